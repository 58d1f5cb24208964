"""Routing: one launch, which reads the logits once.

A *rank* is a logit's bits as an int32 that is ordered as the logits are. *Lanes* are the experts, filled up to what
divides among the threads. A *column* is the number of a choice or a group, [rows, count] filled up to a warp's lanes.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..shapes import shared_by
from .launch import for_each, launch, lead_axes, loop, pad, put
from .tiles import MAX_CHOICES, MAX_EXPERTS, MAX_GROUPS, WARP_EXPERTS

LOWEST = -(2**31)  # below every rank: no expert, or one that is taken already
LOG_EPS = math.log(1e-20)


@dataclasses.dataclass(frozen=True)
class Router:
    """What is known of a routing when it is compiled: the op's parameters."""

    num_experts: int
    top_k: int
    scoring: str
    norm_topk_prob: bool
    scale: float
    zero_sum: str
    num_groups: int
    group_top_k: int | None
    top2_sum: bool  # whether a group's rank is that of its two best scores' sum; else that of its best
    bias_tokens: int  # neighbouring tokens that share a row of the bias


def full(like, value):
    return jnp.full(like.shape, value, like.dtype)


def wide(column, like):
    return jnp.broadcast_to(column[:, None], like.shape)


def is_nan(x):
    return (lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF) > 0x7F800000


def rank(x):
    """The rank of a float32: -0 has that of +0, and NaN of either sign comes below -inf."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = jnp.where(bits == LOWEST, full(bits, 0), bits)
    return jnp.where(is_nan(x), full(bits, LOWEST + 1), bits ^ ((bits >> 31) & 0x7FFFFFFF))


def unrank(key):
    return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def first_best(key, name):
    """Each row's largest rank, and the smallest name that has it."""
    best = jnp.max(key, axis=1)
    # The smallest name is found as the largest negative one: a maximum of a warp is one instruction, a minimum is not.
    return best, -jnp.max(jnp.where(key == wide(best, key), -name, full(name, LOWEST)), axis=1)


def exponent(x, scoring):
    """A score is factor * e^exponent. Kept apart, scores too small for a float still have the right ratios."""
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
    """The scores, to which a bias is added. A lane without an expert holds a logit of -inf."""
    if scoring == "topk_softmax":
        return x
    if scoring != "softmax":
        return factor(x, scoring) * jnp.exp(exponent(x, scoring))
    e = jnp.exp(x - wide(top, x))
    total = jnp.sum(e, axis=1)
    return e / wide(jnp.where(total == 0, full(total, 1.0), total), e)


def in_best_groups(key, lane, layout, router):
    """The ranks of the experts of the best groups; LOWEST for the others."""
    groups, size = router.num_groups, router.num_experts // router.num_groups
    column, columns = _columns(*key.shape, groups, layout)
    group = lax.div(lane, full(lane, size))

    def rank_group(number, ranks):
        own = jnp.where(group == jnp.broadcast_to(number, group.shape), key, full(key, LOWEST))
        best, first = first_best(own, lane)
        if router.top2_sum:
            second = jnp.max(jnp.where(lane == wide(first, lane), full(own, LOWEST), own), axis=1)
            best = rank(unrank(best) + unrank(second))
        return jnp.where(column == jnp.broadcast_to(number, column.shape), wide(best, column), ranks)

    def keep_best(_, state):
        ranks, found = state
        _, first = first_best(ranks, column)
        found = jnp.where(group == wide(first, group), key, found)
        return jnp.where(column == wide(first, column), full(ranks, LOWEST), ranks), found

    ranks = loop(groups, rank_group, plgpu.layout_cast(full(column, LOWEST), columns))
    return loop(router.group_top_k, keep_best, (ranks, full(key, LOWEST)))[1]


def route(logits, bias, ids, weights, *, tokens, router):
    # A warp routes a token, so a block routes four; the tokens that are left over get a block each, whose warps all do
    # the same. Beyond WARP_EXPERTS experts the four warps of a block share one token. The logits are read once and stay
    # in registers as ranks: the largest is taken top_k times, of equal ones that of the smallest id.
    program, fours = lax.axis_index("program"), _fours(tokens, logits.shape[-1], router.bias_tokens)
    run = functools.partial(route_rows, logits, bias, ids, weights, router=router)
    if fours:
        pl.when(program < fours)(lambda: run(program * 4, 4))
    if fours * 4 < tokens:
        pl.when(program >= fours)(lambda: run(program + 3 * fours, 1))


