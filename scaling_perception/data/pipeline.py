"""Batches as a pure function of the step: resuming a run needs nothing but the step and a fingerprint.

For each source and pass: all samples, shuffled anew each epoch, without end. These streams are mixed by weight into one
global stream; its element i says which sample and whether it is flipped, drawn from (seed, i) alone. Batch s is the
elements s * B .. (s+1) * B - 1; of several processes each takes those at the places that its devices hold, so the
global batch is the same whatever the processes. Only then are samples read: from a latent cache, or rendered or read
and encoded by their task.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from scaling_perception.data.augment import Augment, Flip, flip_sample
from scaling_perception.data.cached import Cached
from scaling_perception.data.contents import contents_of, described
from scaling_perception.data.latents import CacheReader
from scaling_perception.data.selection import chosen_records, classes_of, open_subset
from scaling_perception.data.workers import Made, Reading, in_thread, spread
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.places import split_places
from scaling_perception.tasks import TaskOptions, fields_of, get_task

_KEYS = ("cache", "mixture", "flip", "augment", "workers", "resolution", "task_options")
_ENTRY_KEYS = ("source", "root", "split", "task", "count", "weight", "resolution", "start")
_ORDER = 1  # raise it when the order of samples changes for the same settings: old runs must not resume on it
_LONGEST = 20_000  # characters of a fingerprint's rows: more are recorded by their digest
_AHEAD = 4  # batches of latents


class Element(NamedTuple):
    """One element of the global stream: which stream it comes from, which sample of it, and how it is changed.

    ``flip``: it is mirrored. ``draw``: the seed of its augmentation, 0 where there is none.
    """

    stream: int
    index: int
    flip: bool
    draw: int = 0


class Stream(NamedTuple):
    """One pass of one source: ``length`` samples, and its share of the global stream."""

    name: str
    pass_name: str
    length: int
    weight: float


class _Online:
    """Samples read or rendered when they are needed, as pixels."""

    def __init__(
        self, entries: list[tuple[str, dict[str, Any]]], resolution: int, options: TaskOptions, augment: Augment
    ):
        if resolution < 1:
            raise UserError("data.resolution is missing: without a cache it says how large the pictures shall be")
        if not entries:
            raise UserError("data has neither cache nor mixture: set data.cache, or data.mixture.NAME with its source")
        self.entries, self.resolution, self.options, self.augment = entries, resolution, options, augment
        kinds = {entry["task"]: fields_of(entry["task"]) for _, entry in entries}
        self.fields = next(iter(kinds.values()))
        if set(kinds.values()) != {self.fields}:
            raise UserError(f"data.mixture has {', '.join(kinds)}: generation has no conditions, so train it alone")
        self.opened: dict[str, tuple[Any, range, str]] = {}
        self.files: dict[str, str] = {}  # entry/path -> hash of its content, once the fingerprint was taken
        for name, entry in entries:
            augment.check(get_task(entry["task"]))
            where = (entry["source"], entry.get("root", ""), entry.get("split", "train"), entry["task"])
            size = entry.get("resolution", 0) or resolution
            source, chosen = open_subset(*where, entry.get("count", 0), entry.get("start", 0), size)
            self.opened[name] = (source, chosen, entry["task"])
        self.passes = [stream[:2] for stream in self.streams()]  # by number of the stream

    def __reduce__(self) -> tuple[Any, ...]:  # a worker opens the sources itself
        return Made, (_Online, (self.entries, self.resolution, self.options, self.augment))

    def fingerprint(self) -> list[dict[str, Any]]:
        rows = []
        for name, (source, chosen, task) in self.opened.items():
            found = contents_of(source, chosen)
            self.files |= {f"{name}/{path}": made for path, made in found.items()}
            about = {"name": name, "task": task, "first": chosen.start, "count": len(chosen)}
            rows.append({**about, "source": described(source, found)})
        return rows

    def streams(self) -> list[Stream]:
        """One stream for each pass of each entry."""
        found = []
        for name, entry in self.entries:
            passes, length = get_task(entry["task"]).passes, len(self.opened[name][1])
            found += [Stream(name, one.name, length, _weight(name, entry) / len(passes)) for one in passes]
        return found

    def __call__(self, element: Element) -> dict[str, Any]:
        """The sample: image, prompt, target float32 (R, R, 3); valid bool (R, R); pass_id, label; key."""
        name, pass_name = self.passes[element.stream]
        source, chosen, task = self.opened[name]
        what = get_task(task)
        raw = source[chosen[element.index]]
        made = self.augment.encode(what, raw, self.resolution, self.options, element.draw)
        sample = made[[one.name for one in what.passes].index(pass_name)]
        return flip_sample(sample) if element.flip else sample

    def stacked(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples as a batch: pixels float32 (B, R, R, 3), valid bool (B, R, R), pass_id, label int32 (B,), key."""
        out: dict[str, Any] = {field: np.stack([s[field] for s in samples]) for field in (*self.fields, "valid")}
        for field in ("pass_id", "label"):
            out[field] = np.array([s[field] for s in samples], np.int32)
        return {**out, "key": [s["key"] for s in samples]}


