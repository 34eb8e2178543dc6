"""A grid of runs declared in a config: prepare, train, evaluate, collect; here, as a SLURM array or as a JobSet.

Each cell of the grid is one command in a folder of its own. Here the cells run one after the other, and the same
command goes on after a kill: finished cells are left alone, an unfinished one resumes. A cell that fails does not stop
those that do not need it; it is named at the end, and the exit code is 1. What the cells measured is collected into one
CSV, one line a figure, which `fit` reads.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from scaling_perception.support.again import add_overwrite, check_output, keep_settings, replacing
from scaling_perception.support.configs import declared
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.flag_checks import check_outputs

EXAMPLES = """
scaling-perception study --config configs/scenes_study.py --out runs/scenes_study --dry-run
scaling-perception study --config configs/scenes_study.py --out runs/scenes_study
scaling-perception study --config configs/scenes_study.py --out runs/scenes_study --only 'ladder/*' --collect
scaling-perception study --config configs/paper/fig3.py:caches=CACHES --out runs/paper/fig3 --write slurm --to jobs/fig3
"""
OUTPUTS = ("csv", "images")

# Flags that change where things lie or how fast they go, and no figure: a cell may be resumed with others.
_FREE = {
    "data",
    "raw",
    "out",
    "json",
    "csv",
    "per_image",
    "write_budgets",
    "workers",
    "batch",
    "batch_size",
    "overrides",
    "overwrite",
}
_WRITERS = ("slurm", "jobset")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="config file with study(arg) or runs(arg): FILE.py:key=value,…")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the study; each cell has one in it")
    parser.add_argument("--only", default="", metavar="PATTERNS", help="cells by name, such as 'ladder/*,eval/*'")
    parser.add_argument("--dry-run", action="store_true", help="only tell cells, MACs, chip-hours and money")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells that run at a time on this machine")
    parser.add_argument("--collect", action="store_true", help="run nothing; collect what is there")
    parser.add_argument("--csv", metavar="FILE", help="the collected table (default DIR/study.csv)")
    parser.add_argument("--images", metavar="FILE", help="also collect a table of one line an image")
    add_overwrite(parser, "a table")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar="CELL",
        help="run nothing; paired differences by image, from the first to the second",
    )
    parser.add_argument("--write", default="", metavar="KIND", help="run nothing; write the jobs: slurm or jobset")
    parser.add_argument("--to", default="", metavar="FOLDER", help="with --write: where (default DIR/jobs)")
    parser.add_argument("--stage", type=int, metavar="K", help="run one cell: of this stage (0, 1, …)")
    parser.add_argument("--index", type=int, metavar="I", help="run one cell: the I-th of its stage, from 0")
    parser.add_argument("--price", default="", metavar="CHIP=X", help="dry run: money of a chip-hour, comma-separated")
    parser.add_argument("--mfu", default="", metavar="CHIP=X", help="dry run: share of the peak that is reached")
    parser.add_argument(
        "--roofline", default="", metavar="FILE", help="dry run: JSON of `compile`, whose share of the peak is taken"
    )
    parser.add_argument(
        "--measured", default="", metavar="WORKDIR", help="dry run: also hours on the device that trained this run"
    )


def run(args: argparse.Namespace) -> int:
    from scaling_perception.scaling.study import MARKER, check_settings, stages, study_cells

    if args.write and args.write not in _WRITERS:
        raise UserError(f"--write '{args.write}'{did_you_mean(args.write, _WRITERS)}")
    if (args.stage is None) != (args.index is None):
        raise UserError("--stage and --index go together: they name one cell")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: give the number of cells that run at a time, 1 or more")
    if args.only and args.stage is not None:
        raise UserError("--only and --stage both choose cells: give one of them")
    _check_flags(args)
    out = Path(args.out)
    cells = study_cells(args.config)
    settings = check_settings(cells, out, _settings, _defaults, _free)
    chosen = _chosen(cells, args.only)
    if args.stage is not None:
        chosen = [_indexed(stages(cells), args.stage, args.index)]
    if args.dry_run:
        return _dry_run(args, cells, chosen)
    if args.collect and not any((out / cell.name / MARKER).is_file() for cell in cells):
        raise UserError(f"--out {out}: no cell of this study was begun there: give the study's folder, or run it first")
    if args.compare:
        return _compare(args.compare, cells, out)
    if args.write:
        from scaling_perception.scaling.study_jobs import write_jobs

        for path in write_jobs(args.write, args.config, out, Path(args.to or out / "jobs"), stages(cells)):
            print(f"written: {path}")
        return 0
    if args.stage is not None:  # cells that run side by side would write the table at once
        return _run(chosen, out, settings, args.jobs)
    about = {"config": os.path.realpath(args.config.partition(":")[0]), "out": os.path.realpath(out)}
    table, figures = Path(args.csv or out / "study.csv"), declared(args.config, "figures")
    for figure in figures:
        if not all(hasattr(figure, name) for name in ("name", "file", "write", "summary")):
            raise UserError(f"{args.config}: figures(arg) has {figure!r:.80}: give Figure, Comparison or Pictures")
    check_outputs({"--csv": table, "--images": args.images, **{f"figure {f.name}": out / f.file for f in figures}})
    for path in (table, args.images, *(out / figure.file for figure in figures)):
        check_output(path, about, args.overwrite)
    code = 0 if args.collect else _run(chosen, out, settings, args.jobs)
    _collect(cells, out, table, about)
    _draw(figures, cells, out, about)
    if args.images:
        _collect(cells, out, Path(args.images), about, images=True)
    return code


_MODES = {
    "dry_run": "--dry-run",
    "collect": "--collect",
    "compare": "--compare",
    "write": "--write",
    "stage": "--stage",
}
_TABLE, _COST = ("", "--collect"), ("--dry-run",)
_OF_MODES = {
    "to": ("--write",),
    **dict.fromkeys(("price", "mfu", "roofline", "measured"), _COST),
    **dict.fromkeys(("csv", "images"), _TABLE),
    "only": (*_TABLE, *_COST),
    "jobs": ("",),
}
"""Flags that are of use in some of `_MODES` alone; "" is a study that runs."""


def _check_flags(args: argparse.Namespace) -> None:
    """UserError where flags contradict one another, or one would have no effect."""
    from scaling_perception.support.verbs import make_parser

    usual = make_parser("study").get_default
    modes = [flag for name, flag in _MODES.items() if getattr(args, name) != usual(name)]
    if len(modes) > 1 and modes != ["--dry-run", "--stage"]:
        raise UserError(f"{modes[0]} and {modes[1]} do not go together: give one of them")
    mode = modes[0] if modes else ""
    for name, places in _OF_MODES.items():
        if getattr(args, name) == usual(name) or mode in places:
            continue
        where = f"with {mode}" if mode else f"without {' or '.join(places)}"
        raise UserError(f"--{name} is of no use {where}: leave it out" + (f", or give {places[0]}" if not mode else ""))


def _settings(cell: Any) -> dict[str, Any]:
    """What decides the cell's figures: the whole config of a run, or every flag of another command.

    Raises:
        UserError: a flag, a config or a field of it is wrong.
    """
    from scaling_perception.support.configs import flatten, load_config
    from scaling_perception.support.verbs import make_parser
    from scaling_perception.train import split_overrides
    from scaling_perception.training.identity import as_json

    output = ["--workdir", "x"] if cell.verb == "train" else ["--json" if cell.verb == "evaluate" else "--out", "x"]
    if cell.verb != "train":
        flags = vars(make_parser(cell.verb).parse_args([*cell.words, *output]))
        return {name: value for name, value in flags.items() if name not in _free(cell)}
    words, overrides = split_overrides([*cell.words, *output])
    args = make_parser("train").parse_args(words)
    flat = flatten(as_json(load_config(args.config, overrides).to_dict()))
    return {name: value for name, value in flat.items() if name not in _free(cell) and not name.endswith(".root")}


def _defaults(cell: Any) -> dict[str, Any]:
    """Of settings that came later than some folders of studies, the value by which all was done before them."""
    from scaling_perception.support.verbs import make_parser
    from scaling_perception.training.identity import LATER

    if cell.verb == "train":
        return dict(LATER)
    return {action.dest: action.default for action in make_parser(cell.verb)._actions}


def _free(cell: Any) -> frozenset[str]:
    """Settings of a cell that decide no figure."""
    from scaling_perception.training.identity import FREE

    return frozenset({*FREE} - {"data.cache", "train.validate_every"} if cell.verb == "train" else _FREE)


def _chosen(cells: list[Any], only: str) -> list[Any]:
    from fnmatch import fnmatchcase

    patterns = [part.strip() for part in only.split(",") if part.strip()]
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            raise UserError(f"--only '{pattern}' names no cell{did_you_mean(pattern, [cell.name for cell in cells])}")
    return [cell for cell in cells if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns)]


def _indexed(grid: list[list[Any]], stage: int, index: int) -> Any:
    if not 0 <= stage < len(grid):
        raise UserError(f"--stage {stage}: this study has {len(grid)}, from 0")
    if not 0 <= index < len(grid[stage]):
        raise UserError(f"--index {index}: stage {stage} has {len(grid[stage])} cells, from 0")
    return grid[stage][index]


def _dry_run(args: argparse.Namespace, cells: list[Any], chosen: list[Any]) -> int:
    from scaling_perception.scaling import study_cost

    chips = study_cost.assumptions(args.price, args.mfu, args.roofline)
    measured = study_cost.measured_flops(Path(args.measured)) if args.measured else None
    print(study_cost.cost_text(study_cost.costs(cells, [cell.name for cell in chosen]), chips, measured))
    return 0


def _run(cells: list[Any], out: Path, settings: dict[str, Any], jobs: int) -> int:
    from scaling_perception.scaling.study import run_cells

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    outcomes = list(run_cells(cells, out, settings, say, jobs=jobs))
    left = [outcome for outcome in outcomes if outcome.state not in ("done", "was done")]
    for outcome in left:
        say(f"not done: {outcome.name}: {outcome.reason}" + _log_of(out, outcome))
    say(f"{len(outcomes) - len(left)} of {len(outcomes)} cells are done")
    return 1 if left else 0


def _log_of(out: Path, outcome: Any) -> str:
    from scaling_perception.scaling.study import LOG

    return f" ({out / outcome.name / LOG})" if outcome.state == "failed" else ""


def _compare(names: list[str], cells: list[Any], out: Path) -> int:
    from scaling_perception.scaling.study import is_done
    from scaling_perception.scaling.study_table import differences

    known = {cell.name: cell for cell in cells if cell.verb == "evaluate"}
    parts = [name.partition(":") for name in names]
    for name, _, _ in parts:
        if name not in known:
            raise UserError(f"--compare: no cell '{name}' evaluates{did_you_mean(name, known)}")
    for name, _, _ in parts:
        if not is_done(known[name], out):
            raise UserError(f"--compare: {out / name} is not done: run the study, or --only '{name}'")
    settings = [_setting(text) for _, colon, text in parts if colon]
    if len(settings) == 1:
        raise UserError("--compare: give both cells a setting, CELL:PRESET,STEPS,MEMBERS, or none")
    both = (settings[0], settings[1]) if settings else None
    for line in differences(out / parts[0][0], out / parts[1][0], both):
        print(line)
    return 0


def _setting(text: str) -> tuple[str, int, int]:
    preset, *numbers = text.split(",")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise UserError(f"--compare …:{text}: write PRESET,STEPS,MEMBERS, such as fixed,10,5")
    return preset, int(numbers[0]), int(numbers[1])


def _draw(figures: list[Any], cells: list[Any], out: Path, about: dict[str, Any]) -> None:
    """The figures and tables that the config declares, from the cells that are done."""
    from scaling_perception.scaling.study_table import collect

    rows = collect(cells, out)[0] if figures else []
    for figure in figures:
        path = figure.write(rows, out) if rows else None
        if path:
            keep_settings(path, path, about)
            print(f"written: {path}", flush=True)
            print("".join(f"{line}\n" for line in figure.summary(rows)), end="", flush=True)
        else:
            print(f"{figure.name}: no cell of it is done yet", flush=True)


def _collect(cells: list[Any], out: Path, path: Path, about: dict[str, Any], images: bool = False) -> None:
    from scaling_perception.scaling.study_table import collect, table_csv
    from scaling_perception.support.files import write_text

    rows, missing = collect(cells, out, images)
    if missing and not images:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        print(f"{len(missing)} of {len(cells)} cells are missing from the table: {names}", file=sys.stderr)
    if not rows:
        print(f"no cell has figures yet: {path} is not written", file=sys.stderr)
        return
    with replacing(path, about) as file:
        write_text(file, table_csv(rows))
    print(f"written: {path} ({len(rows)} lines of {len(cells) - len(missing)} cells)")
