"""Where raw samples come from. A source is a sequence: ``len(source)``, ``source[i]``, ``source.fingerprint()``.

A source of files also has ``file_paths(indices)``: their folder, and the files of these samples below it, whose
contents ``contents.described`` adds to the fingerprint.

A raw sample is a dict of numpy arrays at native size:

    key    str, stable id                image  uint8 (H, W, 3)
    depth  depth float32 (H, W) metres (planar z), valid bool (H, W)
    flow   image2 uint8 (H, W, 3), flow float32 (H, W, 2) pixels (u right, v down) first to second frame, valid bool
    amodal visible_mask, whole_mask bool (H, W), whole uint8 (H, W, 3) the whole object on white
    generation label int
    normals normals float32 (H, W, 3) unit vectors in the camera's frame, x right, y down, z away from the camera (a
            surface that faces it has z < 0), valid bool
    optional: label int, intrinsics float32 (3, 3), occluded bool (H, W), relative True: depth has no unit

Evaluation sets of photographs have no ``whole``: nobody has the picture of what is hidden.
"""

from __future__ import annotations

import importlib
import inspect
import os
from typing import Any, NamedTuple, Protocol

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.remote import local


class Source(Protocol):
    """What a source promises."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def fingerprint(self) -> dict[str, Any]: ...


class SourceEntry(NamedTuple):
    """A row of ``SOURCES``: the module in this folder, the tasks that it serves, its class."""

    module: str
    tasks: tuple[str, ...]
    member: str


SOURCES: dict[str, SourceEntry] = {
    "scenes": SourceEntry("scenes", ("depth", "flow", "amodal", "normals"), "ScenesSource"),
    "folder": SourceEntry("folder", ("depth", "flow", "amodal", "normals"), "Folder"),
    "vkitti2": SourceEntry("virtual_kitti", ("depth",), "VirtualKitti2"),
    "flying_chairs": SourceEntry("flying_chairs", ("flow",), "FlyingChairs"),
    "hypersim": SourceEntry("hypersim", ("depth",), "Hypersim"),
    "imagenet": SourceEntry("imagenet", ("generation",), "ImageNet"),
    "textures": SourceEntry("texture_classes", ("generation",), "TextureClasses"),
    "pix2gestalt": SourceEntry("pix2gestalt", ("amodal",), "Pix2Gestalt"),
    "coco_amodal": SourceEntry("cocoa", ("amodal",), "CocoAmodal"),
    "mp3d_amodal": SourceEntry("cocoa", ("amodal",), "Mp3dAmodal"),
    "nyuv2": SourceEntry("depth_benchmarks", ("depth",), "NYUv2"),
    "kitti_depth": SourceEntry("depth_benchmarks", ("depth",), "KittiDepth"),
    "eth3d": SourceEntry("depth_benchmarks", ("depth",), "Eth3d"),
    "scannet": SourceEntry("depth_benchmarks", ("depth",), "ScanNet"),
    "diode": SourceEntry("depth_benchmarks", ("depth",), "Diode"),
    "icl_nuim": SourceEntry("depth_benchmarks", ("depth",), "IclNuim"),
    "tum_rgbd": SourceEntry("depth_benchmarks", ("depth",), "TumRgbd"),
    "middlebury_flow": SourceEntry("flow_benchmarks", ("flow",), "MiddleburyFlow"),
    "sintel": SourceEntry("flow_benchmarks", ("flow",), "Sintel"),
    "kitti_flow": SourceEntry("flow_benchmarks", ("flow",), "KittiFlow"),
    "worlds": SourceEntry("worlds", ("depth", "flow", "amodal", "normals"), "WorldsSource"),
}

ENDLESS = ("scenes", "worlds")
"""Sources that render: they have no end, read no files, and take ``start``, ``count`` and ``resolution``."""


def open_source(name: str, root: str | os.PathLike[str], split: str, task: str, **options: Any) -> Source:
    """Open a source by name, and check that its files are there.

    Args:
        name: a name of ``SOURCES``.
        root: the data set's folder, here or in a bucket (for ``folder`` also a manifest file; ignored by those of
            ``ENDLESS``).
        split: train, val, test or all, as far as the source has them; '' is all.
        task: depth, flow, amodal or generation.
        options: of the source's class, e.g. ``count``.

    Raises:
        UserError: unknown name, task, split or option (with the nearest known one), or files that do not fit.
    """
    if name not in SOURCES:
        raise UserError(f"unknown data source '{name}'{did_you_mean(name, SOURCES)}")
    entry = SOURCES[name]
    if task not in entry.tasks:
        known = sorted({one for row in SOURCES.values() for one in row.tasks})
        if task not in known:
            raise UserError(f"unknown task '{task}'{did_you_mean(task, known)}")
        others = [other for other, row in SOURCES.items() if task in row.tasks]
        serves = ", ".join(entry.tasks)
        raise UserError(f"{name} has no {task}, it serves {serves}: for {task} take {', '.join(others)}")
    make = getattr(importlib.import_module(f"{__name__}.{entry.module}"), entry.member)
    defaults = source_options(name)
    for option, value in options.items():
        if option not in defaults:
            raise UserError(f"{name} has no option '{option}'{did_you_mean(option, defaults)}")
        options[option] = _convert(value, defaults[option], f"option '{option}' of {name}")
    for option, default in defaults.items():
        if default is inspect.Parameter.empty and option not in options:
            raise UserError(f"{name} needs the option '{option}': give it")
    given = {"root": local(root) if root else root, "split": split, "task": task}
    parameters = inspect.signature(make).parameters
    return make(**{key: value for key, value in given.items() if key in parameters}, **options)


def taken(
    source: Source,
    name: str,
    root: str | os.PathLike[str],
    split: str,
    task: str,
    every: str = "--split all",
    **options: Any,
) -> str:
    """How many samples a verb takes and of how many: ``1 of 4 samples of pix2gestalt (val; --split all for all)``.

    Args:
        source: the open one. The others are what ``open_source`` was given.
        every: what to give for all splits.
    """
    found, rest = len(source), {key: value for key, value in options.items() if key != "count"}
    try:
        total = len(open_source(name, root, "all", task, **rest)) if name not in ENDLESS else found
    except UserError:  # no split "all", or files of another split are not here
        total = found
    if found >= total:
        return f"{found} samples of {name} ({split or 'all'})"
    how = [] if split in ("", "all") else [every]
    how += ["--count 0"] if options.get("count") else []
    return f"{found} of {total} samples of {name} ({split or 'all'}; {' '.join(how)} for all)"


def usual_split(name: str) -> str:
    """The split to take where none is given: train, or val where a source has no train."""
    entry = SOURCES.get(name)
    make = getattr(importlib.import_module(f"{__name__}.{entry.module}"), entry.member) if entry else None
    return "train" if "train" in getattr(make, "SPLITS", ("train",)) else "val"


def source_options(name: str) -> dict[str, Any]:
    """The options of a source and their defaults (``inspect.Parameter.empty`` for one that must be given)."""
    entry = SOURCES[name]
    make = getattr(importlib.import_module(f"{__name__}.{entry.module}"), entry.member)
    parameters = {**inspect.signature(make).parameters}
    if parameters.pop("own", None):  # a set's own, besides what all of its kind have
        parameters |= {key: one for key, one in inspect.signature(make.set_own).parameters.items() if key != "self"}
    return {key: one.default for key, one in parameters.items() if key not in ("root", "split", "task")}


def _convert(value: Any, default: Any, what: str) -> Any:
    """A value from a command line as the type of the option's default."""
    try:
        if isinstance(default, bool) and not isinstance(value, bool):
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if isinstance(default, (int, float)) and isinstance(value, str):
            return type(default)(value)
        if isinstance(default, int) and value != int(value):
            raise ValueError(value)
        if isinstance(default, (bool, int, float)):
            return type(default)(value)
        return str(value) if isinstance(default, str) and isinstance(value, (int, float)) else value
    except (KeyError, ValueError, TypeError, OverflowError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise UserError(f"{what} is '{value}': give {kind}") from None
