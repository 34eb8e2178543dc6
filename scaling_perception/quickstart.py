"""The main job end to end on the embedded scenes, from the shipped weights.

Renders new scenes, caches their latents, fine-tunes the shipped model for a short while, evaluates depth, flow and
amodal masks at growing budgets (denoising steps × ensemble members, on the trailing grid of `fixed` and the leading
grid of `paper`), and writes a report. Each stage is an ordinary command, printed before it runs; a finished stage is
not repeated when the command is run again.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from scaling_perception.support.again import add_overwrite
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb

EXAMPLES = """
scaling-perception quickstart
scaling-perception quickstart --workdir runs/first --images 32
scaling-perception quickstart --scenes 512 --train-steps 400
"""

STEPS, ENSEMBLE, PRESETS = "1,2,5,10,20", "1,2,5", "fixed,paper"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", default="runs/quickstart", help="folder of everything made (default %(default)s)")
    parser.add_argument("--scenes", type=int, default=192, help="new scenes to fine-tune on (default %(default)s)")
    parser.add_argument("--train-steps", type=int, default=120, help="fine-tuning steps (default %(default)s)")
    parser.add_argument("--images", type=int, default=24, help="held-out images a task (default %(default)s)")
    add_overwrite(parser, "evaluations")


def _stage(verb: str, *words: str) -> float:
    """Say and run one command; returns its seconds.

    Raises:
        UserError: the command failed; its own line says why.
    """
    print(f"\n$ {shlex.join(['scaling-perception', verb, *words])}", flush=True)
    begin = time.monotonic()
    if code := run_verb(verb, list(words)):
        raise UserError(f"`scaling-perception {verb}` ended with exit code {code}: see its message above")
    return time.monotonic() - begin


def print_table(folder: Path) -> None:
    """Print error against compute of each evaluation below ``folder``."""
    from scaling_perception.report import compute_table, find_evaluations

    for _, evaluation in find_evaluations(folder):
        head, rows = compute_table(evaluation)
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        print(f"\n{evaluation['task']} on {evaluation['dataset']} ({evaluation['images']} images, 95 % intervals)")
        for row in [head, *rows]:
            print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def run(args: argparse.Namespace) -> int:
    for name in ("scenes", "train_steps", "images"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a whole number above 0")
    work = Path(args.workdir)
    begin = time.monotonic()
    replace = ["--overwrite"] if args.overwrite else []
    cache, tuned, evals = work / "latents", work / "train", work / "evaluations"
    seconds = {}
    words = ["scenes", "--out", str(cache), "--latents", "--vae", "tiny", "--resolution", "128", "--flips", "none"]
    # The shipped weights were trained on lower indices: these scenes are new to them.
    seconds["render and cache"] = _stage("prepare", *words, "--count", str(args.scenes), "--start", "500000000")
    words = ["--config", f"configs/quickstart.py:cache={cache},steps={args.train_steps}", "--workdir", str(tuned)]
    seconds["fine-tune"] = _stage("train", *words, "--config.data.flip=false")
    for task in ("depth", "flow", "amodal"):
        out = evals / f"{task}.json"
        words = ["--task", task, "--dataset", "scenes", "--split", "val", "--count", str(args.images)]
        words += ["--model", str(tuned), "--steps", STEPS, "--ensemble", ENSEMBLE, "--preset", PRESETS]
        seconds[f"evaluate {task}"] = _stage("evaluate", *words, "--panels", "4", "--json", str(out), *replace)
    title = "Quickstart: what denoising steps and ensemble members buy"
    seconds["report"] = _stage("report", str(work), "--title", title, *replace)
    print_table(evals)
    for name, value in seconds.items():
        print(f"{name}: {value:.0f} s", file=sys.stderr)
    print(f"\nDone in {time.monotonic() - begin:.0f} s. Open the report: {(work / 'report.html').resolve()}")
    return 0
