"""Functions with one implementation for each platform, of which a program holds the one it is compiled for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def by_platform(
    name: str,
    shapes: Callable[..., Any],
    default: Callable[..., Any],
    samples: bool = False,
    **implementations: Callable[..., Any],
) -> Callable[..., Any]:
    """A function whose implementation is chosen when a program is lowered, not when it is traced.

    ``jax.lax.platform_dependent`` chooses as late, but traces every branch wherever it runs: a kernel for another
    machine then costs its import and its trace in each program, if it can be traced here at all. Has no derivative:
    wrap it in ``jax.custom_vjp``.

    Args:
        name: what the operation is called in a jaxpr.
        shapes: (*arrays, **options) to a tree of ``jax.ShapeDtypeStruct``, that of the results.
        samples: the first axis of all arrays and results is one of samples, each computed alone: ``jax.vmap`` puts its
            axis in front of it. Otherwise there is no batching rule.
        default, implementations: (*arrays, **options) to that tree of arrays; keywords ``cpu``, ``tpu``, ``cuda``,
            ``rocm``.

    Returns:
        call(*arrays, **options): trees of arrays, and options that can be hashed.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def abstract(*leaves: Any, tree: Any, options: Any) -> list[Any]:
        found = jax.tree.leaves(shapes(*tree.unflatten(leaves), **dict(options)))
        return [ShapedArray(leaf.shape, leaf.dtype) for leaf in found]

    def lowering(implementation: Callable[..., Any]) -> Any:
        def flat(*leaves: Any, tree: Any, options: Any) -> list[Any]:
            return jax.tree.leaves(implementation(*tree.unflatten(leaves), **dict(options)))

        return mlir.lower_fun(flat, multiple_results=True)

    @partial(jax.jit, static_argnames=("tree", "options"))
    def bind(leaves: list[Any], tree: Any, options: Any) -> list[Any]:
        return primitive.bind(*leaves, tree=tree, options=options)

    def call(*arrays: Any, **options: Any) -> Any:
        leaves, tree = jax.tree.flatten(arrays)
        results = bind(leaves, tree=tree, options=tuple(sorted(options.items())))
        return jax.tree.unflatten(jax.tree.structure(shapes(*arrays, **options)), results)

    def batched(leaves: Any, axes: Any, *, tree: Any, options: Any) -> Any:
        size = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
        fronts = [
            jnp.broadcast_to(leaf, (size, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        results = bind([leaf.reshape(-1, *leaf.shape[2:]) for leaf in fronts], tree=tree, options=options)
        return [leaf.reshape(size, -1, *leaf.shape[1:]) for leaf in results], [0] * len(results)

    if samples:
        batching.primitive_batchers[primitive] = batched
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lowering(default))
    for platform, implementation in implementations.items():
        mlir.register_lowering(primitive, lowering(implementation), platform=platform)
    return call
