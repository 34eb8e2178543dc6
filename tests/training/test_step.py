import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from toys import LinearBatches, config_of, linear_objective

from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.state import abstract_state, named_leaves, new_state
from scaling_perception.training.step import average, is_frozen, make_step, stop_frozen_gradients

DECAY = 0.9


def setup(**optim):
    objective = linear_objective(jitter=optim.pop("jitter", 0.0))
    config = config_of().optim.copy_and_resolve_references()
    config.update({"schedule": "constant", "warmup": 0, "lr": 0.05, "grad_clip": 0.0, **optim})
    tx, _ = make_optimizer(config, 100, objective.frozen)
    state = new_state(objective.init(jax.random.key(1)), tx)
    return objective, state, jax.jit(make_step(objective, tx, DECAY))


def arrays(step):
    batch = LinearBatches().at(step)
    return {"x": batch["x"], "y": batch["y"]}


def test_two_steps_equal_adam_and_average_written_by_hand():
    _, state, step = setup(name="adamw", weight_decay=0.1)
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(state.params).items()}
    ema = dict(weights)
    first, second = ({name: 0.0 for name in weights} for _ in range(2))
    for n in (1, 2):
        batch = arrays(n)
        x, y = (batch[name].astype(np.float64) for name in "xy")
        error = x @ weights["layer/kernel"] + weights["layer/bias"] + weights["table"] - y
        gradient = {"layer/kernel": x.T @ (2 * error / error.size), "layer/bias": (2 * error / error.size).sum(0)}
        state, metrics = step(state, batch, jax.random.key(0))
        assert float(metrics["loss"]) == pytest.approx(np.mean(error**2), rel=1e-5)
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)  # the frozen table has no part in it
        for name, g in gradient.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            move = first[name] / (1 - 0.9**n) / (np.sqrt(second[name] / (1 - 0.999**n)) + 1e-8)
            if name.endswith("kernel"):
                move = move + 0.1 * weights[name]
            weights[name] = weights[name] - 0.05 * move
        ema = {name: DECAY * ema[name] + (1 - DECAY) * weights[name] for name in ema}
    for name, leaf in named_leaves(state.params).items():
        np.testing.assert_allclose(leaf, weights[name], rtol=2e-5, atol=1e-7)
    for name, leaf in named_leaves(state.ema).items():
        np.testing.assert_allclose(leaf, ema[name], rtol=2e-5, atol=1e-7)
    assert int(state.step) == 2


def test_frozen_leaf_stays_bit_for_bit_in_weights_and_average():
    _, state, step = setup(name="adamw", weight_decay=0.1)
    before = np.asarray(state.params["table"])
    for n in range(5):
        state, _ = step(state, arrays(n), jax.random.key(0))
    np.testing.assert_array_equal(state.params["table"], before)
    np.testing.assert_array_equal(state.ema["table"], before)


def test_noise_depends_on_the_step_and_the_key_alone():
    _, state, step = setup(jitter=0.5)
    same = [step(state, arrays(0), jax.random.key(7))[1]["loss"] for _ in range(2)]
    assert float(same[0]) == float(same[1])
    assert float(step(state, arrays(0), jax.random.key(8))[1]["loss"]) != float(same[0])
    later = state._replace(step=jnp.asarray(3, jnp.int32))
    assert float(step(later, arrays(0), jax.random.key(7))[1]["loss"]) != float(same[0])


def test_average_closed_form():
    old, new = {"a": jnp.asarray([1.0, 2.0])}, {"a": jnp.asarray([3.0, 2.0])}
    np.testing.assert_allclose(average(old, new, 0.75)["a"], [1.5, 2.0])
    np.testing.assert_array_equal(average(old, new, 0.0)["a"], new["a"])


def test_hold_stops_the_gradient_of_a_name_and_all_below_it():
    params = {"a": {"x": jnp.ones(2), "y": jnp.ones(2)}, "ab": jnp.ones(2)}
    gradient = jax.grad(lambda p: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(stop_frozen_gradients(p, ("a",)))))(
        params
    )
    assert [float(jnp.sum(leaf)) for leaf in jax.tree.leaves(gradient)] == [0.0, 0.0, 2.0]
    assert is_frozen("a/x", ("a",)) and not is_frozen("ab", ("a",))


def test_eight_devices_give_the_step_of_one():
    objective, state, step = setup(name="adam")
    expected, told = step(state, arrays(0), jax.random.key(0))
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    state, batch = jax.device_put(state, whole), jax.device_put(arrays(0), split)
    assert len(batch["x"].sharding.device_set) == 8
    got, metrics = step(state, batch, jax.device_put(jax.random.key(0), whole))
    for name, leaf in named_leaves(got).items():
        np.testing.assert_allclose(leaf, named_leaves(expected)[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert float(metrics["loss"]) == pytest.approx(float(told["loss"]), rel=1e-6)


def test_abstract_state_has_the_shapes_of_the_real_one():
    objective, state, _ = setup()
    tx, _ = make_optimizer(config_of().optim, 100, objective.frozen)
    shapes = abstract_state(objective.init, tx)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes.params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state.params
    )
    assert shapes.step.dtype == jnp.int32
