"""Points from every kind of file; impossible input is one clear line."""

import json
import re
import time

import numpy as np
import pytest
from synthetic_laws import TRUTHS, made

from scaling_perception.evaluation.tables import cells_csv, images_csv
from scaling_perception.scaling.envelope import iterated_hull, lower_hull, lucky_pair
from scaling_perception.scaling.law_fit import Options, Problem, bootstrap, fit_problem
from scaling_perception.scaling.law_intervals import image_means, resample_counts
from scaling_perception.scaling.laws import fit_law
from scaling_perception.scaling.paper_laws import published_laws
from scaling_perception.scaling.points import Points, read_points
from scaling_perception.support.errors import UserError

QUICK = Options(bootstraps=200, profile=False)


def _rows(count=20, form="power_floor"):
    points = made(form, count, 0.02)
    return [f"{x:.6g},{y:.6g}" for x, y in zip(points.x[0], points.y, strict=True)]


def _fit(tmp_path, text, form="auto", **read):
    (tmp_path / "p.csv").write_text(text)
    return fit_law(read_points([tmp_path / "p.csv"], form=form, **read), form, QUICK)


HEAD = "macs,absrel\n"


@pytest.mark.parametrize(
    "text, form, read, words",
    [
        (HEAD + "\n".join([*_rows(), "1e10,nan"]), "auto", {}, "line 22: absrel is nan; a law needs values above zero"),
        (HEAD + "\n".join([*_rows(), "1e10,0", "1e9,0"]), "auto", {}, r"line 22: absrel is 0 \(and 1 more\)"),
        (HEAD + "\n".join([*_rows(), "-1e10,0.2"]), "auto", {}, "line 22: macs is -1e10"),
        (HEAD + "\n".join([*_rows(), "1e10,inf"]), "auto", {}, "line 22: absrel is inf"),
        (HEAD + "\n".join(_rows()), "auto", {"x": ["mac"]}, "has no column 'mac'; did you mean 'macs'"),
        (HEAD + "\n".join(_rows()), "auto", {"group": ["run"]}, "--group: .* has no column 'run'"),
        (HEAD + "\n".join(f"1e9,{0.1 + i}" for i in range(9)), "auto", {}, "macs is 1e.09 in all 9 points: no law"),
        (HEAD + "\n".join(_rows(2)), "auto", {}, "2 points for the 2 parameters of power"),
        (HEAD + "\n".join(_rows(3)), "power_floor", {}, "3 points for the 3 parameters .* choose --form power"),
        (HEAD + "\n".join(f"1e{i},0.2" for i in range(8)), "power_floor", {}, "all 8 values of absrel are 0.2"),
        (HEAD + "\n".join(_rows()), "powr", {}, "there is no 'powr'; did you mean 'power'"),
        (HEAD + "\n".join(_rows()), "additive", {"x": ["macs"]}, "additive takes 2 columns, and --x names 1"),
        ("params,tokens,loss\n" + "\n".join(f"{i + 1}e9,1e9,{1 + 1 / (i + 1)}" for i in range(9)), "additive", {},
         "tokens is 1e.09 in all 9 points: its term"),
        ("task," + HEAD + "\n".join("depth," + r for r in _rows()), "auto", {"where": ["task=flow"]}, "no row has it"),
        (HEAD + "1e9,\n1e8,\n", "auto", {}, "no row has all of macs, absrel"),
        ("\n".join(_rows()), "auto", {}, r"the first line \(1.53.*\) holds numbers in place of names: name"),
        ("\n".join(_rows()), "auto", {"x": ["macs"], "y": ["absrel"]}, "holds numbers in place of names"),
        ("\n".join(f"r1,{row}" for row in _rows()), "auto", {}, "name the columns in it.*: give --group r1"),
        ("\n".join(f"r1,-3,{row}" for row in _rows()), "auto", {}, "holds numbers in place of names"),
        ("\n".join(row.replace(",", ";").replace(".", ",") for row in _rows()), "auto", {}, "in place of names"),
        ("task,2023,2024,own\ndepth,1,2,3\n", "auto", {}, "--x: .* has no column macs .*: name it with --x"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path, text, form, read, words):
    with pytest.raises(UserError, match=words):
        _fit(tmp_path, text, form, **read)


def test_what_is_left_out_is_said(tmp_path):
    rows = _rows()
    law = _fit(tmp_path, HEAD + "\n".join([*rows, *rows[:3], "1e10,", "1e10,0"]), "power_floor", drop_invalid=True)
    assert law.points == 20
    assert [note.split(" ", 1)[0] for note in law.notes[:3]] == ["3", "1", "1"] and "copies" in law.notes[0]
    equal = _fit(tmp_path, HEAD + "\n".join(f"1e{i},0.2" for i in range(8)))
    assert equal.form == "power" and equal.parameters["alpha"]["value"] == 0
    assert "all values of absrel are equal" in str(equal.warnings)


def test_warnings(tmp_path):
    few = " ".join(
        _fit(tmp_path, "model,run," + HEAD + "\n".join(f"a4,r{i % 2},{r}" for i, r in enumerate(_rows(5)))).warnings
    )
    assert "fewer than three a parameter" in few and "one size (model a4)" in few and "2 clusters (run)" in few
    rng = np.random.default_rng(0)
    flat = "\n".join(f"{10 ** (8 + i / 8):.4g},{0.2 * np.exp(0.05 * rng.normal()):.4g}" for i in range(30))
    assert "holds zero" in " ".join(_fit(tmp_path, HEAD + flat, "power").warnings)
    bound = _fit(tmp_path, HEAD + "\n".join(_rows(30, "power")), "power_floor")
    assert "reaches zero" in " ".join(bound.warnings) or "E is zero" in " ".join(bound.warnings)


def test_wide_tables(tmp_path):
    macs, curves = np.geomspace(1e8, 1e12, 8), (1.0, 1.1)
    law = 0.1 + 150 * macs**-0.29
    (tmp_path / "w.csv").write_text(
        "macs,a1,a2\n"
        + "\n".join(f"{x:.8g},{y * curves[0]:.8g},{y * curves[1]:.8g}" for x, y in zip(macs, law, strict=True))
    )
    points = read_points([tmp_path / "w.csv"], y=["a*"])
    assert points.group_names == ("run",) and len(points) == 16 and set(points.labels) == {"a1", "a2"}
    head = "run," + ",".join(f"{x:.8g}" for x in macs)
    (tmp_path / "v.csv").write_text(head + "\n" + "\n".join(f"r{i}," + ",".join(f"{y * c:.8g}" for y in law)
                                                          for i, c in enumerate(curves)))  # fmt: skip
    other = read_points([tmp_path / "v.csv"])
    np.testing.assert_allclose(np.sort(other.y), np.sort(points.y), rtol=1e-6)
    assert f"the names of 8 columns ({macs[0]:.8g}, " in other.notes[0] and "are the values of x" in other.notes[0]
    (tmp_path / "v.csv").write_text((tmp_path / "v.csv").read_text().replace("run", "mine"))
    mine = read_points([tmp_path / "v.csv"], x=["macs"], y=["loss"], group=["mine"])
    assert mine.x_names == ("macs",) and mine.y_name == "loss" and len(mine) == 16
    assert "are the values of macs" in mine.notes[0]


@pytest.mark.parametrize("head, read", [("macs,abs_rel", {}), ("N,own", {"x": ["N"], "y": ["own"]})])
def test_numbers_beside_named_columns_are_no_values_of_x(tmp_path, head, read):
    rows = [f"{row},1,2" for row in _rows()]
    (tmp_path / "p.csv").write_text(f"{head},2023,2024\n" + "\n".join(rows))
    points = read_points([tmp_path / "p.csv"], **read)
    assert len(points) == 20 and ",".join([*points.x_names, points.y_name]) == head
    assert not any("wide" in note for note in points.notes)


def test_two_tables_without_names_are_refused(tmp_path):
    for name, rows in (("a.csv", _rows()), ("b.csv", _rows()[1:])):
        (tmp_path / name).write_text("\n".join(rows))
    with pytest.raises(UserError, match="holds numbers in place of names"):
        read_points([tmp_path / "a.csv", tmp_path / "b.csv"])


def _image_rows(steps, images, dataset="a"):
    return [f"{dataset},{n},{1e9 * n:g},k{i},{0.1 + 0.3 / n + 0.05 * i:g}" for n in steps for i in images]


@pytest.mark.parametrize(
    "rows, kept, note",
    [
        (_image_rows((1, 2, 5), range(6)), 6, None),
        (
            _image_rows((1, 2), range(6)) + _image_rows((5,), range(4)),
            4,
            "4 rows left out: not every setting has their images (2 of 6)",
        ),
        (_image_rows((1,), range(5)) + _image_rows((2,), range(1, 6)) + _image_rows((5,), range(6)), 4, "(2 of 6)"),
        (_image_rows((1, 2), range(3)) + _image_rows((1, 2), range(3, 7), "b"), 7, None),  # by data set
    ],
)
def test_means_are_over_the_images_that_all_settings_have(tmp_path, rows, kept, note):
    (tmp_path / "i.csv").write_text("dataset,steps,macs,key,abs_rel\n" + "\n".join(rows))
    points = read_points([tmp_path / "i.csv"], image="key")
    assert points.images is not None and points.images.shape[1] == kept
    found = [one for one in points.notes if "their images" in one]
    assert len(found) == (note is not None) and (note or "") in "".join(found)
    if note:  # no image of one setting weighs on the others
        offsets = points.y - 0.3e9 / points.x[0]
        np.testing.assert_allclose(offsets, offsets[0], rtol=1e-6)


@pytest.mark.parametrize(("steps", "kept", "left"), [((1, 2), 6, 0), ((5, 10), 3, 6)])
def test_runs_over_the_same_x_may_have_images_of_their_own(tmp_path, steps, kept, left):
    """Images of one run alone do not differ along x if every run has every x; else they would."""
    rows = [f"r1,{row}" for row in _image_rows((1, 2), range(6))] + [
        f"r2,{row}" for row in _image_rows(steps, range(3))
    ]
    (tmp_path / "i.csv").write_text("run,dataset,steps,macs,key,abs_rel\n" + "\n".join(rows))
    points = read_points([tmp_path / "i.csv"], image="key")
    assert len(points) == 4 and points.images is not None and points.images.shape[1] == kept
    assert [one.split(" ")[0] for one in points.notes if "their images" in one] == [str(left)] * (left > 0)


def test_settings_without_a_common_image_are_refused(tmp_path):
    rows = _image_rows((1, 2), range(3)) + _image_rows((5,), range(3, 6))
    (tmp_path / "i.csv").write_text("dataset,steps,macs,key,abs_rel\n" + "\n".join(rows))
    with pytest.raises(UserError, match="--image key: the 3 settings have no image in common"):
        read_points([tmp_path / "i.csv"], image="key")


def test_rows_without_a_run_are_counted(tmp_path):
    rows = [f"{'' if i in (3, 5) else f'r{i % 4}'},{row}" for i, row in enumerate(_rows())]
    (tmp_path / "p.csv").write_text("run," + HEAD + "\n".join(rows))
    notes = " ".join(read_points([tmp_path / "p.csv"]).notes)
    assert "2 rows have no run (first at line 5) and count as one run" in notes


def test_a_place_is_named_in_the_units_of_its_file(tmp_path):
    """Records of JSON and cells of evaluations are no lines; of several files the file is named."""
    value = _evaluation()
    value["cells"][2]["macs"] = 0
    rows = [{"macs": 1e9, "abs_rel": 0.5}, {"macs": 1e10, "abs_rel": -1}]
    (tmp_path / "e.json").write_text(json.dumps(value))
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "p.csv").write_text("macs,abs_rel\n1e9,0.5\n1e8,0.6\n")
    for names, words in (
        (["e.json"], "e.json cell 3: macs is 0"),
        (["r.json"], "r.json record 2: abs_rel is -1"),
        (["p.csv", "r.json"], r"p.csv \+ .*r.json record 2 of .*r.json: abs_rel is -1"),
    ):
        with pytest.raises(UserError, match=words):
            read_points([tmp_path / name for name in names])


@pytest.mark.parametrize("number", [0, 99, "1", None])
def test_an_evaluation_of_another_format_is_refused(tmp_path, number):
    (tmp_path / "e.json").write_text(json.dumps(_evaluation() | {"format": number}))
    with pytest.raises(UserError, match="e.json: format is .*, and this version reads 1: evaluate again"):
        read_points([tmp_path / "e.json"])


def _evaluation():
    cells, images = [], [f"k{i}" for i in range(6)]
    for steps in (1, 2, 5, 10):
        rows = [{"key": key, "abs_rel": 0.1 + 0.3 / steps + 0.01 * i} for i, key in enumerate(images)]
        mean = float(np.mean([row["abs_rel"] for row in rows]))
        cells.append(
            {"kind": "fixed", "preset": "fixed", "steps": steps, "ensemble": 1, "macs": 1e9 * steps, "rows": rows}
            | {"metrics": {"abs_rel": {"mean": mean, "ci95": [mean - 0.01, mean + 0.01]}}}
        )
    return {"task": "depth", "dataset": "scenes", "model": "mini", "macs_per_forward": 1e9, "cells": cells,
            "protocol": {"fingerprint": "x"}, "baselines": {}}  # fmt: skip


def test_evaluations_are_read_as_they_are(tmp_path):
    value = _evaluation()
    (tmp_path / "e.json").write_text(json.dumps(value))
    (tmp_path / "e.csv").write_text(cells_csv(value))
    (tmp_path / "i.csv").write_text(images_csv(value))
    one, two, three = (read_points([tmp_path / name], image=image) for name, image in
                       (("e.json", None), ("e.csv", None), ("i.csv", "key")))  # fmt: skip
    for points in (one, two, three):
        np.testing.assert_allclose(np.sort(points.x[0]), [1e9, 2e9, 5e9, 1e10])
        np.testing.assert_allclose(
            np.sort(points.y), np.sort([c["metrics"]["abs_rel"]["mean"] for c in value["cells"]])
        )
    assert three.images is not None and three.images.shape == (4, 6)
    problem = Problem.of(three, "power", QUICK)
    samples, left = bootstrap(problem, fit_problem(problem, QUICK), QUICK)
    assert samples.std(0).min() > 0 and left.shape == (6, 2)


def test_cells_of_earlier_versions_and_of_several_settings(tmp_path):
    """`fixed` is today's kind `constant`; cells that differ in a setting are never fitted together without a word."""
    old = _evaluation()
    new = {**old, "cells": [{**cell, "kind": "constant"} for cell in old["cells"]]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    (tmp_path / "new.json").write_text(json.dumps(new))
    (tmp_path / "old.csv").write_text(
        cells_csv(new).replace("depth,scenes", "depth,other").replace("constant", "fixed")
    )
    for word in ("fixed", "constant"):
        for name in ("old.json", "new.json", "old.csv"):
            assert len(read_points([tmp_path / name], where=[f"kind={word}"])) == 4
    points = read_points([tmp_path / "new.json", tmp_path / "old.csv"])
    assert not any("kind" in note for note in points.notes) and any("dataset" in note for note in points.notes)
    for name, value in (("cache", "fora"), ("cache_interval", 4), ("eta", 1.0), ("clip", 1.0), ("antithetic", True)):
        cells = [{**cell, **({name: value} if cell["steps"] > 2 else {})} for cell in new["cells"]]
        (tmp_path / "mixed.json").write_text(json.dumps({**new, "cells": cells}))
        found = [note for note in read_points([tmp_path / "mixed.json"]).notes if f"--where {name}=" in note]
        assert found and "default" in found[0] and str(value) in found[0]
    lone = read_points([tmp_path / "mixed.json"], where=["antithetic=True"])
    assert len(lone) == 2 and not any("antithetic" in note for note in lone.notes)


def test_training_runs_are_read_as_they_are(tmp_path):
    for name, width in (("r1", 10), ("r2", 20)):
        (tmp_path / name).mkdir()
        rows = [{"step": s, "loss": 1 / s**0.1, "lr": 1e-4} for s in (1, 10, 100)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 101, "lo')
        record = {"attempts": [], "started": "x", "samples_per_step": 8, "macs_per_sample": 1e6 * width}
        (tmp_path / name / "run.json").write_text(
            json.dumps({**record, "parameters": {"total": width, "active": width}})
        )
    points = read_points([tmp_path], y=["loss"])
    assert len(points) == 6 and points.group_names == ("run",) and points.x_names == ("macs",)
    np.testing.assert_allclose(points.x[0], [8e7, 8e8, 8e9, 1.6e8, 1.6e9, 1.6e10])
    assert read_points([tmp_path], x=["params"], y=["loss"]).x.tolist() == [[10] * 3 + [20] * 3]
    single = read_points([tmp_path / "r2" / "run.json"], x=["params", "samples"], y=["loss"])
    np.testing.assert_allclose(single.x, [[20] * 3, [8, 80, 800]])


@pytest.mark.parametrize("figure", ["fig2", "fig8a", "fig8b", "fig8c", "fig8d"])
def test_published_laws_come_back(figure):
    law, points = published_laws()[figure], read_points([f"paper:{figure}"], y=[published_laws()[figure].metric])
    for form in ("power", "hull"):
        problem = Problem.of(points, form, Options(loss="lsq"))
        found = fit_law(points, form, QUICK) if form == "hull" else None
        values = found.values if found else problem.published(fit_problem(problem, QUICK).inner[None])[0]
        np.testing.assert_allclose(values, [law.a, -law.b], rtol=1e-6)


def test_hull_of_known_points():
    x, y = np.log([1.0, 2, 4, 8, 16]), np.log([8.0, 5, 2, 1.9, 0.5])
    assert lower_hull(x, y).tolist() == [0, 4]  # the third lies on the line
    log_a, alpha, chosen, rounds = iterated_hull(x, y)
    assert np.allclose([log_a, alpha], [np.log(8), 1.0]) and chosen.tolist() == [0, 4] and rounds == 1
    rng = np.random.default_rng(0)
    far = np.log(np.geomspace(1, 1e4, 40))
    noisy = 0.05 * np.abs(rng.normal(size=40)) + 1 - 0.2 * far
    noisy[[5, 30]] -= [0.8, 3.0]
    pair = lucky_pair(far, noisy, iterated_hull(far, noisy)[1], lower_hull(far, noisy))
    assert pair is not None and 30 in pair[0]


def test_clusters_are_drawn_whole_and_nested():
    rng = np.random.default_rng(0)
    runs, seeds = np.repeat(np.arange(4), 6), np.tile(np.repeat(np.arange(2), 3), 4)
    counts = resample_counts([runs], 300, rng)
    assert (counts.sum(1) == 24).all() and (np.ptp(counts.reshape(300, 4, 6), axis=2) == 0).all()
    nested = resample_counts([runs, seeds], 300, rng).reshape(300, 4, 2, 3)
    assert (np.ptp(nested, axis=3) == 0).all() and (nested.sum((1, 2, 3)) == 24).all()
    assert np.ptp(nested[..., 0], axis=2).max() > 0
    values = rng.normal(size=(3, 50)) + 5
    means = image_means(values, 2000, rng)
    np.testing.assert_allclose(means.std(0), values.std(1) / np.sqrt(50), rtol=0.1)


@pytest.mark.slow
def test_ten_thousand_bootstraps_in_time():
    points = made("additive", 200, 0.01)
    options = Options(bootstraps=10_000)
    problem = Problem.of(points, "additive", options)
    best = fit_problem(problem, options)
    start = time.monotonic()
    samples, _ = bootstrap(problem, best, options)
    assert len(samples) == 10_000 and time.monotonic() - start < 30


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    points = made("power_floor", 1_000_000, 0.02)
    with open(tmp_path / "m.csv", "w") as file:
        file.write("run,macs,absrel\n")
        file.writelines(
            f"r{i % 500},{x:.7g},{y:.7g}\n" for i, (x, y) in enumerate(zip(points.x[0], points.y, strict=True))
        )
    start = time.process_time()
    law = fit_law(read_points([tmp_path / "m.csv"]), "power_floor")
    assert time.process_time() - start < 60
    np.testing.assert_allclose(law.values, TRUTHS["power_floor"][0], rtol=5e-3)


def test_many_points_agree_with_full_bootstraps():
    """The one-step bootstrap of over 20,000 points has the spread of theory: least squares of a power law."""
    points = made("power", 25_000, 0.05)
    problem = Problem.of(points, "power", Options(loss="lsq"))
    samples, _ = bootstrap(problem, fit_problem(problem, QUICK), Options(bootstraps=2000))
    assert samples[:, 1].std() == pytest.approx(0.05 / np.sqrt(25_000) / problem.lx.std(), rel=0.08)


def test_a_law_over_points_of_one_run_holds_for_all():
    points = Points(np.geomspace(1e8, 1e12, 12)[None], np.full(12, 0.3) * np.geomspace(1, 0.5, 12), ("macs",), "y")
    assert fit_law(points, "power", QUICK).clusters == 12


def test_points_of_several_metrics_are_refused_and_other_differences_named(tmp_path):
    rows = "".join(
        f"{metric},{preset},{10**n},{value}\n"
        for metric, value in (("abs_rel", 0.3), ("delta1", 0.7))
        for n in range(4, 8)
        for preset in ("fixed", "paper")
    )
    path = tmp_path / "study.csv"
    path.write_text(f"metric,preset,macs,value\n{rows}")
    with pytest.raises(UserError, match="value is of several metrics .abs_rel, delta1.*--where metric=abs_rel"):
        read_points([path])
    points = read_points([path], where=["metric=delta1"])
    assert len(points) == 8 and points.y_name == "delta1"
    assert "the points are of preset fixed, paper together" in " ".join(points.notes)


def test_the_hull_is_corrected_for_what_noise_does_to_it():
    points = made("power", 60, 0.03, seed=5)
    law = fit_law(points, "hull", Options(bootstraps=200))
    truth, middle = TRUTHS["power"][0], np.log(points.x[0]).mean()

    def off(a, alpha):
        return np.log(a) - alpha * middle - (np.log(truth[0]) - truth[1] * middle)

    value, corrected = ([one[kind] for one in law.parameters.values()] for kind in ("value", "corrected_value"))
    assert off(*value) < -0.02 and abs(off(*corrected)) < 0.3 * abs(off(*value))
    for one, true in zip(law.parameters.values(), truth, strict=True):
        assert one["by"] == "corrected" and one["interval"] == one["corrected"]
        assert one["interval"][0] < true < one["interval"][1]
    (pulled,) = re.findall(r"it lies ([0-9.]+) % below", law.warnings[-2])
    assert 2 < float(pulled) < 6  # 1.29 standard deviations of 3 %
    one = fit_law(points, "hull", Options(bootstraps=200, interval="bootstrap")).parameters["A"]
    assert one["by"] == "bootstrap" and one["interval"] == one["bootstrap"]
