"""vmap equals a Python loop: every subset of operands, every axis, nested, with derivatives, without copies."""

import functools
import itertools

import jax
import jax.numpy as jnp
import layer
import numpy as np
import pytest
from cases import FLOAT_OPS, OPS, SMALL, Size, finite_args, rng

import ferrum_jax

BATCH = 3
# The packed form of the grouped product is its pair-id form with top_k = 1.
MAPPED_OPS, MAPPED_FLOAT_OPS = ([op for op in ops if op.name != "grouped_matmul"] for ops in (OPS, FLOAT_OPS))


def stacked(op, mapped, axes, seeds=range(BATCH)):
    """Arguments of which the mapped ones have a batch axis where `axes` says, and the slices to loop over."""
    slices = [finite_args(op, rng(op, seed), SMALL) for seed in seeds]
    slices = [[s[i] if m else slices[0][i] for i, m in enumerate(mapped)] for s in slices]
    args = [
        np.stack([s[i] for s in slices], axis) if m else slices[0][i]
        for i, (m, axis) in enumerate(zip(mapped, axes, strict=True))
    ]
    return args, slices


def subsets(op):
    count = len(finite_args(op, rng(op), SMALL))
    products = itertools.product([True, False], repeat=count)
    return [m for m in products if any(m) and len({m[i] for i in op.tables}) < 2]


def assert_same(got, loop):
    for result, *slices in zip(got, *loop, strict=True):
        want = np.stack([np.asarray(s) for s in slices])
        if np.issubdtype(want.dtype, np.integer):
            np.testing.assert_array_equal(result, want)
        else:
            np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("op", "mapped"), [(op, m) for op in MAPPED_OPS for m in subsets(op)], ids=str)
def test_every_subset_and_axis(op, mapped, implementation):
    f = functools.partial(op.results, size=SMALL, implementation=implementation)
    ranks = [a.ndim for a in finite_args(op, rng(op), SMALL)]
    for shift in range(max(ranks) + 1):
        axes = [min(shift, rank) for rank in ranks]
        args, slices = stacked(op, mapped, axes)
        in_axes = [axis if m else None for m, axis in zip(mapped, axes, strict=True)]
        assert_same(jax.jit(jax.vmap(f, in_axes))(*args), [f(*s) for s in slices])
        last = jax.vmap(f, in_axes, out_axes=-1)(*args)
        assert_same([jnp.moveaxis(r, -1, 0) for r in last], [f(*s) for s in slices])


@pytest.mark.parametrize(("op", "mapped"), [(op, m) for op in MAPPED_OPS for m in subsets(op)], ids=str)
def test_nested(op, mapped, implementation):
    """The outer map over some operands, the inner one over the others and the first: partly broadcast on both."""
    f = functools.partial(op.results, size=SMALL, implementation=implementation)
    outer = mapped
    inner = [not m or i == 0 for i, m in enumerate(mapped)]
    args, loops = list(finite_args(op, rng(op), SMALL)), []
    grids = [[finite_args(op, rng(op, a, b), SMALL) for b in range(2)] for a in range(BATCH)]
    pick = lambda i, a, b: grids[a if outer[i] else 0][b if inner[i] else 0][i]  # noqa: E731
    for i in range(len(args)):
        grid = np.stack([np.stack([pick(i, a, b) for b in range(2)]) for a in range(BATCH)])
        args[i] = grid[(slice(None) if outer[i] else 0, slice(None) if inner[i] else 0)]
    axes = [[0 if m else None for m in which] for which in (outer, inner)]
    got = jax.vmap(jax.vmap(f, axes[1]), axes[0])(*args)
    for a in range(BATCH):
        loops.append(
            [np.stack(r) for r in zip(*(f(*(pick(i, a, b) for i in range(len(args)))) for b in range(2)), strict=True)]
        )
    assert_same(got, loops)


@pytest.mark.parametrize(("op", "mapped"), [(op, m) for op in MAPPED_FLOAT_OPS for m in subsets(op)], ids=str)
def test_grad_of_vmap_and_vmap_of_grad(op, mapped, implementation):
    """An unmapped operand's gradient is the sum over the batch."""
    args, slices = stacked(op, mapped, [0] * len(mapped))
    in_axes = [0 if m else None for m in mapped]

    def loss(*a):
        results = op.float_results(*a, size=SMALL, implementation=implementation)
        return sum(jnp.sum(jnp.sin(r)) for r in results)

    loop = [jax.grad(loss, op.floats)(*s) for s in slices]
    assert_same(jax.vmap(jax.grad(loss, op.floats), in_axes)(*args), loop)
    whole = jax.grad(lambda *a: jnp.sum(jax.vmap(loss, in_axes)(*a)), op.floats)(*args)
    for i, got, *parts in zip(op.floats, whole, *loop, strict=True):
        np.testing.assert_allclose(got, np.stack(parts) if mapped[i] else sum(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_leading_axes_broadcast_from_one(op, implementation):
    """The public functions take leading axes, and those of size 1 broadcast."""
    f = functools.partial(op.results, size=SMALL, implementation=implementation)
    mapped = [i == 0 for i in range(len(finite_args(op, rng(op), SMALL)))]
    args, slices = stacked(op, mapped, [0] * len(mapped))
    wide = [a[:, None] if m else a[None, None] for a, m in zip(args, mapped, strict=True)]
    assert_same([r[:, 0] for r in f(*wide)], [f(*s) for s in slices])


def test_unmapped_rows_are_not_copied():
    """Two layers' routing over the same rows: the program holds no [B, R, H] array."""
    rows, pairs = jnp.ones((64, 32)), jnp.zeros((5, 8, 2), jnp.int32)
    weights = jnp.ones((5, 8, 2))
    f = jax.vmap(ferrum_jax.moe_combine, in_axes=(None, 0, 0))
    jaxpr = str(jax.make_jaxpr(f)(rows, pairs, weights))
    assert "[1,64,32]" in jaxpr
    assert "[5,64,32]" not in jaxpr + jax.jit(f).lower(rows, pairs, weights).as_text().replace("x", ",")


def test_empty_batch():
    ids, weights = jax.vmap(lambda x: ferrum_jax.route_topk_softmax(x, 2))(jnp.zeros((0, 4, 6)))
    assert ids.shape == weights.shape == (0, 4, 2)


def test_whole_layer(implementation):
    size = Size(5, 4, 2, 3)
    args = [layer.init(jax.random.key(i), size) for i in range(BATCH)]
    run = functools.partial(layer.packed, top_k=2, implementation=implementation)
    loss = lambda *a: jnp.sum(jnp.sin(run(*a)))  # noqa: E731
    got = jax.vmap(jax.grad(loss, (0, 1, 2)), in_axes=(0, 0, None, None))(
        jnp.stack([a[0] for a in args]), jnp.stack([a[1] for a in args]), *args[0][2:]
    )
    loop = [jax.grad(loss, (0, 1, 2))(*a[:2], *args[0][2:]) for a in args]
    assert_same(got, loop)
