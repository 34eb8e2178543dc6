"""Raw dataset to a validated manifest, or to a cache of latents.

Without `--latents`: opens and checks every sample, and writes manifest.jsonl and summary.json; exit code 1 when a
sample is bad. With `--latents`: encodes every sample (and its mirror image) with the autoencoder into checksummed
shards that training reads; killed or out of disk, the same command goes on where it stopped, and on a finished cache it
only verifies.
"""

import argparse
import contextlib
import hashlib
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling_perception.support.again import (
    add_overwrite,
    check_output,
    restore_folder,
    settings_of,
    swap_folder,
)
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import not_damage
from scaling_perception.support.locks import hold
from scaling_perception.support.verbs import POSITIVE, add_source_options, source_options

EXAMPLES = """
scaling-perception prepare scenes --count 8192 --out runs/scenes --latents --vae tiny --resolution 128
scaling-perception prepare worlds --tasks depth --option frames=1 --count 8192 --out runs/worlds --latents
scaling-perception prepare hypersim --raw /data/hypersim --out runs/hypersim_check
scaling-perception prepare flying_chairs --raw /data/FlyingChairs --out runs/chairs --latents --vae DIR --resolution 256
"""

# Pictures an encoder call: fixed, so that the encoder is compiled once. On a CPU core small batches stay in its caches:
# 9.0 ms a picture of 128 pixels in batches of 8 against 12.6 ms in batches of 64.
_BATCH = {"cpu": 8}
_BATCH_ELSEWHERE = 64
# Flags that say nothing of a manifest, and the files of a cache and of a check of its samples
_OF_LATENTS = ("out", "latents", "vae", "resolution", "flips", "flow_divisor", "image_resize", "depth_prompt")
_OF_LATENTS += ("shard_size", "batch", "workers", "skip_bad", "overrides")
_CACHE = re.compile(r"latents-\d+-of-\d+\..*|\.?(ledger|summary)\.json.*|\.?manifest\.jsonl.*|\.lock|\.contents.*")


