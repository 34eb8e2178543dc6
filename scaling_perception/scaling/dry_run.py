"""What a training run will take, before anything is made: parameters, MACs, memory of a device, data, chip-hours.

Everything is computed from shapes: no array is made, no device, dataset or autoencoder is needed.

Activations are an estimate, within a factor of 2 of what a compiler takes (``compile`` asks it). With B samples on a
device at a time, T tokens, width D, MLP width F, K active experts, S the shared expert's width over D, m 2 for SwiGLU
and else 1, in units of B T D numbers:

    kept for the backward pass, in the compute dtype, each layer: 1 with remat, else
        7 + F/D dense, 7 + m R F/D + (2 S + 1 with a shared expert) with experts; 2 more with bfloat16 and a stream of
        float32 (1 with remat, of which only the tokens between blocks are kept)
    at work in one layer, float32: 16 + 4 F/D dense, 16 + (2 + 2 m) K F/D + 4 K + 6 S with experts
    attention scores of one layer, float32: 3 B heads T^2, where no fused kernel is at hand

R is the rows of experts that a device keeps room for, in units of its own tokens: K where experts are not split, and
e min(K, E/e) where an axis ``expert`` of e devices shares E experts. Each device then holds the tokens of all e, any of
which may choose its E/e experts, and shapes are fixed: there is room for all of them. Where rows are exchanged (on TPUs
and GPUs) R is ``ROOM`` K at the most, and R + K are kept besides.

and besides, of one layer, its weights in the compute dtype, gathered over fsdp, and their gradient in float32.

Where pictures are encoded in the step, the autoencoder's widest layer holds three times its output; it is done before
the network begins, so the larger of the two counts. What a ``tensor`` axis saves of activations is left out.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from scaling_perception.data.sources.published import PUBLISHED
from scaling_perception.models.compute import TRAINING_FACTOR, forward_macs
from scaling_perception.models.dit import (
    DiTConfig,
    count_active_params,
    count_params,
    frozen_paths,
    init_params,
)
from scaling_perception.models.exchange import ROOM
from scaling_perception.models.presets import LATENT_FACTOR
from scaling_perception.parallel.mesh import AXES, BATCH_AXES
from scaling_perception.parallel.rules import gathered_place, tree_shardings
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError
from scaling_perception.support.field_checks import check_config
from scaling_perception.support.places import split_places
from scaling_perception.support.remote import local
from scaling_perception.tasks import fields_of, get_task
from scaling_perception.training.averaging import left_of_start, start_warning
from scaling_perception.training.diffusion import network_of, tasks_of
from scaling_perception.training.one_step import AT_ONCE
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.state import abstract_state, named_leaves
from scaling_perception.training.step import gather_dtype, sums_own

# bfloat16 TFLOP/s of dense matmuls and GB of memory of one chip (makers' figures)
CHIPS = {"v5e": (197, 16), "v5p": (459, 95), "v6e": (918, 32), "h100": (989, 80), "h200": (989, 141)}
MFU = 0.4  # share of the peak that useful FLOPs reach
# training samples of published datasets (facts 5, 8; ImageNet-1K's own count)
LENGTHS = {name: counts["train"] for name, counts in PUBLISHED.items() if "train" in counts}

_NETWORK = ("activations_kept", "activations_at_work", "attention_scores", "layer_weights")
_ENCODING = "autoencoder_activations"
_DECODING = "decoder_activations"
DECODINGS = 3  # of a predicted picture by `one_step`: forward, again in the backward pass, and back to its latent
_ITEM = {"float32": 4, "bfloat16": 2}


def describe_run(
    config: Config, devices: int | None = None, mfu: float = MFU, exchanged: bool = False
) -> dict[str, Any]:
    """The numbers of a run of ``objective = "diffusion"``, JSON-able.

    ``model`` parameters and sizes; ``compute`` MACs (multiply-accumulates of the forward pass, the paper's count) and
    FLOPs (2 a MAC, times 3 with the backward pass) of a sample, a step and the run; ``memory`` bytes on each device, by
    kind; ``data`` samples and epochs; ``time`` chip-hours by chip at ``mfu``.

    Args:
        devices: how many there will be; None = what ``config.mesh`` says, or of an axis of -1 as many as fit this
            machine's.
        exchanged: devices that share experts receive the rows that they need, as TPUs and GPUs do, and not all tokens.

    Raises:
        UserError: a field is wrong, or the batch does not divide over the devices.
    """
    check_config(config)
    if config.objective == "autoencoder":
        raise UserError(f"objective is '{config.objective}': a dry run is known for diffusion models")
    dit = network_of(config)
    batch, steps = int(config.train.batch_size), int(config.train.steps)
    macs, encoding = forward_macs(dit), encoding_macs(config)
    samples = batch * steps
    useful = 2 * TRAINING_FACTOR * macs
    memory = _memory(config, dit, devices, exchanged)
    return {
        "model": {
            "name": dit.name,
            "params": count_params(dit),
            "active_params": count_active_params(dit),
            "layers": dit.depth,
            "dim": dit.dim,
            "heads": dit.heads,
            "experts": dit.experts,
            "active_experts": dit.active_experts if dit.experts else 0,
            "resolution": int(config.resolution),
            "tokens": dit.tokens,
            "input_channels": dit.input_channels,
            "tasks": tasks_of(config),
        },
        "compute": {
            "macs_per_forward": macs,
            "training_factor": TRAINING_FACTOR,
            "flops_per_sample": useful,
            "flops_per_step": useful * batch,
            "macs_of_run": macs * samples,
            "macs_of_run_with_backward": TRAINING_FACTOR * macs * samples,
            "flops_of_run": useful * samples,
            "autoencoder_macs_per_sample": encoding,
        },
        "memory": memory,
        "data": _data(config, samples),
        "time": _time(useful * samples, 2 * encoding * samples, memory, mfu),
        "run": {
            "objective": config.objective,
            "steps": steps,
            "batch_size": batch,
            "accumulate": int(config.train.get("accumulate", 1)),
        }
        | {"left_of_start": left_of_start(config.optim, steps), "warning": start_warning(config.optim, steps)},
    }


def _mesh_sizes(config: Config, devices: int | None) -> dict[str, int]:
    sizes = {name: int(config.mesh.get(name, 1)) for name in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {sizes}: give sizes of 1 or more, and -1 (what is left) at most once")
    if free:
        count = devices or (jax.device_count() if jax.device_count() % fixed == 0 else fixed)
        sizes[free[0]] = max(count // fixed, 1)
    if devices and math.prod(sizes.values()) != devices:
        raise UserError(f"mesh {sizes} does not fit {devices} devices: the sizes must multiply to that number")
    return sizes


def _memory(config: Config, dit: DiTConfig, devices: int | None, exchanged: bool) -> dict[str, Any]:
    """Bytes on one device, by kind."""
    sizes = _mesh_sizes(config, devices)
    count, shares = math.prod(sizes.values()), math.prod(sizes[axis] for axis in BATCH_AXES)
    accumulate = int(config.train.get("accumulate", 1))
    if config.train.batch_size % (shares * accumulate):
        raise UserError(
            f"train.batch_size is {config.train.batch_size}: give a multiple of {shares * accumulate}, the devices "
            "that share it times train.accumulate"
        )
    mesh = _abstract_mesh(sizes)
    tx, _ = make_optimizer(config.optim, config.train.steps, frozen_paths(dit))
    state = abstract_state(lambda key: init_params(dit, key), tx)
    placed = tree_shardings(state, mesh)
    sums = {name: _bytes(getattr(state, name), getattr(placed, name)) for name in ("params", "opt_state", "ema")}
    sums["ema"] = sums["ema"] * _ITEM[config.optim.ema_dtype] // 4 if config.optim.ema_place == "device" else 0
    gradients = sums["params"]
    if accumulate > 1 and shares > 1 and sums_own(dit):  # the sum, that of one part, and what is left when reduced
        own = _abstract_mesh({axis: sizes[axis] if axis == "tensor" else 1 for axis in AXES})
        gradients += 2 * _bytes(state.params, tree_shardings(state.params, own))
    elif accumulate > 1:
        gradients *= 2  # the sum, and that of one part
    local = config.train.batch_size // shares  # samples of a step
    part = local // accumulate  # at a time
    kinds = {
        "params": sums["params"],
        "gradients": gradients,
        "optimizer": sums["opt_state"],
        "ema": sums["ema"],
        "batch": 2 * local * _sample_bytes(config, dit),  # this step's, and the next one's on its way
        **_activations(config, dit, part, sizes["expert"], sizes["tensor"], exchanged),
        "layer_weights": _gathered_bytes(config, dit, state.params, placed.params, sizes),
        **_autoencoder(config, dit, part),
    }
    return {
        "mesh": sizes,
        "devices": count,
        "samples_per_device": part,
        "dtype": config.train.dtype,
        "bytes": kinds,
        "total": sum(kinds.values()) - min(sum(kinds[name] for name in _NETWORK), kinds.get(_ENCODING, 0)),
        "estimated": [name for name in (*_NETWORK, _ENCODING, _DECODING) if name in kinds],
    }


def _abstract_mesh(sizes: Mapping[str, int]) -> Any:
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _gathered_bytes(config: Config, dit: DiTConfig, params: Any, places: Any, sizes: Mapping[str, int]) -> int:
    """Of one layer's weights, or of all where they are gathered once a step."""
    dtype = gather_dtype(config.train)
    if dtype is None:
        return _layer_bytes(config, params["blocks"], sizes) // dit.depth
    total, leaves = 0, named_leaves(params)
    for name, place in named_leaves(places).items():
        there, kind = gathered_place(name, place, dtype, config.train.accumulate > 1)
        if there is not None:
            total += math.prod(there.shard_shape(leaves[name].shape)) * (kind or leaves[name].dtype).itemsize
    return total


def _layer_bytes(config: Config, blocks: Any, sizes: Mapping[str, int]) -> int:
    """Of all layers; a device has one of them whole at a time, but for its share of experts and wide matrices."""
    placed = tree_shardings({"blocks": blocks}, _abstract_mesh({**sizes, "fsdp": 1}))
    return _bytes({"blocks": blocks}, placed) * (_ITEM[config.train.dtype] + 4) // 4


def _bytes(tree: Any, placed: Any) -> int:
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in leaves)


