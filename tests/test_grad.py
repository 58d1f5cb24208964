"""Derivatives: forward, reverse, of second order, against finite differences, the oracles and a dense layer."""

import functools
import re

import jax
import jax.numpy as jnp
import layer
import numpy as np
import oracle
import pytest
from cases import (
    DTYPES,
    FLOAT_OPS,
    OPS,
    SMALL,
    Size,
    combine_args,
    combine_repeated_args,
    dispatch_pairs_args,
    finite_args,
    rng,
    weighted_sum_args,
)
from jax.test_util import check_grads

import ferrum_jax

BY_NAME = {op.name: op for op in OPS}


def as_function_of_floats(op, args, size, implementation):
    def f(*floats):
        given = iter(floats)
        full = [next(given) if i in op.floats else a for i, a in enumerate(args)]
        return op.float_results(*full, size=size, implementation=implementation)

    return f, [jnp.asarray(args[i]) for i in op.floats]


@pytest.mark.parametrize("op", FLOAT_OPS, ids=str)
def test_both_modes_to_second_order(op, implementation):
    f, floats = as_function_of_floats(op, finite_args(op, rng(op), SMALL), SMALL, implementation)
    check_grads(f, floats, order=2, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2, eps=1e-2)


@pytest.mark.parametrize("op", FLOAT_OPS, ids=str)
@pytest.mark.parametrize("size", [Size(0, 4, 2, 3), Size(1, 1, 1, 1)], ids=str)
def test_empty_and_single(op, size, implementation):
    f, floats = as_function_of_floats(op, finite_args(op, rng(op), size), size, implementation)
    gradient = jax.grad(lambda *a: sum(jnp.sum(r) for r in f(*a)), argnums=tuple(range(len(floats))))(*floats)
    for g, x in zip(gradient, floats, strict=True):
        assert (g.shape, g.dtype) == (x.shape, x.dtype)
        assert bool(jnp.all(jnp.isfinite(g)))


