"""The latent cache: what the autoencoder makes of every sample, encoded once and read many times.

A cache is a folder: ``ledger.json`` and the shards ``latents-00000-of-00016.array_record`` it lists. A shard holds the
passes of some raw samples, pass by pass, so that the ledger's counts alone say where the records of a pass lie.

One ArrayRecord record is one pass of one sample, little-endian, without padding:

    4s   magic "SPL1"
    B    flags: 1 = log-variances are stored, 2 = a second view, flipped left to right, is stored,
         4 = the target alone: there is neither image nor prompt
    B    id of the pass, see ``tasks``; the ledger's ``passes`` names it
    B    c   latent channels
    B    channels of the target where they are fewer (image and prompt have features as well), else 0
    H    h   latent height
    H    w   latent width
    i    label: class or -1
    H    n   bytes of the key
    n s  key, UTF-8
    then for each view (as it is[, flipped]):
      3 x h*w*c float16        latent means of image, prompt, target (or 1 x); already times 0.18215
      [3 x h*w*c float16       their log-variances (or 1 x)]
      ceil(h*w/8) bytes        valid mask, row by row, first cell in the highest bit: 1 where all 8x8 pixels are valid

A flipped view is flipped in pixels and then encoded (a flipped latent is not the latent of the flipped picture); in the
pass flow_x the target changes its sign.

The ledger records the settings, the ids of the passes, and of each shard its counts, size and SHA-256. ArrayRecord
also checks every chunk it reads, so a damaged record is found by whoever reads it.
"""

import bisect
import hashlib
import os
import resource
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain_os, not_damage
from scaling_perception.support.files import atomic_path, read_json
from scaling_perception.support.remote import local
from scaling_perception.tasks import ALL_PASSES, FIELDS, TaskOptions

FORMAT = 1
LEDGER = "ledger.json"
PART_LEDGERS = "ledger-part-*-of-*.json"
_HEAD = struct.Struct("<4sBBBBHHiH")
_MAGIC = b"SPL1"
_LOGVAR, _FLIPPED, _ALONE = 1, 2, 4
_MOST_READERS = 512
_UNLISTED = {one.name: one.id for one in ALL_PASSES if one.id < 5}  # in caches without a table of passes


def encode_record(pass_id: int, label: int, key: str, views: Sequence[Mapping[str, np.ndarray]]) -> bytes:
    """One record.

    Args:
        pass_id: see ``tasks``. label: class or -1. key: stable sample id.
        views: one or two (the second flipped) of: image, prompt, target (h, w, c) float16; valid (h, w) bool; and
            image_logvar, prompt_logvar, target_logvar (h, w, c) float16, all or none. Image and prompt may be absent.
            The target may have fewer channels than the two.
    """
    name = key.encode()
    means = FIELDS if "image" in views[0] else ("target",)
    (h, w, c), own = views[0][means[0]].shape, views[0]["target"].shape[-1]
    fields = means + tuple(f"{field}_logvar" for field in means if f"{field}_logvar" in views[0])
    flags = (_LOGVAR if len(fields) > len(means) else 0) | (_FLIPPED if len(views) > 1 else 0)
    flags |= 0 if means == FIELDS else _ALONE
    parts = [_HEAD.pack(_MAGIC, flags, pass_id, c, own if own != c else 0, h, w, label, len(name)), name]
    for view in views:
        for field in fields:
            shape = (h, w, own if field.startswith("target") else c)
            if view[field].shape != shape:
                raise ValueError(f"{field} has shape {view[field].shape}, expected {shape}")
            parts.append(np.ascontiguousarray(view[field], "<f2").tobytes())
        parts.append(np.packbits(view["valid"].reshape(-1)).tobytes())
    return b"".join(parts)


