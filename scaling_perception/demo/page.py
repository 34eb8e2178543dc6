"""The page: a tab for each task of the model. All that differs between tasks is asked of the task."""

import dataclasses
import html
import inspect
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from scaling_perception.demo import drawing, masks, text
from scaling_perception.demo.session import Asked, Run, Session
from scaling_perception.diffusion.caching import CACHES
from scaling_perception.diffusion.schedules import PRESETS, SPACINGS
from scaling_perception.diffusion.solvers import SOLVERS
from scaling_perception.inference.aspect import ASPECTS
from scaling_perception.inference.inputs import to_rgb
from scaling_perception.inference.settings import SETTINGS
from scaling_perception.support.errors import UserError
from scaling_perception.tasks import get_task
from scaling_perception.tasks.base import Task
from scaling_perception.tasks.colours import mask_over

EXAMPLES = ("table", "room", "corridor")
WAYS = ("Paint", "Box", "Points", "Mask file")
PAIR, CLIP = "Two pictures", "A clip"
_NEAR_FAR = "1,4"  # where relative depth 0 and 1 are put in the point cloud, unless said otherwise


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
    parts: dict[str, gr.components.Component] = dataclasses.field(default_factory=dict)

    @property
    def components(self) -> list[gr.components.Component]:
        return list(self.parts.values())

    def named(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self.parts, values, strict=True))


def example(name: str, end: str) -> str:
    """Path of a shipped example: ``.jpg``, ``_next.jpg`` or ``_visible.png``."""
    return str(resources.files("scaling_perception.demo") / "examples" / f"{name}{end}")


def one_line(error: UserError) -> gr.Error:
    """A fault as the page shows it: its one line, until it is closed."""
    return gr.Error(html.escape(str(error)), duration=None, title="Not done", print_exception=False)


def build(session: Session, title: str) -> gr.Blocks:
    """The page of a model; nothing is served yet."""
    tabs: list[tuple[Inputs, gr.HTML]] = []
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
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
        quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        timer.tick(tick, every, outputs, **quiet)
    return page


# A tab


