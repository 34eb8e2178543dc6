"""Error of a model on a dataset, against compute: denoising steps, ensemble sizes, timestep grids, solvers, tolerances.

Writes one JSON: every cell of the grid with its error (mean over images and 95 % interval), MACs and seconds, the rows
of all images, the trivial answers, and the autoencoder's floor. `report` makes a page of it; CSV is for other tools.
What is done is kept in OUT.journal until the end: after a kill the same command goes on.
`--shard i/n` evaluates a part of the images, in as many jobs as there are parts; `--merge` joins them to the same JSON.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scaling_perception.evaluation.result_files import FORMAT, USUAL
from scaling_perception.inference.settings import FLAGS as SETTING_FLAGS
from scaling_perception.inference.settings import (
    SETTINGS,
    Settings,
    add_model_settings,
    add_settings,
    flag_of,
    given,
    shared_settings,
    values_of,
    words,
)
from scaling_perception.support.again import add_overwrite, check_output, refuse_other, replacing
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import read_json, write_json, write_text
from scaling_perception.support.parts import add_parts, part_of, refuse_other_flags
from scaling_perception.support.streams import print_message
from scaling_perception.support.verbs import COUNT, FROM_0, add_source_options, source_options

EXAMPLES = """
scaling-perception evaluate --task depth --dataset scenes --model mini --count 32 --json runs/depth.json
scaling-perception evaluate --task depth --dataset nyuv2 --data /data/nyuv2 --model mini --steps 1,5,10 --ensemble 1,5 --json runs/nyu.json
scaling-perception evaluate --task flow --dataset flying_chairs --data /data/FlyingChairs --model runs/flow --preset fixed,paper --json runs/flow.json --panels 4
scaling-perception evaluate --task depth --dataset scenes --model mini --steps 1,2,5,10 --ensemble 1,2,5,10 --tolerance 0.01,0.02,0.04 --json runs/adaptive.json
scaling-perception evaluate --task depth --dataset scenes --model runs/depth --steps 1,2,5,10 --ensemble 1,2,5 --write-budgets runs/depth --json runs/budgets.json
scaling-perception evaluate --task depth --dataset scenes --model runs/depth --count 32 --steps 10 --write-grids runs/depth
scaling-perception evaluate --task depth --dataset scenes --model runs/depth --split test --steps 2,4,10 --spacing trailing,learned --json runs/grids.json
"""  # noqa: E501

FLAGS = {
    "data source": "--dataset",
    "a root": "--data",
    **SETTING_FLAGS,
    **{name: f"--{name}" for name in ("task", "model", "autoencoder", "dtype", "option", "seed")},
}
"""What messages of the library call by name -> the flag."""

_ASKED = ("task", "dataset", "split", "count", "option", "metrics", "seed", "dtype", "panels", "controls")
OUTPUTS = ("json", "csv", "per_image")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, help="depth, flow, amodal or normals")
    parser.add_argument(
        "--dataset", required=True, help="scenes, hypersim, nyuv2, flying_chairs, pix2gestalt, folder, …"
    )
    parser.add_argument("--data", default="", metavar="DIR", help="folder of the dataset (scenes needs none)")
    parser.add_argument("--split", default="val", help="train, val, test or all, as the dataset has them (default val)")
    parser.add_argument("--count", type=COUNT, default=0, help="at most so many images (default all; scenes 64)")
    add_source_options(parser)
    parser.add_argument("--model", required=True, help="model folder, training run, hub id, or a name such as mini")
    add_model_settings(parser)
    add_settings(parser, sweep=True)
    parser.add_argument("--metrics", help="further metrics, comma-separated, or all")
    parser.add_argument("--json", metavar="OUT", help="result to write; without it the table is all")
    parser.add_argument("--csv", metavar="OUT", help="also write one line a cell (columns: docs/evaluate.md)")
    parser.add_argument("--per-image", metavar="OUT", help="also write a CSV of one line an image and cell")
    parser.add_argument(
        "--write-budgets", metavar="MODEL", help="put this into the model folder's budgets.json, for predict --budget"
    )
    parser.add_argument(
        "--write-grids",
        metavar="MODEL",
        help="only find timesteps for 1 to the most of --steps and put them into the model folder's grids.json, for "
        "--spacing learned",
    )
    parser.add_argument(
        "--one-lever",
        action="store_true",
        default=None,
        help="of presets, spacings, solvers and caches only cells that differ from the first of each in one at most",
    )
    add_overwrite(parser)
    add_parts(parser, "the images", "one result")
    parser.add_argument(
        "--controls",
        type=FROM_0,
        default=32,
        metavar="K",
        help="also measure what the model answers without the picture, on the first K images (default 32; 0: none)",
    )
    parser.add_argument("--panels", type=FROM_0, default=0, metavar="K", help="save pictures of the first K images")
    parser.add_argument(
        "--intermediates",
        metavar="T",
        help="with --panels: also what sampling predicts at these times of 1000 to 0, such as 1000,500,0",
    )


def times_of(text: str | None) -> list[int]:
    """``1000,500,0`` as times of the diffusion, all different; None is none.

    Raises:
        UserError: anything else.
    """
    if text is None:
        return []
    values = [int(part) if part.isdecimal() else -1 for part in words(text)]
    if not values or len(set(values)) < len(values) or not all(0 <= value <= 1000 for value in values):
        raise UserError(f"--intermediates '{text}': give different whole numbers from 1000 to 0, such as 1000,500,0")
    return values


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What a result records of the flags that decide its figures."""
    for name, value in USUAL.items():
        if not given(args, name):
            setattr(args, name, value)
    usual = {name: str(one["default"]) for name, one in SETTINGS.items()}
    more = [name for name in usual if given(args, name) and (name in USUAL or str(getattr(args, name)) != usual[name])]
    return {name: getattr(args, name) for name in (*_ASKED, *more)}


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
    from scaling_perception.data.sources import ENDLESS, open_source, taken

    options = source_options(args.option)
    if args.count or args.dataset in ENDLESS:
        options["count"] = args.count or 64
    source = open_source(args.dataset, args.data, args.split, args.task, **options)
    print(taken(source, args.dataset, args.data, args.split, args.task, **options), flush=True)
    return source


