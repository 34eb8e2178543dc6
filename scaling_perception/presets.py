"""Every model size: parameters, MACs, layers, width."""

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLES = """
scaling-perception presets
scaling-perception presets --json
scaling-perception presets --published
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the table as JSON, for other programs")
    parser.add_argument("--published", action="store_true", help="the paper's Tables 1 and 2 beside these counts")


COUNTS = Path(__file__).parent / "models" / "preset_counts.json"
"""Parameters of every preset, as ``count`` finds them: tracing every network to print a table takes seconds."""


def count(name: str) -> dict[str, int]:
    """Parameters of a preset, and of it with a condition latent, counted from the shapes of its arrays."""
    import dataclasses

    from scaling_perception.models.dit import count_active_params, count_params
    from scaling_perception.models.presets import get_preset

    config = get_preset(name)
    depth_model = dataclasses.replace(config, cond_channels=config.in_channels)
    return {
        "params": count_params(config),
        "active_params": count_active_params(config),
        "params_8ch": count_params(depth_model),
        "active_params_8ch": count_active_params(depth_model),
    }


def describe(name: str) -> dict[str, Any]:
    """What is known of a preset before any array is built; all numbers exact.

    ``macs_<pixels>``: forward MACs of the preset as it is; ``macs_<pixels>_8ch``: with 8 input channels, the noisy
    latent and one condition latent, as for depth (facts 1.2). ``active_params``: those that one token meets.
    """
    import dataclasses

    from scaling_perception.models.compute import forward_macs
    from scaling_perception.models.presets import LATENT_FACTOR, get_preset

    config = get_preset(name)
    depth_model = dataclasses.replace(config, cond_channels=config.in_channels)
    return {
        "name": name,
        **json.loads(COUNTS.read_text(encoding="utf-8"))[name],
        "macs_256": forward_macs(config, 256),
        "macs_512": forward_macs(config, 512),
        "macs_256_8ch": forward_macs(depth_model, 256),
        "macs_512_8ch": forward_macs(depth_model, 512),
        "resolution": config.input_size * LATENT_FACTOR,
        "macs": forward_macs(config),
        "layers": config.depth,
        "dim": config.dim,
        "heads": config.heads,
        "head_dim": config.head_dim,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "cond_channels": config.cond_channels,
        "input_channels": config.input_channels,
        "out_channels": config.out_channels,
        "num_classes": config.num_classes,
        "task_labels": config.task_labels,
        "routed": config.routed,
        "learn_sigma": config.learn_sigma,
        "experts": config.experts,
        "active_experts": config.active_experts if config.experts else 0,
        "expert_mlp": config.expert_mlp if config.experts else "",
        "shared_experts": config.shared_experts,
        "gating": config.gating if config.experts else "",
    }


def _short(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    head = ["name", "params", "active", "GMAC 256", "GMAC 512", "layers", "dim", "heads", "head dim", "pixels", "in ch"]
    lines = [head]
    for row in rows:
        macs = [f"{row[field] / 1e9:.2f}" for field in ("macs_256", "macs_512")]
        sizes = [str(row[f]) for f in ("layers", "dim", "heads", "head_dim", "resolution", "input_channels")]
        lines.append([row["name"], _short(row["params"]), _short(row["active_params"]), *macs, *sizes])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    note = "GMAC: forward multiply-accumulates of one sample in billions, without the autoencoder (1 MAC = 2 FLOPs)."
    return "\n".join([*text, "", note])


def published_table() -> str:
    """The counts of the paper's Tables 1 and 2 beside ours, and whether they agree in the digits that it prints.

    It truncates some and rounds others; either is taken.
    """
    from scaling_perception.models.dit import count_active_params, count_params
    from scaling_perception.models.presets import get_preset
    from scaling_perception.scaling.paper_laws import published_values

    counts = {"params": count_params, "active_params": count_active_params}
    lines = [f"{'table':6}  {'model':10}  {'count':13}  {'published':>9}  {'ours':>13}"]
    for figure in ("tab1", "tab2"):
        for one in published_values(figure):
            ours, digits = counts[one.metric](get_preset(one.settings)), len(one.text.split("e")[0].replace(".", ""))
            unit = 10.0 ** (len(f"{one.value:.0f}") - digits)
            word = "equal" if round(one.value / unit) in (int(ours / unit), round(ours / unit)) else "differs"
            lines.append(f"{figure:6}  {one.settings:10}  {one.metric:13}  {one.text:>9}  {ours:>13,}  {word}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    from scaling_perception.models.presets import preset_names

    if args.published:
        print(published_table())
        return

    rows = [describe(name) for name in preset_names()]
    print(json.dumps(rows, indent=2) if args.json else table(rows))
