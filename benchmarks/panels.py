"""One picture of what a model answers: rows of panels that `evaluate --panels` wrote, and pictures without a truth.

    for t in depth flow amodal normals; do
      scaling-perception evaluate --task $t --dataset worlds --count 10 --model mini --steps 2 --ensemble 10 \\
          --panels 10 --json runs/panels/$t.json
    done
    python benchmarks/panels.py runs/panels docs/images/panels.png depth:0 depth:3 flow:1 amodal:2 normals:0 PHOTO.jpg

A word TASK:NUMBER is a row of that evaluation; a file's name is a picture whose depth the shipped model predicts in 2
steps of 10 members; it has no truth.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLUMNS = ("image", "prompt", "truth", "prediction", "error", "uncertainty")
SIDE, GAP, LEFT, TOP = 150, 6, 60, 20


def rows_of(folder: Path, words: list[str]) -> list[tuple[str, dict[str, Image.Image]]]:
    rows = []
    for word in words:
        task, colon, number = word.partition(":")
        if not colon:
            rows += of_photograph(Path(word))
            continue
        path = folder / f"{task}.json"
        panel = json.loads(path.read_text())["panels"][int(number)]
        found = {name: Image.open(path.parent / panel[name]) for name in COLUMNS if name in panel}
        rows.append((task, found))
    return rows


def of_photograph(path: Path) -> list[tuple[str, dict[str, Image.Image]]]:
    import scaling_perception as sp
    from scaling_perception.tasks.colours import depth_to_color, heat

    out = sp.Predictor.from_pretrained("mini")(str(path), task="depth", steps=2, ensemble=10, key=0)
    shown = {"prediction": depth_to_color(out.prediction), "uncertainty": heat(out.uncertainty)}
    panels = {"image": Image.open(path), **{name: Image.fromarray(array) for name, array in shown.items()}}
    return [("depth", panels)]


def main(folder: str, out: str, *words: str) -> None:
    rows = rows_of(Path(folder), list(words))
    sheet = Image.new("RGB", (LEFT + len(COLUMNS) * (SIDE + GAP), TOP + len(rows) * (SIDE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        draw.text((LEFT + column * (SIDE + GAP), 4), name, fill="black")
    for number, (task, panels) in enumerate(rows):
        top = TOP + number * (SIDE + GAP)
        draw.text((6, top + SIDE // 2), task, fill="black")
        for column, name in enumerate(COLUMNS):
            if name in panels:
                square = panels[name].convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                sheet.paste(square, (LEFT + column * (SIDE + GAP), top))
    sheet.quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
