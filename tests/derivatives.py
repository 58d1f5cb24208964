"""Functions with their gradients; and derivatives of every mode, to second order, against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType


def check_derivatives(f, floats, seed, bound=1e-2):
    """Check f, which maps the arrays `floats` to a sequence of arrays, along one random direction.

    One compiled program computes everything that is compared. `bound` limits the error of the finite differences,
    relative to the derivative's largest entry or to 1, whichever is larger.
    """
    r, step = np.random.default_rng(seed), np.float32(1e-2)
    every = tuple(range(len(floats)))
    direction = tuple(r.normal(size=x.shape).astype(x.dtype) for x in floats)
    gradient = jax.grad(lambda *xs: sum(jnp.sum(jnp.sin(y)) for y in f(*xs)), every)

    def slope(*xs):
        return sum(jnp.vdot(g, v) for g, v in zip(gradient(*xs), direction, strict=True))

    @jax.jit
    def run(*xs):
        sides = [[x + s * step * v for x, v in zip(xs, direction, strict=True)] for s in (1, -1)]
        out, tangent = jax.jvp(lambda *xs: tuple(f(*xs)), xs, direction)
        first, forward = jax.jvp(gradient, xs, direction)
        reverse = jax.grad(slope, every)(*xs)
        return out, tangent, first, forward, reverse, [(f(*side), gradient(*side)) for side in sides]

    out, tangent, first, forward, reverse, (above, below) = run(*floats)
    for got, high, low in zip((*tangent, *forward), (*above[0], *above[1]), (*below[0], *below[1]), strict=True):
        difference = (np.asarray(high) - np.asarray(low)) / (2 * step)
        np.testing.assert_allclose(got, difference, rtol=bound, atol=bound * most(difference))
    np.testing.assert_allclose(inner(first, direction), inner(map(np.cos, out), tangent), rtol=1e-4, atol=1e-4)
    for a, b in zip(forward, reverse, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * most(b))


def cotangent(out):
    """A cotangent that does not depend on the result: the sine of a large result in 16 bits would be all rounding."""
    ct = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype)
    sharding = jax.typeof(out).sharding
    return jax.sharding.reshard(ct, sharding) if AxisType.Explicit in sharding.mesh.axis_types else ct


def with_gradients(f):
    """f, and its gradient by each argument for that cotangent, as one compiled program."""

    def run(*args):
        out, vjp = jax.vjp(f, *args)
        return out, *vjp(cotangent(out))

    return jax.jit(run)


def most(x):
    return max(1, np.abs(x).max(initial=0))


def inner(xs, ys):
    return sum(float(np.vdot(x, y)) for x, y in zip(xs, ys, strict=True))
