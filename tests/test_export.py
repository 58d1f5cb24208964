"""jax.export: written, read back and executed; with symbolic sizes where tables are not made."""

import functools

import jax
import layer
import numpy as np
import pytest
from cases import CASES, FLOAT_CASES, SMALL, Size, finite_args, per_primitive, rng
from compiled import on_h200
from jax import export

import ferrum_jax

CHECKS = ferrum_jax.export_checks()


@pytest.mark.parametrize("case", per_primitive(CASES), ids=str)
def test_round_trip(case):
    args = case.args(rng(case), SMALL, "float32")
    f = functools.partial(case.results, size=SMALL)
    stored = export.export(jax.jit(f), platforms=("cpu", "cuda"), disabled_checks=CHECKS)(*args).serialize()
    for got, want in zip(export.deserialize(stored).call(*args), f(*args), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("case", per_primitive(FLOAT_CASES), ids=str)
def test_with_derivatives(case):
    args = finite_args(case, rng(case), SMALL)

    def loss(x):
        return (case.float_results(x, *args[1:], size=SMALL)[0] ** 2).sum()

    stored = export.export(jax.jit(loss))(args[0]).serialize(vjp_order=1)
    got = jax.grad(export.deserialize(stored).call)(args[0])
    np.testing.assert_allclose(got, jax.grad(loss)(args[0]), rtol=1e-5, atol=1e-6)


def test_whole_layer():
    size = Size(5, 4, 2, 3)
    args = layer.init(0, size)
    f = functools.partial(layer.packed, top_k=2)
    exported = export.export(jax.jit(f))(*args)
    np.testing.assert_allclose(exported.call(*args), f(*args), rtol=1e-6)


def test_symbolic_token_counts():
    """For a GPU too, on which None would take kernels."""
    (t,) = export.symbolic_shape("T")

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    def exported(f, *args):
        with on_h200():
            return export.export(jax.jit(f), platforms=("cpu", "cuda"), disabled_checks=CHECKS)(*args)

    combine = functools.partial(ferrum_jax.moe_combine, unique_rows=True)
    operands = of("float32", 2 * t, 4), of("int32", t, 2), of("float32", t, 2)
    y, pairs, weights = np.ones((6, 4), np.float32), np.arange(6, dtype=np.int32).reshape(3, 2), np.ones((3, 2), "f4")
    np.testing.assert_array_equal(exported(combine, *operands).call(y, pairs, weights), np.full((3, 4), 2.0))
    gradients = jax.grad(lambda *args: combine(*args).sum(), argnums=(0, 2))
    for got, want in zip(exported(gradients, *operands).call(y, pairs, weights), (1, 4), strict=True):
        np.testing.assert_array_equal(got, np.full_like(got, want))
    with pytest.raises(NotImplementedError, match="implementation='triton' cannot be used: a kernel's grid"):
        exported(functools.partial(combine, implementation="triton"), *operands)
    route = exported(lambda x: ferrum_jax.route_topk_softmax(x, 2), of("float32", t, 8))
    assert route.call(np.ones((3, 8), np.float32))[0].shape == (3, 2)
    weighted = exported(ferrum_jax.weighted_sum_batched, of("float32", t, 2, 4), of("float32", t, 2))
    assert weighted.out_avals[0].shape == (t, 4)
    tables = of("int32", 96), of("int32", 6), of("int32")

    def product(x, w, *r):
        return ferrum_jax.grouped_matmul(x, w, ferrum_jax.MoeRouting(*r, kind="packed"), activation="silu")

    assert exported(product, of("float32", t, 4), of("float32", 4, 4, 6), *tables).out_avals[0].shape == (t, 3)
    with pytest.raises(TypeError, match="num_pairs must be a Python int"):  # a table's length depends on it
        exported(lambda i: ferrum_jax.moe_plan(i, 4, 2), of("int32", t, 2))
    with pytest.raises(TypeError, match="num_pairs must be a Python int"):
        exported(lambda x: ferrum_jax.moe_route_plan(x, 2, 4), of("float32", t, 8))
    matrices = of("float32", 8, 4, 6), of("float32", 8, 3, 4)
    with pytest.raises(TypeError, match=r"moe_mlp: T\*K must be a Python int"):
        exported(functools.partial(ferrum_jax.moe_mlp, top_k=2), of("float32", t, 4), of("float32", t, 8), *matrices)


def test_symbolic_batch():
    (b,) = export.symbolic_shape("B")
    f = jax.jit(lambda i: ferrum_jax.moe_plan(i, 4, 2))
    ids = rng("b").integers(0, 4, (3, 5, 2)).astype(np.int32)
    exported = export.export(f)(jax.ShapeDtypeStruct((b, 5, 2), np.int32))
    for got, want in zip(exported.call(ids), f(ids), strict=True):
        np.testing.assert_array_equal(got, want)