def run(args: argparse.Namespace) -> int:
    from scaling_perception import Predictor
    from scaling_perception.data.contents import contents_of, described
    from scaling_perception.diffusion.caching import combinations
    from scaling_perception.evaluation.budget_table import check_entry
    from scaling_perception.evaluation.nested import Adaptive
    from scaling_perception.evaluation.panels import PanelWriter
    from scaling_perception.evaluation.parts import part_journal, refuse_parts
    from scaling_perception.evaluation.protocols import count_note, get_protocol, protocol_of
    from scaling_perception.evaluation.sweep import sweep
    from scaling_perception.evaluation.tables import print_table
    from scaling_perception.parallel.mesh import local_mesh
    from scaling_perception.support.progress import progress
    from scaling_perception.tasks import TASKS, get_task

    part = part_of(args)
    if args.merge:
        return _merge(args)
    task = get_task(args.task)
    if task.measure is None:
        measured = [name for name, one in TASKS.items() if one.measure is not None]
        raise UserError(f"--task {args.task} has no truth to measure against: give {', '.join(measured)}")
    shared = shared_settings(args)
    tolerances = [tuple(values_of(args, name)) for name in ("tolerance", "step_tolerance")]
    merges = values_of(args, "merge_in")
    verifiers = tuple(itertools.product(values_of(args, "verifier"), values_of(args, "verify")))
    adaptive = Adaptive(tolerances[0], shared.first, tolerances[1], shared.step_chunk, "latents" in merges, verifiers)
    intervals = values_of(args, "cache_interval") if given(args, "cache_interval") else None
    caches = combinations(values_of(args, "cache"), intervals)
    views = values_of(args, "views")
    _check_merging(args.task, shared, merges, views, verifiers, tolerances[0])
    solvers = values_of(args, "solver")
    for solver, (cache, _), early in itertools.product(solvers, caches, tolerances[1] or [None]):
        dataclasses.replace(shared, solver=solver, cache=cache, step_tolerance=early)  # refused before anything is read
    asked = _asked(args)
    protocol = get_protocol(args.task, args.dataset)
    named = [*protocol["metrics"], *task.reported, *words(args.metrics)]
    metrics = "all" if args.metrics == "all" else list(dict.fromkeys(named))
    get_protocol(args.task, args.dataset, metrics)  # unknown metrics are refused before anything is loaded
    out = None if args.json is None else Path(args.json).expanduser()
    if part is not None:
        _check_part(args)
    if times_of(args.intermediates) and shared.aspect != "squash":
        raise UserError(f"--intermediates do not go with --aspect {shared.aspect}: leave out one of them")
    if out is None and args.panels:
        raise UserError("--panels are written beside the result: give --json OUT, or leave them out")
    times = times_of(args.intermediates)
    if times and not args.panels:
        raise UserError("--intermediates are pictures of --panels: give --panels K, or leave them out")
    folder = _check_places(args)
    if args.write_grids is not None:
        return _write_grids(args, protocol)
    source = open_data(args)
    if not args.count and (note := count_note(protocol, args.split, len(source))):
        print_message(note)
    for note in getattr(source, "notes", ()):
        print_message(note)
    data = described(source, contents_of(source))
    mesh = local_mesh(args.mesh)
    predictor = Predictor.from_pretrained(args.model, autoencoder=args.autoencoder, dtype=args.dtype, mesh=mesh)
    protocol = protocol_of(predictor.options, args.task, args.dataset, metrics)
    asked |= {"weights": predictor.id, "autoencoder": predictor.autoencoder_id, "data": data, "protocol": protocol}
    if args.one_lever:
        asked["one_lever"] = True
    if times:
        asked["intermediates"] = args.intermediates
    for path in (args.csv, args.per_image):
        check_output(path, asked, args.overwrite)
    if folder is not None:
        check_entry(folder, args.task, asked, args.overwrite, len(source))
    if out is not None and out.exists() and not args.overwrite:
        before = read_json(out)
        refuse_other(out, before.get("asked") if isinstance(before, dict) else None, asked)
        _write_tables(args, before, lambda: predictor, folder)
        print_table(before)
        print(f"already finished: {out}")
        return _report_skipped(before["skipped"])
    journal, about = None, {}
    if out is not None:
        journal = out.with_name(f"{out.name}.journal") if part is None else part_journal(out, part)
        if part is None:
            refuse_parts(out)
    if part is not None:
        about = json.loads(json.dumps(_about(args, asked, predictor, data, protocol)))
    found, panels = sweep(
        predictor,
        source,
        args.task,
        protocol,
        values_of(args, "steps"),
        values_of(args, "ensemble"),
        values_of(args, "preset") or [None],
        shared,
        key=asked["seed"],
        batch_size=args.batch_size,
        panels=args.panels,
        progress=progress,
        solvers=solvers,
        caches=caches,
        adaptive=adaptive,
        journal=journal,
        show=None if out is None else PanelWriter(protocol, out, predictor, times, asked["seed"]),
        controls=args.controls,
        part=part,
        described_by=about,
        spacings=values_of(args, "spacing"),
        views=views,
        one_lever=bool(args.one_lever),
    )
    if part is not None:
        print(f"part {part} is finished: {found['images']} images in {journal}")
        print(f"when all parts are finished: the same command with --merge in place of --shard {args.shard}")
        return 0
    result = {**_about(args, asked, predictor, data, protocol), **found, "panels": panels}
    code = _finish(args, out, result, lambda: predictor, folder)
    if journal is not None:
        journal.unlink(missing_ok=True)
    return code


