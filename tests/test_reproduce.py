"""docs/reproduce.md: a line for every figure and table of the paper, with its cost as `study --dry-run` counts it."""

import re
import shlex
from pathlib import Path

import pytest

from scaling_perception.scaling import study_cost
from scaling_perception.scaling.study import study_cells
from scaling_perception.scaling.topologies import CHIPS
from scaling_perception.study import _chosen
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
