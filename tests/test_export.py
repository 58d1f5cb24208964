"""jax.export: written, read back and executed; symbolic batch sizes refused by nothing of ours."""

import functools

import jax
import layer
import numpy as np
import pytest
from cases import FLOAT_OPS, OPS, SMALL, Size, finite_args, rng
from jax import export


@pytest.mark.parametrize("op", OPS, ids=str)
def test_round_trip(op):
    args = op.args(rng(op), SMALL, "float32")
    f = functools.partial(op.results, size=SMALL)
    stored = export.export(jax.jit(f), platforms=("cpu", "cuda"))(*args).serialize()
    for got, want in zip(export.deserialize(stored).call(*args), f(*args), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("op", FLOAT_OPS, ids=str)
def test_with_derivatives(op):
    args = finite_args(op, rng(op), SMALL)

    def loss(x):
        return (op.float_results(x, *args[1:], size=SMALL)[0] ** 2).sum()

    stored = export.export(jax.jit(loss))(args[0]).serialize(vjp_order=1)
    got = jax.grad(export.deserialize(stored).call)(args[0])
    np.testing.assert_allclose(got, jax.grad(loss)(args[0]), rtol=1e-5, atol=1e-6)


def test_whole_layer():
    size = Size(5, 4, 2, 3)
    args = layer.init(jax.random.key(0), size)
    f = functools.partial(layer.packed, top_k=2)
    exported = export.export(jax.jit(f))(*args)
    np.testing.assert_allclose(exported.call(*args), f(*args), rtol=1e-6)
