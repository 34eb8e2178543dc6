"""The verb: what two small train steps send to other devices, what goes wrong when they are not told how, and what
cannot be compiled."""

import importlib.util
import json

import pytest

from scaling_perception import cli
from scaling_perception.compile import compile_program, describe, mesh_of
from scaling_perception.models import dit
from scaling_perception.models.dit import count_params
from scaling_perception.scaling.topologies import get_topology
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError
from scaling_perception.training.diffusion import network_of

NANO = "configs/depth.py:model=nano,res=128,source=scenes,cache=latents"
DENSE, EXPERTS = {"fsdp": 8}, {"data": 2, "expert": 4}


def config_of(*overrides):
    return load_config(NANO, ["model_changes.dim=64", "train.batch_size=16", *overrides])


def report_of(name, sizes, *overrides, **options):
    config, topology = config_of(*overrides), get_topology("cpu:8", chip="h200")
    mesh = mesh_of(config, ",".join(f"{axis}={size}" for axis, size in sizes.items()), topology.devices)
    return compile_program(config, topology, mesh, name, **options)[0]


@pytest.fixture(scope="module")
def dense():
    return report_of("train", DENSE)


@pytest.fixture(scope="module")
def experts():
    return report_of("train", EXPERTS, "model_changes.experts=4")


def counts(report):
    """(kind, axes, purpose) -> how many of them run in a step, inside the layers and outside."""
    found = {}
    for row in report["collectives"]:
        if row["purpose"] != "scalars":  # those come and go with the metrics
            key = row["kind"], "+".join(row["axes"]), row["purpose"]
            inside, outside = found.get(key, (0, 0))
            found[key] = (inside + row["times"], outside) if row["loops"] else (inside, outside + row["times"])
    return found


def test_what_fsdp_sends(dense):
    # A change that adds one is seen here: is it needed? Two layers: four matrices are gathered in each, forward and
    # backward, and seven outside, with two arrays of samples, for modulation is computed where its columns are; on a
    # CPU gradients are reduced whole, all of a layer together.
    assert counts(dense) == {
        ("all-gather", "fsdp", "weights"): (16, 9),
        ("all-reduce", "fsdp", "gradients"): (2, 2),
    }
    assert dense["warnings"] == []


def test_weights_are_gathered_once_a_step():
    report = report_of("train", DENSE, "train.gather=step")
    assert counts(report)["all-gather", "fsdp", "weights"][0] == 0 and report["warnings"] == []


def reduced(report):
    return sum(row["bytes"] * row["times"] for row in report["collectives"] if row["purpose"] == "gradients")


# Slow: another mesh, by the same rule.
@pytest.mark.parametrize("sizes", [DENSE, pytest.param({"data": 8}, marks=pytest.mark.slow)], ids=["fsdp", "data"])
def test_a_batch_in_parts_reduces_its_gradients_once(sizes, request):
    """Every device sums its own: one reduction after the last part, of as many bytes as a batch in one piece has."""
    whole = request.getfixturevalue("dense") if sizes is DENSE else report_of("train", sizes)
    parts = report_of("train", sizes, "train.batch_size=32", "train.accumulate=4")
    ((axis, _),) = sizes.items()
    gathered = {("all-gather", "fsdp", "weights"): (4 * 20, 4)} if axis == "fsdp" else {}  # in every part again
    assert counts(whole)["all-reduce", axis, "gradients"] == (2, 2 if axis == "fsdp" else 1)
    assert counts(parts) == {**gathered, ("all-reduce", axis, "gradients"): (0, 1)}
    # with fsdp more than in one piece, where modulation's gradients are computed where they stay
    stay = 2 * 64 * 6 * 64 * 4 if axis == "fsdp" else 0
    assert reduced(parts) == pytest.approx(752_448, rel=1e-4) and reduced(whole) > 0.8 * (reduced(parts) - stay)
    assert parts["warnings"] == []


