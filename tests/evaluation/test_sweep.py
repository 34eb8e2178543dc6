"""The sweep equals calling the predictor cell by cell, shares its work, goes on after a stop, and hides nothing."""

import json
import resource
from types import SimpleNamespace

import numpy as np
import pytest

from scaling_perception.evaluate import _report_constants
from scaling_perception.evaluation.journal import Journal
from scaling_perception.evaluation.nested import CONSTANT, Adaptive, SweepContext
from scaling_perception.evaluation.protocols import get_protocol, measure, prepare_raw
from scaling_perception.evaluation.sweep import fill_invalid, sweep
from scaling_perception.inference.settings import Settings
from scaling_perception.support import locks
from scaling_perception.support.errors import UserError
from scaling_perception.tasks.resize import resize_bilinear

pytest_plugins = ("nano",)

CACHES = [("none", 1)]


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
        assert cell["metrics"]["abs_rel"] == {"mean": pytest.approx(np.mean(values)), "ci95": None}, "3 images"
    assert len({cell["metrics"]["abs_rel"]["mean"] for cell in found["cells"]}) == 8, "every cell is its own"
    assert [one.raw["key"] for one in shown] == ["raw/0", "raw/1"]
    assert (shown[0].cell["steps"], shown[0].cell["ensemble"], shown[0].cell["preset"]) == (3, 2, "fixed")


def test_answers_that_are_one_value_everywhere_are_marked_and_named(make_raw, capsys):
    raw, protocol = make_raw(40, 56, 0), get_protocol("depth", "scenes")
    way = SweepContext(None, "depth", protocol, "lsq", 1, Adaptive(), 0, None)
    prepared, ramp = prepare_raw(raw, protocol), np.linspace(0, 1, 40 * 56).reshape(40, 56)
    rows = [way.measure(SimpleNamespace(prediction=p, painted=None), prepared) for p in (ramp, np.full((40, 56), 0.3))]
    assert [CONSTANT in row for row in rows] == [False, True]
    cell = {"preset": "fixed", "solver": "ddim", "steps": 1, "ensemble": 2}
    _report_constants([{**cell, "constant_predictions": 3}, cell])
    assert capsys.readouterr().err == (
        "note: fixed ddim, 1 steps, 2 members: 3 prediction(s) are constant over the picture\n"
    )


def test_controls_are_predictions_without_the_picture(predictor, source):
    protocol = get_protocol("depth", "scenes")
    found, _ = sweep(predictor, source, "depth", protocol, [3, 2], [1, 2], key=5, batch_size=4, controls=2)
    assert (found["controls"]["cell"]["steps"], found["controls"]["cell"]["ensemble"]) == (2, 2)
    for index in range(2):
        raw, other = source[index], source[index + 1]["image"]
        size = raw["image"].shape[:2]
        pictures = {"blind": np.full((*size, 3), 128, np.uint8), "shuffled": np.round(resize_bilinear(other, size))}
        for name, picture in pictures.items():
            out = predictor(picture.astype(np.uint8), steps=2, ensemble=2, preset="fixed", key=5, batch_size=4)
            expected = measure(out.prediction, prepare_raw(raw, protocol), protocol)
            rows = found["controls"][name]["rows"]
            assert len(rows) == 2 and rows[index]["key"] == raw["key"]
            assert rows[index]["abs_rel"] == pytest.approx(expected["abs_rel"], rel=1e-4)


@pytest.mark.parametrize("task", ["flow", "amodal"])
def test_other_tasks_with_baselines_and_floor(predictor, source, task):
    protocol = get_protocol(task, "scenes")
    found, shown = sweep(predictor, source, task, protocol, [2], [1, 2], batch_size=4, panels=1)
    ceilings = ["autoencoder", *(["threshold"] if task == "amodal" else [])]
    assert list(found["baselines"]) == [*protocol["baselines"], *ceilings]
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
    filled = fill_invalid(make_raw(4, 6, depth=depth, valid=valid), "depth")
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
        (([1], [1], [None], Settings(reduce="mean")), "merge depth members"),
        (
            ([1], [1], [None], Settings(aspect="tile"), 0, 4, 1.0, 0, None, ["ddim"], CACHES, Adaptive((0.1,))),
            "'tile' is",
        ),
    ):
        with pytest.raises(UserError, match=message):
            sweep(predictor, source, "depth", protocol, *arguments)


def test_solvers_are_part_of_the_grid(predictor, source):
    protocol, more = get_protocol("depth", "scenes"), {"batch_size": 4, "solvers": ["ddim", "dpm++2m", "single"]}
    found, _ = sweep(predictor, source, "depth", protocol, [3], [2], **more)
    assert [(c["solver"], c["steps"]) for c in found["cells"]] == [("ddim", 3), ("dpm++2m", 3), ("single", 1)]
    expected = predictor(source[0]["image"], steps=3, ensemble=2, solver="dpm++2m", batch_size=4)
    expected = measure(expected.prediction, prepare_raw(source[0], protocol), protocol)
    rows = [cell["rows"][0] for cell in found["cells"]]
    assert rows[1]["abs_rel"] == pytest.approx(expected["abs_rel"], rel=1e-6) != rows[0]["abs_rel"]


