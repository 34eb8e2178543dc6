"""The TAESD topology: recorded outputs, an independent numpy network, names of published files, gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from scaling_perception.models import tiny_vae
from scaling_perception.support.errors import UserError

NARROW = tiny_vae.TinyVAEConfig(
    encoder_widths=(4, 6, 5), encoder_blocks=(1, 2, 1), decoder_widths=(5, 6, 4), decoder_blocks=(1, 1, 2), patch=2
)


def numpy_conv(x, kernel, bias=None, stride=1):
    """(H, W, C) float64, 3x3, one pixel of zeros on every side (torch's padding=1)."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    rows, columns = range(0, x.shape[0], stride), range(0, x.shape[1], stride)
    out = np.array([[np.einsum("abc,abcd->d", padded[i : i + 3, j : j + 3], kernel) for j in columns] for i in rows])
    return out if bias is None else out + bias


def numpy_block(p, x):
    y = np.maximum(numpy_conv(x, p["conv0"]["kernel"], p["conv0"]["bias"]), 0)
    y = np.maximum(numpy_conv(y, p["conv1"]["kernel"], p["conv1"]["bias"]), 0)
    return np.maximum(x + numpy_conv(y, p["conv2"]["kernel"], p["conv2"]["bias"]), 0)


def numpy_encoder(config, p, image):
    x = (image + 1) / 2
    if config.patch == 2:
        x = np.concatenate([x[0::2, 0::2], x[0::2, 1::2], x[1::2, 0::2], x[1::2, 1::2]], axis=-1)
    for level, blocks in enumerate(config.encoder_blocks):
        if level == 0:
            x = numpy_conv(x, p["stem"]["kernel"], p["stem"]["bias"])
        else:
            x = numpy_conv(x, p[f"down{level}"]["kernel"], stride=2)
        for block in range(blocks):
            x = numpy_block(p[f"level{level}_block{block}"], x)
    return numpy_conv(x, p["head"]["kernel"], p["head"]["bias"])


def numpy_decoder(config, p, z):
    x = np.tanh(z / 3) * 3
    for level, blocks in enumerate(config.decoder_blocks):
        if level == 0:
            x = np.maximum(numpy_conv(x, p["stem"]["kernel"], p["stem"]["bias"]), 0)
        else:
            x = numpy_conv(x.repeat(2, axis=0).repeat(2, axis=1), p[f"up{level}"]["kernel"])
        for block in range(blocks):
            x = numpy_block(p[f"level{level}_block{block}"], x)
    x = numpy_conv(x, p["head"]["kernel"], p["head"]["bias"])
    if config.patch == 2:
        out = np.zeros((2 * x.shape[0], 2 * x.shape[1], 3))
        for place, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            out[i::2, j::2] = x[..., 3 * place : 3 * place + 3]
        x = out
    return x * 2 - 1


def random_params(part, config, seed):
    """Every leaf non-zero, biases included; in float64."""
    rng = np.random.default_rng(seed)
    flat = {k: rng.normal(0, 0.3, s) for k, s in sorted(tiny_vae.part_shapes(part, config).items())}
    return tiny_vae.unflatten(flat)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("config", [tiny_vae.TAESD, tiny_vae.SMALL, NARROW], ids=["taesd", "small", "narrow"])
def test_shapes_are_those_of_the_network(part, config):
    """In closed form, because every loading asks for them; in the order of the tree, in which weights are drawn."""
    traced = jax.eval_shape(lambda: tiny_vae.init_part(part, config, jax.random.key(0)))
    expected = {name: leaf.shape for name, leaf in tiny_vae.flatten(traced).items()}
    assert list(tiny_vae.part_shapes(part, config).items()) == list(expected.items())


def as32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


CASES = {
    "encoder": (tiny_vae.Encoder, numpy_encoder, (16, 24, 3)),
    "decoder": (tiny_vae.Decoder, numpy_decoder, (2, 3, 4)),
}


@pytest.mark.parametrize("part", CASES)
def test_values_and_gradients_equal_an_independent_network(part):
    network, oracle, shape = CASES[part]
    rng = np.random.default_rng(5)
    params, x = random_params(part, NARROW, 6), rng.uniform(-1, 1, shape)
    apply = jax.jit(lambda p, x: network(NARROW).apply({"params": p}, x[None])[0])
    expected = oracle(NARROW, params, x)
    np.testing.assert_allclose(apply(as32(params), jnp.float32(x)), expected, atol=1e-4, rtol=1e-4)

    mix = rng.normal(size=expected.shape)
    gradient, input_gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(apply(p, x) * mix), (0, 1)))(
        as32(params), jnp.float32(x)
    )
    flat, names = tiny_vae.flatten(gradient), ("stem/kernel", "head/bias", "level1_block0/conv1/kernel")
    for name in (*names, "down2/kernel" if part == "encoder" else "up1/kernel"):
        # one random direction a leaf, by central differences of the float64 network
        direction = rng.normal(size=flat[name].shape)
        sides = []
        for sign in (1e-6, -1e-6):
            moved = dict(tiny_vae.flatten(params))
            moved[name] = moved[name] + sign * direction
            sides.append(np.sum(oracle(NARROW, tiny_vae.unflatten(moved), x) * mix))
        slope = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(np.sum(flat[name] * direction), slope, rtol=2e-3, err_msg=name)
    direction = rng.normal(size=shape)
    sides = [np.sum(oracle(NARROW, params, x + sign * direction) * mix) for sign in (1e-6, -1e-6)]
    np.testing.assert_allclose(np.sum(input_gradient * direction), (sides[0] - sides[1]) / 2e-6, rtol=2e-3)


