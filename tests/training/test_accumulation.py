"""A batch in parts is the batch: loss, every metric and every gradient, also of experts and of parts without a cell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import BATCH, LatentBatches, config_of, linear_objective

from scaling_perception.diffusion.schedules import get_diffusion
from scaling_perception.models.moe import route, routing_stats
from scaling_perception.models.presets import get_preset
from scaling_perception.training.autoencoder import _COUNTS, _score, _tally
from scaling_perception.training.diffusion import loss_parts
from scaling_perception.training.objective import Parts
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.pretrain import generation_parts
from scaling_perception.training.state import new_state
from scaling_perception.training.step import make_step

NORM = {"shift": [[0.5, 0.0, -0.5, 0.0]] * 4, "scale": [[1.0, 2.0, 1.0, 0.5]] * 4}


class TinyModel:
    """A linear map of each cell, and the routing of real experts' routers (two layers), of which it makes no use."""

    def __init__(self, config):
        self.config = config

    def apply(self, variables, x, t, label, with_stats):
        params = variables["params"]
        out = jnp.einsum("bhwc,cd->bhwd", x, params["map"]) + params["label"][label][:, None, None, :]
        if not self.config.experts:
            return out, {}
        flat = x.reshape(-1, x.shape[-1])
        stats = [routing_stats(route(flat, kernel, self.config.active_experts, "paper")) for kernel in params["router"]]
        return out, jax.tree.map(lambda *layers: jnp.stack(layers), *stats)


def problem(task, experts):
    """(parts, params, batch) of perception with four tasks, or of pre-training with its variational bound."""
    rng = np.random.default_rng(3)
    config, experts = config_of("balance_loss=0.5"), {"experts": 4} if experts else {}
    fields = {k: v for k, v in LatentBatches().at(0).items() if k != "key"}
    if task == "generation":
        dit = get_preset(
            "nano", cond_channels=0, task_labels=0, num_classes=8, routed=False, learn_sigma=True, **experts
        )
        parts = generation_parts(TinyModel(dit), get_diffusion("paper"), config, NORM, None)
        fields = {"target": fields["target"], "label": np.arange(BATCH, dtype=np.int32)}
    else:
        dit = get_preset("nano", **experts)
        parts = loss_parts(TinyModel(dit), get_diffusion("fixed"), config, NORM, None)
        fields["valid"] = rng.random(fields["valid"].shape) < np.linspace(0.05, 1.0, BATCH)[:, None, None]
        fields["valid"][[1, 5]] = False  # one of four parts, two of eight, have no valid cell
    wide = dit.cond_channels + 4
    params = {"map": rng.normal(0, 0.3, (wide, 8)), "label": rng.normal(0, 0.3, (9, 8))}
    params |= {"router": rng.normal(0, 2, (2, wide, 4))} if experts else {}
    return parts, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params), fields


def step_of(parts, params, count):
    objective = linear_objective()._replace(loss=parts.loss, parts=parts, frozen=())
    optim = config_of("optim.name=adam", "optim.grad_clip=0", "optim.b1=0", "optim.schedule=constant").optim
    tx, _ = make_optimizer(optim, 10)
    return jax.jit(make_step(objective, tx, 0.9, count)), new_state(params, tx)


@pytest.mark.parametrize(
    ("task", "experts"), [("all", False), ("generation", True), pytest.param("all", True, marks=pytest.mark.slow)]
)
def test_one_four_and_eight_parts_are_alike(task, experts):
    parts, params, batch = problem(task, experts)
    wanted, metrics = {}, {}
    for count in (1, 4) if experts else (1, 4, 8):  # programs with experts take longer to compile
        step, state = step_of(parts, params, count)
        after, told = step(state, batch, jax.random.key(4))
        gradient = jax.tree.map(
            np.asarray, next(s.mu for s in jax.tree.leaves(after.opt_state, is_leaf=_is_adam) if _is_adam(s))
        )
        told = {name: float(value) for name, value in told.items()}
        if count == 1:
            wanted, metrics = gradient, told
            fields, key = batch | {"index": jnp.arange(BATCH)}, jax.random.fold_in(jax.random.key(4), 0)
            direct = jax.jit(jax.grad(lambda *given: parts.loss(*given)[0]))(params, fields, key)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), direct, wanted)
            continue
        assert told.keys() == metrics.keys()
        for name in told:
            np.testing.assert_allclose(told[name], metrics[name], rtol=2e-5, atol=1e-6, err_msg=f"{name} in {count}")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), gradient, wanted)
    assert np.isfinite(metrics["loss"]) and ("loss_depth" in metrics) == (task == "all")
    if experts:
        assert np.abs(wanted["router"]).max() > 1e-4 and metrics["expert_load_max"] > 1.05


def _is_adam(node):
    return hasattr(node, "mu") and hasattr(node, "nu")


@pytest.mark.parametrize("count", [1, 4])
def test_a_batch_without_a_valid_cell_changes_nothing(count):
    parts, params, batch = problem("all", False)
    step, state = step_of(parts, params, count)
    after, told = step(state, {**batch, "valid": np.zeros_like(batch["valid"])}, jax.random.key(4))
    assert float(told["loss"]) == 0 == float(told["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after.params, params)


def test_a_part_of_weight_zero_counts_for_nothing():
    """An objective without parts of its own, whose loss divides by its weight: 0/0 where a part has none."""

    def loss(params, batch, key):
        weight = jnp.sum(batch["valid"])
        return jnp.sum(batch["valid"] * jnp.square(batch["x"] @ params["w"])) / weight, {"weight": weight}

    batch = {"x": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)}
    batch["valid"] = np.array([1, 0, 1, 1, 0, 0, 1, 1], np.float32)  # of four parts, the second has none
    objective = linear_objective()._replace(loss=loss, frozen=())
    tx, _ = make_optimizer(config_of("optim.name=adam", "optim.grad_clip=0").optim, 10)
    state = new_state({"w": jnp.ones(3)}, tx)
    found = [jax.jit(make_step(objective, tx, 0.9, n))(state, batch, jax.random.key(0))[1] for n in (1, 4)]
    assert float(found[0]["loss"]) == pytest.approx(float(found[1]["loss"]), rel=1e-6)
    assert float(found[0]["grad_norm"]) == pytest.approx(float(found[1]["grad_norm"]), rel=1e-6)


def test_the_autoencoder_weighs_pictures_not_parts():
    rng = np.random.default_rng(0)
    fields = {"plain": rng.random(8).astype(np.float32), "weight": np.array([1, 2, 1, 1, 2, 2, 1, 1], np.float32)}

    def tally(params, batch, key):
        plain = params["scale"] * batch["plain"]
        return _tally(2 * plain, plain, batch["weight"])

    parts = Parts(tally, _COUNTS, lambda found, count: _score("mse", found, count))
    told = []
    for count in (1, 4):
        step, state = step_of(parts, {"scale": jnp.float32(1.5)}, count)
        told.append({name: float(value) for name, value in step(state, fields, jax.random.key(0))[1].items()})
    assert told[0] == pytest.approx(told[1], rel=1e-6)
    assert told[0]["mse_rgb"] == pytest.approx(1.5 * fields["plain"][fields["weight"] == 1].mean(), rel=1e-6)
