"""Routing: one launch, one read of the logits."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .launch import launch, lead_axes, loop, pad, put

LOWEST = -(2**31)  # below every rank: no expert, or one that is taken
LOG_EPS = math.log(1e-20)
WARP_EXPERTS = 1024  # up to here a warp holds a row
MAX_EXPERTS, MAX_CHOICES, MAX_GROUPS = 8192, 512, 512


def full(like, value):
    return jnp.full(like.shape, value, like.dtype)


def wide(column, like):
    return jnp.broadcast_to(column[:, None], like.shape)


def is_nan(x):
    return (lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF) > 0x7F800000


def rank(x):
    """A float32's place among all: -0 as +0, NaN of either sign below -inf."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = jnp.where(bits == LOWEST, full(bits, 0), bits)
    return jnp.where(is_nan(x), full(bits, LOWEST + 1), bits ^ ((bits >> 31) & 0x7FFFFFFF))


def unrank(key):
    return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def first_best(key, name):
    """Each row's largest rank, and the smallest name that has it."""
    best = jnp.max(key, axis=1)
    # The smallest name is the largest negative: a maximum is one instruction for the whole warp, a minimum is not.
    return best, -jnp.max(jnp.where(key == wide(best, key), -name, full(name, LOWEST)), axis=1)


def exponent(x, scoring):
    """A score is factor * e^exponent, so that scores too small for a float still compare."""
    if scoring == "sigmoid":
        return jnp.where(x > 0, full(x, 0.0), x)
    if scoring == "sqrt_softplus":
        return jnp.where(x >= -40, full(x, 0.0), x + 40) * 0.5
    return x


def factor(x, scoring):
    if scoring == "sigmoid":
        return 1 / (1 + jnp.exp(-jnp.abs(x)))
    x = jnp.where(x < -40, full(x, -40.0), x)
    e = jnp.exp(-jnp.abs(x))
    z = e / (2 + e)  # log(1 + e) = 2 atanh(z) with z <= 1/3, to the last bit however small e is
    series = full(z, 1 / 15)
    for term in (13, 11, 9, 7, 5, 3, 1):
        series = series * (z * z) + 1 / term
    return jnp.sqrt(jnp.where(x < 0, full(x, 0.0), x) + 2 * z * series)


def score(x, scoring, top):
    """What a bias is added to, in every lane; a lane without an expert holds -inf."""
    if scoring == "topk_softmax":
        return x
    if scoring != "softmax":
        return factor(x, scoring) * jnp.exp(exponent(x, scoring))
    e = jnp.exp(x - wide(top, x))
    total = jnp.sum(e, axis=1)
    return e / wide(jnp.where(total == 0, full(total, 1.0), total), e)


def in_best_groups(key, lane, column, columns, groups, kept, size, top2):
    """The ranks, but those of other groups than the best. Each group's is found over the lanes that are its own."""
    group = lax.div(lane, full(lane, size))
    at = lambda number, like: jnp.broadcast_to(number, like.shape)  # noqa: E731

    def rank_group(number, ranks):
        own = jnp.where(group == at(number, group), key, full(key, LOWEST))
        best, first = first_best(own, lane)
        if top2:
            second = jnp.max(jnp.where(lane == wide(first, lane), full(own, LOWEST), own), axis=1)
            best = rank(unrank(best) + unrank(second))
        return jnp.where(column == at(number, column), wide(best, column), ranks)

    def keep(_, state):
        ranks, found = state
        _, first = first_best(ranks, column)
        found = jnp.where(group == wide(first, group), key, found)
        return jnp.where(column == wide(first, column), full(ranks, LOWEST), ranks), found

    ranks = loop(groups, rank_group, plgpu.layout_cast(full(column, LOWEST), columns))
    return loop(kept, keep, (ranks, full(key, LOWEST)))[1]


def route(logits, bias, ids, weights, *, TOKENS, BIAS_TOKENS, **settings):
    # Up to 1,024 experts a warp routes a token, so a block four; the last tokens that are fewer get a block each, whose
    # warps do the same. Beyond, a block's four warps share a token. The logits are read once and stay in registers as
    # rank keys; K times each row's largest key is taken, of equal ones the smallest id. The key is the logit's bits, or
    # those of its score plus bias where experts are chosen by that; BIAS_TOKENS tokens share a row of the bias.
    program, fours = lax.axis_index("program"), _fours(TOKENS, logits.shape[-1], BIAS_TOKENS)
    run = functools.partial(route_rows, logits, bias, ids, weights, bias_tokens=BIAS_TOKENS, **settings)
    if fours:
        pl.when(program < fours)(lambda: run(program * 4, 4))
    if fours * 4 < TOKENS:
        pl.when(program >= fours)(lambda: run(program + 3 * fours, 1))


