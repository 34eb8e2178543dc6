"""The commands of the pages in docs/, and the files that each takes and makes."""

import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from scaling_perception.interop.find import SHIPPED
from scaling_perception.support.verbs import make_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_PLACEHOLDER = re.compile(
    r"[A-Z][A-Z0-9_]*(/.*)?|/data(/.*)?|x|bucket/.*|paper:.*|FILE\.py|-"
)  # what a person puts a name for
_HUB = re.compile(r"stabilityai/[\w.-]+")
_SHIPPED = {"tiny", *(folder.name for folder in SHIPPED.iterdir())}


class Command(NamedTuple):
    """One command of a page, parsed by its verb."""

    line: str
    verb: str
    words: list[str]
    args: object
    overrides: list[str]


def lines(page):
    """The lines of all blocks of commands of a page, continued ones joined, comments left out."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in fenced if language in ("", "bash", "sh")]
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if "scaling-perception " in line or line.startswith(("launch/", "sbatch ")):
            yield " ".join(line.split())


def commands(page):
    """Every command of a page in order; usage lines (``VERB``, ``[…]``, ``SRC DST``) are none."""
    for line in lines(page):
        for part in re.split(r"&&|\|(?=\s)|;\s", line):
            part = part.strip().removeprefix("do ").removeprefix("$ ")
            found = re.search(r"scaling-perception (\S+) ?(.*)", part)
            if not found or re.search(r"[\[…]|\bVERB\b|\bSRC\b|\w\|\w", part) or part.startswith(("git ", "pip ")):
                continue
            verb, words = found[1], shlex.split(found[2].replace("$t", "flow"))
            module = importlib.import_module(f"scaling_perception.{verb}")
            split = getattr(module, "split_overrides", None)
            rest, overrides = split(words) if split else (words, [])
            yield Command(part, verb, words, make_parser(verb).parse_args(rest), overrides)


def made_by(command):
    """Files and folders that a command leaves."""
    names = ("workdir", "json", "csv", "per_image", "html", "figure", "frontier", "images", "to")
    of = {"prepare": ("out",), "predict": ("out",), "generate": ("out",), "study": ("out",), "convert": ("target",)}
    found = [getattr(command.args, name, None) for name in (*names, *of.get(command.verb, ()))]
    if command.verb == "convert":
        found.append(command.words[1])
    return [one for one in found if isinstance(one, str)]


def taken_by(command):
    """Files and folders that a command reads, as they are written."""
    args, verb = command.args, command.verb
    found = []
    for name in ("model", "autoencoder", "data", "raw", "align", "list", "mask", "repeat", "law", "points", "config"):
        value = getattr(args, name, None)
        found += value if isinstance(value, list) else [value]
    if verb == "predict":
        found += [part for word in args.inputs for part in word.split(",")]
    if verb in ("fit", "report", "convert"):
        found.append(command.words[0])
    of_config = dict(re.findall(r"(\w+)=([^,]+)", str(getattr(args, "config", "") or "").partition(":")[2]))
    found += [of_config.get(name) for name in ("root", "init", "data", "caches")]
    caches = [of_config.get("cache", ""), *(one.partition("=")[2] for one in command.overrides if "cache=" in one)]
    found += [part for cache in caches for part in cache.split(":")]
    return [str(one).partition(":")[0] if ".py" in str(one) else str(one) for one in found if one]


def own(page):
    """Files that a page calls the reader's own, in a line «Yours: `photo.jpg`, `photos/`»."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^Yours here: (.*?)\.(?:\s|$)", text, re.MULTILINE | re.DOTALL)
    return {name.rstrip("/") for line in found for name in re.findall(r"`([^`]+)`", line)}


def is_known(name, before, yours):
    """Whether a file that a command reads is there by then: in the package, made on the page, or the reader's own."""
    name = name.rstrip("/")
    if name in _SHIPPED or _PLACEHOLDER.fullmatch(name) or (ROOT / name).exists() or _HUB.fullmatch(name):
        return True
    from scaling_perception.models.presets import preset_names

    places = {str(Path(one)) for one in before} | yours
    return name in preset_names() or any(
        name == place or name.startswith(f"{place}/") or place.startswith(f"{name}/") for place in places
    )
