"""Grouped products with wgmma: a warpgroup feeds shared memory by TMA, two others multiply and store."""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import launch, lead_axes, loop, pad, split

PROGRAMS = 132  # persistent blocks: the multiprocessors of a Hopper SXM card, one block each
STEP = 64  # elements of a 128-byte line of shared memory, the longest that wgmma reads: all lengths are multiples
SWIZZLE = 128
COLUMNS = 256  # of a tile, half for each of the two multiplying warpgroups
WINDOW = 32  # the largest window
SMALL = 2**24  # bytes of an expert's matrix that stays in the L2 cache from one of its blocks to the next
PART = 160  # most slots of a tile: beyond, one ptxas or another spills registers

# Most slots of a tile -> by how many slots the sizes differ over which its product is made, the smallest that holds its
# rows; the window, table blocks of which those of one expert go side by side through the columns; and how many tiles a
# thread block takes, the hardware dealing them out (0: as many as its share, so that its loads never stop). Decode:
# bytes are the time. Middle: products count too, and most experts have one or two blocks. Prefill: a full tile's time
# is its products; of LARGE matrices the cache holds less than one, so all blocks that use a column go there together.
# The product's kernel on an H100 80GB HBM3, bfloat16, 2026-11-25, E=128 H=2048 N=1536: T=16 167 us; T=1024, blocks of
# 64, 296 us with sizes 40, 56 and 72 (40 and 72: 309, and 315 in groups of 4 blocks); T=8192 700 us by 32 in groups of
# 2 blocks (by 24: 710, by 16: 728, larger groups: 731 to 745), tiles of 192 slots 682 us. E=64 H=7168 N=4096, T=4096:
# 4011 us in windows of 32 (groups of 8 blocks: 4270, of 4: 4783). `python -m ferrum_jax.kernels.pallas.tune` times all.
TILES = {40: (24, 1, 0), 72: (16, 1, 0), PART + 8: (32, 2, 0)}
LARGE = (32, 32, 0)
COMPARED = 2**25  # up to here each eight rows are compared with each slot: one launch in place of three
CHUNK = 32  # slots of a tile that are stored at a time


# ---- rows by their expert's matrix


