"""A cache of latents, shard by shard: what is there is kept, what is missing is made."""

import argparse
import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from scaling_perception.data import latents
from scaling_perception.data.cache_parts import (
    NoBucket,
    asked_of,
    begin_part,
    contents_of_part,
    count_records,
    hold_part,
    open_bucket,
    part_ledger,
    refuse_parts,
    say_precision,
)
from scaling_perception.data.contents import combined
from scaling_perception.data.encoding import Encoder, Name, SampleMaker
from scaling_perception.data.latents import FORMAT, LEDGER, encode_record, pass_table, sha256
from scaling_perception.data.ledger import alone, finished_shards, samples_path, shard_files, sources_and_entries
from scaling_perception.data.manifest import MANIFEST, SUMMARY, RawSamples, say_ranges, wider
from scaling_perception.data.workers import ordered_map
from scaling_perception.diffusion.targets import latent_mask
from scaling_perception.models import autoencoders
from scaling_perception.support.again import restore_folder, swap_folder
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json
from scaling_perception.support.parts import Part, note_idle
from scaling_perception.support.progress import progress
from scaling_perception.support.remote import WorkingCopy
from scaling_perception.tasks import ALL_PASSES, FIELDS, FRAME_PASSES, TaskOptions, fields_of, get_pass

# Pictures an encoder call: fixed, so that the encoder is compiled once. On a CPU core small batches stay in its caches:
# 9.0 ms a picture of 128 pixels in batches of 8 against 12.6 ms in batches of 64.
_BATCH = {"cpu": 8}
_BATCH_ELSEWHERE = 64
_CACHE = re.compile(
    r"latents-\d+-of-\d+\..*|\.?ledger.*\.json.*|\.?summary\.json.*|\.?manifest\.jsonl.*|\.lock|\.contents.*"
)


class _Work(NamedTuple):
    """What is encoded, and how; ``spec`` and ``options`` are what the processes that read are given."""

    samples: RawSamples
    spec: tuple[Any, ...]
    options: dict[str, Any]
    autoencoder: Any
    exact: Any  # the same in float32, where that is not


def make_cache(args: argparse.Namespace, spec: tuple[Any, ...], part: Part | None = None) -> int:
    """Make or complete the cache, or a part of it, that the flags of `prepare` describe, of ``RawSamples(*spec)``.

    Returns:
        The exit code.

    Raises:
        UserError: a flag is wrong, a sample is bad, the folder holds another cache, or it cannot be written.
    """
    if part is not None and args.overwrite:
        raise UserError("--overwrite replaces a whole cache: leave out --shard, or choose another --out")
    work, ledger = _work(args, spec)
    with open_bucket(args) as bucket:
        if part is None:
            bucket.fetch(lambda name: True)
            code = _whole(args, work, ledger, bucket)
        else:
            count = ledger["settings"]["shards"]
            own = tuple(f"latents-{number:05d}-of-{count:05d}." for number in part.block(count))
            bucket.fetch(lambda name: name.startswith(("ledger", *own)))
            code = _part(args, work, ledger, part, bucket)
        bucket.push()
    return code


def _work(args: argparse.Namespace, spec: tuple[Any, ...]) -> tuple[_Work, dict[str, Any]]:
    """What is to be encoded, and the ledger of it without shards."""
    args.batch = args.batch or _BATCH.get(jax.default_backend(), _BATCH_ELSEWHERE)
    frame = args.flow_frame or ("square" if autoencoders.is_matching(args.vae) else "native")
    chosen = {"image_resize": args.image_resize, "depth_prompt": args.depth_prompt, "flow_frame": frame}
    encoding = TaskOptions(flow_divisor=args.flow_divisor, **chosen)
    autoencoders.check_flow_frame(args.vae, frame, "--flow-frame square")
    samples = RawSamples(*spec)
    print("\n".join(samples.taken(args.dataset, spec[1], args.split)), flush=True)
    sources, entries = sources_and_entries(samples)
    autoencoder, exact = autoencoders.load_autoencoder(args.vae), None
    if args.dtype != "float32":
        autoencoder, exact = autoencoders.load_autoencoder(args.vae, dtype=args.dtype), autoencoder
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
        **({} if exact is None else {"dtype": args.dtype}),
        "latent": list(mean.shape[1:]),
        **({"target_channels": autoencoder.latent_channels} if autoencoder.features else {}),
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
    ledger |= {} if exact is None else {"precision": ""}
    ledger |= {"passes": pass_table(), "complete": False, "shards": []}
    return _Work(samples, spec, encoding.to_dict(), autoencoder, exact), ledger


