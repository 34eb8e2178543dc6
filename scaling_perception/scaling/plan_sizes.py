"""What a plan chooses among and what it costs: sizes, the speed of a chip, its memory.

Speed is a measured figure where one is given. Else it is the smaller of two: an assumed share of the chip's peak, and
what the roofline of the network's matrix products allows (``roofline.estimate``; each product reads its factors and
writes its result once, in bfloat16; attention scores stay on the chip).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from scaling_perception.models.compute import TRAINING_FACTOR, forward_macs
from scaling_perception.models.config import DiTConfig
from scaling_perception.models.dit import count_active_params
from scaling_perception.models.presets import at_resolution, get_preset, preset_names
from scaling_perception.scaling.costs import Matmul
from scaling_perception.scaling.dry_run import describe_run
from scaling_perception.scaling.roofline import estimate
from scaling_perception.scaling.topologies import CHIPS, Chip
from scaling_perception.support.configs import load_config
from scaling_perception.support.errors import UserError, did_you_mean
from scaling_perception.training.diffusion import network_of

LADDER = ("a1", "a2", "a3", "a4", "a5", "a6")
UNITS = ("macs", "flops", "chip-hours", "usd")


class Size(NamedTuple):
    """One size. ``params`` are the active ones, NaN where the law does not ask; ``macs`` forward MACs of one sample,
    which has ``tokens``; ``dit`` and ``config`` (a spec for `train`) are None and "" for a size that is a number."""

    name: str
    params: float
    macs: float
    resolution: int = 0
    dit: DiTConfig | None = None
    config: str = ""
    tokens: float = 1.0


class Speed(NamedTuple):
    """What turns MACs into time and money: ``chip`` None where nothing asks. ``measured`` share of the peak, or
    ``per_mac`` seconds a MAC that were measured; ``assumed`` share; ``price`` of a chip-hour."""

    chip: Chip | None = None
    chips: int = 1
    assumed: float = 0.4
    measured: float | None = None
    per_mac: float | None = None
    price: float = math.nan
    memory: float = math.inf


def named_sizes(names: Sequence[str], resolutions: Sequence[int], template: str, params: bool) -> list[Size]:
    """Sizes of networks, at each resolution.

    Args:
        names: presets, or what the config file ``template`` takes in place of ``{size}``; ``{resolution}`` too.
        template: the config of `train`; empty: presets alone.
        params: whether to count parameters.

    Raises:
        UserError: an unknown name, or a resolution that the model cannot have.
    """
    sizes = []
    for name in dict.fromkeys(names):
        for pixels in dict.fromkeys(resolutions):
            spec = template.replace("{size}", name).replace("{resolution}", str(pixels))
            if spec:
                dit = network_of(load_config(spec.replace("{steps}", "1000")))
            else:
                dit = at_resolution(_preset(name), pixels)
            count = float(count_active_params(dit)) if params else math.nan
            sizes.append(Size(name, count, float(forward_macs(dit)), dit.input_size * 8, dit, spec, dit.tokens))
    return sizes


def stage_macs(size: Size) -> tuple[float, float]:
    """Forward MACs of a sample in two trainings of a size: the dense network's that its experts are copied from, then
    its own; the same twice for a dense one."""
    if size.dit is None or not size.dit.experts:
        return size.macs, size.macs
    return float(forward_macs(dataclasses.replace(size.dit, experts=0))), size.macs


def _preset(name: str) -> DiTConfig:
    if name not in preset_names():
        raise UserError(f"--sizes {name}{did_you_mean(name, preset_names())}")
    return get_preset(name)


def chip_named(name: str) -> Chip:
    """A chip by its name.

    Raises:
        UserError: it is not known; the nearest name is offered.
    """
    if name not in CHIPS:
        raise UserError(f"--chip {name}{did_you_mean(name, CHIPS)}")
    return CHIPS[name]


def forward_matmuls(dit: DiTConfig, batch: int) -> tuple[list[Matmul], int]:
    """The matrix products of a forward pass over ``batch`` samples, and the bytes that they move, in bfloat16."""
    rows, width, layers = batch * dit.tokens, dit.dim, dit.depth
    found: list[Matmul] = []
    moved = 0

    def product(m: int, k: int, n: int, times: int) -> None:
        nonlocal moved
        found.append(Matmul(m, n, k, 2 * m * n * k, times))
        moved += 2 * (m * k + k * n + m * n) * times

    product(rows, width, 3 * width, layers)
    product(rows, width, width, layers)
    product(batch, width, 6 * width, layers)
    if dit.experts:
        each = max(math.ceil(rows * dit.active_experts / dit.experts), 1)
        matrices = 2 if dit.expert_mlp == "swiglu" else 1
        product(each, width, matrices * dit.hidden, layers * dit.experts)
        product(each, dit.hidden, width, layers * dit.experts)
        if dit.shared_experts:
            product(rows, width, 2 * dit.shared_experts * width, layers)
            product(rows, dit.shared_experts * width, width, layers)
    else:
        product(rows, width, dit.hidden, layers)
        product(rows, dit.hidden, width, layers)
    scores = batch * dit.heads * layers
    head = width // dit.heads
    found.append(Matmul(dit.tokens, dit.tokens, head, 2 * dit.tokens**2 * head, 2 * scores))
    return found, moved


def bound(chip: Chip, dit: DiTConfig, batch: int, training: bool = False) -> float:
    """Seconds that a pass over ``batch`` samples takes at least on one chip; forward and backward where it trains."""
    products, moved = forward_matmuls(dit, batch)
    least = estimate(chip, products, (), moved, {}).best
    return least * (TRAINING_FACTOR if training else 1)


def seconds(speed: Speed, size: Size, batch: int, training: bool = False) -> tuple[float, str]:
    """Seconds of one pass of ``batch`` samples on one chip, and what that rests on."""
    macs = size.macs * batch * (TRAINING_FACTOR if training else 1)
    if speed.per_mac is not None and not training:
        return macs * speed.per_mac, "measured seconds of an image"
    chip = speed.chip
    if chip is None:
        raise UserError("time needs a chip: give --chip v5e (or another), or --seconds-per-image SECONDS:MACS")
    if speed.measured is not None:
        return 2 * macs / (chip.flops * speed.measured), f"measured, {speed.measured:.0%} of the peak of {chip.name}"
    taken = 2 * macs / (chip.flops * speed.assumed)
    least = bound(chip, size.dit, batch, training) if size.dit is not None else 0.0
    if least > taken:
        return least, f"roofline of {chip.name} at best, {2 * macs / (least * chip.flops):.0%} of its peak"
    allows = " (its roofline allows more)" if size.dit is not None else ""
    return taken, f"assumed, {speed.assumed:.0%} of the peak of {chip.name}{allows}"


def rates(unit: str, speed: Speed, size: Size, batch: int, members: int) -> tuple[float, float, str]:
    """MACs that one unit of the budget buys of ``size``, in training and in serving, and what that rests on."""
    if unit == "macs":
        return 1.0, 1.0, ""
    if unit == "flops":
        return 0.5, 0.5, ""
    if speed.chip is None:
        raise UserError(f"--unit {unit} needs a chip: give --chip, one of {', '.join(CHIPS)}")
    if unit == "usd" and not speed.price > 0:
        raise UserError(
            f"--unit usd: no price of {speed.chip.name} is known: give --price {speed.chip.name}=USD_AN_HOUR"
        )
    hour = 3600 / (speed.price if unit == "usd" else 1.0)
    trained, source = seconds(speed, size, batch, True)
    served, _ = seconds(speed, size, members)
    return TRAINING_FACTOR * size.macs * batch / trained * hour, size.macs * members / served * hour, source


def memory_of(size: Size, chips: int) -> dict[str, Any]:
    """``memory`` of a dry run of the size's config: bytes on each of so many chips.

    Raises:
        UserError: the config cannot run on so many chips.
    """
    return describe_run(load_config(size.config.replace("{steps}", "1000")), chips)["memory"]


def first_that_fits(
    order: Sequence[int], sizes: Sequence[Size], of: Callable[[int], int], speed: Speed
) -> tuple[int | None, dict[str, str]]:
    """The first option of ``order`` whose size fits the memory of a chip, and what was found of each size looked at.

    Args:
        of: the index of an option's size.
    """
    found: dict[str, str] = {}
    fits: dict[int, bool] = {}
    for option in order:
        at = of(option)
        if at not in fits:
            size = sizes[at]
            fits[at] = True
            if size.config and not math.isinf(speed.memory):
                total = memory_of(size, speed.chips)["total"]
                fits[at] = total <= speed.memory
                text = f"{total / 1e9:.3g} GB by the dry run, of {speed.memory / 1e9:.3g} GB"
                found[f"{size.name} at {size.resolution}"] = text if fits[at] else text + ": does not fit"
        if fits[at]:
            return option, found
    return None, found
