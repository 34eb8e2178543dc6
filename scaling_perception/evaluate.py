"""Error of a model on a dataset, by denoising steps and ensemble size.

Writes one JSON: every cell of the grid with its error (mean over images and 95 % interval), MACs and seconds, the rows
of all images, the trivial answers, and the autoencoder's floor. `report` makes a page of it.
"""

import argparse
import csv
import io
import os
import sys
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json, write_text

EXAMPLES = """
scaling-perception evaluate --task depth --dataset scenes --model mini --count 32 --json runs/depth.json
scaling-perception evaluate --task depth --dataset nyuv2 --data /data/nyuv2 --model mini --steps 1,5,10 --ensemble 1,5 --json runs/nyu.json
scaling-perception evaluate --task flow --dataset flying_chairs --data /data/FlyingChairs --model runs/flow --preset fixed,paper --json runs/flow.json --panels 4
"""  # noqa: E501

_FORMAT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, help="depth, flow or amodal")
    parser.add_argument(
        "--dataset", required=True, help="scenes, hypersim, nyuv2, flying_chairs, pix2gestalt, folder, …"
    )
    parser.add_argument("--data", default="", metavar="DIR", help="folder of the dataset (scenes needs none)")
    parser.add_argument("--split", default="val", help="train, val, test or all, as the dataset has them (default val)")
    parser.add_argument("--count", type=int, default=0, help="at most so many images (default all; scenes 64)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of the dataset; may be repeated"
    )
    parser.add_argument("--model", required=True, help="model folder, training run, hub id, or a name such as mini")
    parser.add_argument("--autoencoder", help="another autoencoder than the model's: name, folder or hub id")
    parser.add_argument("--steps", default="10", help="denoising steps, comma-separated (default 10)")
    parser.add_argument("--ensemble", default="5", help="ensemble sizes, comma-separated (default 5)")
    parser.add_argument("--preset", help="timestep grids: fixed, paper, released (default: the model's own)")
    parser.add_argument("--reduce", help="merging: depth lsq, median, minmax, marigold; flow mean, median")
    parser.add_argument("--seed", type=int, default=0, help="key of all noise (default 0)")
    parser.add_argument("--batch-size", type=int, help="images × members at once (default: by memory)")
    parser.add_argument("--dtype", default="float32", help="of the transformer's products: float32 or bfloat16")
    parser.add_argument("--json", required=True, metavar="OUT", help="result to write")
    parser.add_argument("--csv", metavar="OUT", help="also write one line a cell")
    parser.add_argument("--panels", type=int, default=0, metavar="K", help="save pictures of the first K images")


def numbers(text: str, flag: str) -> list[int]:
    """``1,2,5`` as whole numbers above 0.

    Raises:
        UserError: anything else.
    """
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UserError(f"{flag} '{text}': give whole numbers above 0, such as 1,2,5")
    return values


def _options(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"--option '{word}' has no value: write NAME=VALUE")
        options[name] = int(value) if value.lstrip("-").isdigit() else value
    return options


