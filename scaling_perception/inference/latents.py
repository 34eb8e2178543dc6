"""Members merged as latents and decoded once: decoding is most of what a member of few steps costs.

Latents of a depth picture s d + t are about s z(d) plus a shift of each channel, since the encoder is nearly linear. So
by ``lsq`` every member is fitted to the running median of all with one scale and a shift for each channel, ten times,
and the median takes the members' mean scale and shifts after each fit: applied outside it, nothing can gain by
shrinking. ``mean`` and ``median`` merge every number of the latents by itself.

The decoded picture is then treated as a single member. Of the members' disagreement the latents' own spread remains:
its pattern at the latents' resolution, on a scale that is about right only (`uncertainty_of`).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.diffusion.sampler import SamplerTables
from scaling_perception.inference.batches import BatchPlan, joined_members, member_draws
from scaling_perception.inference.draws import NoiseKeys, key_of
from scaling_perception.inference.model import Model
from scaling_perception.inference.settings import Settings
from scaling_perception.support.shapes import Array, EitherArray, Float, RandomKey
from scaling_perception.tasks.base import Estimate
from scaling_perception.tasks.ensemble import median
from scaling_perception.tasks.resize import resize_bilinear

_ROUNDS = 10
_SMALLEST = 1e-6


def merge_latents(
    latents: Float[EitherArray, "I M P h w C"], mode: str
) -> tuple[Float[Array, "I 1 P h w C"], Float[Array, "I h w"]]:
    """Clean latents of members into those of one member and their spread, root mean square over passes and channels.

    Args:
        mode: ``mean`` (spread: standard deviation), ``median`` or ``lsq`` (median absolute deviation), see the module.
    """
    members = jnp.moveaxis(jnp.asarray(latents, jnp.float32), 1, 0)
    if mode == "mean":
        middle = members[0] + jnp.mean(members - members[:1], axis=0)  # of equal members exactly that one
        spread = jnp.std(members - middle[None], axis=0)
    else:
        members = _aligned(members) if mode == "lsq" else members
        middle = median(members)
        spread = median(jnp.abs(members - middle[None]))
    return middle[:, None], jnp.sqrt(jnp.mean(jnp.square(spread), axis=(1, 4)))


def _aligned(members: Float[Array, "M I P h w C"]) -> Float[Array, "M I P h w C"]:
    shift = jnp.mean(members, axis=(3, 4), keepdims=True)
    centred = members - shift
    power = _power(centred)
    level, size = jnp.mean(shift, axis=0), jnp.sqrt(jnp.mean(power, axis=0))

    def improve(_: Any, target: Float[Array, "I P h w C"]) -> Float[Array, "I P h w C"]:
        return _anchored(median(_fit(centred, power, target)), size)

    return _fit(centred, power, jax.lax.fori_loop(0, _ROUNDS, improve, _anchored(median(centred), size))) + level[None]


def _power(centred: Float[Array, "*M I P h w C"]) -> Float[Array, "*M I P 1 1 1"]:
    return jnp.mean(jnp.square(centred), axis=(-3, -2, -1), keepdims=True)


def _fit(
    centred: Float[Array, "M I P h w C"], power: Float[Array, "M I P 1 1 1"], target: Float[Array, "I P h w C"]
) -> Float[Array, "M I P h w C"]:
    """Members times their least-squares scale to the target; a negative one, which would reverse a member, is 0."""
    product = jnp.mean(centred * target[None], axis=(-3, -2, -1), keepdims=True)
    return jnp.maximum(product, 0.0) / jnp.maximum(power, _SMALLEST**2) * centred


def _anchored(merged: Float[Array, "I P h w C"], size: Float[Array, "I P 1 1 1"]) -> Float[Array, "I P h w C"]:
    centred = merged - jnp.mean(merged, axis=(-3, -2), keepdims=True)
    return centred * size / jnp.maximum(jnp.sqrt(_power(centred)), _SMALLEST)


def decode_merged(
    model: Model, latents: Float[EitherArray, "I M P h w C"], task: str, mode: str
) -> tuple[Float[np.ndarray, "I P 1 R R 3"], Float[np.ndarray, "I h w"], Float[np.ndarray, " I"]]:
    """Members merged and decoded: pixels, the latents' spread, and the standard deviation of the merged latents over
    the picture, of which `uncertainty_of` makes a map."""

    def merge(latents: Array) -> tuple[Array, Array, Array]:
        merged, spread = merge_latents(latents, mode)
        return merged, spread, jnp.sqrt(jnp.mean(jnp.var(merged[:, 0], axis=(2, 3)), axis=(1, 2)))

    merged, spread, varies = model.engine.run(f"merge latents by {mode}", merge, latents)
    pixels = model.engine.decode(model.weights[1], merged, model.passes(task))
    return np.asarray(pixels), np.asarray(spread), np.asarray(varies)


def uncertainty_of(
    spread: Float[np.ndarray, "h w"], varies: float | np.floating, prediction: Float[np.ndarray, "R R *C"]
) -> Float[np.ndarray, "R R"]:
    """The latents' spread at the prediction's resolution, times how much more the prediction varies over the picture
    than its latents do: as if the decoder were linear."""
    scale = np.sqrt(np.var(prediction.reshape(-1, *prediction.shape[2:]), axis=0).sum()) / max(float(varies), _SMALLEST)
    return resize_bilinear(spread, (prediction.shape[0], prediction.shape[1])) * np.float32(scale)


def estimate(
    model: Model,
    raw: dict[str, Any],
    found: tuple[Float[np.ndarray, "P 1 R R 3"], Float[np.ndarray, "h w"], float | np.floating],
    task: str,
    mode: str,
    forwards: float,
) -> Estimate:
    """One image's result of what `decode_merged` has of it. Its one member is the merged one."""
    pixels, spread, varies = found
    members = model.decode_members(pixels, task)
    prediction, _ = model.reduce(task, members, mode)
    size, reduced = raw["image"].shape[:2], (prediction, uncertainty_of(spread, varies, prediction))
    return model.merge(members, task, size, mode, raw, forwards, reduced)


