"""The diffusion transformer (DiT, Peebles & Xie 2023): patch embedding, adaLN-Zero blocks, final layer.

A block's MLP may be a mixture of experts (``models/moe.py``).

Conventions are those of the published checkpoints (facts 1.1), so that they convert by renaming and transposing alone.
Layers are stacked: each parameter under ``blocks`` has a leading layer axis L, which keeps compile time and the number
of tensors independent of depth.
"""

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from scaling_perception.models.config import TIME_FREQUENCIES as TIME_FREQUENCIES
from scaling_perception.models.config import DiTConfig as DiTConfig
from scaling_perception.models.config import config_from_dict as config_from_dict
from scaling_perception.models.moe import MoE
from scaling_perception.ops.attention import attention, projection_attention, split_heads
from scaling_perception.ops.modulation import KEPT, NORM_EPSILON, layer_norm, modulate, rounded, stored
from scaling_perception.parallel.mesh import gather_samples, split_batch, split_columns, spreads_columns
from scaling_perception.support.errors import UserError
from scaling_perception.support.executables import kept_value
from scaling_perception.support.shapes import AnyArray, Array, Float, Int, RandomKey, Real

Params = dict[str, Any]  # nested dicts of arrays, or of their shapes

_xavier = nn.initializers.xavier_uniform()
_normal = nn.initializers.normal(0.02)
_zeros = nn.initializers.zeros_init()


def position_table(dim: int, grid: int) -> Float[np.ndarray, "T D"]:
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


def timestep_features(t: Real[AnyArray, " B"]) -> Float[Array, "B 256"]:
    """Sinusoids [cos, sin] of the raw timestep, (B,) -> (B, 256) float32; t in 0..999, fractions allowed."""
    # exponents in float32 as the reference has them, then rounded once: at t = 999 one unit in the last place is 6e-5
    exponents = np.float32(-math.log(10000.0)) * np.arange(TIME_FREQUENCIES, dtype=np.float32) / TIME_FREQUENCIES
    frequencies = jnp.asarray(np.exp(exponents.astype(np.float64)), jnp.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patchify(x: Float[AnyArray, "B h w C"], patch: int) -> Float[AnyArray, "B T _"]:
    """(B, h, w, C) -> (B, T, p * p * C): tokens row-major, inside a patch (row, column, channel)."""
    batch, height, width, channels = x.shape
    rows, columns = height // patch, width // patch
    x = x.reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(x: Float[AnyArray, "B T _"], patch: int, grid: int) -> Float[AnyArray, "B h w C"]:
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

    Being linear, it is the sum of two parts: ``conditions``, the channels that stay the same while sampling, with the
    bias; and ``noisy``, the last ``in_channels``, without it. x then has the channels of that part alone.
    """

    config: DiTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "B h w C"], label: Int[AnyArray, " B"], part: str = "all"
    ) -> Float[Array, "B T D"]:
        config = self.config
        tasks = (config.task_labels,) if config.routed else ()
        patch, width = config.patch_size, config.dim
        kernel = self.param("kernel", _patch_init, (*tasks, patch, patch, config.input_channels, width))
        bias = self.param("bias", _zeros, (*tasks, width))
        first, last = {
            "all": (0, config.input_channels),
            "conditions": (0, config.cond_channels),
            "noisy": (config.cond_channels, config.input_channels),
        }[part]
        bias = jnp.zeros_like(bias) if part == "noisy" else bias
        patches = patchify(x, patch).astype(self.dtype)
        kernel = kernel[..., first:last, :].reshape(*tasks, patch * patch * (last - first), width)
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
    def __call__(self, t: Real[AnyArray, " B"]) -> Float[Array, "B D"]:
        hidden = nn.Dense(self.dim, kernel_init=_normal, name="fc1")(timestep_features(t))
        return nn.Dense(self.dim, kernel_init=_normal, name="fc2")(nn.silu(hidden))


class TaskContext(nn.Module):
    """Label (B,) to (B, D): a projection, zero at first, of a fixed embedding of the task (facts 5.3).

    A model without task labels has one row, which every sample gets; else a label outside the task labels gets zeros.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, label: Int[AnyArray, " B"]) -> Float[Array, "B D"]:
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
    mesh: Any = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B T D"]) -> Float[Array, "B T D"]:
        batch, tokens, dim = x.shape
        flat = x.reshape(-1, dim)  # on a CPU the gradient of a (B, T, D) matmul is far slower than of a (B T, D) one
        qkv = nn.Dense(3 * dim, kernel_init=_xavier, dtype=self.dtype, name="qkv")(flat)
        qkv = checkpoint_name(qkv, KEPT).reshape(batch, tokens, 3 * dim)
        if self.qk_norm:  # in float32, as all norms
            query, key, value = split_heads(qkv, self.heads)
            query = nn.LayerNorm(NORM_EPSILON, name="q_norm")(query.astype(jnp.float32)).astype(self.dtype)
            key = nn.LayerNorm(NORM_EPSILON, name="k_norm")(key.astype(jnp.float32)).astype(self.dtype)
            mixed = attention(query, key, value, self.mesh)
        else:
            mixed = projection_attention(qkv, self.heads, self.mesh)
        mixed = checkpoint_name(mixed.reshape(-1, dim), KEPT)
        out = nn.Dense(dim, kernel_init=_xavier, dtype=self.dtype, name="proj")(mixed)
        return stored(out.reshape(x.shape))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B T D"]) -> Float[Array, "B T D"]:
        flat = x.reshape(-1, x.shape[-1])  # flat for the same reason as in Attention
        hidden = nn.Dense(self.hidden, kernel_init=_xavier, dtype=self.dtype, name="fc1")(flat)
        hidden = nn.gelu(checkpoint_name(hidden, KEPT))
        out = nn.Dense(x.shape[-1], kernel_init=_xavier, dtype=self.dtype, name="fc2")(hidden)
        return stored(out.reshape(x.shape))


