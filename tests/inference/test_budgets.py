"""Tables of budgets: the rules on tables made by hand, the making of one, and its seconds on another machine."""

import json
import re

import numpy as np
import pytest

from scaling_perception.evaluation.budget_table import budget_entry, fit_timing
from scaling_perception.inference.budgets import (
    TABLE,
    Choice,
    Timing,
    choose,
    front,
    load_budgets,
    measure_timing,
    table_choices,
)
from scaling_perception.inference.task_tables import write_entry
from scaling_perception.support.errors import UserError

pytest_plugins = ("nano",)


def _cell(steps, ensemble, error, preset="fixed", solver="ddim", seconds=None, **more):
    macs = 1e6 * steps * ensemble
    seconds = 0.1 + 0.01 * steps * ensemble if seconds is None else seconds
    known = {"steps": steps, "ensemble": ensemble, "preset": preset, "solver": solver, "macs": macs}
    return {**known, "seconds": seconds, "error": error, "ci95": [error - 0.02, error + 0.02], **more}


def _table(*cells, **more):
    entry = {"dataset": "scenes", "images": 8, "metric": "abs_rel", "cells": list(cells), **more}
    return {"format": 1, "tasks": {"depth": entry}}


FALLING = [_cell(1, 1, 0.50), _cell(2, 1, 0.40), _cell(1, 3, 0.45), _cell(5, 1, 0.30), _cell(5, 5, 0.24)]
FALLING += [_cell(10, 5, 0.225), _cell(50, 5, 0.22)]


def _at(choice):
    return choice.steps, choice.ensemble


def test_front_leaves_out_what_a_cheaper_cell_beats():
    choices = [Choice(c["steps"], c["ensemble"], "fixed", "ddim", c["macs"], 1, c["error"]) for c in FALLING[::-1]]
    assert [_at(one) for one in front(choices)] == [(1, 1), (2, 1), (5, 1), (5, 5), (10, 5), (50, 5)]


def test_names():
    table = _table(*FALLING)
    # lowest 0.22 ± 0.02: 0.24 cannot be told from it; nine tenths of the way from 0.5 are 0.248; half of it 0.36
    assert _at(choose(table, "depth", "best")) == (5, 5)
    assert _at(choose(table, "depth", "balanced")) == (5, 5)
    assert _at(choose(table, "depth", "fast")) == (5, 1)
    # half of the way from a trivial answer
    assert _at(choose(_table(*FALLING, trivial={"name": "row", "error": 0.6}), "depth", "fast")) == (2, 1)
    assert _at(choose(_table(*FALLING, trivial={"name": "row", "error": 0.1}), "depth", "fast")) == (5, 1)


def test_paired_differences_decide_where_they_are_known():
    """Images differ far more than cells do: an interval of the mean would call everything a tie."""
    excess = [0.28, 0.18, 0.23, 0.08, 0.02, 0.005, 0.0]
    cells = [
        {**c, "ci95": [0.0, 1.0], "excess": {"mean": e, "ci95": [e - 0.01, e + 0.01]}}
        for c, e in zip(FALLING, excess, strict=True)
    ]
    assert _at(choose(_table(*cells), "depth", "best")) == (10, 5)
    for cell in cells:
        cell["excess"]["ci95"][0] = -1.0  # nothing can be told apart: nothing is worth more
    assert {_at(choose(_table(*cells), "depth", name)) for name in ("fast", "balanced", "best")} == {(1, 1)}


def test_a_name_is_never_dearer_than_a_better_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        cells = [_cell(s, n, float(rng.uniform(0.1, 0.6))) for s in (1, 2, 5) for n in (1, 2, 5)]
        table = _table(*cells, trivial={"name": "row", "error": float(rng.uniform(0.05, 0.7))})
        macs = [choose(table, "depth", name).macs for name in ("fast", "balanced", "best")]
        assert macs == sorted(macs)


def test_limits():
    table = _table(*FALLING)
    assert _at(choose(table, "depth", macs=3e6)) == (2, 1)  # 1 × 3 costs as much as fits, and is worse
    assert _at(choose(table, "depth", macs=1e12)) == (50, 5)
    assert _at(choose(table, "depth", seconds=0.36)) == (5, 5)
    assert _at(choose(table, "depth", seconds=0.36, macs=5e6)) == (5, 1)
    with pytest.raises(UserError, match=r"fits 10 MACs: the cheapest is 1 step\(s\) × 1 member\(s\) with 1e\+06 MACs"):
        choose(table, "depth", macs=10)
    with pytest.raises(UserError, match=r"fits 0.01 s"):
        choose(table, "depth", seconds=0.01)


