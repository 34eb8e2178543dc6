"""Which samples two sets of batches share: what is held out must not be trained on, under whatever name.

A sample is its picture. Procedural pictures are their numbers; pictures of files are the hashes of the files; what is
in a cache is known by both, and by a digest of the picture as it was encoded. A cache of before, which has neither, is
compared by the latents themselves. A key alone tells nothing: two folders may name other pictures alike.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from scaling_perception.data.latents import CacheReader, read_ledger, split_record
from scaling_perception.data.ledger import samples_of
from scaling_perception.data.pipeline import Batches
from scaling_perception.data.sources import ENDLESS

_CHUNK = 1024  # records read at once


def shared_samples(held: Batches, training: Any) -> list[str]:
    """The names of the samples of ``held`` that ``training`` has, too, sorted."""
    latents = any(_bare(reader) for side in (held, training) for reader in _readers(side))
    one, two = _Marks(held, latents), _Marks(training, latents)
    found = set()
    for family, ranges in one.ranges.items():
        for own in ranges:
            for other in two.ranges.get(family, ()):
                both = range(max(own.start, other.start), min(own.stop, other.stop))
                found.update(_name(family, number) for number in both)
    for family, marks in one.digests.items():
        found.update(marks[digest] for digest in marks.keys() & two.digests.get(family, {}).keys())
    return sorted(found)


class _Marks:
    """What the samples of batches are known by.

    Attributes:
        ranges: family -> numbers of procedural pictures, or places in a data set of tensorflow-datasets.
        digests: ``file``, ``picture`` or ``latent`` -> digest -> the sample's key.
    """

    def __init__(self, batches: Batches, latents: bool) -> None:
        self.ranges: dict[str, list[range]] = {}
        self.digests: dict[str, dict[str, str]] = {"file": {}, "picture": {}, "latent": {}}
        for reader in _readers(batches):
            self._cache(reader, latents)
        for row in batches.sources:
            self._numbers(row)
        for name, (source, chosen, _) in batches.opened.items():
            if hasattr(source, "file_paths"):
                for index in chosen:
                    path = source.file_paths([index])[1][0]
                    self.digests["file"][batches.files[f"{name}/{path}"]] = path

    def _cache(self, reader: CacheReader, latents: bool) -> None:
        procedural = all([self._numbers(row) for row in reader.settings.get("sources", [])])
        numbered = procedural and all(
            row["source"]["name"] not in ENDLESS for row in reader.settings.get("sources", [])
        )
        for key, picture, file in () if numbered else samples_of(reader.path, read_ledger(reader.path)) or ():
            self.digests["picture"][picture] = key
            if file:
                self.digests["file"][file] = key
        if latents and not procedural:
            self.digests["latent"].update(_latents(reader))

    def _numbers(self, row: Mapping[str, Any]) -> bool:
        """Note the numbers of a row of sources, if its samples have any; whether they do."""
        found = _range(row)
        if found is not None:
            self.ranges.setdefault(found[0], []).append(found[1])
        return found is not None


def _range(row: Mapping[str, Any]) -> tuple[str, range] | None:
    from scaling_perception.data.sources.scenes import SPLIT_STARTS
    from scaling_perception.data.sources.texture_classes import SPLIT_STARTS as TEXTURE_STARTS

    source, first, count = row["source"], row["first"], row["count"]
    if (name := source["name"]) in ENDLESS:
        first += SPLIT_STARTS[source.get("split", "train")] + source.get("start", 0)
        return name.removesuffix("s"), range(first, first + count)
    if source["name"] == "textures":
        first += TEXTURE_STARTS[source["split"]]
        return "texture", range(first, first + count)
    if about := source.get("dataset"):
        return f"{about['name']} {about['version']} {about['split']}", range(first, first + count)
    return None


def _name(family: str, number: int) -> str:
    """The key of a procedural picture, as its cache has it; of other families a description."""
    return f"{family}-{number:010d}" if f"{family}s" in ENDLESS else f"{family} {number}"


def _readers(batches: Batches) -> list[CacheReader]:
    return batches.cached.readers if batches.cached else []


def _bare(reader: CacheReader) -> bool:
    """Whether a cache says nothing of its pictures."""
    numbered = all(_range(row) is not None for row in reader.settings.get("sources", []))
    return not numbered and samples_of(reader.path, read_ledger(reader.path)) is None


def _latents(reader: CacheReader) -> Iterator[tuple[str, str]]:
    """(digest of the latent of its picture, key) of every record."""
    for start in range(0, len(reader), _CHUNK):
        for record in reader.raw(np.arange(start, min(start + _CHUNK, len(reader))).tolist()):
            (_, _, c, h, w, _), key, body = split_record(record)  # of image, prompt and target the image comes first
            yield hashlib.blake2b(body[: 2 * h * w * c], digest_size=16).hexdigest(), key