@pytest.mark.parametrize("op", FLOAT_OPS, ids=str)
def test_linearize_agrees_with_jvp_and_transpose(op, implementation):
    f, floats = as_function_of_floats(op, finite_args(op, rng(op), SMALL), SMALL, implementation)
    tangents = [jnp.asarray(rng(op, i).normal(size=x.shape).astype(np.float32)) for i, x in enumerate(floats)]
    out, linear = jax.linearize(f, *floats)
    jvp = jax.jvp(f, floats, tangents)[1]
    for got, want in zip(linear(*tangents), jvp, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    cotangents = jax.linear_transpose(linear, *floats)(out)
    inner = lambda xs, ys: sum(jnp.vdot(x, y) for x, y in zip(xs, ys, strict=True))  # noqa: E731
    np.testing.assert_allclose(inner(cotangents, tangents), inner(out, jvp), rtol=1e-4, atol=1e-5)


def vjp(f, primal_floats, g):
    return jax.vjp(f, *primal_floats)[1](g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unique_rows", [True, False])
@pytest.mark.parametrize("size", [SMALL, Size(7, 8, 2, 130), Size(9, 257, 10, 20)], ids=str)
def test_combine_against_oracle_with_garbage(size, unique_rows, dtype, implementation):
    """Rows that no pair names hold NaN, which must reach no gradient; in low precision each sum is cast once."""
    make = combine_args if unique_rows else combine_repeated_args
    y, pairs, weights = make(rng("grad", size), size, dtype)
    g = jnp.asarray(rng("g").normal(size=(size.T, size.H)).astype(np.float32)).astype(dtype)
    f = functools.partial(ferrum_jax.moe_combine, unique_rows=unique_rows, implementation=implementation)
    got = vjp(lambda y, w: f(y, pairs, w), (jnp.asarray(y), jnp.asarray(weights)), g)
    oracle.assert_matches(got, oracle.moe_combine_grads(y, pairs, weights, g))
    assert [x.dtype for x in got] == [y.dtype, weights.dtype]


def plain_combine(y, pairs, w):
    valid = (pairs >= 0) & (pairs < len(y))
    return jnp.sum(jnp.where(valid[..., None], w[..., None] * y[jnp.where(valid, pairs, 0)], 0), 1)


def test_the_tangent_of_combine_is_linear_in_each_operand():
    y, pairs, weights = combine_args(rng("lt"), SMALL, "float32")
    y, weights = np.nan_to_num(y), np.nan_to_num(weights)
    combine = lambda y, w: ferrum_jax.moe_combine(y, pairs, w, unique_rows=True)  # noqa: E731
    plain = lambda y, w: plain_combine(y, pairs, w)  # noqa: E731
    zeros = jnp.zeros_like(y), jnp.zeros_like(weights)
    for by_rows in (True, False):

        def tangent(f, x, by_rows=by_rows):
            if by_rows:
                return jax.jvp(f, (x, weights), (zeros[0], weights))[1]
            return jax.jvp(f, (y, x), (y, zeros[1]))[1]

        x = y if by_rows else weights
        got, want = (
            jax.linear_transpose(lambda x, f=f: tangent(f, x), x)(jnp.ones((SMALL.T, SMALL.H)))[0]
            for f in (combine, plain)
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def equations(f, *args):
    """The names of the library's equations in f's program, without those of the values."""
    names = re.findall(r"= (ferrum_\w+)", str(jax.make_jaxpr(f)(*args)))
    return [name for name in names if name != "ferrum_moe_combine"]


def test_unique_rows_have_both_cotangents_from_one_equation():
    """Under every transformation that a training step is made of; what is asked for alone comes alone."""
    y, pairs, weights = finite_args(BY_NAME["moe_combine"], rng("one"), SMALL)
    combine = lambda y, w, unique=True: jnp.sum(jnp.sin(ferrum_jax.moe_combine(y, pairs, w, unique_rows=unique)))  # noqa: E731
    both = jax.grad(combine, (0, 1))
    one, wide = ["ferrum_moe_combine_cotangents"], (np.stack([y, y]), weights)
    assert equations(both, y, weights) == one
    assert equations(jax.vmap(both, (0, None)), *wide) == one
    assert equations(jax.grad(lambda *a: jnp.sum(jax.vmap(combine, (0, None))(*a)), (0, 1)), *wide) == one
    assert equations(jax.grad(jax.checkpoint(combine), (0, 1)), y, weights) == one
    scanned = lambda y, w: jax.lax.scan(lambda c, _: (c + combine(y, w), None), 0.0, None, length=2)[0]  # noqa: E731
    assert equations(jax.grad(scanned, (0, 1)), y, weights) == one
    assert equations(lambda *a: jax.linear_transpose(jax.linearize(combine, *a)[1], *a)(1.0), y, weights) == one
    assert equations(jax.grad(combine), y, weights) == ["ferrum_moe_spread"]
    assert equations(jax.grad(combine, 1), y, weights) == ["ferrum_moe_row_dot"]
    assert equations(lambda *a: jax.jvp(combine, a, a)[1], y, weights) == ["ferrum_moe_combine_tangent"]
    repeated = jax.grad(lambda y, w: combine(y, w, unique=False), (0, 1))
    assert equations(repeated, y, weights) == ["ferrum_moe_spread", "ferrum_moe_row_dot"]
    text = jax.jit(both).lower(y, weights).as_text(debug_info=True)
    assert "ferrum_moe_combine_cotangents" in text
    assert not re.search("ferrum_moe_(spread|row_dot|combine_tangent)", text)


@pytest.mark.parametrize("unique_rows", [True, False])
@pytest.mark.parametrize("mapped", [(), (0,), (1,), (0, 2), (3,)], ids=str)
def test_the_tangent_in_every_order(mapped, unique_rows, implementation):
    """Of rows and weights that both vary, forward over forward, reverse over forward and the others; some of the
    primals, weights and tangents under a vmap that the others are not under."""
    y, pairs, weights = finite_args(BY_NAME["moe_combine"], rng("order"), SMALL)
    combine = functools.partial(ferrum_jax.moe_combine, unique_rows=unique_rows, implementation=implementation)

    def along(combine):
        f = lambda y, w: jnp.sin(combine(y, pairs, w))  # noqa: E731

        def tangents(*args):
            y, w, dy, dw = args
            step = lambda y, w, dy, dw: jax.jvp(f, (y, w), (dy, dw))[1]  # noqa: E731
            second = jax.jvp(step, args, (dy, dw, y, w))[1]
            only_rows = jax.jvp(lambda dy: step(y, w, dy, dw), (dy,), (y,))[1]
            return second, only_rows, jax.grad(lambda *a: jnp.sum(step(*a) ** 2), (0, 1, 2, 3))(*args)

        axes = [0 if i in mapped else None for i in range(4)]
        return jax.jit(jax.vmap(tangents, axes) if mapped else tangents)

    args = [rng("order", i).normal(size=x.shape).astype(np.float32) for i, x in enumerate((y, weights) * 2)]
    args = [np.stack([a, -a]) if i in mapped else a for i, a in enumerate(args)]
    for got, want in zip(*(jax.tree.leaves(along(f)(*args)) for f in (combine, plain_combine)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mapped", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_slices_that_share_a_cotangent(mapped, implementation):
    """That of a linear loss is the same for all: what a cotangent is made of may have fewer slices than it has."""
    args = finite_args(BY_NAME["moe_combine"], rng("share"), SMALL)
    y, pairs, weights = (np.stack([a, a[::-1]]) if i in mapped else a for i, a in enumerate(args))
    axes = [0 if i in mapped else None for i in range(3)]

    def derivatives(combine):
        both = jax.vmap(jax.grad(lambda *a: jnp.sum(combine(*a)), (0, 2)), axes)
        values, tangents = jax.jvp(lambda y, w: both(y, pairs, w), (y, weights), (y, weights))
        assert [x.shape for x in values] == [x.shape for x in tangents]
        squares = lambda y, w: sum(jnp.sum(x**2) for x in both(y, pairs, w))  # noqa: E731
        return *values, *tangents, *jax.grad(squares, (0, 1))(y, weights)

    ours = functools.partial(ferrum_jax.moe_combine, unique_rows=True, implementation=implementation)
    for got, want in zip(derivatives(ours), derivatives(plain_combine), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_pairs", [True, False])
def test_dispatch_against_oracle(with_pairs, dtype, implementation):
    size = Size(7, 8, 3, 70)
    x, tokens, pairs = dispatch_pairs_args(rng("dispatch"), size, dtype)
    g = jnp.asarray(rng("g").normal(size=(len(tokens), size.H)).astype(np.float32)).astype(dtype)
    g = g.at[tokens == size.T].set(jnp.nan)  # nobody reads these rows of the result
    f = lambda x: ferrum_jax.moe_dispatch(  # noqa: E731
        x, tokens, pairs_by_token=pairs if with_pairs else None, implementation=implementation
    )
    oracle.assert_matches(vjp(f, (jnp.asarray(x),), g), oracle.moe_dispatch_grad(x, tokens, g))


def test_many_rows_of_one_token(implementation):
    """The fixed-order sum at its worst, 1,000 rows to one token, and to tokens on either side of none."""
    tokens = np.array([3] * 1000 + [0, 5, 5, 6, -1, 7, 2**31 - 1], np.int32)
    g = rng("many").normal(size=(len(tokens), 5)).astype(np.float32)
    x = np.zeros((7, 5), np.float32)
    got = vjp(lambda x: ferrum_jax.moe_dispatch(x, tokens, implementation=implementation), (jnp.asarray(x),), g)
    oracle.assert_matches(got, oracle.moe_dispatch_grad(x, tokens, g))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_sum_against_oracle(dtype, implementation):
    size = Size(7, 8, 3, 70)
    slots, weights = weighted_sum_args(rng("slots"), size, dtype)
    g = jnp.asarray(rng("g").normal(size=(size.T, size.H)).astype(np.float32)).astype(dtype)
    f = functools.partial(ferrum_jax.weighted_sum_batched, implementation=implementation)
    pairs = np.arange(size.T * size.K).reshape(size.T, size.K)
    (drows, rows_size), dweights = oracle.moe_combine_grads(slots.reshape(-1, size.H), pairs, weights, g)
    got = vjp(f, (jnp.asarray(slots), jnp.asarray(weights)), g)
    oracle.assert_matches(got, ((drows.reshape(slots.shape), rows_size.reshape(slots.shape)), dweights))


@pytest.mark.parametrize("norm", [True, False])
def test_routing_of_masked_rows(norm, implementation):
    """Some -inf: finite gradient, 0 at the masked experts. All -inf: gradient 0. NaN or +inf: confined to its row."""
    x = jnp.array(
        [
            [1.0, -jnp.inf, 0.5, 2.0],
            [-jnp.inf] * 4,
            [0.0, 1.0, jnp.nan, 2.0],
            [1.0, 2.0, jnp.inf, 0.0],
            [3.0, 1.0, 0.0, 2.0],
        ]
    )
    f = lambda x: ferrum_jax.route_topk_softmax(x, 4, norm_topk_prob=norm, implementation=implementation)  # noqa: E731
    gradient = jax.grad(lambda x: jnp.sum(f(x).expert_weights ** 2 * jnp.arange(1.0, 5)[None]))(x)
    assert bool(jnp.all(jnp.isfinite(gradient[jnp.array([0, 1, 4])])))
    assert float(gradient[0, 1]) == 0
    np.testing.assert_array_equal(gradient[1], np.zeros(4))
    hessian = jax.hessian(lambda x: jnp.sum(f(x).expert_weights[:, 0]))(x[:2])
    assert bool(jnp.all(jnp.isfinite(hessian)))


def test_routing_gradient_is_the_softmax_gradient(implementation):
    x = jnp.asarray(rng("soft").normal(size=(6, 9)).astype(np.float32))
    route = functools.partial(ferrum_jax.route_topk_softmax, implementation=implementation)
    ids = route(x, 4).expert_ids
    g = jnp.asarray(rng("g").normal(size=ids.shape).astype(np.float32))
    for norm in (True, False):

        def plain(x, norm=norm):
            p = jnp.take_along_axis(jax.nn.softmax(x, axis=-1), ids, axis=-1)
            return p / p.sum(-1, keepdims=True) if norm else p

        want = jax.vjp(plain, x)[1](g)[0]
        got = jax.vjp(lambda x, norm=norm: route(x, 4, norm_topk_prob=norm).expert_weights, x)[1](g)[0]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("flow", [layer.packed, layer.pair_ids])
def test_layer_gradient_and_hessian(flow, implementation):
    size = Size(5, 4, 2, 3)
    args = layer.init(jax.random.key(0), size)
    loss = lambda f: lambda *a: jnp.sum(jnp.sin(f(*a, top_k=size.K)))  # noqa: E731
    ours, dense = loss(functools.partial(flow, implementation=implementation)), loss(layer.dense)
    np.testing.assert_allclose(ours(*args), dense(*args), rtol=1e-5)
    for got, want in zip(*(jax.grad(f, argnums=(0, 1, 2, 3))(*args) for f in (ours, dense)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for got, want in zip(*(jax.hessian(f, argnums=(0, 1))(*args) for f in (ours, dense)), strict=True):
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4)


def test_grad_of_grad(implementation):
    size = Size(4, 5, 2, 3)
    args = layer.init(jax.random.key(1), size)

    def norm_of_gradient(flow):
        return lambda *a: sum(jnp.sum(g**2) for g in jax.grad(lambda *b: jnp.sum(flow(*b, top_k=2) ** 2), (0, 1))(*a))

    got = jax.grad(norm_of_gradient(functools.partial(layer.packed, implementation=implementation)), (0, 1))(*args)
    for g, w in zip(got, jax.grad(norm_of_gradient(layer.dense), (0, 1))(*args), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-3, atol=1e-3)


def test_bfloat16_layer_gradient(implementation):
    size = Size(6, 4, 2, 8)
    args = [a.astype(jnp.bfloat16) for a in layer.init(jax.random.key(2), size)]
    run = functools.partial(layer.packed, top_k=2, implementation=implementation)
    got = jax.grad(lambda *a: jnp.sum(run(*a).astype(jnp.float32)), (0, 1, 2, 3))(*args)
    wide = [a.astype(jnp.float32) for a in args]
    choices = [ferrum_jax.route_topk_softmax(x @ router, 2).expert_ids for x, router, *_ in (args, wide)]
    np.testing.assert_array_equal(*choices)  # else the two gradients are of different functions
    want = jax.grad(lambda *a: jnp.sum(layer.packed(*a, top_k=2)), (0, 1, 2, 3))(*wide)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == jnp.bfloat16
        scale = float(jnp.max(jnp.abs(w)))
        np.testing.assert_allclose(g.astype(jnp.float32) / scale, w / scale, atol=0.05)
