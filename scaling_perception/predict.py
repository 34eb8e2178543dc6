"""Images, folders, globs, lists or videos to depth, flow, amodal masks or normals on disk, at the images' own size.

Depth is relative (0 near, 1 far), and metric where --align gives points of known distance. Flow takes pairs
`A.png,B.png`, or a folder, list or video of consecutive frames. Amodal takes --mask, the visible part of the object:
one file, or a folder of masks named as their images. Finished results are not made again; a file that cannot be read
is named at the end and does not stop the others. `--shard i/n` predicts a part of the list, in as many jobs as there
are parts; `--merge` joins them.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling_perception.inference.settings import (
    BY_BUDGET,
    SETTINGS,
    add_model_settings,
    add_settings,
    check_together,
    flag_of,
)
from scaling_perception.inference.settings import FLAGS as SETTING_FLAGS
from scaling_perception.support.errors import UserError
from scaling_perception.support.flag_checks import refuse_irregular
from scaling_perception.support.parts import Part, add_parts, part_of, refuse_other_flags
from scaling_perception.support.streams import print_message
from scaling_perception.support.verbs import POSITIVE, make_parser

if TYPE_CHECKING:
    from scaling_perception.inference.budgets import Choice
    from scaling_perception.inference.find import Item
    from scaling_perception.inference.job import Request
    from scaling_perception.inference.predictor import Predictor

EXAMPLES = """
scaling-perception predict --task depth --model mini --out out photo.jpg
scaling-perception predict --task depth --model mini --steps 10 --ensemble 5 --out out photos/ 'more/*.png'
scaling-perception predict --task depth --model mini --budget fast --recursive --out out dataset/
scaling-perception predict --task depth --model mini --ply --fov 60 --align points.csv --out out photo.jpg
scaling-perception predict --task depth --model mini --out out --list photos.txt
scaling-perception predict --task flow --model mini --out out frame1.png,frame2.png video_frames/
scaling-perception predict --task flow --model mini --every 2 --end 100 --out out clip.mp4
scaling-perception predict --task amodal --model mini --mask masks/ --out out images/
scaling-perception predict --repeat out/photo_depth.json --out again
"""

FLAGS = {
    **SETTING_FLAGS,
    **{name: f"--{name}" for name in ("task", "model", "autoencoder", "dtype", "budget", "seed")},
}
"""What messages of the library call by name -> the flag."""

_USUAL = {"model": "mini", "dtype": "float32", "seed": 0, "every": 1, "start": 0}
_BUDGETS = ("budget", "macs", "seconds")
_GO_WITH = {"align_space": "align", "align_fit": "align", "carry": "video", "flow": "video"}
_WITH_REPEAT = ("out", "overwrite", "json", "workers", "model", "autoencoder", "mesh", "repeat")
_OF_THE_RUN = (
    *("inputs", "list", "null", "recursive", "every", "start", "end", "mask"),
    *("overwrite", "resume", "json", "repeat", "shard", "merge", "mesh"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Every default is None, so that what was given is known; _USUAL and Settings hold the values.
    group = parser.add_argument_group("inputs")
    group.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="image, folder, glob, video; - is a list on stdin; flow: A,B"
    )
    group.add_argument("--list", metavar="FILE", help="file of paths, one a line (- is stdin); # begins a comment line")
    group.add_argument("-0", "--null", action="store_true", default=None, help="paths of the list end with a zero byte")
    group.add_argument("--recursive", action="store_true", default=None, help="also folders below; results likewise")
    group.add_argument(
        "--every", type=int, metavar="N", help="of each folder, glob and video every Nth picture (default 1)"
    )
    group.add_argument(
        "--start", type=int, metavar="I", help="of each folder, glob and video from this picture (default 0)"
    )
    group.add_argument(
        "--end", type=int, metavar="I", help="of each folder, glob and video up to, without, this picture"
    )
    group.add_argument("--mask", metavar="FILE|DIR", help="amodal: the visible part's mask, or a folder of masks")
    group = parser.add_argument_group("model")
    group.add_argument("--task", help="depth, flow, amodal or normals, as the model knows them")
    group.add_argument("--model", help="model folder, training run, hub id or name (default mini)")
    add_model_settings(group)
    add_settings(parser.add_argument_group("compute"))
    group = parser.add_argument_group(
        "budget", "instead of --steps and --ensemble, from the table that the model ships"
    )
    one = group.add_mutually_exclusive_group()
    one.add_argument("--budget", metavar="NAME", help="fast, balanced or best")
    one.add_argument(
        "--macs",
        type=POSITIVE,
        metavar="X",
        help="the best within so many multiply-accumulates an image",
    )
    one.add_argument("--seconds", type=POSITIVE, metavar="X", help="the best within so many seconds an image")
    group = parser.add_argument_group("outputs")
    group.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    group.add_argument(
        "--formats",
        metavar="A,B",
        help="depth png16,npy,color,metric,ply; flow flo,color,npy,kitti; amodal mask,whole; normals color,npy; all "
        "uncertainty",
    )
    group.add_argument("--kitti", action="store_true", default=None, help="flow: also write KITTI's 16-bit PNG")
    group.add_argument("--ply", action="store_true", default=None, help="depth: also write a point cloud")
    group.add_argument(
        "--intrinsics", metavar="FX,FY,CX,CY", help="camera of the point cloud, in pixels of the picture"
    )
    group.add_argument("--fov", type=float, metavar="DEG", help="or: degrees that it sees across the picture's width")
    group.add_argument(
        "--depth-range",
        dest="range",
        metavar="NEAR,FAR",
        help="point cloud: where relative depth 0 and 1 are put (default 0,1)",
    )
    group.add_argument(
        "--align", metavar="CSV", help="depth: points x,y,depth[,image] in pixels and metres; writes metres"
    )
    group.add_argument("--align-space", metavar="NAME", help="fit in depth (default) or disparity")
    group.add_argument(
        "--align-fit", metavar="NAME", help="least-squares (default), or robust where points may be wrong"
    )
    group.add_argument("--overwrite", action="store_true", default=None, help="make existing results again")
    group.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="go on with a list: results of other settings are refused, so that they never mix (default: made anew)",
    )
    group.add_argument("--json", action="store_true", default=None, help="a summary of the run on stdout, as JSON")
    group.add_argument(
        "--repeat", metavar="JSON", help="make the prediction again that this record beside a result describes"
    )
    group = parser.add_argument_group("clips")
    group.add_argument(
        "--video",
        action="store_true",
        default=None,
        help="each video and folder of frames is one clip: the noise of its first frame and one scale and shift for "
        "all, also written as a video, with its flicker",
    )
    group.add_argument(
        "--carry", type=float, metavar="X", help="share of the last frame's latents in a frame's noise (default 0)"
    )
    group.add_argument("--flow", metavar="DIR", help="the frames' .flo files, to measure flicker along (default: own)")
    group = parser.add_argument_group("throughput")
    add_parts(group, "the list", "one index, OUT/TASK.index.json")
    group.add_argument(
        "--workers", type=int, metavar="N", help="threads that read ahead (0: read, compute, write in turn)"
    )


def run(args: argparse.Namespace) -> int:
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers}: give 0 or more")
    out, part = Path(args.out), part_of(args)
    if args.repeat is not None:
        return _repeat(args, out)

    from scaling_perception.inference.find import Search, find_inputs, name_results, read_list
    from scaling_perception.tasks import TASKS, get_task

    if args.task is None:
        raise UserError(f"--task is missing: give {', '.join(name for name, one in TASKS.items() if one.files)}")
    if not get_task(args.task).files:
        raise UserError(f"--task {args.task} predicts nothing of a picture: use `scaling-perception generate`")
    _check_flags(args)
    if part is not None and args.seconds is not None:
        raise UserError("--seconds is measured on each machine, and parts must be alike: give --macs or --budget")
    _fill_usual(args, [name for name in _USUAL if not args.merge or name in _OF_THE_RUN])
    lists = [file for file in ("-" if "-" in args.inputs else None, args.list) if file]
    listed = [word for file in lists for word in read_list(file, bool(args.null))]
    words = [word for word in args.inputs if word != "-"]
    if args.merge and not words and not listed:
        return _merge(args, out, None)
    if not words and not listed:
        raise UserError("no input was given: name an image, a folder, a glob, a video or a --list")
    search = Search(bool(args.recursive), args.every, args.start, args.end, out)
    found = find_inputs(words, args.task, args.mask, search, listed, print_message)
    items = name_results(found, args.task)
    return _merge(args, out, items) if args.merge else _predict(request_of(args), items, out, args, part=part)


# What is asked for


def _check_flags(args: argparse.Namespace) -> None:
    """UserError for flags that belong to another task, or that miss or exclude each other."""
    from scaling_perception.tasks import TASKS

    for task, what in TASKS.items():
        for name in what.flags:
            if task != args.task and getattr(args, name) is not None:
                raise UserError(f"{flag_of(name)} belongs to {task}, not to {args.task}: leave it out")
    if args.null and args.list is None and "-" not in args.inputs:
        raise UserError("-0 goes with a list: give --list FILE, or - as an input")
    if args.overwrite and args.resume:
        raise UserError("--overwrite makes all results again, --resume keeps them: leave out one")
    if args.video and (args.shard is not None or args.merge):
        raise UserError("--video makes whole clips: leave out --shard and --merge, and give each job its clips")
    if args.list == "-" and "-" in args.inputs:
        raise UserError("standard input is named twice: leave out - or --list -")
    for name in _BUDGETS:
        for other in BY_BUDGET:
            if getattr(args, name) is not None and getattr(args, other) is not None:
                one, two = flag_of(name), flag_of(other)
                raise UserError(f"{one} chooses {other} from the model's table: leave out {one} or {two}")
    check_together(vars(args), _GO_WITH, flag_of)


def one_request(words: Sequence[str]) -> tuple[argparse.Namespace, "Request", "Item"]:
    """What `predict` makes of a command for one picture: (arguments, request, item), all checked as there.

    Raises:
        UserError: as `predict` would end with, or the words name several pictures.
    """
    from scaling_perception.inference.find import Search, find_inputs, name_results

    args = make_parser("predict").parse_args(list(words))
    _check_flags(args)
    _fill_usual(args, _USUAL)
    search = Search(False, args.every, args.start, args.end, Path(args.out))
    items = name_results(find_inputs(args.inputs, args.task, args.mask, search), args.task)
    if len(items) != 1:
        raise UserError(f"{len(items)} pictures are named: give one")
    return args, request_of(args), items[0]


def _fill_usual(args: argparse.Namespace, names: Iterable[str]) -> None:
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, _USUAL[name])


def request_of(args: argparse.Namespace, chosen: dict[str, Any] | None = None, budget: Any = None) -> "Request":
    """Args: settings besides those that were given, and the budget that chose them."""
    from scaling_perception.inference.job import Request
    from scaling_perception.inference.metric_depth import FITS, SPACES, check_choice
    from scaling_perception.inference.outputs import Extras, choose_formats
    from scaling_perception.inference.point_cloud import camera_of_fov, parse_camera
    from scaling_perception.inference.settings import Settings

    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    settings = Settings(**given, **(chosen or {}))
    more = [name for name in ("kitti", "ply") if getattr(args, name)] + (["metric"] if args.align else [])
    formats = choose_formats(args.task, args.formats, settings.ensemble, more)
    if "metric" in formats and args.align is None:
        raise UserError("--formats metric: relative depth has no metres; give --align points.csv")
    if "ply" in formats and (args.intrinsics is None) == (args.fov is None):
        raise UserError("a point cloud needs its camera: give one of --intrinsics FX,FY,CX,CY and --fov DEG")
    for name in ("intrinsics", "fov", "range"):
        if "ply" not in formats and getattr(args, name) is not None:
            raise UserError(f"{flag_of(name)} is for a point cloud: give --ply too, or leave it out")
    if args.range is not None and args.align is not None:
        raise UserError("--depth-range is for relative depth, and --align gives metres: leave out one of them")
    extras = Extras(
        None if args.intrinsics is None else tuple(parse_camera(args.intrinsics)),
        args.fov,
        _distances(args.range),
        check_choice("--align-space", args.align_space or "depth", SPACES),
        check_choice("--align-fit", args.align_fit or "least-squares", FITS),
    )
    looks = len(range(settings.step_chunk, settings.steps, settings.step_chunk))
    by_budget = chosen is None and any(getattr(args, name) is not None for name in _BUDGETS)
    if settings.step_tolerance is not None and looks < 2 and not by_budget:
        raise UserError(
            f"--step-tolerance needs two checks before the end, and {settings.steps} steps have {looks}: give more "
            f"--steps, or a smaller {flag_of('step_chunk')}"
        )
    if args.fov is not None:
        camera_of_fov(args.fov, (1, 1))  # told before anything is computed
    align = None if args.align is None else os.path.abspath(os.path.expanduser(args.align))
    names = [os.path.abspath(n) if n and os.path.isdir(n) else n for n in (args.model, args.autoencoder)]
    rest = (args.dtype, settings, args.seed, args.batch_size, formats, extras, align, budget)
    return Request(args.task, names[0], names[1], *rest)


def _distances(text: str | None) -> tuple[float, float]:
    if text is None:
        return 0.0, 1.0
    try:
        near, far = (float(word) for word in text.split(","))
    except ValueError:
        near, far = 0.0, 0.0
    if not 0 <= near < far < float("inf"):
        raise UserError(f"--depth-range {text}: give NEAR,FAR with 0 <= NEAR < FAR")
    return near, far


def _by_budget(
    args: argparse.Namespace, predictor: "Predictor", items: Sequence["Item"], out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings from the model's table, and what is recorded of the choice.

    Seconds are those of this machine, measured now. So that a run that goes on, or another one into the same folder,
    does not choose otherwise, results for the same budget are asked first.
    """
    from scaling_perception.inference.budgets import budgets_of, choice_line, choose, fitting, measure_timing
    from scaling_perception.inference.outputs import chosen_before

    asked = {name: getattr(args, name) for name in _BUDGETS if getattr(args, name) is not None}
    before = None if args.overwrite else chosen_before(out, items, args.task, asked, predictor.id)
    if before is not None:
        settings, budget = before
        chosen = {name: settings[name] for name in BY_BUDGET if settings.get(name) is not None}
        print(choice_line(asked, chosen, budget["expected"]), file=sys.stderr)
        return chosen, budget
    table = fitting(budgets_of(predictor, args.task), args.task, lambda choice: _check(args, predictor, choice))
    unmeasured = None if args.seconds is None else math.inf
    choose(table, args.task, args.budget, args.macs, unmeasured)  # refused before measuring
    here = None if args.seconds is None else measure_timing(predictor, args.task)
    choice = choose(table, args.task, args.budget, args.macs, args.seconds, here)
    expected = {name: getattr(choice, name) for name in ("macs", "seconds", "error")}
    expected["metric"] = (table or {})["tasks"][args.task].get("metric", "error")
    print(choice_line(asked, choice.settings, expected), file=sys.stderr)
    return choice.settings, {"asked": asked, "expected": expected}


