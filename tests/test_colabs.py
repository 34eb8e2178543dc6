"""The notebooks: sound files, and every cell runs, with smaller numbers in the cell of parameters."""

import ast
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import scaling_perception
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
    for variable in ("XDG_CACHE_HOME", "MPLCONFIGDIR"):  # which the first cell sets
        monkeypatch.setenv(variable, str(tmp_path))
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
    assert [path.name for path in tmp_path.iterdir()] == [f"scaling_perception_{name}"], "files outside its folder"


@pytest.mark.parametrize("name", SMALL)
def test_installs_this_version_and_opens_in_colab(name):
    urls = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    repository = urls["Repository"]
    first = ast.parse(cells(name)[0]).body[0]
    assert ast.unparse(first) == f"source = 'git+{repository}@v{scaling_perception.__version__}'"
    top = "".join(json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][0]["source"])
    colab = repository.replace("https://github.com/", "https://colab.research.google.com/github/")
    assert f"]({colab}/blob/main/colabs/{name}.ipynb)" in top


@pytest.mark.parametrize("name", SMALL)
def test_a_package_that_was_upgraded_after_its_import_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(np, "__version__", "1.0")
    with pytest.raises(SystemExit, match="numpy was upgraded after it was imported: restart the session"):
        exec(cells(name)[0], {"__name__": "notebook"})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(3600)  # on a machine that is busy with other work
@pytest.mark.parametrize("name", SMALL)
def test_takes_under_ten_minutes_and_writes_into_one_folder(name, tmp_path):
    """At full size, as a process of its own on the CPU, with nothing compiled before."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (tmp_path / "notebook.py").write_text("\n\n".join(cells(name)), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_", "XDG_"))}
    environment |= {"HOME": str(home), "MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, str(tmp_path / "notebook.py")]
    done = subprocess.run(words, cwd=away, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name}: {seconds:.0f} s of processor time")  # what one idle core takes, however busy this machine is
    assert done.returncode == 0, done.stderr
    assert seconds < 600
    assert [path.name for path in away.iterdir()] == [f"scaling_perception_{name}"]
    assert not list(home.iterdir()), "written to the home folder"
