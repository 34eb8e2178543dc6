"""Hypersim as it is published: HDF5 frames, made planar depth and tone-mapped colour; facts 5.1."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scaling_perception.data.formats import float32
from scaling_perception.data.sources.base import Entry, LeftOut
from scaling_perception.data.sources.hdf5 import need_hdf5, read_array
from scaling_perception.data.sources.lists import list_path
from scaling_perception.support.errors import UserError
from scaling_perception.support.tables import read_table

FOCAL = 886.81
"""Pixels, at a width of 1024 (facts 5.1)."""
WIDTH = 1024
WITHOUT = "prepare leaves the frame out; elsewhere give a list without it (Marigold's are)"
SPLIT_FILE = "metadata_images_split_scene_v1.csv"
LAYOUT = (
    "ai_VVV_NNN/images/scene_cam_XX_final_hdf5/frame.IIII.color.hdf5 and "
    "scene_cam_XX_geometry_hdf5/frame.IIII.depth_meters.hdf5 and frame.IIII.render_entity_id.hdf5"
)
_PLACES = ("", "analysis", "evermotion_dataset/analysis")
_COLUMNS = ("scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name")
_LISTED = re.compile(r"(?:.*/)?(?P<scene>ai_\d+_\d+)/rgb_(?P<camera>cam_\d+)_fr(?P<frame>\d+)\.png")
_PERCENTILE, _BRIGHTNESS, _GAMMA, _DARK = 90, 0.8, 2.2, 1e-4


# Arithmetic


def planar_depth(distance: np.ndarray) -> np.ndarray:
    """Depth along the optical axis, float64 (H, W) metres, of the distance to the camera's centre (H, W) metres."""
    height, width = distance.shape
    return distance.astype(np.float64) * _cosines(height, width)


@functools.cache
def _cosines(height: int, width: int) -> np.ndarray:
    focal = FOCAL * width / WIDTH  # the field of view is that of the published size
    x = np.arange(width) - (width - 1) / 2
    y = np.arange(height)[:, None] - (height - 1) / 2
    return focal / np.sqrt(x**2 + y**2 + focal**2)


