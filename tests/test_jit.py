"""jit and eager calls: the same results, one equation, one compilation a shape."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPS, SMALL, rng

import ferrum_jax

PRIMITIVES = {  # of the functions that bind one of another name
    "route_topk_softmax": "ferrum_route_topk",
    "moe_align_block_size_pair_ids": "ferrum_moe_align_block_size",
}


def primitive(op):
    name = op.name.split("-")[0]
    return PRIMITIVES.get(name, f"ferrum_{name}")


@pytest.mark.parametrize("op", OPS, ids=str)
def test_jit_equals_eager(op, implementation):
    args = op.args(rng(op), SMALL, "float32")
    eager = op.results(*args, size=SMALL, implementation=implementation)
    jitted = jax.jit(lambda *a: op.results(*a, size=SMALL, implementation=implementation))(*args)
    for a, b in zip(eager, jitted, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_one_equation(op):
    jaxpr = jax.make_jaxpr(lambda *a: op.results(*a, size=SMALL))(*op.args(rng(op), SMALL, "float32"))
    names = [e.primitive.name for e in jaxpr.eqns if e.primitive.name != "broadcast_in_dim"]  # of a bias, to its rank
    assert names == [primitive(op)]


@pytest.mark.parametrize("op", OPS, ids=str)
def test_eager_compiles_once_a_shape(op):
    args = op.args(rng(op), SMALL, "float32")
    op.results(*args, size=SMALL)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr("logging.Logger.handle", lambda self, record: compiled.append(record.getMessage()))
        for _ in range(3):
            op.results(*args, size=SMALL)
    assert not [m for m in compiled if "ompil" in m]


@pytest.mark.parametrize("op", OPS, ids=str)
def test_without_jit(op):
    args = op.args(rng(op), SMALL, "float32")
    with jax.disable_jit():
        got = op.results(*args, size=SMALL)
    for a, b in zip(got, op.results(*args, size=SMALL), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_debug_nans_ends_in_its_error():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        ferrum_jax.route_topk_softmax(np.array([[1.0, np.nan]], np.float32), 1)


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


@pytest.mark.parametrize("op", OPS, ids=str)
def test_names_show_in_the_compiled_program(op):
    args = op.args(rng(op), SMALL, "float32")
    text = jax.jit(lambda *a: op.results(*a, size=SMALL)).lower(*args).as_text(debug_info=True)
    assert primitive(op) in text
