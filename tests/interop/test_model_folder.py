"""Model folders: whole or absent, checked against the sizes they claim, one-line refusals."""

import copy
import dataclasses
import errno
import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from scaling_perception.interop import find
from scaling_perception.interop.model_folder import (
    SOURCE_LICENSE,
    find_model,
    load_model,
    model_card,
    read_meta,
    save_model,
    save_streamed,
)
from scaling_perception.interop.safetensors_io import flatten_tree, save_tree, source_of, unflatten_tree
from scaling_perception.interop.torch_dit import dit_to_torch, leaf_specs, stream_from_torch
from scaling_perception.models.dit import abstract_params, count_active_params
from scaling_perception.models.presets import get_preset
from scaling_perception.parallel.mesh import make_mesh
from scaling_perception.parallel.rules import tree_shardings
from scaling_perception.support.errors import UserError

CONFIG = get_preset("nano")
META = {
    "model": dataclasses.asdict(CONFIG),
    "resolution": 128,
    "autoencoder": "tiny",
    "diffusion": {"schedule": "cosine", "prediction": "v", "spacing": "trailing", "steps_offset": 0},
    "tasks": ["depth", "flow"],
    "task_options": {"flow_divisor": 75.0},
    "latent_norm": {"shift": [[0.1, 0.2, 0.3, 0.4]] * 4, "scale": [[1.0] * 4] * 4},
    "training": {"steps": 12, "samples": 384},
}
# as published: classes, learned variance, no task; of experts
MOE = dataclasses.replace(get_preset("L/2-8E2A", dim=32, depth=2, heads=4, input_size=16, num_classes=11), experts=4)
PUBLISHED = {**META, "model": dataclasses.asdict(MOE), "tasks": [], "training": {}, "license": SOURCE_LICENSE}


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract_params(config))


@pytest.fixture
def params():
    return random_params(CONFIG)


@pytest.fixture
def folder(tmp_path, params):
    save_model(tmp_path / "model", params, META)
    return tmp_path / "model"


def edit(folder, **changes):
    meta = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(meta))


def test_what_is_saved_is_loaded(folder, params):
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    back, meta = load_model(folder)
    assert meta == {"format": 1, **META}
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, back))


