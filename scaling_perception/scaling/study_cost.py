"""What a study will take before it is run: MACs of every cell, and from them chip-hours and money; what is assumed.

Chip-hours are FLOPs / (peak x share of the peak that is reached). The share is assumed, or that of the roofline which
``compile`` computed for a program, at best; which of them, the text says. On a device that has trained already its
measured FLOPs a second are used.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaling_perception.data.sources import ENDLESS
from scaling_perception.diffusion.caching import combinations
from scaling_perception.diffusion.solvers import evaluations
from scaling_perception.inference.settings import values_of
from scaling_perception.models.compute import TRAINING_FACTOR, forward_macs
from scaling_perception.models.config import DiTConfig, config_from_dict
from scaling_perception.models.dit import count_params
from scaling_perception.models.presets import at_resolution
from scaling_perception.scaling.dry_run import MFU, encoder_family, encoding_macs
from scaling_perception.scaling.study import Cell
from scaling_perception.scaling.study_table import read_metrics
from scaling_perception.scaling.topologies import CHIPS
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.support.files import read_json
from scaling_perception.support.verbs import make_parser
from scaling_perception.tasks import get_task
from scaling_perception.training.diffusion import network_of

# Money (USD) of a chip-hour without commitment; they change often: --price sets others.
PRICES = {"v5e": 1.20, "v5p": 4.20, "h100": 3.00}
PRICES_FROM = (
    "USD without commitment: v5e and v5p Google Cloud's list for the US in 2025; h100 the middle of 2.49 to 3.99 at "
    "GPU clouds early in 2026; assumed, set yours by --price"
)


class Assumption(NamedTuple):
    """What one chip is taken to do: money of an hour, share of its peak, and where the share is from."""

    price: float
    mfu: float
    source: str


class Cost(NamedTuple):
    """What one cell takes.

    Attributes:
        macs: of the network, both passes where it trains; None: not known.
        autoencoder_macs: encoding and decoding pictures.
        reason: why something is not known, or counts nothing.
    """

    name: str
    verb: str
    params: int | None
    macs: float | None
    autoencoder_macs: float
    reason: str = ""


def assumptions(prices: str = "", shares: str = "", roofline: str = "") -> dict[str, Assumption]:
    """By chip; ``prices`` and ``shares`` as ``v5e=1.2,h100=2.5``, ``roofline`` a file of ``compile --json``.

    Raises:
        UserError: an unknown chip, a value that is no positive number, a share above 1, or a file that is none.
    """
    table = {name: Assumption(price, MFU, "assumed") for name, price in PRICES.items()}
    if roofline:
        for name, share in _of_roofline(Path(roofline)).items():
            if name in table:
                table[name] = table[name]._replace(mfu=share, source=f"roofline at best, {roofline}")
    for flag, text, field, most in (("--price", prices, "price", math.inf), ("--mfu", shares, "mfu", 1.0)):
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in CHIPS:
                raise UserError(f"{flag} {part}: unknown chip{did_you_mean(name, CHIPS)}")
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if not 0 < number <= most or math.isinf(number):
                raise UserError(f"{flag} {part}: give a number above 0{', up to 1' if most == 1 else ''}: {name}=0.4")
            before = table.get(name, Assumption(math.nan, MFU, "assumed"))
            table[name] = before._replace(**{field: number}, **({"source": "--mfu"} if field == "mfu" else {}))
    return table


def _of_roofline(path: Path) -> dict[str, float]:
    reports = read_json(path)
    found: dict[str, float] = {}
    for report in reports if isinstance(reports, list) else ():
        if isinstance(report, dict) and report.get("estimate") and report.get("chip"):
            found.setdefault(report["chip"]["name"], min(float(report["estimate"]["mfu_best"]), 1.0))
    if not found:
        raise UserError(
            f"--roofline {path}: holds no estimate: write it by `scaling-perception compile … --json {path}`"
        )
    return found


def measured_flops(workdir: Path) -> tuple[float, str]:
    """FLOPs a second of a training run's later half, and the device that did them.

    Raises:
        UserError: the folder holds no run, or one too short to tell.
    """
    if not all((workdir / name).is_file() for name in ("run.json", "metrics.jsonl")):
        raise UserError(f"--measured {workdir}: is no folder of a training run: give the --workdir of one")
    rows = [row for row in read_metrics(workdir) if row.get("samples_per_second")]
    record = read_json(workdir / "run.json")
    each = record.get("macs_per_sample")
    if not rows or not each:
        raise UserError(f"--measured {workdir}: holds no speed of a diffusion run: train one for some hundred steps")
    later = rows[len(rows) // 2 :]
    speed = sum(row["samples_per_second"] for row in later) / len(later)
    devices = record["environment"]["devices"]
    return 2 * TRAINING_FACTOR * each * speed, f"{devices['count']} x {devices['kind']}, measured in {workdir}"


def costs(cells: Sequence[Cell], chosen: Sequence[str]) -> list[Cost]:
    """What each of the cells that are ``chosen`` takes.

    Raises:
        UserError: a cell's config or flags are wrong.
    """
    known = {cell.name: cell for cell in cells}
    return [_cost(known[name], known) for name in chosen]


def _cost(cell: Cell, known: Mapping[str, Cell]) -> Cost:
    if cell.verb == "prepare":
        return Cost(cell.name, cell.verb, None, 0.0, 0.0, "rendering, reading and encoding are not counted")
    if cell.verb == "train":
        config = _config(cell)
        dit, samples = network_of(config), int(config.train.batch_size) * int(config.train.steps)
        macs, encoding = TRAINING_FACTOR * forward_macs(dit) * samples, encoding_macs(config) * samples
        return Cost(cell.name, cell.verb, _params(dit), float(macs), float(encoding))
    return _evaluation(cell, known)


@functools.cache  # a study has few sizes and many cells, and to count means to trace the network
def _params(dit: DiTConfig) -> int:
    return count_params(dit)


def _config(cell: Cell) -> Any:
    words = [word for word in cell.words if not word.startswith("--config.")]
    overrides = [word.removeprefix("--config.") for word in cell.words if word.startswith("--config.")]
    return load_config(words[words.index("--config") + 1], overrides)


def _evaluation(cell: Cell, known: Mapping[str, Cell]) -> Cost:
    args = make_parser("evaluate").parse_args([*cell.words, "--json", "x"])
    needed, made_by = cell.needs(), cell.labels.get("made_by")
    if needed and args.model.startswith("{"):
        config = _config(known[needed[0]])
        dit, family = network_of(config), encoder_family(config)
    elif (dit := _of_folder(args.model)) is None and made_by:
        config = load_config(made_by)
        dit, family = network_of(config), encoder_family(config)
    else:
        family = None
    count = args.count or (64 if args.dataset in ENDLESS else _length(args.dataset, args.split))
    if dit is None or not count:
        what = f"model {args.model} is not here" if dit is None else f"how many images {args.dataset} has: give --count"
        return Cost(cell.name, cell.verb, None, None, 0.0, f"not known: {what}")
    steps, members = values_of(args, "steps"), max(values_of(args, "ensemble"))
    intervals = values_of(args, "cache_interval") if args.cache_interval else None
    caches = len(combinations(values_of(args, "cache"), intervals))  # each at most as dear as the cell without
    grids = caches * max(len(values_of(args, "preset")), 1) * len(values_of(args, "views"))
    solvers = values_of(args, "solver")
    passes, side = len(get_task(args.task).passes), dit.input_size * 8
    forwards = count * passes * grids * members * sum(evaluations(solver, each) for solver in solvers for each in steps)
    pictures = 0.0
    if family is not None:
        module, sizes = family
        decoded = count * passes * grids * len(solvers) * members * len(steps)
        pictures = decoded * module.macs("decoder", sizes, side, side) + count * 2 * module.macs(
            "encoder", sizes, side, side
        )
    return Cost(cell.name, cell.verb, _params(dit), float(forwards) * forward_macs(dit), float(pictures))


def _length(dataset: str, split: str) -> int:
    """How many images a dataset's split has by what is published; 0: not known."""
    from scaling_perception.data.sources.published import published

    return max(published(dataset, split), default=0)