@pytest.mark.parametrize("task", ["depth", "flow"])
def test_adaptive_cells_are_what_the_predictor_does(predictor, make_raw, task):
    """Read off the largest ensemble (two batches of three members), against runs that really stop."""
    raws = [make_raw(32, 32, seed) for seed in range(5)]
    protocol, options = get_protocol(task, "scenes"), {"steps": 5, "ensemble": 6, "batch_size": 4}
    tolerances = {"depth": (0.0, 0.0455, 1e9), "flow": (0.0, 0.715, 1e9)}[task]
    looks = {"depth": (0.0, 0.66, 1e9), "flow": (0.0, 0.705, 1e9)}[task]
    adaptive = Adaptive(tolerances, 2, looks, 2)
    found, _ = sweep(
        predictor, Source(raws), task, protocol, [5], [6], batch_size=4, adaptive=adaptive, macs_per_forward=1.0
    )
    kinds = [(cell["kind"], cell.get("tolerance", cell.get("step_tolerance"))) for cell in found["cells"]]
    names = {"adaptive": "tolerance", "steps": "step_tolerance"}
    assert kinds == [("constant", None), *[("adaptive", t) for t in tolerances], *[("steps", t) for t in looks]]
    fixed, prompts = found["cells"][0], [raw["image2"] for raw in raws] if task == "flow" else None
    for cell in found["cells"][1:]:
        rule = {names[cell["kind"]]: cell[names[cell["kind"]]]}
        out = predictor([raw["image"] for raw in raws], task, prompt=prompts, **options, **rule)
        assert cell["forwards"] == out.forwards.tolist()
        for raw, prediction, row in zip(raws, out.prediction, cell["rows"], strict=True):
            expected = measure(prediction, prepare_raw(raw, protocol), protocol)
            metric = protocol["metrics"][0]
            assert row[metric] == pytest.approx(expected[metric], rel=1e-4)
        mean = float(np.mean(cell["forwards"]))
        assert cell["macs"] == mean * found["macs_per_forward"] and sum(cell["counts"].values()) == 5
        assert cell["mean_steps"] * cell["mean_members"] == pytest.approx(mean)
        assert 0 < cell["seconds"]
    by = {(cell["kind"], tolerance): cell for cell, (_, tolerance) in zip(found["cells"], kinds, strict=True)}
    for kind, values, least in (("adaptive", tolerances, 2), ("steps", looks, 4)):
        assert by[kind, 0.0]["rows"] == fixed["rows"] and by[kind, 0.0]["macs"] == fixed["macs"]
        assert len(by[kind, values[1]]["counts"]) > 1, "between the ends images differ"
        assert by[kind, 1e9]["counts"] == {str(least): 5}


@pytest.mark.parametrize(
    ("task", "shared"),
    [
        ("depth", {"spacing": "leading", "eta": 0.5, "clip": 1.0, "antithetic": True}),
        ("flow", {"aspect": "letterbox", "antithetic": True}),
        ("amodal", {"aspect": "tile"}),
    ],
)
def test_settings_of_all_cells_are_those_of_the_predictor(make_predictor, make_raw, task, shared):
    """Arrays of the sweep's last cell and of a call with the same settings; a letterbox and windows included."""
    predictor = make_predictor(seed=1, task_options={"keep_visible": True, "mask_threshold": 110})
    raws = [make_raw(40, 56, 0), make_raw(30, 44, 1)]
    prompts = {"depth": None, "flow": [raw["image2"] for raw in raws], "amodal": [raw["visible_mask"] for raw in raws]}
    found, shown = sweep(
        predictor,
        Source(raws),
        task,
        get_protocol(task, "scenes"),
        [2],
        [1, 3],
        shared=Settings(**shared),
        key=5,
        batch_size=4,
        panels=2,
        controls=1,
    )
    out = predictor([r["image"] for r in raws], task, 2, 3, 5, prompts[task], batch_size=4, **shared)
    for one, prediction in zip(shown, out.prediction, strict=True):
        np.testing.assert_allclose(one.estimate.prediction, prediction, atol=2e-5)
        assert one.estimate.prediction.shape[:2] == one.raw["image"].shape[:2]
    cell = found["cells"][-1]
    named = {name: value for name, value in shared.items() if name != "spacing"}
    assert named.items() <= cell.items() and cell["spacing"] == shared.get("spacing", "trailing")
    assert cell["macs"] == np.mean(out.forwards) * found["macs_per_forward"], "windows are counted"
    if task == "amodal":
        assert out.forwards[0] > 6 and cell["forwards"] == out.forwards.tolist()
        assert all((one.estimate.painted <= one.estimate.prediction).all() for one in shown), "the mask joins it"
        assert (shown[0].estimate.painted != shown[0].estimate.prediction).any()


