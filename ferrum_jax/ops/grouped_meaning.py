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

from ..core.settings import INT32_MAX
from ..core.sharding import equally_varying
from ..kernels import lead_axes

Tables = tuple[jax.Array, ...]  # sorted_token_ids, block_ids and total_tokens_post_pad


def products(
    lhs: jax.Array,
    rhs: jax.Array | None,
    stack: jax.Array | None,
    layer: jax.Array | None,
    tables: Tables,
    top_k: int,
    dtype: str,
    precision: str,
    transposed: bool,
) -> jax.Array:
    """Each slot's row of lhs times the matrix of its block's expert, or times the transposed matrix."""
    if stack is None or layer is None:  # the matrices are a stack of one layer
        assert rhs is not None
        stack, layer = lax.expand_dims(rhs, (rhs.ndim - 3,)), lax.full((1,) * (rhs.ndim - 3), 0, jnp.int32)
    lead = lead_axes((lhs, 2), (rhs, 3), (stack, 4), (layer, 0), *with_ranks(tables))
    num_rows = lhs.shape[-2]
    num_pairs, width = num_rows * top_k, stack.shape[-2 if transposed else -1]
    if 0 in (num_pairs, *tables[0].shape, *stack.shape):
        return lax.full((*lead, num_pairs, width), 0, dtype)
    layer = lax.clamp(jnp.int32(0), layer, jnp.int32(stack.shape[-4] - 1))
    lhs, stack, layer = flat(lhs, lead), flat(stack, lead), flat(layer, lead)
    more, live = live_blocks(tables, lead, stack.shape[-3])
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        slice_id, expert, slot = live(i)
        # Without the barrier, XLA for a CPU may convert all experts' matrices to float32 ahead of the loop. For a GPU
        # it does not, because a GPU multiplies bfloat16.
        matrices, expert = lax.optimization_barrier((stack, expert))
        own_layer, zero, shape = layer[own_slice(layer, 0, slice_id)], lax.full_like(expert, 0), stack.shape[-2:]
        start, sizes = (*own_slice(stack, 4, slice_id), own_layer, expert, zero, zero), (1,) * (stack.ndim - 2) + shape
        matrix = lax.dynamic_slice(matrices, start, sizes, allow_negative_indices=False).reshape(shape)
        rows = rows_of(lhs, slice_id, slot, top_k)  # padding takes some row, whose product is dropped
        rows = lax.dot_general(rows, matrix, contract, precision, preferred_element_type="float32")
        place = *own_slice(out, 2, slice_id), slot
        return out.at[place].set(rows.astype(dtype), mode="drop", wrap_negative_indices=False)

    out, _ = equally_varying([flat(lax.full((*lead, num_pairs, width), 0, dtype), lead), lhs])
    return loop(more, step, out).reshape(*lead, num_pairs, width)


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
    lead, num_pairs = lead_axes((lhs, 2), (g, 2), *with_ranks(tables)), g.shape[-2]
    shape = num_experts, lhs.shape[-1], g.shape[-1]
    if 0 in (num_pairs, *slots.shape, *shape):
        return lax.full((*lead, *shape), 0, lhs.dtype)
    lhs, g = flat(lhs, lead), flat(g, lead)
    more, live = live_blocks(tables, lead, num_experts)

    # The blocks of an expert follow one another, so one sum in float32 serves all experts in turn.
    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, matrix, last = state
        slice_id, expert, slot = live(i)
        number = slice_id * num_experts + expert
        named = lax.expand_dims((slot >= 0) & (slot < num_pairs), (1,))
        # Padding gives zero rows, by selection, so NaN does not leak in.
        rows, columns = (jnp.where(named, rows_of(x, slice_id, slot, k), 0) for x, k in ((lhs, top_k), (g, 1)))
        term = lax.dot_general(rows, columns, (((0,), (0,)), ((), ())), precision, preferred_element_type="float32")
        matrix = jnp.where(number == last, matrix, 0) + term
        own = _bits(matrix.astype(lhs.dtype))[None]
        bits = lax.dynamic_update_slice(_bits(out), own, (number, *[lax.full_like(number, 0)] * 2))
        return lax.bitcast_convert_type(bits, lhs.dtype), matrix, number

    out = lax.full((_size(lead) * num_experts, *shape[1:]), 0, lhs.dtype)
    *state, _ = equally_varying([out, lax.full(shape[1:], 0, jnp.float32), jnp.int32(-1), lhs])
    return loop(more, step, tuple(state))[0].reshape(*lead, *shape)


