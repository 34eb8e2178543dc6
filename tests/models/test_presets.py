"""Sizes: exact parameter counts of the paper and of DiT (facts 1.2)."""

import dataclasses

import pytest

from scaling_perception.models.dit import abstract_params, count_active_params, count_params
from scaling_perception.models.presets import at_resolution, get_preset, preset_names
from scaling_perception.support.errors import UserError

PAPER = {
    "a1": (14_799_392, 14_803_488),
    "a2": (77_208_608, 77_216_800),
    "a3": (215_539_232, 215_551_520),
    "a4": (458_102_816, 458_119_200),
    "a5": (1_199_213_600, 1_199_238_176),
    "a6": (1_862_988_320, 1_863_016_992),
    "XL/2": (675_129_632, 675_148_064),
}

# total, active (facts 1.2)
EXPERTS = {
    "S/2-8E2A": (199_307_552, 71_905_568),
    "S/2-16E2A": (369_213_728, 71_942_432),
    "L/2-8E2A": (2_823_764_000, 1_011_824_672),
    "XL-8E2A": (2_758_511_264, 973_915_808),
}
# millions with 8 input channels, by split (facts 1.2)
UPCYCLED = {
    "a2": {"4E2A": (178.0, 110.8), "8E1A": (312.5, 77.3), "8E2A": (312.5, 110.9), "8E4A": (312.5, 178.1)},
    "a3": {"4E2A": (499.0, 310.1), "8E1A": (876.8, 215.7), "8E2A": (876.8, 310.1), "8E4A": (876.8, 499.0)},
    "a4": {"4E2A": (1062.6, 659.7), "8E1A": (1868.5, 458.3), "8E2A": (1868.5, 659.8), "8E4A": (1868.5, 1062.7)},
}
UPCYCLED["a2"]["16E2A"] = (581.3, 110.9)
UPCYCLED["a3"]["16E2A"] = (1632.5, 310.2)
UPCYCLED["a4"]["16E2A"] = (3480.3, 660.0)


@pytest.mark.parametrize("name", EXPERTS)
def test_counts_of_models_with_experts_equal_the_papers(name):
    assert (count_params(get_preset(name)), count_active_params(get_preset(name))) == EXPERTS[name]


@pytest.mark.parametrize("name, split", [(name, split) for name, row in UPCYCLED.items() for split in row])
def test_counts_of_upcycled_models(name, split):
    config = get_preset(f"{name}-{split}", cond_channels=4)
    counts = count_params(config), count_active_params(config)
    assert tuple(round(count / 1e6, 1) for count in counts) == UPCYCLED[name][split]


def test_layer_norms_of_queries_and_keys_are_counted():
    config = get_preset("S/2-8E2A", qk_norm=True)
    assert count_params(config) - EXPERTS["S/2-8E2A"][0] == 12 * 4 * config.head_dim


@pytest.mark.parametrize("name", PAPER)
def test_counts_equal_the_papers(name):
    plain, widened = PAPER[name]
    assert count_params(get_preset(name)) == plain
    assert count_params(get_preset(name, cond_channels=4)) == widened  # 8 input channels


def test_dense_generalist_count():
    assert count_params(get_preset("XL-generalist")) == 676_225_184
    assert count_params(at_resolution(get_preset("XL-generalist"), 256)) == 676_225_184 - (1024 - 256) * 1152


def test_every_preset_makes_a_model():
    upcycled = {f"{name}-{split}" for name, row in UPCYCLED.items() for split in row}
    ours = {"S/2", "B/2", "L/2", "XL-generalist", "mini", "nano"}
    assert set(PAPER) | set(EXPERTS) | upcycled | ours == set(preset_names())
    for name in preset_names():
        assert get_preset(name).name == name and count_params(get_preset(name)) > 0


def test_small_presets_are_the_generalist_of_128_pixels():
    mini = get_preset("mini")
    assert (mini.dim, mini.depth, mini.heads, mini.input_size) == (128, 6, 4, 16)
    assert (mini.input_channels, mini.out_channels, mini.label_rows) == (12, 4, 5)
    assert mini.routed and mini.task_label(3) == 3
    assert abstract_params(mini)["patch_embed"]["kernel"].shape == (4, 2, 2, 12, 128)
    shared = {field for field in dataclasses.asdict(mini) if getattr(mini, field) == getattr(get_preset("nano"), field)}
    assert {field.name for field in dataclasses.fields(mini)} - shared == {"name", "dim", "depth", "heads"}


def test_resolution_changes_the_position_table_alone():
    small, large = get_preset("a1"), at_resolution(get_preset("a1"), 512)
    assert (small.tokens, large.tokens) == (256, 1024)
    assert count_params(large) - count_params(small) == (1024 - 256) * 256
    assert at_resolution(large, 256) == small


def test_mistakes_name_the_remedy():
    with pytest.raises(UserError, match="did you mean 'XL/2'"):
        get_preset("XL2")
    with pytest.raises(UserError, match="multiple of 16.*try 256"):
        at_resolution(get_preset("a1"), 250)
    with pytest.raises(UserError, match="try 16"):
        at_resolution(get_preset("a1"), 0)