def test_what_expert_parallelism_sends(experts):
    # In each layer tokens, experts and weights are gathered, backward gradients too; their results are scattered back,
    # with the gradients of tokens and weights. Experts never travel; gradients are reduced where weights are whole.
    assert counts(experts) == {
        ("all-gather", "expert", "tokens"): (14, 0),
        ("reduce-scatter", "expert", "results"): (6, 0),
        ("all-reduce", "data", "gradients"): (2, 0),
        ("all-reduce", "data+expert", "gradients"): (2, 1),
    }
    assert experts["warnings"] == []


def test_flops_are_those_of_the_formula(dense, experts):
    for report in (dense, experts):
        flops = report["flops"]
        assert 0.95 < flops["products"] / flops["model_per_device"] < 2  # attention is computed again; rows are padded
        assert flops["xla_loops_once"] < flops["products"]
    assert dense["loops_of_unknown_length"] == []


def test_the_work_of_muon_is_expected():
    report = report_of("train", {"data": 8}, "optim.name=muon")
    flops = report["flops"]
    assert report["warnings"] == [] and flops["products"] > 3 * flops["model_per_device"]
    own = flops["products"] - flops["optimizer"]  # every device updates all of the weights
    assert 0.95 < own / flops["model_per_device"] < 1.1 and "by the optimizer's" in describe(report)


def test_state_is_spread_and_donated(dense):
    params = count_params(network_of(config_of()))
    whole = 4 * 4 * params  # weights, two moments and the average, float32
    assert dense["memory"]["arguments"] < 0.3 * whole
    state = dense["memory"]["state"]
    assert sum(state.values()) < dense["memory"]["arguments"] < 1.1 * sum(state.values())
    assert state["moments"] < 2.01 * state["weights"] == 2.01 * state["average"]
    assert dense["memory"]["aliased"] > 0.9 * dense["memory"]["outputs"]
    assert dense["memory"]["fits"] and dense["estimate"]["best"] <= dense["estimate"]["worst"]


def test_warnings_of_a_batch_that_is_not_kept_split(monkeypatch):
    monkeypatch.setattr(dit, "split_batch", lambda x, *_: x)
    warnings = "\n".join(report_of("train", DENSE)["warnings"])
    assert "an activation is whole over fsdp" in warnings
    assert "of activations" in warnings and "inside a loop, 2 times a step" in warnings


def test_warnings_of_experts_that_are_gathered(monkeypatch):
    import functools

    monkeypatch.setattr(dit, "MoE", functools.partial(_ragged, dit.MoE))
    warnings = report_of("train", EXPERTS, "model_changes.experts=4")["warnings"]
    assert any("of experts (params/blocks/moe/experts/" in line and "over expert" in line for line in warnings)


def _ragged(moe, config, dtype, dispatch, mesh, name):
    return moe(config, dtype, "ragged", mesh, name=name)


def test_sampler_and_encoder(capsys):
    sample = report_of("sample", {"data": 8}, batch=4, steps=3, members=2)
    assert 0.9 < sample["flops"]["products"] / sample["flops"]["model_per_device"] < 1.2
    assert {row["purpose"] for row in sample["collectives"]} <= {"rows", "scalars", "reshard"}
    assert not any(row["loops"] for row in sample["collectives"]) and sample["warnings"] == []
    encode = report_of("encode", {"data": 8})
    assert 0.9 < encode["flops"]["products"] / encode["flops"]["model_per_device"] < 1.2
    text = describe(sample)
    assert "sample on cpu:8: 8 devices (data 8), batch 4" in text and "at best" in text and "no avoidable" in text


@pytest.mark.slow  # what `predict --mesh` places and sends; that it predicts the same: tests/inference/test_engine.py
def test_sampler_with_weights_that_are_split():
    sizes = {"data": 1, "fsdp": 2, "expert": 4}
    split, whole = (report_of("sample", mesh, "model_changes.experts=4", batch=8) for mesh in (sizes, {"data": 8}))
    weights = [one["memory"]["state"]["weights"] for one in (split, whole)]
    assert weights[0] < weights[1] / 3  # the autoencoder is whole
    assert {row["purpose"] for row in split["collectives"] if row["loops"]} == {"weights", "tokens", "results"}
    assert not any(row["loops"] for row in whole["collectives"]) and split["warnings"] == whole["warnings"] == []