class Batches:
    """Batches of a mixture, see :func:`open_batches`.

    A batch holds image, prompt, target float32 (B, h, w, c) latents or (B, R, R, 3) pixels; valid bool (B, h, w) or
    (B, R, R); pass_id and label int32 (B,); key, a list of B sample ids; fewer than B after :meth:`holding`.
    Of generation there is the target alone, and with a cache its ``target_logvar`` where the autoencoder has one.
    """

    def __init__(
        self,
        data: dict[str, Any],
        batch_size: int,
        seed: int,
        in_memory: bool | None = None,
    ):
        _check_keys(data, _KEYS, "data")
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: give a whole number above 0")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed {seed} must be in 0..{2**32 - 1}")
        self._size = self._count = batch_size  # of the whole batch, and what is read of it
        self._seed = int(seed)
        self._workers = int(data.get("workers") or 0)
        self._flip = bool(data.get("flip", False))
        self._augment = Augment.from_dict(dict(data.get("augment") or {}))
        options = TaskOptions.from_dict(dict(data.get("task_options") or {}))
        entries = _entries(dict(data.get("mixture") or {}))
        cache = data.get("cache") or []
        paths = split_places(cache) if isinstance(cache, str) else [str(path) for path in cache]
        self.cached: Cached | None = Cached(paths, self._flip, in_memory) if paths else None
        self.online: _Online | None = None
        self._picked: list[np.ndarray] = []  # cached only: the records of each stream
        if self.cached:
            if names := self._augment.names:
                raise UserError(
                    f"data.augment.{names[0]} changes pictures, and data.cache holds latents of them as they are: "
                    "leave it out, or set data.cache='' to read and encode the pictures"
                )
            _same_encoding(self.cached.readers[0], int(data.get("resolution") or 0), options)
            self.streams = self._cached_streams(entries)
        else:
            self.online = _Online(entries, int(data.get("resolution") or 0), options, self._augment)
            self.streams = self.online.streams()
        self._stream: Any = _global_stream(self.streams, self._seed, Flip(self._flip), bool(self._augment.names))
        self._held = self._stream  # the elements that are read
        self.fingerprint = self._fingerprint(options)

    def _cached_streams(self, entries: list[tuple[str, dict[str, Any]]]) -> list[Stream]:
        assert self.cached is not None
        if not entries:
            held = {name for reader in self.cached.readers for name in reader.settings["tasks"]}
            entries = [(name, {"task": name}) for name in sorted(held)]
        streams = []
        for name, entry in entries:
            passes = get_task(entry["task"]).passes
            for one in passes:
                chosen = chosen_records(self.cached.readers, name, entry, one.name)
                self._picked.append(chosen)
                streams.append(Stream(name, one.name, len(chosen), _weight(name, entry) / len(passes)))
        return streams

    @property
    def autoencoders(self) -> set[str]:
        """Ids of the autoencoders that made the cached latents; empty without a cache."""
        return {reader.settings["autoencoder"] for reader in self.cached.readers} if self.cached else set()

    @property
    def class_count(self) -> int:
        """The largest number of classes that a cache or source has, 0 where none says."""
        return _classes(self._rows)

    @property
    def class_names(self) -> list[str] | None:
        """See ``selection.classes_of``."""
        return classes_of(self.cached.readers if self.cached else [source for source, *_ in self.opened.values()])

    @property
    def opened(self) -> dict[str, tuple[Any, range, str]]:
        """Entry -> (source, samples that are used, task); {} with a cache."""
        return self.online.opened if self.online else {}

    @property
    def files(self) -> dict[str, str]:
        """Entry/path -> hash of the content of every file that is read; {} with a cache."""
        return self.online.files if self.online else {}

    def _fingerprint(self, options: TaskOptions) -> dict[str, Any]:
        held = self.cached or self.online
        assert held is not None
        rows = held.fingerprint()
        self._rows, self.sources = rows, rows if self.online else []
        made = {
            "order": _ORDER,
            "seed": self._seed,
            "batch_size": self._size,
            "flip": self._flip,
            "streams": [list(stream) for stream in self.streams],
            "task_options": options.to_dict(),
            "resolution": self.online.resolution if self.online else None,
            "caches" if self.cached else "sources": _jsonable(rows),
        }
        return made | ({"augment": self._augment.to_dict()} if self._augment.names else {})  # none: as of before

    def holding(self, places: Sequence[int]) -> "Batches":
        """The same batches, of which only the samples at ``places`` (0 .. B - 1) are read, in that order."""
        if not places or not 0 <= min(places) <= max(places) < self._size:
            raise ValueError(f"places {places} of a batch of {self._size}")
        held = copy.copy(self)
        held._held, held._count = _Places(self._stream, self._size, places), len(places)
        return held

    def elements(self, step: int) -> list[Element]:
        """Which samples batch ``step`` holds, at the places that are read."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        return [self._held[step * self._count + place] for place in range(self._count)]

    def at(self, step: int) -> dict[str, Any]:
        """The batch of ``step``, the same every time and in every process that shares its settings."""
        elements = self.elements(step)
        if self.cached:
            return self._gathered(_order(elements))
        assert self.online is not None
        return self.online.stacked([self.online(element) for element in elements])

    def iterate(self, start: int) -> Reading:
        """``at(start)``, ``at(start + 1)``, … without end, read ahead; ``close`` it.

        Made in ``data.workers`` processes, else in a thread. With a cache these settle the order alone, a batch at a
        time, and a thread gathers. Else they read or render, a sample at a time, so that all work on the next batch and
        end at once.
        """
        elements = self._held[start * self._count :]
        if self.cached:
            orders = elements.batch(self._count, batch_fn=_order)
            if self._workers <= 1:
                return Reading(spread(orders.map(self._gathered), 1, _AHEAD))
            return Reading(in_thread(spread(orders, self._workers, _AHEAD).map(self._gathered), _AHEAD))
        assert self.online is not None
        samples = spread(elements.map(self.online), self._workers, -(-self._count // max(1, self._workers)))
        return Reading(samples.batch(self._count, batch_fn=self.online.stacked))

    def _gathered(self, order: np.ndarray) -> dict[str, Any]:
        assert self.cached is not None
        indices = np.array([self._picked[stream][index] for stream, index in order[:, :2].tolist()])
        return self.cached.batch(indices, order[:, 2] != 0)


def open_batches(data_config: Any, batch_size: int, seed: int) -> Batches:
    """Open the batches that a config describes.

    Args:
        data_config: mapping or ConfigDict: ``cache`` (a folder; several as a list, or joined by colons; '' for
            online), ``mixture`` {name: {source, root, split, task, count, start, weight, resolution}},
            ``flip``, ``augment``, ``workers``, ``resolution``, ``task_options``. With a cache an entry
            chooses of its records (``selection.chosen_records``); without entries all tasks of it weigh the same. A
            task's passes share its weight equally.
        batch_size: global batch size B.
        seed: of order, flips and augmentation.

    Returns:
        Whole batches; where several processes run, each takes its own places of them: :meth:`Batches.holding`.

    Raises:
        UserError: an unknown field, source or task, a cache that is damaged or does not fit, an impossible batch size.
    """
    data = data_config.to_dict() if hasattr(data_config, "to_dict") else dict(data_config)
    return Batches(data, batch_size, seed)


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in values:
        if name not in known:
            raise UserError(f"unknown field {where}.{name}{did_you_mean(name, known)}")


def _entries(mixture: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The mixture's entries of non-zero weight, by name: their order must not depend on how the config was written."""
    entries = []
    for name in sorted(mixture):
        entry = dict(mixture[name])
        _check_keys(entry, _ENTRY_KEYS, f"data.mixture.{name}")
        if "task" not in entry:
            raise UserError(f"data.mixture.{name} has no task: set data.mixture.{name}.task")
        if _weight(name, entry) > 0:
            entries.append((name, entry))
    if mixture and not entries:
        raise UserError("every weight in data.mixture is 0: give one entry a positive weight")
    return entries