def _check_folder(path: Path) -> None:
    """Refuse before an hour of computing what would be refused after it."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; choose another place for {path.name}") from None
    if not os.access(folder, os.W_OK) or path.is_dir():
        raise UserError(f"cannot write {path}: choose another place")


def open_data(args: argparse.Namespace) -> Any:
    """The source that the flags name.

    Raises:
        UserError: unknown dataset, task, split or option, or missing files.
    """
    from scaling_perception.data.sources import open_source

    options = _options(args.option)
    if args.count < 0:
        raise UserError(f"--count {args.count}: give a whole number above 0, or leave it out for all")
    if args.count or args.dataset == "scenes":
        options["count"] = args.count or 64
    return open_source(args.dataset, args.data, args.split, args.task, **options)


def run(args: argparse.Namespace) -> int:
    from scaling_perception import Predictor, __version__
    from scaling_perception.evaluation.protocols import get_protocol, reduce_mode
    from scaling_perception.evaluation.sweep import sweep
    from scaling_perception.support.progress import progress
    from scaling_perception.tasks import get_task

    get_task(args.task)
    steps, ensemble = numbers(args.steps, "--steps"), numbers(args.ensemble, "--ensemble")
    mode = reduce_mode(args.task, args.reduce)
    presets = [name.strip() for name in args.preset.split(",") if name.strip()] if args.preset else [None]
    out = Path(args.json)
    for path in filter(None, (args.json, args.csv)):
        _check_folder(Path(path))
    source = open_data(args)
    predictor = Predictor.from_pretrained(args.model, autoencoder=args.autoencoder, dtype=args.dtype)
    protocol = get_protocol(args.task, args.dataset)
    found, shown = sweep(
        predictor,
        source,
        args.task,
        protocol,
        steps,
        ensemble,
        presets,
        mode,
        key=args.seed,
        batch_size=args.batch_size,
        panels=args.panels,
        progress=progress,
    )
    result = {
        "format": _FORMAT,
        "task": args.task,
        "dataset": args.dataset,
        "split": args.split,
        "model": args.model,
        "weights": predictor.id,
        "autoencoder": {"name": predictor.autoencoder.name, "weights": predictor.autoencoder_id},
        "resolution": predictor.resolution,
        "prediction_type": predictor.diffusion.prediction,
        "task_options": predictor.options.to_dict(),
        "seed": args.seed,
        "version": __version__,
        "data": source.fingerprint(),
        "protocol": protocol,
        **found,
        "panels": _write_panels(shown, args.task, protocol, out),
    }
    write_json(out, result)
    if args.csv:
        write_text(args.csv, cells_csv(result))
    print_table(result)
    print(f"written: {out}")
    return _report_skipped(found["skipped"])


def _write_panels(shown: list[Any], task: str, protocol: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    from scaling_perception.data.formats import write_image
    from scaling_perception.evaluation.pictures import panel_pictures

    panels = []
    for index, (raw, estimate, cell) in enumerate(shown):
        entry: dict[str, Any] = {"key": str(raw["key"])}
        for name, pixels in panel_pictures(task, raw, estimate, protocol).items():
            entry[name] = f"panels/{out.stem}_{index:02d}_{name}.png"
            write_image(out.parent / entry[name], pixels)
        panels.append({**entry, "cell": cell})
    return panels


def _report_skipped(skipped: list[dict[str, str]]) -> int:
    """Name what was left out; exit code 1 when a file could not be read (not when it just has nothing to measure)."""
    for item in skipped:
        print(f"left out: {item['key']}: {item['reason']}", file=sys.stderr)
    return 1 if any(item["kind"] == "unreadable" for item in skipped) else 0


def cells_csv(result: dict[str, Any]) -> str:
    """One line a cell: its settings, MACs, seconds, and mean, low and high of every metric."""
    names = ["preset", "spacing", "schedule", "steps", "ensemble", "reduce", "macs", "seconds"]
    metrics = list(result["cells"][0]["metrics"])
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    ends = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]
    table.writerow(["task", "dataset", "model", "images", *names, *ends])
    for cell in result["cells"]:
        values = [value for m in metrics for value in (cell["metrics"][m]["mean"], *cell["metrics"][m]["ci95"])]
        head = [result["task"], result["dataset"], result["model"], result["images"]]
        table.writerow([*head, *[cell[name] for name in names], *values])
    return text.getvalue()


def print_table(result: dict[str, Any]) -> None:
    """Print the cells and the trivial answers."""
    metrics = list(result["cells"][0]["metrics"])

    def figures(summary: dict[str, Any]) -> list[str]:
        values = [summary[m] for m in metrics]
        return [f"{v['mean']:.4f} [{v['ci95'][0]:.4f}, {v['ci95'][1]:.4f}]" for v in values]

    rows = [["preset", "steps", "N", "GMAC", "s/image", *metrics]]
    for cell in result["cells"]:
        macs = "" if cell["macs"] is None else f"{cell['macs'] / 1e9:.3g}"
        head = [cell["preset"], str(cell["steps"]), str(cell["ensemble"]), macs, f"{cell['seconds']:.3g}"]
        rows.append([*head, *figures(cell["metrics"])])
    rows += [[name, "", "", "", "", *figures(value["metrics"])] for name, value in result["baselines"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"{result['task']} on {result['dataset']}: {result['images']} images, model {result['model']}")
    for row in rows:
        left = row[0].ljust(widths[0])
        print("  " + "  ".join([left, *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]]))
