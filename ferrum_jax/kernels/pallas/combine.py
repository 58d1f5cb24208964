"""Combine: rows to the experts and back. A block moves one chunk of columns, 16 bytes a thread of each row."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import THREADS, launch, lead_axes, loop, pad, split, vector

UNROLLED = 16  # up to here all of a token's rows are in flight at once, above 8 of them


def gather_sum(rows, index, weights, out, *, N, K, R):
    # out[n] = sum over k of weights[n,k] * rows[index[n,k]]; without an index, of the rows n*K + k. A block owns one
    # chunk of one output row: it asks for the K rows' chunks before it uses the first, adds in float32, stores once.
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

    store(out, n, chunk, repeat(K, add, zeros(out)))


def row_dot(rows, index, g, out, *, N, K, R, CHOICES):
    # out[n,k] = <rows[index[n,k]], g[n]>; without an index, with the rows n*K + k. A block owns CHOICES choices of one
    # token and walks along the chunks: g's once, and CHOICES rows' at a time. A thread adds up its own columns, and
    # only at the end do the block's threads add up theirs.
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
    # The pair that names each row: a block takes a token's pairs, reads 4 bytes of each and writes 4 where its row is.
    # A row that no pair names keeps whatever the memory held: who reads it asks that pair whether it names the row.
    n = lax.axis_index("program")
    slice_id, token = split(n, N)

    @some(K)
    def _(choices):
        rows = [index[n, k] for k in choices]
        for k, row in zip(choices, rows, strict=True):

            @pl.when((row >= 0) & (row < R))
            def _(k=k, row=row):
                owner[slice_id, row] = token * K + k


def scatter(g, index, weights, owner, out, *, N, K, R, TOTAL, CLEARING):
    # out[index[n,k]] = weights[n,k] * g[n]; without an index, to the rows n*K + k. A block owns one chunk of one token:
    # it reads it once and stores it K times. And it owns 8 rows, and writes zeros to those of them that no pair names.
    # Of either there may be fewer.
    program, chunks = lax.axis_index("program"), out.shape[2]

    @pl.when(program < TOTAL * chunks)
    def _():
        n, chunk = split(program, chunks)
        slice_id, token = split(n, N)
        own = load(g, slice_id, token, chunk)

        def put(row, factor):
            pl.when((row >= 0) & (row < R))(lambda: store(out, (slice_id, row), chunk, own * factor))

        if index is None:
            repeat(K, lambda k, _: put(token * K + k, weights[n, k]) or (), ())
            return

        @some(K)
        def _(choices):
            named = [(index[n, k], weights[n, k]) for k in choices]
            for row, factor in named:
                put(row, factor)

    if index is not None:
        pl.when(program < CLEARING)(lambda: clear(out, bare_rows(program, index, owner, N=N, K=K, R=R)))


def cotangents(g, rows, index, weights, owner, g_rows, g_weights, *, N, K, R, TOTAL, CHOICES, CLEARING):
    # g_rows[index[n,k]] = weights[n,k] * g[n] and g_weights[n,k] = <rows[index[n,k]], g[n]>. A block owns CHOICES
    # choices of one token and walks along the chunks: it asks for g's and for CHOICES rows', stores as many once g's is
    # there, and adds up its dots last. And it owns 8 rows of g_rows, to clear as in `scatter`. Of either there may be
    # fewer. A pair without a row reads row 0, which is in the cache; of its dot nothing is kept.
    program = lax.axis_index("program")

    @pl.when(program < TOTAL * (K // CHOICES))
    def _():
        n, group = split(program, K // CHOICES)
        slice_id, token = split(n, N)
        choices = [group * CHOICES + j for j in range(CHOICES)]
        named, factors = [index[n, k] for k in choices], [weights[n, k] for k in choices]
        valid = [(row >= 0) & (row < R) for row in named]
        named = [jnp.where(ok, row, 0) for row, ok in zip(named, valid, strict=True)]

        def walk(chunk, sums):
            own, terms = load(g, slice_id, token, chunk), [fetch(rows, slice_id, row, chunk) for row in named]
            for row, ok, factor in zip(named, valid, factors, strict=True):

                @pl.when(ok)
                def _(row=row, factor=factor):
                    store(g_rows, (slice_id, row), chunk, own * factor)

            return tuple(s + term.astype(jnp.float32) * own for s, term in zip(sums, terms, strict=True))

        sums = loop(rows.shape[2], walk, (zeros(rows),) * CHOICES)
        for k, ok, total in zip(choices, valid, sums, strict=True):
            g_weights[n, k] = jnp.where(ok, jnp.sum(total), 0.0)

    pl.when(program < CLEARING)(lambda: clear(g_rows, bare_rows(program, index, owner, N=N, K=K, R=R)))


def bare_rows(program, index, owner, *, N, K, R):
    """A program's eight rows, and which of them no pair names. All are asked for before the first is used."""
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
    for row, bare in rows:

        @pl.when(bare)
        def _(row=row):
            loop(out.shape[2], lambda chunk, _: store(out, row, chunk, zeros(out)) or (), ())