def test_recorded_outputs_of_diffusers(shared_dir):
    recorded = load_file(shared_dir / "golden" / "tiny_ae" / "sd_default_f16.safetensors")
    weights = {k.removeprefix("weights/"): v for k, v in recorded.items() if k.startswith("weights/")}
    nhwc = {k: v.transpose(0, 2, 3, 1) for k, v in recorded.items() if v.ndim == 4 and not k.startswith("weights/")}
    encoder = tiny_vae.from_torch("encoder", tiny_vae.TAESD, weights)
    decoder = tiny_vae.from_torch("decoder", tiny_vae.TAESD, weights)
    encode = jax.jit(lambda x: tiny_vae.Encoder(tiny_vae.TAESD).apply({"params": encoder}, x))
    decode = jax.jit(lambda z: tiny_vae.Decoder(tiny_vae.TAESD).apply({"params": decoder}, z))
    np.testing.assert_allclose(encode(nhwc["in/image"]), nhwc["out/latents"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(decode(nhwc["in/z"]), nhwc["out/decode_of_z"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(decode(nhwc["out/latents"]), nhwc["out/decode_of_latents"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["diffusers", "taesd"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_both_published_namings_are_read_whole(golden, layout, part):
    """``names.json``: every tensor's name and shape of TAESD's own files and of diffusers' single file."""
    listed = json.loads((golden / "tiny_ae" / "names.json").read_text())
    names = listed["diffusers" if layout == "diffusers" else f"taesd_{part}"]
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    params = tiny_vae.flatten(tiny_vae.from_torch(part, tiny_vae.TAESD, state))
    assert {name: leaf.shape for name, leaf in params.items()} == tiny_vae.part_shapes(part, tiny_vae.TAESD)
    used = [name for name in state if layout == "taesd" or name.startswith(part)]
    assert len(params) == len(used)
    # by position: the first convolution, and the last one, which the numbering reaches only if all before it is right
    ends = {"encoder": ("0", "14"), "decoder": ("1", "19")}[part]
    for ours, place in zip(("stem", "head"), ends, strict=True):
        shift = 1 if layout == "diffusers" and part == "decoder" else 0
        prefix = f"{part}.layers." if layout == "diffusers" else ""
        kernel = state[f"{prefix}{int(place) - shift}.weight"]
        np.testing.assert_array_equal(params[f"{ours}/kernel"], kernel.transpose(2, 3, 1, 0))


def test_a_wrong_file_is_named_with_its_tensor(golden):
    names = json.loads((golden / "tiny_ae" / "names.json").read_text())["taesd_encoder"]
    state = {name: np.zeros(shape, np.float32) for name, shape in names.items()}
    less = {k: v for k, v in state.items() if k != "3.conv.2.bias"}
    with pytest.raises(UserError, match=r"enc\.st.*'3\.conv\.2\.bias'.*missing"):
        tiny_vae.from_torch("encoder", tiny_vae.TAESD, less, "enc.st")
    with pytest.raises(UserError, match=r"'2\.weight'.*\(3, 3, 64, 32\).*\(3, 3, 64, 64\)"):
        tiny_vae.from_torch("encoder", tiny_vae.TAESD, state | {"2.weight": np.zeros((32, 64, 3, 3), np.float32)})
    with pytest.raises(UserError, match="'99.bias' is not of this encoder"):
        tiny_vae.from_torch("encoder", tiny_vae.TAESD, state | {"99.bias": np.zeros(3, np.float32)})


def test_patches_keep_every_pixel_in_place():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    folded = tiny_vae.space_to_depth(x, 2)
    np.testing.assert_array_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(tiny_vae.depth_to_space(folded, 2), x)


def test_multiply_accumulates_and_sizes():
    # TAESD at 128 pixels by hand: 36,864 a 64-to-64 kernel; encoder levels of 128, 64, 32 and 16 pixels
    kernel = 64 * 64 * 9
    by_hand = 128**2 * (3 * 64 * 9 + 3 * kernel) + (64**2 + 32**2) * 10 * kernel + 16**2 * (10 * kernel + 64 * 4 * 9)
    assert tiny_vae.macs("encoder", tiny_vae.TAESD, 128, 128) == by_hand
    count = sum(int(np.prod(s)) for s in tiny_vae.part_shapes("encoder", tiny_vae.TAESD).values())
    assert count == 1_222_532  # the published file
    for part in ("encoder", "decoder"):
        large, small = (tiny_vae.macs(part, config, 128, 128) for config in (tiny_vae.TAESD, tiny_vae.SMALL))
        assert large >= 5 * small
    assert tiny_vae.SMALL.factor == tiny_vae.TAESD.factor == 8
    assert tiny_vae.TinyVAEConfig(**json.loads(json.dumps(tiny_vae.SMALL.to_dict()))) == tiny_vae.SMALL
    with pytest.raises(UserError, match="every level"):
        tiny_vae.TinyVAEConfig(encoder_widths=(8, 8))
