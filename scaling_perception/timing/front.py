"""`bench front`: error against wall seconds, for each row of a model's table of budgets beside the released loop in
PyTorch (50 steps × 5 members on the leading grid) on the same weights, pictures and noise; speed-up at equal error.

Both predict one picture at a time. Seconds are of whole predictions from the picture to the merged map, compiling left
out; errors are of the same pictures, so that differences are paired. Features of the conditions, where the model takes
some, are given to the loop and not in its seconds: the speed-up is then a lower bound.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import COUNT
from scaling_perception.timing import peer

STEPS, MEMBERS = 50, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model folder, training run, hub id, or a name: with budgets")
    parser.add_argument("--task", default="depth", help="depth, flow, amodal or normals (default depth)")
    parser.add_argument("--dataset", help="(default: what the budgets were measured on)")
    parser.add_argument("--data", default="", metavar="DIR", help="folder of the dataset (scenes and worlds need none)")
    parser.add_argument("--split", default="test", help="(default test)")
    parser.add_argument("--count", type=COUNT, default=16, help="pictures, at least 5 (default 16)")
    parser.add_argument(
        "--one-step",
        metavar="MODEL",
        help="a model of configs/one_step.py: one more row, its single step of one member",
    )
    parser.add_argument("--figure", metavar="PNG", help="also draw error against seconds")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of the front and the loop.

    Raises:
        UserError: no PyTorch, no table of budgets for the task, a model that the loop is not written for, few pictures,
            ``--one-step`` of a model that was not trained for one.
    """
    from scaling_perception import Predictor
    from scaling_perception.data.sources import open_source
    from scaling_perception.evaluation.budget_table import error_rows
    from scaling_perception.evaluation.grid_table import measurable
    from scaling_perception.evaluation.intervals import FEWEST_IMAGES, bootstrap_ci
    from scaling_perception.evaluation.protocols import measure as measure_error
    from scaling_perception.evaluation.protocols import protocol_of
    from scaling_perception.inference.budgets import budgets_of, front, table_choices
    from scaling_perception.inference.inputs import prompt_of

    if args.figure and not args.figure.endswith(".png"):
        raise UserError(f"--figure {args.figure}: end the name in .png")
    predictor, task = Predictor.from_pretrained(args.model), args.task
    predictor.check_task(task)
    entry = (budgets_of(predictor, task) or {"tasks": {}})["tasks"].get(task)
    if entry is None:
        raise UserError(f"--model {args.model} has no budgets for {task}: `evaluate --write-budgets` makes them")
    every = [(predictor, choice.settings) for choice in front(table_choices(entry))]
    if args.one_step:
        every.append(_of_one_step(Predictor.from_pretrained(args.one_step), args.one_step, task))
    loop, given_of = make_loop(predictor, task)
    dataset = args.dataset or entry["dataset"]
    protocol = protocol_of(predictor.options, task, dataset)
    raws = measurable(open_source(dataset, args.data, args.split, task, count=args.count), protocol)
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
        return error_rows(task, rows), seconds

    for raw in raws:
        given_of(raw)  # made ahead: not in the loop's seconds
    theirs, spent = run(loop)
    slow = float(np.median(spent))
    found = []
    for one, own in every:
        errors, seconds = run(
            lambda raw, one=one, own=own: one(raw["image"], task, prompt=prompt_of(raw, task), **own).prediction
        )
        found.append(
            {
                "model": args.model if one is predictor else args.one_step,
                "settings": own,
                "error": float(errors.mean()),
                "seconds": float(np.median(seconds)),
                "speed_up": slow / float(np.median(seconds)),
                "difference": {"mean": float((errors - theirs).mean()), "ci95": bootstrap_ci(errors - theirs)},
            }
        )
    result = {
        "model": args.model,
        "task": task,
        "dataset": dataset,
        "weights": predictor.id,
        "images": len(raws),
        "loop": {"steps": STEPS, "ensemble": MEMBERS, "error": float(theirs.mean()), "seconds": slow},
        "rows": found,
        "equal": next((i for i, row in enumerate(found) if row["difference"]["mean"] <= 0), None),
    }
    if args.figure:
        draw(result, args.figure)
    return result


def _of_one_step(model: Any, name: str, task: str) -> tuple[Any, dict[str, Any]]:
    """The model and the settings that it was trained for."""
    if not model.one_step:
        raise UserError(f"--one-step {name}: not trained for one step: configs/one_step.py trains such a model")
    model.check_task(task)
    return model, {"steps": 1, "ensemble": 1, "solver": "ddim", "spacing": "trailing"}


Loop = Callable[[dict[str, Any]], np.ndarray]