def decode_record(data: bytes) -> dict[str, Any]:
    """The inverse of :func:`encode_record`: the fields of the first view, and ``flipped``, those of the second or None.

    Raises:
        ValueError: not such a record.
    """
    head, key, body = split_record(data)
    flags, pass_id, c, h, w, label = head
    means = ("target",) if flags & _ALONE else FIELDS
    names = means + (tuple(f"{field}_logvar" for field in means) if flags & _LOGVAR else ())
    mask, channels = (h * w + 7) // 8, dict.fromkeys(names, c)
    channels |= {name: target_channels(data) for name in names if name.startswith("target")}
    views: list[dict[str, Any]] = []
    at = 0
    for _ in range(2 if flags & _FLIPPED else 1):
        view: dict[str, Any] = {}
        for name in names:
            count = h * w * channels[name]
            view[name] = np.frombuffer(body, "<f2", count, at).reshape(h, w, channels[name])
            at += 2 * count
        bits = np.unpackbits(np.frombuffer(body, np.uint8, mask, at), count=h * w)
        view["valid"] = bits.reshape(h, w).astype(bool)
        at += mask
        views.append(view)
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes are left over")
    common = {"pass_id": np.int32(pass_id), "label": np.int32(label), "key": key}
    return {**views[0], **common, "flipped": views[1] if len(views) > 1 else None}


def split_record(data: bytes) -> tuple[tuple[int, int, int, int, int, int], str, memoryview]:
    """((flags, pass_id, channels, height, width, label), key, the rest) of a record; ValueError when it is none."""
    try:
        magic, flags, pass_id, c, _, h, w, label, length = _HEAD.unpack_from(data)
    except struct.error as error:
        raise ValueError(str(error)) from None
    if magic != _MAGIC:
        raise ValueError(f"starts with {magic!r} instead of {_MAGIC!r}")
    end = _HEAD.size + length
    return (flags, pass_id, c, h, w, label), data[_HEAD.size : end].decode(), memoryview(data)[end:]


def target_channels(data: bytes) -> int:
    """Channels of the target's latent in a record."""
    return data[7] or data[6]


def pass_table() -> dict[str, int]:
    """Name of each pass -> the id by which records know it, as the ledger lists them."""
    return {one.name: one.id for one in ALL_PASSES}


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Write a shard whole or not at all.

    Raises:
        UserError: it cannot be written, such as on a full disk.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    with atomic_path(path) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:  # how the C++ writer reports what the system answered
            reason = str(error).split(";")[0]
            raise UserError(
                f"cannot write {path}: {reason}; free space or choose another --out, then run again"
            ) from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_shard(
    folder: Path, shard: Mapping[str, Any], contents: bool, passes: Mapping[str, int] | None = None
) -> str | None:
    """What is wrong with a shard that the ledger lists (None: nothing).

    Args:
        contents: compare its checksum too, and the records at the ends of each pass with the ledger's counts.
        passes: name -> id, as the ledger lists them.
    """
    path = folder / shard["file"]
    try:
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != shard["bytes"]:
            return f"has {size} bytes instead of {shard['bytes']} (truncated?)"
        if contents and sha256(path) != shard["sha256"]:
            return "does not match its checksum (damaged)"
        return _miscounted(path, shard, passes or _UNLISTED) if contents else None
    except OSError as error:  # says nothing about what is in it
        raise UserError(f"cannot read {explain_os(error, path)}") from None


def _miscounted(path: Path, shard: Mapping[str, Any], passes: Mapping[str, int]) -> str | None:
    """What a whole shard holds else than its row in the ledger says."""
    from grain.sources import ArrayRecordDataSource

    try:
        reader: Any = ArrayRecordDataSource(str(path)) if shard["records"] else ()
        if len(reader) != shard["records"]:
            return f"holds {len(reader)} records instead of {shard['records']} (of another ledger?)"
        start = 0
        for name in sorted(shard["passes"], key=lambda name: passes.get(name, -1)):
            count = shard["passes"][name]
            ends = (start, start + count - 1) if count else ()
            if any(split_record(reader[index])[0][1] != passes.get(name) for index in ends):
                return f"holds other passes than its ledger says (not {count} of {name})"
            start += count
    except (RuntimeError, ValueError, IndexError) as error:
        if why := not_damage(error):
            raise UserError(f"cannot read {path}: {why}") from None
        return f"is damaged ({str(error).split(';')[0]})"
    return None


