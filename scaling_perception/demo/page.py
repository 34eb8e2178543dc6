"""The page: a tab for each task of the model. All that differs between tasks is asked of the task."""

import html
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np

from scaling_perception.demo import drawing, text
from scaling_perception.demo.marking import marking, mask_of
from scaling_perception.demo.parts import EXAMPLES, QUIET, Inputs, example, one_line, upload
from scaling_perception.demo.results import results
from scaling_perception.demo.session import Asked, Session
from scaling_perception.diffusion.caching import CACHES
from scaling_perception.diffusion.schedules import LEARNED, PRESETS, SPACINGS
from scaling_perception.diffusion.solvers import SOLVERS
from scaling_perception.inference.aspect import ASPECTS
from scaling_perception.inference.draws import VIEWS
from scaling_perception.inference.inputs import to_rgb
from scaling_perception.inference.settings import MERGES, SETTINGS
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import get_task
from scaling_perception.tasks.base import Task

PAIR, CLIP = "Two pictures", "A clip"
_NEAR_FAR = "1,4"  # where relative depth 0 and 1 are put in the point cloud, unless said otherwise


def build(session: Session, title: str) -> gr.Blocks:
    """The page of a model; nothing is served yet."""
    tabs: list[tuple[Inputs, gr.HTML]] = []
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        gr.HTML(text.header(session), padding=False)
        with gr.Tabs():
            for name in session.tasks:
                with gr.Tab(name.capitalize(), id=name, elem_id=f"tab-{name}"):
                    tabs.append(_tab(session, get_task(name)))
        timer = gr.Timer(2.0)
        count = [len(inputs.parts) for inputs, _ in tabs]

        def tick(*values: Any) -> list[Any]:
            found, at = [], 0
            for (inputs, _), number in zip(tabs, count, strict=True):
                found.append(_promise(session, inputs, values[at : at + number]))
                at += number
            return [*found, gr.Timer(active=len(session.costs) < len(session.tasks))]

        every = [component for inputs, _ in tabs for component in inputs.components]
        outputs = [*(shown for _, shown in tabs), timer]
        timer.tick(tick, every, outputs, **QUIET)
    return page


# A tab


def _tab(session: Session, task: Task) -> tuple[Inputs, gr.HTML]:
    inputs = Inputs(task)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=300, elem_classes="inputs"):
            with gr.Group():
                _pictures(session, inputs)
            _examples(inputs)
            promise = _dial(session, inputs)
            with gr.Row():
                run = gr.Button("Run", variant="primary", elem_id=f"run-{task.name}", scale=3)
                stop = gr.Button("Stop", elem_id=f"stop-{task.name}", scale=1, min_width=80)
            _advanced(session, inputs)
        with gr.Column(scale=7, min_width=300, elem_classes="outputs"):
            outputs, redraw = results(session, task)

    knobs = inputs.only(("dial", *SETTINGS))
    for part in knobs.components:
        part.change(lambda *values: _promise(session, knobs, values), knobs.components, promise, **QUIET)

    def predict(*values: Any) -> Iterator[Any]:
        *own, view, overlay, looking = values
        try:
            for found in session.stream(asked(session, inputs, tuple(own))):
                yield redraw(found, view, overlay, looking)
        except UserError as error:
            raise one_line(error) from None

    names = [*inputs.parts, "view", "overlay", "looking"]  # what a client of the server calls them
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    predict.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    event = run.click(
        predict,
        [*inputs.components, outputs["view"], outputs["overlay"], outputs["looking"]],
        [
            outputs[name]
            for name in ("state", "numbers", "picture", "members", "cloud", "files", "command")
            if name in outputs
        ],
        concurrency_limit=1,
        concurrency_id="model",
        show_progress="minimal",
        show_progress_on=outputs["numbers"],
        api_name=task.name,
    )
    stop.click(None, cancels=[event], api_visibility="private")
    return knobs, promise


