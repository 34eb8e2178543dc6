"""Processor seconds (user and system) of `--help`, and of `predict` of one picture with a full compilation cache.

    python benchmarks/startup.py [--rounds 5] [--against CHECKOUT]

Each round runs `import jax`, `--help` and `predict` once, each in a process of its own; with --against also those of
another checkout of this repository, in turn, so that the load of the machine affects both alike.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PREDICT = ["predict", "--task", "depth", "--model", "mini", "--overwrite", "--out", "out", "photo.png"]


def cpu_seconds(words: list[str], checkout: Path, folder: Path) -> float:
    """Of one process that imports the package from ``checkout`` and must succeed."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(folder / checkout.name)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout")
    args = parser.parse_args()
    checkouts = [ROOT] if args.against is None else [args.against.resolve(), ROOT]
    verbs = {"--help": ["--help"], "predict": PREDICT}
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.linear_gradient("L").resize((320, 240)).convert("RGB").save(folder / "photo.png")
        for checkout in checkouts:
            cpu_seconds(["-m", "scaling_perception", *PREDICT], checkout, folder)  # fills the cache
        for _ in range(args.rounds):
            seconds.setdefault("import jax", []).append(cpu_seconds(["-c", "import jax"], ROOT, folder))
            for verb, words in verbs.items():
                for checkout in checkouts:
                    found = cpu_seconds(["-m", "scaling_perception", *words], checkout, folder)
                    seconds.setdefault(f"{verb} ({checkout.name})", []).append(found)
    for what, found in seconds.items():
        print(f"{what:40} median {statistics.median(found):.2f} s, least {min(found):.2f} s")


if __name__ == "__main__":
    main()
