"""Random streams by name: no key is drawn from twice."""

import jax
import numpy as np
import pytest
from toys import LinearBatches, config_of, linear_objective

from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.state import new_state
from scaling_perception.training.step import make_step
from scaling_perception.training.streams import NAMES, step_key, stream_key, tag


def test_no_two_streams_share_a_key_over_many_steps():
    """The tags of old, 0x4E1D and 0x0A7E, were the keys of steps 19,997 and 2,686."""
    key, steps = jax.random.key(2024), np.arange(30_000, dtype=np.int32)
    found = [jax.vmap(lambda n: step_key(key, n))(steps)]
    found += [jax.vmap(lambda n, name=name: stream_key(key, name, n))(steps) for name in NAMES]
    found += [jax.vmap(lambda n: jax.random.fold_in(key, n))(tags())]
    words = np.concatenate([np.asarray(jax.random.key_data(keys)) for keys in found])
    assert len(np.unique(words, axis=0)) == len(words) == (1 + len(NAMES)) * len(steps) + len(NAMES)


def tags():
    return np.asarray([tag(name) for name in NAMES], np.uint32)


def test_tags_are_no_steps_and_do_not_change():
    assert len(set(tags())) == len(NAMES) and (tags() >= 2**31).all()
    assert tag("held_out") == 0xF8E93778 and tag("average") == 0x984DF936
    with pytest.raises(KeyError, match="add it"):
        tag("heldout")


def test_skipped_steps_are_steps_of_the_schedule():
    """Three of ten steps are skipped: the seventh update has the rate of step 9, and equals one by hand."""
    objective = linear_objective(jitter=0.0)
    optim = config_of("optim.schedule=cosine", "optim.warmup=4", "optim.name=adam", "optim.grad_clip=0").optim
    tx, schedule = make_optimizer(optim, 10, objective.frozen)
    step = jax.jit(make_step(objective, tx, 0.9, skip=True))
    state = new_state(objective.init(jax.random.key(1)), tx)
    moments = np.zeros((2, 3, 2))
    updates = 0
    for number in range(10):
        batch = {name: LinearBatches(nan_at=number if number in (2, 3, 7) else -1).at(number)[name] for name in "xy"}
        before = jax.tree.map(np.asarray, state.params)
        state, told = step(state, batch, jax.random.key(0))
        assert told["skipped"] == (number in (2, 3, 7))
        if told["skipped"]:
            continue
        updates += 1
        kernel, x = before["layer"]["kernel"], batch["x"]
        error = x @ kernel + before["layer"]["bias"] + before["table"] - batch["y"]
        gradient = x.T @ (2 * error / error.size)
        moments = np.stack([0.9 * moments[0] + 0.1 * gradient, 0.999 * moments[1] + 0.001 * gradient**2])
        first, second = moments[0] / (1 - 0.9**updates), moments[1] / (1 - 0.999**updates)
        wanted = kernel - float(schedule(number)) * first / (np.sqrt(second) + 1e-8)  # the rate that is logged
        np.testing.assert_allclose(state.params["layer"]["kernel"], wanted, rtol=1e-4, atol=1e-6)
    assert updates == 7 and int(state.step) == 10
