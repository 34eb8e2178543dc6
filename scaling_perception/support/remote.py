"""Folders in buckets, as local ones: copied once to this machine, file by file, and again where they changed.

A copy lies in the user's cache folder (``XDG_CACHE_HOME``), one for each address. ``.copied.jsonl`` in it has a line
for each file that is whole: its name, size, and what the store says of its version. A copy that was stopped goes on;
what the store no longer has is removed. File systems are fsspec's, whose packages are asked for when they are needed.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from scaling_perception.support.errors import UserError
from scaling_perception.support.locks import hold

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "memory": "fsspec"}
"""Scheme -> the package that reads it. ``memory`` is this process's own memory."""

_ADDRESS = re.compile(r"([a-z][a-z0-9]*)://")
_VERSIONS = ("etag", "ETag", "md5Hash", "crc32c", "generation", "mtime", "updated", "LastModified", "created")
_INDEX = ".copied.jsonl"
_THREADS = 8  # files at the same time: a bucket's rate grows with them


def is_remote(text: str | os.PathLike[str]) -> bool:
    """Whether ``text`` is an address in a store that can be read from here."""
    found = _ADDRESS.match(str(text))
    package = PACKAGES.get(found[1]) if found else None
    return package is not None and importlib.util.find_spec(package) is not None


def local(text: str | os.PathLike[str]) -> str:
    """``text`` itself, or of an address the copy of what lies there, brought up to date.

    Raises:
        UserError: nothing is there, it cannot be read, or there is no room for the copy.
    """
    return str(_copy(str(text))) if is_remote(text) else str(text)


def _copy(url: str) -> Path:
    folder = _folder_of(url)
    store, files = _listing(url)
    if not files:
        raise UserError(f"{url} holds nothing: check the address")
    with _copying(url, folder):
        _bring_up_to_date(url, store, files, folder)
    return folder


class WorkingCopy:
    """The copy of a folder in a store that is worked on here, and brought back there: what is new is written, and of
    what was known of it what is gone is removed. For a ``with``, in which no other process of this machine has it;
    processes of others must not write the same files.

    Attributes:
        url, folder: there, and here.
    """

    def __init__(self, url: str, part: str = "") -> None:
        """Args: ``part``: whose copy it is, where several work on one folder."""
        self.url = url.rstrip("/")
        own = _folder_of(url)
        self.folder = own.parent.with_name(f"{own.parent.name}-work{part}") / own.name
        self._there: dict[str, list[int]] = {}  # as it is there: size and time of change here
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        lock = self.folder.parent.with_name(f".{self.folder.parent.name}.lock")
        self._held.enter_context(hold(lock, f"another process is writing to {self.url}", "wait for it"))
        shutil.rmtree(self.folder, ignore_errors=True)  # what is there counts, and not what was left here
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        self._held.close()

    def fetch(self, wanted: Callable[[str], bool]) -> None:
        """Copy the files whose names are wanted from there.

        Raises:
            UserError: as `local`; nothing there is no mistake.
        """
        store, files = _listing(self.url)
        files = {name: about for name, about in files.items() if wanted(name) and name not in self._there}
        _bring_up_to_date(self.url, store, files, self.folder, alone=False)
        self._there |= {name: _stamp(self.folder / name) for name in files}

    def push(self, last: str = "ledger") -> None:
        """Bring back what changed; files whose names begin with ``last`` come after all others.

        Raises:
            UserError: it cannot be written there.
        """
        store, path = _store(self.url)
        here = {str(one.relative_to(self.folder)): _stamp(one) for one in self.folder.rglob("*") if one.is_file()}
        here = {name: stamp for name, stamp in here.items() if not Path(name).name.startswith(".")}
        new = sorted(
            (name for name in here if self._there.get(name) != here[name]), key=lambda n: (n.startswith(last), n)
        )
        gone = [name for name in self._there if name not in here]
        try:
            for name in new:
                store.put_file(str(self.folder / name), f"{path}/{name}")
            for name in gone:
                store.rm_file(f"{path}/{name}")
        except Exception as error:
            raise UserError(f"cannot write {self.url} ({_reason(error)}): run the same command again") from error
        self._there = here


