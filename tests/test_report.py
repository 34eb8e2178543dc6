"""The page of results: self-contained, complete, honest about change; clear words for a folder without results."""

import argparse
import base64
import copy
import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from scaling_perception.cli import main
from scaling_perception.data.formats import write_image
from scaling_perception.evaluation.comparisons import same_compute, savings
from scaling_perception.report import (
    adaptive_table,
    compute_figure,
    compute_table,
    paired_change,
    run,
    write_figures,
    write_report,
)
from scaling_perception.support.errors import UserError

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def _evaluation(task="depth", metric="abs_rel", change=-0.05):
    """Two presets × two step counts × two sizes; images differ widely, each improves by exactly ``change``."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.1, 0.9, 12)

    def metrics(values):
        return {metric: {"mean": float(np.mean(values)), "ci95": [float(np.min(values)), float(np.max(values))]}}

    cells = []
    for preset, spacing in (("fixed", "trailing"), ("paper", "leading")):
        for steps in (1, 10):
            for size in (1, 5):
                values = hard + (change if steps == 10 else 0.0) + rng.normal(0, 1e-3, 12)
                rows = [{"key": f"k{i}", metric: float(value)} for i, value in enumerate(values)]
                cells.append(
                    {"preset": preset, "spacing": spacing, "schedule": "cosine", "steps": steps, "ensemble": size}
                    | {"reduce": "lsq", "macs": 2e9 * steps * size, "seconds": 0.1}
                    | {"metrics": metrics(values), "rows": rows}
                )
    rows = [{"key": f"k{i}", metric: 0.95} for i in range(12)]
    baselines = {name: {"metrics": metrics([0.9, 1.0]), "rows": rows} for name in ("constant", "row", "autoencoder")}
    return {
        "format": 1, "task": task, "dataset": "scenes <val>", "model": "mini", "resolution": 128, "images": 12,
        "protocol": {"fingerprint": "abc"}, "cells": cells, "baselines": baselines,
        "panels": [{"key": "scene-1", "image": "panels/a.png", "truth": "panels/missing.png", "cell": {}}],
    }  # fmt: skip


class Seen(HTMLParser):
    """Tags of a page with their attributes, and its text without scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.words, self._inside = [], [], ""
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        self.words += [data] if self._inside not in ("script", "style") else []

    def all(self, tag, name):
        return [found[name] for one, found in self.tags if one == tag and name in found]

    def saved(self, end):
        """The files that links save whose names end so: name -> text."""
        links = [found for tag, found in self.tags if tag == "a" and found.get("download", "").endswith(end)]
        return {one["download"]: base64.b64decode(one["href"].split(",")[1]).decode() for one in links}


def report(folder, **evaluations):
    """The page of evaluations, named by their files."""
    for name, one in evaluations.items():
        (folder / f"{name}.json").write_text(json.dumps(one))
    return write_report(folder, folder / "report.html", "t").read_text()


def test_page_is_self_contained_and_complete(tmp_path):
    (tmp_path / "run" / "panels").mkdir(parents=True)
    (tmp_path / "run" / "panels" / "a.png").write_bytes(PNG)
    (tmp_path / "run" / "eval.json").write_text(json.dumps(_evaluation()))
    (tmp_path / "run" / "other.json").write_text('{"not": "an evaluation"}')
    lines = [json.dumps({"step": i, "loss": 1.0 / (i + 1)}) for i in range(5)] + ['{"step": 6, "lo']
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines))
    out = write_report(tmp_path, tmp_path / "report.html", "A <title>", "scaling-perception report x")
    page, seen = out.read_text(), Seen(out.read_text())
    assert out.read_text() == write_report(tmp_path, out, "A <title>", "scaling-perception report x").read_text()
    assert len(page.encode()) < 2e6 and "://" not in page, "the page must open offline"
    ids = {f"#{found['id']}" for _, found in seen.tags if "id" in found}
    for target in seen.all("a", "href") + seen.all("img", "src"):
        assert target in ids or re.match("data:(image/webp|text/csv);base64,", target)
    contents = [name for name in seen.all("a", "href") if name.startswith("#")]
    assert contents == sorted(ids) and len(contents) == 3  # the task, the training, how to read
    assert "A &lt;title&gt;" in page and "scenes &lt;val&gt;" in page
    assert re.search(r"Made on \d{4}-\d\d-\d\d by: scaling-perception report x", seen.text)
    opening = page.index('class="lead"')
    assert opening < page.index("<svg") < page.index("<nav") < page.index("<h2")
    charts = [found for tag, found in seen.tags if tag == "svg" and found.get("role") == "img"]
    assert len(charts) == 6  # what compute bought, steps, members, MACs twice, training loss
    assert all(re.match(r"Line chart of .* \d", found["aria-label"]) for found in charts)
    assert seen.all("img", "alt") == ["image of scene-1"]
    assert "steps at N = 5: AbsRel -0.05" in page and "— better." in page
    for word in ("Name of a grid", "95 % bootstrap interval", "multiply-accumulate", "leading, as in the paper"):
        assert word in seen.text
    assert "abs_rel" not in seen.text.replace("abs_rel,", ""), "labels, not keys"
    assert not seen.all("link", "href") and not seen.all("script", "src")


