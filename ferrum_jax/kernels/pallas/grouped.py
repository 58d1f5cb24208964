"""Grouped products by wgmma, on Hopper GPUs: the wrappers that the registry loads."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..shapes import matrices
from . import gather_sm90, grouped_sm90, outer_sm90
from .activations import ACTIVATIONS
from .grouped_tables import (
    cut_into_tiles,
    most_tiles,
    round_up,
    row_ranges,
    table_blocks,
    unnamed_rows,
    weights_by_place,
)
from .launch import launch, lead_axes, pad
from .tiles import GATHER_BUFFERS, GATHER_COLUMNS, LINE, OUTER, PART, PROGRAMS, pipeline, product_tile

ARCHITECTURE = "sm_90"


def refuse(call):
    if call.given[0].dtype == jnp.float32:
        return "wgmma multiplies float16 and bfloat16; got float32"
    activation = call.params.get("activation")
    if activation and activation not in ACTIVATIONS:
        return f"Mosaic has no function that {activation!r} needs"
    halves = 1 if "U" in call.sizes else 2
    if activation and call.sizes["N"] % (halves * LINE):
        return f"gate and up must each have a multiple of {LINE} columns; they have {call.sizes['N'] // halves}"
    if ("L" in call.sizes or "J" in call.sizes) and (call.sizes["H"] % LINE or call.sizes["N"] % LINE):
        return f"it would copy a stack whose matrices' widths, H={call.sizes['H']} and N={call.sizes['N']}, {_PADDED}"
    blocks = call.sizes["B"] or 1
    slots = round_up(call.sizes["S"] // blocks, 8) * blocks
    pairs = call.sizes["P"] if "P" in call.sizes else call.sizes["M"] * call.params.get("top_k", 1)
    rows = math.prod(call.sizes["..."]) * max(pairs, slots)
    if rows > 2**31 - 2 * PART:
        return f"TMA counts rows in 31 bits; the batch together has {rows} rows or slots"
    return None


_NONE = None, None, None
_PADDED = f"are no multiples of {LINE}, because TMA reads lines of so many entries"

# `precision` is that of float32 operands, which are refused. `tile` is for measuring others than the table's.


def grouped_matmul(lhs, rhs, slots, blocks, total, stack, layer, *, top_k, dtype, packed_rows, precision, tile=None):
    return _product(lhs, (rhs, stack, layer), (slots, blocks, total), top_k, jnp.dtype(dtype), tile=tile)


def grouped_matmul_activated(
    lhs,
    rhs,
    slots,
    blocks,
    total,
    row_weights,
    stack,
    layer,
    *up,
    top_k,
    dtype,
    activation,
    packed_rows,
    precision,
    tile=None,
):
    read, tables, dtype = (rhs, stack, layer), (slots, blocks, total), jnp.dtype(dtype)
    return _product(lhs, read, tables, top_k, dtype, row_weights=row_weights, up=up, activation=activation, tile=tile)


def grouped_matmul_transposed(
    g, rhs, slots, blocks, total, stack, layer, *, top_k, dtype, packed_rows, precision, tile=None
):
    read, tables = (rhs, stack, layer), (slots, blocks, total)
    return _product(g, read, tables, top_k, jnp.dtype(dtype), transposed=True, tile=tile)


def grouped_outer(lhs, g, *tables, top_k, num_experts, packed_rows, precision):
    lead = lead_axes((lhs, 2), (g, 2), *zip(tables, (1, 1, 0), strict=True))
    num_slices, height, (num_pairs, width) = math.prod(lead), lhs.shape[-1], g.shape[-2:]
    lhs, lhs_slice = _rows(lhs, lead)
    g, g_slice = _rows(g, lead)
    slots, block_matrix = table_blocks(tables, lead, num_experts)
    first_row, end_row, scattered = row_ranges(slots, block_matrix, num_slices, num_experts, num_pairs, top_k)
    gathered = functools.partial(_gathered, slots, block_matrix, scattered, num_experts, num_pairs)
    matrices, height_16, width_16 = num_slices * num_experts, lhs.shape[-1], g.shape[-1]
    tile = OUTER[ARCHITECTURE, str(lhs.dtype)]
    tiles = matrices * pl.cdiv(height_16, tile.rows) * pl.cdiv(width_16, tile.columns)
    sizes = outer_sm90.Sizes(tile, min(PROGRAMS, tiles), num_experts, lhs_slice, g_slice)
    (out,) = launch(
        outer_sm90.outer,
        *(lhs, gathered(lhs, lhs_slice, top_k)),
        *(g, gathered(g, g_slice, 1)),
        *(first_row, end_row, scattered),
        out=[((matrices, height_16, width_16), lhs.dtype)],
        grid=sizes.grid,
        warpgroups=3,
        scratch=outer_sm90.shared_memory(sizes, lhs.dtype),
        sizes=sizes,
    )
    return (jnp.reshape(out, (*lead, num_experts, height_16, width_16))[..., :height, :width],)


def _product(
    lhs, read, tables, top_k, dtype, *, transposed=False, row_weights=None, up=_NONE, activation=None, tile=None
):
    # `read` and `up` are (rhs, stack, layer).
    sources = [pair for where in (read, up) for pair in zip(where, (3, 4, 0), strict=True)]
    lead = lead_axes((lhs, 2), *sources, *zip(tables, (1, 1, 0), strict=True), (row_weights, 1))
    rhs, first_matrix = _matrices(*read, lead)
    pair = up[0] is not None or up[1] is not None
    up_rhs, up_first_matrix = _matrices(*up, lead) if pair else (None, None)
    shape = (read[0] if read[1] is None else read[1]).shape  # of the matrices before they are padded
    num_slices, num_pairs, num_experts = math.prod(lead), lhs.shape[-2] * top_k, shape[-3]
    width = shape[-2 if transposed else -1] // (2 if activation and not pair else 1)
    plain = not (activation or transposed)
    tile = tile or product_tile(ARCHITECTURE, lhs.dtype, num_pairs, num_experts, plain)
    stages, chunk = pipeline(tile, dtype)

    lhs, lhs_slice = _rows(lhs, lead)
    columns = width if activation else rhs.shape[-2 if transposed else -1]
    out_slice = round_up(num_pairs, 8)

    slots, block_matrix = table_blocks(tables, lead, num_experts)
    first_row, end_row, scattered = row_ranges(slots, block_matrix, num_slices, num_experts, num_pairs, top_k)
    gathered = _gathered(slots, block_matrix, scattered, num_experts, num_pairs, lhs, lhs_slice, top_k)
    num_matrices = num_slices * min(num_experts, num_pairs)  # that can have rows
    room = most_tiles(max(num_slices * num_pairs, slots.size), num_matrices, tile)
    tiles, num_tiles = cut_into_tiles(first_row, end_row, tile, room)
    across = pl.cdiv(columns, tile.columns // (2 if activation else 1))
    grid = room * across if tile.dealt else PROGRAMS
    unnamed = unnamed_rows(slots, block_matrix, num_slices, num_pairs, out_slice, min(grid, PROGRAMS) * 128)
    if row_weights is not None:
        row_weights = weights_by_place(row_weights, lead, slots, num_slices, num_pairs, out_slice, tile.rows)

    sizes = grouped_sm90.Sizes(
        tile=tile,
        steps=lhs.shape[1] // tile.step,
        stages=stages,
        chunk=chunk,
        grid=grid,
        num_experts=num_experts,
        num_pairs=num_pairs,
        block_slots=slots.shape[1],
        transposed=transposed,
        activation=ACTIVATIONS[activation] if activation else None,
        lhs_slice=lhs_slice,
        out_slice=out_slice,
    )
    (out,) = launch(
        grouped_sm90.product,
        *(lhs, gathered, rhs, first_matrix, up_rhs, up_first_matrix, tiles, num_tiles, first_row, end_row, scattered),
        *(jnp.reshape(slots, -1), block_matrix, unnamed, row_weights),
        out=[((num_slices * out_slice, columns), dtype)],
        grid=grid,
        warpgroups=3,
        scratch=grouped_sm90.shared_memory(sizes, lhs.dtype, dtype),
        sizes=sizes,
    )
    return (jnp.reshape(out, (*lead, out_slice, columns))[..., :num_pairs, :width],)


@functools.partial(jax.jit, static_argnums=(3, 4, 6, 7))  # so that a program lowers equal gathers of several ops once
def _gathered(slots, block_matrix, scattered, num_experts, num_pairs, lhs, lhs_slice, top_k):
    """A row of lhs for each slot. The kernel writes only those of scattered matrices; the others are garbage."""
    shape = slots.size, lhs.shape[1]
    (out,) = launch(
        gather_sm90.gather,
        *(lhs, slots, block_matrix, scattered),
        out=[(shape, lhs.dtype)],
        grid=slots.shape[0] * pl.cdiv(shape[1], GATHER_BUFFERS * GATHER_COLUMNS),
        scratch=gather_sm90.shared_memory(lhs.dtype),
        num_experts=num_experts,
        num_pairs=num_pairs,
        lhs_slice=lhs_slice,
        top_k=top_k,
    )
    return out


def _rows(x, lead):
    """Rows of all slices as [rows, width], and the rows of a slice; 0 if all slices share them."""
    x, slices = _whole(x, lead, 8)
    return jnp.reshape(x, (-1, x.shape[-1])), x.shape[-2] if slices > 1 else 0


def _matrices(rhs, stack, layer, lead):
    """The matrices as [matrices, rows, columns], and for each slice the number of its first one; None if that is 0."""
    x, _, layer, layers = matrices(rhs, stack, layer, lead)
    x, slices = _whole(x, lead, LINE)
    slice_id, of_slice = lax.iota(jnp.int32, math.prod(lead)), math.prod(x.shape[len(lead) : -2])
    first = slice_id * of_slice if slices > 1 else None
    if layers:
        layer = jnp.clip(jnp.reshape(layer, -1), 0, layers - 1) * x.shape[-3]
        first = layer if first is None else first + layer
    return jnp.reshape(x, (-1, *x.shape[-2:])), first


def _whole(x, lead, rows):
    """Rows or matrices filled up to multiples of `rows` and of a line, and how many slices there are of them.

    There is one slice if the batch shares them.
    """
    own = x.shape[: len(lead)]
    if math.prod(own) != 1 and own != lead:
        x = jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :]))
    x = pad(x, round_up(x.shape[-1], LINE))
    if extra := round_up(x.shape[-2], rows) - x.shape[-2]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra), (0, 0)])
    return x, math.prod(x.shape[: len(lead)])
