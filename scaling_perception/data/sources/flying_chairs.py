"""FlyingChairs (Dosovitskiy et al. 2015): 22,872 pairs of 512x384 with dense flow; facts 5.2."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from scaling_perception.data.sources.base import Entry, FileSource, list_files
from scaling_perception.support.errors import UserError
from scaling_perception.support.tables import read_text

SPLIT_FILES = ("FlyingChairs_train_val.txt", "chairs_split.txt")
_FLOW = re.compile(r"(?:.*/)?(?P<id>\d+)_flow\.flo")


class FlyingChairs(FileSource):
    """The released folder, or any folder with the same names.

    The split file has one line a pair, in sorted order: 1 is training (22,232 in the release), 2 validation (640).
    ``split='all'`` does not need it.

    Args:
        split_file: its path, where it is neither in ``root`` nor beside ``data/`` under its usual name.
    """

    NAME = "flying_chairs"
    TASKS = ("flow",)
    LAYOUT = "data/NNNNN_img1.ppm, data/NNNNN_img2.ppm, data/NNNNN_flow.flo and FlyingChairs_train_val.txt"

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        task: str = "flow",
        *,
        count: int = 0,
        split_file: str = "",
    ) -> None:
        self.split_file = split_file
        super().__init__(root, split, task, count=count)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "split_file": Path(self.split_file).name}

    def find(self) -> list[Entry]:
        folder = next((f for f in ("data", "FlyingChairs_release/data") if (self.root / f).is_dir()), "")
        prefix = f"{folder}/" if folder else ""
        ids, frames = [], set()
        for path in list_files(self.root, folder):
            name = path.removeprefix(prefix)
            if "/" in name:
                continue
            if name.endswith(".ppm"):
                frames.add(name)
            if match := _FLOW.fullmatch(name):
                ids.append(match["id"])
        if len(frames) != 2 * len(ids):
            wanted = {f"{one}_img{number}.ppm" for one in ids for number in (1, 2)}
            lost, extra = sorted(wanted - frames), sorted(frames - wanted)
            which = f"{lost[0]} is missing" if lost else f"{extra[0]} has no flow"
            raise UserError(
                f"{self.root / folder} holds {len(frames)} .ppm frames and {len(ids)} .flo files ({which}): "
                "every flow needs two frames, so restore the missing files"
            )
        chosen = ids if self.split == "all" or not ids else self._select(ids, folder)
        return [
            Entry(
                one,
                {
                    "image": f"{prefix}{one}_img1.ppm",
                    "image2": f"{prefix}{one}_img2.ppm",
                    "flow": f"{prefix}{one}_flow.flo",
                },
            )
            for one in chosen
        ]

    def _select(self, ids: list[str], folder: str) -> list[str]:
        path = self._split_path(folder)
        try:
            marks = read_text(path).split()
        except UserError as error:
            raise UserError(f"{error}; it must be text, one 1 or 2 a pair") from None
        for number, mark in enumerate(marks, 1):
            if mark not in ("1", "2"):
                raise UserError(f"{path} entry {number} is '{mark}': it must be 1 (training) or 2 (validation)")
        if len(marks) != len(ids):
            raise UserError(
                f"{path} has {len(marks)} entries but there are {len(ids)} pairs: restore the missing files, "
                "or give split=all"
            )
        wanted = {"train": "1", "val": "2"}[self.split]
        chosen = [one for one, mark in zip(ids, marks, strict=True) if mark == wanted]
        if not chosen:
            raise UserError(f"{path} puts none of {len(ids)} pairs into '{self.split}': take the other split, or all")
        return chosen

    def _split_path(self, folder: str) -> Path:
        if self.split_file:
            path = Path(self.split_file).expanduser()
            return path if path.is_absolute() or path.exists() else self.root / path
        places = [self.root / folder, (self.root / folder).parent, self.root]
        for place in places:
            for name in SPLIT_FILES:
                if (place / name).is_file():
                    return place / name
        raise UserError(f"{self.root / SPLIT_FILES[0]} is missing: download it with the data, or give split=all")