def read_ledger(folder: Path, name: str = LEDGER, mend: bool = False) -> dict[str, Any]:
    """The ledger of a cache, or the one called ``name`` of a part of it.

    Args:
        mend: take rows that contradict themselves as well: their shards are going to be made again.

    Raises:
        UserError: there is none, it is of another format, or it contradicts itself.
    """
    path = folder / name
    try:
        there = path.is_file()
    except OSError as error:
        raise UserError(f"cannot read {explain_os(error, path)}") from None
    if not there and any(folder.glob(PART_LEDGERS)):
        raise UserError(f"{folder} holds parts of a cache that are not joined: run `prepare ... --latents --merge`")
    if not there:
        raise UserError(f"{folder} is no latent cache ({LEDGER} is missing): make one with `prepare ... --latents`")
    ledger = read_json(path)
    if not isinstance(ledger, dict) or ledger.get("format") != FORMAT:
        raise UserError(f"{path} is not a ledger of format {FORMAT}: prepare the cache again in an empty folder")
    if fault := _fault(ledger):
        raise UserError(f"{path} is damaged ({fault}): restore it, or prepare the cache again in an empty folder")
    rows = ledger["shards"]
    fault = next((found for row in rows if (found := row_fault(row))), None)
    if fault is None and len({row["file"] for row in rows}) < len(rows):
        fault = "a shard is listed twice"
    if fault is None and ledger["complete"] and "part" not in ledger and len(rows) != ledger["settings"]["shards"]:
        fault = f"it lists {len(rows)} of {ledger['settings']['shards']} shards as all"
    if fault and not mend:
        raise UserError(f"{path} is damaged ({fault}): run the same prepare command again, which mends it")
    if "task_options" in ledger["settings"]:  # what it does not say had the value that is now the default
        ledger["settings"]["task_options"] = {**TaskOptions().encoding(), **ledger["settings"]["task_options"]}
    return ledger


_ROW = {"file": str, "records": int, "passes": dict, "bytes": int, "sha256": str}


def _fault(ledger: Mapping[str, Any]) -> str | None:
    settings = ledger.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("shards"), int):
        return "its settings are not there"
    if not isinstance(ledger.get("shards"), list) or not isinstance(ledger.get("complete"), bool):
        return "its list of shards is not there"
    return None


def row_fault(row: Any) -> str | None:
    """What is not there in a shard's row of a ledger, or contradicts itself (None: nothing)."""
    for name, kind in _ROW.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            return f"a shard has no {name}"
    if not isinstance(row.get("bad", []), list):
        return f"{row['file']} has bad samples that are no list"
    if not all(isinstance(count, int) and count >= 0 for count in row["passes"].values()):
        return f"{row['file']} has passes that are no counts"
    if sum(row["passes"].values()) != row["records"]:
        return f"{row['file']} has {row['records']} records, and {sum(row['passes'].values())} by pass"
    return None


class _OpenReaders:
    """The readers of shards that this process used last, over all caches: each is an open file.

    A reader that is dropped closes its file once no thread reads from it.
    """

    def __init__(self) -> None:
        self._readers: OrderedDict[tuple[object, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, cache: object, number: int) -> Any:
        with self._lock:
            reader = self._readers.get((cache, number))
            if reader is not None:
                self._readers.move_to_end((cache, number))
            return reader

    def put(self, cache: object, number: int, reader: Any) -> None:
        # a quarter of what the process may open; opening one takes 0.15 ms, reading a record 0.01 ms
        most = min(max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 2), _MOST_READERS)
        with self._lock:
            self._readers[cache, number] = reader
            while len(self._readers) > most:
                self._readers.popitem(last=False)

    def close(self) -> None:
        with self._lock:
            self._readers.clear()

    def __len__(self) -> int:
        return len(self._readers)


_open_readers = _OpenReaders()