def _check_merging(
    task: str,
    shared: Settings,
    merges: Sequence[str],
    views: Sequence[str],
    verifiers: Sequence[tuple[str, str]],
    tolerances: Sequence[float],
) -> None:
    """UserError for a way of merging, views or a verifier that the task does not have."""
    for merge in merges:
        dataclasses.replace(shared, merge_in=merge).reduce_for(task)
    for view in views:  # where several are asked for, latents are merged of members that see the picture
        dataclasses.replace(shared, views=view, merge_in=merges[0] if len(merges) == len(views) == 1 else "pixels")
    for verifier, use in verifiers:
        good = tolerances[0] if use == "allocate" and tolerances else None
        dataclasses.replace(shared, verifier=verifier, verify=use, tolerance=good).reduce_for(task)


def _about(
    args: argparse.Namespace, asked: dict[str, Any], predictor: Any, data: dict[str, Any], protocol: dict[str, Any]
) -> dict[str, Any]:
    """What a result says besides its figures."""
    from scaling_perception import __version__
    from scaling_perception.models.dit import count_params

    return {
        "format": FORMAT,
        "asked": asked,
        "task": args.task,
        "dataset": args.dataset,
        "split": args.split,
        "model": args.model,
        "weights": predictor.id,
        "params": count_params(predictor.config),
        "autoencoder": {"name": predictor.autoencoder.name, "weights": predictor.autoencoder_id},
        "resolution": predictor.resolution,
        "prediction_type": predictor.diffusion.prediction,
        "task_options": predictor.options.to_dict(),
        "dtype": asked["dtype"],
        "seed": asked["seed"],
        "version": __version__,
        "data": data,
        "protocol": protocol,
    }


