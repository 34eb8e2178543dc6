"""Predictions of many pictures into files: reading, computing and writing at the same time, what is there is kept.

One bad picture, or a result that cannot be written, is named and does not stop the rest. A full or read-only disk or
Ctrl-C stops everything; what was computed by then is written, and the same command goes on from there.
"""

import collections
import dataclasses
import math
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_perception.diffusion.caching import NO_CACHE
from scaling_perception.inference.clips import Clip, Motion, check_clip, find_clips
from scaling_perception.inference.find import Item
from scaling_perception.inference.metric_depth import (
    Points,
    check_inside,
    fit_points,
    fit_warning,
    points_of,
    read_points,
)
from scaling_perception.inference.outputs import (
    FORMAT,
    Extras,
    There,
    described,
    difference,
    digest,
    output_files,
    replace_results,
    sidecar_path,
    software,
    what_is_there,
    write_results,
)
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import LATER, Settings
from scaling_perception.inference.video import VideoReader, is_video
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain_os, full_or_read_only
from scaling_perception.support.locks import hold
from scaling_perception.support.overlap import WriteBehind, read_ahead, stopped_by_sigterm
from scaling_perception.support.progress import progress
from scaling_perception.tasks.base import Estimate
from scaling_perception.tasks.ensemble import opposed

_AHEAD = 32  # pictures in memory before they are computed, at most
_BEHIND = 4  # results in memory that wait to be written, at most
_WRITERS = 1  # no more: ``atomic_path`` turns the umask of the whole process for a moment


class Request(NamedTuple):
    """What is asked for, whatever the inputs."""

    task: str
    model: str
    autoencoder: str | None
    dtype: str
    settings: Settings
    seed: int
    batch_size: int | None
    formats: tuple[str, ...]
    extras: Extras
    align: str | None = None  # file of points
    budget: dict[str, Any] | None = None  # what it asked for, and what its table promises

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**self._asdict(), "settings": self.settings.to_dict(), "extras": self.extras._asdict()}


class _Ready(NamedTuple):
    """A picture that was read."""

    item: Item
    raw: dict[str, Any]
    inputs: dict[str, Any]  # as they are recorded