def _check(args: argparse.Namespace, predictor: "Predictor", choice: "Choice") -> None:
    """UserError for a row of the table that does not go with the flags, or on a grid that this model does not have."""
    from scaling_perception.inference.clips import Motion, check_clip

    settings = request_of(args, choice.settings).settings
    settings.reduce_for(args.task)
    if args.video:
        check_clip(settings, Motion(args.carry or 0.0, args.flow))
    if settings.spacing is not None:
        predictor.grid(args.task, settings.steps, dataclasses.replace(predictor.diffusion, spacing=settings.spacing))


# Again


def _repeat(args: argparse.Namespace, out: Path) -> int:
    """Make the prediction of a record again, from the same inputs and weights or not at all."""
    from scaling_perception.inference.find import Item, Picture
    from scaling_perception.inference.job import Request
    from scaling_perception.inference.outputs import Extras, check_format, digest
    from scaling_perception.inference.settings import Settings
    from scaling_perception.support.files import read_json

    for name, value in vars(args).items():
        if name not in (*_WITH_REPEAT, "overrides") and value not in (None, []):
            flag = "inputs" if name == "inputs" else flag_of(name)
            raise UserError(f"--repeat takes everything from {args.repeat}: leave out {flag}")
    refuse_irregular("--repeat", args.repeat)
    record = read_json(args.repeat)
    try:
        check_format(args.repeat, record)
        asked, inputs, name = dict(record["request"]), record["inputs"], str(record["name"])
        pictures = tuple(
            Picture(Path(file), frame) for file, frame in zip(inputs["files"], inputs["frames"], strict=True)
        )
        asked["settings"], asked["formats"] = Settings(**asked["settings"]), tuple(asked["formats"])
        extras = Extras(**asked["extras"])
        asked["extras"] = extras._replace(distances=tuple(extras.distances))
        digests, _ = list(inputs["sha256"]), record["settings"]["weights"]
        request = Request(**asked)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{args.repeat} is no record of `predict` that can be repeated: give the JSON beside a result"
        ) from None
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"{args.repeat} would write outside of --out ('{name}'): mend its name")
    if record["settings"].get("clip") is not None:
        raise UserError(f"{args.repeat} is a frame of a clip, which is made as a whole: run its command again")
    for picture, known in zip(pictures, digests, strict=True):
        if digest(picture.path) != known:
            raise UserError(
                f"{picture.path} is not the input that {args.repeat} was made of (sha256 {known[:12]}): bring that back"
            )
    request = request._replace(model=args.model or request.model, autoencoder=args.autoencoder or request.autoencoder)
    return _predict(request, [Item(name, pictures)], out, args, (args.repeat, record))


