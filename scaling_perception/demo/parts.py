"""What the parts of the page share: the components of a request, uploads, faults as one line."""

import dataclasses
import html
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from scaling_perception.support.errors import UserError
from scaling_perception.tasks.base import Task

EXAMPLES = ("table", "room", "corridor")
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""How events go that change what is shown and compute nothing large."""


def upload(**how: Any) -> gr.Image:
    """An upload that stays the file it was: it is read as `predict` reads it, and a bad one is one line.

    The method is replaced, and not overridden: of every subclass Gradio writes a stub beside its source.
    """
    picture = gr.Image(type="filepath", image_mode=None, buttons=[], **how)
    picture.preprocess = lambda payload: None if payload is None else payload.path
    return picture


@dataclasses.dataclass
class Inputs:
    """The components of a tab whose values make a request, by name, in the order in which they are sent."""

    task: Task
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def components(self) -> list[Any]:
        return list(self.parts.values())

    def only(self, names: Iterable[str]) -> "Inputs":
        """Those of the components that are called so."""
        return Inputs(self.task, {name: self.parts[name] for name in names if name in self.parts})

    def named(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self.parts, values, strict=True))


def example(name: str, end: str) -> str:
    """Path of a shipped example: ``.jpg``, ``_next.jpg`` or ``_visible.png``."""
    return str(resources.files("scaling_perception.demo") / "examples" / f"{name}{end}")


def one_line(error: UserError) -> gr.Error:
    """A fault as the page shows it: its one line, until it is closed."""
    return gr.Error(html.escape(str(error)), duration=None, title="Not done", print_exception=False)


def named(error: UserError, path: str) -> UserError:
    """The error with the file's own name, without the folder of uploads."""
    return UserError(str(error).replace(f"{Path(path).parent}/", ""))
