"""`compile --search`: every sensible way to spread a train step over a topology, compiled, and which is the best.

A way is a mesh with whether activations are computed again, in how many parts the batch is computed and where weights
that are split over ``fsdp`` are gathered. For each mesh only the cheapest of the latter that fits the memory by the dry
run is compiled (`_COSTS`, in that order; gathered once a step first); meshes that fit in none are left out, and
counted. A size of ``tensor`` has to divide the heads, one of ``expert`` the experts.

Each way is compiled by a process of its own, which writes its report into a folder beside the result; what is there is
not compiled again, so that the same command goes on.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

import scaling_perception
from scaling_perception.parallel.mesh import AXES
from scaling_perception.scaling.dry_run import describe_run
from scaling_perception.scaling.topologies import Topology
from scaling_perception.support.configs import Config
from scaling_perception.support.errors import UserError
from scaling_perception.training.diffusion import network_of

# (computed again, parts of a batch), cheapest first: computing again costs a third of a step, parts reduce less at once
_COSTS = ((False, 1), (False, 2), (True, 1), (False, 4), (True, 2), (True, 4), (True, 8))
_MARGIN = 0.95  # of the memory that the dry run may fill: it is an estimate
_LARGEST_TENSOR = 8  # its sums of activations are in every layer


class Way(NamedTuple):
    """One way to spread a step: sizes of the mesh by axis, ``remat``, parts, the dry run's bytes on a device, and where
    weights are gathered (``train.gather``)."""

    mesh: dict[str, int]
    remat: bool
    accumulate: int
    memory: int
    gather: str = "layer"

    @property
    def flags(self) -> list[str]:
        """What `train` and `compile` are given for it."""
        mesh = [f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items()]
        return [
            *mesh,
            f"--config.train.remat={str(self.remat).lower()}",
            f"--config.train.accumulate={self.accumulate}",
            f"--config.train.gather={self.gather}",
        ]


def meshes(devices: int, heads: int, experts: int) -> Iterator[dict[str, int]]:
    """Every mesh of so many devices whose ``tensor`` divides the heads and whose ``expert`` divides the experts."""

    def parts(of: int) -> list[int]:
        return [size for size in range(1, of + 1) if of % size == 0]

    for tensor in (size for size in parts(devices) if size <= _LARGEST_TENSOR and heads % size == 0):
        for expert in (size for size in parts(devices // tensor) if size == 1 or (experts and experts % size == 0)):
            for fsdp in parts(devices // tensor // expert):
                sizes = (devices // tensor // expert // fsdp, fsdp, expert, tensor)
                yield dict(zip(AXES, sizes, strict=True))


def ways(config: Config, topology: Topology, batch: int | None) -> tuple[list[Way], int]:
    """The ways to compile, the smallest memory first, and how many meshes fit in none.

    Raises:
        UserError: the batch divides over none of the meshes, or nothing fits.
    """
    if topology.chip is None:
        raise UserError(f"--search on {topology.name}: name the GPU whose limits to use, with --chip")
    dit, limit = network_of(config), topology.chip.memory * _MARGIN
    found, too_large, undivided = [], 0, ""
    for sizes in meshes(len(topology.devices), dit.heads, dit.experts):
        needed = []
        places = ("step", "layer") if sizes["fsdp"] > 1 else ("layer",)
        for (remat, accumulate), gather in itertools.product(_COSTS, places):
            try:
                train = {"remat": remat, "accumulate": accumulate, "gather": gather}
                memory = _memory(config, topology, sizes, train, batch)
            except UserError as error:  # the batch does not divide
                undivided = undivided or str(error)
                continue
            needed.append(memory)
            if memory <= limit:
                found.append(Way(sizes, remat, accumulate, memory, gather))
                break
        else:
            too_large += bool(needed)
    if not found and not too_large:
        raise UserError(f"--search on {topology.name}: {undivided}")
    if not found:
        raise UserError(
            f"--search on {topology.name}: by the dry run no mesh fits {limit / 2**30:.1f} GiB on a device: use more "
            "chips, a smaller batch, or bfloat16 (train.dtype)"
        )
    return sorted(found, key=lambda way: way.memory), too_large


def _memory(
    config: Config, topology: Topology, sizes: Mapping[str, int], train: Mapping[str, Any], batch: int | None
) -> int:
    one = config.copy_and_resolve_references()
    with one.unlocked():
        one.mesh.update(sizes)
        one.train.update(train)
        one.train.batch_size = batch or one.train.batch_size
    kinds = describe_run(one, exchanged=bool(topology.shape))["memory"]  # fake devices are CPUs to the compiler
    return int(kinds["total"])


def compile_all(found: Sequence[Way], words: Sequence[str], folder: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """A row of each way, in their order: its report's memory and bounds, or ``error``.

    Args:
        words: of `compile` for each: config, overrides, topology. folder: of the reports.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda way: _compiled(way, words, folder), found)


