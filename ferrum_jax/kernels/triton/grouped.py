"""Grouped products on tensor cores: rows by their expert's matrix, and per expert the product of rows with rows."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from . import capability, launch, lead_axes
from .combine import large, whole

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers: there, widen first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def at_least(x, least):
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, most):
    return tl.minimum(x, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate * sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        return gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(x)) / 2 is sigmoid(2 x)
        return gate * sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    elif ACTIVATION == "relu":
        return at_least(gate, 0.0) * up
    elif ACTIVATION == "relu2":
        return at_least(gate, 0.0) * at_least(gate, 0.0) * up
    else:
        tl.static_assert(ACTIVATION == "swiglu_oai")
        gate = at_most(gate, 7.0)
        return (at_most(at_least(up, -7.0), 7.0) + 1) * gate * sigmoid(1.702 * gate)


@triton.jit
def name_rows(
    slots, blocks, total, owner,
    S: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, P: tl.constexpr, TOTAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # The slot that names each row, of those that count: another that holds the same row must not stand in its place. A
    # program reads 4 bytes of each of TILE slots and of their blocks, and writes 4 where the slot's row is. A row that
    # no slot names keeps whatever the memory held: who reads it asks that slot whether it names the row.
    slot = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = tl.load(slots + slot, mask=slot < TOTAL, other=-1)
    expert = tl.load(blocks + slot // BLOCK, mask=slot < TOTAL, other=-1)
    live_slots = tl.load(total + slot // S, mask=slot < TOTAL, other=0)
    counts = (expert >= 0) & (expert < E) & (slot % S // BLOCK * BLOCK < live_slots)
    tl.store(owner + slot // S * P + row, (slot % S).to(tl.int32), mask=counts & (row >= 0) & (row < P))


@triton.jit
def zero_unnamed(
    part, slots, blocks, live_slots, owner, out,
    S: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Zeros to those of ROWS rows of the result that no live slot names: for most, two reads of 4 bytes and no write.
    row = part * ROWS + tl.arange(0, ROWS)
    slot = tl.load(owner + row, mask=row < P, other=-1)
    known = (slot >= 0) & (slot < S)
    named = known & (tl.load(slots + slot, mask=known, other=-1) == row) & (slot // BLOCK * BLOCK < live_slots)
    expert = tl.load(blocks + slot // BLOCK, mask=named, other=-1)
    zero = (row < P) & ((expert < 0) | (expert >= E))
    if tl.max(zero.to(tl.int32), 0) > 0:
        for start in range(0, N, COLS):
            col = start + tl.arange(0, COLS)[None, :]
            at = out + row[:, None].to(tl.int64) * N + col
            tl.store(at, tl.zeros([ROWS, COLS], out.dtype.element_ty), mask=zero[:, None] & (col < N))


@triton.jit
def grouped(
    lhs, rhs, slots, blocks, total, owner, row_weights, out,
    M: tl.constexpr, H: tl.constexpr, N: tl.constexpr, E: tl.constexpr, S: tl.constexpr, P: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, SHARED_LHS: tl.constexpr, SHARED_RHS: tl.constexpr,
    ACTIVATION: tl.constexpr, WEIGHTED: tl.constexpr, TRANSPOSED: tl.constexpr, SWAPPED: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
    PROGRAMS: tl.constexpr, GROUP: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    # out[s] = lhs[s // TOP_K] @ rhs[e]: a program owns TM slots of a block by TN columns and walks along H, TK at a
    # time, gathering rows by slot value. GROUP row tiles go side by side through the column tiles, so that the experts
    # and the rows which concurrent programs read are few and stay in L2. SWAPPED: with few rows a tile the product is
    # made transposed, the matrix' columns in the tensor cores' long direction. The last programs zero unnamed rows.
    # With an ACTIVATION the matrix is 2 N wide, gate then up, and a program makes both products for its columns.
    slice_id = tl.program_id(0).to(tl.int64) // PROGRAMS
    program = tl.program_id(0) % PROGRAMS
    slots, blocks = slots + slice_id * S, blocks + slice_id * (S // BLOCK)
    out += slice_id * P * N
    live_slots = tl.load(total + slice_id)
    columns: tl.constexpr = (N + TN - 1) // TN
    if program >= TILES * columns:
        zero_unnamed(
            program - TILES * columns, slots, blocks, live_slots, owner + slice_id * P, out, S, BLOCK, E, P, N, 128, 64
        )
        return
    first = program // (GROUP * columns) * GROUP
    across = min(TILES - first, GROUP)
    tile = first + program % (GROUP * columns) % across
    block = tile // PARTS
    if block * BLOCK >= live_slots:
        return
    expert = tl.load(blocks + block).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    in_block = tile % PARTS * TM + tl.arange(0, TM)
    slot = tl.load(slots + block * BLOCK + in_block, mask=in_block < BLOCK, other=-1)
    named = (slot >= 0) & (slot < P)
    row = tl.where(named, slot // TOP_K, 0).to(tl.int64) + (0 if SHARED_LHS else slice_id * M)
    col = program % (GROUP * columns) // across * TN + tl.arange(0, TN)
    k = tl.arange(0, TK)
    rows = lhs + row[:, None] * H + k[None, :]
    width: tl.constexpr = 2 * N if ACTIVATION != "" else N
    matrix = rhs + (expert if SHARED_RHS else expert + slice_id * E) * H * width
    if TRANSPOSED:
        matrix += col[None, :].to(tl.int64) * H + k[:, None]
    else:
        matrix += col[None, :] + k[:, None].to(tl.int64) * width
    step: tl.constexpr = 1 if TRANSPOSED else width
    sums = tl.zeros([TN, TM], tl.float32) if SWAPPED else tl.zeros([TM, TN], tl.float32)
    up = sums
    for start in range(0, H, TK):
        inside = k < H - start
        a = tl.load(rows + start, mask=named[:, None] & inside[None, :], other=0.0)
        b = tl.load(matrix + tl.cast(start, tl.int64) * step, mask=inside[:, None] & (col < N)[None, :], other=0.0)
        sums = dot(b.T, a.T, sums, PRECISION) if SWAPPED else dot(a, b, sums, PRECISION)
        if ACTIVATION != "":
            at = matrix + N + tl.cast(start, tl.int64) * step
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
    # out[e] = sum over e's slots s of lhs[s // TOP_K] x g[s]: a program owns TM by TN elements of one expert's matrix,
    # finds the expert's first and last block, and walks along the slots from one to the other, TK at a time. Without
    # blocks it writes zeros. To find them it looks at every block, SEEN at a time: blocks of no expert may stand
    # anywhere, so that there is no order to halve. Nor would halving be faster: its loads wait for each other.
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
    # The interpreter takes no range of tensors under NumPy 2.5: there, walk as far as any expert's slots can reach.
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


# ---- tiles by shape class

# Most rows of a row tile -> TM is that or less, TN, TK, warps, stages. Decode: the matrices' bytes are the time, so
# deep pipelines of them and few rows; middle: both count; prefill: the largest tile that the registers hold, because
# each byte from L2 then serves the most products. Below 64 rows the product is made transposed. Which table: by who
# multiplies. TF32's tiles take as many bytes as those of 16 bits. Where a warp multiplies by itself, operands take
# registers, and there may be 99 KiB of shared memory. Only the tiles of warpgroups were timed, in 16 bits.
TILES = {
    "warpgroups": {16: (128, 64, 4, 4), 32: (128, 64, 4, 4), 64: (128, 64, 4, 4), 128: (256, 64, 8, 3)},
    "tf32": {16: (128, 32, 4, 4), 32: (128, 32, 4, 4), 64: (128, 32, 4, 4), 128: (256, 32, 8, 3)},
    "warps": {16: (64, 64, 4, 4), 32: (64, 64, 4, 4), 64: (128, 64, 4, 4), 128: (128, 64, 8, 3)},
    "threads": {16: (64, 32, 4, 3), 32: (64, 32, 4, 3)},  # no tensor cores: registers are the limit
}
# TM, TN, TK, warps, stages
OUTER = {"warpgroups": (128, 128, 64, 8, 3), "warps": (128, 128, 64, 8, 3), "tf32": (128, 128, 32, 8, 3)}
OUTER_OF_THREADS = {4: (64, 64, 32, 4, 3), 2: (64, 64, 16, 4, 3)}  # by the bytes of an element: 2 are widened first
WARPGROUPS = (90, 100, 103)  # the compute capabilities whose tensor cores read both operands from shared memory
GROUP = 8
HAVE_TF32 = 80, 90, 100, 103  # compute capabilities with TF32, and the shared memory for its tiles


def _multipliers(dtype, precision):
    """Who multiplies, as a key of TILES.

    Threads multiply float32 in full, and 16 bits where Triton has no tensor cores. Else tensor cores do, fed by warps,
    by warpgroups, or with float32 rounded to TF32.
    """
    if dtype == jnp.float32:
        return "tf32" if precision == "default" and capability() in HAVE_TF32 else "threads"
    if capability() < 80:
        return "threads"
    return "warpgroups" if capability() in WARPGROUPS else "warps"


def _product(lhs, rhs, tables, top_k, dtype, precision, transposed=False, row_weights=None, activation=None):
    weights = () if row_weights is None else ((row_weights, 1),)
    lead = lead_axes((lhs, 2), (rhs, 3), *zip(tables, (1, 1, 0), strict=True), *weights)
    slots, blocks, total = (whole(table, lead) for table in tables)
    (lhs, shared_lhs), (rhs, shared_rhs) = large(lhs, lead), large(rhs, lead)
    num_rows, width = lhs.shape[-2:]
    num_experts, columns = rhs.shape[-3], rhs.shape[-2 if transposed else -1] // (2 if activation else 1)
    num_pairs, batch = num_rows * top_k, math.prod(lead)
    who = _multipliers(lhs.dtype, precision)
    table = TILES[who]
    block = slots.shape[-1] // blocks.shape[-1]
    tm = min(max(16, triton.next_power_of_2(block)), max(table))
    tn, tk, warps, stages = table[tm]
    tn = tn // 2 if activation else tn
    (owner,) = launch(
        name_rows,
        *(slots, blocks, total),
        out=[((*lead, num_pairs), jnp.int32)],
        grid=triton.cdiv(math.prod(slots.shape), 1024),
        num_warps=4,
        S=slots.shape[-1],
        BLOCK=block,
        E=num_experts,
        P=num_pairs,
        TOTAL=math.prod(slots.shape),
        TILE=1024,
    )
    parts = triton.cdiv(block, tm)
    tiles = blocks.shape[-1] * parts
    programs = tiles * triton.cdiv(columns, tn) + triton.cdiv(num_pairs, 128)
    return launch(
        grouped,
        *(lhs, rhs, slots, blocks, total, owner),
        lhs if row_weights is None else whole(row_weights, lead),
        out=[((*lead, num_pairs, columns), dtype)],
        grid=batch * programs,
        num_warps=warps,
        num_stages=stages,
        M=num_rows,
        H=width,
        N=columns,
        E=num_experts,
        S=slots.shape[-1],
        P=num_pairs,
        TOP_K=top_k,
        BLOCK=block,
        ACTIVATION=activation or "",
        WEIGHTED=row_weights is not None,
        SHARED_LHS=shared_lhs,
        SHARED_RHS=shared_rhs,
        TRANSPOSED=transposed,
        SWAPPED=tm < 64 and who != "threads",
        PRECISION="tf32" if who == "tf32" else "ieee",
        PARTS=parts,
        TILES=tiles,
        PROGRAMS=programs,
        GROUP=GROUP,
        TM=tm,
        TN=tn,
        TK=tk,
    )


def grouped_matmul(lhs, rhs, *tables, top_k, dtype, packed_rows, precision):
    return _product(lhs, rhs, tables, top_k, jnp.dtype(dtype), precision)


def grouped_matmul_activated(
    lhs, rhs, slots, blocks, total, row_weights=None, *, top_k, dtype, activation, packed_rows, precision
):
    made, tables = jnp.dtype(dtype), (slots, blocks, total)
    return _product(lhs, rhs, tables, top_k, made, precision, row_weights=row_weights, activation=activation)


def grouped_matmul_transposed(g, rhs, *tables, dtype, packed_rows, precision):
    return _product(g, rhs, tables, 1, jnp.dtype(dtype), precision, transposed=True)


def _counting(slots, blocks, total, num_experts):
    """The slots, -1 in blocks that do not count: of these there may be some between an expert's others.

    Done once here, it is not done in the loop of every program.
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
    who = _multipliers(lhs.dtype, precision)
    tm, tn, tk, warps, stages = OUTER_OF_THREADS[lhs.dtype.itemsize] if who == "threads" else OUTER[who]
    return launch(
        outer,
        *(lhs, g, slots, blocks, total),
        out=[((*lead, num_experts, height, width), lhs.dtype)],
        grid=math.prod(lead) * num_experts * triton.cdiv(height, tm) * triton.cdiv(width, tn),
        num_warps=warps,
        num_stages=stages,
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
        SEEN=min(triton.next_power_of_2(blocks.shape[-1]), 4096),
        PRECISION="tf32" if who == "tf32" else "ieee",
        TM=tm,
        TN=tn,
        TK=tk,
    )
