"""jit and eager calls: one equation, one compilation a shape, strong types."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, SMALL, finite_args, rng

import ferrum_jax

PRIMITIVES = {  # of the functions that bind one of another name, or two
    "route_topk_softmax": ["route_topk"],
    "route_topk_softmax-raw": ["route_topk"],
    "moe_align_block_size_pair_ids": ["moe_align_block_size"],
    "ragged_dot": ["align_groups", "grouped_matmul"],
    "ragged_dot-offset": ["align_groups", "grouped_matmul"],
    "ragged_dot-transposed": ["align_groups", "grouped_matmul_transposed"],
}
BY_NAME = {case.name: case for case in CASES}


def primitives(case):
    return [f"ferrum_{name}" for name in PRIMITIVES.get(case.name, [case.name.split("-")[0]])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_equation(case):
    """In the trace, and by its name in the lowered program, which profilers show."""

    def run(*args):
        return case.results(*args, size=SMALL)

    args = case.args(rng(case), SMALL, "float32")
    names = [e.primitive.name for e in jax.make_jaxpr(run)(*args).eqns]
    # A broadcast brings a bias to its rank, or makes the offset 0.
    assert [name for name in names if name != "broadcast_in_dim"] == primitives(case)
    text = jax.jit(run).lower(*args).as_text(debug_info=True)
    assert all(name in text for name in primitives(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_equations_are_lowered_once(case):
    """Under jit and vmap each of them calls the one function of the program, and XLA's program has no call left."""

    def run(*args):
        with jax.named_scope("outer"):
            first = case.results(*args, size=SMALL)
        return first, case.results(*args, size=SMALL)

    args = case.args(rng(case), SMALL, "float32")
    for f, given in ((run, args), (jax.vmap(run), jax.tree.map(lambda x: np.stack([x, x]), args))):
        lowered = jax.jit(f).lower(*given)
        text = lowered.as_text()
        for name in primitives(case):
            assert re.findall(rf"func.func private @({name}(?:_\d+)?)\(", text) == [name]
            assert len(re.findall(rf"call @{name}\(", text)) == 2
    compiled = lowered.compile().as_text()
    for name in primitives(case):
        assert name in compiled  # its instructions still bear the op's name
        assert not re.search(rf" call\(.*{name}", compiled)


@pytest.mark.parametrize("name", ["route_topk_softmax", "moe_plan", "moe_combine", "grouped_matmul_activated"])
def test_eager_compiles_once_a_shape(name, monkeypatch):
    case, compiled = BY_NAME[name], []
    monkeypatch.setattr("logging.Logger.handle", lambda self, record: compiled.append(record.getMessage()))

    def compilations(seed):
        compiled.clear()
        case.results(*finite_args(case, rng(seed), SMALL._replace(T=6)), size=SMALL._replace(T=6))
        return sum("ompil" in message for message in compiled)

    jax.clear_caches()
    with jax.log_compiles():
        assert compilations(0)
        assert [compilations(seed) for seed in (1, 2)] == [0, 0]


@pytest.mark.parametrize("name", ["moe_plan", "moe_combine"])
def test_without_jit(name):
    """An equation by itself has no other way to run than jit: it runs so under disable_jit too."""
    case = BY_NAME[name]
    args = case.args(rng(case), SMALL, "float32")
    with jax.disable_jit():
        got = case.results(*args, size=SMALL)
    oracle.assert_matches(got, case.oracle(*args, size=SMALL))


def test_debug_nans_ends_in_its_error():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        ferrum_jax.route_topk_softmax(np.array([[1.0, np.nan]], np.float32), 1)


@pytest.mark.slow
def test_large_tables_compile_in_seconds():
    ids = jax.ShapeDtypeStruct((8192, 10), jnp.int32)
    start = time.perf_counter()
    jax.jit(lambda ids: ferrum_jax.moe_plan(ids, 512, 64)).lower(ids).compile()
    assert time.perf_counter() - start < 20  # a search of the sorted ids, fused into its users, took over a minute


def test_weakly_typed_inputs_give_strong_results():
    weak = jnp.broadcast_to(jnp.asarray(2.0), (3, 4))
    assert jax.typeof(weak).weak_type
    ids, weights = ferrum_jax.route_topk_softmax(weak, 2)
    rows = ferrum_jax.moe_combine(weak, ids, weights)
    assert not any(jax.typeof(x).weak_type for x in (ids, weights, rows))
    tangent = jax.jvp(lambda x: ferrum_jax.route_topk_softmax(x, 2).expert_weights, (weak,), (weak,))[1]
    assert not jax.typeof(tangent).weak_type
