"""The files of one prediction: which there are, what is in them, and the JSON beside them by which they are known.

The JSON is written last: where it is, the prediction is finished. It says what the prediction was made of, with which
settings, and how to make it again.
"""

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.data import formats
from scaling_perception.data.find import Item, Picture
from scaling_perception.data.point_cloud import Camera, camera_of_fov, unproject, write_ply
from scaling_perception.evaluation.metric_depth import MetricFit, Points, to_metres
from scaling_perception.evaluation.pictures import heat, whole_picture
from scaling_perception.evaluation.prediction import Estimate
from scaling_perception.evaluation.settings import Settings
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.files import atomic_path, read_json, write_json

FORMAT = 2

FILES: dict[str, dict[str, dict[str, str]]] = {
    "depth": {
        "png16": {"png16": "depth_16bit.png"},
        "npy": {"npy": "depth.npy"},
        "color": {"color": "depth_color.png"},
        "metric": {"metric_npy": "depth_metric.npy", "metric_png16": "depth_metric_mm.png"},
        "ply": {"ply": "depth.ply"},
    },
    "flow": {
        "flo": {"flo": "flow.flo"},
        "color": {"color": "flow_color.png"},
        "npy": {"npy": "flow.npy"},
        "kitti": {"kitti": "flow_kitti.png"},
    },
    "amodal": {"mask": {"mask": "amodal_mask.png"}, "whole": {"whole": "amodal_whole.png"}},
}
"""Task -> name of a format -> kind of file -> end of its name."""

USUAL = {"depth": ("png16", "npy", "color"), "flow": ("flo", "color"), "amodal": ("mask", "whole")}


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
    known = (*FILES[task], "uncertainty")
    if words is None:
        chosen = [*USUAL[task], *(["uncertainty"] if members > 1 else [])]
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
    kinds = {**FILES[task], "uncertainty": spread}
    return {kind: f"{name}_{end}" for word in chosen for kind, end in kinds[word].items()}


