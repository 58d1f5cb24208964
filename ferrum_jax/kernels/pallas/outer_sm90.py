"""The kernel of the grouped outer product for Hopper GPUs, which multiplies with wgmma.

grouped_tables.py says what a matrix and a scattered matrix are, grouped_sm90.py what a stage, a feeder and a multiplier
are. A step is here a run of rows: it is what the sums go over.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .grouped_sm90 import FEEDER
from .launch import for_each, loop, split, tiled
from .tiles import OuterTile


class Sizes(NamedTuple):
    """What is known of an outer product when it is compiled."""

    tile: OuterTile
    grid: int
    num_experts: int
    lhs_slice: int  # rows of a slice of lhs; 0 if all slices share them
    g_slice: int  # the same of g


class Outer(NamedTuple):
    """What a block of `outer` works with: references in the launcher's order, and where the block stands."""

    # in global memory
    lhs: Any  # [rows, H]
    lhs_gathered: Any  # [slots, H], the rows of scattered matrices
    g: Any  # [rows, N]
    g_gathered: Any  # [slots, N]
    first_row: Any  # [matrices]
    end_row: Any  # [matrices]
    scattered: Any  # [matrices]
    out: Any  # [matrices, H, N]
    # in shared memory
    lhs_stages: Any  # [stages, step, tile's rows]
    g_stages: Any  # [stages, step, tile's columns]
    staged: Any  # [2, step, tile's columns]: results of each multiplier
    full: Any  # a barrier for each stage: its copies have arrived
    empty: Any  # a barrier for each stage: both multipliers are done with it
    masked: Any  # a barrier: both multipliers have zeroed their rows of other experts
    # not in memory
    sizes: Sizes
    program: Any
    warpgroup: Any


def shared_memory(sizes, dtype):
    """The references of Outer that are in shared memory."""
    tile = sizes.tile
    return [
        plgpu.SMEM((tile.stages, tile.step, tile.rows), dtype, transforms=tiled(dtype)),
        plgpu.SMEM((tile.stages, tile.step, tile.columns), dtype, transforms=tiled(dtype)),
        plgpu.SMEM((2, tile.step, tile.columns), dtype, transforms=tiled(dtype)),
        plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        plgpu.Barrier(num_arrivals=2),
    ]


class Tile(NamedTuple):
    matrix: Any
    row: Any  # its first row and column in the matrix
    column: Any
    start: Any  # the first row of lhs and g that is read, a multiple of 8
    steps: Any


