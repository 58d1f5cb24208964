"""Grouped products with wgmma: a warpgroup feeds shared memory by TMA, two others multiply and store."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import launch, lead_axes, loop, pad, put, split

PROGRAMS = 132  # persistent blocks: the multiprocessors of a Hopper SXM card, one block each
STEP = 64  # elements of a 128-byte line of shared memory, the longest that wgmma reads: all lengths are multiples
SWIZZLE = 128
COLUMNS = 256  # of a tile, half for each of the two multiplying warpgroups
UNIT = 16  # the rows by which tiles' heights differ: there is a product for each height
WINDOW = 32  # most tiles of an expert that go side by side through the columns, so that they share what they read of it
PART = 160  # most slots whose rows a thread block gathers

# An expert's rows on average, at most -> the most rows of a tile; and whether the hardware deals the tiles out, one a
# thread block, or each of PROGRAMS blocks takes its share of them, so that its loads never stop. Few rows: the bytes
# of matrices are the time, and each is read once. Many: the products are, of which the larger tile takes fewer bytes
# each, and shares are never quite even. The product's kernel on one NVIDIA H200, bfloat16, 2026-11-26, in
# microseconds: E=128 H=2048 N=1536, before tiles changed places from column to column, T=16 shares 115, dealt 119;
# T=128 183, 187; T=1024 most 80, 96 or 112 204 to 208, dealt 213; T=8192 dealt 144 635, 160 693, shares of 160 654.
# E=64 H=7168 N=4096, as it is, T=4096 dealt 128 2784, 144 2711, 160 2816; shares of 128 2998, 144 2859, 160 2742. On
# one H100 that day, E=8 K=2 H=4096 N=28672, T=2048 dealt 144 1525, shares of 128 1445, 144 1455, 160 1500; T=4096
# 2833, 2905, 2821, 2630; T=8192 5474, 5651, 5504, 5106. H=14336 N=4096, T=4096 1360, 1504, 1418, 1301. E=32 K=4
# H=4096 N=4096, T=8192 1597, 1664, 1561, 1544. E=128, T=16384 1301, 1302, 1266, 1266. `python -m
# ferrum_jax.bench.tune` times them all.
TILES = {16: (32, False), 80: (96, False), 640: (144, True), math.inf: (160, False)}
TIMED = 640  # up to which mean the choices were timed with an activation, and in the transposed form
COMPARED = 2**25  # up to here each eight rows are compared with each slot: one launch in place of three
CHUNK = 32  # slots of a tile that are stored at a time
HOLE, END = -1, -2  # owners of blocks that do not count


# ---- activations


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def _swiglu_oai(gate, up):
    gate, up = jnp.minimum(gate, 7.0), jnp.minimum(jnp.maximum(up, -7.0), 7.0)
    return (up + 1) * gate * sigmoid(1.702 * gate)


ACTIVATIONS = {
    "silu": lambda gate, up: gate * sigmoid(gate) * up,
    # (1 + tanh(x)) / 2 is sigmoid(2 x)
    "gelu_tanh": lambda gate, up: gate * sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up,
    "relu": lambda gate, up: jnp.maximum(gate, 0.0) * up,
    "relu2": lambda gate, up: jnp.maximum(gate, 0.0) * jnp.maximum(gate, 0.0) * up,
    "swiglu_oai": _swiglu_oai,
}


# ---- rows by their expert's matrix


def product(
    lhs, gathered, rhs, tiles, count, low, high, apart, names, owners, holes, weights, out,
    rows, matrix, stage, edge, zero, full, empty,
    *, TRANSPOSED, STEPS, STAGES, ROWS, CHUNK, GRID, EXPERTS, PAIRS, BLOCK, ACTIVATION,
    LHS_SLICE, OUT_SLICE, RHS_SLICE,
):  # fmt: skip
    # out[r] = lhs[r] @ rhs[e]: a block owns in turn tiles of COLUMNS columns by up to ROWS rows of an expert, and makes
    # them transposed, columns in the tensor cores' long direction and rows, any multiple of 8, in the short one. TMA
    # reads rows from a multiple of 8 on: the few before an expert's first and past its last are multiplied, not stored.
    # Experts whose rows do not lie together are read from `gathered`, and stored row by row under their names. With an
    # ACTIVATION the matrix is gate and up: half of a warpgroup's columns are the gate's, half the same of up, so that
    # each thread has both of what it makes one of. Weights are by row, and after all those by place in `gathered`.
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    width, own_out = out.shape[1], stage.shape[2]
    across = pl.cdiv(width, 2 * own_out)

    def own_tiles():  # in each branch anew: from before them it would be spilled
        return lax.div(jnp.maximum(count[0] * across - program, 0) + GRID - 1, jnp.int32(GRID))

    def tile(i):
        """The matrix, and of this block's i-th tile the first column, the first row and the height."""
        at = program + i * GRID
        begin, size = split(tiles[3, lax.div(at, jnp.int32(across))], WINDOW + 1)
        column, number = split(at - begin * across, size)
        # Not the same for each column: else, where GRID is a multiple of `size`, a block's tiles might all be tall.
        number = begin + lax.rem(number + column, size)
        column = pl.multiple_of(column * 2 * own_out, 2 * own_out)
        return tiles[0, number], column, tiles[1, number], tiles[2, number]

    def feed(i, step):
        owner, column, first, _ = tile(i)

        def load(k, step):
            slot = lax.rem(step, jnp.int32(STAGES))
            along = pl.ds(pl.multiple_of(k * STEP, STEP), STEP)

            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            def copy(source, start):
                at = pl.ds(pl.multiple_of(start + first, 8), ROWS)
                plgpu.copy_gmem_to_smem(source.at[at, along], rows.at[slot], full.at[slot])

            pl.when(apart[owner] == 0)(lambda: copy(lhs, lax.div(owner, jnp.int32(EXPERTS)) * LHS_SLICE))
            pl.when(apart[owner] != 0)(lambda: copy(gathered, 0))
            mine = owner if RHS_SLICE else lax.rem(owner, jnp.int32(EXPERTS))
            if ACTIVATION:
                for part, start in enumerate((0, width, own_out, width + own_out)):  # two for each warpgroup
                    these = pl.ds(pl.multiple_of(column + start, own_out), own_out)
                    plgpu.copy_gmem_to_smem(rhs.at[mine, along, these], matrix.at[slot, part], full.at[slot])
            else:
                these = (pl.ds(column, COLUMNS), along) if TRANSPOSED else (along, pl.ds(column, COLUMNS))
                plgpu.copy_gmem_to_smem(rhs.at[mine, *these], matrix.at[slot], full.at[slot])
            return step + 1

        return loop(STEPS, load, step)

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
        plgpu.set_max_registers(56, action="decrease")
        loop(own_tiles(), feed, jnp.int32(0))
        own = holes.shape[0] // min(GRID, PROGRAMS)

        @pl.when(program < PROGRAMS)
        def _():
            put(zero, jnp.zeros(zero.shape, zero.dtype))
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
        plgpu.set_max_registers(224, action="increase")
        mine = pl.ds(pl.multiple_of(warpgroup * (COLUMNS // 2), COLUMNS // 2), COLUMNS // 2)

        def multiply(i, step):
            owner, column, first, height = tile(i)
            for size in range(UNIT, ROWS + 1, UNIT):

                @pl.when(height == size)
                def _(size=size):
                    sums = [plgpu.ACC((own_out, size), jnp.float32)] * (2 if ACTIVATION else 1)
                    sums = pl.run_scoped(functools.partial(accumulate, step), *sums)
                    write(owner, pl.multiple_of(column + warpgroup * own_out, own_out), first, sums)

            return step + STEPS

        finished = ACTIVATION or weights is not None  # when stored, from float32

        def accumulate(step, *sums):
            def add(step):
                slot = lax.rem(step, jnp.int32(STAGES))
                plgpu.barrier_wait(full.at[slot])
                for i, part in enumerate(sums):
                    if ACTIVATION:
                        a = matrix.at[slot, warpgroup * 2 + i].T
                    else:
                        a = matrix.at[slot, mine] if TRANSPOSED else matrix.at[slot, :, mine].T
                    plgpu.wgmma(part, a, rows.at[slot, pl.ds(0, part.shape[1])].T)

            add(step)

            @each(STEPS - 1)
            def _(k):
                add(step + k + 1)
                plgpu.wgmma_wait(len(sums))
                plgpu.barrier_arrive(empty.at[lax.rem(step + k, jnp.int32(STAGES))])

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(empty.at[lax.rem(step + STEPS - 1, jnp.int32(STAGES))])
            return [part[...] if finished else part[...].astype(out.dtype) for part in sums]

        def write(owner, column, first, sums):
            begin, end, gathers = low[owner], high[owner], apart[owner] != 0
            to = lax.div(owner, jnp.int32(EXPERTS)) * OUT_SLICE
            columns, narrow = pl.ds(column, own_out), out.dtype.itemsize == 2
            size = sums[0].shape[1]
            for start in range(0, size, CHUNK):
                here = min(CHUNK, size - start)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                part = stage.at[warpgroup, pl.ds(0, here)]
                values = [x[:, start : start + here] for x in sums]
                value = ACTIVATION(*values) if ACTIVATION else values[0]
                if weights is not None:
                    by_place = weights.shape[0] - ROWS - names.shape[0]
                    at = pl.multiple_of(first + start + jnp.where(gathers, by_place, to), 8)
                    these = weights.at[pl.ds(at, here)]
                    these = plgpu.load(these, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                    value *= lax.broadcast_in_dim(these, value.shape, (1,))
                value = plgpu.layout_cast(value.astype(out.dtype), plgpu.Layout.WGMMA)
                # 16 bits go through the matrix-store instruction, which transposes; of 32 bits the threads swap pairs.
                part.T[...] = value if narrow else plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()

                @each(here // 8)
                def _(g, start=start):
                    at = pl.multiple_of(g * 8, 8)
                    row = first + start + at  # of the eight rows' first
                    whole = jnp.logical_not(gathers) & (row >= begin) & (row + 8 <= end)

                    @pl.when(whole)
                    def _():
                        rows = pl.ds(pl.multiple_of(to + row, 8), 8)
                        plgpu.copy_smem_to_gmem(stage.at[warpgroup, pl.ds(at, 8)], out.at[rows, columns])

                    @pl.when(~whole & (row + 8 > begin) & (row < end))
                    def _():
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        eight_rows = plgpu.load(
                            stage.at[warpgroup, pl.ds(at, 8)], layout=_eight(own_out, out.dtype), optimized=False
                        )
                        put(edge.at[warpgroup], eight_rows)
                        plgpu.commit_smem()

                        @each(8)
                        def _(j):
                            inside = (row + j >= begin) & (row + j < end)
                            block = jnp.where(inside & gathers, lax.div(row + j, jnp.int32(BLOCK)), 0)
                            inside &= ~gathers | (owners[block] == owner)
                            name = jnp.where(gathers, names[jnp.where(inside & gathers, row + j, 0)], row + j)

                            @pl.when(inside & (name >= 0) & (name < PAIRS))
                            def _():
                                put_row(edge.at[warpgroup, pl.ds(j, 1)], out, to + name, column)

        loop(own_tiles(), multiply, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def each(times):
    """The decorated function of i, for each i in [0, times)."""
    return lambda body: loop(times, lambda i, _: body(i) or (), ())


def _tiled(dtype):
    """Shared memory as wgmma and TMA want it: lines of 128 bytes, eight of them swizzled against each other."""
    return plgpu.TilingTransform((8, SWIZZLE // dtype.itemsize)), plgpu.SwizzleTransform(SWIZZLE)


def _eight(width, dtype):
    """8 rows of a warpgroup's columns in its registers, up to 16 bytes of a row a thread."""
    vector = min(16 // dtype.itemsize, width // 16)
    tiling = plgpu.Tiling(((8, width), (128 * vector // width, width // 4), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


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


def gather(lhs, slots, owners, apart, out, buffer, full, *, EXPERTS, PAIRS, LHS_SLICE, TOP_K):
    # out[i] = lhs[slot i // TOP_K], zeros where slot i names no row: a block owns a table block by a buffer's columns
    # and copies eight rows at a time. TMA gives zeros for a row beyond the last. Only blocks of experts whose rows are
    # apart are written, and zeros to those of no expert, which may stand between them.
    parts, _, columns = buffer.shape
    block, chunk = split(lax.axis_index("program"), pl.cdiv(out.shape[1], parts * columns))

    owner = owners[block]

    @pl.when((owner == HOLE) | ((owner >= 0) & (apart[jnp.maximum(owner, 0)] != 0)))
    def _():
        start = lax.div(owner, jnp.int32(EXPERTS)) * LHS_SLICE
        pairs = jnp.where(owner >= 0, PAIRS, 0)

        @each(slots.shape[1] // 8)
        def _(eight):
            starts = [(chunk * parts + part) * columns for part in range(parts)]
            across = [pl.ds(at, columns) for at in starts]

            @each(8)
            def _(j):
                name = slots[block, eight * 8 + j]
                row = jnp.where((name >= 0) & (name < pairs), start + lax.div(name, jnp.int32(TOP_K)), lhs.shape[0])
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


def _blocks(tables, lead, num_experts):
    """Slots as [blocks of them, slots], and per block its matrix, slice * num_experts + expert; HOLE if it is of no
    expert, and negative too, END, if it is past the total.
    """
    slots, blocks, total = (jnp.broadcast_to(t, (*lead, *t.shape[len(lead) :])) for t in tables)
    slots, blocks, total = (jnp.reshape(t, (math.prod(lead), -1)) for t in (slots, blocks, total))
    size = slots.shape[1] // blocks.shape[1]
    starts = lax.broadcasted_iota(jnp.int32, blocks.shape, 1) * size
    matrix = lax.broadcasted_iota(jnp.int32, blocks.shape, 0) * num_experts + blocks
    owner = jnp.where((blocks >= 0) & (blocks < num_experts), matrix, HOLE)
    owner = jnp.where(starts < total, owner, END)
    parts = next(n for n in range(pl.cdiv(size, PART), size + 1) if size % (8 * n) == 0 or n * 8 >= size)
    part = _up(pl.cdiv(size, parts), 8)
    slots = jnp.reshape(slots, (-1, size))
    if parts * part > size:
        slots = jnp.pad(slots, ((0, 0), (0, parts * part - size)), constant_values=-1)
    owner = jnp.broadcast_to(jnp.reshape(owner, (-1, 1)), (owner.size, parts))
    return jnp.reshape(slots, (-1, part)), jnp.reshape(owner, (-1,))


def _up(n, to):
    return -(-n // to) * to


def _at_once(operands, starts, combine, axis):
    """Reductions of arrays of one shape, each its own, in one pass."""
    starts = tuple(map(np.int32, starts))
    return lax.reduce(
        operands, starts, lambda x, y: tuple(f(a, b) for f, a, b in zip(combine, x, y, strict=True)), (axis,)
    )


def _runs(slots, owner, num_pairs):
    """Per block how many of its slots count, and the place after the last of them; and its first row where they name a
    run of rows, first to last; else -1.
    """
    steps = lax.broadcasted_iota(jnp.int32, slots.shape, 1)
    named = (slots >= 0) & (slots < num_pairs) & (owner >= 0)[:, None]
    breaks = named & (slots != slots[:, :1] + steps)
    values = named.astype(jnp.int32), jnp.where(named, steps + 1, 0), breaks.astype(jnp.int32)
    live, last, breaks = _at_once(values, (0, 0, 0), (lax.add, lax.max, lax.max), 1)
    return live, last, jnp.where((live > 0) & (live == last) & (breaks == 0), slots[:, 0], -1)


def _ranges(slots, owner, num_slices, num_experts, num_pairs, top_k):
    """Per matrix the rows to read, [low, high), and whether its rows are apart: then they are those of the gathered
    copy, which has a row for each slot.
    """
    live, last, first = _runs(slots, owner, num_pairs)
    block, size = lax.iota(jnp.int32, owner.size), slots.shape[1]
    goes_on = jnp.pad(first[:-1] + live[:-1] == first[1:], (1, 0))
    before = jnp.pad(owner[:-1], (1, 0), constant_values=END)
    goes_on |= (owner != before) & (before != HOLE)  # before which there may be more of the owner's
    breaks = ((first < 0) | ~goes_on).astype(jnp.int32) if top_k == 1 else jnp.ones_like(owner)
    wide = num_slices, num_experts, owner.size // num_slices
    spread = lambda x: jnp.broadcast_to(jnp.reshape(x, (num_slices, 1, -1)), wide)  # noqa: E731
    matrix = lax.broadcasted_iota(jnp.int32, wide, 0) * num_experts + lax.broadcasted_iota(jnp.int32, wide, 1)
    mine = (spread(owner) == matrix) & spread(live > 0)
    none = 2**31 - 1
    reduced = (block * size, none), (block * size + last, 0), (breaks, 0), (first, none), (first + live, 0)
    begin, end, apart, low, high = _at_once(
        tuple(jnp.where(mine, spread(x), jnp.int32(start)) for x, start in reduced),
        [start for _, start in reduced],
        (lax.min, lax.max, lax.max, lax.min, lax.max),
        2,
    )
    low, high = jnp.where(apart != 0, begin, low), jnp.where(apart != 0, end, high)
    return *(jnp.reshape(jnp.where(end > 0, x, 0), -1) for x in (low, high)), jnp.reshape(apart, -1)


def _tiles(low, high, most, num_tiles):
    """The matrices' rows in as few tiles of at most `most` rows as can be, of even heights: per tile its matrix, its
    first row, its height, and of the tiles that go side by side through the columns, at most WINDOW of one matrix, the
    first's number * (WINDOW + 1) + how many they are; and how many tiles there are.
    """
    low = low // 8 * 8
    units = jnp.maximum(high - low + UNIT - 1, 0) // UNIT
    counts = (units + most // UNIT - 1) // (most // UNIT)
    if counts.size <= COMPARED**0.5:  # one launch
        until = lax.broadcasted_iota(jnp.int32, (counts.size, counts.size), 0)
        before = lax.broadcasted_iota(jnp.int32, until.shape, 1) <= until
        ends = jnp.sum(jnp.where(before, counts[None, :], 0), axis=1, dtype=jnp.int32)
    else:
        ends = jnp.cumsum(counts, dtype=jnp.int32)
    number = lax.iota(jnp.int32, num_tiles)
    by_halves = "scan" if ends.size * num_tiles > COMPARED else "compare_all"
    owner = jnp.searchsorted(ends, number, side="right", method=by_halves).astype(jnp.int32)
    owner = jnp.minimum(owner, ends.size - 1)
    count, begin = jnp.maximum(counts[owner], 1), ends[owner] - counts[owner]
    j, (usual, longer) = number - begin, (units[owner] // count, units[owner] % count)
    side = j // WINDOW * WINDOW
    together = jnp.minimum(jnp.minimum(ends[owner], num_tiles) - begin - side, WINDOW)
    first = low[owner] + UNIT * (j * usual + jnp.minimum(j, longer))
    height = UNIT * jnp.where(j < longer, usual + 1, usual)
    order = (begin + side) * (WINDOW + 1) + together
    # Of tables that break the rules there may be more tiles than there is room for.
    return jnp.stack([owner, first, height, order]), jnp.minimum(ends[-1:], num_tiles)


def _holes(slots, owner, num_slices, num_pairs, padded, length):
    """For each eight rows of the result, a bit for each row that no slot names; zeros up to a multiple of `length`."""
    eights = num_slices * padded // 8
    slices = lax.broadcasted_iota(jnp.int32, slots.shape, 0) // (owner.size // num_slices)
    named = (slots >= 0) & (slots < num_pairs) & (owner >= 0)[:, None]
    at = jnp.reshape(jnp.where(named, slices * padded + slots, eights * 8), (-1,))
    if eights * at.size <= COMPARED:
        wide = lambda x: jnp.broadcast_to(x[None, :], (eights, at.size))  # noqa: E731
        own = wide(at >> 3) == lax.broadcasted_iota(jnp.int32, (eights, at.size), 0)
        bits = lax.reduce(jnp.where(own, wide(1 << (at & 7)), 0), jnp.int32(0), lax.bitwise_or, (1,))
    else:
        named = jnp.zeros(eights * 8, jnp.int32).at[at].set(1, mode="drop", unique_indices=True)
        named = jnp.reshape(named, (eights, 8))
        bits = jnp.sum(named << lax.broadcasted_iota(jnp.int32, named.shape, 1), axis=1, dtype=jnp.int32)
    there = jnp.clip(num_pairs - 8 * (lax.iota(jnp.int32, eights) % (padded // 8)), 0, 8)
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


def _gathered(lhs, slots, owner, apart, num_experts, num_pairs, lhs_slice, top_k):
    parts, columns = 4, 256
    shape = slots.size, lhs.shape[1]
    (out,) = launch(
        gather,
        *(lhs, slots, owner, apart),
        out=[(shape, lhs.dtype)],
        grid=slots.shape[0] * pl.cdiv(shape[1], parts * columns),
        scratch=[plgpu.SMEM((parts, 8, columns), lhs.dtype), plgpu.Barrier(num_arrivals=8 * parts)],
        EXPERTS=num_experts,
        PAIRS=num_pairs,
        LHS_SLICE=lhs_slice,
        TOP_K=top_k,
    )
    return out


def _product(lhs, rhs, tables, top_k, dtype, transposed=False, row_weights=None, activation=None):
    weighted = () if row_weights is None else ((row_weights, 1),)
    lead = lead_axes((lhs, 2), (rhs, 3), *zip(tables, (1, 1, 0), strict=True), *weighted)
    num_slices, num_rows = math.prod(lead), lhs.shape[-2]
    num_pairs, width = num_rows * top_k, rhs.shape[-2 if transposed else -1] // (2 if activation else 1)
    num_experts = rhs.shape[-3]
    lhs, lhs_slices = _large(lhs, lead, rows=8)
    rhs, rhs_slices = _large(rhs, lead, rows=STEP)
    lhs_slice, out_slice = lhs.shape[-2], _up(num_pairs, 8)
    lhs = jnp.reshape(lhs, (-1, lhs.shape[-1]))
    rhs = jnp.reshape(rhs, (-1, *rhs.shape[-2:]))
    columns = width if activation else rhs.shape[-2 if transposed else -1]
    slots, owner = _blocks(tables, lead, num_experts)
    low, high, apart = _ranges(slots, owner, num_slices, num_experts, num_pairs, top_k)
    lhs_slice = lhs_slice if lhs_slices > 1 else 0
    gathered = _gathered(lhs, slots, owner, apart, num_experts, num_pairs, lhs_slice, top_k)
    rows = min(num_pairs, TIMED * num_experts) if activation or transposed else num_pairs
    most, dealt = next(choice for mean, choice in TILES.items() if rows <= mean * num_experts)
    num_matrices = num_slices * min(num_experts, num_pairs)
    tiles, count = _tiles(low, high, most, _most_tiles(max(num_slices * num_pairs, slots.size), num_matrices, most))
    stages, chunk = _stages(most, dtype)
    half = COLUMNS // (4 if activation else 2)  # of the result's columns, for each of the two warpgroups
    grid = tiles.shape[1] * pl.cdiv(columns, 2 * half) if dealt else PROGRAMS
    holes = _holes(slots, owner, num_slices, num_pairs, out_slice, min(grid, PROGRAMS) * 128)
    part = (4, STEP, half) if activation else (COLUMNS, STEP) if transposed else (STEP, COLUMNS)
    if row_weights is not None:
        row_weights = _weights(row_weights, lead, slots, num_slices, num_pairs, out_slice, most)
    (out,) = launch(
        product,
        *(lhs, gathered, rhs, tiles, count, low, high, apart, jnp.reshape(slots, -1), owner, holes, row_weights),
        out=[((num_slices * out_slice, columns), dtype)],
        grid=grid,
        warpgroups=3,
        scratch=[
            plgpu.SMEM((stages, most, STEP), lhs.dtype, transforms=_tiled(lhs.dtype)),
            plgpu.SMEM((stages, *part), lhs.dtype, transforms=_tiled(lhs.dtype)),
            plgpu.SMEM((2, chunk, half), dtype, transforms=_tiled(dtype)),
            plgpu.SMEM((2, 8, half), dtype),
            plgpu.SMEM((1, COLUMNS // 2), dtype),
            plgpu.Barrier(num_arrivals=5 if activation else 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ],
        TRANSPOSED=transposed,
        STEPS=lhs.shape[1] // STEP,
        STAGES=stages,
        ROWS=most,
        CHUNK=chunk,
        GRID=grid,
        EXPERTS=num_experts,
        PAIRS=num_pairs,
        BLOCK=slots.shape[1],
        ACTIVATION=ACTIVATIONS[activation] if activation else None,
        LHS_SLICE=lhs_slice,
        OUT_SLICE=out_slice,
        RHS_SLICE=rhs_slices > 1,
    )
    out = jnp.reshape(out, (*lead, out_slice, columns))
    return (out[..., :num_pairs, :width],)


def _weights(weights, lead, slots, num_slices, num_pairs, padded, most):
    """By row, then by slot, and what the last tile reads beyond."""
    weights = jnp.reshape(jnp.broadcast_to(weights, (*lead, num_pairs)), (num_slices, num_pairs))
    weights = jnp.reshape(jnp.pad(weights, ((0, 0), (0, padded - num_pairs))), -1)
    slots = jnp.reshape(slots, (num_slices, -1))
    at = lax.broadcasted_iota(jnp.int32, slots.shape, 0) * padded + jnp.clip(slots, 0, num_pairs - 1)
    return jnp.concatenate([weights, weights[jnp.reshape(at, -1)], jnp.zeros(most, weights.dtype)])


SHARED = 227 * 1024  # bytes of shared memory of a block, on Hopper


def _most_tiles(num_rows, num_matrices, most):
    """A matrix' rows start up to 7 rows early, and may leave a unit and, but for one, a tile unfilled."""
    return (num_rows + num_matrices * (7 + UNIT - 1 + most - UNIT)) // most + 1


def _stages(rows, dtype):
    """As many stages as fit beside the rows that wait to be stored, at most 6; and how many of these."""
    chunk = min(CHUNK if dtype.itemsize == 2 else CHUNK // 2, rows)
    rest = SHARED - 2 * (chunk + 8) * (COLUMNS // 2) * dtype.itemsize - 4096  # the row of zeros, barriers, Mosaic's own
    return min(6, rest // ((rows + COLUMNS) * STEP * 2)), chunk


def refuse(operands, params):
    lhs, rhs, tables = operands[0], operands[1], operands[2:5]
    if lhs.dtype == jnp.float32:
        return "wgmma multiplies float16 and bfloat16; got float32"
    activation = params.get("activation")
    if activation and activation not in ACTIVATIONS:
        return f"Mosaic has no function that {activation!r} needs"
    if activation and rhs.shape[-1] % (2 * STEP):
        return f"gate and up must each have a multiple of {STEP} columns; they have {rhs.shape[-1] // 2}"
    weights = ((x, 1) for x in operands[5:])
    by_matrix = rhs, 2 if "num_experts" in params else 3
    lead = lead_axes((lhs, 2), by_matrix, *zip(tables, (1, 1, 0), strict=True), *weights)
    blocks = tables[1].shape[-1] or 1
    slots = _up(tables[0].shape[-1] // blocks, 8) * blocks
    rows = math.prod(lead) * max(lhs.shape[-2] * params.get("top_k", 1), slots)
    if rows > 2**31 - 2 * PART:
        return f"TMA counts rows in 31 bits; the batch together has {rows} rows or slots"
    return None


# The precision is that of float32 operands, which are refused.


def grouped_matmul(lhs, rhs, *tables, top_k, dtype, packed_rows, precision):
    return _product(lhs, rhs, tables, top_k, jnp.dtype(dtype))


def grouped_matmul_activated(
    lhs, rhs, slots, blocks, total, row_weights=None, *, top_k, dtype, activation, packed_rows, precision
):
    tables = slots, blocks, total
    return _product(lhs, rhs, tables, top_k, jnp.dtype(dtype), row_weights=row_weights, activation=activation)


def grouped_matmul_transposed(g, rhs, *tables, dtype, packed_rows, precision):
    return _product(g, rhs, tables, 1, jnp.dtype(dtype), transposed=True)


def grouped_outer(lhs, g, *tables, top_k, num_experts, packed_rows, precision):
    lead = lead_axes((lhs, 2), (g, 2), *zip(tables, (1, 1, 0), strict=True))
    num_slices, height, (num_pairs, width) = math.prod(lead), lhs.shape[-1], g.shape[-2:]
    lhs, lhs_slices = _large(lhs, lead, rows=8)
    g, g_slices = _large(g, lead, rows=8)
    lhs_slice, g_slice = (x.shape[-2] if n > 1 else 0 for x, n in ((lhs, lhs_slices), (g, g_slices)))
    lhs, g = (jnp.reshape(x, (-1, x.shape[-1])) for x in (lhs, g))
    slots, owner = _blocks(tables, lead, num_experts)
    low, high, apart = _ranges(slots, owner, num_slices, num_experts, num_pairs, top_k)
    gathered = functools.partial(_gathered, slots=slots, owner=owner, apart=apart, num_experts=num_experts)
    shape = num_slices * num_experts, lhs.shape[-1], g.shape[-1]
    half, stages = COLUMNS // 2, 4
    (out,) = launch(
        outer,
        *(lhs, gathered(lhs, num_pairs=num_pairs, lhs_slice=lhs_slice, top_k=top_k)),
        *(g, gathered(g, num_pairs=num_pairs, lhs_slice=g_slice, top_k=1)),
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