def _whole(args: argparse.Namespace, work: _Work, ledger: dict[str, Any], bucket: WorkingCopy | NoBucket) -> int:
    out, samples, numbers = Path(args.out), work.samples, range(ledger["settings"]["shards"])
    with contextlib.ExitStack() as held:
        restore_folder(out)
        held.enter_context(alone(out))
        refuse_parts(out)
        table = samples.contents()  # before anything is read: what changes from now on is noticed next time
        place = out
        try:
            ledger["shards"] = finished_shards(out, ledger, samples, table)
        except UserError:
            if not args.overwrite:
                raise
            place = _beside(out)
            held.enter_context(alone(place))
            try:  # of an earlier start of this command
                ledger["shards"] = finished_shards(place, ledger, samples, table)
            except UserError:
                (place / LEDGER).unlink()
        begin, before = time.monotonic(), len(ledger["shards"])
        _build(args, place / LEDGER, work, table, ledger, numbers, bucket.push)
        if place != out:
            _replace(out, place)
    if before == len(numbers) and place == out:
        print(f"{bucket.url} is already finished: {count_records(ledger['shards'])}, all checksums match")
    else:
        _say_made(bucket.url, ledger["shards"], before, time.monotonic() - begin)
    return 0


def _part(
    args: argparse.Namespace, work: _Work, ledger: dict[str, Any], part: Part, bucket: WorkingCopy | NoBucket
) -> int:
    out, samples = Path(args.out), work.samples
    count, size = ledger["settings"]["shards"], args.shard_size
    numbers, said = part.block(count), f"part {part} of {bucket.url}"
    indices = range(numbers.start * size, min(len(samples), numbers.stop * size))
    note_idle(part, count, "shards", "--shard-size")
    ledger = {"part": list(part), "asked": asked_of(args), **ledger}
    table = contents_of_part(samples, indices)
    with hold_part(out, part, numbers, count):
        if not begin_part(out, part, ledger):
            print(f"{bucket.url} is already finished: its parts are joined")
            return 0
        path = out / part_ledger(part)
        ledger["shards"] = finished_shards(out, ledger, samples, table, path.name, numbers)
        begin, before = time.monotonic(), len(ledger["shards"])
        _build(args, path, work, table, ledger, numbers, bucket.push)
    if before == len(numbers):
        print(f"{said} is already finished: {count_records(ledger['shards'])}, all checksums match")
    else:
        _say_made(said, ledger["shards"], before, time.monotonic() - begin)
    print(f"when all parts are finished: the same command with --merge in place of --shard {args.shard}")
    return 0


def _say_made(what: str, shards: list[dict[str, Any]], before: int, seconds: float) -> None:
    size, new = sum(shard["bytes"] for shard in shards) / 1e6, sum(shard["records"] for shard in shards[before:])
    skipped = sum(len(shard.get("bad", ())) for shard in shards)
    print(
        f"{what}: {count_records(shards)}, {size:.1f} MB; {new} of them now, {new / seconds:.1f} a second"
        + (f"; {skipped} bad samples left out (see ledger.json)" if skipped else "")
    )


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
    for name in (MANIFEST, SUMMARY, f".{MANIFEST}.settings", f".{SUMMARY}.settings"):
        if (out / name).is_file():
            shutil.copy2(out / name, place / name)
    swap_folder(place, out)


