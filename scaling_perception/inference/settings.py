"""How much compute a prediction gets and how it is spent, as plain data: what a person may turn."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import COUNT, NOT_NEGATIVE, POSITIVE, STEPS

if TYPE_CHECKING:  # JAX, which --help does not wait for
    from scaling_perception.diffusion.sampler import SamplerTables
    from scaling_perception.diffusion.schedules import DiffusionPreset


def setting(default: Any, kind: Callable[[str], Any], placeholder: str, text: str, unset: str = "") -> Any:
    """A field of ``Settings``, from which its flags and the table of docs/reference.md are made.

    Args:
        kind: converts the value of a flag; bool: the flag has none.
        unset: what None stands for, in words.
    """
    known = {"kind": kind, "placeholder": placeholder, "text": text, "default": unset or default}
    return dataclasses.field(default=default, metadata=known)


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
        cache: what stands in for the transformer's blocks in the steps that do not compute them: none, fora,
            taylorseer, l2p, or one of these with ``-trunk`` (``diffusion.caching``).
        cache_interval: every so many steps, from the first one on, the blocks are computed; 1 is without a cache.
    """

    steps: int = setting(10, STEPS, "T", "denoising steps")
    ensemble: int = setting(5, COUNT, "N", "members that are merged")
    preset: str | None = setting(None, str, "NAME", "timestep grid: fixed, paper, released", "the model's own")
    spacing: str | None = setting(None, str, "NAME", "spacing alone: leading, trailing, linspace", "the grid's")
    solver: str = setting("ddim", str, "NAME", "ddim (euler), ddpm, dpm++2m, unipc, heun, single")
    eta: float = setting(0.0, NOT_NEGATIVE, "X", "noise of ddim and dpm++2m: 0 none, 1 as much as ancestral sampling")
    clip: float | None = setting(None, POSITIVE, "X", "bound of the clean latent's estimate in each step", "none")
    reduce: str | None = setting(
        None, str, "NAME", "merging: depth lsq, median, minmax, marigold; flow and normals mean, median", "the first"
    )
    antithetic: bool = setting(False, bool, "", "members in pairs whose noise differs in sign alone")
    aspect: str = setting("squash", str, "NAME", "pictures that are not square: squash, letterbox, tile")
    tolerance: float | None = setting(
        None, NOT_NEGATIVE, "X", "adaptive members: stop an image once it would move by less than this", "all members"
    )
    first: int = setting(2, COUNT, "N", "members of each round of adaptive members")
    step_tolerance: float | None = setting(
        None, NOT_NEGATIVE, "X", "early exit: stop an image's steps once it changes by less than this", "all steps"
    )
    step_chunk: int = setting(2, COUNT, "T", "steps between two looks of the early exit")
    cache: str = setting(
        "none",
        str,
        "NAME",
        "blocks between computed steps: none, fora, taylorseer, l2p, fora-trunk, taylorseer-trunk, l2p-trunk",
    )
    cache_interval: int = setting(2, COUNT, "K", "with a cache: compute the blocks every so many steps")

    def __post_init__(self) -> None:
        from scaling_perception.diffusion.caching import NO_CACHE, cache_name
        from scaling_perception.diffusion.solvers import SOLVERS, solver_name
        from scaling_perception.inference.aspect import check_aspect

        check_aspect(self.aspect)
        object.__setattr__(self, "solver", solver_name(self.solver))  # an alias is recorded by the one name
        object.__setattr__(self, "cache", cache_name(self.cache))
        for name in ("ensemble", "first", "step_chunk", "cache_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give a whole number above 0")
        for name in ("tolerance", "step_tolerance"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise UserError(f"{name} {value}: give a number of 0 or more, or leave it out")
        if self.step_tolerance is not None and (self.eta or SOLVERS[self.solver].draws):
            raise UserError(f"step_tolerance goes with solvers without noise: eta 0, and not {self.solver}")
        if self.step_tolerance is not None and self.evaluations != self.steps:
            raise UserError(f"step_tolerance goes with one evaluation a step: leave it out, or solver '{self.solver}'")
        if self.cache != NO_CACHE and self.step_tolerance is not None:
            raise UserError(f"cache '{self.cache}' does not go with step_tolerance: leave out one of them")
        if self.cache != NO_CACHE and SOLVERS[self.solver].evaluations(9) != 9:
            raise UserError(
                f"cache '{self.cache}' goes with solvers of one evaluation a step: leave it out, or solver "
                f"'{self.solver}'"
            )

    @property
    def adaptive(self) -> bool:
        """Whether images may get different numbers of members or steps."""
        return self.tolerance is not None or self.step_tolerance is not None

    @property
    def evaluations(self) -> int:
        """Network evaluations of one member."""
        from scaling_perception.diffusion.solvers import evaluations

        return evaluations(self.solver, self.steps)

    def tables(self, diffusion: DiffusionPreset) -> SamplerTables:
        """The sampler's table for a model's diffusion on the chosen grid; the cache is put in by `Model.tables`.

        Raises:
            UserError: a value that the solver does not take, or a single step that would return amplified noise.
        """
        from scaling_perception.diffusion.sampler import sampler_tables
        from scaling_perception.diffusion.solvers import refuse_amplified

        return refuse_amplified(sampler_tables(diffusion, self.steps, self.eta, solver=self.solver, clip=self.clip))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dataclasses.asdict(self)


SETTINGS = {one.name: one.metadata for one in dataclasses.fields(Settings)}
"""Name of each setting -> ``kind``, ``placeholder``, ``text`` and ``default`` of its flag."""


def flag_of(name: str) -> str:
    """``--step-chunk`` for ``step_chunk``."""
    return "--" + name.replace("_", "-")


def help_of(name: str) -> str:
    """A setting in words, with its default."""
    one = SETTINGS[name]
    return one["text"] if one["kind"] is bool else f"{one['text']} (default: {one['default']})"


def add_setting(parser: Any, name: str) -> None:
    """The flag of one setting; None where it was not given."""
    one = SETTINGS[name]
    if one["kind"] is bool:
        parser.add_argument(flag_of(name), action="store_true", default=None, help=one["text"])
    else:
        parser.add_argument(flag_of(name), type=one["kind"], metavar=one["placeholder"], help=help_of(name))


def add_several(parser: argparse.ArgumentParser, name: str, usual: str | None = None) -> None:
    """The flag of a setting of which a sweep takes several values, with commas between them."""
    text = f"{SETTINGS[name]['text']}; several, with commas (default: {usual or SETTINGS[name]['default']})"
    parser.add_argument(flag_of(name), default=usual, metavar=f"{SETTINGS[name]['placeholder']},…", help=text)
