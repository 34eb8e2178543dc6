"""Pictures of classes, drawn by a class-conditional model with guidance: does pre-training work, does an import?"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from scaling_perception.data.formats import write_image
from scaling_perception.diffusion.guidance import guided
from scaling_perception.diffusion.sampler import SamplerTables, sample
from scaling_perception.diffusion.schedules import get_diffusion
from scaling_perception.diffusion.solvers import sampler_tables
from scaling_perception.models.dit import DiT, DiTConfig, config_from_dict
from scaling_perception.support.errors import UserError
from scaling_perception.support.shapes import Array, Float, Int, RandomKey, Real, Shaped
from scaling_perception.tasks.colours import whole_picture

GUIDED = 3  # of the four channels, as DiT's own sampler (facts 1.1)
AT_ONCE = 8  # pictures in the network and in the decoder together
DIT_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # those of DiT's own sampling script


def example_classes(classes: int, count: int) -> list[int]:
    """Up to ``count`` classes to look at: DiT's own of ImageNet's 1000, evenly spread ones of other data."""
    if classes == 1000 and count <= len(DIT_CLASSES):
        return list(DIT_CLASSES[:count])
    return [int(i) for i in np.linspace(0, classes, min(count, classes), endpoint=False)]


def sample_classes(
    dit: DiTConfig,
    params: Any,
    tables: SamplerTables,
    labels: Sequence[int],
    guidance: float = 4.0,
    channels: int = GUIDED,
    key: int = 0,
) -> Float[np.ndarray, "B h w C"]:
    """Latents (N, h, w, 4) float32 of the classes ``labels``, in the network's own units.

    Picture i has the noise of its own number, whatever the others are.

    Args:
        guidance: classifier-free guidance; 1 is none, DiT shows 4 and measures at 1.5.
        channels: how many of the latent's channels are guided.

    Raises:
        UserError: a label that is no class of the model.
    """
    wrong = [label for label in labels if not 0 <= label < dit.num_classes]
    if wrong or not labels:
        raise UserError(f"class {wrong[0] if wrong else 'none'}: give one or more of 0..{dit.num_classes - 1}")
    root = jax.random.key(key)
    params = jax.device_put(params, jax.local_devices()[0])
    latents = []
    for start in range(0, len(labels), AT_ONCE):
        part = jnp.arange(start, start + AT_ONCE)  # always full, so that one program serves all
        label = jnp.asarray([labels[i % len(labels)] for i in range(start, start + AT_ONCE)], jnp.int32)
        made = _sample(dit, channels, bool(tables.sigma.any()), params, tables, label, part, root, guidance)
        latents.append(np.asarray(made)[: len(labels) - start])
    return np.concatenate(latents)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(
    dit: DiTConfig,
    channels: int,
    noisy: bool,
    params: Any,
    tables: SamplerTables,
    label: Int[Array, " B"],
    part: Int[Array, " B"],
    root: RandomKey,
    guidance: Real[Array, ""],
) -> Float[Array, "B h w C"]:
    shape = (dit.input_size, dit.input_size, dit.in_channels)

    def noise(number: int | Int[Array, ""]) -> Float[Array, "B h w C"]:
        """(B, h, w, C) for the start (0) or for a step (from 1)."""
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(root, i), number))(part)
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    both = jnp.concatenate([label, jnp.full_like(label, dit.null_label)])

    def pair(x: Float[Array, "pairs h w C"], row: SamplerTables) -> Float[Array, "pairs h w C"]:
        t = jnp.full((len(both),), row.t)
        return DiT(dit).apply({"params": params}, x, t, both)[..., : dit.in_channels]  # type: ignore[index]

    each = (lambda row: noise(row.index + 1)) if noisy else None
    return sample(guided(pair, guidance, channels), tables, noise(0), each)


def draw_classes(
    params: Any,
    meta: Mapping[str, Any],
    labels: Sequence[int],
    steps: int = 50,
    guidance: float = 4.0,
    channels: int = GUIDED,
    key: int = 0,
    solver: str = "ddim",
    autoencoder: str = "",
) -> UInt8[np.ndarray, "B R R 3"]:
    """Pictures uint8 (N, R, R, 3) of a model folder's weights and description (``interop.model_folder.load_model``).

    Args:
        autoencoder: in place of the one that the model names.

    Raises:
        UserError: the model is not of classes alone, no such class, or no autoencoder.
    """
    from scaling_perception.models.autoencoders import load_autoencoder

    dit = config_from_dict(meta["model"])
    if dit.cond_channels or not dit.num_classes:
        raise UserError(
            f"model {dit.name} draws no classes (cond_channels {dit.cond_channels}, num_classes {dit.num_classes}): "
            "give one that was pre-trained on them, or use predict"
        )
    tables = sampler_tables(get_diffusion("paper", **meta["diffusion"]), steps, solver=solver)
    vae = load_autoencoder(autoencoder or meta["autoencoder"])
    latents = sample_classes(dit, params, tables, labels, guidance, channels, key)
    norm = {name: np.asarray(meta["latent_norm"][name][0], np.float32) for name in ("shift", "scale")}
    decode, weights = jax.jit(vae.decode), jax.device_put(vae.params, jax.local_devices()[0])
    pictures = []
    for start in range(0, len(latents), AT_ONCE):
        part = latents[start : start + AT_ONCE] * norm["scale"] + norm["shift"]
        full = np.concatenate([part, np.zeros((AT_ONCE - len(part), *part.shape[1:]), np.float32)])
        pictures.append(whole_picture(np.asarray(decode(weights, full))[: len(part)]))
    return np.concatenate(pictures)


def grid_of(count: int) -> int:
    """Pictures in a row of a sheet of ``count``."""
    return min(count, max(4, int(np.ceil(np.sqrt(count)))))


def sheet(pictures: Shaped[np.ndarray, "B H W 3"], gap: int = 2) -> Shaped[np.ndarray, "height width 3"]:
    """(N, R, R, 3) as one picture, row by row, on white."""
    count, side, columns = len(pictures), pictures.shape[1], grid_of(len(pictures))
    rows, step = -(-count // columns), side + gap
    out = np.full((rows * step - gap, columns * step - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * step, i % columns * step
        out[top : top + side, left : left + side] = picture
    return out


def write_classes(path: str | Path, params: Any, meta: Mapping[str, Any], labels: Sequence[int], **how: Any) -> Any:
    """NoiseKeys classes and write them as one sheet; returns the pictures. ``how`` as for `draw_classes`."""
    pictures = draw_classes(params, meta, labels, **how)
    write_image(path, sheet(pictures))
    return pictures
