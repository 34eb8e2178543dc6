"""Images, folders or globs to depth, flow or amodal masks on disk, at the images' own size.

Depth is relative (0 near, 1 far). Flow takes pairs `A.png,B.png`, or a folder (or list) of consecutive frames. Amodal
takes --mask, the visible part of the object: one file, or a folder of masks named as their images. Finished results are
not made again; a file that cannot be read is named at the end and does not stop the others.
"""

import argparse
import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path, read_json, write_json

EXAMPLES = """
scaling-perception predict --task depth --model mini --out out photo.jpg
scaling-perception predict --task depth --model mini --steps 10 --ensemble 5 --out out photos/ 'more/*.png'
scaling-perception predict --task flow --model mini --out out frame1.png,frame2.png video_frames/
scaling-perception predict --task amodal --model mini --mask masks/ --out out images/
"""

_FORMAT = 1
SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")


class Item(NamedTuple):
    """One prediction to make."""

    name: str  # of its files, without suffix
    inputs: tuple[Path, ...]  # image, and for flow the second frame, for amodal the mask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder, glob; for flow also A,B")
    parser.add_argument("--task", required=True, help="depth, flow or amodal")
    parser.add_argument("--model", default="mini", help="model folder, training run, hub id or name (default mini)")
    parser.add_argument("--autoencoder", help="another autoencoder than the model's: name, folder or hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--mask", metavar="FILE|DIR", help="amodal: the visible part's mask, or a folder of masks")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (default 10)")
    parser.add_argument("--ensemble", type=int, default=5, help="members that are merged (default 5)")
    parser.add_argument("--preset", help="timestep grid: fixed, paper, released (default: the model's own)")
    parser.add_argument("--spacing", help="timestep spacing alone: leading, trailing, linspace")
    parser.add_argument("--reduce", help="merging: depth lsq, median, minmax, marigold; flow mean, median")
    parser.add_argument("--seed", type=int, default=0, help="key of all noise (default 0)")
    parser.add_argument("--batch-size", type=int, help="images × members at once (default: by memory)")
    parser.add_argument("--dtype", default="float32", help="of the transformer's products: float32 or bfloat16")
    parser.add_argument("--kitti", action="store_true", help="flow: also write KITTI's 16-bit PNG")
    parser.add_argument("--overwrite", action="store_true", help="make existing results again")


# Finding inputs


def _natural(path: Path) -> list[Any]:
    """Sort key by which frame_2 comes before frame_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _pictures(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != "."]
    if not found:
        raise UserError(f"{folder} holds no picture ({', '.join(SUFFIXES)}): check the folder")
    return sorted(found, key=_natural)


def _expand(word: str) -> list[Path]:
    """The files of one input word: a file, a folder's pictures, or what a glob matches."""
    path = Path(word).expanduser()
    if path.is_dir():
        return _pictures(path)
    if path.exists():
        return [path]
    if glob.has_magic(word):
        found = [Path(p) for p in glob.glob(os.path.expanduser(word), recursive=True)]
        found = sorted((p for p in found if p.is_file()), key=_natural)
        if not found:
            raise UserError(f"'{word}' matches no file: check the pattern")
        return found
    raise UserError(f"{word} does not exist: check the path")


def find_inputs(words: list[str], task: str, mask: str | None = None) -> list[tuple[Path, ...]]:
    """The files of every prediction: (image,), flow (first, second), amodal (image, mask).

    For flow ``A,B`` is a pair; a folder or glob is a sequence of frames, and so are the plain files together. A mask of
    a folder that is missing is named by the path it should have.

    Raises:
        UserError: an input that does not exist, fewer than two frames, or a --mask that does not fit.
    """
    if task == "flow":
        return _find_pairs(words)
    images = list(dict.fromkeys(path for word in words for path in _expand(word)))
    if task == "depth":
        return [(image,) for image in images]
    if mask is None:
        raise UserError("amodal needs --mask: the mask of the object's visible part, or a folder of masks")
    place = Path(mask).expanduser()
    if place.is_dir():
        return [(image, _mask_of(image, place)) for image in images]
    if not place.exists():
        raise UserError(f"--mask {mask} does not exist: check the path")
    if len(images) != 1:
        raise UserError(f"--mask {mask} is one file but there are {len(images)} images: give a folder of masks")
    return [(images[0], place)]


def _mask_of(image: Path, folder: Path) -> Path:
    short = image.stem.removesuffix("_occlusion")  # pix2gestalt: ID_occlusion.png and ID_visible_mask.png
    for stem in (image.stem, f"{image.stem}_mask", f"{short}_visible_mask"):
        for suffix in (image.suffix, *SUFFIXES):
            if (folder / (stem + suffix)).is_file():
                return folder / (stem + suffix)
    return folder / f"{image.stem}.png"  # missing: told when it is read, so that the other images go on


