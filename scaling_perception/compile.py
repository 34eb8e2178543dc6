"""Compile a config for devices that are not here, and say whether it fits and what it costs.

The train step, the sampler and the latent encoder are compiled ahead of time for a TPU slice (v2 to v6e; needs
libtpu, not a TPU) or for a mesh of fake CPU devices in place of GPUs. Told are memory by kind, FLOPs, every collective
with its bytes and mesh axis, the bounds of a step's time by a stated roofline model, and what the partitioning does
that it need not. Only shapes are used: no data, no weights. docs/compile.md explains the numbers.
"""

import argparse
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from scaling_perception.support.again import add_overwrite, check_output, replacing, settings_of
from scaling_perception.support.errors import UserError
from scaling_perception.support.verbs import COUNT, STEPS
from scaling_perception.train import split_overrides as split_overrides

EXAMPLES = """
scaling-perception compile --config configs/depth.py:model=XL/2,res=512,cache=x --topology v5p:4x4x4 --mesh fsdp=4
scaling-perception compile --config configs/mini.py --topology v5e:2x2 --what all --json out/mini.json
scaling-perception compile --config configs/mini.py --topology cpu:8 --chip h200 --mesh data=4,fsdp=2
scaling-perception compile --config configs/depth.py:model=a1,cache=x --topology v5e:2x4 --search --json out/found.json
"""
OUTPUTS = ("json", "hlo")

WHAT = ("train", "sample", "encode")
_SAMPLER = {"steps": 10, "ensemble": 1}
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="config file, optionally with arguments: FILE.py:key=value,…")
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="v5p:4x4x4, v5e:8x8, v6e:16x16, …, or cpu:N for fake devices"
    )
    parser.add_argument("--mesh", default="", metavar="AXIS=N,…", help="in place of the config's: data, fsdp, …")
    parser.add_argument("--what", choices=(*WHAT, "all"), default="train")
    parser.add_argument("--batch", type=int, metavar="N", help="samples of a train step; pictures to sample or encode")
    parser.add_argument("--steps", type=STEPS, help=f"of the sampler (default {_SAMPLER['steps']})")
    parser.add_argument("--ensemble", type=COUNT, metavar="N", help=f"members (default {_SAMPLER['ensemble']})")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices joined by the network")
    parser.add_argument("--chip", default="", help="with cpu:N, the GPU whose limits to use: a100, h100, h200")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    parser.add_argument("--hlo", metavar="FILE", help="also write the compiled program's text (one program)")
    parser.add_argument(
        "--search", action="store_true", help="compile every sensible mesh, remat and accumulation: a table of bounds"
    )
    parser.add_argument("--jobs", type=COUNT, metavar="N", help="of --search: processes at a time (default 1)")
    add_overwrite(parser)


def run(args: argparse.Namespace) -> None:
    from scaling_perception.scaling.topologies import get_topology, prepare_environment

    prepare_environment(args.topology)
    from scaling_perception.support.configs import load_config
    from scaling_perception.support.files import write_json, write_text
    from scaling_perception.support.progress import waiting

    config = load_config(args.config, list(getattr(args, "overrides", [])))
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch {args.batch}: give 1 or more")
    _refuse_unused(args)
    for name, value in {**_SAMPLER, "jobs": 1}.items():  # settings of earlier results have them
        if getattr(args, name) is None:
            setattr(args, name, value)
    topology = get_topology(args.topology, args.slices, args.chip)
    if args.search:
        _search(args, config, topology)
        return
    mesh = mesh_of(config, args.mesh, topology.devices)
    names = WHAT if args.what == "all" else (args.what,)
    settings = settings_of(args, OUTPUTS)
    for path in (args.json, args.hlo):
        check_output(path, settings, args.overwrite)
    reports = []
    for name in names:
        with waiting(f"compiling {name} for {mesh.size} devices of {topology.name}"):
            report, text = compile_program(config, topology, mesh, name, args.batch, args.steps, args.ensemble)
        reports.append({"config": args.config, "overrides": list(getattr(args, "overrides", [])), **report})
        print(describe(report), flush=True)
        if args.hlo:
            with replacing(args.hlo, settings) as file:
                write_text(file, text)
    if args.json:
        with replacing(args.json, settings) as file:
            write_json(file, reports)