def test_seconds_of_another_machine():
    """Twice as fast at evaluations, half as fast at the rest."""
    table = _table(*FALLING, timing={"fixed": 0.1, "per_forward": 0.01})
    chosen = choose(table, "depth", seconds=0.36, here=(0.2, 0.005))
    assert _at(chosen) == (5, 5) and chosen.seconds == pytest.approx(0.2 + 25 * 0.005)
    assert choose(table, "depth", "best", here=(0.2, 0.005)).seconds == pytest.approx(0.325)
    assert _at(choose(table, "depth", seconds=0.36, here=(0.2, 0.02))) == (5, 1)
    # The table is of large batches; what is compared between machines is the same short run on both.
    table = _table(*FALLING, timing={"fixed": 0.1, "per_forward": 0.01}, reference={"fixed": 0.3, "per_forward": 0.02})
    assert choose(table, "depth", "best", here=(0.3, 0.02)).seconds == pytest.approx(0.35)
    assert choose(table, "depth", "best", here=(0.6, 0.01)).seconds == pytest.approx(0.325)


def test_a_reference_that_is_noise_scales_nothing():
    """On a busy machine five steps may have taken no longer than one: the table holds the least of seconds then."""
    table = _table(*FALLING, timing={"fixed": 0.1, "per_forward": 0.01}, reference={"fixed": 0.3, "per_forward": 1e-9})
    assert choose(table, "depth", "best", here=(0.3, 0.02)).seconds == pytest.approx(0.35)


def test_own_grid_is_none():
    assert choose(_table(_cell(1, 1, 0.3, "own", "unipc")), "depth", "best")[2:4] == (None, "unipc")


def test_where_members_are_merged_is_chosen_too():
    cells = [_cell(1, 5, 0.3), {**_cell(1, 5, 0.25), "merge_in": "latents"}]
    assert choose(_table(*cells), "depth", "best").merge_in == "latents"
    assert choose(_table(cells[0]), "depth", "best").merge_in is None
    result = _evaluation()
    result["cells"][1]["merge_in"] = "latents"
    assert [cell.get("merge_in") for cell in budget_entry(result)["cells"]] == [None, "latents", None]


def test_decoding_counts_as_compute():
    """Equal MACs of the DiT: the latents that are decoded once are the cheaper cell, unless only --macs is limited."""
    pixels = _cell(1, 5, 0.250, decoder_macs=50e6)
    latents = {**_cell(1, 5, 0.251, decoder_macs=10e6), "merge_in": "latents"}
    table = _table(_cell(1, 1, 0.3, decoder_macs=10e6), pixels, latents)
    assert [(one.ensemble, one.merge_in) for one in front(table_choices(table["tasks"]["depth"]))] == [
        *((1, None), (5, "latents"), (5, None))
    ]
    assert choose(table, "depth", "best").merge_in == "latents" and choose(table, "depth", "best").compute == 15e6
    assert choose(table, "depth", macs=5e6).merge_in is None
    result = _evaluation()
    for cell in result["cells"]:
        cell["decoder_macs"] = 7e6
    result["cells"][1] |= {"merge_in": "latents", "decoder_macs": 7e5}
    assert [cell["decoder_macs"] for cell in budget_entry(result)["cells"]] == [7e6, 7e5, 7e6]


def test_levers_are_kept_only_where_nothing_beats_them():
    """Plain cells all stay; of the others those that no cell has less error, MACs and seconds than."""
    result = _evaluation()
    plain = result["cells"][:3]
    cheap = {**plain[2], "spacing": "learned", "timesteps": [999, 0], "macs": 1e6, "seconds": 0.1}
    beaten = {**plain[0], "spacing": "learned", "timesteps": [999, 0], "macs": 9e9}
    again = {**plain[2], "solver": "dpm++2m", "seconds": 0.2}  # another name of the same computation
    result["cells"] += [cheap, beaten, {**beaten, "solver": "unipc"}, again]
    entry = budget_entry(result)
    assert [cell.get("spacing") for cell in entry["cells"]] == ["learned", None, None, None]
    chosen = choose({"format": 1, "tasks": {"depth": entry}}, "depth", "best")
    assert (chosen.spacing, chosen.preset, chosen.macs) == ("learned", "fixed", 1e6)