FLAGS = {
    "a root": "--raw",
    "start or count": "--start or --count",
    "image_resize": "--image-resize",
    "depth_prompt": "--depth-prompt",
    "autoencoder": "--vae",
    "task": "--tasks",
}
"""What messages of the library call by name -> the flag."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="scenes, hypersim, flying_chairs, pix2gestalt, folder, …")
    parser.add_argument("--raw", default="", metavar="DIR", help="folder of the raw dataset (not for scenes)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    what = "depth,flow,amodal or a part of them, or generation (default: all it serves)"
    parser.add_argument("--tasks", default="", help=what)
    parser.add_argument("--split", default="train", help="default %(default)s")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="samples to use (default: all it has)")
    parser.add_argument("--start", type=int, default=0, metavar="I", help="first sample (default %(default)s)")
    add_source_options(parser)
    parser.add_argument("--latents", action="store_true", help="encode into a cache of latents")
    parser.add_argument("--vae", default="tiny", metavar="NAME|DIR", help="autoencoder (default %(default)s)")
    parser.add_argument("--resolution", type=int, default=128, metavar="R", help="pixels (default %(default)s)")
    parser.add_argument("--flips", choices=("none", "both"), default="both", help="mirrored too (default %(default)s)")
    parser.add_argument("--flow-divisor", type=POSITIVE, default=75.0, metavar="D", help="default %(default)s")
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
    parser.add_argument("--skip-bad", action="store_true", help="leave bad samples out instead of failing")
    add_overwrite(parser, "a manifest or cache")


def run(args: argparse.Namespace) -> int:
    for name, least in (("count", 0), ("start", 0), ("resolution", 8), ("shard_size", 1), ("batch", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least {least}")
    if args.workers is None:
        from scaling_perception.data.workers import default_workers

        args.workers = default_workers()
    return _latents(args) if args.latents else _manifest(args)


def _spec(args: argparse.Namespace) -> tuple[Any, ...]:
    tasks = tuple(filter(None, (task.strip() for task in args.tasks.split(","))))
    given = source_options(args.option)
    for name in ("count", "start", "resolution"):
        if name in given:
            raise UserError(f"--option {name}: give --{name} instead")
    return args.dataset, args.raw, args.split, tasks, args.count, args.start, args.resolution, given


def _manifest(args: argparse.Namespace) -> int:
    from scaling_perception.data.manifest import MANIFEST, SUMMARY, Checker, RawSamples, write_manifest
    from scaling_perception.data.workers import ordered_map
    from scaling_perception.support.progress import progress

    spec, out = _spec(args), Path(args.out)
    samples = RawSamples(*spec)
    print("\n".join(samples.taken(args.dataset, args.raw, args.split)), flush=True)
    total = len(samples)
    lines = ordered_map(Checker, spec, range(total), args.workers)
    about = {"format": 1, "dataset": args.dataset, "split": args.split, "sources": samples.fingerprint()}
    settings = settings_of(args, _OF_LATENTS, ("raw",))
    for name in (MANIFEST, SUMMARY):
        check_output(out / name, settings, args.overwrite)
    with _alone(out):
        summary = write_manifest(out, progress(lines, total, "check"), about, settings)
    _say_ranges(summary["ranges"])
    for line in summary["bad_samples"][:10]:
        print(f"bad sample {line['index']}: {line['reason']}")
    print(f"{summary['good']} good and {summary['bad']} bad samples: see {out / MANIFEST} and {out / SUMMARY}")
    return 1 if summary["bad"] and not args.skip_bad else 0


def _say_ranges(ranges: dict[str, list[float]]) -> None:
    from scaling_perception.data.manifest import UNITS, unlikely

    for name, (low, high) in ranges.items():
        print(f"{name}: {low:.4g} .. {high:.4g}{UNITS.get(name, '')}")
    for note in unlikely(ranges):
        print(f"warning: {note}", file=sys.stderr)


class SampleMaker:
    """``maker(index)`` -> the samples of a raw sample, each distinct picture once; made once in each process.

    The result holds ``samples``: dictionaries whose pictures (image, prompt, target) are digests; and ``pictures``:
    digest -> float32 (R, R, 3). The image of a scene is shared by its four passes and the prompt of depth is constant,
    so about a third of the encoding is saved. Or ``bad``: why the sample cannot be used.
    """

    def __init__(self, spec: tuple[Any, ...], resolution: int, options: dict[str, Any]):
        from scaling_perception.data.manifest import RawSamples
        from scaling_perception.tasks import TaskOptions

        self.samples, self.resolution = RawSamples(*spec), resolution
        self.options = TaskOptions.from_dict(options)

    def __call__(self, index: int) -> dict[str, Any]:
        import numpy as np

        from scaling_perception.data.latents import FIELDS
        from scaling_perception.data.manifest import ranges_of, reason
        from scaling_perception.tasks import get_task

        pictures: dict[bytes, Any] = {}
        try:
            raw, tasks = self.samples.read(index)
            ranges = ranges_of(raw, tasks)
            made = [one for task in tasks for one in get_task(task).encode(raw, self.resolution, self.options)]
            for sample in made:
                for field in (name for name in FIELDS if name in sample):
                    picture = np.ascontiguousarray(sample[field], np.float32)
                    if not np.isfinite(picture).all():
                        raise UserError(f"sample '{sample['key']}': its {field} is not finite everywhere")
                    sample[field] = hashlib.blake2b(picture.data, digest_size=16).digest()
                    pictures[sample[field]] = picture
        except Exception as error:
            if not isinstance(error, UserError) and (why := not_damage(error)):  # no reason to leave the sample out
                raise UserError(f"cannot read raw sample {index}: {why}") from error
            return {"index": index, "bad": reason(error)}
        return {"index": index, "samples": made, "pictures": pictures, "ranges": ranges}


_View = tuple[float, float, float] | None
_Name = tuple[bytes, _View]


class _Encoder:
    """Collects pictures and encodes them ``batch`` at a time, each distinct one once; keeps float16 latents.

    A picture is known by its digest and its view: None as it is, or the signs of its channels when mirrored.
    """

    PLAIN = (1.0, 1.0, 1.0)

    def __init__(self, autoencoder: Any, batch: int, resolution: int):
        import jax

        self.factor = autoencoder.factor
        self._encode = jax.jit(autoencoder.encode)
        self._params, self._batch, self._resolution = jax.device_put(autoencoder.params), batch, resolution
        self.clear()

    def clear(self) -> None:
        self._waiting: dict[_Name, Any] = {}
        self._running: tuple[list[_Name], Any] | None = None
        self.done: dict[_Name, tuple[Any, Any]] = {}
        self._known: set[_Name] = set()

    def add(self, digest: bytes, picture: Any, view: _View) -> None:
        """Have a view of the picture (R, R, 3) encoded."""
        import numpy as np

        name = (digest, view)
        if name in self._known:
            return
        self._known.add(name)
        if view is not None:
            picture = picture[:, ::-1]
        self._waiting[name] = picture if view in (None, self.PLAIN) else picture * np.asarray(view, picture.dtype)
        if len(self._waiting) == self._batch:
            self._start()

    def finish(self) -> None:
        """Encode what still waits; then ``done`` holds (mean, log-variance or None) of all that was added."""
        if self._waiting:
            self._start()
        self._collect()

    def _start(self) -> None:
        import numpy as np

        batch = np.zeros((self._batch, self._resolution, self._resolution, 3), np.float32)
        for row, picture in enumerate(self._waiting.values()):
            batch[row] = picture
        result = self._encode(self._params, batch)
        self._collect()  # the previous batch, while this one runs
        self._running = (list(self._waiting), result)
        self._waiting = {}

    def _collect(self) -> None:
        import numpy as np

        if self._running is None:
            return
        names, (mean, logvar) = self._running
        self._running = None
        mean = np.asarray(mean).astype(np.float16)
        logvar = None if logvar is None else np.asarray(logvar).astype(np.float16)
        for row, name in enumerate(names):
            if not np.isfinite(mean[row]).all():
                raise UserError("the autoencoder makes latents that are no finite float16: check its weights (--vae)")
            self.done[name] = (mean[row], None if logvar is None else logvar[row])


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder for this process; what a killed one left half-written is removed.

    Raises:
        UserError: another process is writing there, or it cannot be written.
    """
    with hold(out / ".lock", f"another prepare is writing to {out}", "wait for it or choose another --out"):
        for pattern in (".latents-*.array_record", ".latents-*.json", ".ledger.*.json"):
            for left in out.glob(pattern):
                left.unlink()
        yield


