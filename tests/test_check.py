"""The checker of tables: silent on right ones, in words on every wrong one, the same on the host and under jit."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import SIZES, expert_ids, rng
from hypothesis import HealthCheck, given, settings
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ferrum_jax as fj

jobs = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

IDS = np.array([[1, 0], [1, 3], [-1, 1], [0, 9]])  # of 4 experts
E, K, BLOCK, PAIRS = 4, 2, 2, 8


def make(kind, ids, num_experts, block_size, pair_ids=False):
    """The tables by the oracle, as host arrays."""
    plan = [x.value for x in oracle.moe_plan(ids, num_experts=num_experts, block_size=block_size, pair_ids=pair_ids)]
    parts = {fj.TokenPairs: plan[:3], fj.MoeRouting: plan[3:], fj.MoePlan: plan}
    return kind(*parts[kind])


def check(tables, num_experts=E, **kwargs):
    if isinstance(tables, fj.MoeRouting) and "expert_ids" not in kwargs:
        kwargs.setdefault("num_pairs", PAIRS)
    return fj.check_routing(tables, num_experts, **kwargs)


@pytest.mark.parametrize("pair_ids", [False, True])
@pytest.mark.parametrize("size", [s for s in SIZES if s.E < 1000], ids=str)
def test_right_tables(size, pair_ids):
    ids = expert_ids(rng("check", size), size)[0]
    for kind in (fj.TokenPairs, fj.MoeRouting, fj.MoePlan):
        tables = make(kind, ids, size.E, size.block, pair_ids)
        block = None if kind is fj.TokenPairs or not ids.size else size.block
        assert fj.check_routing(tables, size.E, block_size=block, num_pairs=ids.size, pair_ids=pair_ids) == []
        assert fj.check_routing(tables, size.E, expert_ids=ids, pair_ids=pair_ids) == []
    assert fj.check_routing(fj.moe_plan(ids, size.E, size.block, pair_ids=pair_ids), size.E, pair_ids=pair_ids) == []


def ids_of(tables, shape, num_experts, block_size, pair_ids):
    """Ids that would give these tables, if any do."""
    ids = np.full(shape[0] * shape[1], -1)
    if not isinstance(tables, fj.MoeRouting):
        segments = [range(max(a, 0), b) for a, b in zip(tables.expert_offsets, tables.expert_offsets[1:], strict=False)]
        for p, row in enumerate(tables.pairs_by_token.reshape(-1)):
            ids[p] = next((e for e, rows in enumerate(segments) if int(row) in rows), -1)
    else:
        slots, blocks, _ = tables
        live = [(s, b) for s, b in zip(slots, np.repeat(blocks, block_size), strict=True) if 0 <= s < ids.size]
        for place, (slot, owner) in enumerate(live):
            if place < ids.size:
                ids[slot if pair_ids else place] = owner
    return ids.reshape(shape)


@jobs
@given(st.data())
def test_silent_exactly_on_what_some_ids_give(data):
    """Right tables with entries changed at random: either ids exist that give them, or the checker says so."""
    num_experts, block_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    shape, pair_ids = (data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))), data.draw(st.booleans())
    ids = np.array(data.draw(st.lists(st.integers(-1, num_experts), min_size=6, max_size=6)))
    ids = ids[: shape[0] * shape[1]].reshape(shape)
    kind = data.draw(st.sampled_from([fj.TokenPairs, fj.MoeRouting, fj.MoePlan]))
    tables = kind(*(np.array(x) for x in make(kind, ids, num_experts, block_size, pair_ids)))
    right = kind(*(x.copy() for x in tables))
    for _ in range(data.draw(st.integers(0, 3))):
        table = data.draw(st.sampled_from(list(tables)))
        if table.size:
            index = data.draw(st.integers(0, table.size - 1))
            delta = data.draw(st.sampled_from([-1, 1, -2, 2, 2**40]))
            table.reshape(-1)[index] += delta

    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    sizes = {"block_size": None if kind is fj.TokenPairs else block_size, "num_pairs": ids.size, "pair_ids": pair_ids}
    run = functools.partial(fj.check_routing, tables, num_experts, **sizes)
    source = ids_of(tables, shape, num_experts, block_size, pair_ids)
    assert (run() == []) == same(tables, make(kind, source, num_experts, block_size, pair_ids))
    assert (run(expert_ids=ids) == []) == same(tables, right)


def put(name, index, value):
    def change(tables):
        table = np.array(getattr(tables, name))
        table[index] = value
        return dataclasses.replace(tables, **{name: table})

    return change


def swap(name, i, j):
    def change(tables):
        table = np.array(getattr(tables, name))
        table[i], table[j] = table[j].copy(), table[i].copy()
        return dataclasses.replace(tables, **{name: table})

    return change


# IDS give: offsets 0 2 5 5 6; rows by pair [2 0] [3 5] [-1 4] [1 -1]; tokens 0 3 0 1 2 1 | 4 4;
# blocks 0 1 1 3 of 2 | 3 more: m = 4, (8 - 4) // 2 = 2, so 6 blocks of 2; slots 0 1 2 3 4 8 5 8 | 8 8 8 8.
WRONG = [
    (fj.TokenPairs, put("expert_offsets", 0, 1), "expert_offsets[0] must be 0"),
    (fj.TokenPairs, put("expert_offsets", 1, 9), "expert_offsets[2] must be at least the offset before; got 5"),
    (fj.TokenPairs, put("expert_offsets", 4, 9), "expert_offsets[4] must be at most the number of pairs, 8; got 9"),
    (fj.TokenPairs, put("pairs_by_token", (1, 1), 6), "pairs_by_token[1, 1] must be -1, or a packed row before"),
    (fj.TokenPairs, put("pairs_by_token", (2, 0), -2), "pairs_by_token[2, 0] must be -1, or a packed row before"),
    (
        fj.TokenPairs,
        put("pairs_by_token", (1, 1), 4),
        "packed row [4] must be named by one entry of pairs_by_token; got 2",
    ),
    (
        fj.TokenPairs,
        put("pairs_by_token", (3, 0), -1),
        "packed row [1] must be named by one entry of pairs_by_token; got 0",
    ),
    (fj.TokenPairs, put("packed_token_idx", 3, 2), "pairs_by_token[1, 0] must be the packed row that packed_token_idx"),
    (fj.TokenPairs, put("packed_token_idx", 6, 0), "packed_token_idx[6] must be 4, no token"),
    (
        fj.MoeRouting,
        put("total_tokens_post_pad", (), 7),
        "total_tokens_post_pad must be a multiple of the block size 2",
    ),
    (fj.MoeRouting, put("total_tokens_post_pad", (), 14), "total_tokens_post_pad must be a multiple of the block size"),
    (fj.MoeRouting, put("block_ids", 3, 4), "block_ids[3] must be an expert of 4 in a block before the total; got 4"),
    (fj.MoeRouting, put("block_ids", 5, 0), "block_ids[5] must be -1 in a block past the total; got 0"),
    (fj.MoeRouting, put("block_ids", 0, 2), "block_ids[1] must be at least the owner of the block before; got 1"),
    (
        fj.MoeRouting,
        put("sorted_token_ids", 1, -1),
        "sorted_token_ids[1] must be a packed row, or 8 for padding; got -1",
    ),
    (fj.MoeRouting, put("sorted_token_ids", 9, 6), "sorted_token_ids[9] must be 8, no pair, past the total; got 6"),
    (fj.MoeRouting, put("sorted_token_ids", 6, 8), "sorted_token_ids[6] must be a packed row at the start of a block"),
    (fj.MoeRouting, put("sorted_token_ids", 3, 8), "sorted_token_ids[4] must be 8 where the slot before, of the same"),
    (fj.MoeRouting, put("sorted_token_ids", 1, 2), "sorted_token_ids[1] must be the next packed row; got 2"),
    (fj.MoePlan, put("block_ids", 2, 2), "sorted_token_ids[4] must be a packed row of the expert that owns this block"),
    (fj.MoePlan, put("total_tokens_post_pad", (), 6), "total_tokens_post_pad must be the sum of every expert's pairs"),
    (
        fj.MoePlan,
        put("sorted_token_ids", 1, 8),
        "sorted_token_ids together must be as many pairs as have an expert; got 5",
    ),
]
WRONG_PAIR_IDS = [  # slots 1 6 0 2 5 8 3 8 | 8 ...
    (
        fj.MoeRouting,
        swap("sorted_token_ids", 0, 1),
        "sorted_token_ids[1] must be a pair id above that of the slot before",
    ),
    (
        fj.MoeRouting,
        put("sorted_token_ids", 6, 5),
        "sorted_token_ids[6] must be a pair id that no slot before holds; got 5",
    ),
    (
        fj.MoePlan,
        put("sorted_token_ids", 6, 4),
        "sorted_token_ids[6] must be a pair of the expert that owns this block",
    ),
]
ALL_WRONG = [(*w, False) for w in WRONG] + [(*w, True) for w in WRONG_PAIR_IDS]


@functools.cache
def compiled(kind, pair_ids, with_ids=False):
    def run(tables, ids):
        given = {"expert_ids": ids} if with_ids else {}
        return check(tables, block_size=None if kind is fj.TokenPairs else BLOCK, pair_ids=pair_ids, **given)

    return jax.jit(lambda *args: checkify.checkify(run)(*args)[0])


def as_int32(tables):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), tables)


@pytest.mark.parametrize(("kind", "change", "words", "pair_ids"), ALL_WRONG)
def test_words_on_the_host_and_under_jit(kind, change, words, pair_ids):
    right = make(kind, IDS, E, BLOCK, pair_ids)
    assert check(right, pair_ids=pair_ids) == []
    wrong = change(right)
    said = check(wrong, pair_ids=pair_ids)
    assert any(s.startswith(words) for s in said), said
    run = compiled(kind, pair_ids)
    assert run(as_int32(right), IDS).get() is None
    assert run(as_int32(wrong), IDS).get().startswith(said[0])


def test_order_inside_an_expert():
    """Tables of the same sizes, an unstable sort's: rows 2 and 3 of expert 1 the other way round."""
    tables = make(fj.TokenPairs, IDS, E, BLOCK)
    for change in (swap("pairs_by_token", (0, 0), (1, 0)), swap("packed_token_idx", 2, 3)):
        tables = change(tables)
    said = ["packed row [3] must be that of a pair after the one before, of the same expert; got 0"]
    assert check(tables) == said
    assert compiled(fj.TokenPairs, False)(as_int32(tables), IDS).get().startswith(said[0])


