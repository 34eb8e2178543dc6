"""A hook of mkdocs: links of a page to files outside docs/ lead to the repository, where these files are."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """``[x](../scaling_perception/x.py)`` as a link into the repository; a file that is not there stays a bad link."""

    def link(found: re.Match[str]) -> str:
        path = ROOT / found[1]
        if not path.exists():
            return found[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{found[1]}{found[2] or ''})"

    return _OUTSIDE.sub(link, markdown)
