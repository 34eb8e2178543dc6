"""Fixtures of evaluation and of the verbs: nano models with random weights, and small raw samples."""

import jax
import numpy as np
import pytest

from scaling_perception.models.autoencoders import make_tiny
from scaling_perception.models.dit import DiTConfig, abstract_params, position_table
from scaling_perception.models.tiny_vae import TinyVAEConfig, part_shapes, unflatten
from scaling_perception.tasks.normals import unit

SIDE = 32  # pixels of the nano model
VAE = TinyVAEConfig((4, 4, 4, 4), (0, 0, 0, 0), (4, 4, 4, 4), (0, 0, 0, 0))


def nano_autoencoder():
    rng = np.random.default_rng(7)

    def draw(name, shape):
        if name.endswith("bias"):  # mid-grey pictures: black ones would be clipped to nothing
            return np.full(shape, 0.5 if name == "head/bias" else 0.1, np.float32)
        return rng.normal(0, 1 / np.sqrt(np.prod(shape[:-1])), shape).astype(np.float32)

    parts = ("encoder", "decoder")
    trees = {p: unflatten({n: draw(n, shape) for n, shape in part_shapes(p, VAE).items()}) for p in parts}
    return make_tiny("nano", VAE, trees)


def nano_meta(**changes):
    sizes = {"dim": 16, "depth": 1, "heads": 2, "num_classes": 0, "task_labels": 4, "routed": True}
    sizes |= {"learn_sigma": False, "cond_channels": 8, "input_size": SIDE // 8, "patch_size": 2, "name": "nano"}
    return {
        "format": 1,
        "model": sizes | changes.pop("model", {}),
        "resolution": SIDE,
        "autoencoder": "tiny",
        "diffusion": {
            "schedule": "cosine",
            "prediction": "v",
            "spacing": "trailing",
            "steps_offset": 0,
            "final_alpha_one": True,
        },
        "tasks": ["depth", "flow", "amodal"],
        "task_options": {},
        "latent_norm": {"shift": [[0.0] * 4] * 4, "scale": [[1.0] * 4] * 4},
        "training": {},
        **changes,
    }


def nano_params(meta, seed=0):
    """Random everywhere: a fresh DiT is silent (its last layers are zero), which no test could learn from."""
    config = DiTConfig(**meta["model"])
    rng = np.random.default_rng(seed)
    shapes = abstract_params(config)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    return {**params, "pos_embed": position_table(config.dim, config.grid)}


@pytest.fixture(scope="session")
def make_predictor():
    from scaling_perception.inference.predictor import Predictor

    def make(seed=0, **changes):
        meta = nano_meta(**changes)
        return Predictor(nano_params(meta, seed), meta, nano_autoencoder())

    return make


@pytest.fixture(scope="session")
def predictor(make_predictor):
    return make_predictor()


@pytest.fixture
def make_image():
    def make(height=40, width=56, seed=0):
        rng = np.random.default_rng(seed)
        return rng.integers(0, 256, (height, width, 3), np.uint8)

    return make


@pytest.fixture
def make_raw(make_image):
    """A raw sample that serves every task."""

    def make(height=40, width=56, seed=0, **changes):
        rng = np.random.default_rng(seed + 100)
        visible = np.zeros((height, width), bool)
        visible[5:20, 8:30] = True
        whole_mask = visible.copy()
        whole_mask[5:30, 8:40] = True
        image = make_image(height, width, seed)
        raw = {
            "key": f"raw/{seed}",
            "image": image,
            "image2": np.roll(image, 2, axis=1),
            "depth": rng.uniform(1, 9, (height, width)).astype(np.float32),
            "valid": rng.random((height, width)) < 0.9,
            "flow": rng.uniform(-3, 3, (height, width, 2)).astype(np.float32),
            "normals": unit(np.random.default_rng(seed).normal(size=(height, width, 3)) - [0, 0, 2]),
            "visible_mask": visible,
            "whole_mask": whole_mask,
            "whole": np.where(whole_mask[..., None], image // 2, 255).astype(np.uint8),
        }
        return {**raw, **changes}

    return make


@pytest.fixture(scope="session")
def nano_folder(predictor, tmp_path_factory):
    """The nano model as a folder, its autoencoder beside it."""
    from scaling_perception.interop.model_folder import save_model
    from scaling_perception.models.autoencoders import save_part

    folder = tmp_path_factory.mktemp("nano")
    for part in ("encoder", "decoder"):
        save_part(folder / "vae", part, predictor.autoencoder.config, predictor.autoencoder.params[part], {})
    save_model(folder / "model", predictor.params, {**predictor.meta, "autoencoder": str(folder / "vae")})
    return folder / "model"
