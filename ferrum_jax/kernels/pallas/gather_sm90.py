"""The kernel that copies rows into the order of a table's slots, by TMA.

The grouped products read the copy where an expert's rows do not lie together: see grouped_tables.py.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .grouped_tables import NO_EXPERT
from .launch import for_each, split
from .tiles import GATHER_BUFFERS, GATHER_COLUMNS


def shared_memory(dtype):
    """The buffers and their barrier."""
    shape = GATHER_BUFFERS, 8, GATHER_COLUMNS
    return [plgpu.SMEM(shape, dtype), plgpu.Barrier(num_arrivals=8 * GATHER_BUFFERS)]


def gather(lhs, slots, block_matrix, scattered, out, buffers, full, *, num_experts, num_pairs, lhs_slice, top_k):
    # out[i] = lhs[slot i // top_k], and zeros where slot i names no row: TMA gives zeros for a row beyond the last. A
    # thread block copies a table block by the columns of its buffers, eight rows at a time. It copies blocks of
    # scattered matrices only, and zeros for a block of no expert, which may stand between them.
    parts, _, width = buffers.shape
    block, chunk = split(lax.axis_index("program"), pl.cdiv(out.shape[1], parts * width))

    matrix = block_matrix[block]

    @pl.when((matrix == NO_EXPERT) | ((matrix >= 0) & (scattered[jnp.maximum(matrix, 0)] != 0)))
    def copy_block():
        start = lax.div(matrix, jnp.int32(num_experts)) * lhs_slice
        pairs = jnp.where(matrix >= 0, num_pairs, 0)

        def copy_eight(eight):
            starts = [(chunk * parts + part) * width for part in range(parts)]
            columns = [pl.ds(at, width) for at in starts]

            def load_row(j):
                name = slots[block, eight * 8 + j]
                row = jnp.where((name >= 0) & (name < pairs), start + lax.div(name, jnp.int32(top_k)), lhs.shape[0])
                for part in range(parts):
                    plgpu.copy_gmem_to_smem(lhs.at[pl.ds(row, 1), columns[part]], buffers.at[part, pl.ds(j, 1)], full)

            for_each(8, load_row)
            plgpu.barrier_wait(full)
            rows = pl.ds(pl.multiple_of(block * slots.shape[1] + eight * 8, 8), 8)
            for part in range(parts):

                @pl.when(starts[part] < out.shape[1])  # as in store_row, if `out` is as wide as a buffer
                def store_part(part=part):
                    plgpu.copy_smem_to_gmem(buffers.at[part], out.at[rows, columns[part]])

            plgpu.wait_smem_to_gmem(0)

        for_each(slots.shape[1] // 8, copy_eight)
