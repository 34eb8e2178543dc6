"""What an autoencoder does to pictures and to the tasks' targets: decode(encode(x)) against x, and how fast.

    python -m scaling_perception.training.round_trip tiny TAESD_FOLDER --scenes 64 \\
        --data hypersim:depth:DIR flying_chairs:flow:DIR pix2gestalt:amodal:DIR folder-of-photographs

prints one table: the given autoencoders, and ``none`` (no autoencoder: what the tasks' own encoding costs).
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling_perception.data.sources import open_source
from scaling_perception.models.autoencoders import Autoencoder, load_autoencoder, part_size
from scaling_perception.support.compiler_options import convolving
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TaskOptions, amodal, depth, flow
from scaling_perception.tasks.alignment import align
from scaling_perception.tasks.metrics import depth_metrics, flow_metrics, mask_iou

RoundTrip = Callable[[np.ndarray], np.ndarray]


def round_trip(model: Autoencoder | None) -> RoundTrip:
    """Pictures (N, R, R, 3) float32 -> the same after encoding and decoding; None gives them back as they are."""
    if model is None:
        return lambda pictures: np.asarray(pictures, np.float32)
    run = jax.jit(
        lambda params, x: model.decode(params, model.encode(params, x)[0][..., : model.latent_channels]),
        compiler_options=convolving(jax.default_backend()),
    )
    return lambda pictures: np.asarray(run(model.params, np.asarray(pictures, np.float32)))


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1] (peak 2), after clipping; 99 where they are equal."""
    error = float(np.mean(np.square(np.clip(picture, -1, 1).astype(np.float64) - truth)))
    return 99.0 if error == 0 else float(10 * np.log10(4 / error))


def sample_report(trip: RoundTrip, raw: Mapping[str, Any], resolution: int, options: TaskOptions) -> dict[str, float]:
    """Errors of one raw sample, for each task whose fields it has, at its native size.

    psnr of the image (dB); depth_abs_rel after least squares; flow_epe in native pixels; mask_iou of the whole object
    painted on white, against the same rule on the truth, and visible_iou of the mask prompt.
    """
    size = raw["image"].shape[:2]
    image = depth.conditions(raw, resolution, options)["image"]
    out = {"psnr": psnr(trip(image[None])[0], image)}
    if raw.get("depth") is not None:
        one = depth.encode(raw, resolution, options)[0]
        prediction = depth.decode_prediction(trip(one["target"][None])[None], size, options)[0]
        valid = np.isfinite(raw["depth"]) & (raw["depth"] > 0)
        valid = valid & raw["valid"] if raw.get("valid") is not None and raw.get("flow") is None else valid
        if valid.any():
            aligned = align(prediction, raw["depth"], valid)
            out["depth_abs_rel"] = depth_metrics(aligned, raw["depth"], valid)["abs_rel"]
    if raw.get("flow") is not None:
        both = np.stack([one["target"] for one in flow.encode(raw, resolution, options)])
        prediction = flow.decode_prediction(trip(both)[:, None], size, options)[0]
        valid = np.isfinite(raw["flow"]).all(axis=-1)
        valid = valid & raw["valid"] if raw.get("valid") is not None else valid
        if valid.any():
            out["flow_epe"] = flow_metrics(prediction, np.where(valid[..., None], raw["flow"], 0), valid)["epe"]
    if raw.get("whole") is not None:
        one = amodal.encode(raw, resolution, options)[0]
        whole, visible = trip(np.stack([one["target"], one["prompt"]]))
        truth = amodal.mask_from_whole(one["target"], options.mask_threshold)
        if truth.any():
            out["mask_iou"] = mask_iou(amodal.mask_from_whole(whole, options.mask_threshold), truth)
        if (one["prompt"] > 0).any():
            out["visible_iou"] = mask_iou(whole_mask(visible), whole_mask(one["prompt"]))
        out["whole_psnr"] = psnr(whole, one["target"])
    return out


def whole_mask(prompt: np.ndarray) -> np.ndarray:
    """A +-1 mask picture (R, R, 3) as bool (R, R)."""
    return prompt.mean(axis=-1) > 0


