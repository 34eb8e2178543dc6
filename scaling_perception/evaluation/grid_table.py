"""Finding a model's learned grids of timesteps on samples that it was not trained on (`evaluate --write-grids`).

The costs, all mean squares over samples, members and latent entries in the latents' training units, come from one fine
run of DDIM for each member: the model's own spacing with K steps, from states x_1 (pure noise) to x_K, with the clean
estimate made at each.

* ``start[i]``: x_1 against x_i, for sampling starts from noise at whatever timestep comes first;
* ``jump[i, j]``: where one DDIM step from x_i leads at t_j, against x_j of the fine run;
* ``end[i]``: the clean estimate made at x_i against the true latents.

So the sum of a grid is how far its steps stray from the fine run, and how wrong the estimate that it returns is. Steps
are taken one by one from states of the fine run: what errors of earlier steps do to later ones is left out, as by
Watson et al. (2021), whose costs are those of the variational bound instead.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from scaling_perception.diffusion.grids import Costs, best_grids
from scaling_perception.diffusion.schedules import timestep_grid
from scaling_perception.evaluation.protocols import prepare_raw, unmeasurable
from scaling_perception.evaluation.sweep import Samples, fill_invalid
from scaling_perception.inference.batches import BatchPlan
from scaling_perception.inference.draws import draw_members
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import Settings
from scaling_perception.support.errors import UserError
from scaling_perception.support.shapes import Array, Float
from scaling_perception.tasks import get_task

FINE = 50
_AT_ONCE, _MEMBERS = 8, 2


def transition_costs(
    predictor: Predictor, raws: Sequence[dict[str, Any]], task: str, fine: int = FINE, key: int = 0
) -> Costs:
    """The table of costs between ``fine`` candidate timesteps, see the module.

    Args:
        raws: samples with truth; holes of it take the nearest valid value.
        key: of the members' noise.
    """
    own = predictor.diffusion
    t, t_next = timestep_grid(own.spacing, fine, own.steps_offset)
    tables, passes = Settings(steps=fine).tables(own), predictor.passes(task)
    signal, noise = (level[t] for level in own.levels())
    start, jump, end = np.zeros(fine), np.zeros((fine, fine)), np.zeros(fine)
    plan = BatchPlan(min(_AT_ONCE, len(raws)), _MEMBERS)
    for first in range(0, len(raws), plan.images):
        group = list(raws[first : first + plan.images])
        latents = predictor.encode(group, task, plan)
        draw = draw_members(jax.random.key(key), predictor.image_ids(group, plan.images), 0, _MEMBERS, False)
        cond_tokens, modulation_table, state = predictor.engine.init_state(
            predictor.params, latents, draw, passes, tables
        )
        x, clean = [np.asarray(state.x)], []
        for step in range(fine):
            state = predictor.engine.run_steps(
                predictor.params, cond_tokens, modulation_table, state, passes.labels, tables, step, 1
            )
            x.append(np.asarray(state.x))
            clean.append(np.asarray(state.x0))
        states, estimates = (np.stack(arrays)[:, : len(group)] for arrays in (x[:fine], clean))
        if not np.isfinite(estimates).all():
            raise UserError("the model's output is NaN or infinite: its weights are broken")
        truth = np.stack([true_latents(predictor, raw, task) for raw in group])[:, None]
        weight = len(group) / len(raws)
        start += weight * _mean_square(states - states[:1])
        end += weight * _mean_square(estimates - truth)
        for i in range(fine - 1):
            kept = (noise[i + 1 :] / noise[i]).reshape(-1, *[1] * truth.ndim)
            added = signal[i + 1 :].reshape(kept.shape) - kept * signal[i]
            jump[i, i + 1 :] += weight * _mean_square(kept * states[i] + added * estimates[i] - states[i + 1 :])
    return Costs(t, start, jump, end)


def _mean_square(values: np.ndarray) -> np.ndarray:
    return np.square(values, dtype=np.float64).mean(axis=tuple(range(1, values.ndim)))


def true_latents(predictor: Predictor, raw: dict[str, Any], task: str) -> Float[np.ndarray, "P h w C"]:
    """(P, h, w, C) float32, the latents of a sample's truth for each pass, in training units."""
    what, engine, passes = get_task(task), predictor.engine, predictor.passes(task)
    whole = fill_invalid(raw, what.truth)
    targets = np.stack([one["target"] for one in what.encode(whole, predictor.resolution, predictor.options)])

    def encode(vae: Any, pictures: Any) -> Array:
        return predictor.autoencoder.encode(vae, pictures)[0]

    mean = np.asarray(engine.run("encode truth", encode, predictor.weights[1], targets), np.float32)
    mean = mean[..., : predictor.autoencoder.latent_channels]
    return (mean - passes.shift[:, None, None]) / passes.scale[:, None, None]


def measurable(source: Samples, protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of a source that can be read and measured, prepared.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    raws = (prepare_raw(source[index], protocol) for index in range(len(source)))
    found = [raw for raw in raws if not unmeasurable(raw, protocol)]
    if not found:
        raise UserError("no sample has truth to measure: no grids can be found; give another dataset or split")
    return found


def grid_entry(predictor: Predictor, raws: Sequence[dict[str, Any]], task: str, most: int, key: int) -> dict[str, Any]:
    """One task's part of ``grids.json``: grids of 1 to ``most`` steps, with their costs.

    Raises:
        UserError: more steps than candidates.
    """
    if not 1 <= most <= FINE:
        raise UserError(f"steps {most}: grids are found for 1 to {FINE} steps")
    found = best_grids(transition_costs(predictor, raws, task, key=key), most)
    return {
        "weights": predictor.id,
        "autoencoder": predictor.autoencoder_id,
        "candidates": FINE,
        "images": len(raws),
        "members": _MEMBERS,
        "seed": key,
        "costs": {str(len(t)): float(f"{cost:.6g}") for cost, t in found},
        "grids": {str(len(t)): t for _, t in found},
    }
