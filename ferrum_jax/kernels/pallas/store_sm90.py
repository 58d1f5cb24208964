"""How the grouped product for Hopper GPUs stores a tile that is multiplied. `block` is grouped_sm90.py's Product."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .launch import for_each, put, store_row


class Target(NamedTuple):
    """Where a multiplier's part of a tile goes."""

    matrix: Any
    begin: Any  # the matrix's rows, those of the gathered copy if it is scattered
    end: Any
    scattered: Any
    offset: Any  # of the slice in the result
    column: Any
    first: Any  # row of the tile


def store_tile(block, matrix, column, first, sums):
    """Finish a tile's sums and store them, a chunk of rows at a time."""
    sizes, size = block.sizes, sums[0].shape[1]
    begin, end, scattered = block.first_row[matrix], block.end_row[matrix], block.scattered[matrix] != 0
    offset = lax.div(matrix, jnp.int32(sizes.num_experts)) * sizes.out_slice
    target = Target(matrix, begin, end, scattered, offset, column, first)
    value = finish(block, target, sums)

    # Which registers hold a chunk must be known when it is compiled. What follows is one piece of code for all chunks.
    def stage(start):
        rows = min(sizes.chunk, size - start)
        block.staged.at[block.warpgroup, pl.ds(0, rows)].T[...] = value[:, start : start + rows]
        plgpu.commit_smem()

    def store_chunk(n):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        lax.switch(n, [functools.partial(stage, start) for start in range(0, size, sizes.chunk)])
        eights = jnp.minimum(sizes.chunk // 8, size // 8 - n * (sizes.chunk // 8))
        for_each(eights, functools.partial(store_eight, block, target, n * sizes.chunk))

    for_each(pl.cdiv(size, sizes.chunk), store_chunk)


def finish(block, target, sums):
    """A tile's result, in the layout in which it is staged."""
    value = block.sizes.activation(*sums) if block.sizes.activation else sums[0]
    if block.weights is not None:
        by_place = block.weights.shape[0] - block.sizes.tile.rows - block.slots.shape[0]
        at = pl.multiple_of(target.first + jnp.where(target.scattered, by_place, target.offset), 8)
        weights = block.weights.at[pl.ds(at, value.shape[1])]
        weights = plgpu.load(weights, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        value *= lax.broadcast_in_dim(weights, value.shape, (1,))
    value = plgpu.layout_cast(value.astype(block.out.dtype), plgpu.Layout.WGMMA)
    # The result lies transposed. The matrix-store instruction transposes 16 bits; of 32 bits the threads swap pairs.
    if block.out.dtype.itemsize != 2:
        value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
    return value


def store_eight(block, target, start, eight):
    """Store eight staged rows: by one copy if all are the matrix's and go where they lie, otherwise row by row."""
    at = pl.multiple_of(eight * 8, 8)
    row = target.first + start + at
    whole = jnp.logical_not(target.scattered) & (row >= target.begin) & (row + 8 <= target.end)
    staged = block.staged.at[block.warpgroup, pl.ds(at, 8)]

    @pl.when(whole)
    def store_at_once():
        rows = pl.ds(pl.multiple_of(target.offset + row, 8), 8)
        plgpu.copy_smem_to_gmem(staged, block.out.at[rows, pl.ds(target.column, block.own_columns)])

    @pl.when(~whole & (row + 8 > target.begin) & (row < target.end))
    def store_row_by_row():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        layout = eight_rows_layout(block.own_columns, block.out.dtype)
        put(block.eight_rows.at[block.warpgroup], plgpu.load(staged, layout=layout, optimized=False))
        plgpu.commit_smem()
        # The bounds are not known when it is compiled, so the compiler cannot unroll the loop, whose code is long.
        skipped = jnp.maximum(target.begin - row, 0)
        for_each(jnp.minimum(target.end - row, 8) - skipped, lambda j: store_named_row(block, target, row, skipped + j))


def store_named_row(block, target, row, j):
    """Store row j of eight, one of the matrix's, if it names a row of the result."""
    at = jnp.where(target.scattered, lax.div(row + j, jnp.int32(block.sizes.block_slots)), 0)
    inside = ~target.scattered | (block.block_matrix[at] == target.matrix)
    name = jnp.where(target.scattered, block.slots[jnp.where(target.scattered, row + j, 0)], row + j)

    @pl.when(inside & (name >= 0) & (name < block.sizes.num_pairs))
    def store():
        source = block.eight_rows.at[block.warpgroup, pl.ds(j, 1)]
        store_row(source, block.out, target.offset + name, target.column)


def eight_rows_layout(width, dtype):
    """8 rows of a multiplier's columns in its registers, each thread with up to 16 bytes of a row."""
    vector = min(16 // dtype.itemsize, width // 16)
    tiling = plgpu.Tiling(((8, width), (128 * vector // width, width // 4), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
