"""Hypersim (Roberts et al. 2021) as Marigold prepares it: 8-bit RGB and planar depth in millimetres; facts 5.1."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.data.sources.base import Entry, FileSource, file_sizes
from scaling_perception.data.sources.lists import list_path, read_list
from scaling_perception.support.errors import UserError

FOCAL = 886.81
"""Pixels, at 1024x768 (facts 5.1)."""


class Hypersim(FileSource):
    """A list of ``rgb depth`` lines, and the PNG files that it names.

    The list is ``list`` (or ``list_file``) if given, else the first of ``filename_list_<split>_filtered.txt``,
    ``filename_list_<split>.txt`` (Marigold's names) and ``filename_list.txt``, in ``root`` or in ``root/<split>``. A
    plain ``filename_list.txt`` is what its folder holds, whichever split is asked for: keep one folder a split. Its
    names are relative to the list's folder or to ``root``.
    """

    NAME = "hypersim"
    TASKS = ("depth",)
    SPLITS = ("train", "val", "test", "val_small", "all")
    LAYOUT = "filename_list.txt with lines 'rgb.png depth.png', and those files"
    depth_scale = 1000.0
    depth_range = (1e-5, 65.0)

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        task: str = "depth",
        *,
        count: int = 0,
        list: str = "",
        list_file: str = "",
    ) -> None:
        self.list_file = list or list_file
        super().__init__(root, split, task, count=count)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "list_file": Path(self.list_file).name}

    def find(self) -> list[Entry]:
        path = self._list_path()
        pairs = [(words[0], words[1]) for words in read_list(path, ("rgb.png", "depth.png"))]
        prefix = self._prefix(path, pairs[0][0])
        return [
            Entry(image.removesuffix(".png"), {"image": prefix + image, "depth": prefix + depth})
            for image, depth in pairs
        ]

    def _list_path(self) -> Path:
        if self.list_file:
            return list_path(self.root, self.list_file)
        for kind in (f"_{self.split}_filtered", f"_{self.split}", ""):
            name = f"filename_list{kind}.txt"
            for folder in (self.root, self.root / self.split):
                if (folder / name).is_file():
                    if not kind and folder == self.root and self.root.name != self.split:
                        self.not_split()
                    return folder / name
        path = self.root / "filename_list.txt"
        raise UserError(f"{path} is missing: write it, one line 'rgb.png depth.png' a sample, or give list")

    def _prefix(self, path: Path, first: str) -> str:
        """Where the listed names start, relative to root: the first place that holds the first file."""
        inside = path.parent.is_relative_to(self.root)
        folders = [path.parent.relative_to(self.root).as_posix()] if inside else []
        for folder in (*folders, ".", self.split):
            prefix = "" if folder == "." else f"{folder}/"
            if file_sizes(self.root, [prefix + first]):
                return prefix
        return "" if not folders or folders[0] == "." else f"{folders[0]}/"

    def __getitem__(self, index: int) -> dict[str, Any]:
        raw = super().__getitem__(index)
        if raw["image"].shape[:2] == (768, 1024):
            raw["intrinsics"] = np.array([[FOCAL, 0, 511.5], [0, FOCAL, 383.5], [0, 0, 1]], np.float32)
        return raw