def _pictures(session: Session, inputs: Inputs) -> None:
    task, parts, prompt = inputs.task, inputs.parts, inputs.task.prompt
    how: dict[str, Any] = {"sources": ["upload", "clipboard", "webcam"]}
    how |= {"height": 250, "placeholder": "Drop a picture here\n- or -\nClick to upload"}
    if prompt is None:
        parts["picture"] = upload(label="Picture", elem_id=f"picture-{task.name}", **how)
    elif prompt.frame:
        source = gr.Radio([PAIR, CLIP], value=PAIR, label="Frames from", elem_id=f"source-{task.name}")
        with gr.Row() as pair:
            parts["picture"] = upload(label="First frame", min_width=140, elem_id=f"picture-{task.name}", **how)
            parts["second"] = upload(
                label=prompt.words.capitalize(), min_width=140, elem_id=f"second-{task.name}", **how
            )
        with gr.Column(visible=False) as clip:
            parts["clip"] = gr.File(label="Clip", file_count="single", type="filepath", height=120)
            with gr.Row():
                parts["frame"] = gr.Number(0, label="First frame", precision=0, minimum=0, min_width=100)
                parts["apart"] = gr.Number(1, label="Frames until the second", precision=0, minimum=1, min_width=100)
        parts["source"] = source
        source.change(
            lambda one: (gr.update(visible=one == PAIR), gr.update(visible=one == CLIP)),
            source,
            [pair, clip],
            queue=False,
            api_visibility="private",
        )
    else:
        parts["picture"] = upload(label="Picture", elem_id=f"picture-{task.name}", **how)
        marking(session, inputs)


def _examples(inputs: Inputs) -> None:
    parts, prompt = inputs.parts, inputs.task.prompt
    ends = {"picture": ".jpg"}
    if prompt is not None:
        ends |= {"second": "_next.jpg"} if prompt.frame else {"mask": "_visible.png"}
    rows = [[example(name, end) for end in ends.values()] for name in EXAMPLES]
    targets = [parts[name] for name in ends]
    if "way" in parts:
        rows, targets = [[*row, "Mask file"] for row in rows], [*targets, parts["way"]]
    gr.Examples(
        rows,
        targets,
        label="Examples (rendered worlds)",
        example_labels=[name.capitalize() for name in EXAMPLES],
        cache_examples=False,
        elem_id=f"examples-{inputs.task.name}",
        api_visibility="private",
    )


def _dial(session: Session, inputs: Inputs) -> gr.HTML:
    name, parts = inputs.task.name, inputs.parts
    stops = session.stops(name)
    with gr.Group(elem_classes="dialbox"):
        if stops:
            balanced = next((at for at, stop in enumerate(stops, 1) if "balanced" in stop.names), 1)
            words = "from the cheapest setting to the lowest error"
            parts["dial"] = gr.Slider(
                1,
                max(len(stops), 2),
                balanced,
                step=1,
                label="Compute",
                info=words,
                buttons=[],
                elem_id=f"dial-{name}",
                interactive=len(stops) > 1,
            )
        else:
            with gr.Row():
                parts["steps"] = gr.Slider(1, 50, 5, step=1, label="Steps", buttons=[], elem_id=f"dial-{name}")
                parts["ensemble"] = gr.Slider(1, 20, 3, step=1, label="Members", buttons=[])
        return gr.HTML(lambda: _promise_of(session, inputs), elem_id=f"promise-{name}", padding=False)


def _promise_of(session: Session, inputs: Inputs) -> str:
    """The promise of the dial as it stands when the page is opened."""
    usual = {name: part.value for name, part in inputs.parts.items() if name in ("dial", "steps", "ensemble")}
    return _promise(session, inputs, tuple(usual.get(name) for name in inputs.parts))


