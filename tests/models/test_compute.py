"""MACs: the formula against facts 1.2, against the traced program, and against the compiler's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_perception.models import dit
from scaling_perception.models.compute import forward_macs, inference_macs
from scaling_perception.models.dit import DiT, abstract_params
from scaling_perception.models.presets import at_resolution, get_preset
from scaling_perception.ops.attention import attention_einsum, split_heads
from scaling_perception.support.errors import UserError

# billions at 256 and 512 pixels with 8 input channels (facts 1.2)
GMAC = {
    "a1": (2.83, 16.13),
    "a2": (13.99, 68.78),
    "a3": (38.34, 177.29),
    "a4": (80.70, 361.00),
    "a5": (209.00, 902.45),
    "a6": (323.85, 1383.72),
    "XL/2": (118.63, 524.56),
}

# models with experts: from scratch as they are, upcycled ones with 8 input channels; as many digits as the table has
EXPERTS = {
    "S/2-8E2A": ("16.03", "71.34"),
    "S/2-16E2A": ("16.04", "71.38"),
    "L/2-8E2A": ("222.48", "928.12"),
    "a2-4E2A": ("22.59", "103.2"),
    "a2-8E1A": ("14.01", "68.8"),  # 68.846; the table has 68.9
    "a2-8E2A": ("22.60", "103.2"),
    "a2-8E4A": ("39.78", "171.9"),
    "a2-16E2A": ("22.62", "103.3"),
    "a3-4E2A": ("62.51", "274.0"),
    "a3-8E1A": ("38.37", "177.4"),
    "a3-8E2A": ("62.53", "274.1"),
    "a3-8E4A": ("110.85", "467.3"),
    "a3-16E2A": ("62.56", "274.2"),
    "a4-4E2A": ("132.3", "567.3"),
    "a4-8E1A": ("80.75", "361.2"),
    "a4-8E2A": ("132.3", "567.4"),
    "a4-8E4A": ("235.4", "979.7"),
    "a4-16E2A": ("132.3", "567.6"),
}


@pytest.mark.parametrize("name", GMAC)
def test_equals_the_table(name):
    config = get_preset(name, cond_channels=4)
    for pixels, expected in zip((256, 512), GMAC[name], strict=True):
        assert round(forward_macs(config, pixels) / 1e9, 2) == expected


@pytest.mark.parametrize("name", EXPERTS)
def test_models_with_experts_equal_the_table(name):
    config = get_preset(name, cond_channels=0 if "/" in name else 4)
    for pixels, expected in zip((256, 512), EXPERTS[name], strict=True):
        digits = len(expected.split(".")[1])
        assert f"{forward_macs(config, pixels) / 1e9:.{digits}f}" == expected


def test_released_generalist_equals_the_table():
    assert f"{forward_macs(get_preset('XL-8E2A'), 512) / 1e9:.2f}" == "829.25"


def test_equals_what_dit_published():
    assert [round(forward_macs(get_preset("XL/2"), pixels) / 1e9, 2) for pixels in (256, 512)] == [118.62, 524.54]
    generalist = get_preset("XL/2", cond_channels=8, task_labels=4, routed=True)
    assert round(forward_macs(generalist, 512) / 1e9, 2) == 524.58


def _inputs(config):
    size = config.input_size
    latents = jax.ShapeDtypeStruct((1, size, size, config.input_channels), jnp.float32)
    return abstract_params(config), latents, *(jax.ShapeDtypeStruct((1,), jnp.int32),) * 2


def _dot_macs(jaxpr, times=1):
    """MACs of every dot in a traced program, layers of a scan counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += times * int(np.prod(equation.outvars[0].aval.shape)) * int(np.prod([left[i] for i in contracted]))
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        if equation.primitive.name == "cond":  # a choice of platform: every branch does the same work
            branches = {_dot_macs(branch.jaxpr, inner) for branch in equation.params["branches"]}
            branches -= {0} if len(branches) > 1 else set()  # a kernel, whose products are not seen here
            assert len(branches) == 1
            total += branches.pop()
            continue
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += _dot_macs(inside, inner)
    return total


@pytest.mark.parametrize("name, pixels", [("a1", 256), ("XL/2", 512), ("nano", 128)])
def test_equals_the_traced_program(name, pixels):
    config = at_resolution(get_preset(name), pixels)
    traced = jax.make_jaxpr(lambda params, *inputs: DiT(config).apply({"params": params}, *inputs))(*_inputs(config))
    looked_up = config.task_labels * config.patch_size**2 * config.input_channels * config.dim if config.routed else 0
    looked_up += config.task_labels * config.dim if config.routed else 0
    assert _dot_macs(traced.jaxpr) == forward_macs(config) + looked_up


def test_compiler_counts_the_same_within_its_elementwise_work(monkeypatch):
    # one layer and all heads at once, for the compiler counts the body of a scan once; wide, so that matmuls outweigh
    def einsum(qkv, heads, mesh):
        return attention_einsum(*split_heads(qkv, heads)).reshape(*qkv.shape[:2], -1)

    monkeypatch.setattr(dit, "projection_attention", einsum)
    config = get_preset("a4", depth=1, num_classes=1)
    compiled = jax.jit(lambda params, *inputs: DiT(config).apply({"params": params}, *inputs))
    flops = compiled.lower(*_inputs(config)).compile().cost_analysis()["flops"]
    assert 1.0 <= flops / 2 / forward_macs(config) < 1.02


def test_inference_multiplies_steps_members_and_passes():
    config = at_resolution(get_preset("XL/2", cond_channels=4), 512)
    assert inference_macs(config, 200, 5) == 1000 * forward_macs(config) == pytest.approx(5.25e14, rel=1e-3)
    assert inference_macs(config, 200, 5, passes=2) == 2 * inference_macs(config, 200, 5)
    with pytest.raises(UserError, match="multiple of 16"):
        forward_macs(config, 500)
