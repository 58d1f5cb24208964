"""Inside control flow: remat, scan, while, cond, custom rules of the caller."""

import functools

import jax
import jax.numpy as jnp
import layer
import numpy as np
import pytest
from cases import CASES, FLOAT_CASES, SMALL, Size, finite_args, per_primitive, rng

import ferrum_jax

SIZE = Size(5, 4, 2, 3)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable], ids=["recompute", "save"])
def test_remat_in_scan(policy, every_implementation):
    x, *weights = layer.init(0, SIZE)
    run = functools.partial(layer.packed, top_k=2, implementation=every_implementation)

    def layers(x, *weights):
        step = jax.checkpoint(lambda x, w: (x + run(x, *w), None), policy=policy)
        return jnp.sum(jax.lax.scan(step, x, [jnp.stack([w, 0.5 * w, -w]) for w in weights])[0] ** 2)

    def unrolled(x, *weights):
        for s in (1.0, 0.5, -1.0):
            x = x + layer.packed(x, *(s * w for w in weights), top_k=2)
        return jnp.sum(x**2)

    every = (0, 1, 2, 3)
    for g, w in zip(*(jax.jit(jax.grad(f, every))(x, *weights) for f in (layers, unrolled)), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", per_primitive(CASES), ids=str)
def test_scan_over_slices(case, every_implementation):
    slices = [finite_args(case, rng(case, i), SMALL) for i in range(3)]
    f = jax.jit(functools.partial(case.results, size=SMALL, implementation=every_implementation))
    stacked = tuple(np.stack(a) for a in zip(*slices, strict=True))
    got = jax.lax.scan(lambda c, a: (c, f(*a)), None, stacked)[1]
    for result, *parts in zip(got, *(f(*s) for s in slices), strict=True):
        np.testing.assert_allclose(result, np.stack(parts), rtol=1e-6)


@pytest.mark.parametrize("case", per_primitive(FLOAT_CASES), ids=str)
def test_forward_over_reverse_in_cond_and_remat(case, every_implementation):
    args = finite_args(case, rng(case), SMALL)

    def loss(x, flag):
        run = jax.checkpoint(
            lambda x: case.float_results(x, *args[1:], size=SMALL, implementation=every_implementation)[0]
        )
        return jnp.sum(jax.lax.cond(flag, run, lambda x: 0 * run(x), x) ** 2)

    def plain(x):
        return jnp.sum(case.float_results(x, *args[1:], size=SMALL)[0] ** 2)

    def along(gradient):
        return jax.jit(lambda x, direction: jax.jvp(gradient, (x,), (direction,)))(x, direction)

    x = args[0]
    direction = rng("d").normal(size=x.shape).astype(np.float32)
    gradient, hvp = along(lambda x: jax.grad(loss)(x, True))
    want = along(jax.grad(plain))
    np.testing.assert_allclose(gradient, want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hvp, want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.tables
def test_tables_in_a_differentiated_loop(every_implementation):
    """Integer ops inside scan under grad: their tangents are none, whatever the loop makes of them."""
    run = {"implementation": every_implementation}
    x, router, *_ = layer.init(5, SIZE)

    def loss(x):
        def step(carry, _):
            x, last = carry
            ids, weights = ferrum_jax.route_topk_softmax(x @ router, 2, **run)
            plan = ferrum_jax.moe_plan(ids + 0 * last[:, :2], SIZE.E, 2, **run)
            rows = ferrum_jax.moe_dispatch(x, plan.packed_token_idx, **run)
            out = ferrum_jax.moe_combine(rows, plan.pairs_by_token, weights, **run)
            return (jnp.tanh(out) + x, ids), plan.total_tokens_post_pad

        (x, _), totals = jax.lax.scan(step, (x, jnp.zeros((SIZE.T, 2), jnp.int32)), None, length=3)
        return jnp.sum(x), totals

    gradient, totals = jax.grad(loss, has_aux=True)(x)
    assert totals.shape == (3,)
    # Every row of the unweighted layer is its own token and the weights add up to 1, so each step is x + tanh(x).
    want = jax.grad(lambda x: jnp.sum(functools.reduce(lambda x, _: x + jnp.tanh(x), range(3), x)))(x)
    np.testing.assert_allclose(gradient, want, rtol=1e-4)
