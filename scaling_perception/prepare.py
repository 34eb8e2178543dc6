"""Raw dataset to a validated manifest, or to a cache of latents.

With `--check`, and without `--latents`: decodes every sample, and writes manifest.jsonl and summary.json: how many
there are beside how many were published, corrupt files, value ranges; exit code 1 when a sample is bad. Killed or out
of disk, the same command goes on where it stopped. With `--latents`: encodes every sample (and its mirror image) with
the autoencoder into checksummed shards that training reads; it goes on in the same way, and on a finished cache it only
verifies. `--shard i/n` makes a part of the cache, in as many jobs as there are parts; `--merge` joins them.
"""

import argparse
from pathlib import Path
from typing import Any

from scaling_perception.support.again import add_overwrite, settings_of
from scaling_perception.support.errors import UserError
from scaling_perception.support.parts import add_parts, part_of
from scaling_perception.support.remote import is_remote, local
from scaling_perception.support.verbs import POSITIVE, add_source_options, source_options

EXAMPLES = """
scaling-perception prepare scenes --count 8192 --out runs/scenes --latents --vae tiny --resolution 128
scaling-perception prepare worlds --tasks depth --option frames=1 --count 8192 --out runs/worlds --latents
scaling-perception prepare hypersim --raw /data/hypersim --split val --check --out runs/hypersim_check
scaling-perception prepare flying_chairs --raw /data/FlyingChairs --out runs/chairs --latents --vae DIR --resolution 256
"""

# Flags that say nothing of a manifest
_OF_LATENTS = ("out", "check", "latents", "vae", "resolution", "flips", "flow_divisor", "image_resize", "depth_prompt")
_OF_LATENTS += ("flow_frame", "shard_size", "batch", "workers", "skip_bad", "overrides", "dtype", "shard", "merge")


REMOTE = ("out",)
"""Flags of folders that are written, and may lie in a bucket."""

