"""The end of a run: its averaged weights as model folders, whole or absent."""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling_perception.interop.find import CONFIG
from scaling_perception.interop.safetensors_io import read_entries
from scaling_perception.interop.sharded import find_weights, open_sharded
from scaling_perception.parallel.processes import is_first, to_host
from scaling_perception.support.errors import UserError
from scaling_perception.training.checkpoints import Checkpoints, load_ema
from scaling_perception.training.identity import without_places
from scaling_perception.training.reporting import say
from scaling_perception.training.saving import from_first
from scaling_perception.training.setup import Run


def damage_of(model: Path) -> str:
    """What the headers of an exported folder's weights say is missing of them; empty where they are whole."""
    files = sorted(model.glob("*.safetensors"))
    try:
        for path in files:
            read_entries(path)
        if find_weights(model) is not None:
            open_sharded(model)
    except UserError as error:
        return str(error)
    return f"{model} has no weights" if not files and (model / CONFIG).is_file() else ""


def export_models(run: Run, ema: Any, checkpoints: Checkpoints, model: Path) -> None:
    """Write the folder ``model``, and with ``train.export_kept`` one for each checkpoint that is kept for good.

    Args:
        ema: the average after the last step; ``train.export_from=best`` takes that of the best checkpoint instead.
    """
    train, at = run.config.train, run.total
    if train.export_from == "best":
        at = from_first(next((step for _, step in checkpoints.best()), at))
        ema = ema if at == run.total else load_ema(checkpoints.folder, run.abstract.ema, say, at)[0]
    kept = [step for step in checkpoints.steps() if train.keep_every and step % train.keep_every == 0]
    for step in kept if train.export_kept else ():
        then = load_ema(checkpoints.folder, run.abstract.ema, say, step)[0]
        _export(run, then, step, run.workdir / "models" / str(step))
    _export(run, ema, at, model)
    say(f"exported the averaged weights {'' if at == run.total else f'of step {at} '}to {model}")


def _export(run: Run, ema: Any, step: int, model: Path) -> None:
    samples = step * run.objective.samples_per_step
    info = {"steps": step, "samples": samples, "macs": samples * run.macs, "data": run.identity["data"]}
    info |= {"config": without_places(run.identity["config"])}
    host = to_host(ema, run.mesh)  # all processes take part, for each may hold a part of a leaf
    average = jax.tree.map(lambda leaf, like: np.asarray(leaf, like.dtype), host, run.shapes.params)
    if is_first():
        half = model.with_name(f".{model.name}")  # a kill meanwhile leaves nothing that looks like a finished model
        half.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(half, ignore_errors=True)
        run.objective.export(average, str(half), info)
        shutil.rmtree(model, ignore_errors=True)
        os.rename(half, model)