def segment_sum(rows, weights, order, dest, out, *, P, K, R):
    # out[r] = sum of the terms whose destination is r, in ascending order of the terms. A block owns one chunk of one
    # output row, finds its terms in the sorted destinations by halving, and asks for 4 terms' chunks at a time.
    n, chunk = split(lax.axis_index("program"), out.shape[1])
    slice_id, r = split(n, R)

    def first_at_least(value):
        def halve(_, bounds):
            low, high = bounds
            middle = lax.div(low + high, jnp.int32(2))
            below = dest[slice_id, jnp.minimum(middle, P - 1)] < value
            inside = low < high
            return jnp.where(inside & below, middle + 1, low), jnp.where(below, high, middle)

        return loop(P.bit_length() + 1, halve, (jnp.int32(0), jnp.int32(P)))[0]

    start, stop = first_at_least(r), first_at_least(r + 1)

    def add(four, sums):
        for j in range(4):
            i = start + four * 4 + j
            term = order[slice_id, jnp.minimum(i, P - 1)]
            value = load(rows, slice_id, lax.div(term, jnp.int32(K)), chunk)
            if weights is not None:
                value *= weights[slice_id, term]
            sums += where(i < stop, value)
        return sums

    store(out, n, chunk, loop(lax.div(stop - start + 3, jnp.int32(4)), add, zeros(out)))


# ---- what the kernels have in common: rows are [slice, row, chunk, column], and a warpgroup holds one chunk


def layout(ref):
    return plgpu.Layout.WG_STRIDED((ref.shape[-1],), ref.shape[-1] // THREADS)


def zeros(like):
    return plgpu.layout_cast(jnp.zeros(like.shape[-1:], jnp.float32), layout(like))


def load(rows, slice_id, row, chunk):
    """A chunk of a row in float32."""
    return fetch(rows, slice_id, row, chunk).astype(jnp.float32)


def fetch(rows, slice_id, row, chunk):
    """A chunk of a row; slices that share their rows have one copy of them."""
    at = (slice_id if rows.shape[0] > 1 else 0, row, chunk)
    return plgpu.load(rows.at[at], layout=layout(rows))


def store(out, row, chunk, value):
    at = (*row, chunk) if isinstance(row, tuple) else (row, chunk)
    out[at] = plgpu.layout_cast(value.astype(out.dtype), layout(out))


def where(valid, x):
    return jnp.where(jnp.broadcast_to(valid, x.shape), x, jnp.zeros_like(x))


def repeat(times, step, state):
    """step(k, state) for each k, unrolled where they are few, else by eights."""
    if times <= UNROLLED:
        eights = 0
    else:
        eights = times // 8

        def eight(i, state):
            for j in range(8):
                state = step(i * 8 + j, state)
            return state

        state = loop(eights, eight, state)
    for k in range(eights * 8, times):
        state = step(jnp.int32(k), state)
    return state


def some(times):
    """The decorated function of lists of k, all together each k in [0, times): all at once where they are few, else by
    eights. What it loads for a list before it stores anything is in flight at once: no load overtakes a store.
    """

    def run(body):
        eights = 0 if times <= UNROLLED else times // 8
        loop(eights, lambda i, _: body([i * 8 + j for j in range(8)]) or (), ())
        if eights * 8 < times:
            body([jnp.int32(k) for k in range(eights * 8, times)])

    return run


# ---- wrappers: leading axes become one; rows that the whole batch shares are not copied


def _small(x, lead, *shape):
    """Ids or weights over all the leading axes, folded into `shape`; they are small, so a copy is cheap."""
    return jnp.reshape(jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :])), shape)


def _rows(x, lead):
    """Rows as [slices, rows, chunks, columns]: one slice if the batch shares them, else the batch's."""
    own = x.shape[: len(lead)]
    if math.prod(own) != 1 and own != lead:
        x = jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :]))
    chunks, columns = _chunks(x)
    return jnp.reshape(pad(x, chunks * columns), (-1, x.shape[-2], chunks, columns))


def _chunks(x):
    """How many chunks a row of x is, and the columns of each: a vector a thread."""
    columns = THREADS * vector(x.shape[-1], x.dtype.itemsize)
    return pl.cdiv(x.shape[-1], columns), columns


def _unchunked(out, shape):
    """The inverse of `_rows`, without the padding."""
    return jnp.reshape(jnp.reshape(out, (-1, math.prod(out.shape[-2:])))[:, : shape[-1]], shape)


def _gather(rows, index, weights, lead, n, k):
    total, (chunks, columns) = math.prod(lead) * n, _chunks(rows)
    (out,) = launch(
        gather_sum,
        _rows(rows, lead),
        None if index is None else _small(index, lead, total, k),
        None if weights is None else _small(weights, lead, total, k),
        out=[((total, chunks, columns), rows.dtype)],
        grid=total * chunks,
        N=n,
        K=k,
        R=rows.shape[-2],
    )
    return (_unchunked(out, (*lead, n, rows.shape[-1])),)


