"""The diffusion transformer (DiT, Peebles & Xie 2023): patch embedding, adaLN-Zero blocks, final layer.

A block's MLP may be a mixture of experts (``models/moe.py``).

Conventions are those of the published checkpoints (facts 1.1), so that they convert by renaming and transposing alone.
Layers are stacked: each parameter under ``blocks`` has a leading layer axis L, which keeps compile time and the number
of tensors independent of depth.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from scaling_perception.models.moe import EXPERT_MLPS, GATINGS, MoE
from scaling_perception.ops.attention import attention
from scaling_perception.support.errors import UserError, did_you_mean

Params = dict[str, Any]  # nested dict of arrays

TIME_FREQUENCIES = 128  # sinusoids: 128 cosines, then 128 sines
NORM_EPSILON = 1e-6

_xavier = nn.initializers.xavier_uniform()
_normal = nn.initializers.normal(0.02)
_zeros = nn.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of a DiT. All are plain numbers, so a config is JSON-able (``dataclasses.asdict``).

    Attributes:
        name: preset it came from.
        input_size: side of the square latent grid, h = w (image side / 8).
        patch_size: side of a patch in latent pixels.
        in_channels: channels of the noisy latent.
        cond_channels: channels of the latents put before it: 0 none, 4 image, 8 image and prompt. Order: [image,
            prompt, noisy] (facts 2).
        dim, depth, heads: width D, layers L, attention heads.
        mlp_ratio: hidden width of the MLP over D.
        num_classes: class rows of the label table.
        task_labels: task rows after them; the null row is last.
        routed: one patch embedding per task label (PatchEmbedRouter, facts 2) instead of one for all.
        learn_sigma: whether as many output channels again are made for the learned variance.
        experts: routed expert MLPs E in every block, in place of its MLP; 0 = dense.
        active_experts: experts K that each token meets.
        expert_mlp: ``gelu`` (as the dense MLP, upcycled models) or ``swiglu`` (without biases, DiT-MoE), facts 3.1.
        shared_experts: 0, or width over D of one SwiGLU that every token meets besides (2 in DiT-MoE).
        gating: ``paper``: the chosen experts' softmax weights as they are; ``renormalised``: divided by their sum.
        qk_norm: LayerNorm of queries and keys in each head (DiT-MoE's other attention layout, facts 1.2).
        context_dim: 0, or width of a fixed embedding of the task that is projected and added to the condition.
    """

    name: str
    input_size: int
    dim: int
    depth: int
    heads: int
    patch_size: int = 2
    in_channels: int = 4
    cond_channels: int = 0
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    task_labels: int = 0
    routed: bool = False
    learn_sigma: bool = True
    experts: int = 0
    active_experts: int = 2
    expert_mlp: str = "gelu"
    shared_experts: int = 0
    gating: str = "paper"
    qk_norm: bool = False
    context_dim: int = 0

    def __post_init__(self) -> None:
        for field in ("input_size", "dim", "depth", "heads", "patch_size", "in_channels"):
            if getattr(self, field) < 1:
                raise UserError(f"model {field}={getattr(self, field)}: give a whole number of 1 or more")
        for field in ("cond_channels", "num_classes", "task_labels", "experts", "shared_experts", "context_dim"):
            if getattr(self, field) < 0:
                raise UserError(f"model {field}={getattr(self, field)}: give 0 or more")
        if self.dim % self.heads:
            raise UserError(f"model dim={self.dim} is not a multiple of heads={self.heads}: change one of them")
        if self.dim % 4:
            raise UserError(f"model dim={self.dim}: the position table needs a multiple of 4")
        if self.input_size % self.patch_size:
            raise UserError(f"model input_size={self.input_size} is not a multiple of patch_size={self.patch_size}")
        if self.routed and not self.task_labels:
            raise UserError("model routed=True needs task_labels above 0: one patch embedding is made per task label")
        for field, options in (("expert_mlp", EXPERT_MLPS), ("gating", GATINGS)):
            if getattr(self, field) not in options:
                raise UserError(f"model {field}={getattr(self, field)!r}{did_you_mean(getattr(self, field), options)}")
        if self.experts and not 1 <= self.active_experts <= self.experts:
            raise UserError(f"model active_experts={self.active_experts}: give 1 to experts={self.experts}")
        if self.shared_experts and not self.experts:
            raise UserError("model shared_experts needs experts above 0: a dense block has no shared expert")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """T, patches in the picture."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    @property
    def hidden(self) -> int:
        """F, hidden width of the MLP, and of each expert."""
        return round(self.dim * self.mlp_ratio)

    @property
    def input_channels(self) -> int:
        """Channels of the model's input: condition latents and the noisy latent."""
        return self.cond_channels + self.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the model's output: the prediction, then the variance logits if learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def label_rows(self) -> int:
        """Rows of the label table: classes, tasks, null."""
        return self.num_classes + self.task_labels + 1

    @property
    def null_label(self) -> int:
        """The unconditional label, which is also what a single-task model is fed (facts 2)."""
        return self.label_rows - 1

    def task_label(self, index: int) -> int:
        """Label of task ``index`` (a pass index of ``tasks.PASSES``) where the model has tasks, else the null label."""
        if not self.task_labels:
            return self.null_label
        if not 0 <= index < self.task_labels:
            raise UserError(f"task index {index}: model {self.name} knows {self.task_labels} tasks (0 is the first)")
        return self.num_classes + index


