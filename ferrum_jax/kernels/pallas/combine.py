"""Combine: rows to the experts and back. A block moves chunks of rows, see chunks.py.

The kernels' sizes: N tokens of a slice, K choices of a token, R rows of a slice, P terms of a slice, TOTAL tokens of
all slices. An index outside [0, R) names no row. A *bare* row is one that no pair names.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .chunks import (
    chunk_shape,
    chunked,
    fetch,
    folded,
    for_lists,
    load,
    store,
    unchunked,
    unrolled_loop,
    where,
    zeros,
)
from .launch import for_each, launch, lead_axes, loop, split
from .tiles import COTANGENTS, DOTS


def gather_sum(rows, index, weights, out, *, N, K, R):
    # out[n] = sum over k of weights[n,k] * rows[index[n,k]]; without an index, of the rows n*K + k. A block owns one
    # chunk of one output row: it loads the K rows' chunks before it uses the first, adds in float32 and stores once.
    # A pair without a row reads row 0, which is in the cache, and adds 0.
    n, chunk = split(lax.axis_index("program"), out.shape[1])
    slice_id, token = split(n, N)

    def add(k, sums):
        row, valid = (index[n, k], None) if index is not None else (token * K + k, None)
        if index is not None:
            valid = (row >= 0) & (row < R)
            row = jnp.where(valid, row, 0)
        term = load(rows, slice_id, row, chunk)
        if weights is not None:
            term *= weights[n, k]
        return sums + (term if valid is None else where(valid, term))

    store(out, n, chunk, unrolled_loop(K, add, zeros(out)))


def row_dot(rows, g, index, out, *, N, K, R, CHOICES):
    # out[n,k] = <rows[index[n,k]], g[n]>; without an index, with the rows n*K + k. A block owns CHOICES choices of one
    # token and goes through the chunks: it loads g's once, and that of CHOICES rows. Each thread adds up its own
    # columns; only at the end does the block add up its threads' sums.
    n, group = split(lax.axis_index("program"), K // CHOICES)
    slice_id, token = split(n, N)
    choices = [group * CHOICES + j for j in range(CHOICES)]
    named = [index[n, k] if index is not None else token * K + k for k in choices]
    valid = [(row >= 0) & (row < R) for row in named]
    named = [jnp.where(ok, row, 0) for row, ok in zip(named, valid, strict=True)]

    def add(chunk, sums):
        own = load(g, slice_id, token, chunk)
        terms = [load(rows, slice_id, row, chunk) * own for row in named]
        return tuple(s + where(ok, term) for s, ok, term in zip(sums, valid, terms, strict=True))

    sums = loop(rows.shape[2], add, (zeros(rows),) * CHOICES)
    for k, total in zip(choices, sums, strict=True):
        out[n, k] = jnp.sum(total)


def invert(index, owner, *, N, K, R):
    # owner[index[n,k]] = the pair n*K + k. A block takes a token's pairs: it reads 4 bytes of each and writes 4 at its
    # row. A bare row's owner is garbage: a reader must ask the pair that stands there whether it names the row.
    n = lax.axis_index("program")
    slice_id, token = split(n, N)

    def write_owners(choices):
        rows = [index[n, k] for k in choices]
        for k, row in zip(choices, rows, strict=True):

            @pl.when((row >= 0) & (row < R))
            def write_owner(k=k, row=row):
                owner[slice_id, row] = token * K + k

    for_lists(K, write_owners)


def scatter(g, index, weights, owner, out, *, N, K, R, TOTAL, CLEARING):
    # out[index[n,k]] = weights[n,k] * g[n]; without an index, to the rows n*K + k. A block owns one chunk of one token:
    # it reads the chunk once and stores it K times. It also owns 8 rows, and writes zeros to the bare ones. The grid is
    # the larger of both counts: the last blocks have only one of the two.
    program, chunks = lax.axis_index("program"), out.shape[2]

    @pl.when(program < TOTAL * chunks)
    def scatter_chunk():
        n, chunk = split(program, chunks)
        slice_id, token = split(n, N)
        own = load(g, slice_id, token, chunk)

        def store_scaled(row, weight):
            pl.when((row >= 0) & (row < R))(lambda: store(out, (slice_id, row), chunk, own * weight))

        def store_choice(k, state):
            store_scaled(token * K + k, weights[n, k])
            return state

        def store_choices(choices):
            named = [(index[n, k], weights[n, k]) for k in choices]
            for row, weight in named:
                store_scaled(row, weight)

        if index is None:
            unrolled_loop(K, store_choice, ())
        else:
            for_lists(K, store_choices)

    if index is not None:
        pl.when(program < CLEARING)(lambda: clear(out, bare_rows(program, index, owner, N=N, K=K, R=R)))


def cotangents(g, rows, index, weights, owner, g_rows, g_weights, *, N, K, R, TOTAL, CHOICES, CLEARING):
    # g_rows[index[n,k]] = weights[n,k] * g[n] and g_weights[n,k] = <rows[index[n,k]], g[n]>. A block owns CHOICES
    # choices of one token and goes through the chunks: it loads g's and those of CHOICES rows, stores as many, and adds
    # up its dots last. It also owns 8 rows of g_rows, and clears the bare ones, as in `scatter`. A pair without a row
    # reads row 0, which is in the cache; its dot is dropped.
    program = lax.axis_index("program")

    @pl.when(program < TOTAL * (K // CHOICES))
    def scatter_and_dot():
        n, group = split(program, K // CHOICES)
        slice_id, token = split(n, N)
        choices = [group * CHOICES + j for j in range(CHOICES)]
        named, own_weights = [index[n, k] for k in choices], [weights[n, k] for k in choices]
        valid = [(row >= 0) & (row < R) for row in named]
        named = [jnp.where(ok, row, 0) for row, ok in zip(named, valid, strict=True)]

        def one_chunk(chunk, sums):
            own, terms = load(g, slice_id, token, chunk), [fetch(rows, slice_id, row, chunk) for row in named]
            for row, ok, weight in zip(named, valid, own_weights, strict=True):

                @pl.when(ok)
                def store_scaled(row=row, weight=weight):
                    store(g_rows, (slice_id, row), chunk, own * weight)

            return tuple(s + term.astype(jnp.float32) * own for s, term in zip(sums, terms, strict=True))

        sums = loop(rows.shape[2], one_chunk, (zeros(rows),) * CHOICES)
        for k, ok, total in zip(choices, valid, sums, strict=True):
            g_weights[n, k] = jnp.where(ok, jnp.sum(total), 0.0)

    pl.when(program < CLEARING)(lambda: clear(g_rows, bare_rows(program, index, owner, N=N, K=K, R=R)))


def bare_rows(program, index, owner, *, N, K, R):
    """A block's eight rows, and whether each is bare. All loads start before the first result is used."""
    slice_id, first = split(program, pl.cdiv(R, 8))
    eight = [first * 8 + j for j in range(8)]
    pairs = [owner[slice_id, jnp.minimum(row, R - 1)] for row in eight]
    known = [(pair >= 0) & (pair < N * K) for pair in pairs]
    at = [split(jnp.where(ok, pair, 0), K) for ok, pair in zip(known, pairs, strict=True)]
    named = [index[slice_id * N + token, k] for token, k in at]
    return [
        ((slice_id, row), (row < R) & jnp.logical_not(ok & (name == row)))
        for row, ok, name in zip(eight, known, named, strict=True)
    ]


