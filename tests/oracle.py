"""What the operations mean, as NumPy loops in float64, written from the contract and from nothing else.

Every oracle works on one slice (no leading axes). Each result is a `Sum`: its value, and what bounds the error that a
right implementation may have. See `assert_close`.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Sum(NamedTuple):
    """A float result, or, without a size, one that must be exact.

    size is the sum of its terms' magnitudes, terms how many they are (None: not known), and rounded the error that
    documented roundings to 16 bits on the way may add, which a case that has some explains.
    """

    value: Any
    size: Any = None
    terms: int | None = None
    rounded: Any = 0.0


def f64(x):
    return np.asarray(x).astype(np.float64)


def rank_key(x):
    """Order of logits: by float32 value, -0 as +0, NaN of either sign below everything."""
    bits = int(np.float32(x).view(np.int32))
    if np.isnan(np.float32(x)):
        return -(2**31)
    if bits == -(2**31):
        bits = 0
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


def route_topk_softmax(logits, *, top_k, norm_topk_prob=True):
    x = np.asarray(logits).astype(np.float32)
    ids = np.zeros((len(x), top_k), np.int64)
    weights = np.zeros((len(x), top_k))
    for t, row in enumerate(x):
        order = sorted(range(len(row)), key=lambda e, row=row: (-rank_key(row[e]), e))
        ids[t] = order[:top_k]
        if np.isnan(row).any() or (row == np.inf).any():
            weights[t] = np.nan
        elif (row == -np.inf).all():
            weights[t] = 1 / top_k if norm_topk_prob else 0
        else:
            p = np.exp(row.astype(np.float64) - float(row.max()))
            p /= p.sum()
            weights[t] = p[ids[t]] / (p[ids[t]].sum() if norm_topk_prob else 1)
    return Sum(ids), Sum(weights, np.abs(weights))


def log_scores(x, scoring):
    """Each expert's score as a logarithm, where nothing underflows; -inf masks an expert."""
    x = f64(x)
    with np.errstate(all="ignore"):
        if scoring == "softmax":
            top = 0 if (x == -np.inf).all() else x.max()
            return x - top - np.log(np.sum(np.exp(x - top))) if (x > -np.inf).any() or np.isnan(x).any() else x
        if scoring == "sigmoid":
            return -np.logaddexp(0, -x)
        if scoring == "sqrt_softplus":
            return np.where(x < -30, x / 2, np.log(np.logaddexp(0, np.maximum(x, -30))) / 2)
    return x


def topk_weights(x, ids, *, scoring, norm_topk_prob, scale, zero_sum):
    """The weights of one token's experts `ids`; of one outside [0, E), 0."""
    ids = np.asarray(ids)
    live = (ids >= 0) & (ids < len(x))
    weights = np.zeros(len(ids))
    logs = log_scores(x, scoring)[ids[live]]
    with np.errstate(all="ignore"):
        if scoring != "topk_softmax" and not norm_topk_prob:
            weights[live] = np.exp(logs)
        elif (logs == -np.inf).all():
            weights[live] = 1 / len(ids) if zero_sum == "uniform" else 0
        elif np.isnan(logs).any() or (scoring == "topk_softmax" and np.inf in logs):
            weights[live] = np.nan
        elif np.inf in logs:
            weights[live] = np.where(logs == np.inf, np.nan, 0)
        else:
            most = logs.max()
            total = np.sum(np.exp(logs - most))
            if zero_sum == "eps" and scoring != "topk_softmax":
                total += np.exp(np.log(1e-20) - most)
            weights[live] = np.exp(logs - most) / total
    return weights * np.float64(np.float32(scale))


class Undecided(Exception):
    """Scores so close that implementations may differ: an oracle of exact ids needs other arguments."""


class Contest:
    """Who ranks before whom, as far as 8 ulp decide it: values with a margin, which a NaN or an infinity has not."""

    def __init__(self, values, terms, source):
        """`terms` bound the size of what was added up to each value; equal `source`s have equal values."""
        self.values, self.source = values, source
        with np.errstate(all="ignore"):
            half = 4 * np.spacing(np.maximum(terms, np.finfo(np.float32).tiny).astype(np.float32)).astype(np.float64)
            half += np.finfo(np.float32).tiny  # below it, floats are 0 on some platforms
            half = np.where(np.isfinite(values), half, 0)
            self.low, self.high = values - half, values + half

    def before(self, i, j):
        """i ranks before j on every implementation."""
        a, b = np.isnan(self.values[i]), np.isnan(self.values[j])
        if a or b:
            return b and (not a or i < j)
        equal = self.source[i] == self.source[j] or (
            not np.isfinite(self.values[i]) and self.values[i] == self.values[j]
        )
        return i < j if equal else self.low[i] > self.high[j]


