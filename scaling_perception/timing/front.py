"""`bench front`: error against wall seconds, for each row of a model's table of budgets beside the released loop in
PyTorch (50 steps × 5 members on the leading grid) on the same weights, pictures and noise; speed-up at equal error.

Both predict one picture at a time. Seconds are of whole predictions from the picture to the merged map, compiling left
out; errors are of the same pictures, so that differences are paired.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import COUNT
from scaling_perception.timing import peer

STEPS, MEMBERS, TASK = 50, 5, "depth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model folder, training run, hub id, or a name: with budgets")
    parser.add_argument("--dataset", default="scenes", help="of depth (default scenes)")
    parser.add_argument("--data", default="", metavar="DIR", help="folder of the dataset (scenes needs none)")
    parser.add_argument("--split", default="test", help="(default test)")
    parser.add_argument("--count", type=COUNT, default=16, help="pictures, at least 5 (default 16)")
    parser.add_argument("--figure", metavar="PNG", help="also draw error against seconds")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of the front and the loop.

    Raises:
        UserError: no PyTorch, no table of budgets for depth, a model that the loop is not written for, few pictures.
    """
    from scaling_perception import Predictor
    from scaling_perception.data.sources import open_source
    from scaling_perception.evaluation.budget_table import error_rows
    from scaling_perception.evaluation.grid_table import measurable
    from scaling_perception.evaluation.intervals import FEWEST_IMAGES, bootstrap_ci
    from scaling_perception.evaluation.protocols import get_protocol
    from scaling_perception.evaluation.protocols import measure as measure_error
    from scaling_perception.inference.budgets import front, load_budgets, table_choices

    if args.figure and not args.figure.endswith(".png"):
        raise UserError(f"--figure {args.figure}: end the name in .png")
    predictor = Predictor.from_pretrained(args.model)
    table = load_budgets(predictor.folder or "") or {"tasks": {}}
    if TASK not in table["tasks"]:
        raise UserError(f"--model {args.model} has no budgets for {TASK}: `evaluate --write-budgets` makes them")
    loop, noise_of = make_loop(predictor)
    protocol = get_protocol(TASK, args.dataset)
    raws = measurable(open_source(args.dataset, args.data, args.split, TASK, count=args.count), protocol)
    if len(raws) < FEWEST_IMAGES:
        raise UserError(f"--count {args.count}: {len(raws)} pictures tell nothing apart: give {FEWEST_IMAGES} or more")

    def run(predict: Callable[[dict[str, Any]], np.ndarray]) -> tuple[np.ndarray, list[float]]:
        predict(raws[0])  # compiles
        rows, seconds = [], []
        for raw in raws:
            begin = time.perf_counter()
            answer = predict(raw)
            seconds.append(time.perf_counter() - begin)
            rows.append(measure_error(answer, raw, protocol))
        return error_rows(TASK, rows), seconds

    for raw in raws:
        noise_of(raw)  # drawn ahead: not in the loop's seconds
    theirs, spent = run(loop)
    slow = float(np.median(spent))
    found = []
    for choice in front(table_choices(table["tasks"][TASK])):
        names = ("steps", "ensemble", "preset", "spacing", "solver", "cache", "cache_interval", "merge_in")
        own = {name: getattr(choice, name) for name in names if getattr(choice, name) is not None}
        errors, seconds = run(lambda raw, own=own: predictor(raw["image"], TASK, **own).prediction)
        found.append(
            {
                "settings": own,
                "error": float(errors.mean()),
                "seconds": float(np.median(seconds)),
                "speed_up": slow / float(np.median(seconds)),
                "difference": {"mean": float((errors - theirs).mean()), "ci95": bootstrap_ci(errors - theirs)},
            }
        )
    result = {
        "model": args.model,
        "weights": predictor.id,
        "images": len(raws),
        "loop": {"steps": STEPS, "ensemble": MEMBERS, "error": float(theirs.mean()), "seconds": slow},
        "rows": found,
        "equal": next((i for i, row in enumerate(found) if row["difference"]["mean"] <= 0), None),
    }
    if args.figure:
        draw(result, args.figure)
    return result


Loop = Callable[[dict[str, Any]], np.ndarray]


