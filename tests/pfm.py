"""Writing .pfm files, which the package only reads."""

import numpy as np


def write_pfm(path, array):
    """(H, W) or (H, W, 3) float32, little-endian."""
    kind, (height, width) = "PF" if array.ndim == 3 else "Pf", array.shape[:2]
    rows = np.ascontiguousarray(array[::-1], "<f4").tobytes()
    path.write_bytes(f"{kind}\n{width} {height}\n-1.0\n".encode() + rows)