def outer(*refs, sizes):
    # out[e] = sum over the rows r of expert e of the outer product of lhs[r] and g[r]; zeros if e has no rows. A block
    # makes its tiles in turn: the feeder loads the expert's rows by TMA, step by step, and two multipliers multiply and
    # store. The first and the last step may hold rows of other experts: they are zeroed in shared memory first.
    block = Outer(*refs, sizes, lax.axis_index("program"), lax.axis_index("warpgroup"))
    out, tile = block.out, sizes.tile
    down, across = pl.cdiv(out.shape[1], tile.rows), pl.cdiv(out.shape[2], tile.columns)
    tiles = (out.shape[0] * down * across - block.program + sizes.grid - 1) // sizes.grid

    @pl.when(block.warpgroup == FEEDER)
    def feed():
        plgpu.set_max_registers(40, action="decrease")
        loop(tiles, functools.partial(feed_tile, block, down, across), jnp.int32(0))

    @pl.when(block.warpgroup < FEEDER)
    def multiply_and_store():
        plgpu.set_max_registers(232, action="increase")
        own = pl.multiple_of(block.warpgroup * (tile.rows // 2), tile.rows // 2)  # first row of the multiplier's half
        loop(tiles, functools.partial(make_tile, block, down, across, own), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def tile_at(block, down, across, i):
    """The block's i-th tile."""
    rows, columns, step = block.sizes.tile.rows, block.sizes.tile.columns, block.sizes.tile.step
    matrix, at = split(block.program + i * block.sizes.grid, down * across)
    row, column = pl.multiple_of(at % down * rows, rows), pl.multiple_of(at // down * columns, columns)
    start = block.first_row[matrix] // 8 * 8
    return Tile(matrix, row, column, start, (block.end_row[matrix] - start + step - 1) // step)


def feed_tile(block, down, across, i, step):
    """Load a tile's steps, each into its stage once that is empty."""
    tile, sizes = tile_at(block, down, across, i), block.sizes
    slice_id = tile.matrix // sizes.num_experts

    def load_step(k, step):
        stage = step % sizes.tile.stages

        @pl.when(step >= sizes.tile.stages)
        def wait_until_empty():
            plgpu.barrier_wait(block.empty.at[stage])

        def copy(lhs, g, lhs_start, g_start):
            height, across = sizes.tile.step, pl.ds(tile.row, sizes.tile.rows)
            rows = pl.ds(pl.multiple_of(lhs_start + tile.start + k * height, 8), height)
            plgpu.copy_gmem_to_smem(lhs.at[rows, across], block.lhs_stages.at[stage], block.full.at[stage])
            across = pl.ds(tile.column, sizes.tile.columns)
            rows = pl.ds(pl.multiple_of(g_start + tile.start + k * height, 8), height)
            plgpu.copy_gmem_to_smem(g.at[rows, across], block.g_stages.at[stage], block.full.at[stage])

        @pl.when(block.scattered[tile.matrix] == 0)
        def copy_from_operands():
            copy(block.lhs, block.g, slice_id * sizes.lhs_slice, slice_id * sizes.g_slice)

        @pl.when(block.scattered[tile.matrix] != 0)
        def copy_from_gathered():
            copy(block.lhs_gathered, block.g_gathered, 0, 0)

        return step + 1

    return loop(tile.steps, load_step, step)


def make_tile(block, down, across, own, i, step):
    """Multiply a tile's rows from `own` on, and store them."""
    tile, height = tile_at(block, down, across, i), block.sizes.tile.step
    half, columns = block.sizes.tile.rows // 2, block.sizes.tile.columns
    sums = pl.run_scoped(functools.partial(multiply, block, tile, own, step), plgpu.ACC((half, columns), jnp.float32))
    for start in range(0, half, height):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        value = sums[start : start + height].astype(block.out.dtype)
        block.staged[block.warpgroup] = plgpu.layout_cast(value, plgpu.Layout.WGMMA)
        plgpu.commit_smem()
        rows = pl.ds(pl.multiple_of(tile.row + own + start, height), height)
        to = block.out.at[tile.matrix, rows, pl.ds(tile.column, columns)]
        plgpu.copy_smem_to_gmem(block.staged.at[block.warpgroup], to)
    return step + tile.steps


def multiply(block, tile, own, step, sums):
    """Add up a tile's steps. A stage is given back when the wgmma of the next one is under way."""
    stages, half = block.sizes.tile.stages, block.sizes.tile.rows // 2

    def add_step(k):
        stage, row = (step + k) % stages, tile.start + k * block.sizes.tile.step
        plgpu.barrier_wait(block.full.at[stage])

        @pl.when((row < block.first_row[tile.matrix]) | (row + block.sizes.tile.step > block.end_row[tile.matrix]))
        def mask():
            mask_step(block, tile.matrix, stage, row, own)

        plgpu.wgmma(sums, block.lhs_stages.at[stage, :, pl.ds(own, half)].T, block.g_stages.at[stage])
        plgpu.wgmma_wait(1)

        @pl.when(k > 0)
        def give_back_the_one_before():
            plgpu.barrier_arrive(block.empty.at[(step + k - 1) % stages])

    for_each(tile.steps, add_step)
    plgpu.wgmma_wait(0)

    @pl.when(tile.steps > 0)
    def give_back_the_last():
        plgpu.barrier_arrive(block.empty.at[(step + tile.steps - 1) % stages])

    return sums[...]


def mask_step(block, matrix, stage, row, own):
    """Zero a stage's rows of other experts: each multiplier its half of the columns. Then each waits for the other."""
    half, own_half = block.sizes.tile.rows // 2, block.sizes.tile.columns // 2

    def mask(ref):
        index = plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA) + row
        inside = (index >= block.first_row[matrix]) & (index < block.end_row[matrix])
        value = plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA)
        ref[...] = jnp.where(inside, value, jnp.zeros_like(value))

    mask(block.lhs_stages.at[stage, :, pl.ds(own, half)])
    mask(block.g_stages.at[stage, :, pl.ds(pl.multiple_of(block.warpgroup * own_half, own_half), own_half)])
    plgpu.commit_smem()
    plgpu.barrier_arrive(block.masked)
    plgpu.barrier_wait(block.masked)
