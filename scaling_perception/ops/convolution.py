"""Convolutions of pictures as pure functions of arrays: XLA's on every platform, which are the oracle, and on a CPU
kernels of this package in C++ (``convolution.cc``) where they are."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_perception.support.native import targets
from scaling_perception.support.shapes import AnyArray, Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_SIDES, _STRIDES = (3, 5), (1, 2)  # of a bottleneck, as in convolution.cc


class Activation(NamedTuple):
    """A function that limits its argument, and the limits."""

    function: Callable[[jax.Array], jax.Array]
    low: float
    high: float


ACTIVATIONS = {
    "none": Activation(lambda x: x, -np.inf, np.inf),
    "relu": Activation(jax.nn.relu, 0.0, np.inf),
    "relu6": Activation(jax.nn.relu6, 0.0, 6.0),
}


class How(NamedTuple):
    """Of a convolution: the stride, zeros above and below, left and right, and what follows."""

    stride: int = 1
    padding: tuple[tuple[int, int], ...] = ((1, 1), (1, 1))
    activation: str = "none"


SAME_SIZE = How()
"""Of a kernel of 3 by 3 whose result is as large as the picture."""


def convolution(
    x: Float[AnyArray, "B H W C"],
    kernel: Float[AnyArray, "kh kw C O"],
    bias: Float[AnyArray, " O"] | None = None,
    residual: Float[AnyArray, "B h w O"] | None = None,
    how: How = SAME_SIZE,
) -> Float[Array, "B h w O"]:
    """activation(x * kernel + bias + residual), a convolution as in ``jax.lax.conv_general_dilated``.

    Args:
        x, kernel, bias, residual: of one dtype.

    Returns:
        (B, h, w, O) in that dtype. The kernel for CPUs computes kernels of 3 by 3 at stride 1 by Winograd's formulas:
        within 1e-5 of the largest value of XLA's, and what is not finite may spread to the neighbouring pixel.
    """
    if not native_convolves(x.dtype, kernel.dtype):
        return _by_xla(x, kernel, bias, residual, how=how)
    return jax.lax.platform_dependent(
        x, kernel, bias, residual, cpu=partial(_native, how=how), default=partial(_by_xla, how=how)
    )


def conv_general_dilated(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **others: Any) -> jax.Array:
    """`convolution` with the arguments that ``flax.linen.Conv`` gives its ``conv_general_dilated``, of such pictures:
    one stride for both axes, padding in numbers, no dilation, one group."""
    (stride,) = set(strides)
    return convolution(x, kernel, how=How(stride, tuple(padding)))


def native_convolves(*dtypes: Any) -> bool:
    """Whether the kernels for CPUs are for arrays of these dtypes: in float32, in a process whose only device is a CPU
    (XLA cannot split them), where they are there (they are compiled if need be). Asked while tracing."""
    if any(dtype != jnp.float32 for dtype in dtypes) or jax.device_count() > 1:
        return False
    return jax.devices()[0].platform == "cpu" and bool(targets())


def _by_xla(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, residual: jax.Array | None, how: How) -> jax.Array:
    strides = (how.stride, how.stride)
    out = jax.lax.conv_general_dilated(x, kernel, strides, how.padding, dimension_numbers=_LAYOUT)
    if bias is not None:
        out = out + bias[None, None, None]
    if residual is not None:
        out = residual + out
    return ACTIVATIONS[how.activation].function(out)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _native(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, residual: jax.Array | None, how: How) -> jax.Array:
    shape = jax.eval_shape(partial(_by_xla, how=how), x, kernel, bias, residual).shape
    limits = ACTIVATIONS[how.activation]
    none = jnp.zeros(kernel.shape[-1:], jnp.float32)
    return _call("convolution", shape)(
        x,
        kernel,
        none if bias is None else bias,
        none if residual is None else residual,
        stride=np.int64(how.stride),
        top=np.int64(how.padding[0][0]),
        left=np.int64(how.padding[1][0]),
        low=np.float32(limits.low),
        high=np.float32(limits.high),
        adds=residual is not None,
    )


def _keep(x: Any, kernel: Any, bias: Any, residual: Any, how: How) -> tuple[jax.Array, Any]:
    out: Any = _native(x, kernel, bias, residual, how)
    return out, (x, kernel, bias, residual, out)


def _pull(how: How, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    x, kernel, bias, residual, out = kept
    limits = ACTIVATIONS[how.activation]
    if limits.low > -np.inf:  # the gradient of relu and relu6 is 0 at their limits
        gradient = jnp.where((out > limits.low) & (out < limits.high), gradient, 0)
    plain = partial(_by_xla, bias=None, residual=None, how=how._replace(activation="none"))
    by_x, by_kernel = jax.vjp(plain, x, kernel)[1](gradient)
    if how.stride == 1:  # the same kind of convolution, by the kernel turned round
        sides = kernel.shape[:2]
        edges = [(side - 1 - low, side - 1 - high) for side, (low, high) in zip(sides, how.padding, strict=True)]
        if min(map(min, edges)) >= 0:
            turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
            by_x = _native(gradient, turned, None, None, How(1, (edges[0], edges[1])))
    by_bias = None if bias is None else gradient.sum(axis=(0, 1, 2))
    return by_x, by_kernel, by_bias, None if residual is None else gradient


_native.defvjp(_keep, _pull)


def _call(kernel: str, shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    return jax.ffi.ffi_call(targets()[kernel], jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")


def inverted_bottleneck(
    x: Float[AnyArray, "B H W C"], weights: Any, stride: int, residual: bool
) -> Float[Array, "B h w O"]:
    """A product, a convolution of each channel by itself ('SAME') and a product; relu6 after the first two.

    Args:
        x: (B, H, W, C).
        weights: ``expand`` (kernel (C, inner); absent: C channels go on), ``depth`` (kernel (k, k, inner)) and
            ``project`` (kernel (inner, O)), each with its ``bias``; as ``x``.
        residual: whether x is added.

    Returns:
        (B, H / stride, W / stride, O), sides rounded up. The kernel for CPUs keeps a few rows of the inner channels, so
        that they do not go through main memory.
    """
    side, _, inner = weights["depth"]["kernel"].shape
    fits = side in _SIDES and stride in _STRIDES and inner % 16 == 0  # whole vectors of every processor
    if not fits or not native_convolves(*(leaf.dtype for leaf in jax.tree.leaves((x, weights)))):
        return _bottleneck_by_xla(x, weights, stride, residual)
    return jax.lax.platform_dependent(
        x,
        weights,
        cpu=partial(_native_bottleneck, stride=stride, residual=residual),
        default=partial(_bottleneck_by_xla, stride=stride, residual=residual),
    )


def _bottleneck_by_xla(x: jax.Array, weights: Any, stride: int, residual: bool) -> jax.Array:
    y = jax.nn.relu6(_dense(x, weights["expand"])) if "expand" in weights else x
    y = _depthwise(y, weights["depth"]["kernel"], stride) + jnp.asarray(weights["depth"]["bias"])[None, None, None]
    y = _dense(jax.nn.relu6(y), weights["project"])
    return x + y if residual else y


def _dense(x: jax.Array, own: Any) -> jax.Array:
    return x @ jnp.asarray(own["kernel"]) + jnp.asarray(own["bias"])[None, None, None]


def same_padding(side: int, stride: int, lengths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each axis of these lengths by 'SAME': the result has length / stride, rounded up."""
    pads = [max((-(-length // stride) - 1) * stride + side - length, 0) for length in lengths]
    return tuple((pad // 2, pad - pad // 2) for pad in pads)


def _depthwise(x: jax.Array, kernel: Any, stride: int) -> jax.Array:
    """A convolution of each channel by itself, 'SAME'. A sum of shifted products: XLA's own is slower on a CPU."""
    side = kernel.shape[0]
    sizes = [-(-length // stride) for length in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *same_padding(side, stride, x.shape[1:3]), (0, 0)))
    taps = jnp.asarray(kernel).reshape(side * side, 1, 1, -1)
    out: Any = None
    for tap in range(side * side):
        row, column = divmod(tap, side)
        last = (row + (sizes[0] - 1) * stride + 1, column + (sizes[1] - 1) * stride + 1)
        part = jax.lax.slice(x, (0, row, column, 0), (x.shape[0], *last, x.shape[3]), (1, stride, stride, 1))
        # lax's own functions: there are 272 taps, and jnp's take several times as long to trace
        weight = jax.lax.slice_in_dim(taps, tap, tap + 1)
        term = jax.lax.mul(part, jax.lax.broadcast_in_dim(weight, part.shape, (0, 1, 2, 3)))
        out = term if out is None else jax.lax.add(out, term)
    return out


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _native_bottleneck(x: jax.Array, weights: Any, stride: int, residual: bool) -> jax.Array:
    expand, depth, project = weights.get("expand"), weights["depth"], weights["project"]
    side, _, inner = depth["kernel"].shape
    height, width = (-(-length // stride) for length in x.shape[1:3])
    (top, _), (left, _) = same_padding(side, stride, x.shape[1:3])
    none = jnp.zeros(inner, jnp.float32)
    kernel, bias = (none, none) if expand is None else (expand["kernel"], expand["bias"])
    return _call("inverted_bottleneck", (x.shape[0], height, width, project["kernel"].shape[1]))(
        *(x, kernel, bias, depth["kernel"], depth["bias"], project["kernel"], project["bias"]),
        stride=np.int64(stride),
        top=np.int64(top),
        left=np.int64(left),
        expands=expand is not None,
        adds=residual,
    )


def _keep_bottleneck(x: Any, weights: Any, stride: int, residual: bool) -> tuple[jax.Array, Any]:
    return _native_bottleneck(x, weights, stride, residual), (x, weights)


def _pull_bottleneck(stride: int, residual: bool, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    return jax.vjp(partial(_bottleneck_by_xla, stride=stride, residual=residual), *kept)[1](gradient)


_native_bottleneck.defvjp(_keep_bottleneck, _pull_bottleneck)
