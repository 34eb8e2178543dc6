"""docs/reproduce.md: a line for every figure and table of the paper, with its cost as `study --dry-run` counts it."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from scaling_perception.data.formats import write_image
from scaling_perception.data.images import read_image
from scaling_perception.diffusion.schedules import get_diffusion
from scaling_perception.evaluate import times_of
from scaling_perception.evaluation.panels import PanelWriter
from scaling_perception.evaluation.protocols import get_protocol
from scaling_perception.evaluation.sweep import Shown
from scaling_perception.scaling import study_cost
from scaling_perception.scaling.paper_laws import published_values
from scaling_perception.scaling.study import study_cells
from scaling_perception.scaling.topologies import CHIPS
from scaling_perception.study import _chosen
from scaling_perception.support.configs import declared, load_config
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_json
from scaling_perception.support.verbs import make_parser, run_verb

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "reproduce.md"
ROWS = ["Tab. 1", "Tab. 2", "Fig. 2", "Fig. 3", "Fig. 4", "Fig. 5", "Fig. 6", "Fig. 8a-d", "Fig. 8e, f"]
ROWS += ["Tab. 3", "Tab. 4", "Tab. 5", "Fig. 1, 7, 9", "Suppl. Fig. 1", "Suppl. Fig. 2"]
COST_COLUMNS = ("v5e", "v5p", "h100")


def lines() -> dict[str, list[str]]:
    """The words of the line of each row, as the code blocks have them: a comment with the row's name comes before."""
    found, row = {}, ""
    for block in re.findall(r"```\n(.*?)```", DOC.read_text(), re.S):
        for text in block.replace("\\\n", " ").splitlines():
            if text.startswith("# "):
                row = text[2:].strip()
            elif text.startswith("scaling-perception ") and row:
                assert row not in found, f"two lines for {row}"
                found[row] = shlex.split(text)[1:]
    return found


def table() -> dict[str, list[str]]:
    """The cells of each row of the table of costs."""
    rows = [
        [part.strip() for part in text.strip("| \n").split("|")] for text in DOC.read_text().splitlines() if "|" in text
    ]
    return {cells[0]: cells[1:] for cells in rows[2:]}


def cost_cells(words: list[str]) -> list[str]:
    """Chip-hours and USD of a study's line on each chip; of cells whose compute is not known nothing is counted."""
    args = make_parser("study").parse_args(words[1:])
    cells = study_cells(args.config)
    found = study_cost.costs(cells, [cell.name for cell in _chosen(cells, args.only)])
    whole = sum((cost.macs or 0.0) + cost.autoencoder_macs for cost in found)
    more = " +" if any(cost.macs is None for cost in found) else ""
    out = []
    for name in COST_COLUMNS:
        chip = study_cost.assumptions()[name]
        hours = 2 * whole / (CHIPS[name].flops * chip.mfu * 3600)
        out.append(
            f"{hours:,.3g} h, {hours * chip.price:,.3g} USD{more}"
            if hours < 100
            else f"{hours:,.0f} h, {hours * chip.price:,.0f} USD{more}"
        )
    return out


def test_every_row_of_the_paper_has_a_line_and_a_published_value():
    assert list(lines()) == ROWS and list(table()) == ROWS
    assert all(cells[0] and cells[1] for cells in table().values())


@pytest.mark.parametrize("row", ROWS)
def test_the_cost_of_a_line_is_what_the_dry_run_counts(row, monkeypatch):
    monkeypatch.setattr(study_cost, "_params", lambda dit: 0)  # which takes longest
    words, cells = lines()[row], table()[row]
    make_parser(words[0]).parse_args(words[1:])
    if words[0] == "study":
        assert cells[2:] == cost_cells(words)
    else:
        assert cells[2:] == ["none"] * 3


def test_the_counts_of_tables_1_and_2_are_the_published_ones(capsys):
    assert run_verb("presets", ["--published"]) == 0
    text = capsys.readouterr().out.splitlines()[1:]
    assert len(text) == 12 and all(line.endswith("equal") for line in text)


# ---- From the table to the figure ---------------------------------------------------------------------------------