def _refuse_unused(args: argparse.Namespace) -> None:
    """UserError for a flag that the command would ignore."""
    if args.what == "all" and args.hlo:
        raise UserError(
            f"--hlo {args.hlo} is the text of one program, not of --what all: give --what {' or '.join(WHAT)}"
        )
    if args.jobs is not None and not args.search:
        raise UserError(f"--jobs {args.jobs} goes with --search: leave it out")
    for name in _SAMPLER:
        if getattr(args, name) is not None and args.what not in ("sample", "all"):
            raise UserError(
                f"--{name} {getattr(args, name)} is for --what sample or all, not for {args.what}: leave it out"
            )


def _search(args: argparse.Namespace, config: Any, topology: Any) -> None:
    from pathlib import Path

    from scaling_perception.scaling import mesh_search
    from scaling_perception.support.files import write_json
    from scaling_perception.support.progress import progress

    for flag, given in (("--mesh", args.mesh), ("--hlo", args.hlo)):
        if given:
            raise UserError(f"{flag} goes with one mesh, not with --search: leave it out")
    if args.what != "train":
        raise UserError(f"--search is of the train step, not of --what {args.what}: leave that out")
    if not args.json:
        raise UserError("--search keeps what is compiled beside its result: give --json FILE")
    settings = settings_of(args, (*OUTPUTS, "jobs"))
    check_output(args.json, settings, args.overwrite)
    found, too_large = mesh_search.ways(config, topology, args.batch)
    words = ["--config", args.config, "--topology", args.topology, "--slices", str(args.slices)]
    words += ["--chip", args.chip] if args.chip else []
    words += ["--batch", str(args.batch)] if args.batch else []
    words += [f"--config.{override}" for override in getattr(args, "overrides", [])]
    folder = Path(f"{args.json}.parts")
    print(f"{len(found)} ways to spread a step over {len(topology.devices)} devices of {topology.name}", flush=True)
    compiled = mesh_search.compile_all(found, words, folder, args.jobs)
    rows = mesh_search.best_first(progress(compiled, len(found), "compile"))
    with replacing(args.json, settings) as file:
        write_json(file, {"topology": topology.name, "chip": topology.chip.name, "too_large": too_large, "rows": rows})
    print("\n".join(mesh_search.table(rows, too_large, topology.chip.memory)))


def mesh_of(config: Any, text: str, devices: Sequence[Any]) -> Any:
    """The config's mesh with the sizes of ``text`` (``fsdp=4,expert=2``) in it, over ``devices``.

    Raises:
        UserError: no such axis, no number, or sizes that do not multiply to the number of devices.
    """
    from scaling_perception.parallel.mesh import make_mesh, mesh_sizes

    return make_mesh(**{**config.mesh.to_dict(), **mesh_sizes(text)}, devices=devices)


def compile_program(
    config: Any, topology: Any, mesh: Any, name: str, batch: int | None = None, steps: int = 10, members: int = 1
) -> tuple[dict[str, Any], str]:
    """Compile one program of a config; returns what is known of it (JSON-able) and its HLO text.

    Args:
        name: train, sample or encode. batch: samples of a train step (None: the config's), or pictures (None: one for
            each device). steps, members: of the sampler.

    Raises:
        UserError: a field that does not fit, or a program that does not fit the chip's memory.
    """
    import jax

    from scaling_perception.scaling import programs
    from scaling_perception.support.executables import without_jax_cache

    images = mesh.size if batch is None else batch
    if name == "train":
        with config.unlocked():
            config.train.batch_size = batch or config.train.batch_size
        program = programs.train_program(config, mesh)
    elif name == "sample":
        program = programs.sample_program(config, mesh, images, steps, members)
    else:
        program = programs.encode_program(config, mesh, images)
    begin = time.monotonic()
    try:
        with without_jax_cache():
            compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _does_not_fit(name, topology, str(error)) from error
    seconds = time.monotonic() - begin
    text = compiled.as_text()
    report = analyse(program, compiled, text, topology, mesh)
    report["batch"] = config.train.batch_size if name == "train" else images
    return {**report, "compile_seconds": round(seconds, 1)}, text


