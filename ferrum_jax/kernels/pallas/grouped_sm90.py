"""The kernel of the grouped product for Hopper GPUs, which multiplies with wgmma.

grouped_tables.py says what a matrix, a slot, a block and a scattered matrix are. Here also:

- A *tile* is the part of the result that a block makes at a time: rows of one matrix, and columns.
- A *step* is the part of the inner length that is loaded and multiplied at a time. Steps are counted through all tiles
  of a block.
- A *stage* is a place in shared memory that holds a step. Step s is in stage s % stages.
- The three warpgroups of a block are two *multipliers*, each of half of the tile's columns, and one *feeder*.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .launch import for_each, loop, put, split, store_row, tiled
from .tiles import PROGRAMS, WINDOW, Tile

FEEDER = 2  # the warpgroup; those below it multiply


# ---- what the product's functions are given


class Sizes(NamedTuple):
    """What is known of a product when it is compiled."""

    tile: Tile
    steps: int  # of a tile
    stages: int
    chunk: int  # rows of a tile that a multiplier stages before it stores them
    grid: int
    num_experts: int
    num_pairs: int  # rows of a slice of the result
    block_slots: int  # slots of a block
    transposed: bool
    activation: Any  # a function of gate and up, or None
    lhs_slice: int  # rows of a slice of lhs; 0 if all slices share them
    out_slice: int  # rows of a slice of the result, padding included
    own_matrices: bool  # whether each slice has matrices of its own


class Product(NamedTuple):
    """What a block of `product` works with: references in the launcher's order, and where the block stands."""

    # in global memory
    lhs: Any  # [rows, H]
    gathered: Any  # [slots, H], the rows of scattered matrices
    rhs: Any  # [matrices, H, N]; [matrices, N, H] if transposed
    tiles: Any  # [4, tiles]: see cut_into_tiles
    num_tiles: Any  # [1]
    first_row: Any  # [matrices]
    end_row: Any  # [matrices]
    scattered: Any  # [matrices]
    slots: Any  # [slots]: the row that each names
    block_matrix: Any  # [blocks]
    unnamed: Any  # [eights]: see unnamed_rows
    weights: Any  # see weights_by_place; or None
    out: Any  # [rows, columns]
    # in shared memory
    row_stages: Any  # [stages, tile's rows, step]
    matrix_stages: Any  # [stages, step, tile's columns], transposed if the product is; with an activation four parts
    staged: Any  # [2, chunk, own columns]: results of each multiplier
    eight_rows: Any  # [2, 8, own columns]: results that are stored row by row
    zeros: Any  # [1, ...]
    full: Any  # a barrier for each stage: its copies have arrived
    empty: Any  # a barrier for each stage: both multipliers are done with it
    # not in memory
    sizes: Sizes
    program: Any
    warpgroup: Any

    @property
    def width(self):
        return self.out.shape[1]

    @property
    def own_columns(self):
        """Columns of the result that a multiplier makes of a tile."""
        return self.staged.shape[2]

    @property
    def across(self):
        """Tiles side by side in the whole width."""
        return pl.cdiv(self.width, 2 * self.own_columns)


