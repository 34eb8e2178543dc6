"""Pictures of the report: an image with two sliders, which show the prediction for so many steps and members."""

import functools
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaling_perception.data.images import read_image
from scaling_perception.evaluation.comparisons import select, values
from scaling_perception.evaluation.findings import Measured
from scaling_perception.evaluation.labels import ANSWERS, MAIN_METRIC, counted, macs_text, setting
from scaling_perception.support.html_page import image


class Detail(NamedTuple):
    """How pictures are put into the page: longest side in pixels, quality of WebP, and images an evaluation."""

    side: int
    quality: int
    images: int


DETAILS = (
    *(Detail(320, 85, 12), Detail(256, 80, 8), Detail(192, 75, 8), Detail(160, 70, 6), Detail(128, 65, 6)),
    *(Detail(128, 55, 4), Detail(112, 50, 3), Detail(96, 45, 2), Detail(96, 40, 1), Detail(1, 40, 0)),
)
"""From fine to coarse; the page takes the first that keeps it small."""

_NAMES = {"image": "image", "prompt": "what is asked for", "truth": "truth", "prediction": "prediction"}
_SAMPLE = ("image", "prompt", "truth")


@functools.lru_cache(maxsize=4096)
def _encoded(path: Path, side: int, quality: int) -> bytes:
    from PIL import Image

    picture = Image.fromarray(read_image(path))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=quality, method=4)
    return buffer.getvalue()


def panels(group: Sequence[Measured], detail: Detail) -> str:
    """The images of a group of evaluations as HTML, models below each other; '' where none has pictures."""
    found: dict[str, list[tuple[Measured, Mapping[str, Any]]]] = {}
    for one in group:
        for panel in one.evaluation.get("panels", []):
            found.setdefault(str(panel["key"]), []).append((one, panel))
    shown = list(found.items())[: detail.images]
    blocks = [_panel(key, of, detail, len(group) > 1) for key, of in shown]
    left = len(found) - len(shown)
    note = f"<p class='small'>{left} more in the folder panels/ beside the result.</p>" if left else ""
    if gone := _missing([pair for _, of in shown for pair in of]):
        words = f"{counted(len(gone), 'picture')} not found, such as {gone[0]}: evaluate again, or bring them back."
        note += f"<p class='small'>{html.escape(words)}</p>"
    return "".join(blocks) + note


def _panel(key: str, of: list[tuple[Measured, Mapping[str, Any]]], detail: Detail, several: bool) -> str:
    """One image: its sample, its sliders, and of every model and setting the answer."""
    measured, panel = of[0]
    given = [_figure(measured, panel, name, panel, detail, f"{_NAMES[name]} of {key}") for name in _SAMPLE]
    sample, count = "".join(given), sum(map(bool, given))
    answers, settings, widest = [], [], 1
    for one, entry in of:
        head = f"{one.label}: " if several else ""
        for answer in _answers(entry):
            at = answer["steps"], answer["ensemble"]
            settings.append(at)
            text = f"{setting(*at)} for {key}" + (f" by {one.label}" if several else "")
            names = (*ANSWERS, *[name for name in answer if name.startswith("t") and name[1:].isdigit()])
            drawn = [_figure(one, entry, name, answer, detail, f"{name} with {text}") for name in names]
            pictures, widest = "".join(drawn), max(widest, sum(map(bool, drawn)))
            hidden = "" if at == _last(of) else " hidden"
            answers.append(
                f'<div class="answer" data-key="{at[0]} {at[1]}"{hidden}><p class="before">{html.escape(head)}'
                f'<b>{setting(*at)}</b>{html.escape(_score(one, key, entry, at))}</p><div class="pictures">{pictures}'
                "</div></div>"
            )
    dial = _dial(settings, _last(of), key)
    return (
        f'<div class="panel">{dial}<div class="side"><div class="sample" style="--n:{count}"><p class="before">'
        f'{html.escape(key)}</p><div class="pictures">{sample}</div></div>'
        f'<div class="answers" style="--n:{widest}">{"".join(answers)}<p class="none">Not '
        "measured with these steps and members.</p></div></div></div>"
    )