def product(
    lhs, gathered, rhs, expert, first, live, order, slots, total, holes, out,
    rows, matrix, stage, edge, zero, full, empty,
    *, TRANSPOSED, STEPS, STAGES, ROWS, CHUNK, SIZES, GRID, TAKES,
    SIZE, PARTS, PER_SLICE, LHS_SLICE, OUT_SLICE, RHS_SLICE,
):  # fmt: skip
    # out[s] = lhs[s] @ rhs[e]: a block owns in turn tiles of COLUMNS columns by a table block's slots, and makes them
    # transposed, columns in the tensor cores' long direction and slots, any multiple of 8, in the short one. TMA reads
    # rows from a multiple of 8 on; the up to 7 rows before a block's first are multiplied too, and not stored. Blocks
    # whose slots name no run of rows are read from `gathered`, and stored row by row.
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    width, blocks = out.shape[1], expert.shape[0]
    if blocks == PER_SLICE:
        blocks = (lax.div(jnp.clip(total[0], 0, blocks // PARTS * SIZE) - 1, jnp.int32(SIZE)) + 1) * PARTS
    across = pl.cdiv(width, COLUMNS)
    if TAKES:
        tiles = jnp.clip(blocks * across - program * TAKES, 0, TAKES)
    else:
        tiles = lax.div(blocks * across - program + GRID - 1, jnp.int32(GRID))

    def tile(i):
        """The table block, the first column, and the source's first row of this block's i-th tile."""
        at = program * TAKES + i if TAKES else program + i * GRID
        if order is None:
            block, column = split(at, across)
        else:
            begin, size = split(order[lax.div(at, jnp.int32(across))], WINDOW + 1)
            column, block = split(at - begin * across, size)
            block += begin
        return block, pl.multiple_of(column * COLUMNS, COLUMNS), first[block]

    def feed(i, step):
        block, column, row = tile(i)
        slice_id, owner = lax.div(block, jnp.int32(PER_SLICE)), expert[block]

        def load(k, step):
            slot = lax.rem(step, jnp.int32(STAGES))
            along = pl.ds(pl.multiple_of(k * STEP, STEP), STEP)

            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            @pl.when(row >= 0)
            def _():
                at = pl.multiple_of(slice_id * LHS_SLICE + lax.div(row, jnp.int32(8)) * 8, 8)
                plgpu.copy_gmem_to_smem(lhs.at[pl.ds(at, ROWS), along], rows.at[slot], full.at[slot])

            @pl.when(row < 0)
            def _():
                at = pl.multiple_of(block * slots.shape[1], 8)
                plgpu.copy_gmem_to_smem(gathered.at[pl.ds(at, ROWS), along], rows.at[slot], full.at[slot])

            these = (pl.ds(column, COLUMNS), along) if TRANSPOSED else (along, pl.ds(column, COLUMNS))
            plgpu.copy_gmem_to_smem(rhs.at[slice_id * RHS_SLICE + owner, *these], matrix.at[slot], full.at[slot])
            return step + 1

        return lax.cond(owner >= 0, lambda: loop(STEPS, load, step), lambda: step)

    def clear(at):
        bits = holes[at]

        @pl.when(bits != 0)
        def _():
            @each(8)
            def _(j):
                @pl.when((bits >> j) & 1 != 0)
                def _():
                    each(pl.cdiv(width, zero.shape[1]))(lambda i: put_row(zero, out, at * 8 + j, i * zero.shape[1]))

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        loop(tiles, feed, jnp.int32(0))
        own = holes.shape[0] // min(GRID, PROGRAMS)

        @pl.when(program < PROGRAMS)
        def _():
            store(zero, jnp.zeros(zero.shape, zero.dtype))
            plgpu.commit_smem()

            @each(own // 128)
            def _(i):
                start = program * own + i * 128
                some = plgpu.load(holes.at[pl.ds(start, 128)], layout=plgpu.Layout.WG_STRIDED((128,), 1))

                @pl.when(jnp.max(some) > 0)
                def _():
                    each(128)(lambda j: clear(start + j))

            plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(232, action="increase")
        own = pl.multiple_of(warpgroup * (COLUMNS // 2), COLUMNS // 2)

        def multiply(i, step):
            block, column, row = tile(i)
            need = jnp.where(row >= 0, lax.rem(row, jnp.int32(8)) + live[block], slots.shape[1])
            for below, size in zip((0, *SIZES), SIZES, strict=False):

                @pl.when((expert[block] >= 0) & (need > below) & (need <= size))
                def _(size=size):
                    sums = plgpu.ACC((COLUMNS // 2, size), jnp.float32)
                    sums = pl.run_scoped(functools.partial(accumulate, step, size), sums)
                    write(block, pl.multiple_of(column + own, COLUMNS // 2), row, sums)

            return jnp.where(expert[block] >= 0, step + STEPS, step)

        def accumulate(step, size, sums):
            def add(step):
                slot = lax.rem(step, jnp.int32(STAGES))
                plgpu.barrier_wait(full.at[slot])
                mine = pl.ds(own, COLUMNS // 2)
                a = matrix.at[slot, mine] if TRANSPOSED else matrix.at[slot, :, mine].T
                plgpu.wgmma(sums, a, rows.at[slot, pl.ds(0, size)].T)

            add(step)

            @each(STEPS - 1)
            def _(k):
                add(step + k + 1)
                plgpu.wgmma_wait(1)
                plgpu.barrier_arrive(empty.at[lax.rem(step + k, jnp.int32(STAGES))])

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[lax.rem(step + STEPS - 1, jnp.int32(STAGES))])
            return sums[...].astype(out.dtype)

        def write(block, column, row, sums):
            slice_id, number = lax.div(block, jnp.int32(PER_SLICE)), live[block]
            before = jnp.where(row >= 0, lax.rem(row, jnp.int32(8)), 0)
            to = slice_id * OUT_SLICE
            columns, narrow = pl.ds(column, COLUMNS // 2), out.dtype.itemsize == 2
            for start in range(0, sums.shape[1], CHUNK):
                here = min(CHUNK, sums.shape[1] - start)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                part = stage.at[warpgroup, pl.ds(0, here)]
                value = plgpu.layout_cast(sums[:, start : start + here], plgpu.Layout.WGMMA)
                # 16 bits go through the matrix-store instruction, which transposes; of 32 bits the threads swap pairs.
                part.T[...] = value if narrow else plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()

                @each(here // 8)
                def _(g, start=start):
                    at = pl.multiple_of(g * 8, 8)
                    slot = start + at - before  # of the eight rows' first; there may be none at the ends
                    whole = (row >= 0) & (slot >= 0) & (slot + 8 <= number)

                    @pl.when(whole)
                    def _():
                        rows = pl.ds(pl.multiple_of(to + row + slot, 8), 8)
                        plgpu.copy_smem_to_gmem(stage.at[warpgroup, pl.ds(at, 8)], out.at[rows, columns])

                    @pl.when(~whole & (slot + 8 > 0) & (slot < slots.shape[1]))
                    def _():
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        eight_rows = plgpu.load(
                            stage.at[warpgroup, pl.ds(at, 8)], layout=_eight(out.dtype), optimized=False
                        )
                        store(edge.at[warpgroup], eight_rows)
                        plgpu.commit_smem()

                        @each(8)
                        def _(j):
                            inside = (slot + j >= 0) & (slot + j < slots.shape[1])
                            name = slots[block, jnp.where(inside, slot + j, 0)]

                            @pl.when(inside & (name >= 0))
                            def _():
                                put_row(edge.at[warpgroup, pl.ds(j, 1)], out, to + name, column)

        loop(tiles, multiply, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def each(times):
    """The decorated function of i, for each i in [0, times)."""
    return lambda body: loop(times, lambda i, _: body(i) or (), ())


def _tiled(dtype):
    """Shared memory as wgmma and TMA want it: lines of 128 bytes, eight of them swizzled against each other."""
    return plgpu.TilingTransform((8, SWIZZLE // dtype.itemsize)), plgpu.SwizzleTransform(SWIZZLE)


def _eight(dtype):
    """8 rows of a warpgroup's columns in its registers, 16 bytes of a row a thread."""
    vector, half = 16 // dtype.itemsize, COLUMNS // 2
    tiling = plgpu.Tiling(((8, half), (vector, half // 4), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


def store(ref, value):
    """To where no layout of `value` is fast, which JAX 0.12 wants said."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def put_row(row, out, index, column):
    """A row of shared memory to out[index, column:]. A copy that is one piece of memory goes by addresses, not by the
    array's shape as others do: past the row's end it would run on into the next row.
    """
    width = math.gcd(row.shape[1], out.shape[1])
    for start in range(0, row.shape[1], width):
        to = pl.multiple_of(column + start, width)

        @pl.when(to < out.shape[1])
        def _(start=start, to=to):
            plgpu.copy_smem_to_gmem(row.at[:, pl.ds(start, width)], out.at[pl.ds(index, 1), pl.ds(to, width)])


def gather(lhs, slots, skip, out, buffer, full, *, PER_SLICE, LHS_SLICE, TOP_K):
    # out[i] = lhs[slot i // TOP_K], zeros where slot i names no row: a block owns a table block by a buffer's columns
    # and copies eight rows at a time. TMA gives zeros for a row beyond the last. Skipped blocks are not written.
    parts, _, columns = buffer.shape
    block, chunk = split(lax.axis_index("program"), pl.cdiv(out.shape[1], parts * columns))

    @pl.when(skip[block] == 0)
    def _():
        start = lax.div(block, jnp.int32(PER_SLICE)) * LHS_SLICE

        @each(slots.shape[1] // 8)
        def _(eight):
            starts = [(chunk * parts + part) * columns for part in range(parts)]
            across = [pl.ds(at, columns) for at in starts]

            @each(8)
            def _(j):
                name = slots[block, eight * 8 + j]
                row = jnp.where(name >= 0, start + lax.div(name, jnp.int32(TOP_K)), lhs.shape[0])
                for part in range(parts):
                    plgpu.copy_gmem_to_smem(lhs.at[pl.ds(row, 1), across[part]], buffer.at[part, pl.ds(j, 1)], full)

            plgpu.barrier_wait(full)
            rows = pl.ds(pl.multiple_of(block * slots.shape[1] + eight * 8, 8), 8)
            for part in range(parts):

                @pl.when(starts[part] < out.shape[1])  # as in put_row, where the array is as wide as the buffer
                def _(part=part):
                    plgpu.copy_smem_to_gmem(buffer.at[part], out.at[rows, across[part]])

            plgpu.wait_smem_to_gmem(0)


# ---- per expert, rows by rows


def outer(
    lhs, lhs_gathered, g, g_gathered, low, high, apart, out,
    left, right, stage, full, empty, masked,
    *, EXPERTS, STAGES, LHS_SLICE, G_SLICE, GRID,
):  # fmt: skip
    # out[e] = sum over e's rows r of lhs[r] x g[r]: a block owns in turn tiles of COLUMNS rows by COLUMNS / 2 columns
    # of an expert's matrix and walks along the expert's rows, STEP at a time, from a multiple of 8 on. Rows of other
    # experts, which the first and the last step may hold, are zeroed in shared memory first. Experts whose rows do not
    # lie together are read from the gathered copies. Without rows the sum is zeros.
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    half = COLUMNS // 2
    down, across = pl.cdiv(out.shape[1], COLUMNS), pl.cdiv(out.shape[2], half)
    tiles = (out.shape[0] * down * across - program + GRID - 1) // GRID

    def tile(i):
        """The matrix, the tile's first row and column in it, the first row read, and how many steps."""
        owner, at = split(program + i * GRID, down * across)
        row, column = pl.multiple_of(at % down * COLUMNS, COLUMNS), pl.multiple_of(at // down * half, half)
        start = low[owner] // 8 * 8
        return owner, row, column, start, (high[owner] - start + STEP - 1) // STEP

    def feed(i, step):
        owner, row, column, start, steps = tile(i)
        slice_id = owner // EXPERTS

        def load(k, step):
            slot = step % STAGES

            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            def copy(lhs, g, lhs_slice, g_slice):
                at = pl.ds(pl.multiple_of(lhs_slice + start + k * STEP, 8), STEP)
                plgpu.copy_gmem_to_smem(lhs.at[at, pl.ds(row, COLUMNS)], left.at[slot], full.at[slot])
                at = pl.ds(pl.multiple_of(g_slice + start + k * STEP, 8), STEP)
                plgpu.copy_gmem_to_smem(g.at[at, pl.ds(column, half)], right.at[slot], full.at[slot])

            pl.when(apart[owner] == 0)(lambda: copy(lhs, g, slice_id * LHS_SLICE, slice_id * G_SLICE))
            pl.when(apart[owner] != 0)(lambda: copy(lhs_gathered, g_gathered, 0, 0))
            return step + 1

        return loop(steps, load, step)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        loop(tiles, feed, jnp.int32(0))

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(232, action="increase")
        own = pl.multiple_of(warpgroup * half, half)

        def multiply(i, step):
            owner, row, column, start, steps = tile(i)

            def keep(ref, at):
                index = plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA) + at
                inside = (index >= low[owner]) & (index < high[owner])
                value = plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA)
                ref[...] = jnp.where(inside, value, jnp.zeros_like(value))

            def accumulate(sums):
                @each(steps)
                def _(k):
                    slot, at = (step + k) % STAGES, start + k * STEP
                    plgpu.barrier_wait(full.at[slot])

                    @pl.when((at < low[owner]) | (at + STEP > high[owner]))
                    def _():
                        keep(left.at[slot, :, pl.ds(own, half)], at)
                        keep(right.at[slot, :, pl.ds(pl.multiple_of(warpgroup * STEP, STEP), STEP)], at)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(masked)
                        plgpu.barrier_wait(masked)

                    plgpu.wgmma(sums, left.at[slot, :, pl.ds(own, half)].T, right.at[slot])
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(empty.at[(step + k - 1) % STAGES])

                plgpu.wgmma_wait(0)

                @pl.when(steps > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[(step + steps - 1) % STAGES])

                return sums[...]

            sums = pl.run_scoped(accumulate, plgpu.ACC((half, half), jnp.float32))
            for down in range(0, half, STEP):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stage[warpgroup] = plgpu.layout_cast(sums[down : down + STEP].astype(out.dtype), plgpu.Layout.WGMMA)
                plgpu.commit_smem()
                rows = pl.ds(pl.multiple_of(row + own + down, STEP), STEP)
                plgpu.copy_smem_to_gmem(stage.at[warpgroup], out.at[owner, rows, pl.ds(column, half)])
            return step + steps

        loop(tiles, multiply, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


# ---- tables


def _blocks(tables, lead, num_pairs, num_experts):
    """Each block's slots, [blocks, slots], -1 for none; and per block its expert, -1 if no slot of it counts."""
    slots, blocks, total = (jnp.broadcast_to(t, (*lead, *t.shape[len(lead) :])) for t in tables)
    slots, blocks, total = (jnp.reshape(t, (math.prod(lead), -1)) for t in (slots, blocks, total))
    size = slots.shape[1] // blocks.shape[1]
    parts = pl.cdiv(size, PART)
    part = _up(pl.cdiv(size, parts), 8)
    starts = lax.broadcasted_iota(jnp.int32, blocks.shape, 1) * size
    counts = (blocks >= 0) & (blocks < num_experts) & (starts < total)
    slots = jnp.reshape(slots, (*blocks.shape, size))
    slots = jnp.where((slots >= 0) & (slots < num_pairs) & counts[..., None], slots, -1)
    slots = jnp.pad(slots, ((0, 0), (0, 0), (0, parts * part - size)), constant_values=-1)
    slots = jnp.reshape(slots, (-1, part))
    live = jnp.sum(slots >= 0, axis=1, dtype=jnp.int32)
    expert = jnp.reshape(jnp.broadcast_to(blocks[..., None], (*blocks.shape, parts)), (-1,))
    return slots, jnp.where(live > 0, expert, -1), live


def _up(n, to):
    return -(-n // to) * to


def _runs(slots):
    """Per block its first row where its slots name a run of rows, first to last; else -1."""
    steps = lax.broadcasted_iota(jnp.int32, slots.shape, 1)
    named = slots >= 0
    after = jnp.pad(named[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    run = jnp.all((slots == slots[:, :1] + steps) & after | ~named, axis=1)
    return jnp.where(run, slots[:, 0], -1)


def _order(expert, window):
    """Per block, of those of its expert in its window, the first's index * (WINDOW + 1) + their number."""
    windows = jnp.reshape(
        jnp.pad(expert, (0, _up(expert.size, window) - expert.size), constant_values=-2), (-1, window)
    )
    same = windows[:, :, None] == windows[:, None, :]
    before = jnp.argmax(same, axis=2).astype(jnp.int32)
    begin = lax.broadcasted_iota(jnp.int32, before.shape, 0) * window + before
    order = begin * (WINDOW + 1) + jnp.sum(same, axis=2, dtype=jnp.int32)
    return jnp.reshape(order, (-1,))[: expert.size]


def _ranges(slots, expert, live, per_slice, matrices, num_experts, top_k):
    """Per expert of each slice the rows to read, [low, high); whether they are apart, and those of the gathered copy;
    and per block whether it needs no gathered copy.
    """
    block = lax.iota(jnp.int32, live.size)
    owner = jnp.where(expert >= 0, block // per_slice * num_experts + expert, -1)
    first = _runs(slots)
    goes_on = jnp.pad((slots[:-1, -1] >= 0) & (slots[:-1, -1] + 1 == first[1:]), (1, 0)) | (
        owner != jnp.pad(owner[:-1], (1, 0), constant_values=-2)
    )
    mine = owner[None, :] == lax.broadcasted_iota(jnp.int32, (matrices, live.size), 0)
    wide = lambda x: jnp.broadcast_to(x[None, :], mine.shape)  # noqa: E731
    reduce = lambda f, x, none: f(jnp.where(mine, wide(x), none), axis=1)  # noqa: E731
    begin, end = reduce(jnp.min, block, live.size), reduce(jnp.max, block + 1, 0)
    apart = jnp.any(mine & wide((first < 0) | ~goes_on), axis=1) if top_k == 1 else jnp.full(matrices, True)
    size = slots.shape[1]
    low = jnp.where(apart, begin * size, reduce(jnp.min, first, 2**31 - 1))
    high = jnp.where(apart, end * size, reduce(jnp.max, first + live, 0))
    none = begin >= end
    skip = (owner < 0) | ~apart[jnp.maximum(owner, 0)]
    return (*(jnp.where(none, 0, x) for x in (low, high)), apart.astype(jnp.int32), skip.astype(jnp.int32))


def _holes(slots, per_slice, num_slices, num_rows, padded, length):
    """For each eight rows of the result, a bit for each row that no slot names; zeros up to a multiple of `length`."""
    slices = lax.broadcasted_iota(jnp.int32, slots.shape, 0) // per_slice
    eights = num_slices * padded // 8
    at = jnp.reshape(jnp.where(slots >= 0, slices * padded + slots, eights * 8), (-1,))
    if eights * at.size <= COMPARED:
        wide = lambda x: jnp.broadcast_to(x[None, :], (eights, at.size))  # noqa: E731
        own = wide(at >> 3) == lax.broadcasted_iota(jnp.int32, (eights, at.size), 0)
        bits = lax.reduce(jnp.where(own, wide(1 << (at & 7)), 0), jnp.int32(0), lax.bitwise_or, (1,))
    else:
        named = jnp.zeros(eights * 8, jnp.int32).at[at].set(1, mode="drop", unique_indices=True)
        named = jnp.reshape(named, (eights, 8))
        bits = jnp.sum(named << lax.broadcasted_iota(jnp.int32, named.shape, 1), axis=1, dtype=jnp.int32)
    there = jnp.clip(num_rows - 8 * (lax.iota(jnp.int32, eights) % (padded // 8)), 0, 8)
    return jnp.pad(((1 << there) - 1) & ~bits, (0, _up(eights, length) - eights))


# ---- wrappers


def _large(x, lead, rows=1, columns=STEP):
    """Rows or matrices, one slice if the batch shares them, filled up to whole tiles; and how many slices."""
    own = x.shape[: len(lead)]
    if math.prod(own) != 1 and own != lead:
        x = jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :]))
    x = pad(x, _up(x.shape[-1], columns))
    if extra := _up(x.shape[-2], rows) - x.shape[-2]:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, extra), (0, 0)])
    return x, math.prod(x.shape[: len(lead)])


def _gathered(lhs, slots, skip, per_slice, lhs_slice, top_k):
    parts, columns = 4, 256
    shape = slots.size, lhs.shape[1]
    (out,) = launch(
        gather,
        *(lhs, slots, skip),
        out=[(shape, lhs.dtype)],
        grid=slots.shape[0] * pl.cdiv(shape[1], parts * columns),
        scratch=[plgpu.SMEM((parts, 8, columns), lhs.dtype), plgpu.Barrier(num_arrivals=8 * parts)],
        PER_SLICE=per_slice,
        LHS_SLICE=lhs_slice,
        TOP_K=top_k,
    )
    return out


def _product(lhs, rhs, tables, top_k, dtype, transposed):
    lead = lead_axes((lhs, 2), (rhs, 3), *zip(tables, (1, 1, 0), strict=True))
    num_slices, num_rows = math.prod(lead), lhs.shape[-2]
    num_pairs, width = num_rows * top_k, rhs.shape[-2 if transposed else -1]
    num_experts = rhs.shape[-3]
    lhs, lhs_slices = _large(lhs, lead, rows=8)
    rhs, rhs_slices = _large(rhs, lead, rows=STEP)
    lhs_slice, out_slice = lhs.shape[-2], _up(num_pairs, 8)
    lhs = jnp.reshape(lhs, (-1, lhs.shape[-1]))
    rhs = jnp.reshape(rhs, (-1, *rhs.shape[-2:]))
    columns = rhs.shape[-2 if transposed else -1]
    slots, expert, live = _blocks(tables, lead, num_pairs, num_experts)
    per_slice = slots.shape[0] // num_slices
    first = _runs(slots) if top_k == 1 else jnp.full_like(live, -1)
    skip = (first >= 0) | (live == 0)
    gathered = _gathered(lhs, slots, skip.astype(jnp.int32), per_slice, lhs_slice if lhs_slices > 1 else 0, top_k)
    rows = slots.shape[1] + (8 if top_k == 1 else 0)
    by, window, takes = _tile(rows, 2 * math.prod(rhs.shape[1:]))
    order = _order(expert, window) if window > 1 else None
    stages, chunk = _stages(rows, dtype)
    tiles = expert.size * pl.cdiv(columns, COLUMNS)
    grid = pl.cdiv(tiles, takes) if takes else min(PROGRAMS, tiles)
    holes = _holes(slots, per_slice, num_slices, num_pairs, out_slice, min(grid, PROGRAMS) * 128)
    half, part = COLUMNS // 2, (COLUMNS, STEP) if transposed else (STEP, COLUMNS)
    (out,) = launch(
        product,
        *(lhs, gathered, rhs, expert, first, live, order, slots, jnp.reshape(tables[2], (-1,)), holes),
        out=[((num_slices * out_slice, columns), dtype)],
        grid=grid,
        warpgroups=3,
        scratch=[
            plgpu.SMEM((stages, rows, STEP), lhs.dtype, transforms=_tiled(lhs.dtype)),
            plgpu.SMEM((stages, *part), lhs.dtype, transforms=_tiled(lhs.dtype)),
            plgpu.SMEM((2, chunk, half), dtype, transforms=_tiled(dtype)),
            plgpu.SMEM((2, 8, half), dtype),
            plgpu.SMEM((1, half), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        SIZES=tuple(reversed(range(rows, min(16, rows - 1), -by))),
        TAKES=takes,
        SIZE=tables[0].shape[-1] // tables[1].shape[-1],
        PARTS=expert.size // (num_slices * tables[1].shape[-1]),
        TRANSPOSED=transposed,
        STEPS=lhs.shape[1] // STEP,
        STAGES=stages,
        ROWS=rows,
        CHUNK=chunk,
        PER_SLICE=per_slice,
        LHS_SLICE=lhs_slice if lhs_slices > 1 else 0,
        OUT_SLICE=out_slice,
        RHS_SLICE=num_experts if rhs_slices > 1 else 0,
        GRID=grid,
    )  # fmt: skip
    out = jnp.reshape(out, (*lead, out_slice, columns))
    return (out[..., :num_pairs, :width],)


SHARED = 227 * 1024  # bytes of shared memory of a block, on Hopper


def _tile(rows, matrix_bytes):
    most = next(most for most in TILES if rows <= most)
    return LARGE if most > 72 and matrix_bytes > SMALL else TILES[most]


def _stages(rows, dtype):
    """As many stages as fit beside the rows that wait to be stored, at most 6; and how many of these."""
    chunk = min(CHUNK if dtype.itemsize == 2 else CHUNK // 2, rows)
    rest = SHARED - 2 * (chunk + 8) * (COLUMNS // 2) * dtype.itemsize - 4096  # the row of zeros, barriers, Mosaic's own
    return min(6, rest // ((rows + COLUMNS) * STEP * 2)), chunk


def refuse(operands, params):
    lhs, tables = operands[0], operands[2:]
    if lhs.dtype == jnp.float32:
        return "wgmma multiplies float16 and bfloat16; got float32"
    lead = lead_axes((lhs, 2), *zip(tables, (1, 1, 0), strict=True))
    blocks = tables[1].shape[-1] or 1
    slots = _up(tables[0].shape[-1] // blocks, 8) * blocks
    rows = math.prod(lead) * max(lhs.shape[-2] * params.get("top_k", 1), slots)
    if isinstance(rows, int) and rows > 2**31 - 2 * PART:
        return f"TMA counts rows in 31 bits; the batch together has {rows} rows or slots"
    return None


def grouped_matmul(lhs, rhs, *tables, top_k, dtype):
    return _product(lhs, rhs, tables, top_k, jnp.dtype(dtype), False)


def grouped_matmul_transposed(g, rhs, *tables):
    return _product(g, rhs, tables, 1, g.dtype, True)


def grouped_outer(lhs, g, *tables, top_k, num_experts):
    lead = lead_axes((lhs, 2), (g, 2), *zip(tables, (1, 1, 0), strict=True))
    num_slices, height, (num_pairs, width) = math.prod(lead), lhs.shape[-1], g.shape[-2:]
    lhs, lhs_slices = _large(lhs, lead, rows=8)
    g, g_slices = _large(g, lead, rows=8)
    lhs_slice, g_slice = (x.shape[-2] if n > 1 else 0 for x, n in ((lhs, lhs_slices), (g, g_slices)))
    lhs, g = (jnp.reshape(x, (-1, x.shape[-1])) for x in (lhs, g))
    slots, expert, live = _blocks(tables, lead, num_pairs, num_experts)
    per_slice = slots.shape[0] // num_slices
    low, high, apart, skip = _ranges(slots, expert, live, per_slice, num_slices * num_experts, num_experts, top_k)
    shape = num_slices * num_experts, lhs.shape[-1], g.shape[-1]
    half, stages = COLUMNS // 2, 4
    (out,) = launch(
        outer,
        *(lhs, _gathered(lhs, slots, skip, per_slice, lhs_slice, top_k)),
        *(g, _gathered(g, slots, skip, per_slice, g_slice, 1)),
        *(low, high, apart),
        out=[(shape, lhs.dtype)],
        grid=(grid := min(PROGRAMS, shape[0] * pl.cdiv(shape[1], COLUMNS) * pl.cdiv(shape[2], half))),
        warpgroups=3,
        scratch=[
            plgpu.SMEM((stages, STEP, COLUMNS), lhs.dtype, transforms=_tiled(lhs.dtype)),
            plgpu.SMEM((stages, STEP, half), lhs.dtype, transforms=_tiled(lhs.dtype)),
            plgpu.SMEM((2, STEP, half), lhs.dtype, transforms=_tiled(lhs.dtype)),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
        ],
        EXPERTS=num_experts,
        STAGES=stages,
        LHS_SLICE=lhs_slice,
        G_SLICE=g_slice,
        GRID=grid,
    )
    return (jnp.reshape(out, (*lead, num_experts, *shape[1:]))[..., :height, :width],)
