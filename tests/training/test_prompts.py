"""Text prompts of tasks: a fixed table and a projection that starts at zero."""

import dataclasses

import jax
import numpy as np
import pytest
from applying import applied
from toys import LatentBatches, config_of

from scaling_perception.interop.hf_clip import load_clip
from scaling_perception.models.dit import DiT, config_from_dict
from scaling_perception.support.errors import UserError
from scaling_perception.training.diffusion import diffusion_objective, network_of
from scaling_perception.training.optim import make_optimizer
from scaling_perception.training.prompts import prompt_table
from scaling_perception.training.state import new_state
from scaling_perception.training.step import make_step

TEXT = "the whole object"


@pytest.fixture(scope="module")
def encoder(golden):
    return str(golden / "checkpoints" / "clip_quickgelu")


def test_one_prompt_begins_as_nothing_and_is_learned(encoder):
    config = config_of(f"task_prompts.amodal={TEXT}", f"text_encoder={encoder}")
    objective = diffusion_objective(config, LatentBatches())
    clip = load_clip(encoder)
    params = jax.jit(objective.init)(jax.random.key(0))
    table = np.asarray(params["context"]["table"])
    assert (
        table.shape == (4, clip.config.projection_dim or clip.config.width)
        and not table[[0, 2, 3]].any()
        and table[1].any()
    )
    assert not np.asarray(params["context"]["kernel"]).any()
    assert objective.meta["task_prompts"] == {"amodal": TEXT, "text_encoder": encoder}

    dit = config_from_dict(objective.meta["model"])
    moved = jax.tree.map(lambda leaf: leaf + 0.05, {k: v for k, v in params.items() if k != "context"})
    x, label = np.ones((2, 8, 8, 12), np.float32), np.asarray([0, 1])
    with_prompt = applied(DiT(dit), {**moved, "context": params["context"]}, x, np.ones(1), label)
    without = applied(DiT(network_of(config)), moved, x, np.ones(1), label)
    np.testing.assert_array_equal(with_prompt, without)

    tx, _ = make_optimizer(config.optim, 10, objective.frozen)
    state = new_state(params, tx)
    step = jax.jit(make_step(objective, tx, 0.9))
    batch = {name: value for name, value in LatentBatches().at(0).items() if name != "key"}
    for _ in range(6):  # adaLN-Zero passes no gradient on before its own gates open
        state, _ = step(state, batch, jax.random.key(1))
    assert np.abs(state.params["context"]["kernel"]).max() > 0
    np.testing.assert_array_equal(state.params["context"]["table"], table)


def test_a_specialist_has_one_row(encoder):
    config = config_of(f"task_prompts.amodal={TEXT}", f"text_encoder={encoder}")
    single = dataclasses.replace(network_of(config), task_labels=0, routed=False)
    changed, table = prompt_table(config, single, ["amodal"])
    assert table.shape == (1, changed.context_dim) and table.any()


def test_mistakes_are_told(encoder):
    dit = network_of(config_of())
    with pytest.raises(UserError, match="text_encoder"):
        prompt_table(config_of(f"task_prompts.amodal={TEXT}"), dit, ["amodal"])
    with pytest.raises(UserError, match="does not train"):
        prompt_table(config_of(f"task_prompts.flow={TEXT}", f"text_encoder={encoder}"), dit, ["amodal"])
    with pytest.raises(UserError, match="context_dim is 7"):
        wrong = dataclasses.replace(dit, context_dim=7)
        prompt_table(config_of(f"task_prompts.amodal={TEXT}", f"text_encoder={encoder}"), wrong, ["amodal"])
    assert prompt_table(config_of(), dit, ["amodal"]) == (dit, None)