def _finish(
    args: argparse.Namespace, out: Path | None, result: dict[str, Any], load: Callable[[], Any], folder: Path | None
) -> int:
    """Write and print a result; the exit code."""
    from scaling_perception.data.manifest import unlikely
    from scaling_perception.evaluation.tables import print_table

    if out is not None:
        write_json(out, result)
    _write_tables(args, result, load, folder)
    print_table(result)
    _report_constants(result["cells"])
    for note in unlikely(result["ranges"]):
        print_message(f"warning: {note}")
    if out is not None:
        print(f"written: {out}")
    return _report_skipped(result["skipped"])


_OF_THE_WHOLE = ("csv", "per_image", "write_budgets")


def _check_part(args: argparse.Namespace) -> None:
    """UserError for what a part alone cannot give."""
    if args.json is None:
        raise UserError("--shard keeps its part beside the result: give --json OUT")
    if args.overwrite:
        raise UserError("--overwrite replaces a whole result: leave out --shard, or choose another --json")
    for name in _OF_THE_WHOLE:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is made of the whole result: give it with --merge")


def _merge(args: argparse.Namespace) -> int:
    """Join the parts of a result; needs neither the model nor the data. Returns the exit code."""
    from scaling_perception.evaluation.parts import joined, part_journals
    from scaling_perception.evaluation.tables import print_table

    if args.json is None:
        raise UserError("--merge joins the parts beside the result: give --json OUT")
    out, folder = Path(args.json).expanduser(), _check_places(args)

    def load() -> Any:
        from scaling_perception import Predictor
        from scaling_perception.parallel.mesh import local_mesh

        mesh = local_mesh(args.mesh)
        return Predictor.from_pretrained(
            args.model, autoencoder=args.autoencoder, dtype=args.dtype or USUAL["dtype"], mesh=mesh
        )

    if out.exists() and not part_journals(out):
        result = read_json(out)
        _check_merged(args, out, result, folder)
        _write_tables(args, result, load, folder)
        print_table(result)
        print(f"already finished: {out}")
        return _report_skipped(result["skipped"])
    with joined(out) as result:
        _check_merged(args, out, result, folder)
        if out.exists():
            before = read_json(out)
            refuse_other(out, before.get("asked") if isinstance(before, dict) else None, result["asked"])
        return _finish(args, out, result, load, folder)


def _check_merged(args: argparse.Namespace, out: Path, result: Any, folder: Path | None) -> None:
    """UserError when the parts are of something else than the flags say, or tables of others are in the way."""
    from scaling_perception.evaluation.budget_table import check_entry

    if not isinstance(result, dict) or "asked" not in result:
        raise UserError(f"{out} is no result of this version: choose another --json")
    usual = {name: str(one["default"]) if one["swept"] else one["default"] for name, one in SETTINGS.items()}
    asked = {name: result["asked"].get(name, value) for name, value in usual.items()}
    asked |= {name: result["asked"][name] for name in _ASKED if name in result["asked"]}
    refuse_other_flags(add_arguments, args, {**asked, "model": result["model"]}, out.parent)
    for path in (args.csv, args.per_image):
        check_output(path, result["asked"], args.overwrite)
    if folder is not None:
        check_entry(folder, args.task, result["asked"], args.overwrite, result["images"])


