"""Speed of a whole prediction: encode, sample every member, decode, merge; `bench sample`.

Weights are drawn, not trained: speed does not depend on them. Beside the predictor stand the same models in PyTorch
(`benchmarks/torch_peer.py`), sampled as the released code does it, and the steps that lead from such a loop to the
predictor. All of them take turns in one process, so that what else the machine does meets them alike, and their results
are held against each other: what is not the same computation is not compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scaling_perception.support.stopping import removed_when_stopped
from scaling_perception.support.verbs import COUNT, POSITIVE
from scaling_perception.timing.rounds import Function, in_rounds, keep_to, ratio
from scaling_perception.timing.ways import (
    AUTOENCODERS,
    LARGEST_PIXEL,
    agreement,
    difference,
    finish,
    make_case,
    make_levers,
    make_torch,
    one_picture,
    pixels_of,
    predict,
    torch_prediction,
)

COMPILE_SECONDS = 120  # what torch.compile may take
_QUICK = {"steps": 2, "ensemble": 2, "repeats": 1}
_SAME = ("model", "resolution", "steps", "ensemble", "images", "autoencoder", "dtype", "cores")  # of other processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="a1", help="a preset, as a depth specialist")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ensemble", type=int, default=5, help="members")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--autoencoder", default="tiny", help=f"sizes of it: {', '.join(AUTOENCODERS)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="ours; torch is float32")
    parser.add_argument("--against", choices=("torch",), help="also the released way of sampling, in PyTorch")
    parser.add_argument("--levers", action="store_true", help="also what each step from a plain loop to ours gives")
    parser.add_argument("--cores", type=COUNT, help="processors for everybody; with 1, processor seconds mean most")
    parser.add_argument(
        "--peak",
        type=POSITIVE,
        metavar="TFLOPS",
        help="of the device, to give the share that is reached (default: by its kind, where it is known)",
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory (a process for each way)")
    parser.add_argument("--quick", action="store_true", help="two steps and members, one round: no measurement")
    parser.add_argument("--once", help=argparse.SUPPRESS)  # run one way once and tell the memory it took


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _once(args: argparse.Namespace) -> dict[str, Any]:
    """Run one way once in this process: its memory before (weights are there), and at most."""
    case = make_case(args)
    if args.once == "ours":
        function: Function = lambda: predict(case)  # noqa: E731
    else:
        sampler = make_torch(case, args.once.split()[-1])
        every = [one_picture(case, picture) for picture in case.pictures]
        function = lambda: torch_prediction(case, sampler, every)  # noqa: E731
    before = _status("VmRSS")
    function()
    return {"what": "sample", "before_bytes": before, "peak_bytes": _status("VmHWM")}


def _in_a_process(args: argparse.Namespace, name: str, limit: float | None = None) -> dict[str, int] | str:
    """What `_once` tells of a way of sampling, or why it tells nothing."""
    with tempfile.TemporaryDirectory() as folder, removed_when_stopped(folder):
        file = Path(folder) / "once.json"
        words = [sys.executable, "-m", "scaling_perception", "bench", "sample", "--once", name, "--json", str(file)]
        for field in _SAME:
            words += [f"--{field}", str(getattr(args, field))] if getattr(args, field) is not None else []
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return f"not done within {limit:.0f} s"
        if done.returncode or not file.exists():
            return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        found = json.loads(file.read_text())
        return {field: found[field] for field in ("before_bytes", "peak_bytes")}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see the module and docs/speed.md.

    Returns:
        ``ways``: for each its seconds (median), the fastest, all rounds, processor seconds, memory; ``parts``: encode
        and decode of ours; ``ours``: rates; with ``--against`` and ``--levers`` ratios and differences.

    Raises:
        UserError: options that are unknown or do not go together, or no torch.
        RuntimeError: results that should be equal are not.
    """
    import jax

    from scaling_perception.models.autoencoders import part_size
    from scaling_perception.models.compute import forward_macs
    from scaling_perception.support.chips import peak_flops

    if args.quick:
        vars(args).update(_QUICK)
    if args.cores is not None:
        keep_to(args.cores)
    if args.once:
        return _once(args)
    case = make_case(args)
    predictor, members = case.predictor, args.ensemble
    every = [one_picture(case, picture) for picture in case.pictures]
    samplers = {f"torch {kind}": make_torch(case, kind) for kind in ("explicit", "sdpa")} if args.against else {}
    memory: dict[str, Any] = {}
    if not (args.no_memory or args.quick):
        memory = {name: _in_a_process(args, name) for name in ("ours", *samplers)}
    if samplers and not args.quick:  # in a process of its own first: it can be ended
        memory["torch compiled"] = _in_a_process(args, "torch compiled", COMPILE_SECONDS)
        if not isinstance(memory["torch compiled"], str):
            samplers["torch compiled"] = make_torch(case, "compiled")

    begin = time.perf_counter()
    predict(case)
    first_call, compiling = time.perf_counter() - begin, predictor.compile_seconds
    ways: dict[str, Function] = {"ours": lambda: predict(case)}
    for name, sampler in samplers.items():
        ways[name] = lambda sampler=sampler: torch_prediction(case, sampler, every)
    differences = {name: agreement(case, every[0], sampler) for name, sampler in samplers.items()}
    passes, shape = predictor.passes("depth"), (1, members, 1, *every[0].noise.shape[1:])
    stages = {
        "encode": lambda: jax.block_until_ready(predictor.engine.encode(predictor.weights[1], every[0].picture[None])),
        "decode": lambda: jax.block_until_ready(
            predictor.engine.decode(predictor.weights[1], every[0].noise.reshape(shape), passes)
        ),
    }
    levers = make_levers(case, every[0]) if args.levers else {}
    expected = pixels_of(case, every[0]) if levers else None
    for name, lever in levers.items():
        if args.dtype == "float32" and (off := difference(lever(), expected)) > LARGEST_PIXEL:
            raise RuntimeError(f"'{name}' differs from the predictor by {off:.1e}")
    timed = {name: (lambda lever=lever: finish(case, lever())) for name, lever in levers.items()}
    load = os.getloadavg() if hasattr(os, "getloadavg") else ()
    found = in_rounds({**ways, **stages, **timed}, args.repeats)

    forward, resolution = forward_macs(case.config), args.resolution
    coding = {
        part: part_size(predictor.autoencoder, part, resolution, resolution)[1] for part in ("encoder", "decoder")
    }
    evaluations = case.evaluations * args.images
    total = forward * evaluations + args.images * (coding["encoder"] + members * coding["decoder"])
    spent = {name: found[name]["seconds"] for name in ("ours", "encode", "decode")}
    network = spent["ours"] / args.images - spent["encode"] - spent["decode"]
    for name in ways:
        found[name]["seconds_per_evaluation"] = found[name]["seconds"] / evaluations
        found[name]["memory"] = memory.get(name)
    result: dict[str, Any] = {"what": "sample", **{name: getattr(args, name) for name in (*_SAME, "repeats")}}
    result["macs"] = {"forward": forward, **coding, "ours": total}
    result["ours"] = {
        "compile_seconds": compiling,
        "first_call_seconds": first_call,
        "network_seconds_per_evaluation": network / case.evaluations,
        "network_gflops_per_second": 2e-9 * forward * case.evaluations / network,
        "gflops_per_second": 2e-9 * total / spent["ours"],
    }
    peak = args.peak * 1e12 if args.peak else peak_flops(jax.devices()[0].device_kind)
    if peak:
        result["ours"]["mfu"] = 2 * total / spent["ours"] / peak
    result["ways"] = {name: found[name] for name in ways}
    result["parts"] = {name: found[name] for name in stages}
    result["load_before"] = list(load)
    if samplers:
        opponent = min(("torch explicit", "torch sdpa"), key=lambda name: found[name]["seconds"])
        ratios = {name: ratio(found, name, "ours") for name in samplers}
        compiled = memory.get("torch compiled", "not tried")
        result["against"] = {"opponent": opponent, "ratios": ratios, "differences": differences}
        result["against"]["torch_compile"] = compiled if isinstance(compiled, str) else "works"
    if levers:
        result["levers"] = _lever_rows(found, list(timed), result.get("against", {}).get("opponent"))
    return result