def make_loop(predictor: Any) -> tuple[Loop, Loop]:
    """The released loop, a raw sample to its depth map (H, W), and the noise (M, h, w, 4) of the predictor's own
    members that it takes, which is drawn once for each sample.

    Raises:
        UserError: no PyTorch, or a model it is not written for.
    """
    import dataclasses

    import jax

    from scaling_perception.inference.batches import BatchPlan
    from scaling_perception.inference.engine import draw_members
    from scaling_perception.inference.settings import Settings
    from scaling_perception.tasks import get_task

    if predictor.config.features or predictor.diffusion.prediction != "v" or TASK not in predictor.tasks:
        raise UserError("--model: the PyTorch loop is written for depth models of v without features of the conditions")
    torch_peer = peer.prepare()
    network = torch_peer.make_dit(predictor.config, predictor.params, "sdpa")
    passes = predictor.passes(TASK)
    leading = dataclasses.replace(predictor.diffusion, spacing="leading")
    sampler = torch_peer.Sampler(network, predictor.autoencoder, leading, STEPS, int(passes.labels[0]))
    encode, decode, shift, scale = sampler.encode, sampler.decode, passes.shift[0], passes.scale[0]
    fields, given = ("image", "prompt")[: predictor.config.conditions], {}

    def every_condition(image: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        more = [image.new_tensor(given[name].transpose(2, 0, 1)[None]) for name in fields[1:]]
        return torch.cat([encode(one) for one in (image, *more)], dim=1)

    def in_units(z: Any) -> Any:
        like = [z.new_tensor(values)[None, :, None, None] for values in (scale, shift)]
        return decode(z * like[0] + like[1])

    sampler.encode, sampler.decode = every_condition, in_units
    tables = Settings(steps=1).tables(dataclasses.replace(predictor.diffusion, spacing="trailing"))

    noise: dict[str, np.ndarray] = {}  # drawn when a picture is first seen

    def noise_of(raw: dict[str, Any]) -> np.ndarray:
        if raw["key"] not in noise:
            draw = draw_members(jax.random.key(0), predictor.image_ids([raw], 1), 0, MEMBERS, False)
            latents = predictor.encode([raw], TASK, BatchPlan(1, MEMBERS))
            state = predictor.engine.init_state(predictor.params, latents, draw, passes, tables)[2]
            noise[raw["key"]] = np.asarray(state.x[0, :, 0])
        return noise[raw["key"]]

    def predict(raw: dict[str, Any]) -> np.ndarray:
        conditions = get_task(TASK).conditions(raw, predictor.resolution, predictor.options)
        given.update({name: np.asarray(conditions[name], np.float32) for name in fields})
        pixels = sampler(given["image"], noise_of(raw))
        members = predictor.decode_members(pixels[None], TASK)
        return predictor.merge(members, TASK, raw["image"].shape[:2], "lsq").prediction

    return predict, noise_of


def table(result: Mapping[str, Any]) -> str:
    return "\n".join(_lines(result))


def _words(settings: Mapping[str, Any]) -> str:
    more = [str(settings[name]) for name in ("spacing", "cache", "merge_in") if name in settings]
    return " ".join([f"{settings['steps']} × {settings['ensemble']}", settings["solver"], *more])


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    loop = result["loop"]
    yield f"depth, {result['images']} pictures, one at a time, model {result['model']}"
    yield "steps × members | error | minus the loop | s | times faster"
    yield f"PyTorch {loop['steps']} × {loop['ensemble']} | {loop['error']:.4f} | | {loop['seconds']:.3f} | 1"
    for row in result["rows"]:
        low, high = row["difference"]["ci95"]
        paired = f"{row['difference']['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"
        numbers = f"{row['error']:.4f} | {paired} | {row['seconds']:.3f} | {row['speed_up']:.1f}"
        yield f"{_words(row['settings'])} | {numbers}"
    if result["equal"] is None:
        yield "no row reaches the loop's error"
    else:
        row = result["rows"][result["equal"]]
        yield f"at an error not above the loop's: {row['speed_up']:.1f} times faster ({_words(row['settings'])})"


def draw(result: Mapping[str, Any], path: str) -> None:
    """A PNG of error against seconds."""
    from matplotlib.figure import Figure

    from scaling_perception.support.files import atomic_path

    figure = Figure(figsize=(6, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    rows, loop = sorted(result["rows"], key=lambda row: row["seconds"]), result["loop"]
    axes.plot([row["seconds"] for row in rows], [row["error"] for row in rows], "o-", label="the model's budgets")
    axes.plot([loop["seconds"]], [loop["error"]], "s", label=f"PyTorch, {loop['steps']} steps × {loop['ensemble']}")
    axes.axhline(loop["error"], lw=0.6, ls="--", color="grey")
    axes.set(xscale="log", xlabel="seconds a picture", ylabel="AbsRel")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