def round_trip_report(
    model: Autoencoder | None, samples: Iterable[Mapping[str, Any]], resolution: int = 128
) -> dict[str, float]:
    """Means over the samples of :func:`sample_report`, each over the samples that have it, and ``images``."""
    trip, options = round_trip(model), TaskOptions()
    rows = [sample_report(trip, raw, resolution, options) for raw in samples]
    names = sorted({name for row in rows for name in row})
    means = {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
    return {"images": float(len(rows)), **means}


def speeds(models: Sequence[Autoencoder], resolution: int = 128, batch: int = 8, rounds: int = 5) -> list[dict]:
    """Images per second of encoding and decoding, float32, best of ``rounds`` that take the models in turn."""
    images = np.random.default_rng(0).uniform(-1, 1, (batch, resolution, resolution, 3)).astype(np.float32)
    runs = []
    for model in models:
        encode = jax.jit(lambda p, x, m=model: m.encode(p, x)[0][..., : m.latent_channels])
        decode = jax.jit(model.decode)
        runs.append((model.params, encode, decode, np.asarray(encode(model.params, images))))
        decode(model.params, runs[-1][3]).block_until_ready()
    best = [{"encode_per_s": 0.0, "decode_per_s": 0.0} for _ in models]
    for _ in range(rounds):
        for (params, encode, decode, latents), figures in zip(runs, best, strict=True):
            for name, run, x in (("encode_per_s", encode, images), ("decode_per_s", decode, latents)):
                start = time.perf_counter()
                run(params, x).block_until_ready()
                figures[name] = max(figures[name], batch / (time.perf_counter() - start))
    return best


def size_report(model: Autoencoder, resolution: int = 128) -> dict[str, float]:
    """Parameters and multiply-accumulates (one image of ``resolution``), encoder and decoder."""
    out: dict[str, float] = {}
    for part in ("encoder", "decoder"):
        count, macs = part_size(model, part, resolution, resolution)
        out[f"{part}_params"] = float(count)
        out[f"{part}_mmacs"] = macs / 1e6
    return out


def photographs(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first ``count`` JPEG or PNG files below ``folder`` in the order of their names, the middle square of each."""
    from PIL import Image

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})[:count]
    if not files:
        raise UserError(f"{folder} holds no .jpg or .png file: give a folder of photographs")
    out = []
    for file in files:
        image = Image.open(file).convert("RGB")
        side, (width, height) = min(image.size), image.size
        left, top = (width - side) // 2, (height - side) // 2
        out.append({"key": file.name, "image": np.asarray(image.crop((left, top, left + side, top + side)))})
    return out


def _sets(args: argparse.Namespace) -> dict[str, list[Mapping[str, Any]]]:
    from scaling_perception.data.sources.scenes import render_scene

    sets: dict[str, list[Mapping[str, Any]]] = {
        "scenes": [render_scene(2_000_000_000 + index, args.resolution) for index in range(args.scenes)]
    }
    for item in args.data:
        name, *rest = item.split(":", 2)
        if len(rest) == 2:
            source = open_source(name, rest[1], "all", rest[0])
            sets[name] = [source[index] for index in range(min(len(source), args.count))]
        else:
            sets[Path(item).name] = list(photographs(Path(item), args.count))
    return sets


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="autoencoders: 'tiny', folders or hub ids")
    parser.add_argument("--data", nargs="*", default=[], help="SOURCE:TASK:DIR, or a folder of photographs")
    parser.add_argument("--scenes", type=int, default=64, help="held-out scenes (test split)")
    parser.add_argument("--count", type=int, default=100, help="samples of each other set at most")
    parser.add_argument("--resolution", type=int, default=128)
    args = parser.parse_args(argv)
    models = [load_autoencoder(name) for name in args.models]
    sets = _sets(args)
    for model, speed in zip(models, speeds(models, args.resolution), strict=True):
        print(f"{model.name}  " + _line({**size_report(model, args.resolution), **speed}))
    for name, samples in sets.items():
        for model in (None, *models):
            figures = round_trip_report(model, samples, args.resolution)
            print(f"{name}  {model.name if model else 'none'}  " + _line(figures), flush=True)


def _line(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.5g}" for name, value in figures.items())


if __name__ == "__main__":
    main()
