"""Parts of a cache, made by several jobs in one folder, and the ledger that joins them.

A part makes a block of the cache's shards and keeps ``ledger-part-i-of-n.json``, a ledger of its own shards with
``part`` ([i, n]) and ``asked`` (the flags). Joining verifies all of them and every checksum, and writes the ledger that
one job would have written; the shards stay as they are.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scaling_perception.data.contents import contents_of
from scaling_perception.data.latents import LEDGER, PART_LEDGERS, check_shard, read_ledger
from scaling_perception.data.manifest import RawSamples
from scaling_perception.support.again import differing
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json
from scaling_perception.support.locks import hold
from scaling_perception.support.parts import Part, all_parts, refuse_elsewhere, refuse_other_flags
from scaling_perception.support.progress import progress
from scaling_perception.support.remote import WorkingCopy, is_remote

_OF_ONE_PART = ("part", "asked", "precision", "complete", "shards")
_OF_THE_RUN = {"out", "raw", "shard", "merge", "batch", "workers", "skip_bad", "overwrite", "overrides", "latents"}
_BUSY = ("another prepare is writing to {}", "wait for it or choose another --out")
_THREADS = 4  # that compare checksums: more only queue at the disk


def part_ledger(part: Part) -> str:
    """Name of a part's ledger."""
    return f"ledger-{part.name}.json"