def _advanced(session: Session, inputs: Inputs) -> None:
    task, parts = inputs.task, inputs.parts
    choices: dict[str, Callable[[], list[str]]] = {
        "preset": lambda: list(PRESETS),
        "spacing": lambda: [*SPACINGS, LEARNED],
        "solver": lambda: list(SOLVERS),
        "reduce": lambda: list(task.reduce_modes),
        "aspect": lambda: list(ASPECTS),
        "cache": lambda: list(CACHES),
        "merge_in": lambda: list(MERGES),
        "views": lambda: list(VIEWS),
    }
    with gr.Accordion("Advanced", open=False, elem_id=f"advanced-{task.name}"):
        gr.Markdown("Empty fields follow the dial and the model. They are the flags of `scaling-perception predict`.")
        with gr.Row():
            for name, one in SETTINGS.items():
                if name in parts:
                    continue
                label = name.replace("_", " ").capitalize()
                info = f"{one['text']} (default: {one['default']})"
                if name == "ensemble":
                    label = "Members"
                if name in choices:
                    parts[name] = gr.Dropdown(
                        [("", ""), *choices[name]()], value="", label=label, info=info, min_width=200
                    )
                elif one["kind"] is bool:
                    parts[name] = gr.Checkbox(False, label=label, info=info, min_width=200)
                else:
                    parts[name] = gr.Textbox("", label=label, info=info, min_width=200, max_lines=1)
            parts["seed"] = gr.Textbox(
                "", label="Seed", info="key of all noise (default: 0)", min_width=200, max_lines=1
            )
        if "ply" in task.files:
            gr.Markdown("Camera of the point cloud")
            with gr.Row():
                hint = "degrees across the width; empty: from the picture's EXIF, or 60"
                parts["fov"] = gr.Textbox("", label="Field of view", info=hint, min_width=200, max_lines=1)
                hint = "fx,fy,cx,cy in pixels, instead"
                parts["intrinsics"] = gr.Textbox("", label="Intrinsics", info=hint, min_width=200, max_lines=1)
                hint = "where relative depth 0 and 1 are put: NEAR,FAR"
                parts["range"] = gr.Textbox(_NEAR_FAR, label="Range", info=hint, min_width=200, max_lines=1)


# From the components' values to a request


def chosen(session: Session, inputs: Inputs, given: dict[str, Any]) -> dict[str, str]:
    """Texts of settings: those of the dial, and over them the fields that are filled."""
    found: dict[str, str] = {}
    if given.get("dial") is not None:
        stops = session.stops(inputs.task.name)
        choice = stops[min(max(int(given["dial"]), 1), len(stops)) - 1].choice
        found |= {name: str(value) for name, value in choice.settings.items()}
    for name in (*SETTINGS, "seed"):
        value = given.get(name)
        if value not in (None, "", False):
            found[name] = str(value).strip()
    if found.get("cache") == "none" and not given.get("cache_interval"):
        found.pop("cache_interval", None)  # the dial's, whose cache the field has replaced
    return found


def _promise(session: Session, inputs: Inputs, values: tuple[Any, ...]) -> str:
    name = inputs.task.name
    try:
        settings = session.settings(name, chosen(session, inputs, inputs.named(tuple(values))))
    except UserError as error:
        return f'<div class="promise"><p class="note">{html.escape(str(error))}</p></div>'
    return text.promise(session, name, settings, session.stops(name))


def asked(session: Session, inputs: Inputs, values: tuple[Any, ...]) -> Asked:
    """The request that the components' values make.

    Raises:
        UserError: a value that cannot be meant.
    """
    given, task = inputs.named(values), inputs.task
    pictures: tuple[str | None, ...] = (given["picture"],)
    frames, mask = (0, 1), None
    if "second" in given:
        pictures = (given["picture"], given["second"]) if given["source"] == PAIR else (given["clip"],)
        frames = int(given["frame"] or 0), max(int(given["apart"] or 1), 1)
    if "way" in given and given["picture"] is not None:
        session.check_size(Path(given["picture"]))
        mask = mask_of(given, to_rgb(given["picture"]) if given["way"] != "Mask file" else np.empty(0))
    camera: dict[str, str] = {}
    if "ply" in task.files:
        camera = {"range": given["range"] or _NEAR_FAR}
        if given["intrinsics"]:
            camera["intrinsics"] = given["intrinsics"]
        else:
            camera["fov"] = given["fov"] or f"{drawing.guess_fov(given['picture'])[0]:g}"
    return Asked(task.name, pictures, mask, chosen(session, inputs, given), camera, frames)