class CacheReader:
    """Random access to the records of a finished cache; may be pickled and used in threads.

    ``reader[i]`` is :func:`decode_record`'s dictionary: image, prompt, target float16 (h, w, c); valid bool (h, w);
    pass_id, label int32; key str; ``flipped``: the same arrays of the flipped view, or None.

    ``path`` may be an address in a bucket, whose copy is read (``support.remote``).

    Raises:
        UserError: no cache, an unfinished one, or a shard that is missing or of the wrong size, naming it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(local(path))
        ledger = read_ledger(self.path)
        if not ledger.get("complete"):
            done, total = len(ledger["shards"]), ledger["settings"]["shards"]
            raise UserError(f"{self.path} is unfinished ({done} of {total} shards): run the same prepare command again")
        self.settings: dict[str, Any] = ledger["settings"]
        self.entries: list[Any] = ledger.get("entries", [])  # digests of the samples' names
        self.class_names: list[str] | None = ledger.get("class_names")
        self._passes: dict[str, int] = ledger.get("passes", _UNLISTED)
        self._order = sorted(self._passes, key=self._passes.__getitem__)  # of the passes in a shard
        self.shards: list[dict[str, Any]] = ledger["shards"]
        self._check(contents=False)
        self._starts = np.cumsum([0, *(shard["records"] for shard in self.shards)]).tolist()
        self._token = object()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the latents."""
        h, w, c = self.settings["latent"]
        return h, w, c

    @property
    def target_channels(self) -> int:
        """Channels of the target's latents; those of image and prompt may have features besides."""
        return self.settings.get("target_channels", self.shape[2])

    @property
    def fields(self) -> tuple[str, ...]:
        """The pictures whose latents the records hold."""
        return tuple(self.settings.get("fields", FIELDS))

    @property
    def flipped(self) -> bool:
        """Whether each record has a flipped view."""
        return self.settings["flips"] == "both"

    @property
    def size(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard["bytes"] for shard in self.shards)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the cache holds, independent of where it lies: its settings and a digest of all checksums."""
        digest = hashlib.sha256("".join(shard["sha256"] for shard in self.shards).encode()).hexdigest()
        return {"settings": self.settings, "records": len(self), "shards_sha256": digest}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_token"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _token=object())  # file handles stay at home

    def __getitem__(self, index: int) -> dict[str, Any]:
        return decode_record(self.raw([index])[0])

    def raw(self, indices: Sequence[int]) -> list[bytes]:
        """The undecoded records at ``indices``, in that order.

        Raises:
            IndexError: outside 0..len-1.
            UserError: a damaged shard, naming it.
        """
        found: list[bytes] = [b""] * len(indices)
        by_shard: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"record {index} of {len(self)}")
            by_shard.setdefault(bisect.bisect_right(self._starts, index) - 1, []).append(place)
        for number, places in by_shard.items():
            local = [int(indices[place]) - self._starts[number] for place in places]
            for place, record in zip(places, self._read(number, local), strict=True):
                found[place] = record
        return found

    def _read(self, number: int, local: list[int]) -> Sequence[bytes]:
        from grain.sources import ArrayRecordDataSource

        shard = self.shards[number]
        path = self.path / shard["file"]

        def read() -> Sequence[bytes]:
            reader: Any = _open_readers.get(self._token, number)
            if reader is None:
                # a source for each shard: one for all of them would never close a file
                reader = ArrayRecordDataSource(str(path))
                if len(reader) != shard["records"]:
                    raise RuntimeError(f"holds {len(reader)} records instead of {shard['records']}")
                _open_readers.put(self._token, number, reader)
            return [reader[index] for index in local]  # twice as fast as all at once

        try:
            try:
                return read()
            except RuntimeError as error:
                if not_damage(error) is None:
                    raise
                _open_readers.close()  # what is short may be open files
                return read()
        except (RuntimeError, ValueError, IndexError) as error:
            if why := not_damage(error):
                raise UserError(f"cannot read {path}: {why}") from None
            raise UserError(
                f"{path} is damaged ({str(error).split(';')[0]}): delete it and run the same prepare command again"
            ) from None

    def everything(self) -> Iterator[list[bytes]]:
        """All records, shard by shard, each shard's checksum compared first.

        Raises:
            UserError: a damaged shard, naming it.
        """
        for number, shard in enumerate(self.shards):
            self._refuse(shard, check_shard(self.path, shard, True, self._passes))
            if shard["records"]:
                yield list(self._read(number, list(range(shard["records"]))))

    def verify(self) -> None:
        """Compare every shard's size and checksum with the ledger.

        Raises:
            UserError: a shard is missing, truncated or damaged, naming it.
        """
        self._check(contents=True)

    def _check(self, contents: bool) -> None:
        for shard in self.shards:
            self._refuse(shard, check_shard(self.path, shard, contents, self._passes))

    def _refuse(self, shard: Mapping[str, Any], problem: str | None) -> None:
        if problem:
            raise UserError(f"{self.path / shard['file']} {problem}: delete it and run the same prepare command again")

    def indices(self, pass_name: str) -> np.ndarray:
        """int64 indices of the records of a pass, in the order of the source; empty when the cache has none."""
        ranges = []
        for start, shard in zip(self._starts, self.shards, strict=False):
            for name in self._order:
                count = shard["passes"].get(name, 0)
                if name == pass_name:
                    ranges.append(np.arange(start, start + count, dtype=np.int64))
                start += count
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)
