"""Evaluation sets whose files are found by their names. Each says how they are called; ``Benchmark`` does the rest.

Depth sets are in ``depth_benchmarks``, flow sets in ``flow_benchmarks``. How each is measured is in
``evaluation.protocols``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from scaling_perception.data.sources.base import Entry, FileSource, list_files
from scaling_perception.data.sources.lists import tails

FOLDER = r"(?P<folder>(?:.*/)?)"
_ANYWHERE = "*/"
_BONUS = ("occluded", "invalid_mask", "seen")  # not everyone copies them


class Benchmark(FileSource):
    """Files found by a pattern of the first image.

    ``LAYOUTS`` are tried in order: (pattern of the image's path, field -> templates of which the first that exists
    counts). Templates use the pattern's groups, and ``{next}``: the group ``frame`` plus one, as wide. A template that
    begins with ``*/`` fits a path anywhere that ends with the rest.
    """

    SPLITS = ("val", "test", "all")
    LAYOUTS: Sequence[tuple[str, Mapping[str, tuple[str, ...]]]]
    SPLIT_FOLDERS: ClassVar[Mapping[str, str]] = {}
    """split -> the folder that is that split, where there is one of that name: only what is below it counts."""
    LEAVE_OUT: ClassVar[str] = ""
    """A field that images may lack: those without are left out."""

    def find(self) -> list[Entry]:
        names = within(list_files(self.root), self.SPLIT_FOLDERS.get(self.split, ""))
        known = set(names)
        by_tail: dict[int, dict[str, list[str]]] = {}

        def places(template: str, groups: Mapping[str, str]) -> list[str]:
            path = template.removeprefix(_ANYWHERE).format(**groups)
            if path == template.format(**groups):
                return [path] if path in known else []
            parts = path.count("/") + 1
            if parts not in by_tail:
                by_tail[parts] = tails(names, parts)
            return by_tail[parts].get(path, [])

        for pattern, templates in self.LAYOUTS:
            entries, lost = [], 0
            for name in names:
                if not (match := re.fullmatch(pattern, name)):
                    continue
                groups = match.groupdict()
                if "frame" in groups:
                    groups["next"] = str(int(groups["frame"]) + 1).zfill(len(groups["frame"]))
                files = {"image": name}
                for field, choices in templates.items():
                    found = [place for choice in choices for place in places(choice, groups)]
                    if found or field not in _BONUS:
                        files[field] = found[0] if found else choices[0].removeprefix(_ANYWHERE).format(**groups)
                if files.get(self.LEAVE_OUT, name) not in known:
                    lost += 1
                    continue
                last = "next" in groups and files["image2"] not in known and files["flow"] not in known
                if not last:  # the end of a sequence has neither
                    entries.append(Entry(os.path.splitext(name)[0], files))
            if entries:
                self.leave_out(lost, lost + len(entries))
                return entries
        return []

    def leave_out(self, lost: int, total: int) -> None:
        """Note that ``lost`` of ``total`` images have no truth."""
        if lost:
            self.notes.append(f"{lost} of {total} images have no ground truth and are left out")


def within(names: Sequence[str], folder: str) -> list[str]:
    """Those of the paths that lie below a folder of this name, if any do; else all."""
    inside = [name for name in names if folder in name.split("/")[:-1]] if folder else []
    return inside or list(names)
