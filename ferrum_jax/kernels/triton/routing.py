"""Routing: one launch, one read of all logits, and one of the chosen ones."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from . import launch, lead_axes

_LOWEST = tl.constexpr(-(2**31))  # below every rank: no expert, or one that is taken
_NAN = tl.constexpr(-(2**31) + 2**22)  # between that and the rank of -inf, also without the last 22 bits
_LOG_EPS = tl.constexpr(math.log(1e-20))
MAX_LANES = 16384

EXACT_LANES = {"bfloat16": 2**15, "float16": 2**12}  # up to which 31 bits have room for a whole logit and its lane

# What was changed, and what came of it: a warp's instructions per token, counted in the machine code for an H200 that
# Triton 3.6.0 makes of K=8, bfloat16, T=8192 at E=128 and 65,536 at E=256. On an H100 the first row's kernel took 7.4
# and 64.8 us, 2026-11-25; the others have not been timed.
#
#   change                                                                        E=128   E=256
#   the best rank, then the least lane that has it; crossed out                   341     570
#   one maximum over rank and lane in one word; subtracted, not crossed out       185     480
#   four rows a warp also at E=256, so that the weights are divided among lanes   185     315
#   rank and word made in one; offsets of 32 bits in the tile                     174     293
#   ids stored and read back, so that weights are computed once, not in each lane 155     244
#   +inf looked for beside NaN: with a bias or groups it may not be chosen        159     249


@triton.jit
def rank(x):
    # A float32's place among all: -0 as +0, NaN of either sign below -inf.
    bits = x.to(tl.int32, bitcast=True)
    sign = bits >> 31
    return tl.where(x == x, (bits ^ (sign & 0x7FFFFFFF)) - sign, _NAN)


@triton.jit
def unrank(key):
    sign = key >> 31
    return ((key + sign) ^ (sign & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_best(key, name, none):
    # The smallest name that has its row's largest rank.
    return tl.min(tl.where(key == tl.max(key, 1)[:, None], name, none), 1)[:, None]


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
        first = first_best(best, group, WIDE)
        kept = tl.where(group == first, 1, kept)
        best = tl.where(group == first, _LOWEST, best)
    return tl.reshape(tl.where(kept[:, :, None] > 0, by_group, _LOWEST), key.shape)


@triton.jit
def best_lanes(x, allowed, K: tl.constexpr, CHOICES: tl.constexpr, EXACT: tl.constexpr, ALL: tl.constexpr):
    # The allowed lanes with each row's K best values, of equal ones the first: [rows, CHOICES].
    LANES: tl.constexpr = x.shape[1]
    lane = tl.arange(0, LANES)[None, :]
    column = tl.arange(0, CHOICES)[None, :]
    # One word holds a value's first bits, as a number in their order, and below them the lane, counted from the last:
    # one maximum finds both. It has 31 bits, so that the next maximum is the largest of those that the last one makes
    # negative when it is subtracted from all: nothing is crossed out.
    bits = x.to(tl.int32, bitcast=True)
    sign = bits >> 31
    word = ((bits >> 1) ^ (sign & 0x3FFFFFFF)) - sign
    if not EXACT:
        word = word & -LANES
    word = tl.where(x == x, word, _NAN >> 1) + (LANES - 1 - lane - 2**30)
    if not ALL:
        word = tl.where(allowed, word, -(2**31))
    last = tl.zeros([x.shape[0], 1], tl.int32)
    words = tl.zeros([x.shape[0], CHOICES], tl.int32)
    unsure = tl.zeros([x.shape[0], 1], tl.int32)
    for k in range(K + (0 if EXACT else 1)):
        best = last + tl.max((word - last).to(tl.uint32, bitcast=True), 1)[:, None].to(tl.int32, bitcast=True)
        words = tl.where(column == k, best, words)
        if not EXACT:
            unsure = tl.where(((best ^ last) & -LANES) == 0, 1, unsure)  # the bits left out decide
        last = best
    chosen = LANES - 1 - (words & (LANES - 1))
    if not EXACT:  # noqa: SIM102 (decided when it is compiled, unlike the next)
        if tl.max(unsure) > 0:
            key = tl.where(allowed, rank(x), _LOWEST)
            for place in range(K):
                first = first_best(key, lane, LANES)
                chosen = tl.where(column == place, first, chosen)
                key = tl.where(lane == first, _LOWEST, key)
    return chosen


@triton.jit
def route_rows(
    logits, bias, ids, weights, first_row, end_row,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    CHOICES: tl.constexpr, SCORING: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, ZERO_SUM: tl.constexpr,
    BIAS_TOKENS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # Routes ROWS tokens from the first on, none from the end on. All logits are read once, for the choice, and the
    # chosen ones again; K ids and weights are all that is written. It chooses by the logits, or by their scores plus
    # bias. A group of SIZE experts has WIDTH lanes; BIAS_TOKENS tokens share a row of the bias.
    row = tl.arange(0, ROWS)[:, None]
    there = row < end_row - first_row
    lane = tl.arange(0, LANES)[None, :]
    expert = lane // WIDTH * SIZE + lane % WIDTH if GROUPS > 1 else lane
    allowed = tl.broadcast_to((lane % WIDTH < SIZE) & (expert < E), [ROWS, LANES])
    logits += first_row * E
    x = tl.load(logits + row * E + expert, mask=there & allowed, other=float("-inf")).to(tl.float32)

    if SCORING == "softmax" and NORM and ZERO_SUM != "eps":
        broken = tl.max(tl.where(x < float("inf"), 0, 1), 1)[:, None]  # by a NaN or +inf, chosen or not
    elif SCORING == "softmax":
        top = tl.max(tl.where(x == x, x, float("-inf")), 1)[:, None]
        top = tl.where(top == float("-inf"), 0.0, top)
        everything = tl.sum(tl.exp(x - top), 1)[:, None]
    value = x
    if BIAS_TOKENS > 0 or GROUPS > 1:
        value = score(x, SCORING)
    if BIAS_TOKENS > 0:
        at = (first_row + row) // BIAS_TOKENS * E + expert
        value += tl.load(bias + at, mask=there & allowed, other=0.0)
    if GROUPS > 1:
        allowed = in_best_groups(tl.where(allowed, rank(value), _LOWEST), GROUPS, KEPT, TOP2, WIDTH) > _LOWEST
    chosen_lane = best_lanes(value, allowed, K, CHOICES, EXACT, E == LANES and GROUPS == 1)
    chosen_id = chosen_lane // WIDTH * SIZE + chosen_lane % WIDTH if GROUPS > 1 else chosen_lane
    column = tl.arange(0, CHOICES)[None, :]
    kept = there & (column < K)
    # What follows is for few numbers a row. Read back, they lie one to a thread, not all in every thread of a warp.
    at = first_row * K + row * K + column
    tl.store(ids + at, chosen_id, mask=kept)
    tl.debug_barrier()
    chosen_id = tl.load(ids + at, mask=kept, other=0)
    chosen = tl.load(logits + row * E + chosen_id, mask=kept, other=float("-inf")).to(tl.float32)

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
    if SCORING == "softmax" and NORM and ZERO_SUM != "eps":
        weight = tl.where(broken > 0, float("nan"), weight)
    tl.store(weights + at, weight * SCALE, mask=kept)


@triton.jit
def route(
    logits, bias, ids, weights,
    tokens: tl.constexpr, E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    CHOICES: tl.constexpr, SCORING: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, ZERO_SUM: tl.constexpr,
    BIAS_TOKENS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # A program routes ROWS tokens. Up to 1,024 lanes it is one warp, which keeps its rows in registers.
    route_rows(
        logits, bias, ids, weights, tl.program_id(0).to(tl.int64) * ROWS, tokens, E, K, ROWS, LANES, CHOICES, SCORING,
        NORM, SCALE, ZERO_SUM, BIAS_TOKENS, GROUPS, KEPT, TOP2, SIZE, WIDTH, EXACT,
    )  # fmt: skip


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


def settings(
    logits, bias, lead, warps, *, top_k, scoring, norm_topk_prob, num_groups, group_top_k, group_score, scale, zero_sum
):
    """The bias as `route_rows` takes it, and its constants, for programs of so many warps."""
    experts, bias_tokens = logits.shape[-1], 0
    if bias is not None:
        bias, bias_tokens = _shared_by(bias, lead)
    tokens, (lanes, width) = math.prod(lead), _lanes(experts, num_groups)
    exact = bias is None and num_groups is None and lanes <= EXACT_LANES.get(logits.dtype.name, 0)
    return logits if bias is None else bias, {
        "E": experts,
        "K": top_k,
        # 32 logits a thread keep a warp busy, or 16 where those must be kept for a second look.
        "ROWS": max(1, min(warps * (1024 if exact else 512) // lanes, triton.next_power_of_2(tokens))),
        "LANES": lanes,
        "CHOICES": triton.next_power_of_2(top_k),
        "SCORING": scoring,
        "NORM": norm_topk_prob,
        "SCALE": scale,
        "ZERO_SUM": zero_sum,
        "BIAS_TOKENS": bias_tokens,
        "GROUPS": num_groups or 1,
        "KEPT": group_top_k or 1,
        "TOP2": group_score == "top2_sum",
        "SIZE": experts // (num_groups or 1),
        "WIDTH": width,
        "EXACT": exact,
    }


def route_topk(logits, bias=None, **params):
    lead = lead_axes((logits, 1), *([] if bias is None else [(bias, 1)]))
    logits = jnp.broadcast_to(logits, (*lead, logits.shape[-1]))
    bias, constants = settings(logits, bias, lead, 1, **params)
    tokens = math.prod(lead)
    # Fewer rows a program where multiprocessors would be idle: 16 warps for each of about 128.
    constants["ROWS"] = min(constants["ROWS"], triton.next_power_of_2(triton.cdiv(tokens, 2048)))
    return launch(
        route,
        logits,
        bias,
        out=[((*lead, params["top_k"]), dtype) for dtype in (jnp.int32, jnp.float32)],
        grid=triton.cdiv(tokens, constants["ROWS"]),
        num_warps=min(32, max(1, constants["LANES"] // 1024)),
        tokens=tokens,
        **constants,
    )
