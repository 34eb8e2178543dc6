"""Caching of blocks between steps: the tables of weights, what they reproduce exactly, and the network's part."""

import dataclasses

import jax
import numpy as np
import pytest

from scaling_perception.diffusion.caching import CACHES, cache_rows, combinations, computed_steps, fit_weights
from scaling_perception.evaluation.comparisons import evaluations_of, solver_of
from scaling_perception.evaluation.protocols import get_protocol, measure, prepare_raw
from scaling_perception.evaluation.sweep import sweep
from scaling_perception.evaluation.tables import images_csv
from scaling_perception.inference.budgets import CACHE_CELL, CELL, choose, load_budgets
from scaling_perception.inference.settings import Settings
from scaling_perception.models.compute import cached_macs, forward_macs
from scaling_perception.models.dit import DiT, PrecomputedConditioning, feature_update
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json

pytest_plugins = ("nano",)


def _replayed(rows, features):
    """What a run uses as features (T, ...) when the network computes ``features``, by the definition of the table."""
    last = older = np.zeros_like(features[0])
    used = []
    for step, feature in enumerate(features):
        if rows.compute[step]:
            older, last = last, feature
            used.append(feature)
        else:
            used.append(rows.last[step] * last + rows.older[step] * older)
    return np.stack(used)