# The run


def command_of(args: argparse.Namespace, item: "Item") -> list[str]:
    """Words that make this one prediction, whatever else the run made."""
    from scaling_perception.tasks import get_task

    words = ["scaling-perception", "predict"]
    for name, value in vars(args).items():
        if name not in (*_OF_THE_RUN, "overrides") and value is not None and value != _USUAL.get(name):
            words += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    if args.video:  # a frame alone would be another prediction
        more = [f"{flag_of(n)}={getattr(args, n)}" for n in ("every", "start", "end") if getattr(args, n)]
        more += ["--mask", args.mask] if args.mask else []
        return [*words, *more, "--", *(args.inputs or ["--list", str(args.list)])]
    first, *more = item.inputs
    prompt = None if args.task is None else get_task(args.task).prompt  # none: --repeat names the record
    paired = prompt is not None and prompt.frame
    if prompt is not None and not paired:
        words += [prompt.cli, str(more[0].path)]
    if first.frame is not None:
        last = first.frame if not paired or more[0].frame is None else more[0].frame
        words += ["--start", str(first.frame), "--end", str(last + 1)]
        words += ["--every", str(last - first.frame)] if last - first.frame > 1 else []
    elif paired:
        return [*words, "--", f"{first.path},{more[0].path}"]
    return [*words, "--", str(first.path)]


