import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import BATCH, LinearBatches, config_of, linear_objective

from scaling_perception import train as verb
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.support.errors import UserError
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.spikes import detect_spike, new_guard
from scaling_perception.training.state import named_leaves, new_state
from scaling_perception.training.step import make_step

SKIP = ("train.on_spike=skip", "train.spike_window=6", "train.spike_factor=20")


class Spiking(LinearBatches):
    """Targets a thousand times too large at some steps."""

    def __init__(self, at=(), **fields):
        super().__init__(**fields)
        self.spikes = at

    def at(self, step):
        batch = super().at(step)
        return {**batch, "y": batch["y"] * np.float32(1000 if step in self.spikes else 1)}


def linear_run(monkeypatch, workdir, batches, *overrides):
    objective = linear_objective(batches)
    monkeypatch.setattr(verb, "_objective", lambda config, *_: objective)
    one = make_mesh(devices=jax.devices()[:1])  # compiles in half the time of eight
    monkeypatch.setattr("scaling_perception.parallel.mesh.make_mesh", lambda **_: one)
    return verb.train(config_of("optim.lr=0.05", "optim.lr_final=0.01", "train.steps=16", *overrides), workdir)


def leaves_of(workdir, step):
    """Name -> dtype, shape and checksum of every leaf of a checkpoint."""
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["leaves"]


def seen(values, window=6, factor=3.0, norm=1.0):
    guard, told = new_guard(window), []
    for value in values:
        spike, guard = detect_spike(guard, jnp.float32(value), jnp.float32(norm), factor)
        told.append(bool(spike))
    return told, guard


def test_a_spike_is_measured_by_the_median_of_what_is_remembered():
    assert seen([1, 2, 100])[0] == [False] * 3  # two are not yet half of six
    assert seen([1, 2, 3, 5.9])[0][-1] is False and seen([1, 2, 3, 6.1])[0][-1] is True
    told, guard = seen([1, 1, 1, np.nan, np.inf, 9])
    assert told == [False] * 5 + [True]  # what is not finite is no spike
    np.testing.assert_array_equal(guard["loss"], [np.nan, np.nan, 1, 1, 1, 9])  # and is not remembered
    assert seen([-1, -1, -1, 5])[0] == [False] * 4  # no factor of a median that is not positive


def test_the_gradient_norm_is_looked_at_as_well():
    _, guard = seen([1.0] * 4)
    assert (
        detect_spike(guard, jnp.float32(1), jnp.float32(3.1), 3.0)[0]
        and not detect_spike(guard, jnp.float32(1), jnp.float32(2), 3.0)[0]
    )


def test_values_that_stay_high_are_taken_for_the_usual_ones_in_the_end():
    told, _ = seen([1.0] * 6 + [50.0] * 6)
    assert told == [False] * 6 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_changes_its_number_and_the_memory_alone(accumulate):
    objective = linear_objective(jitter=0.0)
    tx, _ = make_optimizer(config_of().optim, 16, objective.frozen)
    state = new_state(objective.init(jax.random.key(1)), tx)._replace(guard=new_guard(4))
    step = jax.jit(make_step(objective, tx, 0.9, accumulate, spike_factor=10.0, skip_spikes=True))
    batches = Spiking(at=(4,))
    for number in range(5):
        before = state
        state, told = step(state, {name: batches.at(number)[name] for name in "xy"}, jax.random.key(0))
        assert told["spike"] == told["skipped"] == (number == 4)
    old, new = named_leaves(before), named_leaves(state)
    changed = {name for name in old if not np.array_equal(old[name], new[name], equal_nan=True)}
    assert changed == {"step", "guard/loss", "guard/grad_norm"}


def test_spikes_are_skipped_told_and_resumed_bit_for_bit(monkeypatch, tmp_path, capsys):
    spikes = (5, 11)
    linear_run(monkeypatch, tmp_path / "whole", Spiking(spikes), *SKIP)
    told = [json.loads(line) for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["why"]) for row in told] == [(6, "spike"), (12, "spike")]
    assert told[0]["keys"] == [f"sample5-{i}" for i in range(BATCH)]
    assert "step 6 skipped (spike)" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 0.25, 0.25, 0] and all(row["loss"] < 100 for row in rows)
    with pytest.raises(verb.Stopped):  # between the two, where the second depends on what the first left behind
        linear_run(monkeypatch, tmp_path / "halves", Spiking(spikes, signal_at=7), *SKIP)
    linear_run(monkeypatch, tmp_path / "halves", Spiking(spikes), *SKIP)
    whole = leaves_of(tmp_path / "whole", 16)
    assert "guard/loss" in whole and whole == leaves_of(tmp_path / "halves", 16)
    linear_run(monkeypatch, tmp_path / "without", Spiking(spikes))
    plain = leaves_of(tmp_path / "without", 16)
    assert plain["params/layer/kernel"] != whole["params/layer/kernel"] and "guard/loss" not in plain


def test_a_run_that_a_spike_stopped_goes_on_with_another_policy(monkeypatch, tmp_path):
    words = "a spike: loss .* at step 11 .samples sample10-0, .*last good checkpoint is step 8.*train.on_spike=skip"
    with pytest.raises(UserError, match=words):
        linear_run(monkeypatch, tmp_path, Spiking((10,)), "train.on_spike=raise", *SKIP[1:])
    assert json.loads((tmp_path / "bad_batch.json").read_text())["step"] == 11
    linear_run(monkeypatch, tmp_path, Spiking((10,)), *SKIP)
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["step"] == 11


def test_a_policy_may_come_and_go_between_attempts(monkeypatch, tmp_path):
    for number, overrides in ((3, ()), (7, SKIP), (11, (*SKIP[:1], "train.spike_window=4"))):
        with pytest.raises(verb.Stopped):
            linear_run(monkeypatch, tmp_path, LinearBatches(signal_at=number), *overrides)
    assert leaves_of(tmp_path, 8)["guard/loss"][1] == [6] and leaves_of(tmp_path, 12)["guard/loss"][1] == [4]
    linear_run(monkeypatch, tmp_path, LinearBatches())
    assert not any(name.startswith("guard") for name in leaves_of(tmp_path, 16))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.on_spike=skp", "train.on_spike is 'skp'; did you mean 'skip'"),
        ("train.spike_factor=1", "train.spike_factor is 1.0: give a number above 1"),
        ("train.spike_window=1", "train.spike_window is 1: give a whole number of at least 2"),
    ],
)
def test_impossible_values(monkeypatch, tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        linear_run(monkeypatch, tmp_path, None, "train.on_spike=skip", override)
