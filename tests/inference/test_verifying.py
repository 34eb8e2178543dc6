"""Scores without truth: what they must not depend on, what they say of answers that are known, and their uses."""

import numpy as np
import pytest

from scaling_perception.evaluation.comparisons import against_usual
from scaling_perception.evaluation.nested import Adaptive
from scaling_perception.evaluation.protocols import get_protocol, measure, prepare_raw
from scaling_perception.evaluation.sweep import sweep
from scaling_perception.inference.outputs import difference
from scaling_perception.inference.settings import Settings
from scaling_perception.inference.verifying import copies
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import TASKS, TaskOptions, get_task
from scaling_perception.tasks.verifiers import Seen

pytest_plugins = ("nano",)
SIDE = 24
EVERY = [(name, verifier) for name, task in TASKS.items() for verifier in task.verifiers]
MEMBERS = {"depth": (), "flow": (2,), "amodal": (3,), "normals": (3,)}


def _seen(merged, seed=0, **more):
    rng = np.random.default_rng(seed)
    image, prompt = rng.uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)
    usual = {"image": image, "prompt": prompt, "merged": merged, "options": TaskOptions(), "size": (SIDE, SIDE)}
    return Seen(**usual | more)


def _members(task, count=5):
    rng = np.random.default_rng(3)
    found = rng.normal(0, 0.7, (count, SIDE, SIDE, *MEMBERS[task])).astype(np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True) if task == "normals" else found


@pytest.mark.parametrize("task, name", EVERY)
def test_a_score_belongs_to_a_member(task, name):
    """Whatever the order and the copies of the others, given what all are merged to."""
    members, verifier = _members(task), get_task(task).verifier(name)
    merged, _ = get_task(task).merged(members, get_task(task).reduce_modes[0], TaskOptions())
    seen = _seen(merged, reverse=-merged)
    found = verifier.score(members, seen)
    assert found.shape == (5,) and np.isfinite(found).all() and (found >= 0).all() and len(set(found)) > 1
    order = [3, 0, 4, 1, 1, 2]
    np.testing.assert_allclose(verifier.score(members[order], seen), found[order], rtol=1e-6)
    assert verifier.text


