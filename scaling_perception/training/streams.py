"""Random streams of a run, by name, so that no two of them ever draw from the same key.

A step's key is ``fold_in(key, step)``, as it has always been: runs that were begun earlier go on as they would have.
Every other stream has a fold of its own before its number:

    key of (name, number) = fold_in(fold_in(key, tag of name), number)

The tag is a hash of the name with its highest bit set, so that it is no step's number, and a fold of one key by two
different numbers gives two different keys (threefry permutes its counter). What is drawn per sample folds the sample's
place into these keys (``training/diffusion.py``). Order of data and pictures of scenes come from numpy's generators,
which are seeded with words of their own and share nothing with these.
"""

import hashlib

import jax

NAMES = ("init", "held_out", "average")


def tag(name: str) -> int:
    """Stable hash of a stream's name, 2^31 to 2^32 - 1.

    Raises:
        KeyError: the name is not in `NAMES`, whose tags are known to differ.
    """
    if name not in NAMES:
        raise KeyError(f"no stream '{name}': add it to {NAMES}")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") | 1 << 31


def step_key(key: jax.Array, step: jax.Array | int) -> jax.Array:
    """The key of a training step. ``step``: int32, 0 to 2^31 - 1."""
    return jax.random.fold_in(key, step)


def stream_key(key: jax.Array, name: str, number: jax.Array | int = 0) -> jax.Array:
    """The key of ``number`` (a step, for a stream that draws at each) in the stream ``name``."""
    return jax.random.fold_in(jax.random.fold_in(key, tag(name)), number)
