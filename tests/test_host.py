"""Routing read back to the host, and tables made there."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import SMALL, USUAL, expert_ids, logits, rng
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ferrum_jax as fj

DEVICES = min(4, jax.device_count())
MESH = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
X = np.array([[1.0, 3.0, 2.0, -1.0]] * 8, np.float32)


def check_host(results, x):
    ids, weights = results
    want_ids, want_weights = fj.route_topk_softmax(np.asarray(x), 2)
    assert type(ids) is np.ndarray
    assert type(weights) is np.ndarray
    assert (ids.dtype, weights.dtype) == (np.uint32, np.float32)
    np.testing.assert_array_equal(ids, np.asarray(want_ids).astype(np.uint32))
    np.testing.assert_array_equal(weights, np.asarray(want_weights))


def test_route_into_host():
    (x,) = logits(rng("host"), SMALL, "float32")
    check_host(fj.route_topk_into_host(x, 2), x)
    check_host(fj.route_topk_into_host(jnp.stack([X, X]), 2), np.stack([X, X]))
    ids, weights = fj.route_topk_into_host(X, 4, norm_topk_prob=False)
    np.testing.assert_array_equal(weights, fj.route_topk_softmax(X, 4, norm_topk_prob=False).expert_weights)
    ids[:], weights[:] = 0, 0  # the caller's own
    assert fj.route_topk_into_host(X[:0], 2)[0].shape == (0, 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P()], ids=str)
def test_route_into_host_from_any_sharding(kind, spec):
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,))
    check_host(fj.route_topk_into_host(jax.device_put(X, NamedSharding(mesh, spec)), 2), X)


def test_route_into_host_from_any_device():
    check_host(fj.route_topk_into_host(jax.device_put(X, jax.devices()[-1]), 2), X)


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        jax.vmap,
        lambda f: jax.jit(lambda x: f(X)),  # values, but in a traced function
        lambda f: jax.grad(lambda x: f(x)[1].sum()),
        lambda f: jax.shard_map(f, mesh=MESH, in_specs=P("d"), out_specs=P("d")),
    ],
    ids=["jit", "vmap", "jit of values", "grad", "shard_map"],
)
def test_route_into_host_refuses_to_be_traced(transform):
    with pytest.raises(TypeError, match=r"route_topk_into_host: logits must be values.*use route_topk_softmax"):
        transform(lambda x: fj.route_topk_into_host(x, 2))(X)


@pytest.mark.parametrize("pair_ids", [False, True])
@pytest.mark.parametrize("size", USUAL, ids=str)
def test_upload_of_every_table(size, pair_ids):
    ids = expert_ids(rng("upload", size), size)[0]
    tables = oracle.aligned(ids, num_experts=size.E, block_size=size.block, pair_ids=pair_ids)
    slots, blocks, total = (table.value for table in tables)
    sizes = {"num_pairs": ids.size, "num_experts": size.E, "block_size": size.block}
    uploaded = fj.upload_moe_routing(slots, blocks.astype(np.int16), total.reshape(1), **sizes)
    align = fj.moe_align_block_size_pair_ids if pair_ids else fj.moe_align_block_size
    for got, want in zip(uploaded, align(ids, size.E, size.block), strict=True):
        assert (got.dtype, got.shape, jax.typeof(got).weak_type) == (jnp.int32, want.shape, False)
        np.testing.assert_array_equal(got, want)


SLOTS, BLOCKS, TOTAL = [0, 4, 1, 2, 3, 4, 4, 4], [0, 1, 2, -1], 6


@pytest.mark.parametrize("dtype", ["uint8", "uint64", "int64"])
def test_upload_of_any_integers(dtype):
    slots, blocks = np.array(SLOTS, dtype), np.array(BLOCKS[:3], dtype)
    routing = fj.upload_moe_routing(slots[:6], blocks, np.array(TOTAL, dtype), num_pairs=4)
    slots[:] = 0  # what is uploaded is a copy
    assert routing.sorted_token_ids.tolist() == SLOTS[:6]
    assert routing.total_tokens_post_pad.dtype == jnp.int32


def test_upload_to_devices_and_shardings():
    mesh = jax.make_mesh((DEVICES,), ("d",))
    last = jax.devices()[-1]
    for device, want in ((last, {last}), (NamedSharding(mesh, P("d")), set(mesh.devices.flat))):
        routing = fj.upload_moe_routing(SLOTS, BLOCKS, TOTAL, device=device)
        assert all(x.devices() == want for x in routing)
        assert routing.sorted_token_ids.tolist() == SLOTS
    assert routing.block_ids.sharding.spec == P("d")
    assert routing.total_tokens_post_pad.sharding.is_fully_replicated


def change(values, index, value):
    return [*values[:index], value, *values[index + 1 :]]


WRONG = {
    "float slots": (([0.0], [0], 1), {}, TypeError, "sorted_token_ids must hold integers; got float64"),
    "bool blocks": ((SLOTS, [True] * 4, TOTAL), {}, TypeError, "block_ids must hold integers; got bool"),
    "no total": ((SLOTS, BLOCKS, None), {}, TypeError, "total_tokens_post_pad must hold integers; got object"),
    "two axes": (([SLOTS], BLOCKS, TOTAL), {}, ValueError, "sorted_token_ids must have one axis; got shape (1, 8)"),
    "scalar block": ((SLOTS, 0, TOTAL), {}, ValueError, "block_ids must have one axis; got shape ()"),
    "two totals": ((SLOTS, BLOCKS, [6, 6]), {}, ValueError, "total_tokens_post_pad must be a scalar or of length 1"),
    "uneven": ((SLOTS[:-1], BLOCKS, TOTAL), {}, ValueError, "sorted_token_ids must hold equally many slots"),
    "no slots": (([], BLOCKS, 0), {}, ValueError, "for each of the 4 block_ids; got 0"),
    "no blocks": ((SLOTS, [], 0), {}, ValueError, "for each of the 0 block_ids; got 8"),
    "block_size": ((SLOTS, BLOCKS, TOTAL), {"block_size": 4}, ValueError, "4 blocks of block_size 4, 16 slots; got 8"),
    "bad block_size": ((SLOTS, BLOCKS, TOTAL), {"block_size": 0}, ValueError, "block_size must be in"),
    "bad num_pairs": ((SLOTS, BLOCKS, TOTAL), {"num_pairs": 4.0}, TypeError, "num_pairs must be a Python int"),
    "bad num_experts": ((SLOTS, BLOCKS, TOTAL), {"num_experts": 0}, ValueError, "num_experts must be in"),
    "slot -1": (
        (change(SLOTS, 3, -1), BLOCKS, TOTAL),
        {},
        ValueError,
        "sorted_token_ids[3] must be a packed row or pair id in [0, 2147483647]; got -1",
    ),
    "wide slot": (
        (change(SLOTS, 2, 2**32), BLOCKS, TOTAL),
        {},
        ValueError,
        "sorted_token_ids[2] must be a packed row or pair id in [0, 2147",
    ),
    "slot past P": (
        (change(SLOTS, 2, 5), BLOCKS, TOTAL),
        {"num_pairs": 4},
        ValueError,
        "sorted_token_ids[2] must be a packed row or pair id, or 4 for padding; got 5",
    ),
    "slot in the tail": (
        (change(change(SLOTS, 3, 4), 7, 2), BLOCKS, TOTAL),
        {"num_pairs": 4},
        ValueError,
        "sorted_token_ids[7] must be 4, no pair, past the total; got 2",
    ),
    "slot twice": (
        (change(SLOTS, 4, 1), BLOCKS, TOTAL),
        {"num_pairs": 4},
        ValueError,
        "sorted_token_ids[4] must be a packed row or pair id that no slot before holds; got 1",
    ),
    "total -2": (
        (SLOTS, BLOCKS, -2),
        {},
        ValueError,
        "total_tokens_post_pad must be a multiple of the block size 2, from 0 to the 8 slots; got -2",
    ),
    "total past S": ((SLOTS, BLOCKS, 10), {}, ValueError, "total_tokens_post_pad must be a multiple"),
    "total 5": ((SLOTS, BLOCKS, 5), {}, ValueError, "multiple of the block size 2, from 0 to the 8 slots; got 5"),
    "no owner": (
        (SLOTS, change(BLOCKS, 1, -1), TOTAL),
        {},
        ValueError,
        "block_ids[1] must be in [0, 2147483647) in a block before the total; got -1",
    ),
    "owner E": (
        (SLOTS, change(BLOCKS, 2, 3), TOTAL),
        {"num_experts": 3},
        ValueError,
        "block_ids[2] must be an expert of 3 in a block before the total; got 3",
    ),
    "owner in the tail": (
        (SLOTS, change(BLOCKS, 3, 0), TOTAL),
        {},
        ValueError,
        "block_ids[3] must be -1 in a block past the total; got 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_upload_says_what_is_wrong(name):
    args, sizes, error, words = WRONG[name]
    with pytest.raises(error) as caught:
        fj.upload_moe_routing(*args, **sizes)
    assert str(caught.value).startswith("upload_moe_routing: ")
    assert words in str(caught.value)


def test_upload_refuses_tracers():
    with pytest.raises(TypeError, match="total_tokens_post_pad must be a host array"):
        jax.jit(lambda total: fj.upload_moe_routing(SLOTS, BLOCKS, total))(TOTAL)
