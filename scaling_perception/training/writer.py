"""What a run tells: one JSON line and TensorBoard scalars per report; a bar on a terminal, plain lines elsewhere."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from scaling_perception.support.errors import UserError

_SHOWN = {"loss": "loss", "lr": "lr", "grad_norm": "grad", "samples_per_second": "samples/s"}


class Window:
    """Means of the metrics between two reports."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take in the scalars of one step; NaN means "undefined here" (checked losses are never NaN) and is skipped."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._values.setdefault(name, []).append(float(value))

    def means(self) -> dict[str, float]:
        """Name -> mean over the steps where it was defined; empties the window."""
        means = {name: float(np.mean(values)) for name, values in self._values.items()}
        self._values = {}
        return means


class Writer:
    """The record of a run in ``workdir``: ``metrics.jsonl`` and ``tb/``; and what is shown meanwhile.

    Args:
        start: number of finished steps. Rows beyond it, left by an interrupted run, are dropped, so that each step is
            told once.
        total: steps of the whole run.
        label: what the progress is called.
    """

    def __init__(self, workdir: Path, start: int, total: int, label: str = "train") -> None:
        from tensorboardX import SummaryWriter

        self._file = _open_rows(workdir / "metrics.jsonl", start)
        self._board = SummaryWriter(str(workdir / "tb"), purge_step=start + 1 if start else None)
        self._label, self._total = label, total
        self._mark, self._mark_time = start, time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=label, dynamic_ncols=True)

    def begin(self) -> None:
        """The first step is about to run; what came before (compiling) is no measure of the time left."""
        self._mark_time = time.monotonic()
        if self._bar is not None:
            self._bar.unpause()

    def tick(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` (finite floats) for ``step`` finished steps.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            why = error.strerror or error
            text = f"cannot write {self._file.name}: {why}; free space and run the same command again"
            raise UserError(text) from error
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        shown = {label: f"{values[name]:.4g}" for name, label in _SHOWN.items() if name in values}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
        else:
            now = time.monotonic()
            pace = (now - self._mark_time) / max(step - self._mark, 1)
            self._mark, self._mark_time = step, now
            told = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"{self._label}: step {step}/{self._total}  {told}  {duration((self._total - step) * pace)} left")

    def say(self, line: str) -> None:
        """Show one line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush and close the files; a second time does nothing."""
        if self._file.closed:
            return
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._board.close()


def _open_rows(path: Path, start: int) -> TextIO:
    """Open the JSONL file to append after the rows of steps <= start; later rows and a torn last line are cut off."""
    keep: list[str] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    keep.append(line)
            except (ValueError, KeyError, TypeError):
                continue
    path.write_text("".join(line + "\n" for line in keep), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def duration(seconds: float) -> str:
    """``90`` -> ``1m30s``; ``4000`` -> ``1h06m``."""
    whole = max(int(round(seconds)), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