def test_every_figure_has_its_numbers_and_its_command(tmp_path):
    evaluation = _evaluation() | {"asked": {"steps": "1,10", "option": ["a=b"], "seed": 0, "count": 12, "data": {}}}
    seen = Seen(report(tmp_path, eval=evaluation))
    figures = [found for tag, found in seen.tags if tag == "figure"]
    assert seen.text.count("data and command") == len(figures) == 5
    command = "evaluate --task depth --dataset 'scenes <val>' --model mini --count 12 --option a=b --steps 1,10 --json"
    assert seen.text.count(command) == len(figures) + 1 and seen.text.count("report " + str(tmp_path)) > len(figures)
    tables = seen.saved("-steps.csv")
    rows = list(csv.DictReader(tables["depth-scenes-val-steps.csv"].splitlines()))
    cell = evaluation["cells"][1]["metrics"]["abs_rel"]
    (row,) = [row for row in rows if row["line"] == "fixed, 5 members" and row["x"] == "1"]
    found = [float(row[name]) for name in ("y", "low", "high")]
    assert found == pytest.approx([cell["mean"], *cell["ci95"]], rel=1e-5)
    assert len(seen.saved("-cells.csv")["eval-cells.csv"].splitlines()) == 9
    dots = [found for tag, found in seen.tags if tag == "path" and "data-text" in found]
    assert any("1 step × 5 members: AbsRel" in one["data-text"] and "10 GMAC" in one["data-text"] for one in dots)
    assert len(seen.all("path", "data-x")) == len(dots) > 20


def test_small_models_and_ceilings_are_readable(tmp_path):
    evaluation = _evaluation("amodal", "iou")
    for cell in evaluation["cells"]:
        cell["macs"] /= 1e6
    head, rows = compute_table(evaluation)
    assert head[-1] == "kMAC / image, N = 1" and [row[-1] for row in rows[:2]] == ["2.000", "20.00"]
    seen = Seen(report(tmp_path, eval=evaluation))
    assert "round trip of the truth (ceiling)" in seen.text and "(floor)" not in seen.text
    assert "2 kMAC per image" in str(seen.tags) and "0.00" not in "".join(seen.all("svg", "aria-label"))


def with_pictures(folder, cells=((1, 1), (10, 1), (10, 5)), side=8):
    """An evaluation of one image with pictures of three settings, as `evaluate` writes them."""
    (folder / "panels").mkdir(exist_ok=True)
    names = {}
    for i, (name, at) in enumerate([("truth", ""), *((n, at) for at in cells for n in ("prediction", "error"))]):
        names[name, at] = f"panels/{name}{at and f'_{at[0]}_{at[1]}'}.png"
        pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3))
        write_image(folder / names[name, at], pixels.astype(np.uint8))
    answers = [
        {"steps": at[0], "ensemble": at[1], **{name: names[name, at] for name in ("prediction", "error")}}
        for at in cells
    ]
    scales = {"error": {"words": "|p - d| / d", "unit": "m", "low": 0.0, "high": 0.5, "colours": "inferno"}}
    cell = {"preset": "fixed", "steps": cells[-1][0], "ensemble": cells[-1][1]}
    sample = {"key": "k1", "truth": names["truth", ""], "scales": scales, "cell": cell}
    panel = {**sample, **answers[-1], "answers": answers}
    return {**_evaluation(), "panels": [panel]}


