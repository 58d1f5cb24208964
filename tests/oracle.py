"""What the ops must compute, as NumPy loops in float64, written from their documentation and not from their code.

Every oracle works on one slice (no leading axes). Each result is a `Sum`: its value, and what limits the error of a
correct implementation. See `assert_close`.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Sum(NamedTuple):
    """A result and what limits its error. Without a size it must be exact.

    size: the sum of the magnitudes of the terms that the value is a sum of.
    terms: the number of these terms; None if not known.
    rounded: the error that documented intermediate roundings to 16 bits may add. An oracle that sets it says why.
    """

    value: Any
    size: Any = None
    terms: int | None = None
    rounded: Any = 0.0


def f64(x):
    return np.asarray(x).astype(np.float64)


def rank_key(x):
    """An int that orders logits by float32 value, with -0 equal to +0, and NaN of either sign below everything."""
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
    """The logarithm of each expert's score, which does not underflow. A masked expert has -inf."""
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
    """The weights of one token's experts `ids`. An id outside [0, E) has weight 0."""
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
    """Two scores are so close that correct implementations may choose differently. Draw other arguments."""


class Contest:
    """Values to be ranked, each with a margin of 4 ulp, so that two rank surely if they differ by more than 8 ulp.

    NaN and infinities have no margin.
    """

    def __init__(self, values, terms, source):
        """`terms` are the magnitudes of each value's terms. Values of equal `source`s are equal in any rounding."""
        self.values, self.source = values, source
        with np.errstate(all="ignore"):
            half = 4 * np.spacing(np.maximum(terms, np.finfo(np.float32).tiny).astype(np.float32)).astype(np.float64)
            half += np.finfo(np.float32).tiny  # some platforms flush smaller floats to 0
            half = np.where(np.isfinite(values), half, 0)
            self.low, self.high = values - half, values + half

    def before(self, i, j):
        """Whether i ranks before j in every correct implementation."""
        a, b = np.isnan(self.values[i]), np.isnan(self.values[j])
        if a or b:
            return b and (not a or i < j)
        equal = self.source[i] == self.source[j] or (
            not np.isfinite(self.values[i]) and self.values[i] == self.values[j]
        )
        return i < j if equal else self.low[i] > self.high[j]


def contests(x, bias, scoring, num_groups, group_score):
    """One token's `Contest` of experts, that of groups, and the experts of each group."""
    x = np.asarray(x).astype(np.float32)
    with np.errstate(all="ignore"):
        logs = log_scores(x, scoring)
        scores = f64(x) if scoring == "topk_softmax" else np.exp(logs)
        added = np.zeros(len(x)) if bias is None else f64(np.float32(bias))
        biased = scores + added
        biased = np.where(np.abs(biased) > np.finfo(np.float32).max, np.sign(biased) * np.inf, biased)
        # The float32 value that a score is computed from. Logits so near 0, or so low, that their scores are equal in
        # float32 count as one value.
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
        # The margin of a sum covers the margins of its terms and the rounding of their addition.
        terms = [4 * sizes[group].sum() if len(group) > 1 else sizes[group].sum() for group in best]
    return experts, Contest(sums, np.array(terms), [[sources[e] for e in group] for group in best]), members


def choose(experts, groups, members, *, top_k, group_top_k):
    """The ids, and whether the margins decide all of them and the groups."""
    kept, sure = best_of(groups, range(len(members)), group_top_k or len(members))
    ids, decided = best_of(experts, np.sort(members[kept].reshape(-1)), top_k)
    return ids, sure and decided


def best_of(contest, names, count):
    order = sorted(names, key=lambda i: (np.isnan(contest.values[i]), -np.nan_to_num(contest.values[i], nan=0), i))
    sure = all(contest.before(a, b) for a, b in itertools.pairwise(order[: count + 1]))
    return order[:count], sure


def check_choice(ids, experts, groups, members, *, group_top_k):
    """Assert that the margins allow one token's ids. Where they decide everything, they allow only one choice."""
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
    """The ids and weights. If `got` has an implementation's ids, check them, and return them with their weights."""
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
    # Scores below the smallest normal float32 may be flushed to 0; `scale` then multiplies that error.
    return Sum(ids), Sum(weights, np.abs(weights) + np.abs(scale) * 1e-33)


def sorted_pairs(expert_ids, num_experts):
    """All pair ids, sorted by expert and then by id; and a list of each expert's pair ids."""
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
    """(pair id or row, expert) of every slot that names a row, in a block with an expert."""
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


def group_of_row(group_sizes, group_offset, *, num_rows, num_groups):
    """The matrix of each row, its group counted from the offset; -1 for a row without one."""
    rows = []
    for group, size in enumerate(np.asarray(group_sizes).tolist()):
        matrix = group - int(group_offset)
        rows += [matrix if 0 <= matrix < num_groups else -1] * min(max(size, 0), num_rows - len(rows))
    return np.array(rows + [-1] * (num_rows - len(rows)), np.int64)


