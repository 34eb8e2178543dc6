"""Laws are recovered from points made of them, intervals hold the truth, and files survive a round trip."""

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_laws import TRUTHS, made

from scaling_perception.fit import add_arguments
from scaling_perception.scaling.law_choice import choose_form
from scaling_perception.scaling.law_fit import Options, Problem, fit_problem
from scaling_perception.scaling.law_forms import FORMS
from scaling_perception.scaling.law_solver import Loss, fit, jacobian, solve, starts
from scaling_perception.scaling.laws import (
    decades_beyond,
    fit_law,
    load_law,
    predict,
    predict_interval,
    predict_samples,
    write_law,
)  # fmt: skip
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import make_parser, run_verb

QUICK = Options(bootstraps=200)


@pytest.mark.parametrize("form", TRUTHS)
def test_slopes_are_the_derivatives(form):
    points = made(form, 20)
    problem = Problem.of(points, form, Options(loss="lsq"))
    inner = starts(problem.form, problem.lx, problem.ly, 3)
    _, slopes = jacobian(problem.form, inner, problem.lx)
    for j in range(problem.form.size):
        step = np.zeros(problem.form.size)
        step[j] = 1e-6
        ends = [jacobian(problem.form, inner + sign * step, problem.lx)[0] for sign in (1, -1)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slopes[:, j], atol=2e-6)
    law = problem.form.value(problem.published(inner), np.log(points.x))
    np.testing.assert_allclose(law, problem.scale * problem.form.evaluate(inner, problem.lx), rtol=1e-8)


@pytest.mark.parametrize("form", TRUTHS)
def test_a_law_without_noise_is_recovered(form):
    problem = Problem.of(made(form, 120), form, Options(delta=1e-3))
    found = problem.published(fit_problem(problem, QUICK).inner[None])[0]
    np.testing.assert_allclose(found, TRUTHS[form][0], rtol=2e-3)


def test_the_best_of_many_starts_is_a_minimum():
    problem = Problem.of(made("additive", 80, 0.02), "additive", Options())
    best = fit_problem(problem, QUICK)
    rng = np.random.default_rng(1)
    near = best.inner * (1 + 1e-3 * rng.normal(size=(200, 5)))
    losses = problem.loss.values(problem.ly - jacobian(problem.form, near, problem.lx)[0]).sum(1)
    assert losses.min() >= best.loss
    assert (best.losses <= best.loss * (1 + 1e-6)).sum() >= 6


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_the_quantile_fit_leaves_its_share_below(tau):
    points = made("power", 2000, 0.1)
    problem = Problem.of(points, "power", Options(loss="quantile", tau=tau))
    residual = problem.residual(fit_problem(problem, QUICK).inner)
    assert abs((residual < 0).mean() - tau) < 0.01


def test_weights_are_copies():
    points = made("power_floor", 30, 0.05)
    problem = Problem.of(points, "power_floor", Options())
    begin = fit_problem(problem, QUICK).inner[None]
    weights = np.random.default_rng(0).integers(0, 3, 30).astype(float)
    twice = np.repeat(np.arange(30), weights.astype(int))
    one = solve(problem.form, problem.lx, problem.ly, begin, problem.loss, weights, tolerance=1e-12)
    other = fit(problem.form, problem.lx[:, twice], problem.ly[twice], problem.loss, begin)
    np.testing.assert_allclose(one.inner[0], other.inner, rtol=1e-4)


