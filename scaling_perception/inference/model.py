"""A trained model as its parts: encode once, sample every member and pass in one batch, decode, merge.

The graphs are in ``engine``; ``predictor`` puts the parts together, ``adaptive`` by image.

The noise of a member depends on the key, the image's own pixels and the member's number, and on nothing else: member 3
of an image is the same in an ensemble of 5 or of 50, alone or in a batch, in any order.
"""

import dataclasses
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from scaling_perception.diffusion.caching import CACHES, CacheRows, cache_rows, computed_steps, fit_weights
from scaling_perception.diffusion.sampler import SamplerTables
from scaling_perception.diffusion.schedules import LEARNED, DiffusionPreset, get_diffusion
from scaling_perception.inference.batches import BatchPlan, free_bytes, joined_members, member_draws, shrink, split
from scaling_perception.inference.description import (
    NO_TASK,
    check_description,
    one_step_noise,
    own_autoencoder,
    own_diffusion,
    own_tasks,
)
from scaling_perception.inference.draws import NoiseKeys, draw_members, image_id, key_of, mirrored_back
from scaling_perception.inference.engine import Engine, Passes
from scaling_perception.inference.grids import learned_grid
from scaling_perception.inference.inputs import raw_samples
from scaling_perception.inference.settings import Settings
from scaling_perception.interop.find import CONFIG, find_model
from scaling_perception.interop.model_folder import load_model
from scaling_perception.models.autoencoders import Autoencoder, is_matching, load_autoencoder, tree_hash
from scaling_perception.models.compute import cached_macs, forward_macs, graph_macs
from scaling_perception.models.config import config_from_dict
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support.errors import UserError, did_you_mean, short
from scaling_perception.support.shapes import AnyArray, EitherArray, Float, RandomKey, UInt
from scaling_perception.tasks import RELEASED, TaskOptions, get_task
from scaling_perception.tasks.base import Estimate

# Decoded pixels in one batch where no larger batch is faster; then memory decides (see ``Predictor.plan``).
_PIXELS_AT_ONCE = {"cpu": 2**20}
_PIXELS_AT_ONCE_ELSEWHERE = 2**24
_FIT_SCENES, _FIT_MEMBERS = 4, 2  # what the weights of a cache are fitted to, unless pictures are given


