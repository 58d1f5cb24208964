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
    CASES,
    DTYPES,
    FLOAT_CASES,
    SMALL,
    Size,
    combine_args,
    combine_repeated_args,
    dispatch_pairs_args,
    finite_args,
    per_primitive,
    rng,
    weighted_sum_args,
)
from derivatives import check_derivatives, inner

import ferrum_jax

BY_NAME = {case.name: case for case in CASES}


def as_function_of_floats(case, args, size, implementation):
    def f(*floats):
        given = iter(floats)
        full = [next(given) if i in case.floats else a for i, a in enumerate(args)]
        return case.float_results(*full, size=size, implementation=implementation)

    return f, [args[i] for i in case.floats]


def normal(*seed, like):
    """Random numbers of the shapes and dtypes of arrays."""
    return [rng(*seed, i).normal(size=x.shape).astype(np.float32).astype(x.dtype) for i, x in enumerate(like)]


@pytest.mark.parametrize("case", per_primitive(FLOAT_CASES), ids=str)
def test_both_modes_to_second_order(case, every_implementation):
    f, floats = as_function_of_floats(case, finite_args(case, rng(case), SMALL), SMALL, every_implementation)
    check_derivatives(f, floats, seed=0)


@pytest.mark.parametrize("case", per_primitive(FLOAT_CASES), ids=str)
def test_no_tokens(case, every_implementation):
    """Nothing adds to a gradient: it has its operand's shape and is 0, where the operand has entries."""
    size = Size(0, 4, 2, 3)
    f, floats = as_function_of_floats(case, finite_args(case, rng(case), size), size, every_implementation)
    out, vjp = jax.vjp(f, *floats)
    gradient = vjp(out)
    for g, x in zip(gradient, floats, strict=True):
        assert (g.shape, g.dtype) == (x.shape, x.dtype)
        assert not np.any(g)
    if case.name.startswith(("moe_combine", "grouped")):
        assert any(g.size for g in gradient)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case.name in ("moe_combine", "grouped_matmul-pair_ids") else [pytest.mark.full])
        for case in FLOAT_CASES
    ],
    ids=str,
)
def test_linearize_agrees_with_jvp_and_transpose(case, every_implementation):
    f, floats = as_function_of_floats(case, finite_args(case, rng(case), SMALL), SMALL, every_implementation)
    tangents = normal(case, like=floats)
    out, linear = jax.linearize(f, *floats)
    jvp = jax.jvp(f, floats, tangents)[1]
    for got, want in zip(linear(*tangents), jvp, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    cotangents = jax.linear_transpose(linear, *floats)(out)
    np.testing.assert_allclose(inner(cotangents, tangents), inner(out, jvp), rtol=1e-4, atol=1e-5)


def vjp(f, primal_floats, g):
    return jax.jit(lambda primals, g: jax.vjp(f, *primals)[1](g))(primal_floats, g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unique_rows", [True, False])
@pytest.mark.parametrize(
    "size",
    [Size(7, 8, 2, 130), *(pytest.param(s, marks=pytest.mark.full) for s in (SMALL, Size(9, 257, 10, 20)))],
    ids=str,
)
def test_combine_against_oracle_with_garbage(size, unique_rows, dtype, implementation):
    """Rows that no pair names hold NaN, which must reach no gradient; in low precision each sum is cast once."""
    make = combine_args if unique_rows else combine_repeated_args
    y, pairs, weights = make(rng("grad", size), size, dtype)
    (g,) = normal("g", like=[np.zeros((size.T, size.H), jnp.dtype(dtype))])
    f = functools.partial(ferrum_jax.moe_combine, unique_rows=unique_rows, implementation=implementation)
    got = vjp(lambda y, w: f(y, pairs, w), (y, weights), g)
    oracle.assert_matches(got, oracle.moe_combine_grads(y, pairs, weights, g))
    assert [x.dtype for x in got] == [y.dtype, weights.dtype]


def plain_combine(y, pairs, w):
    valid = (pairs >= 0) & (pairs < len(y))
    return jnp.sum(jnp.where(valid[..., None], w[..., None] * y[jnp.where(valid, pairs, 0)], 0), 1)


def test_the_tangent_of_combine_is_linear_in_each_operand():
    y, pairs, weights = combine_args(rng("lt"), SMALL, "float32")
    y, weights = np.nan_to_num(y), np.nan_to_num(weights)

    def combine(y, w):
        return ferrum_jax.moe_combine(y, pairs, w, unique_rows=True)

    def plain(y, w):
        return plain_combine(y, pairs, w)

    zeros, others = (jnp.zeros_like(y), jnp.zeros_like(weights)), (y[::-1], weights[::-1])
    for by_rows in (True, False):

        def tangent(f, x, by_rows=by_rows):
            if by_rows:
                return jax.jvp(f, (x, weights), (zeros[0], others[1]))[1]
            return jax.jvp(f, (y, x), (others[0], zeros[1]))[1]

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

    def combine(y, w, unique=True):
        return jnp.sum(jnp.sin(ferrum_jax.moe_combine(y, pairs, w, unique_rows=unique)))

    both = jax.grad(combine, (0, 1))
    one, wide = ["ferrum_moe_combine_cotangents"], (np.stack([y, y]), weights)
    assert equations(both, y, weights) == one
    assert equations(jax.vmap(both, (0, None)), *wide) == one
    assert equations(jax.grad(lambda *a: jnp.sum(jax.vmap(combine, (0, None))(*a)), (0, 1)), *wide) == one
    assert equations(jax.grad(jax.checkpoint(combine), (0, 1)), y, weights) == one

    def scanned(y, w):
        return jax.lax.scan(lambda c, _: (c + combine(y, w), None), 0.0, None, length=2)[0]

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
@pytest.mark.parametrize("mapped", [(), (0,), (3,), *(pytest.param(m, marks=pytest.mark.full) for m in ((1,), (0, 2)))])
def test_the_tangent_in_every_order(mapped, unique_rows, every_implementation):
    """Of rows and weights that both vary, forward over forward, reverse over forward and the others; some of the
    primals, weights and tangents under a vmap that the others are not under."""
    y, pairs, weights = finite_args(BY_NAME["moe_combine"], rng("order"), SMALL)
    combine = functools.partial(ferrum_jax.moe_combine, unique_rows=unique_rows, implementation=every_implementation)

    def along(combine):
        def f(y, w):
            return jnp.sin(combine(y, pairs, w))

        def tangents(*args):
            y, w, dy, dw = args

            def step(y, w, dy, dw):
                return jax.jvp(f, (y, w), (dy, dw))[1]

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
def test_slices_that_share_a_cotangent(mapped, every_implementation):
    """That of a linear loss is the same for all: what a cotangent is made of may have fewer slices than it has."""
    args = finite_args(BY_NAME["moe_combine"], rng("share"), SMALL)
    y, pairs, weights = (np.stack([a, a[::-1]]) if i in mapped else a for i, a in enumerate(args))
    axes = [0 if i in mapped else None for i in range(3)]

    def derivatives(combine):
        both = jax.vmap(jax.grad(lambda *a: jnp.sum(combine(*a)), (0, 2)), axes)

        def squares(y, w):
            return sum(jnp.sum(x**2) for x in both(y, pairs, w))

        def run(y, weights):
            values, tangents = jax.jvp(lambda y, w: both(y, pairs, w), (y, weights), (y, weights))
            assert [x.shape for x in values] == [x.shape for x in tangents]
            return *values, *tangents, *jax.grad(squares, (0, 1))(y, weights)

        return jax.jit(run)(y, weights)

    ours = functools.partial(ferrum_jax.moe_combine, unique_rows=True, implementation=every_implementation)
    for got, want in zip(derivatives(ours), derivatives(plain_combine), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_pairs", [True, False])
def test_dispatch_against_oracle(with_pairs, dtype, implementation):
    size = Size(7, 8, 3, 70)
    x, tokens, pairs = dispatch_pairs_args(rng("dispatch"), size, dtype)
    (g,) = normal("g", like=[np.zeros((len(tokens), size.H), jnp.dtype(dtype))])
    g[tokens == size.T] = np.nan  # nobody reads these rows of the result

    def f(x):
        return ferrum_jax.moe_dispatch(
            x, tokens, pairs_by_token=pairs if with_pairs else None, implementation=implementation
        )

    oracle.assert_matches(vjp(f, (x,), g), oracle.moe_dispatch_grad(x, tokens, g))


def test_many_rows_of_one_token(implementation):
    """The fixed-order sum at its worst, 1,000 rows to one token, and to tokens on either side of none."""
    tokens = np.array([3] * 1000 + [0, 5, 5, 6, -1, 7, 2**31 - 1], np.int32)
    g = rng("many").normal(size=(len(tokens), 5)).astype(np.float32)
    x = np.zeros((7, 5), np.float32)
    got = vjp(lambda x: ferrum_jax.moe_dispatch(x, tokens, implementation=implementation), (x,), g)
    oracle.assert_matches(got, oracle.moe_dispatch_grad(x, tokens, g))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_sum_against_oracle(dtype, implementation):
    size = Size(7, 8, 3, 70)
    slots, weights = weighted_sum_args(rng("slots"), size, dtype)
    (g,) = normal("g", like=[np.zeros((size.T, size.H), jnp.dtype(dtype))])
    f = functools.partial(ferrum_jax.weighted_sum_batched, implementation=implementation)
    pairs = np.arange(size.T * size.K).reshape(size.T, size.K)
    drows, dweights = oracle.moe_combine_grads(slots.reshape(-1, size.H), pairs, weights, g)
    got = vjp(f, (slots, weights), g)
    drows = drows._replace(value=drows.value.reshape(slots.shape), size=drows.size.reshape(slots.shape))
    oracle.assert_matches(got, (drows, dweights))


def test_routing_of_masked_rows(implementation):
    """Some -inf: finite gradient, 0 at the masked experts. All -inf: gradient 0. NaN or +inf: confined to its row."""
    x = np.array(
        [
            [1.0, -np.inf, 0.5, 2.0],
            [-np.inf] * 4,
            [0.0, 1.0, np.nan, 2.0],
            [1.0, 2.0, np.inf, 0.0],
            [3.0, 1.0, 0.0, 2.0],
        ],
        np.float32,
    )
    scale = np.arange(1, 5, dtype=np.float32)[None]

    def weights(x, norm):
        return ferrum_jax.route_topk_softmax(x, 4, norm_topk_prob=norm, implementation=implementation).expert_weights

    @jax.jit
    def run(x):
        return [
            (
                jax.grad(lambda x, norm=norm: jnp.sum(weights(x, norm) ** 2 * scale))(x),
                jax.hessian(lambda x, norm=norm: jnp.sum(weights(x, norm)[:, 0]))(x[:2]),
            )
            for norm in (True, False)
        ]

    for gradient, hessian in run(x):
        assert np.isfinite(np.asarray(gradient)[[0, 1, 4]]).all()
        assert gradient[0, 1] == 0
        assert np.any(gradient[0])
        np.testing.assert_array_equal(gradient[1], np.zeros(4))
        assert np.isfinite(hessian).all()


def test_routing_gradient_is_the_softmax_gradient(implementation):
    x = rng("soft").normal(size=(6, 9)).astype(np.float32)
    ids = np.argsort(-x, axis=-1)[:, :4].astype(np.int32)
    (g,) = normal("g", like=[np.zeros(ids.shape, np.float32)])

    def plain(x, norm):
        p = jnp.take_along_axis(jax.nn.softmax(x, axis=-1), ids, axis=-1)
        return p / p.sum(-1, keepdims=True) if norm else p

    def ours(x, norm):
        return ferrum_jax.route_topk_softmax(x, 4, norm_topk_prob=norm, implementation=implementation).expert_weights

    run = jax.jit(
        lambda x: [[jax.vjp(lambda x: f(x, norm), x)[1](g)[0] for f in (ours, plain)] for norm in (True, False)]  # noqa: B023
    )
    for got, want in run(x):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("flow", [layer.packed, layer.pair_ids])
def test_layer_gradient_hessian_and_gradient_of_gradient(flow, every_implementation):
    size = Size(5, 4, 2, 3)
    args = layer.init(0, size)

    def derivatives(flow):
        def loss(*a):
            return jnp.sum(jnp.sin(flow(*a, top_k=size.K)))

        def norm_of_gradient(*a):
            return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(*a))

        gradient, hessian = jax.grad(loss, (0, 1, 2, 3)), jax.hessian(loss, (0, 1))
        return jax.jit(lambda *a: (loss(*a), gradient(*a), hessian(*a), jax.grad(norm_of_gradient, (0, 1))(*a)))

    ours = derivatives(functools.partial(flow, implementation=every_implementation))(*args)
    dense = derivatives(layer.dense)(*args)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * max(1, np.abs(want).max()))


def test_bfloat16_layer_gradient(every_implementation):
    """Beside the same in float32: what the layer rounds to 16 bits on its way is a few roundings of the largest."""
    size = Size(6, 4, 2, 8)
    args = [a.astype(jnp.bfloat16) for a in layer.init(2, size)]
    wide = [a.astype(np.float32) for a in args]

    def gradient(*args, implementation=every_implementation):
        run = functools.partial(layer.packed, top_k=2, implementation=implementation)
        return jax.grad(lambda *a: jnp.sum(run(*a).astype(jnp.float32)), (0, 1, 2, 3))(*args)

    choices = [ferrum_jax.route_topk_softmax(x @ router, 2).expert_ids for x, router, *_ in (args, wide)]
    np.testing.assert_array_equal(*choices)  # else the two gradients are of different functions
    want = jax.jit(functools.partial(gradient, implementation="xla"))(*wide)
    for g, w in zip(jax.jit(gradient)(*args), want, strict=True):
        assert g.dtype == jnp.bfloat16
        scale = np.abs(w).max()
        np.testing.assert_allclose(np.asarray(g, np.float32) / scale, w / scale, atol=0.05)
