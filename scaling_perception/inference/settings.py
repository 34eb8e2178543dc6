"""How much compute a prediction gets and how it is spent, as plain data: what a person may turn."""

import dataclasses
from typing import Any

from scaling_perception.diffusion.sampler import SamplerTables, sampler_tables
from scaling_perception.diffusion.schedules import DiffusionPreset
from scaling_perception.diffusion.solvers import SOLVERS, evaluations, refuse_amplified, solver_name
from scaling_perception.inference.aspect import check_aspect
from scaling_perception.support.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a prediction. JSON-able (``dataclasses.asdict``).

    Attributes:
        steps: denoising steps T, 1..1000; the most of them with ``step_tolerance``.
        ensemble: members N; the most of them with ``tolerance``.
        preset: grid of timesteps: ``fixed`` (trailing), ``paper`` (leading), ``released`` (leading, offset 1); None is
            the model's own. Schedule and prediction type are always the model's own: at the same timestep another
            schedule would mean another noise level than the model was trained on.
        spacing: the grid's spacing alone: leading, trailing or linspace.
        solver: ddim (also called euler), ddpm, dpm++2m, unipc, heun or single (``diffusion.solvers``).
        eta: noise of ddim and dpm++2m: 0 none, 1 as much as ancestral sampling.
        clip: bound of the clean latent's estimate in each step, None for none.
        reduce: how members are merged: depth lsq (default), median, minmax, marigold; flow mean (default), median;
            amodal median.
        antithetic: members come in pairs whose noise differs in sign alone.
        aspect: ``squash``, ``letterbox`` or ``tile`` (``inference.aspect``).
        tolerance: adaptive ensembling: an image gets no further members once the prediction is expected to be within
            this root-mean-square distance of what all N would give (depth: of the range [0, 1]; flow: pixels of the
            model's frame; amodal: of [-1, 1] colours). None gives every image all N.
        first: members of an adaptive ensemble's first round, and of each further one.
        step_tolerance: early exit: an image takes no further steps once its clean latent changes by less than this
            (root mean square, in the latents' training units) over ``step_chunk`` steps. None takes all.
        step_chunk: steps between two looks.
    """

    steps: int = 10
    ensemble: int = 5
    preset: str | None = None
    spacing: str | None = None
    solver: str = "ddim"
    eta: float = 0.0
    clip: float | None = None
    reduce: str | None = None
    antithetic: bool = False
    aspect: str = "squash"
    tolerance: float | None = None
    first: int = 2
    step_tolerance: float | None = None
    step_chunk: int = 2

    def __post_init__(self) -> None:
        check_aspect(self.aspect)
        object.__setattr__(self, "solver", solver_name(self.solver))  # an alias is recorded by the one name
        for name in ("ensemble", "first", "step_chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give a whole number above 0")
        for name in ("tolerance", "step_tolerance"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise UserError(f"{name} {value}: give a number of 0 or more, or leave it out")
        if self.step_tolerance is not None and (self.eta or SOLVERS[self.solver].draws):
            raise UserError(f"step_tolerance goes with solvers without noise: eta 0, and not {self.solver}")
        if self.step_tolerance is not None and self.evaluations != self.steps:
            raise UserError(f"step_tolerance goes with one evaluation a step: leave it out, or solver '{self.solver}'")

    @property
    def adaptive(self) -> bool:
        """Whether images may get different numbers of members or steps."""
        return self.tolerance is not None or self.step_tolerance is not None

    @property
    def evaluations(self) -> int:
        """Network evaluations of one member."""
        return evaluations(self.solver, self.steps)

    def tables(self, diffusion: DiffusionPreset) -> SamplerTables:
        """The sampler's table for a model's diffusion on the chosen grid.

        Raises:
            UserError: a value that the solver does not take, or a single step that would return amplified noise.
        """
        return refuse_amplified(sampler_tables(diffusion, self.steps, self.eta, solver=self.solver, clip=self.clip))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dataclasses.asdict(self)
