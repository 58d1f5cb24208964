"""Experts spread over devices: equal to the unsharded layer, nothing lost unless counted, the collective asked for."""

import functools
import itertools
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Size, rng
from compiled import h200s, memory_for_h200, needs_pjrt
from derivatives import cotangent, with_gradients
from jax import lax
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from test_mlp import beyond_float16

import ferrum_jax
from ferrum_jax.model import spread
from ferrum_jax.parallel import exchange_sizes, moe_mlp

EXCHANGES = ("gather", "padded", "ragged")
F = 3


def one_after_another(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name, axis_index_groups
):
    """What JAX documents of ragged_all_to_all, from collectives that a CPU has. Its derivatives stay JAX's own."""
    me = lax.axis_index(axis_name)
    sent, begin, put = (lax.all_gather(a, axis_name) for a in (operand, input_offsets, output_offsets))
    begin, put = (a.reshape(len(sent), len(sent), -1)[:, me].reshape(-1) for a in (begin, put))  # [sender, part]
    place = jnp.arange(output.shape[0], dtype=jnp.int32)[None] - put[:, None]
    inside = (place >= 0) & (place < recv_sizes[:, None])
    slice_id = jnp.argmax(inside, axis=0)
    row = jnp.take_along_axis(place + begin[:, None], slice_id[None], axis=0)[0]
    rows = sent.at[slice_id // (len(begin) // len(sent)), row].get(mode="clip")
    return jnp.where(jnp.any(inside, axis=0)[:, None], rows, output)


on_cpu = mlir.lower_fun(one_after_another, multiple_results=False)
mlir.register_lowering(lax.ragged_all_to_all_p, on_cpu, platform="cpu")

SIZE = Size(24, 16, 3, 5)


@functools.cache
def arguments():
    """x, logits, weights, w_gate_up, w_down, b_gate_up, b_down of the unsharded layer."""
    t, e, k, h, _ = SIZE
    shapes = (t, h), (t, e), (t, k), (e, h, 2 * F), (e, F, h), (e, 2 * F), (e, h)
    r = rng("parallel")
    return [jnp.asarray(r.normal(size=s).astype(np.float32)) for s in shapes]


def routings(devices):
    """Any; all tokens to one device's experts; a device without tokens; no pair at all."""
    t, e, k, *_ = SIZE
    ids = rng("ids", devices).integers(0, e, (t, k)).astype(np.int32)
    without = ids.copy()
    without[t // devices : 2 * t // devices] = [-1, e, -(2**31)]
    return ids, np.where(ids % 2, e - 2, e - 1).astype(np.int32), without, np.full_like(ids, -1)


def layer(x, ids, weights, gate_up, down, b_gate_up, b_down, run=ferrum_jax.moe_mlp, **kwargs):
    routed = ferrum_jax.RouterOutput(ids, weights)
    return run(x, None, gate_up, down, router_output=routed, b_gate_up=b_gate_up, b_down=b_down, **kwargs)


def value_and_gradients(f):
    def run(ids, x, weights, *rest):
        return with_gradients(lambda x, weights, *rest: f(x, ids, weights, *rest))(x, weights, *rest)

    return jax.jit(run)


@functools.cache
def unsharded():
    return value_and_gradients(layer)


def close(got, want, dtype="float32"):
    for g, w in zip(got, want, strict=True):
        oracle.assert_near(g, w, dtype)


@pytest.mark.parametrize(
    ("devices", "exchange", "kind"),
    [(2, "gather", AxisType.Explicit), (4, "ragged", AxisType.Auto), (8, None, AxisType.Explicit)],
    ids=str,
)
def test_values_and_gradients_equal_the_unsharded_layers(devices, exchange, kind, monkeypatch):
    """Without a capacity nothing is dropped, wherever the tokens go; a token may name an expert twice.

    None is "padded" here, chosen at lowering.
    """
    monkeypatch.setattr(spread, "_FEW_BYTES", 0)
    mesh = mesh_of(devices, kind)
    f = functools.partial(layer, run=moe_mlp, axis_name="d", exchange=exchange)
    f = value_and_gradients(jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
    x, _, *rest = arguments()
    for ids in routings(devices):
        placed = (jax.device_put(a, NamedSharding(mesh, P("d"))) for a in (ids, x, *rest))
        close(f(*placed), unsharded()(ids, x, *rest))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_no_hidden_width(exchange):
    args = [np.ones(s, np.float32) for s in ((4, 0), (4, 4), (4, 0, 2 * F), (4, F, 0))]
    f = functools.partial(moe_mlp, axis_name="d", top_k=2, exchange=exchange)
    f = jax.shard_map(f, mesh=mesh_of(2), in_specs=P("d"), out_specs=P("d"))
    out, vjp = jax.eval_shape(lambda *a: jax.vjp(f, *a), *args)
    gradients = jax.eval_shape(lambda vjp, out: vjp(out), vjp, out)
    assert out.shape == (4, 0)
    assert [g.shape for g in gradients] == [a.shape for a in args]


@pytest.mark.parametrize("exchange", ["gather", "padded", pytest.param("ragged", marks=pytest.mark.full)])
def test_sixteen_bits(exchange):
    x, _, weights, *rest = (a if a.ndim == 2 and a.shape[-1] == SIZE.K else a.astype("bfloat16") for a in arguments())
    f = functools.partial(layer, run=moe_mlp, axis_name="d", exchange=exchange)
    f = value_and_gradients(jax.shard_map(f, mesh=mesh_of(2), in_specs=P("d"), out_specs=P("d")))
    ids, *_ = routings(2)
    got = f(ids, x, weights, *rest)
    assert [g.dtype for g in got] == [x.dtype, x.dtype, weights.dtype, *[r.dtype for r in rest]]
    close(got, [w.astype("float32") for w in unsharded()(ids, x, weights, *rest)], "bfloat16")


@pytest.mark.parametrize("exchange", ["gather", "padded"])
def test_what_float16_cannot_hold_goes_through_the_activation(exchange):
    """Of products that float16 would round to infinity, before a bias and a function."""
    x, gate_up, down, zeros = beyond_float16()
    matrices = [np.concatenate([a, a]) for a in (gate_up, down)]  # two experts, one a device
    ids, ones = np.array([[1], [0]], np.int32), np.ones((2, 1), np.float32)

    def run(x, ids, weights, w_gate_up, w_down, b_gate_up):
        routed = ferrum_jax.RouterOutput(ids, weights)
        given = {"b_gate_up": b_gate_up, "activation": lambda gate, up: jax.nn.silu(gate) * up}
        return moe_mlp(x, None, w_gate_up, w_down, axis_name="d", router_output=routed, exchange=exchange, **given)

    f = jax.jit(jax.shard_map(run, mesh=mesh_of(2), in_specs=P("d"), out_specs=P("d")))
    out = f(x, ids, ones, *matrices, np.concatenate([zeros, zeros]))
    np.testing.assert_allclose(np.asarray(out, np.float32)[:, 0], [75000 * 250 / 2**18 / 8, 0], rtol=2e-3)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_precision_reaches_every_product(exchange):
    x, logits, _, gate_up, down, *_ = arguments()

    def found(context, **given):
        run = functools.partial(moe_mlp, axis_name="d", top_k=SIZE.K, exchange=exchange, **given)

        def loss(*args):
            with jax.default_matmul_precision(context):
                return jnp.sum(jax.shard_map(run, mesh=mesh_of(2), in_specs=P("d"), out_specs=P("d"))(*args))

        text = str(jax.make_jaxpr(jax.grad(loss, (0, 2, 3)))(x, logits, gate_up, down))
        return set(re.findall(r"ferrum_grouped_(?:matmul|outer)\w*\[[^\]]*?precision=(\w+)", text))

    assert found(None) == found("tensorfloat32", precision="highest") == {"highest"}
    assert found("tensorfloat32") == found(None, precision="tensorfloat32") == {"default"}


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Four devices of two processes, which talk over the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker, path = pathlib.Path(__file__).with_name("two_processes.py"), tmp_path / "out.npy"
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = str(worker.parents[1])
    processes = [
        subprocess.Popen([sys.executable, worker, str(port), str(i), path], env=env, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    ended = [(p.communicate(timeout=300)[1], p.returncode) for p in processes]
    assert all(code == 0 for _, code in ended), ended
    ids, (x, _, *rest) = routings(4)[0], arguments()
    for out in np.load(path):
        close((out,), unsharded()(ids, x, *rest)[:1])


def test_axes_of_a_larger_mesh():
    """Experts over two mesh axes, copies of them along a third; leading axes are more tokens; ids from logits."""
    x, logits, _, *rest = arguments()
    mesh = jax.make_mesh((2, 2, 2), ("data", "host", "chip"), axis_types=(AxisType.Auto,) * 3)
    every, spread = P(("data", "host", "chip")), ("host", "chip")
    run = functools.partial(moe_mlp, axis_name=spread, top_k=SIZE.K, exchange="padded")
    f = jax.shard_map(run, mesh=mesh, in_specs=(every, every, P(spread), P(spread)), out_specs=every)

    def loss(f):
        return lambda *a: jnp.sum(jnp.sin(f(*a)))

    got = jax.jit(jax.grad(loss(f), 1))(x.reshape(8, 3, -1), logits.reshape(8, 3, -1), *rest[:2])
    want = jax.jit(jax.grad(loss(functools.partial(ferrum_jax.moe_mlp, top_k=SIZE.K)), 1))(x, logits, *rest[:2])
    close((got.reshape(logits.shape),), (want,))


@pytest.mark.parametrize(
    ("exchange", "tokens", "matrices"),
    [
        ("gather", P("d", "o"), (P("d"), P("d"))),
        ("padded", P(("d", "o")), (P("d"), P("d"))),
        ("ragged", P("d", None, "o"), (P("d"), P("d"))),
        ("gather", P("d"), (P("d", None, "o"), P("d", "o"))),
        ("padded", P("d", "o"), (P("d", "o"), P("d", None, "o"))),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.full)], ids=lambda t: t.name
)
def test_an_axis_that_is_not_mapped(exchange, tokens, matrices, kind):
    """Experts over one axis by shard_map, while another one shards tokens, width or the experts' own width by types."""
    r, shapes = rng("not mapped"), ((4, 6, 6), (4, 6, 8), (8, 6, 8), (8, 4, 6))
    args = [r.normal(size=s).astype(np.float32) for s in shapes]
    mesh = jax.make_mesh((2, 2), ("d", "o"), axis_types=(AxisType.Auto, kind))

    def run(x, *rest):
        out = moe_mlp(x, *rest, axis_name="d", top_k=3, exchange=exchange)
        specs = [tuple(jax.typeof(a).sharding.spec)[:-1] for a in (out, x)]
        assert kind == AxisType.Auto or specs[0] == specs[1]
        return out

    f = jax.shard_map(run, mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"})

    def all_of(f):
        def run(*args):
            out, vjp = jax.vjp(f, *args)
            return out, *vjp(jnp.sin(out))

        return jax.jit(run)

    want = all_of(functools.partial(ferrum_jax.moe_mlp, top_k=3))(*args)
    with jax.set_mesh(mesh):
        placed = map(jax.device_put, args, (tokens, P(*tokens[:2]), *matrices))
        close(all_of(f)(*placed), want)


@pytest.mark.parametrize("exchange", [None, *EXCHANGES])
def test_no_tokens(exchange):
    x, logits, _, gate_up, down, *_ = arguments()
    run = functools.partial(moe_mlp, axis_name="d", top_k=SIZE.K, exchange=exchange)
    f = jax.shard_map(run, mesh=mesh_of(4), in_specs=P("d"), out_specs=P("d"))

    @jax.jit
    def both(*args):
        out, vjp = jax.vjp(f, *args)
        return out, *vjp(out)

    out, *gradients = both(x[:0], logits[:0], gate_up, down)
    assert out.shape == (0, SIZE.H)
    assert not any(np.any(g) for g in gradients)


# ---- capacity


def left_behind(ids, devices, num_experts, capacity, exchange):
    """In loops: the pairs that do not fit."""
    slots, owned = -(-capacity // devices), num_experts // devices
    dropped, taken = np.zeros(ids.shape, bool), np.zeros((devices, devices), int)
    pairs = [(t * devices // len(ids), ids[t, k], t, k) for t, k in np.ndindex(ids.shape)]
    for sender, expert, t, k in sorted(p for p in pairs if 0 <= p[1] < num_experts):
        to = expert // owned
        full = taken[sender, to] >= slots if exchange == "padded" else taken[:, to].sum() >= slots * devices
        dropped[t, k] = full
        taken[sender, to] += not full
    return dropped


def with_gradients_and_count(devices, **options):
    """A function of (x, ids, ...): the results with their gradients, and what each device dropped."""

    def run(*args):
        out, dropped = layer(*args, run=moe_mlp, axis_name="d", return_dropped=True, **options)
        return out, dropped[None]

    sharded = jax.shard_map(run, mesh=mesh_of(devices), in_specs=P("d"), out_specs=P("d"))

    @jax.jit
    def f(x, ids, *rest):
        out, vjp, dropped = jax.vjp(lambda x, *rest: sharded(x, ids, *rest), x, *rest, has_aux=True)
        return (out, *vjp(cotangent(out))), dropped

    return f


@pytest.mark.parametrize("exchange", ["padded", "ragged"])
def test_overflow_is_counted_exactly_and_adds_nothing(exchange):
    devices, capacity = 4, 13  # 16, shared by four: 4 rows from each, or 16 from any
    x, _, weights, *rest = arguments()
    f = with_gradients_and_count(devices, exchange=exchange, capacity=capacity)
    balanced = (np.arange(24 * 3).reshape(24, 3) % SIZE.E).astype(np.int32)
    counts = []
    for ids in (*routings(devices), balanced):
        gone = left_behind(ids, devices, SIZE.E, capacity, exchange)
        results, dropped = f(x, ids, weights, *rest)
        np.testing.assert_array_equal(dropped, gone.reshape(devices, -1).sum(1))
        close(results, unsharded()(np.where(gone, -1, ids).astype(np.int32), x, weights, *rest))
        counts.append(int(dropped.sum()))
    assert counts[1] == 24 * 3 - 16
    assert counts[3] == 0


@pytest.mark.parametrize(
    "exchange", ["ragged", *[pytest.param(e, marks=pytest.mark.full) for e in ("gather", "padded")]]
)
def test_chunks(exchange):
    """Each chunk has an exchange of its own and its share of the capacity; gradients are exact."""
    devices, chunks, capacity = 4, 3, 13  # 8 rows a chunk
    x, _, weights, *rest = arguments()
    f = with_gradients_and_count(devices, exchange=exchange, capacity=capacity, chunks=chunks)
    for ids in routings(devices)[:3]:
        by_chunk = ids.reshape(devices, chunks, -1, SIZE.K).swapaxes(0, 1)  # each with a part of every device's tokens
        gone = [left_behind(c.reshape(-1, SIZE.K), devices, SIZE.E, 8, exchange) for c in by_chunk]
        gone = np.stack([g.reshape(by_chunk.shape[1:]) for g in gone], axis=1).reshape(ids.shape)
        gone &= exchange != "gather"
        results, dropped = f(x, ids, weights, *rest)
        np.testing.assert_array_equal(dropped, gone.reshape(devices, -1).sum(1))
        close(results, unsharded()(np.where(gone, -1, ids).astype(np.int32), x, weights, *rest))


@needs_pjrt
@pytest.mark.compiled
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
def test_chunks_bound_memory(grad):
    """Of eight H200s: the rows of two chunks of eight, and the rest, are less than half."""
    mesh = jax.sharding.Mesh(np.array(h200s(8)), ("d",), axis_types=(AxisType.Auto,))

    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P("d")))

    def bytes_of(chunks):
        def run(x, *rest):
            return moe_mlp(x, *rest, axis_name="d", top_k=4, exchange="padded", chunks=chunks)

        f = jax.shard_map(run, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
        g = jax.grad(lambda *args: jnp.sum(f(*args).astype(jnp.float32)), (0, 2, 3)) if grad else f
        return memory_for_h200(g, of(8192, 256), of(8192, 16), of(16, 256, 512), of(16, 256, 256))

    assert bytes_of(8) < bytes_of(1) / 2


def simulated(operands, outputs, sizes, parts):
    """jax.lax.ragged_all_to_all in NumPy, all devices; every slice must lie in its buffer, and no two writes meet."""
    outputs, written = [o.copy() for o in outputs], [np.zeros(len(o), int) for o in outputs]
    for (s, sender), (d, receiver), part in itertools.product(enumerate(sizes), enumerate(sizes), range(parts)):
        begin, size, put = (int(a[d * parts + part]) for a in sender[:3])
        assert size == receiver.recv_sizes[s * parts + part]
        assert 0 <= begin <= begin + size <= len(operands[s])
        assert 0 <= put <= put + size <= len(outputs[d])
        outputs[d][put : put + size] = operands[s][begin : begin + size]
        written[d][put : put + size] += 1
    assert all(np.max(w, initial=0) <= 1 for w in written)
    return outputs


@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.parametrize("capacity", [None, 0, 5, 11, 1000])
def test_sizes_and_offsets(capacity, parts):
    devices, experts, pairs = 4, 8, 10
    r = rng("offsets", capacity)
    f = jax.jit(jax.vmap(functools.partial(exchange_sizes, capacity=capacity, parts=parts), (None, 0)))
    for case in range(6):
        owner = [np.sort(r.integers(0, experts, size=r.integers(0, pairs + 1))) for _ in range(devices)]
        owner = [np.zeros_like(o) for o in owner] if case == 0 else owner
        offsets = np.stack([np.searchsorted(o, np.arange(experts + 1)) for o in owner]).astype(np.int32)
        there, back = (
            [spread.ExchangeSizes(*np.stack(way)[:, d]) for d in range(devices)]
            for way in f(offsets, np.arange(devices))
        )
        rows = devices * pairs if capacity is None else capacity
        packed = [np.array([(d, i, e) for i, e in enumerate(o)], int).reshape(-1, 3) for d, o in enumerate(owner)]
        received = simulated(packed, [np.full((rows, 3), -1)] * devices, there, parts)
        for d, got in enumerate(received):
            mine = np.concatenate([p[p[:, 2] // (experts // devices) == d] for p in packed])
            np.testing.assert_array_equal(got[: len(mine)], mine[:rows])
            assert np.all(got[len(mine) :] == -1)
        returned = simulated(received, [np.full((pairs, 3), -1)] * devices, back, parts)
        for d, got in enumerate(returned):
            home = got[got[:, 0] >= 0]
            np.testing.assert_array_equal(home, packed[d][home[:, 1]])
            assert len(home) == there[d].send_sizes.sum()


# ---- the collective that was asked for


def abstract(mesh, tokens=16, width=32):
    shapes = (tokens, width), (tokens, 8), (8, width, 2 * F), (8, F, width)
    spread = NamedSharding(mesh, P("d"))
    return [jax.ShapeDtypeStruct(s, jnp.float32, sharding=spread) for s in shapes]


def shard_mapped(mesh, **kwargs):
    run = functools.partial(moe_mlp, axis_name="d", top_k=2, implementation="xla", **kwargs)
    return jax.shard_map(run, mesh=mesh, in_specs=P("d"), out_specs=P("d"))


def row_collectives(program, width=32):
    """XLA's collectives of a program that carry rows of this width."""
    names = "ragged-all-to-all|all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute"
    found = re.findall(rf"= (.*?) ({names})(?:-start)?\(", program)
    return sorted(name for types, name in found if f",{width}]" in types)


@pytest.mark.parametrize(
    ("exchange", "collectives"), [("gather", ["all-gather", "reduce-scatter"]), ("padded", ["all-to-all"] * 2)]
)
def test_rows_travel_by_the_collectives_asked_for(exchange, collectives):
    mesh = mesh_of(4)
    program = jax.jit(shard_mapped(mesh, exchange=exchange)).lower(*abstract(mesh)).compile().as_text()
    assert row_collectives(program) == collectives


def test_choice_by_shapes_and_platform():
    mesh = mesh_of(4)
    f = jax.jit(shard_mapped(mesh))
    for tokens, width, platform, names in (
        (16, 32, "cpu", {"all_gather", "reduce_scatter"}),
        (2**14, 1024, "cpu", {"all_gather", "all_to_all"}),
        (2**14, 1024, "cuda", {"all_gather", "ragged_all_to_all"}),
    ):
        text = f.trace(*abstract(mesh, tokens, width)).lower(lowering_platforms=(platform,)).as_text()
        pattern = r"(?:stablehlo\.|@)(ragged_all_to_all|all_to_all|all_gather|reduce_scatter)\b"
        assert set(re.findall(pattern, text)) == names


@needs_pjrt
@pytest.mark.compiled
def test_ragged_layer_compiles_for_two_gpus():
    # In a process of its own: after many other programs in one, XLA's compiler has crashed on this one.
    code = "import sys; sys.path.insert(0, 'tests'); import conftest, test_parallel as t; print(t.ragged_program())"
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert row_collectives(done.stdout) == ["ragged-all-to-all"] * 2


def ragged_program():
    mesh = jax.sharding.Mesh(np.array(h200s(2)), ("d",), axis_types=(AxisType.Auto,))
    traced = jax.jit(shard_mapped(mesh, exchange="ragged")).trace(*abstract(mesh))
    return traced.lower(lowering_platforms=("cuda",)).compile().as_text()


# ---- errors


WRONG = {
    "axis": ({"axis_name": "e"}, ["axis_name", "jax.shard_map", "'e'"]),
    "exchange": ({"exchange": "all_to_all"}, ["exchange", "'ragged'", "'all_to_all'"]),
    "uncounted": ({"capacity": 8}, ["capacity", "return_dropped=True"]),
    "capacity": ({"capacity": 0, "return_dropped": True}, ["capacity", "got 0"]),
    "chunks": ({"chunks": 4}, ["chunks", "the 6 tokens of a device", "got 4"]),
    "no chunks": ({"chunks": 0}, ["chunks", "got 0"]),
    "E": ({"experts": 6}, ["router_logits", "4 devices", "2 of each", "must have 8", "(6, 6)"]),
    "top_k": ({"top_k": 9}, ["top_k", "[1, 8]", "got 9"]),
    "neither": ({"router_logits": None}, ["router_logits", "neither"]),
    "precision": ({"precision": "tf32"}, ["parallel.moe_mlp", "precision", "'tensorfloat32'", "'tf32'"]),
    "of a device": ({"activation": "swish"}, ["activation", "'swish'"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_named_error(name):
    change, words = WRONG[name]
    options = {"axis_name": "d", "top_k": 2, "experts": 8, **change}
    experts, logits = options.pop("experts"), options.pop("router_logits", True)
    mesh = mesh_of(4)

    def run(x, logits_, *matrices):
        return moe_mlp(x, logits_ if logits else None, *matrices, **options)

    args = [jnp.ones(s) for s in ((24, 4), (24, experts), (8, 4, 2 * F), (8, F, 4))]
    with pytest.raises(ValueError) as info:  # noqa: PT011
        jax.eval_shape(jax.shard_map(run, mesh=mesh, in_specs=P("d"), out_specs=P("d")), *args)
    for word in words:
        assert word in str(info.value), str(info.value)


@pytest.mark.parametrize("name", ["x", "router_logits", "w_gate_up", "w_down"])
@pytest.mark.parametrize("value", [None, 1.0, "a"])
def test_an_argument_that_is_no_fitting_array_is_named(name, value):
    args = dict(zip(("x", "router_logits", "w_gate_up", "w_down"), abstract(mesh_of(2)), strict=True))

    def run(*arrays):
        arrays = dict(zip(args, arrays, strict=True)) | {name: value}
        return moe_mlp(**arrays, axis_name="d", top_k=2)

    with pytest.raises((TypeError, ValueError), match=rf"parallel\.moe_mlp: .*{name}"):
        jax.eval_shape(jax.shard_map(run, mesh=mesh_of(2), in_specs=P("d"), out_specs=P("d")), *args.values())


def test_named_errors_of_exchange_sizes():
    for offsets, options, error, words in (
        (np.zeros((3, 5), int), {}, ValueError, ["expert_offsets", "(3, 5)"]),
        (np.zeros(5, int), {}, ValueError, ["expert_offsets", "(5,)"]),
        (np.zeros((2, 1), int), {}, ValueError, ["expert_offsets", "(2, 1)"]),
        (np.zeros((2, 5)), {}, TypeError, ["expert_offsets", "float"]),
        (np.zeros((2, 5), int), {"capacity": -1}, ValueError, ["capacity", "-1"]),
        (np.zeros((2, 5), int), {"parts": 0}, ValueError, ["parts", "got 0"]),
    ):
        with pytest.raises(error) as info:
            exchange_sizes(offsets, 0, **options)
        for word in words:
            assert word in str(info.value), str(info.value)