def _predict(
    request: "Request",
    items: Sequence["Item"],
    out: Path,
    args: argparse.Namespace,
    repeated: tuple[str, dict[str, Any]] | None = None,
    part: Part | None = None,
) -> int:
    from scaling_perception import Predictor
    from scaling_perception.inference.clips import Motion
    from scaling_perception.inference.job import run_clips, run_job
    from scaling_perception.inference.parts import run_part
    from scaling_perception.parallel.mesh import local_mesh

    how = {"autoencoder": request.autoencoder, "dtype": request.dtype, "mesh": local_mesh(args.mesh)}
    predictor = Predictor.from_pretrained(request.model, **how)
    predictor.check_task(request.task)
    if any(getattr(args, name) is not None for name in _BUDGETS):
        request = request_of(args, *_by_budget(args, predictor, items, out))
    workers = min(4, os.cpu_count() or 1) if args.workers is None else args.workers
    how = {"resume": bool(args.resume), "workers": workers, "command": lambda item: command_of(args, item)}
    if args.video:
        motion = Motion(args.carry or 0.0, args.flow)
        summary = run_clips(predictor, request, items, out, motion, bool(args.overwrite), **how)
    elif part is None:
        summary = run_job(predictor, request, items, out, bool(args.overwrite), repeated=repeated, **how)
    else:
        left = (*_OF_THE_RUN, "out", "overrides", "workers")
        asked = {name: value for name, value in vars(args).items() if name not in left}
        summary = run_part(predictor, request, items, out, part, asked, bool(args.overwrite), **how)
    if summary is None:
        print(f"{request.task}: already joined in {out}", file=sys.stderr if args.json else sys.stdout)
        return 0
    code = _report(args, request.task, summary, out)
    if part is not None:  # what failed is the index's to tell
        code, line = (
            0,
            f"part {part} is finished; when all are: the same command with --merge in place of --shard {args.shard}",
        )
        print(line, file=sys.stderr if args.json else sys.stdout)
    return code


