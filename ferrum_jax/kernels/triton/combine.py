"""Combine: rows to the experts and back. Five kernels serve the whole family. All are bound by memory."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from ..shapes import large, lead_axes, whole
from . import tiles
from .launch import capability, launch


@triton.jit
def gather_sum(
    rows, index, pairs, weights, out,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, H: tl.constexpr, SHARED: tl.constexpr,
    KIND: tl.constexpr, REPEAT: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    # Computes out[n] = sum over k of weights[n,k] * rows[index[n,k]]. A program owns ROWS output rows by COLS columns,
    # loads UNROLL terms before it uses the first, adds in float32 and stores once. KIND says which row a term is:
    # "table": the row that the index names. "slots": row n * K + k. "repeated": row n // REPEAT. "owner": the token of
    # the pair that names row n, which `invert` wrote to the index; it counts if pairs[pair] == n.
    chunks: tl.constexpr = (H + COLS - 1) // COLS
    n = tl.program_id(0).to(tl.int64) // chunks * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % chunks * COLS + tl.arange(0, COLS))[None, :]
    base = rows if SHARED else rows + (n // N)[:, None] * R * H
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, K, UNROLL):
        for j in tl.static_range(UNROLL):
            at = n * K + start + j
            valid = (n < TOTAL) & (start + j < K)
            if KIND == "table":
                row = tl.load(index + at, mask=valid, other=-1).to(tl.int64)
                valid = (row >= 0) & (row < R)
            elif KIND == "slots":
                row = n % N * K + start + j
            elif KIND == "repeated":
                row = n % N // REPEAT
            else:
                pair = tl.load(index + at, mask=valid, other=-1).to(tl.int64)
                row = pair // REPEAT
                at = n // N * R * REPEAT + pair
                named = tl.load(pairs + at, mask=(pair >= 0) & (pair < R * REPEAT), other=-1)
                valid = named == n % N
            term = tl.load(base + row[:, None] * H + col, mask=valid[:, None] & (col < H), other=0.0).to(tl.float32)
            sums += term * tl.load(weights + at, mask=valid, other=0.0)[:, None] if WEIGHTED else term
    tl.store(out + n[:, None] * H + col, sums.to(out.dtype.element_ty), mask=(n < TOTAL)[:, None] & (col < H))


@triton.jit
def row_dot(
    rows, g, index, out,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
    SHARED_ROWS: tl.constexpr, SHARED_G: tl.constexpr, TABLE: tl.constexpr, CHOICES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Computes out[n,k] = <rows[index[n,k]], g[n]>. A program owns CHOICES choices of one token and walks along H, COLS
    # columns at a time, so that it reads each row once. Rows outside [0, R) are not read; their result is 0.
    groups: tl.constexpr = (K + CHOICES - 1) // CHOICES
    n = tl.program_id(0).to(tl.int64) // groups
    k = tl.program_id(0) % groups * CHOICES + tl.arange(0, CHOICES)
    row = (n % N) * K + k
    valid = k < K
    if TABLE:
        row = tl.load(index + n * K + k, mask=valid, other=-1).to(tl.int64)
        valid = valid & (row >= 0) & (row < R)
    rows = rows if SHARED_ROWS else rows + n // N * R * H
    g += (n % N if SHARED_G else n) * H
    sums = tl.zeros([CHOICES, COLS], tl.float32)
    for start in range(0, H, COLS):
        col = start + tl.arange(0, COLS)
        own = tl.load(g + col, mask=col < H, other=0.0).to(tl.float32)
        term = tl.load(rows + row[:, None] * H + col[None, :], mask=valid[:, None] & (col < H)[None, :], other=0.0)
        sums += tl.where(valid[:, None], term.to(tl.float32) * own[None, :], 0.0)
    tl.store(out + n * K + k, tl.sum(sums, 1), mask=k < K)


@triton.jit
def invert(index, owner, PAIRS: tl.constexpr, R: tl.constexpr, TOTAL: tl.constexpr, TILE: tl.constexpr):
    # Writes, for each row, the pair that names it. A program takes TILE pairs. Entries of rows that no pair names are
    # left uninitialised: a reader checks that index[entry] == row.
    pair = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = tl.load(index + pair, mask=pair < TOTAL, other=-1)
    tl.store(owner + pair // PAIRS * R + row, (pair % PAIRS).to(tl.int32), mask=(row >= 0) & (row < R))


@triton.jit
def cotangents(
    g, rows, index, weights, owner, g_rows, g_weights,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, H: tl.constexpr, TOTAL: tl.constexpr,
    SHARED_G: tl.constexpr, SHARED_ROWS: tl.constexpr, CHOICES: tl.constexpr, CLEARED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Computes g_rows[index[n,k]] = weights[n,k] * g[n] and g_weights[n,k] = <rows[index[n,k]], g[n]>. A program owns
    # CHOICES choices of one token and walks along H, COLS columns at a time; it reads g and each row once. It also owns
    # CLEARED rows of g_rows, and writes zeros to those that no pair names. `invert` wrote the pairs to look at. The
    # last programs may own choices only, or rows only.
    groups: tl.constexpr = (K + CHOICES - 1) // CHOICES
    blocks: tl.constexpr = (R + CLEARED - 1) // CLEARED
    program = tl.program_id(0).to(tl.int64)
    n = program // groups
    k = program % groups * CHOICES + tl.arange(0, CHOICES)
    at = n * K + k
    live = (at < TOTAL * K) & (k < K)
    row = tl.load(index + at, mask=live, other=-1).to(tl.int64)
    weight = tl.load(weights + at, mask=live, other=0.0)
    valid = (row >= 0) & (row < R)
    dest = n // N * R + row
    source = row if SHARED_ROWS else dest
    token = n % N if SHARED_G else n

    sums = tl.zeros([CHOICES, COLS], tl.float32)
    for start in range(0, H, COLS):
        col = start + tl.arange(0, COLS)
        inside = valid[:, None] & (col < H)[None, :]
        own = tl.load(g + token * H + col, mask=(n * H + col < TOTAL * H) & (col < H), other=0.0).to(tl.float32)
        term = tl.load(rows + source[:, None] * H + col[None, :], mask=inside, other=0.0)
        scaled = (weight[:, None] * own[None, :]).to(g_rows.dtype.element_ty)
        tl.store(g_rows + dest[:, None] * H + col[None, :], scaled, mask=inside)
        sums += term.to(tl.float32) * own[None, :]
    tl.store(g_weights + at, tl.where(valid, tl.sum(sums, 1), 0.0), mask=live)

    slice_id, r = program // blocks, program % blocks * CLEARED + tl.arange(0, CLEARED)
    cleared = slice_id * R + r
    bare = (cleared < TOTAL // N * R) & (r < R)
    pair = tl.load(owner + cleared, mask=bare, other=-1).to(tl.int64)
    known = bare & (pair >= 0) & (pair < N * K)
    bare = bare & (tl.load(index + slice_id * (N * K) + pair, mask=known, other=-1) != r)
    zeros = tl.zeros([CLEARED, COLS], g_rows.dtype.element_ty)
    for start in range(0, H, COLS):
        col = (start + tl.arange(0, COLS))[None, :]
        tl.store(g_rows + cleared[:, None] * H + col, zeros, mask=bare[:, None] & (col < H))


@triton.jit
def first_at_least(ascending, value, length, STEPS: tl.constexpr):
    # The place of the first of `length` ascending entries that is at least the value, by bisection.
    low, high = value * 0 + length * 0, value * 0 + length
    for _ in range(STEPS):
        middle = (low + high) // 2
        below = tl.load(ascending + middle, mask=low < high, other=0) < value
        low, high = tl.where((low < high) & below, middle + 1, low), tl.where(below, high, middle)
    return low


@triton.jit
def segment_sum(
    rows, order, dest, weights, out,
    N: tl.constexpr, P: tl.constexpr, K: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
    SHARED: tl.constexpr, WEIGHTED: tl.constexpr, STEPS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Computes out[r] = sum of the terms whose destination is r, in ascending order of the terms. A program owns COLS
    # columns of one output row. It finds its terms in the sorted destinations by bisection and reads each once.
    chunks: tl.constexpr = (H + COLS - 1) // COLS
    n = tl.program_id(0).to(tl.int64) // chunks
    slice_id, r = n // R, n % R
    col = tl.program_id(0) % chunks * COLS + tl.arange(0, COLS)
    rows = rows if SHARED else rows + slice_id * N * H
    dest, order, weights = dest + slice_id * P, order + slice_id * P, weights + slice_id * P
    sums = tl.zeros([COLS], tl.float32)
    i, stop = first_at_least(dest, r, P, STEPS), first_at_least(dest, r + 1, P, STEPS)
    while i < stop:
        term = tl.load(order + i).to(tl.int64)
        value = tl.load(rows + term // K * H + col, mask=col < H, other=0.0).to(tl.float32)
        sums += value * tl.load(weights + term) if WEIGHTED else value
        i += 1
    tl.store(out + n * H + col, sums.to(out.dtype.element_ty), mask=col < H)


# ---- wrappers: leading axes become one; rows that the whole batch shares are not copied


def _chosen():
    return tiles.first(tiles.ROWS, capability())


def _gather(rows, index, weights, lead, n, k, kind, repeat=1, pairs=None):
    """`gather_sum` of `n` output rows a slice, of `k` terms each. Tables that are None are not read."""
    *_, num_rows, width = rows.shape
    rows, shared = large(rows, lead)
    total = math.prod(lead) * n
    chosen = _chosen()
    tile_rows, cols = chosen.tile(width, rows.dtype.itemsize, total)
    return launch(
        gather_sum,
        rows,
        *(rows if table is None else table for table in (index, pairs, weights)),
        out=[((*lead, n, width), rows.dtype)],
        grid=triton.cdiv(total, tile_rows) * triton.cdiv(width, cols),
        num_warps=chosen.warps,
        N=n,
        K=k,
        R=num_rows,
        H=width,
        SHARED=shared,
        KIND=kind,
        REPEAT=repeat,
        WEIGHTED=weights is not None,
        ROWS=tile_rows,
        COLS=cols,
        UNROLL=k if k <= chosen.unrolled else chosen.portion,
        TOTAL=total,
    )


def _sorted_sum(rows, dest, weights, lead, num_rows, top_k):
    """Row r of the result is the sum of the terms with destination r. A stable sort of the destinations finds them."""
    dest = jnp.where((dest >= 0) & (dest < num_rows), dest, num_rows)
    order = jnp.argsort(dest, axis=-1, stable=True)
    dest, order = jnp.take_along_axis(dest, order, axis=-1), order.astype(jnp.int32)
    rows, shared = large(rows, lead)
    *_, n, width = rows.shape
    chosen = _chosen()
    _, cols = chosen.tile(width, rows.dtype.itemsize)
    return launch(
        segment_sum,
        rows,
        order,
        dest,
        rows if weights is None else weights,
        out=[((*lead, num_rows, width), rows.dtype)],
        grid=math.prod(lead) * num_rows * triton.cdiv(width, cols),
        num_warps=chosen.warps,
        N=n,
        P=dest.shape[-1],
        K=top_k,
        R=num_rows,
        H=width,
        SHARED=shared,
        WEIGHTED=weights is not None,
        STEPS=dest.shape[-1].bit_length() + 1,
        COLS=cols,
    )


def _dot(rows, g, index, lead, num_tokens, top_k):
    *_, num_rows, width = rows.shape
    rows, shared_rows = large(rows, lead)
    g, shared_g = large(g, lead)
    chosen = _chosen()
    choices = min(triton.next_power_of_2(top_k), chosen.dotted)
    return launch(
        row_dot,
        rows,
        g,
        rows if index is None else index,
        out=[((*lead, num_tokens, top_k), jnp.float32)],
        grid=math.prod(lead) * num_tokens * triton.cdiv(top_k, choices),
        num_warps=chosen.warps,
        N=num_tokens,
        K=top_k,
        R=num_rows,
        H=width,
        SHARED_ROWS=shared_rows,
        SHARED_G=shared_g,
        TABLE=index is not None,
        CHOICES=choices,
        COLS=chosen.tile(width, rows.dtype.itemsize)[1],
    )


def _owner(index, lead, num_rows):
    """The pair that names each row: see `invert`. With it each row is written once, not zeroed and then written."""
    total, chosen = math.prod(index.shape), _chosen()
    (owner,) = launch(
        invert,
        index,
        out=[((*lead, num_rows), jnp.int32)],
        grid=triton.cdiv(total, chosen.inverted),
        num_warps=chosen.warps,
        PAIRS=math.prod(index.shape[-2:]),
        R=num_rows,
        TOTAL=total,
        TILE=chosen.inverted,
    )
    return owner


def moe_dispatch(x, packed_token_idx, pairs_by_token=None):
    lead = lead_axes((x, 2), (packed_token_idx, 1), (pairs_by_token, 2))
    return _gather(x, whole(packed_token_idx, lead), None, lead, packed_token_idx.shape[-1], 1, "table")


def moe_collect(rows, packed_token_idx, pairs_by_token=None, *, num_tokens):
    if pairs_by_token is None:
        lead = lead_axes((rows, 2), (packed_token_idx, 1))
        return _sorted_sum(rows, whole(packed_token_idx, lead), None, lead, num_tokens, 1)
    lead = lead_axes((rows, 2), (packed_token_idx, 1), (pairs_by_token, 2))
    return _gather(rows, whole(pairs_by_token, lead), None, lead, num_tokens, pairs_by_token.shape[-1], "table")


def moe_combine(packed_down, pairs_by_token, pair_weights, *, unique_rows):
    lead = lead_axes((packed_down, 2), (pair_weights, 2), (pairs_by_token, 2))
    index, weights = whole(pairs_by_token, lead), whole(pair_weights, lead)
    return _gather(packed_down, index, weights, lead, *index.shape[-2:], "table")


def moe_spread(g, pairs_by_token, pair_weights, *, num_rows, unique_rows):
    lead = lead_axes((g, 2), (pair_weights, 2), (pairs_by_token, 2))
    index, weights = whole(pairs_by_token, lead), whole(pair_weights, lead)
    num_tokens, top_k = index.shape[-2:]
    if not unique_rows:
        flat = (*lead, num_tokens * top_k)
        return _sorted_sum(g, jnp.reshape(index, flat), jnp.reshape(weights, flat), lead, num_rows, top_k)
    return _gather(g, _owner(index, lead, num_rows), weights, lead, num_rows, 1, "owner", top_k, index)


def moe_row_dot(packed_down, g, pairs_by_token, *, unique_rows):
    lead = lead_axes((packed_down, 2), (g, 2), (pairs_by_token, 2))
    return _dot(packed_down, g, whole(pairs_by_token, lead), lead, *pairs_by_token.shape[-2:])


def moe_combine_cotangents(g, packed_down, pairs_by_token, pair_weights):
    lead = lead_axes((g, 2), (packed_down, 2), (pair_weights, 2), (pairs_by_token, 2))
    index, weights = whole(pairs_by_token, lead), whole(pair_weights, lead)
    *_, num_rows, width = packed_down.shape
    num_tokens, top_k = index.shape[-2:]
    rows, shared_rows = large(packed_down, lead)
    g, shared_g = large(g, lead)
    chosen, slices = _chosen(), math.prod(lead)
    choices, cleared = min(triton.next_power_of_2(top_k), chosen.differentiated), chosen.cleared
    return launch(
        cotangents,
        g,
        rows,
        index,
        weights,
        _owner(index, lead, num_rows),
        out=[((*lead, num_rows, width), rows.dtype), ((*lead, num_tokens, top_k), jnp.float32)],
        grid=slices * max(num_tokens * triton.cdiv(top_k, choices), triton.cdiv(num_rows, cleared)),
        num_warps=chosen.warps,
        N=num_tokens,
        K=top_k,
        R=num_rows,
        H=width,
        TOTAL=slices * num_tokens,
        SHARED_G=shared_g,
        SHARED_ROWS=shared_rows,
        CHOICES=choices,
        CLEARED=cleared,
        COLS=chosen.tile(width, rows.dtype.itemsize)[1],
    )


def weighted_sum_batched(slots, weights):
    lead = lead_axes((slots, 3), (weights, 2))
    *_, num_tokens, top_k, width = slots.shape
    rows = jnp.reshape(slots, (*slots.shape[: len(lead)], num_tokens * top_k, width))
    return _gather(rows, None, whole(weights, lead), lead, num_tokens, top_k, "slots")


def slot_scale(g, weights):
    lead = lead_axes((g, 2), (weights, 2))
    num_tokens, top_k = weights.shape[-2:]
    (out,) = _gather(g, None, whole(weights, lead), lead, num_tokens * top_k, 1, "repeated", top_k)
    return (jnp.reshape(out, (*lead, num_tokens, top_k, g.shape[-1])),)


def slot_dot(slots, g):
    lead = lead_axes((slots, 3), (g, 2))
    *_, num_tokens, top_k, width = slots.shape
    rows = jnp.reshape(slots, (*slots.shape[: len(lead)], num_tokens * top_k, width))
    return _dot(rows, g, None, lead, num_tokens, top_k)
