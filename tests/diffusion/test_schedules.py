import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from scaling_perception.diffusion import schedules
from scaling_perception.diffusion.schedules import DiffusionPreset, get_diffusion, timestep_grid
from scaling_perception.support.errors import UserError


@pytest.fixture(scope="module")
def tables(golden):
    return load_file(golden / "ddim" / "tables.safetensors")


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedule_agrees_with_the_reference(tables, name):
    got = schedules.alphas_cumprod(name)
    assert got.dtype == np.float64 and got.shape == (1000,)
    np.testing.assert_allclose(schedules.betas(name), tables[f"out/{name}/betas"], rtol=1e-6)
    np.testing.assert_allclose(got, tables[f"out/{name}/alphas_cumprod"], rtol=2e-5)
    assert (np.diff(got) < 0).all()


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_snr_agrees_with_the_reference_and_ends_at_zero(tables, name):
    got = schedules.zero_snr(schedules.alphas_cumprod(name))
    np.testing.assert_allclose(got, tables[f"out/{name}/zero_snr/alphas_cumprod"], rtol=1e-4, atol=1e-6)
    assert got[-1] == 0 and got[0] == pytest.approx(schedules.alphas_cumprod(name)[0], rel=1e-14)


def test_known_values_of_each_schedule():
    expected = {
        "linear": (0.999900, 0.5241, 0.0786, 0.00335, 5.90e-5, 4.04e-5),
        "scaled_linear_default": (0.999900, 0.8215, 0.3332, 0.0386, 1.07e-3, 7.33e-4),
        "scaled_linear": (0.999150, 0.6754, 0.2777, 0.0566, 5.84e-3, 4.66e-3),
        "cosine": (0.999959, 0.8470, 0.4938, 0.1443, 8.77e-4, 2.43e-9),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(schedules.alphas_cumprod(name)[[0, 249, 499, 749, 980, 999]], values, rtol=5e-3)
    assert np.count_nonzero(schedules.betas("cosine") == 0.999) == 1


def test_error_amplification_of_the_docstring():
    def factor(name, steps):
        t, _ = timestep_grid("trailing", steps)
        now = schedules.alphas_cumprod(name)[t[0]]
        after = 1.0 if steps == 1 else schedules.alphas_cumprod(name)[t[1]]
        return abs(np.sqrt(1 - after) - np.sqrt(after) * np.sqrt(1 - now) / np.sqrt(now))

    assert factor("cosine", 1) == pytest.approx(2.0e4, rel=0.02)
    assert factor("cosine", 50) == pytest.approx(631, rel=0.02)
    assert factor("linear", 1) == pytest.approx(157, rel=0.02)
    assert factor("scaled_linear", 1) == pytest.approx(14.6, rel=0.02)


def test_grids_agree_with_the_reference(tables):
    names = [key for key in tables if "/timesteps/" in key]
    assert len(names) == 24
    for key in names:
        spacing, offset = key.split("/")[2].split("_off")
        t, t_next = timestep_grid(spacing, int(key.split("/")[3]), int(offset))
        np.testing.assert_array_equal(t, tables[key])
        np.testing.assert_array_equal(t_next, [*tables[key][1:], -1])


def test_every_trailing_and_linspace_grid_chains_strictly_down_through_the_schedule():
    for steps in range(1, 1001):
        for spacing in ("trailing", "linspace", "leading"):
            t, t_next = timestep_grid(spacing, steps)
            assert len(t) == steps and t.max() <= 999 and t.min() >= 0
            assert (t_next < t).all() and t_next[-1] == -1 and (t_next[:-1] == t[1:]).all()
            if spacing == "trailing":
                assert t[0] == 999


def test_where_a_stride_would_leave_the_trailing_grid():
    """300 does not divide 1000: a stride of 1000 // 300 = 3 misses the next grid point, the table does not."""
    t, t_next = timestep_grid("trailing", 300)
    assert (t_next[:-1] != t[:-1] - 3).sum() > 50
    np.testing.assert_array_equal(timestep_grid("trailing", 3)[0], [999, 666, 332])  # 666.7 - 1 is rounded, not cut
    t, t_next = timestep_grid("trailing", 250)
    np.testing.assert_array_equal(t_next, t - 4)


def test_one_leading_step_sits_at_the_clean_end():
    assert timestep_grid("leading", 1, 0)[0] == [0]
    assert timestep_grid("leading", 1, 1)[0] == [1]
    assert timestep_grid("trailing", 1)[0] == [999]
    assert list(timestep_grid("leading", 50, 1)[0][[0, -1]]) == [981, 1]


@pytest.mark.parametrize("steps, offset", [(0, 0), (1001, 0), (1000, 1), (10, 950), (10, -1)])
def test_impossible_grids_are_user_errors(steps, offset):
    with pytest.raises(UserError, match="step"):
        timestep_grid("leading", steps, offset)


def test_levels_are_roots_of_alpha_bar_or_a_straight_line():
    for changes in ({}, {"schedule": "linear"}, {"zero_snr": True}):
        preset = get_diffusion("fixed", **changes)
        alpha, sigma = preset.levels()
        np.testing.assert_allclose(alpha**2, preset.alphas_cumprod(), rtol=1e-15)
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-15)
    alpha, sigma = get_diffusion("rectified").levels()
    np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-15)
    assert (sigma[0], sigma[499], sigma[999], alpha[999]) == (0.001, 0.5, 1.0, 0.0)
    steps = np.diff(np.append(sigma[timestep_grid("trailing", 8)[0]], 0.0))
    np.testing.assert_allclose(steps, -1 / 8, rtol=1e-12)  # the trailing grid cuts it into equal parts