def align_groups(group_sizes, group_offset=0, *, num_rows, num_groups, block_size):
    owner = group_of_row(group_sizes, group_offset, num_rows=num_rows, num_groups=num_groups)
    busy = min(num_groups, num_rows)
    num_blocks = busy + (num_rows - busy) // block_size
    slots, blocks = [], []
    for group in sorted(set(owner[owner >= 0].tolist())):
        rows = np.flatnonzero(owner == group).tolist()
        slots += rows + [num_rows] * (-len(rows) % block_size)
        blocks += [group] * -(-len(rows) // block_size)
    total = len(slots)
    slots += [num_rows] * (num_blocks * block_size - total)
    blocks += [-1] * (num_blocks - len(blocks))
    return Sum(np.array(slots, np.int64)), Sum(np.array(blocks, np.int64)), Sum(np.array(total))


def ragged_dot(lhs, rhs, group_sizes, group_offset=0):
    owner = group_of_row(group_sizes, group_offset, num_rows=len(lhs), num_groups=len(rhs))
    out, size = np.zeros((len(lhs), rhs.shape[2])), np.zeros((len(lhs), rhs.shape[2]))
    for row, group in enumerate(owner):
        if group >= 0:
            out[row] = f64(lhs[row]) @ f64(rhs[group])
            size[row] = np.abs(f64(lhs[row])) @ np.abs(f64(rhs[group]))
    return (Sum(out, size, lhs.shape[1]),)


def ragged_dot_grads(lhs, rhs, group_sizes, group_offset=0, *, g):
    """Cotangents of lhs and of rhs for the cotangent g of the result."""
    owner = group_of_row(group_sizes, group_offset, num_rows=len(lhs), num_groups=len(rhs))
    dlhs, lhs_size, drhs, rhs_size = (np.zeros(x.shape) for x in (lhs, lhs, rhs, rhs))
    for row, group in enumerate(owner):
        if group >= 0:
            x, matrix, ct = f64(lhs[row]), f64(rhs[group]), f64(g[row])
            dlhs[row], lhs_size[row] = matrix @ ct, np.abs(matrix) @ np.abs(ct)
            drhs[group] += np.outer(x, ct)
            rhs_size[group] += np.abs(np.outer(x, ct))
    return Sum(dlhs, lhs_size, rhs.shape[2]), Sum(drhs, rhs_size, len(g))


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
    """The size is that of the activation's terms (a sigmoid is at most 1), and of the errors of gate and up.

    The activation's slopes, by finite differences, say how far errors of gate and up change the result. Where no kernel
    fuses product and activation, bfloat16 products are first stored in bfloat16, which rounds once more.
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

    The K rows of a token's cotangent are stored in lhs's dtype before they are added, which rounds each once more.
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


TERMS = 4096  # the number of terms of a sum where a test does not give it


def steps(terms):
    """The allowed error of a float32 sum of so many terms, in units of eps(float32) * the sum of their magnitudes.

    A float32 sum rounds about `terms` times, each time by at most eps/2 of a partial sum, which is at most the sum of
    the magnitudes. The signs of these errors are independent. So by Hoeffding's inequality their sum exceeds
    8 * sqrt(terms) * eps/2 once in 10^13 sums (Higham and Mary, https://doi.org/10.1137/18M1226312). Tensor cores
    truncate instead, so their errors have one sign; but they add sixteen terms at a time, so the error is terms/16,
    which is smaller up to 4,096 terms. The eps of 16-bit floats is 2^13 or 2^16 times larger, so sums in 16 bits fail.
    """
    return 4 * math.sqrt(max(1, terms))


def assert_close(got, want, size, dtype, terms=None, rounded=0.0):
    """|error| <= eps(dtype)/2 * |want| + steps(terms) * eps(float32) * size + tiny(dtype): float32 sums, rounded once.

    size, terms and rounded are those of `Sum`. NaN and infinities must stand at the same places in both.
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
    """`assert_close` for whole layers. Their sums cancel, so the size is that of the largest entry, and at least 1.

    In 16 bits a layer also rounds rows that it stores: the experts' inner rows, their results, what it sends between
    devices, and for the gradient the same again. Each of these `stored` roundings counts as one of the largest entry.
    """
    want = f64(want)
    size = max(1.0, float(np.max(np.abs(want), initial=0)))
    rounded = 0.0 if jnp.dtype(dtype) == jnp.float32 else stored * float(jnp.finfo(dtype).eps) / 2 * size
    assert_close(got, want, size, dtype, rounded=rounded)


def assert_matches(got, wanted):
    """Compare a function's results (arrays) with an oracle's (`Sum`s). One without a size must be int32, and exact."""
    got = tuple(got)
    assert len(got) == len(wanted)
    for result, want in zip(got, wanted, strict=True):
        value, size, *bound = Sum(*want)
        if size is None:
            assert result.dtype == np.int32
            np.testing.assert_array_equal(np.asarray(result), value)
        else:
            assert_close(result, value, size, result.dtype, *bound)