def _merge(args: argparse.Namespace, out: Path, items: Sequence["Item"] | None) -> int:
    """Join the parts of a list, of ``items`` where those are given; needs no model. Returns the exit code."""
    from scaling_perception.inference.parts import index_file, join, part_files, same_items, write_index
    from scaling_perception.support.files import read_json

    if index_file(out, args.task).is_file() and not part_files(out, args.task):
        failed = [file for file in read_json(index_file(out, args.task))["files"] if "error" in file]
        print(f"{args.task}: already joined in {index_file(out, args.task)}, {len(failed)} failed")
        return 1 if failed else 0
    summary, first = join(out, args.task)
    refuse_other_flags(add_arguments, args, first["asked"], out)
    if items is not None and not same_items(first, items):
        raise UserError(f"the parts in {out} are of other inputs than these: give the same inputs, or none")
    path = write_index(out, summary, first)
    code = _report(args, args.task, summary, out)
    print(f"written: {path}", file=sys.stderr if args.json else sys.stdout)
    return code


def _report(args: argparse.Namespace, task: str, summary: dict[str, Any], out: Path) -> int:
    """Print what a run did; the exit code."""
    kept = f", {summary['kept']} already there" if summary["kept"] else ""
    failed = f", {summary['failed']} failed" if summary["failed"] else ""
    line = f"{task}: {summary['written']} written to {out}{kept}{failed}"
    print(line, file=sys.stderr if args.json else sys.stdout)
    for video in summary.get("clips", ()):
        print(f"clip: {video}", file=sys.stderr if args.json else sys.stdout)
    if summary["anew"] is not None:
        print_message(f"note: made anew: {summary['anew']}")
    if args.json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    for file in summary["files"]:
        for word, name in (("failed", "error"), ("note", "note")):
            if name in file:
                print_message(f"{word}: {file[name]}")
    return 1 if summary["failed"] else 0