def _find_pairs(words: list[str]) -> list[tuple[Path, ...]]:
    pairs: list[tuple[Path, ...]] = []
    frames: list[Path] = []
    for word in words:
        path = Path(word).expanduser()
        if "," in word and not path.exists():
            parts = word.split(",")
            if len(parts) != 2 or not all(parts):
                raise UserError(f"'{word}' is no pair of frames: write FIRST.png,SECOND.png")
            pairs.append(tuple(Path(part).expanduser() for part in parts))
        elif path.is_file():
            frames.append(path)
        else:
            sequence = _expand(word)
            if len(sequence) < 2:
                raise UserError(f"{word} holds one frame: flow needs two or more")
            pairs += zip(sequence[:-1], sequence[1:], strict=True)
    if len(frames) == 1:
        raise UserError(f"{frames[0]} is one frame: flow needs a pair FIRST.png,SECOND.png or a folder of frames")
    pairs += zip(frames[:-1], frames[1:], strict=True)
    return list(dict.fromkeys(pairs))


def name_results(inputs: list[tuple[Path, ...]], task: str) -> list[Item]:
    """A name for every prediction: the image's stem, with its folder and suffix where two would collide."""

    def candidates(files: tuple[Path, ...]) -> list[str]:
        first = files[0].resolve()
        short = first.stem
        names = [short, f"{first.parent.name}_{short}", f"{first.parent.name}_{first.name.replace('.', '_')}"]
        if task == "flow":
            names.insert(1, f"{short}_{files[1].stem}")
        return [*names, f"{names[-1]}_{hashlib.sha256(str(files).encode()).hexdigest()[:6]}"]

    pending = list(range(len(inputs)))
    names = [""] * len(inputs)
    taken: set[str] = set()
    for level in range(len(candidates(inputs[0]))):
        proposals = {i: candidates(inputs[i])[level] for i in pending}
        counts: dict[str, int] = {}
        for name in proposals.values():
            counts[name] = counts.get(name, 0) + 1
        for i, name in proposals.items():
            if counts[name] == 1 and name not in taken:
                names[i] = name
        taken |= set(filter(None, names))
        pending = [i for i in pending if not names[i]]
    return [Item(name, files) for name, files in zip(names, inputs, strict=True)]


# Results


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from None


def output_files(task: str, name: str, members: int, kitti: bool) -> dict[str, str]:
    """What is written for one prediction: {kind: file name}. Of one member there is no uncertainty to write."""
    files = {
        "depth": {"png16": "depth_16bit.png", "npy": "depth.npy", "color": "depth_color.png"},
        "flow": {"flo": "flow.flo", "color": "flow_color.png"} | ({"kitti": "flow_kitti.png"} if kitti else {}),
        "amodal": {"mask": "amodal_mask.png", "whole": "amodal_whole.png"},
    }[task]
    if members > 1:
        files |= {"uncertainty": f"{task}_uncertainty.npy", "uncertainty_picture": f"{task}_uncertainty.png"}
    return {kind: f"{name}_{file}" for kind, file in files.items()}


def write_results(out: Path, files: dict[str, str], task: str, estimate: Any) -> None:
    """Write the files of ``output_files``; each is whole or absent.

    Depth: 16-bit PNG (0..65535 for 0..1), float32 NPY, colours. Flow: .flo, colours, KITTI's PNG. Amodal: mask 0/255,
    RGB of the whole object. Uncertainty: float32 NPY, and a picture whose brightest point is the largest value.
    """
    from scaling_perception.data import formats
    from scaling_perception.evaluation.pictures import heat, whole_picture

    value = estimate.prediction
    if task == "depth":
        formats.write_png16(out / files["png16"], np.round(np.clip(value, 0, 1) * 65535).astype(np.uint16))
        _write_npy(out / files["npy"], value)
        formats.write_image(out / files["color"], formats.depth_to_color(value))
    elif task == "flow":
        formats.write_flo(out / files["flo"], value)
        formats.write_image(out / files["color"], formats.flow_to_color(value))
        if "kitti" in files:
            formats.write_kitti_flow(out / files["kitti"], value)
    else:
        formats.write_image(out / files["mask"], value.astype(np.uint8) * 255)
        formats.write_image(out / files["whole"], whole_picture(estimate.whole))
    if "uncertainty" in files:
        _write_npy(out / files["uncertainty"], estimate.uncertainty)
        formats.write_image(out / files["uncertainty_picture"], heat(estimate.uncertainty))


def _write_npy(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, np.ascontiguousarray(array, np.float32))


def sidecar_path(out: Path, item: Item, task: str) -> Path:
    """The JSON that is written after everything else of a prediction: where it is, the prediction is finished."""
    return out / f"{item.name}_{task}.json"


