"""The sweep equals calling the predictor cell by cell, shares its work, and hides nothing that it leaves out."""

import numpy as np
import pytest

from scaling_perception.evaluation.protocols import get_protocol, measure, prepare_raw
from scaling_perception.evaluation.sweep import fill_invalid, summarise, sweep
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)


class Source:
    """Raw samples from a list; an exception in the list is raised when it is read."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if isinstance(self.samples[index], Exception):
            raise self.samples[index]
        return self.samples[index]


@pytest.fixture
def source(make_raw):
    return Source([make_raw(40, 56, 0), make_raw(30, 44, 1), make_raw(40, 56, 2)])


def test_cells_equal_separate_predictions(predictor, source):
    protocol = get_protocol("depth", "scenes")
    more = {"key": 5, "batch_size": 4, "macs_per_forward": 10.0, "panels": 2}
    found, shown = sweep(predictor, source, "depth", protocol, [2, 3], [1, 2], [None, "paper"], **more)
    assert found["images"] == 3 and not found["skipped"]
    settings = [(c["preset"], c["spacing"], c["steps"], c["ensemble"], c["macs"]) for c in found["cells"]]
    assert settings == [
        (preset, spacing, steps, size, 10.0 * steps * size)
        for preset, spacing in (("fixed", "trailing"), ("paper", "leading"))
        for steps in (2, 3)
        for size in (1, 2)
    ]
    for cell in found["cells"]:
        assert cell["seconds"] > 0 and cell["schedule"] == "cosine" and cell["reduce"] == "lsq"
        for i, row in enumerate(cell["rows"]):
            raw = source[i]
            out = predictor(
                raw["image"], steps=cell["steps"], ensemble=cell["ensemble"], preset=cell["preset"], key=5, batch_size=4
            )
            expected = measure(out.prediction, prepare_raw(raw, protocol), protocol)
            assert row["key"] == raw["key"] and row["abs_rel"] == pytest.approx(expected["abs_rel"], rel=1e-4)
            assert row["delta1"] == pytest.approx(expected["delta1"], abs=2e-3)  # a pixel may lie on the threshold
        values = [row["abs_rel"] for row in cell["rows"]]
        mean, (low, high) = cell["metrics"]["abs_rel"]["mean"], cell["metrics"]["abs_rel"]["ci95"]
        assert mean == pytest.approx(np.mean(values)) and low <= mean <= high
    assert len({cell["metrics"]["abs_rel"]["mean"] for cell in found["cells"]}) == 8, "every cell is its own"
    assert [one.raw["key"] for one in shown] == ["raw/0", "raw/1"]
    assert (shown[0].cell["steps"], shown[0].cell["ensemble"], shown[0].cell["preset"]) == (3, 2, "fixed")


@pytest.mark.parametrize("task", ["flow", "amodal"])
def test_other_tasks_with_baselines_and_floor(predictor, source, task):
    protocol = get_protocol(task, "scenes")
    found, shown = sweep(predictor, source, task, protocol, [2], [1, 2], batch_size=4, panels=1)
    assert list(found["baselines"]) == [*protocol["baselines"], "autoencoder"]
    for value in (*found["baselines"].values(), *found["cells"]):
        assert [row["key"] for row in value["rows"]] == ["raw/0", "raw/1", "raw/2"]
        assert set(value["metrics"]) == set(protocol["metrics"])
    assert found["cells"][0]["macs"] is None or found["cells"][0]["macs"] > 0
    assert shown[0].estimate.prediction.shape[:2] == (40, 56)


def test_floor_is_the_truth_through_the_autoencoder(predictor, source):
    """The nano autoencoder is lossy, but its round trip is no prediction: it must not depend on the sampler."""
    protocol = get_protocol("depth", "scenes")
    found = [sweep(predictor, source, "depth", protocol, [2], [1], key=k, batch_size=4)[0] for k in (0, 1)]
    assert found[0]["baselines"] == found[1]["baselines"]
    assert found[0]["cells"][0]["rows"] != found[1]["cells"][0]["rows"]


def test_holes_of_the_truth_are_filled_for_the_floor(make_raw):
    depth = np.full((4, 6), 5.0, np.float32)
    valid = np.zeros((4, 6), bool)
    depth[:, 1], valid[:, 1] = 2.0, True
    depth[:, 4], valid[:, 4] = 3.0, True
    filled = fill_invalid(make_raw(4, 6, depth=depth, valid=valid))
    np.testing.assert_array_equal(filled["depth"], np.tile(np.float32([2, 2, 2, 3, 3, 3]), (4, 1)))
    assert filled["valid"].all() and filled["flow"].shape == (4, 6, 2)


def test_each_graph_is_compiled_once(make_predictor, make_raw):
    predictor = make_predictor(seed=1)
    source = Source([make_raw(40 + i, 56, i) for i in range(5)])  # three groups, the last one padded
    sweep(predictor, source, "depth", get_protocol("depth", "scenes"), [2], [1, 2], [None, "paper"], batch_size=4)
    assert predictor.traces == {"encode": 1, "sample": 1, "round_trip": 1}


def test_samples_that_are_left_out_are_listed(predictor, make_raw):
    empty = make_raw(seed=7, whole_mask=np.zeros((40, 56), bool))
    source = Source([UserError("a.png is cut short"), empty, make_raw(seed=2)])
    found, _ = sweep(predictor, source, "amodal", get_protocol("amodal", "scenes"), [2], [2], batch_size=4)
    assert found["images"] == 1
    assert found["skipped"] == [
        {"key": "sample 0", "kind": "unreadable", "reason": "a.png is cut short"},
        {"key": "raw/7", "kind": "unmeasurable", "reason": "the true mask is empty"},
    ]
    with pytest.raises(UserError, match="no image could be evaluated: sample 0: a.png is cut short"):
        sweep(predictor, Source(source.samples[:1]), "amodal", get_protocol("amodal", "x"), [2], [2], batch_size=4)


def test_refusals(predictor, source):
    protocol = get_protocol("depth", "scenes")
    for arguments, message in (
        (([], [1]), "no steps"),
        (([1], []), "no ensemble"),
        (([1], [0]), "ensemble 0"),
        (([0], [1]), "0 sampling steps"),
        (([1], [1], ["fixd"]), "did you mean 'fixed'"),
        (([1], [1], [None], "mean"), "merge depth members"),
    ):
        with pytest.raises(UserError, match=message):
            sweep(predictor, source, "depth", protocol, *arguments)


def test_summary_of_one_image_has_no_width():
    assert summarise([{"key": "a", "x": 2.0}]) == {"x": {"mean": 2.0, "ci95": [2.0, 2.0]}}