def test_the_command(tmp_path, capsys):
    words = ["compile", "--config", NANO, "--topology", "cpu:8", "--what", "encode"]
    assert cli.main([*words, "--json", str(tmp_path / "report.json"), "--hlo", str(tmp_path / "program.txt")]) == 0
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert report["program"] == "encode" and report["chip"] is None and "estimate" not in report
    assert "name a GPU with --chip" in capsys.readouterr().out
    assert (tmp_path / "program.txt").read_text().startswith("HloModule")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mesh", "fdsp=8"], "did you mean 'fsdp'"),
        (["--mesh", "fsdp=many"], "give a whole number, such as fsdp=4"),
        (["--mesh", "fsdp=2,fsdp=4"], "fsdp is given twice"),
        (["--mesh", "fsdp=3"], "does not fit 8 devices"),
        (["--batch", "12"], "give a multiple of 8"),
        (["--batch", "0"], "--batch 0"),
        (["--config.objective=autoencoder"], "objective=autoencoder needs it"),
        (["--what", "sample", "--batch", "3"], "3 rows"),
        (["--topology", "v5p"], "give a TPU slice"),
        (["--topology", "cpu:0"], "--topology 'cpu:0': give a TPU slice such as v5e:8x8"),
        (["--topology", "cpu:00"], "cpu:N with N >= 1 for fake devices"),
        (["--what", "all", "--hlo", "h.txt"], "--hlo h.txt is the text of one program, not of --what all"),
        (["--ensemble", "4"], "--ensemble 4 is for --what sample or all, not for train"),
        (["--what", "encode", "--steps", "10"], "--steps 10 is for --what sample or all, not for encode"),
        (["--jobs", "1"], "--jobs 1 goes with --search"),
        (["--search", "--json", "x.json", "--steps", "3"], "--steps 3 is for --what sample"),
    ],
)
def test_mistakes(words, message, capsys):
    given = ["compile", "--config", NANO, "--topology", "cpu:8"]
    assert cli.main([*given, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_step_for_a_tpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'scaling-perception[tpu]'")
    from scaling_perception.scaling.topologies import prepare_environment

    prepare_environment("v5e:2x2")
    config, topology = config_of("train.dtype=bfloat16"), get_topology("v5e:2x2")
    report, _ = compile_program(config, topology, mesh_of(config, "fsdp=4", topology.devices), "train")
    assert report["memory"]["fits"] and report["warnings"] == [] and report["loops_of_unknown_length"] == []
    assert 0 < report["estimate"]["mfu_best"] < 1
    config = config_of("train.dtype=bfloat16", f"train.batch_size={2**22}")
    with pytest.raises(UserError, match=r"train does not fit v5e:2x2 \([\d.]+G of 15.75G of memory\)"):
        compile_program(config, topology, mesh_of(config, "fsdp=4", topology.devices), "train")


@pytest.mark.slow
def test_what_a_tpu_exchanges_for_its_experts():
    """In each of two layers rows go to their experts and back, and so do gradients: nothing is gathered over the axis
    but the numbers of rows. What an uneven load takes besides is not counted."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install 'scaling-perception[tpu]'")
    from scaling_perception.scaling.topologies import prepare_environment

    prepare_environment("v5e:2x4")
    config, topology = config_of("train.dtype=bfloat16", "model_changes.experts=4"), get_topology("v5e:2x4")
    mesh = mesh_of(config, "data=2,expert=4", topology.devices)
    report, _ = compile_program(config, topology, mesh, "train")
    found = {key: times for key, times in counts(report).items() if key[2] in ("tokens", "results")}
    assert found == {
        ("all-gather", "data+expert", "tokens"): (2, 0),
        ("ragged-all-to-all", "expert", "tokens"): (4, 0),
        ("ragged-all-to-all", "expert", "results"): (4, 0),
    }
    assert report["warnings"] == [] and report["loops_of_unknown_length"] == []
