"""How much compute a prediction gets and how it is spent, as plain data: what a person may turn."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from scaling_perception.support.errors import UserError, did_you_mean, short
from scaling_perception.support.verbs import (
    COUNT,
    MEMBERS,
    MOST_MEMBERS,
    NOT_NEGATIVE,
    POSITIVE,
    RENAMED,
    SEED,
    STEPS,
    add_mesh,
)

if TYPE_CHECKING:  # JAX, which --help does not wait for
    from scaling_perception.diffusion.sampler import SamplerTables
    from scaling_perception.diffusion.schedules import DiffusionPreset


def setting(
    default: Any,
    kind: Callable[[str], Any],
    placeholder: str,
    text: str,
    unset: str = "",
    swept: bool = False,
    goes_with: str = "",
) -> Any:
    """A field of ``Settings``, from which its flags and the table of docs/reference.md are made.

    Args:
        kind: converts the value of a flag; bool: the flag has none.
        unset: what None stands for, in words.
        swept: `evaluate` takes several values of it; of all others one, which all its cells share.
        goes_with: the setting without which this one has no effect.
    """
    known = {"kind": kind, "placeholder": placeholder, "text": text, "default": unset or default}
    return dataclasses.field(default=default, metadata=known | {"swept": swept, "goes_with": goes_with})


BY_BUDGET = ("steps", "ensemble", "preset", "spacing", "solver", "cache", "cache_interval", "merge_in", "views")
"""Settings that a model's table of budgets chooses (``inference.budgets``)."""
MERGES = ("pixels", "latents")
USES = ("best", "weighted", "allocate")
ALIASES: dict[str | None, str] = {"v_trailing": "fixed", "least-squares": "lsq"}
"""The telling name of a preset or a way of merging -> the one that files of every version hold."""


_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a finite number"),
    "str": (str, "a text"),
    "bool": (bool, "True or False"),
}
"""Type of a field -> the values it takes, in Python and in words."""


