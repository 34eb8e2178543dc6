"""`bench sample`: what is told, that all ways give the same prediction, and what is refused."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from scaling_perception.models import tiny_vae, vae
from scaling_perception.models.autoencoders import make_kl, make_tiny
from scaling_perception.models.presets import get_preset
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import make_parser, run_verb
from scaling_perception.timing import peer, sample, ways
from scaling_perception.timing.rounds import in_rounds
from scaling_perception.timing.ways import draw_leaves, make_case, make_torch

NANO = ["sample", "--model", "nano", "--resolution", "32", "--quick"]


def parse(*words):
    return make_parser("bench").parse_args([*NANO, *words])


@pytest.fixture(scope="module")
def result(tmp_path_factory, torch):
    file = tmp_path_factory.mktemp("bench") / "sample.json"
    assert run_verb("bench", [*NANO, "--against", "torch", "--levers", "--peak", "1", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_every_way_and_lever_is_told(result):
    assert set(result["ways"]) == {"ours", "torch explicit", "torch sdpa"}
    assert set(result["parts"]) == {"encode", "decode"} and len(result["levers"]) == 7
    for row in [*result["ways"].values(), *result["parts"].values(), *result["levers"].values()]:
        assert row["seconds"] > 0 and row["fastest"] > 0
    assert (result["steps"], result["ensemble"], result["repeats"]) == (2, 2, 1)
    ours, ways = result["ours"], result["ways"]
    assert ours["gflops_per_second"] == pytest.approx(2e-9 * result["macs"]["ours"] / ways["ours"]["seconds"])
    assert ours["mfu"] == pytest.approx(ours["gflops_per_second"] / 1000)
    against = result["against"]
    assert ways[against["opponent"]]["seconds"] == min(
        ways[f"torch {kind}"]["seconds"] for kind in ("explicit", "sdpa")
    )
    for name, row in against["ratios"].items():
        assert row["ratio"] == pytest.approx(ways[name]["seconds"] / ways["ours"]["seconds"])


def test_work_is_counted(result):
    macs = result["macs"]
    assert macs["ours"] == 4 * macs["forward"] + macs["encoder"] + 2 * macs["decoder"]


def test_torch_gives_the_same_prediction(result):
    for found in result["against"]["differences"].values():
        assert found["pixels"] < 1e-4 and 0 < found["estimates"] < 1e-5


@pytest.mark.parametrize("family", ["kl", "tiny"])
def test_autoencoders_in_torch(family, torch):
    config = vae.VAEConfig((8, 16), 1, norm_num_groups=4) if family == "kl" else tiny_vae.SMALL
    rng, module = np.random.default_rng(0), (vae if family == "kl" else tiny_vae)
    parts = ("encoder", "decoder")
    trees = {p: tiny_vae.unflatten(draw_leaves(module.part_shapes(p, config), rng)) for p in parts}
    ours = (make_kl if family == "kl" else make_tiny)("drawn", config, trees)
    encode, decode = peer.load("torch_peer").make_coders(ours)
    picture = rng.uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    latent = np.array(ours.encode(ours.params, picture)[0])
    theirs = encode(torch.from_numpy(picture.transpose(0, 3, 1, 2))).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(theirs, latent, atol=1e-4 * np.abs(latent).max())
    pixels = np.asarray(ours.decode(ours.params, latent))
    theirs = decode(torch.from_numpy(latent.transpose(0, 3, 1, 2))).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(theirs, pixels, atol=1e-4 * np.abs(pixels).max())


def test_differences_end_the_run(monkeypatch, torch):
    monkeypatch.setattr(ways, "LARGEST_ESTIMATE", 0.0)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        run_verb("bench", [*NANO, "--against", "torch"])


def test_rounds_take_turns():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = in_rounds(functions, 2)
    assert "".join(calls) == "abc" + "abc" + "bca"
    assert len(found["a"]["rounds"]) == 2 and found["a"]["fastest"] <= found["a"]["seconds"]


def test_memory_of_one_way():
    found = sample._once(parse("--once", "ours"))
    assert 0 < found["before_bytes"] <= found["peak_bytes"]
    assert "MiB" in sample.table(found)


def test_refusals(monkeypatch):
    with pytest.raises(UserError, match="unknown autoencoder 'tinny'; did you mean 'tiny'"):
        run_verb("bench", [*NANO, "--autoencoder", "tinny"])
    with pytest.raises(UserError, match="resolution 40 is not a multiple of 16"):
        run_verb("bench", [*NANO, "--resolution", "40"])
    with pytest.raises(UserError, match="--cores"):
        run_verb("bench", [*NANO, "--cores", "0"])
    with pytest.raises(UserError, match="--images 0: give 1 or more"):
        run_verb("bench", [*NANO, "--images", "0"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs PyTorch: pip install 'scaling-perception\[torch\]'"):
        make_torch(make_case(parse()), "sdpa")


def test_torch_refuses_what_it_has_not(torch):
    with pytest.raises(UserError, match="dense models alone, and nano is none"):
        peer.load("torch_peer").make_dit(dataclasses.replace(get_preset("nano"), qk_norm=True), {})
