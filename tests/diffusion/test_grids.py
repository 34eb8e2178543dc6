"""Learned grids: the dynamic programming against all grids, the file and what is refused."""

import itertools
import json
import shutil

import numpy as np
import pytest

from scaling_perception.diffusion.grids import Costs, best_grids
from scaling_perception.diffusion.schedules import get_diffusion, timestep_grid
from scaling_perception.evaluation.grid_table import grid_entry, transition_costs, true_latents
from scaling_perception.evaluation.nested import Adaptive
from scaling_perception.evaluation.points import points_of
from scaling_perception.inference.grids import TABLE, learned_grid, load_grids
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import Settings
from scaling_perception.inference.task_tables import write_entry
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)


def _costs(rng, count):
    t = np.sort(rng.choice(1000, count, replace=False))[::-1]
    return Costs(t, rng.uniform(0, 1, count), rng.uniform(0, 1, (count, count)), rng.uniform(0, 1, count))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_no_grid_is_cheaper(count):
    rng = np.random.default_rng(count)
    for _ in range(20):
        costs = _costs(rng, count)
        for steps, (cost, t) in enumerate(best_grids(costs, count), 1):
            every = {
                path: costs.start[path[0]]
                + sum(costs.jump[i, j] for i, j in itertools.pairwise(path))
                + costs.end[path[-1]]
                for path in itertools.combinations(range(count), steps)
            }
            best = min(every, key=lambda path: every[path])
            assert t == [int(costs.t[i]) for i in best] and cost == pytest.approx(every[best], abs=1e-12)
            assert t == sorted(t, reverse=True) and len(set(t)) == steps
    with pytest.raises(ValueError, match="candidates"):
        best_grids(costs, count + 1)


def test_one_step_is_the_trailing_one_where_that_is_cheapest():
    """Starting anywhere but at pure noise costs more than a better estimate gains."""
    t = timestep_grid("trailing", 5)[0]
    costs = Costs(t, np.asarray([0, 2, 2, 2, 2.0]), np.zeros((5, 5)), np.asarray([1.0, 0.9, 0.8, 0.7, 0.6]))
    (cost, grid), (_, two) = best_grids(costs, 2)
    assert cost == 1.0 and grid == timestep_grid("trailing", 1)[0].tolist() == [999]
    assert two == [999, int(t[-1])]


ENTRY = {"weights": "a", "autoencoder": "b", "grids": {"1": [999], "2": [999, 399]}}
IDENTITY = {"weights": "a", "autoencoder": "b"}


def _write(folder, entry=ENTRY, **more):
    (folder / TABLE.file).write_text(json.dumps({"format": 1, "tasks": {"depth": entry}, **more}))


def test_a_grid_is_what_the_sampler_takes(tmp_path):
    _write(tmp_path)
    t, t_next = learned_grid(tmp_path, "depth", 2, IDENTITY)
    assert t.tolist() == [999, 399] and t_next.tolist() == [399, -1]
    learned = Settings(steps=2, spacing="learned").tables(get_diffusion("fixed", spacing="learned"), (t, t_next))
    assert learned.t.tolist() == [999, 399]
    trailing = Settings(steps=1).tables(get_diffusion("fixed"))
    one = Settings(steps=1).tables(
        get_diffusion("fixed", spacing="learned"), learned_grid(tmp_path, "depth", 1, IDENTITY)
    )
    for name in ("t", "t_next", "x0_x", "x0_out", "next_x", "next_x0"):
        np.testing.assert_array_equal(getattr(one, name), getattr(trailing, name))
    with pytest.raises(UserError, match="no grid"):
        Settings(steps=1, solver="single").tables(get_diffusion("fixed"), (t[:1], t_next[-1:]))


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="no learned grids for depth: make it: `evaluate --task depth"):
        learned_grid(tmp_path, "depth", 2, IDENTITY)
    with pytest.raises(UserError, match="no learned grids"):
        learned_grid(None, "depth", 2, IDENTITY)
    _write(tmp_path)
    for task, steps, identity, message in (
        ("flow", 2, IDENTITY, "no learned grids for flow"),
        ("depth", 3, IDENTITY, "no learned grid of 3 steps for depth, but of 1, 2"),
        ("depth", 2, {**IDENTITY, "weights": "c"}, r"made with other weights \(a, now c\)"),
        ("depth", 2, {**IDENTITY, "autoencoder": "c"}, "other autoencoder"),
    ):
        with pytest.raises(UserError, match=message):
            learned_grid(tmp_path, task, steps, identity)
    _write(tmp_path, format=2)
    with pytest.raises(UserError, match="has format 2"):
        load_grids(tmp_path)


