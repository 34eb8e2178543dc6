"""From pictures to predictions: encode once, sample every member and pass in one batch, decode, ensemble.

The graphs are in ``engine``; what may be turned is in ``settings``; compute by image is in ``adaptive``.

The noise of a member depends on the key, the image's own pixels and the member's number, and on nothing else: member 3
of an image is the same in an ensemble of 5 or of 50, alone or in a batch, in any order.
"""

import dataclasses
import itertools
import math
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np

from scaling_perception.diffusion.sampler import SamplerTables
from scaling_perception.diffusion.schedules import DiffusionPreset, get_diffusion
from scaling_perception.diffusion.solvers import evaluations
from scaling_perception.evaluation.adaptive import adaptive_stream
from scaling_perception.evaluation.aspect import with_aspect
from scaling_perception.evaluation.batches import Plan, free_bytes, shrink, split
from scaling_perception.evaluation.engine import Engine, Passes, draw_members
from scaling_perception.evaluation.inputs import find_model, raw_samples
from scaling_perception.evaluation.prediction import Estimate, Prediction, reduce_members, to_native
from scaling_perception.evaluation.protocols import reduce_mode
from scaling_perception.evaluation.settings import Settings
from scaling_perception.interop.model_folder import load_model
from scaling_perception.models.autoencoders import Autoencoder, load_autoencoder, tree_hash
from scaling_perception.models.config import config_from_dict
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks import TaskOptions, get_task, pass_indices
from scaling_perception.tasks.amodal import mask_from_whole
from scaling_perception.tasks.depth import to_range
from scaling_perception.tasks.resize import resize_nearest

# Decoded pixels in one batch where no larger batch is faster; then memory decides (see ``Predictor.plan``).
_PIXELS_AT_ONCE = {"cpu": 2**20}
_PIXELS_AT_ONCE_ELSEWHERE = 2**24
_NO_TASK = (
    "this model knows no task: it was made for classes of pictures (an imported DiT); fine-tune it first "
    "(scaling-perception train --config configs/from_dit.py:init=FOLDER …)"
)