def test_other_ids():
    """Right tables, but of other ids."""
    other = np.where(IDS == 3, 2, IDS)
    for kind in (fj.TokenPairs, fj.MoeRouting, fj.MoePlan):
        tables = make(kind, IDS, E, BLOCK)
        said = check(tables, expert_ids=other)
        assert check(tables, expert_ids=IDS) == []
        if kind is fj.TokenPairs:
            assert len(said) == 1
            assert said[0].startswith("pairs_by_token[1, 1] must be a packed row of this pair's expert in expert_ids")
        assert compiled(kind, False, True)(as_int32(tables), other).get().startswith(said[0])
        assert compiled(kind, False, True)(as_int32(tables), IDS).get() is None


def test_leading_axes():
    many = np.stack([np.stack([IDS, IDS[::-1]]), np.stack([IDS * 0, IDS - 5])])
    plan = fj.moe_plan(many, E, BLOCK)
    assert check(plan, expert_ids=many) == []
    wrong = put("packed_token_idx", (1, 0, 7), 4)(plan)
    said = check(wrong, expert_ids=many)
    assert said[0].startswith("pairs_by_token[1, 0, 3, 1] must be the packed row that packed_token_idx")
    run = jax.jit(checkify.checkify(lambda plan: check(plan)))
    assert run(plan)[0].get() is None
    assert run(as_int32(wrong))[0].get().startswith(said[0])
    assert check(jax.tree.map(lambda x: x[:0], plan)) == []
    each = jax.vmap(lambda pairs: jnp.zeros(()) if check(fj.TokenPairs(*pairs)) == [] else jnp.ones(()))
    error = jax.jit(checkify.checkify(each))([x[1] for x in [*as_int32(wrong)][:3]])[0].get()
    assert error.startswith("pairs_by_token[3, 1] must be the packed row that packed_token_idx")