def _tab(session: Session, task: Task) -> tuple[Inputs, gr.HTML]:
    inputs = Inputs(task)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320, elem_classes="inputs"):
            with gr.Group():
                _pictures(session, inputs)
            _examples(inputs)
            promise = _dial(session, inputs)
            with gr.Row():
                run = gr.Button("Run", variant="primary", elem_id=f"run-{task.name}", scale=3)
                stop = gr.Button("Stop", elem_id=f"stop-{task.name}", scale=1, min_width=80)
            _advanced(session, inputs)
        with gr.Column(scale=7, min_width=320, elem_classes="outputs"):
            outputs, redraw = _outputs(session, task)

    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    for name in ("dial", *SETTINGS):
        if name in inputs.parts:
            inputs.parts[name].change(
                lambda *values: _promise(session, inputs, values), inputs.components, promise, **quiet
            )

    def predict(*values: Any) -> Iterator[Any]:
        *own, view, overlay = values
        try:
            for found in session.stream(asked(session, inputs, tuple(own))):
                yield redraw(found, view, overlay)
        except UserError as error:
            raise one_line(error) from None

    names = [*inputs.parts, "view", "overlay"]  # what a client of the server calls them
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    predict.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    event = run.click(
        predict,
        [*inputs.components, outputs["view"], outputs["overlay"]],
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
    return inputs, promise


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
        _marking(session, inputs)


def _marking(session: Session, inputs: Inputs) -> None:
    """How the visible part of the object is marked."""
    parts = inputs.parts
    parts["way"] = gr.Radio(list(WAYS), value=WAYS[0], label="Mark the visible part of the object by", elem_id="way")
    editor = parts["painted"] = gr.ImageEditor(
        label="Paint over the object",
        sources=(),
        transforms=(),
        layers=False,
        image_mode="RGBA",
        type="numpy",
        format="png",
        brush=gr.Brush(default_size=24, colors=["#ff5000"], color_mode="fixed"),
        height=320,
        buttons=[],
        elem_id="painted",
    )
    hint = "Click two corners in the picture below, or write x0,y0 x1,y1 in pixels"
    box = parts["box"] = gr.Textbox(label="Box", info=hint, visible=False, elem_id="box")
    hint = "Click in the picture below, or write x,y x,y in pixels"
    points = parts["points"] = gr.Textbox(label="Points", info=hint, visible=False, elem_id="points")
    like = parts["like"] = gr.Slider(
        4, 120, 30, step=1, label="How different a colour may be", visible=False, buttons=[]
    )
    file = parts["mask"] = upload(label="Mask file", sources=["upload"], height=160, visible=False)
    marked = gr.Image(label="What counts as visible", interactive=False, height=260, buttons=[], visible=False)
    outputs = [editor, box, points, like, file]
    marking = Inputs(inputs.task, dict(parts))  # the components so far
    own = marking.components
    ways = (("Paint",), ("Box",), ("Points",), ("Points",), ("Mask file",))

    def switch(way: str) -> list[Any]:
        return [gr.update(visible=way in one) for one in ways]

    def background(path: str | None) -> Any:
        if path is None:
            return None
        try:
            session.check_size(Path(path))
            picture = drawing.shown(to_rgb(path))
        except UserError as error:
            raise one_line(named(error, path)) from None
        return {"background": picture, "layers": [], "composite": None}

    def preview(*values: Any) -> Any:
        given = marking.named(values)
        if given["picture"] is None or given["way"] == "Paint":
            return gr.update(visible=False)
        try:
            session.check_size(Path(given["picture"]))
            image = to_rgb(given["picture"])
            mask = mask_of(given, image)
        except UserError as error:
            raise one_line(named(error, given["picture"])) from None
        if isinstance(mask, str):
            from scaling_perception.data.masks import to_mask

            try:
                mask = to_mask(mask)
            except UserError as error:
                raise one_line(named(error, mask)) from None
        if mask is None or mask.shape != image.shape[:2]:
            return gr.update(value=image, visible=True)
        return gr.update(value=mask_over(image, mask), visible=True)

    def click(given: dict[str, Any], at: list[int]) -> tuple[str, str]:
        here = f"{at[0]},{at[1]}"
        if given["way"] == "Box":
            corners = given["box"].split()
            return " ".join([*corners[:1], here] if len(corners) == 1 else [here]), given["points"]
        return given["box"], f"{given['points']} {here}".strip() if given["way"] == "Points" else given["points"]

    def clicked(event: gr.SelectData, *values: Any) -> tuple[str, str]:
        return click(marking.named(values), event.index)

    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    parts["way"].change(switch, parts["way"], outputs, **quiet)
    parts["picture"].change(background, parts["picture"], editor, **quiet)
    for name in ("picture", "way", "box", "points", "like", "mask"):
        parts[name].change(preview, own, marked, **quiet)
    marked.select(clicked, own, [box, points], **quiet)


def named(error: UserError, path: str) -> UserError:
    """The error with the file's own name, without the folder of uploads."""
    return UserError(str(error).replace(f"{Path(path).parent}/", ""))


def mask_of(given: dict[str, Any], image: np.ndarray) -> Any:
    """The mask of a request, bool (H, W), or the path of a file; None where nothing is marked."""
    if given["way"] == "Paint":
        return masks.of_painting(given["painted"], image.shape[:2])
    if given["way"] == "Box":
        return masks.of_box(given["box"] or "", image)
    if given["way"] == "Points":
        return masks.of_points(given["points"] or "", image, given["like"])
    return given["mask"]


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
        "spacing": lambda: list(SPACINGS),
        "solver": lambda: list(SOLVERS),
        "reduce": lambda: list(task.reduce_modes),
        "aspect": lambda: list(ASPECTS),
        "cache": lambda: list(CACHES),
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


def _outputs(session: Session, task: Task) -> tuple[dict[str, Any], Callable[[Run, str, float], list[Any]]]:
    views = list(task.views)
    found: dict[str, Any] = {"state": gr.State(0)}
    found["numbers"] = gr.HTML(
        '<div class="numbers"><p class="soft">Choose a picture, set the dial, press Run.</p></div>',
        elem_id=f"numbers-{task.name}",
        padding=False,
    )
    found["picture"] = gr.ImageSlider(
        label="Picture | prediction",
        elem_id=f"result-{task.name}",
        height=460,
        max_height=460,
        buttons=["fullscreen"],
        interactive=False,
        slider_position=35,
        format="png",
    )
    with gr.Row():
        found["view"] = gr.Dropdown(
            views, value=views[0], label="View", min_width=160, elem_id=f"view-{task.name}", interactive=len(views) > 1
        )
        found["overlay"] = gr.Slider(
            0,
            1,
            0,
            step=0.05,
            label="Uncertainty overlay",
            info="opacity where members differ most",
            min_width=160,
            buttons=[],
            elem_id=f"overlay-{task.name}",
        )
    with gr.Tabs():
        with gr.Tab("Members"):
            found["members"] = gr.Gallery(
                show_label=False,
                columns=5,
                fit_columns=False,
                height=230,
                object_fit="contain",
                buttons=[],
                elem_id=f"members-{task.name}",
                interactive=False,
                format="png",
            )
        if "ply" in task.files:
            with gr.Tab("3-D", render_children=True):
                found["cloud"] = gr.Model3D(
                    label="Points: drag to turn, scroll to zoom",
                    height=420,
                    clear_color=(0.07, 0.08, 0.1, 1.0),
                    camera_position=(90, 90, None),
                    elem_id=f"cloud-{task.name}",
                    interactive=False,
                )
        with gr.Tab("Files"):
            found["files"] = gr.File(
                label="Downloads: the files that predict writes",
                file_count="multiple",
                interactive=False,
                elem_id=f"files-{task.name}",
            )
        with gr.Tab("Command"):
            found["command"] = gr.Code(
                label="The command that writes these files",
                language="shell",
                interactive=False,
                wrap_lines=True,
                lines=3,
                show_line_numbers=False,
                elem_id=f"command-{task.name}",
            )

    def pair(run: Run, view: str, overlay: float) -> tuple[np.ndarray, np.ndarray]:
        return drawing.shown(run.image), drawing.shown(drawing.answer(run, view, overlay))

    def redraw(run: Run, view: str, overlay: float) -> list[Any]:
        shown = [run.number, text.numbers(run, session), pair(run, view, overlay), drawing.members(run)]
        if not run.done:
            return [*shown, *[gr.skip()] * (3 if "cloud" in found else 2)]
        if "cloud" in found:
            near, far = (float(word) for word in run.distances)
            shown.append(str(drawing.write_cloud(run.folder / "cloud.glb", run, near, far)))
        return [*shown, [str(path) for path in run.files], run.command]

    def again(number: int, view: str, overlay: float) -> Any:
        run = session.runs.get(number)
        return gr.skip() if run is None else pair(run, view, overlay)

    for name in ("view", "overlay"):
        found[name].change(
            again,
            [found["state"], found["view"], found["overlay"]],
            found["picture"],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
    return found, redraw


# From the components' values to a request


def chosen(session: Session, inputs: Inputs, given: dict[str, Any]) -> dict[str, str]:
    """Texts of settings: those of the dial, and over them the fields that are filled."""
    found: dict[str, str] = {}
    if given.get("dial") is not None:
        stops = session.stops(inputs.task.name)
        choice = stops[min(max(int(given["dial"]), 1), len(stops)) - 1].choice
        for name in ("steps", "ensemble", "preset", "solver", "cache", "cache_interval"):
            if (value := getattr(choice, name)) is not None:
                found[name] = str(value)
    for name in (*SETTINGS, "seed"):
        value = given.get(name)
        if value not in (None, "", False):
            found[name] = str(value).strip()
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
