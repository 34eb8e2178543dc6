"""CLIP's text tower: token ids to hidden states, one vector per text, and its projection into the shared space.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021): a pre-norm
transformer with a causal mask. The tests hold it against transformers' ``CLIPTextModelWithProjection``. Everything is
float32. Layers are stacked, as in the DiT: each parameter under ``blocks`` has a leading layer axis L.

Words: B texts, T tokens of each, D width, P projection.
"""

import dataclasses
import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.shapes import AnyArray, Array, Bool, Float, Int, RandomKey, Shaped

Params = dict[str, Any]  # nested dict of arrays

ACTIVATIONS = ("quick_gelu", "gelu")
LEGACY_EOS = 2  # an end id that older configs state wrongly; it stands for "the largest id of the text"

_normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text tower; the defaults are those of ViT-B/32, as in transformers. JSON-able.

    Attributes:
        vocab_size: rows of the token table.
        width, layers, heads: D, L, attention heads.
        hidden: width of the MLP.
        max_positions: tokens that a text has at most.
        activation: ``quick_gelu`` (x sigmoid(1.702 x), OpenAI's weights) or ``gelu`` (the exact one, OpenCLIP's).
        layer_norm_eps: of every norm.
        projection_dim: P, or 0 for a tower without a projection (as in Stable Diffusion).
        eos_token_id: id of the end token, where a text is pooled: its first place. 2 means the first place of the
            largest id, whatever that is (configs from before the id was put right).
        bos_token_id, pad_token_id: as the published config states them; nothing here uses them (a tokenizer has its
            own).

    Raises:
        UserError: a value out of range.
    """

    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8
    hidden: int = 2048
    max_positions: int = 77
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    eos_token_id: int = 49407
    bos_token_id: int | None = 49406
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        least = dict.fromkeys(("vocab_size", "width", "layers", "heads", "hidden", "max_positions"), 1)
        for name, low in {**least, "projection_dim": 0, "eos_token_id": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UserError(f"text encoder {name} is {value!r}: give a whole number of {low} or more")
        if self.width % self.heads:
            raise UserError(f"text encoder width {self.width} is no multiple of heads={self.heads}: change one of them")
        if self.activation not in ACTIVATIONS:
            hint = did_you_mean(self.activation, ACTIVATIONS)
            raise UserError(f"text encoder activation {self.activation!r} is not supported{hint}")
        if not isinstance(self.layer_norm_eps, int | float) or not self.layer_norm_eps > 0:
            raise UserError(f"text encoder layer_norm_eps is {self.layer_norm_eps!r}: give a number above 0")


class TextOutput(NamedTuple):
    """What a text tower gives; float32.

    Attributes:
        last_hidden_state: (B, T, D), after the final norm.
        penultimate_hidden_state: (B, T, D), what goes into the last layer; no norm.
        pooled: (B, D), ``last_hidden_state`` at the end token.
        text_embeds: (B, P), the projection of ``pooled``, not normalised; None without a projection.
    """

    last_hidden_state: Float[Array, "B T D"]
    penultimate_hidden_state: Float[Array, "B T D"]
    pooled: Float[Array, "B D"]
    text_embeds: Float[Array, "B P"] | None


def _norm(config: CLIPTextConfig, name: str) -> nn.LayerNorm:
    # the fast variance, E[x^2] - E[x]^2, loses digits where the mean is large
    return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, name=name)


class SelfAttention(nn.Module):
    """Multi-head attention of x (B, T, D) under ``allowed`` (B or 1, 1, T, T) bool, queries by keys."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B T D"], allowed: Bool[AnyArray, "_ 1 T T"]) -> Float[Array, "B T D"]:
        batch, tokens, dim = x.shape
        split = (batch, tokens, self.heads, dim // self.heads)
        query, key, value = (
            nn.Dense(dim, kernel_init=_normal, name=name)(x).reshape(split) for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", query * split[-1] ** -0.5, key)
        # finite, so that a query with nothing to look at gives a mean and no NaN
        logits = jnp.where(allowed, logits, jnp.finfo(logits.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), value)
        return nn.Dense(dim, kernel_init=_normal, name="out")(mixed.reshape(x.shape))


class Block(nn.Module):
    """Pre-norm layer. The carry is (tokens, the tokens that went into the layer before): (B, T, D) each."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(
        self, carry: tuple[Float[AnyArray, "B T D"], Float[AnyArray, "B T D"]], allowed: Bool[AnyArray, "_ 1 T T"]
    ) -> tuple[tuple[Float[Array, "B T D"], Float[Array, "B T D"]], None]:
        config, x = self.config, carry[0]
        attended = x + SelfAttention(config.heads, name="attn")(_norm(config, "norm1")(x), allowed)
        hidden = nn.Dense(config.hidden, kernel_init=_normal, name="fc1")(_norm(config, "norm2")(attended))
        if config.activation == "quick_gelu":
            hidden = hidden * jax.nn.sigmoid(1.702 * hidden)
        else:
            hidden = jax.nn.gelu(hidden, approximate=False)
        return (attended + nn.Dense(config.width, kernel_init=_normal, name="fc2")(hidden), x), None


class CLIPText(nn.Module):
    """Call with ids (B, T) integer (see ``check_ids``) and attention_mask (B, T), 0 where a token is not to be looked
    at, or None; returns a :class:`TextOutput`.

    Padding after the end token needs no mask for ``pooled`` and ``text_embeds``: no token sees a later one.
    """

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, ids: Int[AnyArray, "B T"], attention_mask: Shaped[AnyArray, "B T"] | None = None) -> TextOutput:
        config = self.config
        ids = jnp.asarray(ids)
        batch, tokens = ids.shape
        if tokens > config.max_positions:
            raise _too_long(config, tokens)
        table = self.param("token_embed", _normal, (config.vocab_size, config.width))
        positions = self.param("position_embed", _normal, (config.max_positions, config.width))
        x = jnp.take(table, ids, axis=0) + positions[None, :tokens]
        allowed = jnp.tril(jnp.ones((tokens, tokens), bool))[None, None]
        if attention_mask is not None:
            allowed = allowed & (jnp.asarray(attention_mask) != 0)[:, None, None]
        stack = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=config.layers,
        )
        (x, penultimate), _ = stack(config, name="blocks")((x, x), allowed)
        last = _norm(config, "final_norm")(x)
        end = ids if config.eos_token_id == LEGACY_EOS else ids == config.eos_token_id
        pooled = last[jnp.arange(batch), jnp.argmax(end, axis=1)]  # argmax gives the first of equals
        embeds = None
        if config.projection_dim:
            embeds = nn.Dense(config.projection_dim, use_bias=False, kernel_init=_normal, name="projection")(pooled)
        return TextOutput(last, penultimate, pooled, embeds)


def _too_long(config: CLIPTextConfig, tokens: int) -> UserError:
    most = config.max_positions
    return UserError(f"texts of {tokens} tokens are too long, the text encoder takes {most} at most: truncate them")


def check_ids(config: CLIPTextConfig, ids: Any) -> Int[np.ndarray, "B T"]:
    """``ids`` as int32 (B, T), after a look at every one: on a device an id out of range would go unnoticed.

    Raises:
        UserError: not (B, T) integers, more tokens than the tower has positions, or an id that is not in its table.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.shape[1]:
        raise UserError(f"token ids have shape {ids.shape} and type {ids.dtype}: give integers (texts, tokens)")
    if ids.shape[1] > config.max_positions:
        raise _too_long(config, ids.shape[1])
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if outside.size:
        raise UserError(
            f"token id {outside[0]} is not in the text encoder's vocabulary of {config.vocab_size}: use the tokenizer "
            "that belongs to it"
        )
    return ids.astype(np.int32)


@partial(jax.jit, static_argnums=0)
def encode_text(
    config: CLIPTextConfig,
    params: Params,
    ids: Int[AnyArray, "B T"],
    attention_mask: Shaped[AnyArray, "B T"] | None = None,
) -> TextOutput:
    """The tower's outputs, see :class:`CLIPText`. On an accelerator matmuls round their inputs unless
    ``jax.default_matmul_precision("highest")`` says otherwise."""
    return CLIPText(config).apply({"params": params}, ids, attention_mask)  # type: ignore[return-value]


@partial(jax.jit, static_argnums=0)  # compiled, the forward pass that flax traces for the shapes is dropped
def init_params(config: CLIPTextConfig, key: RandomKey) -> Params:
    """Fresh float32 parameters, normal(0.02)."""
    variables: Any = CLIPText(config).init(key, jnp.zeros((1, 1), jnp.int32))
    return variables["params"]


@lru_cache(maxsize=16)
def abstract_params(config: CLIPTextConfig) -> Params:
    """The parameter tree as ``jax.ShapeDtypeStruct`` leaves; no array is built. Treat it as read-only."""
    return jax.eval_shape(partial(init_params, config), jax.random.key(0))


def count_params(config: CLIPTextConfig) -> int:
    """Number of parameters; no array is built."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