class Predictor:
    """A trained model with its autoencoder, ready to be called on pictures.

    Attributes:
        params: the DiT's parameters on the device; may be replaced by others of the same shapes (no recompilation).
        meta: the model folder's description.
        config, resolution, options, tasks: taken from it.
        id, autoencoder_id: 12 hexadecimal digits of the weights that it was made with (encoder and decoder together).
        autoencoder: the frozen autoencoder.
        engine: the compiled graphs.
        macs_per_forward: multiply-accumulates of one forward pass of the DiT on one image, NaN if unknown.
    """

    count_macs: ClassVar[Callable[[Any], float] | None] = None
    """Counts one forward pass of a DiTConfig. Set by the package's root: this layer may not import ``scaling``."""

    def __init__(
        self,
        params: Any,
        meta: dict[str, Any],
        autoencoder: Autoencoder | None = None,
        dtype: str = "float32",
        mesh: Any = None,
    ) -> None:
        """Args: the tree and description that ``load_model`` returns; an autoencoder other than the description's; the
        devices to use (None: all accelerators of this machine, or one CPU device).

        Raises:
            UserError: the description does not fit together.
        """
        self.meta = meta
        self.config = config_from_dict(meta["model"])
        self.resolution = int(meta["resolution"])
        self.tasks: tuple[str, ...] = tuple(meta["tasks"])
        self.options = TaskOptions.from_dict(meta.get("task_options", {}))
        self.autoencoder = autoencoder if autoencoder is not None else _own_autoencoder(meta)
        if self.resolution != self.config.input_size * self.autoencoder.factor:
            raise UserError(
                f"resolution {self.resolution} does not fit the model's latents of {self.config.input_size} and the "
                f"autoencoder's factor {self.autoencoder.factor}: choose the autoencoder it was trained with"
            )
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"unknown dtype '{dtype}'{did_you_mean(dtype, ('float32', 'bfloat16'))}")
        self.diffusion = _own_diffusion(meta["diffusion"])
        self.id, self.autoencoder_id = tree_hash(params), tree_hash(self.autoencoder.params)
        if mesh is None and jax.default_backend() != "cpu":
            mesh = make_mesh(devices=jax.local_devices())
        self.engine = Engine(self.config, self.autoencoder, dtype, mesh)
        self.params = self.engine.place(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params))
        self._autoencoder_params = self.engine.place(self.autoencoder.params)
        count = type(self).count_macs
        self.macs_per_forward = math.nan if count is None else float(count(self.config))

    @classmethod
    def from_pretrained(
        cls, name: str, autoencoder: str | None = None, dtype: str = "float32", mesh: Any = None
    ) -> "Predictor":
        """Load a model.

        Args:
            name: a model folder, a training run (its ``model/``), a shipped name such as ``mini``, or a hub id.
            autoencoder: another than the one the model names, by name, folder or hub id.
            dtype: of the DiT's matmuls: float32 or bfloat16.
            mesh: devices to use, see ``Predictor``.

        Raises:
            UserError: nothing there, damaged files, or parts that do not fit together.
        """
        params, meta = load_model(find_model(name))
        return cls(params, meta, load_autoencoder(autoencoder) if autoencoder else None, dtype, mesh)

    @property
    def weights(self) -> tuple[Any, Any]:
        """Parameters of the DiT and of the autoencoder, as the graphs take them."""
        return self.params, self._autoencoder_params

    @property
    def traces(self) -> Counter[str]:
        """How often each graph was traced, by name."""
        return self.engine.traces

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling so far."""
        return self.engine.compile_seconds

    def __call__(
        self,
        images: Any,
        task: str = "depth",
        steps: int = 10,
        ensemble: int = 5,
        key: int | jax.Array = 0,
        prompt: Any = None,
        preset: str | None = None,
        spacing: str | None = None,
        reduce: str | None = None,
        batch_size: int | None = None,
        **more: Any,
    ) -> Prediction:
        """Predict. Safe to call from several threads.

        Args:
            images: one picture or several (list, tuple, or an array (B, H, W, C)): paths, PIL pictures, or arrays
                (H, W[, C]) of uint8, uint16 or float in [0, 1]. Sizes may differ; results are as large as the pictures.
            task: depth, flow or amodal, as far as the model knows them.
            key: integer or JAX key; the same key gives the same prediction.
            prompt: flow: the second frame of each image; amodal: the mask of the object's visible part.
            steps, ensemble, preset, spacing, reduce, more: see ``evaluation.settings.Settings``; ``more``: solver,
                eta, clip, antithetic, aspect, tolerance, first, step_tolerance or step_chunk.
            batch_size: images × members sampled at once; None chooses by memory. When given, short batches are padded
                to it, so that calls of any length share one graph.

        Raises:
            UserError: an unreadable picture, a missing prompt, or an unknown or impossible setting.
        """
        fields = [field.name for field in dataclasses.fields(Settings)]
        for name in more:
            if name not in fields:
                raise TypeError(f"unknown setting '{name}'{did_you_mean(name, fields)}")
        given = {"preset": preset, "spacing": spacing, "reduce": reduce}
        settings = Settings(steps=steps, ensemble=ensemble, **given, **more)
        several = isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4)
        raws = self.raw_inputs(list(images) if several else [images], task, prompt if several else [prompt])
        parts = list(self.stream(raws, task, settings, key, batch_size, len(raws)))
        return Prediction(task, parts, self.macs(task, 1, 1), single=not several)

    def intermediates(
        self,
        image: Any,
        task: str = "depth",
        at: Sequence[int] = (0, -1),
        key: int | jax.Array = 0,
        prompt: Any = None,
        **settings: Any,
    ) -> list[Prediction]:
        """The prediction as it would be if sampling stopped after each of the steps ``at`` (supplement Fig. 1).

        Args:
            at: numbers of steps, 0 is the first; negative ones count from the end. All come from one run.
            settings: as for calling the predictor (steps, ensemble, …), squashing and without tolerances.

        Raises:
            UserError: as calling; a step that is not there.
        """
        chosen = Settings(**settings)
        if chosen.adaptive or chosen.aspect != "squash":
            raise UserError("intermediates go with neither tolerance nor aspect: leave them out")
        steps = [step + chosen.steps if step < 0 else step for step in at]
        if not steps or len(set(steps)) < len(steps) or not set(steps) <= set(range(chosen.steps)):
            raise UserError(f"steps {list(at)} to look at: give different ones in 0..{chosen.steps - 1}")
        (raw,) = raws = self.raw_inputs([image], task, [prompt])
        diffusion, mode = self.choose_diffusion(chosen.preset, chosen.spacing), reduce_mode(task, chosen.reduce)
        tables = chosen.tables(diffusion)
        plan = Plan(1, chosen.ensemble)
        draw = draw_members(_key(key), self.image_ids(raws, 1), 0, chosen.ensemble, chosen.antithetic)
        latents = self.encode(raws, task, plan)
        rows = tuple(evaluations(chosen.solver, step + 1) - 1 for step in steps)
        kept = np.asarray(self.engine.sample(*self.weights, latents, draw, self.passes(task), tables, rows))
        found, size = [], (raw["image"].shape[0], raw["image"].shape[1])
        for row, pixels in zip(rows, kept, strict=True):
            members = self.decode_members(pixels[0], task)
            forwards = (row + 1) * chosen.ensemble
            estimate = self.merge(members, task, size, mode, raw.get("visible_mask"), forwards)
            found.append(Prediction(task, [estimate], self.macs(task, 1, 1), single=True))
        return found

    def stream(
        self,
        raws: Iterable[dict[str, Any]],
        task: str,
        settings: Settings,
        key: int | jax.Array = 0,
        batch_size: int | None = None,
        count: int | None = None,
    ) -> Iterator[Estimate]:
        """One result for each raw sample, in order; holds few batches of samples at a time.

        Args:
            count: how many samples there are, if that is known: short runs then take smaller batches.
        """
        key, mode = _key(key), reduce_mode(task, settings.reduce)
        tables = settings.tables(self.choose_diffusion(settings.preset, settings.spacing))
        if settings.aspect == "tile":
            count = None  # windows: more than there are samples
        members = min(settings.first, settings.ensemble) if settings.tolerance is not None else settings.ensemble
        plan = self.plan(task, members, count or 10**9, batch_size, tables)
        if settings.adaptive:
            run = partial(
                adaptive_stream, self, task=task, settings=settings, tables=tables, key=key, mode=mode, plan=plan
            )
        else:
            run = partial(self.sampled, task=task, settings=settings, tables=tables, key=key, mode=mode, plan=plan)
        yield from with_aspect(run, raws, task, settings.aspect, self.resolution)

    def sampled(
        self,
        raws: Iterable[dict[str, Any]],
        task: str,
        settings: Settings,
        tables: SamplerTables,
        key: int | jax.Array,
        mode: str,
        plan: Plan,
    ) -> Iterator[Estimate]:
        """One result for each raw sample, squashed and with constant compute, in the batches of ``plan``."""
        key = _key(key)
        samples, forwards = iter(raws), settings.evaluations * settings.ensemble
        while group := list(itertools.islice(samples, plan.images)):
            latents = self.encode(group, task, plan)
            pixels = self.sample(latents, group, task, settings.ensemble, tables, key, plan, settings.antithetic)
            for raw, one in zip(group, pixels, strict=True):
                members, visible = self.decode_members(one, task), raw.get("visible_mask")
                yield self.merge(members, task, raw["image"].shape[:2], mode, visible, forwards)

    def macs(self, task: str, steps: int, ensemble: int) -> float:
        """Multiply-accumulates of the DiT for one image: a forward pass × passes × steps × members."""
        return self.macs_per_forward * len(pass_indices(task)) * steps * ensemble

    def raw_inputs(self, images: Sequence[Any], task: str, prompt: Any = None) -> list[dict[str, Any]]:
        """Pictures and prompts as raw samples (the fields that ``tasks.conditions`` reads).

        Raises:
            UserError: as ``__call__``.
        """
        self.check_task(task)
        return raw_samples(images, task, prompt)

    def check_task(self, task: str) -> None:
        """UserError when there is no such task, or when this model does not serve it."""
        get_task(task)
        if not self.tasks:
            raise UserError(_NO_TASK)
        if task not in self.tasks:
            raise UserError(f"this model does not know {task}: it was trained for {', '.join(self.tasks)}")
        if self.config.cond_channels < (4 if task == "depth" else 8):
            raise UserError(f"this model has no input for {task}'s conditions: choose a model trained for {task}")

    def choose_diffusion(self, preset: str | None = None, spacing: str | None = None) -> DiffusionPreset:
        """The model's own diffusion on the grid of ``preset``, then ``spacing``; warns of combinations that mislead.

        Raises:
            UserError: unknown preset or spacing.
        """
        own = self.diffusion
        if preset is not None:
            grid = get_diffusion(preset)
            if grid.schedule != own.schedule:
                warnings.warn(
                    f"preset '{preset}' belongs to the {grid.schedule} schedule; this model was trained on "
                    f"{own.schedule}, which is kept: only the grid of timesteps is taken from the preset",
                    stacklevel=3,
                )
            own = dataclasses.replace(
                own, spacing=grid.spacing, steps_offset=grid.steps_offset, final_alpha_one=grid.final_alpha_one
            )
        if spacing is not None:
            own = dataclasses.replace(own, spacing=spacing)
        if own.prediction == "epsilon" and own.spacing == "trailing":
            gain = 1 / own.levels()[0][-1]
            warnings.warn(
                f"this model predicts noise: on the trailing grid the error of its first step is multiplied by up to "
                f"{gain:.0f}; use preset 'paper' (leading)",
                stacklevel=3,
            )
        return own

    def plan(
        self,
        task: str,
        ensemble: int,
        images: int,
        batch_size: int | None = None,
        tables: SamplerTables | None = None,
    ) -> Plan:
        """How many images and members go into one batch, so that no batch is mostly padding and memory is enough.

        Without ``batch_size`` the largest batch that is any faster is tried, and with ``tables`` made smaller until the
        compiler's account of it fits the memory that is free.

        Raises:
            UserError: ensemble or batch_size below 1.
        """
        for name, value in (("ensemble", ensemble), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: give a whole number above 0")
        if batch_size is not None:
            return split(ensemble, batch_size, batch_size, self.engine.devices)
        at_once = _PIXELS_AT_ONCE.get(jax.default_backend(), _PIXELS_AT_ONCE_ELSEWHERE) * self.engine.devices
        rows = max(1, at_once // (self.resolution**2 * len(pass_indices(task))))
        plan = split(ensemble, rows, images, self.engine.devices)
        while tables is not None and plan.images * plan.members > 1:
            needed, free = self._sampling_bytes(task, plan, tables), free_bytes()
            if needed <= free:
                break
            rows = shrink(plan.images * plan.members, needed, free)
            plan = split(ensemble, rows, images, self.engine.devices)
        return plan

    def _sampling_bytes(self, task: str, plan: Plan, tables: SamplerTables) -> int:
        size = self.config.input_size
        latents = jax.ShapeDtypeStruct((plan.images, size, size, self.config.cond_channels), np.float32)
        draw = draw_members(jax.random.key(0), np.zeros(plan.images, np.uint32), 0, plan.members, False)
        return self.engine.sampling_bytes(*self.weights, latents, draw, self.passes(task), tables)

    def encode(self, group: Sequence[dict[str, Any]], task: str, plan: Plan) -> jax.Array:
        """Latents (plan.images, h, w, cond_channels) of a group of raw samples; missing ones repeat the first."""
        conditions = [get_task(task).conditions(raw, self.resolution, self.options) for raw in group]
        conditions += [conditions[0]] * (plan.images - len(group))
        fields = ("image", "prompt") if self.config.cond_channels >= 8 else ("image",)
        pictures = np.stack([np.stack([c[field] for c in conditions]) for field in fields])
        return self.engine.encode(self._autoencoder_params, pictures)

    def sample(
        self,
        latents: Any,
        group: Sequence[dict[str, Any]],
        task: str,
        ensemble: int,
        tables: SamplerTables,
        key: int | jax.Array,
        plan: Plan,
        antithetic: bool = False,
    ) -> np.ndarray:
        """Decoded pixels (images of the group, passes, members, R, R, 3), about [-1, 1]."""
        key, ids, passes = _key(key), self.image_ids(group, plan.images), self.passes(task)
        chunks = []
        for first in range(0, ensemble, plan.members):
            draw = draw_members(key, ids, first, plan.members, antithetic)
            chunks.append(np.asarray(self.engine.sample(*self.weights, latents, draw, passes, tables)))
        return np.concatenate(chunks, axis=2)[: len(group), :, :ensemble]

    def image_ids(self, group: Sequence[dict[str, Any]], images: int) -> np.ndarray:
        """(images,) uint32, each image's share of the noise key; what only fills the batch gets 0."""
        return np.asarray([image_id(raw) for raw in group] + [0] * (images - len(group)), np.uint32)

    def passes(self, task: str) -> Passes:
        """Labels and latent normalisation of the task's passes."""
        indices = pass_indices(task)
        labels = np.asarray([self.config.task_label(i) for i in indices], np.int32)
        return Passes(labels, self._norm_rows("shift", indices), self._norm_rows("scale", indices))

    def _norm_rows(self, name: str, passes: tuple[int, ...]) -> np.ndarray:
        """(P, channels) float32; a model of one task may store that task's rows alone."""
        values = np.asarray(self.meta["latent_norm"][name], np.float32)
        return values[list(passes)] if len(values) > max(passes) else values[: len(passes)]

    def decode_members(self, pixels: np.ndarray, task: str) -> np.ndarray:
        """Pixels (P, M, R, R, 3) of one image to members (M, R, R[, C]) at the model's resolution.

        Raises:
            UserError: pixels are NaN or infinite: nothing made of them would be a result.
        """
        if not np.isfinite(pixels).all():
            raise UserError("the model's output is NaN or infinite: its weights are broken, or choose another preset")
        return get_task(task).decode_prediction(pixels, (self.resolution, self.resolution), self.options)

    def merge(
        self,
        members: np.ndarray,
        task: str,
        size: tuple[int, int],
        mode: str,
        visible: np.ndarray | None = None,
        forwards: int = 0,
        reduced: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Estimate:
        """Merge members (M, R, R[, C]) at the model's resolution, then resize to ``size`` (H, W), as Marigold does.

        ``visible`` (H, W), the given mask, joins an amodal mask where the model's options say ``keep_visible``.
        ``forwards``: network evaluations that were spent on each pass. ``reduced``: what `reduce` made of the members,
        if that is known.
        """
        size = (int(size[0]), int(size[1]))
        merged, spread = self.reduce(task, members, mode) if reduced is None else reduced
        prediction, uncertainty = to_native(task, merged, size), to_native(task, spread, size)
        if task != "amodal":
            return Estimate(prediction, uncertainty, members, None, size, forwards)
        # the published rule: a mask at the model's size, brought back by nearest (facts 6.3)
        mask = painted = resize_nearest(mask_from_whole(merged, self.options.mask_threshold), size)
        if self.options.keep_visible and visible is not None:
            mask = painted | np.asarray(visible, bool)
        return Estimate(mask, uncertainty, members, prediction, size, forwards, painted)

    def reduce(self, task: str, members: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
        """Members (M, R, R[, C]) to (prediction, uncertainty) at the model's resolution."""
        if task == "depth" and mode == "median" and not self.options.clip_depth:
            members = to_range(members)  # the one way of merging that stretches nothing
        return reduce_members(task, members, mode)

    def round_trip(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures (B, R, R, 3) through the autoencoder and back: what no prediction can be better than."""
        return np.asarray(self.engine.round_trip(self._autoencoder_params, pictures))


def image_id(raw: dict[str, Any]) -> int:
    """A number that the image's own pixels decide (CRC-32): its share of the noise key."""
    return zlib.crc32(raw["image"].tobytes(), zlib.crc32(repr(raw["image"].shape).encode()))


def _key(key: int | jax.Array) -> jax.Array:
    if not isinstance(key, (int, np.integer)):
        return key
    if not 0 <= key < 2**32:
        raise UserError(f"key {key}: give a whole number from 0 to {2**32 - 1}")
    return jax.random.key(int(key))


def _own_autoencoder(meta: dict[str, Any]) -> Autoencoder:
    """The autoencoder that a model names. One without tasks needs none, and may name one that is not here."""
    if meta["tasks"]:
        return load_autoencoder(meta["autoencoder"])

    def refuse(*_: Any) -> Any:
        raise UserError(_NO_TASK)

    return Autoencoder(meta["autoencoder"], "", {}, refuse, refuse)


def _own_diffusion(fields: dict[str, Any]) -> DiffusionPreset:
    known = [field.name for field in dataclasses.fields(DiffusionPreset)]
    for name in fields:
        if name not in known:
            raise UserError(f"unknown diffusion setting '{name}' of the model{did_you_mean(name, known)}")
    return DiffusionPreset(**fields)