FLAGS = {
    "a root": "--raw",
    "start or count": "--start or --count",
    "image_resize": "--image-resize",
    "flow_frame": "--flow-frame",
    "depth_prompt": "--depth-prompt",
    "autoencoder": "--vae",
    "task": "--tasks",
}
"""What messages of the library call by name -> the flag."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="scenes, hypersim, flying_chairs, pix2gestalt, folder, …")
    parser.add_argument("--raw", default="", metavar="DIR", help="folder of the raw dataset (not for scenes)")
    parser.add_argument("--out", default="", metavar="DIR", help="folder to write to (--check: default in the cache)")
    what = "depth,flow,amodal or a part of them, or generation (default: all it serves)"
    parser.add_argument("--tasks", default="", help=what)
    parser.add_argument("--split", help="default train, or val of a dataset that has no train")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="samples to use (default: all it has)")
    parser.add_argument("--start", type=int, default=0, metavar="I", help="first sample (default %(default)s)")
    add_source_options(parser)
    parser.add_argument("--check", action="store_true", help="decode and count every sample (so without --latents)")
    parser.add_argument("--latents", action="store_true", help="encode into a cache of latents")
    parser.add_argument(
        "--vae",
        default="tiny",
        metavar="NAME|DIR",
        help="autoencoder; NAME+lite0: with features beside its latents (default %(default)s)",
    )
    parser.add_argument("--resolution", type=int, default=128, metavar="R", help="pixels (default %(default)s)")
    parser.add_argument("--flips", choices=("none", "both"), default="both", help="mirrored too (default %(default)s)")
    parser.add_argument("--flow-divisor", type=POSITIVE, default=75.0, metavar="D", help="default %(default)s")
    parser.add_argument(
        "--flow-frame",
        metavar="FRAME",
        help="native or square: the frame in whose pixels flow is measured (default square with a VAE that ends in "
        "+match, else native)",
    )
    resizes = "bilinear, nearest or nearest_depth, as the released generalist (default %(default)s)"
    parser.add_argument("--image-resize", default="bilinear", metavar="HOW", help=resizes)
    parser.add_argument(
        "--depth-prompt", default="ones", metavar="WHAT", help="ones, or valid: the mask of true depths (default ones)"
    )
    parser.add_argument(
        "--shard-size", type=int, default=512, metavar="N", help="samples a shard (default %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="pictures an encoder call (default: 8 on a CPU, else 64)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="reading processes (default: cores; 0: none)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the encoder's products (default float32)",
    )
    add_parts(parser, "a cache of latents", "one cache")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad samples out instead of failing")
    add_overwrite(parser, "a manifest or cache")


def run(args: argparse.Namespace) -> int:
    for name, least in (("count", 0), ("start", 0), ("resolution", 8), ("shard_size", 1), ("batch", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least {least}")
    if args.check and (args.latents or args.merge):
        raise UserError(f"--check and {'--latents' if args.latents else '--merge'}: give one of them")
    if not (args.out or args.check):
        raise UserError("--out is missing: give the folder to write to")
    if args.workers is None:
        from scaling_perception.data.workers import default_workers

        args.workers = default_workers()
    part = part_of(args)
    if args.out and is_remote(args.out) and not (args.latents or args.merge):
        raise UserError(f"--out is {args.out}: a check is written to a local folder; caches alone may lie in a bucket")
    _refuse_nested(args.raw, args.out)
    if args.merge:
        from scaling_perception.data.cache_parts import merge_cache

        return merge_cache(args, add_arguments)
    if args.split is None:
        from scaling_perception.data.sources import usual_split

        args.split = usual_split(args.dataset)
    if args.latents:
        from scaling_perception.data.building import make_cache

        return make_cache(args, _spec(args), part)
    if part is not None:
        raise UserError("--shard is for caches of latents: give --latents too, or leave it out")
    if args.dtype != "float32":
        raise UserError("--dtype is for caches of latents: give --latents too, or leave it out")
    return _check(args)


def _refuse_nested(raw: str, out: str) -> None:
    """UserError where results would be written among the raw data, or around it."""
    if not (raw and out) or is_remote(raw) or is_remote(out):
        return
    here, there = Path(out).expanduser().resolve(), Path(raw).expanduser().resolve()
    if here == there or there in here.parents or here in there.parents:
        how = "is" if here == there else "lies in" if there in here.parents else "contains"
        raise UserError(f"--out {out} {how} the raw data, --raw {raw}: give a folder apart from it")


def _spec(args: argparse.Namespace) -> tuple[Any, ...]:
    tasks = tuple(filter(None, (task.strip() for task in args.tasks.split(","))))
    given = source_options(args.option)
    for name in ("count", "start", "resolution"):
        if name in given:
            raise UserError(f"--option {name}: give --{name} instead")
    raw = local(args.raw) if args.raw else ""  # once, not in every process
    return args.dataset, raw, args.split, tasks, args.count, args.start, args.resolution, given


def _check(args: argparse.Namespace) -> int:
    from scaling_perception.data.check import check_all, default_out, published_line
    from scaling_perception.data.ledger import alone
    from scaling_perception.data.manifest import MANIFEST, SUMMARY, RawSamples, say_ranges
    from scaling_perception.data.sources.base import tolerating

    spec, settings = _spec(args), settings_of(args, _OF_LATENTS, ("raw",))
    with tolerating():
        samples = RawSamples(*spec)
    out = Path(args.out or default_out(args.dataset, settings))
    print("\n".join(samples.taken(args.dataset, spec[1], args.split)), flush=True)
    with alone(out):
        summary = check_all(out, spec, samples, settings, args.workers, args.overwrite)
    if line := published_line(summary):
        print(line)
    say_ranges(summary["ranges"])
    if count := summary["untrainable"]:
        print(f"note: {count} samples lack the picture that is learned: they are to be evaluated on, not trained on")
    for kind, name in (("bad", "bad_samples"), ("left_out", "left_out_samples")):
        for line in summary[name][:10]:
            print(f"{kind.replace('_', ' ')} sample {line['index']}: {line['reason']}")
        if summary[kind] > 10:
            print(f"… and {summary[kind] - 10} more")
    left_out = f", {summary['left_out']} left out" if summary["left_out"] else ""
    counts = f"{summary['good']} good and {summary['bad']} bad samples{left_out}"
    print(f"{counts}: see {out / MANIFEST} and {out / SUMMARY}")
    return 1 if summary["bad"] and not args.skip_bad else 0
