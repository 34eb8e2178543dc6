"""One step, end to end: a task's own loss on the picture of a single evaluation (E2E-FT, Garcia et al. 2025).

Per sample, with x_T what sampling starts from, T the last timestep and the row of the sampler's table for one step:

    z = next_x x_T + next_x0 (x0_x x_T + x0_out network(input, T, label)[..., :4])             (1)
    loss = task.loss(decode(scale z + shift), truth)   + the balance loss of models with experts          (2)

so z is what `predict --steps 1` decodes, whatever the schedule and the prediction. x_T is 0 (``noise = "zeros"``, as in
E2E-FT: one answer a picture) or Gaussian noise (members of an ensemble then differ). The truth is the target picture
where pictures are read as the run goes, and the decoded target latent with a cache, which has nothing else: the network
then learns the truth as the autoencoder shows it, and the floor of the autoencoder (`evaluate` prints it) is what it
cannot get below.

The frozen autoencoder decodes few rows at a time, in a loop whose backward pass computes them again, so that the memory
it takes does not grow with the batch.

Words: B batch, h w latent sides, R pixels; latents are (B, h, w, 4) float32.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from scaling_perception.diffusion.schedules import DiffusionPreset, get_diffusion
from scaling_perception.diffusion.solvers import refuse_amplified, sampler_tables
from scaling_perception.models.presets import LATENT_FACTOR
from scaling_perception.models.vae_tiles import sliced
from scaling_perception.parallel.mesh import free_batch_axes
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TASKS, TaskOptions, get_task
from scaling_perception.training.balance import balance_known, routing_tally, with_balance
from scaling_perception.training.noising import LATENT
from scaling_perception.training.objective import Metrics, Parts

ZEROS = "zeros"
AT_ONCE = 64**2  # latent pixels that are decoded together: one picture of 512 pixels, 16 of 128

Inputs = Callable[[Mapping[str, Any]], tuple[list[jax.Array], jax.Array, jax.Array, jax.Array, jax.Array]]


def check_one_step(config: Config) -> None:
    """Refuse what one step cannot be trained with.

    Raises:
        UserError: naming the field.
    """
    if not config.init:
        raise UserError("init is empty: one_step fine-tunes a trained model, so give a model folder or a shipped name")
    if config.noise not in (ZEROS, "gaussian"):
        raise UserError(
            f"noise is '{config.noise}': one_step starts where predicting does, so give zeros (one answer) or gaussian"
        )
    for entry in config.data.mixture.values():
        if get_task(entry.task).loss is None:
            known = ", ".join(one.name for one in TASKS.values() if one.loss is not None)
            raise UserError(f"data.mixture has {entry.task}, which one_step has no loss for: give {known}")
    preset = get_diffusion(config.diffusion, **config.diffusion_changes.to_dict())
    if preset.spacing != "trailing":
        raise UserError(
            f"diffusion '{config.diffusion}' has a {preset.spacing} grid, whose one step does not start at the last "
            "timestep: set diffusion_changes.spacing=trailing"
        )
    refuse_amplified(sampler_tables(preset, 1))


def decoded_in_turns(
    decode: Callable[[Any, jax.Array], jax.Array], params: Any, latents: jax.Array, mesh: Any = None
) -> jax.Array:
    """``decode(params, latents)``, float32 (B, R, R, 3), few rows at a time and again in the backward pass.

    Args:
        decode: a frozen autoencoder's. latents: (B, h, w, 4).
        mesh: devices that the rows are split over; each decodes its own. None = one device.
    """

    def own_rows(params: Any, rows: jax.Array) -> jax.Array:
        again = jax.checkpoint(lambda some: decode(params, some).astype(jnp.float32))
        return sliced(again, rows, AT_ONCE, 1)

    params = jax.lax.stop_gradient(params)
    if mesh is None:
        return own_rows(params, latents)
    # a loop over an array that is split would have every device decode all of it
    split = PartitionSpec(free_batch_axes())
    one = jax.shard_map(own_rows, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False)
    return one(params, latents)


def start_noise(key: jax.Array, index: jax.Array, shape: tuple[int, ...], noise: str) -> jax.Array:
    """x_T of ``shape`` (B, h, w, 4): zeros, or each sample's noise by ``key`` and its place in the batch alone."""
    if noise == ZEROS:
        return jnp.zeros(shape, jnp.float32)
    return jax.vmap(lambda place: jax.random.normal(jax.random.fold_in(key, place), shape[1:]))(index)


