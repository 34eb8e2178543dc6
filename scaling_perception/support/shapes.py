"""Arrays in signatures: jaxtyping's annotations, with one letter for one size everywhere.

    B batch    M members      T tokens    D width of the tokens       H W sides of a picture in pixels
    C channels E experts      L layers    K experts that a token meets    h w sides of a latent
    I images R side of the model's square picture
    N tokens of a whole batch R rows of experts   F hidden width    S steps   P passes, or labels   d width of a head

``Float[Array, "B h w C"]`` is an array on devices, or one that is being traced; ``Float[AnyArray, …]`` one on the host
as well. ``Real`` is any number that is not complex. A name stands for one size within one call, "*shape" for any
number of axes that are the same wherever it stands, and "..." for any. `pytest --shapes` checks them all.

Imports JAX: not for what the command line needs for ``--help``, nor for data workers. What has arrays of the host
alone, such as ``tasks``, takes the annotations from jaxtyping, which does not: ``Float[np.ndarray, "H W"]``.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Array as Array
from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Int as Int
from jaxtyping import Key
from jaxtyping import Real as Real
from jaxtyping import Shaped as Shaped
from jaxtyping import UInt as UInt

if TYPE_CHECKING:
    AnyArray: TypeAlias = jax.Array  # arithmetic of either gives either, which a union would not say
    EitherArray: TypeAlias = Any  # what goes into a compiled program, where it is traced, or its shape alone
else:
    AnyArray = EitherArray = jax.Array | np.ndarray
RandomKey = Key[Array, ""]
Level = Float[AnyArray, ""] | Float[AnyArray, " B"] | float
"""A level of signal or noise: of all samples, or of each."""
