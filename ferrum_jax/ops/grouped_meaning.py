"""The meanings of the grouped products: a loop in jnp over the live blocks.

Operands come with their leading axes. A batch of products is computed as one product with more blocks. A block is live
if it starts before the table's total and its expert is one of the E.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core.sharding import equally_varying
from ..core.signature import INT32_MAX
from ..kernels import lead_axes


def products(
    lhs: jax.Array,
    rhs: jax.Array,
    tables: tuple[jax.Array, ...],
    top_k: int,
    dtype: str,
    precision: str,
    transposed: bool,
) -> jax.Array:
    """Each slot's row of lhs times the matrix of its block's expert, or times the transposed matrix."""
    lead, (num_rows, _) = lead_axes((lhs, 2), (rhs, 3), *_with_ranks(tables)), lhs.shape[-2:]
    num_pairs, width = num_rows * top_k, rhs.shape[-2 if transposed else -1]
    if 0 in (num_pairs, *tables[0].shape, *rhs.shape):
        return lax.full((*lead, num_pairs, width), 0, dtype)
    lhs, rhs = _flat(lhs, lead), _flat(rhs, lead)
    more, live = _live_blocks(tables, lead, rhs.shape[-3])
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        slice_id, expert, slot = live(i)
        matrix, _ = _matrix(rhs, slice_id, expert)
        rows = _rows(lhs, slice_id, slot, top_k)  # padding takes some row, whose product is dropped
        rows = lax.dot_general(rows, matrix, contract, precision, preferred_element_type="float32")
        place = *_own_slice(out, 2, slice_id), slot
        return out.at[place].set(rows.astype(dtype), mode="drop", wrap_negative_indices=False)

    out = _loop(more, step, _zeros(lead, (num_pairs, width), dtype), lhs)
    return out.reshape(*lead, num_pairs, width)


def outer_products(
    lhs: jax.Array,
    g: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    total: jax.Array,
    *,
    top_k: int,
    num_experts: int,
    packed_rows: bool,
    precision: str,
) -> jax.Array:
    """For each expert, the sum over its slots of the outer product of the slot's rows in lhs and in g."""
    tables = slots, blocks, total
    lead, num_pairs = lead_axes((lhs, 2), (g, 2), *_with_ranks(tables)), g.shape[-2]
    shape = num_experts, lhs.shape[-1], g.shape[-1]
    if 0 in (num_pairs, *slots.shape, *shape):
        return lax.full((*lead, *shape), 0, lhs.dtype)
    lhs, g = _flat(lhs, lead), _flat(g, lead)
    more, live = _live_blocks(tables, lead, num_experts)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        slice_id, expert, slot = live(i)
        named = lax.expand_dims((slot >= 0) & (slot < num_pairs), (1,))
        # Padding gives zero rows, by selection, so NaN does not leak in.
        rows, columns = (jnp.where(named, _rows(x, slice_id, slot, k), 0) for x, k in ((lhs, top_k), (g, 1)))
        term = lax.dot_general(rows, columns, (((0,), (0,)), ((), ())), precision, preferred_element_type="float32")
        old, at = _matrix(out, slice_id, expert)
        new = lax.expand_dims(old + term, range(out.ndim - 2))
        return lax.dynamic_update_slice(out, new, at, allow_negative_indices=False)

    out = _loop(more, step, _zeros(lead, shape, jnp.float32), lhs)
    return out.astype(lhs.dtype).reshape(*lead, *shape)


def _with_ranks(tables: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, int], ...]:
    return tuple(zip(tables, (1, 1, 0), strict=True))


def _size(lead: tuple[int, ...]) -> int:
    return functools.reduce(operator.mul, lead, 1)  # sizes may be symbolic: math.prod takes ints


def _flat(x: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """Merge the leading axes to one; to none if the whole batch shares x, which is then not copied."""
    own, trailing = x.shape[: len(lead)], x.shape[len(lead) :]
    if _size(own) == 1:
        return x.reshape(trailing)
    return jnp.broadcast_to(x, (*lead, *trailing)).reshape(_size(lead), *trailing)


def _zeros(lead: tuple[int, ...], trailing: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros with the axes that `_flat` makes of these."""
    return lax.full((*([] if _size(lead) == 1 else [_size(lead)]), *trailing), 0, dtype)


def _own_slice(x: jax.Array, rank: int, slice_id: jax.Array) -> tuple[jax.Array, ...]:
    """Where in x this slice of the batch stands: nothing to say if the batch shares x, which then has `rank` axes."""
    return () if x.ndim == rank else (slice_id,)


def _matrix(x: jax.Array, slice_id: jax.Array, expert: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """An expert's matrix for this slice of the batch, and where it starts in x."""
    zero, shape = lax.full_like(expert, 0), x.shape[-2:]
    start = *_own_slice(x, 3, slice_id), expert, zero, zero
    matrix = lax.dynamic_slice(x, start, (1,) * (x.ndim - 2) + shape, allow_negative_indices=False)
    return matrix.reshape(shape), start


def _live_blocks(tables: tuple[jax.Array, ...], lead: tuple[int, ...], num_experts: int) -> tuple[Any, Any]:
    """Two functions of i: whether there is an i-th live block in all slices, and its slice, expert and slots."""
    slots, blocks, total = (lax.broadcast_in_dim(t, (*lead, *t.shape[len(lead) :]), range(t.ndim)) for t in tables)
    per_slice, num_blocks = blocks.shape[-1], blocks.size
    starts = lax.broadcasted_iota(jnp.int32, blocks.shape, blocks.ndim - 1) * (slots.shape[-1] // per_slice)
    before = starts < lax.expand_dims(total, (total.ndim,))
    is_live = ((blocks >= 0) & (blocks < num_experts) & before).reshape(-1)
    number = lax.iota(jnp.int32, num_blocks)
    # The numbers of the live blocks, then an end mark, once at least. Not flatnonzero: XLA's CPU compiler (jaxlib
    # 0.11.2) aborts on it in a module for several platforms.
    number = lax.select(is_live, number, lax.full_like(number, INT32_MAX))
    order = lax.sort(lax.pad(number, jnp.int32(INT32_MAX), [(0, 1, 0)]))
    blocks, slots = blocks.reshape(-1), slots.reshape(num_blocks, -1)

    def at(x: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(x, i, keepdims=False, allow_negative_indices=False)

    def more(i: jax.Array) -> jax.Array:
        return at(order, i) < INT32_MAX

    def live(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        block = at(order, i)
        return lax.div(block, jnp.asarray(per_slice, jnp.int32)), at(blocks, block), at(slots, block)

    return more, live


def _loop(more: Any, step: Any, out: jax.Array, like: jax.Array) -> jax.Array:
    """out, after step(i, out) for each i from 0 on for which there is more. It varies over the mesh axes of `like`."""
    start = jnp.int32(0), equally_varying([out, like])[0]
    return lax.while_loop(lambda state: more(state[0]), lambda state: (state[0] + 1, step(*state)), start)[1]


def _rows(x: jax.Array, slice_id: jax.Array, slot: jax.Array, top_k: int) -> jax.Array:
    """The rows of x that a block's slots name, and some row for a slot that names none."""
    place = *_own_slice(x, 2, slice_id), lax.div(slot, jnp.int32(top_k))
    return x.at[place].get(mode="clip", wrap_negative_indices=False)
