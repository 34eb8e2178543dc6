"""Speed of reading: latents and pictures through the pipeline, beside plain loops over the same files; `bench data`.

A plain loop is what anyone would write: one file or record after the other, in the same kind of random order, decoded
and stacked. Then a training step takes its batches from the cache, and the time in which it waits for them is counted.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from scaling_perception.support.errors import UserError
from scaling_perception.timing import train

Batch = Mapping[str, np.ndarray]

_SPAN = 1.0  # seconds that a timed call reads
_WARM = 8  # batches before: more than are made ahead
_SHARD = 512  # records of a drawn shard
_SCENE = (480, 640)  # of a drawn picture
_QUICK = {"repeats": 1, "steps": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", metavar="FOLDER", help="latents to read; drawn and thrown away unless given")
    parser.add_argument("--samples", type=int, default=4096, help="drawn records: image, prompt, target, two views")
    parser.add_argument("--pictures", type=int, default=128, help="drawn pictures of 640x480 with depth, as PNG")
    parser.add_argument("--resolution", type=int, default=256, help="latents have an eighth of it")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0, help="data.workers of the pipeline")
    parser.add_argument("--model", default="a1", help="the preset whose step waits; as a depth specialist")
    parser.add_argument("--steps", type=int, default=6, help="steps of it")
    parser.add_argument("--quick", action="store_true", help="one round of a moment: no measurement")


def draw_cache(out: Path, count: int, side: int) -> Path:
    """A cache of depth with random latents (side, side, 4), each with its mirrored view."""
    from scaling_perception.data.latents import FORMAT, LEDGER, encode_record, pass_table, sha256, write_shard
    from scaling_perception.support.files import write_json
    from scaling_perception.tasks import FIELDS, TaskOptions

    rng, shards = np.random.default_rng(0), []
    out.mkdir()
    for number, start in enumerate(range(0, count, _SHARD)):
        records = []
        for index in range(start, min(count, start + _SHARD)):
            drawn = [rng.standard_normal((len(FIELDS), side, side, 4), np.float32).astype(np.float16) for _ in range(2)]
            views = [{**dict(zip(FIELDS, one, strict=True)), "valid": rng.random((side, side)) < 0.9} for one in drawn]
            records.append(encode_record(0, -1, f"drawn/{index}", views))
        path = out / f"latents-{number:05d}-of-{-(-count // _SHARD):05d}.array_record"
        write_shard(path, records)
        row = {"file": path.name, "records": len(records), "passes": {"depth": len(records)}, "bad": []}
        shards.append({**row, "bytes": path.stat().st_size, "sha256": sha256(path)})
    settings = {"dataset": "drawn", "split": "", "tasks": ["depth"], "flips": "both", "logvar": False, "sources": []}
    settings |= {"latent": [side, side, 4], "resolution": 8 * side, "autoencoder": "drawn", "shards": len(shards)}
    settings["task_options"] = TaskOptions().encoding()
    ledger = {"format": FORMAT, "settings": settings, "entries": [], "passes": pass_table(), "complete": True}
    write_json(out / LEDGER, {**ledger, "shards": shards})
    return out


def draw_pictures(out: Path, count: int) -> Path:
    """Pictures with depth, in the folders of a person's own data: ramps with a little noise, so that PNG has work."""
    from scaling_perception.data.formats import write_depth_png
    from scaling_perception.data.images import write_image

    rng, (height, width) = np.random.default_rng(0), _SCENE
    ramp = np.add.outer(np.arange(height), np.arange(width)) * (160 / (height + width))
    for name in ("image", "depth"):
        (out / name).mkdir(parents=True)
    for index in range(count):
        noisy = ramp[..., None] + rng.integers(0, 24, (height, width, 3)) + rng.integers(0, 60, 3)
        write_image(out / "image" / f"{index}.png", noisy.astype(np.uint8))
        write_depth_png(out / "depth" / f"{index}.png", (1 + ramp / 20).astype(np.float32))
    return out


def plain_latents(cache: Path, batch: int) -> Iterator[Batch]:
    """Batches of a cache's records, one record after the other."""
    from array_record.python.array_record_module import ArrayRecordReader

    from scaling_perception.data.latents import decode_record, read_ledger

    shards = read_ledger(cache)["shards"]
    readers = [ArrayRecordReader(str(cache / shard["file"])) for shard in shards]
    places = [(reader, k) for reader, shard in zip(readers, shards, strict=True) for k in range(shard["records"])]
    for part in _shuffled(len(places), batch):
        records = [decode_record(places[index][0].read([places[index][1]])[0]) for index in part]
        names = [name for name in ("image", "prompt", "target") if name in records[0]]
        made = {name: np.stack([record[name] for record in records]).astype(np.float32) for name in names}
        yield {**made, "valid": np.stack([record["valid"] for record in records])}


def plain_pictures(folder: Path, batch: int, side: int) -> Iterator[Batch]:
    """Batches of pictures with depth, one file after the other."""
    from PIL import Image

    from scaling_perception.tasks import TaskOptions, get_task

    names = sorted(path.name for path in (folder / "image").iterdir())
    for part in _shuffled(len(names), batch):
        samples = []
        for index in part:
            image = np.asarray(Image.open(folder / "image" / names[index]))
            depth = np.asarray(Image.open(folder / "depth" / names[index])).astype(np.float32) / 1000
            samples += get_task("depth").encode({"image": image, "depth": depth}, side, TaskOptions())
        yield {name: np.stack([sample[name] for sample in samples]) for name in ("image", "prompt", "target", "valid")}


