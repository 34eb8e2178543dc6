"""Budgets that a law has not seen: its choice among measured cells, regret, rules of thumb."""

import json
from pathlib import Path

import numpy as np
import pytest

from scaling_perception.scaling.law_fit import Options
from scaling_perception.scaling.plan_holdout import hold_out_budget, make_cells
from scaling_perception.scaling.points import Points
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import run_verb

STUDY = str(Path(__file__).parents[2] / "docs" / "studies" / "scenes_study.csv")
QUICK = Options(bootstraps=100)


def ladder(noise=0.005, seeds=1):
    """Cells of E + A / params^0.35 + B / samples^0.4, 16 sizes of model and data."""
    n, d = (row.ravel() for row in np.meshgrid(np.geomspace(1e6, 1e9, 10), np.geomspace(1e4, 1e7, 10)))
    n, d = np.repeat(n, seeds), np.repeat(d, seeds)
    y = 0.3 + 40 * n**-0.35 + 15 * d**-0.4
    y = y * np.exp(noise * np.random.default_rng(0).normal(size=len(y)))
    return Points(np.stack([n, d]), y, ("params", "samples"), "loss", extra={"train_macs": 10 * n * d})


def test_the_choice_is_the_best_cell_and_the_largest_model_is_not():
    points = ladder()
    found, law = hold_out_budget(points, 3e14, None, 0.4, "additive", QUICK)
    cells = make_cells(points, None)
    within = cells.cost <= 3e14
    assert (
        found["best"]["measured"] == cells.error[within].min()
        and found["new"] == (within & (cells.cost > 1.2e14)).sum()
    )
    assert law.range["loss"][0] >= points.y[30 * points.x.prod(0) <= 1.2e14].min()  # dearer cells were not fitted
    assert found["choice"]["regret"] < 0.01 and not found["choice"]["seen"]
    assert found["rules"]["largest model"]["params"] == pytest.approx(1e9)
    assert found["rules"]["largest model"]["regret"] > 0.1 < found["rules"]["longest training"]["regret"]
    assert found["prediction"]["error"] < 0.02 and found["prediction"]["inside"] >= 0.7 * found["new"]
    assert found["seeds_differ"] is None


def test_seeds_are_one_cell_and_say_how_they_differ():
    cells = make_cells(ladder(0.02, seeds=3), None)
    assert len(cells.error) == 100 and set(cells.rows.tolist()) == {3}
    assert cells.scatter == pytest.approx(0.02, rel=0.15)


def test_serving_counts_and_its_rules_are_there():
    grid = np.meshgrid(np.geomspace(1e6, 1e8, 5), [1.0, 2, 5, 10, 20], [1.0, 2, 4], np.geomspace(1e3, 1e5, 4))
    n, t, m, d = (row.ravel() for row in grid)
    y = 0.05 + 0.2 / t + 0.1 / m + 40 * n**-0.35 + 400 * (n * d) ** -0.3
    extra = {"macs": n * t * m}
    points = Points(np.stack([t, m, n, n * d]), y, ("steps", "members", "params", "train_macs"), "err", extra=extra)
    cells = make_cells(points, 1e4)
    np.testing.assert_allclose(cells.cost, cells.train + cells.serve)
    budget = float(np.quantile(cells.cost, 0.8))
    found, _ = hold_out_budget(points, budget, 1e4, 0.5, "test_time", QUICK)
    assert found["choice"]["regret"] < 0.02
    rules = found["rules"]
    assert (rules["most steps and members"]["steps"], rules["most steps and members"]["members"]) == (20, 4)
    few = rules["one step, one member, largest"]
    assert (few["steps"], few["members"], few["params"]) == (1, 1, 1e8)
    even = rules["equal split of training and serving"]
    assert 0.2 < even["training_macs"] / even["serving_macs"] < 5


def test_the_published_study_at_its_largest_budget(tmp_path, capsys):
    where = ["--where", "kind=train", "metric=held_out_loss", "arm=ladder", "last=1", "seed=0"]
    words = ["--points", STUDY, *where, "--x", "params", "samples", "--form", "kaplan", "--hold-out", "1.9e12"]
    out = tmp_path / "held.json"
    assert run_verb("plan", [*words, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "the law is fitted to 7 cells of up to 6.661e+11 MACs; 2 more cost up to the budget" in text
    (found,) = json.loads(out.read_text())["budgets"]
    assert found["choice"]["predicted"] == pytest.approx(found["choice"]["measured"], rel=0.005)
    assert found["choice"]["regret"] == 0 and found["rules"]["largest model"]["regret"] == pytest.approx(
        0.166, abs=0.003
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--hold-out", "1e3"), "no cell costs more than 0.4 of it and not more than it; the cells cost"),
        (("--hold-out", "2.4e10"), "no cell costs up to 0.4 of it to fit a law to"),
        (("--hold-out", "1e11"), "1 cell.s. of up to 0.4 of it: 1 point for the 4 parameters of kaplan"),
        ((), "--points POINTS and --hold-out BUDGET go together"),
        (("--hold-out", "1.9e12", "--seen", "1"), "--seen 1: give a share"),
        (("--hold-out", "1.9e12", "--budget", "3"), "leave --law and --budget out"),
        (("--hold-out", "1.9e12", "--unit", "usd"), "--unit usd: --hold-out is in MACs"),
        (("--hold-out", "1.9e12", "--images", "10"), "have no cost"),
    ],
)
def test_what_cannot_be_held_out_is_one_line(more, told):
    where = ["--where", "kind=train", "metric=held_out_loss", "arm=ladder", "last=1", "seed=0"]
    with pytest.raises(UserError, match=told) as raised:
        run_verb("plan", ["--points", STUDY, *where, "--x", "params", "samples", "--form", "kaplan", *more])
    assert "\n" not in str(raised.value)


def test_a_table_without_costs_is_refused():
    with pytest.raises(UserError, match="needs what a training costs"):
        make_cells(Points(np.ones((1, 3)), np.ones(3), ("x",), "y"), None)
    with pytest.raises(UserError, match="--images needs a column macs"):
        make_cells(ladder(), 10.0)
