"""Where the time of a run went: seconds that trained it, and the others by cause. No service is asked; files suffice.

Goodput is the share of the wall time, from the first start to the end of the last attempt, that went into steps whose
result was kept. The rest is badput:

* ``compile``, ``restore``, ``data_wait``, ``checkpoint``, ``evaluate``: what the attempts measured of themselves;
* ``lost``: steps that were done and then had to be done again, for the run was killed before they were saved;
* ``down``: between two attempts;
* ``other``: what is left of an attempt, such as imports and initialisation.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_perception.support.errors import UserError
from scaling_perception.support.files import read_json
from scaling_perception.training.record import SPENT, close_killed, seconds_of

CAUSES: tuple[str, ...] = ("step", "compile", "restore", "data_wait", "checkpoint", "evaluate")
_TOLD = {
    "step": "training",
    "compile": "compiling",
    "restore": "restoring",
    "data_wait": "waiting for data",
    "checkpoint": "saving",
    "evaluate": "evaluating",
    "lost": "steps done again",
    "down": "between attempts",
    "other": "starting and other",
}


_HUNGRY = 0.3  # share of the time waiting for data from which a line says how to mend it


def waiting_advice(share: float, config: Any) -> str | None:
    """What to do about waiting for data, or None where it takes little of the time.

    Args:
        share: of the time between two reports.
        config: of the run.
    """
    if not share > _HUNGRY:
        return None
    data = config.get("data", {})
    online = bool(data.get("mixture")) and not data.get("cache")
    mend = (
        "encode the data once (`scaling-perception prepare … --latents`) and train from that (--config.data.cache=DIR)"
        if online
        else "read with more processes (--config.data.workers=N), or from a faster disk"
    )
    return f"waiting for data takes {share:.0%} of the time: {mend}"


class Clock:
    """Shares the wall time of an attempt out among causes, from when it was made.

    ``spend`` may be nested: what an inner cause takes is not the outer one's, so a whole loop can be "step" and the
    waiting for data within it "data_wait".
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._begin = self._mark = now()
        self._stack: list[str] = []
        self._seconds = dict.fromkeys(CAUSES, 0.0)

    @contextlib.contextmanager
    def spend(self, cause: str) -> Iterator[None]:
        """The block's time goes to ``cause``: one of ``CAUSES``, or ``other`` (for what lies within another block)."""
        if cause not in (*CAUSES, "other"):
            raise ValueError(f"unknown cause '{cause}': one of {', '.join(CAUSES)}, other")
        self._settle()
        self._stack.append(cause)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def _settle(self) -> None:
        now = self._now()
        if self._stack and self._stack[-1] != "other":
            self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now

    def totals(self) -> dict[str, float]:
        """Cause -> seconds until now; ``other`` is what no block claimed, so that all add up to the wall time."""
        self._settle()
        return {**self._seconds, "other": max(self._mark - self._begin - sum(self._seconds.values()), 0.0)}

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return self._now() - self._begin

    def row(self) -> dict[str, float]:
        """``totals`` as fields of a row of ``metrics.jsonl``: ``spent_step``, …"""
        return {SPENT + name: round(value, 3) for name, value in self.totals().items()}

    def report(self) -> dict[str, dict[str, float]]:
        """``seconds`` and ``shares`` of this attempt by cause."""
        seconds = self.totals()
        whole = sum(seconds.values()) or 1.0
        return {"seconds": seconds, "shares": {name: value / whole for name, value in seconds.items()}}


