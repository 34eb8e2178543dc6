"""Clips: frames that follow each other are predicted as one, so that what does not move does not flicker.

All frames take the noise of the first. With ``carry`` a frame starts from that noise mixed with the clean latents of
the frame before. Relative depth is aligned once: the members of all frames together, with one scale and shift each, and
the clip is stretched to [0, 1] as a whole; points of known distance give one line for all frames. The flicker is what
changes along the motion: see `flicker`.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Real

from scaling_perception.data.formats import read_flo
from scaling_perception.diffusion.caching import NO_CACHE
from scaling_perception.diffusion.sampler import SamplerTables
from scaling_perception.diffusion.solvers import SOLVERS
from scaling_perception.inference.batches import BatchPlan
from scaling_perception.inference.draws import draw_members, image_id, key_of
from scaling_perception.inference.find import Item
from scaling_perception.inference.metric_depth import MetricFit, Points, at_points, fit_points
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import Settings
from scaling_perception.inference.video import VideoWriter, frame_rate, is_video, require_pyav
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import atomic_path, read_json, write_json
from scaling_perception.support.progress import progress
from scaling_perception.support.shapes import RandomKey
from scaling_perception.tasks import get_task
from scaling_perception.tasks.base import Estimate
from scaling_perception.tasks.shapes import Colours, Map, Members, Native, Size, Spread

_MOST_BYTES = 8 * 2**30  # members and pictures of a clip, which are in memory together
_SURE = 50.0  # how fast the weight of a pixel falls with the square of its change of colour, of colours in [0, 1]


class Motion(NamedTuple):
    """How a clip is made: ``carry``, the share of the last frame's latents; ``flow``: a folder of its flow, or None."""

    carry: float = 0.0
    flow: str | None = None


def check_clip(settings: Settings, motion: Motion) -> None:
    """Refuse what does not go with a clip.

    Raises:
        UserError: another aspect than squash, compute by image, a ``carry`` outside [0, 1), or, with one, noise in the
            steps, a cache, or a solver of several evaluations a step.
    """
    if settings.adaptive or settings.aspect != "squash":
        raise UserError("--video goes with neither --tolerance, --step-tolerance nor --aspect: leave them out")
    if settings.merge_in != "pixels":
        raise UserError("--video merges members of all frames together, as pixels: leave out --merge-in")
    if settings.verifier is not None:
        raise UserError("--video merges members of all frames together: leave out --verifier")
    if not 0 <= motion.carry < 1:
        raise UserError(f"--carry {motion.carry:g}: give a share from 0 up to, without, 1, such as 0.1")
    draws = settings.eta or SOLVERS[settings.solver].draws
    if motion.carry and (draws or settings.cache != NO_CACHE or settings.evaluations != settings.steps):
        raise UserError("--carry goes with solvers without noise, of one evaluation a step, and without --cache")


def find_clips(items: Sequence[Item]) -> list[list[Item]]:
    """The items of each clip: a video's frames, or the pictures of a folder, in their order.

    Raises:
        UserError: a clip of a single frame.
    """
    clips: dict[Path, list[Item]] = {}
    for item in items:
        first = item.inputs[0]
        clips.setdefault(first.path if first.frame is not None else first.path.parent, []).append(item)
    for place, found in clips.items():
        if len(found) < 2:
            raise UserError(f"--video: {place} has one frame: give a video or a folder of frames, or leave out --video")
    return list(clips.values())


