"""Arrays of tasks in signatures, by what they are; the letters are those of ``support.shapes``, without JAX."""

import numpy as np
from jaxtyping import Bool, Float, Real, Shaped, UInt8

Pixels = Real[np.ndarray, "P M R R 3"]  # decoded, about [-1, 1]
Members = Real[np.ndarray, "M R R *C"]
Map = Float[np.ndarray, "R R *C"]  # at the model's resolution
Spread = Float[np.ndarray, "R R"]
Native = Shaped[np.ndarray, "H W *C"]  # at the picture's own size
Mask = Bool[np.ndarray, "H W"]
Colours = UInt8[np.ndarray, "H W 3"]
Plain = Real[np.ndarray, "H W"]
Unchecked = Real[np.ndarray, "..."]  # of a shape that the function checks itself
Size = tuple[int, int]
