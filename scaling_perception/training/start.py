"""Where a run starts: another model's weights, fitted to the network that is to be trained (``models/surgery.py``)."""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from scaling_perception.diffusion.schedules import get_diffusion
from scaling_perception.models.dit import DiTConfig, Params, abstract_params, config_from_dict, position_table
from scaling_perception.models.surgery import adapt
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError
from scaling_perception.training.state import named_leaves


def starting_point(config: Config, dit: DiTConfig) -> tuple[Params, dict[str, Any]]:
    """(params, meta) of the model folder, training run, shipped name or hub id ``config.init``, as weights of ``dit``.

    ``config.init_surgery``: ``auto`` changes what can be changed without training, by ``config.init_gain`` and
    ``config.upcycle``, and prints each step; ``none`` takes a model of the same shapes alone. Where a perception model
    was trained for another prediction or schedule, that is told as well. The position table, which depends on the
    resolution, is always made anew. Params are float32 on the host; copies of one array are views.

    Returns:
        (params, the folder's description with ``surgery``: the steps as text).

    Raises:
        UserError: no such model, or one that cannot become ``dit``, naming the field or tensor.
    """
    from scaling_perception.interop.find import find_model
    from scaling_perception.interop.model_folder import load_model

    found, meta = load_model(find_model(config.init))
    found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), found)  # first: 1/3 of a half is rounded twice
    if config.init_surgery == "none":
        _refuse_other_shapes(config.init, found, dit)
        params, steps = found, []
    else:
        key = jax.random.key(config.seed)
        try:
            params, steps = adapt(
                found, config_from_dict(meta["model"]), dit, config.init_gain, **config.upcycle.to_dict(), key=key
            )
        except UserError as error:
            raise UserError(f"init {config.init}: {error}") from None
    for line in [*steps, *_other_prediction(config, meta)]:
        print(f"init {config.init}: {line}", file=sys.stderr, flush=True)
    params = {**params, "pos_embed": position_table(dit.dim, dit.grid)}
    return params, {**meta, "surgery": steps}


def check_latents(config: Config, start: Mapping[str, Any], encoder_id: str) -> None:
    """Refuse a start that was trained in other latents than those of the config's autoencoder.

    A start without conditions, trained on pictures of classes, has seen no features: latents of the same autoencoder
    without them will do.

    Raises:
        UserError: as said.
    """
    from scaling_perception.models.autoencoders import load_autoencoder

    was = start.get("autoencoder_id", encoder_id)
    if not encoder_id or was == encoder_id:
        return
    plain, plus, _ = config.autoencoder.partition("+")
    conditioned = start.get("model", {}).get("cond_channels", 0) > 0
    if plus and not conditioned and load_autoencoder(plain).id == was:
        return
    raise UserError(
        f"init {config.init} was trained in the latents of autoencoder {start['autoencoder']}, which is not "
        f"'{config.autoencoder}' of this config: use the same"
    )


def _other_prediction(config: Config, meta: Mapping[str, Any]) -> list[str]:
    """A line, if a perception model starts anew under another schedule or prediction: its loss then starts high."""
    now = get_diffusion(config.diffusion, **config.diffusion_changes.to_dict())
    was = [meta["diffusion"].get("prediction"), meta["diffusion"].get("schedule")]
    wanted = [now.prediction, now.schedule]
    if not meta["tasks"] or was == wanted:
        return []
    return [f"it was trained to predict {was[0]} on {was[1]}, and this config says {wanted[0]} on {wanted[1]}"]


def _refuse_other_shapes(init: str, found: Params, dit: DiTConfig) -> None:
    trees = (named_leaves(found), named_leaves(abstract_params(dit)))
    for name in sorted(trees[0].keys() | trees[1].keys()):
        shapes = [tuple(tree[name].shape) if name in tree else "absent" for tree in trees]
        if name != "pos_embed" and shapes[0] != shapes[1]:
            raise UserError(
                f"init: {name} is {shapes[0]} in {init} and {shapes[1]} in this config's model: "
                "choose the preset and model_changes that it was made with, or init_surgery=auto"
            )
