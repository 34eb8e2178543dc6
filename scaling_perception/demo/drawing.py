"""What the page shows of a run: the answer in a chosen view, the uncertainty over it, the members, points in space."""

import json
import math
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from scaling_perception.demo.session import Run
from scaling_perception.inference.point_cloud import Camera, camera_of_fov, parse_camera, unproject
from scaling_perception.tasks import TaskOptions, get_task
from scaling_perception.tasks.colours import heat

USUAL_FOV = 60.0  # degrees across the width, where nothing is known of the camera
SHOWN = 1024  # pixels of the longer side of what is sent to the page; the files have all
_POINTS = 260_000  # of the cloud on the page; the PLY has all
_MEMBERS = 25  # pictures of members on the page
_FOCAL_35MM = 0xA405  # EXIF: focal length as of a film 36 mm wide


def shown(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) small enough for the page."""
    height, width = picture.shape[:2]
    most = max(height, width)
    if most <= SHOWN:
        return picture
    size = (max(1, round(width * SHOWN / most)), max(1, round(height * SHOWN / most)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def answer(run: Run, view: str, overlay: float = 0.0) -> np.ndarray:
    """The answer in a view of the task, with the uncertainty over it.

    Args:
        overlay: opacity of the most uncertain pixel, 0..1; certain pixels stay as they are.
    """
    assert run.estimate is not None
    views = get_task(run.task).views
    picture = views.get(view, next(iter(views.values())))(run.estimate, run.image)
    if overlay > 0 and run.members > 1:
        spread = run.estimate.uncertainty
        share = np.clip(spread / max(float(spread.max()), 1e-12), 0, 1)[..., None] * overlay
        picture = (picture * (1 - share) + heat(spread) * share).round().astype(np.uint8)
    return picture


def members(run: Run, options: TaskOptions) -> list[tuple[np.ndarray, str]]:
    """(picture, caption) of every member, as many as the page shows. ``options``: the model's."""
    assert run.estimate is not None
    task = get_task(run.task)
    draw = task.member_picture
    if draw is None:
        return []
    found = [shown(draw(task.native(one, run.estimate.size, options))) for one in run.estimate.members[:_MEMBERS]]
    return [(picture, f"member {number}") for number, picture in enumerate(found, 1)]


# Points in space


def guess_fov(path: str | Path | None) -> tuple[float, str]:
    """(degrees across the width, how that is known) of a picture file: by its EXIF, or the usual angle."""
    try:
        with Image.open(str(path)) as image:
            exif = image.getexif()
            focal = exif.get_ifd(0x8769).get(_FOCAL_35MM)
            width, height = image.size
            if exif.get(0x0112, 1) >= 5:  # lies on its side
                width, height = height, width
        if focal and math.isfinite(float(focal)) and float(focal) > 0:
            across = 36.0 if width >= height else 36.0 * width / height
            degrees = 2 * math.degrees(math.atan(across / 2 / float(focal)))
            return round(degrees, 1), f"from the picture's EXIF: {float(focal):g} mm"
    except Exception:  # whatever is wrong with the file is said when it is read as a picture
        pass
    return USUAL_FOV, "a guess: the picture does not name its lens"


def write_cloud(path: Path, run: Run, near: float, far: float) -> Path:
    """The run's depth as coloured points in a GLB, at most 260 000 of them; axes are glTF's (y up, z towards you).

    The file that the page shows; the PLY among the downloads holds every pixel.
    """
    assert run.estimate is not None
    depth = run.estimate.prediction
    size = (depth.shape[0], depth.shape[1])
    camera = parse_camera(run.camera[0]) if run.camera[0] else camera_of_fov(float(run.camera[1]), size)
    scale = min(math.sqrt(_POINTS / depth.size), 3.0)  # a small picture gets more points than pixels, or it has gaps
    rows, columns = max(2, int(size[0] * scale)), max(2, int(size[1] * scale))
    distance = np.asarray(
        Image.fromarray(np.asarray(depth, np.float32)).resize((columns, rows), Image.Resampling.BILINEAR)
    )
    y, x = rows / size[0], columns / size[1]
    scaled = Camera(camera.fx * x, camera.fy * y, (camera.cx + 0.5) * x - 0.5, (camera.cy + 0.5) * y - 0.5)
    points = unproject(near + (far - near) * distance, scaled) * np.array([1, -1, -1], np.float32)
    points -= (points.reshape(-1, 3).min(0) + points.reshape(-1, 3).max(0)) / 2  # so that it turns about its middle
    colours = np.asarray(Image.fromarray(run.image).resize((columns, rows), Image.Resampling.BILINEAR))
    write_glb(path, points.reshape(-1, 3), colours.reshape(-1, 3))
    return path


def write_glb(path: Path, points: np.ndarray, colours: np.ndarray) -> None:
    """Coloured points as a binary glTF 2.0.

    Args:
        points: float (N, 3), finite. colours: uint8 (N, 3), sRGB.
    """
    linear = (np.clip(colours / 255, 0, 1) ** 2.2 * 255).round().astype(np.uint8)  # glTF's vertex colours are linear
    rgba = np.concatenate([linear, np.full((len(linear), 1), 255, np.uint8)], axis=1)
    positions = np.ascontiguousarray(points, "<f4")
    blob = positions.tobytes() + rgba.tobytes()
    head = {
        "asset": {"version": "2.0", "generator": "scaling-perception demo"},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "materials": [{"extensions": {"KHR_materials_unlit": {}}, "pbrMetallicRoughness": {"metallicFactor": 0}}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "COLOR_0": 1}, "mode": 0, "material": 0}]}],
        "buffers": [{"byteLength": len(blob)}],
        "bufferViews": [
            {"buffer": 0, "byteLength": positions.nbytes},
            {"buffer": 0, "byteOffset": positions.nbytes, "byteLength": rgba.nbytes},
        ],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": 5126,
                "count": len(positions),
                "type": "VEC3",
                "min": positions.min(0).tolist(),
                "max": positions.max(0).tolist(),
            },
            {"bufferView": 1, "componentType": 5121, "count": len(rgba), "type": "VEC4", "normalized": True},
        ],
    }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(blob), 0x004E4942) + blob
    path.write_bytes(struct.pack("<III", 0x46546C67, 2, 12 + len(chunks)) + chunks)