def members_of_frames(
    model: Predictor,
    raws: Sequence[dict[str, Any]],
    task: str,
    settings: Settings,
    tables: SamplerTables,
    key: int | RandomKey,
    carry: float = 0.0,
    batch_size: int | None = None,
) -> Iterator[Members]:
    """The members of each frame, from the noise of the first.

    Args:
        carry: share of the clean latents of a member in the frame before that its starting noise is mixed with.
    """
    raws = [{**raw, "noise_id": image_id(raws[0])} for raw in raws]
    most = 1 if carry else len(raws)
    plan = model.plan(task, settings.ensemble, most, batch_size, tables, views=settings.views_seen)
    if not carry:
        for start in range(0, len(raws), plan.images):
            group = raws[start : start + plan.images]
            latents = model.encode(group, task, plan, settings.views_seen)
            pixels = model.sample(latents, group, task, settings.ensemble, tables, key, plan, settings.antithetic)
            yield from (model.decode_members(one, task) for one in pixels)
        return
    plan, before = BatchPlan(1, plan.members), {}
    for raw in raws:
        latents, pixels = model.encode([raw], task, plan, settings.views_seen), []
        for first in range(0, settings.ensemble, plan.members):
            draw = draw_members(key_of(key), model.image_ids([raw], 1), first, plan.members, settings.antithetic)
            before[first], found = _carried(model, task, latents, draw, tables, before.get(first), carry)
            pixels.append(model.as_seen(found, task, latents, first))
        yield model.decode_members(np.concatenate(pixels, axis=1)[:, : settings.ensemble], task)


def _carried(
    model: Predictor, task: str, latents: Any, draw: Any, tables: SamplerTables, before: Any, carry: float
) -> tuple[Any, np.ndarray]:
    """Clean latents (1, M, P, h, w, C) of a frame that starts from those ``before``, and pixels (P, M, R, R, 3)."""
    engine, passes, (params, vae) = model.engine, model.passes(task), model.weights
    cond_tokens, modulation_table, state = engine.init_state(params, latents, draw, passes, tables)
    if before is not None:
        state = state._replace(x=(1 - carry) * state.x + carry * before)
    count = len(tables.t)
    state = engine.run_steps(params, cond_tokens, modulation_table, state, passes.labels, tables, 0, count)
    return state.x, np.asarray(engine.decode(vae, state.x, passes))[0]


def align(model: Predictor, members: Sequence[Members], task: str, mode: str) -> list[tuple[Map, Spread]]:
    """(prediction, uncertainty) of each frame's members. A relative answer is merged over all frames at
    once, as if they were one tall picture: each member keeps one scale and shift, and so does the clip."""
    if not get_task(task).relative:
        return [model.reduce(task, one, mode) for one in members]
    merged, spread = model.reduce(task, np.concatenate(members, axis=1), mode)
    return list(zip(np.split(merged, len(members)), np.split(spread, len(members)), strict=True))