def tone_map(colour: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of linear colour: the 90th percentile of the valid pixels' brightness becomes 0.8 after a gamma
    of 1 / 2.2; black where that percentile is below 1e-4; not scaled where no pixel is valid.

    Args:
        colour: (H, W, 3) linear, without NaN. valid: bool (H, W).

    Raises:
        LeftOut: the percentile is infinite, so that nothing can be scaled.
    """
    scale = 1.0
    if valid.any():
        brightness = colour.astype(np.float64) @ np.array([0.3, 0.59, 0.11])
        with np.errstate(invalid="ignore"):  # between two infinite values
            bright = float(np.percentile(brightness[valid], _PERCENTILE))
        if not np.isfinite(bright):
            raise LeftOut(f"the {_PERCENTILE}th percentile of its brightness is infinite")
        scale = _BRIGHTNESS**_GAMMA / bright if bright >= _DARK else 0.0
    if scale == 0.0:
        return np.zeros(colour.shape, np.uint8)
    if colour.dtype != np.float16:
        return _curve(colour, scale)
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)  # fewer than a frame has values: a sixth of the time
    return _curve(np.nan_to_num(every, posinf=np.inf), scale)[np.ascontiguousarray(colour).view(np.uint16)]


def _curve(values: np.ndarray, scale: float) -> np.ndarray:
    bright = np.maximum(scale * values.astype(np.float64), 0) ** (1 / _GAMMA)
    return (np.clip(bright, 0, 1) * 255).astype(np.uint8)


# Files


def read(root: Path, entry: Entry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image uint8 (H, W, 3), depth float32 (H, W) metres, 0 where nothing was hit, and where something was, bool.

    Raises:
        UserError: a file is missing, damaged or of another shape. LeftOut: the frame itself is of no use.
    """
    colour, distance, entity = (_read(root, entry, field) for field in ("image", "depth", "entity"))
    for field, array in (("depth", distance), ("entity", entity)):
        if array.shape != colour.shape[:2] or array.ndim != 2:
            raise UserError(
                f"{root / entry.files[field]} is {_size(array)} but {root / entry.files['image']} is {_size(colour)}: "
                "give both the same size"
            )
    valid = entity != -1
    if count := int(np.isnan(colour).sum()):
        raise LeftOut(f"{root / entry.files['image']}: its colour is not a number in {count} places: {WITHOUT}")
    with np.errstate(invalid="ignore"):
        depth = planar_depth(distance)
    depth[~valid] = 0
    try:
        return tone_map(colour, valid), float32(depth), valid
    except LeftOut as error:
        raise LeftOut(f"{root / entry.files['image']}: {error}: {WITHOUT}") from None


def _read(root: Path, entry: Entry, field: str) -> np.ndarray:
    path = root / entry.files[field]
    array = read_array(path, "dataset")
    wanted = "(H, W, 3)" if field == "image" else "(H, W)"
    if array.ndim != (3 if field == "image" else 2) or array.shape[2:] not in ((), (3,)) or not array.size:
        raise UserError(f"{path} holds {array.shape}: it needs {wanted}")
    if array.dtype.kind not in ("iu" if field == "entity" else "f"):
        raise UserError(f"{path} holds {array.dtype}: it needs {'whole' if field == 'entity' else 'real'} numbers")
    return array


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


# Which frames


def find(root: Path, split: str, listed: Sequence[str], split_file: str) -> tuple[list[Entry], list[str]]:
    """The frames of a split in the order of its list, and notes on what is left out.

    Args:
        listed: names ``ai_VVV_NNN/rgb_cam_XX_frIIII.png`` as Marigold's lists have them; where empty, the frames of
            the split CSV that are in the public release.
        split_file: the CSV, where it has another name or place.

    Raises:
        UserError: no CSV, or a list, CSV or split that does not fit.
    """
    notes: list[str] = []
    frames = [_frame(name) for name in listed] or _of_csv(_csv_path(root, split_file), split, notes)
    scenes = {path.parent.name for path in root.glob("*/images")}
    here = [frame for frame in frames if frame[0] in scenes]
    if not here:
        raise UserError(f"{root} holds none of the {len({f[0] for f in frames})} scenes of '{split}': {LAYOUT}")
    if lost := len(frames) - len(here):
        count = len({frame[0] for frame in frames} - scenes)
        notes.append(f"{lost} of {len(frames)} frames are of {count} scenes that are not in {root} and are left out")
    entries = [_entry(*frame) for frame in here]
    need_hdf5(root / entries[0].files["image"])  # once, and not for every frame
    return entries, notes


def _entry(scene: str, camera: str, frame: int) -> Entry:
    stem = f"{scene}/images/scene_{camera}"
    names = {"image": "final_hdf5/{}.color", "depth": "geometry_hdf5/{}.depth_meters"}
    names["entity"] = "geometry_hdf5/{}.render_entity_id"
    files = {field: f"{stem}_{name.format(f'frame.{frame:04d}')}.hdf5" for field, name in names.items()}
    return Entry(f"{scene}/rgb_{camera}_fr{frame:04d}", files)  # the key of the same frame in Marigold's layout


def _frame(name: str) -> tuple[str, str, int]:
    if not (match := _LISTED.fullmatch(name)):
        raise UserError(f"the list names '{name}': a frame is ai_VVV_NNN/rgb_cam_XX_frIIII.png")
    return match["scene"], match["camera"], int(match["frame"])


def _csv_path(root: Path, split_file: str) -> Path:
    if split_file:
        return list_path(root, split_file)
    for place in _PLACES:
        if (root / place / SPLIT_FILE).is_file():
            return root / place / SPLIT_FILE
    raise UserError(
        f"{root / SPLIT_FILE} is missing: take it from Hypersim's repository (evermotion_dataset/analysis), or give "
        "list, one of Marigold's"
    )


def _of_csv(path: Path, split: str, notes: list[str]) -> list[tuple[str, str, int]]:
    table = read_table(path)
    scenes, cameras, numbers, public, parts = ([word.strip() for word in table.text(name)] for name in _COLUMNS)
    frames, hidden = [], 0
    for at, line in enumerate(table.lines):
        if split not in ("all", parts[at]):
            continue
        if public[at].lower() not in ("true", "false", "1", "0") or not re.fullmatch(r"\d{1,9}", numbers[at]):
            row = f"frame_id '{numbers[at]}', included_in_public_release '{public[at]}'"
            raise UserError(f"{path} line {line} has {row}: give a number, and True or False")
        if public[at].lower() in ("true", "1"):
            frames.append((scenes[at], cameras[at], int(numbers[at])))
        else:
            hidden += 1
    if not frames:
        raise UserError(f"{path} puts no frame into '{split}': it has {', '.join(sorted(set(parts)))}")
    if hidden:
        notes.append(f"{hidden} of {hidden + len(frames)} frames are not in the public release and are left out")
    return frames
