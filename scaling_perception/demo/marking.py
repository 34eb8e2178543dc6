"""How a person marks the visible part of an object: paint, a box, points, or a file."""

from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np

from scaling_perception.data.masks import to_mask
from scaling_perception.demo import drawing, masks
from scaling_perception.demo.parts import QUIET, Inputs, named, one_line, upload
from scaling_perception.demo.session import Session
from scaling_perception.inference.inputs import to_rgb
from scaling_perception.support.errors import UserError
from scaling_perception.tasks.colours import mask_over

WAYS = ("Paint", "Box", "Points", "Mask file")


def marking(session: Session, inputs: Inputs) -> None:
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
    here = Inputs(inputs.task, dict(parts))  # the components so far
    own = here.components
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
        given = here.named(values)
        if given["picture"] is None or given["way"] == "Paint":
            return gr.update(visible=False)
        try:
            session.check_size(Path(given["picture"]))
            image = to_rgb(given["picture"])
            mask = mask_of(given, image)
        except UserError as error:
            raise one_line(named(error, given["picture"])) from None
        if isinstance(mask, str):
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
        return click(here.named(values), event.index)

    parts["way"].change(switch, parts["way"], outputs, **QUIET)
    parts["picture"].change(background, parts["picture"], editor, **QUIET)
    for name in ("picture", "way", "box", "points", "like", "mask"):
        parts[name].change(preview, own, marked, **QUIET)
    marked.select(clicked, own, [box, points], **QUIET)


def mask_of(given: dict[str, Any], image: np.ndarray) -> Any:
    """The mask of a request, bool (H, W), or the path of a file; None where nothing is marked."""
    if given["way"] == "Paint":
        return masks.of_painting(given["painted"], image.shape[:2])
    if given["way"] == "Box":
        return masks.of_box(given["box"] or "", image)
    if given["way"] == "Points":
        return masks.of_points(given["points"] or "", image, given["like"])
    return given["mask"]
