"""Which samples of a dataset or records of caches an entry of the mixture means: honoured or refused, never ignored."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from scaling_perception.data.latents import CacheReader
from scaling_perception.support.errors import UserError


def open_subset(
    name: str, root: str, split: str, task: str, count: int = 0, start: int = 0, resolution: int = 0, **chosen: Any
) -> tuple[Any, range]:
    """A source and the indices of it to use: ``count`` (0 = all) from ``start`` on.

    The sources of ``ENDLESS`` take ``start``, ``count`` and the ``resolution`` to render at themselves; ``chosen`` are
    further options of the source.

    Raises:
        UserError: unknown source, wrong folder, or a range outside of the source.
    """
    from scaling_perception.data import sources

    if start < 0 or count < 0:
        raise UserError(f"{name}: count {count} and start {start} must not be negative")
    if name in sources.ENDLESS:
        options: dict[str, Any] = {"start": start}
        options |= {"count": count} if count else {}
        options |= {"resolution": resolution} if resolution else {}
        source = sources.open_source(name, root, split, task, **{**chosen, **options})
        return source, range(len(source))
    source = sources.open_source(name, root, split, task, **chosen)
    if getattr(source, "whole", False) and split not in ("train", "all", ""):
        raise UserError(
            f"{root} has no splits, so that split '{split}' would be everything: make one (see {name} in "
            "docs/own_data.md), or leave it out and choose a part by start and count"
        )
    end = start + count if count else len(source)
    if end > len(source) or start >= end:
        raise UserError(f"{name} ({split}) has {len(source)} samples, not {start}..{end - 1}: change start or count")
    return source, range(start, end)


def chosen_records(readers: Sequence[CacheReader], name: str, entry: Mapping[str, Any], pass_name: str) -> np.ndarray:
    """Indices (int64), over all caches one after the other, of a pass's records that ``data.mixture.name`` asks for.

    Of several caches those count that were prepared from its ``source`` and ``split``, where it names them; of their
    records those from place ``start`` of the dataset on, and ``count`` of them.

    Raises:
        UserError: it names a folder with other samples, or a dataset, a split or a range that no cache holds.
    """
    where, field = ", ".join(str(reader.path) for reader in readers), f"data.mixture.{name}"
    wanted = {"dataset": entry.get("source"), "split": entry.get("split"), "resolution": entry.get("resolution")}
    wanted = {setting: value for setting, value in wanted.items() if value}
    parts, first = [], 0
    for reader in readers:
        if all(reader.settings.get(setting, value) == value for setting, value in wanted.items()):
            if entry.get("root"):
                _of_folder(reader, entry, field)
            places = reader.indices(pass_name)
            if start := entry.get("start", 0):
                places = places[positions(reader.settings, reader.shards, entry["task"]) >= start]
            parts.append(places + first)
        first += len(reader)
    if not parts:
        held = "; ".join(" ".join(str(reader.settings.get(s)) for s in wanted) for reader in readers)
        raise UserError(
            f"{field} asks for {' '.join(map(str, wanted.values()))} ({', '.join(wanted)}) and {where} holds "
            f"{held}: leave that out of the mixture, or prepare another cache"
        )
    found, count = np.concatenate(parts), entry.get("count", 0)
    if not any(len(reader.indices(pass_name)) for reader in readers):
        refuse_absent(field, entry["task"], where)
    if not len(found) or len(found) < count:
        after = f" from {entry['start']} on" if entry.get("start", 0) else ""
        raise UserError(
            f"{field} asks for {count or 'samples'}{after} of {entry['task']}, and {where} holds {len(found)}: "
            "set count and start to 0 for all of them, or prepare another cache"
        )
    return found[:count] if count else found


def refuse_absent(field: str, task: str, where: str) -> NoReturn:
    """Raise UserError: ``field`` of a mixture asks for a task of which ``where`` holds nothing."""
    raise UserError(
        f"{field} asks for {task}, which {where} does not hold: prepare a cache with --tasks {task}, or leave it out "
        "of the mixture"
    )


def _of_folder(reader: CacheReader, entry: Mapping[str, Any], field: str) -> None:
    """Refuse a root that holds other samples than the cache was prepared from."""
    from scaling_perception.data.sources import open_source

    dataset, split = reader.settings["dataset"], entry.get("split") or reader.settings["split"]
    found = open_source(dataset, entry["root"], split, entry["task"]).fingerprint().get("entries")
    rows = zip(reader.settings["sources"], reader.entries, strict=False)
    if any(entry["task"] in row["tasks"] and held != found for row, held in rows):
        raise UserError(
            f"{field}.root is {entry['root']}, which holds other samples than {reader.path} was prepared from: leave "
            "root out to read the cache, or data.cache to read the folder"
        )


def samples_taken(batches: Any) -> list[str]:
    """A line for each entry of the mixture: how many samples train, of how many, and from where.

    Args:
        batches: ``pipeline.Batches``; others have nothing to say.
    """
    from scaling_perception.data.sources import taken

    lines = []
    if online := getattr(batches, "online", None):
        for name, entry in online.entries:
            source, chosen, task = online.opened[name]
            where = entry["source"], entry.get("root", ""), entry.get("split", "train"), task
            line = taken(source, *where, every=f"data.mixture.{name}.split=all")
            lines.append(line if len(chosen) == len(source) else f"{line}; {len(chosen)} of them, from {chosen.start}")
            lines += [f"note: {note}" for note in getattr(source, "notes", ())]
    elif cached := getattr(batches, "cached", None):
        where = ", ".join(
            f"{r.settings['dataset']} ({r.settings['split'] or 'all'}) in {r.path}" for r in cached.readers
        )
        for stream in batches.streams:
            total = sum(len(reader.indices(stream.pass_name)) for reader in cached.readers)
            count = f"{stream.length}" if stream.length == total else f"{stream.length} of {total}"
            lines.append(f"{count} records of {stream.pass_name}: {where}")
    return lines


def classes_of(held: Sequence[Any]) -> list[str] | None:
    """The names of the classes of sources or caches by label, None where none knows them.

    Raises:
        UserError: two of them number their classes in other ways.
    """
    known = [names for one in held if (names := getattr(one, "class_names", None))]
    if any(names != known[0] for names in known):
        raise UserError("data.mixture: its sources or caches have other classes: prepare them with one labels.txt")
    return known[0] if known else None


def positions(settings: Mapping[str, Any], shards: Sequence[Mapping[str, Any]], task: str) -> np.ndarray:
    """Places in its dataset of the records of a pass of ``task``, int64, in their order; bad samples have none."""
    bad = {row["index"] for shard in shards for row in shard["bad"]}
    offset = 0
    for row in settings["sources"]:
        if task in row["tasks"]:
            good = [i for i in range(row["count"]) if offset + i not in bad]
            return np.array(good, np.int64) + row["first"] + row["source"].get("start", 0)
        offset += row["count"]
    return np.zeros(0, np.int64)
