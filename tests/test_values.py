"""Results against the oracles: every op, size and dtype, with hostile values."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, SMALL, Size, finite_args, per_primitive, rng, values

import ferrum_jax


@pytest.mark.parametrize(("case", "dtype", "size"), values(), ids=str)
def test_matches_oracle(case, dtype, size, implementation):
    args = case.args(rng(case, size), size, dtype)
    got = jax.jit(lambda *a: case.results(*a, size=size, implementation=implementation))(*args)
    oracle.assert_matches(got, case.oracle(*args, size=size))
    assert not any(jax.typeof(r).weak_type for r in got)


@pytest.mark.parametrize("case", per_primitive(CASES), ids=str)
def test_leading_axes(case, implementation):
    """All that a kernel sees of batches: operands have a leading axis of the batch's size, or of 1, and are shared.

    All operands of the batch, only the first, all but the first.
    """
    slices = [finite_args(case, rng(case, i), SMALL) for i in range(3)]
    count = len(slices[0])
    patterns = [[True] * count, [i == 0 for i in range(count)], [i > 0 for i in range(count)]]
    patterns = [p for p in patterns if any(p) and len({p[i] for i in case.tables}) < 2]
    batches = [
        [np.stack([s[i] for s in slices]) if mapped else slices[0][i][None] for i, mapped in enumerate(p)]
        for p in patterns
    ]
    run = jax.jit(lambda batches: [case.results(*b, size=SMALL, implementation=implementation) for b in batches])
    for pattern, got in zip(patterns, run(batches), strict=True):
        for b, own in enumerate(slices):
            args = [own[i] if mapped else slices[0][i] for i, mapped in enumerate(pattern)]
            oracle.assert_matches([np.asarray(r)[b] for r in got], case.oracle(*args, size=SMALL))


@pytest.mark.tables
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "uint32", "int64", "uint64"])
@pytest.mark.usefixtures("x64")
def test_ids_of_any_integer_dtype(dtype, implementation):
    info = np.iinfo(dtype)
    hostile = [
        v for v in (-1, 6, 2**31 - 1, -(2**31), 2**31, 2**32 + 1, info.max, info.min) if info.min <= v <= info.max
    ]
    ids = np.array([*range(6), *hostile, *[1] * (10 - len(hostile))], dtype=dtype)[:, None]
    want = np.where((ids >= 0) & (ids < 6), ids.astype(np.int64), -1)
    got = ferrum_jax.moe_plan(ids, 6, 2, implementation=implementation)
    oracle.assert_matches(got, oracle.moe_plan(want, num_experts=6, block_size=2))
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    rows = ferrum_jax.moe_dispatch(x, ids[:, 0], implementation=implementation)
    oracle.assert_matches([rows], oracle.moe_dispatch(x, want[:, 0]))


def test_numpy_ids_of_64_bits_do_not_wrap_without_x64():
    """JAX would cut them down to 32 bits: 2^32 + 1 would be expert 1."""
    ids = np.array([[2**32 + 1, 1], [-(2**32) + 1, -(2**63)]])
    for given in (ids, ids.tolist()):
        assert ferrum_jax.moe_build_pairs_by_token(given, 6).pairs_by_token.tolist() == [[-1, 0], [-1, -1]]
    assert ferrum_jax.moe_dispatch(jnp.ones((3, 1)), np.array([2**32 + 1, 2, 2**63], np.uint64)).tolist() == [
        [0],
        [1],
        [0],
    ]


@pytest.mark.tables
def test_more_experts_than_the_dtype_of_the_ids_can_name(implementation):
    ids = np.array([[0, 255], [7, 255]], np.uint8)
    got = ferrum_jax.moe_build_pairs_by_token(ids, 4096, implementation=implementation)
    oracle.assert_matches(got, oracle.moe_build_pairs_by_token(ids, num_experts=4096))


@pytest.mark.parametrize(
    "size",
    [
        Size(400, 64, 4, 1, 16),
        *(pytest.param(s, marks=pytest.mark.full) for s in (Size(300, 5, 1, 1, 128), Size(2, 70_000, 3, 1, 2))),
    ],
    ids=str,
)
@pytest.mark.tables
def test_larger_tables(size, implementation):
    for case in CASES:
        if not case.floats:
            args = case.args(rng(case, size), size, "int32")
            got = case.results(*args, size=size, implementation=implementation)
            oracle.assert_matches(got, case.oracle(*args, size=size))


def test_tables_too_wide_for_one_word_per_pair():
    ids = rng("wide").integers(-1, 2**30 + 1, size=(6, 3)).astype(np.int32)
    ids[0] = 2**30 - 1
    got = ferrum_jax.moe_build_pairs_by_token(ids % 40_000_000, 40_000_000)
    order = np.argsort((ids % 40_000_000).reshape(-1), kind="stable")
    np.testing.assert_array_equal(got.packed_token_idx, order // 3)


def test_ids_are_distinct_and_in_range_for_any_bits(implementation):
    bits = rng("bits").integers(0, 2**32, size=(200, 33), dtype=np.uint32)
    bits[:50] |= 0x7F800000
    ids, _ = ferrum_jax.route_topk_softmax(bits.view(np.float32), 33, implementation=implementation)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(33), (200, 1)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", per_primitive(CASES), ids=str)
def test_x64_changes_nothing(case, implementation):
    args = case.args(rng(case), SMALL, "bfloat16")
    got = case.results(*args, size=SMALL, implementation=implementation)
    oracle.assert_matches(got, case.oracle(*args, size=SMALL))


def test_weights_of_any_float_dtype(implementation):
    slots, weights = np.ones((3, 2, 4), np.float32), rng("w").random((3, 2)).astype(np.float32)
    for dtype in ("bfloat16", "float16"):
        low = jnp.asarray(weights).astype(dtype)
        got = ferrum_jax.weighted_sum_batched(slots, low, implementation=implementation)
        oracle.assert_matches([got], oracle.weighted_sum_batched(slots, low))


def test_aligned_rows_are_enough_and_not_a_block_too_many():
    for num_pairs, num_experts, block in [(0, 5, 4), (1, 1, 1), (7, 3, 4), (256, 128, 16), (9, 9, 2), (30, 4, 7)]:
        busy = min(num_experts, num_pairs)
        counts = np.ones(busy, int)
        counts[:1] += num_pairs - busy  # the worst case: every expert has one row, and one has all the rest
        worst = max(sum(-(-c // block) for c in counts) * block, 0)
        bound = ferrum_jax.max_aligned_rows(num_pairs, num_experts, block)
        assert worst <= bound <= worst + block
        assert bound % block == 0
