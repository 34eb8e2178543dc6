"""The record of one run: ``run.json`` in its folder says what ran, on what, how often it was started, what it cost.

A run is one or more attempts; each ends as ``finished``, ``interrupted`` (asked to stop, and saved), ``error`` or
``killed``. Whoever is killed cannot say so: the next attempt closes that one, at the last thing it told.
"""

import datetime
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from scaling_perception import __version__
from scaling_perception.support.files import write_json

SPENT = "spent_"  # begins the fields of a row that say where an attempt's seconds went until then
_FORMAT = 1
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_CHECKOUT = Path(__file__).resolve().parents[2]


class Record:
    """``run.json`` of one folder, written anew, and whole, at each change. Make it with ``open_record``."""

    def __init__(self, path: Path, content: dict[str, Any], write: bool, now: Callable[[], float]) -> None:
        self.path, self.content = path, content
        self._write, self._now = write, now

    def attempt_started(self, step: int, ago: float = 0.0) -> None:
        """A new attempt, which began ``ago`` seconds ago, goes on from ``step`` finished steps.

        One that is still open is closed as killed, at the last row of ``metrics.jsonl`` or the last ``seen``, whichever
        is later. Call it before the Writer is made: that drops the rows of the steps that are done again.
        """
        attempts = self.content["attempts"]
        if attempts and attempts[-1]["why"] is None:
            close_killed(attempts[-1], self.path.parent / "metrics.jsonl")
            attempts[-1]["end_step"] = max(attempts[-1]["end_step"], step)  # saved, but killed before it was told
        environment = self.content["environment"]
        where = {name: environment[name] for name in ("host", "devices")} | {"git": self.content["git"]}
        started = _stamp(self._now() - ago)
        if not attempts:
            self.content["started"] = started
        begun = {"start_step": step, "end_step": None, "started": started, "ended": None, "why": None}
        attempts.append({**begun, "spent": {}, **where})
        self.content["finished"] = None
        self._save()

    def seen(self, step: int, spent: Mapping[str, float]) -> None:
        """The attempt is alive at ``step``: worth telling at each checkpoint, in case it is killed.

        Args:
            spent: seconds of this attempt by cause, as ``goodput.Clock.totals`` tells them.
        """
        told = {"step": step, "time": _stamp(self._now()), "spent": _rounded(spent)}
        self.content["attempts"][-1]["seen"] = told
        self._save()

    def attempt_ended(self, step: int, why: str, spent: Mapping[str, float] | None = None, error: str = "") -> None:
        """The attempt is over after ``step`` finished steps of the run.

        Args:
            why: ``finished``, ``interrupted``, ``error`` or ``killed``; see ``why_ended``.
            error: what went wrong; its first line is kept of an ``error``.
        """
        attempt = self.content["attempts"][-1]
        attempt.update(end_step=step, ended=_stamp(self._now()), why=why, spent=_rounded(spent or {}))
        if error and why == "error":
            attempt["error"] = error.splitlines()[0][:300]
        attempt.pop("seen", None)
        if why == "finished":
            self.content["finished"] = attempt["ended"]
        self._save()

    def _save(self) -> None:
        self.content["cost"] = cost(self.content)
        if self._write:
            write_json(self.path, self.content)


def open_record(
    workdir: Path, facts: Mapping[str, Any], write: bool = True, now: Callable[[], float] = time.time
) -> Record:
    """The record of the run in ``workdir``: the one that is there with its facts renewed, or a new one.

    Call it after devices are known (it asks JAX for them). A ``run.json`` that cannot be read is put aside as
    ``run.damaged.json``: a damaged record is no reason not to train.

    Args:
        facts: JSON-able; what the caller knows: ``command``, ``config``, ``data`` (fingerprint), ``parameters``
            (``total`` and ``active``), ``macs_per_sample`` (forward), ``samples_per_step``,
            ``samples`` (lines that say how many of which data)
        write: False in processes other than the first.
        now: seconds since 1970.
    """
    path = workdir / "run.json"
    old: dict[str, Any] = {}
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(old, dict) or not {"attempts", "started"} <= old.keys():
                raise ValueError
        except ValueError:
            old = {}
            if write:
                os.replace(path, workdir / "run.damaged.json")
    content = {"format": _FORMAT, "version": __version__, "git": git_state(_CHECKOUT), "environment": environment()}
    content |= facts
    content |= {"started": old.get("started", _stamp(now())), "finished": old.get("finished")}
    content |= {"attempts": old.get("attempts", []), "cost": {}}
    return Record(path, content, write, now)