def test_card_says_what_it_is_and_how_to_run_it(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and "58,224 parameters" in card and "- steps: 12" in card
    assert "scaling-perception predict --task depth --model ." in card


def test_card_of_a_published_model_says_what_it_is_for():
    card = model_card({**PUBLISHED, "source": {"file": "L.pt", "sha256": "0123abcd"}, "metrics": {"fid": 9.5}})
    assert "license: other\n" in card and "the licence of the source weights applies" in card
    assert "- file: L.pt\n- sha256: 0123abcd" in card and "- fid: 9.5" in card and "| experts | 4 |" in card
    assert f"{count_active_params(MOE):,} of them active for a token" in card and "| preset | L/2-8E2A |" in card
    assert "predict --task" not in card and "starting point for fine-tuning" in card and "init=." in card
    own = model_card({**META, "fingerprint": "c0ffee"})
    assert "license: apache-2.0\n" in own and "## Source" not in own and "- data fingerprint: c0ffee" in own
    for text in (card, own):
        _, front, body = text.split("---\n", 2)
        assert all(": " in line for line in front.splitlines()) and "None" not in body and "\n\n\n" not in body


def test_large_weights_are_several_files_which_are_one_model(tmp_path, params):
    save_model(tmp_path / "model", params, META, max_shard_bytes=100_000)
    names = sorted(os.listdir(tmp_path / "model"))
    assert names[2] == "model-00001-of-00003.safetensors" and names[-1] == "model.safetensors.index.json"
    assert find_model(tmp_path / "model") == tmp_path / "model" and read_meta(tmp_path / "model")["format"] == 1
    back, meta = load_model(tmp_path / "model")
    assert meta == {"format": 1, **META} and jax.tree.all(jax.tree.map(np.array_equal, params, back))
    save_model(tmp_path / "model", params, META)  # what is left of the former is not in the way
    assert sorted(os.listdir(tmp_path / "model")) == ["README.md", "config.json", "model.safetensors"]
    save_model(tmp_path / "model", params, META, max_shard_bytes=100_000)
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors is missing"):
        load_model(tmp_path / "model")


def test_published_weights_stream_into_a_folder_which_each_device_reads_its_part_of(tmp_path):
    params = random_params(MOE)
    source = source_of(dit_to_torch(params, MOE), "test")
    told = []
    slices = stream_from_torch(source, MOE)
    save_streamed(tmp_path, leaf_specs(source, MOE), slices, PUBLISHED, 200_000, lambda *size: told.append(size))
    assert told[-1][0] == told[-1][1] and len(told) == len(source.shapes)
    mesh = make_mesh(fsdp=2, expert=4, data=1)
    found, _ = load_model(tmp_path, mesh)
    host, _ = load_model(tmp_path, dtype=np.float16)
    places = flatten_tree(tree_shardings(abstract_params(MOE), mesh))
    for name, leaf in flatten_tree(found).items():
        np.testing.assert_array_equal(leaf, flatten_tree(params)[name])
        assert leaf.sharding == places[name] and flatten_tree(host)[name].dtype == np.float16
    gate = found["blocks"]["moe"]["experts"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.shape == (2, 1, 16, 128)


def test_shipped_models_are_found_by_name(folder, monkeypatch):
    monkeypatch.setattr(find, "SHIPPED", folder.parent)
    assert find_model("model") == folder and load_model("model")[1]["resolution"] == 128
    with pytest.raises(UserError, match="model 'nothing' is no folder, hub id .* or shipped model; .*known: model"):
        load_model("nothing")
    for name in ("", "../model", str(folder.parent / "other")):
        with pytest.raises(UserError, match="is no folder|has no config.json"):
            load_model(name or folder.parent)


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors does not exist"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="has weights and no config.json: copy the model's config.json there"):
        find.find_model(folder)


def test_truncated_weights_are_told(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="no whole safetensors file"):
        load_model(folder)


def test_damaged_config_is_told(folder):
    (folder / "config.json").write_text('{"format": 1,')
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(folder)


def test_weights_of_another_model_name_the_tensor_and_both_shapes(folder):
    tree = unflatten_tree(load_file(folder / "model.safetensors"))
    wrong = copy.deepcopy(tree)
    wrong["blocks"]["mlp"]["fc1"]["kernel"] = np.zeros((2, 32, 64), np.float32)
    save_tree(folder / "model.safetensors", wrong)
    with pytest.raises(UserError, match=r"blocks/mlp/fc1/kernel has shape \(2, 32, 64\).*needs \(2, 32, 128\)"):
        load_model(folder)
    del wrong["blocks"]["mlp"]["fc1"]["kernel"]
    save_tree(folder / "model.safetensors", wrong)
    with pytest.raises(UserError, match=r"blocks/mlp/fc1/kernel \(2, 32, 128\) of model nano is missing"):
        load_model(folder)
    save_tree(folder / "model.safetensors", {**tree, "more": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="tensor more is unknown"):
        load_model(folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"format": 2}, "format 2 is not 1"),
        ({"model": {**META["model"], "widht": 3}}, "no field 'widht'"),
        ({"model": "nano"}, "should be the model's sizes"),
        ({"resolution": 256}, "resolution 256 does not fit model input_size 16 .128 pixels."),
        ({"latent_norm": {"shift": [[0.0] * 4] * 4}}, "no 'scale'"),
        ({"latent_norm": {"shift": [[0.0] * 3], "scale": [[1.0] * 4]}}, "shift should hold 4 numbers"),
        ({"latent_norm": {"shift": None, "scale": [[1.0] * 4]}}, "shift should hold 4 numbers"),
        ({"latent_norm": {"shift": [[0.0] * 4], "scale": [[0.0] * 4]}}, "scale should hold finite numbers above 0"),
        ({"latent_norm": {"shift": [[float("nan")] * 4], "scale": [[1.0] * 4]}}, "shift should hold finite numbers:"),
        ({"resolution": "128"}, "config.json: resolution is '128': give a value of type int"),
        ({"autoencoder": None}, "config.json: autoencoder is None: give a value of type str"),
        ({"model": {**META["model"], "depth": "1"}}, "config.json: model depth='1': expected"),
    ],
)
def test_config_that_describes_no_model_of_ours(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(UserError, match=words):
        load_model(folder)


def test_foreign_config_and_missing_field(folder):
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="describes no model of ours"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({"format": 1, **{k: v for k, v in META.items() if k != "tasks"}}))
    with pytest.raises(UserError, match="field 'tasks' is missing"):
        load_model(folder)


def test_saving_refuses_what_could_not_be_loaded(tmp_path, params):
    with pytest.raises(UserError, match=r"pos_embed has shape \(2, 2\)"):
        save_model(tmp_path / "m", {**params, "pos_embed": np.zeros((2, 2))}, META)
    with pytest.raises(UserError, match="'autoencoder' is missing"):
        save_model(tmp_path / "m", params, {k: v for k, v in META.items() if k != "autoencoder"})
    assert not (tmp_path / "m").exists()


def test_full_disk_while_writing_leaves_no_partial_file(tmp_path, params, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_model(tmp_path / "m", params, META)
    assert os.listdir(tmp_path / "m") == []


def test_full_disk_at_the_flush_keeps_the_old_model(folder, params, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(UserError, match="No space left on device"):
        save_model(folder, other, {**META, "training": {"steps": 13}})
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
