"""A study: a grid of cells, each one command of the library in a folder of its own, run one after the other.

A config file declares it by ``study(arg) -> [Cell, …]``, or by ``runs(arg)`` alone, each of which is then a cell that
trains. ``{NAME}`` in a cell's words stands for the folder of the cell NAME, which is done first:

    [Cell("data", "prepare", ("scenes", "--latents", "--count", "512")),
     Cell("small", "train", ("--config", "configs/mini.py:model=nano,cache={data}")),
     Cell("eval/small", "evaluate", ("--task", "depth", "--dataset", "scenes", "--model", "{small}"))]

The flag that names the output is added here: ``prepare --out``, ``train --workdir``, ``evaluate --json``. A cell's
folder has ``cell.json``, written before the cell starts and again when it has ended well, with its settings, and
``cell.log``, what the command printed. A cell is done when ``cell.json`` says so; one that was killed is started again,
and goes on by the means of its command. Settings that differ from those that a folder was begun with are refused.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from scaling_perception.support.configs import run_declaration
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.files import read_json, write_json

OUTPUT = {"prepare": ("--out", ""), "train": ("--workdir", ""), "evaluate": ("--json", "result.json")}
"""Of each verb that a cell can be: the flag that names its output, and the file in the cell's folder, or "" for it."""

MARKER, LOG, LOCK = "cell.json", "cell.log", ".cell.lock"
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_REFERENCE = re.compile(r"\{([^{}]*)\}")

Settings = Callable[["Cell"], dict[str, Any]]
Defaults = Callable[["Cell"], Mapping[str, Any]]
Free = Callable[["Cell"], frozenset[str]]


class Cell(NamedTuple):
    """One command of a study.

    Attributes:
        name: of its folder, below the study's; parts are separated by slashes.
        verb: prepare, train or evaluate.
        words: of the command, without the flag of its output; ``{NAME}`` is the folder of another cell.
        after: further cells that must be done first.
        labels: further columns of its rows in the collected table.
    """

    name: str
    verb: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()
    labels: Mapping[str, Any] = {}

    def needs(self) -> tuple[str, ...]:
        """The cells that must be done before this one."""
        found = [name for word in self.words for name in _REFERENCE.findall(word)]
        return tuple(dict.fromkeys([*found, *self.after]))

    def command(self, out: Path) -> list[str]:
        """The words after ``scaling-perception``, with folders below ``out``."""
        flag, file = OUTPUT[self.verb]
        words = [_REFERENCE.sub(lambda match: str(out / match[1]), word) for word in self.words]
        return [self.verb, *words, flag, str(out / self.name / file)]


class Outcome(NamedTuple):
    """How a cell ended: ``done``, ``was done``, ``failed``, ``waits`` (for one that failed) or ``elsewhere``."""

    name: str
    state: str
    reason: str = ""


def study_cells(spec: str) -> list[Cell]:
    """The cells that a config file declares, each after those that it needs.

    Args:
        spec: ``FILE.py`` or ``FILE.py:key=value``, as for ``train``.

    Raises:
        UserError: no such file or argument, a file that declares no study, or cells that do not go together.
    """
    kind, found = run_declaration(spec, ("study", "runs"))
    if kind == "runs":
        found = [Cell(name, "train", ("--config", one)) for name, one in found]
    return in_order(found, spec)