def clear(out, rows):
    """Write zeros to the bare ones of these rows."""
    for row, bare in rows:

        @pl.when(bare)
        def clear_row(row=row):
            for_each(out.shape[2], lambda chunk: store(out, row, chunk, zeros(out)))


def segment_sum(rows, order, dest, weights, out, *, P, K, R):
    # out[r] = sum of the terms whose destination is r, in ascending order of the terms. A block owns one chunk of one
    # output row, finds its terms in the sorted destinations by bisection, and loads 4 terms' chunks at a time.
    n, chunk = split(lax.axis_index("program"), out.shape[1])
    slice_id, r = split(n, R)

    def first_at_least(value):
        def bisect(_, bounds):
            low, high = bounds
            middle = lax.div(low + high, jnp.int32(2))
            below = dest[slice_id, jnp.minimum(middle, P - 1)] < value
            inside = low < high
            return jnp.where(inside & below, middle + 1, low), jnp.where(below, high, middle)

        return loop(P.bit_length() + 1, bisect, (jnp.int32(0), jnp.int32(P)))[0]

    start, stop = first_at_least(r), first_at_least(r + 1)

    def add_four(four, sums):
        for j in range(4):
            i = start + four * 4 + j
            term = order[slice_id, jnp.minimum(i, P - 1)]
            value = load(rows, slice_id, lax.div(term, jnp.int32(K)), chunk)
            if weights is not None:
                value *= weights[slice_id, term]
            sums += where(i < stop, value)
        return sums

    store(out, n, chunk, loop(lax.div(stop - start + 3, jnp.int32(4)), add_four, zeros(out)))