def _weight(name: str, entry: Mapping[str, Any]) -> float:
    weight = float(entry.get("weight", 1.0))
    if not 0 <= weight < float("inf"):
        raise UserError(f"data.mixture.{name}.weight is {weight}: give a number of at least 0")
    return weight


def _same_encoding(reader: CacheReader, resolution: int, options: TaskOptions) -> None:
    """Refuse a cache that was made for another resolution or other task options than the config says."""
    if resolution and reader.settings["resolution"] != resolution:
        made = reader.settings["resolution"]
        raise UserError(
            f"{reader.path} was prepared at {made} pixels and resolution is {resolution}: set resolution={made} or "
            "prepare another cache"
        )
    for name, value in options.encoding().items():
        made = reader.settings["task_options"][name]
        if made != value:
            raise UserError(
                f"{reader.path} was prepared with task_options.{name}={made}, not {value}: set it so, or prepare "
                "another cache"
            )


class _Places(grain.MapDataset):
    """The elements at ``places`` of each batch of ``size``, batch after batch."""

    def __init__(self, stream: grain.MapDataset, size: int, places: Sequence[int]) -> None:
        super().__init__(stream)
        self._size, self._places = size, list(places)

    def __len__(self) -> int:
        return len(self._parent) // self._size * len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, place = divmod(index, len(self._places))
        return self._parent[step * self._size + self._places[place]]