def in_order(cells: Sequence[Cell], where: str) -> list[Cell]:
    """``cells``, each after those that it needs, otherwise as they are.

    Raises:
        UserError: what is no cell, a bad or double name, a verb that cells cannot be, a word that the study adds
            itself, an unknown reference, or a circle.
    """
    known: dict[str, Cell] = {}
    for number, cell in enumerate(cells, 1):
        if wrong := _wrong_kind(cell):
            name = f"cell '{cell.name}'" if isinstance(cell, Cell) and isinstance(cell.name, str) else f"cell {number}"
            raise UserError(f"{where}: {name}: {wrong}")
        if not _NAME.fullmatch(cell.name):
            raise UserError(f"{where}: cell '{cell.name}': use letters, digits, '.', '_', '-', and '/' between parts")
        if cell.name in known:
            raise UserError(f"{where}: two cells are named '{cell.name}': give each its own name")
        if cell.verb not in OUTPUT:
            raise UserError(f"{where}: cell '{cell.name}' is '{cell.verb}'{did_you_mean(cell.verb, OUTPUT)}")
        flag = OUTPUT[cell.verb][0]
        if any(word == flag or word.startswith(f"{flag}=") for word in cell.words):
            raise UserError(f"{where}: cell '{cell.name}' has {flag}, which is the cell's folder: leave it out")
        known[cell.name] = cell
    for cell in cells:
        for name in cell.needs():
            if name not in known:
                raise UserError(f"{where}: cell '{cell.name}' needs '{name}'{did_you_mean(name, known)}")
        above = next((name for name in known if cell.name.startswith(f"{name}/")), None)
        if above:
            raise UserError(f"{where}: cell '{cell.name}' lies in the folder of cell '{above}': rename one of them")
    if not cells:
        raise UserError(f"{where} declares no cell")
    ordered: dict[str, Cell] = {}
    while left := [cell for cell in cells if cell.name not in ordered]:
        free = [cell for cell in left if all(name in ordered for name in cell.needs())]
        if not free:
            names = ", ".join(cell.name for cell in left[:4])
            raise UserError(f"{where}: these cells wait for one another: {names}; break the circle")
        ordered |= {cell.name: cell for cell in free[:1]}
    return list(ordered.values())


def _wrong_kind(cell: Any) -> str:
    """What of a cell is of a kind that it cannot be, and what to write; empty: nothing."""
    if not isinstance(cell, Cell):
        return f"{cell!r:.80} is no Cell: write Cell(NAME, VERB, (WORD, …))"
    for what, text in (("name", cell.name), ("verb", cell.verb)):
        if not isinstance(text, str):
            return f"its {what} is {text!r}: give a text"
    for what, words in (("words", cell.words), ("after", cell.after)):
        if not isinstance(words, (list, tuple)):
            return f"its {what} are {words!r:.80}: give a tuple of texts"
        odd = [word for word in words if not isinstance(word, str)]
        if odd:
            return f"its {what} have {odd[0]!r}, which is no text: write '{odd[0]}'"
    if not isinstance(cell.labels, Mapping):
        return f"its labels are {cell.labels!r:.80}: give a mapping of names to values"
    for name, value in cell.labels.items():
        if not isinstance(name, str) or not isinstance(value, (str, int, float, type(None))):
            return f"its label {name!r} is {value!r:.80}: give a text or a number, named by a text"
    return ""