def _answers(panel: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of every cell; of older evaluations the one that they have. Pictures along the way go with the last."""
    cell = panel.get("cell") or {}
    along = {name: value for name, value in panel.items() if name.startswith("t") and name[1:].isdigit()}
    whole = {"steps": cell.get("steps", 0), "ensemble": cell.get("ensemble", 0)}
    own = {**whole, **{name: panel[name] for name in ANSWERS if name in panel}, **along}
    return [{**one, **along} if whole.items() <= one.items() else one for one in panel.get("answers") or [own]]


def _last(of: list[tuple[Measured, Mapping[str, Any]]]) -> tuple[int, int]:
    """The setting that is shown first: the most compute."""
    every = [(one["steps"], one["ensemble"]) for _, entry in of for one in _answers(entry)]
    return max(every, key=lambda at: (at[0] * at[1], at))


def _missing(of: list[tuple[Measured, Mapping[str, Any]]]) -> list[str]:
    """Pictures that an evaluation names and that are not beside it."""
    names = [
        one.path.parent / source[name]
        for one, entry in of
        for source in (entry, *_answers(entry))
        for name in (*_SAMPLE, *ANSWERS)
        if source.get(name)
    ]
    return sorted({str(path) for path in names if not path.is_file()})


def _score(one: Measured, key: str, entry: Mapping[str, Any], at: tuple[int, int]) -> str:
    """The error of this image in the cell, and its compute."""
    metric, known = MAIN_METRIC[one.evaluation["task"]], entry.get("cell") or {}
    same = {name: known[name] for name in ("preset", "solver") if name in known}
    cells = select(one.evaluation["cells"], kind="constant", steps=at[0], ensemble=at[1], **same)
    if not cells:
        return ""
    value = values(cells[0], metric.name).get(key)
    words = [] if value is None else [f"{metric.label} {value:.3f} for this image"]
    words += [] if cells[0]["macs"] is None else [macs_text(cells[0]["macs"])]
    return ": " + ", ".join(words) if words else ""


def _figure(
    one: Measured, panel: Mapping[str, Any], name: str, source: Mapping[str, Any], detail: Detail, what: str
) -> str:
    path = one.path.parent / source[name] if source.get(name) else None
    if path is None or not path.is_file():
        return ""
    scale = (panel.get("scales") or {}).get("prediction" if name.startswith("t") and name[1:].isdigit() else name) or {}
    words = str(scale.get("words") or "")
    title = _NAMES.get(name, f"prediction at time {name[1:]} of 1000" if name[1:].isdigit() else name)
    title += f": {words}" if words else ""
    drawn = image(_encoded(path, detail.side, detail.quality), f"{what}{f' ({words})' if words else ''}", "webp")
    return f"<figure>{drawn}<figcaption>{html.escape(title)}{_bar(scale)}</figcaption></figure>"


def _bar(scale: Mapping[str, Any]) -> str:
    """The colours between their ends, with the values there."""
    low, high = scale.get("low"), scale.get("high")
    if not scale.get("colours") or low is None or high is None:
        return ""
    unit = f" {scale['unit']}" if scale.get("unit") else ""
    return (
        f'<span class="scale"><span>{low:.3g}</span><i style="background:linear-gradient(90deg,'
        f'{_stops(str(scale["colours"]))})"></i><span>{high:.3g}{html.escape(unit)}</span></span>'
    )


@functools.cache
def _stops(name: str) -> str:
    import matplotlib

    colours = matplotlib.colormaps[name]
    return ",".join("#" + "".join(f"{round(255 * part):02x}" for part in colours(i / 8)[:3]) for i in range(9))


def _dial(settings: Sequence[tuple[int, int]], start: tuple[int, int], key: str) -> str:
    """Sliders over steps and members, where there is more than one of either."""
    if len(set(settings)) < 2:
        return ""
    found = []
    for i, name in enumerate(("steps", "members")):
        every = sorted({setting[i] for setting in settings})
        at, shown = every.index(start[i]), " ".join(map(str, every))
        found.append(
            f'<label>{name} <input type="range" min="0" max="{len(every) - 1}" value="{at}" data-values="{shown}" '
            f'aria-label="{name} for {html.escape(key, quote=True)}"><output>{start[i]}</output></label>'
        )
    return f'<div class="dial">{"".join(found)}</div>'
