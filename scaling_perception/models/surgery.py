"""Changing a trained DiT's shape: more input channels, task labels, a patch embedding per task, experts.

How a class-conditional DiT becomes a perception model, and a dense one a mixture of experts (paper sections 3 and 4.3,
facts 2 and 3.2). Functions take (params, config) and return both anew; nothing is changed in place. Leaves may be numpy
or JAX arrays; those that change come back as numpy arrays of the same dtype, and copies of one and the same array as
read-only views that take no memory. ``adapt`` puts them together.

Words: B batch, T tasks, C classes, D width, E experts, F hidden width, L layers, p patch size.
"""

import dataclasses
import operator
from typing import Any

import jax
import numpy as np

from scaling_perception.models.config import DiTConfig
from scaling_perception.models.dit import Params, position_table
from scaling_perception.models.presets import LATENT_FACTOR, at_resolution, get_preset, preset_names
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.shapes import AnyArray, Float

GAINS = ("exact", "released")
_SIZES = ("dim", "depth", "heads", "mlp_ratio", "patch_size", "in_channels")  # that no surgery changes
_RELEASED_GAIN = {2: 0.5, 3: 0.33}  # literally so in the authors' code: three copies together give 0.99 (facts 2)


def widen_input(
    params: Params, config: DiTConfig, cond_channels: int, gain: str = "exact", features: int = 0
) -> tuple[Params, DiTConfig]:
    """Room for ``cond_channels`` condition channels before the noisy latent: [image, prompt, noisy].

    The patch kernel (..., p, p, channels, D) is repeated n times along its input channels and divided by n (``exact``)
    or multiplied by the released code's 0.5 for two copies and 0.33 for three (``released``); the bias stays. An input
    of n equal latents then gives what one of them gave. ``features`` further channels after each condition's latent
    start at zero.

    Raises:
        UserError: the model has conditions already, the channels are no whole number of latents, or an unknown gain.
    """
    if config.cond_channels:
        raise UserError(
            f"model {config.name} has cond_channels={config.cond_channels}: its input is widened from 0 alone; start "
            "from a model without conditions"
        )
    each = config.in_channels + features
    if cond_channels < 1 or cond_channels % each:
        raise UserError(f"cond_channels={cond_channels}: give a multiple of {each}, the channels of a condition")
    copies = cond_channels // each + 1
    if gain not in GAINS:
        raise UserError(f"gain of the widened input is '{gain}'{did_you_mean(gain, GAINS)}")
    if gain == "released" and copies not in _RELEASED_GAIN:
        raise UserError(f"gain 'released' is known for 4 and 8 condition channels, not {cond_channels}: use 'exact'")
    kernel = np.asarray(params["patch_embed"]["kernel"])
    own = kernel.astype(np.float32) / copies if gain == "exact" else kernel.astype(np.float32) * _RELEASED_GAIN[copies]
    nothing = np.zeros((*own.shape[:-2], features, own.shape[-1]), np.float32)
    wide = np.concatenate([own, nothing] * (copies - 1) + [own], axis=-2)
    patch = {**params["patch_embed"], "kernel": wide.astype(kernel.dtype)}
    return {**params, "patch_embed": patch}, dataclasses.replace(config, cond_channels=cond_channels, features=features)


