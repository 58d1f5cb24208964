"""vmap equals a Python loop: of some operands, over any axis, nested, with derivatives, without copies."""

import functools

import jax
import jax.numpy as jnp
import layer
import numpy as np
import pytest
from cases import CASES, FLOAT_CASES, SMALL, Size, finite_args, per_primitive, rng

import ferrum_jax

BATCH = 3


def stacked(case, mapped, axes):
    """Arguments of which the mapped ones have a batch axis where `axes` says, and the slices to loop over."""
    slices = [finite_args(case, rng(case, seed), SMALL) for seed in range(BATCH)]
    slices = [[s[i] if m else slices[0][i] for i, m in enumerate(mapped)] for s in slices]
    args = [
        np.stack([s[i] for s in slices], axis) if m else slices[0][i]
        for i, (m, axis) in enumerate(zip(mapped, axes, strict=True))
    ]
    return args, slices


def subsets(case):
    """All operands mapped, each alone, each left out; operands of one origin together."""
    count = len(finite_args(case, rng(case), SMALL))
    group = [case.tables if i in case.tables else (i,) for i in range(count)]
    alone = [tuple(i in g for i in range(count)) for g in group]
    found = [(True,) * count, *alone, *(tuple(not m for m in mapped) for mapped in alone)]
    return [m for m in dict.fromkeys(found) if any(m)]


def assert_same(got, loop, what):
    for result, *slices in zip(got, *loop, strict=True):
        want = np.stack([np.asarray(s) for s in slices])
        if np.issubdtype(want.dtype, np.integer):
            np.testing.assert_array_equal(result, want, err_msg=str(what))
        else:
            np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-6, err_msg=str(what))


@pytest.mark.parametrize("case", per_primitive(CASES), ids=str)
def test_every_subset_and_axis(case, every_implementation):
    """In one program. With each subset the batch axis stands at another place, and once the results' is the last."""
    f = functools.partial(case.results, size=SMALL, implementation=every_implementation)
    ranks = [a.ndim for a in finite_args(case, rng(case), SMALL)]
    patterns = []
    for turn, mapped in enumerate(subsets(case)):
        axes = [min(turn % (max(ranks) + 1), rank) for rank in ranks]
        patterns.append((mapped, [axis if m else None for m, axis in zip(mapped, axes, strict=True)], -(turn % 2)))
    given = [stacked(case, mapped, [a or 0 for a in in_axes]) for mapped, in_axes, _ in patterns]
    run = jax.jit(
        lambda batches: [jax.vmap(f, axes, out)(*b) for b, (_, axes, out) in zip(batches, patterns, strict=True)]
    )
    one = jax.jit(f)
    for (mapped, _, out), got, (_, slices) in zip(patterns, run([args for args, _ in given]), given, strict=True):
        assert_same([np.moveaxis(r, out, 0) for r in got], [one(*s) for s in slices], mapped)


@pytest.mark.parametrize("case", per_primitive(CASES), ids=str)
def test_nested(case, every_implementation):
    """The outer map over the first operand, the inner one over all; and over all but the first, and the first."""
    f = functools.partial(case.results, size=SMALL, implementation=every_implementation)
    grids = [[finite_args(case, rng(case, a, b), SMALL) for b in range(2)] for a in range(BATCH)]
    count = len(grids[0][0])
    first, every = [i == 0 for i in range(count)], [True] * count
    rest = [not m for m in first]
    one = jax.jit(f)
    for outer, inner in [(first, every), (rest, first)][: 2 if any(rest) else 1]:

        def pick(i, a, b, outer=outer, inner=inner):
            return grids[a if outer[i] else 0][b if inner[i] else 0][i]

        args = []
        for i in range(count):
            grid = np.stack([np.stack([pick(i, a, b) for b in range(2)]) for a in range(BATCH)])
            args.append(grid[(slice(None) if outer[i] else 0, slice(None) if inner[i] else 0)])
        outer_axes, inner_axes = ([0 if m else None for m in which] for which in (outer, inner))
        got = jax.jit(jax.vmap(jax.vmap(f, inner_axes), outer_axes))(*args)
        loop = [[one(*(pick(i, a, b) for i in range(count))) for b in range(2)] for a in range(BATCH)]
        assert_same(got, [[np.stack(r) for r in zip(*row, strict=True)] for row in loop], outer)


@pytest.mark.parametrize("case", per_primitive(FLOAT_CASES), ids=str)
def test_grad_of_vmap_and_vmap_of_grad(case, every_implementation):
    """All operands mapped, the first, all but it. An unmapped operand's gradient is the sum over the batch."""

    def loss(*a):
        results = case.float_results(*a, size=SMALL, implementation=every_implementation)
        return sum(jnp.sum(jnp.sin(r)) for r in results)

    every = subsets(case)
    first = tuple(i == 0 for i in range(len(every[0])))
    patterns = [m for m in dict.fromkeys((every[0], first, tuple(not m for m in first))) if any(m)]
    given = [stacked(case, mapped, [0] * len(mapped)) for mapped in patterns]

    @jax.jit
    def run(batches):
        out = []
        for args, mapped in zip(batches, patterns, strict=True):
            in_axes = [0 if m else None for m in mapped]
            whole = jax.grad(lambda *a, axes=in_axes: jnp.sum(jax.vmap(loss, axes)(*a)), case.floats)
            out.append((jax.vmap(jax.grad(loss, case.floats), in_axes)(*args), whole(*args)))
        return out

    one = jax.jit(jax.grad(loss, case.floats))
    for mapped, (by_slice, whole), (_, slices) in zip(patterns, run([a for a, _ in given]), given, strict=True):
        loop = [[np.asarray(g) for g in one(*s)] for s in slices]
        assert_same(by_slice, loop, mapped)
        for i, got, *parts in zip(case.floats, whole, *loop, strict=True):
            want = np.stack(parts) if mapped[i] else sum(parts)
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=str(mapped))


def test_unmapped_rows_are_not_copied():
    """Two layers' routing over the same rows: the program holds no [B, R, H] array."""
    rows, pairs = jnp.ones((64, 32)), jnp.zeros((5, 8, 2), jnp.int32)
    weights = jnp.ones((5, 8, 2))
    f = jax.vmap(ferrum_jax.moe_combine, in_axes=(None, 0, 0))
    jaxpr = str(jax.make_jaxpr(f)(rows, pairs, weights))
    assert "[1,64,32]" in jaxpr
    assert "[5,64,32]" not in jaxpr + jax.jit(f).lower(rows, pairs, weights).as_text().replace("x", ",")


def test_empty_batch():
    ids, weights = jax.vmap(lambda x: ferrum_jax.route_topk_softmax(x, 2))(np.zeros((0, 4, 6), np.float32))
    assert ids.shape == weights.shape == (0, 4, 2)


def test_whole_layer(every_implementation):
    size = Size(5, 4, 2, 3)
    args = [layer.init(i, size) for i in range(BATCH)]
    run = functools.partial(layer.packed, top_k=2, implementation=every_implementation)

    def loss(*a):
        return jnp.sum(jnp.sin(run(*a)))

    gradient = jax.grad(loss, (0, 1, 2))
    got = jax.jit(jax.vmap(gradient, in_axes=(0, 0, None, None)))(
        np.stack([a[0] for a in args]), np.stack([a[1] for a in args]), *args[0][2:]
    )
    one = jax.jit(gradient)
    assert_same(got, [one(*a[:2], *args[0][2:]) for a in args], "layer")
