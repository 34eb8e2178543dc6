"""What the figures of an evaluation are called on pages: metrics, settings, trivial answers, amounts of compute."""

import html
from collections.abc import Iterable, Sequence

from scaling_perception.tasks import TASKS
from scaling_perception.tasks.base import Metric

# The metric a task is judged by, how it is written, and whether less is better.
MAIN_METRIC = {name: task.main for name, task in TASKS.items() if task.main is not None}
BASELINE_NAMES = {
    **{name: words for task in TASKS.values() for name, words in task.baseline_names.items()},
    "threshold": "thresholding the true picture (ceiling)",
    "autoencoder": "autoencoder round trip of the truth (floor)",
}
LIMITS = ("autoencoder", "threshold")
"""Answers made of the truth: no model of this kind can be expected to pass them."""

ANSWERS = ("prediction", "error", "uncertainty")
"""The pictures of an image that differ with compute; the others are of the sample."""

_METRICS = {
    "abs_rel": "AbsRel",
    "delta1": "δ < 1.25",
    "delta2": "δ < 1.25²",
    "delta3": "δ < 1.25³",
    "sq_rel": "SqRel (m)",
    "rmse": "RMSE (m)",
    "rmse_log": "RMSE of log",
    "log10": "log10 error",
    "silog": "SILog",
    "i_rmse": "iRMSE (1/m)",
    "epe": "EPE (px)",
    "epe_fitted": "EPE after a fit (px)",
    "epe_noc": "EPE, visible (px)",
    "epe_occ": "EPE, occluded (px)",
    "f1_all": "outliers",
    "fl_all": "outliers (KITTI)",
    "iou": "IoU",
    "dice": "Dice",
    "iou_painted": "IoU, painted mask alone",
    "iou_joined": "IoU, with the visible part",
    "mean_angle": "mean angle (°)",
    "median_angle": "median angle (°)",
}
_LESS, _MORE = "less is better", "more is better"


def metric_label(name: str) -> str:
    """A metric as people write it, with its unit: ``AbsRel`` for ``abs_rel``."""
    return _METRICS.get(name, name.replace("_", " "))


def better_words(metric: Metric) -> str:
    """Which way is better."""
    return _LESS if metric.less_is_better else _MORE


def baseline_label(name: str, less_is_better: bool) -> str:
    """A trivial answer or limit in words; a limit of a share is a ceiling, one of an error a floor."""
    words = BASELINE_NAMES.get(name, name.replace("_", " "))
    kinds = ("ceiling", "floor") if less_is_better else ("floor", "ceiling")
    return words.replace(f"({kinds[0]})", f"({kinds[1]})")


def counted(count: float, noun: str) -> str:
    """``1 step``, ``5 steps``."""
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def setting(steps: float, size: float) -> str:
    """A setting of compute in words."""
    return f"{counted(steps, 'step')} × {counted(size, 'member')}"


class Unit:
    """A unit of multiply-accumulates in which the smallest of ``amounts`` is at least 1: kMAC, MMAC, GMAC, TMAC, …"""

    def __init__(self, amounts: Iterable[float]) -> None:
        smallest = min((amount for amount in amounts if amount > 0), default=1e9)
        names = ("MAC", "kMAC", "MMAC", "GMAC", "TMAC", "PMAC", "EMAC")
        power = next((i for i in range(len(names) - 1, 0, -1) if smallest >= 1000**i), 0)
        self.name, self.size = names[power], 1000.0**power

    def text(self, amount: float) -> str:
        """The amount in this unit with four digits, such as ``20.00`` or ``1,234``."""
        value = amount / self.size
        return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}".rstrip(".")


def macs_text(amount: float) -> str:
    """An amount with a unit of its own, ``83.0 MMAC``."""
    unit = Unit([amount])
    return f"{amount / unit.size:.3g} {unit.name}"


_TERMS = {
    "step": "One denoising step: each member starts from noise and is refined in so many steps.",
    "member, N": "One answer of its own, from its own noise. An ensemble of N members is merged into one prediction; "
    "their spread is the uncertainty.",
    "MAC": "A multiply-accumulate of the transformer's forward passes: one pass for each step, member and output of "
    "the task; the autoencoder is not counted. 1 GMAC = 1,000 MMAC = 10⁹ MACs.",
    "fixed": "Name of a grid of timesteps (also v_trailing): trailing, it starts at pure noise.",
    "v_trailing": "Name of a grid of timesteps: trailing, it starts at pure noise.",
    "paper": "Name of a grid of timesteps: leading, as in the paper; its first step is not at pure noise.",
    "released": "Name of a grid of timesteps: leading with an offset of 1, as in the authors' released pipeline.",
    "rectified": "Name of a grid of timesteps for rectified flow: steps of equal length.",
    "own": "The model's own grid of timesteps.",
    "constant compute": "The same steps and members for every image.",
    "adaptive members": "Members are added to an image until its prediction changes by less than a tolerance.",
    "early exit": "Steps end for an image once its estimate changes by less than a tolerance.",
    "[a, b]": "95 % bootstrap interval of the mean over images. Too few images (below 5) have none.",
    "paired difference": "The mean of each image's own difference: easy and hard images cancel, so that its interval "
    "is far narrower than those of the two means. “No clear change” means that it holds 0.",
    "answer without a model": "The best that can be said without looking (such as a constant fitted to the truth).",
    "floor, ceiling": "The truth itself, through the autoencoder and back: the model cannot be expected to pass it.",
    "blind, shuffled": "Controls: the model is given no picture, or another image's picture.",
}


def terms(used: Sequence[str]) -> str:
    """The list of terms as HTML: those in ``used``, in the order of the table."""
    found = [(name, words) for name, words in _TERMS.items() if name in used]
    return "<dl>" + "".join(f"<dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd>" for a, b in found) + "</dl>"
