"""Convert: every published checkpoint back and forth without a changed bit; refusals that name tensors and write
nothing; stopped at any moment, nothing that looks complete."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from applying import fresh
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from scaling_perception.cli import main
from scaling_perception.convert import size_of
from scaling_perception.interop import checkpoint as reading
from scaling_perception.interop import export, torch_dit
from scaling_perception.interop.hf_clip import load_clip
from scaling_perception.interop.model_folder import load_model, save_model
from scaling_perception.interop.released import RELEASED, describe
from scaling_perception.interop.torch_files import open_tensors
from scaling_perception.models import tiny_vae
from scaling_perception.models.autoencoders import load_autoencoder, load_part
from scaling_perception.models.dit import DiT, config_from_dict
from scaling_perception.models.presets import at_resolution, get_preset
from scaling_perception.support.errors import UserError

ROOT = Path(__file__).parent.parent
CHECKPOINTS = {
    "dit/DiT-tiny-2-64x64.pt": ("dit", "--heads 4"),
    "dit/0000002.pt": ("dit", "--heads 4"),
    "generalist/dit_moe_generalist_tiny.pt": ("generalist", "--heads 4"),
    "generalist/dit_moe_generalist_tiny_ema.pt": ("generalist", "--heads 2"),
    "vae_new_names": ("sd_vae", ""),
    "vae_old_names": ("sd_vae", ""),
    "clip_quickgelu": ("clip", ""),
    "clip_gelu_legacy": ("clip", ""),
}


def convert(*words, code=0):
    assert main(["convert", *map(str, words)]) == code


def tensors(path):
    path = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    source = open_tensors(path)
    return {name: np.array(source.read(name)) for name in source.shapes}


def assert_same(first, second):
    assert set(first) == set(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype and np.array_equal(value, second[name]), name


def meta_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def routed(golden):
    """The generalist's tensors under their published names."""
    arrays = load_file(golden / "generalist" / "uc_e8_top2_shared.safetensors")
    return {name.removeprefix("weights/"): value for name, value in arrays.items() if name.startswith("weights/")}


