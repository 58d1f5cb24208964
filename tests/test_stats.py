"""Statistics of a routing, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SIZES, SMALL, expert_ids, rng
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ferrum_jax as fj


def routing(ids):
    return fj.RouterOutput(ids, np.ones(np.shape(ids), np.float32))


def check(stats, ids, num_experts, block_size):
    flat = np.asarray(ids).reshape(-1)
    load = np.array([np.sum(flat == e) for e in range(num_experts)], np.float64)
    pairs = load.sum()
    share = load[load > 0] / pairs
    slots = np.ceil(load / block_size).sum() * block_size
    np.testing.assert_array_equal(stats.tokens_per_expert, load)
    np.testing.assert_allclose(stats.load_imbalance, load.max() / load.mean() if pairs else 1, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, -np.sum(share * np.log(share)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.padding_waste, 1 - pairs / slots if pairs else 0, rtol=1e-5, atol=1e-6)
    assert (int(stats.unused_experts), int(stats.pairs_without_expert)) == (np.sum(load == 0), flat.size - pairs)
    assert stats.block_size == block_size


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size):
    ids = expert_ids(rng("stats", size), size)[0]
    check(fj.routing_stats(routing(ids), size.E, block_size=size.block), ids, size.E, size.block)


def test_transformed():
    ids = np.stack([expert_ids(rng("stats", i), SMALL)[0] for i in range(4)])

    def f(ids):
        return fj.routing_stats(routing(ids), SMALL.E, block_size=4)

    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    sharded = jax.device_put(ids, NamedSharding(mesh, P("d")))
    assert jax.vmap(f)(ids).summary() == f(ids).summary()
    every = [f(ids), jax.jit(f)(ids), jax.vmap(f)(ids)._replace(block_size=4), jax.jit(f)(sharded)]
    for stats in every:
        assert isinstance(stats, fj.RoutingStats)
        assert [x.dtype for x in stats[:-1]] == ["int32", "float32", "float32", "int32", "int32", "float32"]
        for i in range(4):
            check(fj.RoutingStats(*(np.asarray(x)[i] for x in stats[:-1]), stats.block_size), ids[i], SMALL.E, 4)


def test_extremes():
    even = fj.routing_stats(routing(np.arange(16).reshape(8, 2)), 16, block_size=1)
    alone = fj.routing_stats(routing(np.full((8, 1), 3)), 16)
    none = fj.routing_stats(routing(np.full((8, 2), -1)), 16)
    got = [(float(s.load_imbalance), float(s.entropy), float(s.padding_waste)) for s in (even, alone, none)]
    np.testing.assert_allclose(got, [(1, np.log(16), 0), (16, 0, 0.875), (1, 0, 0)], rtol=1e-6, atol=1e-6)


def test_x64(x64):
    stats = fj.routing_stats(routing(np.array([[0, 2**32 + 1]])), 4)
    assert (stats.tokens_per_expert.tolist(), int(stats.pairs_without_expert)) == ([1, 0, 0, 0], 1)
    assert (stats.load_imbalance.dtype, stats.tokens_per_expert.dtype) == (jnp.float32, jnp.int32)


def test_summary():
    ids = np.array([[[0, 1], [0, 2]], [[3, -1], [9, 9]], [[-1, 9], [9, 9]]])
    assert fj.routing_stats(routing(ids), 4, block_size=2).summary() == (
        "[0]: 4 pairs on 4 experts, 1.0 an expert.\n"
        "The busiest, expert 0, has 2: 2.00 times the mean. 1 expert is unused.\n"
        "Entropy 1.04 nats of 1.39: as if 2.8 experts shared the load evenly.\n"
        "Blocks of 2: 6 slots, of which 33.3% are padding.\n\n"
        "[1]: 1 pair on 4 experts, 0.2 an expert.\n"
        "The busiest, expert 3, has 1: 4.00 times the mean. 3 experts are unused.\n"
        "Entropy 0.00 nats of 1.39: as if 1.0 experts shared the load evenly.\n"
        "Blocks of 2: 2 slots, of which 50.0% are padding.\n"
        "3 pairs have no expert.\n\n"
        "[2]: 0 pairs on 4 experts, 0.0 an expert.\n"
        "4 pairs have no expert."
    )


def test_a_plain_tuple_will_do():
    ids, weights = np.array([[0, 1]]), np.ones((1, 2))
    assert fj.routing_stats((ids, weights), 4).tokens_per_expert.tolist() == [1, 1, 0, 0]
    with pytest.raises(TypeError, match="routing_stats: router_output must be a RouterOutput; got ndarray"):
        fj.routing_stats(ids, 4)


@pytest.mark.parametrize(
    ("ids", "sizes", "error", "words"),
    [
        (np.zeros((2, 2)), (4,), TypeError, "expert_ids must hold integers"),
        (np.zeros(2, int), (4,), ValueError, "expert_ids"),
        (np.zeros((2, 2), int), (0,), ValueError, "routing_stats: num_experts"),
        (np.zeros((2, 2), int), (2.0,), TypeError, "routing_stats: num_experts"),
        (np.zeros((2, 2), int), (4, 0), ValueError, "routing_stats: block_size"),
    ],
)
def test_errors(ids, sizes, error, words):
    with pytest.raises(error, match=words):
        fj.routing_stats(routing(ids), sizes[0], **({"block_size": sizes[1]} if sizes[1:] else {}))