def _order(elements: Sequence[Element]) -> np.ndarray:
    """Elements as int64 (n, 3), which pickles ten times as fast."""
    return np.array([element[:3] for element in elements], np.int64)


def _global_stream(streams: list[Stream], seed: int, flip: Flip, augmented: bool) -> grain.MapDataset:
    parts = []
    for number, stream in enumerate(streams):
        # a seed of its own: streams of one length would otherwise show the same scene in the same batch
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        part = grain.MapDataset.range(stream.length).seed(own).shuffle().repeat(None)
        parts.append(part.map(lambda index, number=number: (number, int(index))))
    mixed = grain.MapDataset.mix(parts, [stream.weight for stream in streams]) if len(parts) > 1 else parts[0]

    def choose(element: tuple[int, int], rng: np.random.Generator) -> Element:
        return Element(*element, flip(rng), int(rng.integers(2**63)) if augmented else 0)

    return mixed.seed(seed).random_map(choose)


def _jsonable(value: Any) -> Any:
    """``value`` as JSON gives it back (tuples become lists), long ones with their digest alone."""
    text = json.dumps(value, sort_keys=True)
    if len(text) > _LONGEST:
        return {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.loads(text)


def _classes(value: Any) -> int:
    if isinstance(value, Mapping):
        own = value.get("classes")
        return max([own if isinstance(own, int) else 0, *map(_classes, value.values())])
    return max(map(_classes, value), default=0) if isinstance(value, list) else 0
