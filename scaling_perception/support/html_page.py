"""A self-contained HTML page: its style, script, tables, pictures and files embedded, so that it opens offline.

The page follows the reader's choice of light or dark, fits a phone, prints, and works without JavaScript.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from scaling_perception.support.svg_chart import Chart, csv_text, legend, svg

_STYLE, _SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table; every cell is text. Where it is wider than the page it scrolls, and says so."""
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    about = f'<p class="small">{html.escape(caption)}</p>' if caption else ""
    long = ' class="long"' if any(len(row[0]) > 20 for row in rows) else ""
    return (
        f'<div class="table">{about}<div role="region" tabindex="0" aria-label="{html.escape(caption or "table")}">'
        f"<table{long}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="hint">scroll the table sideways to see all columns →</p></div>'
    )


def image(data: bytes, name: str, kind: str = "png") -> str:
    """A picture; ``name`` says what is seen, where it is not shown."""
    coded = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(name, quote=True)}" src="data:image/{kind};base64,{coded}">'


def link(name: str, text: str, kind: str = "text/csv") -> str:
    """A link that saves a file, ``name``, of MIME type ``kind``, which lies in the page."""
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="{html.escape(name, quote=True)}" href="data:{kind};base64,{data}">{html.escape(name)}</a>'


def file(name: str, text: str, kind: str) -> str:
    """A file to save whose text can be unfolded."""
    return f"<p>{link(name, text, kind)}</p><details><summary>show it</summary><pre>{html.escape(text)}</pre></details>"


def items(texts: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"


def chart_figure(chart: Chart, caption: str, name: str, command: str, kind: str = "") -> str:
    """A chart with its legend, caption, data as CSV to save, and the command that made them.

    Args:
        caption: text.
        name: of the CSV.
        kind: a class of the page's style.
    """
    made = f"{link(name, csv_text(chart))}<pre>{html.escape(command)}</pre>"
    return (
        f'<figure class="{kind}">{legend(chart)}{svg(chart)}<figcaption>{html.escape(caption)}'
        f"<details><summary>data and command</summary>{made}</details></figcaption></figure>"
    )


def page(title: str, intro: str, body: str) -> str:
    """The whole page; ``intro`` and ``title`` are text, ``body`` is HTML."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f'<p class="small">{html.escape(intro)}</p>{body}<script>{_SCRIPT}</script></body></html>'
    )