def test_refusals(tmp_path):
    table = _table(*FALLING)
    cases = [
        ((None, "depth", "fast"), {}, "ships no table of budgets for depth: choose"),
        ((table, "flow", "fast"), {}, r"for flow \(it has one for depth\)"),
        ((table, "depth", "fsat"), {}, "did you mean 'fast'"),
        ((table, "depth"), {}, "give either"),
        ((table, "depth", "fast"), {"macs": 1e9}, "give either"),
    ]
    for words, more, message in cases:
        with pytest.raises(UserError, match=message) as error:
            choose(*words, **more)
        assert "\n" not in str(error.value)
    assert load_budgets(tmp_path) is None
    path = tmp_path / "budgets.json"
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "no table"),
        ('{"format": 2, "tasks": {}}', "format 2"),
        ('{"tasks": {}}', "no table"),
        ('{"format": 1, "tasks": {"depth": {"cells": [{"steps": 1}]}}}', "no table"),
        ('{"format": 1, "tasks": {"depth": {"cells": 3}}}', "no table"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_budgets(tmp_path)


@pytest.mark.parametrize(
    ("changes", "cell", "fault"),
    [
        *(({}, {"error": value}, f"cells[1].error is {value!r}") for value in ("x", float("nan"), -1, None, True)),
        ({}, {"macs": None}, "cells[1].macs is None"),
        ({}, {"steps": 1.5}, "cells[1].steps is 1.5"),
        ({}, {"ci95": [1]}, "cells[1].ci95 is [1]"),
        ({}, {"excess": {}}, "cells[1].excess.ci95 is missing"),
        ({}, {"cache": "fora"}, "cells[1].cache_interval is missing"),
        ({"timing": "x"}, {}, "timing is 'x'"),
        ({"timing": {"fixed": 1, "per_forward": "x"}}, {}, "timing.per_forward is 'x'"),
        ({"reference": None}, {}, "reference is None"),
        ({"reference": {"x": 0}}, {}, "reference.fixed is missing"),
        ({"trivial": {"error": "x"}}, {}, "trivial.error is 'x'"),
    ],
)
def test_wrong_values_are_named(changes, cell, fault, tmp_path):
    table = _table(FALLING[0], {**FALLING[1], **cell}, **changes)
    (tmp_path / "budgets.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=rf"budgets.json is no table of budgets \(depth: {re.escape(fault)}\): remove"):
        load_budgets(tmp_path)


def _evaluation(task="depth", metric="abs_rel"):
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.9, 20)
    cells = []
    for steps, better in ((1, 0.0), (5, 0.1), (50, 0.1)):
        values = hard - better if metric != "iou" else hard + better / 10
        rows = [{"key": str(i), metric: float(v + rng.normal(0, 1e-3))} for i, v in enumerate(values)]
        known = {"steps": steps, "ensemble": 2, "preset": "fixed", "solver": "ddim", "reduce": "lsq", "rows": rows}
        cells.append({**known, "macs": 2e6 * steps, "seconds": 0.3 + 0.02 * steps})
    cells.append({**cells[0], "kind": "adaptive"})
    baselines = {name: {"rows": [{"key": "0", metric: v}]} for name, v in (("row", 0.7), ("autoencoder", 0.01))}
    protocol = {"fingerprint": "abc"}
    shared = {"task": task, "dataset": "scenes", "images": 20, "protocol": protocol, "baselines": baselines}
    return {**shared, "cells": cells}


def test_a_table_from_an_evaluation(tmp_path):
    entry = budget_entry(_evaluation(), Timing(0.5, 0.02))
    assert entry["reference"] == {"fixed": 0.5, "per_forward": 0.02}
    assert [cell["steps"] for cell in entry["cells"]] == [1, 5, 50] and entry["metric"] == "abs_rel"
    assert entry["trivial"] == {"name": "row", "error": 0.7}
    assert entry["timing"]["per_forward"] == pytest.approx(0.01) and entry["timing"]["fixed"] > 0
    write_entry(TABLE, tmp_path, "depth", entry)
    write_entry(TABLE, tmp_path, "amodal", budget_entry(_evaluation("amodal", "iou")))
    write_entry(TABLE, tmp_path, "depth", entry)
    table = load_budgets(tmp_path)
    assert table is not None and list(table["tasks"]) == ["amodal", "depth"] and table["tasks"]["depth"] == entry
    assert table["tasks"]["amodal"]["metric"] == "1-iou"
    assert table["tasks"]["amodal"]["cells"][0]["error"] == pytest.approx(
        1 - np.mean([row["iou"] for row in _evaluation("amodal", "iou")["cells"][0]["rows"]])
    )
    # 5 and 50 steps are paired: their difference is noise, and the cheaper is taken
    assert _at(choose(table, "depth", "best")) == (5, 2)
    text = (tmp_path / "budgets.json").read_text()
    assert sum('"steps"' in line for line in text.splitlines()) == 6 and json.loads(text) == table
    with pytest.raises(UserError, match="no cell with a known number of MACs"):
        budget_entry({**_evaluation(), "cells": [{**_evaluation()["cells"][0], "macs": None}]})


def test_timing_is_fitted_and_measured(predictor):
    cells = [
        {"steps": s, "ensemble": n, "seconds": 0.2 + 0.05 * n + 0.003 * n * s} for s in (1, 5, 20) for n in (1, 2, 5)
    ]
    assert fit_timing(cells) == pytest.approx((0.25, 0.003))
    assert min(fit_timing(cells[:1])) >= 0
    here = measure_timing(predictor, "amodal")
    assert isinstance(here, Timing) and here.fixed >= 0 and here.per_forward > 0
