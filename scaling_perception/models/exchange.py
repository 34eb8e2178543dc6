"""Rows that travel to the devices that have their experts, and back: who sends which rows where, and the sending.

Every device has its rows sorted by expert. Experts are split over the mesh axis ``expert`` in order, so a device's rows
for another are contiguous, and so are those for each expert. A receiver's rows are sorted by expert too, and those of
an expert by sender; that fixes the place of every row from the counts alone, which all devices have. What a receiver
has room for at a time is a window of its rows; most often one window holds them all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scaling_perception.support.shapes import AnyArray, Array, Float, Int

AXIS = "expert"
ROOM = 1.25
"""Rows of a window, as a multiple of a device's share where all experts have equally many."""
OVERFLOW = "overflow_windows"
"""The name, in a program's text, of the loop over the windows after the first: with an even load it never runs."""
BACK = "rows_back"
"""The name, in a program's text, of what is sent from the experts."""


class Slices(NamedTuple):
    """What one device sends and receives in an exchange, in P = devices x experts of a device slices of rows; slice
    p goes to (or comes from) device p // (experts of a device).

    Attributes:
        start, size: (P,) int32, where it begins among the rows that this device sends, and how many rows it has.
        to: (P,) int32, where it begins on its receiver. comes: (P,) int32, how many rows come in each.
    """

    start: Int[Array, " P"]
    size: Int[Array, " P"]
    to: Int[Array, " P"]
    comes: Int[Array, " P"]


class Window(NamedTuple):
    """The rows ``first`` … ``first + length - 1`` of every receiver.

    Attributes:
        out: from the senders to the receivers, whose buffer begins at ``first``. back: the same rows the other way.
        sizes: (count,) int32, the rows of each of this device's experts among them.
    """

    out: Slices
    back: Slices
    sizes: Int[Array, " count"]


def window(counts: Int[AnyArray, "G E"], me: Any, first: Any, length: int) -> Window:
    """What device ``me`` sends and receives of a window.

    Args:
        counts: (G, E) int32, the rows of each of the G devices for each of the E experts, G of which E is a multiple.
    """
    devices, experts = counts.shape
    count = experts // devices

    def mine(table: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(table, me * count, count, axis=1).reshape(-1)

    start = jnp.cumsum(counts, axis=1) - counts  # (sender, expert): among the sender's rows
    totals = counts.sum(axis=0).reshape(devices, count)
    heads = (jnp.cumsum(totals, axis=1) - totals).reshape(-1)  # where an expert begins on its device
    place = heads[None] + jnp.cumsum(counts, axis=0) - counts  # (sender, expert): among the receiver's rows
    low, high = (jnp.clip(edge - place, 0, counts) for edge in (first, first + length))
    size = high - low
    start, place = (jnp.where(size > 0, table + low, 0) for table in (start, place - first))
    out = Slices(start[me], size[me], place[me], mine(size))
    back = Slices(mine(place), mine(size), mine(start), size[me])
    return Window(out, back, mine(size).reshape(devices, count).sum(axis=0))


def busiest(counts: Int[AnyArray, "G E"]) -> Int[Array, ""]:
    """The most rows that any device of the group receives."""
    return counts.sum(axis=0).reshape(counts.shape[0], -1).sum(axis=1).max()


def pack(rows: Float[AnyArray, "R D"]) -> Float[Array, "R P W"]:
    """Rows as a TPU sends them, each in one piece of its memory: the tiles of a matrix interleave 8 or 16 rows. Columns
    are padded with 0 to whole tiles of P x 128, P = 2 in bfloat16 and 1 in float32."""
    count, width = rows.shape
    lines = 4 // rows.dtype.itemsize
    return jnp.pad(rows, ((0, 0), (0, -width % (lines * 128)))).reshape(count, lines, -1)


def unpack(rows: Float[AnyArray, "R P W"], width: int) -> Float[Array, "R D"]:
    """The rows, of D = ``width`` columns, that ``pack`` was given."""
    return rows.reshape(rows.shape[0], -1)[:, :width]


def send(
    rows: Float[AnyArray, " M *more"], into: Float[AnyArray, " R *more"], slices: Slices, native: bool
) -> Float[Array, " R *more"]:
    """``into`` with the rows that come in their places; all devices of the axis together, under ``shard_map``.

    Args:
        native: with XLA's ``ragged-all-to-all``; otherwise every device gathers all rows and takes its own, which is
            the same function of the same slices for a platform that lacks the operation (CPU).
    """
    if native:
        return jax.lax.ragged_all_to_all(rows, into, *slices, axis_name=AXIS)
    devices, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)

    def to_me(array: jax.Array) -> jax.Array:
        return jax.lax.all_gather(array.reshape(devices, -1), AXIS)[:, me].reshape(-1)

    start, size, to = (to_me(array) for array in slices[:3])
    place = jnp.arange(into.shape[0])[:, None]
    hit = (place >= to[None]) & (place < (to + size)[None])
    found = jnp.argmax(hit, axis=1)
    row = (start - to)[found] + place[:, 0]
    sender = found // (size.shape[0] // devices)
    mine = hit.any(axis=1).reshape(-1, *[1] * (into.ndim - 1))
    return jnp.where(mine, jax.lax.all_gather(rows, AXIS)[sender, row], into)
