"""The best K of a row's lanes, by one rule on every platform: see `rank`. A lane holds one expert's logit or score.

A row is [tokens, lanes] of a tile. Helpers of `routing.py`, compiled into its kernels.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))  # below every rank: a lane without an expert, or one that is taken already
NAN = tl.constexpr(-(2**31) + 2**22)  # between that and the rank of -inf, also without the last 22 bits
INF = tl.constexpr(0x7F800000)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rank(x):
    # An int32 that is greater the greater the float32 is: -0 counts as +0, and NaN of either sign ranks below -inf.
    bits = x.to(tl.int32, bitcast=True)
    sign = bits >> 31
    return tl.where(x == x, (bits ^ (sign & 0x7FFFFFFF)) - sign, NAN)


@triton.jit
def unrank(key):
    # The float32 of a rank that is not NaN's.
    sign = key >> 31
    return ((key + sign) ^ (sign & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_best(key, name, none):
    # The smallest name among those with the largest rank of their row; `none` is greater than all names.
    return tl.min(tl.where(key == tl.max(key, 1)[:, None], name, none), 1)[:, None]


@triton.jit
def in_best_groups(key, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, WIDTH: tl.constexpr):
    # The ranks [rows, lanes], where WIDTH lanes are a group. Outside of a row's KEPT best groups they become the
    # lowest. A group is worth its best lane or, with TOP2, the sum of its two best.
    WIDE: tl.constexpr = key.shape[1] // WIDTH
    by_group = tl.reshape(key, [key.shape[0], WIDE, WIDTH])
    best = tl.max(by_group, 2)
    if TOP2:
        lane = tl.arange(0, WIDTH)[None, None, :]
        largest = tl.min(tl.where(by_group == best[:, :, None], lane, WIDTH), 2)
        second = tl.max(tl.where(lane == largest[:, :, None], LOWEST, by_group), 2)
        best = rank(unrank(best) + unrank(second))
    group = tl.arange(0, WIDE)[None, :]
    best = tl.where(group < GROUPS, best, LOWEST)
    kept = tl.zeros([key.shape[0], WIDE], tl.int32)
    for _ in range(KEPT):
        first = first_best(best, group, WIDE)
        kept = tl.where(group == first, 1, kept)
        best = tl.where(group == first, LOWEST, best)
    return tl.reshape(tl.where(kept[:, :, None] > 0, by_group, LOWEST), key.shape)


@triton.jit
def same_value(a, b, LANES: tl.constexpr):
    # Whether two words hold the same value, in whatever lanes.
    return (((a + 2 * LANES - 1) ^ (b + 2 * LANES - 1)) & (-2 * LANES)) == 0


@triton.jit
def columns(x, N: tl.constexpr):
    # The N columns of x[rows, threads, N], as a tuple.
    if N == 1:
        return (tl.reshape(x, [x.shape[0], x.shape[1]]),)
    else:
        a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], N // 2, 2]))
        return columns(a, N // 2) + columns(b, N // 2)


@triton.jit
def merge(a, b, N: tl.constexpr):
    # Merges two descending tuples of N, by Batcher's odd-even network.
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
    # Sorts a tuple of N, descending.
    if N == 1:
        return x
    else:
        return merge(sort(x[: N // 2], N // 2), sort(x[N // 2 :], N // 2), N // 2)


@triton.jit
def one_unknown(like):
    # A 1 that the compiler cannot replace by a constant: the height of a block in threads.
    if INTERPRETED:
        return like
    else:
        return tl.inline_asm_elementwise("mov.u32 $0, %ntid.y;", "=r,r", [like], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def chosen_by_multiplier(condition, a, b, one):
    # tl.where(condition, a, b), as a multiplication of a by 1 that is done only if the condition holds. The kernel's
    # time is that of the GPU's pipe for comparisons and selections, while the multiplier is idle.
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
    # The K greatest words of each row. Each thread sorts its own words of the row, which are VECTOR neighbours or
    # several groups of these. Then, K times, the greatest first word of all threads is taken, and its thread's others
    # move up.
    ROWS: tl.constexpr = word.shape[0]
    LANES: tl.constexpr = word.shape[1]
    THREADS: tl.constexpr = min(32, LANES // VECTOR)
    N: tl.constexpr = LANES // THREADS
    own = tl.permute(tl.reshape(word, [ROWS, N // VECTOR, THREADS, VECTOR]), [0, 2, 1, 3])
    own = sort(columns(tl.reshape(own, [ROWS, THREADS, N]), N), N)
    own += (tl.full([ROWS, THREADS], LOWEST, tl.int32),)
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
    # The same, for many lanes or choices: K times, the greatest word of the row is taken and crossed out.
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
        word = tl.where(word == best, LOWEST, word)
    return words, first, unsure


@triton.jit
def best_lanes(
    x, allowed, K: tl.constexpr, CHOICES: tl.constexpr, EXACT: tl.constexpr, ALL: tl.constexpr, VECTOR: tl.constexpr
):
    # Returns the allowed lanes with each row's K best values, of equal values the first lane, as [rows, CHOICES];
    # whether the best value is NaN or +inf; and whether the lanes are unsure. They are if a value is NaN, which a word
    # ranks first though it ranks last, or if values differ only in bits that a word has no room for.
    LANES: tl.constexpr = x.shape[1]
    lane = tl.arange(0, LANES)[None, :]
    # Pack value and lane into one int32: the value's bits in an order that ascends with it, minus 2 * lane. As 2 * lane
    # is smaller than the gap to the next value, one maximum finds the best value and its first lane. Adding 0 turns -0
    # into +0 and, on a GPU, every NaN into the one whose bits are above those of +inf.
    if INTERPRETED:  # NumPy may flush subnormals to 0, and keeps the signs of NaN
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(bits == LOWEST, 0, tl.where(x == x, bits, 0x7FFFFFFF))
    else:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
    if not EXACT:
        bits = bits & (-2 * LANES)
    sign = bits >> 31
    word = (bits ^ (sign ^ (sign << 31))) - 2 * lane  # LLVM makes worse code of "& 0x7FFFFFFF"
    if not ALL:
        word = tl.where(allowed, word, LOWEST)
    if VECTOR > 0:
        words, first, unsure = best_by_sorting(word, K, CHOICES, EXACT, VECTOR)
    else:
        words, first, unsure = best_in_turn(word, K, CHOICES, EXACT)
    return (-words >> 1) & (LANES - 1), first > INF - 2 * LANES, tl.where(first > INF, 1, unsure)


@triton.jit
def best_by_rank(x, allowed, K: tl.constexpr, CHOICES: tl.constexpr):
    # The same lanes, without any that is unsure: whole values are compared, by rank.
    lane, column = tl.arange(0, x.shape[1])[None, :], tl.arange(0, CHOICES)[None, :]
    key = tl.where(allowed, rank(x), LOWEST)
    chosen = tl.zeros([x.shape[0], CHOICES], tl.int32)
    for place in range(K):
        best = first_best(key, lane, x.shape[1])
        chosen = tl.where(column == place, best, chosen)
        key = tl.where(lane == best, LOWEST, key)
    return chosen
