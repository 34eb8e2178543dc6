"""Whether what is traced is one device's own samples (``parallel.mesh.on_own``): their axes are taken then."""

import jax

OWN = "own_samples"  # name of the vmapped axis, an entry of which is one device of the batch axes


def inside_own() -> bool:
    """Whether this is traced inside ``parallel.mesh.on_own``."""
    try:
        jax.lax.axis_size(OWN)
    except NameError:
        return False
    return True
