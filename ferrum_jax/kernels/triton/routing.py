"""Routing: one launch, one read of all logits, and one of the chosen ones."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from . import launch, lead_axes

_LOWEST = tl.constexpr(-(2**31))  # below every rank: no expert, or one that is taken
_NAN = tl.constexpr(-(2**31) + 2**22)  # between that and the rank of -inf, also without the last 22 bits
_INF = tl.constexpr(0x7F800000)
_LOG_EPS = tl.constexpr(math.log(1e-20))
MAX_LANES = 16384
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

EXACT_LANES = {"bfloat16": 2**15, "float16": 2**12}  # up to which 31 bits have room for a whole logit and its lane

# What was changed, and what came of it: a warp's instructions per token, counted in the machine code for an H200 that
# Triton 3.6.0 makes of bfloat16, K=8, T=8192 at E=128 and 65,536 at E=256, and K=10, T=65,536 at E=512.
#
#   change                                                                        E=128   E=256   E=512
#   the best rank, then the least lane that has it; crossed out                   341     570
#   one maximum over rank and lane in one word; subtracted, not crossed out       185     480
#   four rows a warp also at E=256, so that the weights are divided among lanes   185     315
#   rank and word made in one; offsets of 32 bits in the tile                     174     293
#   ids stored and read back, so that weights are computed once, not in each lane 155     244
#   +inf looked for beside NaN: with a bias or groups it may not be chosen        162     252     560
#   each thread sorts its words, so that a round is one comparison and few moves  164     208     420
#   words of 32 bits that one addition makes of NaN and -0 too; and what NaNs     137     182     368
#     need apart, row by row: it is rare, and must not take the registers
#   loads without masks where all tokens are there                                133     177     361
#   words move up by a multiplication that is done or not, no selection           136     182     368
#
# On one H200, 2026-11-25, the sixth row's kernel took 3.8, 22.5 and 46.9 us, the last but one's 3.6, 19.0 and 37.7.
# What binds is the pipe of comparisons, selections and bit operations, which takes an instruction of a warp in two
# cycles: 88, 114 and 256 of the last but one's go there, 76, 90 and 216 of the last one's, whose moves the multiplier
# makes. On one H100, 2026-11-26, in turn, the last but one took 3.8, 19.3 and 37.8 us, the last 3.8, 17.1 and 34.0.
# Undone there, as changes of the last: neighbours of 16 bits loaded and put in order as one number, 3.8, 17.1 and
# 35.7; half as many rows a program 3.8, 24.5 and 50.0, twice as many 3.8, 18.1 and 33.5; two warps a program 4.5,
# 18.5 and 41.4; two of these turns a program 4.7, 18.5 and 37.7; logits asked for 2,048 programs ahead 5.9, 18.7 and
# 34.5.


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
def same_value(a, b, LANES: tl.constexpr):
    # Whether words differ in their lanes only.
    return (((a + 2 * LANES - 1) ^ (b + 2 * LANES - 1)) & (-2 * LANES)) == 0


@triton.jit
def columns(x, N: tl.constexpr):
    # The N columns, a tuple, of x[rows, threads, N].
    if N == 1:
        return (tl.reshape(x, [x.shape[0], x.shape[1]]),)
    else:
        a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], N // 2, 2]))
        return columns(a, N // 2) + columns(b, N // 2)


@triton.jit
def merge(a, b, N: tl.constexpr):
    # Two descending tuples of N as one, by Batcher's odd-even merging.
    if N == 1:
        return (tl.maximum(a[0], b[0]), tl.minimum(a[0], b[0]))
    else:
        even, odd = merge(a[::2], b[::2], N // 2), merge(a[1::2], b[1::2], N // 2)
        merged = even[:1]
        for i in tl.static_range(N - 1):
            merged += (tl.maximum(even[i + 1], odd[i]), tl.minimum(even[i + 1], odd[i]))
        return merged + odd[N - 1 :]


@triton.jit
def sort(x, N: tl.constexpr):
    # A tuple of N, descending.
    if N == 1:
        return x
    else:
        return merge(sort(x[: N // 2], N // 2), sort(x[N // 2 :], N // 2), N // 2)


@triton.jit
def one_unknown(like):
    # 1, which the compiler does not know of: a block's height in threads.
    if INTERPRETED:
        return like
    else:
        return tl.inline_asm_elementwise("mov.u32 $0, %ntid.y;", "=r,r", [like], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def chosen_by_multiplier(condition, a, b, one):
    # tl.where, by a multiplication that is done or not: the pipe for comparisons and selections is what the kernel
    # waits for, the multiplier has time.
    if INTERPRETED:
        return tl.where(condition, a, b)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p mul.lo.s32 $0, $3, $4; }",
            "=r,0,r,r,r",
            [b, condition.to(tl.int32), a, one],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def best_by_sorting(word, K: tl.constexpr, CHOICES: tl.constexpr, EXACT: tl.constexpr, VECTOR: tl.constexpr):
    # Each thread sorts the words that it holds of a row, VECTOR neighbours or several times as many. Then, K times, the
    # largest of the threads' first ones is taken, and the others of its thread move up.
    ROWS: tl.constexpr = word.shape[0]
    LANES: tl.constexpr = word.shape[1]
    THREADS: tl.constexpr = min(32, LANES // VECTOR)
    N: tl.constexpr = LANES // THREADS
    own = tl.permute(tl.reshape(word, [ROWS, N // VECTOR, THREADS, VECTOR]), [0, 2, 1, 3])
    own = sort(columns(tl.reshape(own, [ROWS, THREADS, N]), N), N)
    own += (tl.full([ROWS, THREADS], _LOWEST, tl.int32),)
    column = tl.arange(0, CHOICES)[None, :]
    words = tl.zeros([ROWS, CHOICES], tl.int32)
    unsure = tl.zeros([ROWS, 1], tl.int32)
    COUNT: tl.constexpr = K if EXACT else K + 1
    one = one_unknown(own[0])
    first = tl.max(own[0], 1)[:, None]
    last = first
    for k in tl.static_range(COUNT):
        best = first if k == 0 else tl.max(own[0], 1)[:, None]
        words = tl.where(column == k, best, words)
        if k > 0 and not EXACT:
            unsure = tl.where(same_value(best, last, LANES), 1, unsure)
        last = best
        taken = own[0] == best
        for i in tl.static_range(min(N, COUNT - 1 - k)):
            moved = chosen_by_multiplier(taken, own[i + 1], own[i], one)
            own = own[:i] + (moved,) + own[i + 1 :]  # noqa: RUF005 (Triton knows no unpacking)
    return words, first, unsure


@triton.jit
def best_in_turn(word, K: tl.constexpr, CHOICES: tl.constexpr, EXACT: tl.constexpr):
    # The same, for many lanes or choices: the largest of all is crossed out.
    column = tl.arange(0, CHOICES)[None, :]
    words = tl.zeros([word.shape[0], CHOICES], tl.int32)
    first = tl.max(word, 1)[:, None]
    last = first
    unsure = tl.zeros([word.shape[0], 1], tl.int32)
    for k in range(K if EXACT else K + 1):
        best = tl.max(word, 1)[:, None]
        words = tl.where(column == k, best, words)
        if not EXACT:
            unsure = tl.where((k > 0) & same_value(best, last, word.shape[1]), 1, unsure)
        last = best
        word = tl.where(word == best, _LOWEST, word)
    return words, first, unsure


@triton.jit
def best_lanes(
    x, allowed, K: tl.constexpr, CHOICES: tl.constexpr, EXACT: tl.constexpr, ALL: tl.constexpr, VECTOR: tl.constexpr
):
    # The allowed lanes with each row's K best values, of equal ones the first: [rows, CHOICES]; whether the best is NaN
    # or +inf; and whether it is NaN, which ranks last, or the bits decide that a word has no room for.
    LANES: tl.constexpr = x.shape[1]
    lane = tl.arange(0, LANES)[None, :]
    # One word says where a value is among all, by its bits as a number, and less than its distance from the next below
    # it, twice the lane: one maximum finds both. To add 0 makes +0 of -0, and on a GPU every NaN the one above +inf.
    if INTERPRETED:  # by a NumPy that may flush subnormals to 0 and keeps the NaNs' signs
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(bits == _LOWEST, 0, tl.where(x == x, bits, 0x7FFFFFFF))
    else:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
    if not EXACT:
        bits = bits & (-2 * LANES)
    sign = bits >> 31
    word = (bits ^ (sign ^ (sign << 31))) - 2 * lane  # with "& 0x7FFFFFFF", as one would write it, LLVM does worse
    if not ALL:
        word = tl.where(allowed, word, _LOWEST)
    if VECTOR > 0:
        words, first, unsure = best_by_sorting(word, K, CHOICES, EXACT, VECTOR)
    else:
        words, first, unsure = best_in_turn(word, K, CHOICES, EXACT)
    return (-words >> 1) & (LANES - 1), first > _INF - 2 * LANES, tl.where(first > _INF, 1, unsure)


@triton.jit
def best_by_rank(x, allowed, K: tl.constexpr, CHOICES: tl.constexpr):
    # The same lanes from whole values, of which NaN is the last.
    lane, column = tl.arange(0, x.shape[1])[None, :], tl.arange(0, CHOICES)[None, :]
    key = tl.where(allowed, rank(x), _LOWEST)
    chosen = tl.zeros([x.shape[0], CHOICES], tl.int32)
    for place in range(K):
        best = first_best(key, lane, x.shape[1])
        chosen = tl.where(column == place, best, chosen)
        key = tl.where(lane == best, _LOWEST, key)
    return chosen


@triton.jit
def name_of(lane, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    return lane // WIDTH * SIZE + lane % WIDTH  # a group of SIZE experts has WIDTH lanes


@triton.jit
def route_rows(
    logits, bias, ids, weights, first_row, end_row,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    CHOICES: tl.constexpr, SCORING: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, ZERO_SUM: tl.constexpr,
    BIAS_TOKENS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr, weigh,
):  # fmt: skip
    # Routes ROWS tokens from the first on, none from the end on; WHOLE: all are there. All logits are read once, for
    # the choice, and the chosen ones again, if they are weighed; K ids and weights are all that is written. It chooses
    # by the logits, or by their scores plus bias. A group of SIZE experts has WIDTH lanes; BIAS_TOKENS tokens share a
    # row of the bias.
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
        allowed = in_best_groups(tl.where(allowed, rank(value), _LOWEST), GROUPS, KEPT, TOP2, WIDTH) > _LOWEST
    chosen, broken, unsure = best_lanes(value, allowed, K, CHOICES, EXACT, ALL, VECTOR)
    if BIAS_TOKENS > 0 or GROUPS > 1:  # the NaN or +inf that breaks a row may not be chosen
        broken = tl.max(tl.where(x < float("inf"), 0, 1), 1)[:, None] > 0
    column = tl.arange(0, CHOICES)[None, :]
    kept = there & (column < K)
    # What follows is for few numbers a row. Read back, they lie one to a thread, not all in every thread of a warp.
    # Each place is written once: other programs may write the same, and read it back while this one is still here.
    at = first_row * K + row * K + column
    if tl.max(unsure) == 0:
        tl.store(ids + at, name_of(chosen, SIZE, WIDTH), mask=kept)
    elif BIAS_TOKENS > 0 or GROUPS > 1:
        tl.store(ids + at, name_of(best_by_rank(value, allowed, K, CHOICES), SIZE, WIDTH), mask=kept)
    else:  # rare, so that it is no use to keep so many registers for it: row by row
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
    # A program routes ROWS tokens. Up to 1,024 lanes it is one warp, which keeps its rows in registers.
    route_rows(
        logits, bias, ids, weights, tl.program_id(0).to(tl.int64) * ROWS, tokens, E, K, ROWS, LANES, CHOICES, SCORING,
        NORM, SCALE, ZERO_SUM, BIAS_TOKENS, GROUPS, KEPT, TOP2, SIZE, WIDTH, EXACT, VECTOR, WHOLE, True,
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
    logits, bias, lead, warps, most_rows,
    *, top_k, scoring, norm_topk_prob, num_groups, group_top_k, group_score, scale, zero_sum,
):  # fmt: skip
    """The bias as `route_rows` takes it, and its constants, for programs of so many warps and rows."""
    experts, bias_tokens = logits.shape[-1], 0
    if bias is not None:
        bias, bias_tokens = _shared_by(bias, lead)
    lanes, width = _lanes(experts, num_groups)
    plain = bias is None and num_groups is None
    # 32 logits a thread keep a warp busy, or 16 where those must be kept for a second look.
    rows = max(1, min(warps * (1024 if plain else 512) // lanes, triton.next_power_of_2(most_rows)))
    # How many neighbours of a row a thread holds, where threads sort: where their words and the choices are few.
    vector = min(16 // logits.dtype.itemsize, max(1, rows * lanes // (32 * warps)), lanes)
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
        "VECTOR": vector if lanes <= 512 and top_k <= 16 else 0,
    }


def route_topk(logits, bias=None, **params):
    lead = lead_axes((logits, 1), *([] if bias is None else [(bias, 1)]))
    logits = jnp.broadcast_to(logits, (*lead, logits.shape[-1]))
    tokens = math.prod(lead)
    # Fewer rows a program where multiprocessors would be idle: 16 warps for each of about 128.
    bias, constants = settings(logits, bias, lead, 1, triton.cdiv(tokens, 2048), **params)
    return launch(
        route,
        logits,
        bias,
        out=[((*lead, params["top_k"]), dtype) for dtype in (jnp.int32, jnp.float32)],
        grid=triton.cdiv(tokens, constants["ROWS"]),
        num_warps=min(32, max(1, constants["LANES"] // 1024)),
        tokens=tokens,
        WHOLE=tokens % constants["ROWS"] == 0,
        **constants,
    )
