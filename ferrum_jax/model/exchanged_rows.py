"""The arithmetic of the exchange: which rows each device sends to which, if each holds some of the experts.

offsets[s, e] is where expert e's rows begin in sender s's packed rows. counts[s, d] is how many rows sender s has for
device d.
"""

import jax
import jax.numpy as jnp


def bounds_of(offsets: jax.Array) -> jax.Array:
    """[D, D+1]: where in sender s's packed rows those for device d begin, and in the last column where all end."""
    return offsets[:, :: max((offsets.shape[1] - 1) // offsets.shape[0], 1)]


def packed_rows_of(counts: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """(start, size), both [sender, device]: where a sender's rows begin in a device's `rows` rows, and how many fit.

    The rows of one sender follow those of another without a gap.
    """
    end = jnp.cumsum(counts, axis=0, dtype=jnp.int32)
    start = jnp.minimum(end - counts, rows)
    return start, jnp.minimum(end, rows) - start


def slotted_rows_of(counts: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The same, where each sender has an equal share of the device's rows."""
    slots = rows // counts.shape[0]
    start = jnp.broadcast_to(jnp.arange(counts.shape[0], dtype=jnp.int32)[:, None] * slots, counts.shape)
    return start, jnp.minimum(counts, slots)


def experts_of_rows(ends: jax.Array, start: jax.Array, size: jax.Array, rows: int) -> jax.Array:
    """The local expert of each of a device's rows; -1 for a row that nobody sent.

    ends[s, e]: the number of sender s's rows for experts up to e, with e. They begin at start[s]; size[s] of them came.
    """
    ends = start[:, None] + jnp.minimum(ends, size[:, None])
    ends_passed = _passed(ends.reshape(-1), rows)
    inside = _passed(start, rows) > _passed(start + size, rows)
    return jnp.where(inside, ends_passed % ends.shape[1], -1)


def _passed(marks: jax.Array, rows: int) -> jax.Array:
    """For each row, how many of the marks stand at it or before it."""
    return jnp.cumsum(jnp.zeros(rows + 1, jnp.int32).at[marks].add(1, mode="drop"), dtype=jnp.int32)[:rows]