def is_finished(out: Path, item: Item, task: str, settings: dict[str, Any], files: dict[str, str]) -> bool:
    """Whether this prediction is there, of the same inputs.

    Raises:
        UserError: a result of other settings is there: neither keeping nor replacing it silently would be right.
    """
    path = sidecar_path(out, item, task)
    if not path.is_file() or not all((out / file).is_file() for file in files.values()):
        return False
    found = read_json(path)
    for name, value in settings.items():
        if found.get("settings", {}).get(name) != value:
            was = found.get("settings", {}).get(name)
            raise UserError(
                f"{path} was made with {name} {was}, not {value}: give --overwrite, or another --out to keep both"
            )
    return found.get("inputs", {}).get("sha256") == [_digest(file) for file in item.inputs]


def run(args: argparse.Namespace) -> int:
    from scaling_perception.tasks import get_task

    get_task(args.task)
    if args.mask is not None and args.task != "amodal":
        raise UserError(f"--mask belongs to amodal, not to {args.task}: leave it out")
    if args.kitti and args.task != "flow":
        raise UserError(f"--kitti belongs to flow, not to {args.task}: leave it out")
    out = Path(args.out)
    for word in args.inputs:
        if Path(word).is_dir() and Path(word).resolve() == out.resolve():
            raise UserError(f"--out {out} is an input folder: its results would become inputs; choose another")
    items = name_results(find_inputs(args.inputs, args.task, args.mask), args.task)

    from scaling_perception import Predictor

    predictor = Predictor.from_pretrained(args.model, autoencoder=args.autoencoder, dtype=args.dtype)
    return _predict(args, predictor, items, out)


def _settings(args: argparse.Namespace, predictor: Any, diffusion: Any) -> dict[str, Any]:
    """All that decides a result besides the inputs."""
    import dataclasses

    from scaling_perception.evaluation.protocols import reduce_mode

    return {
        "weights": predictor.id,
        "autoencoder_weights": predictor.autoencoder_id,
        "resolution": predictor.resolution,
        "steps": args.steps,
        "ensemble": args.ensemble,
        "reduce": reduce_mode(args.task, args.reduce),
        "diffusion": dataclasses.asdict(diffusion),
        "seed": args.seed,
        "dtype": args.dtype,
        "task_options": predictor.options.to_dict(),
    }


def _predict(args: argparse.Namespace, predictor: Any, items: list[Item], out: Path) -> int:
    from scaling_perception import __version__
    from scaling_perception.evaluation.settings import Settings
    from scaling_perception.support.progress import progress

    task = args.task
    predictor.check_task(task)
    diffusion = predictor.choose_diffusion(args.preset, args.spacing)
    given = {"preset": args.preset, "spacing": args.spacing, "reduce": args.reduce}
    chosen = Settings(steps=args.steps, ensemble=args.ensemble, **given)
    settings = _settings(args, predictor, diffusion)
    files = {item: output_files(task, item.name, args.ensemble, args.kitti) for item in items}
    failures: list[str] = []
    if args.overwrite:
        todo = items
    else:
        todo = [item for item in items if not _finished(out, item, task, settings, files[item])]
    readable: list[Item] = []

    def raws() -> Iterator[dict[str, Any]]:
        for item in todo:
            try:
                prompt = item.inputs[1:] or None
                raw = predictor.raw_inputs(item.inputs[:1], task, prompt)[0]
            except UserError as error:
                failures.append(str(error))
                continue
            readable.append(item)
            yield raw

    stream = predictor.stream(raws(), task, chosen, args.seed, args.batch_size, len(todo))
    done = 0
    for index, estimate in enumerate(progress(stream, len(todo), f"predict {task}") if todo else ()):
        item = readable[index]
        write_results(out, files[item], task, estimate)
        record = {
            "format": _FORMAT,
            "version": __version__,
            "task": task,
            "inputs": {
                "files": [str(file.resolve()) for file in item.inputs],
                "sha256": [_digest(file) for file in item.inputs],
            },
            "size": {"height": estimate.size[0], "width": estimate.size[1]},
            "model": args.model,
            "autoencoder": predictor.autoencoder.name,
            "settings": settings,
            "macs": None if np.isnan(predictor.macs_per_forward) else predictor.macs(task, args.steps, args.ensemble),
            "largest_uncertainty": float(np.max(estimate.uncertainty)) if args.ensemble > 1 else None,
            "outputs": files[item],
        }
        write_json(sidecar_path(out, item, task), record)
        done += 1
    kept = f", {len(items) - len(todo)} already there" if len(todo) < len(items) else ""
    print(f"{task}: {done} written to {out}{kept}" + (f", {len(failures)} failed" if failures else ""))
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failures else 0


def _finished(out: Path, item: Item, task: str, settings: dict[str, Any], files: dict[str, str]) -> bool:
    """As ``is_finished``; an input that has gone is left to be named among the failures."""
    missing = not all(file.is_file() for file in item.inputs)
    return False if missing else is_finished(out, item, task, settings, files)
