"""Model folders: whole or absent, checked against the sizes they claim, one-line refusals."""

import copy
import dataclasses
import errno
import json
import os

import jax
import numpy as np
import pytest

from scaling_perception.interop import model_folder
from scaling_perception.interop.model_folder import find_model, load_model, save_model
from scaling_perception.interop.safetensors_io import load_tree, save_tree
from scaling_perception.models.dit import abstract_params
from scaling_perception.models.presets import get_preset
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


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract_params(CONFIG))


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


def test_shipped_models_are_found_by_name(folder, monkeypatch):
    monkeypatch.setattr(model_folder, "SHIPPED", folder.parent)
    assert find_model("model") == folder and load_model("model")[1]["resolution"] == 128
    with pytest.raises(UserError, match="no model folder nothing.*one of: model"):
        load_model("nothing")
    for name in ("", "../model", str(folder.parent / "other")):
        with pytest.raises(UserError, match="no model folder|has no config.json"):
            load_model(name or folder.parent)


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors does not exist"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        load_model(folder)


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
    tree, _ = load_tree(folder / "model.safetensors")
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
