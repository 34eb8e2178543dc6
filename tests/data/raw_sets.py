"""Data sets as their publishers ship them, with few pixels: written byte by byte, independently of their readers."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from small_sets import H, W, picture, write

COLUMNS = "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name\n"


def write_hdf5(path, **arrays):
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")
    return path


def write_frame(root, scene, camera, frame, colour, distance, entity):
    """One of Hypersim's frames; returns the three files."""
    images = root / scene / "images"
    geometry = images / f"scene_{camera}_geometry_hdf5"
    return (
        write_hdf5(images / f"scene_{camera}_final_hdf5" / f"frame.{frame:04d}.color.hdf5", dataset=colour),
        write_hdf5(geometry / f"frame.{frame:04d}.depth_meters.hdf5", dataset=distance),
        write_hdf5(geometry / f"frame.{frame:04d}.render_entity_id.hdf5", dataset=entity),
    )


def make_hypersim(root, height=H, width=W):
    """Two scenes, four public frames and a hidden one; returns colour, distance and entities of the first frame."""
    rows, first = [], None
    for number, (scene, part, public) in enumerate(
        [
            ("ai_001_001", "train", True),
            ("ai_001_001", "train", True),
            ("ai_001_001", "train", False),
            ("ai_003_010", "val", True),
            ("ai_003_010", "test", True),
        ]
    ):
        draw = np.random.default_rng(number)
        colour = draw.gamma(2.0, 0.4, (height, width, 3)).astype(np.float16)
        distance = draw.uniform(1, 9, (height, width)).astype(np.float16)
        entity = draw.integers(1, 40, (height, width)).astype(np.int32)
        entity[0, :3] = -1
        distance[0, 0] = np.nan
        if public:
            write_frame(root, scene, "cam_00", number, colour, distance, entity)
        first = first or (colour, distance, entity)
        rows.append(f"{scene},cam_00,{number},{public},{'' if public else 'artefact'},{part}\n")
    (root / "metadata_images_split_scene_v1.csv").write_text(COLUMNS + "".join(rows))
    return first


def make_vkitti(root, scenes=("Scene01", "Scene20"), size=(H, W), apart=False):
    """Two frames a scene; returns the centimetres of the first."""
    first = None
    for number, scene in enumerate(scenes):
        for frame in (0, 1):
            stored = np.random.default_rng(10 * number + frame).integers(150, 7900, size).astype(np.uint16)
            stored[0] = 65535  # sky
            stored[1, :2] = 8000  # 80 m
            for kind, array in (("rgb", picture(frame, *size)), ("depth", stored)):
                folder = root / (kind if apart else "") / scene / "clone" / "frames" / kind / "Camera_0"
                suffix = "jpg" if kind == "rgb" else "png"
                write(folder / f"{kind}_{frame:05d}.{suffix}", array)
            first = stored if first is None else first
    return first


def make_nyu(root, count=5, test=(2, 4)):
    """MATLAB's arrays, axes reversed; returns images (N, H, W, 3), raw and filled depths (N, H, W)."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, H, W, 3)).astype(np.uint8)
    filled = draw.uniform(0.7, 9, (count, H, W)).astype(np.float32)
    known = np.where(draw.random((count, H, W)) < 0.7, filled, 0).astype(np.float32)
    arrays = {"images": images.transpose(0, 3, 2, 1)}
    arrays |= {"depths": filled.transpose(0, 2, 1), "rawDepths": known.transpose(0, 2, 1)}
    write_hdf5(root / "nyu_depth_v2_labeled.mat", **arrays)
    others = [number for number in range(1, count + 1) if number not in test]
    savemat(root / "splits.mat", {"testNdxs": np.array([test]).T, "trainNdxs": np.array([others]).T})
    return images, known, filled


def sens_bytes(frames, colour=(2 * H, 2 * W), depth=(H, W), shift=1000.0):
    """A recording of (colour uint8, depth uint16) frames."""
    pose = np.eye(4, dtype="<f4").tobytes()
    out = struct.pack("<IQ", 4, 12) + b"StructureSen" + 4 * pose
    out += struct.pack("<ii", 2, 1) + struct.pack("<IIII", colour[1], colour[0], depth[1], depth[0])
    out += struct.pack("<fQ", shift, len(frames))
    for number, (image, stored) in enumerate(frames):
        jpeg = io.BytesIO()
        Image.fromarray(image).save(jpeg, "JPEG", quality=95)
        packed = zlib.compress(stored.astype("<u2").tobytes())
        out += pose + struct.pack("<QQQQ", number, number, len(jpeg.getvalue()), len(packed)) + jpeg.getvalue() + packed
    return out + struct.pack("<Q", 0)  # no readings of the motion sensor


def make_sens(root, scene="scene0406_02", count=3):
    """A recording; returns its frames."""
    draw, frames = np.random.default_rng(7), []
    for number in range(count):
        image = np.kron(picture(number), np.ones((2, 2, 1), np.uint8))
        frames.append((image, draw.integers(0, 9500, (H, W)).astype(np.uint16)))
    path = root / "scans" / scene / f"{scene}.sens"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sens_bytes(frames))
    return frames
