"""What a tab shows of a run: numbers, the picture beside the answer, members, points, files, the command."""

from collections.abc import Callable
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np

from scaling_perception.demo import drawing, text
from scaling_perception.demo.parts import QUIET
from scaling_perception.demo.session import Run, Session
from scaling_perception.tasks.base import Task

_POINTS = "3-D"


def results(session: Session, task: Task) -> tuple[dict[str, Any], Callable[[Run, str, float, bool], list[Any]]]:
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
    found["looking"] = gr.State(False)  # whether the points are looked at
    with gr.Tabs() as tabs:
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
            with gr.Tab(_POINTS):
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

    def cloud(run: Run) -> str:
        near, far = (float(word) for word in run.distances)
        place = run.folder / "cloud.glb"
        return str(place if place.exists() else drawing.write_cloud(place, run, near, far))

    def redraw(run: Run, view: str, overlay: float, looking: bool) -> list[Any]:
        members = drawing.members(run, session.predictor.options)
        shown = [run.number, text.numbers(run, session), pair(run, view, overlay), members]
        if not run.done:
            return [*shown, *[gr.skip()] * (3 if "cloud" in found else 2)]
        if "cloud" in found:
            shown.append(cloud(run) if looking else None)
        return [*shown, [str(path) for path in run.files], run.command]

    def look(event: gr.SelectData, number: int) -> Any:
        run = session.runs.get(number)
        if event.value != _POINTS:
            return False, gr.skip()
        return True, gr.skip() if run is None else cloud(run)

    if "cloud" in found:  # made when they are looked at: they are large, and a viewer that is hidden loads none
        tabs.select(look, found["state"], [found["looking"], found["cloud"]], **QUIET)

    def again(number: int, view: str, overlay: float) -> Any:
        run = session.runs.get(number)
        return gr.skip() if run is None else pair(run, view, overlay)

    for name in ("view", "overlay"):
        found[name].change(
            again,
            [found["state"], found["view"], found["overlay"]],
            found["picture"],
            **QUIET,
        )
    return found, redraw
