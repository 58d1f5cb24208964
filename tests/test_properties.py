"""Properties over hostile values. The shapes are few, so that most examples need no compilation."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, given, settings

import ferrum_jax

jobs = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
floats = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
hostile_ids = st.one_of(st.integers(-2, 12), st.sampled_from([2**31 - 1, -(2**31)]))
plain = st.floats(-4, 4, width=32)


@pytest.mark.parametrize(("shape", "top_k"), [((5, 1), 1), ((4, 7), 7), ((3, 20), 5)])
@jobs
@given(st.data())
def test_routing(shape, top_k, data):
    x = data.draw(hnp.arrays(np.float32, shape, elements=floats))
    for norm in (True, False):
        got = ferrum_jax.route_topk_softmax(x, top_k, norm_topk_prob=norm)
        oracle.assert_matches(got, oracle.route_topk_softmax(x, top_k=top_k, norm_topk_prob=norm))


@pytest.mark.parametrize(
    ("shape", "num_experts", "block_size"), [((6, 5), 11, 3), ((1, 1), 1, 9), ((5, 2), 7, 1), ((3, 0), 4, 2)]
)
@jobs
@given(st.data())
def test_tables(shape, num_experts, block_size, data):
    ids = data.draw(hnp.arrays(np.int32, shape, elements=hostile_ids))
    pairs = ferrum_jax.moe_build_pairs_by_token(ids, num_experts)
    aligned = ferrum_jax.moe_align_block_size, ferrum_jax.moe_align_block_size_pair_ids
    for pair_ids, align in enumerate(aligned):
        got = ferrum_jax.moe_plan(ids, num_experts, block_size, pair_ids=bool(pair_ids))
        want = oracle.moe_plan(ids, num_experts=num_experts, block_size=block_size, pair_ids=pair_ids)
        oracle.assert_matches(got, want)
        for a, b in zip(got, (*pairs, *align(ids, num_experts, block_size)), strict=True):
            np.testing.assert_array_equal(a, b)


@functools.cache
def with_gradients(f):
    """The compiled values and cotangents of a function of float arrays, tables and a cotangent."""

    def run(floats, tables, g):
        out, vjp = jax.vjp(lambda *a: f(*a, *tables), *floats)
        return out, vjp(g)

    return jax.jit(run)


def combine(rows, weights, pairs):
    return ferrum_jax.moe_combine(rows, pairs, weights)


@pytest.mark.parametrize(
    ("num_rows", "shape", "width"), [(7, (6, 3), 4), (0, (2, 2), 3), (3, (5, 1), 1), (4, (2, 0), 2)]
)
@jobs
@given(st.data())
def test_combine_and_its_gradients_skip_by_selection(num_rows, shape, width, data):
    """Rows may hold anything where nobody names them; the sums of the others come out as if they were not there."""
    pairs = data.draw(hnp.arrays(np.int32, shape, elements=hostile_ids))
    rows = data.draw(hnp.arrays(np.float32, (num_rows, width), elements=plain))
    rows[~np.isin(np.arange(num_rows), pairs)] = data.draw(st.sampled_from([np.nan, np.inf, 0.0]))
    weights = data.draw(hnp.arrays(np.float32, shape, elements=plain))
    g = data.draw(hnp.arrays(np.float32, (len(pairs), width), elements=plain))
    out, gradients = with_gradients(combine)((rows, weights), (pairs,), g)
    oracle.assert_matches([out], oracle.moe_combine(rows, pairs, weights))
    oracle.assert_matches(gradients, oracle.moe_combine_grads(rows, pairs, weights, g))


@pytest.mark.parametrize(("num_tokens", "width", "rows"), [(7, 4, 12), (0, 3, 5), (2, 1, 0), (3, 2, 9)])
@jobs
@given(st.data())
def test_dispatch_and_its_gradient(num_tokens, width, rows, data):
    index = data.draw(hnp.arrays(np.int32, rows, elements=hostile_ids))
    x = data.draw(hnp.arrays(np.float32, (num_tokens, width), elements=plain))
    g = data.draw(hnp.arrays(np.float32, (rows, width), elements=plain))
    out, gradients = with_gradients(ferrum_jax.moe_dispatch)((x,), (index,), g)
    oracle.assert_matches([out], oracle.moe_dispatch(x, index))
    oracle.assert_matches(gradients, oracle.moe_dispatch_grad(x, index, g))
