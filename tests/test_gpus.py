"""Experts over two GPUs: equal to one GPU's layer, and timed against it and against one-hot dispatch.

`pytest -m gpu -s tests/test_gpus.py` on a machine with two GPUs prints the times.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from derivatives import with_gradients
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import ferrum_jax
from ferrum_jax.bench import today
from ferrum_jax.parallel import moe_mlp

pytestmark = [pytest.mark.gpu, pytest.mark.gpus(2)]

QWEN3_30B = {"experts": 128, "top_k": 8, "hidden": 2048, "width": 768}
SMALL = {"experts": 16, "top_k": 3, "hidden": 256, "width": 128}
EXCHANGES = ("gather", "padded", "ragged", None)


def arguments(tokens, dtype, experts, top_k, hidden, width):
    """Logits with a slope: some experts are chosen often, some hardly."""
    shapes = (tokens, hidden), (tokens, experts), (experts, hidden, 2 * width), (experts, width, hidden)
    keys = jax.random.split(jax.random.key(tokens), 4)
    x, logits, *matrices = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    logits += jnp.linspace(1, -1, experts)[None]
    return [a.astype(dtype) for a in (x, logits, *(m / m.shape[1] ** 0.5 for m in matrices))]


def spread(f):
    return jax.shard_map(f, mesh=mesh_of(2), in_specs=P("d"), out_specs=P("d"))


ALL = (P("d"),) * 4


def placed(args, specs=ALL, kind=AxisType.Auto):
    return [jax.device_put(a, NamedSharding(mesh_of(2, kind), spec)) for a, spec in zip(args, specs, strict=False)]


# Where each of x, the logits and the two matrices is divided.
LAYOUTS = {
    "tokens": (P("d"), P("d"), P(), P()),
    "tokens, H of matrices": (P("d"), P("d"), P(None, "d"), P(None, None, "d")),
    "tokens and experts": ALL,
    "experts": (P(), P(), P("d"), P("d")),
    "width": (P(), P(), P(None, None, "d"), P(None, "d")),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [32, 2048])
@pytest.mark.parametrize(("exchange", "chunks"), [*((exchange, 1) for exchange in EXCHANGES), ("ragged", 4)])
def test_two_gpus_equal_one(exchange, chunks, tokens, dtype):
    args = arguments(tokens, dtype, **SMALL)
    fixed = {"top_k": SMALL["top_k"]}
    how = {"axis_name": "d", "exchange": exchange, "chunks": chunks}
    got = with_gradients(spread(functools.partial(moe_mlp, **how, **fixed)))(*placed(args))
    want = with_gradients(functools.partial(ferrum_jax.moe_mlp, **fixed))(*args)
    for g, w in zip(got, want, strict=True):
        oracle.assert_near(g, w, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_divided_by_its_types_equals_one_gpu(layout, dtype):
    args = arguments(2048, dtype, **SMALL)
    layer = functools.partial(ferrum_jax.moe_mlp, top_k=SMALL["top_k"])
    want = with_gradients(layer)(*args)
    with jax.set_mesh(mesh_of(2, AxisType.Explicit)):
        there = placed(args, LAYOUTS[layout], AxisType.Explicit)
        got = with_gradients(layer)(*there)
        assert "triton_kernel_call" in jax.jit(layer).lower(*there).compile().as_text()
    for g, w in zip(got, want, strict=True):
        oracle.assert_near(g, w, dtype)


@pytest.mark.parametrize("exchange", ["padded", "ragged"])
def test_overflow_is_counted(exchange):
    """All pairs name the first GPU's experts: it takes in its capacity, and the rest is counted."""
    tokens, capacity = 64, 40
    x, _, *matrices = arguments(tokens, "float32", **SMALL)
    ids = jnp.arange(tokens * 2, dtype=jnp.int32).reshape(tokens, 2) % (SMALL["experts"] // 2)

    def run(x, ids, *matrices):
        routed = ferrum_jax.RouterOutput(ids, jnp.ones(ids.shape))
        fixed = {"axis_name": "d", "exchange": exchange, "capacity": capacity, "return_dropped": True}
        out, dropped = moe_mlp(x, None, *matrices, router_output=routed, **fixed)
        return out, dropped[None]

    out, dropped = jax.jit(spread(run))(*placed([x, ids, *matrices]))
    assert int(dropped.sum()) == tokens * 2 - capacity
    assert bool(jnp.all(jnp.isfinite(out)))


def test_kernels_run_inside_shard_map_and_xla_under_plain_jit():
    """The same ids, and in shard_map the same bits as on one GPU, without a collective."""
    logits = jax.random.normal(jax.random.key(0), (4096, 128), jnp.bfloat16)
    (there,) = placed([logits])

    def route(x):
        return tuple(ferrum_jax.route_topk_softmax(x, 8))

    (ids, weights), inside = jax.jit(route)(logits), jax.jit(spread(route))
    program = inside.lower(there).compile().as_text()
    assert "triton_kernel_call" in program
    assert "all-gather" not in program
    for got, want in zip(inside(there), (ids, weights), strict=True):
        np.testing.assert_array_equal(got, want)
    plain = jax.jit(route).lower(there).compile()
    assert "triton_kernel_call" not in plain.as_text()
    np.testing.assert_array_equal(plain(there)[0], ids)
    np.testing.assert_allclose(plain(there)[1], weights, rtol=1e-6)


def one_hot_dispatch(x, logits, w_gate_up, w_down, *, top_k, capacity):
    """GShard's layer on one device of the axis: one-hot [T, E, C] products around an all_to_all of fixed slots."""
    weights, ids = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), top_k)
    weights = weights / weights.sum(-1, keepdims=True)
    chosen = jax.nn.one_hot(ids, logits.shape[-1], dtype=jnp.float32)  # [T, K, E]
    place = (jnp.cumsum(chosen.reshape(-1, logits.shape[-1]), axis=0).reshape(chosen.shape) - 1) * chosen
    slot = jax.nn.one_hot(place.sum(-1).astype(jnp.int32), capacity, dtype=jnp.float32)  # [T, K, C]
    dispatch = jnp.einsum("tke,tkc->tec", chosen, slot).astype(x.dtype)
    combine = jnp.einsum("tke,tkc,tk->tec", chosen, slot, weights).astype(x.dtype)
    rows = lax.all_to_all(jnp.einsum("th,tec->ech", x, dispatch), "d", 0, 1, tiled=True)
    gate, up = jnp.split(jnp.einsum("ech,ehf->ecf", rows, w_gate_up), 2, axis=-1)
    rows = lax.all_to_all(jnp.einsum("ecf,efh->ech", jax.nn.silu(gate) * up, w_down), "d", 1, 0, tiled=True)
    return jnp.einsum("ech,tec->th", rows, combine)


