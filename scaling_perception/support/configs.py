"""Config files: ``configs/depth.py:model=a1,res=256`` plus ``optim.lr=1e-4`` to one locked ConfigDict.

A config is a Python file with ``get_config(arg: str = "") -> ConfigDict``; what follows the colon is its ``arg``.
"""

import ast
import contextlib
import importlib.machinery
import importlib.util
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.field_checks import check_config
from scaling_perception.support.fields import Field, field_named
from scaling_perception.support.places import place_fields

Config = Any  # an ml_collections.ConfigDict: its fields have no static types, so the whole has none

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parent
# an installed wheel has its own copy; the folder beside it is ours only in a checkout
_SHIPPED = (_CHECKOUT / "configs",) if (_CHECKOUT / "pyproject.toml").is_file() else (_PACKAGE / "_configs",)
_PAPER = "paper"  # the folder in it of the paper's figures and tables
_SHARED = ("common", "shared")  # files that other configs import


def load_config(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Run a config file and apply overrides.

    Args:
        spec: ``FILE.py`` or ``FILE.py:key=value,key=value``. A relative FILE is looked for in the working folder, then
            among the configs of the checkout or of the installed package.
        overrides: ``some.key=value``; the value must have the type of what is there. Keys can be added to tables
            that are empty or whose name ends in ``_changes`` (such as ``model_changes.depth=4``), and so can fields
            without a default (``data.mixture.depth.resolution=48``).

    Returns:
        The config, locked.

    Raises:
        UserError: no such file, an error in it, or an argument or field that is unknown or wrong (``field_checks``).
    """
    path, arg = _split(spec)
    module = _execute(path)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} has no get_config(arg): copy one of the files in configs/ and change it")
    with _own_errors(path):
        config = module.get_config(arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returns {type(config).__name__}: return an ml_collections.ConfigDict")
    for override in overrides:
        _override(config, override)
    place_fields(config)
    check_config(config)
    return config.lock()


def config_runs(spec: str) -> list[tuple[str, str]]:
    """The runs of a config file that stands for several, as those in ``configs/paper`` do: (name, spec of one).

    A file says so by ``runs(arg) -> [(name, its own argument), …]``.

    Raises:
        UserError: no such file, an unknown argument, or a file that is one run.
    """
    path, arg = _split(spec)
    module = _execute(path)
    if not callable(getattr(module, "runs", None)):
        raise UserError(f"{path} is one run: give it to `train` as it is")
    file = spec.partition(".py:")[0].removesuffix(".py") + ".py"
    found = _listed(path, "runs", module.runs, arg)
    for one in found:
        if not (isinstance(one, (list, tuple)) and len(one) == 2 and all(isinstance(part, str) for part in one)):
            raise UserError(f"{path}: runs(arg) has {one!r:.80}: give pairs of texts, (name, its own argument)")
    return [(name, f"{file}:{own}") for name, own in found]


def run_declaration(spec: str, names: Sequence[str]) -> tuple[str, list[Any]]:
    """What a config file that stands for several commands declares: the first of the functions ``names`` that it has,
    and what that returns; ``runs`` as by `config_runs`.

    Raises:
        UserError: no such file, an unknown argument, or a file with none of the functions.
    """
    path, arg = _split(spec)
    module = _execute(path)
    for name in names:
        if callable(getattr(module, name, None)):
            return name, config_runs(spec) if name == "runs" else _listed(path, name, getattr(module, name), arg)
    raise UserError(f"{path} declares no {' and no '.join(f'{name}(arg)' for name in names)}: see docs/study.md")


def declared(spec: str, name: str) -> list[Any]:
    """What the function ``name`` of a config file returns for the file's argument; empty where it has none.

    Raises:
        UserError: no such file, an unknown argument, or an error in it.
    """
    path, arg = _split(spec)
    function: Any = getattr(_execute(path), name, None)
    return [] if function is None else _listed(path, name, function, arg)


def _listed(path: Path, name: str, function: Callable[[str], Any], arg: str) -> list[Any]:
    """What a function of a config file returns, which must be a list.

    Raises:
        UserError: it is none, or the function has an error.
    """
    with _own_errors(path):
        found = function(arg)
        if isinstance(found, Iterable) and not isinstance(found, (str, Mapping)):
            return list(found)
    raise UserError(f"{path}: {name}(arg) returns {found!r:.80}: return a list")


def _split(spec: str) -> tuple[Path, str]:
    name, _, arg = spec.partition(".py:")
    return find_config(name if name.endswith(".py") else name + ".py"), arg


def find_config(name: str) -> Path:
    """The file that ``name`` means; UserError lists the shipped configs when there is none."""
    path = Path(name)
    places = [path]
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    if not path.is_absolute() and inside.parent.as_posix() in (".", _PAPER):
        places += [folder / inside for folder in _SHIPPED]
    for place in places:
        if place.is_file():
            return place.resolve()
    known = {
        "configs/" + file.relative_to(folder).as_posix()
        for folder in _SHIPPED
        for file in [*folder.glob("*.py"), *folder.glob(f"{_PAPER}/*.py")]
        if file.stem not in _SHARED
    }
    raise UserError(f"config {name} does not exist{did_you_mean('configs/' + inside.as_posix(), known)}")


def _package(folder: Path) -> str:
    """The package made for a folder of configs; that of the paper's is inside the one of the folder above."""
    inside = folder.name == _PAPER
    name = f"{_package(folder.parent)}.{_PAPER}" if inside else f"_scaling_perception_configs_{hash(str(folder)):x}"
    name = name.replace("-", "_")
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__path__ = [str(folder), *(str(place / _PAPER if inside else place) for place in _SHIPPED)]
        sys.modules[name] = module
    return name


class _Fresh(importlib.machinery.SourceFileLoader):
    """Compiles the file every time: cached bytecode is that of any edit of the same size within the same second."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _execute(path: Path) -> types.ModuleType:
    """Run ``path`` as part of a package made for its folder, so that ``from . import common`` finds the common file.

    A file elsewhere, copied from ours, finds ours: the shipped folders come after its own.
    """
    name = f"{_package(path.parent)}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Fresh(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _own_errors(path):
            spec.loader.exec_module(module)
    finally:
        sys.modules.pop(name, None)
    return module


@contextlib.contextmanager
def _own_errors(path: Path) -> Iterator[None]:
    """An error of the file's own code becomes one line with the file and the line."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}: mend the file") from error
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).suffix == ".py"]
        own = [frame for frame in frames if Path(frame.filename).resolve() == path] or frames
        what = " ".join(str(error).split())
        raise UserError(f"{path}, line {own[-1].lineno}: {type(error).__name__}: {what}: mend the file") from error