@pytest.fixture
def file(tmp_path, routed):
    save_file(routed, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_back_and_forth_changes_nothing(shared_dir, torch, tmp_path, name, capsys):
    layout, flags = CHECKPOINTS[name]
    source = shared_dir / "golden" / "checkpoints" / name
    ours, file, again, split, back = (tmp_path / n for n in ("ours", "file.pt", "again", "split", "back"))
    convert(source, ours, *flags.split())
    convert(ours, file)
    convert(file, again)
    convert(ours, split, "--to", "safetensors", "--shard-size", "200KB")
    convert(split, back, "--layout", layout)
    shown = capsys.readouterr().out
    assert f"({layout})" in shown and "parameters" in shown
    for other in (again, back):
        assert_same(tensors(ours), tensors(other))
    published = tensors(shared_dir / "golden" / "checkpoints" / ("vae_new_names" if layout == "sd_vae" else name))
    published = {n: value for n, value in published.items() if not n.endswith("position_ids")}
    assert_same(published, tensors(file))
    assert_same(published, tensors(split))
    if layout in ("dit", "generalist"):
        described = [meta_of(folder) for folder in (ours, again, back)]
        sources = [meta.pop("source") for meta in described]
        assert described[0] == described[1] == described[2]
        assert sources[0]["file"] == source.name and len(sources[0]["sha256"]) == 64 and sources[0]["layout"] == layout
        assert sources[2]["file"] == "model.safetensors.index.json" and len(sources[2]["sha256"]) > 1
        assert "licence of the source weights" in (ours / "README.md").read_text()
    elif layout == "sd_vae":
        assert load_autoencoder(str(ours)).id == load_autoencoder(str(source)).id
    else:
        first, second = load_clip(source), load_clip(ours)
        assert first.config == second.config
        np.testing.assert_array_equal(first.tokenize(["a depth map"]), second.tokenize(["a depth map"]))


def test_converted_generalist_gives_the_published_output(golden, tmp_path, capsys):
    arrays = load_file(golden / "generalist" / "uc_e8_top2.safetensors")
    weights = {name.removeprefix("weights/"): v for name, v in arrays.items() if name.startswith("weights/")}
    save_file(weights, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "--heads", 4)
    params, meta = load_model(tmp_path / "out")
    config = config_from_dict(meta["model"])
    x = jnp.asarray(arrays["in/x"].transpose(0, 2, 3, 1))
    out = DiT(config).apply({"params": params}, x, jnp.asarray(arrays["in/t"]), jnp.asarray(arrays["in/y"], jnp.int32))
    np.testing.assert_allclose(out.transpose(0, 3, 1, 2), arrays["out/forward"], atol=5e-5, rtol=1e-4)
    for field in ("diffusion", "tasks", "task_options", "autoencoder"):
        assert meta[field] == RELEASED[field]
    shown = capsys.readouterr().out
    assert "8 gelu experts (2 active, paper)" in shown and "active experts are assumed (--active)" in shown
    assert "heads are assumed" not in shown


def test_what_is_not_told_is_assumed_and_said(file, tmp_path, capsys):
    convert(file, tmp_path / "a", "--dry-run")
    assert "attention heads are assumed: the tensors do not tell (--heads)" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    convert(file, tmp_path / "b", "--heads", 2, "--active", 4, "--gating", "renormalised")
    assert "assumed" not in capsys.readouterr().out
    model = meta_of(tmp_path / "b")["model"]
    assert (model["heads"], model["active_experts"], model["gating"]) == (2, 4, "renormalised")
    convert(tmp_path / "b", tmp_path / "c", "--to", "safetensors")
    convert(tmp_path / "c", tmp_path / "d")
    assert meta_of(tmp_path / "d")["model"] == model and "assumed" not in capsys.readouterr().out


def test_a_table_is_shortened_unless_asked_for(file, tmp_path, routed, capsys):
    convert(file, tmp_path / "out", "--dry-run")
    short = capsys.readouterr().out
    assert f"… {len(routed) - 20} more (--table shows them)" in short
    convert(file, tmp_path / "out", "--dry-run", "--table")
    whole = capsys.readouterr().out
    assert all(f"{name} " in whole for name in routed)
    line = next(line for line in whole.splitlines() if line.startswith("blocks.1.moe.experts.5.fc1.weight"))
    assert line.split() == ["blocks.1.moe.experts.5.fc1.weight", "blocks/moe/experts/fc1/kernel[1,", "5]"] + (
        ["128x32", "float32"]
    )


def test_presets_are_recognised_at_any_resolution():
    for name, pixels in (("XL/2", 512), ("XL-8E2A", 512), ("L/2-8E2A", 256), ("a4-16E2A", 256)):
        assert export._preset(dataclasses.replace(at_resolution(get_preset(name), pixels), name="x")) == name
    assert export._preset(get_preset("a2-8E4A", gating="paper")) == "a2-8E4A"
    assert export._preset(get_preset("a2", depth=3)) is None


def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_written(tmp_path, routed, capsys):
    broken = dict(routed)
    for i in range(8):
        del broken[f"blocks.0.moe.experts.{i}.fc1.bias"], broken[f"blocks.1.moe.experts.{i}.fc2.weight"]
    broken |= {f"optimizer.{i}": np.zeros(2, np.float32) for i in range(7)}
    save_file(broken, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", code=2)
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[-1] == "and 3 more"
    assert "missing: blocks.0.moe.experts.3.fc1.bias (128,) (for blocks/moe/experts/fc1/bias)" in lines
    assert "unexpected: optimizer.0 (2,)" in lines
    assert "16 missing, 7 unexpected" in last and "--allow-partial" in last
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_partial_checkpoints_are_filled_and_the_description_says_so(tmp_path, routed, capsys):
    broken = {name: value for name, value in routed.items() if name != "blocks.1.attn.qkv.weight"}
    save_file({**broken, "logit_scale": np.ones(1, np.float32)}, tmp_path / "in.safetensors")
    for out in ("a", "b"):
        convert(tmp_path / "in.safetensors", tmp_path / out, "--allow-partial", "--heads", 2)
    shown = capsys.readouterr()
    assert "missing: blocks.1.attn.qkv.weight (96, 32)" in shown.err and "unexpected: logit_scale (1,)" in shown.err
    assert meta_of(tmp_path / "a")["partial"] == {"made_up": ["blocks.1.attn.qkv.weight"], "left_out": ["logit_scale"]}
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert_same(first, second)
    kernel = first["blocks/attn/qkv/kernel"]
    np.testing.assert_array_equal(kernel[0], routed["blocks.0.attn.qkv.weight"].T)
    assert 0.05 < kernel[1].std() < 0.3 and np.abs(kernel[1] - routed["blocks.1.attn.qkv.weight"].T).max() > 0.01
    load_model(tmp_path / "a")


def test_another_shape_is_refused_always(tmp_path, routed, capsys):
    save_file({**routed, "pos_embed": routed["pos_embed"][:, :9]}, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "a", "--dry-run")  # another grid is another resolution
    wrong = {**routed, "final_layer.linear.bias": np.zeros(7, np.float32)}
    save_file(wrong, tmp_path / "in.safetensors")
    capsys.readouterr()
    for flags in ([], ["--allow-partial"]):
        convert(tmp_path / "in.safetensors", tmp_path / "b", *flags, code=2)
        error = capsys.readouterr().err
        assert "of another shape: final_layer.linear.bias has (7,), the model needs (32,)" in error
        assert "1 tensor(s) have another shape" in error.splitlines()[-1]
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_words_that_cannot_be_meant_are_refused_in_one_line(file, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    (tmp_path / "there.pt").write_text("mine")
    save_file({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}, tmp_path / "foreign.safetensors")
    out = tmp_path / "out"
    cases = [
        ((tmp_path / "none.pt", out), "none.pt does not exist"),
        ((tmp_path / "foreign.safetensors", out), "first a, b): known are dit, dit_moe"),
        ((file, out, "--layout", "clip"), "has the layout generalist"),
        ((file, out, "--layout", "generlist"), "did you mean 'generalist'"),
        ((file, out, "--heads", "0"), "--heads 0"),
        ((file, out, "--heads", "5"), "5 attention heads do not fit a width of 32"),
        ((file, out, "--active", "9"), "active_experts=9"),
        ((file, out, "--shard-size", "4XB"), "--shard-size '4XB'"),
        ((file, tmp_path / "full"), "full holds other files than a model"),
        ((file, tmp_path / "file"), "is a file"),
        ((file, file), "source itself"),
        ((file, tmp_path), "holds the source"),
        ((file, tmp_path / "there.pt"), "there.pt holds another result (its settings are not known)"),
        ((file, out, "--to", "torch"), "ends in .pt"),
        ((file, tmp_path / "x.pt", "--to", "ours"), "writes a folder"),
        ((ROOT / "scaling_perception" / "weights" / "tiny_vae", tmp_path / "x.pt"), "no published layout holds"),
    ]
    for words, message in cases:
        convert(*words, code=2)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, (words, error)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "foreign.safetensors", "full", "in.safetensors", "there.pt"]


def test_sizes():
    assert [size_of(text) for text in ("4GB", "1.5MiB", "700", "2kb")] == [4 * 10**9, 3 * 2**19, 700, 2000]
    with pytest.raises(UserError, match="such as 4GB"):
        size_of("0")


def test_another_model_is_replaced_by_wish_alone(file, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(message, *words):
        capsys.readouterr()
        before = {path: path.read_bytes() for path in out.iterdir()}
        convert(*words, code=2)
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1], error
        assert before == {path: path.read_bytes() for path in out.iterdir()}

    for _ in range(2):  # equal settings go on
        convert(file, out, "--shard-size", "300KB")
    assert len(os.listdir(out)) > 4
    refused('heads: "absent" there, 4 here', file, out, "--shard-size", "300KB", "--heads", 4)
    for name in ("budgets.json", "grids.json"):  # tables of the replaced weights
        (out / name).write_text("{}")
    convert(file, out, "--heads", 4, "--overwrite")
    assert sorted(os.listdir(out)) == [".settings", "README.md", "config.json", "model.safetensors"]
    assert meta_of(out)["model"]["heads"] == 4
    save_file({name: array + 1 for name, array in load_file(file).items()}, file)
    refused("sha256: ", file, out, "--heads", 4)  # the same words, other weights
    (out / ".settings").unlink()  # as one that was trained
    refused("its settings are not known", file, out, "--heads", 4)
    (out / "notes.txt").write_text("mine")
    refused("holds other files", file, out, "--overwrite")
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out"]


def test_half_precision_keeps_the_router_and_comes_back(file, tmp_path, routed):
    convert(file, tmp_path / "half", "--dtype", "bfloat16")
    half = tensors(tmp_path / "half")
    assert half["blocks/moe/router/kernel"].dtype == np.float32
    assert {v.dtype for n, v in half.items() if "router" not in n} == {np.dtype(ml_dtypes.bfloat16)}
    convert(tmp_path / "half", tmp_path / "split", "--to", "safetensors")
    convert(tmp_path / "split", tmp_path / "again")
    assert_same(half, tensors(tmp_path / "again"))
    name = "blocks.1.attn.proj.weight"
    kept = tensors(tmp_path / "split")[name].astype(np.float32)
    np.testing.assert_allclose(kept, routed[name], rtol=2**-8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_taesd_as_two_files_one_file_and_ours(tmp_path, dtype, torch):
    rng, pair = np.random.default_rng(3), tmp_path / "pair"
    pair.mkdir()
    for part in reading.PARTS:
        shapes = tiny_vae.part_shapes(part, tiny_vae.TAESD)
        names = tiny_vae.torch_names(part, tiny_vae.TAESD)
        state = {names[leaf]: rng.normal(0, 0.1, shape[::-1]).astype(dtype) for leaf, shape in shapes.items()}
        save_file(state, pair / f"taesd_{part}.safetensors")
    convert(pair, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "one.pt")
    convert(tmp_path / "one.pt", tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "pair2", "--to", "safetensors")
    for part in reading.PARTS:
        published, back = (load_file(folder / f"taesd_{part}.safetensors") for folder in (pair, tmp_path / "pair2"))
        assert_same(published, back)
        assert load_part(tmp_path / "ours", part)[0] == tiny_vae.TAESD
    assert "encoder.layers.0.weight" in tensors(tmp_path / "one.pt")
    loaded = [load_autoencoder(str(tmp_path / name)) for name in ("pair", "ours", "again", "pair2")]
    assert len({one.id for one in loaded}) == 1


def test_shipped_models_go_out_and_come_back(tmp_path, torch):
    mini = ROOT / "scaling_perception" / "weights" / "mini"
    convert(mini, tmp_path / "mini.pt")
    assert tensors(tmp_path / "mini.pt")["x_embedder.proj.conv_in_4.weight"].shape == (128, 76, 2, 2)
    convert(tmp_path / "mini.pt", tmp_path / "mini")
    assert_same(tensors(mini), tensors(tmp_path / "mini"))
    ours, theirs = meta_of(tmp_path / "mini"), meta_of(mini)
    for field in ("tasks", "task_options", "latent_norm", "diffusion", "autoencoder", "training"):
        assert ours[field] == theirs[field]
    assert config_from_dict(ours["model"]) == config_from_dict(theirs["model"])


def test_a_model_that_no_layout_holds_stays_ours(tmp_path, capsys):
    config = get_preset("nano", context_dim=6)
    params = fresh(config, jax.random.key(0))
    save_model(tmp_path / "in", params, describe(config))
    convert(tmp_path / "in", tmp_path / "half", "--dtype", "float16")
    assert tensors(tmp_path / "half")["context/table"].dtype == np.float16
    assert meta_of(tmp_path / "half")["model"]["context_dim"] == 6
    convert(tmp_path / "in", tmp_path / "out", "--to", "safetensors", code=2)
    assert "task context" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_anything_is_written(file, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    convert(file, tmp_path / "out", code=2)
    assert "takes 0.00 GB and 0.00 are free" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in.safetensors"]


@pytest.mark.parametrize("to", ["ours", "safetensors", pytest.param("torch", marks=pytest.mark.torch)])
def test_interrupted_it_leaves_nothing(file, tmp_path, monkeypatch, to):
    target = tmp_path / ("out.pt" if to == "torch" else "out")
    name = "to_ours" if to == "ours" else "to_published"
    real = getattr(reading, name)

    def stop(checkpoint):
        for number, piece in enumerate(real(checkpoint)):
            if number == 40:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(reading, name, stop)
    convert(file, target, "--to", to, code=130)
    assert os.listdir(tmp_path) == ["in.safetensors"]


CHILD = """
import os, resource, sys
from scaling_perception.cli import main
from scaling_perception.interop import checkpoint as reading
source, target, what = sys.argv[1:]
if what == "killed":
    real = reading.to_ours
    def stop(checkpoint):
        for number, piece in enumerate(real(checkpoint)):
            if number == 40:
                os._exit(9)
            yield piece
    reading.to_ours = stop
    main(["convert", source, target])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
assert main(["convert", source, target, "--dry-run"]) == 0
before = peak()
assert main(["convert", source, target]) == 0
print("growth", peak() - before)
"""


def child(*words):
    command = [sys.executable, "-c", CHILD, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})


def test_killed_it_leaves_nothing_that_looks_complete_and_the_next_run_cleans_up(file, tmp_path):
    assert child(file, tmp_path / "out", "killed").returncode == 9
    left = [name for name in os.listdir(tmp_path) if name != "in.safetensors"]
    assert not (tmp_path / "out").exists() and left and all(name.startswith(".out.") for name in left)
    convert(file, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out"]
    load_model(tmp_path / "out")


def test_memory_stays_far_below_the_size_of_the_file(file, tmp_path):
    """150 MB of experts take less than a third of that above what the program needs to check them."""
    rng = np.random.default_rng(0)
    config = get_preset("nano", depth=4, dim=256, heads=4, experts=16, num_classes=1000)
    plans = reading.leaf_pieces(config)
    state = {p.tensor: rng.standard_normal(p.shape, np.float32) for plan in plans.values() for p in plan.pieces}
    save_file(state, tmp_path / "big.safetensors")
    size = (tmp_path / "big.safetensors").stat().st_size
    assert size > 1.4e8
    done = child(tmp_path / "big.safetensors", tmp_path / "out", "whole")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("growth")[1]) < size / 3
    assert "convert: " in done.stderr and done.stderr.count("\n") <= 2  # plain lines: no terminal


def test_an_unusual_width_asks_for_the_heads():
    assert torch_dit._fitting_heads(40, 12, 5) == 5 and torch_dit._fitting_heads(64, 12, None) == 16
    for heads, likely in (((40, 12, None), "1"), ((1000, 12, 7), "8, 10, 20, 25")):
        with pytest.raises(UserError, match=f"attention heads do not fit a width of .* likely {likely}$"):
            torch_dit._fitting_heads(*heads)


def test_a_tiny_autoencoder_of_other_widths(tmp_path):
    sizes = {"encoder_block_out_channels": [8, 16, 24], "num_encoder_blocks": [1, 1, 2]}
    sizes |= {"decoder_block_out_channels": [24, 16, 8], "num_decoder_blocks": [2, 1, 1], "latent_channels": 4}
    config = reading._tiny_config(sizes, "here")
    state = {}
    for part in ("encoder", "decoder"):
        shapes = tiny_vae.part_shapes(part, config)
        for leaf, name in tiny_vae.torch_names(part, config).items():
            shape = reading._turn(shapes[leaf])[0]
            state[reading._joined_name(part, name)] = np.random.default_rng(len(state)).normal(size=shape).astype("f4")
    folder = tmp_path / "vae"
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny", **sizes}))
    convert(folder, tmp_path / "out")
    for part in ("encoder", "decoder"):
        found, params = load_part(tmp_path / "out", part)
        want = tiny_vae.from_torch(
            part, config, {reading.half_name(part, n): v for n, v in state.items() if n.startswith(part)}, ""
        )
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, params, want)


def _changed(array, change):
    array = np.array(array)
    if change == "integers":
        return (array * 100).astype(np.int32)
    array.flat[0] = {"large": 1e6, "nan": np.nan}[change]
    return array


@pytest.mark.parametrize("to", ["ours", pytest.param("torch", marks=pytest.mark.torch), "safetensors"])
@pytest.mark.parametrize(
    ("change", "flags", "told"),
    [
        ("large", ["--dtype", "float16"], "does not fit float16, for its largest value is 1e+06: use bfloat16"),
        ("nan", [], "holds 1 value(s) that are NaN or infinite"),
        ("integers", [], "holds int32: weights are floating-point numbers"),
        ("integers", ["--dtype", "float32"], "holds int32: weights are floating-point numbers"),
    ],
)
def test_weights_that_are_no_finite_floats_are_refused(tmp_path, routed, capsys, to, change, flags, told):
    name = next(name for name in routed if name.endswith(".weight"))
    save_file({**routed, name: _changed(routed[name], change)}, tmp_path / "in.safetensors")
    target = tmp_path / ("out.pt" if to == "torch" else "out")
    convert(tmp_path / "in.safetensors", target, "--heads", "4", "--to", to, *flags, code=2)
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and sorted(tmp_path.iterdir()) == [tmp_path / "in.safetensors"]


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_autoencoders_of_no_finite_floats_are_refused(tmp_path, capsys, part):
    shutil.copytree(ROOT / "scaling_perception" / "weights" / "tiny_vae", tmp_path / "vae")
    weights = load_file(tmp_path / "vae" / f"{part}.safetensors")
    name = next(iter(weights))
    with safe_open(tmp_path / "vae" / f"{part}.safetensors", "numpy") as held:
        header = held.metadata()
    save_file({**weights, name: _changed(weights[name], "nan")}, tmp_path / "vae" / f"{part}.safetensors", header)
    convert(tmp_path / "vae", tmp_path / "out", code=2)
    assert "that are NaN or infinite" in capsys.readouterr().err and not (tmp_path / "out").exists()