def test_round_trip_of_a_law(tmp_path):
    law = fit_law(made("additive", 60, 0.01), "additive", QUICK)
    write_law(tmp_path / "law.json", law)
    again = load_law(tmp_path / "law.json")
    x = {"a": [1e9, 1e12], "b": 1e10}
    np.testing.assert_allclose(predict(again, x), predict(law, x))
    np.testing.assert_allclose(predict_interval(again, x), predict_interval(law, x), rtol=1e-6)
    assert predict_samples(again, x).shape == (200, 2)
    low, high = predict_interval(law, x)
    inner = predict_interval(law, x, noise=False)
    assert (
        (low < inner[0]).all()
        and (inner[1] < high).all()
        and decades_beyond(law, x)[0] == 0 < decades_beyond(law, x)[1]
    )
    with pytest.raises(UserError, match="b is missing"):
        predict(law, {"a": 1e9})
    content = json.loads((tmp_path / "law.json").read_text())
    for change, words in (
        ({"version": 9}, "version 9"),
        ({"kind": "x"}, "is no law"),
        ({"form": "power"}, "not a whole law"),
        ({"form": "upcycling"}, "not a whole law .its parameters are not those of upcycling"),
        ({"level": 1.5}, "level is not between 0 and 1"),
        ({"level": 0}, "level is not between 0 and 1"),
        ({"samples": content["samples"] | {"values": [[None, 1, 1, 1, 1]]}}, "a sample of the parameters is no number"),
        ({"samples": content["samples"] | {"values": [[1, 2]]}}, "a field is missing or of another kind"),
        ({"range": content["range"] | {"a": [2, 1]}}, "a range is not two rising numbers"),
        ({"range": content["range"] | {"b": [0, 1]}}, "a range is not two rising numbers"),
        ({"range": {"a": [1, 2]}}, "a field is missing"),
        ({"noise": content["noise"] | {"log_sd": None}}, "a field is missing or of another kind"),
        ({"noise": content["noise"] | {"quantiles": []}}, "noise has no quantiles"),
        ({"loss": None}, "loss is no table"),
        ({"source": "x.csv"}, "warnings, notes or source is no list"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=words):
            load_law(tmp_path / "bad.json")


def test_verb(tmp_path: Path, capsys):
    points = made("power_floor", 60, 0.02)
    rows = [f"r{i % 12};{x:.6g};{y:.6g}" for i, (x, y) in enumerate(zip(points.x[0], points.y, strict=True))]
    (tmp_path / "p.csv").write_text("\ufeffrun;MACs;abs_rel\n" + "\n".join(rows).replace(".", ","), encoding="utf-8")
    words = [str(tmp_path / "p.csv"), "--y", "absrel", "--bootstraps", "200", "--predict", "1e16"]
    out = [str(tmp_path / name) for name in ("law.json", "law.svg")]
    assert run_verb("fit", [*words, "--json", out[0], "--figure", out[1]]) == 0
    text = capsys.readouterr().out
    for part in (
        "y = E + A / MACs^alpha",
        "12 clusters (run)",
        "power_floor *",
        "hold-out:",
        "warning: 3.0 decades beyond",
    ):
        assert part in text
    law = load_law(out[0])
    for name, truth in zip(law.parameters, TRUTHS["power_floor"][0], strict=True):
        low, high = law.parameters[name]["interval"]
        assert low < truth < high
    assert Path(out[1]).read_text().startswith("<?xml")


def test_every_form_is_in_the_help():
    text = " ".join(make_parser("fit").format_help().split())
    assert add_arguments and all(f"{name}:" in text for name in FORMS)


def test_loss_values():
    r = np.array([-2.0, -0.5, 0.0, 0.5, 2.0])
    np.testing.assert_allclose(Loss(1.0).values(r), [1.5, 0.125, 0, 0.125, 1.5])
    np.testing.assert_allclose(Loss(1.0, 0.1).values(r), [2.7, 0.225, 0, 0.025, 0.3])
    np.testing.assert_allclose(Loss().values(r), 0.5 * r**2)
    for loss in (Loss(0.7), Loss(0.7, 0.2), Loss()):
        slope = (loss.values(r + 1e-6) - loss.values(r - 1e-6)) / 2e-6
        assert np.allclose((loss.weights(r) * r)[[0, 1, 3, 4]], slope[[0, 1, 3, 4]], atol=1e-5)


@pytest.mark.parametrize("truth, count", [("power", 40), ("power_floor", 60), ("broken", 120), ("kaplan", 60)])
def test_the_form_is_chosen_by_held_out_points(truth, count):
    form, rows, how = choose_form(made(truth, count, 0.01), QUICK)
    assert form == truth and "held out" in how and {row["form"] for row in rows} >= {truth}
    assert choose_form(made(truth, count, 0.01), Options(loss="quantile", bootstraps=200))[0] == truth
