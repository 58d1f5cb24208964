"""Routing in one launch. It reads all logits once, and the chosen ones once more."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from ..shapes import lead_axes, shared_by
from . import tiles
from .launch import capability, launch
from .ranking import LOWEST, best_by_rank, best_lanes, in_best_groups, rank

_LOG_EPS = tl.constexpr(math.log(1e-20))
EXACT_LANES = {"bfloat16": 2**15, "float16": 2**12}  # up to which 31 bits have room for a whole logit and its lane


@triton.jit
def exp(x):
    # e^x of x <= 0, to 2 ulp. tl.exp rounds x / log(2) first, so its error grows with |x|: enough to change a choice.
    x = tl.where(x < -104.0, -104.0, x)
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - whole * 0.693359375) + whole * 2.12194440e-4  # log(2) in two parts
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(whole)


@triton.jit
def exponent(x, SCORING: tl.constexpr):
    # A score is factor * e^exponent, so that scores which are too small for a float can still be compared.
    if SCORING == "sigmoid":
        return tl.where(x > 0.0, 0.0, x)
    elif SCORING == "sqrt_softplus":
        return tl.where(x >= -40.0, 0.0, x + 40.0) * 0.5
    else:
        return x


@triton.jit
def factor(x, SCORING: tl.constexpr):
    # See `exponent`.
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
    # The score of each lane, to which a bias is added. A lane without an expert holds -inf.
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
def name_of(lane, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    # The expert of a lane: a group of SIZE experts has WIDTH lanes.
    return lane // WIDTH * SIZE + lane % WIDTH


@triton.jit
def route_rows(
    logits, bias, ids, weights, first_row, end_row,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    CHOICES: tl.constexpr, SCORING: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, ZERO_SUM: tl.constexpr,
    BIAS_TOKENS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr, weigh,
):  # fmt: skip
    # Routes ROWS tokens from `first_row` on, as far as they are before `end_row`; WHOLE says that they all are. It
    # reads all logits once, chooses K of them (with a bias or groups: of their scores) and writes the ids. If `weigh`,
    # it reads the chosen logits again and writes their weights. BIAS_TOKENS neighbouring tokens share a row of the
    # bias.
    row = tl.arange(0, ROWS)[:, None]
    there = row < end_row - first_row
    lane = tl.arange(0, LANES)[None, :]
    expert = name_of(lane, SIZE, WIDTH)
    allowed = tl.broadcast_to((lane % WIDTH < SIZE) & (expert < E), [ROWS, LANES])
    logits += first_row * E
    ALL: tl.constexpr = E == LANES and GROUPS == 1
    if ALL and WHOLE:
        x = tl.load(logits + row * E + expert).to(tl.float32)
    else:
        x = tl.load(logits + row * E + expert, mask=there & allowed, other=float("-inf")).to(tl.float32)

    if SCORING == "softmax" and (not NORM or ZERO_SUM == "eps"):
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
        allowed = in_best_groups(tl.where(allowed, rank(value), LOWEST), GROUPS, KEPT, TOP2, WIDTH) > LOWEST
    chosen, broken, unsure = best_lanes(value, allowed, K, CHOICES, EXACT, ALL, VECTOR)
    if BIAS_TOKENS > 0 or GROUPS > 1:  # the NaN or +inf that makes weights NaN may not be chosen
        broken = tl.max(tl.where(x < float("inf"), 0, 1), 1)[:, None] > 0
    column = tl.arange(0, CHOICES)[None, :]
    kept = there & (column < K)
    # The weights are computed from ids that are stored and read back: then each thread of a warp holds one of them, not
    # all. Each id is written once and never changed, because other programs, which write the same, may read it already.
    at = first_row * K + row * K + column
    if tl.max(unsure) == 0:
        tl.store(ids + at, name_of(chosen, SIZE, WIDTH), mask=kept)
    elif BIAS_TOKENS > 0 or GROUPS > 1:
        tl.store(ids + at, name_of(best_by_rank(value, allowed, K, CHOICES), SIZE, WIDTH), mask=kept)
    else:  # this is rare, so it goes row by row, to need few registers
        for i in range(ROWS):
            here = tl.full([1, 1], i, tl.int32) < end_row - first_row
            one = tl.load(logits + i * E + lane, mask=here & (lane < E), other=float("-inf")).to(tl.float32)
            best = best_by_rank(one, lane < E, K, CHOICES)
            tl.store(ids + (first_row + i) * K + column, best, mask=here & (column < K))
    if weigh:
        tl.debug_barrier()
        chosen_id = tl.load(ids + at, mask=kept, other=0)
        logit = tl.load(logits + row * E + chosen_id, mask=kept, other=float("-inf")).to(tl.float32)

        power = exponent(logit, SCORING)
        base = tl.zeros([ROWS, 1], tl.float32)
        if NORM:
            base = tl.max(power, 1)[:, None]
            base = tl.where(base == float("-inf"), 0.0, base)
        elif SCORING == "softmax":
            base = top
        weight = tl.where(column < K, factor(logit, SCORING) * tl.exp(power - base), 0.0)
        if NORM or SCORING == "softmax":
            total = tl.sum(weight, 1)[:, None] if NORM else everything
            if NORM and ZERO_SUM == "eps" and SCORING == "softmax":
                total += tl.exp(top - base + _LOG_EPS) * everything
            elif NORM and ZERO_SUM == "eps" and SCORING != "topk_softmax":
                total += tl.exp(-base + _LOG_EPS)
            otherwise: tl.constexpr = 1.0 / K if NORM and ZERO_SUM == "uniform" else 0.0
            weight = tl.where(total == 0.0, otherwise, weight / tl.where(total == 0.0, 1.0, total))
        if SCORING == "softmax" and NORM and ZERO_SUM != "eps":
            weight = tl.where(broken, float("nan"), weight)
        tl.store(weights + at, weight * SCALE, mask=kept)


@triton.jit
def route(
    logits, bias, ids, weights,
    tokens: tl.constexpr, E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    CHOICES: tl.constexpr, SCORING: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, ZERO_SUM: tl.constexpr,
    BIAS_TOKENS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    # A program routes ROWS tokens, whose logits it keeps in registers. It is one warp, unless a token has many logits.
    route_rows(
        logits, bias, ids, weights, tl.program_id(0).to(tl.int64) * ROWS, tokens, E, K, ROWS, LANES, CHOICES, SCORING,
        NORM, SCALE, ZERO_SUM, BIAS_TOKENS, GROUPS, KEPT, TOP2, SIZE, WIDTH, EXACT, VECTOR, WHOLE, True,
    )  # fmt: skip


def _chosen():
    return tiles.first(tiles.ROUTING, capability())


def _lanes(experts, num_groups):
    """The lanes of a row, and of a group in it: powers of two. Each group is filled up by itself."""
    if num_groups is None:
        lanes = triton.next_power_of_2(experts)
        return lanes, lanes
    width = triton.next_power_of_2(experts // num_groups)
    return triton.next_power_of_2(num_groups) * width, width


SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrt_softplus")  # those that the kernel computes


def refuse(call):
    if call.params.get("scoring", SCORINGS[0]) not in SCORINGS:
        return f"its kernel does not compute the scores of {call.params['scoring']!r}"
    experts, groups = call.sizes["E"], call.params.get("num_groups")
    lanes, _ = _lanes(experts, groups)
    if lanes <= tiles.MOST_LANES:
        return None
    of, most = f" in {groups} groups" if groups else "", tiles.MOST_LANES
    return f"a program holds a token's logits in registers, {most} lanes at most; {experts}{of} take {lanes}"


def settings(
    logits, bias, lead, warps, most_rows,
    *, top_k, scoring, norm_topk_prob, num_groups, group_top_k, group_score, scale, zero_sum,
):  # fmt: skip
    """The bias and the constants of `route_rows`, for programs of so many warps that take `most_rows` or fewer."""
    chosen, experts, bias_tokens = _chosen(), logits.shape[-1], 0
    if bias is not None:
        bias, bias_tokens = shared_by(bias, lead)
    lanes, width = _lanes(experts, num_groups)
    plain, threads = bias is None and num_groups is None, 32 * warps
    rows = threads * (chosen.logits if plain else chosen.twice) // lanes
    rows = max(1, min(rows, triton.next_power_of_2(most_rows)))
    vector = min(chosen.vector // logits.dtype.itemsize, max(1, rows * lanes // threads), lanes)
    sorts = lanes <= chosen.sorted_lanes and top_k <= chosen.sorted_choices
    return logits if bias is None else bias, {
        "E": experts,
        "K": top_k,
        "ROWS": rows,
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
        "EXACT": plain and lanes <= EXACT_LANES.get(logits.dtype.name, 0),
        "VECTOR": vector if sorts else 0,
    }


def route_topk(logits, bias=None, **params):
    lead = lead_axes((logits, 1), (bias, 1))
    logits = jnp.broadcast_to(logits, (*lead, logits.shape[-1]))
    chosen, tokens = _chosen(), math.prod(lead)
    bias, constants = settings(logits, bias, lead, 1, triton.cdiv(tokens, chosen.programs), **params)
    return launch(
        route,
        logits,
        bias,
        out=[((*lead, params["top_k"]), dtype) for dtype in (jnp.int32, jnp.float32)],
        grid=triton.cdiv(tokens, constants["ROWS"]),
        num_warps=min(chosen.most_warps, max(1, constants["LANES"] // chosen.lanes)),
        tokens=tokens,
        WHOLE=tokens % constants["ROWS"] == 0,
        **constants,
    )
