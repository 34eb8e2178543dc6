"""What a run tells: one JSON line and TensorBoard scalars per report; a bar on a terminal, plain lines elsewhere.

On request the same goes to Weights & Biases (``train.wandb=PROJECT``, extra ``wandb``).
"""

import hashlib
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from scaling_perception.support.chips import peak_flops as peak_flops
from scaling_perception.support.errors import UserError
from scaling_perception.support.files import write_text

_SHOWN = {"loss": "loss", "held_out_loss": "held out", "lr": "lr", "grad_norm": "grad"}
_SHOWN |= {"samples_per_second": "samples/s", "mfu": "MFU"}
_HIDDEN = ("time", "spent_")  # begin fields that are for goodput.py: in the rows alone, for no curve is in them


class Pace:
    """How long steps take, and what that is of the devices' peak.

    Steps are told by ``tick`` when the host has seen their result. The device works ahead of the host by a step, so
    one interval says little about one step and the percentiles of a window much about all.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._mark = now()
        self._seconds: list[float] = []

    def resume(self) -> None:
        """What came since the last tick was no training (compiling, saving, evaluating): the next step begins now."""
        self._mark = self._now()

    def leave_out(self, seconds: float) -> None:
        """So much of the time since the last tick was no training, in the midst of a step."""
        self._mark += seconds

    def tick(self) -> None:
        """One more step is done."""
        now = self._now()
        self._seconds.append(now - self._mark)
        self._mark = now

    def row(
        self, samples: int, macs: float = 0.0, devices: int = 1, kind: str = "", tokens: int = 0
    ) -> dict[str, float]:
        """What is told of the steps since the last row; forgets them.

        Args:
            samples: of one step, over all devices.
            macs: forward multiply-accumulates of one sample; 0 where they are not counted.
            devices, kind: how many, and their ``device_kind``.
            tokens: of one sample.

        Returns:
            seconds_per_step (mean), samples_per_second, step_seconds_p50, _p90, _p99; tokens_per_second if there are
            tokens; and if macs and peak are known ``mfu``: three passes (forward, backward) of two FLOPs for each MAC
            over the dense bfloat16 peak. Work done twice to save memory does not count. {} if no step was done.
        """
        seconds, self._seconds = np.asarray(self._seconds), []
        if not seconds.size:
            return {}
        mean = max(float(seconds.mean()), 1e-9)
        told = {"seconds_per_step": mean, "samples_per_second": samples / mean}
        for percent in (50, 90, 99):
            told[f"step_seconds_p{percent}"] = float(np.percentile(seconds, percent))
        if tokens:
            told["tokens_per_second"] = tokens * samples / mean
        peak = peak_flops(kind)
        if macs and peak:
            told["mfu"] = 3 * 2 * macs * samples / mean / (devices * peak)
        return told


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
        wandb: project of Weights & Biases to tell, too; "" = none. Its environment variables hold, such as
            WANDB_MODE=offline.
        config: what Weights & Biases shows as the run's settings.

    Raises:
        UserError: Weights & Biases is wanted and is not installed, or cannot start.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        total: int,
        label: str = "train",
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        from tensorboardX import SummaryWriter

        self._wandb = _wandb_run(wandb, workdir, config or {}) if wandb else None

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
        """Record ``values`` (finite floats) for ``step`` finished steps, and the time.

        Raises:
            UserError: the disk is full.
        """
        row = {"step": step, **values, "time": round(time.time(), 3)}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            why = error.strerror or error
            text = f"cannot write {self._file.name}: {why}; free space and run the same command again"
            raise UserError(text) from error
        curves = {name: value for name, value in values.items() if not name.startswith(_HIDDEN)}
        for name, value in curves.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **curves})
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
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
    """The run of Weights & Biases that belongs to this folder: a resumed training goes on in the same one."""
    try:
        wandb = importlib.import_module("wandb")  # an extra: the checker of types may not find it
    except ImportError:
        raise UserError("train.wandb needs Weights & Biases: pip install 'scaling-perception[wandb]'") from None
    marked = hashlib.blake2b(str(workdir.resolve()).encode(), digest_size=8).hexdigest()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=project, dir=str(workdir), id=marked, name=workdir.name, resume="allow", config=dict(config)
        )
    except Exception as error:  # it has many kinds of its own, such as for a missing key
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"train.wandb={project}: {why}; log in, set WANDB_MODE=offline, or leave it out") from error
    run.define_metric("*", step_metric="step")  # steps that are done again are told again; its own counter only grows
    return run


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
    write_text(path, "".join(line + "\n" for line in keep))  # at no moment are the kept rows in memory alone
    return path.open("a", encoding="utf-8")


def duration(seconds: float) -> str:
    """``90`` -> ``1m30s``; ``4000`` -> ``1h06m``."""
    whole = max(int(round(seconds)), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
