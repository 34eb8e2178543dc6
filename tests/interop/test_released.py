"""The released generalist's description: sizes, order of inputs, labels, prompts and sampler as facts 2, 4.3 and 10."""

import dataclasses

import numpy as np
import pytest

from scaling_perception.diffusion.sampler import sampler_tables
from scaling_perception.diffusion.schedules import DiffusionPreset, get_diffusion
from scaling_perception.interop.released import RELEASED, TASK_LABELS, describe
from scaling_perception.models.dit import config_from_dict, count_active_params, count_params
from scaling_perception.models.presets import get_preset
from scaling_perception.tasks import TaskOptions, get_task

OPTIONS = TaskOptions.from_dict(RELEASED["task_options"])


@pytest.fixture
def raw():
    rng = np.random.default_rng(5)
    height, width = 6, 9
    depth = rng.uniform(1, 9, (height, width)).astype(np.float32)
    depth[2:4, 3:7] = 0
    return {
        "key": "one",
        "image": rng.integers(0, 256, (height, width, 3), np.uint8),
        "image2": rng.integers(0, 256, (height, width, 3), np.uint8),
        "depth": depth,
        "flow": rng.uniform(-90, 90, (height, width, 2)).astype(np.float32),
        "visible_mask": rng.random((height, width)) < 0.5,
        "whole": rng.integers(0, 256, (height, width, 3), np.uint8),
    }


def nearest_exact(array, size):
    """torch's rule, written out: output i takes input floor((i + 1/2) * length / size)."""
    rows, columns = (
        np.floor((np.arange(n) + 0.5) * m / n).astype(int) for m, n in zip(array.shape, size, strict=False)
    )
    return array[rows][:, columns]


def unit(pixels):
    return pixels.astype(np.float32) / 127.5 - 1


def test_sizes_and_labels():
    config = config_from_dict(RELEASED["model"])
    assert config == get_preset("XL-8E2A") and RELEASED["resolution"] == 512
    assert (count_params(config), count_active_params(config)) == (2_758_511_264, 973_915_808)  # facts 1.2
    assert (config.label_rows, config.null_label, config.gating, config.qk_norm) == (1005, 1004, "paper", False)
    assert (config.input_channels, config.out_channels, config.shared_experts) == (12, 8, 0)
    assert list(TASK_LABELS) == RELEASED["tasks"]
    for task, labels in TASK_LABELS.items():
        assert tuple(config.task_label(one.id) for one in get_task(task).passes) == labels
    assert np.shape(RELEASED["latent_norm"]["shift"]) == (4, 4) and not np.any(RELEASED["latent_norm"]["shift"])
    assert np.all(np.asarray(RELEASED["latent_norm"]["scale"]) == 1)


def test_sampler_is_the_scheduler_file_of_the_released_pipeline():
    preset = DiffusionPreset(**RELEASED["diffusion"])
    assert preset == get_diffusion("released") and RELEASED["diffusion"] == dataclasses.asdict(preset)
    np.testing.assert_array_equal(np.asarray(sampler_tables(preset, 50).t)[[0, -1]], [981, 1])  # facts 4.3


def test_a_model_of_classes_has_no_task_and_its_own_diffusion():
    meta = describe(get_preset("XL/2", input_size=64), {"file": "DiT-XL-2-512x512.pt"})
    assert meta["tasks"] == [] and meta["task_options"] == {} and meta["resolution"] == 512
    assert np.shape(meta["latent_norm"]["scale"]) == (1, 4) and meta["source"]["file"] == "DiT-XL-2-512x512.pt"
    preset = DiffusionPreset(**meta["diffusion"])
    assert (preset.schedule, preset.prediction, preset.final_alpha_one) == ("linear", "epsilon", True)
    tables = sampler_tables(preset, 250)
    np.testing.assert_array_equal(np.asarray(tables.t), np.arange(0, 1000, 4)[::-1])  # DiT's "ddim250"


