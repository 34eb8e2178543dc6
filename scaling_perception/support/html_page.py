"""A self-contained HTML page: its style, tables, pictures and files embedded, so that it opens offline."""

import base64
import html
from collections.abc import Sequence

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.7rem;margin-bottom:.2rem}
h2{margin-top:2.4rem;border-bottom:1px solid #ddd}small,figcaption,.panel p{color:#666}
table{border-collapse:collapse;font-size:.85rem;margin:.8rem 0;display:block;overflow-x:auto}
th,td{padding:.25rem .7rem;border-bottom:1px solid #e5e5e5;text-align:right}
th:first-child,td:first-child{text-align:left}
.plots{display:flex;flex-wrap:wrap;gap:.6rem}.plots img{width:340px;max-width:100%}.wide img{width:800px}
.full svg{width:100%;height:auto}
.panel>div{display:flex;flex-wrap:wrap;gap:.5rem}.panel p{margin:.8rem 0 .1rem;font-size:.8rem}
figure{margin:0}figure img{width:160px;image-rendering:auto;display:block}figcaption{font-size:.75rem;text-align:center}
li{margin:.15rem 0}pre{background:#f6f6f6;padding:.6rem;overflow-x:auto;font-size:.8rem;max-height:24rem}
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every cell is text."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def image(png: bytes, name: str) -> str:
    """A PNG; ``name`` stands where it is not shown."""
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def file(name: str, text: str, kind: str) -> str:
    """A file to save, ``name``, of MIME type ``kind``, whose text can be unfolded."""
    data = base64.b64encode(text.encode()).decode()
    link = f'<a download="{html.escape(name)}" href="data:{kind};base64,{data}">{html.escape(name)}</a>'
    return f"<p>{link}</p><details><summary>show it</summary><pre>{html.escape(text)}</pre></details>"


def items(texts: Sequence[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"


def page(title: str, intro: str, body: str) -> str:
    """The whole page; ``intro`` and ``title`` are text, ``body`` is HTML."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p><small>{html.escape(intro)}</small></p>{body}</body></html>"
    )