def flicker(
    first: Native, second: Native, flow: Real[np.ndarray, "H W 2"], images: tuple[Colours, Colours]
) -> float | None:
    """How much a prediction changes along the motion, in its own unit: the mean of |second(x + flow) - first(x)|.

    Pixels count by how well their colours agree after the motion (exp(-50 d²), colours in [0, 1]), so that what is
    hidden, or where the flow is wrong, counts little; what leaves the picture does not count.

    Args:
        flow: pixels from the first to the second.

    Returns:
        None where no pixel counts.
    """
    height, width = flow.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    x, y = columns + flow[..., 0], rows + flow[..., 1]
    inside = (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    x, y = np.where(inside, x, 0), np.where(inside, y, 0)
    before, after = (np.asarray(image, np.float64) / 255 for image in images)
    weight = inside * np.exp(-_SURE * np.square(_warped(after, x, y) - before).sum(axis=-1))
    change = np.abs(_warped(np.asarray(second, np.float64), x, y) - np.asarray(first, np.float64))
    change = np.linalg.norm(change, axis=-1) if change.ndim == 3 else change
    return float((weight * change).sum() / weight.sum()) if weight.sum() > 0 else None


def _warped(values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A map (H, W[, C]) at places inside of it, bilinear."""
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right, bottom = np.minimum(left + 1, values.shape[1] - 1), np.minimum(top + 1, values.shape[0] - 1)
    across, down = x - left, y - top
    if values.ndim == 3:
        across, down = across[..., None], down[..., None]
    upper = values[top, left] * (1 - across) + values[top, right] * across
    lower = values[bottom, left] * (1 - across) + values[bottom, right] * across
    return upper * (1 - down) + lower * down


class Clip:
    """One clip in a job: makes the estimates of its frames, and beside them the video and its record.

    Attributes:
        points: points of known distance of all frames together, or None.
        fit: from the clip's depth to metres, once the estimates are made.
    """

    def __init__(
        self, items: Sequence[Item], out: Path, task: str, motion: Motion, points: Sequence[Points | None] | None
    ) -> None:
        """Args: ``points``: of each item; None where none are given at all."""
        first = items[0].inputs[0]
        require_pyav("--video writes a video")
        place = first.path if first.frame is not None else Path(items[0].inputs[0].path.absolute().parent)
        folder = Path(items[0].name).parent
        name = place.stem if first.frame is not None else place.name
        self.items, self.task, self.motion = list(items), task, motion
        self.rate = frame_rate(first.path) if is_video(first.path) else 25
        self.video, self.record = (out / folder / f"{name}_{task}{end}" for end in (".mp4", "_clip.json"))
        self.fit: MetricFit | None = None
        self._own = dict(zip((item.name for item in items), points or [None] * len(items), strict=True))
        known = [one for one in points or () if one is not None]
        self.points = Points(*(np.concatenate(c) for c in zip(*known, strict=True))) if known else None
        if points is not None and self.points is None:
            raise UserError(f"--align has no point of any frame of {place}: add some")
        self._changes: list[float | None] = []
        self._source = ""

    def identity(self, digest_of: Callable[[Path], str]) -> dict[str, Any]:
        """What decides the results of its frames besides their own inputs, as JSON values."""
        inputs = [[digest_of(p.path) if p.path.is_file() else None, p.frame] for i in self.items for p in i.inputs]
        digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
        return {"frames": digest, "carry": self.motion.carry}

    def is_there(self, identity: Mapping[str, Any]) -> bool:
        """Whether the video and its record are those of this clip."""
        try:
            return self.video.is_file() and read_json(self.record)["settings"]["clip"] == identity
        except (UserError, KeyError, TypeError):
            return False

    def stream(self, model: Predictor, raws: Iterator[dict[str, Any]], request: Any) -> Iterator[Estimate]:
        """An estimate for each frame that could be read, in order; makes the video on the way.

        Raises:
            UserError: frames of different sizes, or more of them than memory holds.
        """
        settings, what = request.settings, get_task(self.task)
        frames = self._all(raws, settings.ensemble * model.resolution**2)
        if not frames:
            return
        if self.motion.flow is not None:  # what is wrong with it is said before anything is written
            for one in frames[:-1]:
                _read_flow(Path(self.motion.flow), one["name"], one["image"].shape[:2])
        mode = settings.reduce_for(self.task)
        tables = model.tables(settings, self.task, model.choose_diffusion(settings.preset, settings.spacing))
        made = members_of_frames(
            model, frames, self.task, settings, tables, request.seed, self.motion.carry, request.batch_size
        )
        members = list(progress(made, len(frames), f"sample {self.task}"))
        reduced = align(model, members, self.task, mode)
        spent = model.evaluations(settings) * settings.ensemble

        def estimate(i: int) -> Estimate:
            size = frames[i]["image"].shape[:2]
            return model.merge(members[i], self.task, size, mode, frames[i], spent, reduced[i])

        if self.points is not None:
            self.fit = self._fit(frames, estimate, request)
        scale = None
        if what.clip_scale is not None:
            scale = max(what.clip_scale(estimate(i).prediction) for i in range(len(frames)))
        self.video.parent.mkdir(parents=True, exist_ok=True)
        last: Estimate | None = None
        pairs = itertools.chain([None], self._flows(model, frames, request))
        with atomic_path(self.video) as temporary, VideoWriter(temporary, self.rate) as video:
            for i, flow in enumerate(pairs):
                found = estimate(i)
                if last is not None and flow is not None:
                    images = frames[i - 1]["image"], frames[i]["image"]
                    self._changes.append(flicker(last.prediction, found.prediction, flow, images))
                video.add(what.clip_picture(found.prediction, scale))
                last = found
                yield found

    def _all(self, raws: Iterator[dict[str, Any]], each: int) -> list[dict[str, Any]]:
        frames: list[dict[str, Any]] = []
        for raw in raws:
            frames.append(raw)
            size, first = raw["image"].shape[:2], frames[0]["image"].shape[:2]
            if size != first:
                raise UserError(
                    f"--video: {self.items[0].name} is {first[1]}x{first[0]} and a later frame {size[1]}x{size[0]}: "
                    "give frames of one size"
                )
            if len(frames) * (24 * each + 24 * size[0] * size[1]) > _MOST_BYTES:
                raise UserError(
                    f"--video: {len(frames)} frames and more of {size[1]}x{size[0]} do not fit memory together: give "
                    "--start and --end for a part, --every, or fewer members"
                )
        return frames

    def _fit(self, frames: Sequence[Any], estimate: Callable[[int], Estimate], request: Any) -> MetricFit:
        """One line from the depth of all frames to their points."""
        given = [self._own[raw["name"]] for raw in frames]
        values = [at_points(estimate(i).prediction, own) for i, own in enumerate(given) if own is not None]
        known = Points(*(np.concatenate(c) for c in zip(*[own for own in given if own is not None], strict=True)))
        line = known._replace(x=np.arange(len(known.x), dtype=float), y=np.zeros(len(known.x)))
        return fit_points(np.concatenate(values)[None], line, request.extras.space, request.extras.fit)

    def _flows(self, model: Predictor, frames: Sequence[dict[str, Any]], request: Any) -> Iterator[Any]:
        """The flow (H, W, 2) from each frame to the next: given, the model's own, or None."""
        if self.motion.flow is not None:
            self._source = "given"
            for one in frames[:-1]:
                yield _read_flow(Path(self.motion.flow), one["name"], one["image"].shape[:2])
        elif (task := next(filter(_is_motion, model.tasks), None)) is not None:
            self._source = f"predicted by {request.model}"
            images = [frame["image"] for frame in frames]
            raws = (model.raw_inputs([a], task, [b])[0] for a, b in itertools.pairwise(images))
            settings = dataclasses.replace(request.settings, ensemble=1, reduce=None)
            for found in model.stream(raws, task, settings, request.seed, request.batch_size, len(frames) - 1):
                yield found.prediction
        else:
            yield from [None] * (len(frames) - 1)

    def finish(
        self, frames: Sequence[str], settings: Mapping[str, Any], request: Any, command: list[str] | None
    ) -> None:
        """Write the clip's record: it says what the video was made of, and how much it flickers."""
        known = [one for one in self._changes if one is not None]
        measured = {"mean": float(np.mean(known)), "pairs": self._changes, "flow": self._source} if known else None
        write_json(
            self.record,
            {
                "format": 1,
                "task": self.task,
                "video": self.video.name,
                "rate": float(self.rate),
                "frames": list(frames),
                "noise": "of the first frame",
                "carry": self.motion.carry,
                "flicker": measured,
                "metric": None if self.fit is None else self.fit.to_dict(),
                "settings": dict(settings),
                "request": request.to_dict(),
                "command": command,
            },
        )


def _is_motion(task: str) -> bool:
    """Whether a task asks for a second frame, so that its answer leads there."""
    asks = get_task(task).prompt
    return asks is not None and asks.frame


def _read_flow(folder: Path, name: str, size: Size) -> Real[np.ndarray, "H W 2"]:
    """The flow of a frame in a folder of ``predict --task flow``'s files.

    Raises:
        UserError: it is not there, or of another size than the frame.
    """
    stem = Path(name).name
    paths = [folder / f"{stem}{end}" for end in ("_flow.flo", ".flo")]
    path = next((one for one in paths if one.is_file()), None)
    if path is None:
        raise UserError(
            f"--flow {folder} has no {paths[0].name}: make it with predict --task flow, or leave out --flow"
        )
    flow = read_flo(path)
    if flow.shape[:2] != tuple(size):
        raise UserError(f"{path} is {flow.shape[1]}x{flow.shape[0]}, its frame {size[1]}x{size[0]}: give its own flow")
    return flow