def write_results(
    out: Path,
    files: Mapping[str, str],
    task: str,
    estimate: Estimate,
    image: np.ndarray | None = None,
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
    extras = extras or Extras()
    value, spread = estimate.prediction, estimate.uncertainty
    metres = None if fit is None else to_metres(value, fit)
    makers: dict[str, Callable[[Path], None]] = {
        "uncertainty": partial(_write_npy, array=spread),
        "uncertainty_picture": lambda path: formats.write_image(path, heat(spread)),
        "npy": partial(_write_npy, array=value),
    }
    if task == "depth":
        makers |= {
            "png16": lambda path: formats.write_png16(path, np.round(np.clip(value, 0, 1) * 65535).astype(np.uint16)),
            "color": lambda path: formats.write_image(path, formats.depth_to_color(value)),
            "metric_npy": lambda path: _write_npy(path, np.asarray(metres)),
            "metric_png16": lambda path: formats.write_depth_png(path, np.asarray(metres)),
            "ply": lambda path: _write_cloud(path, value, metres, image, extras),
        }
    elif task == "flow":
        makers |= {
            "flo": lambda path: formats.write_flo(path, value),
            "color": lambda path: formats.write_image(path, formats.flow_to_color(value)),
            "kitti": lambda path: formats.write_kitti_flow(path, value),
        }
    else:
        makers |= {
            "mask": lambda path: formats.write_image(path, value.astype(np.uint8) * 255),
            "whole": lambda path: formats.write_image(path, whole_picture(np.asarray(estimate.whole))),
        }
    begun: list[Path] = []
    try:
        for kind, file in files.items():
            begun.append(out / file)
            makers[kind](out / file)
    except BaseException:
        for path in begun:
            if path.is_file():
                path.unlink()
        raise


def _write_npy(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, np.ascontiguousarray(array, np.float32))


def _write_cloud(
    path: Path, depth: np.ndarray, metres: np.ndarray | None, image: np.ndarray | None, extras: Extras
) -> None:
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


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first entry of ``wanted`` that a record has otherwise: (name, was, is)."""
    recorded = {**Settings().to_dict(), **found}  # what a record of an older version does not name was not turned
    for name, value in wanted.items():
        if recorded.get(name) != value:
            return name, recorded.get(name), value
    return None


def is_finished(
    out: Path,
    item: Item,
    task: str,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    files: Mapping[str, str],
    digest_of: Callable[[Path], str] = digest,
) -> bool:
    """Whether this prediction is there, of the same inputs.

    Args:
        settings: all that decides a prediction besides its inputs.
        options: {kind: what else decides this file}.

    Raises:
        UserError: a result of other settings or of another picture is there: neither keeping nor replacing it silently
            would be right.
    """
    path = sidecar_path(out, item.name, task)
    if not path.is_file() or not all(picture.path.is_file() for picture in item.inputs):
        return False  # an input that has gone is named among the failures
    found = read_json(path)
    other = difference(found.get("settings", {}), settings)
    for kind in files:
        if other is None and kind in found.get("outputs", {}):
            was = found.get("options", {}).get(kind, {})
            names = [name for name in {**options[kind], **was} if was.get(name) != options[kind].get(name)]
            other = (f"{kind} {names[0]}", was.get(names[0]), options[kind].get(names[0])) if names else None
    if other is not None:
        raise UserError(
            f"{path} was made with {other[0]} {other[1]}, not {other[2]}: "
            "give --overwrite, or another --out to keep both"
        )
    inputs = described(item.inputs, [digest_of(picture.path) for picture in item.inputs])
    recorded = {"frames": [None] * len(item.inputs), **found.get("inputs", {})}
    if recorded.get("sha256") == inputs["sha256"] and recorded["frames"] == inputs["frames"]:
        return all(found["outputs"].get(kind) == file and (out / file).is_file() for kind, file in files.items())
    if recorded.get("files") != inputs["files"] or recorded["frames"] != inputs["frames"]:
        raise UserError(
            f"{path} is the result of {recorded.get('files', ['?'])[0]}, not of {item.inputs[0]}: "
            "give another --out, or --overwrite to replace it"
        )
    return False


def chosen_before(
    out: Path, items: Sequence[Item], task: str, asked: Mapping[str, Any], weights: str
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Settings and budget of the first record of these items that was made by these weights for the same budget."""
    for item in items:
        path = sidecar_path(out, item.name, task)
        found = read_json(path) if path.is_file() else {}
        budget = found.get("request", {}).get("budget")
        if budget is not None and budget["asked"] == asked and found["settings"]["weights"] == weights:
            return found["request"]["settings"], budget
    return None


def prepare_place(out: Path, item: Item, task: str, record: dict[str, Any]) -> None:
    """Make way for the files of a new record: the old record goes first, so that nothing unfinished looks finished.

    Further files of the old record join the new one (``outputs``, ``options``, ``metric``) where they are of the same
    prediction; otherwise they are removed.
    """
    path = sidecar_path(out, item.name, task)
    if not path.is_file():
        return
    ours = output_files(task, item.name, (*FILES[task], "uncertainty"))
    try:
        found = read_json(path)
        others = {kind for kind, file in found["outputs"].items() if ours.get(kind) == file and (out / file).is_file()}
        others -= set(record["outputs"])
        same = all(found[name] == record[name] for name in ("settings", "inputs"))
        options, metric = found["options"], found["metric"]
    except (UserError, KeyError, TypeError, AttributeError):
        others, same, options, metric = set(), False, {}, None
    path.unlink()
    for kind in sorted(others):
        if same:
            record["outputs"][kind], record["options"][kind] = ours[kind], options.get(kind, {})
            record["metric"] = record["metric"] or metric
        else:
            (out / ours[kind]).unlink()


def write_record(out: Path, item: Item, task: str, record: Mapping[str, Any]) -> None:
    """Write the JSON that ends a prediction."""
    write_json(sidecar_path(out, item.name, task), record)
