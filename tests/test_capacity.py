"""The capacity of experts, against a NumPy loop; shapes, bits and gradients of what is kept."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SIZES, expert_ids, rng
from hypothesis import HealthCheck, given, settings
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from meshes import mesh_of
from oracle import rank_key

import ferrum_jax as fj

jobs = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
PRIORITIES = ("token", "weight")


def limit(ids, weights, num_experts, capacity, priority):
    flat, w = np.asarray(ids).reshape(-1), np.asarray(weights).reshape(-1)
    order = range(flat.size)
    if priority == "weight":
        order = sorted(order, key=lambda p: -rank_key(w[p]))  # stable
    room, dropped = [capacity] * num_experts, 0
    out_ids, out_weights = np.full(flat.size, -1), np.zeros(flat.size, np.float32)
    for p in order:
        e = int(flat[p])
        if not 0 <= e < num_experts:
            continue
        if room[e]:
            room[e] -= 1
            out_ids[p], out_weights[p] = e, w[p]
        else:
            dropped += 1
    return out_ids.reshape(np.shape(ids)), out_weights.reshape(np.shape(ids)), dropped


def assert_limited(got, want):
    (ids, weights), dropped = got
    assert isinstance(got[0], fj.RouterOutput)
    assert (ids.dtype, weights.dtype, dropped.dtype) == (jnp.int32, jnp.float32, jnp.int32)
    for result, expected in zip((ids, weights, dropped), want, strict=True):
        np.testing.assert_array_equal(result, expected)  # NaN where NaN is


def weights_of(r, shape):
    """With ties, zeros of either sign, subnormals and NaN."""
    w = np.round(r.random(shape) * 4) / 4
    hostile = r.random(shape) < 0.3
    w[hostile] = r.choice([0.0, -0.0, 1e-40, 2e-40, np.nan, -np.nan, np.inf, -1.0], size=hostile.sum())
    return w.astype(np.float32)


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("size", [*SIZES[:2], *SIZES[3:7:2], SIZES[8]], ids=str)
def test_values(size, priority):
    r = rng("capacity", size)
    (ids,) = expert_ids(r, size)
    weights = weights_of(r, ids.shape)
    for capacity in (0, 1, 3, 10**9):
        got = fj.limit_capacity(fj.RouterOutput(ids, weights), size.E, capacity, priority=priority)
        assert_limited(got, limit(ids, weights, size.E, capacity, priority))
        assert max(np.bincount(np.ravel(got[0].expert_ids) + 1, minlength=2)[1:]) <= capacity


@jobs
@given(
    hnp.arrays(np.int32, (4, 3), elements=st.one_of(st.integers(-1, 3), st.sampled_from([2**31 - 1, -(2**31)]))),
    hnp.arrays(np.float32, (4, 3), elements=st.floats(width=32, allow_nan=True, allow_subnormal=True)),
    st.integers(0, 5),
    st.sampled_from(PRIORITIES),
)
def test_any_ids_and_weights(ids, weights, capacity, priority):
    got = fj.limit_capacity(fj.RouterOutput(ids, weights), 3, capacity, priority=priority)
    assert_limited(got, limit(ids, weights, 3, capacity, priority))


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
def test_any_integer_dtype(dtype, priority, x64):
    ids = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    if dtype(0).itemsize == 8:
        ids[1, 0] += dtype(2**32)  # expert 1, were it narrowed by wrapping
    routing = fj.RouterOutput(ids, np.ones(ids.shape, np.float64))
    assert_limited(fj.limit_capacity(routing, 2, 2, priority=priority), limit(ids, routing[1], 2, 2, priority))


@pytest.mark.parametrize("priority", PRIORITIES)
def test_vmap_and_leading_axes(priority):
    r = rng("capacity")
    ids, weights = r.integers(-1, 3, (2, 3, 4, 2)), weights_of(r, (2, 3, 4, 2))

    def f(i, w):
        return fj.limit_capacity(fj.RouterOutput(i, w), 3, 2, priority=priority)

    want = [limit(ids[i], weights[i], 3, 2, priority) for i in np.ndindex(2, 3)]
    want = [np.reshape(x, (2, 3, *np.shape(x[0]))) for x in zip(*want, strict=True)]
    assert_limited(jax.jit(f)(ids, weights), want)
    twice = jax.jit(jax.vmap(jax.vmap(f, (2, 0)), (0, 0)))
    assert_limited(twice(np.moveaxis(ids, 1, -1), weights), want)
    shared = jax.vmap(f, (None, 0))(ids[0, 0], weights[0])
    for i in range(3):
        assert_limited(jax.tree.map(lambda x: x[i], shared), limit(ids[0, 0], weights[0, i], 3, 2, priority))  # noqa: B023


@pytest.mark.parametrize("priority", PRIORITIES)
def test_gradient_of_what_is_kept(priority):
    """Exactly the cotangent where a pair is kept, exactly 0 elsewhere, also where a weight or cotangent is NaN."""
    r = rng("gradient")
    ids, weights = r.integers(-1, 3, (5, 2)), np.round(r.random((5, 2)), 1).astype(np.float32)

    def f(w):
        return fj.limit_capacity(fj.RouterOutput(ids, w), 3, 2, priority=priority)[0].expert_weights

    kept = limit(ids, weights, 3, 2, priority)[0] >= 0
    assert kept.any()
    assert not kept.all()
    g = r.normal(size=weights.shape).astype(np.float32)
    hostile = np.where(kept, weights, np.nan).astype(np.float32) if priority == "token" else weights
    (gradient,) = jax.jit(lambda w, g: jax.vjp(f, w)[1](g))(hostile, np.where(kept, g, np.nan))
    np.testing.assert_array_equal(gradient, np.where(kept, g, 0))
    spread = (np.argsort(r.random(10)) * 0.37).reshape(5, 2).astype(np.float32)
    check_grads(jax.jit(lambda w: jnp.sin(f(w))), (spread,), order=1, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name)
@pytest.mark.parametrize("priority", PRIORITIES)
def test_meshes(priority, kind):
    """Tokens sharded, one capacity for all of them; and inside shard_map, where each shard has its own."""
    mesh = mesh_of(2, kind)
    r = rng("mesh")
    ids, weights = r.integers(-1, 3, (8, 2)).astype(np.int32), r.random((8, 2)).astype(np.float32)

    def f(i, w):
        return fj.limit_capacity(fj.RouterOutput(i, w), 3, 2, priority=priority)

    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, P("d"))) for x in (ids, weights)]
    with jax.set_mesh(mesh):
        assert_limited(jax.jit(f)(*placed), limit(ids, weights, 3, 2, priority))

    def local(i, w):
        return jax.tree.map(lambda x: x[None], f(i, w))

    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d")))(*placed)
    for i, part in enumerate((slice(4), slice(4, 8))):
        want = limit(ids[part], weights[part], 3, 2, priority)
        assert_limited(jax.tree.map(lambda x: np.asarray(x)[i], got), want)  # noqa: B023


def test_what_is_left_is_a_routing():
    """Counted, planned and combined, dropped pairs are nowhere."""
    ids, weights = fj.route_topk_softmax(rng("left").normal(size=(16, 4)).astype(np.float32), 2)
    kept, dropped = fj.limit_capacity(fj.RouterOutput(ids, weights), 4, 5)
    counts = fj.expert_counts(kept.expert_ids, 4)
    np.testing.assert_array_equal(counts, np.minimum(fj.expert_counts(ids, 4), 5))
    assert int(dropped) == 32 - int(counts.sum())
    assert fj.check_routing(fj.moe_plan(kept.expert_ids, 4, 4), 4, expert_ids=kept.expert_ids) == []


IDS, WEIGHTS = np.zeros((3, 2), int), np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("routing", "sizes", "error", "words"),
    [
        ((IDS, WEIGHTS), (0, 1), ValueError, "limit_capacity: num_experts.*got 0"),
        ((IDS, WEIGHTS), (4, -1), ValueError, "limit_capacity: capacity.*got -1"),
        ((IDS, WEIGHTS), (4, 1.5), TypeError, "limit_capacity: capacity.*float"),
        ((IDS, WEIGHTS), (4, 1, "random"), ValueError, "priority must be one of 'token', 'weight'; got 'random'"),
        ((IDS, WEIGHTS, 1), (4, 1), TypeError, "router_output must be a RouterOutput; got tuple"),
        (IDS, (4, 1), TypeError, "router_output must be a RouterOutput; got ndarray"),
        ((WEIGHTS, WEIGHTS), (4, 1), TypeError, "expert_ids must hold integers; got float32"),
        ((IDS, IDS), (4, 1), TypeError, "expert_weights must be floating point; got int"),
        ((IDS, WEIGHTS[:2]), (4, 1), ValueError, "expert_weights.*T = 3"),
        (
            (IDS[None], np.stack([WEIGHTS] * 2)),
            (4, 1),
            ValueError,
            r"shape of expert_ids, \(1, 3, 2\); got \(2, 3, 2\)",
        ),
        ((IDS[0], WEIGHTS[0]), (4, 1), ValueError, "expert_ids.*at least 2 axes"),
    ],
)
def test_errors(routing, sizes, error, words):
    with pytest.raises(error, match=words):
        fj.limit_capacity(routing, *sizes[:2], **({"priority": sizes[2]} if sizes[2:] else {}))
