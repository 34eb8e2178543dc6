"""Published checkpoints in, ours out: DiT, DiT-MoE, the released generalist, autoencoders, text encoders.

The layout is told by the names of the tensors. Every tensor is shown with the parameter it becomes; one that is
missing, unexpected or of another shape refuses the whole (--allow-partial drops and makes up, never reshapes). Tensors
are streamed: a checkpoint need not fit in memory. What is written is complete or absent.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from scaling_perception.support.again import add_overwrite, settings_of
from scaling_perception.support.errors import UserError
from scaling_perception.support.streams import print_message

EXAMPLES = """
scaling-perception convert DiT-XL-2-512x512.pt models/dit-xl-512
scaling-perception convert dit_moe_generalist.pt models/generalist --dry-run
scaling-perception convert models/mine models/mine.pt --to torch
scaling-perception convert stable-diffusion-2/vae models/sd-vae
scaling-perception convert models/mine models/mine-bf16 --dtype bfloat16 --shard-size 2GB
"""

FLAGS = {"unknown layout": "--layout", "layout": "--layout"}
"""What messages of the library call by name -> the flag."""

_TO = ("ours", "torch", "safetensors")
_DTYPES = ("keep", "float32", "bfloat16", "float16")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHOWN = 20  # problems, and rows of the table before it is shortened


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint file, or folder of a model")
    parser.add_argument("target", metavar="DST", help="folder to write, or a file ending in .pt")
    layouts = "auto, dit, dit_moe, generalist, sd_vae, taesd, clip, ours"
    parser.add_argument("--layout", default="auto", help=f"what SRC must be: {layouts} (default %(default)s)")
    parser.add_argument("--to", choices=_TO, help="form of DST (default: torch for a .pt file, else ours)")
    parser.add_argument("--allow-partial", action="store_true", help="drop unexpected tensors, make up missing ones")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads of a DiT (its tensors do not tell)")
    parser.add_argument("--active", type=int, metavar="N", help="experts that a token meets (tensors do not tell)")
    parser.add_argument("--gating", choices=("paper", "renormalised"), help="weights of the experts (default: paper)")
    parser.add_argument("--dtype", choices=_DTYPES, default="keep", help="of the tensors written (default %(default)s)")
    parser.add_argument("--shard-size", default="4GB", metavar="SIZE", help="largest file of weights (default 4GB)")
    parser.add_argument("--table", action="store_true", help="show every tensor, not only the first and last ones")
    parser.add_argument("--dry-run", action="store_true", help="check and show, write nothing")
    add_overwrite(parser, "a model")


def run(args: argparse.Namespace) -> int:
    from scaling_perception.interop import checkpoint as reading
    from scaling_perception.interop import export, layouts

    source, target = Path(args.source), Path(args.target)
    to = args.to or ("torch" if target.suffix in export.TORCH_SUFFIXES else "ours")
    shard_bytes = size_of(args.shard_size)
    for name in ("heads", "active"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give a whole number above 0")
    settings = settings_of(args, ("target", "table", "dry_run"))
    settings |= {"source": source.name, "to": to}  # its name alone: the record goes along with the model
    export.check_target(source, target, to, settings, args.overwrite or args.dry_run)
    begin = time.monotonic()
    for line in layouts.left_aside(source):
        print_message(f"warning: {line}")
    try:
        checkpoint = reading.open_checkpoint(source, args.layout, args.heads, args.active, args.gating)
    except UserError as error:
        raise UserError(str(error).replace(f"heads={args.heads}", f"--heads {args.heads}")) from None
    if checkpoint.family != "dit" and (args.heads or args.active or args.gating):
        raise UserError(f"--heads, --active and --gating are a DiT's; {source} is {checkpoint.layout}: leave them out")
    if args.active and checkpoint.family == "dit" and not checkpoint.config.experts:
        raise UserError(f"--active {args.active}: {source} has no experts; leave it out")
    partial: dict[str, list[str]] = {}
    problems = reading.check(checkpoint)
    if problems.lines():
        checkpoint, partial = _mend(checkpoint, problems, args.allow_partial)
    plan = export.plan(checkpoint, to, args.dtype, partial)
    print(_table(reading.rows(checkpoint), args.table))
    print(_summary(checkpoint, plan))
    if args.dry_run:
        print("dry run: nothing was written")
        return 0
    written = export.write(checkpoint, plan, target, shard_bytes, settings, args.overwrite)
    print(f"{target}: {written / 1e6:.1f} MB in {time.monotonic() - begin:.1f} s")
    return 0


def size_of(text: str) -> int:
    """``4GB``, ``500MiB`` or a plain number of bytes.

    Raises:
        UserError: none of these, or less than a byte.
    """
    digits = text.strip().rstrip("BGKMIbgkmi")
    unit = text.strip()[len(digits) :].upper()
    with contextlib.suppress(ValueError):
        if unit in _UNITS and float(digits) * _UNITS[unit] >= 1:
            return int(float(digits) * _UNITS[unit])
    raise UserError(f"--shard-size '{text}': give a size such as 4GB or 500MB")


def _mend(checkpoint: Any, problems: Any, allowed: bool) -> tuple[Any, dict[str, list[str]]]:
    """The checkpoint made to fit, and the names that were left out and made up.

    Raises:
        UserError: it may not be, or a tensor has another shape; every problem is printed first.
    """
    from scaling_perception.interop import checkpoint as reading

    lines = problems.lines()
    for line in lines[:_SHOWN]:
        print_message(line)
    if len(lines) > _SHOWN:
        print(f"and {len(lines) - _SHOWN} more", file=sys.stderr)
    origin = checkpoint.source.origin
    if problems.misshaped:
        raise UserError(
            f"{origin}: {len(problems.misshaped)} tensor(s) have another shape than the model made of the others: give "
            "the file of one whole model"
        )
    if not allowed:
        counts = f"{len(problems.missing)} missing, {len(problems.unexpected)} unexpected"
        raise UserError(f"{origin} does not fit ({counts}): give the whole file, or pass --allow-partial")
    print("--allow-partial: unexpected tensors are left out, missing ones are those of a fresh model (key 0)")
    partial = {"made_up": sorted(problems.missing), "left_out": sorted(problems.unexpected)}
    return reading.mended(checkpoint, problems), partial


def _table(rows: list[Any], whole: bool) -> str:
    cells = [("tensor", "parameter", "shape", "dtype")]
    cells += [(row.tensor, row.parameter, "x".join(map(str, row.shape)) or "()", row.dtype) for row in rows]
    hidden = 0 if whole else max(0, len(rows) - _SHOWN)
    if hidden:
        cells = [*cells[: _SHOWN // 2 + 1], *cells[-_SHOWN // 2 :]]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]]) for line in cells]
    if hidden:
        lines.insert(_SHOWN // 2 + 1, f"… {hidden} more (--table shows them)")
    return "\n".join(lines)


def _summary(checkpoint: Any, plan: Any) -> str:
    facts = [("from", f"{checkpoint.source.origin} ({checkpoint.layout})"), *plan.facts]
    facts += [("assumed", text) for text in checkpoint.guessed]
    facts.append(("to", f"{plan.form}, {plan.bytes / 1e6:.1f} MB"))
    width = max(len(name) for name, _ in facts)
    return "\n".join(["", *(f"{name:<{width}}  {text}" for name, text in facts)])