def best_first(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By the MFU at worst; those that did not compile last."""
    return sorted(rows, key=lambda row: -row.get("mfu_worst", -1.0))


def _compiled(way: Way, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """One way, compiled by a process or read where an earlier one left it."""
    asked = [*words, *way.flags]
    key = json.dumps([asked, scaling_perception.__version__, jax.__version__])
    place = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    error = ""
    if not place.exists():
        run = [sys.executable, "-m", "scaling_perception", "compile", *asked, "--json", str(place)]
        ended = subprocess.run(
            run, capture_output=True, text=True, check=False, env={**os.environ, "TQDM_DISABLE": "1"}
        )
        if ended.returncode:
            error = (ended.stderr.strip().splitlines() or [f"ended with {ended.returncode}"])[-1]
    row = {"mesh": way.mesh, "remat": way.remat, "accumulate": way.accumulate, "gather": way.gather}
    row |= {"flags": way.flags, "memory_dry_run": way.memory}
    if error:
        return {**row, "error": error.removeprefix("scaling-perception: ")}
    (report,) = json.loads(place.read_text(encoding="utf-8"))
    bound = report["estimate"]
    return {
        **row,
        "memory": report["memory"]["total"],
        "fits": report["memory"]["fits"],
        "seconds_best": bound["best"],
        "seconds_worst": bound["worst"],
        "mfu_best": bound["mfu_best"],
        "mfu_worst": bound["mfu_worst"],
        "compile_seconds": report["compile_seconds"],
        "warnings": len(report["warnings"]),
    }


def best_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row with the best bound at worst among those that fit."""
    return next((row for row in rows if row.get("fits")), None)


def table(rows: Sequence[Mapping[str, Any]], too_large: int, limit: int) -> Iterator[str]:
    """The rows as text, the best one's flags last."""
    names = f"{'mesh':<34}{'remat':>6}{'parts':>6}{'gather':>8}{'GiB':>8}"
    yield f"{names}{'ms at best':>12}{'at worst':>10}{'MFU':>8}{'at worst':>10}"
    for row in rows:
        mesh = ",".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) or "one device"
        start = f"{mesh:<34}{'yes' if row['remat'] else 'no':>6}{row['accumulate']:>6}{row.get('gather', 'layer'):>8}"
        if "error" in row:
            yield f"{start}  {row['error']}"
            continue
        times = f"{row['seconds_best'] * 1e3:>12.4g}{row['seconds_worst'] * 1e3:>10.4g}"
        shares = f"{row['mfu_best']:>8.1%}{row['mfu_worst']:>10.1%}"
        note = "" if row["fits"] else "  does not fit"
        yield f"{start}{row['memory'] / 2**30:>8.2f}{times}{shares}{note}"
    if too_large:
        yield f"left out, for by the dry run they do not fit {limit / 2**30:.1f} GiB in any way: {too_large} meshes"
    best = best_of(rows)
    yield "no way fits" if best is None else f"best bound at worst: {' '.join(best['flags'])}"


def mfu_of(path: str, chip: str) -> float:
    """The bound at worst of the best row of a result of `compile --search`, for `plan`.

    Raises:
        UserError: no such result, of another chip, or nothing in it fits.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows, known = found["rows"], found["chip"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--search {path} is no result of 'compile --search … --json' ({error}): give one") from None
    if known != chip:
        raise UserError(f"--search {path} is of {known} and --chip is {chip or 'not given'}: give --chip {known}")
    best = best_of(rows)
    if best is None:
        raise UserError(f"--search {path}: nothing in it fits: give another")
    return float(best["mfu_worst"])
