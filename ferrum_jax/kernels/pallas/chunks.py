"""Rows in chunks: how combine's kernels see rows, and how their wrappers bring them into that form.

Rows are [slices, rows, chunks, columns]. A chunk is what a warpgroup holds of a row: up to 16 bytes a thread. A slice
is what the leading axes count; rows that the whole batch shares have one slice and are not copied.
"""

import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .launch import THREADS, loop, pad, vector
from .tiles import UNROLLED

# ---- in a kernel


def layout(ref):
    return plgpu.Layout.WG_STRIDED((ref.shape[-1],), ref.shape[-1] // THREADS)


def zeros(like):
    """A chunk of zeros in float32, of the width of `like`'s."""
    return plgpu.layout_cast(jnp.zeros(like.shape[-1:], jnp.float32), layout(like))


def fetch(rows, slice_id, row, chunk):
    """A chunk of a row, in the row's own dtype."""
    at = (slice_id if rows.shape[0] > 1 else 0, row, chunk)
    return plgpu.load(rows.at[at], layout=layout(rows))


def load(rows, slice_id, row, chunk):
    """A chunk of a row, in float32."""
    return fetch(rows, slice_id, row, chunk).astype(jnp.float32)


def store(out, row, chunk, value):
    """`row` is a row's number, or the slice and the number."""
    at = (*row, chunk) if isinstance(row, tuple) else (row, chunk)
    out[at] = plgpu.layout_cast(value.astype(out.dtype), layout(out))


def where(valid, x):
    """x if valid, else zeros."""
    return jnp.where(jnp.broadcast_to(valid, x.shape), x, jnp.zeros_like(x))


def unrolled_loop(times, step, state):
    """state = step(k, state) for each k in [0, times): unrolled if they are few, otherwise eight at a time."""
    if times <= UNROLLED:
        eights = 0
    else:
        eights = times // 8

        def eight_steps(i, state):
            for j in range(8):
                state = step(i * 8 + j, state)
            return state

        state = loop(eights, eight_steps, state)
    for k in range(eights * 8, times):
        state = step(jnp.int32(k), state)
    return state


def for_lists(times, body):
    """Call body with lists that together hold each k in [0, times): one list if they are few, otherwise eights.

    No load overtakes a store. A body that loads for its whole list before it stores has all of these loads in flight.
    """
    eights = 0 if times <= UNROLLED else times // 8
    loop(eights, lambda i, _: body([i * 8 + j for j in range(8)]) or (), ())
    if eights * 8 < times:
        body([jnp.int32(k) for k in range(eights * 8, times)])


# ---- in a wrapper


def folded(x, lead, *shape):
    """Ids or weights over all the leading axes, folded into `shape`. They are small, so a copy is cheap."""
    return jnp.reshape(jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :])), shape)


def chunked(x, lead):
    """[..., rows, width] as [slices, rows, chunks, columns], padded: one slice if the batch shares the rows."""
    own = x.shape[: len(lead)]
    if math.prod(own) != 1 and own != lead:
        x = jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :]))
    chunks, columns = chunk_shape(x)
    return jnp.reshape(pad(x, chunks * columns), (-1, x.shape[-2], chunks, columns))


def chunk_shape(x):
    """How many chunks a row of x has, and how many columns a chunk has."""
    columns = THREADS * vector(x.shape[-1], x.dtype.itemsize)
    return pl.cdiv(x.shape[-1], columns), columns


def unchunked(out, shape):
    """The inverse of `chunked`: rows of this shape, without the padding."""
    return jnp.reshape(jnp.reshape(out, (-1, math.prod(out.shape[-2:])))[:, : shape[-1]], shape)