# ---- wrappers: what several of the ops share


def _gather(rows, index, weights, lead, n, k):
    total, (chunks, columns) = math.prod(lead) * n, chunk_shape(rows)
    (out,) = launch(
        gather_sum,
        chunked(rows, lead),
        None if index is None else folded(index, lead, total, k),
        None if weights is None else folded(weights, lead, total, k),
        out=[((total, chunks, columns), rows.dtype)],
        grid=total * chunks,
        N=n,
        K=k,
        R=rows.shape[-2],
    )
    return (unchunked(out, (*lead, n, rows.shape[-1])),)


def _dot(rows, g, index, lead, n, k):
    total, choices = math.prod(lead) * n, _choices(k, DOTS)
    (out,) = launch(
        row_dot,
        chunked(rows, lead),
        chunked(g, lead),
        None if index is None else folded(index, lead, total, k),
        out=[((total, k), jnp.float32)],
        grid=total * (k // choices),
        N=n,
        K=k,
        R=rows.shape[-2],
        CHOICES=choices,
    )
    return (jnp.reshape(out, (*lead, n, k)),)


def _choices(k, most):
    """How many of a token's k choices a block owns: the same for each of its blocks."""
    return max(c for c in range(1, most + 1) if k % c == 0)


def _owner(index, n, k, num_rows):
    """The pair that names each row, and how many eights of rows there are.

    It tells the kernels which rows are bare, so that they write each row just once.
    """
    sizes = {"N": n, "K": k, "R": num_rows}
    (owner,) = launch(invert, index, out=[((len(index) // n, num_rows), jnp.int32)], grid=len(index), **sizes)
    return owner, len(index) // n * pl.cdiv(num_rows, 8)


def _scatter(g, index, weights, lead, n, k, num_rows):
    slices, (chunks, columns) = math.prod(lead), chunk_shape(g)
    total, owner, clearing = slices * n, None, 0
    if index is not None:
        index = folded(index, lead, total, k)
        owner, clearing = _owner(index, n, k, num_rows)
    (out,) = launch(
        scatter,
        chunked(g, lead),
        index,
        folded(weights, lead, total, k),
        owner,
        out=[((slices, num_rows, chunks, columns), g.dtype)],
        grid=max(total * chunks, clearing),
        N=n,
        K=k,
        R=num_rows,
        TOTAL=total,
        CLEARING=clearing,
    )
    return (unchunked(out, (*lead, num_rows, g.shape[-1])),)


def _sorted_sum(rows, dest, weights, lead, num_rows, k):
    """Each row r of the result is the sum of the terms with dest r, found by a stable sort of the destinations."""
    slices, (chunks, columns) = math.prod(lead), chunk_shape(rows)
    dest = folded(dest, lead, slices, -1)
    dest = jnp.where((dest >= 0) & (dest < num_rows), dest, num_rows)
    order = jnp.argsort(dest, axis=-1, stable=True)
    (out,) = launch(
        segment_sum,
        chunked(rows, lead),
        order.astype(jnp.int32),
        jnp.take_along_axis(dest, order, axis=-1),
        None if weights is None else folded(weights, lead, slices, -1),
        out=[((slices * num_rows, chunks, columns), rows.dtype)],
        grid=slices * num_rows * chunks,
        P=dest.shape[-1],
        K=k,
        R=num_rows,
    )
    return (unchunked(out, (*lead, num_rows, rows.shape[-1])),)


# ---- wrappers: the ops


def moe_dispatch(x, packed_token_idx, pairs_by_token=None):
    lead = lead_axes((x, 2), (packed_token_idx, 1), (pairs_by_token, 2))
    return _gather(x, packed_token_idx, None, lead, packed_token_idx.shape[-1], 1)


def moe_collect(rows, packed_token_idx, pairs_by_token=None, *, num_tokens):
    if pairs_by_token is None:
        return _sorted_sum(rows, packed_token_idx, None, lead_axes((rows, 2), (packed_token_idx, 1)), num_tokens, 1)
    lead = lead_axes((rows, 2), (packed_token_idx, 1), (pairs_by_token, 2))
    return _gather(rows, pairs_by_token, None, lead, num_tokens, pairs_by_token.shape[-1])


def moe_combine(packed_down, pairs_by_token, pair_weights, *, unique_rows):
    lead = lead_axes((packed_down, 2), (pair_weights, 2), (pairs_by_token, 2))
    return _gather(packed_down, pairs_by_token, pair_weights, lead, *pairs_by_token.shape[-2:])


def moe_spread(g, pairs_by_token, pair_weights, *, num_rows, unique_rows):
    lead = lead_axes((g, 2), (pair_weights, 2), (pairs_by_token, 2))
    num_tokens, top_k = pairs_by_token.shape[-2:]
    if unique_rows:
        return _scatter(g, pairs_by_token, pair_weights, lead, num_tokens, top_k, num_rows)
    return _sorted_sum(g, pairs_by_token, pair_weights, lead, num_rows, top_k)


def moe_row_dot(packed_down, g, pairs_by_token, *, unique_rows):
    lead = lead_axes((packed_down, 2), (g, 2), (pairs_by_token, 2))
    return _dot(packed_down, g, pairs_by_token, lead, *pairs_by_token.shape[-2:])


def moe_combine_cotangents(g, packed_down, pairs_by_token, pair_weights):
    lead = lead_axes((g, 2), (packed_down, 2), (pair_weights, 2), (pairs_by_token, 2))
    n, k = pairs_by_token.shape[-2:]
    num_rows, width = packed_down.shape[-2:]
    # A token's blocks share g in the cache.
    slices, choices, (chunks, columns) = math.prod(lead), _choices(k, COTANGENTS), chunk_shape(g)
    total = slices * n
    index = folded(pairs_by_token, lead, total, k)
    owner, clearing = _owner(index, n, k, num_rows)
    g_rows, g_weights = launch(
        cotangents,
        chunked(g, lead),
        chunked(packed_down, lead),
        index,
        folded(pair_weights, lead, total, k),
        owner,
        out=[((slices, num_rows, chunks, columns), g.dtype), ((total, k), jnp.float32)],
        grid=max(total * (k // choices), clearing),
        N=n,
        K=k,
        R=num_rows,
        TOTAL=total,
        CHOICES=choices,
        CLEARING=clearing,
    )
    return unchunked(g_rows, (*lead, num_rows, width)), jnp.reshape(g_weights, (*lead, n, k))


def weighted_sum_batched(slots, weights):
    lead = lead_axes((slots, 3), (weights, 2))
    return _gather(_in_order(slots), None, weights, lead, *slots.shape[-3:-1])


def slot_scale(g, weights):
    lead = lead_axes((g, 2), (weights, 2))
    num_tokens, top_k = weights.shape[-2:]
    (out,) = _scatter(g, None, weights, lead, num_tokens, top_k, num_tokens * top_k)
    return (jnp.reshape(out, (*lead, num_tokens, top_k, g.shape[-1])),)


def slot_dot(slots, g):
    return _dot(_in_order(slots), g, None, lead_axes((slots, 3), (g, 2)), *slots.shape[-3:-1])


def _in_order(slots):
    """[..., T, K, H] as the rows [..., T*K, H]."""
    *lead, num_tokens, top_k, width = slots.shape
    return jnp.reshape(slots, (*lead, num_tokens * top_k, width))
