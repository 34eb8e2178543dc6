"""Fit a scaling law to points of any CSV: parameters with intervals, hold-out, certificate, warnings, figure, JSON.

POINTS is a CSV (any delimiter, long or wide), the CSV or JSON of `evaluate`, or a training run's metrics.jsonl,
run.json or folder. Without --form the forms for so many columns are compared on held-out points: the largest decade.
"""

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_perception.support.again import add_overwrite, check_output, replacing, settings_of
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import SEED

if TYPE_CHECKING:
    from scaling_perception.scaling.points import Points

EXAMPLES = """
scaling-perception fit points.csv
scaling-perception fit points.csv --x macs --y absrel --group run --json law.json --figure law.svg
scaling-perception fit chinchilla.csv --form additive --x N D --y loss --delta 1e-3
scaling-perception fit runs/sweep.csv --x steps ensemble --form test_time --y abs_rel
scaling-perception fit runs/sweep.csv --form hull
scaling-perception fit runs/sweep.csv --form power --loss quantile --tau 0.05
scaling-perception fit images.csv --x macs --y abs_rel --image key --group model
scaling-perception fit runs/study/study.csv --where metric=abs_rel --x train_macs macs --form additive --html law.html
scaling-perception fit paper:fig8b
scaling-perception fit wide.csv --x macs --y a1 a2 a3 --predict 1e14
"""
OUTPUTS = ("json", "figure", "html", "frontier")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from scaling_perception.scaling.law_forms import FORMS

    forms = "\n".join(f"{name}: {equation}" for name, equation in FORMS.items())
    parser.add_argument(
        "points", nargs="+", metavar="POINTS", help="CSV, evaluation, metrics.jsonl, run.json or folder"
    )
    parser.add_argument("--x", nargs="+", default=[], metavar="COLUMN", help="one column or more (default: macs, …)")
    parser.add_argument(
        "--y", nargs="+", default=[], metavar="COLUMN", help="error; several: wide (default: abs_rel, …)"
    )
    parser.add_argument(
        "--group",
        nargs="*",
        metavar="COLUMN",
        help="clusters, outermost first: run seed (default: run; without a column: none)",
    )
    parser.add_argument("--image", metavar="COLUMN", help="image of a row: means over images, which are resampled too")
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="use the rows that have all these"
    )
    parser.add_argument("--form", default="auto", help=f"auto, or one of: {forms}".replace("%", "%%"))
    parser.add_argument("--loss", default="huber", help="huber, lsq, or quantile: a lower envelope (default huber)")
    parser.add_argument("--delta", type=float, help="of Huber's loss on log y, such as 1e-3 (default: by the noise)")
    parser.add_argument("--tau", type=float, help="of --loss quantile (default 0.05)")
    parser.add_argument("--level", type=float, default=0.95, help="of all intervals (default %(default)s)")
    parser.add_argument("--interval", help="the one shown: bootstrap, bca, profile, corrected (default: docs/laws.md)")
    parser.add_argument("--bootstraps", type=int, default=2000, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=SEED, default=0, help="of the bootstraps (default 0)")
    parser.add_argument(
        "--drop-invalid", action="store_true", help="leave out rows with zero, negative or infinite values"
    )
    parser.add_argument("--keep-duplicates", action="store_true", help="keep rows that are copies of others")
    parser.add_argument(
        "--predict", nargs="+", default=[], metavar="X", help="also predict y there; of several columns: 1e9,2e10"
    )
    parser.add_argument("--json", metavar="OUT", help="write the law, for `plan` and other programs")
    parser.add_argument("--figure", metavar="OUT", help="draw points, law, bands and residuals: .svg, .png or .pdf")
    parser.add_argument("--html", metavar="OUT", help="write a page: figure, profiles, hold-out, warnings, points")
    parser.add_argument("--frontier", metavar="OUT", help="draw error over training and test-time compute, two --x")
    parser.add_argument("--serve", nargs="+", default=[], metavar="N", help="images to serve, of the frontier")
    add_overwrite(parser, "a law, figure or page")