def _lever_rows(found: Mapping[str, Any], names: list[str], opponent: str | None) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for before, name in zip([None, *names[:-1]], names, strict=True):
        row = {field: found[name][field] for field in ("seconds", "fastest", "processor_seconds")}
        row["times_faster_than_last"] = ratio(found, before, name)["ratio"] if before else 1.0
        row["times_faster_than_loop"] = ratio(found, names[0], name)["ratio"]
        if opponent:
            row["times_faster_than_torch"] = ratio(found, opponent, name)["ratio"]
        rows[name] = row
    return rows


def ratio_lines(against: Mapping[str, Any]) -> Iterator[str]:
    """What each way of torch takes over ours, and how far their results are apart."""
    for name, row in against["ratios"].items():
        marked = " (the opponent)" if name == against["opponent"] else ""
        off = ", ".join(f"{what} {value:.1e}" for what, value in against["differences"][name].items())
        yield (
            f"x {name}{marked}: {row['ratio']:.2f} (fastest {row['ratio_of_fastest']:.2f}, processor seconds "
            f"{row['ratio_of_processor_seconds']:.2f}); differences: {off}"
        )


def table(result: Mapping[str, Any]) -> str:
    """The result as lines of text."""
    return "\n".join(_lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    if "ways" not in result:
        yield f"peak memory {result['peak_bytes'] / 2**20:.0f} MiB, {result['before_bytes'] / 2**20:.0f} before"
        return
    ours = result["ours"]
    yield f"{'way':<30} {'seconds':>9} {'fastest':>9} {'processor s':>12} {'ms/evaluation':>14} {'peak MiB':>9}"
    for name, row in result["ways"].items():
        peak = row["memory"]
        peak = f"{peak['peak_bytes'] / 2**20:.0f}" if isinstance(peak, dict) else "-"
        times = f"{row['seconds']:9.3f} {row['fastest']:9.3f} {row['processor_seconds']:12.2f}"
        yield f"{name:<30} {times} {1000 * row['seconds_per_evaluation']:14.2f} {peak:>9}"
    stages = ", ".join(f"{name} {row['seconds']:.3f} s" for name, row in result["parts"].items())
    share = f", MFU {ours['mfu']:.1%}" if "mfu" in ours else ""
    yield f"ours: {stages}, compiling {ours['compile_seconds']:.1f} s"
    yield (
        f"network {1000 * ours['network_seconds_per_evaluation']:.2f} ms an evaluation at "
        f"{ours['network_gflops_per_second']:.0f} GFLOP/s; all {ours['gflops_per_second']:.0f} GFLOP/s{share}"
    )
    if against := result.get("against"):
        yield from ratio_lines(against)
        if against["torch_compile"] != "works":
            yield f"torch.compile: {against['torch_compile']}"
    if levers := result.get("levers"):
        yield f"{'lever':<30} {'seconds':>9} {'x last':>7} {'x loop':>7} {'x torch':>8}"
        for name, row in levers.items():
            torch = f"{row['times_faster_than_torch']:8.2f}" if "times_faster_than_torch" in row else f"{'-':>8}"
            lasts = f"{row['times_faster_than_last']:7.2f} {row['times_faster_than_loop']:7.2f}"
            yield f"{name:<30} {row['seconds']:9.3f} {lasts} {torch}"