def shared_memory(sizes, operand_dtype, dtype):
    """The references of Product that are in shared memory."""
    tile, stages = sizes.tile, sizes.stages
    half = tile.columns // (4 if sizes.activation else 2)  # of gate and up a multiplier makes one column
    if sizes.activation:
        part = 4, tile.step, half
    else:
        part = (tile.columns, tile.step) if sizes.transposed else (tile.step, tile.columns)
    return [
        plgpu.SMEM((stages, tile.rows, tile.step), operand_dtype, transforms=tiled(operand_dtype)),
        plgpu.SMEM((stages, *part), operand_dtype, transforms=tiled(operand_dtype)),
        plgpu.SMEM((2, sizes.chunk, half), dtype, transforms=tiled(dtype)),
        plgpu.SMEM((2, 8, half), dtype),
        plgpu.SMEM((1, tile.columns // 2), dtype),
        plgpu.Barrier(num_arrivals=5 if sizes.activation else 2, num_barriers=stages),  # the copies of a stage
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ]


# ---- the product


def product(*refs, sizes):
    # out[r] = lhs[r] @ rhs[e] for the rows r of expert e. A block makes its tiles in turn: the feeder loads rows and
    # matrix by TMA, stage by stage, and two multipliers multiply and store. At the end the feeder stores zeros to the
    # block's share of the rows that no slot names.
    #
    # A tile is multiplied transposed: its columns lie in the long direction of the tensor cores, which is fixed, its
    # rows in the short one, which may be any multiple of 8. TMA reads rows from a multiple of 8 on, so a tile may have
    # rows of other experts at its ends: they are multiplied, but not stored.
    #
    # With an activation the matrix is gate and up. Half of a multiplier's columns are the gate's, the other half the
    # same columns of up, so that each thread holds both of the values that it makes one of.
    block = Product(*refs, sizes, lax.axis_index("program"), lax.axis_index("warpgroup"))

    @pl.when(block.warpgroup == FEEDER)
    def feed_and_clear():
        plgpu.set_max_registers(56, action="decrease")
        loop(own_tiles(block), functools.partial(feed_tile, block), jnp.int32(0))
        clear_share(block)

    @pl.when(block.warpgroup < FEEDER)
    def multiply_and_store():
        plgpu.set_max_registers(224, action="increase")
        half = sizes.tile.columns // 2
        columns = pl.ds(pl.multiple_of(block.warpgroup * half, half), half)  # of the matrix's tile
        loop(own_tiles(block), functools.partial(make_tile, block, columns), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def own_tiles(block):
    """How many tiles the block makes. Each warpgroup computes it anew: a value from before would be spilled."""
    grid = block.sizes.grid
    return lax.div(jnp.maximum(block.num_tiles[0] * block.across - block.program, 0) + grid - 1, jnp.int32(grid))


def tile_at(block, i):
    """Of the block's i-th tile: the matrix, the first column, the first row and the height."""
    at = block.program + i * block.sizes.grid
    group, size = split(block.tiles[3, lax.div(at, jnp.int32(block.across))], WINDOW + 1)
    column, number = split(at - group * block.across, size)
    # Start each column with another tile of the group. Otherwise, where the grid is a multiple of the group's size, one
    # block might get all of the tall tiles.
    number = group + lax.rem(number + column, size)
    column = pl.multiple_of(column * 2 * block.own_columns, 2 * block.own_columns)
    return block.tiles[0, number], column, block.tiles[1, number], block.tiles[2, number]


def stage_of(block, step):
    return lax.rem(step, jnp.int32(block.sizes.stages))


# ---- the feeder


def feed_tile(block, i, step):
    """Load a tile's steps, each into its stage once that is empty."""
    sizes = block.sizes
    matrix, column, first, _ = tile_at(block, i)

    def load_step(k, step):
        stage = stage_of(block, step)
        along = pl.ds(pl.multiple_of(k * sizes.tile.step, sizes.tile.step), sizes.tile.step)

        @pl.when(step >= sizes.stages)
        def wait_until_empty():
            plgpu.barrier_wait(block.empty.at[stage])

        copy_rows(block, stage, matrix, first, along)
        copy_matrix(block, stage, matrix, column, along)
        return step + 1

    return loop(sizes.steps, load_step, step)


def copy_rows(block, stage, matrix, first, along):
    """Copy a tile's rows from where they lie, or from their gathered copy."""
    sizes = block.sizes

    def copy_from(source, start):
        rows = pl.ds(pl.multiple_of(start + first, 8), sizes.tile.rows)
        plgpu.copy_gmem_to_smem(source.at[rows, along], block.row_stages.at[stage], block.full.at[stage])

    @pl.when(block.scattered[matrix] == 0)
    def copy_from_lhs():
        copy_from(block.lhs, lax.div(matrix, jnp.int32(sizes.num_experts)) * sizes.lhs_slice)

    @pl.when(block.scattered[matrix] != 0)
    def copy_from_gathered():
        copy_from(block.gathered, 0)


def copy_matrix(block, stage, matrix, column, along):
    """Copy a tile's columns of a matrix; with an activation, for each multiplier the gate's and up's."""
    sizes, full = block.sizes, block.full.at[stage]
    number = matrix if sizes.own_matrices else lax.rem(matrix, jnp.int32(sizes.num_experts))
    if not sizes.activation:
        columns = pl.ds(column, sizes.tile.columns)
        at = (columns, along) if sizes.transposed else (along, columns)
        plgpu.copy_gmem_to_smem(block.rhs.at[number, *at], block.matrix_stages.at[stage], full)
        return
    up, own = block.width, block.own_columns
    for part, start in enumerate((0, up, own, up + own)):
        columns = pl.ds(pl.multiple_of(column + start, own), own)
        plgpu.copy_gmem_to_smem(block.rhs.at[number, along, columns], block.matrix_stages.at[stage, part], full)


def clear_share(block):
    """Store zeros to the unnamed rows of the block's share of the result. PROGRAMS blocks have one."""
    share = block.unnamed.shape[0] // min(block.sizes.grid, PROGRAMS)  # eights of rows

    @pl.when(block.program < PROGRAMS)
    def clear():
        put(block.zeros, jnp.zeros(block.zeros.shape, block.zeros.dtype))
        plgpu.commit_smem()

        def clear_128_eights(i):
            start = block.program * share + i * 128
            bits = plgpu.load(block.unnamed.at[pl.ds(start, 128)], layout=plgpu.Layout.WG_STRIDED((128,), 1))

            @pl.when(jnp.max(bits) > 0)
            def clear_each():
                for_each(128, lambda j: clear_eight(block, start + j))

        for_each(share // 128, clear_128_eights)
        plgpu.wait_smem_to_gmem(0)


def clear_eight(block, at):
    bits, zeros = block.unnamed[at], block.zeros
    width = zeros.shape[1]

    @pl.when(bits != 0)
    def clear_rows():
        def clear_row(j):
            @pl.when((bits >> j) & 1 != 0)
            def clear_columns():
                for_each(pl.cdiv(block.width, width), lambda i: store_row(zeros, block.out, at * 8 + j, i * width))

        for_each(8, clear_row)


# ---- the multipliers


def make_tile(block, columns, i, step):
    """Multiply a tile and store it. There is code for each height that a tile can have."""
    own = block.own_columns
    matrix, column, first, height = tile_at(block, i)
    unit = block.sizes.tile.unit
    for size in range(unit, block.sizes.tile.rows + 1, unit):

        @pl.when(height == size)
        def make_tile_of_this_height(size=size):
            sums = [plgpu.ACC((own, size), jnp.float32)] * (2 if block.sizes.activation else 1)
            sums = pl.run_scoped(functools.partial(multiply, block, columns, step), *sums)
            store_tile(block, matrix, pl.multiple_of(column + block.warpgroup * own, own), first, sums)

    return step + block.sizes.steps


def multiply(block, columns, step, *sums):
    """Add up a tile's steps. A stage is given back when the wgmma of the next one is under way."""
    steps = block.sizes.steps

    def add_next(k):
        add_step(block, columns, step + k, sums)
        plgpu.wgmma_wait(len(sums))

        @pl.when(k > 0)
        def give_back_the_one_before():
            plgpu.barrier_arrive(block.empty.at[stage_of(block, step + k - 1)])

    for_each(steps, add_next)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(block.empty.at[stage_of(block, step + steps - 1)])
    # An activation and weights want float32. Otherwise 16 bits hold the result, in fewer registers.
    finished_later = block.sizes.activation or block.weights is not None
    return [x[...] if finished_later else x[...].astype(block.out.dtype) for x in sums]


def add_step(block, columns, step, sums):
    """sums += matrix.T @ rows.T, of a stage: with an activation the gate's sums and up's, otherwise one."""
    stage, matrix = stage_of(block, step), block.matrix_stages
    plgpu.barrier_wait(block.full.at[stage])
    for i, part in enumerate(sums):
        if block.sizes.activation:
            a = matrix.at[stage, block.warpgroup * 2 + i].T
        elif block.sizes.transposed:
            a = matrix.at[stage, columns]
        else:
            a = matrix.at[stage, :, columns].T
        plgpu.wgmma(part, a, block.row_stages.at[stage, pl.ds(0, part.shape[1])].T)


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