def make_loop(predictor: Any, task: str = "depth") -> tuple[Loop, Callable[[dict[str, Any]], Any]]:
    """The released loop, a raw sample to its prediction at native size, and what it is given of a sample: the noise
    (M, P, h, w, 4) of the predictor's own members and the features (conditions, h, w, F), made once for each sample.

    Raises:
        UserError: no PyTorch, or a model it is not written for.
    """
    import dataclasses

    import jax

    from scaling_perception.inference.batches import BatchPlan
    from scaling_perception.inference.draws import draw_members
    from scaling_perception.inference.settings import Settings
    from scaling_perception.tasks import get_task

    if predictor.diffusion.prediction != "v":
        raise UserError(
            f"--model: the PyTorch loop is written for models of v, and this one predicts "
            f"{predictor.diffusion.prediction}: choose another"
        )
    torch_peer = peer.prepare()
    network, passes = torch_peer.make_dit(predictor.config, predictor.params, "sdpa"), predictor.passes(task)
    leading = dataclasses.replace(predictor.diffusion, spacing="leading")
    samplers = [
        torch_peer.Sampler(network, predictor.autoencoder, leading, STEPS, int(label)) for label in passes.labels
    ]
    encode, decode = samplers[0].encode, samplers[0].decode
    fields = ("image", "prompt")[: predictor.config.conditions]
    tables = Settings(steps=1).tables(dataclasses.replace(predictor.diffusion, spacing="trailing"))
    given: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # made when a picture is first seen

    def given_of(raw: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        if raw["key"] not in given:
            draw = draw_members(jax.random.key(0), predictor.image_ids([raw], 1), 0, MEMBERS, False)
            latents = predictor.encode([raw], task, BatchPlan(1, MEMBERS))
            state = predictor.engine.init_state(predictor.params, latents, draw, passes, tables)[2]
            both = np.stack(np.split(np.asarray(latents[0]), len(fields), axis=-1))
            given[raw["key"]] = np.asarray(state.x[0]), both[..., predictor.autoencoder.latent_channels :]
        return given[raw["key"]]

    def predict(raw: dict[str, Any]) -> np.ndarray:
        import torch  # pyright: ignore[reportMissingImports]

        conditions = get_task(task).conditions(raw, predictor.resolution, predictor.options)
        pictures = [np.asarray(conditions[name], np.float32) for name in fields]
        noise, features = given_of(raw)

        def every_condition(image: Any) -> Any:
            parts = []
            for picture, found in zip(pictures, features, strict=True):
                parts += [encode(image.new_tensor(picture.transpose(2, 0, 1)[None]))]
                parts += [image.new_tensor(found.transpose(2, 0, 1)[None])]
            return torch.cat(parts, dim=1)

        pixels = []
        for number, sampler in enumerate(samplers):
            scale, shift = (torch.from_numpy(rows[number])[:, None, None] for rows in (passes.scale, passes.shift))
            sampler.encode = every_condition
            sampler.decode = lambda z, scale=scale, shift=shift: decode(z * scale + shift)
            pixels.append(sampler(pictures[0], noise[:, number]))
        members = predictor.decode_members(np.stack(pixels), task)
        mode = get_task(task).reduce_mode(None)
        return predictor.merge(members, task, raw["image"].shape[:2], mode, raw).prediction

    return predict, given_of


def table(result: Mapping[str, Any]) -> str:
    return "\n".join(_lines(result))


def _words(settings: Mapping[str, Any]) -> str:
    more = [str(settings[name]) for name in ("spacing", "cache", "merge_in", "views") if name in settings]
    return " ".join([f"{settings['steps']} × {settings['ensemble']}", settings["solver"], *more])


def _of(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    return "" if row["model"] == result["model"] else f" of {row['model']}"


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    loop = result["loop"]
    what = f"{result['images']} pictures of {result['dataset']}"
    yield f"{result['task']}, {what}, one at a time, model {result['model']}"
    yield "steps × members | error | minus the loop | s | times faster"
    yield f"PyTorch {loop['steps']} × {loop['ensemble']} | {loop['error']:.4f} | | {loop['seconds']:.3f} | 1"
    for row in result["rows"]:
        low, high = row["difference"]["ci95"]
        paired = f"{row['difference']['mean']:+.4f} [{low:+.4f}, {high:+.4f}]"
        numbers = f"{row['error']:.4f} | {paired} | {row['seconds']:.3f} | {row['speed_up']:.1f}"
        yield f"{_words(row['settings'])}{_of(row, result)} | {numbers}"
    if result["equal"] is None:
        yield "no row reaches the loop's error"
    else:
        row = result["rows"][result["equal"]]
        which = _words(row["settings"]) + _of(row, result)
        yield f"at an error not above the loop's: {row['speed_up']:.1f} times faster ({which})"


def draw(result: Mapping[str, Any], path: str) -> None:
    """A PNG of error against seconds."""
    from matplotlib.figure import Figure

    from scaling_perception.evaluation.labels import MAIN_METRIC
    from scaling_perception.support.files import atomic_path

    main = MAIN_METRIC[result["task"]]
    figure = Figure(figsize=(6, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    rows, loop = sorted(result["rows"], key=lambda row: row["seconds"]), result["loop"]
    own = [row for row in rows if row["model"] == result["model"]]
    axes.plot([row["seconds"] for row in own], [row["error"] for row in own], "o-", label="the model's budgets")
    for row in rows:
        if row["model"] != result["model"]:
            axes.plot([row["seconds"]], [row["error"]], "D", label="fine-tuned for one step")
    axes.plot([loop["seconds"]], [loop["error"]], "s", label=f"PyTorch, {loop['steps']} steps × {loop['ensemble']}")
    axes.axhline(loop["error"], lw=0.6, ls="--", color="grey")
    axes.set(xscale="log", xlabel="seconds a picture", ylabel=main.error_label)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