def _moved(flow):
    """A smooth pair of pictures, the second moved by a constant flow."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float64)

    def draw(x, y):
        return np.stack([np.sin(x / 5 + y / 9 + c) * 0.9 for c in range(3)], axis=-1).astype(np.float32)

    return {"image": draw(columns, rows), "prompt": draw(columns - flow[0], rows - flow[1])}


def test_a_perfect_flow_has_no_photometric_error_and_comes_back():
    flow = np.broadcast_to(np.float32([3, -2]), (SIDE, SIDE, 2))
    members = np.stack([flow, flow + np.float32([1, 0]), 0 * flow, flow + 100])
    pair = _moved((3, -2))
    error = TASKS["flow"].verifiers["photometric"].score(members, _seen(flow, **pair))
    assert error[0] < 1e-6 < 0.01 < error[1] < error[2] < error[3] == np.inf, "nothing is inside the other frame"
    there = TASKS["flow"].verifiers["cycle"].score(members, _seen(flow, reverse=-flow))
    np.testing.assert_allclose(there[:3], [0, 1, 13**0.5], atol=1e-5)
    half = np.broadcast_to(np.float32([2.5, -1.5]), (1, SIDE, SIDE, 2))
    between = TASKS["flow"].verifiers["photometric"].score(half, _seen(flow, **_moved((2.5, -1.5))))
    assert between[0] < 0.01, "between pixels it is bilinear"
    # of a frame of (2 SIDE, SIDE), whose height is squashed: 3 px across and -2 px down here are 3 and -4 by its width
    tall = {"size": (2 * SIDE, SIDE), "reverse": -flow * np.float32([1, 2])}
    for name, score in (("photometric", error[0]), ("cycle", 0.0)):
        by = TASKS["flow"].verifiers[name]
        found = by.score(flow[None] * np.float32([1, 2]), _seen(flow, **pair, **tall))
        np.testing.assert_allclose(found, score, atol=1e-6)
    turned = TASKS["flow"].verifiers["cycle"].reverse({"image": 1, "image2": 2, "key": "a"})
    assert turned == {"image": 2, "image2": 1, "key": "a"}


def test_depth_scores_know_neither_scale_nor_shift():
    members = _members("depth")
    seen = _seen(members.mean(0))
    for name, turn in (("edges", -3.0), ("edges", 0.5), ("agreement", 0.5)):
        score = TASKS["depth"].verifiers[name].score
        np.testing.assert_allclose(score(turn * members + 2, seen), score(members, seen), rtol=1e-4)
    picture = np.zeros((SIDE, SIDE, 3), np.float32)
    picture[:, SIDE // 2 :] = 1
    same, across, flat = picture[..., 0], picture[..., 0].T, 0 * picture[..., 0]
    found = TASKS["depth"].verifiers["edges"].score(np.stack([same, across, flat]), _seen(same, image=picture))
    assert found[0] < 1e-6 and found[1] > 0.9 and found[2] == 1, "edges where the picture has them"
    agree = TASKS["depth"].verifiers["agreement"].score(np.stack([2 * same, -same, flat]), _seen(same))
    np.testing.assert_allclose(agree, [0, 1, 1], atol=1e-6)


def test_amodal_scores():
    whole = np.ones((4, SIDE, SIDE, 3), np.float32)
    whole[0, 2:20], whole[1, 2:8], whole[2, 5:8] = -1, -1, -1
    prompt = np.full((SIDE, SIDE, 3), -1, np.float32)
    prompt[2:8] = 1
    seen = _seen(whole[1], prompt=prompt)
    np.testing.assert_allclose(TASKS["amodal"].verifiers["visible"].score(whole, seen), [0, 0, 0.5, 1])
    np.testing.assert_allclose(TASKS["amodal"].verifiers["agreement"].score(whole, seen), [2 / 3, 0, 0.5, 1])


def test_copies():
    assert copies(np.full(5, 0.3)).tolist() == [2] * 5, "equal scores: the usual merge"
    scores = np.array([0.1, 0.9, 0.2, np.inf, 0.4])
    found = copies(scores)
    assert found.sum() == 10 and found[3] == 0 and found[0] >= found[2] >= found[4] >= found[1]
    order = [2, 4, 0, 1, 3]
    assert copies(scores[order]).tolist() == found[order].tolist()
    assert copies(np.full(3, np.inf)).tolist() == [2] * 3


def _source():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (3, 2, 40, 56, 3), np.uint8)
    truth = {"flow": np.ones((40, 56, 2), np.float32), "valid": np.ones((40, 56), bool)}
    return [{"key": str(i), "image": a, "image2": b, **truth} for i, (a, b) in enumerate(pictures)]


def test_cells_are_what_the_predictor_gives(predictor):
    """Of every use; `cycle` costs a second prediction, and is compared with twice the members."""
    source, protocol = _source(), get_protocol("flow", "scenes")
    uses = tuple((name, use) for name in ("photometric", "cycle") for use in ("best", "weighted"))
    adaptive = Adaptive(tolerances=(0.25,), verifiers=(*uses, ("photometric", "allocate")))
    result, _ = sweep(predictor, source, "flow", protocol, [1], [1, 2, 4], adaptive=adaptive, batch_size=4)
    cells = {(c.get("verifier"), c.get("verify"), c["ensemble"]): c for c in result["cells"]}
    assert len(cells) == len(result["cells"]) == 3 + 2 * 4 + 1
    fixed = [cell for cell in result["cells"] if cell["kind"] == "constant" and "verifier" in cell]
    shares = {(cell["verifier"], cell["ensemble"]): cell["macs"] / cells[None, None, 4]["macs"] for cell in fixed}
    assert shares == {("photometric", 2): 0.5, ("photometric", 4): 1, ("cycle", 2): 1, ("cycle", 4): 2}
    even = {(m.cell["verifier"], m.cell["ensemble"]): m.even for m in against_usual(result["cells"], "epe")}
    assert even["cycle", 4] is None and even["cycle", 2] is not None
    for (verifier, use, ensemble), cell in cells.items():
        if verifier is None or ensemble == 2:
            continue
        more = {"tolerance": 0.25} if use == "allocate" else {}
        settings = Settings(1, ensemble, verifier=verifier, verify=use, **more)
        found = list(predictor.stream(source, "flow", settings, 0, batch_size=4))
        for raw, one, row in zip(source, found, cell["rows"], strict=True):
            epe = measure(one.prediction, prepare_raw(raw, protocol), protocol)["epe"]
            assert epe == pytest.approx(row["epe"], rel=1e-3), (verifier, use)
        spent = [one.forwards for one in found]
        assert spent == cell["forwards"] if use == "allocate" else spent == [8 if verifier == "cycle" else 4] * 3
    assert cells["photometric", "best", 4]["rows"] != cells[None, None, 4]["rows"]


def test_one_member_is_as_without_and_the_best_is_a_member(predictor, make_image):
    pair = {"prompt": make_image(seed=1), "task": "flow", "steps": 1}
    plain = predictor(make_image(), ensemble=1, **pair)
    for use in ("best", "weighted"):
        one = predictor(make_image(), ensemble=1, **pair, verifier="cycle", verify=use)
        np.testing.assert_array_equal(one.prediction, plain.prediction)
        assert one.forwards == 1, "with nothing to choose, nothing is predicted twice"
    best = predictor(make_image(), ensemble=4, **pair, verifier="photometric")
    members = [np.abs(member - best.prediction).max() for member in best.members]
    assert min(members) < 1e-5 < max(members) and best.uncertainty.max() > 0, "one of the members, as it is"


def test_what_is_refused(predictor, make_image):
    for message, settings in (
        ("unknown verify 'bset'; did you mean 'best'", {"verifier": "edges", "verify": "bset"}),
        ("verify 'allocate' goes with verifier", {"verify": "allocate"}),
        ("does not go with verifier", {"verifier": "edges", "merge_in": "latents"}),
        ("does not go with step_tolerance", {"verifier": "edges", "step_tolerance": 0.1}),
        ("goes with tolerance", {"verifier": "edges", "verify": "allocate"}),
        ("verify 'best' does not go with tolerance", {"verifier": "edges", "tolerance": 0.1}),
    ):
        with pytest.raises(UserError, match=message):
            Settings(**settings)
    with pytest.raises(UserError, match="verifier 'cycle' is none of depth; known: agreement, edges"):
        predictor(make_image(), "depth", verifier="cycle")
    with pytest.raises(UserError, match="saves nothing by cycle"):
        predictor(make_image(), "flow", prompt=make_image(), verifier="cycle", verify="allocate", tolerance=1.0)
    with pytest.raises(UserError, match="verifier 'edges' is none of generation"):
        get_task("generation").verifier("edges")


def test_a_setting_that_is_recorded_only_where_it_was_turned_is_missed_when_it_is_turned_back():
    for name, value, usual in (
        ("merge_in", "latents", "pixels"),
        ("verifier", "edges", None),
        ("cache", "fora", "none"),
    ):
        assert difference({name: value, "steps": 2}, {"steps": 2}) == [(name, value, usual)]
        assert difference({"steps": 2}, {name: value, "steps": 2}) == [(name, usual, value)]
        assert difference({name: value}, {name: value}) == []