def remember(module: nn.Module, name: str, value: Any) -> None:
    """Put a value into the collection ``features``, where a caller asks for that (``mutable``)."""
    module.sow("features", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def feature_update(features: Params, blocks: Float[AnyArray, "L B _"]) -> Float[Array, "B T D"]:
    """What all blocks add to the tokens, in float32.

    Args:
        features: the collection ``features`` of a `DiT`, or a part: ``trunk`` (B, T, D) is that itself; else
            ``blocks`` holds the outputs of attention (``attended``) and MLP (``widened``) before their gates,
            (L, B, T, D).
        blocks: (L, B, 6 D) modulation of the step, see `PrecomputedConditioning`.
    """
    if "trunk" in features:
        return features["trunk"].astype(jnp.float32)
    attended, widened = features["blocks"]["attended"], features["blocks"]["widened"]

    def add(total: jax.Array, layer: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        modulation, attended, widened = layer
        _, _, gate_a, _, _, gate_m = jnp.split(modulation[:, None, :], 6, axis=-1)
        return total + gate_a * attended + gate_m * widened, None

    # Layer by layer: XLA's CPU backend (jax 0.10.2) fuses one sum over all layers wrongly into the final norm.
    return jax.lax.scan(add, jnp.zeros(attended.shape[1:], jnp.float32), (blocks, attended, widened))[0]


class Block(nn.Module):
    """adaLN-Zero block: (B, T, D) tokens and (B, D) condition (already through SiLU) to tokens.

    Returns (tokens, statistics of the routing or None): the pair that ``scan`` asks for. Norms, modulation, router and
    gates are float32; the tokens that travel from block to block have the dtype ``stream`` (None: the compute dtype).
    With ``modulation`` (B, 6 D) given, the condition is not needed.
    """

    config: DiTConfig
    dtype: Any = jnp.float32
    dispatch: str = "auto"
    mesh: Any = None
    stream: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "B T D"],
        condition: Float[AnyArray, "_ D"] | None,
        modulation: Float[AnyArray, "B _"] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "..."]] | None]:
        config, dtype, stream = self.config, self.dtype, self.stream or self.dtype
        if modulation is None:
            wide = nn.Dense(6 * config.dim, kernel_init=_zeros, name="modulation")(condition)
        else:
            wide = modulation
        x, wide = split_batch(x, self.mesh), split_batch(wide, self.mesh)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(wide, 6, axis=-1)
        attend = Attention(config.heads, dtype, config.qk_norm, self.mesh, name="attn")
        mixed = attend(rounded(modulate(layer_norm(x), shift_a, scale_a), dtype))
        remember(self, "attended", mixed)
        x = (x + gate_a[:, None, :] * mixed).astype(stream)
        inner, stats = modulate(layer_norm(x), shift_m, scale_m), None
        if config.experts:
            mixed, stats = MoE(config, dtype, self.dispatch, self.mesh, name="moe")(inner)
        else:
            mixed = Mlp(config.hidden, dtype, name="mlp")(rounded(inner, dtype))
        remember(self, "widened", mixed)
        return (x + gate_m[:, None, :] * mixed).astype(stream), stats


