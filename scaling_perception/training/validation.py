"""The loss of samples that are not trained on: the same ones, with the same noise and timesteps, each time.

``held_out`` says what they are, as ``data`` does for training, whose order they have no part in. Sample i of them draws
its noise from the run's key and i alone, so that the numbers of two steps, or of two runs of one seed, differ by the
weights and nothing else, and do not depend on mesh, processes or ``accumulate`` (but for rounding). Measured is the
running average, for that is what a checkpoint is kept for.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from scaling_perception.parallel.mesh import BATCH_AXES, batch_sharding, replicated
from scaling_perception.parallel.processes import own_places, put_batch
from scaling_perception.support.compiler_options import convolving
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.field_checks import HELD_OUT
from scaling_perception.support.places import split_places
from scaling_perception.training.checksums import is_off_device, on_device
from scaling_perception.training.objective import LatentBatches, Objective, own_share
from scaling_perception.training.streams import stream_key


def held_out_batches(config: Config, data: Mapping[str, Any], training: LatentBatches) -> LatentBatches | None:
    """The batches of ``config.held_out``, or None without ``train.validate_every``.

    Args:
        data: what ``training`` was opened with: see ``data.pipeline.open_batches``.

    Raises:
        UserError: nothing is held out, or it is trained on, or does not fit what is.
    """
    if not config.train.validate_every:
        return None
    from scaling_perception.data.contents import first_names
    from scaling_perception.data.overlap import shared_samples
    from scaling_perception.data.pipeline import open_batches

    own = config.held_out.to_dict()
    if not own["cache"] and not own["mixture"]:
        raise UserError(
            "train.validate_every is set and nothing is held out: set held_out.cache to latents that are not trained "
            "on, or held_out.mixture"
        )
    if not own.get("shared"):
        _refuse_shared(own, data)
    wanted = {**data, "cache": own["cache"], "mixture": own["mixture"], "flip": False, "augment": {}}
    if own["cache"] and not own["mixture"]:
        tasks = data["mixture"].items()  # which tasks, and how much each
        wanted["mixture"] = {name: {f: e[f] for f in ("task", "weight") if f in e} for name, e in tasks}
    held = open_batches(wanted, chunk_size(config), config.seed)
    both = [batches.at(0)["target"].shape[1:] for batches in (training, held)]
    if both[0] != both[1] or training.autoencoders != held.autoencoders:
        raise UserError(
            f"held_out has targets of shape {both[1]} and the training data of {both[0]}, or another autoencoder: "
            "prepare both alike"
        )
    names = [getattr(batches, "class_names", None) for batches in (training, held)]
    if all(names) and names[0] != names[1]:
        raise UserError(
            "held_out has other classes than the training data, or in another order: give both one labels.txt"
        )
    if found := shared_samples(held, training):
        told = f"held_out: {len(found)} of its samples are trained on as well ({first_names(found)})"
        if not own.get("shared"):
            raise UserError(
                f"{told}: hold out other ones (prepare --split, --start, --count), or set held_out.shared=true to "
                "measure the loss of these on purpose"
            )
        print(f"{told}, as held_out.shared allows", file=sys.stderr, flush=True)
    return held


def chunk_size(config: Config) -> int:
    """Samples that are measured at once: as many as are trained on at once, or all if they are fewer.

    Raises:
        UserError: it does not divide ``train.validate_samples``.
    """
    count, size = config.train.validate_samples, config.train.batch_size // config.train.accumulate
    size = min(count, size)
    if size < 1 or count % size:
        raise UserError(f"train.validate_samples is {count}: give a multiple of {max(size, 1)}, a part of a batch")
    return size


def make_validation(objective: Objective, config: Config, mesh: Mesh) -> Callable[[Any, Any, Any], dict[str, float]]:
    """validate(ema, key, constants) -> ``held_out_loss`` and the objective's other metrics, means over the samples.

    Every process must call it. What is not finite is left out.

    Raises:
        UserError: there are none, or they cannot be shared by the mesh.
    """
    held, size, count = objective.held_out, chunk_size(config), config.train.validate_samples
    if held is None:
        raise UserError(
            f"train.validate_every is {config.train.validate_every}: this objective holds nothing out; set 0"
        )
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if size % shares:
        raise UserError(f"train.validate_samples is {count}: give a multiple of {shares}, the devices that share them")
    split, held = batch_sharding(mesh), own_share(held, mesh, size)
    places = own_places(split, size).astype(np.int32)

    parts = objective.parts

    def measure(params: Any, batch: Any, key: jax.Array, constants: Any) -> dict[str, jax.Array]:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        fields = batch if constants is None else {**batch, "constants": constants}
        own_key = stream_key(key, "held_out")
        if parts is not None:
            return parts.tally(params, fields, own_key)
        loss, metrics = objective.loss(params, fields, own_key)
        return {**metrics, "loss": loss}

    def scored(tallies: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Of all chunks together: denominators are those of all samples, not of a chunk."""
        assert score is not None
        means = jax.tree.map(lambda *chunks: np.mean(np.stack(chunks), axis=0, dtype=np.float32), *tallies)
        loss, metrics = jax.device_get(score(means))
        values = {**metrics, "loss": loss}
        return {HELD_OUT + name: float(v) for name, v in values.items() if name != "weight" and math.isfinite(v)}

    score = jax.jit(lambda means: parts.score(means, count // size)) if parts is not None else None

    options = convolving(jax.default_backend())
    measured = jax.jit(measure, out_shardings=replicated(mesh), compiler_options=options)

    def validate(ema: Any, key: Any, constants: Any) -> dict[str, float]:
        ema = jax.tree.map(lambda leaf: on_device(leaf) if is_off_device(leaf) else leaf, ema)
        tallies: list[dict[str, np.ndarray]] = []
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for part in range(count // size):
            batch = dict(held.at(part))  # read anew: held in memory, pixels would fill it
            batch.pop("key", None)
            batch["index"] = part * size + places
            found = jax.device_get(measured(ema, put_batch(batch, split, size), key, constants))
            if parts is not None:
                tallies.append(found)
                continue
            weight = float(found.pop("weight", 1.0))
            for name, value in found.items():
                if math.isfinite(value):
                    sums[name] = sums.get(name, 0.0) + weight * float(value)
                    weights[name] = weights.get(name, 0.0) + weight
        if tallies:
            return scored(tallies)
        return {HELD_OUT + name: value / weights[name] for name, value in sums.items() if weights[name]}

    return validate


def check_metric(name: str, metrics: Sequence[str], train: Config) -> None:
    """Refuse a ``train.best_metric`` that no step has.

    Raises:
        UserError: telling the nearest of ``metrics``.
    """
    known = [*metrics, *(HELD_OUT + one for one in metrics if train.validate_every)]
    if train.keep_best and name not in known:
        raise UserError(f"train.best_metric: this run has no metric '{name}'{did_you_mean(name, known)}")


def _refuse_shared(own: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Samples that are trained on say nothing of those that are not."""
    caches = [{os.path.realpath(path) for path in split_places(one["cache"]) if path} for one in (own, data)]
    if caches[0] & caches[1]:
        raise UserError(f"held_out.cache {own['cache']} is trained on: prepare another part of the data for it")
    if own["cache"] or data["cache"]:
        return
    for name, entry in own["mixture"].items():
        for other, trained in data["mixture"].items():
            same = all(entry.get(field, "") == trained.get(field, "") for field in ("source", "root"))
            if same and entry.get("split", "train") == trained.get("split", "train") and _overlap(entry, trained):
                raise UserError(
                    f"held_out.mixture.{name} holds samples of data.mixture.{other}: give another split, start or count"
                )


def _overlap(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    ranges = []
    for entry in (one, two):
        start, count = entry.get("start", 0), entry.get("count", 0)
        ranges.append((start, start + count if count else math.inf))
    return ranges[0][0] < ranges[1][1] and ranges[1][0] < ranges[0][1]