def config_from_dict(fields: Mapping[str, Any]) -> DiTConfig:
    """A config from its JSON form.

    Raises:
        UserError: a field is unknown, missing, or of the wrong kind.
    """
    known = {field.name: field for field in dataclasses.fields(DiTConfig)}
    kinds = {field.name: type(field.default) for field in known.values() if field.default is not dataclasses.MISSING}
    kinds["name"] = str
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"model has no field '{name}'{did_you_mean(name, known)}")
        kind = kinds.get(name, int)
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
            raise UserError(f"model {name}={value!r}: expected a value of type {kind.__name__}")
        given[name] = kind(value)
    missing = [n for n, field in known.items() if field.default is dataclasses.MISSING and n not in given]
    if missing:
        raise UserError(f"model field '{missing[0]}' is missing: add it to the model's description")
    return DiTConfig(**given)


def position_table(dim: int, grid: int) -> np.ndarray:
    """Fixed 2-D sin-cos table, (grid * grid, dim) float32, rows in row-major token order (facts 1.1).

    The first half of the width encodes the column, the second half the row; each half is [sin, cos] of the raw integer
    position times 10000 ** (-i / (dim / 4)), computed in float64.
    """
    omega = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim / 4.0))
    angles = np.arange(grid, dtype=np.float64)[:, None] * omega[None, :]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, dim / 2)
    column = np.broadcast_to(line[None, :, :], (grid, grid, dim // 2))
    row = np.broadcast_to(line[:, None, :], (grid, grid, dim // 2))
    return np.concatenate([column, row], axis=2).reshape(grid * grid, dim).astype(np.float32)


def timestep_features(t: jax.Array) -> jax.Array:
    """Sinusoids [cos, sin] of the raw timestep, (B,) -> (B, 256) float32; t in 0..999, fractions allowed."""
    # exponents in float32 as the reference has them, then rounded once: at t = 999 one unit in the last place is 6e-5
    exponents = np.float32(-math.log(10000.0)) * np.arange(TIME_FREQUENCIES, dtype=np.float32) / TIME_FREQUENCIES
    frequencies = jnp.asarray(np.exp(exponents.astype(np.float64)), jnp.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalise the last axis in float32, without affine parameters; returns float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + NORM_EPSILON)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """``x (1 + scale) + shift`` with x (B, T, D) and one shift and scale (B, D) per sample."""
    return x * (1.0 + scale[:, None, :]) + shift[:, None, :]


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """(B, h, w, C) -> (B, T, p * p * C): tokens row-major, inside a patch (row, column, channel)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(x: jax.Array, patch: int, grid: int) -> jax.Array:
    """(B, T, p * p * C) -> (B, h, w, C), the inverse of ``patchify`` for a square picture."""
    batch = x.shape[0]
    x = x.reshape(batch, grid, grid, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * patch, grid * patch, -1)


def _patch_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Xavier-uniform on the kernel seen as a (p * p * C, D) matrix, drawn per task where there are several."""
    *tasks, patch, _, channels, dim = shape
    flat = (*tasks, patch * patch * channels, dim)
    init = nn.initializers.xavier_uniform(batch_axis=tuple(range(len(tasks))))
    return init(key, flat, dtype).reshape(shape)


class PatchEmbed(nn.Module):
    """Latent (B, h, w, C) and label (B,) to tokens (B, T, D): a strided convolution, written as a matmul.

    Routed, the kernel has a leading task axis and each sample uses the kernel and bias of its task label; a label
    outside the task labels gets zeros, without bias (facts 2).
    """

    config: DiTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array) -> jax.Array:
        config = self.config
        tasks = (config.task_labels,) if config.routed else ()
        patch, width = config.patch_size, config.dim
        kernel = self.param("kernel", _patch_init, (*tasks, patch, patch, config.input_channels, width))
        bias = self.param("bias", _zeros, (*tasks, width))
        patches = patchify(x, patch).astype(self.dtype)
        kernel = kernel.reshape(*tasks, -1, width)
        if not config.routed:
            return patches @ kernel.astype(self.dtype) + bias.astype(self.dtype)[None, None, :]
        chosen = jax.nn.one_hot(label - config.num_classes, config.task_labels, dtype=jnp.float32)
        # exact: the sum has one term, and full precision keeps an accelerator from rounding the kernels on the way
        own = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        kernels = own("bn,nkd->bkd", chosen, kernel).astype(self.dtype)
        biases = own("bn,nd->bd", chosen, bias).astype(self.dtype)
        return jnp.einsum("btk,bkd->btd", patches, kernels) + biases[:, None, :]


class TimeEmbed(nn.Module):
    """Timestep (B,) to (B, D): sinusoids, then two linear layers with SiLU between, in float32."""

    dim: int

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        hidden = nn.Dense(self.dim, kernel_init=_normal, name="fc1")(timestep_features(t))
        return nn.Dense(self.dim, kernel_init=_normal, name="fc2")(nn.silu(hidden))


class TaskContext(nn.Module):
    """Label (B,) to (B, D): a projection, zero at first, of a fixed embedding of the task (facts 5.3).

    A model without task labels has one row, which every sample gets; else a label outside the task labels gets zeros.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        config = self.config
        rows = max(config.task_labels, 1)
        table = self.param("table", _zeros, (rows, config.context_dim))
        kernel = self.param("kernel", _zeros, (config.context_dim, config.dim))
        row = label - config.num_classes if config.task_labels else jnp.zeros_like(label)
        return jax.nn.one_hot(row, rows) @ jax.lax.stop_gradient(table) @ kernel


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection whose output is laid out (3, heads, head_dim)."""

    heads: int
    dtype: Any = jnp.float32
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, dim = x.shape
        flat = x.reshape(-1, dim)  # on a CPU the gradient of a (B, T, D) matmul is far slower than of a (B T, D) one
        qkv = nn.Dense(3 * dim, kernel_init=_xavier, dtype=self.dtype, name="qkv")(flat)
        query, key, value = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.heads, dim // self.heads), 2, 0)
        if self.qk_norm:  # in float32, as all norms
            query = nn.LayerNorm(NORM_EPSILON, name="q_norm")(query.astype(jnp.float32)).astype(self.dtype)
            key = nn.LayerNorm(NORM_EPSILON, name="k_norm")(key.astype(jnp.float32)).astype(self.dtype)
        mixed = attention(query, key, value).reshape(-1, dim)
        return nn.Dense(dim, kernel_init=_xavier, dtype=self.dtype, name="proj")(mixed).reshape(x.shape)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])  # flat for the same reason as in Attention
        hidden = nn.Dense(self.hidden, kernel_init=_xavier, dtype=self.dtype, name="fc1")(flat)
        out = nn.Dense(x.shape[-1], kernel_init=_xavier, dtype=self.dtype, name="fc2")(nn.gelu(hidden))
        return out.reshape(x.shape)


class Block(nn.Module):
    """adaLN-Zero block: (B, T, D) tokens and (B, D) condition (already through SiLU) to tokens.

    Returns (tokens, statistics of the routing or None): the pair that ``scan`` asks for. Norms, modulation, router and
    gates are float32; the tokens that travel from block to block have the compute dtype.
    """

    config: DiTConfig
    dtype: Any = jnp.float32
    dispatch: str = "auto"
    mesh: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        config, dtype = self.config, self.dtype
        modulation = nn.Dense(6 * config.dim, kernel_init=_zeros, name="modulation")(condition)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        attend = Attention(config.heads, dtype, config.qk_norm, name="attn")
        mixed = attend(modulate(layer_norm(x), shift_a, scale_a))
        x = (x + gate_a[:, None, :] * mixed).astype(dtype)
        inner, stats = modulate(layer_norm(x), shift_m, scale_m), None
        if config.experts:
            mixed, stats = MoE(config, dtype, self.dispatch, self.mesh, name="moe")(inner)
        else:
            mixed = Mlp(config.hidden, dtype, name="mlp")(inner)
        return (x + gate_m[:, None, :] * mixed).astype(dtype), stats


class Final(nn.Module):
    """Norm, modulation and the linear layer to pixels: (B, T, D) -> (B, T, p * p * out_channels) float32."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        config = self.config
        shift, scale = jnp.split(nn.Dense(2 * config.dim, kernel_init=_zeros, name="modulation")(condition), 2, axis=-1)
        width = config.patch_size**2 * config.out_channels
        return nn.Dense(width, kernel_init=_zeros, name="linear")(modulate(layer_norm(x), shift, scale))


class DiT(nn.Module):
    """Predicts noise, velocity or the clean latent (the trainer's choice) from a noisy latent and its conditions.

    Call with x (B, h, w, cond_channels + in_channels) float, channels [image, prompt, noisy]; t (B,) or (1,) raw
    timesteps 0..999, integer or fractional; label (B,) integer rows of the label table (-1 = the null label). Returns
    (B, h, w, out_channels) float32.

    Attributes:
        config: sizes.
        dtype: dtype of the large matmuls and of the tokens (float32 or bfloat16); parameters are float32, and so are
            norms, softmax, modulation and the final layer.
        remat: store only the tokens between blocks for the backward pass and recompute the rest; without it, the
            outputs of the linear layers are stored as well, and only what is cheap (and attention) is recomputed.
        dispatch: where experts are computed (``models/dispatch.py``).
        mesh: the mesh that the arrays live on, which models with experts need to know; None = one device.

    With ``with_stats`` the result is (output, statistics): ``moe.routing_stats`` with a leading layer axis, or {} for a
    dense model.
    """

    config: DiTConfig
    dtype: Any = jnp.float32
    remat: bool = False
    dispatch: str = "auto"
    mesh: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, label: jax.Array, with_stats: bool = False) -> Any:
        config = self.config
        x, t, label = jnp.asarray(x), jnp.asarray(t), jnp.asarray(label)
        expected = (config.input_size, config.input_size, config.input_channels)
        if x.shape[1:] != expected:
            raise UserError(
                f"model {config.name} takes latents (B, {expected[0]}, {expected[1]}, {expected[2]}), got {x.shape}: "
                f"choose another resolution (at_resolution) or number of condition channels"
            )
        table = self.param("pos_embed", lambda _: jnp.asarray(position_table(config.dim, config.grid)))
        labels = self.param("label_embed", _normal, (config.label_rows, config.dim))
        tokens = PatchEmbed(config, self.dtype, name="patch_embed")(x, label)
        tokens = tokens + jax.lax.stop_gradient(jnp.asarray(table, self.dtype))[None, :, :]
        condition = TimeEmbed(config.dim, name="time_embed")(t) + jnp.take(labels, label, axis=0)
        if config.context_dim:
            condition = condition + TaskContext(config, name="context")(label)
        condition = nn.silu(condition)
        # Storing every elementwise intermediate of every layer is slower than recomputing it (by a quarter of the
        # gradient's time on a CPU), and the attention logits would grow with T squared.
        policies = jax.checkpoint_policies
        named = policies.save_only_these_names("moe_hidden", "moe_out")  # grouped matmuls are not seen as dots
        dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named)
        kept = policies.nothing_saveable if self.remat else dots
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=kept),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=config.depth,
        )
        tokens, stats = stack(config, self.dtype, self.dispatch, self.mesh, name="blocks")(tokens, condition)
        out = unpatchify(Final(config, name="final")(tokens, condition), config.patch_size, config.grid)
        return (out, stats or {}) if with_stats else out


def guide(conditional: jax.Array, unconditional: jax.Array, scale: float, channels: int = 3) -> jax.Array:
    """Classifier-free guidance of two outputs (B, h, w, C): ``unconditional + scale (conditional - unconditional)`` in
    the first ``channels`` channels, ``conditional`` in the others.

    DiT's own sampler guides 3 of the 4 latent channels (``forward_with_cfg``); pass 4 for all of them (facts 1.1).
    """
    mixed = unconditional + scale * (conditional - unconditional)
    return jnp.concatenate([mixed[..., :channels], conditional[..., channels:]], axis=-1)


def frozen_paths(config: DiTConfig) -> tuple[str, ...]:
    """Names of the leaves that are stored and counted but never trained: the position table (facts 1.1) and, where
    there is one, the table of task embeddings."""
    return ("pos_embed", "context/table") if config.context_dim else ("pos_embed",)


def _example(config: DiTConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    size = config.input_size
    return jnp.zeros((1, size, size, config.input_channels)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)


@partial(jax.jit, static_argnums=0)  # compiled, the forward pass that flax traces for the shapes is dropped
def init_params(config: DiTConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters (pure; may run under jit). The network's output is exactly 0 (adaLN-Zero, facts 1.1)."""
    variables: Any = DiT(config).init(key, *_example(config))
    return variables["params"]


@lru_cache(maxsize=64)
def abstract_params(config: DiTConfig) -> Params:
    """The parameter tree as ``jax.ShapeDtypeStruct`` leaves; no array is built. Treat it as read-only."""
    return jax.eval_shape(partial(init_params, config), jax.random.key(0))


def count_params(config: DiTConfig) -> int:
    """Number of parameters, position table included (as the paper counts, facts 1.2); no array is built."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def count_active_params(config: DiTConfig) -> int:
    """Number of parameters that one token meets: all but those of the E - K experts it is not sent to (facts 1.2)."""
    total = count_params(config)
    if not config.experts:
        return total
    experts = abstract_params(config)["blocks"]["moe"]["experts"]
    routed = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(experts))
    return total - routed // config.experts * (config.experts - config.active_experts)