class Model:
    """A trained network with its autoencoder: encode pictures, sample members, decode and merge them.

    Attributes:
        params: the DiT's parameters on the device; may be replaced by others of the same shapes (no recompilation).
        meta: the model folder's description.
        config, resolution, options, tasks: taken from it.
        id, autoencoder_id: 12 hexadecimal digits of the weights that it was made with (encoder and decoder together).
        autoencoder, engine: the frozen autoencoder, and the compiled graphs.
        folder: where the model was loaded from, or None; its learned grids lie there.
        macs_per_forward: multiply-accumulates of one forward pass of the DiT on one image, NaN if unknown.
    """

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
        self.tasks = own_tasks(meta)
        self.options = TaskOptions.from_dict(meta.get("task_options", {}))
        self.autoencoder = autoencoder if autoencoder is not None else own_autoencoder(meta)
        if self.resolution != self.config.input_size * self.autoencoder.factor:
            raise UserError(
                f"resolution {self.resolution} does not fit the model's latents of {self.config.input_size} and the "
                f"autoencoder's factor {self.autoencoder.factor}: choose the autoencoder it was trained with"
            )
        if self.autoencoder.features != self.config.features and self.config.conditions:
            raise UserError(
                f"the model takes {self.config.features} features of each picture and autoencoder "
                f"'{self.autoencoder.name}' gives {self.autoencoder.features}: choose the one it was trained with"
            )
        if self.autoencoder.matches != is_matching(meta.get("autoencoder", "")) and self.config.conditions:
            raise UserError(
                f"autoencoder '{self.autoencoder.name}' encodes a second frame in another way than "
                f"'{meta.get('autoencoder')}', which the model was trained with: choose that one"
            )
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"unknown dtype '{dtype}'{did_you_mean(dtype, ('float32', 'bfloat16'))}")
        self.diffusion = own_diffusion(meta["diffusion"])
        self.id, self.autoencoder_id = tree_hash(params), tree_hash(self.autoencoder.params)
        if mesh is None and jax.default_backend() != "cpu":
            mesh = make_mesh(devices=jax.local_devices())
        self.one_step = one_step_noise(meta)
        self.engine = Engine(self.config, self.autoencoder, dtype, mesh, self.one_step == "zeros")
        self.params = self.engine.place(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params))
        self._autoencoder_params = self.engine.place(self.autoencoder.params)
        self.macs_per_forward = float(forward_macs(self.config))
        self._rows = tuple(meta.get("passes", RELEASED))
        self._fitted: dict[Any, CacheRows] = {}
        self._constant_prompts: dict[float, np.ndarray] = {}
        self.folder: Path | None = None

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], autoencoder: str | None = None, dtype: str = "float32", mesh: Any = None
    ) -> Self:
        """Load a model.

        Args:
            name: a model folder, a training run (its ``model/``), a shipped name such as ``mini``, or a hub id.
            autoencoder: another than the one the model names, by name, folder or hub id.
            dtype: of the DiT's matmuls: float32 or bfloat16.
            mesh: devices to use, see ``Model``.

        Raises:
            UserError: nothing there, damaged files, or parts that do not fit together.
        """
        folder, other = find_model(name), load_autoencoder(autoencoder) if autoencoder else None
        params, meta = load_model(folder)
        check_description(meta, str(folder / CONFIG))
        model = cls(params, meta, other, dtype, mesh)
        model.folder = folder
        return model

    @property
    def weights(self) -> tuple[Any, Any]:
        """Parameters of the DiT and of the autoencoder, as the graphs take them."""
        return self.params, self._autoencoder_params

    @property
    def identity(self) -> dict[str, str]:
        """The ids of the weights, as tables in model folders name them (``task_tables.IDENTITY``)."""
        return {"weights": self.id, "autoencoder": self.autoencoder_id}

    @property
    def traces(self) -> Counter[str]:
        """How often each graph was traced, by name."""
        return self.engine.traces

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling so far."""
        return self.engine.compile_seconds

    def macs(self, task: str, steps: float, ensemble: int) -> float:
        """Multiply-accumulates of the DiT for one image: a forward pass × passes × steps × members. With a cache,
        ``steps`` are `evaluations`."""
        return self.macs_per_forward * len(get_task(task).passes) * steps * ensemble

    def decoder_macs(self, task: str) -> float:
        """Multiply-accumulates of decoding one member of the task, which `macs` leaves out; merged latents are one."""
        size, channels = self.config.input_size, self.config.in_channels
        latents = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
        return float(graph_macs(self.autoencoder.decode, self._autoencoder_params, latents)) * len(
            get_task(task).passes
        )

    def evaluations(self, settings: Settings) -> float:
        """Network evaluations of one member, by MACs: a step whose blocks come from a cache counts as the part of an
        evaluation that it computes."""
        entry = CACHES[settings.cache]
        if entry is None:
            return settings.evaluations
        whole = computed_steps(settings.steps, settings.cache_interval)
        if whole == settings.steps:
            return whole
        return whole + (settings.steps - whole) * cached_macs(self.config, entry.features) / self.macs_per_forward

    def tables(self, settings: Settings, task: str, diffusion: DiffusionPreset) -> SamplerTables:
        """The sampler's table with its cache. The weights of ``l2p`` are fitted when they are first needed (see
        `fit_cache`) and then kept.

        Raises:
            UserError: as `Settings.tables`.
        """
        self._warn_of_steps(settings, diffusion)
        tables, entry = settings.tables(diffusion, self.grid(task, settings.steps, diffusion)), CACHES[settings.cache]
        rows = cache_rows(settings.cache, settings.steps, settings.cache_interval)
        if entry is None or rows is None:
            return tables
        tables = tables._replace(cache=rows)
        if entry.weights is not None:
            return tables
        name = _fit_name(settings, task, diffusion)
        if name not in self._fitted:
            self._fitted[name] = self._fit(tables, task, None)
        return tables._replace(cache=self._fitted[name])

    def grid(self, task: str, steps: int, diffusion: DiffusionPreset) -> tuple[np.ndarray, np.ndarray] | None:
        """`learned_grid` where the diffusion's spacing is ``learned``, else None."""
        return learned_grid(self.folder, task, steps, self.identity) if diffusion.spacing == LEARNED else None

    def fit_cache(self, images: Sequence[Any], task: str, settings: Settings, prompt: Any = None) -> CacheRows:
        """Fit the weights of a cache such as ``l2p`` to the features of these pictures, for all later calls with the
        same settings; without this call they are fitted to 4 drawn scenes. No truth is needed.

        Args:
            images, prompt: as for calling the predictor; a few are enough.

        Raises:
            UserError: as calling; a cache without weights to fit, or one that computes every step.
        """
        entry, diffusion = CACHES[settings.cache], self.choose_diffusion(settings.preset, settings.spacing)
        rows = cache_rows(settings.cache, settings.steps, settings.cache_interval)
        if entry is None or entry.weights is not None or rows is None:
            fitted = ", ".join(name for name, one in CACHES.items() if one is not None and one.weights is None)
            raise UserError(
                f"cache '{settings.cache}' every {settings.cache_interval} of {settings.steps} steps has no weights to "
                f"fit: choose {fitted}, and an interval of 2 to {settings.steps} steps"
            )
        raws = self.raw_inputs(list(images), task, prompt)
        tables = settings.tables(diffusion, self.grid(task, settings.steps, diffusion))
        found = self._fitted[_fit_name(settings, task, diffusion)] = self._fit(tables._replace(cache=rows), task, raws)
        return found

    def _fit(self, tables: SamplerTables, task: str, raws: list[dict[str, Any]] | None) -> CacheRows:
        assert tables.cache is not None
        if raws is None:
            from scaling_perception.data.sources import SOURCES, open_source  # rarely needed

            if task not in SOURCES["scenes"].tasks:
                raise UserError(
                    f"cache: drawn scenes do not serve {task}: call Predictor.fit_cache, or choose taylorseer"
                )
            scenes = open_source("scenes", "", "train", task, count=_FIT_SCENES)
            raws = [scenes[index] for index in range(_FIT_SCENES)]
        moments = np.zeros((len(tables.t), 5))
        plan = BatchPlan(1, _FIT_MEMBERS)
        for raw in raws:  # one at a time: little memory, and one graph whatever their number
            draw = draw_members(jax.random.key(0), self.image_ids([raw], 1), 0, _FIT_MEMBERS, False)
            latents = self.encode([raw], task, plan)
            moments += self.engine.cache_moments(self.params, latents, draw, self.passes(task), tables)
        return fit_weights(tables.cache, moments)

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
            raise UserError(NO_TASK)
        if task not in self.tasks:
            raise UserError(f"this model does not know {task}: it was trained for {', '.join(self.tasks)}")
        if self.config.conditions < (1 if get_task(task).prompt is None else 2):
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

    def _warn_of_steps(self, settings: Settings, diffusion: DiffusionPreset) -> None:
        """Warn where a model of one step is sampled in another way than it was trained for."""
        if not self.one_step:
            return
        if settings.evaluations > 1 or diffusion.spacing != "trailing":
            warnings.warn(
                "this model was fine-tuned for one step on the trailing grid, and is no denoiser any more: use steps 1",
                stacklevel=4,
            )
        different, of = (1, "") if settings.views == "plain" else (2, " of a view")
        if self.one_step == "zeros" and settings.ensemble > different:
            warnings.warn(
                f"this model starts from zeros in place of noise, so all members{of} are equal: use ensemble "
                f"{different}",
                stacklevel=4,
            )

    def plan(
        self,
        task: str,
        ensemble: int,
        images: int,
        batch_size: int | None = None,
        tables: SamplerTables | None = None,
        decoded: bool = True,
        views: str = "plain",
    ) -> BatchPlan:
        """How many images and members go into one batch, so that no batch is mostly padding and memory is enough.

        Without ``batch_size`` the largest batch that is any faster is tried, and with ``tables`` made smaller until the
        compiler's account of it fits the memory that is free; not ``decoded``: of members that are merged as latents.

        Raises:
            UserError: ensemble or batch_size below 1.
        """
        for name, value in (("ensemble", ensemble), ("batch_size", batch_size)):
            if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
                raise UserError(f"{name} {short(value)}: give a whole number above 0")
        if batch_size is not None:
            return split(ensemble, batch_size, batch_size, self.engine.devices)
        at_once = _PIXELS_AT_ONCE.get(jax.default_backend(), _PIXELS_AT_ONCE_ELSEWHERE) * self.engine.devices
        rows = max(1, at_once // (self.resolution**2 * len(get_task(task).passes)))
        plan = split(ensemble, rows, images, self.engine.devices)
        while tables is not None and plan.images * plan.members > 1:
            needed, free = self._sampling_bytes(task, plan, tables, decoded, views), free_bytes()
            if needed <= free:
                break
            rows = shrink(plan.images * plan.members, needed, free)
            plan = split(ensemble, rows, images, self.engine.devices)
        return plan

    def _sampling_bytes(
        self, task: str, plan: BatchPlan, tables: SamplerTables, decoded: bool = True, views: str = "plain"
    ) -> int:
        size, channels = self.config.input_size, self.config.cond_channels * (1 if views == "plain" else 2)
        latents = jax.ShapeDtypeStruct((plan.images, size, size, channels), np.float32)
        draw = draw_members(jax.random.key(0), np.zeros(plan.images, np.uint32), 0, plan.members, False)
        return self.engine.sampling_bytes(*self.weights, latents, draw, self.passes(task), tables, decoded=decoded)

    def encode(
        self, group: Sequence[dict[str, Any]], task: str, plan: BatchPlan, views: str = "plain"
    ) -> Float[EitherArray, "I h w C"]:
        """Latents (plan.images, h, w, cond_channels) of a group of raw samples; missing ones repeat the first.
        ``views`` flip: twice as many channels, the second half of the mirror images."""
        conditions = [get_task(task).conditions(raw, self.resolution, self.options) for raw in group]
        conditions += [conditions[0]] * (plan.images - len(group))
        fields = ("image", "prompt")[: self.config.conditions]
        pictures = np.stack([np.stack([c[field] for c in conditions]) for field in fields])
        if views == "plain":
            return self._encoded(pictures, task)
        latents = self._encoded(np.concatenate([pictures, pictures[:, :, :, ::-1]], axis=1), task)
        return np.concatenate(np.split(np.asarray(latents), 2), axis=-1)

    def _encoded(self, pictures: Float[np.ndarray, "F I R R 3"], task: str) -> Float[EitherArray, "I h w C"]:
        """Latents of pictures; those of a prompt that is the same everywhere, as depth's is, are computed once."""
        asks, encode = get_task(task).prompt, partial(self.engine.encode, self._autoencoder_params)
        if asks is not None and asks.frame and self.autoencoder.matches:
            return encode(pictures, True)
        found = [np.asarray(encode(pictures[:1]))]
        for prompts in pictures[1:]:
            value = float(prompts.flat[0])
            if asks is not None or (prompts != value).any():
                found.append(np.asarray(encode(prompts[None])))
                continue
            if value not in self._constant_prompts:
                self._constant_prompts[value] = np.asarray(encode(prompts[None]))[:1]
            known = self._constant_prompts[value]
            found.append(np.broadcast_to(known, (len(prompts), *known.shape[1:])))
        return np.concatenate(found, axis=-1)

    def as_seen(
        self, pixels: EitherArray, task: str, latents: EitherArray, first: int = 0
    ) -> Float[np.ndarray, "*images P M R R 3"]:
        """Pixels (..., P, M, R, R, 3) of members ``first`` and after, sampled from ``latents``, as in the picture
        itself: where these hold views, those of mirror images are mirrored back."""
        plain = latents.shape[-1] == self.config.cond_channels
        return np.asarray(pixels) if plain else mirrored_back(np.asarray(pixels), task, first)

    def sample(
        self,
        latents: Float[AnyArray, "I h w C"],
        group: Sequence[dict[str, Any]],
        task: str,
        ensemble: int,
        tables: SamplerTables,
        key: int | RandomKey,
        plan: BatchPlan,
        antithetic: bool = False,
        watch: Callable[[Float[np.ndarray, "J P M R R 3"]], None] | None = None,
    ) -> Float[np.ndarray, "J P M R R 3"]:
        """Decoded pixels (images of the group, passes, members, R, R, 3), about [-1, 1].

        Args:
            watch: called with the pixels of the members so far, after each batch of members but the last.
        """
        passes, count = self.passes(task), len(group)

        def run(draw: NoiseKeys) -> Any:
            return self.engine.sample(*self.weights, latents, draw, passes, tables)

        seen = None if watch is None else lambda pixels: watch(self.as_seen(pixels[:count], task, latents))
        draws = member_draws(key_of(key), self.image_ids(group, plan.images), ensemble, plan.members, antithetic)
        return self.as_seen(joined_members(map(run, draws), ensemble, seen, axis=2)[:count], task, latents)

    def image_ids(self, group: Sequence[dict[str, Any]], images: int) -> UInt[np.ndarray, " {images}"]:
        """(images,) uint32, each image's share of the noise key; what only fills the batch gets 0."""
        return np.asarray([image_id(raw) for raw in group] + [0] * (images - len(group)), np.uint32)

    def passes(self, task: str) -> Passes:
        """Labels and latent normalisation of the task's passes."""
        names = [one.name for one in get_task(task).passes]
        rows = [self._row(name) for name in names]
        labels = np.asarray([self.config.task_label(row) for row in rows], np.int32)
        return Passes(labels, self._norm_rows("shift", rows), self._norm_rows("scale", rows))

    def _row(self, name: str) -> int:
        """The row of a pass in the model's tables."""
        if name not in self._rows:
            known = ", ".join(self._rows)
            raise UserError(
                f"the model's config.json lists the passes {known}, but not {name}: convert or train it again"
            )
        return self._rows.index(name)

    def _norm_rows(self, name: str, rows: list[int]) -> Float[np.ndarray, "P C"]:
        """(P, channels) float32; a model of one task may store that task's rows alone."""
        values = np.asarray(self.meta["latent_norm"][name], np.float32)
        return values[rows] if len(values) > max(rows) else values[: len(rows)]

    def decode_members(self, pixels: Float[np.ndarray, "P M R R 3"], task: str) -> Float[np.ndarray, "M R R *C"]:
        """Pixels (P, M, R, R, 3) of one image to members (M, R, R[, C]) at the model's resolution.

        Raises:
            UserError: pixels are NaN or infinite: nothing made of them would be a result.
        """
        if not np.isfinite(pixels).all():
            raise UserError("the model's output is NaN or infinite: its weights are broken, or choose another preset")
        return get_task(task).decode_prediction(pixels, (self.resolution, self.resolution), self.options)

    def merge(
        self,
        members: Float[np.ndarray, "M R R *C"],
        task: str,
        size: tuple[int, int],
        mode: str,
        raw: dict[str, Any] | None = None,
        forwards: float = 0,
        reduced: tuple[Float[np.ndarray, "R R *C"], Float[np.ndarray, "R R"]] | None = None,
    ) -> Estimate:
        """Merge members (M, R, R[, C]) at the model's resolution, then resize to ``size`` (H, W), as Marigold does.

        Args:
            raw: the raw input; None: the answer is made of the members alone.
            forwards: network evaluations that were spent on each pass.
            reduced: what `reduce` made of the members, if that is known.
        """
        size, what = (int(size[0]), int(size[1])), get_task(task)
        merged, spread = self.reduce(task, members, mode) if reduced is None else reduced
        answer = what.answer(merged, size, self.options, raw)
        spread = what.native(spread, size, self.options)
        return Estimate(answer.prediction, spread, members, answer.whole, size, forwards, answer.painted)

    def reduce(
        self, task: str, members: Float[np.ndarray, "M H W *C"], mode: str
    ) -> tuple[Float[np.ndarray, "H W *C"], Float[np.ndarray, "H W"]]:
        """Members (M, R, R[, C]) to (prediction, uncertainty) at the model's resolution."""
        return get_task(task).merged(members, mode, self.options)

    def round_trip(self, pictures: Float[np.ndarray, "B R R 3"]) -> Float[np.ndarray, "B R R 3"]:
        """Pictures (B, R, R, 3) through the autoencoder and back: what no prediction can be better than."""
        return np.asarray(self.engine.round_trip(self._autoencoder_params, pictures))


def _fit_name(settings: Settings, task: str, diffusion: DiffusionPreset) -> Any:
    """All that fitted weights depend on besides the model."""
    names = ("steps", "solver", "eta", "clip", "cache", "cache_interval")
    return task, diffusion, *(getattr(settings, name) for name in names)