def contests(x, bias, scoring, num_groups, group_score):
    """The experts' contest and the groups'."""
    x = np.asarray(x).astype(np.float32)
    with np.errstate(all="ignore"):
        logs = log_scores(x, scoring)
        scores = f64(x) if scoring == "topk_softmax" else np.exp(logs)
        added = np.zeros(len(x)) if bias is None else f64(np.float32(bias))
        biased = scores + added
        biased = np.where(np.abs(biased) > np.finfo(np.float32).max, np.sign(biased) * np.inf, biased)
        # What a score is computed from, in float32: logits so near 0, or so low, that their scores are equal, are one.
        seen = x - x.max() if scoring == "softmax" and np.isfinite(x.max()) else x + 0
        if scoring != "topk_softmax":
            seen = np.where(np.abs(seen) < 1e-30, np.float32(0), np.where(scores < 1e-46, -np.inf, seen))
    sources = list(zip(seen.tolist(), added.tolist(), strict=True))
    sizes = np.maximum(np.abs(scores), np.abs(added))
    experts = Contest(biased, sizes, sources)
    members = np.arange(len(x)).reshape(num_groups or 1, -1)
    best = [sorted(group, key=lambda e: (np.isnan(biased[e]), -biased[e], e)) for group in members]
    best = [group[: 2 if group_score == "top2_sum" else 1] for group in best]
    with np.errstate(all="ignore"):
        sums = np.array([biased[group].sum() for group in best])
        # The margin of a sum is those of its terms and of their addition.
        terms = [4 * sizes[group].sum() if len(group) > 1 else sizes[group].sum() for group in best]
    return experts, Contest(sums, np.array(terms), [[sources[e] for e in group] for group in best]), members


def choose(experts, groups, members, *, top_k, group_top_k):
    """The ids, and whether 8 ulp decide each of them and the groups."""
    kept, sure = best_of(groups, range(len(members)), group_top_k or len(members))
    ids, decided = best_of(experts, np.sort(members[kept].reshape(-1)), top_k)
    return ids, sure and decided


def best_of(contest, names, count):
    order = sorted(names, key=lambda i: (np.isnan(contest.values[i]), -np.nan_to_num(contest.values[i], nan=0), i))
    sure = all(contest.before(a, b) for a, b in itertools.pairwise(order[: count + 1]))
    return order[:count], sure