def run_job(
    predictor: Predictor,
    request: Request,
    items: Sequence[Item],
    out: Path,
    overwrite: bool = False,
    resume: bool = False,
    workers: int = 2,
    command: Callable[[Item], list[str]] | None = None,
    repeated: tuple[str, dict[str, Any]] | None = None,
    of: int | None = None,
    watch: Callable[[Estimate], None] | None = None,
    clip: Clip | None = None,
) -> dict[str, Any]:
    """Make the files of every item.

    Args:
        overwrite: also those that are there.
        resume: those of other settings are refused; without, they are made anew.
        workers: threads that read; 0 reads, computes and writes in turn.
        command: words that make one item's prediction, to be recorded.
        repeated: name and content of a record, whose weights, settings and points these must be.
        of: how many items there are with those of other jobs, which decides the batches; None: these.
        watch: called with every estimate before it is written, and with those of the members so far, see
            ``Predictor.stream``.
        clip: the items are its frames: all are made where one is missing, and its video.

    Returns:
        JSON values: ``files`` (name, inputs, status written, kept or failed, outputs or error, and where settings were
        other ``changed``), how many of each, ``anew`` (in words, how many had other settings, or None), ``seconds``,
        ``seconds_per_image``, ``compile_seconds``, ``macs_per_image``.

    Raises:
        UserError: an impossible setting, only results of other pictures in the way, with ``resume`` results of other
            settings, a full disk, ``out`` cannot be written.
    """
    # Long: the functions within share one job's items, settings and results; each is short.
    task, begin = request.task, time.perf_counter()
    predictor.check_task(task)
    settings = decided(request, predictor)
    digest_of = _remember_videos()
    whole = None if clip is None else clip.identity(digest_of)
    settings |= {} if whole is None else {"clip": whole}
    points = points_of_items(request, items) if clip is None else [clip.points] * len(items)
    options = [_options(request, item, own) for item, own in zip(items, points, strict=True)]
    if repeated is not None:
        _check_same(*repeated, settings, options[0], request.model)
    results: dict[str, dict[str, Any]] = {}
    known = {item.name: (own, choice) for item, own, choice in zip(items, points, options, strict=True)}

    def look(item: Item) -> There | UserError:
        files = output_files(task, item.name, request.formats)
        try:
            return (
                There()
                if overwrite
                else what_is_there(out, item, task, settings, known[item.name][1], files, digest_of)
            )
        except UserError as error:
            return error

    todo, changed = [], {}
    for item, there in zip(items, read_ahead(items, look, workers, 64), strict=True):
        if isinstance(there, UserError):
            results[item.name] = {"status": "failed", "error": str(there)}
        elif there.finished:
            results[item.name] = {"status": "kept", "outputs": output_files(task, item.name, request.formats)}
        else:
            todo.append(item)
            if there.changed:
                changed[item.name] = there.changed
    if clip is not None and whole is not None and (todo or not clip.is_there(whole)):
        todo = [item for item in items if results.get(item.name, {}).get("status") != "failed"]
    failed = [result["error"] for result in results.values() if result["status"] == "failed"]
    if len(failed) == len(items):
        more = "" if len(failed) == 1 else f" (and {len(failed) - 1} more like it)"
        raise UserError(failed[0] + more)
    if resume and changed:
        raise UserError(
            f"--resume: {_anew(changed, len(items), out)}: leave out --resume to make them anew, or give another --out"
        )
    if todo:
        _check_writable(out)

    videos = VideoReader()
    in_video = any(picture.frame is not None for item in todo for picture in item.inputs)
    readers = min(workers, 1) if in_video else workers  # frames come one after the other

    def read(item: Item) -> _Ready | str:
        if fault := next((picture.fault for picture in item.inputs if picture.fault), ""):
            return fault
        try:
            paths = [p.path if p.frame is None else videos.read(p.path, p.frame) for p in item.inputs]
            raw: dict[str, Any] = predictor.raw_inputs(paths[:1], task, paths[1:] or None)[0]
            raw["name"] = item.name
            if request.align is not None:
                own = known[item.name][0]
                if own is None:
                    return f"{request.align} has no point of {item.inputs[0]}: add some"
                check_inside(own, (raw["image"].shape[0], raw["image"].shape[1]))
            return _Ready(item, raw, described(item.inputs, [digest_of(p.path) for p in item.inputs]))
        except UserError as error:
            return _failure_text(item, error)

    def finish(ready: _Ready, estimate: Estimate) -> None:
        try:
            put(ready, estimate)
        except (UserError, OSError) as error:  # of this item, unless nothing more can be written at all
            if full_or_read_only(error):
                raise
            text = explain_os(error) if isinstance(error, OSError) else str(error)
            results[ready.item.name] = {"status": "failed", "error": _failure_text(ready.item, text)}

    def put(ready: _Ready, estimate: Estimate) -> None:
        item, (own, choice) = ready.item, known[ready.item.name]
        fit = None
        if clip is not None:
            fit = clip.fit
        elif own is not None:
            fit = fit_points(estimate.prediction, own, request.extras.space, request.extras.fit)
        files = output_files(task, item.name, request.formats)
        macs = predictor.macs(task, 1, 1) * estimate.forwards
        record = {
            "format": FORMAT,
            "name": item.name,
            "task": task,
            "inputs": ready.inputs,
            "size": {"height": estimate.size[0], "width": estimate.size[1]},
            "settings": settings,
            "options": {kind: choice[kind] for kind in files},
            "model": request.model,
            "autoencoder": predictor.autoencoder.name,
            "forwards": estimate.forwards,
            "macs": None if math.isnan(macs) else macs,
            "largest_uncertainty": float(np.max(estimate.uncertainty)) if request.settings.ensemble > 1 else None,
            "metric": None if fit is None else {"file": request.align, **fit.to_dict()},
            "request": request.to_dict(),
            "versions": software(),
            "command": None if command is None else command(item),
            "outputs": dict(files),
        }
        record_path = sidecar_path(out, item.name, task)
        busy = f"another predict is writing {record_path}"
        with hold(record_path.with_name(f".{record_path.name}.lock"), busy, "wait for it", wait=True):
            if not overwrite and what_is_there(out, item, task, settings, choice, files, digest_of).finished:
                results[item.name] = {"status": "kept", "outputs": files}  # another predict made it meanwhile
                return

            def write(folder: Path, names: Mapping[str, str]) -> None:
                write_results(folder, names, task, estimate, ready.raw["image"], request.extras, fit)

            replace_results(out, item, task, record, write)
        results[item.name] = {"status": "written", "macs": record["macs"], "outputs": files}
        if item.name in changed:
            results[item.name]["changed"] = list(changed[item.name])
        if estimate.members.ndim == 3 and len(estimate.members) > 1 and opposed(estimate.members):  # maps of depth
            note = "half of the members or more are inside out: its depth is that of the member that agrees best"
            results[item.name]["note"] = f"{item.inputs[0]}: {note}"
        if fit is not None and (note := fit_warning(estimate.prediction, fit)):
            results[item.name]["note"] = f"{item.inputs[0]}: {note}"

    _compute(predictor, request, todo, of or len(todo), readers, workers, read, finish, results, watch, clip)
    videos.close()
    made = [item.name for item in items if results[item.name]["status"] != "failed"]
    if clip is not None and todo and made:
        clip.finish(made, settings, request, None if command is None else command(items[0]))
    done = {name: words for name, words in changed.items() if "changed" in results[name]}
    files = [{"name": i.name, "inputs": [str(p) for p in i.inputs], **results[i.name]} for i in items]
    about = {"task": task, "model": request.model, "out": str(out)}
    return {
        **summary_of(about, files, time.perf_counter() - begin, predictor.compile_seconds),
        "anew": _anew(done, len(items), out) if done else None,
    }