def _bits(x: jax.Array) -> jax.Array:
    """The same bits as integers, so that XLA for a CPU writes them as they are. Floats of 16 bits it may convert."""
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def with_ranks(tables: Tables) -> tuple[tuple[jax.Array, int], ...]:
    return tuple(zip(tables, (1, 1, 0), strict=True))


def _size(lead: tuple[int, ...]) -> int:
    return functools.reduce(operator.mul, lead, 1)  # sizes may be symbolic: math.prod takes ints


def flat(x: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """Merge the leading axes to one, and to none if the whole batch shares x, which is then not copied."""
    own, trailing = x.shape[: len(lead)], x.shape[len(lead) :]
    if _size(own) == 1:
        return x.reshape(trailing)
    return jnp.broadcast_to(x, (*lead, *trailing)).reshape(_size(lead), *trailing)


def own_slice(x: jax.Array, rank: int, slice_id: jax.Array) -> tuple[jax.Array, ...]:
    """The index of this slice of the batch in x, which has `rank` axes more; none if the batch shares x."""
    return () if x.ndim == rank else (slice_id,)


def live_blocks(tables: Tables, lead: tuple[int, ...], num_experts: int) -> tuple[Any, Any]:
    """Two functions of i: whether there is an i-th live block in all slices, and its slice, expert and slots."""
    slots, blocks, total = (lax.broadcast_in_dim(t, (*lead, *t.shape[len(lead) :]), range(t.ndim)) for t in tables)
    per_slice, num_blocks = blocks.shape[-1], blocks.size
    block_size = slots.shape[-1] // per_slice
    starts = lax.broadcasted_iota(jnp.int32, blocks.shape, blocks.ndim - 1) * block_size
    before = starts < lax.expand_dims(total, (total.ndim,))
    is_live = ((blocks >= 0) & (blocks < num_experts) & before).reshape(-1)
    number = lax.iota(jnp.int32, num_blocks)
    # The numbers of the live blocks, then an end mark, once at least. Not flatnonzero: it calls jnp.cumsum, which
    # tables.py says why not to call.
    number = lax.select(is_live, number, lax.full_like(number, INT32_MAX))
    order = lax.sort(lax.pad(number, jnp.int32(INT32_MAX), [(0, 1, 0)]))
    blocks, slots = blocks.reshape(-1), slots.reshape(num_blocks, block_size)

    def at(x: jax.Array, i: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(x, i, keepdims=False, allow_negative_indices=False)

    def more(i: jax.Array) -> jax.Array:
        return at(order, i) < INT32_MAX

    def live(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        block = at(order, i)
        slice_id = jnp.int32(0) if num_blocks == per_slice else lax.div(block, jnp.asarray(per_slice, jnp.int32))
        return slice_id, at(blocks, block), at(slots, block)

    return more, live


def loop(more: Any, step: Any, state: Any) -> Any:
    """The state after step(i, state) for each i from 0 on for which there is more."""

    def next_step(counted: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        i, state = counted
        return i + 1, step(i, state)

    return lax.while_loop(lambda counted: more(counted[0]), next_step, (jnp.int32(0), state))[1]


def rows_of(x: jax.Array, slice_id: jax.Array, slot: jax.Array, top_k: int) -> jax.Array:
    """The rows of x that a block's slots name, and some row for a slot that names none."""
    place = *own_slice(x, 2, slice_id), lax.div(slot, jnp.int32(top_k))
    return x.at[place].get(mode="clip", wrap_negative_indices=False)
