"""Noise schedules, timestep grids and the presets that tie them together. Everything is float64 numpy on the host.

A schedule is two tables over the training timesteps t = 0..999, signal alpha_t and noise sigma_t: x_t = alpha_t x0 +
sigma_t eps. All but one preserve variance, alpha^2 + sigma^2 = 1; they are given by ``alpha_bar`` = alpha^2
(``alphas_cumprod``). ``rectified`` is the straight path of rectified flow, alpha_t = 1 - sigma_t with sigma_t =
(t + 1) / 1000, whose velocity d x / d sigma = eps - x0 is constant along it (Liu et al. 2023, Lipman et al. 2023).

Traps, all of which the presets settle by name:

* The cosine schedule ends at alpha_bar_999 = 2.4e-9 (only its last beta hits the cap of 0.999). It is representable in
  float32, but ``1 - alpha_bar`` is then exactly 1, and near t = 0 the same subtraction in float32 keeps only three
  digits. Take the square roots in float64 (the sampler's tables do).
* Epsilon prediction on the trailing grid divides by sqrt(alpha_bar_999): a model error is multiplied by 2.0e4 (cosine,
  one step), 631 (cosine, 50 steps), 157 (linear, one step), 14.6 (Stable Diffusion's schedule, one step). Use the
  leading grid with epsilon, and v or x0 with trailing.
* The leading grid starts few-step sampling at a timestep that claims an almost clean input (t = 0 or 1 for one step)
  while the input is pure noise: one step then returns nearly nothing but noise. This is the flaw described by
  Garcia et al. 2024 ("Fine-tuning image-conditional diffusion models is easier than you think").
* The last step goes to alpha_bar = 1 (``final_alpha_one``) or to alpha_bar_0, as Stable Diffusion's scheduler does.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from scaling_perception.support.errors import UserError, did_you_mean

TRAIN_STEPS = 1000
"""Training timesteps of every schedule (t = 0..999)."""

SCHEDULES = ("linear", "scaled_linear", "scaled_linear_default", "cosine", "rectified")
PREDICTIONS = ("epsilon", "v", "x0", "velocity")
SPACINGS = ("leading", "trailing", "linspace")
LEARNED = "learned"  # the timesteps are given to the sampler: a model's own, found by ``evaluation.grid_table``

# Names that other libraries' scheduler files use for the same things.
_SCHEDULE_ALIASES = {"squaredcos_cap_v2": "cosine"}
_PREDICTION_ALIASES = {"v_prediction": "v", "sample": "x0", "eps": "epsilon"}


def choose_name(kind: str, word: Any, options: Collection[str], aliases: dict[str, str]) -> str:
    """The option that ``word`` names, by itself or by an alias.

    Raises:
        UserError: it names none.
    """
    found = aliases.get(str(word), str(word))
    if found not in options:
        raise UserError(f"unknown {kind} '{word}'{did_you_mean(str(word), (*options, *aliases))}")
    return found


def betas(name: str) -> Float[np.ndarray, "1000"]:
    """The noise variances added at each training step.

    Args:
        name: ``linear`` (1e-4 to 0.02, DiT's pre-training), ``scaled_linear`` (0.00085 to 0.012, linear in the square
            root, Stable Diffusion), ``scaled_linear_default`` (the same with 1e-4 to 0.02, the default numbers of
            diffusers), ``cosine`` (alias ``squaredcos_cap_v2``; Nichol & Dhariwal 2021, capped at 0.999).

    Returns:
        float64 (1000,).

    Raises:
        UserError: the name is unknown.
    """
    name = choose_name("schedule", name, SCHEDULES, _SCHEDULE_ALIASES)
    if name == "rectified":
        raise UserError("schedule 'rectified' has no betas: it does not preserve variance")
    if name == "linear":
        return np.linspace(1e-4, 0.02, TRAIN_STEPS)
    if name == "scaled_linear":
        return np.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS) ** 2
    if name == "scaled_linear_default":
        return np.linspace(1e-4**0.5, 0.02**0.5, TRAIN_STEPS) ** 2
    edges = np.arange(TRAIN_STEPS + 1) / TRAIN_STEPS
    signal = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999)


def alphas_cumprod(name: str) -> Float[np.ndarray, "1000"]:
    """alpha_bar of a named schedule, float64 (1000,), falling with t.

    Raises:
        UserError: the name is unknown (names as in `betas`).
    """
    return np.cumprod(1 - betas(name))


def rectified_flow() -> tuple[Float[np.ndarray, "1000"], Float[np.ndarray, "1000"]]:
    """Signal 1 - sigma and noise sigma = (t + 1) / 1000 of the straight path, float64 (1000,) each; sigma ends at 1."""
    noise = np.arange(1, TRAIN_STEPS + 1) / TRAIN_STEPS
    return 1 - noise, noise


def zero_snr(alpha_bar: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """Shift and scale sqrt(alpha_bar) so that the last timestep carries no signal (Lin et al. 2024, algorithm 1).

    Args:
        alpha_bar: (T,) falling.

    Returns:
        float64 (T,): the first entry unchanged, the last exactly 0. Epsilon prediction is undefined at the last entry.
    """
    root = np.sqrt(np.asarray(alpha_bar, np.float64))
    return np.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))


def timestep_grid(
    spacing: str, steps: int, steps_offset: int = 0
) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """The timesteps that a sampler of ``steps`` steps visits, and where each step goes.

    ``leading``: {i * (1000 // steps) + steps_offset}, from the top. ``trailing``: round(1000 - i * 1000 / steps) - 1,
    always starting at 999. ``linspace``: round(linspace(0, 999, steps)), from the top; one step runs at t = 0.
    ``steps_offset`` moves the leading grid only.

    Where this differs from diffusers: there each step goes to t - 1000 // steps in every spacing. That is the next grid
    point for leading, and for trailing only if ``steps`` divides 1000; otherwise, and for linspace, the sample is moved
    to a noise level at which the model is then not evaluated. Here ``t_next`` is always the next point of the grid, and
    the last step always leaves the schedule (-1). (Leading with an offset at or above the stride, which happens for
    more than 500 steps at offset 1, ends at -1 here and at t = 0 there.) The trailing grid is computed from integers;
    ``arange`` with a fractional stride can return one point too many.

    Returns:
        (t, t_next): int64 (steps,), strictly falling in 0..999, and the same shifted by one with -1 at the end.

    Raises:
        UserError: unknown spacing, steps outside 1..1000, or an offset that pushes the grid outside the schedule.
    """
    spacing = choose_name("timestep spacing", spacing, SPACINGS, {})
    steps, steps_offset = int(steps), int(steps_offset)
    if not 1 <= steps <= TRAIN_STEPS:
        raise UserError(f"{steps} sampling steps: choose between 1 and {TRAIN_STEPS}")
    index = np.arange(steps)
    if spacing == "leading":
        t = (index * (TRAIN_STEPS // steps))[::-1] + steps_offset
    elif spacing == "trailing":
        t = np.round(TRAIN_STEPS * (steps - index) / steps).astype(np.int64) - 1
    else:
        t = np.round(np.linspace(0, TRAIN_STEPS - 1, steps)).astype(np.int64)[::-1]
    if t[0] >= TRAIN_STEPS or t[-1] < 0:
        raise UserError(
            f"{steps} leading steps with steps_offset {steps_offset} leave the schedule 0..{TRAIN_STEPS - 1}: "
            "use fewer steps or steps_offset 0"
        )
    t = np.ascontiguousarray(t, np.int64)
    return t, np.append(t[1:], -1)


@dataclasses.dataclass(frozen=True)
class DiffusionPreset:
    """What a diffusion model was trained for and how it is sampled. Hashable; ``dataclasses.asdict`` is JSON-able.

    Attributes:
        schedule: a name of `betas`.
        prediction: what the network returns: ``epsilon``, ``v`` = alpha eps - sigma x0, ``x0``, or ``velocity`` =
            eps - x0.
        spacing: the sampler's grid, see `timestep_grid`; or ``learned``, of a sampler that is given one.
        steps_offset: added to the leading grid.
        final_alpha_one: the last step goes to alpha = 1; otherwise to alpha_0.
        zero_snr: rescale the schedule with `zero_snr`.

    Raises:
        UserError: an unknown name, epsilon where nothing of x0 is left at t = 999 (zero_snr, ``rectified``), or
            what ``rectified`` does not have (v, zero_snr).
    """

    schedule: str = "cosine"
    prediction: str = "v"
    spacing: str = "trailing"
    steps_offset: int = 0
    final_alpha_one: bool = True
    zero_snr: bool = False

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen; aliases are replaced by the one name we use
        set_field(self, "schedule", choose_name("schedule", self.schedule, SCHEDULES, _SCHEDULE_ALIASES))
        set_field(self, "prediction", choose_name("prediction", self.prediction, PREDICTIONS, _PREDICTION_ALIASES))
        set_field(self, "spacing", choose_name("timestep spacing", self.spacing, (*SPACINGS, LEARNED), {}))
        if self.zero_snr and self.prediction == "epsilon":
            raise UserError("prediction 'epsilon' cannot be used with zero_snr: use 'v' or 'x0', or zero_snr=False")

        if self.schedule == "rectified":
            if self.zero_snr:
                raise UserError("schedule 'rectified' ends in pure noise by itself: leave zero_snr at False")
            if self.prediction in ("epsilon", "v"):
                raise UserError(f"prediction '{self.prediction}' does not go with schedule 'rectified': use 'velocity'")

    def levels(self) -> tuple[Float[np.ndarray, "1000"], Float[np.ndarray, "1000"]]:
        """(alpha, sigma) by timestep, ``zero_snr`` applied, float64 (1000,) each; see the module."""
        if self.schedule == "rectified":
            return rectified_flow()
        table = alphas_cumprod(self.schedule)
        table = zero_snr(table) if self.zero_snr else table
        return np.sqrt(table), np.sqrt(1 - table)

    def alphas_cumprod(self) -> Float[np.ndarray, "1000"]:
        """alpha_bar with ``zero_snr`` applied, float64 (1000,).

        Raises:
            UserError: the schedule does not preserve variance.
        """
        table = alphas_cumprod(self.schedule)
        return zero_snr(table) if self.zero_snr else table


PRESETS: dict[str, DiffusionPreset] = {
    # The paper's text: cosine schedule, epsilon loss; diffusers' default (leading) spacing.
    "paper": DiffusionPreset("cosine", "epsilon", "leading", steps_offset=0, final_alpha_one=True),
    # What the authors' released pipeline loads: the scheduler file of Stable Diffusion 2.
    "released": DiffusionPreset("scaled_linear", "v", "leading", steps_offset=1, final_alpha_one=False),
    # Default of new training: the grid starts at pure noise, and the target is well scaled there.
    "fixed": DiffusionPreset("cosine", "v", "trailing", steps_offset=0, final_alpha_one=True),
    # Rectified flow: the straight path and its velocity; a trailing grid takes steps of equal length.
    "rectified": DiffusionPreset("rectified", "velocity", "trailing", steps_offset=0, final_alpha_one=True),
}
PRESETS["v_trailing"] = PRESETS["fixed"]  # the name that says what it is


def get_diffusion(name: str, **changes: Any) -> DiffusionPreset:
    """A preset by name (``paper``, ``released``, ``fixed`` or ``v_trailing``, ``rectified``), with fields changed.

    Raises:
        UserError: unknown preset, field, or value.
    """
    if name not in PRESETS:
        raise UserError(f"unknown diffusion preset '{name}'{did_you_mean(name, PRESETS)}")
    fields = [field.name for field in dataclasses.fields(DiffusionPreset)]
    for word in changes:
        if word not in fields:
            raise UserError(f"unknown diffusion setting '{word}'{did_you_mean(word, fields)}")
    return dataclasses.replace(PRESETS[name], **changes)
