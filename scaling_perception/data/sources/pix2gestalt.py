"""pix2gestalt's amodal pairs (Ozguroglu et al. 2024): 256x256, four folders; facts 5.3."""

from __future__ import annotations

from scaling_perception.data.sources.base import Entry, FileSource, list_files
from scaling_perception.support.errors import UserError

FOLDERS = {
    "image": ("occlusion", "_occlusion.png"),
    "visible_mask": ("visible_object_mask", "_visible_mask.png"),
    "whole": ("whole", "_whole.png"),
    "whole_mask": ("whole_mask", "_whole_mask.png"),
}


class Pix2Gestalt(FileSource):
    """Files are matched by id, not by their place in a sorted list, so that a missing one cannot shift the others.

    Split as upstream: sorted by id, the first 99 % train, the last 1 % validate.
    """

    NAME = "pix2gestalt"
    TASKS = ("amodal",)
    LAYOUT = "the folders occlusion, visible_object_mask, whole and whole_mask, with files <id>_occlusion.png and so on"

    def find(self) -> list[Entry]:
        ids = {}
        for field, (folder, suffix) in FOLDERS.items():
            if not (self.root / folder).is_dir():
                raise UserError(f"{self.root / folder} is missing: the root should hold {self.LAYOUT}")
            names = list_files(self.root, folder)
            ids[field] = {n[len(folder) + 1 : -len(suffix)] for n in names if n.endswith(suffix)}
        for field, (folder, suffix) in FOLDERS.items():
            if lost := sorted(set().union(*ids.values()) - ids[field]):
                counts = ", ".join(f"{FOLDERS[f][0]} {len(found)}" for f, found in ids.items())
                raise UserError(
                    f"{self.root / folder / (lost[0] + suffix)} is missing, {len(lost)} in all ({counts}): "
                    "restore the files or remove those of the other folders"
                )
        chosen = sorted(ids["image"])
        if chosen and self.split != "all":
            border = len(chosen) * 99 // 100
            chosen = chosen[:border] if self.split == "train" else chosen[border:]
            if not chosen:
                raise UserError(f"{self.root} has too few samples for split '{self.split}': give split=all")
        return [
            Entry(one, {field: f"{folder}/{one}{suffix}" for field, (folder, suffix) in FOLDERS.items()})
            for one in chosen
        ]
