"""The page of results: self-contained, complete, honest about change; clear words for a folder without results."""

import argparse
import json
import re

import numpy as np
import pytest

from scaling_perception.cli import main
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
    for preset in ("fixed", "paper"):
        for steps in (1, 10):
            for size in (1, 5):
                values = hard + (change if steps == 10 else 0.0) + rng.normal(0, 1e-3, 12)
                rows = [{"key": f"k{i}", metric: float(value)} for i, value in enumerate(values)]
                cells.append(
                    {"preset": preset, "spacing": "trailing", "schedule": "cosine", "steps": steps, "ensemble": size}
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


def test_page_is_self_contained_and_complete(tmp_path):
    (tmp_path / "run" / "panels").mkdir(parents=True)
    (tmp_path / "run" / "panels" / "a.png").write_bytes(PNG)
    (tmp_path / "run" / "eval.json").write_text(json.dumps(_evaluation()))
    (tmp_path / "run" / "other.json").write_text('{"not": "an evaluation"}')
    lines = [json.dumps({"step": i, "loss": 1.0 / (i + 1)}) for i in range(5)] + ['{"step": 6, "lo']
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines))
    page = write_report(tmp_path, tmp_path / "report.html", "A <title>").read_text()
    links = re.findall(r"(?:src|href)=[\"']([^\"']*)", page)
    assert links and all(link.startswith("data:image/png;base64,") for link in links), "the page must open offline"
    assert "A &lt;title&gt;" in page and "scenes &lt;val&gt;" in page
    assert page.count('alt="plot"') == 4  # steps, members, MACs, training loss
    assert 'alt="image"' in page and 'alt="truth"' not in page
    assert "steps at N = 5: AbsRel -0.05" in page and "— better." in page


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
    assert "Compute by image" in page and page.count('alt="plot"') == 3
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