def _of_folder(name: str) -> DiTConfig | None:
    from scaling_perception.interop.find import find_model

    try:
        card = read_json(find_model(name) / "config.json")
        return at_resolution(config_from_dict(card["model"]), card["resolution"])
    except (UserError, KeyError, TypeError):
        return None


def cost_text(found: Sequence[Cost], chips: Mapping[str, Assumption], measured: tuple[float, str] | None = None) -> str:
    """What `costs` found, as lines to read."""
    width = max(len(cost.name) for cost in found)
    lines = []
    for cost in found:
        size = "" if cost.params is None else f"{cost.params / 1e6:.3g} M"
        macs = "?" if cost.macs is None else f"{cost.macs:.3g}"
        more = f"  + {cost.autoencoder_macs:.3g} for pictures" if cost.autoencoder_macs else ""
        note = f"  ({cost.reason})" if cost.reason else ""
        lines.append(f"{cost.name:<{width}}  {cost.verb:8}  {size:>8}  {macs:>9} MACs{more}{note}")
    kinds = {verb: sum(cost.verb == verb for cost in found) for verb in dict.fromkeys(cost.verb for cost in found)}
    whole = sum((cost.macs or 0.0) + cost.autoencoder_macs for cost in found)
    unknown = [cost.name for cost in found if cost.macs is None]
    counts = ", ".join(f"{count} {verb}" for verb, count in kinds.items())
    lines += ["", f"cells     {len(found)}: {counts}"]
    lines.append(f"MACs      {whole:.3g} in all, {TRAINING_FACTOR} x the forward pass where a network is trained")
    if unknown:
        lines.append(f"          without {len(unknown)} cell(s) whose compute is not known: {', '.join(unknown[:4])}")
    for name, chip in chips.items():
        hours = 2 * whole / (CHIPS[name].flops * chip.mfu * 3600)
        money = "" if math.isnan(chip.price) else f", {hours * chip.price:.4g} USD at {chip.price:g} an hour"
        share = f"{chip.mfu:.0%} of the peak ({chip.source})"
        lines.append(f"{name:9} {hours:.4g} chip-hours at {share}{money}")
    if measured is not None:
        speed, device = measured
        lines.append(f"here      {2 * whole / speed / 3600:.4g} hours at {speed / 1e9:.3g} GFLOP/s ({device})")
    lines.append(f"prices    {PRICES_FROM}")
    return "\n".join(lines)