def _stamp(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _folder_of(url: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scaling-perception" / "copies"
    address = url.rstrip("/")
    if not re.fullmatch(_ADDRESS.pattern + ".*[^/.].*", address):
        raise UserError(f"{url} names no folder: give its whole address, such as gs://BUCKET/FOLDER")
    return base / hashlib.sha256(address.encode()).hexdigest()[:16] / address.rsplit("/", 1)[1]


def _copying(url: str, folder: Path) -> contextlib.AbstractContextManager[None]:
    lock = folder.parent.with_name(f".{folder.parent.name}.lock")
    return hold(lock, f"another process is copying {url}", "wait for it", wait=True)


def _store(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(url.rstrip("/"))
    except Exception as error:  # of every store's own kind
        raise UserError(f"cannot read {url} ({_reason(error)}): check the address and your rights") from error
    store.invalidate_cache()
    return store, path


def _listing(url: str) -> tuple[Any, dict[str, tuple[str, Any]]]:
    """The store, and of the files there: name below ``url`` -> (name in the store, what the store says of it)."""
    store, path = _store(url)
    try:
        there = {name: about for name, about in store.find(path, detail=True).items() if about["type"] == "file"}
    except FileNotFoundError:
        there = {}
    except Exception as error:
        raise UserError(f"cannot read {url} ({_reason(error)}): check the address and your rights") from error
    files = {name.removeprefix(path).lstrip("/"): (name, about) for name, about in there.items()}
    files.pop(_INDEX, None)  # of a copy that was itself put there
    if "" in files:
        raise UserError(f"{url} is a file: give the folder that it lies in")
    if bad := next((name for name in files if ".." in Path(name).parts or Path(name).is_absolute()), None):
        raise UserError(f"{url} has a file called {bad}, which cannot be copied to a folder: rename it")
    return store, files


def _bring_up_to_date(
    url: str, store: Any, files: Mapping[str, tuple[str, Any]], folder: Path, alone: bool = True
) -> None:
    """Args: ``alone``: these are all files there, and others here are removed."""
    from scaling_perception.support.progress import progress

    lines = {name: [int(about["size"]), _version(about)] for name, (_, about) in files.items()}
    known = dict(_known(folder))
    left = [name for name, line in lines.items() if known.get(name) != line or not _whole(folder / name, line[0])]
    gone = [path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in lines]
    for path in gone if alone else ():
        if path.name != _INDEX:
            path.unlink()
    if not left:
        return
    folder.mkdir(parents=True, exist_ok=True)
    size, free = sum(lines[name][0] for name in left), shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{url} needs {size / 1e9:.3g} GB more and {folder} has {free / 1e9:.3g} GB free: set XDG_CACHE_HOME to a "
            "larger disk, or mount the bucket and give its folder"
        )

    def one(name: str) -> str:
        target = folder / name
        half = target.with_name(f".{hashlib.sha256(target.name.encode()).hexdigest()[:16]}.half")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(files[name][0], str(half))
            if not _whole(half, lines[name][0]):
                raise UserError(f"{url}/{name} has {half.stat().st_size} bytes instead of {lines[name][0]}: run again")
            os.replace(half, target)
        except UserError:
            raise
        except Exception as error:  # of every store's own kind, or of the disk
            half.unlink(missing_ok=True)
            raise UserError(f"cannot copy {url}/{name} ({_reason(error)}): run the same command again") from error
        return name

    with ThreadPoolExecutor(_THREADS) as pool, open(folder / _INDEX, "a", encoding="utf-8") as index:
        try:
            for name in progress(pool.map(one, left), len(left), f"copy {url}"):
                index.write(json.dumps([name, *lines[name]]) + "\n")
                index.flush()
        finally:
            pool.shutdown(cancel_futures=True)


def _known(folder: Path) -> Iterator[tuple[str, list[Any]]]:
    if not (folder / _INDEX).is_file():
        return
    for line in (folder / _INDEX).read_text(encoding="utf-8").splitlines():
        try:
            name, *rest = json.loads(line)
        except (ValueError, TypeError):  # a line that a kill cut short
            continue
        yield name, rest


def _version(about: Mapping[str, Any]) -> str:
    return next((str(about[name]) for name in _VERSIONS if about.get(name)), "")


def _whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
