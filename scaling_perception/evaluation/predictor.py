"""From pictures to predictions: encode once, sample every member and pass in one batch, decode, ensemble.

Two compiled graphs do the work: ``encode`` (pictures to latents, once an image) and ``sample`` (noise to pixels for all
members and passes, one scan over the denoising steps, decoder included). Weights, pictures, keys and the sampler's
coefficients are their arguments: only the batch shape and the number of steps make a new graph.

The noise of a member depends on the key, the image's own pixels and the member's number, and on nothing else: member 3
of an image is the same in an ensemble of 5 or of 50, alone or in a batch, in any order.
"""

import dataclasses
import itertools
import math
import os
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.diffusion.sampler import SamplerTables, ddim_sample, sampler_tables
from scaling_perception.diffusion.schedules import DiffusionPreset, get_diffusion
from scaling_perception.evaluation.inputs import find_model, to_mask, to_rgb
from scaling_perception.evaluation.prediction import Estimate, Prediction, reduce_members, to_native
from scaling_perception.evaluation.protocols import reduce_mode
from scaling_perception.interop.model_folder import load_model
from scaling_perception.models.autoencoders import Autoencoder, load_autoencoder, tree_hash
from scaling_perception.models.dit import DiT, config_from_dict
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks import TaskOptions, get_task, pass_indices
from scaling_perception.tasks.amodal import mask_from_whole
from scaling_perception.tasks.common import require
from scaling_perception.tasks.depth import to_range

_PIXELS_AT_ONCE = {"cpu": 2**20}  # decoded pixels in one batch: bounds memory (about 2 KiB a pixel while decoding)
_PIXELS_AT_ONCE_ELSEWHERE = 2**22
_NO_TASK = (
    "this model knows no task: it was made for classes of pictures (an imported DiT); fine-tune it first "
    "(scaling-perception train --config configs/from_dit.py:init=FOLDER …)"
)


class Plan(NamedTuple):
    """Shape of the sampling batch: ``images`` × ``members`` at a time (times the task's passes)."""

    images: int
    members: int


