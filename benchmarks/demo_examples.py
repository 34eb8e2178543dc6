"""Render the example pictures of `scaling-perception demo` from the package's own worlds (test split).

    python benchmarks/demo_examples.py

Each example is a picture, the next frame, and the mask of an object's visible part, in the folder examples of the demo.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from scaling_perception.data.sources import open_source
from scaling_perception.support.files import atomic_path

OUT = Path(__file__).resolve().parents[1] / "scaling_perception" / "demo" / "examples"
CHOSEN = {"table": 20, "room": 9, "corridor": 18}
RESOLUTION = 384


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, index in CHOSEN.items():
        sample = open_source("worlds", "", "test", "amodal", count=1, start=index, resolution=RESOLUTION)[0]
        for end, field in (("", "image"), ("_next", "image2")):
            with atomic_path(OUT / f"{name}{end}.jpg") as path:
                Image.fromarray(sample[field]).save(path, quality=88, optimize=True)
        with atomic_path(OUT / f"{name}_visible.png") as path:
            Image.fromarray(sample["visible_mask"].astype(np.uint8) * 255).convert("1").save(path, optimize=True)


if __name__ == "__main__":
    main()
