"""A list of predictions made by several jobs into one folder: what each has done, and the index that joins them.

A part predicts a block of the list, in the batches that one job would form, and keeps ``TASK.part-i-of-n.json`` in the
folder of results; joining verifies that all parts and all their files are there, of the sizes that were written, and
writes ``TASK.index.json``: of every prediction its name, inputs, and files, or why it failed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_perception.inference.find import Item
from scaling_perception.inference.job import Request, decided, run_job, summary_of
from scaling_perception.inference.predictor import Predictor
from scaling_perception.support.again import differing
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import read_json, write_json
from scaling_perception.support.parts import Part, all_parts, note_idle, refuse_elsewhere

_FORMAT = 1
_WHAT = ("items", "request", "settings")
"""What all parts have in common."""


def part_file(out: Path, task: str, part: Part) -> Path:
    """What a part keeps."""
    return out / f"{task}.{part.name}.json"


def part_files(out: Path, task: str) -> list[Path]:
    """Those of all parts that there are."""
    return sorted(out.glob(f"{task}.part-*-of-*.json"))


def index_file(out: Path, task: str) -> Path:
    """What joins the parts."""
    return out / f"{task}.index.json"


def run_part(
    predictor: Predictor,
    request: Request,
    items: Sequence[Item],
    out: Path,
    part: Part,
    asked: Mapping[str, Any],
    overwrite: bool,
    **how: Any,
) -> dict[str, Any] | None:
    """``job.run_job`` of this part's block of ``items``; None where the parts are joined already.

    Args:
        items: of all parts. asked: flags, for `join`. how: further arguments of ``run_job``.

    Raises:
        UserError: as ``run_job``, or other parts in ``out`` are of other settings, or of another number.
    """
    what = json.loads(json.dumps({"items": _described(items), "request": request.to_dict()}))
    what["settings"] = json.loads(json.dumps(decided(request, predictor)))
    path, index = part_file(out, request.task, part), index_file(out, request.task)
    others = {one: _read(one) for one in part_files(out, request.task)}
    if not others and not overwrite and index.is_file() and not _differing(_read(index), what):
        return None
    refuse_elsewhere(part, [one.get("part") for one in others.values()], out)
    for other, found in others.items():
        if told := _differing(found, what):
            raise UserError(f"{other} is of other settings ({told}): give all parts the same, or choose another --out")
    kept = {"format": _FORMAT, "part": list(part), **what, "asked": asked}
    write_json(path, {**kept, "summary": None})
    settings = request.settings
    members = settings.ensemble if settings.tolerance is None else min(settings.first, settings.ensemble)
    images = predictor.plan(request.task, members, max(len(items), 1), request.batch_size).images
    groups = -(-len(items) // images)  # whole batches, so that a part computes them as one job does
    note_idle(part, groups, f"batches of {images} pictures", "--batch-size")
    block = part.block(groups)
    own = items[block.start * images : block.stop * images]
    if own:
        summary = run_job(predictor, request, own, out, overwrite, of=len(items), **how)
    else:
        about = {"task": request.task, "model": request.model, "out": str(out)}
        summary = {**summary_of(about, [], 0.0, 0.0), "anew": None}
    sizes = {name: (out / name).stat().st_size for name in _written(summary, request.task)}
    write_json(path, {**kept, "summary": summary, "bytes": sizes})
    return summary


def _written(summary: Mapping[str, Any], task: str) -> list[str]:
    """Names of all files of a part's results."""
    made = [file for file in summary["files"] if "outputs" in file]
    return [path for file in made for path in (*file["outputs"].values(), f"{file['name']}_{task}.json")]


def join(out: Path, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(summary of all predictions as ``run_job`` has it, what the first part keeps); nothing is written.

    Raises:
        UserError: parts are missing, unfinished, there twice, or of other settings than each other, or files of theirs
            are gone, or of another size than was written.
    """
    found = {path.name: _read(path) for path in part_files(out, task)}

    def unfinished(part: Part) -> str | None:
        return "it did not come to its end" if found[part_file(out, task, part).name].get("summary") is None else None

    parts = all_parts({name: one.get("part") for name, one in found.items()}, out, unfinished)
    every = [found[part_file(out, task, part).name] for part in parts]
    for part, one in zip(parts, every, strict=True):
        if told := _differing(every[0], one):
            first, name = (part_file(out, task, which).name for which in (parts[0], part))
            raise UserError(f"{first} and {name} are of other settings ({told}): run one of them again")
        names, sizes = _written(one["summary"], task), one.get("bytes", {})
        if gone := [name for name in names if not (out / name).is_file()]:
            raise UserError(f"{len(gone)} files of part {part} are gone from {out} ({gone[0]}): run {part.flag}")
        if other := [name for name in names if sizes and sizes.get(name) != (out / name).stat().st_size]:
            what = f"{len(other)} files of part {part} in {out} are no longer of the size that was written"
            raise UserError(f"{what} ({other[0]}): remove them and run {part.flag} again")
    files = [file for one in every for file in one["summary"]["files"]]
    if len(files) != (count := every[0]["items"]["count"]):
        raise UserError(f"the parts in {out} hold {len(files)} of {count} results: run them again")
    seconds = [sum(one["summary"][name] for one in every) for name in ("seconds", "compile_seconds")]
    anew = [one["summary"]["anew"] for one in every if one["summary"]["anew"]]
    about = {"task": task, "model": every[0]["summary"]["model"], "out": str(out)}
    return {**summary_of(about, files, *seconds), "anew": "; ".join(anew) or None}, every[0]


def write_index(out: Path, summary: Mapping[str, Any], first: Mapping[str, Any]) -> Path:
    """Write what `join` found, and remove the files of the parts."""
    path, parts = index_file(out, summary["task"]), part_files(out, summary["task"])
    names = ("name", "inputs", "outputs", "error", "note")
    files = [{name: file[name] for name in names if name in file} for file in summary["files"]]
    write_json(
        path, {"format": _FORMAT, "task": summary["task"], **{name: first[name] for name in _WHAT}, "files": files}
    )
    for part in parts:
        part.unlink(missing_ok=True)
    return path


def same_items(first: Mapping[str, Any], items: Sequence[Item]) -> bool:
    """Whether a part is of these items."""
    return first["items"] == _described(items)


def _described(items: Sequence[Item]) -> dict[str, Any]:
    lines = [json.dumps([item.name, *map(str, item.inputs)]) for item in items]
    return {"count": len(items), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != _FORMAT or not all(name in found for name in _WHAT):
        raise UserError(f"{path} is no file of `predict --shard` of this version: remove it and run its part again")
    if not _sound(found.get("summary")) or not isinstance(found["items"], dict):
        raise UserError(f"{path} is damaged: remove it and run its part again")
    return found


def _sound(summary: Any) -> bool:
    """Whether a summary, or none yet, holds what joining reads."""

    def of_file(file: Any) -> bool:
        if not isinstance(file, dict) or not all(isinstance(file.get(name), str) for name in ("name", "status")):
            return False
        outputs = file.get("outputs", {})
        return isinstance(outputs, dict) and all(isinstance(name, str) for name in outputs.values())

    if not isinstance(summary, dict):
        return summary is None
    numbers = [summary.get(name) for name in ("seconds", "compile_seconds")]
    files = summary.get("files")
    return all(isinstance(one, int | float) for one in numbers) and isinstance(files, list) and all(map(of_file, files))


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What of the common is not the same, in words; ``''`` for nothing."""
    return "; ".join(differing(*({name: side[name] for name in _WHAT} for side in (there, here)))[:5])