def _shuffled(count: int, batch: int) -> Iterator[np.ndarray]:
    """Places in random order, epoch after epoch."""
    rng = np.random.default_rng(0)
    stream = itertools.chain.from_iterable(rng.permutation(count) for _ in itertools.count())
    while True:
        yield np.fromiter(itertools.islice(stream, batch), np.int64)


def rate(make: Callable[[], Iterator[Batch]], batch: int, span: float) -> tuple[float, float]:
    """(samples a second, microseconds of this process's processor time a sample) of what ``make`` opens, once it is
    under way."""
    batches = make()
    for _ in range(_WARM):
        next(batches)
    begin, work, count = time.perf_counter(), time.process_time(), 0
    while (spent := time.perf_counter() - begin) < span or not count:
        next(batches)
        count += batch
    work = time.process_time() - work
    getattr(batches, "close", lambda: None)()
    return count / spent, 1e6 * work / count


def waiting(case: train.Case, batches: Any, steps: int) -> dict[str, float]:
    """Seconds of a training step (median), and the share of all of them that it waited for its batch."""
    import jax

    from scaling_perception.training.feed import ahead

    step = train.Ours(case, "float32", remat=False)
    read = batches.iterate(0)
    fed: Any = ahead(read, lambda batch: jax.device_put({name: batch[name] for name in case.batch}))
    step(next(fed))
    waited, seconds = 0.0, []
    for _ in range(steps):
        begin = time.perf_counter()
        batch = next(fed)
        waited += time.perf_counter() - begin
        step(batch)
        seconds.append(time.perf_counter() - begin)
    for stage in (read, fed):
        stage.close()
    return {"step_seconds": median(seconds), "waiting": waited / sum(seconds)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see the module and docs/speed.md.

    Returns:
        ``ways``: samples a second of each (median), and of every round, and this process's processor time a sample;
        ``ratios``: how many times as fast as its plain loop; ``step_seconds`` and ``waiting`` of the model's step.

    Raises:
        UserError: a number below 1, an unknown model, or no cache that it can be trained on.
    """
    from scaling_perception.data.pipeline import Batches

    if args.quick:
        vars(args).update(_QUICK)
    for name in ("samples", "pictures", "batch", "repeats", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: give 0 or more")
    if args.resolution < 16 or args.resolution % 16:
        raise UserError(f"--resolution {args.resolution}: give a multiple of 16")
    case = train.make_case(args)
    with tempfile.TemporaryDirectory() as place:
        cache = Path(args.cache or draw_cache(Path(place) / "cache", args.samples, args.resolution // 8))
        pictures = draw_pictures(Path(place) / "pictures", args.pictures)
        latents = {"cache": str(cache), "workers": args.workers, "mixture": {"depth": {"task": "depth"}}}
        held = Batches({**latents, "resolution": args.resolution}, args.batch, 0)
        if held.cached is None or held.cached.readers[0].fields == ("target",):
            raise UserError(f"{cache} holds no depth: give a --cache that was prepared with --tasks depth")
        latents["flip"] = all(reader.flipped for reader in held.cached.readers)
        files = Batches(latents, args.batch, 0, in_memory=False)
        entry = {"source": "folder", "root": str(pictures), "task": "depth", "split": "all"}
        online = {"mixture": {"own": entry}, "resolution": args.resolution, "flip": True, "workers": args.workers}
        raw = Batches(online, args.batch, 0)
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            "latents in memory": lambda: held.iterate(0),
            "latents from files": lambda: files.iterate(0),
            "latents, plain loop": lambda: plain_latents(cache, args.batch),
            "pictures": lambda: raw.iterate(0),
            "pictures, plain loop": lambda: plain_pictures(pictures, args.batch, args.resolution),
        }
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        order = list(ways)
        for _ in range(args.repeats):
            for name in order:
                rounds[name].append(rate(ways[name], args.batch, 0.0 if args.quick else _SPAN))
            order = order[1:] + order[:1]
        waits = waiting(case, held, args.steps)
    plain = {name: f"{name.split()[0]}, plain loop" for name in ways if "plain" not in name}
    found = {
        name: {"samples_per_second": median(speeds), "processor_microseconds": median(work), "rounds": list(speeds)}
        for name, (speeds, work) in ((name, zip(*rows, strict=True)) for name, rows in rounds.items())
    }
    ratios = {
        name: median(a / b for a, b in zip(found[name]["rounds"], found[slow]["rounds"], strict=True))
        for name, slow in plain.items()
    }
    names = ("samples", "pictures", "resolution", "batch", "workers", "model", "steps", "repeats")
    return {"what": "data", **{name: getattr(args, name) for name in names}, "ways": found, "ratios": ratios, **waits}


def table(result: Mapping[str, Any]) -> str:
    """The result as lines of text."""
    lines = [f"{'way':<22} {'samples/s':>10} {'slowest':>9} {'fastest':>9} {'processor us':>13}  x plain loop"]
    for name, row in result["ways"].items():
        rates = f"{row['samples_per_second']:10.0f} {min(row['rounds']):9.0f} {max(row['rounds']):9.0f}"
        rates += f" {row['processor_microseconds']:13.0f}"
        lines.append(f"{name:<22} {rates}" + (f"  {result['ratios'][name]:.2f}" if name in result["ratios"] else ""))
    step = f"a step of {result['model']} takes {result['step_seconds']:.3f} s"
    return "\n".join([*lines, f"{step}, of which it waits {result['waiting']:.2%} for its {result['batch']} latents"])
