"""Rows by index, in jnp: taken without reading past the end, and added up in a fixed order."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .tables import counting_sort


def rows_at(rows: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(rows[index] in float32, whether each index is that of a row). For any other index some row is taken.

    The barrier is for speed: without it XLA may fuse the gather with what makes the index, and compute each index anew
    for every element of its row.
    """
    index = lax.optimization_barrier(index)
    valid = (index >= 0) & (index < rows.shape[0])
    taken = rows.at[index].get(mode="clip", wrap_negative_indices=False)
    return taken.astype(jnp.float32), valid[..., None]


def add_rows(terms: jax.Array, dest: jax.Array, num_rows: int) -> jax.Array:
    """out[r] = the sum of the terms whose dest is r, added in a fixed order.

    On a GPU a scatter-add would leave the order to atomics. So the terms are sorted by destination, and those of each
    destination are added as a tree: a b c d e become (a+b) . (c+d) . e, then (a+b+c+d) . . . e, then their sum in the
    first place. The number of steps is the logarithm of the most terms that any destination has, found at run time.
    """
    if terms.shape[0] == 0 or num_rows == 0:
        return jnp.zeros((num_rows, *terms.shape[1:]), terms.dtype)
    order, offsets = counting_sort(dest, num_rows)
    counts = jnp.diff(offsets)
    index = jnp.arange(terms.shape[0], dtype=jnp.int32)
    dest = dest[order]  # a dest that is out of range gets the bounds of some other row; nobody reads its sums
    first = offsets.at[dest].get(mode="clip", wrap_negative_indices=False)
    end = jnp.where(index < offsets[-1], offsets.at[dest + 1].get(mode="clip", wrap_negative_indices=False), 0)

    def add_neighbours(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, sums = state
        pair_up = ((index - first) % (2 * step) == 0) & (index + step < end)
        return 2 * step, sums + jnp.where(pair_up[:, None], sums.at[index + step].get(mode="clip"), 0)

    longest = jnp.max(counts)
    _, sums = lax.while_loop(lambda state: state[0] < longest, add_neighbours, (jnp.ones_like(longest), terms[order]))
    return jnp.where(counts[:, None] > 0, sums.at[offsets[:-1]].get(mode="clip"), 0)


def add_choices(rows: jax.Array, num_rows: int, top_k: int, dtype: Any) -> jax.Array:
    """[..., num_rows, N] of this dtype: of `top_k` rows that belong to one, the sum, in float32."""
    if top_k == 1:
        return rows
    by_row = rows.reshape(*rows.shape[:-2], num_rows, top_k, rows.shape[-1])
    return jnp.sum(by_row, axis=-2, dtype=jnp.float32).astype(dtype)