def _override(config: Config, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override '{text}' has no value: write --config.some.key=value")
    *folders, last = key.split(".")
    field = field_named(key)
    place: Any = config
    for depth, part in enumerate([*folders, last]):
        if not isinstance(place, ConfigDict):
            raise UserError(f"config key '{key}': '{'.'.join(key.split('.')[:depth])}' holds one value, no keys")
        if part in place:
            place = place[part]
        elif depth == len(folders) and field is not None and field.optional:
            place = _Absent
        elif depth and depth == len(folders) and (len(place) == 0 or folders[-1].endswith("_changes")):
            place = _Absent
        elif field is not None and depth:  # a field of an entry that the table does not have
            table, near = ".".join(key.split(".")[:depth]), did_you_mean(part, list(place)) if len(place) else ""
            raise UserError(
                f"config key '{key}': {table} has no entry '{part}'{near}; give a new entry as a whole: "
                f"--config.{table}.{part}=\"{{'task': 'depth', …}}\""
            )
        else:
            raise UserError(f"unknown config key '{key}'{_nearest(config, key, depth)}")
    parent: Any = config
    for part in folders:
        parent = parent[part]
    new = _new(field, value) if place is _Absent else convert(f"config.{key}", place, value)
    with parent.unlocked():
        if isinstance(new, dict):
            if last in parent:
                del parent[last]  # assigning a table would merge it into the old one
            parent[last] = ConfigDict(new)
        else:
            parent[last] = new


class _Absent:
    """Marks a key that is about to be added."""


def _nearest(config: Config, key: str, depth: int) -> str:
    names = flatten(config)
    ending = [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    if ending:  # `lr` for `optim.lr`
        return f"; did you mean '{ending[0]}'?"
    head = ".".join(key.split(".")[:depth])
    level = {".".join(name.split(".")[: depth + 1]) for name in names if name.startswith(head)}
    return did_you_mean(".".join(key.split(".")[: depth + 1]), level)


def _new(field: Field | None, text: str) -> Any:
    return text if field is not None and field.kind is str else _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def convert(field: str, current: Any, text: str) -> Any:
    """``text`` as a value of the type of ``current``.

    Raises:
        UserError: it is none, naming ``field``.
    """
    wanted = type(current).__name__
    try:
        if isinstance(current, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if isinstance(current, int):
            number = float(text) if any(sign in text for sign in ".eE") else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        if isinstance(current, float):
            return float(text)
        if isinstance(current, str):
            return text
        value = ast.literal_eval(text)
        if isinstance(current, (ConfigDict, Mapping)):
            wanted = "table such as {'depth': 4}"
            if not isinstance(value, dict):
                raise ValueError
            return value
        if isinstance(current, (list, tuple)):
            if not isinstance(value, (list, tuple)):
                raise ValueError
            return type(current)(value)
        return value
    except (ValueError, KeyError, SyntaxError, OverflowError):
        now = current.to_dict() if isinstance(current, ConfigDict) else current
        raise UserError(f"{field} is '{text}': give a value of type {wanted} (now {now!r})") from None


def flatten(config: Mapping[str, Any] | Config, prefix: str = "") -> dict[str, Any]:
    """Nested tables as ``{"optim.lr": 1e-4, ...}``; an empty table is kept as ``{}``."""
    flat: dict[str, Any] = {}
    for key in config.keys():
        value = config[key]
        if isinstance(value, (ConfigDict, Mapping)) and len(value):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = {} if isinstance(value, (ConfigDict, Mapping)) else value
    return flat