def one_step_latents(
    model: Any,
    preset: DiffusionPreset,
    norm: Mapping[str, Any],
    params: Any,
    conditions: Sequence[jax.Array],
    x: jax.Array,
    row: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Equation (1) from ``x`` (B, h, w, 4), as latents to decode; and the routing of a model with experts."""
    table = jax.tree.map(lambda column: column[0], sampler_tables(preset, 1))
    t, whole = jnp.full(x.shape[:1], table.t, jnp.int32), jnp.concatenate([*conditions, x], axis=-1)
    out, stats = model.apply({"params": params}, whole, t, labels, with_stats=True)
    clean = table.x0_x * x + table.x0_out * out[..., :LATENT].astype(jnp.float32)
    clean = table.next_x * x + table.next_x0 * clean
    shift, scale = (jnp.asarray(norm[name], jnp.float32)[row][:, None, None] for name in ("shift", "scale"))
    return clean * scale + shift, stats


def one_step_parts(
    model: Any,
    preset: DiffusionPreset,
    config: Config,
    norm: Mapping[str, Any],
    inputs: Inputs,
    decode: Callable[[Any, jax.Array], jax.Array],
    trained: Mapping[str, int],
    mesh: Any = None,
) -> Parts:
    """The loss of equation (2), in parts or whole: a mean over the samples that have a valid pixel.

    Args:
        model: a DiT. norm: {"shift": P x [4], "scale": P x [4]}, a row for each of the model's passes.
        inputs: batch -> (conditions, list of (B, h, w, 4); target latents or pixels; their valid mask; rows (B,) of the
            passes in ``norm``; labels (B,)).
        decode: (autoencoder params, latents (B, h, w, 4)) -> pixels; ``batch["constants"]`` holds those params.
        trained: name of each pass of the mixture -> its row.
    """
    dit, options = model.config, TaskOptions.from_dict(config.task_options.to_dict())
    tasks = tasks_of_passes(trained)

    def tally(params: Any, batch: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
        conditions, target, valid, row, labels = inputs(batch)
        shape = (*conditions[0].shape[:3], LATENT)
        x = start_noise(key, batch.get("index", jnp.arange(shape[0])), shape, config.noise)
        latents, stats = one_step_latents(model, preset, norm, params, conditions, x, row, labels)
        pixels = decoded_in_turns(decode, batch["constants"], latents, mesh)
        if target.shape[-1] == LATENT:
            target = jnp.where(jnp.isfinite(target), target, 0.0)
            target = jax.lax.stop_gradient(decoded_in_turns(decode, batch["constants"], target, mesh))
            valid = jnp.repeat(jnp.repeat(valid, LATENT_FACTOR, axis=1), LATENT_FACTOR, axis=2)
        target = jnp.where(valid[..., None] & jnp.isfinite(target), target, 0.0)
        losses = jnp.zeros(len(pixels), jnp.float32)
        for name, passes in tasks.items():
            loss: Any = get_task(name).loss
            own = jnp.isin(row, jnp.asarray(passes))
            # of another task's rows nothing is computed that could be infinite: no pixel of theirs is valid
            some = valid & own[:, None, None]
            losses += jax.vmap(lambda one, two, three, loss=loss: loss(one, two, three, options))(pixels, target, some)
        counted = jnp.any(valid, axis=(1, 2))
        losses = jnp.where(counted, losses, 0.0)
        found = {"losses": jnp.sum(losses), "rows": jnp.sum(counted, dtype=jnp.float32)}
        found["valid"] = jnp.mean(valid.astype(jnp.float32))
        for name, index in trained.items():
            own = counted & (row == index)
            found[f"losses_{name}"] = jax.lax.stop_gradient(jnp.sum(jnp.where(own, losses, 0.0)))
            found[f"rows_{name}"] = jnp.sum(own, dtype=jnp.float32)
        return {**found, **routing_tally(stats, dit, len(pixels))}

    def score(found: Mapping[str, jax.Array], parts: int) -> tuple[jax.Array, Metrics]:
        value = found["losses"] / jnp.where(found["rows"] > 0, found["rows"], 1.0)
        metrics: Metrics = {"valid": found["valid"], "weight": found["rows"]}
        if "balance" in found:
            metrics["pixel_loss"] = value
        if len(trained) > 1:
            for name in trained:
                losses, rows = found[f"losses_{name}"], found[f"rows_{name}"]
                metrics[f"loss_{name}"] = jnp.where(rows > 0, losses / jnp.where(rows > 0, rows, 1.0), jnp.nan)
        return with_balance(value, found, dit, config, metrics, parts), metrics

    return Parts(tally, ("rows", *(f"rows_{name}" for name in trained), *balance_known(config)), score)


def tasks_of_passes(trained: Mapping[str, int]) -> dict[str, list[int]]:
    """Name of each task -> the rows of its passes, of passes by name -> row."""
    found = {name: [trained[one.name] for one in task.passes if one.name in trained] for name, task in TASKS.items()}
    return {name: rows for name, rows in found.items() if rows}
