"""Pictures of one evaluated image: truth, and for every measured compute prediction, error and uncertainty."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scaling_perception.data.formats import write_image
from scaling_perception.evaluation.labels import ANSWERS
from scaling_perception.evaluation.sweep import Shown
from scaling_perception.inference.budgets import OWN
from scaling_perception.inference.predictor import Predictor
from scaling_perception.inference.settings import SETTINGS, Settings
from scaling_perception.tasks import get_task
from scaling_perception.tasks.base import Estimate
from scaling_perception.tasks.colours import heat


def panel_pictures(
    raw: Mapping[str, Any], estimate: Estimate, protocol: Mapping[str, Any], most: float | None = None
) -> dict[str, np.ndarray]:
    """image, prompt (where the task has one), truth, prediction, error, uncertainty, each uint8 (H, W, 3).

    Args:
        raw: the prepared sample.
        most: the uncertainty drawn in the brightest colour; None is the largest of this estimate.
    """
    drawn = get_task(protocol["task"]).panels(raw, estimate, protocol)
    return {"image": np.asarray(raw["image"]), **drawn, "uncertainty": heat(estimate.uncertainty, most)}


class PanelWriter:
    """Writes an image's pictures as soon as it is done, so that a run that goes on need not do it again.

    Args:
        out: the result, beside which the pictures lie in ``panels/``.
        times: also draw what sampling predicts at these times of 1000 to 0.
        seed: key of the noise.
    """

    def __init__(
        self, protocol: Mapping[str, Any], out: Path, predictor: Predictor, times: list[int], seed: int
    ) -> None:
        self.protocol, self.out, self.predictor, self.times, self.seed = protocol, out, predictor, times, seed

    def __call__(self, shown: Shown, number: int) -> dict[str, Any]:
        """The pictures of image ``number``; returns their names as the result's ``panels`` hold them.

        ``answers`` are the pictures of each cell, ``scales`` what their colours mean (``tasks.base.Scale``). All
        uncertainties of an image have one scale.
        """
        raw, task = shown.raw, get_task(self.protocol["task"])
        every = [shown.estimate, *(estimate for _, estimate in shown.answers)]
        most = max(float(np.max(estimate.uncertainty)) for estimate in every)
        scales = {name: scale._asdict() for name, scale in task.panel_scales(raw, self.protocol).items()}
        scales["uncertainty"] = {**scales.get("uncertainty", {}), "low": 0.0, "high": most, "colours": "inferno"}
        pictures = panel_pictures(raw, shown.estimate, self.protocol, most)
        entry: dict[str, Any] = {"key": str(raw["key"])}
        entry |= {name: self._write(number, name, pixels) for name, pixels in pictures.items()}
        for time, estimate in self._on_the_way(shown) if self.times else ():
            entry[f"t{time}"] = self._write(
                number, f"t{time}", panel_pictures(raw, estimate, self.protocol)["prediction"]
            )
        answers = []
        for cell, estimate in shown.answers:
            names = {name: entry[name] for name in ANSWERS if name in entry}
            if cell is not shown.cell:
                pictures, end = panel_pictures(raw, estimate, self.protocol, most), _cell_name(cell)
                names = {name: self._write(number, f"{end}_{name}", pictures[name]) for name in names}
            answers.append({"steps": cell["steps"], "ensemble": cell["ensemble"], **names})
        return {**entry, "cell": shown.cell, "answers": answers, "scales": scales}

    def _write(self, number: int, name: str, pixels: np.ndarray) -> str:
        found = f"panels/{self.out.stem}_{number:02d}_{name}.png"
        write_image(self.out.parent / found, pixels)
        return found

    def _on_the_way(self, shown: Shown) -> list[tuple[int, Any]]:
        """The prediction at each time, as `Predictor.intermediates` has it; of a grid without it at the nearest."""
        task, cell, raw = self.protocol["task"], shown.cell, shown.raw
        preset = None if cell["preset"] == OWN else cell["preset"]
        settings: dict[str, Any] = {name: cell[name] for name in SETTINGS if name in cell} | {"preset": preset}
        diffusion = self.predictor.choose_diffusion(preset, cell["spacing"])
        grid = np.asarray(Settings(**settings).tables(diffusion).t)
        nearest = {time: int(np.abs(grid - time).argmin()) for time in self.times}
        steps = sorted(set(nearest.values()))
        asks = get_task(task).prompt
        prompt = None if asks is None else raw.get(asks.field)
        found = self.predictor.intermediates(raw["image"], task, steps, self.seed, prompt, **settings)
        estimates = dict(zip(steps, found, strict=True))
        return [(time, estimates[step]) for time, step in nearest.items()]


def _cell_name(cell: Mapping[str, Any]) -> str:
    return f"s{cell['steps']}_n{cell['ensemble']}"
