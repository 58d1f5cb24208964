"""Routing: one launch, one read of the logits."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import launch, loop, pad

LOWEST = -(2**31)
WARP_EXPERTS = 1024  # up to here a warp holds a row
MAX_EXPERTS, MAX_CHOICES = 8192, 512


def route(logits, ids, weights, *, TOKENS, E, K, NORM):
    # Up to 1,024 experts a warp routes a token, so a block four; the last tokens that are fewer get a block each, whose
    # warps do the same. Beyond, a block's four warps share a token. The logits are read once and stay in registers as
    # rank keys; K times each row's largest key is taken, of equal ones the smallest id.
    program, fours = lax.axis_index("program"), _fours(TOKENS, logits.shape[-1])
    if fours:
        pl.when(program < fours)(lambda: route_rows(logits, ids, weights, program * 4, 4, E, K, NORM))
    if fours * 4 < TOKENS:
        pl.when(program >= fours)(lambda: route_rows(logits, ids, weights, program + 3 * fours, 1, E, K, NORM))


def _fours(tokens, lanes):
    """How many blocks route four tokens; the others route one."""
    return tokens // 4 if lanes <= WARP_EXPERTS else 0


def route_rows(logits, ids, weights, start, rows, experts, top_k, norm):
    lanes = logits.shape[-1]
    choices = min(32, lanes) * pl.cdiv(top_k, min(32, lanes))
    layout = _layout(rows, lanes, 16 // logits.dtype.itemsize, shared=lanes > WARP_EXPERTS)
    here = pl.ds(start, rows)
    full = lambda like, value: jnp.full(like.shape, value, like.dtype)  # noqa: E731
    wide = lambda column, like: jnp.broadcast_to(column[:, None], like.shape)  # noqa: E731
    unkey = lambda key: lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)  # noqa: E731

    x = plgpu.load(logits.at[here], layout=layout, optimized=False).astype(jnp.float32)
    lane = plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, (rows, lanes), 1), layout)
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = jnp.where(bits == LOWEST, full(bits, 0), bits)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    key = jnp.where(nan, full(bits, LOWEST + 1), bits ^ ((bits >> 31) & 0x7FFFFFFF))
    if lanes > experts:
        key = jnp.where(lane < experts, key, full(key, LOWEST))
    broken = jnp.max(jnp.where(nan | (bits == 0x7F800000), full(bits, 1), full(bits, 0)), axis=1)
    top = unkey(jnp.max(key, axis=1))
    top = jnp.where(top == -jnp.inf, full(top, 0.0), top)
    everything = None if norm else jnp.sum(jnp.exp(x - wide(top, x)), axis=1)

    columns = layout if choices == lanes else _layout(rows, choices)  # one layout a shape, or Mosaic finds neither
    column = plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, (rows, choices), 1), columns)

    def choose(k, state):
        key, chosen = state
        best = jnp.max(key, axis=1)
        # The smallest id is the largest negative: a maximum is one instruction for the whole warp, a minimum is not.
        first = -jnp.max(jnp.where(key == wide(best, key), -lane, full(lane, LOWEST)), axis=1)
        _put(ids.at[here, k], first)
        key = jnp.where(lane == wide(first, lane), full(key, LOWEST), key)
        return key, jnp.where(column == jnp.broadcast_to(k, column.shape), wide(best, column), chosen)

    _, chosen = loop(top_k, choose, (key, plgpu.layout_cast(full(column, LOWEST), columns)))

    term = unkey(jnp.where(column < top_k, chosen, full(chosen, 0)))
    term = jnp.where(column < top_k, jnp.exp(term - wide(top, term)), full(term, 0.0))
    total = jnp.sum(term, axis=1) if norm else everything
    positive = total > 0
    weight = term / wide(jnp.where(positive, total, full(total, 1.0)), term)
    weight = jnp.where(wide(total, term) > 0, weight, full(weight, 1 / top_k if norm else 0.0))
    weight = jnp.where(wide(broken, column) > 0, full(weight, jnp.nan), weight)
    weight = lax.bitcast_convert_type(weight, jnp.int32)  # none is negative, so they rank as integers

    def store(k, _):
        own = column == jnp.broadcast_to(k, column.shape)
        bits = jnp.max(jnp.where(own, weight, full(weight, LOWEST)), axis=1)
        _put(weights.at[here, k], lax.bitcast_convert_type(bits, jnp.float32))
        return ()

    loop(top_k, store, ())


def _put(ref, value):
    """Store one number a row, K times: which is not wide, and need not be. JAX 0.12 wants that said."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _layout(rows: int, lanes: int, most: int = 1, shared: bool = False) -> Any:
    """[rows, lanes] over the warpgroup: four rows by the warps, or one in each warp alike, or one shared by all."""
    threads = min(32, lanes) * (4 if shared else 1)
    vector = min(most, (lanes // threads) & -(lanes // threads))
    tiles = ((rows, threads * vector), (32 * vector,), (vector,)) if shared else ((rows, threads * vector), (vector,))
    warps = (-3,) if shared or rows == 4 else (plgpu.Replicated(4),)
    lane_dims = (-2,) if lanes >= 32 else (-2, plgpu.Replicated(32 // lanes))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=warps, lane_dims=lane_dims, vector_dim=-1)


def _lanes(experts: int) -> int:
    """The experts, filled up to what divides among lanes."""
    if experts <= 32:
        return max(2, 1 << (experts - 1).bit_length())
    step = 32 if experts <= WARP_EXPERTS else 128
    return -(-experts // step) * step


def refuse(operands, params):
    experts, top_k = operands[0].shape[-1], params["top_k"]
    if experts > MAX_EXPERTS:
        return f"a block holds a token's logits in registers, {MAX_EXPERTS} at most; got {experts}"
    if top_k > MAX_CHOICES:
        return f"a block holds a token's choices in registers, {MAX_CHOICES} at most; got {top_k}"
    return None


def route_topk_softmax(logits, *, top_k, norm_topk_prob):
    *lead, experts = logits.shape
    tokens, lanes = math.prod(lead), _lanes(experts)
    ids, weights = launch(
        route,
        pad(jnp.reshape(logits, (tokens, experts)), lanes, -jnp.inf),
        out=[((tokens, top_k), jnp.int32), ((tokens, top_k), jnp.float32)],
        grid=tokens - 3 * _fours(tokens, lanes),
        TOKENS=tokens,
        E=experts,
        K=top_k,
        NORM=norm_topk_prob,
    )
    return jnp.reshape(ids, (*lead, top_k)), jnp.reshape(weights, (*lead, top_k))
