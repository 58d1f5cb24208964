"""Tables know what they are: their facts survive every transformation, and every consumer reads and checks them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import ferrum_jax as fj

T, E, K, H, F, BLOCK = 6, 4, 2, 3, 5, 2
P = T * K
R = np.random.default_rng(0)
IDS = np.argsort(R.random((T, E)), axis=1)[:, :K].astype(np.int32)
X, W, DOWN = (R.normal(size=shape).astype(np.float32) for shape in ((T, H), (E, H, F), (E, F, H)))
WEIGHTS = R.random((T, K)).astype(np.float32)
PACKED = fj.moe_plan(IDS, E, BLOCK)
PAIR_IDS = fj.moe_plan(IDS, E, BLOCK, pair_ids=True)
FACTS = {"kind": "packed", "num_experts": E, "top_k": K, "block_size": BLOCK}


def make(kind, ids):
    plan = fj.moe_plan(ids, E, BLOCK, pair_ids=kind == "pair_ids")
    return {"plan": plan, "routing": plan.routing, "pairs": fj.moe_build_pairs_by_token(ids, E)}


def facts(table):
    return {name: getattr(table, name) for name in table.facts}


def by_hand():
    """x[t] @ w[e] of each pair, in pair order."""
    return np.einsum("th,tkhf->tkf", X, W[IDS]).reshape(P, F)


def test_facts():
    assert facts(PACKED) == FACTS == facts(PACKED.routing)
    assert facts(PAIR_IDS) == FACTS | {"kind": "pair_ids"}
    assert facts(fj.moe_build_pairs_by_token(IDS, E)) == {"num_experts": E, "top_k": K}
    assert facts(fj.moe_align_block_size(IDS, E, BLOCK)) == FACTS
    assert facts(fj.moe_align_block_size_pair_ids(IDS, E, BLOCK)) == FACTS | {"kind": "pair_ids"}
    assert facts(fj.moe_route_plan(R.normal(size=(T, E)).astype(np.float32), K, BLOCK)[1]) == FACTS
    assert set(facts(fj.MoeRouting(*PACKED.routing)).values()) == {None}  # made elsewhere
    assert set(facts(PACKED.untyped()).values()) == {None}


def test_they_unpack_and_print_in_the_order_of_their_fields():
    pairs, tokens, offsets = fj.moe_build_pairs_by_token(IDS, E)
    slots, blocks, total = PACKED.routing
    assert [a.shape for a in PACKED] == [a.shape for a in (pairs, tokens, offsets, slots, blocks, total)]
    assert [f.name for f in dataclasses.fields(PACKED)][:6] == [
        *("pairs_by_token", "packed_token_idx", "expert_offsets"),
        *("sorted_token_ids", "block_ids", "total_tokens_post_pad"),
    ]
    assert "kind='packed', num_experts=4, top_k=2, block_size=2" in repr(PACKED)


@pytest.mark.parametrize("kind", ["packed", "pair_ids"])
def test_facts_survive_transformations(kind):
    want = {name: facts(table) for name, table in make(kind, IDS).items()}

    def check(tables):
        assert {name: facts(table) for name, table in tables.items()} == want
        return tables

    def step(carry, ids):
        tables = check(make(kind, ids))
        return tables, tables["plan"].block_ids

    several = jnp.stack([IDS, IDS[::-1], IDS])
    jitted = jax.jit(lambda ids: check(make(kind, ids)))
    check(jax.jit(check)(jitted(IDS)))
    mapped = jax.vmap(lambda ids: check(make(kind, ids)))(several)
    one = jax.tree.map(lambda a: a[1], check(jax.vmap(check)(mapped)))
    check(one)
    np.testing.assert_array_equal(one["plan"].block_ids, make(kind, IDS[::-1])["plan"].block_ids)
    last, blocks = jax.jit(lambda: jax.lax.scan(step, make(kind, IDS), several))()
    check(last)
    np.testing.assert_array_equal(blocks, mapped["plan"].block_ids)
    exported = export.deserialize(export.export(jitted)(jnp.asarray(IDS)).serialize())
    check(exported.call(jnp.asarray(IDS)))


def test_results_of_all_types_are_exported():
    def run(x):
        routed, plan = fj.moe_route_plan(x, K, BLOCK)
        return routed, plan, plan.routing, fj.moe_build_pairs_by_token(routed.expert_ids, E)

    logits = R.normal(size=(T, E)).astype(np.float32)
    loaded = export.deserialize(export.export(jax.jit(run))(logits).serialize()).call(logits)
    assert jax.tree.structure(loaded) == jax.tree.structure(run(logits))
    assert isinstance(loaded[0], fj.RouterOutput)


def test_a_branch_takes_tables_of_two_origins_untyped():
    def layer(packed, ids):
        plans = fj.moe_plan(ids, E, BLOCK), fj.moe_plan(ids, E, BLOCK, pair_ids=True)
        with pytest.raises(TypeError):
            jax.lax.cond(packed, lambda: plans[0], lambda: plans[1])
        return jax.lax.cond(packed, lambda: plans[0].untyped(), lambda: plans[1].untyped())

    for packed, plan in ((True, PACKED), (False, PAIR_IDS)):
        got = jax.jit(layer)(packed, IDS)
        np.testing.assert_array_equal(got.sorted_token_ids, plan.sorted_token_ids)
        assert got.kind is None


# ---- consumers


@pytest.mark.parametrize("routing", [PAIR_IDS, PAIR_IDS.routing], ids=["plan", "routing"])
def test_products_read_the_choices_off_pair_ids(routing):
    pairs = fj.grouped_matmul(X, W, routing)
    np.testing.assert_allclose(pairs, by_hand(), rtol=1e-5)
    np.testing.assert_array_equal(pairs, fj.grouped_matmul(X, W, routing, top_k=K))
    down = fj.grouped_matmul(pairs, DOWN, routing)
    want = np.einsum("pf,pfh->ph", by_hand(), DOWN[IDS.reshape(-1)])
    np.testing.assert_allclose(down, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(down, fj.grouped_matmul(pairs, DOWN, routing, top_k=1))


def test_products_of_packed_rows_and_of_tables_in_place_of_arrays():
    rows = fj.moe_dispatch(X, PACKED)
    np.testing.assert_array_equal(rows, fj.moe_dispatch(X, PACKED.packed_token_idx))
    made = fj.grouped_matmul(rows, W, PACKED)
    np.testing.assert_allclose(np.asarray(made)[np.asarray(PACKED.pairs_by_token).reshape(-1)], by_hand(), rtol=1e-5)
    by_table, by_array = (fj.moe_combine(made, p, WEIGHTS) for p in (PACKED, PACKED.pairs_by_token))
    np.testing.assert_array_equal(by_table, by_array)
    pairs = fj.moe_build_pairs_by_token(IDS, E)
    np.testing.assert_array_equal(by_table, fj.moe_combine(made, pairs, WEIGHTS))


def test_a_table_promises_unique_rows():
    def grads(pairs):
        f = jax.grad(lambda y, w: fj.moe_combine(y, pairs, w).sum(), (0, 1))
        return str(jax.make_jaxpr(f)(np.ones((P, H), np.float32), WEIGHTS))

    assert "ferrum_moe_combine_cotangents" in grads(PACKED)
    assert "ferrum_moe_combine_cotangents" not in grads(PACKED.pairs_by_token)


def test_where_tokens_and_pairs_fit_one_table_the_choices_must_be_given():
    ids = np.zeros((2, 2), np.int32)
    plan = fj.moe_plan(ids, 1, 128, pair_ids=True)
    x, w = np.ones((2, 3), np.float32), np.ones((1, 3, 3), np.float32)
    with pytest.raises(ValueError, match="top_k must be given here: lhs has 2 rows"):
        fj.grouped_matmul(x, w, plan.routing)
    assert fj.grouped_matmul(x, w, plan.routing, top_k=2).shape == (4, 3)
    assert fj.grouped_matmul(x, w, plan).shape == (4, 3)


@pytest.mark.parametrize("kind", ["packed", "pair_ids"])
def test_no_tokens(kind):
    for table in make(kind, IDS[:0]).values():
        if isinstance(table, fj.TokenPairs):
            assert fj.moe_combine(fj.moe_dispatch(X[:0], table), table, WEIGHTS[:0]).shape == (0, H)
        else:
            assert fj.grouped_matmul(X[:0], W, table).shape == (0, F)
            assert fj.check_routing(table, num_pairs=0) == []


def test_tables_made_elsewhere_are_taken_at_their_word():
    made = fj.MoeRouting(*PAIR_IDS.routing)
    np.testing.assert_allclose(fj.grouped_matmul(X, W, made, top_k=K), by_hand(), rtol=1e-5)
    told = fj.MoeRouting(*made, kind="pair_ids", num_experts=E, top_k=K, block_size=BLOCK)
    np.testing.assert_allclose(fj.grouped_matmul(X, W, told), by_hand(), rtol=1e-5)


ROWS = np.ones((P, H), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fj.grouped_matmul(X, W, PACKED, top_k=2), ValueError, "top_k must be 1 with a routing of packed rows"),
        (lambda: fj.grouped_matmul(X, W, PACKED), ValueError, "another number of pairs: lhs has 6 rows"),
        (lambda: fj.grouped_matmul(X, W, PACKED.routing), ValueError, "another number of pairs: lhs has 6 rows"),
        (lambda: fj.grouped_matmul(X, W, PAIR_IDS, top_k=3), ValueError, "top_k must be 2 or 1 .* K = 2; got 3"),
        (lambda: fj.grouped_matmul(X[:5], W, PAIR_IDS), ValueError, "lhs has 5 rows, which make 10 .* or 5"),
        (lambda: fj.grouped_matmul(X[:5], W, PAIR_IDS.routing), ValueError, "lhs has 5 rows, which make 10 .* or 5"),
        (lambda: fj.grouped_matmul(X, W, PAIR_IDS, top_k=1), ValueError, "lhs has 6 rows, which make 6 rows"),
        (lambda: fj.grouped_matmul(X, W[:3], PAIR_IDS), ValueError, "rhs must have the 4 experts of routing"),
        (lambda: fj.grouped_matmul(ROWS, W, fj.moe_build_pairs_by_token(IDS, E)), TypeError, "got TokenPairs"),
        (
            lambda: fj.grouped_matmul(X, W, dataclasses.replace(PAIR_IDS, block_size=4)),
            ValueError,
            "4 slots in each of its",
        ),
        (lambda: fj.moe_dispatch(X, PAIR_IDS), ValueError, "must be of packed rows.*got one of pair ids"),
        (lambda: fj.moe_dispatch(X, PACKED.routing), TypeError, "TokenPairs or a MoePlan; got MoeRouting"),
        (
            lambda: fj.moe_dispatch(X, PACKED, pairs_by_token=PACKED.pairs_by_token),
            ValueError,
            "pairs_by_token must be None with a table",
        ),
        (lambda: fj.moe_combine(ROWS, PAIR_IDS, WEIGHTS), ValueError, "must be of packed rows.*got one of pair ids"),
        (lambda: fj.moe_combine(ROWS, PACKED.routing, WEIGHTS), TypeError, "got MoeRouting"),
        (lambda: fj.moe_combine(ROWS[:5], PACKED, WEIGHTS), ValueError, "must have the P = 12 rows of the table"),
        (lambda: fj.moe_combine(ROWS, PACKED, WEIGHTS[:, :1]), ValueError, "pair_weights.*K = 2"),
    ],
)
def test_the_wrong_table_is_an_error_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call()