SLICED = {  # at trial size: one cell of each kind, two where a curve is drawn, and what later lines start from
    "Tab. 2": "L-2-8E2A-256",
    "Fig. 2": "a2,a4",
    "Fig. 3": "a2,a4,eval/a2,eval/a4",
    "Fig. 4": "*-60k,*-120k,eval/60k,eval/120k",
    "Fig. 5": "XL-2-256,L-2-8E2A-256,eval/XL-2-256,eval/L-2-8E2A-256",
    "Fig. 6": "a2-4E2A,eval/a2-dense,eval/a2-4E2A",
    "Fig. 8a-d": "a2,steps/a2,members/a2",
    "Fig. 8e, f": "cosine,eval/cosine-[16]",
    "Tab. 3": "depth,eval/hypersim,eval/nyuv2",
    "Tab. 5": "amodal,eval/coco_amodal",
}


def line(**changes):
    row = {
        "kind": "evaluate",
        "metric": "abs_rel",
        "cell": "eval/a1",
        "model": "a1",
        "run": "a1",
        "value": 0.3,
        "low": 0.2,
    }
    row |= {"high": 0.4, "last": 1, "images": 9, "steps": 50, "members": 1, "study_cells": "2/3"}
    return {**row, **dict.fromkeys(("own_train_macs", "train_macs", "macs", "macs_per_forward"), 1e12), **changes}


def all_rows():
    for cell in ("eval/a1", "steps/a2", "members/a2", "eval/dense", "a1"):
        for n in (1, 2):
            for metric in ("abs_rel", "1-delta1"):
                macs = dict.fromkeys(("own_train_macs", "train_macs", "macs", "macs_per_forward"), n * 1e12)
                yield line(cell=cell, metric=metric, value=0.5 / n, **macs)
        for metric in ("loss", "mse"):
            yield line(cell=cell, kind="train", metric=metric)


@pytest.mark.parametrize("stem", ["fig2", "fig3", "fig4", "fig5", "fig6", "fig8ef"])
def test_the_figures_of_a_study_are_drawn_from_its_table(stem, tmp_path):
    found = declared(f"configs/paper/{stem}.py:trial", "figures")
    rows = list(all_rows())
    for figure in found:
        assert figure.write([], tmp_path) is None
        text = figure.write(rows, tmp_path).read_text()
        assert text.startswith("<?xml") and f"{figure.name}, 2/3 cells" in re.sub(r"<!-- | -->", "", text)
    if stem == "fig3":
        assert "published: 28.93 C^-0.1504" in text or "published: 14.38 C^-0.1308" in text


def test_the_mean_gain_of_upcycling_is_computed_beside_the_published_one():
    (figure,) = declared("configs/paper/fig6.py:trial", "figures")
    values = {
        ("a2", "dense"): 0.4,
        ("a2", "4E2A"): 0.3,
        ("a2", "8E2A"): 0.42,
        ("a3", "dense"): 0.2,
        ("a3", "4E2A"): 0.1,
    }
    rows = [line(model=model, experts=experts, value=value) for (model, experts), value in values.items()]
    (text,) = figure.summary(rows)  # gains 25 %, -5 % and 50 %
    assert text == "gain of abs_rel, 3 models against dense: mean +23.3 % (-5 to +50 %); published: +5.3 %"
    assert figure.summary(rows[:1]) == []


def test_tables_hold_ours_beside_the_published_values(tmp_path):
    (table,) = declared("configs/paper/tab4.py", "figures")
    assert table.write([line()], tmp_path) is None  # nothing of it
    rows = [line(metric="epe", published="flying_chairs", members=n, value=float(n)) for n in (1, 5)]
    text = table.write(rows, tmp_path).read_text().splitlines()
    assert "| 3.45 | 1 | 0.2 to 0.4 | 9 | 50 x 1 |" in text[2] and "| 3.08 | 5 | 0.2 to 0.4 | 9 | 50 x 5 |" in text[3]
    for stem in ("tab3", "tab5"):  # every published data set has a cell, by its name
        named = {cell.labels.get("published") for cell in study_cells(f"configs/paper/{stem}.py")} - {None}
        assert named == {one.dataset for one in published_values(stem)}


