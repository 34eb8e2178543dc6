"""What a task is called, as a fixed text embedding that the network may learn to listen to (facts 5.3).

The embeddings of ``config.task_prompts`` are made once, by the text encoder of ``config.text_encoder``, and become a
frozen leaf of the model (``context/table``): nobody needs the encoder afterwards. Their projection starts at zero, so
that a model that is given prompts begins as it was.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from scaling_perception.models.config import DiTConfig
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.tasks import get_task, model_passes


def prompt_table(config: Config, dit: DiTConfig, tasks: list[str]) -> tuple[DiTConfig, np.ndarray | None]:
    """(the network with room for the prompts, table (max(task_labels, 1), width)), or (``dit``, None) without prompts.

    Args:
        tasks: those that the run trains; a network without task labels serves one, and gets its row.

    Raises:
        UserError: a prompt for no task of this run, no text encoder, or a width that ``model_changes`` contradicts.
    """
    prompts = config.task_prompts.to_dict()
    if not prompts:
        return dit, None
    for name, text in prompts.items():
        get_task(name)
        if name not in tasks:
            raise UserError(f"task_prompts.{name}: this run does not train {name}{did_you_mean(name, tasks)}")
        if not isinstance(text, str) or not text:
            raise UserError(f"task_prompts.{name} is {text!r}: give a text")
    if not config.text_encoder:
        raise UserError("task_prompts need text_encoder: the folder or hub id of a CLIP text encoder")
    from scaling_perception.interop.hf_clip import load_clip, task_context

    passes = model_passes(tasks)
    rows = {one.name: text for name, text in prompts.items() for one in get_task(name).passes}
    table = task_context(rows, load_clip(config.text_encoder), passes)
    if not dit.task_labels:
        table = table[[passes.index(get_task(tasks[0]).passes[0].name)]]
    if dit.context_dim not in (0, table.shape[1]):
        raise UserError(f"model_changes.context_dim is {dit.context_dim}; {config.text_encoder} gives {table.shape[1]}")
    return dataclasses.replace(dit, context_dim=table.shape[1]), table


def with_table(params: Any, table: np.ndarray | None) -> Any:
    """``params`` with the table of prompts in its place."""
    if table is None:
        return params
    return {**params, "context": {**params["context"], "table": jnp.asarray(table)}}
