"""Properties over random shapes and hostile values."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np
import oracle
from hypothesis import HealthCheck, given, settings

import ferrum_jax

jobs = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
floats = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
hostile_ids = st.one_of(st.integers(-2, 12), st.sampled_from([2**31 - 1, -(2**31)]))
shapes = st.tuples(st.integers(0, 6), st.integers(0, 5))


@jobs
@given(st.data())
def test_routing(data):
    num_tokens, num_experts = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 20))
    top_k, norm = data.draw(st.integers(1, num_experts)), data.draw(st.booleans())
    x = data.draw(hnp.arrays(np.float32, (num_tokens, num_experts), elements=floats))
    got = ferrum_jax.route_topk_softmax(x, top_k, norm_topk_prob=norm)
    oracle.assert_matches(got, oracle.route_topk_softmax(x, top_k=top_k, norm_topk_prob=norm))


@jobs
@given(hnp.arrays(np.int32, shapes, elements=hostile_ids), st.integers(1, 11), st.integers(1, 9), st.booleans())
def test_tables(ids, num_experts, block_size, pair_ids):
    got = ferrum_jax.moe_plan(ids, num_experts, block_size, pair_ids=pair_ids)
    want = oracle.moe_plan(ids, num_experts=num_experts, block_size=block_size, pair_ids=pair_ids)
    oracle.assert_matches(got, want)
    parts = (
        ferrum_jax.moe_build_pairs_by_token(ids, num_experts),
        (ferrum_jax.moe_align_block_size_pair_ids if pair_ids else ferrum_jax.moe_align_block_size)(
            ids, num_experts, block_size
        ),
    )
    for a, b in zip(got, (*parts[0], *parts[1]), strict=True):
        np.testing.assert_array_equal(a, b)


@jobs
@given(st.data())
def test_combine_and_its_gradients_skip_by_selection(data):
    """Rows may hold anything where nobody names them; the sums of the others come out as if they were not there."""
    num_rows, width = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 4))
    pairs = data.draw(hnp.arrays(np.int32, shapes, elements=hostile_ids))
    plain = st.floats(-4, 4, width=32)
    rows = data.draw(hnp.arrays(np.float32, (num_rows, width), elements=plain))
    rows[~np.isin(np.arange(num_rows), pairs)] = data.draw(st.sampled_from([np.nan, np.inf, 0.0]))
    weights = data.draw(hnp.arrays(np.float32, pairs.shape, elements=plain))
    g = data.draw(hnp.arrays(np.float32, (len(pairs), width), elements=plain))
    out, vjp = jax.vjp(lambda y, w: ferrum_jax.moe_combine(y, pairs, w), rows, weights)
    oracle.assert_matches([out], oracle.moe_combine(rows, pairs, weights))
    oracle.assert_matches(vjp(g), oracle.moe_combine_grads(rows, pairs, weights, g))


@jobs
@given(st.data())
def test_dispatch_and_its_gradient(data):
    num_tokens, width = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 4))
    index = data.draw(hnp.arrays(np.int32, st.integers(0, 12), elements=hostile_ids))
    plain = st.floats(-4, 4, width=32)
    x = data.draw(hnp.arrays(np.float32, (num_tokens, width), elements=plain))
    g = data.draw(hnp.arrays(np.float32, (len(index), width), elements=plain))
    out, vjp = jax.vjp(lambda x: ferrum_jax.moe_dispatch(x, index), x)
    oracle.assert_matches([out], oracle.moe_dispatch(x, index))
    oracle.assert_matches(vjp(g), oracle.moe_dispatch_grad(x, index, g))
