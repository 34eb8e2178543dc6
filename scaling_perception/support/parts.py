"""One command as several jobs: ``--shard i/n`` does a part of the work, ``--merge`` joins what all parts have done.

Every job runs the same command but for ``i``, on any machine that sees the same files. Parts are numbered from 0 or
from 1, as the scheduler does: ``n/n`` is the same part as ``0/n``.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from scaling_perception.support.errors import UserError


class Part(NamedTuple):
    """Part ``index`` (from 0) of ``of`` parts."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index} of {self.of}"

    @property
    def flag(self) -> str:
        """What asks for it."""
        return f"--shard {self.index}/{self.of}"

    @property
    def name(self) -> str:
        """As in names of files."""
        return f"part-{self.index}-of-{self.of}"

    def block(self, count: int) -> range:
        """Which of ``count`` pieces of work, in order, are this part's: as many as every other part's, or one more."""
        return range(count * self.index // self.of, count * (self.index + 1) // self.of)


def stated_part(said: Any) -> Part | None:
    """The part that a file says it is, as ``[index, of]``; None where that is none."""
    two = isinstance(said, list | tuple) and len(said) == 2 and all(type(one) is int for one in said)
    return Part(*said) if two and 0 <= said[0] < said[1] else None


def add_parts(parser: Any, what: str, joined: str) -> None:
    """The flags of a verb whose work can be split."""
    parser.add_argument(
        "--shard",
        metavar="i/n",
        help=f"do part i of n of {what}, one job for each i (auto: as SLURM's array says; auto/n: with n, as "
        "Kubernetes' index says)",
    )
    parser.add_argument(
        "--merge", action="store_true", default=None, help=f"join what the jobs of --shard have done into {joined}"
    )


def part_of(args: argparse.Namespace) -> Part | None:
    """The part that the flags ask for; None for all of the work.

    Raises:
        UserError: no such part, or the environment does not say which.
    """
    if args.merge and (args.shard or getattr(args, "overwrite", False)):
        raise UserError(
            "--merge joins what --shard has done: leave out " + ("--shard" if args.shard else "--overwrite")
        )
    return None if args.shard is None else parse_part(args.shard)


def parse_part(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """``2/8``, ``auto`` or ``auto/8`` as a part.

    Raises:
        UserError: something else, or the environment does not say which part.
    """
    which, slash, count = text.partition("/")
    if which == "auto":
        which, known = _of_environment(text, environment)
        count = count if slash else known
    if not re.fullmatch(r"\d{1,9}", which) or not re.fullmatch(r"\d{1,9}", count):
        raise UserError(f"--shard '{text}': give i/n, such as 0/8, or auto in an array of jobs")
    index, of = int(which), int(count)
    if of < 1:
        raise UserError(f"--shard {text}: part {index} of {of} is none: give i/n, such as 0/8")
    if index > of:
        raise UserError(f"--shard {text}: part {index} of {of} is none: give i from 0 to {of}")
    return Part(index % of, of)


def _of_environment(text: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Number of the part, and of parts ('' where only ``auto/n`` can say it)."""
    index, slurm = environment.get("JOB_COMPLETION_INDEX", ""), environment.get("SLURM_ARRAY_TASK_ID", "")
    if not index and not slurm:
        raise UserError(
            f"--shard {text}: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set: start it as an array of "
            "jobs, or give i/n"
        )
    if not re.fullmatch(r"\d{1,9}", slurm or index):
        name = "SLURM_ARRAY_TASK_ID" if slurm else "JOB_COMPLETION_INDEX"
        raise UserError(f"--shard {text}: {name} is '{slurm or index}' and no number: give i/n")
    if "/" in text:
        return slurm or index, ""
    if not slurm:
        raise UserError("--shard auto: JOB_COMPLETION_INDEX does not say how many parts there are: give auto/n")
    first, last, count = (environment.get(f"SLURM_ARRAY_TASK_{word}", "") for word in ("MIN", "MAX", "COUNT"))
    usual = {str(int(count) - 1 + start): str(start) for start in (0, 1)} if re.fullmatch(r"\d{1,9}", count) else {}
    if not usual or first not in ("", "0", "1") or (last and usual.get(last) != (first or "0")):
        raise UserError(
            f"--shard auto: the array {first or '?'}-{last or '?'} of {count or '?'} jobs is none of 0-(n-1) or 1-n: "
            "give auto/n"
        )
    return slurm, count


def note_idle(part: Part, pieces: int, what: str, mend: str) -> None:
    """One line on stderr where there are fewer pieces of work than parts."""
    if part.of > pieces:
        print(f"note: {pieces} {what} for {part.of} parts: some have nothing to do (see {mend})", file=sys.stderr)


def refuse_elsewhere(own: Part, others: Iterable[Any], where: Any) -> None:
    """UserError when the work in ``where`` was split into another number of parts.

    Args:
        others: what the files of the other parts say of themselves.
    """
    if other := next((one for said in others if (one := stated_part(said)) and one.of != own.of), None):
        raise UserError(f"{where} holds parts of {other.of}: give --shard i/{other.of}, or choose another place")


def all_parts(found: Mapping[str, Any], where: Any, finished: Callable[[Part], str | None]) -> list[Part]:
    """The parts in order, all there and finished.

    Args:
        found: file -> its ``[index, of]`` as it says itself. where: what they lie in, for messages.
        finished: why a part is not, if it is not.

    Raises:
        UserError: there are none, one is missing, there twice, or unfinished; or they are of other numbers.
    """
    if not found:
        raise UserError(f"{where} holds no parts to join: run the command with --shard i/n first")
    known: dict[Part, str] = {}
    for file, said in sorted(found.items()):
        if (part := stated_part(said)) is None:
            raise UserError(f"{file} does not say which part it is: remove it and run that part again")
        if part in known:
            raise UserError(f"{file} and {known[part]} are both part {part}: remove one of them")
        known[part] = file
    if renamed := next((part for part, file in known.items() if part.name not in file), None):
        raise UserError(f"{known[renamed]} is part {renamed} by its content: restore its name, or remove the file")
    counts = sorted({part.of for part in known})
    if len(counts) > 1:
        raise UserError(f"{where} holds parts of {' and of '.join(map(str, counts))}: remove those of one kind")
    wanted = [Part(index, counts[0]) for index in range(counts[0])]
    if missing := [part for part in wanted if part not in known]:
        raise UserError(f"{len(missing)} of {counts[0]} parts are missing in {where}: run {_flags(missing)}")
    if unfinished := [(part, why) for part in wanted if (why := finished(part))]:
        parts = [part for part, _ in unfinished]
        raise UserError(f"part {parts[0]} in {where} is unfinished ({unfinished[0][1]}): run {_flags(parts)} again")
    return wanted


def _flags(parts: list[Part]) -> str:
    return ", ".join(part.flag for part in parts[:5]) + (f" and {len(parts) - 5} more" if parts[5:] else "")


def refuse_other_flags(
    add_arguments: Callable[[argparse.ArgumentParser], None],
    args: argparse.Namespace,
    asked: Mapping[str, Any],
    where: Any,
) -> None:
    """UserError when a flag that is given to ``--merge`` is another than the parts were made with.

    Args:
        asked: flags of the parts, those that were not set left out or at their default.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    for name, here in vars(args).items():
        usual = parser.get_default(name)
        if name in ("shard", "merge") or here == usual or name not in asked:
            continue
        if (there := asked[name]) != here:
            flag = flags.get(name, name)
            known = "without it: leave it out" if there is None else f"with {there}: give that"
            raise UserError(f"{flag} is {here}, and the parts in {where} were made {known}")
