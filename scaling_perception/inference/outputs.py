"""The files of one prediction: which there are, what is in them, and the JSON beside them by which they are known.

The JSON is written last: where it is, the prediction is finished. It says what the prediction was made of, with which
settings, and how to make it again.
"""

import hashlib
import json
import os
import platform
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from scaling_perception.data import formats
from scaling_perception.inference.find import Item, Picture
from scaling_perception.inference.metric_depth import MetricFit, Points, to_metres
from scaling_perception.inference.point_cloud import Camera, camera_of_fov, unproject, write_ply
from scaling_perception.inference.settings import Settings, flag_of
from scaling_perception.support.errors import UserError, did_you_mean, short
from scaling_perception.support.files import atomic_path, read_json, save_npy, write_json
from scaling_perception.support.stopping import removed_when_stopped
from scaling_perception.tasks import get_task
from scaling_perception.tasks.base import Estimate, File
from scaling_perception.tasks.colours import heat

FORMAT = 2


class Extras(NamedTuple):
    """What depth becomes besides itself. All of it JSON-able but the points."""

    camera: tuple[float, ...] | None = None  # fx, fy, cx, cy
    fov: float | None = None  # instead: degrees across the width
    distances: tuple[float, float] = (0.0, 1.0)  # of the point cloud of relative depth 0 and 1
    space: str = "depth"  # of the fit to points
    fit: str = "least-squares"

    def of(self, kind: str, points: Points | None) -> dict[str, Any]:
        """What of this decides a file of ``kind``, as JSON values."""
        metric = {} if points is None else {"points": points.digest(), "space": self.space, "fit": self.fit}
        if kind == "ply":
            view = {"fov": self.fov} if self.camera is None else {"camera": list(self.camera)}
            return {**view, **(metric or {"distances": list(self.distances)})}
        return metric if kind.startswith("metric") else {}


