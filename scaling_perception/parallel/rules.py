"""Which axis of which parameter is split over which axis of the mesh: a table of patterns over leaf names."""

import re
from collections.abc import Sequence
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from scaling_perception.parallel.mesh import COLUMN_AXES

Rules = Sequence[tuple[str, PartitionSpec]]

# First match wins. Axes are those of parallel.mesh; a leading None under blocks is the layer axis, which is scanned.
# Matrices that widen are split along their output over ``tensor``, those that narrow along their input, so that each
# pair needs one reduction; the other side is split over ``fsdp`` and gathered layer by layer.
DIT_RULES: Rules = (
    (r"blocks/attn/qkv/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/attn/proj/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/mlp/fc1/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/mlp/fc2/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/moe/experts/(fc1|gate|up)/kernel", PartitionSpec(None, "expert", "fsdp", "tensor")),
    (r"blocks/moe/experts/(fc2|down)/kernel", PartitionSpec(None, "expert", "tensor", "fsdp")),
    (r"blocks/moe/experts/fc1/bias", PartitionSpec(None, "expert", "tensor")),
    (r"blocks/moe/experts/fc2/bias", PartitionSpec(None, "expert")),
    (r"blocks/moe/shared/(gate|up)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/moe/shared/down/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/modulation/kernel", PartitionSpec(None, None, COLUMN_AXES)),
    (r"blocks/(attn/qkv|mlp/fc1|modulation)/bias", PartitionSpec(None, "tensor")),
    (r"(time_embed/.*|final/.*)/kernel", PartitionSpec("fsdp", None)),
    # Small, so whole on every device. A kernel that is not named here is refused: it might be large.
    (r"(patch_embed|context|blocks/moe/router)/kernel", PartitionSpec()),
    # What is no kernel: position table, remaining biases, counters; and the label table, for a row looked up in a table
    # that is split by columns comes split by columns, where the batch is to be split.
    (r"(.*/)?(?!kernel$)[^/]+", PartitionSpec()),
)

# Kernels that a layer rounds to the compute dtype before it uses them: gathered ahead they are rounded first.
ROUNDED = r"blocks/(attn/(qkv|proj)|mlp/(fc1|fc2)|moe/(shared|experts)/\w+)/kernel"

WHOLE_RULES: Rules = ((r".*", PartitionSpec()),)
"""For models that are small enough to be whole on every device."""


def _path_name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """``spec`` without the axes that do not divide their dimension: such a dimension is kept whole."""
    kept = []
    for size, axes in zip(shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        kept.append(axes if names and size % prod(mesh.shape[name] for name in names) == 0 else None)
    return PartitionSpec(*kept)


def spec_for(name: str, rules: Rules = DIT_RULES) -> PartitionSpec:
    """The spec of the first rule that matches the end of ``name`` (names joined by '/'), so that the same rules serve
    parameters, their average and the optimiser's moments (``ema/blocks/…``).

    Raises:
        ValueError: no rule matches.
    """
    for pattern, spec in rules:
        if re.search(rf"(^|/)({pattern})$", name):
            return spec
    raise ValueError(f"no sharding rule for {name}: add one to DIT_RULES (parallel/rules.py)")


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = DIT_RULES) -> Any:
    """A NamedSharding for each leaf of ``tree`` (arrays or shapes; parameters, or any state made of such trees)."""

    def choose(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = spec_for(_path_name(path), rules)
        if len(spec) > len(leaf.shape):  # a statistic with fewer axes than its parameter
            spec = PartitionSpec()
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(choose, tree)


def gathered(params: Any, places: Any, dtype: Any, whole: bool = False) -> Any:
    """The weights that a loss is computed with, gathered over ``fsdp`` once and not in each layer.

    Args:
        params, places: the weights and their shardings. dtype: of the activations; kernels that layers round to it
            are gathered in it. whole: gather those whose columns are split, too (``COLUMN_AXES``).
    """

    def gather(path: tuple[Any, ...], leaf: jax.Array, place: NamedSharding) -> jax.Array:
        there, kind = gathered_place(_path_name(path), place, dtype, whole)
        if there is None:
            return leaf
        # split as before, so that it is rounded before it is sent
        leaf = jax.lax.with_sharding_constraint(leaf.astype(kind or leaf.dtype), place)
        return jax.lax.with_sharding_constraint(leaf, there)

    return jax.tree_util.tree_map_with_path(gather, params, places)


def gathered_place(name: str, place: NamedSharding, dtype: Any, whole: bool) -> tuple[NamedSharding | None, Any]:
    """The sharding of a leaf that ``gathered`` gathers, None for others; and its dtype, None for that of the leaf."""
    kind = dtype if re.fullmatch(ROUNDED, name) else None
    spec = PartitionSpec(*(_without_fsdp(entry, whole) for entry in place.spec))
    return (None, None) if spec == place.spec and kind is None else (NamedSharding(place.mesh, spec), kind)


def _without_fsdp(entry: Any, whole: bool) -> Any:
    if isinstance(entry, tuple) and whole:
        return tuple(axis for axis in entry if axis != "fsdp") or None
    return None if entry == "fsdp" else entry
