"""What a cache was made of: which samples, of which files, with which contents.

Beside each shard lies ``latents-NNNNN-of-NNNNN.samples.json``. Its ``files`` are path -> hash of the content of each
file that the shard was made of; its ``samples`` have a row for each raw sample: key, digest of the picture at the
cache's resolution, and hash of the picture's file (null for a source without files). The shard's row in the ledger has
``contents``, the digest of ``files``: a shard whose files hold something else now is made again, and no other.

Caches of before have neither. They are taken as they are where no file is newer than its shard, and get ``files`` then.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scaling_perception.data.contents import changes, combined, first_names
from scaling_perception.data.latents import LEDGER, PART_LEDGERS, check_shard, read_ledger, row_fault
from scaling_perception.data.manifest import RawSamples
from scaling_perception.support.again import differing
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import read_json, write_json
from scaling_perception.support.locks import hold
from scaling_perception.support.streams import print_message

_DIGESTS = ("files", "entries")  # of a source's fingerprint: compared by contents here


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the folder for this process; what a killed one left half-written is removed.

    Raises:
        UserError: another process is writing there, or it cannot be written.
    """
    with hold(out / ".lock", f"another prepare is writing to {out}", "wait for it or choose another --out"):
        patterns = (".latents-*.array_record", ".latents-*.json", ".ledger.*.json")
        for pattern in () if any(out.glob(PART_LEDGERS)) else patterns:  # else it may be another part's
            for left in out.glob(pattern):
                left.unlink()
        yield


def samples_path(shard: Path) -> Path:
    """Where the description of a shard's samples lies."""
    return shard.with_name(f"{shard.stem}.samples.json")


def sources_and_entries(samples: RawSamples) -> tuple[list[dict[str, Any]], list[Any]]:
    """(what the ledger's settings say of the sources, digests of the samples' names)."""
    rows = samples.fingerprint()
    return [_bare(row) for row in rows], [row["source"].get("entries") for row in rows]


def _bare(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "source": {name: v for name, v in row["source"].items() if name not in _DIGESTS}}


def shard_files(samples: RawSamples, part: range, table: Mapping[str, str]) -> dict[str, str]:
    """Path -> hash of the files of some raw samples."""
    return {path: table[path] for index in part for path in samples.paths(index)} if table else {}


def finished_shards(
    out: Path,
    ledger: Mapping[str, Any],
    samples: RawSamples,
    table: Mapping[str, str],
    name: str = LEDGER,
    numbers: range | None = None,
) -> list[dict[str, Any]]:
    """The shards that an earlier run finished, that still match their checksums, and whose files are still the same.

    Args:
        ledger: the one to be made, whose settings and entries count. table: :meth:`RawSamples.contents`. name: of the
            ledger in ``out``. numbers: of the shards that are to be there; None: all.

    Raises:
        UserError: the folder holds a cache of other settings or samples; names what differs.
    """
    if not (out / name).exists():
        return []
    found, size, total = read_ledger(out, name, mend=True), ledger["settings"]["shard_size"], len(samples)
    _same_settings(out, found, ledger, samples, table)
    good, adopted = [], False
    count = ledger["settings"]["shards"]
    names = {f"latents-{n:05d}-of-{count:05d}.array_record" for n in (range(count) if numbers is None else numbers)}
    for shard in found["shards"]:
        if fault := row_fault(shard) or _unknown(shard["file"], good, names):
            print_message(f"{out / name}: {fault}: mending it")
            continue
        number = int(shard["file"].split("-")[1])
        files = shard_files(samples, range(number * size, min(total, (number + 1) * size)), table)
        problem = check_shard(out, shard, True, found.get("passes"))
        if problem is None and files and "contents" not in shard:
            problem = _newer(out, shard, samples, files)
            if problem is None:
                write_json(samples_path(out / shard["file"]), {"format": 1, "files": files})
                shard, adopted = {**shard, "contents": combined(files)}, True
        elif problem is None and files and shard["contents"] != combined(files):
            told = changes(_described(out / shard["file"]).get("files", {}), files) or "names are not known"
            problem = f"was made of files that hold something else now: {told}"
        if problem:
            print_message(f"{shard['file']} {problem}: making it again")
        else:
            good.append(shard)
    listed = {str(shard["file"]) for shard in found["shards"] if isinstance(shard, dict) and "file" in shard}
    if (adopted or len(good) < len(found["shards"])) and len(good) == len(listed):  # nothing is to be made
        write_json(out / name, {**found, "shards": good, "entries": ledger["entries"]})
    return good


def _unknown(file: str, good: list[dict[str, Any]], names: set[str]) -> str | None:
    """Why a row is none of a shard to be made, or not the only one."""
    if file not in names:
        return f"'{file}' is none of its shards"
    return f"{file} is listed twice" if any(shard["file"] == file for shard in good) else None


def _same_settings(
    out: Path, found: Mapping[str, Any], ledger: Mapping[str, Any], samples: RawSamples, table: Mapping[str, str]
) -> None:
    old, new = dict(found["settings"]), dict(ledger["settings"])
    if "entries" in found:
        old["sources"] = [_bare(row) for row in old["sources"]]
        if not differing(old, new) and found["entries"] != ledger["entries"]:
            told = changes({p: "" for s in _all(out, found) for p in s.get("files", {})}, dict.fromkeys(table, ""))
            raise UserError(
                f"{out} holds a cache of other samples ({told or 'their order or values'}): choose another --out, or "
                "--overwrite to replace it"
            )
    else:  # before contents were hashed: names and sizes
        rows = samples.fingerprint()
        new["sources"] = [{**row, "source": {n: v for n, v in row["source"].items() if n != "entries"}} for row in rows]
        if any(
            a.get("source", {}).get("files") != b["source"].get("files")
            for a, b in zip(old["sources"], rows, strict=False)
        ):
            raise UserError(
                f"{out} holds a cache of files with other names or sizes: choose another --out, or "
                "--overwrite to replace it"
            )
    if changed := differing(old, new):
        raise UserError(
            f"{out} holds a cache of other settings ({'; '.join(changed[:5])}): choose another --out or the "
            "same settings, or --overwrite to replace it"
        )


def _newer(out: Path, shard: Mapping[str, Any], samples: RawSamples, files: Mapping[str, str]) -> str | None:
    """Why a shard without hashes cannot be taken as it is."""
    made, root = (out / shard["file"]).stat().st_mtime_ns, samples.groups[0][0].file_paths([])[0]
    newer = sorted(path for path in files if (root / path).stat().st_mtime_ns >= made)
    return f"is older than {len(newer)} of its files ({first_names(newer)})" if newer else None


def _described(shard: Path) -> dict[str, Any]:
    path = samples_path(shard)
    if not path.is_file():
        return {}
    found = read_json(path)
    return found if isinstance(found, dict) and found.get("format") == 1 else {}


def _all(out: Path, ledger: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for shard in ledger["shards"]:
        yield _described(out / shard["file"])


def samples_of(folder: Path, ledger: Mapping[str, Any]) -> list[tuple[str, str, str | None]] | None:
    """(key, digest of the picture, hash of its file) of every raw sample of a cache; None where a shard has none."""
    rows: list[tuple[str, str, str | None]] = []
    for description in _all(folder, ledger):
        if "samples" not in description:
            return None
        rows += [tuple(row) for row in description["samples"]]
    return rows