@pytest.mark.parametrize(
    "grids",
    [
        *({}, [], None, {"2": [999]}, {"2": [399, 999]}, {"2": [999, 999]}, {"1": [1000]}, {"1": [-1]}),
        *({"1": [9.5]}, {"1": ["999"]}, {"1": [True]}, {"0": []}, {"1": 999}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, grids):
    _write(tmp_path, {**ENTRY, "grids": grids})
    with pytest.raises(UserError, match=r"holds no grids \(depth: .*grids.*\): remove it, or make it again"):
        load_grids(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", '{"tasks": {}}', '{"tasks": {}, "format": 1', '{"format": 1}', '{"format": 1, "tasks": []}', ""]
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    (tmp_path / TABLE.file).write_text(text)
    with pytest.raises(UserError, match=TABLE.file):
        load_grids(tmp_path)


def test_costs_of_a_model(nano_folder, make_raw, tmp_path):
    """The fine run's own steps cost nothing, its start neither, and its last estimate what it is away from the truth;
    the grid that is written is sampled on, recorded, and refused after another training."""
    folder = tmp_path / "model"
    shutil.copytree(nano_folder, folder)
    predictor, raws, fine = Predictor.from_pretrained(folder), [make_raw(seed=0), make_raw(seed=1)], 5
    costs = transition_costs(predictor, raws, "depth", fine)
    assert costs.start[0] == 0 and (costs.start[1:] > 0).all()
    np.testing.assert_allclose(np.diag(costs.jump, 1), 0, atol=1e-10)
    assert (costs.jump[np.triu_indices(fine, 2)] > 1e-8).all()
    truth = true_latents(predictor, raws[0], "depth")
    assert truth.shape[0] == len(predictor.passes("depth").labels) and np.isfinite(costs.end).all()
    both = [transition_costs(predictor, [raw], "depth", fine) for raw in raws]
    for name in ("start", "jump", "end"):  # a mean over samples
        np.testing.assert_allclose(
            np.mean([getattr(one, name) for one in both], axis=0), getattr(costs, name), atol=1e-6
        )
    entry = grid_entry(predictor, raws, "depth", 2, 0)
    assert list(entry["grids"]) == ["1", "2"] and entry["grids"]["2"][0] > entry["grids"]["2"][1]
    with pytest.raises(UserError, match="no learned grids"):
        predictor(raws[0]["image"], "depth", 2, 1, spacing="learned")
    write_entry(TABLE, folder, "depth", entry)
    write_entry(TABLE, folder, "flow", entry)
    learned = predictor.tables(Settings(2, 1), "depth", predictor.choose_diffusion(None, "learned"))
    assert learned.t.tolist() == entry["grids"]["2"]
    again = predictor(raws[0]["image"], "depth", 2, 1, spacing="learned").prediction
    assert not np.array_equal(again, predictor(raws[0]["image"], "depth", 2, 1).prediction)
    adaptive, caches = Adaptive((), 2, (), 2, False, ()), [("none", 2), ("fora", 2)]
    more = (("ddim", "unipc"), caches, "lsq", adaptive, Settings(), (None, "learned"))
    for alone, count in ((False, 8), (True, 4)):
        points = points_of(predictor, "depth", [2], [1], (None,), *more, alone)
        assert len(points) == count and {one.settings.spacing for one in points} == {None, "learned"}
    assert [one.cells[0].get("timesteps") for one in points].count(entry["grids"]["2"]) == 1
    for alone, solvers in ((False, ["ddim", "unipc"]), (True, ["ddim"])):  # a single step is that of every solver
        points = points_of(predictor, "depth", [1], [1], (None,), more[0], caches[:1], *more[2:5], (None,), alone)
        assert [one.settings.solver for one in points] == solvers
    write_entry(TABLE, folder, "depth", {**entry, "weights": "0" * 12})
    with pytest.raises(UserError, match=r"other weights \(0{12}"):
        predictor(raws[0]["image"], "depth", 2, 1, spacing="learned")