def _report_constants(cells: list[dict[str, Any]]) -> None:
    """Name the settings under which the model answered with one value everywhere: their errors are those of a mean."""
    for cell in cells:
        if count := cell.get("constant_predictions"):
            where = f"{cell['preset']} {cell['solver']}, {cell['steps']} steps, {cell['ensemble']} members"
            print(f"note: {where}: {count} prediction(s) are constant over the picture", file=sys.stderr)


def _check_places(args: argparse.Namespace) -> Path | None:
    """Refuse outputs that cannot be written; the model folder that gets a table of budgets."""
    from scaling_perception.inference.budgets import TABLE

    for path in filter(None, (getattr(args, name) for name in OUTPUTS)):
        _check_folder(Path(path))
    return None if args.write_budgets is None else _table_folder(args.write_budgets, TABLE)


def _table_folder(name: str, table: Any) -> Path:
    """The model folder that gets a table (`TaskTable`); a damaged one is refused before the work, not after it."""
    from scaling_perception.inference.task_tables import read_table
    from scaling_perception.interop.find import find_model

    folder = find_model(name)
    read_table(table, folder)
    _check_folder(folder / table.file)
    return folder


_NOT_WITH_GRIDS = (
    *("json", "csv", "per_image", "write_budgets", "shard"),
    *("preset", "spacing", "solver", "cache", "views"),
)


def _write_grids(args: argparse.Namespace, protocol: dict[str, Any]) -> int:
    """Find the model's learned grids for the task and write them; the exit code."""
    from scaling_perception import Predictor
    from scaling_perception.evaluation.grid_table import grid_entry, measurable
    from scaling_perception.inference.grids import TABLE
    from scaling_perception.inference.task_tables import refuse_other_model, write_entry
    from scaling_perception.parallel.mesh import local_mesh

    for name in _NOT_WITH_GRIDS:
        if getattr(args, name) not in (None, USUAL.get(name)):
            raise UserError(f"--write-grids evaluates no cells: leave out {flag_of(name)}")
    folder = _table_folder(args.write_grids, TABLE)
    source = open_data(args)
    predictor = Predictor.from_pretrained(
        args.model, autoencoder=args.autoencoder, dtype=args.dtype, mesh=local_mesh(args.mesh)
    )
    predictor.check_task(args.task)
    refuse_other_model(folder, predictor.id)
    raws = measurable(source, protocol)
    entry = grid_entry(predictor, raws, args.task, max(values_of(args, "steps")), args.seed)
    asked = {"dataset": args.dataset, "split": args.split}
    for steps, t in entry["grids"].items():
        print(f"  {steps} steps: {', '.join(map(str, t))}; cost {entry['costs'][steps]:.4g}")
    print(f"written: {write_entry(TABLE, folder, args.task, {**asked, **entry})}")
    return 0


def _write_tables(
    args: argparse.Namespace, result: dict[str, Any], load: Callable[[], Any], folder: Path | None
) -> None:
    """The CSVs and the table of budgets, where they are asked for; ``load`` gives the predictor."""
    from scaling_perception.evaluation.budget_table import budget_entry, busy
    from scaling_perception.evaluation.tables import cells_csv, images_csv
    from scaling_perception.inference.budgets import TABLE, measure_timing
    from scaling_perception.inference.task_tables import write_entry

    if args.csv:
        with replacing(args.csv, result["asked"]) as file:
            write_text(file, cells_csv(result))
    if args.per_image:
        with replacing(args.per_image, result["asked"]) as file:
            write_text(file, images_csv(result))
    if folder is not None:
        entry = budget_entry(result, measure_timing(load(), args.task))
        print(f"written: {write_entry(TABLE, folder, args.task, entry)}")
        if note := busy():
            print(f"note: {note}", file=sys.stderr)


def _report_skipped(skipped: list[dict[str, str]]) -> int:
    """Name what was left out; exit code 1 when a file could not be read (not when it just has nothing to measure)."""
    for item in skipped:
        print_message(f"left out: {item['key']}: {item['reason']}")
    return 1 if any(item["kind"] == "unreadable" for item in skipped) else 0