def _is_kind(value: Any, kind: str) -> bool:
    if not isinstance(value, _KINDS[kind][0]) or (isinstance(value, bool) and kind != "bool"):
        return False
    return not isinstance(value, float) or math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a prediction. JSON-able (``dataclasses.asdict``).

    Attributes:
        steps: denoising steps T, 1..1000; the most of them with ``step_tolerance``.
        ensemble: members N; the most of them with ``tolerance``.
        preset: grid of timesteps: ``v_trailing`` (trailing; recorded as ``fixed``), ``paper`` (leading), ``released``
            (leading, offset 1); None is the model's own. Schedule and prediction type are always the model's own:
            at the same timestep another schedule would mean another noise level than the model was trained on.
        spacing: the grid's spacing alone: leading, trailing, linspace, or learned: the model's own timesteps for the
            task and the number of steps (``inference.grids``).
        solver: ddim (also called euler), ddpm, dpm++2m, unipc, heun or single (``diffusion.solvers``).
        eta: noise of ddim and dpm++2m: 0 none, 1 as much as ancestral sampling.
        clip: bound of the clean latent's estimate in each step, None for none.
        reduce: how members are merged: depth least-squares (default; recorded as lsq), median, minmax, marigold; flow
            mean (default), median; amodal median.
        antithetic: members come in pairs whose noise differs in sign alone.
        views: what members see: ``plain``, the picture, or ``flip``, every second one its mirror image
            (``inference.draws``).
        aspect: ``squash``, ``letterbox`` or ``tile`` (``inference.aspect``).
        tolerance: adaptive ensembling: an image gets no further members once the prediction is expected to be within
            this root-mean-square distance of what all N would give (depth: of the range [0, 1]; flow: pixels of the
            model's frame; amodal: of [-1, 1] colours). None gives every image all N.
        first: members of an adaptive ensemble's first round, and of each further one.
        step_tolerance: early exit: an image takes no further steps once its clean latent changes by less than this
            (root mean square, in the latents' training units) over ``step_chunk`` steps. None takes all.
        step_chunk: steps between two checks.
        cache: what stands in for the transformer's blocks in the steps that do not compute them: none, fora,
            taylorseer, l2p, or one of these with ``-trunk`` (``diffusion.caching``).
        cache_interval: every so many steps, from the first one on, the blocks are computed; 1 is without a cache.
        merge_in: where members are merged: ``pixels``, each member decoded, or ``latents``, their merged latents
            decoded once (``inference.latents``).
        verifier: a score of members that needs no truth: flow photometric, cycle; depth and normals edges; amodal
            visible; all agreement (``tasks.verifiers``).
        verify: what it is used for: best, weighted or allocate (``inference.verifying``); by ``allocate`` the
            ``tolerance`` is of the score.
    """

    steps: int = setting(10, STEPS, "T", "denoising steps", swept=True)
    ensemble: int = setting(5, MEMBERS, "N", "members that are merged", swept=True)
    preset: str | None = setting(
        None, str, "NAME", "timestep grid: v_trailing (in files: fixed), paper, released", "the model's own", swept=True
    )
    spacing: str | None = setting(
        None, str, "NAME", "spacing alone: leading, trailing, linspace, learned", "the grid's", swept=True
    )
    solver: str = setting("ddim", str, "NAME", "ddim (euler), ddpm, dpm++2m, unipc, heun, single", swept=True)
    eta: float = setting(0.0, NOT_NEGATIVE, "X", "noise of ddim and dpm++2m: 0 none, 1 as much as ancestral sampling")
    clip: float | None = setting(None, POSITIVE, "X", "bound of the clean latent's estimate in each step", "none")
    reduce: str | None = setting(
        None,
        str,
        "NAME",
        "merging: depth least-squares (in files: lsq), median, minmax, marigold; flow and normals mean, median",
        "the first",
    )
    antithetic: bool = setting(False, bool, "", "members in pairs whose noise differs in sign alone")
    views: str = setting(
        "plain", str, "NAME", "what members see: plain, or flip: every second one the mirror image", swept=True
    )
    aspect: str = setting("squash", str, "NAME", "pictures that are not square: squash, letterbox, tile")
    tolerance: float | None = setting(
        None,
        NOT_NEGATIVE,
        "X",
        "adaptive members: stop an image once it would move by less than this",
        "all members",
        swept=True,
    )
    first: int = setting(2, COUNT, "N", "members of each round of adaptive members", goes_with="tolerance")
    step_tolerance: float | None = setting(
        None,
        NOT_NEGATIVE,
        "X",
        "early exit: stop an image's steps once it changes by less than this",
        "all steps",
        swept=True,
    )
    step_chunk: int = setting(2, COUNT, "T", "steps between two checks of the early exit", goes_with="step_tolerance")
    cache: str = setting(
        "none",
        str,
        "NAME",
        "blocks between computed steps: none, fora, taylorseer, l2p, fora-trunk, taylorseer-trunk, l2p-trunk",
        swept=True,
    )
    cache_interval: int = setting(
        2, COUNT, "K", "with a cache: compute the blocks every so many steps", swept=True, goes_with="cache"
    )
    merge_in: str = setting(
        "pixels", str, "WHERE", "where members are merged: pixels, or latents, which are then decoded once", swept=True
    )
    verifier: str | None = setting(
        None,
        str,
        "NAME",
        "score without truth: flow photometric, cycle; depth, normals edges; amodal visible; all agreement",
        "none",
        swept=True,
    )
    verify: str = setting(
        "best",
        str,
        "USE",
        "its use: best member, weighted merge, or allocate members to scores above tolerance",
        swept=True,
        goes_with="verifier",
    )

    def __post_init__(self) -> None:
        from scaling_perception.diffusion.caching import NO_CACHE, cache_name
        from scaling_perception.diffusion.solvers import SOLVERS, solver_name
        from scaling_perception.inference.aspect import check_aspect
        from scaling_perception.inference.draws import VIEWS

        self._check_kinds()
        check_aspect(self.aspect)
        if self.views not in VIEWS:
            raise UserError(f"unknown views '{self.views}'{did_you_mean(self.views, VIEWS)}")
        object.__setattr__(self, "solver", solver_name(self.solver))  # an alias is recorded by the one name
        object.__setattr__(self, "cache", cache_name(self.cache))
        if self.merge_in not in MERGES:
            raise UserError(f"unknown merge_in '{self.merge_in}'{did_you_mean(self.merge_in, MERGES)}")
        if self.merge_in != "pixels" and self.adaptive:
            other = "step_tolerance" if self.tolerance is None else "tolerance"
            raise UserError(f"merge_in '{self.merge_in}' does not go with {other}: leave out one of them")
        if self.merge_in != "pixels" and self.views != "plain":
            raise UserError(
                f"merge_in '{self.merge_in}' does not go with views '{self.views}', whose members are mirrored back as "
                "pixels: leave out one of them"
            )
        self._check_verifier()
        for name in ("preset", "reduce"):
            object.__setattr__(self, name, ALIASES.get(getattr(self, name), getattr(self, name)))
        for name in ("ensemble", "first", "step_chunk", "cache_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give a whole number above 0")
        if self.ensemble > MOST_MEMBERS:
            raise UserError(f"ensemble {self.ensemble}: give {MOST_MEMBERS} at most")
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

    def _check_kinds(self) -> None:
        """UserError for a value of another type than its field's; numpy's numbers become Python's."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind, _, unset = str(field.type).partition(" | ")
            if hasattr(value, "item") and getattr(value, "shape", None) == ():
                object.__setattr__(self, field.name, value := value.item())
            if not (value is None and unset) and not _is_kind(value, kind):
                raise UserError(f"{field.name} {short(value)}: give {_KINDS[kind][1]}")

    def _check_verifier(self) -> None:
        if self.verify not in USES:
            raise UserError(f"unknown verify '{self.verify}'{did_you_mean(self.verify, USES)}")
        allocates = self.verify == "allocate"
        if self.verifier is None:
            if allocates:
                raise UserError("verify 'allocate' goes with verifier: give that too, or leave it out")
            return
        if self.merge_in != "pixels":
            raise UserError(f"merge_in '{self.merge_in}' does not go with verifier: leave out one of them")
        if self.step_tolerance is not None:
            raise UserError("verifier does not go with step_tolerance: leave out one of them")
        if allocates and self.tolerance is None:
            raise UserError("verify 'allocate' goes with tolerance, the score that is good enough: give that too")
        if not allocates and self.tolerance is not None:
            raise UserError(f"verify '{self.verify}' does not go with tolerance: leave it out, or choose allocate")

    @property
    def adaptive(self) -> bool:
        """Whether images may get different numbers of members or steps."""
        return self.tolerance is not None or self.step_tolerance is not None

    @property
    def views_seen(self) -> str:
        """``views``; ``plain`` where the only member sees the picture itself, so that nothing else is encoded."""
        return self.views if self.ensemble > 1 else "plain"

    @property
    def evaluations(self) -> int:
        """Network evaluations of one member."""
        from scaling_perception.diffusion.solvers import evaluations

        return evaluations(self.solver, self.steps)

    def reduce_for(self, task: str) -> str:
        """How members of a task are merged, by the name that is recorded.

        Raises:
            UserError: the task has no such way, none for latents, or not the verifier; or members are to be allocated
                by one that costs as much as they do.
        """
        from scaling_perception.tasks import get_task

        if self.verifier is not None:
            costs = get_task(task).verifier(self.verifier).reverse is not None
            if costs and self.verify == "allocate":
                raise UserError(
                    f"verify 'allocate' saves nothing by {self.verifier}, which predicts twice: choose another"
                )
        return get_task(task).reduce_mode(self.reduce, self.merge_in == "latents")

    def tables(self, diffusion: DiffusionPreset, grid: Any = None) -> SamplerTables:
        """The sampler's table for a model's diffusion on the chosen grid; the cache is put in by `Model.tables`.

        Args:
            grid: (t, t_next) of a learned grid.

        Raises:
            UserError: a value that the solver does not take, or a single step that would return amplified noise.
        """
        from scaling_perception.diffusion.sampler import sampler_tables
        from scaling_perception.diffusion.solvers import refuse_amplified

        return refuse_amplified(sampler_tables(diffusion, self.steps, self.eta, grid, self.solver, self.clip))

    @property
    def named(self) -> dict[str, Any]:
        """Those of ``NAMED`` that are not the default: what a cell of an evaluation says besides its place in the
        grid."""
        return {name: getattr(self, name) for name in NAMED if getattr(self, name) != getattr(Settings, name)}

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dataclasses.asdict(self)


NAMED = ("eta", "clip", "antithetic", "aspect", "merge_in", "verifier", "verify", "views")
LATER = ("merge_in", "verifier", "verify", "views")
"""Settings whose default is not recorded with a result: versions before them had no other."""
SETTINGS = {one.name: one.metadata for one in dataclasses.fields(Settings)}
"""Name of each setting -> the arguments of `setting`; ``default`` in words."""


def flag_of(name: str) -> str:
    """The flag of an argument: ``--step-tolerance`` for ``step_tolerance``."""
    return RENAMED.get(flag := "--" + name.replace("_", "-"), flag)


FLAGS = {name: flag_of(name) for name in SETTINGS if name != "first"}  # a common word: "of the first 5 images"
"""What messages of the library call by name -> the flag, in every verb that has the settings."""


def add_settings(parser: Any, sweep: bool = False) -> None:
    """The flags of all settings and of what else decides a prediction's figures; None where one was not given.

    Args:
        sweep: swept settings take several values, with commas between them, and keep them as text (see `values_of`).
    """
    for name, one in SETTINGS.items():
        flag, text, many = flag_of(name), one["text"], sweep and one["swept"]
        if one["kind"] is bool:
            parser.add_argument(flag, dest=name, action="store_true", default=None, help=text)
            continue
        kind, placeholder = (
            (_several(one["kind"]), f"{one['placeholder']},…") if many else (one["kind"], one["placeholder"])
        )
        text = f"{text}{'; several, with commas' if many else ''} (default: {one['default']})"
        parser.add_argument(flag, dest=name, type=kind, metavar=placeholder, help=text)
    parser.add_argument("--seed", type=SEED, help="key of all noise (default 0)")
    parser.add_argument("--batch-size", type=COUNT, metavar="N", help="images × members at once (default: by memory)")


def add_model_settings(parser: Any) -> None:
    """The flags of how a model is loaded, besides ``--model``; None where one was not given."""
    parser.add_argument("--autoencoder", help="another autoencoder than the model's: name, folder or hub id")
    parser.add_argument("--dtype", help="of the transformer's products: float32 (default) or bfloat16")
    add_mesh(parser)


def _several(kind: Callable[[str], Any]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not words(text):
            raise argparse.ArgumentTypeError(f"'{text}': give a value, or several with commas between them")
        for part in words(text):
            try:
                kind(part)
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentTypeError(f"{error}" if part == text else f"'{text}' has {error}") from None
        return text

    return parse


def words(text: str | None) -> list[str]:
    """``a,b`` as a list; empty for None."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def values_of(args: argparse.Namespace, name: str) -> list[Any]:
    """The values of a swept setting's flag; the default alone where it was not given, and none where that is None."""
    text = getattr(args, name)
    default = getattr(Settings, name)
    if text is None:
        return [] if default is None else [default]
    return [SETTINGS[name]["kind"](part) for part in words(text)]


def shared_settings(args: argparse.Namespace) -> Settings:
    """Settings of the flags that are not swept.

    Raises:
        UserError: as ``Settings``; a flag without the one that it goes with.
    """
    check_together(vars(args), called=flag_of)
    return Settings(**{n: getattr(args, n) for n, one in SETTINGS.items() if not one["swept"] and given(args, n)})


def given(args: argparse.Namespace, name: str) -> bool:
    """Whether a flag was."""
    return getattr(args, name) is not None


def check_together(
    values: Mapping[str, Any], more: Mapping[str, str] | None = None, called: Callable[[str], str] = str
) -> None:
    """UserError for a setting whose effect needs another one that is missing, or off (``cache none``); ``more`` pairs
    than those of the settings. A value is None where it was not given; ``called``: a setting's name in the message."""
    pairs = {name: one["goes_with"] for name, one in SETTINGS.items() if one["goes_with"]} | dict(more or {})
    for name, other in pairs.items():
        off = SETTINGS[other]["default"] if other in SETTINGS else None
        if values.get(name) is not None and values.get(other) is None:
            raise UserError(f"{called(name)} goes with {called(other)}: give that too, or leave it out")
        if values.get(name) is not None and set(words(str(values[other]))) == {off}:
            raise UserError(f"{called(name)} has no effect with {called(other)} {off}: leave it out, or choose another")
