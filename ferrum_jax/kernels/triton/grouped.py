"""Grouped products on tensor cores.

The forward product multiplies each row by the matrix of its expert. The gradient of the matrices is, for each expert,
the product of its rows with the rows of the cotangent.
"""

import dataclasses
import math

import jax.numpy as jnp
import triton
import triton.language as tl

from ..shapes import large, lead_axes, matrices, whole
from . import tiles
from .launch import capability, launch
from .walk import INTERPRETED, activated, dot, matrix_number, tile_at, walk, zero_unnamed


@triton.jit
def grouped(
    lhs, rhs, layer, up_rhs, up_layer, slots, blocks, total, owner, row_weights, out,
    M: tl.constexpr, H: tl.constexpr, N: tl.constexpr, E: tl.constexpr, S: tl.constexpr, P: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, SHARED_LHS: tl.constexpr, SHARED_RHS: tl.constexpr,
    LAYERS: tl.constexpr, PAIR: tl.constexpr, SHARED_UP: tl.constexpr, UP_LAYERS: tl.constexpr,
    ACTIVATION: tl.constexpr, WEIGHTED: tl.constexpr, TRANSPOSED: tl.constexpr, SWAPPED: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ZERO_ROWS: tl.constexpr, ZERO_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Computes out[s] = lhs[s // TOP_K] @ rhs[e]. A program owns TM slots of a block by TN columns and walks along H, TK
    # elements at a time; it gathers rows by the slots' values. SWAPPED: the product is computed transposed. With an
    # ACTIVATION a program computes the gate's product and up's for its columns. The matrix is 2 N wide then, gate
    # before up; or it is a PAIR, and up_rhs has up's. The last programs zero the rows that no slot names.
    slice_id = tl.program_id(0).to(tl.int64) // PROGRAMS
    program = tl.program_id(0) % PROGRAMS
    slots, blocks = slots + slice_id * S, blocks + slice_id * (S // BLOCK)
    out += slice_id * P * N
    live_slots = tl.load(total + slice_id)
    columns: tl.constexpr = (N + TN - 1) // TN
    if program >= TILES * columns:
        zero_unnamed(
            program - TILES * columns, slots, blocks, live_slots, owner + slice_id * P, out, S, BLOCK, E, P, N,
            ZERO_ROWS, ZERO_COLUMNS,
        )  # fmt: skip
        return
    expert, slot, named, column_tile = tile_at(
        program, slots, blocks, live_slots, BLOCK, E, P, columns, PARTS, TILES, GROUP, TM
    )
    if expert < 0:
        return
    row = tl.where(named, slot // TOP_K, 0).to(tl.int64) + (0 if SHARED_LHS else slice_id * M)
    col = column_tile * TN + tl.arange(0, TN)
    k = tl.arange(0, TK)
    rows = lhs + row[:, None] * H + k[None, :]
    width: tl.constexpr = 2 * N if ACTIVATION != "" and not PAIR else N
    matrix = rhs + matrix_number(expert, layer, slice_id, E, LAYERS, SHARED_RHS) * H * width
    if TRANSPOSED:
        matrix += col[None, :].to(tl.int64) * H + k[:, None]
    else:
        matrix += col[None, :] + k[:, None].to(tl.int64) * width
    up_matrix = matrix + N
    if PAIR:
        up_matrix = up_rhs + matrix_number(expert, up_layer, slice_id, E, UP_LAYERS, SHARED_UP) * H * width
        up_matrix += col[None, :] + k[:, None].to(tl.int64) * width
    step: tl.constexpr = 1 if TRANSPOSED else width
    sums = tl.zeros([TN, TM], tl.float32) if SWAPPED else tl.zeros([TM, TN], tl.float32)
    up = sums
    for start in range(0, H, TK):
        inside = k < H - start
        a = tl.load(rows + start, mask=named[:, None] & inside[None, :], other=0.0)
        b = tl.load(matrix + tl.cast(start, tl.int64) * step, mask=inside[:, None] & (col < N)[None, :], other=0.0)
        sums = dot(b.T, a.T, sums, PRECISION) if SWAPPED else dot(a, b, sums, PRECISION)
        if ACTIVATION != "":
            at = up_matrix + tl.cast(start, tl.int64) * step
            b = tl.load(at, mask=inside[:, None] & (col < N)[None, :], other=0.0)
            up = dot(b.T, a.T, up, PRECISION) if SWAPPED else dot(a, b, up, PRECISION)
    if ACTIVATION != "":
        sums = activated(sums, up, ACTIVATION)
    if SWAPPED:
        sums = sums.T
    if WEIGHTED:
        sums *= tl.load(row_weights + slice_id * P + slot, mask=named, other=0.0)[:, None]
    tl.store(out + slot[:, None].to(tl.int64) * N + col[None, :], sums.to(out.dtype.element_ty),
             mask=named[:, None] & (col < N)[None, :])  # fmt: skip


@triton.jit
def outer(
    lhs, g, slots, blocks, total, out,
    M: tl.constexpr, H: tl.constexpr, N: tl.constexpr, E: tl.constexpr, S: tl.constexpr, P: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, SHARED_LHS: tl.constexpr, SHARED_G: tl.constexpr,
    SEEN: tl.constexpr, PRECISION: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    # Computes out[e] = sum over the expert's slots s of lhs[s // TOP_K] x g[s]. A program owns TM by TN elements of one
    # expert's matrix and walks along the slots from the expert's first block to its last, TK slots at a time. If there
    # is no block, it writes zeros. To find the blocks it looks at all of them, SEEN at a time: blocks without an expert
    # may stand anywhere, so the table is not sorted, and a search by halves would not be faster, because each of its
    # loads has to wait for the one before.
    rows: tl.constexpr = (H + TM - 1) // TM
    columns: tl.constexpr = (N + TN - 1) // TN
    matrix = tl.program_id(0).to(tl.int64) // (rows * columns)
    tile = tl.program_id(0) % (rows * columns)
    slice_id, expert = matrix // E, (matrix % E).to(tl.int32)
    slots, blocks = slots + slice_id * S, blocks + slice_id * (S // BLOCK)
    live_slots = tl.load(total + slice_id)
    begins, ends = tl.full([SEEN], S, tl.int32), tl.zeros([SEEN], tl.int32)
    for start in range(0, S // BLOCK, SEEN):
        block = start + tl.arange(0, SEEN)
        inside = (block < S // BLOCK) & (block * BLOCK < live_slots)
        own = tl.load(blocks + block, mask=inside, other=-1) == expert
        begins = tl.where(own, tl.minimum(begins, block * BLOCK), begins)
        ends = tl.where(own, (block + 1) * BLOCK, ends)
    begin, end = tl.min(begins, 0), tl.max(ends, 0)
    row, col = tile // columns * TM + tl.arange(0, TM), tile % columns * TN + tl.arange(0, TN)
    lhs += (0 if SHARED_LHS else slice_id * M * H) + row[None, :]
    g += (0 if SHARED_G else slice_id * P * N) + col[None, :]
    sums = tl.zeros([TM, TN], tl.float32)
    # Under NumPy 2.5 Triton's interpreter accepts no tensor as a bound of range, so there the loop takes the most steps
    # that any expert can need.
    for start in range(0, S if INTERPRETED else end - begin, TK):
        at = begin + start + tl.arange(0, TK)
        slot = tl.load(slots + at, mask=at < end, other=-1)
        named = (slot >= 0) & (slot < P)
        pair = tl.where(named, slot, 0).to(tl.int64)
        a = tl.load(lhs + (pair // TOP_K)[:, None] * H, mask=named[:, None] & (row < H)[None, :], other=0.0)
        b = tl.load(g + pair[:, None] * N, mask=named[:, None] & (col < N)[None, :], other=0.0)
        sums = dot(a.T, b, sums, PRECISION)
    tl.store(out + matrix * H * N + row[:, None].to(tl.int64) * N + col[None, :], sums.to(out.dtype.element_ty),
             mask=(row < H)[:, None] & (col < N)[None, :])  # fmt: skip


# ---- wrappers

_NONE = None, None, None


def _multipliers(dtype, precision):
    """What multiplies operands of this dtype on the target GPU, as `tiles.Products` says it."""
    return tiles.products(jnp.dtype(dtype), precision, capability()).multipliers


def _product(lhs, read, tables, top_k, dtype, precision, transposed=False, row_weights=None, up=_NONE, activation=None):
    # `read` and `up` are (rhs, stack, layer).
    sources = [pair for where in (read, up) for pair in zip(where, (3, 4, 0), strict=True)]
    lead = lead_axes((lhs, 2), *sources, *zip(tables, (1, 1, 0), strict=True), (row_weights, 1))
    lhs, shared_lhs = large(lhs, lead)
    rhs, shared_rhs, layer, layers = matrices(*read, lead)
    pair = up[0] is not None or up[1] is not None
    up_rhs, shared_up, up_layer, up_layers = matrices(*up, lead) if pair else (None, True, None, 0)
    num_rows, width = lhs.shape[-2:]
    columns = rhs.shape[-2 if transposed else -1] // (2 if activation and not pair else 1)
    chosen = tiles.products(lhs.dtype, precision, capability())
    tile = chosen.tile(tables[0].shape[-1] // tables[1].shape[-1])
    if activation:
        tile = dataclasses.replace(tile, columns=tile.columns // 2)
    over = walk(tables, lead, chosen, tile, top_k=top_k, rows=num_rows, columns=columns, experts=rhs.shape[-3])
    total = over.tables[2]
    return launch(
        grouped,
        lhs,
        *(total if x is None else x for x in (rhs, layer, up_rhs, up_layer)),  # a kernel's operand cannot be None
        *over.tables,
        over.owner,
        lhs if row_weights is None else whole(row_weights, lead),
        out=[((*lead, num_rows * top_k, columns), dtype)],
        H=width,
        ACTIVATION=activation or "",
        WEIGHTED=row_weights is not None,
        SHARED_LHS=shared_lhs,
        SHARED_RHS=shared_rhs,
        LAYERS=layers,
        PAIR=pair,
        SHARED_UP=shared_up,
        UP_LAYERS=up_layers,
        TRANSPOSED=transposed,
        SWAPPED=tile.rows < chosen.transposed_below,
        PRECISION=_input_precision(chosen),
        **over.constants,
    )


def _input_precision(chosen):
    return "tf32" if chosen.multipliers == "tf32" else "ieee"


def grouped_matmul(lhs, rhs, slots, blocks, total, stack, layer, *, top_k, dtype, packed_rows, precision):
    return _product(lhs, (rhs, stack, layer), (slots, blocks, total), top_k, jnp.dtype(dtype), precision)


def grouped_matmul_activated(
    lhs, rhs, slots, blocks, total, row_weights, stack, layer, *up, top_k, dtype, activation, packed_rows, precision
):
    made, tables, read = jnp.dtype(dtype), (slots, blocks, total), (rhs, stack, layer)
    return _product(lhs, read, tables, top_k, made, precision, row_weights=row_weights, up=up, activation=activation)


def grouped_matmul_transposed(g, rhs, slots, blocks, total, stack, layer, *, top_k, dtype, packed_rows, precision):
    tables, read = (slots, blocks, total), (rhs, stack, layer)
    return _product(g, read, tables, top_k, jnp.dtype(dtype), precision, transposed=True)


def _counting(slots, blocks, total, num_experts):
    """The slots, with -1 for those of blocks that do not count, which may stand between an expert's other blocks.

    This is done once, here, so that no program has to do it in its loop.
    """
    by_block = jnp.reshape(slots, (*blocks.shape, -1))
    starts = jnp.arange(blocks.shape[-1], dtype=jnp.int32) * by_block.shape[-1]
    starts = jnp.broadcast_to(jnp.reshape(starts, (*(1 for _ in total.shape), -1)), blocks.shape)
    counts = (blocks >= 0) & (blocks < num_experts) & (starts < total[..., None])
    return jnp.reshape(jnp.where(counts[..., None], by_block, -1), slots.shape)


def grouped_outer(lhs, g, *tables, top_k, num_experts, packed_rows, precision):
    lead = lead_axes((lhs, 2), (g, 2), *zip(tables, (1, 1, 0), strict=True))
    slots, blocks, total = (whole(table, lead) for table in tables)
    slots = _counting(slots, blocks, total, num_experts)
    (lhs, shared_lhs), (g, shared_g) = large(lhs, lead), large(g, lead)
    (num_rows, height), (num_pairs, width) = lhs.shape[-2:], g.shape[-2:]
    chosen = tiles.products(lhs.dtype, precision, capability())
    tile = chosen.outer
    tiles_of_matrix = triton.cdiv(height, tile.rows) * triton.cdiv(width, tile.columns)
    return launch(
        outer,
        *(lhs, g, slots, blocks, total),
        out=[((*lead, num_experts, height, width), lhs.dtype)],
        grid=math.prod(lead) * num_experts * tiles_of_matrix,
        num_warps=tile.warps,
        num_stages=tile.stages,
        M=num_rows,
        H=height,
        N=width,
        E=num_experts,
        S=slots.shape[-1],
        P=num_pairs,
        TOP_K=top_k,
        BLOCK=slots.shape[-1] // blocks.shape[-1],
        SHARED_LHS=shared_lhs,
        SHARED_G=shared_g,
        SEEN=min(triton.next_power_of_2(blocks.shape[-1]), chosen.blocks_seen),
        PRECISION=_input_precision(chosen),
        TM=tile.rows,
        TN=tile.columns,
        TK=tile.step,
    )