def _does_not_fit(name: str, topology: Any, message: str) -> Exception:
    sizes = re.search(r"\(?Used (\S+) of (\S+)|\((\S+)\) exceeds available \S+ \((\S+?)\)", message)
    if "RESOURCE_EXHAUSTED" not in message and sizes is None:
        return RuntimeError(message)
    needs = " of ".join(part for part in (sizes.groups() if sizes else ()) if part).rstrip(".")
    return UserError(
        f"{name} does not fit {topology.name}{f' ({needs} of memory)' if needs else ''}: spread the state (mesh.fsdp), "
        "recompute (train.remat=true), compute in parts (train.accumulate) or use bfloat16 (train.dtype)"
    )


def analyse(program: Any, compiled: Any, text: str, topology: Any, mesh: Any) -> dict[str, Any]:
    """Everything that a compiled program's text and the compiler's own account say of it."""
    from scaling_perception.scaling import collectives, costs, hlo, partition, roofline
    from scaling_perception.scaling.topologies import transfer_seconds

    module, sizes, chip = hlo.parse(text), dict(mesh.shape), topology.chip
    own = {name: shape for name, shape in program.shapes.items() if name.startswith("params/")}
    parameters = collectives.parameters_of(own, program.rules, sizes)
    travelling = (
        parameters if program.rules else collectives.Parameters({}, {}, {}, {})
    )  # weights that are whole stay where they are
    flat = list(mesh.devices.flat)
    found, rows, links = [], [], {}
    for one in collectives.collectives(module):
        axes = collectives.mesh_axes(one.groups, sizes)
        purpose = collectives.purpose(one, axes, travelling)
        if program.name != "train" and purpose == "gradients":
            purpose = "partial"
        found.append((one, axes, purpose))
        groups = one.groups if one.kind == "collective-permute" else one.groups[:1]
        seconds = max(transfer_seconds(topology, one.kind, one.bytes, [flat[at] for at in group]) for group in groups)
        key = " × ".join(axes) or "none"
        links[key] = links.get(key, 0.0) + seconds * one.trips
        rows.append(
            {
                "kind": one.kind,
                "axes": list(axes),
                "group": int(one.groups.shape[1]) if one.kind != "collective-permute" else 2,
                "arrays": [f"{array.dtype}{list(array.shape)}" for array in one.arrays],
                "bytes": one.bytes,
                "times": one.trips,
                "loops": [loop.op_name or loop.name for loop in one.loops],
                "purpose": purpose,
                "parameters": list(collectives.carried(one, parameters)) if purpose in _OF_PARAMETERS else [],
                "seconds": seconds * one.trips,
                "op_name": one.op_name,
            }
        )
    products, kernels = costs.matmuls(module), costs.kernels(module)
    by_name = costs.traffic(module)
    # a grouped matmul passes over the rows that are nobody's, though its operands have room for them
    shares = [min(1.0, program.expert_rows / one.rows) if "gmm" in one.op_name else 1.0 for one in kernels]
    for op_name, share in {one.op_name: share for one, share in zip(kernels, shares, strict=True)}.items():
        by_name[op_name] = round(by_name[op_name] * share)
    moved = sum(by_name.values())
    counted = sum(one.flops * one.trips for one in products)
    by_kernels = sum((one.flops or 0) * one.trips * share for one, share in zip(kernels, shares, strict=True))
    flops = {
        "model": program.flops,
        "model_per_device": program.flops / mesh.size,
        "optimizer": program.update_flops,
        "products": counted,
        "kernels": by_kernels,
        "xla_loops_once": float((compiled.cost_analysis() or {}).get("flops", math.nan)),
    }
    report: dict[str, Any] = {
        "program": program.name,
        "topology": topology.name,
        "chip": chip._asdict() if chip else None,
        "devices": mesh.size,
        "slices": len({getattr(device, "slice_index", None) or 0 for device in flat}),
        "mesh": sizes,
        "memory": {**_memory(compiled, chip), "state": _state(program, sizes)},
        "flops": flops,
        "memory_traffic": moved,
        "memory_traffic_by_part": _by_part(by_name),
        "loops_of_unknown_length": sorted(
            {loop.name for place in hlo.places(module) for loop in place.loops if not loop.known}
        ),
        "kernels_of_unknown_cost": sorted({one.op_name for one in kernels if one.flops is None}),
        "collectives": rows,
        "warnings": [
            *partition.gathered_experts(found, parameters),
            *partition.unsharded_activations(module, sizes, program, parameters),
            *partition.repeated_work(counted + by_kernels, program.flops / mesh.size, program.update_flops, mesh.size),
            *partition.resharded_layers(found),
            # a CPU's compiler knows no reduce-scatter of its own
            *(partition.whole_gradients(found, travelling) if topology.shape else ()),
            *partition.replicated_state(program.shapes, program.rules, program.specs, sizes),
        ],
    }
    if chip is not None:
        narrow = roofline.padding(program.head, chip.matrix) if program.head else 1.0
        takes = [share * (narrow if "attn" in one.op_name else 1.0) for one, share in zip(kernels, shares, strict=True)]
        bound = roofline.estimate(chip, products, zip(kernels, takes, strict=True), moved, links)
        per_device = program.flops / mesh.size / chip.flops
        report["estimate"] = {
            **bound._asdict(),
            "mfu_best": per_device / bound.best,
            "mfu_worst": per_device / bound.worst,
        }
    return report


