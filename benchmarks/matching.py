"""Flow of the matching alone (models/matching.py), without a model: what the network that is given it has to improve.

    python benchmarks/matching.py flying_chairs --data DIR [--split all] [--resolution 128]

Frames at the model's square, the flow bilinear to the truth's size, as ``evaluate --task flow`` measures.
"""

import argparse

import jax
import numpy as np

from scaling_perception.data.sources import open_source
from scaling_perception.evaluation.intervals import bootstrap_ci
from scaling_perception.evaluation.protocols import get_protocol
from scaling_perception.models import matching
from scaling_perception.tasks import TaskOptions, flow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--data", default="", help="folder of the data")
    parser.add_argument("--split", default="all")
    parser.add_argument("--count", type=int, default=0, help="samples (0: all)")
    parser.add_argument("--resolution", type=int, default=128)
    args = parser.parse_args()
    protocol, options = get_protocol("flow", args.dataset), TaskOptions(flow_frame="square")
    extra = {"count": args.count, "resolution": args.resolution} if not args.data else {}
    source, run = open_source(args.dataset, args.data, args.split, "flow", **extra), jax.jit(matching.match)
    found: dict[str, list[float]] = {"matching": [], "zero": [], "oracle_mean": []}
    for index in range(min(args.count or len(source), len(source))):
        raw = flow.prepare(source[index], protocol)
        given = flow.conditions(raw, args.resolution, options)
        matched = np.asarray(run(given["image"][None], given["prompt"][None])["filled"][0])
        trivial = flow.flow_baselines(raw["flow"], raw["valid"])
        for name, answer in {"matching": flow.native(matched, raw["image"].shape[:2], options), **trivial}.items():
            found[name].append(flow.measure(answer, raw, protocol)["epe"])
    for name, errors in found.items():
        between = bootstrap_ci(np.asarray(errors), seed=0)
        interval = "[n < 5]" if between is None else f"[{between[0]:.3f}, {between[1]:.3f}]"
        print(f"{name:12} EPE {np.mean(errors):7.3f} px {interval}, {len(errors)} pairs of {args.dataset}")


if __name__ == "__main__":
    main()
