"""The CLIP text tower: recorded outputs of transformers, its values and gradients at random sizes, masks, counts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from scaling_perception.interop.hf_clip import clip_config_from_json, clip_from_torch, clip_to_torch
from scaling_perception.models.clip_text import (
    CLIPTextConfig,
    abstract_params,
    check_ids,
    count_params,
    encode_text,
    init_params,
)
from scaling_perception.support.errors import UserError

NANO = CLIPTextConfig(vocab_size=11, width=8, layers=2, heads=2, hidden=12, max_positions=6, eos_token_id=10)


@pytest.fixture(scope="module", params=["quickgelu", "gelu_legacy"])
def case(request, golden):
    with safe_open(golden / "clip_text" / f"{request.param}.safetensors", "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        config = clip_config_from_json({"model_type": "clip_text_model", **json.loads(file.metadata()["config"])})
    weights = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
    return config, clip_from_torch(weights, config), arrays


@pytest.mark.parametrize("call", ["", "masked/", "empty_prompt/", "random/"])
def test_recorded_outputs_of_transformers(case, call):
    config, params, arrays = case
    ids = check_ids(config, arrays[f"in/{'' if call == 'masked/' else call}input_ids"])
    mask = jnp.asarray(arrays["in/attention_mask"]) if call == "masked/" else None
    made = encode_text(config, params, jnp.asarray(ids), mask)
    named = {"penultimate_hidden_state": made.penultimate_hidden_state, "pooler_output": made.pooled}
    named |= {"last_hidden_state": made.last_hidden_state, "text_embeds": made.text_embeds}
    recorded = {n: arrays[f"out/{call}{n}"] for n in named if f"out/{call}{n}" in arrays}
    assert len(recorded) == {"": 4, "masked/": 1, "empty_prompt/": 2, "random/": 3}[call]
    for name, expected in recorded.items():
        assert named[name].dtype == jnp.float32
        np.testing.assert_allclose(named[name], expected, atol=3e-5, rtol=1e-4, err_msg=name)
        error = np.linalg.norm(named[name] - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, (name, error)


@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_of_random_sizes(seed, torch):
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(seed)
    heads, vocab = int(rng.integers(1, 4)), int(rng.integers(5, 40))
    config = CLIPTextConfig(
        vocab_size=vocab,
        width=heads * int(rng.integers(2, 9)),
        layers=seed + 1,
        heads=heads,
        hidden=int(rng.integers(3, 30)),
        max_positions=int(rng.integers(4, 12)),
        activation=("quick_gelu", "gelu")[seed % 2],
        layer_norm_eps=float(rng.choice([1e-5, 1e-3])),
        projection_dim=int(rng.integers(2, 7)),
        eos_token_id=(vocab - 1, 2)[seed // 2],
    )
    tokens = int(rng.integers(3, config.max_positions + 1))
    ids = rng.integers(0, vocab, (3, tokens))
    mask = (np.arange(tokens) < np.array([[tokens], [2], [1]])).astype(np.int64)

    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=vocab,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
            intermediate_size=config.hidden,
            max_position_embeddings=config.max_positions,
            hidden_act=config.activation,
            layer_norm_eps=config.layer_norm_eps,
            projection_dim=config.projection_dim,
            eos_token_id=config.eos_token_id,
            bos_token_id=0,
            attn_implementation="eager",
        )
    )
    state = {n: rng.normal(0, 0.4, p.shape) for n, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, parameter in theirs.double().named_parameters():
            parameter.copy_(torch.from_numpy(state[name]))
    out = theirs(torch.from_numpy(ids), torch.from_numpy(mask), output_hidden_states=True)
    mixes = [rng.normal(size=s) for s in ((3, tokens, config.width), (3, config.projection_dim))]
    sum((a * torch.from_numpy(b)).sum() for a, b in zip((out[1], out[0]), mixes, strict=True)).backward()
    wanted = {n: p.grad.numpy() for n, p in theirs.named_parameters()}

    def value(params):
        made = encode_text(config, params, jnp.asarray(ids), jnp.asarray(mask))
        return jnp.sum(made.last_hidden_state * mixes[0]) + jnp.sum(made.text_embeds * mixes[1]), made

    (_, made), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(clip_from_torch(state, config))
    np.testing.assert_allclose(made.last_hidden_state, out[1].detach(), atol=3e-5, rtol=1e-4)
    np.testing.assert_allclose(made.penultimate_hidden_state, out.hidden_states[-2].detach(), atol=3e-5, rtol=1e-4)
    np.testing.assert_allclose(made.text_embeds, out.text_embeds.detach(), atol=3e-5, rtol=1e-4)
    got = clip_to_torch(gradient, config)
    assert got.keys() == wanted.keys()
    largest = max(np.linalg.norm(g) for g in wanted.values())
    for name, expected in wanted.items():
        # the bias of the keys moves all logits of a query alike: its gradient is 0 but for rounding
        error = np.linalg.norm(got[name] - expected) / max(np.linalg.norm(expected), 1e-3 * largest)
        assert error < 1e-4, (name, error)


def test_no_token_sees_a_later_or_a_masked_one_and_ends_pool():
    params = init_params(NANO, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * 5, params)
    ids = jnp.array([[1, 2, 10, 10, 3, 4], [5, 6, 7, 8, 9, 10]])
    base = encode_text(NANO, params, ids)
    np.testing.assert_array_equal(base.pooled[0], base.last_hidden_state[0, 2])  # the first end, not the last
    np.testing.assert_array_equal(base.pooled[1], base.last_hidden_state[1, 5])
    later = encode_text(NANO, params, ids.at[:, 4].set(0))
    np.testing.assert_array_equal(later.last_hidden_state[:, :4], base.last_hidden_state[:, :4])
    assert np.all(np.any(later.last_hidden_state[:, 4:] != base.last_hidden_state[:, 4:], axis=-1))
    mask = jnp.array([[1, 0, 1, 1, 1, 1]] * 2)
    masked, moved = encode_text(NANO, params, ids, mask), encode_text(NANO, params, ids.at[:, 1].set(0), mask)
    np.testing.assert_array_equal(np.delete(masked.last_hidden_state, 1, 1), np.delete(moved.last_hidden_state, 1, 1))
    # nothing to look at: still numbers
    assert np.all(np.isfinite(encode_text(NANO, params, ids, jnp.zeros_like(ids)).last_hidden_state))


def test_counts_are_those_of_the_published_towers():
    def closed_form(c):
        layer = 4 * (c.width**2 + c.width) + 4 * c.width + 2 * c.width * c.hidden + c.hidden + c.width
        tables = (c.vocab_size + c.max_positions) * c.width
        return tables + c.layers * layer + 2 * c.width + c.width * c.projection_dim

    large = CLIPTextConfig(width=768, heads=12, hidden=3072, projection_dim=0)
    assert count_params(large) == closed_form(large) == 123_060_480
    sd2 = CLIPTextConfig(width=1024, layers=23, heads=16, hidden=4096, projection_dim=0, activation="gelu")
    assert count_params(sd2) == closed_form(sd2) == 340_387_840
    assert count_params(CLIPTextConfig()) == closed_form(CLIPTextConfig())
    assert "projection" not in abstract_params(large) and "projection" in abstract_params(CLIPTextConfig())


def test_config_is_plain_and_refuses_what_it_cannot_be():
    assert CLIPTextConfig(**json.loads(json.dumps(dataclasses.asdict(NANO)))) == NANO
    wrong = [("heads", 3), ("layers", 0), ("width", 8.0), ("activation", "gelu_new"), ("layer_norm_eps", 0.0)]
    for name, value in wrong:
        with pytest.raises(UserError, match=rf"{name}.*{value}"):
            dataclasses.replace(NANO, **{name: value})


def test_ids_are_checked_before_they_reach_a_device():
    assert check_ids(NANO, [[0, 10]]).dtype == np.int32
    for ids, text in (([[0, 11]], "token id 11"), ([[-1]], "token id -1"), ([[0] * 7], "7 tokens"), ([1], "shape")):
        with pytest.raises(UserError, match=text):
            check_ids(NANO, ids)
    with pytest.raises(UserError, match="float64"):
        check_ids(NANO, [[1.5]])
    with pytest.raises(UserError, match="7 tokens"):
        encode_text(NANO, abstract_params(NANO), jnp.zeros((1, 7), jnp.int32))
