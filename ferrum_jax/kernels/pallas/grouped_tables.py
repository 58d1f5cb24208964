"""What the grouped products are told about a table: small int32 arrays, computed in jnp before the launch.

Words used here and in the kernels:

- A *matrix* is an expert's matrix for one slice of the batch; its number is slice * num_experts + expert.
- A *slot* is a place of the table. It names a row, or none: then its value is not in [0, num_pairs).
- A *block* is a run of slots of one expert, here cut into parts that a thread block can gather.
- A matrix is *scattered* if the rows that its slots name do not lie together, in the order of the slots. The kernels
  then read a gathered copy of the rows, which has a row for each slot.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from .launch import split
from .tiles import COMPARED, PART, WINDOW

NO_EXPERT, PAST_END = -1, -2  # stand for the matrix of a block that has none


def round_up(n, to):
    return -(-n // to) * to


def table_blocks(tables, lead, num_experts):
    """The slots as [blocks, slots a block], and for each block its matrix.

    A block of no expert has NO_EXPERT for its matrix, a block past the total PAST_END. Both are negative.
    """
    slots, blocks, total = (jnp.broadcast_to(t, (*lead, *t.shape[len(lead) :])) for t in tables)
    slots, blocks, total = (jnp.reshape(t, (math.prod(lead), -1)) for t in (slots, blocks, total))
    size = slots.shape[1] // blocks.shape[1]
    starts = lax.broadcasted_iota(jnp.int32, blocks.shape, 1) * size
    matrix = lax.broadcasted_iota(jnp.int32, blocks.shape, 0) * num_experts + blocks
    matrix = jnp.where((blocks >= 0) & (blocks < num_experts), matrix, NO_EXPERT)
    matrix = jnp.where(starts < total, matrix, PAST_END)
    parts = next(n for n in range(-(-size // PART), size + 1) if size % (8 * n) == 0 or n * 8 >= size)
    part = round_up(-(-size // parts), 8)
    slots = jnp.reshape(slots, (-1, size))
    if parts * part > size:
        slots = jnp.pad(slots, ((0, 0), (0, parts * part - size)), constant_values=-1)
    matrix = jnp.broadcast_to(jnp.reshape(matrix, (-1, 1)), (matrix.size, parts))
    return jnp.reshape(slots, (-1, part)), jnp.reshape(matrix, (-1,))


def _names_a_row(slots, block_matrix, num_pairs):
    return (slots >= 0) & (slots < num_pairs) & (block_matrix >= 0)[:, None]


def _reduce_together(operands, starts, functions, axis):
    """Reduce arrays of one shape along an axis, each with its own function, in one pass."""

    def reduce(x, y):
        return tuple(f(a, b) for f, a, b in zip(functions, x, y, strict=True))

    return lax.reduce(operands, tuple(map(np.int32, starts)), reduce, (axis,))


def runs(slots, block_matrix, num_pairs):
    """For each block: how many of its slots name a row, the place after the last that does, and its first row.

    The first row is -1 unless the block's slots from its first on name consecutive rows, and then none.
    """
    steps = lax.broadcasted_iota(jnp.int32, slots.shape, 1)
    named = _names_a_row(slots, block_matrix, num_pairs)
    breaks = named & (slots != slots[:, :1] + steps)
    values = named.astype(jnp.int32), jnp.where(named, steps + 1, 0), breaks.astype(jnp.int32)
    live, last, breaks = _reduce_together(values, (0, 0, 0), (lax.add, lax.max, lax.max), 1)
    return live, last, jnp.where((live > 0) & (live == last) & (breaks == 0), slots[:, 0], -1)


def row_ranges(slots, block_matrix, num_slices, num_experts, num_pairs, top_k):
    """For each matrix the rows to read, from `first_row` up to `end_row`, and whether it is scattered.

    The rows of a scattered matrix are counted in the gathered copy.
    """
    live, last, first = runs(slots, block_matrix, num_pairs)
    block, size = lax.iota(jnp.int32, block_matrix.size), slots.shape[1]
    goes_on = jnp.pad(first[:-1] + live[:-1] == first[1:], (1, 0))
    before = jnp.pad(block_matrix[:-1], (1, 0), constant_values=PAST_END)
    # The first block of a matrix starts its run. After a block of no expert it may not be the first: it counts as cut.
    goes_on |= (block_matrix != before) & (before != NO_EXPERT)
    breaks = ((first < 0) | ~goes_on).astype(jnp.int32) if top_k == 1 else jnp.ones_like(block_matrix)
    wide = num_slices, num_experts, block_matrix.size // num_slices

    def spread(x):
        return jnp.broadcast_to(jnp.reshape(x, (num_slices, 1, -1)), wide)

    matrix = lax.broadcasted_iota(jnp.int32, wide, 0) * num_experts + lax.broadcasted_iota(jnp.int32, wide, 1)
    mine = (spread(block_matrix) == matrix) & spread(live > 0)
    none = 2**31 - 1
    reduced = (block * size, none), (block * size + last, 0), (breaks, 0), (first, none), (first + live, 0)
    first_slot, end_slot, scattered, first_row, end_row = _reduce_together(
        tuple(jnp.where(mine, spread(x), jnp.int32(start)) for x, start in reduced),
        [start for _, start in reduced],
        (lax.min, lax.max, lax.max, lax.min, lax.max),
        2,
    )
    first_row = jnp.where(scattered != 0, first_slot, first_row)
    end_row = jnp.where(scattered != 0, end_slot, end_row)
    ranges = (jnp.reshape(jnp.where(end_slot > 0, x, 0), -1) for x in (first_row, end_row))
    return *ranges, jnp.reshape(scattered, -1)


def cut_into_tiles(first_row, end_row, tile, num_tiles):
    """Cut each matrix's rows into as few tiles of at most `tile.rows` rows as possible, of even heights.

    Returns the tiles as int32[4, num_tiles], and how many there are. The rows of that array are a tile's matrix, its
    first row, its height, and its group * (WINDOW + 1) + the group's size. A group is at most WINDOW consecutive tiles
    of one matrix, named by the number of its first tile: a block makes them side by side, column by column.
    """
    unit, most = tile.unit, tile.rows // tile.unit
    first_row = first_row & -8
    units, _ = split(jnp.maximum(end_row - first_row + unit - 1, 0), unit)
    counts, _ = split(units + most - 1, most)
    ends = _cumulative_sum(counts)
    number = lax.iota(jnp.int32, num_tiles)
    by_halves = "scan" if ends.size * num_tiles > COMPARED else "compare_all"
    matrix = jnp.searchsorted(ends, number, side="right", method=by_halves).astype(jnp.int32)
    matrix = jnp.minimum(matrix, ends.size - 1)
    usual, longer = split(units, jnp.maximum(counts, 1))
    # One gather: a program of many layers is compiled as long as it has many instructions.
    facts = jnp.stack([first_row, usual, longer, ends - counts, ends], 1)[matrix]
    first_row, usual, longer, begin, end = (lax.squeeze(x, (1,)) for x in lax.split(facts, [1] * 5, 1))
    # Of a matrix's tiles, number j, the first `longer` ones are a unit higher than the others.
    j = number - begin
    in_group = j & -WINDOW
    # Tables that break the rules may need more tiles than there is room for: the last ones are left out.
    size = jnp.minimum(jnp.minimum(end, num_tiles) - begin - in_group, WINDOW)
    first = first_row + unit * (j * usual + jnp.minimum(j, longer))
    height = unit * jnp.where(j < longer, usual + 1, usual)
    group = (begin + in_group) * (WINDOW + 1) + size
    return jnp.stack([matrix, first, height, group]), jnp.minimum(ends[-1:], num_tiles)


def _cumulative_sum(counts):
    if counts.size > COMPARED**0.5:
        return jnp.cumsum(counts, dtype=jnp.int32)
    until = lax.broadcasted_iota(jnp.int32, (counts.size, counts.size), 0)
    before = lax.broadcasted_iota(jnp.int32, until.shape, 1) <= until
    return jnp.sum(jnp.where(before, counts[None, :], 0), axis=1, dtype=jnp.int32)


def most_tiles(num_rows, num_matrices, tile):
    """As many tiles as a table that keeps the rules can need.

    A matrix's rows are read from up to 7 rows early, its last unit may hold a single row, and its last tile a single
    unit.
    """
    return (num_rows + num_matrices * (7 + tile.unit - 1 + tile.rows - tile.unit)) // tile.rows + 1


def unnamed_rows(slots, block_matrix, num_slices, num_pairs, padded, length):
    """For each eight rows of the result, an int32 with a bit for each row that no slot names.

    A slice of the result has `padded` rows. Zeros fill the array up to a multiple of `length`.
    """
    eights = num_slices * padded // 8
    slices, _ = split(lax.broadcasted_iota(jnp.int32, slots.shape, 0), block_matrix.size // num_slices)
    named = _names_a_row(slots, block_matrix, num_pairs)
    at = jnp.reshape(jnp.where(named, slices * padded + slots, eights * 8), (-1,))
    if eights * at.size <= COMPARED:

        def wide(x):
            return jnp.broadcast_to(x[None, :], (eights, at.size))

        own = wide(at >> 3) == lax.broadcasted_iota(jnp.int32, (eights, at.size), 0)
        bits = lax.reduce(jnp.where(own, wide(1 << (at & 7)), 0), jnp.int32(0), lax.bitwise_or, (1,))
    else:
        named = jnp.zeros(eights * 8, jnp.int32).at[at].set(1, mode="drop", unique_indices=True)
        named = jnp.reshape(named, (eights, 8))
        bits = jnp.sum(named << lax.broadcasted_iota(jnp.int32, named.shape, 1), axis=1, dtype=jnp.int32)
    _, eight = split(lax.iota(jnp.int32, eights), padded // 8)
    there = jnp.clip(num_pairs - 8 * eight, 0, 8)
    return jnp.pad(((1 << there) - 1) & ~bits, (0, round_up(eights, length) - eights))


def weights_by_place(weights, lead, slots, num_slices, num_pairs, padded, most):
    """The rows' weights, as the kernel reads them: by row, then by slot, then `most` zeros that a tile may read too."""
    weights = jnp.reshape(jnp.broadcast_to(weights, (*lead, num_pairs)), (num_slices, num_pairs))
    weights = jnp.reshape(jnp.pad(weights, ((0, 0), (0, padded - num_pairs))), -1)
    slots = jnp.reshape(slots, (num_slices, -1))
    at = lax.broadcasted_iota(jnp.int32, slots.shape, 0) * padded + jnp.clip(slots, 0, num_pairs - 1)
    return jnp.concatenate([weights, weights[jnp.reshape(at, -1)], jnp.zeros(most, weights.dtype)])
