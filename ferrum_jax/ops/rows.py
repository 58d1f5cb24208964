"""Rows by index, in jnp: to take them without reading past the end, and to add them up in a fixed order."""

import jax
import jax.numpy as jnp
from jax import lax

from .tables import counting_sort


def rows_at(rows: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """rows[index] in float32, and a mask of the indices that are in range. Out of range, some other row is returned.

    The barrier keeps XLA from fusing whatever makes the index: it would compute it again for each element of a row.
    """
    index = lax.optimization_barrier(index)
    valid = (index >= 0) & (index < rows.shape[0])
    taken = rows.at[index].get(mode="clip", wrap_negative_indices=False)
    return taken.astype(jnp.float32), valid[..., None]


def add_rows(terms: jax.Array, dest: jax.Array, num_rows: int) -> jax.Array:
    """out[r] = the sum of the terms whose dest is r, in a fixed order: a pairwise tree over each destination's terms.

    Terms a b c d e of one destination, side by side after the sort, become (a+b) . (c+d) . e, then (a+b+c+d) . . . e,
    then their sum in the first place. A scatter-add would leave the order to atomics on a GPU. The tree's depth is the
    logarithm of the most terms that any destination has, found at run time.
    """
    if terms.shape[0] == 0 or num_rows == 0:
        return jnp.zeros((num_rows, *terms.shape[1:]), terms.dtype)
    order, offsets = counting_sort(dest, num_rows)
    counts = jnp.diff(offsets)
    index = jnp.arange(terms.shape[0], dtype=jnp.int32)
    dest = dest[order]  # out of range, it borrows the bounds of another row, and its sums are never read
    first = offsets.at[dest].get(mode="clip", wrap_negative_indices=False)
    end = jnp.where(index < offsets[-1], offsets.at[dest + 1].get(mode="clip", wrap_negative_indices=False), 0)

    def add_neighbours(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, sums = state
        pair_up = ((index - first) % (2 * step) == 0) & (index + step < end)
        return 2 * step, sums + jnp.where(pair_up[:, None], sums.at[index + step].get(mode="clip"), 0)

    longest = jnp.max(counts)
    _, sums = lax.while_loop(lambda state: state[0] < longest, add_neighbours, (jnp.ones_like(longest), terms[order]))
    return jnp.where(counts[:, None] > 0, sums.at[offsets[:-1]].get(mode="clip"), 0)
