"""Depth of rendered clips, frame by frame and as clips: error and flicker against the known depth and motion.

    python benchmarks/clip.py --clips 16 --frames 8

AbsRel is taken after one scale and shift for the whole clip, by least squares, as a user of a clip needs it; "each
frame" has its own for every frame. Flicker is in metres, after the one fit, along the true motion (`inference.clips`);
that of the true depth is what no prediction has to go below. Intervals and differences are over clips, paired.
"""

import argparse
from pathlib import Path

import numpy as np

from scaling_perception import Predictor
from scaling_perception.data.formats import write_image
from scaling_perception.data.sources.scenes import SPLIT_STARTS, render_clip
from scaling_perception.evaluation.comparisons import change
from scaling_perception.inference.clips import align, flicker, members_of_frames
from scaling_perception.inference.settings import Settings
from scaling_perception.tasks import get_task
from scaling_perception.tasks.alignment import fit_scale_shift


def metres(predictions: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Predictions (F, H, W) after one scale and shift to the truth."""
    scale, shift = fit_scale_shift(predictions.ravel(), truth.ravel())
    return np.maximum(scale * predictions + shift, 1e-3)


def measure(predictions: np.ndarray, clip: list[dict]) -> dict[str, float]:
    """Errors and flicker of a clip's predictions (F, H, W)."""
    truth = np.stack([frame["depth"] for frame in clip])
    once = metres(predictions, truth)
    each = np.stack([metres(one[None], frame[None])[0] for one, frame in zip(predictions, truth, strict=True)])
    return {
        "AbsRel": float(np.mean(np.abs(once - truth) / truth)),
        "AbsRel, each frame": float(np.mean(np.abs(each - truth) / truth)),
        "flicker": flickers(once, clip),
    }


def flickers(depth: np.ndarray, clip: list[dict]) -> float:
    """Mean flicker of a clip of depth (F, H, W) in metres."""
    pairs = zip(depth, depth[1:], clip, clip[1:], strict=False)
    return float(np.mean([flicker(a, b, one["flow"], (one["image"], two["image"])) for a, b, one, two in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ensemble", type=int, default=2)
    parser.add_argument("--carry", default="0.1,0.3", help="shares to try, comma-separated")
    parser.add_argument("--keep", metavar="DIR", help="also write the frames of the first clip here")
    args = parser.parse_args()
    model = Predictor.from_pretrained(args.model)
    settings, key = Settings(args.steps, args.ensemble), 0
    tables = model.tables(settings, "depth", model.choose_diffusion())
    mode = get_task("depth").reduce_mode(None)
    shares = [0.0, *map(float, args.carry.split(","))]
    rows: dict[str, list[dict[str, float]]] = {}
    for number in range(args.clips):
        clip = render_clip(SPLIT_STARTS["val"] + number, args.frames, model.resolution)
        if args.keep and not number:
            for i, frame in enumerate(clip):
                write_image(Path(args.keep) / f"frame_{i:04d}.png", frame["image"])
        raws = [{"key": frame["key"], "image": frame["image"]} for frame in clip]
        alone = [found.prediction for found in model.stream(raws, "depth", settings, key, count=len(raws))]
        made = {"frame by frame": np.stack(alone)}
        for share in shares:
            members = list(members_of_frames(model, raws, "depth", settings, tables, key, share))
            name = "clip" if not share else f"clip, carry {share:g}"
            made[name] = np.stack([prediction for prediction, _ in align(model, members, "depth", mode)])
        for name, predictions in made.items():
            rows.setdefault(name, []).append(measure(predictions, clip))
        truth = np.stack([frame["depth"] for frame in clip])
        rows.setdefault("true depth", []).append({"flicker": flickers(truth, clip)})
    for name, found in rows.items():
        print(name)
        for metric in found[0]:
            now, before = ({str(i): row[metric] for i, row in enumerate(of)} for of in (found, rows["frame by frame"]))
            print(f"  {metric}: {np.mean(list(now.values())):.4f}, against frame by frame {change(before, now)}")


if __name__ == "__main__":
    main()