def test_under_shard_map():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    ids = np.stack([IDS, IDS[::-1]]).astype(np.int32)

    def local(ids, shift):
        plan = fj.moe_plan(ids, E, BLOCK)
        check(dataclasses.replace(plan, block_ids=plan.block_ids + shift), expert_ids=ids)
        return plan.total_tokens_post_pad

    run = jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
    checked = jax.jit(checkify.checkify(run))
    assert checked(ids, jnp.int32(0))[0].get() is None
    assert "block_ids[0, 3] must be an expert of 4" in checked(ids, jnp.int32(1))[0].get()


def test_traced_without_checkify_is_an_error():
    with pytest.raises(ValueError, match="not functionalized"):
        jax.jit(lambda ids: check(fj.moe_plan(ids, E, BLOCK)))(IDS)


@pytest.mark.parametrize("tables", [np.int64, np.uint32, np.int16])
def test_any_integer_dtype(tables, x64):
    plan = make(fj.MoePlan, np.abs(IDS) % E, E, BLOCK)
    plan = jax.tree.map(
        lambda x: np.where(x < 0, 0, x).astype(tables) if tables == np.uint32 else x.astype(tables), plan
    )
    said = check(plan)
    assert said == check(jax.tree.map(jnp.asarray, plan))
    assert bool(said) == (tables == np.uint32)  # blocks past the total hold 0 there
    if tables == np.int64:
        wide = put("packed_token_idx", 3, plan.packed_token_idx[3] + 2**32)(plan)
        for arrays in (wide, jax.tree.map(jnp.asarray, wide)):
            assert "packed_token_idx" in check(arrays)[0]


