"""Parts of an evaluation, made by several jobs: a journal each beside the result, and what joins them.

A part evaluates a block of the groups of images that one job would form, in the same batches, so that the joined
figures are those of one job to the last digit. Each part opens the whole data set: the control ``shuffled`` of its last
image takes the picture of another part's first, and the controls and panels are of the first images of all.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scaling_perception.evaluation.comparisons import kind
from scaling_perception.evaluation.journal import identity_of, other_settings, whole_lines
from scaling_perception.evaluation.results import result_of
from scaling_perception.support.errors import UserError
from scaling_perception.support.failures import explain_os
from scaling_perception.support.locks import hold
from scaling_perception.support.parts import Part, all_parts, refuse_elsewhere


def part_journal(out: Path, part: Part) -> Path:
    """The journal of a part of the result ``out``."""
    return out.with_name(f"{out.name}.{part.name}.journal")


def part_journals(out: Path) -> list[Path]:
    """The journals of all parts that there are."""
    begin, end = f"{out.name}.part-", ".journal"
    if not out.parent.is_dir():
        return []
    return sorted(path for path in out.parent.iterdir() if path.name.startswith(begin) and path.name.endswith(end))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return whole_lines(path, path.read_bytes())[0]
    except OSError as error:
        raise UserError(f"cannot read {explain_os(error, path)}") from None


def plan_of_others(journal: Path, part: Part, identity: Mapping[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The batches in which the parts that have begun are computed; else ``plan``: other batches have other last digits.

    Raises:
        UserError: they are of other settings, or of another number of parts.
    """
    out = journal.with_name(journal.name.removesuffix(f".{part.name}.journal"))
    identity = json.loads(json.dumps(identity))
    for path in part_journals(out):
        lines = [] if path == journal else _read(path)
        if not lines:
            continue
        if told := other_settings(identity_of(path, lines[0]), identity):
            raise UserError(
                f"{path} is of other settings ({told}): give all parts the same, choose another result, or remove it"
            )
        refuse_elsewhere(part, [lines[0].get("part")], out.parent)
        plan = lines[0]["plan"]
    return plan


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a part's first line, with today's names of the kinds of cells."""
    cells = fields.get("cells")
    return fields if cells is None else {**fields, "cells": [{**cell, "kind": kind(cell)} for cell in cells]}


def refuse_parts(out: Path) -> None:
    """UserError when parts of the result ``out`` are there: they are not for a job that does all."""
    if found := part_journals(out):
        raise UserError(
            f"{found[0]} is a part of that result ({len(found)} in all): finish the parts with --shard and join them "
            "with --merge, or choose another result"
        )


@contextlib.contextmanager
def joined(out: Path) -> Iterator[dict[str, Any]]:
    """The result of all parts of ``out``, as one job would have it; after the block their journals are removed.

    Raises:
        UserError: parts are missing, unfinished, twice there, in use, or of other settings than each other.
    """
    paths = {path.name: path for path in part_journals(out)}
    with contextlib.ExitStack() as held:
        for path in paths.values():
            busy = f"{path} is in use by another evaluation"
            held.enter_context(hold(path.with_name(f".{path.name}.lock"), busy, "wait for it, then run --merge again"))
        lines = {name: _read(path) for name, path in paths.items()}
        for name, found in lines.items():
            identity_of(paths[name], found[0] if found else None)
            kinds = {"groups": int, "about": dict, "described_by": dict}
            if lacking := [field for field, kind in kinds.items() if not isinstance(found[0].get(field), kind)]:
                raise UserError(f"{paths[name]} is damaged (no {lacking[0]}): remove it and run its part again")

        def unfinished(part: Part) -> str | None:
            head, *groups = lines[part_journal(out, part).name]
            return None if len(groups) == head["groups"] else f"{len(groups)} of {head['groups']} groups of images"

        parts = all_parts({name: found[0].get("part") for name, found in lines.items()}, out.parent, unfinished)
        journals = [lines[part_journal(out, part).name] for part in parts]
        first, name = journals[0][0], part_journal(out, parts[0]).name
        for part, (head, *_) in zip(parts, journals, strict=True):
            for field in ("identity", "plan", "about", "described_by"):
                if told := other_settings(_renamed(first[field]), _renamed(head[field])):
                    other = part_journal(out, part).name
                    raise UserError(f"{name} and {other} are of other settings ({told}): run one of them again")
        groups = [group for _, *own in journals for group in own]
        described_by, result = dict(first["described_by"]), result_of(groups, first["about"])
        yield {**described_by, **result, "panels": [one for group in groups for one in group["shown"]]}
        for path in paths.values():
            path.unlink(missing_ok=True)