def _activations(
    config: Config, dit: DiTConfig, samples: int, split: int, tensor: int, exchanged: bool
) -> dict[str, int]:
    """``split``: devices that share the experts; ``tensor``: those that share heads and hidden units of each layer."""
    unit, ratio = samples * dit.tokens * dit.dim, dit.hidden / dit.dim
    own = 1 / tensor if dit.heads % tensor == 0 else 1  # of queries, keys, values and what attention makes of them
    kept, working = 3 + 4 * own + ratio / tensor, 16 + 4 * ratio / tensor
    if dit.experts:
        matrices, chosen = (2 if dit.expert_mlp == "swiglu" else 1), dit.active_experts
        shares, sent = split > 1 and dit.experts % split == 0, 0.0
        room = split * min(chosen, dit.experts // split) if shares else chosen
        if shares and exchanged:
            room = min(ROOM * chosen, room)
            sent = room + chosen  # rows that came, and results that came back
        shared = (2 * dit.shared_experts / tensor + 1) if dit.shared_experts else 0
        kept = 3 + 4 * own + matrices * room * ratio / tensor + sent + shared
        working = 16 + (2 + 2 * matrices) * chosen * ratio / tensor + 4 * chosen + 6 * dit.shared_experts / tensor
        if config.train.remat:  # made again, of one layer
            working += matrices * (room - chosen) * ratio / tensor * _ITEM[config.train.dtype] / 4
    kept = 1 if config.train.remat else kept
    if config.train.stream_dtype == "float32":  # the tokens, and those between attention and MLP
        kept += (1 if config.train.remat else 2) * (4 / _ITEM[config.train.dtype] - 1)
    return {
        "activations_kept": round(dit.depth * kept * unit * _ITEM[config.train.dtype]),
        "activations_at_work": round(working * unit * 4),
        "attention_scores": round(3 * samples * dit.heads * own * dit.tokens**2 * 4),
    }


def _pictures(config: Config, dit: DiTConfig) -> int:
    """Pictures of a sample that the loss encodes or reads."""
    return 1 + dit.conditions


def _sample_bytes(config: Config, dit: DiTConfig) -> int:
    held = len(fields_of(tasks_of(config)[0]))
    if config.data.cache:
        return held * dit.input_size**2 * dit.in_channels * 4 + dit.input_size**2
    return held * config.resolution**2 * 3 * 4 + config.resolution**2


def encoder_family(config: Config) -> tuple[Any, Any]:
    """(module, config) of the autoencoder's kind, by its name alone: the shipped one, or Stable Diffusion's."""
    from scaling_perception.models import tiny_vae, vae

    return (tiny_vae, tiny_vae.SMALL) if config.autoencoder == "tiny" else (vae, vae.VAEConfig())


def encoding_macs(config: Config) -> int:
    """MACs of one sample in the autoencoder: encoding its pictures (0 with a cache), decoding for ``one_step``."""
    family, sizes = encoder_family(config)

    def macs(part: str) -> int:
        return family.macs(part, sizes, config.resolution, config.resolution)

    one_step, cached = config.objective == "one_step", bool(config.data.cache)
    pictures = 0 if cached else _pictures(config, network_of(config)) - one_step
    return pictures * macs("encoder") + one_step * (DECODINGS + cached) * macs("decoder")


def _autoencoder(config: Config, dit: DiTConfig, samples: int) -> dict[str, int]:
    """Weights, whole on each device, and the widest layer's input, output and normalised input."""
    if config.data.cache and config.objective != "one_step":
        return {}
    family, sizes = encoder_family(config)
    weights = sum(4 * math.prod(s) for part in ("encoder", "decoder") for s in family.part_shapes(part, sizes).values())
    if config.objective == "one_step":  # at work in one turn, besides the network's activations
        return {"autoencoder": weights, _DECODING: _decoding_bytes(config, sizes, samples)}
    widest = sizes.block_out_channels[0] if hasattr(sizes, "block_out_channels") else sizes.encoder_widths[0]
    pixels = config.resolution**2 // getattr(sizes, "patch", 1) ** 2
    shown = samples * _pictures(config, dit)
    return {"autoencoder": weights, _ENCODING: 3 * shown * pixels * widest * 4}


def _decoding_bytes(config: Config, sizes: Any, samples: int) -> int:
    """What the decoder keeps of the rows of one turn, whose widest maps are at full size: some 20 of them."""
    widths = sizes.block_out_channels if hasattr(sizes, "block_out_channels") else sizes.decoder_widths[::-1]
    pixels = config.resolution**2 // getattr(sizes, "patch", 1) ** 2
    latents = (config.resolution // LATENT_FACTOR) ** 2
    rows = max(1, min(samples, AT_ONCE // latents))
    return 20 * rows * pixels * widths[0] * _ITEM[config.train.dtype]


def _data(config: Config, samples: int) -> dict[str, Any]:
    entries = {name: entry for name, entry in config.data.mixture.items() if entry.get("weight", 1.0) > 0}
    total = sum(entry.get("weight", 1.0) for entry in entries.values())
    sources = []
    for name, entry in entries.items():
        length, told_by = _length(config, name, entry)
        share, passes = entry.get("weight", 1.0) / total, len(get_task(entry.task).passes)
        drawn = samples * share
        row = {"name": name, "task": entry.task, "source": "cache" if config.data.cache else entry.get("source", "")}
        row |= {"samples": round(drawn), "length": length, "length_from": told_by}
        # of a raw sample each pass is a sample
        sources.append({**row, "epochs": round(drawn / length / passes, 2) if length else None})
    return {"samples": samples, "sources": sources}


def _length(config: Config, field: str, entry: Mapping[str, Any]) -> tuple[int | None, str]:
    """(raw samples of an entry, how that is known), (None, "unknown") where it is not."""
    if config.data.cache:
        held, told_by = _cached_length(config, field, entry["task"])
        return (entry["count"], "data.mixture") if entry.get("count") else (held, told_by)
    count, root, name = entry.get("count", 0), entry.get("root", ""), entry.get("source", "")
    if count:
        return int(count), "data.mixture"
    if root and Path(root).is_dir():
        from scaling_perception.data.selection import open_subset

        try:
            return len(open_subset(name, root, entry.get("split", "train"), entry["task"])[1]), "files"
        except UserError:
            pass
    return (LENGTHS[name], "published") if name in LENGTHS else (None, "unknown")


def _cached_length(config: Config, field: str, task: str) -> tuple[int | None, str]:
    from scaling_perception.data.latents import read_ledger
    from scaling_perception.data.selection import refuse_absent

    found, known = 0, 0
    for path in split_places(str(config.data.cache)):
        try:
            shards = read_ledger(Path(local(path)))["shards"]
        except UserError:
            return None, "unknown"
        known += len(shards)
        found += sum(shard["passes"].get(get_task(task).passes[0].name, 0) for shard in shards)
    if known and not found:
        refuse_absent(f"data.mixture.{field}", task, f"the cache {config.data.cache}")
    return found or None, "ledger"


def _time(flops: float, encoding: float, memory: Mapping[str, Any], mfu: float) -> dict[str, Any]:
    if not 0 < mfu <= 1:
        raise UserError(f"MFU {mfu}: give a share above 0, up to 1")
    chips = {}
    for name, (peak, gigabytes) in CHIPS.items():
        rate = peak * 1e12 * mfu * 3600
        hours = flops / rate
        chips[name] = {
            "peak_tflops": peak,
            "memory_gb": gigabytes,
            "chip_hours": hours,
            "encoding_chip_hours": encoding / rate,
            "days": (hours + encoding / rate) / memory["devices"] / 24,
            "fits": memory["total"] < 0.95 * gigabytes * 1e9,
        }
    return {"mfu": mfu, "chips": chips}


def run_text(told: Mapping[str, Any]) -> str:
    """What `describe_run` found, as lines to read."""
    model, compute, memory, run = (told[name] for name in ("model", "compute", "memory", "run"))
    experts = f", {model['active_experts']} of {model['experts']} experts" if model["experts"] else ""
    active = f", {model['active_params']:,} of them active" if experts else ""
    sizes = f"{model['layers']} layers, width {model['dim']}, {model['heads']} heads{experts}"
    parts = f" in {run['accumulate']} parts" if run["accumulate"] > 1 else ""
    forward, step = compute["macs_per_forward"], compute["flops_per_step"]
    whole = f"{compute['macs_of_run_with_backward']:.3g} with the backward pass (x {compute['training_factor']})"
    lines = [
        f"model     {model['name']} for {', '.join(model['tasks'])}: {model['params']:,} parameters{active} ({sizes})",
        f"input     {model['resolution']} pixels, {model['tokens']} tokens, {model['input_channels']} channels",
        f"run       {run['steps']:,} steps of {run['batch_size']:,}{parts}",
        f"MACs      {forward:.4g} a forward pass of a sample; {compute['macs_of_run']:.3g} of the run, {whole}",
        f"FLOPs     {step:.4g} a step, {compute['flops_of_run']:.3g} of the run: 2 a MAC, both passes",
    ]
    average = f"average   {run['left_of_start']:.2g} of the starting weights is left in the exported average"
    lines.append(f"warning   {run['warning']}" if run["warning"] else average)
    if encoding := compute["autoencoder_macs_per_sample"]:
        share = encoding / compute["training_factor"] / forward
        more = f"adds {encoding:.3g} MACs a sample ({share:.0%})"
        if run["objective"] == "one_step":
            lines.append(f"          the autoencoder in each step {more}")
        else:
            lines.append(f"          encoding pictures in each step {more}: `prepare --latents` does it once")
    mesh = " x ".join(f"{name} {size}" for name, size in memory["mesh"].items() if size > 1) or "whole"
    each = f"{memory['samples_per_device']} samples at a time, {memory['dtype']}"
    lines.append(f"memory    of each of {memory['devices']} device(s) ({mesh}), {each}:")
    for name, size in memory["bytes"].items():
        note = "  (estimated)" if name in memory["estimated"] else ""
        lines.append(f"          {size / 1e9:9.3f} GB  {name.replace('_', ' ')}{note}")
    lines.append(f"          {memory['total'] / 1e9:9.3f} GB  at the most")
    for row in told["data"]["sources"]:
        known = f"{row['length']:,} ({row['length_from']}), {row['epochs']:g} epochs" if row["length"] else "unknown"
        lines.append(f"data      {row['name']}: {row['samples']:,} draws from {row['source']}, whose length is {known}")
    lines.append(f"time      at {told['time']['mfu']:.0%} of the peak in bfloat16:")
    for name, chip in told["time"]["chips"].items():
        more = f" + {chip['encoding_chip_hours']:.4g} for encoding" if chip["encoding_chip_hours"] else ""
        days = f"{chip['days']:.3g} days on {memory['devices']}"
        fits = "" if chip["fits"] else f"; more than its {chip['memory_gb']} GB"
        lines.append(f"          {name:5} {chip['chip_hours']:9.4g} chip-hours{more}, {days}{fits}")
    return "\n".join(lines)


def print_run(told: Mapping[str, Any]) -> None:
    """Print what `describe_run` found."""
    print(run_text(told))