def _latents(args: argparse.Namespace) -> int:
    import jax

    from scaling_perception.data.latents import FORMAT, LEDGER, pass_table
    from scaling_perception.data.ledger import finished_shards, sources_and_entries
    from scaling_perception.data.manifest import RawSamples
    from scaling_perception.models.autoencoders import load_autoencoder
    from scaling_perception.tasks import FIELDS, TaskOptions, fields_of

    spec, out = _spec(args), Path(args.out)
    args.batch = args.batch or _BATCH.get(jax.default_backend(), _BATCH_ELSEWHERE)
    chosen = {"image_resize": args.image_resize, "depth_prompt": args.depth_prompt}
    encoding = TaskOptions(flow_divisor=args.flow_divisor, **chosen)
    options = encoding.to_dict()
    samples = RawSamples(*spec)
    print("\n".join(samples.taken(args.dataset, args.raw, args.split)), flush=True)
    sources, entries = sources_and_entries(samples)
    autoencoder = load_autoencoder(args.vae)
    if args.resolution % autoencoder.factor:
        raise UserError(f"--resolution {args.resolution} is no multiple of {autoencoder.factor}: choose one")
    picture = jax.ShapeDtypeStruct((1, args.resolution, args.resolution, 3), "float32")
    mean, logvar = jax.eval_shape(autoencoder.encode, autoencoder.params, picture)
    settings = {
        "dataset": args.dataset,
        "split": args.split,
        "tasks": samples.tasks,
        "sources": sources,
        "task_options": encoding.encoding(),
        "resolution": args.resolution,
        "autoencoder": autoencoder.id,
        "latent": list(mean.shape[1:]),
        "logvar": logvar is not None,
        "flips": args.flips,
        "shard_size": args.shard_size,
        "shards": -(-len(samples) // args.shard_size),
    }
    kinds = {task: fields_of(task) for task in samples.tasks}
    if len(set(kinds.values())) > 1:
        raise UserError(f"a cache cannot hold {' and '.join(kinds)} together: prepare generation by itself")
    if kinds[samples.tasks[0]] != FIELDS:
        settings["fields"] = list(kinds[samples.tasks[0]])
    ledger = {"format": FORMAT, "autoencoder_name": args.vae, "settings": settings, "entries": entries}
    if hasattr(samples.groups[0][0], "class_names"):
        ledger["class_names"] = samples.groups[0][0].class_names  # by label
    ledger |= {"passes": pass_table(), "complete": False, "shards": []}
    with contextlib.ExitStack() as held:
        restore_folder(out)
        held.enter_context(_alone(out))
        table = samples.contents()  # before anything is read: what changes from now on is noticed next time
        place = out
        try:
            ledger["shards"] = finished_shards(out, ledger, samples, table)
        except UserError:
            if not args.overwrite:
                raise
            place = _beside(out)
            held.enter_context(_alone(place))
            try:  # of an earlier start of this command
                ledger["shards"] = finished_shards(place, ledger, samples, table)
            except UserError:
                (place / LEDGER).unlink()
        begin, before = time.monotonic(), len(ledger["shards"])
        _build(args, place, spec, options, samples, table, ledger, autoencoder)
        if place != out:
            _replace(out, place)
    shards = ledger["shards"]
    records, new = (sum(shard["records"] for shard in some) for some in (shards, shards[before:]))
    if before == settings["shards"] and place == out:
        print(f"{out} is already finished: {records} records in {before} shards, all checksums match")
        return 0
    size = sum(shard["bytes"] for shard in shards) / 1e6
    seconds = time.monotonic() - begin
    skipped = sum(len(shard["bad"]) for shard in shards)
    print(
        f"{out}: {records} records in {len(shards)} shards, {size:.1f} MB; {new} of them now, {new / seconds:.1f} a "
        f"second" + (f"; {skipped} bad samples left out (see ledger.json)" if skipped else "")
    )
    return 0


def _beside(out: Path) -> Path:
    """Where the cache is made that will replace the one in ``out``, which stays whole until then.

    Raises:
        UserError: ``out`` holds something that is no part of a cache or of a check of its samples.
    """
    other = sorted(path.name for path in out.iterdir() if not _CACHE.fullmatch(path.name))
    if other:
        raise UserError(
            f"{out} also holds {', '.join(other[:5])}, which --overwrite would remove: choose another --out"
        )
    return out.absolute().with_name(f".{out.name}.partial")


def _replace(out: Path, place: Path) -> None:
    from scaling_perception.data.manifest import MANIFEST, SUMMARY

    for name in (MANIFEST, SUMMARY, f".{MANIFEST}.settings", f".{SUMMARY}.settings"):
        if (out / name).is_file():
            shutil.copy2(out / name, place / name)
    swap_folder(place, out)


def _build(
    args: argparse.Namespace,
    out: Path,
    spec: tuple[Any, ...],
    options: dict[str, Any],
    samples: Any,
    table: dict[str, str],
    ledger: dict[str, Any],
    autoencoder: Any,
) -> None:
    """Make the shards that are still missing; the ledger on disk is brought up to date after each."""
    from scaling_perception.data.contents import combined
    from scaling_perception.data.latents import LEDGER, sha256, write_shard
    from scaling_perception.data.ledger import samples_path, shard_files
    from scaling_perception.data.workers import ordered_map
    from scaling_perception.support.files import write_json
    from scaling_perception.support.progress import progress

    count, total = ledger["settings"]["shards"], len(samples)
    names = [f"latents-{number:05d}-of-{count:05d}.array_record" for number in range(count)]
    have = {shard["file"] for shard in ledger["shards"]}
    missing = [number for number, name in enumerate(names) if name not in have]
    parts = {n: range(n * args.shard_size, min(total, (n + 1) * args.shard_size)) for n in missing}
    if missing:
        write_json(out / LEDGER, ledger)  # from now on the folder is taken by these settings
        encoder = _Encoder(autoencoder, args.batch, args.resolution)
        jobs = [index for part in parts.values() for index in part]
        # no more processes than there is work for: each takes seconds to start
        workers = min(args.workers, -(-len(jobs) // 8))
        results = ordered_map(SampleMaker, (spec, args.resolution, options), jobs, workers)
        with contextlib.closing(results):
            shown = progress(results, len(jobs), "encode")
            ranges: dict[str, list[float]] = {}
            for number, part in parts.items():
                records, passes, bad, seen = _shard(encoder, shown, len(part), args, ranges)
                path, files = out / names[number], shard_files(samples, part, table)
                pictures = [files.get(next(iter(samples.paths(index)), "")) for index, *_ in seen]
                rows = [[key, made, picture] for (_, key, made), picture in zip(seen, pictures, strict=True)]
                write_shard(path, records)
                write_json(samples_path(path), {"format": 1, "files": files, "samples": rows})
                entry = {
                    "file": path.name,
                    "records": len(records),
                    "passes": passes,
                    "bytes": path.stat().st_size,
                    "sha256": sha256(path),
                    "bad": bad,
                }
                entry |= {"contents": combined(files)} if files else {}
                ledger["shards"] = sorted([*ledger["shards"], entry], key=lambda shard: shard["file"])
                ledger["complete"] = len(ledger["shards"]) == count
                write_json(out / LEDGER, ledger)
            for _ in shown:  # nothing is left: lets the progress say so
                pass
            _say_ranges(ranges)
    ledger["complete"] = True


def _shard(
    encoder: _Encoder,
    results: Iterator[dict[str, Any]],
    count: int,
    args: argparse.Namespace,
    ranges: dict[str, list[float]],
) -> tuple[list[bytes], dict[str, int], list[dict[str, Any]], list[tuple[int, str, str]]]:
    """Of the next ``count`` raw samples: records ordered by pass, records a pass, bad samples, and of the good ones
    (index, key, digest of the picture); ``ranges`` are widened by theirs."""
    from scaling_perception.data.latents import encode_record
    from scaling_perception.data.manifest import wider
    from scaling_perception.diffusion.targets import latent_mask
    from scaling_perception.tasks import ALL_PASSES, FIELDS, get_pass

    encoder.clear()
    views = (False,) if args.flips == "none" else (False, True)
    samples: dict[str, list[dict[str, Any]]] = {one.name: [] for one in ALL_PASSES}

    def name_of(sample: dict[str, Any], field: str, mirrored: bool) -> _Name:
        signs = get_pass(int(sample["pass_id"])).mirrored if field == "target" else encoder.PLAIN
        return sample[field], signs if mirrored else None

    bad, seen = [], []
    for _ in range(count):
        result = next(results)
        if "bad" in result:
            if not args.skip_bad:
                raise UserError(f"raw sample {result['index']} is bad ({result['bad']}): mend it or pass --skip-bad")
            bad.append({"index": result["index"], "reason": result["bad"]})
            continue
        wider(ranges, result["ranges"])
        first = result["samples"][0]
        seen.append((result["index"], first["key"], first["image" if "image" in first else "target"].hex()))
        for sample in result["samples"]:
            samples[get_pass(int(sample["pass_id"])).name].append(sample)
            for field in (name for name in FIELDS if name in sample):
                for view in views:
                    digest, signs = name_of(sample, field, view)
                    encoder.add(digest, result["pictures"][digest], signs)
    encoder.finish()
    records = []
    for sample in (sample for made in samples.values() for sample in made):
        encoded = []
        for view in views:
            valid = sample["valid"][:, ::-1] if view else sample["valid"]
            fields = {"valid": latent_mask(valid, encoder.factor)}
            for field in (name for name in FIELDS if name in sample):
                fields[field], logvar = encoder.done[name_of(sample, field, view)]
                if logvar is not None:
                    fields[f"{field}_logvar"] = logvar
            encoded.append(fields)
        records.append(encode_record(int(sample["pass_id"]), int(sample["label"]), sample["key"], encoded))
    return records, {name: len(made) for name, made in samples.items() if made}, bad, seen