def test_early_exit_cells_of_nested_sizes(predictor, source):
    protocol, options = get_protocol("depth", "scenes"), {"batch_size": 4, "adaptive": Adaptive((), 2, (1e9,), 2)}
    found, _ = sweep(predictor, source, "depth", protocol, [2, 5], [1, 3], **options)
    cells = [(c["kind"], c["steps"], c["ensemble"], c["mean_steps"]) for c in found["cells"]]
    assert cells == [
        *[("constant", 2, 1, 2), ("constant", 2, 3, 2)],  # too few steps for an exit
        *[("constant", 5, 1, 5), ("constant", 5, 3, 5), ("steps", 5, 1, 4), ("steps", 5, 3, 4)],
    ]
    stopped = predictor(source[0]["image"], steps=5, ensemble=3, step_tolerance=1e9, batch_size=4)
    expected = measure(stopped.prediction, prepare_raw(source[0], protocol), protocol)
    assert found["cells"][-1]["rows"][0]["abs_rel"] == pytest.approx(expected["abs_rel"], rel=1e-4)


def _without_times(found):
    text = json.dumps(found)
    found = json.loads(text)
    for cell in found["cells"]:
        assert cell.pop("seconds") > 0
    return found


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_where_it_was(predictor, make_raw, tmp_path):
    raws = [make_raw(40, 56, seed) for seed in range(7)]
    raws[2] = UserError("c.png is cut short")
    arguments = ("depth", get_protocol("depth", "scenes"), [2], [1, 2])
    options = {"batch_size": 4, "adaptive": Adaptive((0.05,)), "panels": 1}
    options["show"] = lambda shown, number: {"key": shown.raw["key"], "number": number}
    whole, pictures = sweep(predictor, Source(raws), *arguments, **options)
    options["journal"] = tmp_path / "x.json.journal"
    stopped = Source([*raws[:5], Stopped(), raws[6]])  # in the third group of two
    with pytest.raises(Stopped):
        sweep(predictor, stopped, *arguments, **options)
    text = options["journal"].read_bytes()
    assert text.count(b"\n") == 3
    options["journal"].write_bytes(text + text.splitlines()[1][:40])  # a kill in the middle of a line
    read = []

    class Counting(Source):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    found, again = sweep(predictor, Counting(raws), *arguments, **options)
    assert read == [4, 5, 6] and again == pictures == [{"key": "raw/0", "number": 0}]
    assert _without_times(found) == _without_times(whole)
    assert found["skipped"] == [{"key": "sample 2", "kind": "unreadable", "reason": "c.png is cut short"}]
    done, _ = sweep(predictor, Source(raws), *arguments, **options)
    assert done == found, "nothing is done twice, not even times change"


def test_a_journal_of_other_settings_is_refused(predictor, source, tmp_path):
    path, protocol = tmp_path / "x.journal", get_protocol("depth", "scenes")

    def run(**changes):
        options = {"steps": [2], "ensemble": [1, 2], "batch_size": 4, "journal": path, **changes}
        return sweep(predictor, source, "depth", protocol, **options)

    run()
    for changes, message in (
        ({"steps": [2, 3]}, r"steps was \[2\], is \[2, 3\]"),
        ({"key": 1}, "seed was 0, is 1"),
        ({"presets": ["paper"]}, "presets was"),
        ({"shared": Settings(reduce="median")}, "reduce was"),
        ({"shared": Settings(eta=0.5)}, "eta was null, is 0.5"),
        ({"shared": Settings(spacing="leading", aspect="tile")}, "spacing was null, is .*; aspect was null, is"),
        ({"adaptive": Adaptive((0.1,))}, "adaptive was"),
    ):
        before = path.read_bytes()
        with pytest.raises(UserError, match=message) as error:
            run(**changes)
        assert "remove the file to start anew" in str(error.value) and path.read_bytes() == before
    path.write_bytes(b"{]\n" + path.read_bytes())
    with pytest.raises(UserError, match="is damaged: remove it"):
        run()
    path.write_bytes(b'{"other": 1}\n')
    with pytest.raises(UserError, match="no journal of this version"):
        run()


def test_two_runs_do_not_write_one_journal(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SAME_MACHINE", 0.0)
    with Journal(tmp_path / "j", {"a": 1}, {}), pytest.raises(UserError, match="in use by another evaluation"):
        Journal(tmp_path / "j", {"a": 1}, {})


def test_a_journal_on_a_full_disk_names_itself_and_goes_on(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(UserError, match="cannot write .*/j: File too large"),
            Journal(tmp_path / "j", {}, {}) as one,
        ):
            one.append({"a": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "j").stat().st_size + 5, limit[1]))
            one.append({"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with Journal(tmp_path / "j", {}, {}) as one:
        assert one.groups == [{"a": 1}]
