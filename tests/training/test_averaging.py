import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import LinearBatches, config_of, linear_objective

from scaling_perception import train as verb
from scaling_perception.parallel.mesh import make_mesh, replicated
from scaling_perception.scaling.dry_run import describe_run
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError
from scaling_perception.training.averaging import (
    HOST,
    _rate_of,
    ema_config,
    first_average,
    left_of_start,
    make_update,
    round_at_random,
    start_warning,
)
from scaling_perception.training.step import average_rate

BF16 = np.float32(2.0**-7)  # between neighbours of 1, in bfloat16


def test_rounding_at_random_takes_the_neighbours_and_keeps_the_mean():
    draws = 40_000
    for value in (1.0 + BF16 / 8, -3.0 - BF16 / 2, 1e-30):
        x = np.float32(value)
        got = np.asarray(round_at_random(jnp.full(draws, x), jax.random.key(1)), np.float64)
        below, above = np.unique(got)
        assert below < x < above and above - below <= 2.0**-7 * abs(x)
        deviation = np.sqrt((x - below) * (above - x) / draws)
        assert abs(got.mean() - x) < 5 * deviation
    exact = jnp.asarray([0.0, 1.5, -jnp.inf, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(round_at_random(exact, jax.random.key(2)).astype(jnp.float32), exact)
    np.testing.assert_array_equal(round_at_random(-exact, jax.random.key(2)).astype(jnp.float32), -exact)


DECAY, STEPS, WIDE = 0.9995, 4000, 1024


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("moving", [False, True], ids=["rest", "ramp"])
def test_bfloat16_follows_the_average_of_float32(every, moving):
    """4,000 steps: weights that jump to 1.5 and rest there, or climb from 1 to 1.8 while noise of 10 % is on them.

    The bound is what the module says of the random walk: a deviation of sqrt(u g / 2), with g the mean gap between
    weights and average, plus half a unit for the last rounding. Rounding to the nearest fails it by far.
    """
    apart = ema_config(config_of(f"optim.ema={DECAY}", f"optim.ema_every={every}", "optim.ema_dtype=bfloat16").optim)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert apart.dtype == jnp.bfloat16 and place is not None

    def weights(step, key):
        if not moving:
            return jnp.full(WIDE, 1.5)
        return 1.0 + 0.8 * step / STEPS + 0.1 * jax.random.normal(key, (WIDE,))

    def one(carry, step):
        exact, drawn, nearest, gap = carry
        key = jax.random.fold_in(jax.random.key(3), step)
        p, decay = weights(step, key), DECAY**every
        exact = exact + (1 - DECAY) * (p - exact)
        due = (step + 1) % every == 0
        wide, narrow = drawn.astype(jnp.float32), nearest.astype(jnp.float32)
        moved = round_at_random(wide + (1 - decay) * (p - wide), jax.random.fold_in(key, 1))
        drawn = jnp.where(due, moved, drawn)
        nearest = jnp.where(due, (narrow + (1 - decay) * (p - narrow)).astype(jnp.bfloat16), nearest)
        return (exact, drawn, nearest, gap + jnp.mean(jnp.abs(p - exact)) / STEPS), None

    start = jnp.ones(WIDE)
    carry = (start, start.astype(jnp.bfloat16), start.astype(jnp.bfloat16), jnp.float32(0))
    (exact, drawn, nearest, gap), _ = jax.jit(lambda c: jax.lax.scan(one, c, jnp.arange(STEPS)))(carry)
    closed = 1.5 - 0.5 * DECAY**STEPS
    if not moving:
        np.testing.assert_allclose(exact, closed, rtol=1e-4)
    error = np.asarray(drawn, np.float64) - np.asarray(exact, np.float64)
    bound = np.sqrt(BF16 * float(gap) / 2) + BF16 / 2
    sampled = float(np.std(np.asarray(exact))) * np.sqrt(every - 1)  # noise that every k-th step alone leaves
    assert np.sqrt(np.mean(error**2)) < bound + sampled
    assert abs(error.mean()) < BF16 / 4 + (0.8 * every / STEPS if moving else 0)
    assert np.abs(np.asarray(nearest, np.float64) - np.asarray(exact, np.float64)).mean() > 3 * bound


def settings(*fields):
    return ema_config(config_of("optim.ema=0.9", *fields).optim)


@pytest.mark.parametrize("place", ["device", "host"])
def test_an_update_of_every_third_step_by_hand(place):
    apart = settings("optim.ema_every=3", f"optim.ema_place={place}")
    mesh = make_mesh()
    sharding = replicated(mesh).with_memory_kind(HOST) if apart.host else replicated(mesh)
    weights = [np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32) for step in range(9)]
    update = make_update(apart, 8, {"a": sharding})
    ema, expected = {"a": jax.device_put(weights[0], sharding)}, weights[0].astype(np.float64)
    for number in range(1, 9):
        step, params = (jax.device_put(x, replicated(mesh)) for x in (np.int32(number), {"a": weights[number]}))
        ema = update(ema, params, jax.device_put(jax.random.key(0), replicated(mesh)), step, number)
        if number in (3, 6, 8):  # the last step comes before its time
            decay = 0.9 ** (2 if number == 8 else 3)
            expected = decay * expected + (1 - decay) * weights[number]
        np.testing.assert_allclose(np.asarray(ema["a"]), expected, rtol=1e-5)
    assert ema["a"].sharding == sharding


def test_a_dry_run_tells_what_is_saved():
    found = {}
    for field in ("optim.ema_dtype=float32", "optim.ema_dtype=bfloat16", "optim.ema_place=host"):
        told = describe_run(config_of(field, spec="configs/depth.py:model=nano,res=64"), devices=1)
        found[field.split("=")[1]] = told["memory"]["bytes"]["ema"]
    assert found["float32"] == 2 * found["bfloat16"] > 0 == found["host"]


def test_frozen_leaves_are_not_rounded():
    params = {"table": jnp.full(2, 1.001), "layer": jnp.full(2, 1.001)}
    ema = first_average(params, settings("optim.ema_dtype=bfloat16"), ("table",))
    assert ema["table"].dtype == jnp.float32 and ema["layer"].dtype == jnp.bfloat16
    assert settings() is None and first_average(params, None)["layer"].dtype == jnp.float32


def linear_run(monkeypatch, workdir, *overrides, **batches):
    objective = linear_objective(LinearBatches(**batches))
    monkeypatch.setattr(verb, "_objective", lambda config, *_: objective)
    return verb.train(config_of("optim.lr=0.05", "optim.lr_final=0.01", "train.steps=16", *overrides), workdir)


def leaves_of(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["leaves"]


def test_a_small_average_in_host_memory_resumes_bit_for_bit(monkeypatch, tmp_path):
    fields = ("optim.ema_every=3", "optim.ema_dtype=bfloat16", "optim.ema_place=host", "train.check_replicas=5")
    linear_run(monkeypatch, tmp_path / "whole", *fields)
    for stop in (4, 9):  # one and two steps after the average has moved
        with pytest.raises(verb.Stopped):
            linear_run(monkeypatch, tmp_path / "parts", *fields, signal_at=stop)
    model = linear_run(monkeypatch, tmp_path / "parts", *fields)
    whole = leaves_of(tmp_path / "whole", 16)
    assert whole == leaves_of(tmp_path / "parts", 16)
    assert whole["ema/layer/kernel"][0] == "bfloat16" and whole["ema/table"][0] == "float32"
    usual = linear_run(monkeypatch, tmp_path / "usual")
    assert leaves_of(tmp_path / "usual", 16)["params/layer/kernel"] == whole["params/layer/kernel"]
    near, exact = (np.load(folder / "model.npz")["kernel"] for folder in (model, usual))
    assert (
        near.dtype == np.float32 and np.abs(near - exact).max() < 0.1
    )  # they see other steps of weights that move fast


def test_an_average_in_host_memory_is_that_of_the_step(monkeypatch, tmp_path):
    models = [linear_run(monkeypatch, tmp_path / place, f"optim.ema_place={place}") for place in ("device", "host")]
    on_device, on_host = (np.load(model / "model.npz") for model in models)
    for name in on_device.files:
        np.testing.assert_allclose(on_device[name], on_host[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.ema_dtype=bf16", "optim.ema_dtype is 'bf16'; did you mean 'bfloat16'"),
        ("optim.ema_place=hots", "optim.ema_place is 'hots'; did you mean 'host'"),
        ("optim.ema_every=0", "optim.ema_every is 0: give a whole number of at least 1"),
        ("optim.ema=-0.1", "optim.ema is -0.1"),
    ],
)
def test_impossible_values(override, words):
    with pytest.raises(UserError, match=words):
        settings(override)


@pytest.mark.parametrize(
    ("steps", "field", "left"),
    [
        (4000, "optim.ema_warmup=false", 0.67029),
        (6000, "optim.ema_warmup=false", 0.54879),
        (15_000, "optim.ema_warmup=false", 0.22311),
        (4000, "optim.ema_warmup=true", 1.3686e-27),  # 4000! 9! / 4009!
        (100_000, "optim.ema_warmup=true", None),  # past the step where the decay stops growing
    ],
)
def test_what_is_left_of_the_start_in_closed_form(steps, field, left):
    optim = config_of("optim.ema=0.9999", field).optim
    decays = np.minimum(0.9999, (1.0 + np.arange(steps)) / (10.0 + np.arange(steps)))
    product = np.exp(np.log(decays if optim.ema_warmup else np.full(steps, 0.9999)).sum())
    assert left_of_start(optim, steps) == pytest.approx(product, rel=1e-6)
    assert left is None or product == pytest.approx(left, rel=1e-3)
    warning = start_warning(optim, steps)
    assert bool(warning) == (product > 0.05) and "\n" not in warning
    if warning:
        assert f"{product:.0%} of the starting weights" in warning
        smaller = float(warning.rsplit("optim.ema=", 1)[1].split()[0])
        assert 0.01 < smaller**steps < 0.05


@pytest.mark.parametrize("every", [1, 7])
def test_the_average_of_a_recipe_of_4000_steps_weighs_step_t_by_t_to_the_8th(every):
    """The update of the run itself, of a counter per step: each step's weight in the average, and that of the start."""
    steps = 4000
    apart = ema_config(config_of("optim.ema=0.9999", "optim.ema_warmup=true", "optim.ema_place=host").optim)
    apart = apart._replace(every=every)
    marks = np.linspace(0, steps, 9)[1:]  # by the closed form, weights up to step n add up to C(n + 9, 9) / C(N + 9, 9)
    moments = np.stack([np.arange(1, steps + 1) > mark for mark in marks], axis=1).astype(np.float32)

    def one(ema, step):
        since = (step % every) + 1
        rate = average_rate(apart.decay, True, step) if every == 1 else 0.0
        if every > 1:
            due = ((step + 1) % every == 0) | (step + 1 == steps)
            whole, rest = (_rate_of(apart, step + 1, n) for n in (every, (steps - 1) % every + 1))
            rate = jnp.where(due, jnp.where(since == every, whole, rest), 0.0)
        return ema + rate * (jnp.asarray(moments)[step] - ema), None

    late = np.asarray(jax.jit(lambda: jax.lax.scan(one, jnp.zeros(len(marks)), jnp.arange(steps))[0])(), np.float64)
    share = np.prod([(marks + 1 + i) / (steps + 1 + i) for i in range(9)], axis=0)  # weight of steps up to each mark
    if every == 1:
        np.testing.assert_allclose(1 - late, share, rtol=2e-4, atol=2e-5)
    else:  # it sees every seventh step
        np.testing.assert_allclose(1 - late, share, atol=9 * every / steps)


def test_warm_up_is_the_same_in_the_step_and_apart_from_it(monkeypatch, tmp_path):
    fields = ("optim.ema=0.95", "optim.ema_warmup=true")
    models = [
        linear_run(monkeypatch, tmp_path / place, *fields, f"optim.ema_place={place}") for place in ("device", "host")
    ]
    on_device, on_host = (np.load(model / "model.npz") for model in models)
    for name in on_device.files:
        np.testing.assert_allclose(on_device[name], on_host[name], rtol=1e-6, err_msg=name)


def test_recipes_forget_their_start_and_pre_training_stays_as_published():
    for spec in ("configs/upcycle.py:task=generalist", "configs/upcycle.py", "configs/amodal.py", "configs/depth.py"):
        config = config_of(spec=spec).copy_and_resolve_references()
        config.optim.ema = 0.9999
        assert left_of_start(config.optim, config.train.steps) < 1e-20
    published = load_config("configs/pretrain.py:model=a1", []).optim
    assert published.ema == 0.9999 and not published.ema_warmup