def test_sliders_switch_pictures_that_are_in_the_page(tmp_path):
    seen = Seen(report(tmp_path, eval=with_pictures(tmp_path)))
    answers = [found for _, found in seen.tags if found.get("class") == "answer"]
    assert [one["data-key"] for one in answers] == ["1 1", "10 1", "10 5"]
    assert ["hidden" in one for one in answers] == [True, True, False], "without a script the most compute is shown"
    dials = [found for tag, found in seen.tags if tag == "input"]
    assert [(one["data-values"], one["value"], one["max"]) for one in dials] == [("1 10", "1", "1"), ("1 5", "1", "1")]
    assert seen.all("img", "alt")[0] == "truth of k1"
    assert "error with 10 steps × 1 member for k1 (|p - d| / d)" in seen.all("img", "alt")
    assert "10 steps × 5 members : AbsRel" in seen.text and "for this image, 100 GMAC" in seen.text
    bars = [found["style"] for tag, found in seen.tags if tag == "i"]
    assert len(bars) == 3 and all("#000004" in bar and "#fcffa4" in bar for bar in bars) and "0.5 m" in seen.text


def test_pictures_become_coarser_until_the_page_is_small(tmp_path, monkeypatch):
    evaluation = with_pictures(tmp_path, [(step, 1) for step in range(1, 6)], side=300)
    whole = report(tmp_path, eval=evaluation)
    monkeypatch.setattr("scaling_perception.report.MOST_BYTES", len(whole.encode()) - 100_000)
    smaller = report(tmp_path, eval=evaluation)
    assert len(smaller.encode()) <= len(whole.encode()) - 100_000 and smaller.count("<img") == whole.count("<img")
    monkeypatch.setattr("scaling_perception.report.MOST_BYTES", 1)
    assert "1 more in the folder panels/" in report(tmp_path, eval=evaluation)


def test_models_are_compared_by_image(tmp_path):
    first, second = with_pictures(tmp_path), with_pictures(tmp_path)
    second = copy.deepcopy(second) | {"model": "runs/long"}
    for cell in second["cells"]:
        for row in cell["rows"]:
            row["abs_rel"] -= 0.02
    second["cells"] = second["cells"][:4]
    page = report(tmp_path, a=first, b=second)
    seen = Seen(page)
    assert "Depth on scenes <val>, 2 models" in seen.text and page.count("<h2") == 1
    differences = re.findall(r"([-+][\d.]+ \[[-+][\d.]+, [-+][\d.]+\]) 12 (\w+)", seen.text)
    assert len(differences) == 4 and all(word == "better" for _, word in differences)
    assert all(text.startswith("-0.0200") for text, _ in differences)
    assert [found["data-key"] for _, found in seen.tags if found.get("class") == "answer"] == [
        *("1 1", "10 1", "10 5") * 2
    ]
    assert "long: 10 steps" in seen.text.replace(" :", ":") and page.count('class="dial"') == 1
    second["cells"] = [{**cell, "rows": [{**row, "key": "other"} for row in cell["rows"]]} for cell in second["cells"]]
    assert "nothing can be paired" in report(tmp_path, a=first, b=second)
    same_name = report(tmp_path, a=first, b={**first, "images": 12})
    assert "mini (a)" in same_name and "mini (b)" in same_name


def test_table_holds_every_cell():
    head, rows = compute_table(_evaluation())
    assert head[:2] == ["preset", "steps"] and len(head) == 5
    assert [row[:2] for row in rows] == [["fixed", "1"], ["fixed", "10"], ["paper", "1"], ["paper", "10"]]
    assert rows[1][-1] == "20.00" and all(all(row) for row in rows)


@pytest.mark.parametrize("change", [-0.05, 0.05, 0.0])
def test_change_is_paired_by_image(change):
    """The spread between images is 0.8; pairing leaves only the noise of 1e-3."""
    cells = [cell for cell in _evaluation(change=change)["cells"] if cell["preset"] == "fixed"]
    found = paired_change(cells, "abs_rel", {"steps": 1, "ensemble": 5}, {"steps": 10, "ensemble": 5})
    assert found is not None
    mean, low, high = found
    assert low < mean < high and high - low < 0.005 and abs(mean - change) < 0.002
    assert paired_change(cells, "abs_rel", {"steps": 1, "ensemble": 5}, {"steps": 99, "ensemble": 5}) is None


def test_more_is_better_for_masks(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(_evaluation("amodal", "iou", change=-0.05)))
    page = write_report(tmp_path, tmp_path / "report.html", "t").read_text()
    assert "IoU -0.05" in page and "— worse." in page and "— better." not in page