def check_choice(ids, experts, groups, members, *, group_top_k):
    """One token's ids are a choice that the margins allow; where these decide everything, it is the only one."""
    ids = [int(e) for e in ids]
    assert len(set(ids)) == len(ids), ids
    assert all(0 <= e < len(experts.values) for e in ids), ids
    kept = group_top_k or len(members)
    everyone = range(len(members))
    may = [g for g in everyone if sum(groups.before(h, g) for h in everyone if h != g) < kept]
    must = [g for g in everyone if sum(not groups.before(g, h) for h in everyone if h != g) < kept]
    used = {e // members.shape[1] for e in ids}
    assert used <= set(may), (used, may)
    assert len(used | set(must)) <= kept, (used, must)
    for a, b in itertools.pairwise(ids):
        assert not experts.before(b, a), (a, b)
    for e in set(members[must].reshape(-1).tolist() if must else []) - set(ids):
        assert not experts.before(e, ids[-1]), (e, ids[-1])


def route_topk(
    logits,
    bias=None,
    *,
    top_k,
    scoring="softmax",
    norm_topk_prob=True,
    num_groups=None,
    group_top_k=None,
    group_score="top2_sum",
    scale=1.0,
    zero_sum="uniform",
    got=None,
):
    """The ids and weights; with the ids that an implementation `got`, these checked, and their weights."""
    x = np.asarray(logits).astype(np.float32)
    ids, weights = np.zeros((len(x), top_k), np.int64), np.zeros((len(x), top_k))
    grouped = num_groups is not None and group_top_k < num_groups
    for t, row in enumerate(x):
        if bias is None and not grouped:
            ids[t] = sorted(range(len(row)), key=lambda e, row=row: (-rank_key(row[e]), e))[:top_k]
        else:
            contest = contests(row, bias, scoring, num_groups if grouped else None, group_score)
            limit = group_top_k if grouped else None
            if got is None:
                ids[t], decided = choose(*contest, top_k=top_k, group_top_k=limit)
                if not decided:
                    raise Undecided
            else:
                check_choice(got[t], *contest, group_top_k=limit)
                ids[t] = got[t]
        weights[t] = topk_weights(
            row, ids[t], scoring=scoring, norm_topk_prob=norm_topk_prob, scale=scale, zero_sum=zero_sum
        )
        if scoring == "softmax" and (np.isnan(row).any() or np.inf in row):
            weights[t] = np.nan
    # Scores below the smallest normal float32 may be 0, and are then scaled.
    return Sum(ids), Sum(weights, np.abs(weights) + np.abs(scale) * 1e-33)


def sorted_pairs(expert_ids, num_experts):
    """Pair ids by expert, ascending inside an expert; and each expert's."""
    flat = [int(e) for e in np.asarray(expert_ids).reshape(-1)]
    lists = [[p for p, e in enumerate(flat) if e == expert] for expert in range(num_experts)]
    return [p for pairs in lists for p in pairs], lists


def moe_build_pairs_by_token(expert_ids, *, num_experts):
    num_tokens, top_k = np.shape(expert_ids)
    order, lists = sorted_pairs(expert_ids, num_experts)
    pairs = np.full((num_tokens, top_k), -1)
    tokens = np.full(num_tokens * top_k, num_tokens)
    for row, p in enumerate(order):
        pairs[p // top_k, p % top_k] = row
        tokens[row] = p // top_k
    offsets = np.cumsum([0] + [len(pairs) for pairs in lists])
    return Sum(pairs), Sum(tokens), Sum(offsets)


def aligned(expert_ids, *, num_experts, block_size, pair_ids):
    num_pairs = np.size(expert_ids)
    order, lists = sorted_pairs(expert_ids, num_experts)
    row_of = {p: row for row, p in enumerate(order)}
    busy = min(num_experts, num_pairs)
    num_blocks = busy + (num_pairs - busy) // block_size
    slots, blocks = [], []
    for expert, pairs in enumerate(lists):
        for start in range(0, len(pairs), block_size):
            values = [p if pair_ids else row_of[p] for p in pairs[start : start + block_size]]
            slots += values + [num_pairs] * (block_size - len(values))
            blocks.append(expert)
    total = len(slots)
    slots += [num_pairs] * (num_blocks * block_size - total)
    blocks += [-1] * (num_blocks - len(blocks))
    return Sum(np.array(slots, np.int64)), Sum(np.array(blocks, np.int64)), Sum(np.array(total))


def moe_align_block_size(expert_ids, *, num_experts, block_size):
    return aligned(expert_ids, num_experts=num_experts, block_size=block_size, pair_ids=False)


def moe_align_block_size_pair_ids(expert_ids, *, num_experts, block_size):
    return aligned(expert_ids, num_experts=num_experts, block_size=block_size, pair_ids=True)


def moe_plan(expert_ids, *, num_experts, block_size, pair_ids=False):
    pairs = moe_build_pairs_by_token(expert_ids, num_experts=num_experts)
    return *pairs, *aligned(expert_ids, num_experts=num_experts, block_size=block_size, pair_ids=pair_ids)


def moe_dispatch(x, packed_token_idx, pairs_by_token=None):
    out = np.zeros((len(packed_token_idx), x.shape[1]))
    for r, t in enumerate(packed_token_idx):
        if 0 <= t < len(x):
            out[r] = f64(x[t])
    return (Sum(out, np.abs(out), 1),)


def moe_combine(packed_down, pairs_by_token, pair_weights):
    out = np.zeros((len(pairs_by_token), packed_down.shape[1]))
    size = np.zeros_like(out)
    for t, k in np.ndindex(np.shape(pairs_by_token)):
        r = int(pairs_by_token[t, k])
        if 0 <= r < len(packed_down):
            term = np.float64(np.float32(pair_weights[t, k])) * f64(packed_down[r])
            out[t] += term
            size[t] += np.abs(term)
    return (Sum(out, size, np.shape(pairs_by_token)[1]),)


def weighted_sum_batched(slots, weights):
    pairs = np.arange(slots.shape[0] * slots.shape[1]).reshape(slots.shape[:2])
    return moe_combine(np.asarray(slots).reshape(-1, slots.shape[2]), pairs, weights)


def moe_combine_grads(packed_down, pairs_by_token, pair_weights, g):
    """Cotangents of packed_down and of pair_weights for the cotangent g of the result."""
    drows, rows_size = np.zeros(packed_down.shape), np.zeros(packed_down.shape)
    dweights, weights_size = np.zeros(np.shape(pair_weights)), np.zeros(np.shape(pair_weights))
    for t, k in np.ndindex(np.shape(pairs_by_token)):
        r = int(pairs_by_token[t, k])
        if 0 <= r < len(packed_down):
            term = np.float64(np.float32(pair_weights[t, k])) * f64(g[t])
            drows[r] += term
            rows_size[r] += np.abs(term)
            terms = f64(packed_down[r]) * f64(g[t])
            dweights[t, k], weights_size[t, k] = terms.sum(), np.abs(terms).sum()
    return Sum(drows, rows_size, np.size(pairs_by_token)), Sum(dweights, weights_size, packed_down.shape[1])


def moe_dispatch_grad(x, packed_token_idx, g):
    out, size = np.zeros(x.shape), np.zeros(x.shape)
    for r, t in enumerate(packed_token_idx):
        if 0 <= t < len(x):
            out[t] += f64(g[r])
            size[t] += np.abs(f64(g[r]))
    return (Sum(out, size, len(packed_token_idx)),)


def live_slots(sorted_token_ids, block_ids, total_tokens_post_pad, *, num_pairs, num_experts):
    """(slot value, expert) of every slot that counts."""
    block_size = len(sorted_token_ids) // max(len(block_ids), 1)
    for i, s in enumerate(np.asarray(sorted_token_ids)):
        block = i // block_size
        expert = int(block_ids[block])
        if block * block_size < total_tokens_post_pad and 0 <= expert < num_experts and 0 <= s < num_pairs:
            yield int(s), expert


def grouped_matmul(lhs, rhs, *tables, top_k):
    num_pairs, (num_experts, _, width) = len(lhs) * top_k, rhs.shape
    out, size = np.zeros((num_pairs, width)), np.zeros((num_pairs, width))
    for s, e in live_slots(*tables, num_pairs=num_pairs, num_experts=num_experts):
        row, matrix = f64(lhs[s // top_k]), f64(rhs[e])
        out[s], size[s] = row @ matrix, np.abs(row) @ np.abs(matrix)
    return (Sum(out, size, lhs.shape[1]),)


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def silu(gate, up):
    return gate * sigmoid(gate) * up


def gelu(gate, up):
    return gate * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(gate / math.sqrt(2))) * up


def gelu_tanh(gate, up):
    return gate * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def relu(gate, up):
    return np.maximum(gate, 0) * up


def relu2(gate, up):
    return np.maximum(gate, 0) ** 2 * up


def swiglu_oai(gate, up):
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return (up + 1) * gate * sigmoid(1.702 * gate)


ACTIVATIONS = {f.__name__: f for f in (silu, gelu, gelu_tanh, relu, relu2, swiglu_oai)}


def grouped_matmul_activated(lhs, rhs, row_weights, *tables, top_k, activation):
    """The magnitude is that of the terms, a sigmoid's being at most 1, and of what errors of gate and up make of it.

    Where no kernel fuses them, bfloat16 products are stored in bfloat16 before the activation: one rounding more.
    """
    ((product, size, *_),) = grouped_matmul(lhs, rhs, *tables, top_k=top_k)
    half, stored = rhs.shape[2] // 2, float(jnp.finfo("bfloat16").eps) / 2 if rhs.dtype == jnp.bfloat16 else 0.0
    out, out_size, rounded = np.zeros((3, len(product), half))
    f = ACTIVATIONS[activation]
    for s, _ in live_slots(*tables, num_pairs=len(product), num_experts=len(rhs)):
        for j in range(half):
            (gate, up), (gate_size, up_size) = product[s, [j, half + j]], size[s, [j, half + j]]
            step = 1e-3
            by_gate = abs(f(gate + step, up) - f(gate - step, up)) / (2 * step)
            by_up = abs(f(gate, up + step) - f(gate, up - step)) / (2 * step)
            weight = f64(row_weights)[s]
            out[s, j] = weight * f(gate, up)
            rounded[s, j] = abs(weight) * stored * (by_gate * abs(gate) + by_up * abs(up))
            out_size[s, j] = abs(weight) * (
                by_gate * gate_size + by_up * up_size + abs(f(gate, up)) + abs(gate) * (abs(up) + 1)
            )
    return (Sum(out, out_size, None, rounded),)


def grouped_matmul_grads(lhs, rhs, *tables, g, top_k):
    """Cotangents of lhs and of rhs for the cotangent g of the result.

    A token's K rows of lhs's cotangent are stored in its dtype before they are added: each is rounded once more.
    """
    dlhs, lhs_size, rounded, drhs, rhs_size = (np.zeros(x.shape) for x in (lhs, lhs, lhs, rhs, rhs))
    stored = float(jnp.finfo(lhs.dtype).eps) / 2 if top_k > 1 else 0.0
    for s, e in live_slots(*tables, num_pairs=len(g), num_experts=len(rhs)):
        row, matrix, ct = f64(lhs[s // top_k]), f64(rhs[e]), f64(g[s])
        dlhs[s // top_k] += matrix @ ct
        lhs_size[s // top_k] += np.abs(matrix) @ np.abs(ct)
        rounded[s // top_k] += stored * np.abs(matrix @ ct)
        drhs[e] += np.outer(row, ct)
        rhs_size[e] += np.abs(np.outer(row, ct))
    return Sum(dlhs, lhs_size, rhs.shape[2] * top_k, rounded), Sum(drhs, rhs_size, len(g))


TERMS = 4096  # of a sum whose number of terms a test does not say


def steps(terms):
    """How many eps(float32) of the terms' magnitudes a float32 sum of so many terms may be off by.

    Each term and each addition is rounded: about `terms` times, by at most eps/2 of a partial sum, which the magnitudes
    bound. The signs of these errors are independent, so by Hoeffding's inequality they add up to more than
    8 * sqrt(terms) * eps/2 once in 10^13 sums (Higham and Mary, https://doi.org/10.1137/18M1226312). Tensor cores cut
    off where others round, so their errors have one sign, but they add sixteen terms at a time: terms/16, which is
    less up to 4,096 terms. Sixteen bits have eps of 2^13 and 2^16 times float32's: no sum in them stays below.
    """
    return 4 * math.sqrt(max(1, terms))


def assert_close(got, want, size, dtype, terms=None, rounded=0.0):
    """|error| <= eps(dtype)/2 * |want| + steps(terms) * eps(float32) * size + tiny(dtype): float32 sums, rounded once.

    size is the sum of the terms' magnitudes, terms how many they are, rounded as in `Sum`. NaN and infinities must
    stand where they should.
    """
    got, info = f64(got), jnp.finfo(dtype)
    assert got.shape == want.shape, (got.shape, want.shape)
    regular = np.isfinite(want)
    np.testing.assert_array_equal(got[~regular], want[~regular])
    error = np.abs(got[regular] - want[regular])
    added = steps(TERMS if terms is None else terms) * float(np.finfo(np.float32).eps) * size + rounded
    added = np.broadcast_to(added, want.shape)[regular]
    eps = float(info.eps)
    bound = eps / 2 * np.abs(want[regular]) + (1 + eps) * added + float(info.tiny)
    assert np.all(error <= bound), f"largest error over its bound: {np.max(error / bound)}"


def assert_near(got, want, dtype, stored=4):
    """The bound of whole layers. Their results are sums that cancel: the terms' size is the largest entry's, or 1.

    A layer of 16 bits stores rows on its way: the experts' inner rows, their results, what goes between devices, and
    for the gradient the same again. Each of these `stored` roundings counts as one of the largest entry.
    """
    want = f64(want)
    size = max(1.0, float(np.max(np.abs(want), initial=0)))
    rounded = 0.0 if jnp.dtype(dtype) == jnp.float32 else stored * float(jnp.finfo(dtype).eps) / 2 * size
    assert_close(got, want, size, dtype, rounded=rounded)


def assert_matches(got, wanted):
    """A function's results (arrays) against an oracle's, each a `Sum`; what has no size is int32, and exact."""
    got = tuple(got)
    assert len(got) == len(wanted)
    for result, want in zip(got, wanted, strict=True):
        value, size, *bound = Sum(*want)
        if size is None:
            assert result.dtype == np.int32
            np.testing.assert_array_equal(np.asarray(result), value)
        else:
            assert_close(result, value, size, result.dtype, *bound)
