"""Routing: one launch, one read of the logits."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from . import launch, lead_axes

_LOWEST = tl.constexpr(-(2**31))  # below every rank: no expert, or one that is taken
_LOG_EPS = tl.constexpr(math.log(1e-20))
MAX_LANES = 16384


@triton.jit
def rank(x):
    # A float32's place among all: -0 as +0, NaN of either sign below -inf.
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == _LOWEST, 0, bits)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LOWEST + 1)


@triton.jit
def unrank(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_best(key, name, none):
    # Each row's largest rank, and the smallest name that has it.
    best = tl.max(key, 1)[:, None]
    return best, tl.min(tl.where(key == best, name, none), 1)[:, None]


@triton.jit
def exp(x):
    # Of x <= 0, to 2 ulp. tl.exp rounds x / log(2) first, which is |x| / 2 ulp off: enough to change a choice.
    x = tl.where(x < -104.0, -104.0, x)
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4  # log(2), as a short number and what is left
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(whole)


@triton.jit
def exponent(x, SCORING: tl.constexpr):
    # A score is factor * e^exponent, so that scores too small for a float still compare.
    if SCORING == "sigmoid":
        return tl.where(x > 0.0, 0.0, x)
    elif SCORING == "sqrt_softplus":
        return tl.where(x >= -40.0, 0.0, x + 40.0) * 0.5
    else:
        return x


@triton.jit
def factor(x, SCORING: tl.constexpr):
    if SCORING == "sigmoid":
        return 1.0 / (1.0 + exp(-tl.abs(x)))
    elif SCORING == "sqrt_softplus":
        x = tl.where(x < -40.0, -40.0, x)
        e = exp(-tl.abs(x))
        z = e / (2.0 + e)  # log(1 + e) = 2 atanh(z) with z <= 1/3, to the last bit however small e is
        s = z * z
        series = 1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13 + s / 15))))))
        return tl.sqrt(tl.where(x < 0.0, 0.0, x) + 2.0 * z * series)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def score(x, SCORING: tl.constexpr):
    # What a bias is added to, in every lane; a lane without an expert holds -inf.
    if SCORING == "softmax":
        top = tl.max(tl.where(x == x, x, float("-inf")), 1)[:, None]
        e = exp(x - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(e, 1)[:, None]
        return e / tl.where(total == 0.0, 1.0, total)
    elif SCORING == "topk_softmax":
        return x
    else:
        return factor(x, SCORING) * exp(exponent(x, SCORING))


@triton.jit
def in_best_groups(key, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, WIDTH: tl.constexpr):
    # The ranks, but those of other groups than the best: [rows, lanes], in which a group has WIDTH lanes.
    WIDE: tl.constexpr = key.shape[1] // WIDTH
    by_group = tl.reshape(key, [key.shape[0], WIDE, WIDTH])
    best = tl.max(by_group, 2)
    if TOP2:
        lane = tl.arange(0, WIDTH)[None, None, :]
        largest = tl.min(tl.where(by_group == best[:, :, None], lane, WIDTH), 2)
        second = tl.max(tl.where(lane == largest[:, :, None], _LOWEST, by_group), 2)
        best = rank(unrank(best) + unrank(second))
    group = tl.arange(0, WIDE)[None, :]
    best = tl.where(group < GROUPS, best, _LOWEST)
    kept = tl.zeros([key.shape[0], WIDE], tl.int32)
    for _ in range(KEPT):
        _, first = first_best(best, group, WIDE)
        kept = tl.where(group == first, 1, kept)
        best = tl.where(group == first, _LOWEST, best)
    return tl.reshape(tl.where(kept[:, :, None] > 0, by_group, _LOWEST), key.shape)


@triton.jit
def route(
    logits, bias, ids, weights,
    tokens: tl.constexpr, E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    CHOICES: tl.constexpr, SCORING: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, ZERO_SUM: tl.constexpr,
    BIAS_TOKENS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # A program routes ROWS tokens. Up to 1,024 lanes it is one warp, which keeps its rows in registers and shares
    # nothing. It reads the logits once and K times takes each row's largest rank key, of equal ones the smallest id;
    # K ids and weights are all it writes. The key is the logit's bits, or those of its score plus bias where experts
    # are chosen by that. A group of SIZE experts has WIDTH lanes; BIAS_TOKENS tokens share a row of the bias.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    expert = lane // WIDTH * SIZE + lane % WIDTH if GROUPS > 1 else lane
    here = (lane % WIDTH < SIZE) & (expert < E)
    live = (row < tokens) & here
    x = tl.load(logits + row * E + expert, mask=live, other=float("-inf")).to(tl.float32)

    BY_LOGIT: tl.constexpr = BIAS_TOKENS == 0 and GROUPS == 1
    logit_key = tl.where(here, rank(x), _LOWEST)
    key = logit_key
    if SCORING == "softmax":  # what is asked of all logits is asked before the loop, which then holds nothing but ranks
        broken = tl.max(tl.where((x == x) & (x < float("inf")), 0, 1), 1)[:, None] > 0
        if not NORM or ZERO_SUM == "eps":
            top = tl.max(tl.where(x == x, x, float("-inf")), 1)[:, None]
            top = tl.where(top == float("-inf"), 0.0, top)
            everything = tl.sum(tl.exp(x - top), 1)[:, None]
    if not BY_LOGIT:
        value = score(x, SCORING)
        if BIAS_TOKENS > 0:
            value += tl.load(bias + row // BIAS_TOKENS * E + expert, mask=live, other=0.0)
        key = rank(value)
    key = tl.where(here, key, _LOWEST)
    if GROUPS > 1:
        key = in_best_groups(key, GROUPS, KEPT, TOP2, WIDTH)
    column = tl.arange(0, CHOICES)[None, :]
    chosen_id = tl.zeros([ROWS, CHOICES], tl.int32)
    chosen_key = tl.full([ROWS, CHOICES], _LOWEST, tl.int32)
    for k in range(K):
        best, first = first_best(key, expert, LANES)
        chosen_id = tl.where(column == k, first, chosen_id)
        if not BY_LOGIT:
            best = tl.max(tl.where(expert == first, logit_key, _LOWEST), 1)[:, None]
        chosen_key = tl.where(column == k, best, chosen_key)
        key = tl.where(expert == first, _LOWEST, key)

    chosen = tl.where(column < K, unrank(chosen_key), float("-inf"))
    power = exponent(chosen, SCORING)
    base = tl.zeros([ROWS, 1], tl.float32)
    if NORM:
        base = tl.max(power, 1)[:, None]
        base = tl.where(base == float("-inf"), 0.0, base)
    elif SCORING == "softmax":
        base = top
    weight = tl.where(column < K, factor(chosen, SCORING) * tl.exp(power - base), 0.0)
    if NORM or SCORING == "softmax":
        total = tl.sum(weight, 1)[:, None] if NORM else everything
        if NORM and ZERO_SUM == "eps" and SCORING == "softmax":
            total += tl.exp(top - base + _LOG_EPS) * everything
        elif NORM and ZERO_SUM == "eps" and SCORING != "topk_softmax":
            total += tl.exp(_LOG_EPS - base)
        otherwise: tl.constexpr = 1.0 / K if NORM and ZERO_SUM == "uniform" else 0.0
        weight = tl.where(total == 0.0, otherwise, weight / tl.where(total == 0.0, 1.0, total))
    if SCORING == "softmax":
        weight = tl.where(broken, float("nan"), weight)
    kept = (row < tokens) & (column < K)
    tl.store(ids + row * K + column, chosen_id, mask=kept)
    tl.store(weights + row * K + column, weight * SCALE, mask=kept)


def _lanes(experts, num_groups):
    """The lanes of a row, and of a group in it: powers of two, which groups fill up each by itself."""
    if num_groups is None:
        lanes = triton.next_power_of_2(experts)
        return lanes, lanes
    width = triton.next_power_of_2(experts // num_groups)
    return triton.next_power_of_2(num_groups) * width, width


def refuse(operands, params):
    experts, groups = operands[0].shape[-1], params["num_groups"]
    lanes, _ = _lanes(experts, groups)
    if lanes > MAX_LANES:
        of = f" in {groups} groups" if groups else ""
        return f"a program holds a token's logits in registers, {MAX_LANES} lanes at most; {experts}{of} take {lanes}"
    return None


def _shared_by(bias, lead):
    """The rows of bias that differ, and how many neighbouring tokens share one."""
    outer = max((axis + 1 for axis, size in enumerate(bias.shape[:-1]) if size != 1), default=0)
    wide = (*lead[:outer], *bias.shape[outer:])
    return jnp.broadcast_to(bias, wide), math.prod(lead[outer:])


def route_topk(
    logits, bias=None, *, top_k, scoring, norm_topk_prob, num_groups, group_top_k, group_score, scale, zero_sum
):
    experts, bias_tokens = logits.shape[-1], 0
    lead = lead_axes((logits, 1), *([] if bias is None else [(bias, 1)]))
    logits = jnp.broadcast_to(logits, (*lead, experts))
    if bias is not None:
        bias, bias_tokens = _shared_by(bias, lead)
    tokens, (lanes, width) = math.prod(lead), _lanes(experts, num_groups)
    # 16 logits a lane keep a warp busy, unless that leaves multiprocessors idle: 4 warps for each of about 128.
    rows = max(1, min(512 // lanes, triton.next_power_of_2(triton.cdiv(tokens, 512))))
    return launch(
        route,
        logits,
        logits if bias is None else bias,
        out=[((*lead, top_k), jnp.int32), ((*lead, top_k), jnp.float32)],
        grid=triton.cdiv(tokens, rows),
        num_warps=min(32, max(1, lanes // 1024)),
        tokens=tokens,
        E=experts,
        K=top_k,
        ROWS=rows,
        LANES=lanes,
        CHOICES=triton.next_power_of_2(top_k),
        SCORING=scoring,
        NORM=norm_topk_prob,
        SCALE=scale,
        ZERO_SUM=zero_sum,
        BIAS_TOKENS=bias_tokens,
        GROUPS=num_groups or 1,
        KEPT=group_top_k or 1,
        TOP2=group_score == "top2_sum",
        SIZE=experts // (num_groups or 1),
        WIDTH=width,
    )