def _build(
    args: argparse.Namespace,
    path: Path,
    work: _Work,
    table: dict[str, str],
    ledger: dict[str, Any],
    numbers: range,
    push: Callable[[], None],
) -> None:
    """Make those of the shards ``numbers`` that are missing; the ledger at ``path`` is kept up to date, and after
    each shard ``push`` is called."""
    out, samples, count = path.parent, work.samples, ledger["settings"]["shards"]
    names = {number: f"latents-{number:05d}-of-{count:05d}.array_record" for number in numbers}
    have = {shard["file"] for shard in ledger["shards"]}
    missing = [number for number, name in names.items() if name not in have]
    parts = {n: range(n * args.shard_size, min(len(samples), (n + 1) * args.shard_size)) for n in missing}
    if not numbers:
        ledger["complete"] = True
        write_json(path, ledger)
    if missing:
        write_json(path, ledger)  # from now on the folder is taken by these settings
        pictures = 2 * (1 if args.flips == "none" else 2) * min(args.shard_size, len(samples))  # of a shard, at least
        devices = jax.local_devices()[: max(1, -(-pictures // args.batch))]
        encoder = Encoder(work.autoencoder, args.batch, args.resolution, devices, work.exact)
        jobs = [index for part in parts.values() for index in part]
        # no more processes than there is work for: each takes seconds to start
        workers = min(args.workers, -(-len(jobs) // 8))
        results = ordered_map(SampleMaker, (work.spec, args.resolution, work.options), jobs, workers)
        with contextlib.closing(results):
            shown = progress(results, len(jobs), "encode")
            ranges: dict[str, list[float]] = {}
            for number, part in parts.items():
                records, passes, bad, seen = _shard(encoder, shown, len(part), args, ranges)
                shard, files = out / names[number], shard_files(samples, part, table)
                pictures = [files.get(next(iter(samples.paths(index)), "")) for index, *_ in seen]
                rows = [[key, made, picture] for (_, key, made), picture in zip(seen, pictures, strict=True)]
                latents.write_shard(shard, records)
                write_json(samples_path(shard), {"format": 1, "files": files, "samples": rows})
                entry = {
                    "file": shard.name,
                    "records": len(records),
                    "passes": passes,
                    "bytes": shard.stat().st_size,
                    "sha256": sha256(shard),
                    "bad": bad,
                }
                entry |= {"error": encoder.error} if encoder.error else {}
                entry |= {"contents": combined(files)} if files else {}
                ledger["shards"] = sorted([*ledger["shards"], entry], key=lambda shard: shard["file"])
                ledger["complete"] = len(ledger["shards"]) == len(numbers)
                say_precision(ledger)
                write_json(path, ledger)
                push()
            for _ in shown:  # nothing is left: lets the progress say so
                pass
            say_ranges(ranges)
    ledger["complete"] = True


def _shard(
    encoder: Encoder,
    results: Iterator[dict[str, Any]],
    count: int,
    args: argparse.Namespace,
    ranges: dict[str, list[float]],
) -> tuple[list[bytes], dict[str, int], list[dict[str, Any]], list[tuple[int, str, str]]]:
    """Of the next ``count`` raw samples: records ordered by pass, records a pass, bad samples, and of the good ones
    (index, key, digest of the picture); ``ranges`` are widened by theirs."""
    encoder.clear()
    views = (False,) if args.flips == "none" else (False, True)
    samples: dict[str, list[dict[str, Any]]] = {one.name: [] for one in ALL_PASSES}

    def name_of(sample: dict[str, Any], field: str, mirrored: bool) -> Name:
        number = int(sample["pass_id"])
        signs = get_pass(number).mirrored if field == "target" else encoder.PLAIN
        matched = encoder.matches and field == "prompt" and number in FRAME_PASSES
        return Name(sample[field], signs if mirrored else None, sample["image"] if matched else None)

    bad, seen = [], []
    for _ in range(count):
        result = next(results)
        if "bad" in result:
            if not (args.skip_bad or result["left_out"]):
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
                    encoder.add(name_of(sample, field, view), result["pictures"])
    encoder.finish()
    records = []
    for sample in (sample for made in samples.values() for sample in made):
        encoded = []
        for view in views:
            valid = sample["valid"][:, ::-1] if view else sample["valid"]
            fields = {"valid": latent_mask(valid, encoder.factor)}
            for field in (name for name in FIELDS if name in sample):
                mean, logvar = encoder.done[name_of(sample, field, view)]
                kept = encoder.latent_channels if field == "target" else mean.shape[-1]
                fields[field] = mean[..., :kept]
                if logvar is not None:
                    fields[f"{field}_logvar"] = logvar[..., :kept]
            encoded.append(fields)
        records.append(encode_record(int(sample["pass_id"]), int(sample["label"]), sample["key"], encoded))
    return records, {name: len(made) for name, made in samples.items() if made}, bad, seen