def test_depth_is_taken_by_nearest_and_its_prompt_is_the_mask_of_valid_depths(raw):
    shown = get_task("depth").conditions(raw, 16, OPTIONS)
    np.testing.assert_allclose(shown["image"], unit(nearest_exact(raw["image"], (16, 16))), atol=1e-6)
    valid = nearest_exact(raw["depth"] > 0, (16, 16)).astype(np.float32)
    assert 0 < valid.mean() < 1
    np.testing.assert_array_equal(shown["prompt"], np.repeat(valid[..., None], 3, axis=-1))  # 0 and 1, not -1 and 1
    alone = get_task("depth").conditions({"key": "x", "image": raw["image"]}, 16, OPTIONS)
    assert (alone["prompt"] == 1).all() and alone["prompt"].shape == (16, 16, 3)
    raw["valid"] = raw["depth"] > 5
    np.testing.assert_array_equal(
        get_task("depth").encode(raw, 16, OPTIONS)[0]["prompt"][..., 0], nearest_exact(raw["valid"], (16, 16))
    )


def test_flow_and_amodal_are_bilinear_with_the_prompts_of_the_facts(raw):
    flow = get_task("flow").conditions(raw, 16, OPTIONS)
    amodal = get_task("amodal").conditions(raw, 16, OPTIONS)
    assert np.abs(flow["image"] - unit(nearest_exact(raw["image"], (16, 16)))).max() > 0.1
    np.testing.assert_array_equal(flow["image"], amodal["image"])
    np.testing.assert_array_equal(flow["prompt"], get_task("flow").conditions(raw, 16, TaskOptions())["prompt"])
    mask = np.where(nearest_exact(raw["visible_mask"], (16, 16)), 1.0, -1.0)
    np.testing.assert_array_equal(amodal["prompt"], np.repeat(mask[..., None], 3, axis=-1))
    u, v = get_task("flow").encode({**raw, "flow": np.full((6, 9, 2), 18.0, np.float32)}, 16, OPTIONS)
    np.testing.assert_allclose(u["target"], 18 / 75 * 512 / 9, rtol=1e-6)  # pixels of a 512-wide frame / 75


@pytest.mark.parametrize("size", [(16, 16), (5, 5), (13, 13)])
def test_nearest_of_everything_is_torchs_nearest_exact(raw, size, torch):
    options = TaskOptions(image_resize="nearest")

    def resized(array):
        planes = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array.astype(np.float32), -1, 0)))[None]
        return np.moveaxis(torch.nn.functional.interpolate(planes, size, mode="nearest-exact")[0].numpy(), 0, -1)

    flow = get_task("flow").encode(raw, size[0], options)
    for found, field in ((flow[0]["image"], "image"), (flow[0]["prompt"], "image2")):
        np.testing.assert_allclose(found, resized(raw[field]) / 127.5 - 1, atol=1e-6)
    vectors = resized(raw["flow"]) * (512 / 9 / 75)
    for i, sample in enumerate(flow):
        np.testing.assert_allclose(sample["target"][..., 0], vectors[..., i], rtol=1e-5)
    whole = get_task("amodal").encode(raw, size[0], options)[0]["target"]
    np.testing.assert_allclose(whole, resized(raw["whole"]) / 127.5 - 1, atol=1e-6)


def test_depth_reaches_the_ensemble_as_it_was_decoded():
    pixels = np.stack([np.full((4, 4, 3), value, np.float32) for value in (-1.5, 0.25, 1.25)])[None]
    raw = get_task("depth").decode_prediction(pixels, (4, 4), OPTIONS)
    np.testing.assert_array_equal(raw[:, 0, 0], np.float32([-1.5, 0.25, 1.25]))
    clipped = get_task("depth").decode_prediction(pixels, (4, 4), TaskOptions())
    np.testing.assert_array_equal(clipped[:, 0, 0], np.float32([0, 0.625, 1]))


def test_description_of_an_older_model_still_loads():
    old = {"flow_divisor": 75.0, "depth_quantiles": [0.02, 0.98], "mask_threshold": 225.0, "keep_visible": True}
    options = TaskOptions.from_dict(old)
    assert (options.image_resize, options.depth_prompt, options.clip_depth) == ("bilinear", "ones", True)