def test_presets_say_what_the_docs_say():
    paper, released, fixed = (get_diffusion(name) for name in ("paper", "released", "fixed"))
    assert (paper.schedule, paper.prediction, paper.spacing, paper.steps_offset) == ("cosine", "epsilon", "leading", 0)
    assert (released.schedule, released.prediction, released.spacing) == ("scaled_linear", "v", "leading")
    assert released.steps_offset == 1 and not released.final_alpha_one
    assert (fixed.schedule, fixed.prediction, fixed.spacing) == ("cosine", "v", "trailing")


def test_preset_changes_aliases_and_json():
    preset = get_diffusion("fixed", schedule="squaredcos_cap_v2", prediction="v_prediction", spacing="leading")
    assert preset == get_diffusion("fixed", spacing="leading")
    assert DiffusionPreset(**json.loads(json.dumps(dataclasses.asdict(preset)))) == preset
    older = {name: value for name, value in dataclasses.asdict(preset).items() if name != "zero_snr"}
    assert DiffusionPreset(**older) == preset  # model folders written before the field
    assert get_diffusion("fixed", zero_snr=True).alphas_cumprod()[-1] == 0


@pytest.mark.parametrize(
    "call, hint",
    [
        (lambda: get_diffusion("fixd"), "fixed"),
        (lambda: get_diffusion("fixed", spacin="leading"), "spacing"),
        (lambda: get_diffusion("fixed", spacing="trailin"), "trailing"),
        (lambda: get_diffusion("fixed", prediction="epsilo"), "epsilon"),
        (lambda: schedules.alphas_cumprod("cosin"), "cosine"),
        (lambda: get_diffusion("paper", zero_snr=True), "zero_snr"),
        (lambda: get_diffusion("rectified", zero_snr=True), "zero_snr"),
        (lambda: get_diffusion("rectified", prediction="v"), "velocity"),
        (lambda: get_diffusion("rectified", prediction="epsilon"), "velocity"),
        (lambda: get_diffusion("rectified").alphas_cumprod(), "does not preserve variance"),
    ],
)
def test_wrong_names_are_user_errors_with_the_nearest(call, hint):
    with pytest.raises(UserError, match=hint):
        call()