def stages(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that can run side by side, stage after stage; ``cells`` as `in_order` leaves them."""
    depth: dict[str, int] = {}
    for cell in cells:
        depth[cell.name] = 1 + max((depth[name] for name in cell.needs() if name in depth), default=-1)
    return [[cell for cell in cells if depth[cell.name] == stage] for stage in range(max(depth.values()) + 1)]


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of the settings' JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What ``cell.json`` of a cell's folder holds, None without one.

    Raises:
        UserError: it is damaged.
    """
    if not (folder / MARKER).exists():
        return None
    marker = read_json(folder / MARKER)
    if not isinstance(marker, dict) or marker.get("format") != _FORMAT or "settings" not in marker:
        raise UserError(f"{folder / MARKER} is no marker of a cell: restore it, or remove the folder to do it again")
    return marker


def check_settings(
    cells: Sequence[Cell],
    out: Path,
    settings_of: Settings,
    defaults_of: Defaults = lambda cell: {},
    free_of: Free = lambda cell: frozenset(),
) -> dict[str, dict[str, Any]]:
    """The settings of every cell, by name.

    Args:
        settings_of: what decides a cell's figures.
        defaults_of: values that a setting has where one side does not know it: the folder was begun by another version
            of the library, which behaved so.
        free_of: settings that decide no figure; an earlier version may have recorded them.

    Raises:
        UserError: a cell's settings are wrong, or differ from those that its folder was begun with; says in what.
    """
    known: dict[str, dict[str, Any]] = {}
    for cell in cells:
        try:
            known[cell.name] = json.loads(json.dumps(settings_of(cell)))
        except UserError as error:
            raise UserError(f"cell '{cell.name}': {error}") from None
    prints = {name: fingerprint(settings) for name, settings in known.items()}
    for cell in cells:
        marker = read_marker(out / cell.name)
        if marker is None:
            continue
        defaults = defaults_of(cell)
        differ = differing_settings(marker["settings"], known[cell.name], defaults, free_of(cell))
        was, now = ({**defaults, **side} for side in (marker["settings"], known[cell.name]))
        if marker["verb"] != cell.verb:
            differ, was, now = ["verb"], {"verb": marker["verb"]}, {"verb": cell.verb}
        if differ:
            told = "; ".join(f"{name} was {_short(was, name)} and is now {_short(now, name)}" for name in differ[:3])
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(
                f"{out / cell.name} was begun with other settings: {told}{more}; restore them, or choose another --out"
            )
        known[cell.name] = marker["settings"]  # those of its fingerprint
        for name, old in marker.get("after", {}).items():
            needed = read_marker(out / name)
            if name in prints and old != (needed["fingerprint"] if needed else prints[name]):
                raise UserError(
                    f"{out / cell.name} was made from '{name}' of other settings: remove that folder to do it again, "
                    "or choose another --out"
                )
    return known


def differing_settings(
    was: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], free: frozenset[str] = frozenset()
) -> list[str]:
    """Names of settings that differ, sorted. One that a side does not have has its default there, or else is not set:
    null, false or empty."""

    def value(side: Mapping[str, Any], name: str) -> Any:
        found = side.get(name, defaults.get(name))
        return None if found is False or found in ("", [], {}) else found

    names = sorted((was.keys() | now.keys()) - free)
    return [name for name in names if value(was, name) != value(now, name)]


def _short(table: Mapping[str, Any], name: str) -> str:
    return json.dumps(table[name])[:80] if name in table else "absent"


def is_done(cell: Cell, out: Path) -> bool:
    """Whether the cell's folder says that it is done."""
    marker = read_marker(out / cell.name)
    return marker is not None and marker["state"] == "done"


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    settings: Mapping[str, dict[str, Any]],
    say: Callable[[str], None],
    run: Callable[[list[str], Path], int] | None = None,
    jobs: int = 1,
) -> Iterator[Outcome]:
    """Run the cells, and yield how each ended; one that fails stops only those that need it.

    Args:
        cells: in order; what they need and is not among them must be done already.
        settings: of `check_settings`, for all cells of the study.
        say: takes a line about a cell that starts or ends; called from one thread a job.
        run: runs the words of a command with its output added to a file; returns the exit code.
        jobs: cells that run at a time.

    Raises:
        StudyStopped: SIGINT or SIGTERM came; the running commands received it, and have ended.
    """
    ended: dict[str, str] = {}
    left = list(enumerate(cells, 1))
    among = {cell.name for cell in cells}
    with _Commands(shared=jobs > 1) as commands, ThreadPoolExecutor(jobs) as pool:
        running: set[Future[Outcome]] = set()
        while left or running:
            free = [at for at in left if all(name in ended for name in at[1].needs() if name in among)]
            for number, cell in free[: jobs - len(running)]:
                left.remove((number, cell))
                head = f"{number}/{len(cells)} {cell.name}"
                report = partial(lambda head, text: say(f"{head}: {text}"), head)
                running.add(pool.submit(_run_cell, cell, out, settings, dict(ended), report, run or commands.run))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for outcome in (future.result() for future in finished):
                ended[outcome.name] = outcome.state
                yield outcome


