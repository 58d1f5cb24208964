"""The meanings of the grouped products with quantised matrices: a loop in jnp over the live blocks.

A block's matrix is turned into floats as it is used, a few of its rows at a time, so that they stay in the cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core.quantized import entries, rounded_rows, scale_rows
from ..core.sharding import equally_varying
from ..kernels import lead_axes
from .grouped_meaning import Tables, flat, live_blocks, loop, own_slice, rows_of, with_ranks

_TILE = 2**20  # so many entries of a matrix are floats at a time


def quantized_products(
    lhs: jax.Array,
    tables: Tables,
    values: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    top_k: int,
    dtype: str,
    form: str,
    block: tuple[int | None, int | None],
    parts: int,
    activations: str | None,
    width: int,
    transposed: bool,
) -> jax.Array:
    """Each slot's row of lhs times the matrix of its block's expert, or times the transposed matrix.

    values, scales, zeros: of a stack of layers, as `QuantizedMatrices` says. width: columns of the result.
    """
    stored = [x for x in (values, scales, zeros) if x is not None]
    lead = lead_axes((lhs, 2), *[(x, 4) for x in stored], (layer, 0), *with_ranks(tables))
    num_pairs, (experts, rows_stored) = lhs.shape[-2] * top_k, values.shape[-3:-1]
    if 0 in (num_pairs, *tables[0].shape, *values.shape):
        return lax.full((*lead, num_pairs, width), 0, dtype)
    layer = flat(lax.clamp(jnp.int32(0), layer, jnp.int32(values.shape[-4] - 1)), lead)
    lhs, stored = flat(rounded_rows(lhs) if activations else lhs, lead), [flat(x, lead) for x in stored]
    more, live = live_blocks(tables, lead, experts)
    of_row = jnp.asarray(scale_rows(rows_stored, block[0], parts))
    tile = _tile(rows_stored, lhs.shape[-1] if not transposed else width)

    def matrix_rows(first: jax.Array, mine: list[jax.Array]) -> jax.Array:
        """`tile` rows of the stored matrix, as float32."""
        own = [lax.dynamic_slice_in_dim(mine[0], first, tile)]
        own += [x.at[lax.dynamic_slice_in_dim(of_row, first, tile)].get(mode="promise_in_bounds") for x in mine[1:]]
        return entries(form, block[1], *own)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        slice_id, expert, slot = live(i)
        # Without the barrier, XLA may turn all experts' matrices into floats ahead of the loop.
        *arrays, expert = lax.optimization_barrier((*stored, expert))
        own_layer = layer[own_slice(layer, 0, slice_id)]
        mine = [_matrix(x, (*own_slice(x, 4, slice_id), own_layer, expert)) for x in arrays]
        rows = rows_of(lhs, slice_id, slot, top_k).astype(jnp.float32)  # of padding too, whose product is dropped
        start = equally_varying([lax.full((slot.size, width), 0, jnp.float32), rows, *mine])[0]

        def add_tile(number: jax.Array, product: jax.Array) -> jax.Array:
            first = number * tile
            matrix = matrix_rows(first, mine)
            if transposed:
                part = lax.dynamic_slice_in_dim(rows, first, tile, axis=1)
                return product + _dot(part, matrix, 0)
            return lax.dynamic_update_slice_in_dim(product, _dot(rows, matrix, 1), first, axis=1)

        product = lax.fori_loop(jnp.int32(0), jnp.int32(rows_stored // tile), add_tile, start)
        place = *own_slice(out, 2, slice_id), slot
        return out.at[place].set(product.astype(dtype), mode="drop", wrap_negative_indices=False)

    out, *_ = equally_varying([flat(lax.full((*lead, num_pairs, width), 0, dtype), lead), lhs, *stored])
    return loop(more, step, out).reshape(*lead, num_pairs, width)


def _dot(rows: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    return lax.dot_general(rows, matrix, (((1,), (axis,)), ((), ())), lax.Precision.HIGHEST)


def _matrix(x: jax.Array, index: tuple[Any, ...]) -> jax.Array:
    """One expert's part of an array with axes for the batch, layers and experts before its last two."""
    shape = x.shape[-2:]
    start = *index, *[lax.full_like(index[-1], 0)] * 2
    sizes = (1,) * len(index) + shape
    return lax.dynamic_slice(x, start, sizes, allow_negative_indices=False).reshape(shape)


def _tile(rows: int, width: int) -> int:
    """The largest divisor of the rows that keeps a tile's entries within `_TILE`, or all of them if they are few."""
    most = max(_TILE // max(width, 1), 1)
    return next(d for d in range(min(rows, most), 0, -1) if rows % d == 0)
