"""Sizes: exact parameter counts of the paper and of DiT (facts 1.2)."""

import dataclasses

import pytest

from scaling_perception.models.dit import abstract_params, count_params
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


@pytest.mark.parametrize("name", PAPER)
def test_counts_equal_the_papers(name):
    plain, widened = PAPER[name]
    assert count_params(get_preset(name)) == plain
    assert count_params(get_preset(name, cond_channels=4)) == widened  # 8 input channels


def test_dense_generalist_count():
    config = at_resolution(get_preset("XL/2", cond_channels=8, task_labels=4, routed=True), 512)
    assert count_params(config) == 676_225_184


def test_every_preset_makes_a_model():
    assert set(PAPER) | {"S/2", "B/2", "L/2", "mini", "nano"} == set(preset_names())
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