def _fours(tokens, lanes, bias_tokens):
    """How many blocks route four tokens, which share a row of the bias; the others route one."""
    return tokens // 4 if lanes <= WARP_EXPERTS and (bias_tokens % 4 == 0 or bias_tokens == tokens) else 0


def route_rows(
    logits, bias, ids, weights, start, rows, *, bias_tokens, E, K, SCORING, NORM, SCALE, ZERO_SUM, GROUPS, KEPT, TOP2
):
    lanes = logits.shape[-1]
    layout = _layout(rows, lanes, 16 // logits.dtype.itemsize, shared=lanes > WARP_EXPERTS)
    here = pl.ds(start, rows)
    x = plgpu.load(logits.at[here], layout=layout, optimized=False).astype(jnp.float32)
    lane = plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, (rows, lanes), 1), layout)
    live = lambda key: jnp.where(lane < E, key, full(key, LOWEST)) if lanes > E else key  # noqa: E731
    logit_key = live(rank(x))
    top = finite(unrank(jnp.max(logit_key, axis=1)))
    if SCORING == "softmax":  # what is asked of all logits is asked before the loop, which then holds nothing but ranks
        bits = lax.bitcast_convert_type(x, jnp.int32)
        broken = jnp.max(jnp.where(is_nan(x) | (bits == 0x7F800000), full(bits, 1), full(bits, 0)), axis=1)
        everything = None if NORM and ZERO_SUM != "eps" else jnp.sum(jnp.exp(x - wide(top, x)), axis=1)

    key, by_logit = logit_key, bias is None and GROUPS == 1
    if not by_logit:
        value = score(x, SCORING, top)
        if bias is not None:
            own = plgpu.load(bias.at[start // bias_tokens], layout=layout.reduce(0), optimized=False)
            value += lax.broadcast_in_dim(own, value.shape, (1,))
        key = live(rank(value))
    if GROUPS > 1:
        key = in_best_groups(key, lane, *_columns(rows, lanes, GROUPS, layout), GROUPS, KEPT, E // GROUPS, TOP2)
    column, columns = _columns(rows, lanes, K, layout)

    def choose(k, state):
        key, chosen = state
        best, first = first_best(key, lane)
        put(ids.at[here, k], first)
        mine = lane == wide(first, lane)
        if not by_logit:
            best = jnp.max(jnp.where(mine, logit_key, full(key, LOWEST)), axis=1)
        key = jnp.where(mine, full(key, LOWEST), key)
        return key, jnp.where(column == jnp.broadcast_to(k, column.shape), wide(best, column), chosen)

    _, chosen = loop(K, choose, (key, plgpu.layout_cast(full(column, LOWEST), columns)))

    if NORM:
        base = finite(exponent(unrank(jnp.max(chosen, axis=1)), SCORING))
    else:
        base = top if SCORING == "softmax" else full(top, 0.0)
    logit = unrank(jnp.where(column < K, chosen, full(chosen, 0)))
    weight = jnp.exp(exponent(logit, SCORING) - wide(base, logit))
    if SCORING in ("sigmoid", "sqrt_softplus"):
        weight *= factor(logit, SCORING)
    weight = jnp.where(column < K, weight, full(weight, 0.0))
    if NORM or SCORING == "softmax":
        total = jnp.sum(weight, axis=1) if NORM else everything
        if NORM and ZERO_SUM == "eps" and SCORING != "topk_softmax":
            total += jnp.exp(top - base + LOG_EPS) * everything if SCORING == "softmax" else jnp.exp(LOG_EPS - base)
        zero = total == 0
        otherwise = full(weight, 1 / K if NORM and ZERO_SUM == "uniform" else 0.0)
        weight = weight / wide(jnp.where(zero, full(total, 1.0), total), weight)
        weight = jnp.where(wide(total, weight) == 0, otherwise, weight)
    if SCORING == "softmax":
        weight = jnp.where(wide(broken, column) > 0, full(weight, jnp.nan), weight)
    weight = lax.bitcast_convert_type(weight * SCALE if SCALE != 1 else weight, jnp.int32)

    def store(k, _):
        own = column == jnp.broadcast_to(k, column.shape)
        bits = jnp.max(jnp.where(own, weight, full(weight, LOWEST)), axis=1)
        put(weights.at[here, k], lax.bitcast_convert_type(bits, jnp.float32))
        return ()

    loop(K, store, ())


def finite(largest):
    return jnp.where(largest == -jnp.inf, full(largest, 0.0), largest)


def _layout(rows: int, lanes: int, most: int = 1, shared: bool = False) -> Any:
    """[rows, lanes] over the warpgroup: four rows by the warps, or one in each warp alike, or one shared by all."""
    threads = min(32, lanes) * (4 if shared else 1)
    vector = min(most, (lanes // threads) & -(lanes // threads))
    tiles = ((rows, threads * vector), (32 * vector,), (vector,)) if shared else ((rows, threads * vector), (vector,))
    warps = (-3,) if shared or rows == 4 else (plgpu.Replicated(4),)
    lane_dims = (-2,) if lanes >= 32 else (-2, plgpu.Replicated(32 // lanes))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=warps, lane_dims=lane_dims, vector_dim=-1)


def _columns(rows, lanes, count, layout):
    """[rows, count], filled up to the lanes of a warp: each one's number, and their layout."""
    width = min(32, lanes) * pl.cdiv(count, min(32, lanes))
    columns = layout if width == lanes else _layout(rows, width)  # one layout a shape, or Mosaic finds neither
    return plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, (rows, width), 1), columns), columns


def _lanes(experts: int) -> int:
    """The experts, filled up to what divides among lanes."""
    if experts <= 32:
        return max(2, 1 << (experts - 1).bit_length())
    step = 32 if experts <= WARP_EXPERTS else 128
    return -(-experts // step) * step


def refuse(operands, params):
    experts, top_k, groups = operands[0].shape[-1], params["top_k"], params["num_groups"] or 1
    if experts > MAX_EXPERTS:
        return f"a block holds a token's logits in registers, {MAX_EXPERTS} at most; got {experts}"
    if top_k > MAX_CHOICES:
        return f"a block holds a token's choices in registers, {MAX_CHOICES} at most; got {top_k}"
    if groups > MAX_GROUPS:
        return f"a block holds a token's groups in registers, {MAX_GROUPS} at most; got {groups}"
    return None


def _shared_by(bias, lead):
    """The rows of bias that differ, and how many neighbouring tokens share one."""
    outer = max((axis + 1 for axis, size in enumerate(bias.shape[:-1]) if size != 1), default=0)
    wide = jnp.broadcast_to(bias, (*lead[:outer], *bias.shape[outer:]))
    return jnp.reshape(wide, (-1, bias.shape[-1])), math.prod(lead[outer:])


def route_topk(
    logits, bias=None, *, top_k, scoring, norm_topk_prob, num_groups, group_top_k, group_score, scale, zero_sum
):
    experts, bias_tokens = logits.shape[-1], 0
    lead = lead_axes((logits, 1), *([] if bias is None else [(bias, 1)]))
    tokens, lanes = math.prod(lead), _lanes(experts)
    logits = jnp.reshape(jnp.broadcast_to(logits, (*lead, experts)), (tokens, experts))
    if bias is not None:
        bias, bias_tokens = _shared_by(bias, lead)
        bias = pad(bias, lanes)
    ids, weights = launch(
        route,
        pad(logits, lanes, -jnp.inf),
        bias,
        out=[((tokens, top_k), jnp.int32), ((tokens, top_k), jnp.float32)],
        grid=tokens - 3 * _fours(tokens, lanes, bias_tokens),
        TOKENS=tokens,
        BIAS_TOKENS=bias_tokens,
        E=experts,
        K=top_k,
        SCORING=scoring,
        NORM=norm_topk_prob,
        SCALE=scale,
        ZERO_SUM=zero_sum,
        GROUPS=num_groups or 1,
        KEPT=group_top_k,
        TOP2=group_score == "top2_sum",
    )
    return jnp.reshape(ids, (*lead, top_k)), jnp.reshape(weights, (*lead, top_k))