def asked_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that decide what the cache holds."""
    return {name: value for name, value in sorted(vars(args).items()) if name not in _OF_THE_RUN}


def contents_of_part(samples: RawSamples, indices: range) -> dict[str, str]:
    """Path -> hash of the content of the files of raw samples ``indices``; other parts hash theirs."""
    table, start = {}, 0
    for source, chosen, _ in samples.groups:
        own = chosen[max(0, indices.start - start) : max(0, indices.stop - start)]
        table |= contents_of(source, own) if own else {}
        start += len(chosen)
    return table


def count_records(shards: Sequence[Mapping[str, Any]]) -> str:
    """``24 records in 2 shards``."""
    return f"{sum(shard['records'] for shard in shards)} records in {len(shards)} shards"


def say_precision(ledger: dict[str, Any]) -> None:
    """In words, what encoding in another type than float32 changed, measured on the first batch of every shard."""
    known = [shard["error"] for shard in ledger["shards"] if "error" in shard]
    if not known:
        return
    rms = (sum(one["rms"] ** 2 * one["pictures"] for one in known) / sum(one["pictures"] for one in known)) ** 0.5
    worst = max(one["rms"] / one["std"] for one in known)
    ledger["precision"] = (
        f"encoded in {ledger['settings']['dtype']}: on the first pictures of each shard "
        f"({sum(one['pictures'] for one in known)} in all) the latents differ from those of float32 by {rms:.2g} "
        f"(root mean square), at most {worst:.2%} of their standard deviation"
    )


class NoBucket:
    """A folder of this machine needs neither."""

    def __init__(self, folder: str) -> None:
        self.url = folder

    def fetch(self, wanted: Callable[[str], bool]) -> None:
        pass

    def push(self) -> None:
        pass


@contextlib.contextmanager
def open_bucket(args: argparse.Namespace) -> Iterator[WorkingCopy | NoBucket]:
    """Where ``args.out`` is an address, a copy of it, which ``args.out`` is within the block; nothing is fetched yet.

    Raises:
        UserError: a cache in a bucket is to be replaced.
    """
    if not is_remote(args.out):
        yield NoBucket(args.out)
        return
    if args.overwrite:
        raise UserError(f"--overwrite replaces local folders: remove {args.out}, or choose another --out")
    with WorkingCopy(args.out, f"-{(args.shard or 'all').replace('/', '-')}") as copy:
        args.out = str(copy.folder)
        try:
            yield copy
        except UserError as error:  # the copy is gone when it is read
            error.args = (str(error).replace(str(copy.folder), copy.url),)
            raise
        finally:
            args.out = copy.url


# Making a part


def refuse_parts(out: Path) -> None:
    """UserError when the folder holds parts and no finished cache."""
    if not (out / LEDGER).exists() and (known := sorted(out.glob(PART_LEDGERS))):
        raise UserError(
            f"{out} holds parts of a cache ({known[0].name}, {len(known)} in all): finish them with --shard and join "
            "them with --merge, or choose another --out"
        )


@contextlib.contextmanager
def hold_part(out: Path, part: Part, numbers: range, count: int) -> Iterator[None]:
    """Hold a part for this process; what a killed one left half-written is removed."""
    with hold(out / f".{part.name}.lock", f"another prepare is making part {part} of {out}", "wait for it"):
        patterns = [f".latents-{number:05d}-of-{count:05d}.*" for number in numbers]
        for pattern in (*patterns, f".ledger-{part.name}.*"):
            for left in out.glob(pattern):
                left.unlink()
        yield


def begin_part(out: Path, part: Part, ledger: Mapping[str, Any]) -> bool:
    """Take a place among the parts in ``out``; whether there is anything left to do.

    Raises:
        UserError: other parts have other settings or another number, or the folder holds a cache that is no part.
    """
    with hold(out / ".lock", _BUSY[0].format(out), _BUSY[1]):  # a whole prepare or --merge is not under way
        others = {path: read_ledger(out, path.name) for path in sorted(out.glob(PART_LEDGERS))}
        if (out / LEDGER).exists():
            whole = read_ledger(out)
            _same(out / LEDGER, whole, ledger)
            if whole["complete"]:
                return False
            raise UserError(
                f"{out} holds a cache that was begun without --shard: finish it so, or choose another --out"
            )
        refuse_elsewhere(part, [one.get("part") for one in others.values()], out)
        for path, one in others.items():
            _same(path, one, ledger)
        own = others.get(out / part_ledger(part))
        if own is not None and own.get("part") != list(part):
            raise UserError(
                f"{out / part_ledger(part)} is not of part {part} by its content: remove it, then run again"
            )
        if own is None:
            write_json(out / part_ledger(part), ledger)
    return True


def _same(path: Path, found: Mapping[str, Any], ledger: Mapping[str, Any]) -> None:
    sides = ({name: v for name, v in side.items() if name not in _OF_ONE_PART} for side in (found, ledger))
    if changed := differing(*sides):
        raise UserError(
            f"{path} is of other settings ({'; '.join(changed[:5])}): give all parts the same, or choose another --out"
        )


# Joining


def merge_cache(args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None]) -> int:
    """Join the parts in ``args.out``; needs neither raw data nor the autoencoder. Returns the exit code.

    Raises:
        UserError: parts are missing, unfinished, twice there, of other settings than each other or than the flags, or
            a shard is damaged.
    """
    if not args.out:
        raise UserError("--merge joins the parts in a folder: give it with --out")
    with open_bucket(args) as bucket:
        bucket.fetch(lambda name: True)
        return _merge(args, add_arguments, bucket)


def _merge(
    args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None], bucket: WorkingCopy | NoBucket
) -> int:
    out = Path(args.out)
    if not out.is_dir():
        raise UserError(f"{out} does not exist: give the folder that the parts were written to")
    with contextlib.ExitStack() as held:
        held.enter_context(hold(out / ".lock", _BUSY[0].format(out), _BUSY[1]))
        paths = {path.name: path for path in sorted(out.glob(PART_LEDGERS))}
        if not paths and (out / LEDGER).exists():
            whole = read_ledger(out)
            _refuse_damaged(out, whole, None)
            state = "" if whole["complete"] else "; it is unfinished: run it again without --shard and --merge"
            print(f"{bucket.url} holds no parts to join, and a cache of {count_records(whole['shards'])}{state}")
            return 0 if whole["complete"] else 1
        ledgers = {name: read_ledger(out, name) for name in paths}
        parts = all_parts(
            {name: one.get("part") for name, one in ledgers.items()}, out, lambda part: _left(ledgers, part)
        )
        for part in parts:
            busy = f"another prepare is making part {part} of {out}"
            held.enter_context(hold(out / f".{part.name}.lock", busy, "wait for it, then run --merge again"))
        first = ledgers[part_ledger(parts[0])]
        refuse_other_flags(add_arguments, args, first["asked"], out)
        for part in parts[1:]:
            _same(paths[part_ledger(part)], ledgers[part_ledger(part)], first)
        shards = _joined(out, parts, ledgers)
        whole = {name: value for name, value in first.items() if name not in ("part", "asked")}
        whole |= {"complete": True, "shards": shards}
        if "precision" in whole:
            say_precision(whole)
        write_json(out / LEDGER, whole)
        bucket.push()
        for path in paths.values():
            path.unlink()
        bucket.push()
    skipped = sum(len(shard.get("bad", ())) for shard in shards)
    left = f"; {skipped} bad samples left out (see {LEDGER})" if skipped else ""
    print(f"{bucket.url}: {len(parts)} parts joined, {count_records(shards)}, all checksums match{left}")
    return 0


def _left(ledgers: Mapping[str, Mapping[str, Any]], part: Part) -> str | None:
    ledger = ledgers[part_ledger(part)]
    count = len(part.block(ledger["settings"]["shards"]))
    if ledger["complete"] and len(ledger["shards"]) == count:
        return None
    return f"{len(ledger['shards'])} of {count} shards"


def _joined(out: Path, parts: Sequence[Part], ledgers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The shards of all parts, each once, none missing, none damaged."""
    shards: list[dict[str, Any]] = []
    for part in parts:
        ledger = ledgers[part_ledger(part)]
        count = ledger["settings"]["shards"]
        wanted = [f"latents-{number:05d}-of-{count:05d}.array_record" for number in part.block(count)]
        found = [shard["file"] for shard in ledger["shards"]]
        if found != wanted:
            raise UserError(
                f"{out / part_ledger(part)} lists other shards than part {part} has: remove it and run {part.flag}"
            )
        _refuse_damaged(out, ledger, part)
        shards += ledger["shards"]
    return shards


def _refuse_damaged(out: Path, ledger: Mapping[str, Any], part: Part | None) -> None:
    shards, passes = ledger["shards"], ledger.get("passes")
    mend = "prepare without --merge" if part is None else part.flag
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda shard: check_shard(out, shard, True, passes), shards)
        label = "verify" if part is None else f"verify part {part}"
        for shard, problem in zip(shards, progress(problems, len(shards), label), strict=True):
            if problem:
                raise UserError(f"{out / shard['file']} {problem}: run {mend} again, which makes it anew")
