"""The table of cases: an op with fixed parameters, its oracle, and how to make arguments for it.

A test takes a case and a size from here and adds a transformation. Arguments are NumPy arrays without leading axes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import ferrum_jax
from ferrum_jax.ops import combine, ragged


class Size(NamedTuple):
    T: int
    E: int
    K: int
    H: int
    block: int = 4

    def __str__(self):
        return "-".join(f"{name}{value}" for name, value in zip(self._fields, self, strict=True))


SMALL = Size(5, 6, 3, 4)
SIZES = (
    Size(0, 8, 2, 16),
    Size(1, 1, 1, 1, 1),
    Size(1, 8, 8, 64),
    Size(7, 3, 3, 5, 2),
    Size(7, 8, 2, 130, 16),
    Size(33, 128, 8, 96, 16),
    Size(9, 257, 10, 20, 8),
    Size(3, 384, 8, 256, 64),
    Size(5, 512, 64, 8, 1),
    Size(2, 2048, 10, 3, 5),
    Size(2, 4096, 64, 7, 3),
)
# No tokens; K = E; many experts and choices; and an H of 130, which is no multiple of a kernel's tile.
USUAL = (Size(0, 8, 2, 16), Size(7, 3, 3, 5, 2), Size(9, 257, 10, 20, 8), Size(7, 8, 2, 130, 16))
assert set(USUAL) <= set(SIZES)
DTYPES = ("float32", "bfloat16", "float16")


class Case(NamedTuple):
    name: str
    call: Callable[..., Any]  # (*arrays, size, implementation) -> result or tuple of results
    oracle: Callable[..., Any]  # (*arrays, size) -> pairs of value and magnitude
    args: Callable[[np.random.Generator, Size, str], tuple[np.ndarray, ...]]
    floats: tuple[int, ...] = ()  # the arguments that it is differentiated by
    tables: tuple[int, ...] = ()  # arguments that describe one routing, so vmap maps all of them or none

    def __str__(self):
        return self.name

    def results(self, *args, size, implementation=None):
        out = self.call(*args, size=size, implementation=implementation)
        return (out,) if hasattr(out, "shape") else tuple(out)  # the tables unpack into their arrays

    def has_kernel(self, backend):
        op = self.name.partition("-")[0].replace("route_topk_softmax", "route_topk")
        op = op.replace("moe_align_block_size_pair_ids", "moe_align_block_size").replace("ragged_dot", "grouped_matmul")
        return any(op == row.op for row in ferrum_jax.kernels.KERNELS if row.backend == backend)

    def float_results(self, *args, **kwargs):
        return [r for r in self.results(*args, **kwargs) if jnp.issubdtype(r.dtype, jnp.floating)]


def rng(*seed):
    return np.random.default_rng([ord(c) for c in "".join(map(str, seed))])


def logits(r, size, dtype):
    """Rows with ties, masked experts, and hostile values. The first three rows have no masks or hostile values."""
    x = r.normal(size=(size.T, size.E)).astype(np.float32)
    x[1::2] = np.round(x[1::2])
    hostile = [-np.inf, np.inf, np.nan, -np.nan, 0.0, -0.0, 1e-40, -1e-40, 1e-45, 3e38, -3e38]
    for t in range(3, size.T):
        where = r.random(size.E) < 0.3
        x[t, where] = r.choice(hostile[: 1 if t % 2 else None], size=where.sum())
    if size.T > 4:
        x[3], x[4] = -np.inf, 0.0
        x[4, ::2] = -0.0
    with np.errstate(over="ignore"):  # 3e38 in float16
        return (x.astype(jnp.dtype(dtype)),)


def groups(size):
    """As many groups as divide E, up to 8. Half of them are chosen, or more if K experts need more."""
    count = max(n for n in (8, 4, 3, 2, 1) if size.E % n == 0)
    return {"num_groups": count, "group_top_k": max(-(-count // 2), -(-size.K * count // size.E))}


def router(name, settings, biased=False):
    """A case of route_topk. Arguments are drawn until rounding cannot change which experts are chosen."""

    def args(r, size, dtype):
        while True:
            (x,) = logits(r, size, dtype)
            bias = (0.3 * r.normal(size=size.E).astype(np.float32),) if biased else ()
            try:
                oracle.route_topk(x, *bias, top_k=size.K, **settings(size))
            except oracle.Undecided:
                continue
            return x, *bias

    def call(x, *bias, size, implementation):
        given = {"bias": bias[0]} if bias else {}
        return ferrum_jax.route_topk(x, size.K, **given, **settings(size), implementation=implementation)

    return Case(name, call, lambda *args, size: oracle.route_topk(*args, top_k=size.K, **settings(size)), args, (0,))


def route_plan(name, settings=lambda size: {}, biased=False, pair_ids=False):
    """A case of moe_route_plan: the arguments of the router, and the tables for the experts that it chose."""
    route = router(name, lambda size: {"scoring": "softmax", **settings(size)}, biased)

    def call(x, *bias, size, implementation):
        given = {"bias": bias[0]} if bias else {}
        run = {"pair_ids": pair_ids, "implementation": implementation}
        routed, plan = ferrum_jax.moe_route_plan(x, size.K, size.block, **given, **settings(size), **run)
        return *routed, *plan

    def meaning(*args, size):
        routed = route.oracle(*args, size=size)
        sizes = {"num_experts": size.E, "block_size": size.block}
        return *routed, *oracle.moe_plan(routed[0].value, **sizes, pair_ids=pair_ids)

    return route._replace(call=call, oracle=meaning)


def expert_ids(r, size, dtype=None):
    """Tokens name distinct experts, except the first, which names one expert K times. Some ids are out of range."""
    ids = np.argsort(r.random((size.T, size.E)), axis=1)[:, : size.K].astype(np.int32)
    ids[:1] = size.E // 2
    strays = r.random(ids.shape) < 0.15
    ids[strays] = r.choice([-1, size.E, 2**31 - 1, -(2**31)], size=strays.sum())
    return (ids,)


def rows(r, shape, dtype):
    return r.normal(size=shape).astype(np.float32).astype(jnp.dtype(dtype))


def tables(r, size):
    pairs, tokens, _ = oracle.moe_build_pairs_by_token(expert_ids(r, size)[0], num_experts=size.E)
    return pairs.value.astype(np.int32), tokens.value.astype(np.int32)


def dispatch_args(r, size, dtype):
    return rows(r, (size.T, size.H), dtype), tables(r, size)[1]


def dispatch_pairs_args(r, size, dtype):
    pairs, tokens = tables(r, size)
    return rows(r, (size.T, size.H), dtype), tokens, pairs


def combine_args(r, size, dtype):
    """Rows that no pair names hold NaN; there are two or more. Some indices are out of range, on either side."""
    pairs, _ = tables(r, size)
    y = rows(r, (size.T * size.K + 2, size.H), dtype)
    y[~np.isin(np.arange(len(y)), pairs)] = np.nan
    pairs[pairs < 0] = r.choice([-1, len(y), 2**31 - 1, -(2**31)], size=(pairs < 0).sum())
    return y, pairs, r.random(pairs.shape).astype(np.float32) - 0.3


def combine_repeated_args(r, size, dtype):
    y, pairs, weights = combine_args(r, size, dtype)
    y = np.nan_to_num(y, nan=1.0)
    return y, r.integers(-1, max(len(y) // 2, 1), size=pairs.shape).astype(np.int32), weights


def cotangents_args(r, size, dtype):
    """As for combine. The cotangent of a token with an invalid pair is NaN, which must not reach that weight."""
    y, pairs, weights = combine_args(r, size, dtype)
    g = rows(r, (size.T, size.H), dtype)
    g[np.flatnonzero(((pairs < 0) | (pairs >= len(y))).any(1))[:1]] = np.nan
    return g, y, pairs, weights


def weighted_sum_args(r, size, dtype):
    return rows(r, (size.T, size.K, size.H), dtype), r.normal(size=(size.T, size.K)).astype(np.float32)


def grouped_args(r, size, dtype, pair_ids=False):
    """Rows that no slot names hold NaN, and so do the matrices of experts without rows."""
    _, _, _, *tables = oracle.moe_plan(
        expert_ids(r, size)[0], num_experts=size.E, block_size=size.block, pair_ids=pair_ids
    )
    slots, blocks, total = (table.value.astype(np.int32) for table in tables)
    num_pairs, top_k = size.T * size.K, size.K if pair_ids else 1
    lhs = rows(r, (num_pairs // top_k, size.H), dtype)
    rhs = rows(r, (size.E, size.H, size.H % 13 + 3), dtype)
    lhs[~np.isin(np.arange(len(lhs)), slots[slots < num_pairs] // top_k)] = np.nan
    rhs[~np.isin(np.arange(len(rhs)), blocks)] = np.nan
    slots[slots == num_pairs] = r.choice([-1, num_pairs, 2**31 - 1, -(2**31)], size=(slots == num_pairs).sum())
    return lhs, rhs, slots, blocks, total


def activated_args(r, size, dtype, pair_ids=False):
    """As for grouped_matmul, with gate and up side by side. The weight of a row that no slot names is NaN."""
    lhs, gate, *tables = grouped_args(r, size, dtype, pair_ids)
    up = np.where(np.isnan(gate), gate, rows(r, gate.shape, dtype))
    weights = r.normal(size=size.T * size.K).astype(np.float32)
    named = [s for s, _ in oracle.live_slots(*tables, num_pairs=len(weights), num_experts=size.E)]
    weights[~np.isin(np.arange(len(weights)), named)] = np.nan
    return lhs, np.concatenate([gate, up], axis=2), weights, *tables


def activated(lhs, rhs, weights, *tables, **kwargs):
    return grouped_matmul(lhs, rhs, *tables, row_weights=weights, **kwargs)


def grouped_matmul(lhs, rhs, *tables, top_k=1, implementation=None, **kwargs):
    routing = ferrum_jax.MoeRouting(*tables)
    return ferrum_jax.grouped_matmul(lhs, rhs, routing, top_k=top_k, implementation=implementation, **kwargs)


def group_sizes(r, size, others=0):
    """Sizes of E groups and of `others`. Some are 0, some negative, and often they add up to more than the rows."""
    groups = size.E + others
    sizes = r.multinomial(size.T * size.K, np.full(groups, 1 / groups)).astype(np.int32)
    sizes[r.random(groups) < 0.2] = -3
    sizes[-1] += r.choice([0, 2, 2**31 - 1 - size.T * size.K])
    return sizes


def groups_args(r, size, dtype=None):
    return group_sizes(r, size, 3), np.array(r.integers(-1, 5), np.int32)


def ragged_args(r, size, dtype, offset=False, transposed=False):
    """Rows without a matrix hold NaN, and so do the matrices of groups without rows."""
    sizes, *offset = groups_args(r, size) if offset else (group_sizes(r, size),)
    lhs, rhs = rows(r, (size.T * size.K, size.H), dtype), rows(r, (size.E, size.H, size.H % 13 + 3), dtype)
    owner = oracle.group_of_row(sizes, *(offset or [0]), num_rows=len(lhs), num_groups=size.E)
    lhs[owner < 0] = np.nan
    rhs[~np.isin(np.arange(size.E), owner)] = np.nan
    return lhs, np.ascontiguousarray(rhs.swapaxes(1, 2)) if transposed else rhs, sizes, *offset


def ragged_dot(name, offset=False, transposed=False):
    def call(lhs, rhs, sizes, *offset, size, implementation):
        given = {"group_offset": offset[0]} if offset else {}
        given |= {"transpose_rhs": transposed, "implementation": implementation}
        return ferrum_jax.ragged_dot(lhs, rhs, sizes, **given)

    def meaning(lhs, rhs, *groups, size):
        return oracle.ragged_dot(lhs, rhs.swapaxes(1, 2) if transposed else rhs, *groups)

    return Case(name, call, meaning, functools.partial(ragged_args, offset=offset, transposed=transposed), (0, 1))


CASES = (
    Case(
        "route_topk_softmax",
        lambda x, size, implementation: ferrum_jax.route_topk_softmax(x, size.K, implementation=implementation),
        lambda x, size: oracle.route_topk_softmax(x, top_k=size.K),
        logits,
        (0,),
    ),
    Case(
        "route_topk_softmax-raw",
        lambda x, size, implementation: ferrum_jax.route_topk_softmax(
            x, size.K, norm_topk_prob=False, implementation=implementation
        ),
        lambda x, size: oracle.route_topk_softmax(x, top_k=size.K, norm_topk_prob=False),
        logits,
        (0,),
    ),
    router("route_topk-groups", lambda size: {"scoring": "sigmoid", "scale": 2.5, **groups(size)}, biased=True),
    router("route_topk-max", lambda size: {"group_score": "max", "zero_sum": "eps", **groups(size)}),
    route_plan("moe_route_plan"),
    route_plan(
        "moe_route_plan-groups", lambda size: {"scoring": "sigmoid", **groups(size)}, biased=True, pair_ids=True
    ),
    Case(
        "moe_build_pairs_by_token",
        lambda ids, size, implementation: ferrum_jax.moe_build_pairs_by_token(
            ids, size.E, implementation=implementation
        ),
        lambda ids, size: oracle.moe_build_pairs_by_token(ids, num_experts=size.E),
        expert_ids,
    ),
    Case(
        "moe_align_block_size",
        lambda ids, size, implementation: ferrum_jax.moe_align_block_size(
            ids, size.E, size.block, implementation=implementation
        ),
        lambda ids, size: oracle.moe_align_block_size(ids, num_experts=size.E, block_size=size.block),
        expert_ids,
    ),
    Case(
        "moe_align_block_size_pair_ids",
        lambda ids, size, implementation: ferrum_jax.moe_align_block_size_pair_ids(
            ids, size.E, size.block, implementation=implementation
        ),
        lambda ids, size: oracle.moe_align_block_size_pair_ids(ids, num_experts=size.E, block_size=size.block),
        expert_ids,
    ),
    Case(
        "moe_plan",
        lambda ids, size, implementation: ferrum_jax.moe_plan(ids, size.E, size.block, implementation=implementation),
        lambda ids, size: oracle.moe_plan(ids, num_experts=size.E, block_size=size.block),
        expert_ids,
    ),
    Case(
        "moe_plan-pair_ids",
        lambda ids, size, implementation: ferrum_jax.moe_plan(
            ids, size.E, size.block, pair_ids=True, implementation=implementation
        ),
        lambda ids, size: oracle.moe_plan(ids, num_experts=size.E, block_size=size.block, pair_ids=True),
        expert_ids,
    ),
    Case(
        "moe_dispatch",
        lambda x, idx, size, implementation: ferrum_jax.moe_dispatch(x, idx, implementation=implementation),
        lambda x, idx, size: oracle.moe_dispatch(x, idx),
        dispatch_args,
        (0,),
    ),
    Case(
        "moe_dispatch-pairs",
        lambda x, idx, pairs, size, implementation: ferrum_jax.moe_dispatch(
            x, idx, pairs_by_token=pairs, implementation=implementation
        ),
        lambda x, idx, pairs, size: oracle.moe_dispatch(x, idx),
        dispatch_pairs_args,
        (0,),
    ),
    Case(
        "moe_combine",
        lambda y, pairs, w, size, implementation: ferrum_jax.moe_combine(
            y, pairs, w, unique_rows=True, implementation=implementation
        ),
        lambda y, pairs, w, size: oracle.moe_combine(y, pairs, w),
        combine_args,
        (0, 2),
    ),
    Case(
        "moe_combine-repeated",
        lambda y, pairs, w, size, implementation: ferrum_jax.moe_combine(y, pairs, w, implementation=implementation),
        lambda y, pairs, w, size: oracle.moe_combine(y, pairs, w),
        combine_repeated_args,
        (0, 2),
    ),
    Case(
        "moe_combine_cotangents",
        lambda g, y, pairs, w, size, implementation: tuple(
            combine._cotangents(g, y, pairs, w, implementation=implementation)
        ),
        lambda g, y, pairs, w, size: oracle.moe_combine_grads(y, pairs, w, g),
        cotangents_args,
        (0, 1, 3),
    ),
    Case(
        "weighted_sum_batched",
        lambda slots, w, size, implementation: ferrum_jax.weighted_sum_batched(slots, w, implementation=implementation),
        lambda slots, w, size: oracle.weighted_sum_batched(slots, w),
        weighted_sum_args,
        (0, 1),
    ),
    Case(
        "grouped_matmul",
        lambda *args, size, implementation: grouped_matmul(*args, implementation=implementation),
        lambda *args, size: oracle.grouped_matmul(*args, top_k=1),
        grouped_args,
        (0, 1),
        (2, 3, 4),
    ),
    Case(
        "grouped_matmul-pair_ids",
        lambda *args, size, implementation: grouped_matmul(*args, top_k=size.K, implementation=implementation),
        lambda *args, size: oracle.grouped_matmul(*args, top_k=size.K),
        functools.partial(grouped_args, pair_ids=True),
        (0, 1),
        (2, 3, 4),
    ),
    Case(
        "grouped_matmul_activated",
        lambda *args, size, implementation: activated(*args, activation="silu", implementation=implementation),
        lambda *args, size: oracle.grouped_matmul_activated(*args, top_k=1, activation="silu"),
        activated_args,
        (0, 1, 2),
        (3, 4, 5),
    ),
    Case(
        "align_groups",
        lambda sizes, offset, size, implementation: tuple(
            ragged.align_groups(
                sizes,
                offset,
                num_rows=size.T * size.K,
                num_groups=size.E,
                block_size=size.block,
                implementation=implementation,
            )
        ),
        lambda sizes, offset, size: oracle.align_groups(
            sizes, offset, num_rows=size.T * size.K, num_groups=size.E, block_size=size.block
        ),
        groups_args,
    ),
    ragged_dot("ragged_dot"),
    ragged_dot("ragged_dot-offset", offset=True),
    ragged_dot("ragged_dot-transposed", transposed=True),
)
FLOAT_CASES = tuple(case for case in CASES if case.floats)

# Cases that share another case's primitive and differ in its parameters. JAX's rules do not depend on the parameters,
# so tests of these rules cover the variants only in a full run.
VARIANTS = {
    "route_topk_softmax-raw",
    "route_topk-max",
    "moe_route_plan-groups",
    "moe_align_block_size_pair_ids",
    "moe_plan-pair_ids",
    "grouped_matmul",
    "ragged_dot",
    "ragged_dot-transposed",
}


def per_primitive(cases):
    """Parameters of a test of JAX's rules. The variants run only in a full run."""
    return [pytest.param(case, marks=[pytest.mark.full] if case.name in VARIANTS else []) for case in cases]


def values():
    """Parameters (case, dtype, size) of a test of values. Only a full run has every size with every dtype."""
    found = []
    for case in CASES:
        for dtype in DTYPES if case.floats else ["int32"]:
            usual = USUAL if dtype in ("float32", "int32") else USUAL[-1:]
            found += [pytest.param(case, dtype, s, marks=[] if s in usual else [pytest.mark.full]) for s in SIZES]
    return found


def finite_args(case, r, size, dtype="float32"):
    """Arguments without hostile values: for finite differences, and for comparing gradients with ==."""
    args = case.args(r, size, dtype)
    plain = list(args)
    for i in case.floats:
        wide = np.asarray(args[i], np.float32)
        wide = np.nan_to_num(wide, nan=0.5, posinf=2.0, neginf=-2.0)
        plain[i] = (wide * (0.3 if "activated" in case.name else 1)).astype(
            args[i].dtype
        )  # small: finite differences are then exact enough
    if "route" in case.name:  # experts far enough apart that a finite difference changes no choice
        order = np.argsort(r.random(plain[0].shape), axis=-1)
        plain[0] = (order * 0.37 - 1).astype(plain[0].dtype)
    return tuple(plain)
