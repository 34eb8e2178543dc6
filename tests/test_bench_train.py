"""`bench train`: what is told, that torch's step is the same as ours, and what is refused."""

import importlib.util
import json
import types

import numpy as np
import pytest

from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import make_parser, run_verb
from scaling_perception.timing import rounds
from scaling_perception.timing import train as bench_train

NANO = ["train", "--model", "nano", "--resolution", "32", "--batch", "2", "--quick"]


def make_case():
    return bench_train.make_case(make_parser("bench").parse_args(NANO))


@pytest.fixture(scope="module")
def result(tmp_path_factory, torch):
    file = tmp_path_factory.mktemp("bench") / "train.json"
    assert run_verb("bench", [*NANO, "--against", "torch", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_every_way_is_told(result):
    assert list(result["ways"]) == ["ours", "torch explicit", "torch sdpa"]
    assert (result["model"], result["batch"], result["repeats"]) == ("nano", 2, 1)
    for row in result["ways"].values():
        assert row["seconds"] > 0 and row["fastest"] > 0 and row["steps_a_round"] == 1
        assert row["gflops_per_second"] == pytest.approx(1e-9 * result["flops"] / row["seconds"])
    against, ways = result["against"], result["ways"]
    assert ways[against["opponent"]]["seconds"] == min(ways[name]["seconds"] for name in against["ratios"])
    for name, row in against["ratios"].items():
        assert row["ratio"] == pytest.approx(ways[name]["seconds"] / ways["ours"]["seconds"])


def test_torch_computes_the_same_loss_and_gradient(result):
    for found in result["against"]["differences"].values():
        assert found["loss"] < 1e-6 and 0 < found["gradient"] < 1e-4


def test_torch_takes_the_same_step(torch):
    """Weights and running average after it: with the rate as a bound, for Adam's first step is the rate wherever a
    gradient is not zero, and near zero rounding decides the sign."""
    import jax

    from scaling_perception.interop.torch_dit import dit_to_torch

    case = make_case()
    ours, trainer = bench_train.Ours(case, "float32", False), bench_train.make_torch(case, "sdpa")
    trainer(bench_train.first_draws(case))
    params = dit_to_torch(jax.tree.map(np.asarray, ours.state.params), case.config, attention="timm")
    ema = dit_to_torch(jax.tree.map(np.asarray, ours.state.ema), case.config, attention="timm")
    before = dit_to_torch(case.params, case.config, attention="timm")
    names = [name for name, leaf in trainer.network.named_parameters() if leaf.requires_grad]
    for name, leaf, mean in zip(names, trainer.trained, trainer.ema, strict=True):
        moved = np.abs(params[name] - before[name])
        off = np.abs(leaf.detach().numpy() - params[name])
        assert moved.max() == pytest.approx(case.optim.lr, rel=1e-2) and off.max() <= 2.01 * case.optim.lr
        if not name.endswith("qkv.bias"):  # softmax does not see the keys' bias: its gradient is rounding alone
            assert np.mean(off > 0.01 * case.optim.lr) < 0.01
        np.testing.assert_allclose(mean.numpy(), ema[name], atol=3e-4 * case.optim.lr, rtol=1e-6)


def test_differences_end_the_run(monkeypatch, torch):
    monkeypatch.setattr(bench_train, "LARGEST_LOSS", -1.0)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        run_verb("bench", [*NANO, "--against", "torch"])


def test_short_steps_are_timed_several_at_once(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(rounds, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def step():
        calls.append(None)
        clock[0] += 0.3

    function, count = rounds.several(step, 1.0)
    function()
    assert count == 3 and len(calls) == 1 + 3
    assert rounds.several(step, 0.0)[1] == 1


def test_refusals(monkeypatch):
    with pytest.raises(UserError, match="--batch 0: give 1 or more"):
        run_verb("bench", [*NANO, "--batch", "0"])
    with pytest.raises(UserError, match="unknown model 'nanno'; did you mean 'nano'"):
        run_verb("bench", [*NANO, "--model", "nanno"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs PyTorch: pip install 'scaling-perception\[torch\]'"):
        bench_train.make_torch(make_case(), "sdpa")