class Predictor:
    """A trained model with its autoencoder, ready to be called on pictures.

    Attributes:
        params: the DiT's parameters on the device; may be replaced by others of the same shapes (no recompilation).
        meta: the model folder's description.
        config, resolution, options, tasks: taken from it.
        id, autoencoder_id: 12 hexadecimal digits of the weights that it was made with (encoder and decoder together).
        autoencoder: the frozen autoencoder.
        traces: how often each graph was traced, by name.
        compile_seconds: spent compiling so far.
        macs_per_forward: multiply-accumulates of one forward pass of the DiT on one image, NaN if unknown.
    """

    count_macs: ClassVar[Callable[[Any], float] | None] = None
    """Counts one forward pass of a DiTConfig. Set by the package's root: this layer may not import ``scaling``."""

    def __init__(
        self, params: Any, meta: dict[str, Any], autoencoder: Autoencoder | None = None, dtype: str = "float32"
    ) -> None:
        """Args: the tree and description that ``load_model`` returns; an autoencoder other than the description's.

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
        self.params = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params))
        self._autoencoder_params = jax.device_put(self.autoencoder.params)
        self._model = DiT(self.config, dtype=jnp.dtype(dtype))
        self.traces: Counter[str] = Counter()
        self.compile_seconds = 0.0
        self._compiled: dict[tuple[Any, ...], Any] = {}
        count = type(self).count_macs
        self.macs_per_forward = math.nan if count is None else float(count(self.config))

    @classmethod
    def from_pretrained(cls, name: str, autoencoder: str | None = None, dtype: str = "float32") -> "Predictor":
        """Load a model.

        Args:
            name: a model folder, a training run (its ``model/``), a shipped name such as ``mini``, or a hub id.
            autoencoder: another than the one the model names, by name, folder or hub id.
            dtype: of the DiT's matmuls: float32 or bfloat16.

        Raises:
            UserError: nothing there, damaged files, or parts that do not fit together.
        """
        params, meta = load_model(find_model(name))
        return cls(params, meta, load_autoencoder(autoencoder) if autoencoder else None, dtype)

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
    ) -> Prediction:
        """Predict.

        Args:
            images: one picture or several (list, tuple, or an array (B, H, W, C)): paths, PIL pictures, or arrays
                (H, W[, C]) of uint8, uint16 or float in [0, 1]. Sizes may differ; each is squashed to the model's
                square and the result is brought back.
            task: depth, flow or amodal, as far as the model knows them.
            steps: denoising steps T, 1..1000.
            ensemble: members N.
            key: integer or JAX key; the same key gives the same prediction.
            prompt: flow: the second frame of each image; amodal: the mask of the object's visible part.
            preset: grid of timesteps: ``fixed`` (trailing), ``paper`` (leading), ``released`` (leading, offset 1); None
                is the model's own. The schedule and the prediction type are always the model's own: at the same
                timestep another schedule would mean another noise level than the model was trained on.
            spacing: the grid's spacing alone: leading, trailing or linspace.
            reduce: how members are merged: depth lsq (default), median, minmax, marigold; flow mean (default), median;
                amodal median.
            batch_size: images × members sampled at once; None chooses by memory. When given, short batches are padded
                to it, so that calls of any length share one graph.

        Raises:
            UserError: an unreadable picture, a missing prompt, or an unknown task, preset or mode.
        """
        several = isinstance(images, (list, tuple)) or (isinstance(images, np.ndarray) and images.ndim == 4)
        raws = self.raw_inputs(list(images) if several else [images], task, prompt if several else [prompt])
        diffusion = self.choose_diffusion(preset, spacing)
        plan = self.plan(task, ensemble, len(raws), batch_size)
        parts = list(self.stream(raws, task, diffusion, steps, ensemble, key, reduce, plan))
        return Prediction(task, parts, self.macs(task, steps, ensemble), single=not several)

    def stream(
        self,
        raws: Iterable[dict[str, Any]],
        task: str,
        diffusion: DiffusionPreset,
        steps: int,
        ensemble: int,
        key: int | jax.Array,
        reduce: str | None,
        plan: Plan,
    ) -> Iterator[Estimate]:
        """One result for each raw sample, in order; holds ``plan.images`` samples at a time."""
        mode = reduce_mode(task, reduce)
        tables = sampler_tables(diffusion, steps)
        samples = iter(raws)
        while group := list(itertools.islice(samples, plan.images)):
            pixels = self.sample(self.encode(group, task, plan), group, task, ensemble, tables, key, plan)
            for raw, one in zip(group, pixels, strict=True):
                members, visible = self.decode_members(one, task), raw.get("visible_mask")
                yield self.merge(members, task, raw["image"].shape[:2], mode, visible)

    def macs(self, task: str, steps: int, ensemble: int) -> float:
        """Multiply-accumulates of the DiT for one image: a forward pass × passes × steps × members."""
        return self.macs_per_forward * len(pass_indices(task)) * steps * ensemble

    def raw_inputs(self, images: Sequence[Any], task: str, prompt: Any = None) -> list[dict[str, Any]]:
        """Pictures and prompts as raw samples (the fields that ``tasks.conditions`` reads).

        Raises:
            UserError: as ``__call__``.
        """
        self.check_task(task)
        if not images:
            raise UserError("no image was given: give one picture or more")
        if task == "depth":
            if prompt is not None and any(p is not None for p in prompt):
                raise UserError("depth takes no prompt: leave it out, or choose the task flow or amodal")
            return [{"key": _name(image, i), "image": to_rgb(image)} for i, image in enumerate(images)]
        what = "the second frame" if task == "flow" else "the mask of the object's visible part"
        prompts = [] if prompt is None else list(prompt)
        if len(prompts) != len(images) or any(p is None for p in prompts):
            given = sum(p is not None for p in prompts)
            raise UserError(f"{task} needs a prompt for each image ({what}): got {given} for {len(images)} image(s)")
        field, read = ("image2", to_rgb) if task == "flow" else ("visible_mask", to_mask)
        raws = [
            {"key": _name(image, i), "image": to_rgb(image), field: read(one)}
            for i, (image, one) in enumerate(zip(images, prompts, strict=True))
        ]
        for raw in raws:
            require(raw, field, like="image")  # told now, and not in the middle of a batch
        return raws

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
            gain = 1 / math.sqrt(own.alphas_cumprod()[-1])
            warnings.warn(
                f"this model predicts noise: on the trailing grid the error of its first step is multiplied by up to "
                f"{gain:.0f}; use preset 'paper' (leading)",
                stacklevel=3,
            )
        return own

    def plan(self, task: str, ensemble: int, images: int, batch_size: int | None = None) -> Plan:
        """How many images and members go into one batch, so that memory stays bounded and no batch is mostly padding.

        Raises:
            UserError: ensemble or batch_size below 1.
        """
        for name, value in (("ensemble", ensemble), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: give a whole number above 0")
        rows = batch_size
        if rows is None:
            at_once = _PIXELS_AT_ONCE.get(jax.default_backend(), _PIXELS_AT_ONCE_ELSEWHERE)
            rows = max(1, at_once // (self.resolution**2 * len(pass_indices(task))))
        if ensemble > rows:
            return Plan(1, math.ceil(ensemble / math.ceil(ensemble / rows)))
        return Plan(rows // ensemble if batch_size is not None else min(images, rows // ensemble), ensemble)

    def encode(self, group: Sequence[dict[str, Any]], task: str, plan: Plan) -> jax.Array:
        """Latents (plan.images, h, w, cond_channels) of a group of raw samples; missing ones repeat the first."""
        conditions = [get_task(task).conditions(raw, self.resolution, self.options) for raw in group]
        conditions += [conditions[0]] * (plan.images - len(group))
        fields = ("image", "prompt") if self.config.cond_channels >= 8 else ("image",)
        pictures = np.stack([np.stack([c[field] for c in conditions]) for field in fields])
        return self._run("encode", self._encode, self._autoencoder_params, pictures)

    def sample(
        self,
        latents: jax.Array,
        group: Sequence[dict[str, Any]],
        task: str,
        ensemble: int,
        tables: SamplerTables,
        key: int | jax.Array,
        plan: Plan,
    ) -> np.ndarray:
        """Decoded pixels (images of the group, passes, members, R, R, 3), about [-1, 1]."""
        if isinstance(key, (int, np.integer)):
            if not 0 <= key < 2**32:
                raise UserError(f"key {key}: give a whole number from 0 to {2**32 - 1}")
            key = jax.random.key(int(key))
        passes = pass_indices(task)
        labels = np.asarray([self.config.task_label(i) for i in passes], np.int32)
        shift, scale = (self._norm_rows(name, passes) for name in ("shift", "scale"))
        ids = np.asarray([image_id(raw) for raw in group] + [0] * (plan.images - len(group)), np.uint32)
        chunks = []
        for first in range(0, ensemble, plan.members):
            members = np.arange(first, first + plan.members, dtype=np.uint32)
            noise, norm = (key, ids, members), (labels, shift, scale)
            weights = (self.params, self._autoencoder_params)
            chunks.append(self._run("sample", self._sample, *weights, latents, *noise, *norm, tables))
        pixels = np.concatenate([np.asarray(chunk) for chunk in chunks], axis=2)
        return pixels[: len(group), :, :ensemble]

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
    ) -> Estimate:
        """Merge members (M, R, R[, C]) at the model's resolution, then resize to ``size`` (H, W), as Marigold does.

        ``visible`` (H, W), the given mask, joins an amodal mask where the model's options say ``keep_visible``.
        """
        size = (int(size[0]), int(size[1]))
        if task == "depth" and mode == "median" and not self.options.clip_depth:
            members = to_range(members)  # the one way of merging that stretches nothing
        merged, spread = reduce_members(task, members, mode)
        prediction, uncertainty = to_native(task, merged, size), to_native(task, spread, size)
        if task != "amodal":
            return Estimate(prediction, uncertainty, members, None, size)
        mask = mask_from_whole(prediction, self.options.mask_threshold)
        if self.options.keep_visible and visible is not None:
            mask = mask | np.asarray(visible, bool)
        return Estimate(mask, uncertainty, members, prediction, size)

    def round_trip(self, pictures: np.ndarray) -> np.ndarray:
        """Pictures (B, R, R, 3) through the autoencoder and back: what no prediction can be better than."""
        return np.asarray(self._run("round_trip", self._round_trip, self._autoencoder_params, pictures))

    # The graphs

    def _encode(self, autoencoder: Any, pictures: jax.Array) -> jax.Array:
        fields, images, *shape = pictures.shape
        mean, _ = self.autoencoder.encode(autoencoder, pictures.reshape(fields * images, *shape))
        mean = mean.astype(jnp.float32).reshape(fields, images, *mean.shape[1:])
        return jnp.concatenate(list(mean), axis=-1)

    def _sample(
        self,
        params: Any,
        autoencoder: Any,
        latents: jax.Array,
        key: jax.Array,
        ids: jax.Array,
        members: jax.Array,
        labels: jax.Array,
        shift: jax.Array,
        scale: jax.Array,
        tables: SamplerTables,
    ) -> jax.Array:
        """Latents (I, h, w, C), ids (I,), members (M,), labels (P,), shift and scale (P, 4) to (I, P, M, R, R, 3)."""
        images, count, passes = latents.shape[0], members.shape[0], labels.shape[0]
        latent = (*latents.shape[1:3], self.config.in_channels)

        def draw(image: jax.Array, member: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, image), member), latent)

        noise = jax.vmap(lambda image: jax.vmap(lambda member: draw(image, member))(members))(ids)
        rows = (images, count, passes)
        noise = jnp.broadcast_to(noise[:, :, None], (*rows, *latent)).reshape(-1, *latent)  # passes share their noise
        inputs = jnp.broadcast_to(latents[:, None, None], (*rows, *latents.shape[1:])).reshape(-1, *latents.shape[1:])
        label = jnp.broadcast_to(labels[None, None], rows).reshape(-1)

        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            out: Any = self._model.apply({"params": params}, jnp.concatenate([inputs, x], axis=-1), t[None], label)
            return out[..., : self.config.in_channels]  # what follows is the learned variance

        z = ddim_sample(denoise, tables, noise).reshape(images * count, passes, *latent)
        z = z * scale[None, :, None, None, :] + shift[None, :, None, None, :]
        pixels = self.autoencoder.decode(autoencoder, z.reshape(-1, *latent)).astype(jnp.float32)
        return pixels.reshape(*rows, *pixels.shape[1:]).swapaxes(1, 2)

    def _round_trip(self, autoencoder: Any, pictures: jax.Array) -> jax.Array:
        mean, _ = self.autoencoder.encode(autoencoder, pictures)
        return self.autoencoder.decode(autoencoder, mean)

    def _run(self, name: str, function: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
        """Run a graph, compiled once for each set of shapes; compiling apart lets `sweep` time running alone."""
        return self.compiled(name, function, *arguments)(*arguments)

    def compiled(self, name: str, function: Callable[..., jax.Array], *arguments: Any) -> Any:
        """The executable of a graph for these shapes."""
        shapes = (name, *[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments)])
        if shapes not in self._compiled:

            def counted(*values: Any) -> jax.Array:
                self.traces[name] += 1  # runs while tracing only
                return function(*values)

            begin = time.perf_counter()
            self._compiled[shapes] = jax.jit(counted).lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - begin
        return self._compiled[shapes]


def image_id(raw: dict[str, Any]) -> int:
    """A number that the image's own pixels decide (CRC-32): its share of the noise key."""
    return zlib.crc32(raw["image"].tobytes(), zlib.crc32(repr(raw["image"].shape).encode()))


def _name(image: Any, index: int) -> str:
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {index}"


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
