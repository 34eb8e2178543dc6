"""Dispatchers against the dense oracle: values and every gradient, on one device and on many; nothing is dropped."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from scaling_perception.models import dispatch as dispatching
from scaling_perception.models import exchange
from scaling_perception.models.dispatch import expert_mlp
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.parallel.rules import tree_shardings
from scaling_perception.support.errors import UserError

TOKENS, WIDTH, HIDDEN, EXPERTS = 77, 12, 24, 8  # 77: no number of shards divides it

LAYOUTS = {
    "one device": None,
    "data 8": dict(data=8),
    "data 2, expert 4": dict(data=2, expert=4),
    "data 4, expert 2": dict(data=4, expert=2),
    "expert 8": dict(data=1, expert=8),
    "fsdp 2, expert 2, tensor 2": dict(data=1, fsdp=2, expert=2, tensor=2),
    "data 2, fsdp 2, tensor 2": dict(data=2, fsdp=2, tensor=2),
}


def draw_experts(kind, hidden=HIDDEN):
    wide, narrow = (WIDTH, hidden), (hidden, WIDTH)
    sizes = {"gate": wide, "up": wide, "down": narrow} if kind == "swiglu" else {"fc1": wide, "fc2": narrow}
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)

    if kind == "swiglu":
        return {name: {"kernel": array(EXPERTS, *size)} for name, size in sizes.items()}
    return {name: {"kernel": array(EXPERTS, *size), "bias": array(EXPERTS, size[1])} for name, size in sizes.items()}


def draw_index(active, seed=1, tokens=TOKENS):
    """(N, K): experts in no order, all different; expert 5 gets nobody."""
    rng = np.random.default_rng(seed)
    others = np.delete(np.arange(EXPERTS), 5)
    return np.stack([rng.permutation(others)[:active] for _ in range(tokens)]).astype(np.int32)


def draw(active=2, tokens=TOKENS):
    rng = np.random.default_rng(2)
    x, target = (jnp.asarray(rng.standard_normal((tokens, WIDTH)), jnp.float32) for _ in range(2))
    return x, jnp.asarray(rng.uniform(0.05, 1.0, (tokens, active)), jnp.float32), target


ROUTINGS = {
    "mixed, one expert idle": draw_index(2),
    "all on one": np.tile(np.asarray([[3, 6]], np.int32), (TOKENS, 1)),
    "alternating": np.stack([np.arange(TOKENS) % 8, (np.arange(TOKENS) + 4) % 8], axis=1).astype(np.int32),
}


@partial(jax.jit, static_argnames=("kind", "dispatch", "layout", "dtype"))
def gradients(x, index, weight, experts, target, kind, dispatch, layout=None, dtype="float32"):
    """(output, gradients of tokens, weights and every parameter)."""
    mesh = make_mesh(**dict(layout)) if layout else None

    def loss(x, weight, experts):
        out = expert_mlp(x.astype(dtype), index, weight, experts, kind, dispatch, mesh)
        return jnp.sum(out.astype(jnp.float32) * target), out

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weight, experts)[::-1]


def assert_close(mine, theirs, tolerance):
    """Largest difference of each array over its largest reference value."""
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.max(np.abs(a - b)) <= tolerance * np.max(np.abs(b))


def frozen(layout):
    return layout and tuple(layout.items())


RING = dict(kind="gelu", dispatch="ring", layout=frozen(LAYOUTS["data 2, expert 4"]))
EXCHANGE = {**RING, "dispatch": "exchange"}


@pytest.mark.parametrize(
    ("kind", "dispatch", "layout"),
    [("gelu", "auto", name) for name in LAYOUTS]
    + [("gelu", "exchange", "data 2, expert 4"), ("gelu", "exchange", "expert 8")]
    + [("swiglu", "auto", "one device"), ("swiglu", "auto", "fsdp 2, expert 2, tensor 2")]
    + [("swiglu", "exchange", "fsdp 2, expert 2, tensor 2")],
)
def test_values_and_all_gradients_equal_dense(kind, dispatch, layout, monkeypatch):
    """An exchange needs two windows and more where all rows are of one expert."""
    if (dispatch, layout) == ("exchange", "expert 8"):  # as on a TPU
        monkeypatch.setattr(dispatching._Plan, "packs", True)
    experts, (x, weight, target) = draw_experts(kind), draw()
    for routing in ROUTINGS.values():
        expected = gradients(x, routing, weight, experts, target, kind=kind, dispatch="dense")
        found = gradients(
            x, routing, weight, experts, target, kind=kind, dispatch=dispatch, layout=frozen(LAYOUTS[layout])
        )
        assert_close(found, expected, 3e-6)


@pytest.mark.parametrize("active", [1, 3])
def test_other_numbers_of_active_experts(active):
    """With expert 8 a token can have no more than one of its experts on a device: the buffer there is smaller."""
    experts, (x, weight, target) = draw_experts("gelu"), draw(active)
    index = draw_index(active)
    expected = gradients(x, index, weight, experts, target, kind="gelu", dispatch="dense")
    eight = frozen(dict(data=1, expert=8))
    for dispatch, layout in (("auto", None), ("auto", eight), ("exchange", eight)):
        found = gradients(x, index, weight, experts, target, kind="gelu", dispatch=dispatch, layout=layout)
        assert_close(found, expected, 3e-6)


def test_slices_of_an_exchange_fit_together():
    """Over all windows every row goes to its expert's device and back to its place, once; what a device expects is what
    the others send."""
    rng = np.random.default_rng(0)
    for devices, experts, length in ((4, 8, 16), (8, 8, 64), (2, 6, 1000)):
        counts = rng.integers(0, 20, (devices, experts)) * (rng.random((devices, experts)) < 0.7)
        counts[:, 0] = 0  # nobody's
        counts[1] = 0  # a device without rows
        count, most = experts // devices, int(exchange.busiest(jnp.asarray(counts)))
        rows = [np.stack(np.divmod(np.arange(own.sum()), 1000), 1) + [me, 0] for me, own in enumerate(counts)]
        expert = [np.repeat(np.arange(experts), own) for own in counts]
        returned = [np.full_like(own, -1) for own in rows]
        for first in range(0, most, length):
            windows = [exchange.window(jnp.asarray(counts), me, first, length) for me in range(devices)]
            buffers = [np.full((length, 3), -1) for _ in range(devices)]
            for way, ends in (("out", buffers), ("back", returned)):
                for me, one in enumerate(windows):
                    starts, sizes, to, _ = np.asarray(getattr(one, way)).reshape(4, devices, count)
                    for other in range(devices):
                        comes = np.asarray(getattr(windows[other], way).comes).reshape(devices, count)[me]
                        np.testing.assert_array_equal(sizes[other], comes)
                        for at, size, place in zip(starts[other], sizes[other], to[other], strict=True):
                            sent = np.column_stack([rows[me], expert[me]]) if way == "out" else buffers[me][:, :2]
                            ends[other][place : place + size] = sent[at : at + size]
            for me, (one, buffer) in enumerate(zip(windows, buffers, strict=True)):
                owners = np.repeat(np.arange(me * count, (me + 1) * count), np.asarray(one.sizes))
                np.testing.assert_array_equal(
                    buffer[:, 2], np.pad(owners, (0, length - len(owners)), constant_values=-1)
                )
        for own, back in zip(rows, returned, strict=True):
            np.testing.assert_array_equal(back, own)


def test_bfloat16_is_near_float32():
    """To 3 % of the largest value: a mantissa of eight bits, rounded a few times on the way."""
    experts, (x, weight, target) = draw_experts("gelu"), draw()
    index = draw_index(2)
    expected = gradients(x, index, weight, experts, target, kind="gelu", dispatch="dense")
    rounded = {layer: {**own, "kernel": own["kernel"].astype(jnp.bfloat16)} for layer, own in experts.items()}
    for how, given in ((RING, experts), (EXCHANGE, rounded)):
        out, grads = gradients(x, index, weight, given, target, **how, dtype="bfloat16")
        assert out.dtype == jnp.bfloat16 and grads[2]["fc1"]["kernel"].dtype == given["fc1"]["kernel"].dtype
        assert_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (out, grads)), expected, 0.03)


@pytest.mark.parametrize(("width", "dtype", "packed"), [(1152, "bfloat16", (2, 640)), (12, "float32", (1, 128))])
def test_packed_rows_are_whole_tiles(width, dtype, packed):
    rows = jnp.arange(3 * width, dtype=dtype).reshape(3, width)
    found = exchange.pack(rows)
    assert found.shape == (3, *packed) and found.dtype == rows.dtype
    np.testing.assert_array_equal(exchange.unpack(found, width), rows)


def test_gradients_of_bfloat16_are_summed_in_float32():
    """600 ones: a sum in bfloat16 stays at 256."""
    experts = jax.tree.map(jnp.zeros_like, draw_experts("gelu"))
    index, ones = jnp.zeros((600, 1), jnp.int32), jnp.ones((600, WIDTH))
    for how in (dict(kind="gelu", dispatch="ragged"), RING, EXCHANGE):
        _, (_, _, grads) = gradients(ones, index, ones[:, :1], experts, ones, **how, dtype="bfloat16")
        np.testing.assert_array_equal(grads["fc2"]["bias"][0], 600.0)


@pytest.mark.parametrize("layout", ["one device", "data 2, expert 4", "expert 8"])
@pytest.mark.parametrize("tokens", [1, 64])
def test_every_pair_is_computed_exactly_once(layout, tokens):
    """Experts that only say who they are: the output counts the pairs of each token, its sum the load."""
    experts = jax.tree.map(jnp.zeros_like, draw_experts("gelu"))
    experts["fc2"]["bias"] = jnp.pad(jnp.eye(EXPERTS), ((0, 0), (0, WIDTH - EXPERTS)))
    index = draw_index(3, seed=4, tokens=tokens)
    mesh = make_mesh(**LAYOUTS[layout]) if LAYOUTS[layout] else None
    run = jax.jit(
        lambda index: expert_mlp(jnp.ones((tokens, WIDTH)), index, jnp.ones((tokens, 3)), experts, "gelu", mesh=mesh)
    )
    expected = np.zeros((tokens, WIDTH))
    np.put_along_axis(expected, index, 1.0, axis=1)
    out = np.asarray(run(index))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(out.sum(axis=0)[:EXPERTS], np.bincount(index.reshape(-1), minlength=EXPERTS))


def count(jaxpr, name):
    """How many times a primitive is met in a jaxpr and all within it."""
    found = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
    return found + sum(count(inner, name) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))


@pytest.mark.parametrize("layout", ["one device", "fsdp 2, expert 2, tensor 2"])
def test_inside_scan_and_checkpoint(layout):
    """Layers stacked and scanned, sharded as they are in training: same gradients, and named tensors are not
    computed again."""
    mesh = make_mesh(**LAYOUTS[layout]) if LAYOUTS[layout] else None
    x, weight, target = draw(tokens=64)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), draw_experts("swiglu"))
    if mesh is not None:
        stack = {"blocks": {"moe": {"experts": stack}}}
        stack = jax.device_put(stack, tree_shardings(stack, mesh))["blocks"]["moe"]["experts"]
    indices = jnp.stack([draw_index(2, seed, 64) for seed in (1, 2)])

    def gradient(dispatch, policy):
        def loss(stack, x):
            def layer(x, inputs):
                experts, index = inputs
                return x + expert_mlp(x, index, weight, experts, "swiglu", dispatch, mesh), None

            return jnp.sum(jax.lax.scan(jax.checkpoint(layer, policy=policy), x, (stack, indices))[0] * target)

        return jax.grad(loss, argnums=(0, 1))

    named = jax.checkpoint_policies.save_only_these_names("moe_hidden", "moe_out")
    expected = jax.jit(gradient("dense", None))(stack, x)
    assert_close(jax.jit(gradient("auto", named))(stack, x), expected, 3e-6)
    forwards = {
        policy: count(jax.make_jaxpr(gradient("auto", policy))(stack, x).jaxpr, "grouped_mlp_forward")
        for policy in (named, jax.checkpoint_policies.nothing_saveable)
    }
    assert list(forwards.values()) == [1, 2]


def test_tokens_stay_where_they_are():
    """Ragged sorts each device's tokens; no collective moves them. Ring gathers over the expert axis alone."""
    experts, (x, weight, _) = draw_experts("gelu"), draw(tokens=64)

    def text(**sizes):
        mesh = make_mesh(**sizes)
        run = jax.jit(lambda *arrays: expert_mlp(*arrays, kind="gelu", mesh=mesh))
        return run.lower(x, draw_index(2, tokens=64), weight, experts).as_text()

    assert "all_gather" not in text(data=8) and "all_to_all" not in text(data=8)
    ring = text(data=2, expert=4)
    assert ring.count("all_gather") >= 3 and "reduce_scatter" in ring


def test_mistakes_are_one_line():
    experts, (x, weight, _) = draw_experts("gelu"), draw()
    index = draw_index(2)
    with pytest.raises(UserError, match="unknown dispatch 'raged'; did you mean 'ragged'"):
        expert_mlp(x, index, weight, experts, "gelu", "raged")
    for mesh in (None, make_mesh(data=8)):
        for dispatch in ("ring", "exchange"):
            with pytest.raises(UserError, match=f"'{dispatch}' needs a mesh whose expert axis"):
                expert_mlp(x, index, weight, experts, "gelu", dispatch, mesh)
    odd = jax.tree.map(lambda leaf: leaf[:6], experts)
    for dispatch in ("ring", "exchange", "auto"):
        with pytest.raises(UserError, match="6 experts cannot be split over an expert axis of 4"):
            expert_mlp(x, index, weight, odd, "gelu", dispatch, make_mesh(data=2, expert=4))