class Final(nn.Module):
    """Norm, modulation and the linear layer to pixels: (B, T, D) -> (B, T, p * p * out_channels) float32."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "B T D"],
        condition: Float[AnyArray, "_ D"] | None,
        modulation: Float[AnyArray, "B _"] | None,
    ) -> Float[Array, "B T _"]:
        config = self.config
        if modulation is None:
            wide = nn.Dense(2 * config.dim, kernel_init=_zeros, name="modulation")(condition)
        else:
            wide = modulation
        shift, scale = jnp.split(wide, 2, axis=-1)
        width = config.patch_size**2 * config.out_channels
        return nn.Dense(width, kernel_init=_zeros, name="linear")(modulate(layer_norm(x), shift, scale))


class PrecomputedConditioning(NamedTuple):
    """What a denoising step needs besides the noisy latent, computed ahead by ``modulations`` and ``embed_conditions``.

    Attributes:
        tokens: (B, T, D), the patch embedding of the conditions, with bias and positions.
        blocks: (L, B, 6 D) float32, the modulation of every block.
        final: (B, 2 D) float32, that of the final layer.
    """

    tokens: Float[Array, "B T D"]
    blocks: Float[Array, "L B _"]
    final: Float[Array, "B _"]


class DiT(nn.Module):
    """Predicts noise, velocity or the clean latent (the trainer's choice) from a noisy latent and its conditions.

    Call with x (B, h, w, cond_channels + in_channels) float, channels [image, prompt, noisy]; t (B,) or (1,) raw
    timesteps 0..999, integer or fractional; label (B,) integer rows of the label table (-1 = the null label). Returns
    (B, h, w, out_channels) float32.

    Attributes:
        config: sizes.
        dtype: dtype of the large matmuls (float32 or bfloat16); parameters are float32, and so are
            norms, softmax, modulation and the final layer.
        remat: store only the tokens between blocks for the backward pass and recompute the rest; without it, the
            outputs of the linear layers are stored as well, and only what is cheap (and attention) is recomputed.
        dispatch: where experts are computed (``models/dispatch.py``).
        stream: dtype of the tokens between blocks, to which every block adds: None is ``dtype``. float32 halves the
            rounding error of a bfloat16 network (docs/reference.md).
        mesh: the mesh that the arrays live on: the batch stays split over it, and experts are found on it; None = one
            device.

    With ``with_stats`` the result is (output, statistics): ``moe.routing_stats`` with a leading layer axis, or {} for a
    dense model. With ``fixed``, x holds the noisy latent's channels alone, t is not looked at, and label only chooses
    the patch embedding of a routed model. With ``mutable=["features"]`` it also returns what its blocks computed (see
    `feature_update`); with ``features`` (and ``fixed``) these take the place of the blocks, which are not computed.
    """

    config: DiTConfig
    dtype: Any = jnp.float32
    remat: bool = False
    dispatch: str = "auto"
    mesh: Any = None
    stream: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "B h w _"],
        t: Real[AnyArray, " _"],
        label: Int[AnyArray, " B"],
        with_stats: bool = False,
        fixed: PrecomputedConditioning | None = None,
        features: Params | None = None,
    ) -> Float[Array, "B h w C"] | tuple[Float[Array, "B h w C"], dict[str, Float[Array, "L ..."]]]:
        config = self.config
        x, t, label = (split_batch(jnp.asarray(array), self.mesh) for array in (x, t, label))
        channels = config.in_channels if fixed else config.input_channels
        expected = (config.input_size, config.input_size, channels)
        if x.shape[1:] != expected:
            raise UserError(
                f"model {config.name} takes latents (B, {expected[0]}, {expected[1]}, {expected[2]}), got {x.shape}: "
                f"choose another resolution (at_resolution) or number of condition channels"
            )
        patches, condition = PatchEmbed(config, self.dtype, name="patch_embed"), None
        stream = self.stream or self.dtype
        if fixed is None:
            table = self.param("pos_embed", lambda _: jnp.asarray(position_table(config.dim, config.grid)))
            tokens = patches(x, label) + jax.lax.stop_gradient(jnp.asarray(table, stream))[None, :, :]
            labels = self.param("label_embed", _normal, (config.label_rows, config.dim))
            condition = TimeEmbed(config.dim, name="time_embed")(t) + jnp.take(labels, label, axis=0)
            if config.context_dim:
                condition = condition + TaskContext(config, name="context")(label)
            condition = split_batch(nn.silu(condition), self.mesh)
        else:
            tokens = fixed.tokens.astype(stream) + patches(x, label, "noisy")
        blocks, final = (None, None) if fixed is None else (fixed.blocks, fixed.final)
        if fixed is None and spreads_columns(self.mesh, x.shape[0]) and not self.is_initializing():
            # of all layers at once: samples travel, which are few numbers here, and not a third of all weights
            weights, condition = self.variables["params"]["blocks"]["modulation"], gather_samples(condition, self.mesh)
            wide = jnp.einsum("bd,ldm->lbm", condition, weights["kernel"]) + weights["bias"][:, None]
            blocks = split_batch(split_columns(wide, self.mesh), self.mesh, 1)
        # Storing every elementwise intermediate of every layer is slower than recomputing it (by a quarter of the
        # gradient's time on a CPU), and the attention logits would grow with T squared.
        policies = jax.checkpoint_policies
        # neither grouped matmuls nor attention are seen as dots; of a linear layer what is used is kept, with its bias
        named = policies.save_only_these_names("moe_hidden", "moe_out", KEPT)
        dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named)
        kept = policies.nothing_saveable if self.remat else dots
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=kept),
            variable_axes={"params": 0, "intermediates": 0, "features": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
            length=config.depth,
        )
        every = stack(config, self.dtype, self.dispatch, self.mesh, self.stream, name="blocks")
        if features is not None and blocks is not None:
            tokens, stats = (tokens + feature_update(features, blocks)).astype(stream), None
        else:
            before = tokens
            tokens, stats = every(tokens, condition, blocks)
            remember(self, "trunk", tokens.astype(jnp.float32) - before.astype(jnp.float32))
        out = unpatchify(Final(config, name="final")(tokens, condition, final), config.patch_size, config.grid)
        return (out, stats or {}) if with_stats else out


def modulations(
    config: DiTConfig, params: Params, t: Real[Array, " S"] | Real[np.ndarray, " S"], label: Int[AnyArray, " P"]
) -> tuple[Float[Array, "S L P _"], Float[Array, "S P _"]]:
    """All modulations of a run of the sampler, which depend on its timesteps and labels alone.

    Args:
        t: (S,) timesteps. label: (P,) rows of the label table.

    Returns:
        (S, L, P, 6 D) of the blocks and (S, P, 2 D) of the final layer, float32.
    """
    time: Any = TimeEmbed(config.dim).apply({"params": params["time_embed"]}, t)
    known: Any = jnp.take(params["label_embed"], label, axis=0)
    if config.context_dim:
        known = known + TaskContext(config).apply({"params": params["context"]}, label)
    condition = nn.silu(time[:, None] + known[None])
    blocks, final = params["blocks"]["modulation"], params["final"]["modulation"]
    inner = jnp.einsum("spd,ldm->slpm", condition, blocks["kernel"]) + blocks["bias"][None, :, None]
    return inner, condition @ final["kernel"] + final["bias"][None, None]


def embed_conditions(
    config: DiTConfig,
    params: Params,
    latents: Float[AnyArray, "B h w C"],
    label: Int[AnyArray, " B"],
    dtype: Any = jnp.float32,
) -> Float[Array, "B T D"]:
    """The part of the tokens that stays the same while sampling: latents (B, h, w, cond_channels), label (B,), to
    (B, T, D) in ``dtype``, with bias and positions."""
    model = PatchEmbed(config, dtype)
    tokens: Any = model.apply({"params": params["patch_embed"]}, latents, label, "conditions")
    return tokens + jnp.asarray(params["pos_embed"], dtype)[None]


def guide(
    conditional: Float[AnyArray, "B h w C"],
    unconditional: Float[AnyArray, "B h w C"],
    scale: Float[AnyArray, ""] | float,
    channels: int = 3,
) -> Float[Array, "B h w C"]:
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
def init_params(config: DiTConfig, key: RandomKey) -> Params:
    """Fresh float32 parameters (pure; may run under jit). The network's output is exactly 0 (adaLN-Zero, facts 1.1)."""
    variables: Any = DiT(config).init(key, *_example(config))
    return variables["params"]


@lru_cache(maxsize=64)
def abstract_params(config: DiTConfig) -> Params:
    """The parameter tree as ``jax.ShapeDtypeStruct`` leaves; no array is built. Treat it as read-only."""

    def restored(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: restored(below) for name, below in node.items()}
        return jax.ShapeDtypeStruct(tuple(node[0]), node[1])

    return restored(_shapes(config))


@lru_cache(maxsize=64)
def _shapes(config: DiTConfig) -> Any:
    """The parameter tree with [shape, dtype] as leaves, as JSON holds it; tracing takes tenths of a second."""

    def traced() -> Any:
        tree = jax.eval_shape(
            lambda: init_params(config, jax.random.key(0))
        )  # a key made outside is a compiled program
        return jax.tree.map(lambda leaf: [list(leaf.shape), str(leaf.dtype)], tree)

    return kept_value(f"parameters of {config!r}", traced)


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