def options_of(args: argparse.Namespace):
    """The options of a fit.

    Raises:
        UserError: a value that makes no sense.
    """
    from scaling_perception.scaling.law_fit import Options

    if args.loss not in ("huber", "lsq", "quantile"):
        raise UserError(f"--loss '{args.loss}': choose huber, lsq or quantile")
    if args.interval not in (None, "bootstrap", "bca", "profile", "corrected"):
        raise UserError(f"--interval '{args.interval}': choose bootstrap, bca, profile or corrected")
    if args.interval == "corrected" and args.form != "hull":
        raise UserError("--interval corrected: it is the hull's; choose bootstrap, bca or profile, or --form hull")
    if args.form == "hull" and (args.loss != "huber" or args.interval in ("bca", "profile")):
        what = f"--loss {args.loss}" if args.loss != "huber" else f"--interval {args.interval}"
        raise UserError(f"{what} is not of --form hull, which touches the lowest points: leave out one of them")
    for flag, value, loss in (("--tau", args.tau, "quantile"), ("--delta", args.delta, "huber")):
        if value is not None and args.loss != loss:
            raise UserError(f"{flag} {value:g} is of --loss {loss}, not of --loss {args.loss}: leave it out")
    tau = 0.05 if args.tau is None else args.tau
    for flag, value, low, high, usual in (
        ("--level", args.level, 0.5, 0.999, 0.95),
        ("--tau", tau, 0.001, 0.999, 0.05),
    ):
        if not low <= value <= high:
            raise UserError(f"{flag} {value:g}: give a number from {low:g} to {high:g}, such as {usual:g}")
    if args.delta is not None and not 0 < args.delta < float("inf"):
        raise UserError(f"--delta {args.delta:g}: give a number above zero, such as 1e-3")
    if not 100 <= args.bootstraps <= 1_000_000:
        raise UserError(f"--bootstraps {args.bootstraps}: give 100 to 1000000")
    return Options(
        args.loss, args.delta, tau, args.level, args.bootstraps, args.seed, interval=args.interval
    )  # fmt: skip


def predictions(texts: list[str], names: tuple[str, ...], flag: str = "--predict") -> list[list[float]]:
    """``1e9,2e10`` as a row of numbers above zero for each text.

    Raises:
        UserError: anything else.
    """
    rows = []
    for text in texts:
        try:
            row = [float(part) for part in text.split(",")]
        except ValueError:
            row = []
        if len(row) != len(names) or not all(0 < value < float("inf") for value in row):
            raise UserError(f"{flag} '{text}': give {','.join(names)} as numbers above zero")
        rows.append(row)
    return rows


def run(args: argparse.Namespace) -> int:
    from scaling_perception.scaling.law_forms import variable_counts
    from scaling_perception.scaling.law_text import law_text, prediction_text
    from scaling_perception.scaling.laws import fit_law, write_law
    from scaling_perception.scaling.points import read_points

    options = options_of(args)
    if args.form != "auto":
        variable_counts(args.form)
    if args.figure or args.frontier:
        from scaling_perception.scaling.law_figures import check_name

        for flag, path in (("--figure", args.figure), ("--frontier", args.frontier)):
            check_name(path or "x.svg", flag)
    if args.html and not args.html.lower().endswith((".html", ".htm")):
        raise UserError(f"--html {args.html}: end the name in .html")
    settings = settings_of(args, OUTPUTS, ("points",))
    for name in OUTPUTS:
        check_output(getattr(args, name), settings, args.overwrite)
    points = read_points(
        args.points, args.x, args.y, args.group, args.image, args.form, args.where, args.drop_invalid,
        args.keep_duplicates,
    )  # fmt: skip
    wanted = predictions(args.predict, points.x_names)
    images = _served(args, points)
    law = fit_law(points, args.form, options)
    print(law_text(law))
    for row in wanted:
        print(prediction_text(law, row))
    if args.json:
        with replacing(args.json, settings) as file:
            write_law(file, law)
        print(f"law: {args.json}")
    if args.figure or args.frontier:
        from scaling_perception.scaling.frontier import draw_frontier
        from scaling_perception.scaling.law_figures import draw_law, save_figure

        for name, draw in (("figure", draw_law), ("frontier", partial(draw_frontier, images=images))):
            if path := getattr(args, name):
                with replacing(path, settings) as file:
                    save_figure(file, draw(law, points), Path(path).suffix)
                print(f"{name}: {path}")
    if args.html:
        from scaling_perception.scaling.law_page import law_page
        from scaling_perception.support.files import write_text

        with replacing(args.html, settings) as file:
            write_text(file, law_page(law, points, options, command_of(args), images))
        print(f"page: {args.html}")
    return 0


def _served(args: argparse.Namespace, points: "Points") -> list[float]:
    """Images to serve, of the frontier; none where the law is of other columns and none are asked for.

    Raises:
        UserError: they are asked for and the columns are others, or a number is none.
    """
    from scaling_perception.scaling.frontier import compute_columns, need_columns, usual_images

    served = [predictions([text], ("N",), "--serve")[0][0] for text in args.serve]
    if served and not (args.frontier or args.html):
        raise UserError("--serve is of the frontier: give --frontier OUT or --html OUT too, or leave it out")
    if args.frontier or args.serve:
        need_columns(points.x_names)
    if not compute_columns(points.x_names):
        return []
    return served or usual_images(points)


def command_of(args: argparse.Namespace) -> str:
    """The command line that asks for what ``args`` hold: flags that differ from their defaults."""
    from scaling_perception.support.verbs import make_parser

    words = ["scaling-perception", "fit", *args.points]
    for action in make_parser("fit")._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or action.dest in ("overwrite", "help") or value == action.default:
            continue
        words.append(action.option_strings[-1])
        words += [] if value is True else map(str, value) if isinstance(value, list) else [str(value)]
    return shlex.join(words)