def _fours(tokens, lanes, bias_tokens):
    """How many blocks route four tokens, which share a row of the bias; the others route one."""
    return tokens // 4 if lanes <= WARP_EXPERTS and (bias_tokens % 4 == 0 or bias_tokens == tokens) else 0


def route_rows(logits, bias, ids, weights, start, rows, *, router):
    """Route `rows` tokens from `start` on."""
    lanes, here = logits.shape[-1], pl.ds(start, rows)
    layout = _layout(rows, lanes, 16 // logits.dtype.itemsize, shared=lanes > WARP_EXPERTS)
    x = plgpu.load(logits.at[here], layout=layout, optimized=False).astype(jnp.float32)
    lane = plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, (rows, lanes), 1), layout)
    logit_key = of_experts(rank(x), lane, router)
    top = finite(unrank(jnp.max(logit_key, axis=1)))
    broken, everything = over_all(x, top, router)

    key, by_logit = logit_key, bias is None and router.num_groups == 1
    if not by_logit:
        value = score(x, router.scoring, top)
        if bias is not None:
            own = plgpu.load(bias.at[start // router.bias_tokens], layout=layout.reduce(0), optimized=False)
            value += lax.broadcast_in_dim(own, value.shape, (1,))
        key = of_experts(rank(value), lane, router)
    if router.num_groups > 1:
        key = in_best_groups(key, lane, layout, router)
    column, columns = _columns(rows, lanes, router.top_k, layout)

    def choose(k, state):
        key, chosen = state
        best, first = first_best(key, lane)
        put(ids.at[here, k], first)
        mine = lane == wide(first, lane)
        if not by_logit:
            best = jnp.max(jnp.where(mine, logit_key, full(key, LOWEST)), axis=1)
        key = jnp.where(mine, full(key, LOWEST), key)
        return key, jnp.where(column == jnp.broadcast_to(k, column.shape), wide(best, column), chosen)

    _, chosen = loop(router.top_k, choose, (key, plgpu.layout_cast(full(column, LOWEST), columns)))
    weight = weigh(chosen, column, top, broken, everything, router)

    def store_choice(k):
        own = column == jnp.broadcast_to(k, column.shape)
        bits = jnp.max(jnp.where(own, weight, full(weight, LOWEST)), axis=1)
        put(weights.at[here, k], lax.bitcast_convert_type(bits, jnp.float32))

    for_each(router.top_k, store_choice)


def of_experts(key, lane, router):
    """The ranks; LOWEST in lanes without an expert."""
    return jnp.where(lane < router.num_experts, key, full(key, LOWEST)) if lane.shape[1] > router.num_experts else key


def over_all(x, top, router):
    """For softmax, of each row: whether it holds NaN or +inf, and the sum over all experts if the weights need it.

    Both are computed before the loop over choices, which then keeps only ranks in registers.
    """
    if router.scoring != "softmax":
        return None, None
    bits = lax.bitcast_convert_type(x, jnp.int32)
    broken = jnp.max(jnp.where(is_nan(x) | (bits == 0x7F800000), full(bits, 1), full(bits, 0)), axis=1)
    if router.norm_topk_prob and router.zero_sum != "eps":
        return broken, None
    return broken, jnp.sum(jnp.exp(x - wide(top, x)), axis=1)


def weigh(chosen, column, top, broken, everything, router):
    """The bits of the weights of the chosen logits, given as ranks."""
    scoring, norm, top_k = router.scoring, router.norm_topk_prob, router.top_k
    if norm:
        base = finite(exponent(unrank(jnp.max(chosen, axis=1)), scoring))
    else:
        base = top if scoring == "softmax" else full(top, 0.0)
    logit = unrank(jnp.where(column < top_k, chosen, full(chosen, 0)))
    weight = jnp.exp(exponent(logit, scoring) - wide(base, logit))
    if scoring in ("sigmoid", "sqrt_softplus"):
        weight *= factor(logit, scoring)
    weight = jnp.where(column < top_k, weight, full(weight, 0.0))
    if norm or scoring == "softmax":
        total = jnp.sum(weight, axis=1) if norm else everything
        if norm and router.zero_sum == "eps" and scoring != "topk_softmax":
            total += jnp.exp(top - base + LOG_EPS) * everything if scoring == "softmax" else jnp.exp(LOG_EPS - base)
        zero = total == 0
        otherwise = full(weight, 1 / top_k if norm and router.zero_sum == "uniform" else 0.0)
        weight = weight / wide(jnp.where(zero, full(total, 1.0), total), weight)
        weight = jnp.where(wide(total, weight) == 0, otherwise, weight)
    if scoring == "softmax":
        weight = jnp.where(wide(broken, column) > 0, full(weight, jnp.nan), weight)
    return lax.bitcast_convert_type(weight * router.scale if router.scale != 1 else weight, jnp.int32)


def finite(largest):
    """The largest of a row, or 0 where it is -inf."""
    return jnp.where(largest == -jnp.inf, full(largest, 0.0), largest)


def _layout(rows: int, lanes: int, most: int = 1, shared: bool = False) -> Any:
    """[rows, lanes] over the warpgroup: a row a warp, or one row in each warp alike, or one row shared by all warps."""
    threads = min(32, lanes) * (4 if shared else 1)
    vector = min(most, (lanes // threads) & -(lanes // threads))
    tiles = ((rows, threads * vector), (32 * vector,), (vector,)) if shared else ((rows, threads * vector), (vector,))
    warps = (-3,) if shared or rows == 4 else (plgpu.Replicated(4),)
    lane_dims = (-2,) if lanes >= 32 else (-2, plgpu.Replicated(32 // lanes))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=warps, lane_dims=lane_dims, vector_dim=-1)


def _columns(rows, lanes, count, layout):
    """The numbers of the columns, [rows, count] filled up to the lanes of a warp, and their layout."""
    width = min(32, lanes) * pl.cdiv(count, min(32, lanes))
    columns = layout if width == lanes else _layout(rows, width)  # Mosaic wants one layout for one shape
    return plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, (rows, width), 1), columns), columns


def _lanes(experts: int) -> int:
    """The number of experts, filled up to what divides among threads."""
    if experts <= 32:
        return max(2, 1 << (experts - 1).bit_length())
    step = 32 if experts <= WARP_EXPERTS else 128
    return -(-experts // step) * step


SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrt_softplus")  # those that the kernel computes


def refuse(call):
    if call.params.get("scoring", SCORINGS[0]) not in SCORINGS:
        return f"its kernel does not compute the scores of {call.params['scoring']!r}"
    experts, top_k, groups = call.sizes["E"], call.params["top_k"], call.params["num_groups"] or 1
    if experts > MAX_EXPERTS:
        return f"a block holds a token's logits in registers, {MAX_EXPERTS} at most; got {experts}"
    if top_k > MAX_CHOICES:
        return f"a block holds a token's choices in registers, {MAX_CHOICES} at most; got {top_k}"
    if groups > MAX_GROUPS:
        return f"a block holds a token's groups in registers, {MAX_GROUPS} at most; got {groups}"
    return None


def route_topk(
    logits, bias=None, *, top_k, scoring, norm_topk_prob, num_groups, group_top_k, group_score, scale, zero_sum
):
    experts, bias_tokens = logits.shape[-1], 0
    lead = lead_axes((logits, 1), (bias, 1))
    tokens, lanes = math.prod(lead), _lanes(experts)
    logits = jnp.reshape(jnp.broadcast_to(logits, (*lead, experts)), (tokens, experts))
    if bias is not None:
        bias, bias_tokens = shared_by(bias, lead)
        bias = pad(jnp.reshape(bias, (-1, experts)), lanes)
    router = Router(
        num_experts=experts,
        top_k=top_k,
        scoring=scoring,
        norm_topk_prob=norm_topk_prob,
        scale=scale,
        zero_sum=zero_sum,
        num_groups=num_groups or 1,
        group_top_k=group_top_k,
        top2_sum=group_score == "top2_sum",
        bias_tokens=bias_tokens,
    )
    ids, weights = launch(
        route,
        pad(logits, lanes, -jnp.inf),
        bias,
        out=[((tokens, top_k), jnp.int32), ((tokens, top_k), jnp.float32)],
        grid=tokens - 3 * _fours(tokens, lanes, bias_tokens),
        tokens=tokens,
        router=router,
    )
    return jnp.reshape(ids, (*lead, top_k)), jnp.reshape(weights, (*lead, top_k))