def choose_formats(task: str, words: str | None, members: int, more: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of formats: those of a comma list, or the usual ones with ``uncertainty``; then ``more``.

    Raises:
        UserError: a format that the task does not have, or the uncertainty of one member.
    """
    what = get_task(task)
    known = (*what.files, "uncertainty")
    if words is None:
        chosen = [*what.usual_files, *(["uncertainty"] if members > 1 else [])]
    else:
        chosen = [word.strip() for word in words.split(",") if word.strip()]
        for word in chosen:
            if word not in known:
                raise UserError(f"--formats: {task} has no '{word}'{did_you_mean(word, known)}")
        if not chosen:
            raise UserError(f"--formats names none: choose of {', '.join(known)}")
        if "uncertainty" in chosen and members < 2:
            raise UserError("--formats uncertainty: one member has none; give --ensemble 2 or more")
    return tuple(dict.fromkeys([*chosen, *more]))


def output_files(task: str, name: str, chosen: Sequence[str]) -> dict[str, str]:
    """What is written for one prediction: {kind: file name below the folder of results}."""
    spread = {"uncertainty": f"{task}_uncertainty.npy", "uncertainty_picture": f"{task}_uncertainty.png"}
    ends = {word: {kind: file.end for kind, file in kinds.items()} for word, kinds in get_task(task).files.items()}
    ends["uncertainty"] = spread
    return {kind: f"{name}_{end}" for word in chosen for kind, end in ends[word].items()}


class _Context(NamedTuple):
    """What writers may need besides the array: the picture, uint8 RGB (H, W, 3), and depth in metres where known."""

    image: UInt8[np.ndarray, "H W 3"] | None
    extras: Extras
    metres: Float[np.ndarray, "H W"] | None


def _write_npy(path: Path, array: Shaped[np.ndarray, "..."], context: _Context) -> None:
    with atomic_path(path) as temporary:
        save_npy(temporary, np.ascontiguousarray(array, np.float32))


def _write_cloud(path: Path, depth: Float[np.ndarray, "H W"], context: _Context) -> None:
    image, extras, metres = context
    size = (depth.shape[0], depth.shape[1])
    camera = camera_of_fov(extras.fov or 0, size) if extras.camera is None else Camera(*extras.camera)
    if metres is not None:
        distance, unit = metres, "unit: metres, by scale and shift fitted to known points"
    else:
        near, far = extras.distances
        distance = near + (far - near) * depth
        unit = (
            f"unit: none. Relative depth, true up to an unknown scale and shift only; 0..1 was put at {near:g}..{far:g}"
        )
    comments = [
        "made by scaling-perception predict",
        unit,
        f"camera: fx {camera.fx:.9g} fy {camera.fy:.9g} cx {camera.cx:.9g} cy {camera.cy:.9g}",
        f"picture: {size[1]} x {size[0]} pixels",
        "axes: x right, y down, z forward",
    ]
    colours = np.full((*size, 3), 128, np.uint8) if image is None else image
    write_ply(path, unproject(distance, camera), colours, comments)


Writer = Callable[[Path, Shaped[np.ndarray, "H W *C"], _Context], None]
WRITERS: dict[str, Writer] = {
    "npy": _write_npy,
    "image": lambda path, array, context: formats.write_image(path, array),
    "png16": lambda path, array, context: formats.write_png16(path, array),
    "flo": lambda path, array, context: formats.write_flo(path, array),
    "kitti": lambda path, array, context: formats.write_kitti_flow(path, array),
    "metres_npy": lambda path, array, context: _write_npy(path, np.asarray(context.metres), context),
    "metres_png16": lambda path, array, context: formats.write_depth_png(path, np.asarray(context.metres)),
    "point_cloud": _write_cloud,
}
"""What a task's ``File`` may name: how an array becomes a file."""

_SPREAD = {
    "uncertainty": File("", "npy", lambda estimate: estimate.uncertainty),
    "uncertainty_picture": File("", "image", lambda estimate: heat(estimate.uncertainty)),
}


def write_results(
    out: Path,
    files: Mapping[str, str],
    task: str,
    estimate: Estimate,
    image: UInt8[np.ndarray, "H W 3"] | None = None,
    extras: Extras | None = None,
    fit: MetricFit | None = None,
) -> None:
    """Write the files of ``output_files``: all of them, or after an error or Ctrl-C none.

    Depth: 16-bit PNG (0..65535 for 0..1), float32 NPY, colours; metric: float32 NPY in metres (NaN: not in front of the
    camera) and 16-bit PNG in millimetres (0: the same; 65535: that or farther); PLY. Flow: .flo, colours, NPY, KITTI's
    PNG. Amodal: mask 0/255, RGB of the whole object. Uncertainty: float32 NPY, and a picture whose brightest point is
    the largest value.

    Args:
        image: uint8 RGB (H, W, 3), the colours of the points.
        fit: from depth to metres; ``metric`` needs it, and the PLY is then in metres.

    Raises:
        UserError: a file cannot be written.
    """
    context = _Context(image, extras or Extras(), None if fit is None else to_metres(estimate.prediction, fit))
    kinds = {kind: file for files_of in get_task(task).files.values() for kind, file in files_of.items()}
    kinds |= _SPREAD
    begun: list[Path] = []
    try:
        for kind, file in files.items():
            begun.append(out / file)
            WRITERS[kinds[kind].writer](out / file, kinds[kind].array(estimate), context)
    except BaseException:
        for path in begun:
            path.unlink(missing_ok=True)
        raise


# The record beside the files


def digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from None


def described(pictures: Sequence[Picture], digests: Sequence[str]) -> dict[str, Any]:
    """Inputs as JSON values."""
    return {
        "files": [str(picture.path.resolve()) for picture in pictures],
        "frames": [picture.frame for picture in pictures],
        "sha256": list(digests),
    }


def sidecar_path(out: Path, name: str, task: str) -> Path:
    """The JSON that is written after everything else of a prediction."""
    return out / f"{name}_{task}.json"


def software() -> dict[str, str]:
    """Versions of what computes a prediction."""
    import jax
    import PIL

    from scaling_perception import __version__

    device = jax.devices()[0]
    return {
        "scaling_perception": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "device": device.device_kind,
    }


_FLAGS = {
    "weights": "--model",
    "autoencoder_weights": "--autoencoder",
    "diffusion": "--preset or --spacing",
    "points": "--align",
    "space": "--align-space",
    "fit": "--align-fit",
    "camera": "--intrinsics",
    "distances": "--depth-range",
    "resolution": "the model's resolution",
    "task_options": "the model's options",
}
"""What decides a result -> the flag that sets it, where that is not called the same."""


def _said(name: str, was: Any, now: Any) -> str:
    """``--seed 0, now 1`` for a setting that differs."""
    flag = _FLAGS.get(name, flag_of(name))

    def text(value: Any) -> str:
        return "not given" if value is None else str(value if isinstance(value, str) else json.dumps(value))[:60]

    if isinstance(was, Mapping) and isinstance(now, Mapping):
        parts = [part for part in {**was, **now} if was.get(part) != now.get(part)]
        return f"{flag} ({', '.join(f'{part} {text(was.get(part))}, now {text(now.get(part))}' for part in parts)})"
    if isinstance(now if was is None else was, list):
        was, now = (None if side is None else ",".join(f"{number:g}" for number in side) for side in (was, now))
    if name in ("weights", "autoencoder_weights", "points"):  # digests
        was, now = (side if side is None else str(side)[:12] for side in (was, now))
    return f"{flag} {text(was)}, now {text(now)}"


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The entries of ``wanted`` that a record has otherwise: (name, was, is).

    A setting that either does not name has its default: older versions had no other, and some are recorded only where
    they were turned.
    """
    usual = Settings().to_dict()
    recorded = {**usual, **found}
    wanted = {**{name: value for name, value in usual.items() if name in found}, **wanted}
    return [(name, recorded.get(name), value) for name, value in wanted.items() if recorded.get(name) != value]


class There(NamedTuple):
    """What lies where a prediction is to be written."""

    finished: bool = False  # the same prediction, of the same inputs
    changed: tuple[str, ...] = ()  # or one of other settings: each in words


def check_format(path: str | Path, record: Mapping[str, Any]) -> None:
    """UserError for a record of a later version, whose fields may mean something else. Earlier formats are read."""
    if (number := record.get("format", FORMAT)) not in range(1, FORMAT + 1):
        raise UserError(
            f"{path} has format {short(number)}, this version reads up to {FORMAT}: use a newer version, or "
            "make the result again with --overwrite"
        )


def _intact(path: Path, size: Any) -> bool:
    """Whether a result has the size that its record names; earlier records name none (None), but none was empty."""
    try:
        found = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and (found.st_size > 0 if size is None else found.st_size == size)


def what_is_there(
    out: Path,
    item: Item,
    task: str,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    files: Mapping[str, str],
    digest_of: Callable[[Path], str] = digest,
) -> There:
    """Whether this prediction is there, or which settings of the one that is there are other.

    Args:
        settings: all that decides a prediction besides its inputs.
        options: {kind: what else decides this file}.

    Raises:
        UserError: a result of another picture is there, or a JSON that is no record: neither keeping nor replacing it
            silently would be right.
    """
    path = sidecar_path(out, item.name, task)
    if not os.path.lexists(path) or not all(os.path.isfile(picture.path) for picture in item.inputs):
        return There()  # an input that has gone is named among the failures
    inputs = described(item.inputs, [digest_of(picture.path) for picture in item.inputs])
    try:
        found = read_json(path)
        recorded = {"frames": [None] * len(item.inputs), **found["inputs"]}
        first, own, written = recorded["files"][0], dict(found["settings"]), dict(found["outputs"])
        past = {kind: dict(found.get("options", {}).get(kind, {})) for kind in written}
        sizes = dict(found.get("bytes", {}))
    except (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(
            f"{path} is no record of predict: move it away, give another --out, or --overwrite to replace it"
        ) from None
    check_format(path, found)
    equal = recorded.get("sha256") == inputs["sha256"] and recorded["frames"] == inputs["frames"]
    if not equal and (recorded["files"] != inputs["files"] or recorded["frames"] != inputs["frames"]):
        raise UserError(
            f"{path} is the result of {first}, not of {item.inputs[0]}: "
            "give another --out, or --overwrite to replace it"
        )
    changed = [_said(*other) for other in difference(own, {"clip": None, **settings})]
    for kind in files.keys() & past.keys():
        was, now = past[kind], options[kind]
        changed += [_said(n, was.get(n), now.get(n)) for n in {**now, **was} if was.get(n) != now.get(n)]
    if changed:
        return There(changed=tuple(dict.fromkeys(changed)))
    return There(
        equal
        and all(written.get(kind) == file and _intact(out / file, sizes.get(kind)) for kind, file in files.items())
    )


def chosen_before(
    out: Path, items: Sequence[Item], task: str, asked: Mapping[str, Any], weights: str
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Settings and budget of the first record of these items that was made by these weights for the same budget."""
    for item in items:
        try:
            found = read_json(sidecar_path(out, item.name, task))
            budget = found["request"]["budget"]
            if budget is not None and budget["asked"] == asked and found["settings"]["weights"] == weights:
                return found["request"]["settings"], budget
        except (UserError, KeyError, TypeError):
            continue  # none, or no record: named when its item is looked at
    return None


def _keep_others(out: Path, item: Item, task: str, record: dict[str, Any]) -> list[Path]:
    """Let further files of the old record join the new one (``outputs``, ``options``, ``metric``) where they are of
    the same prediction and points; returns those that are not."""
    ours = output_files(task, item.name, (*get_task(task).files, "uncertainty"))
    try:
        found = read_json(sidecar_path(out, item.name, task))
        others = {kind for kind, file in found["outputs"].items() if ours.get(kind) == file and (out / file).is_file()}
        sizes = dict(found.get("bytes", {}))
        same = all(found[name] == record[name] for name in ("settings", "inputs"))
        options, metric = found["options"], found["metric"]
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return []  # without a record nothing is known to be ours

    def fit_of(choice: Mapping[str, Any]) -> dict[str, Any]:
        return {name: choice[name] for name in ("points", "space", "fit") if name in choice}

    fits = [fit_of(choice) for choice in record["options"].values() if fit_of(choice)]
    stale = []
    for kind in sorted(others - set(record["outputs"])):
        choice = options.get(kind, {})
        fresh = same and _intact(out / ours[kind], sizes.get(kind))
        if fresh and (not fit_of(choice) or fits in ([], [fit_of(choice)] * len(fits))):
            record["outputs"][kind], record["options"][kind] = ours[kind], choice
            record["metric"] = record["metric"] or metric
        else:
            stale.append(out / ours[kind])
    return stale


def replace_results(
    out: Path, item: Item, task: str, record: dict[str, Any], write: Callable[[Path, Mapping[str, str]], None]
) -> None:
    """Write a prediction's files beside their places, put them there, and write the record last.

    What was there stays whole until all new files are. From the first file that changes to the end there is no record,
    so that nothing unfinished looks finished.

    Args:
        record: what is written as JSON, with the sizes of the files (``bytes``); older files of the same prediction
            join it.
        write: writes the files of ``{kind: name}`` into a folder.

    Raises:
        UserError: a file cannot be written.
    """
    path = sidecar_path(out, item.name, task)
    beside = path.with_name(f".{path.name}.new")
    places = {kind: out / file for kind, file in record["outputs"].items()}
    for place in (path, *places.values()):
        if os.path.lexists(place) and not place.is_file():
            raise UserError(f"cannot write {place}: it is there and is no regular file; move it away")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of a killed process: the lock is ours
        with removed_when_stopped(beside):
            beside.mkdir()
            write(beside, {kind: place.name for kind, place in places.items()})
        stale = _keep_others(out, item, task, record)
        made = {kind: beside / place.name for kind, place in places.items()}
        found = {kind: made.get(kind, out / file) for kind, file in record["outputs"].items()}
        record["bytes"] = {kind: file.stat().st_size for kind, file in found.items()}
        path.unlink(missing_ok=True)
        try:
            for place in stale:
                place.unlink()
            for place in places.values():
                os.replace(beside / place.name, os.path.realpath(place))
            write_json(path, record)
        except BaseException:
            for place in () if path.is_file() else places.values():
                place.unlink(missing_ok=True)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