def milliseconds(f, args, repeat=20):
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


@pytest.mark.parametrize("tokens", [32, 1024, 16384])
def test_times(tokens):
    """Wall time of the whole layer of Qwen3-30B-A3B's shape, forward and with gradients, bf16."""
    args, k = arguments(tokens, "bfloat16", **QWEN3_30B), QWEN3_30B["top_k"]
    balanced = tokens * k // 2
    layers = {"one GPU": (functools.partial(ferrum_jax.moe_mlp, top_k=k), args)}
    for exchange in EXCHANGES:
        layers[f"two GPUs, {exchange}"] = (
            spread(functools.partial(moe_mlp, axis_name="d", top_k=k, exchange=exchange)),
            placed(args),
        )
    for exchange in ("padded", "ragged"):

        def bounded(*args, exchange=exchange):
            fixed = {"axis_name": "d", "top_k": k, "exchange": exchange}
            return moe_mlp(*args, capacity=balanced * 5 // 4, return_dropped=True, **fixed)[0]

        layers[f"two GPUs, {exchange}, capacity 1.25"] = spread(bounded), placed(args)
    in_chunks = functools.partial(moe_mlp, axis_name="d", top_k=k, exchange="ragged", chunks=4)
    layers["two GPUs, ragged, 4 chunks"] = spread(in_chunks), placed(args)
    if tokens <= 1024:  # [T, E, C] arrays grow with the square of the tokens
        slots = max(4, 2 * tokens * k // 2 // QWEN3_30B["experts"])
        layers["two GPUs, one-hot, capacity 2"] = (
            spread(functools.partial(one_hot_dispatch, top_k=k, capacity=slots)),
            placed(args),
        )
    print(f"\n{tokens} tokens, {jax.devices()[0].device_kind}, jax {jax.__version__}: milliseconds, median of 20")
    want = np.asarray(layers["one GPU"][0](*args), np.float32)
    for name, (f, given) in layers.items():
        if "capacity" not in name:
            np.testing.assert_allclose(np.asarray(f(*given), np.float32), want, atol=0.02 * abs(want).max())
        hidden = {"xla_gpu_enable_latency_hiding_scheduler": "chunks" in name}
        forward, both = (milliseconds(g, given) for g in (jax.jit(f, compiler_options=hidden), with_gradients(f)))
        print(f"  {name:36} forward {forward:9.3f}   with gradients {both:9.3f}")


@pytest.mark.parametrize("tokens", [32, 1024, 16384])
def test_times_by_types(tokens):
    """The same layer divided by its arrays' types, beside what XLA makes of `lax.ragged_dot` by the same shardings."""
    args, fixed = arguments(tokens, "bfloat16", **QWEN3_30B), {"top_k": QWEN3_30B["top_k"]}
    ours, theirs = (functools.partial(f, **fixed) for f in (ferrum_jax.moe_mlp, today.ragged_layer))
    want = np.asarray(ours(*args), np.float32)
    print(f"\n{tokens} tokens, {jax.devices()[0].device_kind}, jax {jax.__version__}: milliseconds, median of 20")

    def times(name, f, given, repeat=20):
        np.testing.assert_allclose(np.asarray(jax.jit(f)(*given), np.float32), want, atol=0.02 * abs(want).max())
        forward, both = (milliseconds(g, given, repeat) for g in (jax.jit(f), with_gradients(f)))
        print(f"  {name:45} forward {forward:9.3f}   with gradients {both:9.3f}", flush=True)

    times("one GPU", ours, args)
    few = 20 if tokens == 32 else 3
    fits = tokens <= 1024  # lax.ragged_dot's rows of every group do not fit the memory of one GPU beyond
    if fits:
        times("one GPU, lax.ragged_dot", theirs, args, few)
    for layout, specs in LAYOUTS.items():
        with jax.set_mesh(mesh_of(2, AxisType.Explicit)):
            times(f"two GPUs, {layout}", ours, placed(args, specs, AxisType.Explicit))
        if fits:
            times(f"two GPUs, {layout}, lax.ragged_dot", theirs, placed(args, specs), few)