@pytest.mark.parametrize("steps, interval", [(10, 3), (9, 2), (7, 7), (5, 12)])
def test_a_line_is_extrapolated_exactly_once_two_steps_are_computed(steps, interval):
    start, slope = np.random.default_rng(0).normal(size=(2, 4))
    features = start + np.arange(steps)[:, None] * slope
    line, held = (_replayed(cache_rows(name, steps, interval), features) for name in ("taylorseer", "fora"))
    np.testing.assert_allclose(line[interval:], features[interval:], atol=1e-5)
    np.testing.assert_array_equal(held, features[np.arange(steps) // interval * interval])
    np.testing.assert_array_equal(line[:interval], held[:interval], "there is one computed step until then")


def _moments(rows, features):
    last = older = np.zeros_like(features[0])
    found = []
    for step, now in enumerate(features):
        ahead, change = last - older, now - last
        found.append([last @ last, last @ ahead, ahead @ ahead, last @ change, ahead @ change])
        if rows.compute[step]:
            older, last = last, now
    return np.asarray(found)


def test_fitted_weights_find_a_recurrence_and_never_do_worse_than_the_line():
    rows, rng = cache_rows("l2p", 9, 3), np.random.default_rng(1)
    basis = rng.normal(size=(2, 50))
    curves = np.stack([np.cos(0.2 * np.arange(9)), 0.7 ** np.arange(9)], axis=1) @ basis  # two modes: two weights do
    fitted = fit_weights(rows, _moments(rows, curves))
    np.testing.assert_allclose(_replayed(fitted, curves)[3:], curves[3:], atol=1e-3)
    noisy = curves + rng.normal(size=curves.shape)
    fitted, line = fit_weights(rows, _moments(rows, noisy)), cache_rows("taylorseer", 9, 3)
    errors = [np.square(_replayed(one, noisy) - noisy).sum(1) for one in (fitted, line)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all() and errors[0].sum() < errors[1].sum()
    with pytest.raises(UserError, match="NaN or infinite"):
        fit_weights(rows, np.full((9, 5), np.nan))


def test_tables_and_what_is_refused():
    assert cache_rows("fora", 10, 1) is None and cache_rows("none", 10, 3) is None and cache_rows("l2p", 1, 2) is None
    assert [computed_steps(10, k) for k in (1, 2, 3, 10, 99)] == [10, 5, 4, 1, 1]
    assert list(cache_rows("fora", 7, 3).compute) == [1, 0, 0, 1, 0, 0, 1]
    assert combinations(["none", "fora", "none"], [2, 4]) == [("none", 1), ("fora", 2), ("fora", 4)]
    for word, options in [
        ("unknown cache 'furo'.*fora", {"cache": "furo"}),
        ("cache_interval 0", {"cache": "fora", "cache_interval": 0}),
        ("does not go with step_tolerance", {"cache": "fora", "step_tolerance": 0.1}),
        ("one evaluation a step", {"cache": "l2p", "solver": "heun", "steps": 1}),
    ]:
        with pytest.raises(UserError, match=word):
            Settings(**options)
    with pytest.raises(UserError, match="goes with cache"):
        combinations(["none"], [2])


def test_features_take_the_place_of_the_blocks(make_predictor):
    """At the step that made them both kinds of features give the network's output."""
    predictor = make_predictor(model={"depth": 2})
    config, params, rng = predictor.config, predictor.params, np.random.default_rng(0)
    shapes = ((3, config.tokens, config.dim), (2, 3, 6 * config.dim), (3, 2 * config.dim))
    fixed = PrecomputedConditioning(*[rng.normal(size=shape).astype(np.float32) for shape in shapes])
    x = rng.normal(size=(3, config.input_size, config.input_size, 4)).astype(np.float32)

    @jax.jit
    def network(x):
        def run(**more):
            t, label = np.zeros(1), np.zeros(3, np.int32)
            return DiT(config).apply({"params": params}, x, t, label, fixed=fixed, **more)

        out, found = run(mutable=["features"])
        kinds = [{name: found["features"][name]} for name in ("blocks", "trunk")]
        return run(), out, [run(features=one) for one in kinds], [feature_update(one, fixed.blocks) for one in kinds]

    plain, out, again, updates = network(x)
    np.testing.assert_allclose(out, plain, atol=1e-6)
    np.testing.assert_allclose(*updates, atol=1e-5)
    for other in again:
        np.testing.assert_allclose(other, plain, atol=1e-5)


def test_macs_of_a_cached_step_are_all_but_the_blocks(predictor):
    config = predictor.config
    deeper = dataclasses.replace(config, depth=config.depth + 3)
    modulation = 6 * config.dim**2  # of a block, which every step has
    assert cached_macs(deeper, "trunk") - cached_macs(config, "trunk") == 3 * modulation
    more = cached_macs(config, "blocks") - cached_macs(config, "trunk")
    assert more == (6 * config.depth - 2) * config.tokens * config.dim
    assert cached_macs(config, "trunk") < forward_macs(config)
    settings = Settings(steps=10, cache="fora-trunk", cache_interval=4)
    expected = 3 * forward_macs(config) + 7 * cached_macs(config, "trunk")
    assert predictor.macs("flow", predictor.evaluations(settings), 2) == pytest.approx(4 * expected)
    assert predictor.evaluations(Settings(steps=10, cache="fora", cache_interval=1)) == 10


@pytest.fixture(scope="module")
def shared(make_predictor):
    """Both tests below sample 2 images x 2 members in 4 steps, so that they share its programs."""
    return make_predictor()


def test_evaluations_and_budgets_of_cells_with_a_cache(shared, make_raw, tmp_path):
    """A cell is what the predictor gives, with its MACs, and is found again by a budget."""
    predictor, raws = shared, [make_raw(40, 56, seed) for seed in (0, 1)]
    protocol, caches = get_protocol("depth", "scenes"), [("taylorseer-trunk", 2), ("fora-trunk", 9)]
    found, _ = sweep(predictor, raws, "depth", protocol, [1, 4], [2], caches=caches, batch_size=4)
    settings = [(c["steps"], c["ensemble"], c.get("cache"), c.get("cache_interval")) for c in found["cells"]]
    assert settings == [(4, 2, *cache) for cache in caches], "one step computes all"
    for cell in found["cells"]:
        chosen = {name: cell[name] for name in ("steps", "ensemble", "cache", "cache_interval")}
        for raw, row in zip(raws, cell["rows"], strict=True):
            one = predictor(raw["image"], batch_size=4, **chosen)
            expected = measure(one.prediction, prepare_raw(raw, protocol), protocol)
            assert row["abs_rel"] == pytest.approx(expected["abs_rel"], rel=1e-5)
            assert cell["macs"] == pytest.approx(one.macs) and evaluations_of(cell) * cell["ensemble"] == one.forwards
    result = {**found, "task": "depth", "dataset": "scenes", "model": "nano", "protocol": protocol}
    lines = [line.split(",") for line in images_csv(result).splitlines()]
    at = lines[0].index("cache")
    assert lines[0][at + 1] == "cache_interval" and lines[-len(found["baselines"]) * 2 - 1][at] == "fora-trunk"
    assert {solver_of(cell) for cell in found["cells"]} == {"ddim + taylorseer-trunk 2", "ddim + fora-trunk 9"}
    plain = {name: found["cells"][0].get(name) for name in CELL} | {"steps": 1, "macs": 5.0}
    cells = [plain, *({name: cell.get(name) for name in (*CELL, *CACHE_CELL)} for cell in found["cells"])]
    cells = [{**cell, "error": 1 / (1 + number), "ci95": [0, 1]} for number, cell in enumerate(cells)]
    table = {"format": 1, "tasks": {"depth": {"cells": cells, "timing": {"fixed": 1.0, "per_forward": 1e-9}}}}
    choice = choose(table, "depth", macs=1e15, here=(1.0, 1e-9))
    assert (choice.cache, choice.cache_interval, choice.steps, choice.ensemble) == ("fora-trunk", 9, 4, 2)
    assert choose(table, "depth", macs=cells[0]["macs"]).cache is None
    write_json(tmp_path / "budgets.json", table)
    assert load_budgets(tmp_path) == table
    del cells[-1]["evaluations"]
    write_json(tmp_path / "budgets.json", table)
    with pytest.raises(UserError, match="no table of budgets"):
        load_budgets(tmp_path)
    with pytest.raises(UserError, match="every cell would compute every step"):
        sweep(predictor, raws, "depth", protocol, [1], [1], caches=[("fora", 2)])


def test_predictions_with_a_cache(shared, make_image):
    """Without cached steps bit for bit as without a cache; weights of methods are arguments of one program."""
    predictor, image, options = shared, make_image(), {"steps": 4, "ensemble": 2, "batch_size": 4}
    plain = predictor(image, **options)
    whole = predictor(image, cache="taylorseer", cache_interval=1, **options)
    np.testing.assert_array_equal(whole.prediction, plain.prediction)
    assert whole.macs == plain.macs and predictor.traces["sample"] <= 2
    names = [name for name, entry in CACHES.items() if entry is not None and entry.features == "trunk"]
    found = {name: predictor(image, cache=name, **options) for name in names}
    assert predictor.traces["sample"] == 2 and predictor.traces["cache moments"] == 1
    predictions = [one.prediction for one in found.values()]
    assert all(np.abs(one - plain.prediction).max() > 1e-4 for one in predictions)
    assert all(np.abs(one - predictions[0]).max() > 1e-5 for one in predictions[1:])
    assert all(one.macs < plain.macs and one.forwards < 8 for one in found.values())
    fitted = predictor.fit_cache([image], "depth", Settings(4, 2, cache="l2p-trunk"))
    assert fitted.last[0] == 1 and predictor.traces["cache moments"] == 1
    own = predictor(image, cache="l2p-trunk", **options).prediction
    assert np.abs(own - found["l2p-trunk"].prediction).max() > 0, "fitted to other pictures"
    with pytest.raises(UserError, match="has no weights to fit"):
        predictor.fit_cache([image], "depth", Settings(4, 2, cache="fora"))