def _run_cell(
    cell: Cell,
    out: Path,
    settings: Mapping[str, dict[str, Any]],
    ended: Mapping[str, str],
    say: Callable[[str], None],
    run: Callable[[list[str], Path], int],
) -> Outcome:
    folder = out / cell.name
    if is_done(cell, out):
        say("is done")
        return Outcome(cell.name, "was done")
    for name in cell.needs():
        marker = read_marker(out / name)
        if marker is None or marker["state"] != "done":
            reason = f"needs {name}, which {'failed' if ended.get(name) == 'failed' else 'is not done'}"
            say(reason)
            return Outcome(cell.name, "waits", reason)
    words = cell.command(out)
    with _hold(folder) as held:
        if not held:
            say("is being run by another process")
            return Outcome(cell.name, "elsewhere", "another process runs it")
        if is_done(cell, out):  # by another process, since we looked
            return Outcome(cell.name, "was done")
        marker = {"format": _FORMAT, "name": cell.name, "verb": cell.verb, "words": list(cell.words)}
        marker |= {"labels": dict(cell.labels), "settings": settings[cell.name], "state": "started"}
        marker |= {"fingerprint": fingerprint(settings[cell.name])}
        marker |= {"after": {name: fingerprint(settings[name]) for name in cell.needs()}}
        before = read_marker(folder) or {}
        marker |= {"attempts": before.get("attempts", 0) + 1, "seconds": before.get("seconds", 0.0)}
        write_json(folder / MARKER, marker)
        say(f"{cell.verb} …")
        start = time.monotonic()
        code = run(words, folder / LOG)
        marker["seconds"] = round(marker["seconds"] + time.monotonic() - start, 1)
        if code == 0 and (reason := _lacks(cell, folder)):
            code = 1
        else:
            reason = "" if code == 0 else f"{_ending(code)}: {_last_line(folder / LOG)}"
        write_json(folder / MARKER, marker | {"state": "started" if code else "done"})
    say(f"failed, {reason}" if code else f"done in {marker['seconds']:.0f} s")
    return Outcome(cell.name, "failed" if code else "done", reason)


def _lacks(cell: Cell, folder: Path) -> str:
    """What a command that says it succeeded has not left, "" when all is there."""
    file = {"prepare": "ledger.json", "train": "model", "evaluate": OUTPUT["evaluate"][1]}[cell.verb]
    if cell.verb == "prepare" and "--latents" not in cell.words:
        file = "summary.json"
    return "" if (folder / file).exists() else f"it ended well and left no {file}"


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[bool]:
    """Hold the cell for this process; False where another one does.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


class StudyStopped(SystemExit):
    """The study was asked to stop and so was its cell; its code (130 or 143) is the exit code of the command."""


class _Commands:
    """The commands of the library that run at a time; SIGINT and SIGTERM reach each of them, and end the study."""

    def __init__(self, shared: bool) -> None:
        # cells side by side share an accelerator, of whose memory the first would else take three quarters
        self.environment = dict(os.environ)
        if shared:
            self.environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.running: set[subprocess.Popen[bytes]] = set()
        self.asked: list[int] = []
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "_Commands":
        with contextlib.suppress(ValueError):  # outside the main thread there are no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def pass_on(self, number: int, _: Any) -> None:
        self.asked.append(number)
        for child in list(self.running):
            child.send_signal(number)

    def run(self, words: list[str], log: Path) -> int:
        """Run one command in a process of its own, and return its exit code."""
        if self.asked:
            raise StudyStopped(128 + self.asked[0])
        with open(log, "ab") as file:
            file.write(f"$ scaling-perception {' '.join(words)}\n".encode())
            file.flush()
            command = [sys.executable, "-u", "-m", "scaling_perception", *words]
            # a session of its own, so that Ctrl-C at a terminal reaches it once, through `pass_on`
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=self.environment
            )
            self.running.add(child)
            try:
                if self.asked:  # the signal came while the process was made
                    child.send_signal(self.asked[0])
                code = child.wait()
            finally:
                if child.poll() is None:
                    child.kill()
                    child.wait()
                self.running.discard(child)
        if self.asked and code:
            raise StudyStopped(128 + self.asked[0])
        return code


def _ending(code: int) -> str:
    """How a command ended, by what its process returned."""
    if code >= 0:
        return f"exit code {code}"
    return f"ended by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"ended by signal {-code}"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"