def _by_part(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes by part of the network: what follows ``blocks``, or the first name after the transformations."""
    found: dict[str, int] = {}
    for op_name, size in sizes.items():
        words = [word for word in re.split(r"[/;:]", op_name) if re.fullmatch(r"\w+", word) and word not in _NO_PARTS]
        at = words.index("blocks") if "blocks" in words else -1
        part = "/".join(words[at : at + 2]) if at >= 0 else (words[0] if len(words) > 1 else "other")
        found[part] = found.get(part, 0) + size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


_NO_PARTS = ("while", "body", "closed_call", "checkpoint", "rematted_computation", "cond")
_OF_PARAMETERS = ("weights", "ring", "kept", "gradients")


def _memory(compiled: Any, chip: Any) -> dict[str, Any]:
    """Bytes on each device by kind; donated arguments are outputs as well and count once."""
    told = compiled.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    sizes = {name: int(getattr(told, f"{word}_size_in_bytes")) for name, word in names.items()}
    sizes["code"] = int(told.generated_code_size_in_bytes)
    total = sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"] + sizes["code"]
    limit = chip.memory if chip else None
    return {**sizes, "total": total, "limit": limit, "fits": None if limit is None else total <= limit}


_KINDS = {"params": "weights", "opt_state": "moments", "ema": "average"}


def _state(program: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes on each device of what stays from call to call, by what it is; all of it has four bytes a number."""
    found: dict[str, int] = {}
    for name, shape in program.shapes.items():
        entries = ((entry,) if isinstance(entry, str) else entry or () for entry in program.specs.get(name, ()))
        parts = math.prod(sizes[axis] for entry in entries for axis in entry)
        kind = _KINDS.get(name.split("/")[0], "other")
        found[kind] = found.get(kind, 0) + 4 * math.prod(shape) // parts
    return found


_RATES = {"memory": "bandwidth", "a link": "link", "network": "network"}


# --- As text -------------------------------------------------------------------------------------------------------


def describe(report: Mapping[str, Any]) -> str:
    """A report as text, for people."""
    spread = " × ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    slices = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    head = f"{report['program']} on {slices}{report['topology']}: {report['devices']} devices ({spread}), "
    lines = [f"{head}batch {report['batch']}, compiled in {report['compile_seconds']} s", ""]
    lines += [*_memory_lines(report), "", *_flop_lines(report), "", *_collective_lines(report)]
    if report["loops_of_unknown_length"]:
        lines += ["", f"counted once, of unknown length: loops {', '.join(report['loops_of_unknown_length'])}"]
    if report["kernels_of_unknown_cost"]:
        lines += ["", f"not counted, for they state no cost: kernels {', '.join(report['kernels_of_unknown_cost'])}"]
    lines += ["", *(f"warning: {line}" for line in report["warnings"])]
    return "\n".join(
        lines if report["warnings"] else [*lines, "no avoidable collective, no array whole that is to be split"]
    )


def _memory_lines(report: Mapping[str, Any]) -> list[str]:
    memory = report["memory"]
    lines = ["memory on each device (GiB)"]
    for name in ("arguments", "outputs", "aliased", "temporaries", "code", "total"):
        note = {"aliased": "  outputs that take the place of donated arguments"}.get(name, "")
        if name == "arguments":
            state = ", ".join(f"{kind} {size / GIB:.3f}" for kind, size in memory["state"].items() if size > GIB / 1e3)
            note = f"  of them {state}" if state else ""
        if name == "total" and memory["limit"]:
            verdict = "fits" if memory["fits"] else "DOES NOT FIT"
            note = f"  of {memory['limit'] / GIB:.2f}: {memory['total'] / memory['limit']:.0%}, {verdict}"
        lines.append(f"  {name:<12}{memory[name] / GIB:9.3f}{note}")
    return lines


def _flop_lines(report: Mapping[str, Any]) -> list[str]:
    flops, bound = report["flops"], report.get("estimate")
    tera = {name: value / 1e12 for name, value in flops.items()}
    done = tera["products"] + tera["kernels"]
    update = f" and up to {tera['optimizer']:.4g} by the optimizer's" if tera["optimizer"] else ""
    parts = list(report["memory_traffic_by_part"].items())[:4]
    most = ", ".join(f"{size / 1e9:.4g} in {part}" for part, size in parts)
    lines = [
        f"TFLOPs on each device: {tera['model_per_device']:.4g} by the model's formula{update}; {done:.4g} in the "
        f"program ({tera['kernels']:.4g} of them in kernels); XLA's own count, loops once: "
        f"{tera['xla_loops_once']:.4g}",
        f"memory traffic on each device: {report['memory_traffic'] / 1e9:.4g} GB, of them {most}",
    ]
    if bound is None:
        return [*lines, "no estimate of time: name a GPU with --chip"]
    links = ", ".join(f"{axes} {seconds * 1e3:.3g}" for axes, seconds in bound["links"].items() if seconds)
    chip = report["chip"]
    limits = ", ".join(f"{what} {chip[field] / 1e9:.4g}" for what, field in _RATES.items())
    lines += [
        f"ms by the limits of a {chip['name']} ({chip['flops'] / 1e12:.0f} TFLOP/s; GB/s: {limits}):",
        f"  compute {bound['compute'] * 1e3:.3g}, memory {bound['memory'] * 1e3:.3g}, links "
        f"{sum(bound['links'].values()) * 1e3:.3g} ({links or 'none'})",
        f"  at best {bound['best'] * 1e3:.3g} (all overlap): MFU {bound['mfu_best']:.1%}; "
        f"at worst {bound['worst'] * 1e3:.3g} (nothing does): MFU {bound['mfu_worst']:.1%}",
    ]
    return lines


def _collective_lines(report: Mapping[str, Any]) -> list[str]:
    from scaling_perception.scaling.collectives import PURPOSES

    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in report["collectives"]:
        groups.setdefault((bool(row["loops"]), row["purpose"], row["kind"], tuple(row["axes"])), []).append(row)
    if not groups:
        return ["no collectives"]
    lines = [f"{'collectives on each device':<34}{'ops':>5}{'times':>7}{'MB a step':>11}{'ms':>9}  purpose"]
    for (inside, purpose, kind, axes), rows in sorted(groups.items(), key=lambda item: item[0], reverse=True):
        times = sum(row["times"] for row in rows)
        size = sum(row["bytes"] * row["times"] for row in rows) / 1e6
        seconds = sum(row["seconds"] for row in rows) * 1e3
        name = f"{kind} {' × '.join(axes)}"
        where = "in the layers" if inside else "once"
        lines.append(f"  {name:<32}{len(rows):>5}{times:>7}{size:>11.4g}{seconds:>9.3g}  {where}: {PURPOSES[purpose]}")
    return lines