def _dot(rows, index, g, lead, n, k):
    total, choices = math.prod(lead) * n, _choices(k, 8)
    (out,) = launch(
        row_dot,
        _rows(rows, lead),
        None if index is None else _small(index, lead, total, k),
        _rows(g, lead),
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
    """Inverting the table (4 bytes a row) tells which rows no pair names: so every row is written just once."""
    sizes = {"N": n, "K": k, "R": num_rows}
    (owner,) = launch(invert, index, out=[((len(index) // n, num_rows), jnp.int32)], grid=len(index), **sizes)
    return owner, len(index) // n * pl.cdiv(num_rows, 8)


def _scatter(g, index, weights, lead, n, k, num_rows):
    slices, (chunks, columns) = math.prod(lead), _chunks(g)
    total, owner, clearing = slices * n, None, 0
    if index is not None:
        index = _small(index, lead, total, k)
        owner, clearing = _owner(index, n, k, num_rows)
    (out,) = launch(
        scatter,
        _rows(g, lead),
        index,
        _small(weights, lead, total, k),
        owner,
        out=[((slices, num_rows, chunks, columns), g.dtype)],
        grid=max(total * chunks, clearing),
        N=n,
        K=k,
        R=num_rows,
        TOTAL=total,
        CLEARING=clearing,
    )
    return (_unchunked(out, (*lead, num_rows, g.shape[-1])),)


def _sorted_sum(rows, weights, dest, lead, num_rows, k):
    """Each row r of the result is the sum of the terms with dest r, found by a stable sort of the destinations."""
    slices, (chunks, columns) = math.prod(lead), _chunks(rows)
    dest = _small(dest, lead, slices, -1)
    dest = jnp.where((dest >= 0) & (dest < num_rows), dest, num_rows)
    order = jnp.argsort(dest, axis=-1, stable=True)
    (out,) = launch(
        segment_sum,
        _rows(rows, lead),
        None if weights is None else _small(weights, lead, slices, -1),
        order.astype(jnp.int32),
        jnp.take_along_axis(dest, order, axis=-1),
        out=[((slices * num_rows, chunks, columns), rows.dtype)],
        grid=slices * num_rows * chunks,
        P=dest.shape[-1],
        K=k,
        R=num_rows,
    )
    return (_unchunked(out, (*lead, num_rows, rows.shape[-1])),)


def moe_dispatch(x, packed_token_idx, pairs_by_token=None):
    lead = lead_axes((x, 2), (packed_token_idx, 1), (pairs_by_token, 2))
    return _gather(x, packed_token_idx, None, lead, packed_token_idx.shape[-1], 1)


def moe_collect(rows, packed_token_idx, pairs_by_token=None, *, num_tokens):
    if pairs_by_token is None:
        return _sorted_sum(rows, None, packed_token_idx, lead_axes((rows, 2), (packed_token_idx, 1)), num_tokens, 1)
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
    return _sorted_sum(g, pair_weights, pairs_by_token, lead, num_rows, top_k)


def moe_row_dot(packed_down, g, pairs_by_token, *, unique_rows):
    lead = lead_axes((packed_down, 2), (g, 2), (pairs_by_token, 2))
    return _dot(packed_down, pairs_by_token, g, lead, *pairs_by_token.shape[-2:])


def moe_combine_cotangents(g, packed_down, pairs_by_token, pair_weights):
    lead = lead_axes((g, 2), (packed_down, 2), (pair_weights, 2), (pairs_by_token, 2))
    n, k = pairs_by_token.shape[-2:]
    num_rows, width = packed_down.shape[-2:]
    # Of the registers for 5 rows there are enough for 4 blocks a multiprocessor; a token's blocks share g in the cache.
    slices, choices, (chunks, columns) = math.prod(lead), _choices(k, 5), _chunks(g)
    total = slices * n
    index = _small(pairs_by_token, lead, total, k)
    owner, clearing = _owner(index, n, k, num_rows)
    g_rows, g_weights = launch(
        cotangents,
        _rows(g, lead),
        _rows(packed_down, lead),
        index,
        _small(pair_weights, lead, total, k),
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
    return _unchunked(g_rows, (*lead, num_rows, width)), jnp.reshape(g_weights, (*lead, n, k))


def weighted_sum_batched(slots, weights):
    lead = lead_axes((slots, 3), (weights, 2))
    return _gather(_in_order(slots), None, weights, lead, *slots.shape[-3:-1])


def slot_scale(g, weights):
    lead = lead_axes((g, 2), (weights, 2))
    num_tokens, top_k = weights.shape[-2:]
    (out,) = _scatter(g, None, weights, lead, num_tokens, top_k, num_tokens * top_k)
    return (jnp.reshape(out, (*lead, num_tokens, top_k, g.shape[-1])),)


def slot_dot(slots, g):
    return _dot(_in_order(slots), None, g, lead_axes((slots, 3), (g, 2)), *slots.shape[-3:-1])


def _in_order(slots):
    """[..., T, K, H] as the rows [..., T*K, H]."""
    *lead, num_tokens, top_k, width = slots.shape
    return jnp.reshape(slots, (*lead, num_tokens * top_k, width))
