"""The diffusion objective: denoise the latent of a task's picture, given the image and the prompt (facts 2 and 4).

Per sample, with z = (target latent - shift[task]) / scale[task] and (alpha, sigma) of the schedule:

    x_t = alpha_t z + sigma_t eps                                                       (1)
    input = [image latent, prompt latent, x_t] on the channel axis (no prompt when cond_channels is 4)
    loss = mean over valid latent cells of (network(input, t, label)[..., :4] - y)^2    (2)
           + balance_loss * sum over layers of f P, for models with experts (models/moe.py, facts 3.1)

where y is eps, z or v (``diffusion.targets``). Variance channels, if the network has them, are not trained here: they
exist so that released checkpoints fit (facts 10, row 21). No label is ever dropped (row 23). Pre-training, whose task
is ``generation`` (``training/pretrain.py``), and ``one_step`` (``training/one_step.py``) have other losses, and share
the rest.

Words: B batch, h w latent sides, R pixels; latents are (B, h, w, 4) float32.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.diffusion.schedules import DiffusionPreset, get_diffusion
from scaling_perception.diffusion.targets import latent_mask, masked_squares, mean_of_cells
from scaling_perception.models.autoencoders import FEATURES, Autoencoder, check_flow_frame, is_matching
from scaling_perception.models.dit import DiT, DiTConfig, frozen_paths, init_params
from scaling_perception.models.presets import at_resolution, get_preset
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import (
    ALL_PASSES,
    FRAME_PASSES,
    PERCEPTION,
    RELEASED,
    TASKS,
    TaskOptions,
    get_task,
    model_passes,
    pass_names,
)
from scaling_perception.training import one_step, pretrain
from scaling_perception.training.balance import balance_known, routing_tally, with_balance
from scaling_perception.training.noising import LATENT, make_noising
from scaling_perception.training.noising import sample_timesteps as sample_timesteps
from scaling_perception.training.objective import LatentBatches, Metrics, Objective, Parts, own_share
from scaling_perception.training.prompts import prompt_table, with_table
from scaling_perception.training.start import check_latents, starting_point
from scaling_perception.training.validation import held_out_batches

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # of activations
EXPORT_DTYPES = {**DTYPES, "float16": jnp.float16}  # of exported weights

_NORM_SAMPLES = 1024  # samples that `latent_norm=auto` measures
_SMALLEST_SCALE = 1e-2  # a channel that hardly varies must not be blown up to unit variance


def labels_of(row: jax.Array, dit: DiTConfig) -> jax.Array:
    """Label, int32 (B,), of each row of the model's passes: first task label + row, or a specialist's null label
    (facts 2)."""
    return dit.num_classes + row if dit.task_labels else jnp.full_like(row, dit.null_label)


def make_loss(
    model: Any, preset: DiffusionPreset, config: Config, norm: Mapping[str, Any], encode: Callable[..., Any] | None
) -> Callable[[Any, Mapping[str, Any], jax.Array], tuple[jax.Array, Metrics]]:
    """The loss of equation (2) as (params, batch, key) -> (scalar, metrics). Arguments as for `loss_parts`."""
    return loss_parts(model, preset, config, norm, encode).loss


def loss_parts(
    model: Any, preset: DiffusionPreset, config: Config, norm: Mapping[str, Any], encode: Callable[..., Any] | None
) -> Parts:
    """The loss of equation (2), in parts or whole: errors of all tasks and of each are means over valid cells.

    Args:
        model: a DiT.
        norm: {"shift": P x [4], "scale": P x [4]}, a row for each of ``passes_of``.
        encode: (autoencoder params, pixels) -> latent mean for batches of pixels (then ``batch["constants"]`` holds
            those params), None for batches of latents.
    """
    dit, frames = model.config, matched_passes(config)
    noised = make_noising(preset, config)
    shift, scale = np.asarray(norm["shift"], np.float32), np.asarray(norm["scale"], np.float32)
    names = passes_of(config, dit)
    trained = pass_names(tasks_of(config))
    told = {f"loss_{name}": names.index(name) for name in trained} if len(trained) > 1 else {}

    def tally(params: Any, batch: Mapping[str, Any], key: jax.Array) -> dict[str, jax.Array]:
        image, prompt, target, valid = latents_of(batch, encode, dit.conditions, frames)
        row = rows_of(batch["pass_id"], names)
        clean = (target - jnp.asarray(shift)[row][:, None, None]) / jnp.asarray(scale)[row][:, None, None]
        clean = jnp.where(valid[..., None], clean, 0.0)  # what hides under the mask may be anything, even NaN
        noisy, wanted, t = noised(clean, key, batch.get("index", jnp.arange(len(clean))))
        parts = [image, noisy] if dit.conditions == 1 else [image, prompt, noisy]
        inputs, labels = jnp.concatenate(parts, axis=-1), labels_of(row, dit)
        got, stats = model.apply({"params": params}, inputs, t, labels, with_stats=True)
        got = got[..., :LATENT]
        squares, cells = masked_squares(got, wanted, valid)
        found = {"squares": squares, "cells": cells, "valid": jnp.mean(valid.astype(jnp.float32))}
        for name, index in told.items():
            own = masked_squares(jax.lax.stop_gradient(got), wanted, valid & (row == index)[:, None, None])
            found[f"squares_{name}"], found[f"cells_{name}"] = own
        return {**found, **routing_tally(stats, dit, len(clean))}

    def score(found: Mapping[str, jax.Array], parts: int) -> tuple[jax.Array, Metrics]:
        value = mean_of_cells(found["squares"], found["cells"], LATENT)
        metrics = {"valid": found["valid"], "weight": found["cells"]}
        if "balance" in found:
            metrics["mse"] = value
        for name in told:
            own, cells = found[f"squares_{name}"], found[f"cells_{name}"]
            metrics[name] = jnp.where(cells > 0, mean_of_cells(own, cells, LATENT), jnp.nan)
        return with_balance(value, found, dit, config, metrics, parts), metrics

    return Parts(tally, ("cells", *(f"cells_{name}" for name in told), *balance_known(config)), score)


def one_step_inputs(
    config: Config, dit: DiTConfig, encode: Callable[..., Any] | None
) -> Callable[[Mapping[str, Any]], tuple[list[jax.Array], jax.Array, jax.Array, jax.Array, jax.Array]]:
    """What ``one_step.one_step_parts`` needs of a batch; the target stays as it is, latents or pixels."""
    names, fields, frames = passes_of(config, dit), ["image", "prompt"][: dit.conditions], matched_passes(config)

    def inputs(batch: Mapping[str, Any]) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array, jax.Array]:
        row = rows_of(batch["pass_id"], names)
        conditions = _latents(batch, encode, fields, frames)
        return list(conditions.values()), batch["target"].astype(jnp.float32), batch["valid"], row, labels_of(row, dit)

    return inputs


def latents_of(
    batch: Mapping[str, Any], encode: Callable[..., Any] | None, conditions: int, frames: Sequence[int] = ()
) -> tuple[Any, jax.Array | None, jax.Array, jax.Array]:
    """(image, prompt, target, valid) of a batch: latents float32 (B, h, w, 4), encoded if pixels; mask (B, h, w). Those
    of image and prompt may have features as further channels. ``frames``: ids of the passes whose prompts are encoded
    together with the image, by an autoencoder that matches them.

    Image and prompt are None where the network is not given them.
    """
    names = [*("image", "prompt")[:conditions], "target"]
    valid = batch["valid"]
    found = _latents(batch, encode, names, frames)
    if encode is not None:
        valid = latent_mask(valid, valid.shape[1] // found["target"].shape[1])
    return found.get("image"), found.get("prompt"), found["target"], valid


def matched_passes(config: Config) -> tuple[int, ...]:
    """Ids of the passes of a config whose prompts are encoded together with the image."""
    return FRAME_PASSES if is_matching(config.get("autoencoder", "")) else ()


def _latents(
    batch: Mapping[str, Any], encode: Callable[..., Any] | None, names: Sequence[str], frames: Sequence[int]
) -> dict[str, jax.Array]:
    """The fields ``names`` as latents float32 (B, h, w, 4); of conditions with their features."""
    if encode is None:
        return {name: batch[name].astype(jnp.float32) for name in names}
    # one call over all of them: fewer, larger convolutions
    pixels = jnp.concatenate([batch[name].astype(jnp.float32) for name in names])
    latents = jax.lax.stop_gradient(encode(batch["constants"], pixels))
    found = dict(zip(names, jnp.split(latents.astype(jnp.float32), len(names)), strict=True))
    if frames and "prompt" in names:
        image, prompt = (batch[name].astype(jnp.float32) for name in ("image", "prompt"))
        matched = jax.lax.stop_gradient(encode(batch["constants"], prompt, image)).astype(jnp.float32)
        second = (batch["pass_id"][:, None] == jnp.asarray(frames)[None]).any(axis=1)  # no gather: see `rows_of`
        found["prompt"] = jnp.where(second[:, None, None, None], matched, found["prompt"])
    return {name: value[..., :LATENT] if name == "target" else value for name, value in found.items()}


def measure_latent_norm(
    batches: LatentBatches,
    batch_size: int,
    latents: Callable[[Mapping[str, Any]], Any],
    rows: Sequence[str] = RELEASED,
) -> dict[str, Any]:
    """Per-pass, per-channel mean and standard deviation of target latents over the first 1,024 samples' valid cells.

    Passes without a sample keep shift 0 and scale 1. ``latents``: batch -> (target (B, h, w, 4), valid (B, h, w)).
    ``rows``: names of the passes.

    Returns:
        {"shift": [[4] * rows], "scale": [[4] * rows]}, JSON-able.
    """
    by_name = {one.name: one for one in ALL_PASSES}
    cells, total, square = np.zeros((len(rows), 1)), np.zeros((len(rows), LATENT)), np.zeros((len(rows), LATENT))
    for step in range(max(1, math.ceil(_NORM_SAMPLES / batch_size))):
        batch = batches.at(step)
        target, valid = (np.asarray(part) for part in latents(batch))
        for index, name in enumerate(rows):
            own = np.asarray(batch["pass_id"]) == by_name[name].id
            chosen = target[np.asarray(valid, bool) & own[:, None, None]]
            chosen = chosen.astype(np.float64)
            cells[index] += len(chosen)
            total[index] += chosen.sum(axis=0)
            square[index] += np.square(chosen).sum(axis=0)
    many = np.maximum(cells, 1)
    mean = total / many
    deviation = np.sqrt(np.maximum(square / many - np.square(mean), 0.0))
    scale = np.where(cells > 1, np.maximum(deviation, _SMALLEST_SCALE), 1.0)
    # rounded, so that the numbers in the model's config.json are the numbers that were trained with
    return {"shift": np.round(mean, 6).tolist(), "scale": np.round(scale, 6).tolist()}


def tasks_of(config: Config) -> list[str]:
    """The tasks of ``data.mixture`` (those of weight 0 left out), in the order of their passes."""
    names = {entry.task for entry in config.data.mixture.values() if entry.get("weight", 1.0) > 0}
    return sorted(names, key=lambda name: get_task(name).passes[0].id)


def conditioned(config: Config) -> bool:
    """Whether the tasks predict something of a picture. If not, the network is pre-trained on pictures alone."""
    return all(get_task(name).conditioned for name in tasks_of(config))


def passes_of(config: Config, dit: DiTConfig) -> tuple[str, ...]:
    """The passes that the model lists: the rows of its latent normalisation and of its table of labels."""
    needed = model_passes(tasks_of(config))
    return needed if not conditioned(config) else PERCEPTION[: max(len(needed), dit.task_labels)]


def rows_of(pass_id: jax.Array, names: Sequence[str]) -> jax.Array:
    """Stored ids of passes (B,) as rows among ``names``, int32 (B,).

    No table that is indexed: ids and rows are the same but for passes that came later, and then the program is, too.
    """
    row = pass_id.astype(jnp.int32)
    for one in ALL_PASSES:
        if one.name in names and names.index(one.name) != one.id:
            row = jnp.where(pass_id == one.id, names.index(one.name), row)
    return row


def diffusion_objective(
    config: Config,
    batches: LatentBatches | None = None,
    mesh: Any = None,
    resumed: Mapping[str, Any] | None = None,
    load: Callable[..., Autoencoder] | None = None,
) -> Objective:
    """The objective of a config with ``objective = "diffusion"`` or ``"one_step"``.

    Args:
        config: see ``configs/common.py``.
        mesh: the mesh that the step runs on, which models with experts need to know; None = one device.
        batches: batches to use in place of those that ``config.data`` describes.
        resumed: ``meta`` of a checkpoint that will be restored: then ``config.init`` is not opened, nor changed anew.
        load: (name, dtype=…) -> autoencoder, in place of ``load_autoencoder``; its parameters may be shapes.

    Raises:
        UserError: a field with an unknown value, or fields that contradict each other or the data.
    """
    dit = network_of(config)
    preset = get_diffusion(config.diffusion, **config.diffusion_changes.to_dict())
    options = TaskOptions.from_dict(config.task_options.to_dict())
    check_flow_frame(config.get("autoencoder", ""), options.flow_frame, "task_options.flow_frame=square")
    held_out = None
    if batches is not None:
        whole = batches
    else:
        from scaling_perception.data.pipeline import open_batches

        data = {**config.data.to_dict(), "resolution": config.resolution, "task_options": options.to_dict()}
        whole = open_batches(data, config.train.batch_size, config.seed)
        batches = own_share(whole, mesh, config.train.batch_size)
        held_out = held_out_batches(config, data, batches)
    moments, decode, constants, encoder_id = _autoencoder(config, batches, dit, load)
    encode = None if moments is None else _mean_of(moments)

    dit, table = prompt_table(config, dit, tasks_of(config))
    frozen = tuple(frozen_paths(dit))
    start, start_meta = starting_point(config, dit) if config.init and resumed is None else (None, {})
    check_latents(config, start_meta, encoder_id)
    if decode is not None and start_meta and not start_meta.get("tasks"):
        raise UserError(f"init {config.init} was trained for no task yet: fine-tune it first (objective=diffusion)")
    # what is measured must not depend on this process's share
    norm = (resumed or {}).get("latent_norm")
    norm = norm or _latent_norm(config, whole, encode, constants, start_meta, dit.conditions, passes_of(config, dit))
    mesh = mesh if mesh is not None and mesh.size > 1 else None
    stream = jnp.float32 if config.train.stream_dtype == "float32" else None
    model = DiT(dit, dtype=DTYPES[config.train.dtype], remat=config.train.remat, mesh=mesh, stream=stream)
    meta = {
        "format": 1,
        "model": dataclasses.asdict(dit),
        "resolution": config.resolution,
        "autoencoder": config.autoencoder,
        "autoencoder_id": encoder_id,
        "diffusion": dataclasses.asdict(preset),
        "tasks": tasks_of(config),
        "task_options": options.to_dict(),
        "passes": list(passes_of(config, dit)),
        "latent_norm": norm,
    }
    if table is not None:
        meta["task_prompts"] = {**config.task_prompts.to_dict(), "text_encoder": config.text_encoder}
    generation = not conditioned(config)
    if generation:  # a starting point, as an imported DiT is: no perception task
        meta |= {"tasks": [], "task_options": {}, "classes": pretrain.check_classes(dit, batches.class_count)}
    if start_meta.get("surgery"):
        meta["init"] = {"model": start_meta["model"]["name"], "steps": start_meta["surgery"]}
    elif resumed is not None and "init" in resumed:
        meta["init"] = resumed["init"]

    if decode is not None:
        meta["one_step"] = {"noise": config.noise}
        names = passes_of(config, dit)
        trained = {name: names.index(name) for name in pass_names(tasks_of(config))}
        given = one_step_inputs(config, dit, encode)
        parts = one_step.one_step_parts(model, preset, config, norm, given, decode, trained, mesh)
    elif generation:
        parts = pretrain.generation_parts(model, preset, config, norm, moments)
    else:
        parts = loss_parts(model, preset, config, norm, encode)
    names = getattr(batches, "class_names", None)

    def export(params: Any, path: str, info: Mapping[str, Any]) -> None:
        from scaling_perception.interop.model_folder import save_model
        from scaling_perception.interop.safetensors_io import cast, flatten_tree, unflatten_tree

        dtype = EXPORT_DTYPES[config.train.export_dtype]
        small = unflatten_tree({name: cast(name, leaf, dtype) for name, leaf in flatten_tree(params).items()})
        classes = {"class_names": names} if generation and names else {}
        save_model(path, small, {**meta, **classes, "training": dict(info)})
        if generation:
            pretrain.write_samples(str(Path(path) / "samples.png"), config, small, meta)

    return Objective(
        init=lambda key: with_table(init_params(dit, key), table),
        loss=parts.loss,
        parts=parts,
        batches=batches,
        export=export,
        samples_per_step=config.train.batch_size,
        constants=constants,
        model=dit,
        frozen=frozen,
        starting_params=None if start is None else with_table(start, table),
        meta=meta,
        held_out=held_out,
    )


def network_of(config: Config) -> DiTConfig:
    """The DiTConfig of a config, for its resolution.

    Raises:
        UserError: unknown preset or change, or a network that cannot serve the tasks of the mixture.
    """
    dit = at_resolution(get_preset(config.model, **config.model_changes.to_dict()), config.resolution)
    passes = pass_names(tasks_of(config))
    if not passes:
        raise UserError("data.mixture is empty: name at least one source and its task")
    names = ", ".join(tasks_of(config))
    if not conditioned(config):
        pretrain.check_generation(config, dit)
        return dit
    wanted = len(model_passes(tasks_of(config)))
    if len(passes) > 1 and not dit.task_labels:
        raise UserError(f"{len(passes)} passes ({names}) need labels: set model_changes.task_labels={wanted}")
    if 0 < dit.task_labels < wanted:
        raise UserError(f"model_changes.task_labels={dit.task_labels} is too few for {names}: set it to {wanted}")
    each = dit.condition_channels
    if dit.conditions not in (1, 2):
        raise UserError(
            f"model_changes.cond_channels is {dit.cond_channels}: use {each} (image) or {2 * each} (image and prompt)"
        )
    prompted = [name for name, task in TASKS.items() if task.prompt is not None]
    if dit.conditions == 1 and set(prompted) & set(tasks_of(config)):
        raise UserError(
            f"model_changes.cond_channels is {each}, without a prompt: {' and '.join(prompted)} need {2 * each}"
        )
    return dit


def _mean_of(moments: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, images, *first: moments(params, images, *first)[0]


def _autoencoder(
    config: Config, batches: LatentBatches, dit: DiTConfig, load: Callable[..., Autoencoder] | None = None
) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None, Any, str]:
    """((params, pixels) -> (mean, log-variance or None), decode, their params, the id) of what the loss needs.

    The first is None when batches are latents (that fit), the second but for ``one_step``; it decodes in
    ``train.dtype``. Without both there are no params, and the id is that of the latents or "".
    """
    from scaling_perception.models.autoencoders import load_autoencoder

    load, decode, constants = load or load_autoencoder, None, None
    if config.objective == "one_step":
        vae = load(config.autoencoder, dtype=config.train.dtype)
        decode, constants = vae.decode, {"decoder": vae.params["decoder"]}
    target = batches.at(0)["target"]
    if target.shape[-1] == 3:
        vae = load(config.autoencoder)
        _check_features(config, dit, vae.features, f"autoencoder {config.autoencoder}")
        return vae.encode, decode, vae.params, vae.id
    side = config.resolution // 8
    if target.shape[1:] != (side, side, LATENT):
        raise UserError(
            f"data.cache {config.data.cache} holds latents of {target.shape[1] * 8} pixels and resolution is "
            f"{config.resolution}: set resolution={target.shape[1] * 8} or prepare another cache"
        )
    if dit.conditions:
        _check_features(config, dit, batches.at(0)["image"].shape[-1] - LATENT, f"data.cache {config.data.cache}")
    made = ""
    for made in batches.autoencoders:
        if made != load(config.autoencoder).id:
            raise UserError(
                f"data.cache {config.data.cache} was encoded by autoencoder {made}, which is not "
                f"'{config.autoencoder}': set autoencoder to the one it was prepared with, or prepare another cache"
            )
    return None, decode, constants, made


def _check_features(config: Config, dit: DiTConfig, found: int, of: str) -> None:
    if not dit.conditions or found == dit.features:
        return
    if not found:
        cache = f"prepare it with --vae {config.autoencoder.partition('+')[0]}+{FEATURES}" if config.data.cache else ""
        mend = cache or f"set autoencoder={config.autoencoder}+{FEATURES}"
        raise UserError(
            f"{of} has no features beside its latents, and the network takes {dit.features}: {mend}, or start from a "
            "model without features"
        )
    raise UserError(
        f"{of} gives {found} features beside a latent, and the network takes {dit.features}: set "
        f"model_changes.features={found} and model_changes.cond_channels={dit.conditions * (LATENT + found)}, or "
        "choose another autoencoder"
    )


def _latent_norm(
    config: Config,
    batches: LatentBatches,
    encode: Callable[..., Any] | None,
    constants: Any,
    start: Mapping[str, Any],
    conditions: int,
    rows: Sequence[str],
) -> dict[str, Any]:
    known = start["latent_norm"] if start.get("tasks") and start.get("latent_norm") else {"shift": [], "scale": []}
    if len(known["shift"]) >= len(rows) or len(known["shift"]) == 1:
        return dict(known)  # weights expect the normalisation they were trained with
    if config.latent_norm == "none":
        return {"shift": [[0.0] * LATENT] * len(rows), "scale": [[1.0] * LATENT] * len(rows)}

    @jax.jit
    def encoded(fields: Mapping[str, Any]) -> Any:
        return latents_of(fields, encode, min(conditions, 1))[2:]

    def latents(batch: Mapping[str, Any]) -> Any:
        fields = {name: batch[name] for name in ("image", "target", "valid") if name in batch}
        return encoded({**fields, "constants": constants}) if encode else (batch["target"], batch["valid"])

    where = "" if encode is None else "; without data.cache they are read and encoded first"
    print(f"measuring the latents of {_NORM_SAMPLES} samples{where}", file=sys.stderr, flush=True)
    made = measure_latent_norm(batches, config.train.batch_size, latents, rows)
    return {name: [*known[name], *made[name][len(known[name]) :]] for name in ("shift", "scale")}