def test_a_folder_without_results_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="holds no evaluation"):
        write_report(tmp_path, tmp_path / "report.html", "t")
    with pytest.raises(UserError, match="is no folder"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html", "t")
    broken = _evaluation()
    del broken["baselines"]
    (tmp_path / "eval.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match="eval.json: not a whole evaluation"):
        write_report(tmp_path, tmp_path / "report.html", "t")
    assert not (tmp_path / "report.html").exists()
    broken = _evaluation()
    broken["cells"][3]["metrics"]["abs_rel"]["mean"] = float("nan")
    for wrong in (broken, {**_evaluation(), "cells": []}, {**_evaluation(), "task": "sound"}):
        with pytest.raises(UserError, match="eval.json: not a whole evaluation"):
            report(tmp_path, eval=wrong)


def _changed(change):
    evaluation = _evaluation()
    change(evaluation)
    return evaluation


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e["cells"][0].update(macs=0), "macs of cell 1 is 0, no number above zero"),
        (lambda e: e["cells"][2].update(macs=-1e9), "macs of cell 3 is -1"),
        (lambda e: e["cells"][2].update(macs=float("nan")), "macs of cell 3 is nan"),
        (lambda e: e["cells"][1].update(steps=0), "steps of cell 2 is 0"),
        (lambda e: e["cells"][1].update(ensemble="5"), "ensemble of cell 2 is '5'"),
        (lambda e: e["cells"][1].update(preset=None), "preset of cell 2 is None, no text"),
        (lambda e: e["cells"][3].update(rows=[]), "cell 4 has no rows of images"),
        (lambda e: e.update(images=None), "images is None"),
        (lambda e: e.update(cells=[]), "cells is empty"),
        (lambda e: e.update(task="sound"), "task is 'sound', none of depth"),
        (lambda e: e.pop("dataset"), "'dataset' is missing"),
        (lambda e: e.update(protocol={"fingerprint": []}), r"protocol.fingerprint is \[\]"),
    ],
)
def test_a_field_that_no_evaluation_has_is_named(tmp_path, change, words):
    with pytest.raises(UserError, match=f"eval.json: not a whole evaluation .{words}.*run `evaluate` again") as error:
        report(tmp_path, eval=_changed(change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [0, 99, "1"])
def test_another_format_is_refused(tmp_path, number):
    with pytest.raises(UserError, match="eval.json: format is .*, and this version reads 1"):
        report(tmp_path, eval=_evaluation() | {"format": number})


def test_a_damaged_evaluation_is_refused_and_other_files_are_left_alone(tmp_path):
    whole = json.dumps(_evaluation(), indent=2)
    (tmp_path / "theirs.json").write_text('{"torn": [')
    (tmp_path / ".eval.x7.json").write_text(whole[:-20])  # that another process writes
    (tmp_path / "folder.json").mkdir()
    first = report(tmp_path, eval=_evaluation())
    for text in (whole[:-20], whole[:3000], whole + "}", whole.replace(": 12", ": 12,,", 1), ""):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UserError, match="other.json is .*: restore it, evaluate again, or remove it"):
            report(tmp_path)
    (tmp_path / "other.json").unlink()
    (tmp_path / "eval.json").write_text("\ufeff" + whole, encoding="utf-8")
    assert report(tmp_path) == first


@pytest.mark.parametrize("line", ['{"step": 2, "lo', "loss", '{"step": 2 "loss": 1}'])
def test_a_damaged_line_of_a_run_is_refused_unless_it_is_the_last(tmp_path, line):
    lines = [json.dumps({"step": i, "loss": 1.0}) for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, line]))
    assert "Training, " in report(tmp_path, eval=_evaluation())
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(UserError, match="metrics.jsonl line 3 is not valid JSON: remove the line"):
        report(tmp_path)


