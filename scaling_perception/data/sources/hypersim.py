"""Hypersim (Roberts et al. 2021) as it is published, or as Marigold prepares it: 8-bit RGB and planar depth in
millimetres; facts 5.1."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.data.sources import hypersim_raw
from scaling_perception.data.sources.base import Entry, FileSource, LeftOut, file_sizes
from scaling_perception.data.sources.hypersim_raw import FOCAL as FOCAL
from scaling_perception.data.sources.lists import list_path, read_list
from scaling_perception.support.errors import UserError


class Hypersim(FileSource):
    """The published HDF5 frames (``hypersim_raw.LAYOUT``), or a list of ``rgb depth`` lines and the PNG files that it
    names. Both have the same keys, so that their caches are of the same samples.

    Of the published frames those count that the split CSV (``split_file``, else ``metadata_images_split_scene_v1.csv``
    in ``root``) puts into the split and into the public release; or those of ``list``, one of Marigold's.

    The list is ``list`` (or ``list_file``) if given, else the first of ``filename_list_<split>_filtered.txt``,
    ``filename_list_<split>.txt`` (Marigold's names) and ``filename_list.txt``, in ``root`` or in ``root/<split>``. A
    plain ``filename_list.txt`` is what its folder holds, whichever split is asked for: keep one folder a split. Its
    names are relative to the list's folder or to ``root``.
    """

    NAME = "hypersim"
    TASKS = ("depth",)
    SPLITS = ("train", "val", "test", "val_small", "all")
    LAYOUT = f"{hypersim_raw.LAYOUT} with {hypersim_raw.SPLIT_FILE}; or filename_list.txt with the PNG files it names"
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
        split_file: str = "",
    ) -> None:
        self.list_file, self.split_file, self.raw = list or list_file, split_file, False
        super().__init__(root, split, task, count=count)

    def options(self) -> dict[str, Any]:
        found = {**super().options(), "list_file": Path(self.list_file).name}
        return found | ({"split_file": Path(self.split_file).name, "layout": "hdf5"} if self.raw else {})

    def find(self) -> list[Entry]:
        published = any(self.root.glob("ai_*/images"))
        if published and not self.list_file:
            self.raw = not any(self.root.glob("filename_list*.txt")) or bool(self.split_file)
        path = None if self.raw else self._list_path()
        pairs = [(words[0], words[1]) for words in read_list(path, ("rgb.png", "depth.png"))] if path else []
        prefix = self._prefix(path, pairs[0][0]) if path else ""
        if published and path and not file_sizes(self.root, [prefix + pairs[0][0]]):
            self.raw = True
        if self.raw:
            names = [image for image, _ in pairs]
            entries, notes = hypersim_raw.find(self.root, self.split, names, self.split_file)
            self.notes += notes
            return entries
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
        raise UserError(
            f"{path} is missing, and so is ai_*/images: give the folder of the published frames, or write the list, "
            "one line 'rgb.png depth.png' a sample"
        )

    def _prefix(self, path: Path, first: str) -> str:
        """Where the listed names start, relative to root: the first place that holds the first file."""
        inside = path.parent.is_relative_to(self.root)
        folders = [path.parent.relative_to(self.root).as_posix()] if inside else []
        for folder in (*folders, ".", self.split):
            prefix = "" if folder == "." else f"{folder}/"
            if file_sizes(self.root, [prefix + first]):
                return prefix
        return "" if not folders or folders[0] == "." else f"{folders[0]}/"

    def _arrays(self, entry: Entry) -> dict[str, Any]:
        if not self.raw:
            return super()._arrays(entry)
        image, depth, valid = hypersim_raw.read(self.root, entry)
        return {"image": image, "depth": depth, "valid_mask": valid}

    def _refuse_invalid(self, entry: Entry, raw: Mapping[str, Any]) -> None:
        if not self.raw:
            super()._refuse_invalid(entry, raw)
        near, far = self.depth_range
        what = f"no pixel has a depth of {near:g} to {far:g} m"
        raise LeftOut(f"{self.root / entry.files['depth']}: {what}: {hypersim_raw.WITHOUT}")

    def __getitem__(self, index: int) -> dict[str, Any]:
        raw = super().__getitem__(index)
        if raw["image"].shape[:2] == (768, 1024):
            raw["intrinsics"] = np.array([[FOCAL, 0, 511.5], [0, FOCAL, 383.5], [0, 0, 1]], np.float32)
        return raw
