"""Cells of a study, what stands for their commands, and what these leave."""

import json

from scaling_perception.scaling.study import Cell, run_cells
from scaling_perception.support.files import write_json

A = Cell("a", "train", ("--config", "x"))
B = Cell("b", "train", ("--config", "x:init={a}"))
C = Cell("eval/b", "evaluate", ("--task", "depth", "--model", "{b}"), labels={"arm": "one"})
D = Cell("d", "train", ("--config", "y"))
SETTINGS = {name: {"steps": 1, "from": name} for name in ("a", "b", "eval/b", "d")}


class Runs:
    """Stands for the commands of the cells: makes what they leave, or fails as it is asked to."""

    def __init__(self, **codes):
        self.codes, self.ran = codes, []

    def __call__(self, words, log):
        name = log.parent.name
        self.ran.append(name)
        log.write_text(f"did {name}\nno space left\n")
        code = self.codes.get(name, 0)
        if isinstance(code, BaseException):
            raise code
        if code == 0:
            (log.parent / ("result.json" if words[0] == "evaluate" else "model")).touch()
        return max(code, 0)


def go(cells, out, run, settings=None):
    said = []
    return [tuple(one)[:2] for one in run_cells(cells, out, settings or SETTINGS, said.append, run)], said


def trained(folder, macs=100.0, **config):
    folder.mkdir(parents=True)
    record = {"config": {"model": "nano", "resolution": 64, "seed": 3} | config}
    record |= {"parameters": 50, "macs_per_sample": 10, "environment": {"devices": {"kind": "cpu", "count": 1}}}
    write_json(folder / "run.json", record)
    rows = [{"step": step, "samples": 5 * step, "loss": 1 / step, "macs": macs * step / 2} for step in (1, 2)]
    rows[0]["held_out_loss"] = 0.5
    rows[1] |= {"samples_per_second": 4.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluated(folder, shift=0.0, **changes):
    cell = {
        "kind": "fixed",
        "preset": "fixed",
        "solver": "ddim",
        "steps": 5,
        "ensemble": 2,
        "macs": 20.0,
        "reduce": "lsq",
    }
    cell |= {"schedule": "cosine", "seconds": 0.1}
    cell["rows"] = [{"key": f"k{i}", "abs_rel": 0.1 * i + shift, "delta1": 0.1 * i} for i in range(1, 6)]
    few = {"rows": [{"key": f"k{i}", "abs_rel": 0.5} for i in range(4)]}
    found = {"task": "depth", "dataset": "scenes", "split": "val", "images": 5, "params": 50, "resolution": 64}
    found |= {"weights": "w", "seed": 0, "model": "FOLDER/b", "protocol": {"fingerprint": "p"}, "prediction_type": "v"}
    found |= {"cells": [cell, {**cell, "kind": "adaptive"}], "baselines": {"constant": few}, "macs_per_forward": 2}
    write_json(folder / "result.json", found | changes)