class Attempt:
    """One start of a run, as a context: ``record`` says when it began, how far it came and how it ended.

    Attributes:
        step: finished steps of the run, kept up to date by the loop.
    """

    def __init__(self, record: Record, step: int, clock: Any) -> None:
        """``clock``: a ``goodput.Clock`` that was made when the attempt began."""
        self.step, self._record, self._clock = step, record, clock

    def __enter__(self) -> "Attempt":
        self._record.attempt_started(self.step, self._clock.elapsed())
        return self

    def saved(self) -> None:
        """The state after ``step`` steps is being saved: worth recording, in case the attempt is killed."""
        self._record.seen(self.step, self._clock.totals())

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        self._record.attempt_ended(self.step, why_ended(error), self._clock.totals(), str(error or ""))


def why_ended(error: BaseException | None) -> str:
    """How an attempt ended, by the exception that left it (None: nothing did)."""
    if error is None:
        return "finished"
    return "interrupted" if isinstance(error, (SystemExit, KeyboardInterrupt)) else "error"


def close_killed(attempt: dict[str, Any], rows: Path) -> None:
    """Close an attempt that could not do so itself, at the last thing it told; what it did after that is unknown."""
    told = attempt.pop("seen", {"step": attempt["start_step"], "time": attempt["started"], "spent": {}})
    row = _last_row(rows)
    if row and row["step"] >= told["step"] and row.get("time", 0.0) > seconds_of(told["time"]):
        spent = {name.removeprefix(SPENT): value for name, value in row.items() if name.startswith(SPENT)}
        told = {"step": row["step"], "time": _stamp(row["time"]), "spent": _rounded(spent)}
    attempt.update(end_step=told["step"], ended=told["time"], why="killed", spent=told["spent"])


def cost(content: Mapping[str, Any]) -> dict[str, float]:
    """``device_hours`` of all closed attempts, and forward ``macs`` done in them; steps done twice count twice."""
    hours = macs = 0.0
    for attempt in content["attempts"]:
        if attempt["why"] is not None:
            seconds = max(seconds_of(attempt["ended"]) - seconds_of(attempt["started"]), 0.0)
            hours += seconds / 3600 * attempt["devices"]["count"]
            steps = attempt["end_step"] - attempt["start_step"]
            macs += steps * content.get("samples_per_step", 0) * content.get("macs_per_sample", 0.0)
    return {"device_hours": round(hours, 6), "macs": macs}


def environment() -> dict[str, Any]:
    """Versions, devices and a short hash of this host's name, which is private."""
    import jax

    devices = jax.devices()
    versions = {name: metadata.version(name) for name in _PACKAGES}
    kinds = {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)}
    return {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "devices": {**kinds, "processes": jax.process_count()},
        "host": hashlib.blake2b(platform.node().encode(), digest_size=6).hexdigest(),
    }


def git_state(root: Path) -> dict[str, Any] | None:
    """``commit`` and ``dirty`` (a tracked file differs from it) of the checkout ``root``; None if it is none."""
    if not (root / ".git").exists():  # else git would tell of a repository around the place of installation
        return None

    def ask(*words: str) -> str:
        quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True, env=quiet
        )
        return done.stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def seconds_of(stamp: str) -> float:
    """Seconds since 1970 of a time in the record."""
    return datetime.datetime.fromisoformat(stamp).timestamp()


def _stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")


def _rounded(spent: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in spent.items()}


def _last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a ``metrics.jsonl``; an attempt that was killed may have torn the one after it."""
    if not path.exists():
        return None
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            row = json.loads(line)
            if math.isfinite(row["step"]):
                return row
        except (ValueError, KeyError, TypeError):
            continue
    return None
