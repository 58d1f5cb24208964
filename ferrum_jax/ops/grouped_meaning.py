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
        return jnp.zeros((*lead, num_pairs, width), dtype)
    lhs, rhs = _flat(lhs, lead), _flat(rhs, lead)
    count, live = _live_blocks(tables, lead, rhs.shape[1])
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        slice_id, expert, slot = live(i)
        # Without the barrier, XLA for a CPU may convert all experts' matrices to float32 ahead of the loop. For a GPU
        # it does not, because a GPU multiplies bfloat16.
        matrices, expert = lax.optimization_barrier((rhs, expert))
        at = _own_slice(rhs, slice_id), expert, *[jnp.zeros_like(expert)] * 2
        matrix = lax.dynamic_slice(matrices, at, (1, 1, *rhs.shape[2:]))[0, 0]
        rows = _rows(lhs, slice_id, slot, top_k, num_pairs)
        rows = lax.dot_general(rows, matrix, contract, precision, preferred_element_type="float32")
        row = jnp.where((slot >= 0) & (slot < num_pairs), slot, num_pairs)
        return out.at[slice_id, row].set(rows.astype(dtype), mode="drop")

    out, _ = equally_varying([jnp.zeros((_size(lead), num_pairs, width), dtype), lhs])
    return lax.fori_loop(0, count, step, out).reshape(*lead, num_pairs, width)


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
        return jnp.zeros((*lead, *shape), lhs.dtype)
    lhs, g = _flat(lhs, lead), _flat(g, lead)
    count, live = _live_blocks(tables, lead, num_experts)

    # The blocks of an expert follow one another, so one sum in float32 serves all experts in turn.
    def step(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, matrix = state
        (slice_id, expert, slot), (last_slice, last_expert, _) = live(i), live(jnp.maximum(i - 1, 0))
        goes_on = (i > 0) & (slice_id == last_slice) & (expert == last_expert)
        rows, columns = (_rows(x, slice_id, slot, k, num_pairs) for x, k in ((lhs, top_k), (g, 1)))
        term = lax.dot_general(rows, columns, (((0,), (0,)), ((), ())), precision, preferred_element_type="float32")
        matrix = jnp.where(goes_on, matrix, 0) + term
        own = _bits(matrix.astype(lhs.dtype))[None, None]
        bits = lax.dynamic_update_slice(_bits(out), own, (slice_id, expert, *[jnp.zeros_like(expert)] * 2))
        return lax.bitcast_convert_type(bits, lhs.dtype), matrix

    start = jnp.zeros((_size(lead), *shape), lhs.dtype), jnp.zeros(shape[1:], jnp.float32)
    out, matrix, _ = equally_varying([*start, lhs])
    return lax.fori_loop(0, count, step, (out, matrix))[0].reshape(*lead, *shape)


def _bits(x: jax.Array) -> jax.Array:
    """The same bits as integers, so that XLA for a CPU writes them as they are. Floats of 16 bits it may convert."""
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def _with_ranks(tables: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, int], ...]:
    return tuple(zip(tables, (1, 1, 0), strict=True))


def _size(lead: tuple[int, ...]) -> int:
    return functools.reduce(operator.mul, lead, 1)  # sizes may be symbolic: math.prod takes ints


def _flat(x: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """Merge the leading axes to one, of size 1 if the whole batch shares x, which is then not copied."""
    own, trailing = x.shape[: len(lead)], x.shape[len(lead) :]
    if _size(own) == 1:
        return x.reshape(1, *trailing)
    return jnp.broadcast_to(x, (*lead, *trailing)).reshape(_size(lead), *trailing)


def _own_slice(x: jax.Array, slice_id: jax.Array) -> jax.Array:
    """Which slice of x serves this slice of the batch: the only one, if the batch shares x."""
    return jnp.zeros_like(slice_id) if x.shape[0] == 1 else slice_id


def _live_blocks(tables: tuple[jax.Array, ...], lead: tuple[int, ...], num_experts: int) -> tuple[jax.Array, Any]:
    """The number of live blocks in all slices, and a function from i to the slice, expert and slots of the i-th one."""
    slots, blocks, total = (jnp.broadcast_to(t, (*lead, *t.shape[len(lead) :])) for t in tables)
    per_slice = blocks.shape[-1]
    block_size = slots.shape[-1] // max(per_slice, 1)
    starts = jnp.arange(per_slice, dtype=jnp.int32) * block_size
    before = lax.broadcast_in_dim(starts, blocks.shape, (blocks.ndim - 1,)) < total[..., None]
    is_live = ((blocks >= 0) & (blocks < num_experts) & before).reshape(-1)
    # Not flatnonzero: it calls jnp.cumsum, which tables.py says why not to call.
    order = jnp.argsort(~is_live, stable=True).astype(jnp.int32)
    blocks, slots = blocks.reshape(-1), slots.reshape(blocks.size, block_size)

    def live(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        block = order[i]
        return block // per_slice, blocks[block], slots[block]

    return jnp.sum(is_live, dtype=jnp.int32), live


def _rows(x: jax.Array, slice_id: jax.Array, slot: jax.Array, top_k: int, num_pairs: int) -> jax.Array:
    """The rows of x that a block's slots name. Padding gives zero rows, by selection, so NaN does not leak in."""
    named = (slot >= 0) & (slot < num_pairs)
    rows = x.at[_own_slice(x, slice_id), jnp.where(named, slot // top_k, 0)].get(mode="promise_in_bounds")
    return jnp.where(named[:, None], rows, 0)
