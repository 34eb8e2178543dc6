"""The notebooks: sound files, and every cell runs, with smaller numbers in the cell of parameters."""

import ast
import json
import re
import shlex
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

from scaling_perception.cli import main

FOLDER = Path(__file__).parent.parent / "colabs"
SMALL = {
    "quickstart": {"steps": 1, "ensemble": 2},
    "test_time_scaling": {"scenes": 2, "steps": "1,2", "members": "1,2", "tolerances": "0.02"},
    "scaling_laws": {"bootstraps": 100},
    "finetune_your_own": {"count": 8, "steps": 2, "batch": 8},
}


def cells(name):
    """Sources of the code cells of a notebook."""
    document = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert document["nbformat"] == 4
    code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "clear the outputs before committing"
    return ["".join(cell["source"]) for cell in code]


def test_every_notebook_is_run_here():
    assert {path.stem for path in FOLDER.iterdir()} == SMALL.keys()


# finetune_your_own trains and predicts as the tests of those verbs do: ``pytest -m slow tests/test_colabs.py``
SLOW = {"finetune_your_own"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SMALL])
def test_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")

    def run(line):  # here, and not in a process of its own
        words = shlex.split(line)
        assert words[0] == "scaling-perception", line
        assert main(words[1:]) in (0, None), line

    known = {"__name__": "notebook"}
    parameters, *rest = cells(name)
    exec(parameters, known)
    assert SMALL[name].keys() <= known.keys(), "a parameter that the notebook does not have"
    known |= SMALL[name]
    for source in rest:
        assert not re.search(r"^[!%]", source, re.MULTILINE), "IPython's ! forks, which JAX's threads do not survive"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(ast.parse(source), f"{name}.ipynb", "exec"), known)
        known["run"] = run
    plt.close("all")
