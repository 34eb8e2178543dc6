"""Which ways to spread a step are compiled, and what is made of the results."""

import json
import math
from pathlib import Path

import pytest

from scaling_perception import cli
from scaling_perception.scaling import mesh_search
from scaling_perception.scaling.mesh_search import Way
from scaling_perception.scaling.topologies import CHIPS, Topology
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError

NANO = "configs/depth.py:model=nano,res=128,source=scenes,cache=latents"


def config_of(*overrides):
    return load_config(NANO, ["model_changes.dim=64", "train.batch_size=16", *overrides])


def topology_of(memory, devices=8):
    return Topology("cpu:8", CHIPS["h200"]._replace(memory=memory), [None] * devices, ())


@pytest.mark.parametrize("devices, heads, experts", [(1, 2, 0), (8, 6, 0), (12, 12, 4), (64, 16, 8)])
def test_every_mesh_is_there_once_and_divides_heads_and_experts(devices, heads, experts):
    found = list(mesh_search.meshes(devices, heads, experts))
    assert len({tuple(one.values()) for one in found}) == len(found)
    for one in found:
        assert math.prod(one.values()) == devices and heads % one["tensor"] == 0
        assert one["expert"] == 1 or experts % one["expert"] == 0
    wanted = sum(
        devices % (fsdp * expert * tensor) == 0
        for tensor in range(1, 9)
        for expert in range(1, devices + 1)
        for fsdp in range(1, devices + 1)
        if heads % tensor == 0 and (expert == 1 or (experts and experts % expert == 0))
    )
    assert len(found) == wanted


def test_the_cheapest_way_that_fits_is_taken_for_each_mesh():
    config = config_of()
    roomy, none = mesh_search.ways(config, topology_of(2**40), None)
    assert none == 0 and all((way.remat, way.accumulate) == (False, 1) for way in roomy)
    assert [way.memory for way in roomy] == sorted(way.memory for way in roomy)
    middle = roomy[len(roomy) // 2].memory / 0.95 + 1
    tight, left_out = mesh_search.ways(config, topology_of(int(middle)), None)
    assert all(way.memory <= 0.95 * middle for way in tight) and len(tight) + left_out == len(roomy)
    assert any(way.remat or way.accumulate > 1 for way in tight) or left_out
    assert int(config.mesh.data) == -1 and not config.train.remat  # the config is left as it is


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(UserError, match="no mesh fits 0.0 GiB on a device: use more chips"):
        mesh_search.ways(config_of(), topology_of(1000), None)
    with pytest.raises(UserError, match="train.batch_size is 7: give a multiple of 8"):
        mesh_search.ways(config_of(), topology_of(2**40), 7)
    with pytest.raises(UserError, match="name the GPU whose limits to use, with --chip"):
        mesh_search.ways(config_of(), topology_of(2**40)._replace(chip=None), None)


def row(worst, fits=True, **more):
    times = {"seconds_best": 0.1 / worst, "seconds_worst": 0.2 / worst, "mfu_best": 2 * worst, "mfu_worst": worst}
    mesh = {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}
    way = {"mesh": mesh, "remat": True, "accumulate": 2, "flags": [f"--worst={worst}"], "memory": 2**30, "fits": fits}
    return {**way, **times, **more}


def test_the_best_is_what_fits_with_the_best_bound_at_worst(tmp_path):
    failed = {name: value for name, value in row(0.5).items() if not name.startswith(("mfu", "fits"))}
    rows = mesh_search.best_first([row(0.2), {**failed, "error": "refused"}, row(0.4, fits=False), row(0.3)])
    assert [one.get("mfu_worst") for one in rows] == [0.4, 0.3, 0.2, None]
    text = list(mesh_search.table(rows, 3, 2**34))
    assert text[-1] == "best bound at worst: --worst=0.3" and "3 meshes" in text[-2] and "refused" in text[-3]
    assert "does not fit" in text[1] and "data=2,fsdp=4" in text[2]

    result = tmp_path / "search.json"
    result.write_text(json.dumps({"chip": "v5e", "rows": rows}))
    assert mesh_search.mfu_of(str(result), "v5e") == 0.3
    for text, chip, message in [
        (result.read_text(), "v5p", "is of v5e and --chip is v5p"),
        ("[]", "v5e", "no result of 'compile --search"),
        (json.dumps({"chip": "v5e", "rows": [row(0.4, fits=False)]}), "v5e", "nothing in it fits"),
    ]:
        result.write_text(text)
        with pytest.raises(UserError, match=message):
            mesh_search.mfu_of(str(result), chip)


def test_what_was_compiled_is_not_compiled_again(tmp_path, monkeypatch):
    calls = []

    def compile_one(words, **_):
        calls.append(words)
        bound = {"best": 1.0, "worst": 2.0, "mfu_best": 0.4, "mfu_worst": 0.2}
        report = {"estimate": bound, "memory": {"total": 5, "fits": True}, "compile_seconds": 1.0, "warnings": []}
        failed = "--config.mesh.fsdp=2" in words
        if not failed:
            Path(words[-1]).write_text(json.dumps([report]))
        return type("Ended", (), {"returncode": 2 * failed, "stderr": "log\nscaling-perception: does not fit\n"})

    monkeypatch.setattr(mesh_search.subprocess, "run", compile_one)
    found = [Way({"data": 2 // size, "fsdp": size}, False, 1, size) for size in (1, 2)]
    for expected in (2, 3):  # the one that failed is tried again
        rows = list(mesh_search.compile_all(found, ["--config", "x.py"], tmp_path / "parts", 2))
        assert [one.get("error") for one in rows] == [None, "does not fit"] and rows[0]["mfu_worst"] == 0.2
        assert len(calls) == expected
    list(mesh_search.compile_all(found[:1], ["--config", "y.py"], tmp_path / "parts", 1))
    assert len(calls) == 4  # another config


@pytest.mark.parametrize(
    "words, message",
    [
        (["--mesh", "fsdp=2", "--json", "x.json"], "--mesh goes with one mesh, not with --search"),
        (["--what", "all", "--json", "x.json"], "--search is of the train step"),
        ([], "give --json FILE"),
    ],
)
def test_flags_that_do_not_go_together(words, message, capsys):
    assert cli.main(["compile", "--config", NANO, "--topology", "cpu:8", "--chip", "h200", "--search", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_of_real_programs(tmp_path, capsys):
    words = ["compile", "--config", NANO, "--topology", "cpu:2", "--chip", "h200", "--search", "--jobs", "2"]
    words += ["--config.model_changes.dim=64", "--config.train.batch_size=16", "--json", str(tmp_path / "s.json")]
    assert cli.main(words) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert len(found["rows"]) == 3 and all(one["fits"] for one in found["rows"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("best bound at worst: --config.mesh.data=")