def test_ids_beyond_int32_are_none_under_jit_too():
    """64 bits of NumPy, of which JAX would take the lower 32: here those of expert 1."""
    wide = np.array([[2**32 + 1, 0]])
    right = make(fj.MoePlan, wide, E, BLOCK)
    wrong = make(fj.MoePlan, wide % 2**32, E, BLOCK)
    for plan, silent in ((right, True), (wrong, False)):
        run = checkify.checkify(lambda plan: check(plan, expert_ids=wide))
        error, _ = jax.jit(run)(plan)
        assert (error.get() is None) == silent == (check(plan, expert_ids=wide) == [])


PAIRS_OK, BLOCKS_OK, PLAN_OK = (make(kind, IDS, E, BLOCK) for kind in (fj.TokenPairs, fj.MoeRouting, fj.MoePlan))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: check(tuple(PAIRS_OK)), TypeError, "tables must be TokenPairs, MoeRouting or MoePlan; got tuple"),
        (lambda: check(PAIRS_OK, 4.0), TypeError, "num_experts.*float"),
        (lambda: check(PAIRS_OK, 0), ValueError, "num_experts.*got 0"),
        (lambda: check(PAIRS_OK, 5), ValueError, "expert_offsets must have 6 entries; got 5"),
        (lambda: check(PAIRS_OK, num_pairs=6), ValueError, r"pairs_by_token must have num_pairs = 6.*\(4, 2\)"),
        (lambda: check(PAIRS_OK, block_size=2), ValueError, "block_size must be None for TokenPairs.*got 2"),
        (lambda: check(PAIRS_OK, expert_ids=IDS[:2]), ValueError, r"expert_ids must have shape \(4, 2\).*\(2, 2\)"),
        (lambda: check(PAIRS_OK, expert_ids=IDS[None]), ValueError, r"expert_ids must have the leading axes \(\)"),
        (lambda: check(PAIRS_OK, expert_ids=IDS * 0.5), TypeError, "expert_ids must hold integers; got float64"),
        (
            lambda: check(dataclasses.replace(PAIRS_OK, expert_offsets="x")),
            TypeError,
            "expert_offsets must hold integers",
        ),
        (
            lambda: check(dataclasses.replace(PAIRS_OK, packed_token_idx=np.zeros(3, int))),
            ValueError,
            "packed_token_idx.*8.*got 3",
        ),
        (
            lambda: check(dataclasses.replace(PAIRS_OK, pairs_by_token=np.zeros(3, int))),
            ValueError,
            "pairs_by_token.*2 axes",
        ),
        (lambda: fj.check_routing(BLOCKS_OK, E), ValueError, "num_pairs must be given for MoeRouting"),
        (lambda: check(BLOCKS_OK, num_pairs=-1), ValueError, "num_pairs.*got -1"),
        (lambda: check(BLOCKS_OK, block_size=3), ValueError, "3 slots for each of the 6 block_ids; got 12"),
        (
            lambda: check(dataclasses.replace(BLOCKS_OK, block_ids=np.zeros(5, int))),
            ValueError,
            "each of the 5 block_ids; got 12",
        ),
        (
            lambda: check(dataclasses.replace(BLOCKS_OK, block_ids=np.zeros(0, int))),
            ValueError,
            "each of the 0 block_ids; got 12",
        ),
        (lambda: check(PLAN_OK, block_size=0), ValueError, "block_size.*got 0"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.filterwarnings("error")
def test_offsets_at_the_end_of_int32():
    plan = fj.moe_plan(np.array([[0, 1]]), 2, 4)
    assert fj.check_routing(dataclasses.replace(plan, expert_offsets=np.array([0, 1, 2**31 - 1], np.int32)), 2)
