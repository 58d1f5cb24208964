"""jax.linear_transpose of the products: in one operand at a time, or the error says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng

from ferrum_jax.ops import combine, grouped_ops, weighted_sum

T, K, R, H, E, N = 3, 2, 6, 4, 2, 5
PAIRS = np.array([[0, 5], [2, -1], [1, 6]], np.int32)
TABLES = np.array([2, 0, 6, 1, 4, -1], np.int32), np.array([0, 1], np.int32), np.int32(6)
rows, weights, tokens, slots = (R, H), (T, K), (T, H), (T, K, H)
lhs, rhs, out = (R, H), (E, H, N), (R, N)
SETTINGS = {"packed_rows": False, "precision": "highest"}
PRODUCT = {"dtype": "float32", **SETTINGS}


def weights_second(op):
    """Combine's operands, with the table last, as those of the other ops here."""

    def run(x, weights, pairs, **params):
        return op(x, pairs, weights, **params)

    return run


# function, the shapes of the operands in each of which it is linear, the others, the parameters
BILINEAR = {
    "moe_combine": (weights_second(combine.combine_op), (rows, weights), (PAIRS,), {"unique_rows": True}),
    "moe_spread": (weights_second(combine._spread), (tokens, weights), (PAIRS,), {"num_rows": R, "unique_rows": True}),
    "moe_row_dot": (combine._row_dot, (rows, tokens), (PAIRS,), {"unique_rows": True}),
    "weighted_sum_batched": (weighted_sum.weighted_sum_op, (slots, weights), (), {}),
    "slot_scale": (weighted_sum._slot_scale, (tokens, weights), (), {}),
    "slot_dot": (weighted_sum._slot_dot, (slots, tokens), (), {}),
    "grouped_matmul": (grouped_ops._matmul, (lhs, rhs), TABLES, {"top_k": 1, **PRODUCT}),
    "grouped_matmul_transposed": (grouped_ops._transposed, (out, rhs), TABLES, {"top_k": 1, **PRODUCT}),
    "grouped_outer": (grouped_ops._outer, (lhs, out), TABLES, {"top_k": 1, "num_experts": E, **SETTINGS}),
}

NAMES = {
    "moe_combine": ("packed_down", "pair_weights"),
    "moe_spread": ("g", "pair_weights"),
    "moe_row_dot": ("packed_down", "g"),
    "weighted_sum_batched": ("slots", "weights"),
    "slot_scale": ("g", "weights"),
    "slot_dot": ("slots", "g"),
    "grouped_matmul": ("lhs", "rhs"),
    "grouped_matmul_transposed": ("g", "rhs"),
    "grouped_outer": ("lhs", "g"),
}


def normal(name, *shapes):
    return [jnp.asarray(rng(name, i).normal(size=shape).astype(np.float32)) for i, shape in enumerate(shapes)]


def inner(xs, ys):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(xs), jax.tree.leaves(ys), strict=True))


def check(f, operands, chosen):
    """<cotangent, f(operands)> is the same as <transpose of f in the chosen operand (cotangent), that operand>."""

    @jax.jit
    def both(*operands):
        def of_one(x):
            return f(*operands[:chosen], x, *operands[chosen + 1 :])

        result = of_one(operands[chosen])
        cotangent = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), result)
        (transposed,) = jax.linear_transpose(of_one, operands[chosen])(cotangent)
        return inner(cotangent, result), inner(transposed, operands[chosen])

    np.testing.assert_allclose(*both(*operands), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BILINEAR)
def test_in_one_operand(name):
    op, shapes, others, params = BILINEAR[name]
    for chosen in (0, 1):
        check(lambda x, y: op(x, y, *others, **params), normal(name, *shapes), chosen)


@pytest.mark.parametrize("name", BILINEAR)
def test_in_both_operands_at_once(name):
    op, shapes, others, params = BILINEAR[name]
    x, y = normal(name, *shapes)

    def f(x, y):
        return op(x, y, *others, **params)

    first, second = NAMES[name]
    words = rf"{name}: it is linear in each of {first}.* {second}.*, and not in (both|{first} and {second}) at once"
    with pytest.raises(TypeError, match=words):
        jax.linear_transpose(f, x, y)(f(x, y))


def test_a_square_is_not_linear():
    x = jnp.ones((T, H))

    def f(x):
        return weighted_sum._slot_dot(jnp.stack([x, x], 1), x)

    with pytest.raises(TypeError, match=r"slot_dot: .* at once"):
        jax.linear_transpose(f, x)(f(x))


@pytest.mark.parametrize("chosen", range(3))
def test_the_gradients_of_unique_rows(chosen):
    """They come from one equation: both are linear in what comes from above, and one each in the rows and weights."""

    def gradients(g, y, w):
        of_rows, of_weights = jax.vjp(lambda y, w: combine.combine_op(y, PAIRS, w, unique_rows=True), y, w)[1](g)
        return [(of_rows, of_weights), of_weights, of_rows][chosen]

    check(gradients, normal("gradients", tokens, rows, weights), chosen)


def test_what_is_linear_in_two_operands_together():
    """The tangent of combine, in its rows and weights; and both gradients, in the same."""
    y, w, dy, dw, g = normal("together", rows, weights, rows, weights, tokens)
    f = functools.partial(combine.combine_op, unique_rows=True)

    def tangent(y, w):
        return jax.jvp(lambda y, w: f(y, PAIRS, w), (y, w), (dy, dw))[1]

    def gradients(y, w):
        return jax.vjp(lambda y, w: f(y, PAIRS, w), y, w)[1](g)

    for linear in (tangent, gradients):
        result = linear(y, w)
        transposed = jax.linear_transpose(linear, y, w)(result)
        np.testing.assert_allclose(inner(transposed, (y, w)), inner(result, result), rtol=1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_product_with_weights(activation):
    settings = {"activation": activation, "top_k": 1, **PRODUCT}

    def f(x, w, weights):
        return grouped_ops._activated(x, w, *TABLES, weights, **settings)

    x, w, scale = normal("weighted", lhs, (E, H, 2 * N), (R,))
    check(f, (x, w, scale), 2)
    for chosen in (0, 1):
        if activation is None:
            check(f, (x, w, scale), chosen)
        else:
            with pytest.raises(NotImplementedError, match=f"{('lhs', 'rhs')[chosen]}, in which an activation is not"):
                check(f, (x, w, scale), chosen)
    with pytest.raises(TypeError, match=r"linear in each of lhs, .*, and not in lhs and row_weights"):
        jax.linear_transpose(lambda x, scale: f(x, w, scale), x, scale)(f(x, w, scale))