def run_clips(
    predictor: Predictor,
    request: Request,
    items: Sequence[Item],
    out: Path,
    motion: Motion,
    overwrite: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Make the files of every frame, the video and the record of each clip (see ``clips``).

    Args:
        how: as for `run_job`.

    Returns:
        What `run_job` does, of all clips together, and ``clips``, the videos.

    Raises:
        UserError: as `run_job`; what does not go with a clip, one of a single frame, or two of one name.
    """
    check_clip(request.settings, motion)
    clips = []
    for own in find_clips(items):
        points = points_of_items(request, own) if request.align is not None else None
        clips.append(Clip(own, out, request.task, motion, points))
        if clips[-1].video in [clip.video for clip in clips[:-1]]:
            raise UserError(f"two clips would be written to {clips[-1].video}: give each its own --out")
    found = [run_job(predictor, request, clip.items, out, overwrite, clip=clip, **how) for clip in clips]
    files = [file for one in found for file in one["files"]]
    about = {"task": request.task, "model": request.model, "out": str(out)}
    anew = "; ".join(one["anew"] for one in found if one["anew"] is not None)
    seconds = sum(one["seconds"] for one in found)
    whole = summary_of(about, files, seconds, predictor.compile_seconds)
    return {**whole, "anew": anew or None, "clips": [str(clip.video) for clip in clips if clip.video.is_file()]}


def _anew(changed: Mapping[str, tuple[str, ...]], of: int, out: Path) -> str:
    """How many results had other settings, and which: those of most of them."""
    ((words, count),) = collections.Counter(changed.values()).most_common(1)
    which = "; ".join(words) + (f"; {len(changed) - count} more with others" if count < len(changed) else "")
    return f"{len(changed)} of {of} in {out} had been made with other settings ({which})"


def _check_writable(out: Path) -> None:
    """UserError before anything is computed where no result can be written."""
    place = out.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: cannot write {explain_os(error, place)}") from error


def _compute(
    predictor: Predictor,
    request: Request,
    todo: Sequence[Item],
    of: int,
    readers: int,
    workers: int,
    read: Callable[[Item], _Ready | str],
    finish: Callable[[_Ready, Estimate], None],
    results: dict[str, dict[str, Any]],
    watch: Callable[[Estimate], None] | None,
    clip: Clip | None,
) -> None:
    task, settings = request.task, request.settings
    if not todo:
        return
    plan = predictor.plan(task, settings.ensemble, of, request.batch_size)
    ahead = min(max(plan.images, 2 * readers), _AHEAD)
    waiting: deque[_Ready] = deque()  # read, and on the way through the predictor, which keeps their order

    with (
        stopped_by_sigterm(),
        WriteBehind(min(workers, _WRITERS), _BEHIND) as write,
        closing(read_ahead(todo, read, readers, ahead)) as reading,
    ):

        def raws() -> Iterator[dict[str, Any]]:
            for item, ready in zip(todo, reading, strict=True):
                if isinstance(ready, str):
                    results[item.name] = {"status": "failed", "error": ready}
                else:
                    waiting.append(ready)
                    yield ready.raw

        if clip is None:
            stream = predictor.stream(raws(), task, settings, request.seed, request.batch_size, of, watch)
        else:
            stream = clip.stream(predictor, raws(), request)
        for estimate in progress(stream, len(todo), f"predict {task}"):
            if watch is not None:
                watch(estimate)
            write(finish, waiting.popleft(), estimate)


def _failure_text(item: Item, error: UserError | str) -> str:
    """A reason that names its picture."""
    name = str(item.inputs[0].path)
    return str(error) if name in str(error) or len(item.inputs) > 1 else f"{name}: {error}"


def summary_of(
    about: Mapping[str, Any], files: list[dict[str, Any]], seconds: float, compile_seconds: float
) -> dict[str, Any]:
    """What `run_job` returns of ``files``; ``about``: task, model and out."""
    count = {status: sum(file["status"] == status for file in files) for status in ("written", "kept", "failed")}
    macs = [file["macs"] for file in files if file.get("macs") is not None]
    return {
        **about,
        **count,
        "seconds": seconds,
        "seconds_per_image": seconds / count["written"] if count["written"] else None,
        "compile_seconds": compile_seconds,
        "macs_per_image": sum(macs) / len(macs) if macs else None,
        "files": files,
    }


# What decides a result


def decided(request: Request, predictor: Predictor) -> dict[str, Any]:
    """All that decides a result besides the inputs."""
    settings, usual = request.settings.to_dict(), Settings().to_dict()
    diffusion = predictor.choose_diffusion(settings.pop("preset"), settings.pop("spacing"))
    grid = predictor.grid(request.task, request.settings.steps, diffusion)
    if settings["cache"] == NO_CACHE:  # results of versions without caches are the same
        del settings["cache"], settings["cache_interval"]
    settings = {name: value for name, value in settings.items() if name not in LATER or value != usual[name]}
    return {
        "weights": predictor.id,
        "autoencoder_weights": predictor.autoencoder_id,
        "resolution": predictor.resolution,
        **settings,
        "reduce": request.settings.reduce_for(request.task),
        "diffusion": dataclasses.asdict(diffusion),
        **({} if grid is None else {"timesteps": grid[0].tolist()}),
        "seed": request.seed,
        "dtype": request.dtype,
        "task_options": predictor.options.to_dict(),
    }


def points_of_items(request: Request, items: Sequence[Item]) -> list[Points | None]:
    """The points of known distance of each item; None where the request's file has none."""
    if request.align is None:
        return [None] * len(items)
    return points_of(request.align, read_points(request.align), [item.inputs[0] for item in items])


def _options(request: Request, item: Item, points: Points | None) -> dict[str, Any]:
    return {kind: request.extras.of(kind, points) for kind in output_files(request.task, item.name, request.formats)}


def _check_same(
    name: str, found: dict[str, Any], settings: dict[str, Any], options: dict[str, Any], model: str
) -> None:
    """UserError when a repetition would not compute what the record describes."""
    what = {"weights": f"weights of model {model}", "autoencoder_weights": "weights of the autoencoder"}
    for other, was, now in difference(found["settings"], settings):
        changed = what.get(other, f"{other} of model {model}")
        raise UserError(f"the {changed} are not those of {name} ({was} then, {now} now): bring those back")
    for kind, own in options.items():
        if found["options"].get(kind, own) != own:
            raise UserError(f"the points of this picture are not those of {name}: bring the old file of points back")


def _remember_videos() -> Callable[[Path], str]:
    """``digest`` that reads a video once for all its frames."""
    lock, seen = threading.Lock(), {}

    def of(path: Path) -> str:
        if not is_video(path):
            return digest(path)
        with lock:
            if path not in seen:
                seen[path] = digest(path)
            return seen[path]

    return of