def test_what_is_missing_or_not_finite_is_said(tmp_path, capsys, monkeypatch):
    evaluation = with_pictures(tmp_path)
    (tmp_path / evaluation["panels"][0]["answers"][0]["error"]).unlink()
    rows = [{"step": i, "loss": float("nan") if i == 3 else 1.0} for i in range(9)] + [[1], {"step": "x", "loss": 1}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = report(tmp_path, eval=evaluation)
    assert "1 picture not found, such as" in page and "without 2 rows that are no finite" in page
    assert "nan" not in Seen(page).text.lower() and 'd="Mnan' not in page
    monkeypatch.setattr("scaling_perception.report.MOST_BYTES", 1000)
    report(tmp_path, eval=evaluation)
    assert "MB without pictures: report folders of fewer evaluations" in capsys.readouterr().err


def _adaptive():
    """Members help hard images alone, and an adaptive ensemble gives them to those."""
    cells, hard = [], np.arange(12) >= 6
    shared = {"preset": "fixed", "solver": "unipc", "steps": 5, "spacing": "trailing", "schedule": "cosine"}

    def add(values, spent, **cell):
        rows = [{"key": f"k{i}", "abs_rel": float(value)} for i, value in enumerate(values)]
        mean = float(np.mean(spent))
        known = {"mean_members": mean / 5, "mean_steps": 5, "macs": 1e9 * mean, "seconds": 1.0, "reduce": "lsq"}
        summary = {"mean": float(np.mean(values)), "ci95": [float(np.min(values)), float(np.max(values))]}
        cells.append({**shared, **known, **cell, "rows": rows, "metrics": {"abs_rel": summary}})

    for size in (1, 5, 10):
        add(np.where(hard, 0.5 - 0.02 * size, 0.2), 5 * size, kind="fixed", ensemble=size)
    forwards = np.where(hard, 50, 5)
    found = {"kind": "adaptive", "ensemble": 10, "tolerance": 0.02, "first": 1}
    add(np.where(hard, 0.3, 0.2), forwards, **found, forwards=forwards.tolist(), counts={"1": 6, "10": 6})
    return {**_evaluation(), "cells": cells}


def test_adaptive_compute_is_held_against_as_much_for_every_image():
    evaluation = _adaptive()
    cells = evaluation["cells"]
    even = same_compute(cells[:3], 27.5, "abs_rel")
    assert even is not None and even["k0"] == 0.2
    share = (1 / 25 - 1 / 27.5) / (1 / 25 - 1 / 50)
    assert even["k11"] == pytest.approx(0.4 - 0.1 * share)
    assert same_compute(cells[:3], 51, "abs_rel") is None and same_compute(cells[:3], 4, "abs_rel") is None
    assert same_compute(cells[:3], 5, "abs_rel") == {row["key"]: row["abs_rel"] for row in cells[0]["rows"]}
    (saving,) = savings(cells, "abs_rel", "adaptive")
    assert saving.share == 0.55 and saving.whole == pytest.approx((0, 0, 0))
    assert (
        saving.even is not None and saving.even.mean == pytest.approx(-0.1 * (1 - share) / 2) and saving.even.high < 0
    )
    head, rows = adaptive_table(evaluation)
    assert len(rows) == 1 and len(head) == len(rows[0]) and rows[0][0] == "fixed, 5 steps, members within 0.02"
    assert rows[0][1:4] == ["5.5", "5.0", "55 %"] and rows[0][-1].startswith("-0.0409 [")


def test_figures_of_adaptive_cells_and_many_solvers(tmp_path):
    evaluation = _adaptive()
    (tmp_path / "depth.json").write_text(json.dumps(evaluation))
    page = write_report(tmp_path, tmp_path / "report.html", "t").read_text()
    assert "Compute by image" in page and "adaptive members" in page and page.count('role="img"') == 5
    for cell in evaluation["cells"]:
        cell["macs"] = None
    assert compute_figure(evaluation) == b""
    many = _evaluation()
    more = [{**cell, "solver": solver} for cell in many["cells"] for solver in ("ddim", "unipc", "dpm++2m", "ddpm")]
    head, rows = compute_table({**many, "cells": more})
    assert len(rows) == 16 and rows[2][0] == "fixed, unipc"
    args = argparse.Namespace(dir=str(tmp_path), out=None, title="t", figures=str(tmp_path / "figures"), overwrite=True)
    assert run(args) == 0 and (tmp_path / "figures" / "compute_depth.png").read_bytes().startswith(b"\x89PNG")
    for name in ("a", "b"):  # as a study lays them out
        (tmp_path / "study" / name).mkdir(parents=True)
        (tmp_path / "study" / name / "result.json").write_text(json.dumps(_evaluation()))
    written = write_figures(tmp_path / "study", tmp_path / "figures", {})
    assert [path.name for path in written] == ["compute_a_result.png", "compute_b_result.png"]


def test_a_missing_folder_is_named_and_not_made(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'} is no folder" in capsys.readouterr().err and not (tmp_path / "none").exists()
