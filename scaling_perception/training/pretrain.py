"""Pre-training: class-conditional generation, as DiT does it (Peebles & Xie 2023; facts 4.1 and 8).

Per sample, with the autoencoder's posterior N(m, s^2) of its picture and (alpha, sigma) of the schedule:

    z = (m + s xi - shift) / scale,  x_t = alpha_t z + sigma_t eps         (1)
    loss = mean (network(x_t, t, label)[..., :4] - y)^2  + bits(network(x_t, t, label)[..., 4:])     (2)
           + balance_loss * sum over layers of f P, for models with experts

m and s are those of scaled latents; an autoencoder without a variance, such as ``tiny``, has s = 0. y is eps (or z, or
v); ``bits`` is the variational bound of ``diffusion/vlb.py``, which trains the variance channels alone. A label is
replaced by the null one with probability ``label_dropout``, for guidance needs a network that knows both.

Words: B batch, R pixels, h w latent sides.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.diffusion.schedules import DiffusionPreset
from scaling_perception.diffusion.vlb import learned_range_bits, variance_tables
from scaling_perception.models.dit import DiTConfig
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError
from scaling_perception.training.balance import balance_known, routing_tally, with_balance
from scaling_perception.training.noising import LATENT, make_noising
from scaling_perception.training.objective import Metrics, Parts

Moments = Callable[..., tuple[jax.Array, jax.Array | None]]


def latent_draw(batch: Mapping[str, Any], moments: Moments | None, key: jax.Array, index: jax.Array) -> jax.Array:
    """A draw from the posterior of each target, float32 (B, h, w, 4), or its mean where there is no variance.

    Args:
        batch: ``target`` latent means (B, h, w, 4), with ``target_logvar`` or without; or pixels (B, R, R, 3), and
            ``constants``, the autoencoder's params.
        moments: (params, pixels) -> (mean, log-variance or None), None for batches of latents.
        index: (B,) each sample's place in the whole batch, which its draw depends on.
    """
    if moments is None:
        mean, logvar = batch["target"].astype(jnp.float32), batch.get("target_logvar")
    else:
        mean, logvar = moments(batch["constants"], batch["target"].astype(jnp.float32))
    mean = jax.lax.stop_gradient(mean.astype(jnp.float32))
    if logvar is None:
        return mean
    noise = jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), mean.shape[1:]))(index)
    return mean + jnp.exp(0.5 * jax.lax.stop_gradient(logvar.astype(jnp.float32))) * noise


def dropped_labels(label: jax.Array, dit: DiTConfig, rate: float, key: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of the label table, int32 (B,): the class, or the null row with probability ``rate`` or without a class."""
    dropped = jax.vmap(lambda place: jax.random.bernoulli(jax.random.fold_in(key, place), rate))(index)
    return jnp.where(dropped | (label < 0), dit.null_label, label).astype(jnp.int32)


def generation_parts(
    model: Any, preset: DiffusionPreset, config: Config, norm: Mapping[str, Any], moments: Moments | None
) -> Parts:
    """The loss of equation (2), in parts or whole, with metrics ``mse``, ``bound`` in bits, and of the routing.

    Args:
        model: a DiT without conditions. norm: {"shift": [[4]], "scale": [[4]]}. moments: as for `latent_draw`.
    """
    dit = model.config
    noised = make_noising(preset, config)
    tables = variance_tables(preset) if dit.learn_sigma else None
    shift, scale = np.asarray(norm["shift"][0], np.float32), np.asarray(norm["scale"][0], np.float32)

    def tally(params: Any, batch: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
        index = batch.get("index", jnp.arange(batch["target"].shape[0]))
        key_draw, key_drop, key_noise = jax.random.split(key, 3)
        clean = (latent_draw(batch, moments, key_draw, index) - shift[None, None, None]) / scale[None, None, None]
        labels = dropped_labels(batch["label"], dit, config.label_dropout, key_drop, index)
        noisy, wanted, t = noised(clean, key_noise, index)
        out, stats = model.apply({"params": params}, noisy, t, labels, with_stats=True)
        found = {"mse": jnp.mean(jnp.square(out[..., :LATENT] - wanted))}
        if tables is not None:
            bits = learned_range_bits(
                tables, preset.prediction, out[..., :LATENT], out[..., LATENT:], clean, noisy, t
            ).mean()
            found["bound"] = bits
        return {**found, **routing_tally(stats, dit, len(clean))}

    def score(found: Mapping[str, jax.Array], parts: int) -> tuple[jax.Array, Metrics]:
        metrics: Metrics = {name: found[name] for name in ("mse", "bound") if name in found}
        value = found["mse"] + found["bound"] if "bound" in found else found["mse"]
        return with_balance(value, found, dit, config, metrics, parts), metrics

    return Parts(tally, balance_known(config), score)


def check_generation(config: Config, dit: DiTConfig) -> None:
    """Refuse a network or a mixture that cannot be pre-trained.

    Raises:
        UserError: naming the field.
    """
    tasks = sorted({entry.task for entry in config.data.mixture.values() if entry.get("weight", 1.0) > 0})
    if len(tasks) > 1:
        raise UserError(f"data.mixture has {', '.join(tasks)}: generation has no conditions, so train it alone")
    for field in ("cond_channels", "task_labels"):
        if getattr(dit, field):
            raise UserError(f"model_changes.{field} is {getattr(dit, field)}: generation has none, set it to 0")
    if not dit.num_classes:
        raise UserError("model_changes.num_classes is 0: set it to the number of classes of the data")


def check_classes(dit: DiTConfig, found: int) -> int:
    """The number of classes ``found`` in the data, or the network's where that is 0.

    Raises:
        UserError: the network has fewer.
    """
    found = found or dit.num_classes
    if found > dit.num_classes:
        raise UserError(
            f"the data has {found} classes and the model {dit.num_classes}: set model_changes.num_classes={found}"
        )
    return found


def write_samples(path: str, config: Config, params: Any, meta: Mapping[str, Any]) -> None:
    """``samples.png`` of the finished model, if ``config.samples.count`` says so.

    A picture is not worth a finished run: what goes wrong here is told and no more.
    """
    from scaling_perception.inference.class_pictures import example_classes, grid_of, write_classes

    wanted = config.samples
    if not wanted.count:
        return
    try:
        labels = example_classes(meta["classes"], wanted.count)
        how = {"steps": wanted.steps, "guidance": wanted.guidance, "key": config.seed}
        pictures = write_classes(path, params, meta, labels, **how)
    except (RuntimeError, UserError) as error:
        print(f"no {path}: {' '.join(str(error).split())[:200]}", file=sys.stderr, flush=True)
        return
    # ``path`` is in the folder of the export under way, which is renamed
    shown = f"drew classes {', '.join(map(str, labels))}, {grid_of(len(pictures))} to a row"
    print(f"{shown}: samples.png in the model's folder", file=sys.stderr)