def extend_labels(params: Params, config: DiTConfig, task_labels: int = 4) -> tuple[Params, DiTConfig]:
    """A label for each task: the table (C + 1, D) becomes (C + T + 1, D), rows classes, tasks, null.

    Task j starts as the mean of the j-th of T groups of classes, equal in size where T divides C (of 1000 classes
    [0:250), [250:500), ...: facts 2); where a group is empty, as the null row. The null row stays last.

    Raises:
        UserError: the model has task labels already, or ``task_labels`` is below 1.
    """
    if config.task_labels:
        raise UserError(
            f"model {config.name} has task_labels={config.task_labels}: start from a model without, or keep them"
        )
    if task_labels < 1:
        raise UserError(f"task_labels={task_labels}: give a whole number of 1 or more")
    table = np.asarray(params["label_embed"])
    bounds = [config.num_classes * j // task_labels for j in range(task_labels + 1)]
    groups = [table[a:b] if b > a else table[-1:] for a, b in zip(bounds, bounds[1:], strict=False)]
    tasks = np.stack([group.astype(np.float64).mean(axis=0) for group in groups]).astype(table.dtype)
    params = {**params, "label_embed": np.concatenate([table[:-1], tasks, table[-1:]])}
    if config.context_dim:  # its one row served every sample
        rows = np.asarray(params["context"]["table"])
        params["context"] = {**params["context"], "table": np.broadcast_to(rows, (task_labels, rows.shape[1]))}
    return params, dataclasses.replace(config, task_labels=task_labels)


def drop_classes(params: Params, config: DiTConfig) -> tuple[Params, DiTConfig]:
    """The label table without its class rows, (T + 1, D): enough for a model that is fed tasks or the null label.

    Not needed for fine-tuning (rows that nobody asks for cost next to nothing), but models without classes have none.
    """
    table = np.asarray(params["label_embed"])[config.num_classes :]
    return {**params, "label_embed": table}, dataclasses.replace(config, num_classes=0)


def split_patch_embed(params: Params, config: DiTConfig) -> tuple[Params, DiTConfig]:
    """One patch embedding for each task label, all equal at first (PatchEmbedRouter, facts 2).

    Raises:
        UserError: the model is routed already, or has no task labels.
    """
    if config.routed:
        raise UserError(f"model {config.name} is routed=True: it has a patch embedding for each task already")
    new = dataclasses.replace(config, routed=True)  # refuses a model without task labels
    patch = jax.tree.map(lambda leaf: _copies(np.asarray(leaf)[None], config.task_labels, 0), params["patch_embed"])
    return {**params, "patch_embed": patch}, new


def change_resolution(params: Params, config: DiTConfig, pixels: int) -> tuple[Params, DiTConfig]:
    """The model for square pictures of ``pixels`` on a side: its position table made anew (facts 1.1).

    Raises:
        UserError: ``pixels`` is no whole number of patches.
    """
    new = at_resolution(config, pixels)
    return {**params, "pos_embed": position_table(new.dim, new.grid)}, new


def drop_variance(params: Params, config: DiTConfig) -> tuple[Params, DiTConfig]:
    """The model without the output channels of the learned variance; the others stay as they are.

    Raises:
        UserError: it has none.
    """
    if not config.learn_sigma:
        raise UserError(f"model {config.name} has learn_sigma=False: there is no variance to drop")
    new = dataclasses.replace(config, learn_sigma=False)

    def kept(leaf: Any) -> np.ndarray:  # (..., p * p * channels), channels fastest
        leaf = np.asarray(leaf)
        pixels = leaf.reshape(*leaf.shape[:-1], config.patch_size**2, config.out_channels)
        return pixels[..., : new.out_channels].reshape(*leaf.shape[:-1], -1)

    final = {**params["final"], "linear": jax.tree.map(kept, params["final"]["linear"])}
    return {**params, "final": final}, new


def add_context(
    params: Params, config: DiTConfig, context_dim: int, table: Float[AnyArray, "..."] | None = None
) -> tuple[Params, DiTConfig]:
    """A fixed embedding of the task beside the label (facts 5.3), which says nothing before its projection has learned.

    Args:
        table: (max(T, 1), context_dim) embeddings; None = zeros, to be filled by the caller.

    Raises:
        UserError: the model has a context already, or the table has another shape.
    """
    if config.context_dim:
        raise UserError(f"model {config.name} has context_dim={config.context_dim} already: keep it")
    new = dataclasses.replace(config, context_dim=context_dim)
    shape = (max(config.task_labels, 1), context_dim)
    rows = np.zeros(shape, np.float32) if table is None else np.asarray(table, np.float32)
    if rows.shape != shape or not context_dim:
        raise UserError(f"context table {rows.shape}: model {config.name} needs {shape}, a row for each task")
    return {**params, "context": {"table": rows, "kernel": np.zeros((context_dim, config.dim), np.float32)}}, new


def upcycle(
    params: Params,
    config: DiTConfig,
    experts: int,
    active: int,
    gating: str = "renormalised",
    noise: float = 0.0,
    drop: float = 0.0,
    key: jax.Array | None = None,
) -> tuple[Params, DiTConfig]:
    """A dense model's MLPs copied to ``experts`` experts, of which each token meets ``active`` (facts 3.2).

    The router is drawn U(-1/sqrt(D), 1/sqrt(D)) in float32; there is no shared expert. With ``renormalised`` gating the
    model computes what it did before. With the paper's, the weights of the chosen experts sum to S < 1 and every MLP's
    output shrinks by it: S is about 0.43 for 2 of 8, 0.27 for 2 of 16, 0.68 for 2 of 4, and 1 only when all are active.

    Equal experts stay equal until the balance loss has moved the router, so there are two ways to make them differ from
    the start, at the price of exactness:

    Args:
        noise: each expert's kernels get Gaussian noise of ``noise`` times the kernel's standard deviation.
        drop: share of the hidden units, other ones in each expert, that are drawn anew from a normal distribution with
            the mean and deviation of the layer's originals: columns of fc1, entries of its bias, rows of fc2 (after
            Drop-Upcycling, Nakamura et al. 2025).
        key: of the router, the noise and the drawing; None = ``jax.random.key(0)``.

    Raises:
        UserError: the model has experts already, or a number is out of range.
    """
    if config.experts:
        raise UserError(f"model {config.name} has experts={config.experts} already: upcycle a dense model")
    if experts < 1:
        raise UserError(f"experts={experts}: give a whole number of 1 or more")
    if not 0.0 <= noise < np.inf:
        raise UserError(f"upcycle.noise is {noise}: give 0 or more (0.01 = one hundredth of a kernel's deviation)")
    if not 0.0 <= drop <= 1.0:
        raise UserError(f"upcycle.drop is {drop}: give a share from 0 to 1")
    name = f"{config.name}-{experts}E{active}A"
    fields = {"expert_mlp": "gelu", "shared_experts": 0, "gating": gating}
    new = dataclasses.replace(config, name=name, experts=experts, active_experts=active, **fields)

    words = np.asarray(jax.random.key_data(jax.random.key(0) if key is None else key)).ravel()
    # numpy's own generator fills one expert at a time; a stream for each purpose: noise does not change the router
    for_router, for_noise, for_drop = np.random.default_rng(words.tolist()).spawn(3)
    bound = config.dim**-0.5
    router = for_router.uniform(-bound, bound, (config.depth, config.dim, experts)).astype(np.float32)
    dense = jax.tree.map(np.asarray, params["blocks"]["mlp"])
    copied = jax.tree.map(lambda leaf: _copies(leaf[:, None], experts, 1), dense)
    if noise:
        for layer in ("fc1", "fc2"):
            copied[layer]["kernel"] = _noisy(copied[layer]["kernel"], noise, for_noise)
    if drop:
        copied = _redrawn(dense, copied, round(drop * config.hidden), for_drop)
    blocks = {name: branch for name, branch in params["blocks"].items() if name != "mlp"}
    blocks["moe"] = {"router": {"kernel": router}, "experts": copied}
    return {**params, "blocks": blocks}, new


def _copies(leaf: np.ndarray, count: int, axis: int) -> np.ndarray:
    """``leaf``, of length 1 along ``axis``, seen ``count`` times along it."""
    return np.broadcast_to(leaf, (*leaf.shape[:axis], count, *leaf.shape[axis + 1 :]))


def _noisy(kernels: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Equal kernels (L, E, in, out), each with noise of its own."""
    out = np.empty_like(kernels, subok=False, order="C")
    for layer in range(kernels.shape[0]):
        kernel = np.asarray(kernels[layer, 0], np.float32)
        scale = np.float32(noise * kernel.std())
        for expert in range(kernels.shape[1]):
            drawn = rng.standard_normal(kernel.shape, np.float32)
            drawn *= scale
            drawn += kernel
            out[layer, expert] = drawn
    return out


def _redrawn(dense: Params, copied: Params, units: int, rng: np.random.Generator) -> Params:
    """The experts with ``units`` hidden units of each drawn anew, with the statistics of the dense layers."""
    fc1, fc2 = dict(copied["fc1"]), dict(copied["fc2"])
    for branch, leaf in ((fc1, "kernel"), (fc1, "bias"), (fc2, "kernel")):
        if not branch[leaf].flags.writeable:  # noisy kernels are our own already
            branch[leaf] = np.array(branch[leaf], order="C")
    depth, experts, width, hidden = fc1["kernel"].shape
    originals = (dense["fc1"]["kernel"], dense["fc1"]["bias"], dense["fc2"]["kernel"])
    for layer in range(depth):
        floats = [np.asarray(leaf[layer], np.float32) for leaf in originals]
        (mean1, std1), (mean_b, std_b), (mean2, std2) = [(leaf.mean(), leaf.std()) for leaf in floats]
        for expert in range(experts):
            chosen = rng.choice(hidden, units, replace=False)
            fc1["kernel"][layer, expert][:, chosen] = mean1 + std1 * rng.standard_normal((width, units), np.float32)
            fc1["bias"][layer, expert][chosen] = mean_b + std_b * rng.standard_normal(units, np.float32)
            fc2["kernel"][layer, expert][chosen] = mean2 + std2 * rng.standard_normal((units, width), np.float32)
    return {"fc1": fc1, "fc2": fc2}


def adapt(
    params: Params,
    config: DiTConfig,
    wanted: DiTConfig,
    gain: str = "exact",
    noise: float = 0.0,
    drop: float = 0.0,
    key: jax.Array | None = None,
) -> tuple[Params, list[str]]:
    """The weights of a model ``config``, changed to be those of ``wanted``: all of the above that it takes.

    Args:
        gain: of ``widen_input``. noise, drop, key: of ``upcycle``.

    Returns:
        (params, steps): one line of text for each step that was taken, none if the two have the same shapes.

    Raises:
        UserError: they differ in a field that no surgery bridges (the first such field is named).
    """
    _refuse_unbridged(config, wanted)
    steps: list[str] = []
    if wanted.input_size != config.input_size:
        pixels = wanted.input_size * LATENT_FACTOR
        params, config = change_resolution(params, config, pixels)
        steps.append(f"position table made for {pixels} x {pixels} pixels")
    if wanted.cond_channels != config.cond_channels:
        before = config.input_channels
        params, config = widen_input(params, config, wanted.cond_channels, gain, wanted.features)
        steps.append(f"input widened from {before} to {config.input_channels} channels (gain {gain})")
    if wanted.task_labels != config.task_labels:
        before = config.label_rows
        params, config = extend_labels(params, config, wanted.task_labels)
        start = "means of groups of classes" if config.num_classes >= config.task_labels else "the null label"
        steps.append(f"label table extended from {before} to {config.label_rows} rows (tasks start as {start})")
    if wanted.num_classes != config.num_classes:
        steps.append(f"{config.num_classes} class rows dropped from the label table")
        params, config = drop_classes(params, config)
    if wanted.routed and not config.routed:
        params, config = split_patch_embed(params, config)
        steps.append(f"patch embedding copied for each of {config.task_labels} tasks")
    if wanted.learn_sigma != config.learn_sigma:
        params, config = drop_variance(params, config)
        steps.append("output channels of the learned variance dropped")
    if wanted.context_dim != config.context_dim:
        params, config = add_context(params, config, wanted.context_dim)
        steps.append(f"task context of width {config.context_dim} added, its projection zero")
    if wanted.experts and not config.experts:
        count, active = wanted.experts, wanted.active_experts
        params, config = upcycle(params, config, count, active, wanted.gating, noise, drop, key)
        line = f"MLPs upcycled to {count} experts, {active} active (gating {wanted.gating}"
        line += "".join(f", {name} {value:g}" for name, value in (("noise", noise), ("drop", drop)) if value)
        keeps = not noise and not drop and (wanted.gating == "renormalised" or active == count)
        steps.append(line + (": same function)" if keeps else ": another function at first)"))
    for field in ("active_experts", "gating"):
        old, new = getattr(config, field), getattr(wanted, field)
        if config.experts and old != new:
            steps.append(f"{field} changed from {old} to {new}: same weights, another function")
    return params, steps


def _refuse_unbridged(config: DiTConfig, wanted: DiTConfig) -> None:
    """Raise for the first field in which the two differ and that no surgery changes."""
    never = {field: getattr(config, field) != getattr(wanted, field) for field in (*_SIZES, "qk_norm")}
    mlp = config.expert_mlp if config.experts else "gelu"  # what upcycling makes
    stuck = never | {
        "cond_channels": bool(config.cond_channels) and wanted.cond_channels != config.cond_channels,
        "task_labels": bool(config.task_labels) and wanted.task_labels != config.task_labels,
        "num_classes": bool(wanted.num_classes) and wanted.num_classes != config.num_classes,
        "routed": config.routed and not wanted.routed,
        "learn_sigma": wanted.learn_sigma and not config.learn_sigma,
        "context_dim": bool(config.context_dim) and wanted.context_dim != config.context_dim,
        "experts": bool(config.experts) and wanted.experts != config.experts,
        "expert_mlp": bool(wanted.experts) and wanted.expert_mlp != mlp,
        "shared_experts": wanted.shared_experts != config.shared_experts,
    }
    for field, differs in stuck.items():
        if differs:
            have = mlp if field == "expert_mlp" else getattr(config, field)
            if field in _SIZES:
                sizes = operator.attrgetter(*_SIZES)
                same = [name for name in preset_names() if sizes(get_preset(name)) == sizes(config)]
                mend = f"choose model={same[0]}" if same else "choose the preset that it was made with"
            else:
                mend = f"set model_changes.{field}={have}, or start from another model"
            raise UserError(
                f"{field} is {have} in model {config.name} and {getattr(wanted, field)} in {wanted.name}, and no "
                f"surgery changes it: {mend}"
            )