def sample_latents(
    model: Model,
    latents: Float[EitherArray, "I h w _"],
    group: Sequence[dict[str, Any]],
    task: str,
    ensemble: int,
    tables: SamplerTables,
    key: int | RandomKey,
    plan: BatchPlan,
    antithetic: bool = False,
    watch: Callable[[Float[np.ndarray, "J M P h w C"]], None] | None = None,
) -> Float[np.ndarray, "I M P h w C"]:
    """`Model.sample` without decoding: clean latents of all members, of the whole batch of images.

    Args:
        watch: called with those of the group's members so far, after each batch of members but the last.
    """
    passes = model.passes(task)

    def run(draw: NoiseKeys) -> Any:
        return model.engine.clean(model.params, latents, draw, passes, tables)

    draws = member_draws(key_of(key), model.image_ids(group, plan.images), ensemble, plan.members, antithetic)
    return joined_members(map(run, draws), ensemble, watch, axis=1)


def latent_stream(
    model: Model,
    raws: Iterable[dict[str, Any]],
    task: str,
    settings: Settings,
    tables: SamplerTables,
    key: int | RandomKey,
    mode: str,
    plan: BatchPlan,
    watch: Callable[[Estimate], None] | None = None,
) -> Iterator[Estimate]:
    """One estimate for each raw sample, in order, all with `Settings.ensemble` members, in the batches of ``plan``.

    Args:
        watch: as `Predictor.stream`.
    """
    samples, each = iter(raws), model.evaluations(settings)
    while group := list(itertools.islice(samples, plan.images)):

        def estimates(z: Float[np.ndarray, "I M P h w C"], group: Sequence[dict[str, Any]] = group) -> list[Estimate]:
            found = zip(*decode_merged(model, z, task, mode), strict=True)
            return [
                estimate(model, raw, one, task, mode, each * z.shape[1]) for raw, one in zip(group, found, strict=False)
            ]

        seen = None if watch is None or len(group) > 1 else lambda z: watch(estimates(z)[0])
        arguments = (task, settings.ensemble, tables, key, plan, settings.antithetic, seen)
        yield from estimates(sample_latents(model, model.encode(group, task, plan), group, *arguments))