def test_pictures_are_put_on_one_page(tmp_path):
    found = declared("configs/paper/fig9.py", "figures")
    for task in ("depth", "flow", "amodal"):
        folder = tmp_path / "eval" / task
        panel = {"key": "k", "image": "image.png", "t800": "image.png"}
        write_json(folder / "result.json", {"panels": [panel, panel, panel]})
        write_image(folder / "image.png", np.zeros((4, 4, 3), np.uint8))
    rows = [line(cell=f"eval/{task}") for task in ("depth", "flow", "amodal")]
    for figure, high in zip(found, (6, 9, 3), strict=True):
        assert figure.write([], tmp_path) is None
        page = read_image(figure.write(rows, tmp_path))
        assert page.shape[0] == 240 * high


def trials() -> dict[str, list[str]]:
    """The words of each line at trial size."""
    sliced = {row: ["--only", SLICED[row]] if row in SLICED else [] for row in lines()}
    return {row: [word.replace("data=DATA", "trial") for word in words] + sliced[row] for row, words in lines().items()}


def test_the_trial_makes_what_later_lines_start_from():
    made: set[str] = set()
    for row, words in trials().items():
        if words[0] != "study":
            continue
        args = make_parser("study").parse_args(words[1:])
        for cell in _chosen(study_cells(args.config), args.only):
            word = cell.words[list(cell.words).index("--config" if cell.verb == "train" else "--model") + 1]
            start = load_config(word).init if cell.verb == "train" and "{" not in word else word
            assert not start.startswith("runs/") or start in made, f"{row}, {cell.name}: nothing makes {start}"
            made.add(f"{args.out}/{cell.name}")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_line_runs_at_trial_size_to_its_figure(tmp_path, monkeypatch):
    """In their order, in one folder, as the page says; of cells that are alike, some: 37 of 71."""
    monkeypatch.chdir(tmp_path)
    cheap = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compiling is most of it
    monkeypatch.setenv("XLA_FLAGS", cheap)
    for row, words in trials().items():
        assert run_verb(words[0], words[1:]) == 0, row
    written = {path.name for path in tmp_path.rglob("runs/paper/*/*.*")}
    figures = {"fig2.svg", "fig3.svg", "fig4.svg", "fig5.svg", "fig6.svg", "fig8ab.svg", "fig8cd.svg", "fig8ef.svg"}
    figures |= {"tab3.md", "tab4.md", "tab5.md", "fig9.png", "suppl_fig1.png", "suppl_fig2.png"}
    assert figures <= written


def test_predictions_on_the_way_are_those_of_the_nearest_steps(tmp_path):
    preset, asked = get_diffusion("paper"), {}

    class Stand:
        def choose_diffusion(self, name, spacing):
            assert spacing == preset.spacing
            return preset

        def intermediates(self, image, task, at, key, prompt, **settings):
            asked.update(at=at, key=key, **settings)
            return [SimpleNamespace(prediction=depth * (step + 1), uncertainty=depth) for step in at]

    depth = np.linspace(1, 2, 64, dtype=np.float32).reshape(8, 8)
    raw = {"key": "k", "image": np.zeros((8, 8, 3), np.uint8), "depth": depth, "valid": np.ones((8, 8), bool)}
    cell = {"preset": "own", "spacing": "leading", "steps": 5, "ensemble": 2, "solver": "ddim", "reduce": "lsq"}
    panels = PanelWriter(get_protocol("depth", "scenes"), tmp_path / "r.json", Stand(), [1000, 800, 0], 7)
    entry = panels(Shown(raw, SimpleNamespace(prediction=depth, uncertainty=depth), cell), 0)
    assert asked["at"] == [0, 4] and asked["key"] == 7 and asked["steps"] == 5 and asked["preset"] is None
    truth = read_image(tmp_path / entry["truth"])
    for time in (1000, 800, 0):  # whatever their scale: each is aligned by itself
        assert np.abs(read_image(tmp_path / entry[f"t{time}"]).astype(int) - truth).max() <= 1
    with pytest.raises(UserError, match="--intermediates '1000,1000': give different"):
        times_of("1000,1000")