def account(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Goodput of a run by the closed attempts of its record.

    Args:
        attempts: oldest first, each with start_step, end_step, started, ended, why and spent (cause -> seconds).

    Returns:
        wall_seconds; goodput (share); seconds and shares by cause (``step``: only what was kept; they add up to the
        wall time and to 1); steps: done, kept, lost; attempts: how many ended in each way.
    """
    after = [index for index, attempt in enumerate(attempts) if attempt["why"] == "finished"]
    idle = {id(one) for one in attempts[after[0] + 1 :] if one["end_step"] == one["start_step"]} if after else set()
    attempts = [attempt for attempt in attempts if id(attempt) not in idle]  # only looked in, long after the end
    seconds: dict[str, float] = dict.fromkeys((*CAUSES, "lost", "down", "other"), 0.0)
    steps = {"done": 0, "kept": 0, "lost": 0}
    endings: dict[str, int] = {}
    for index, attempt in enumerate(attempts):
        begin, end = seconds_of(attempt["started"]), seconds_of(attempt["ended"])
        wall = max(end - begin, 0.0)
        spent = {cause: float(attempt["spent"].get(cause, 0.0)) for cause in CAUSES}
        named = sum(spent.values())
        if named > wall:  # the two clocks differ by a little; a wall clock may even be set back
            spent = {cause: value * wall / named for cause, value in spent.items()}
        first, last = attempt["start_step"], attempt["end_step"]
        done = max(last - first, 0)
        kept = max(min([last, *(later["start_step"] for later in attempts[index + 1 :])]) - first, 0)
        lost = spent["step"] * (done - kept) / done if done else 0.0
        for cause, value in spent.items():
            seconds[cause] += value
        seconds["step"] -= lost
        seconds["lost"] += lost
        seconds["other"] += max(wall - named, 0.0)
        if index + 1 < len(attempts):
            seconds["down"] += max(seconds_of(attempts[index + 1]["started"]) - end, 0.0)
        steps = {"done": steps["done"] + done, "kept": steps["kept"] + kept, "lost": steps["lost"] + done - kept}
        endings[attempt["why"]] = endings.get(attempt["why"], 0) + 1
    wall = sum(seconds.values())
    shares = {cause: value / wall if wall else 0.0 for cause, value in seconds.items()}
    told = {"wall_seconds": wall, "goodput": shares["step"], "seconds": seconds, "shares": shares}
    return {**told, "steps": steps, "attempts": endings}


def goodput_report(workdir: Path) -> dict[str, Any]:
    """``account`` of the run in ``workdir``, and its ``cost``.

    An attempt that is still open, running or killed, counts until the last row of ``metrics.jsonl``.

    Raises:
        UserError: there is no ``run.json``.
    """
    record = read_json(workdir / "run.json")
    attempts = [dict(attempt) for attempt in record["attempts"]]
    if attempts and attempts[-1]["why"] is None:
        close_killed(attempts[-1], workdir / "metrics.jsonl")
        attempts[-1]["why"] = "running or killed"
    return {**account(attempts), "cost": record["cost"]}


def goodput_table(report: Mapping[str, Any]) -> str:
    """``goodput_report`` as a few lines of text; causes that took no time are left out."""
    from scaling_perception.training.writer import duration

    endings = ", ".join(f"{count} {why}" for why, count in report["attempts"].items())
    steps = report["steps"]
    lines = [
        f"goodput {report['goodput']:.1%} of {duration(report['wall_seconds'])}; attempts: {endings or 'none'}",
        f"steps: {steps['kept']} kept, {steps['lost']} done again; {report['cost']['device_hours']:.3g} device-hours",
    ]
    for cause, share in sorted(report["shares"].items(), key=lambda item: -item[1]):
        if share > 0:
            lines.append(f"  {_TOLD[cause]:<20} {share:7.2%}  {duration(report['seconds'][cause])}")
    return "\n".join(lines)


def goodput_tables(folder: Path) -> dict[str, str]:
    """Folder (as seen from ``folder``; its own name for itself) of each run that was started -> ``goodput_table``."""
    tables = {}
    for path in sorted(folder.rglob("run.json")):
        try:
            report = goodput_report(path.parent)
        except (KeyError, TypeError, ValueError, UserError):
            continue  # another program's, or of a version with other fields
        if report["attempts"]:
            below = path.parent.relative_to(folder)
            tables[str(below) if below.parts else folder.resolve().name] = goodput_table(report)
    return tables
