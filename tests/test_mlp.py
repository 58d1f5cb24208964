"""moe_mlp against a dense layer in NumPy and in jnp: both flows, every activation, gradients, memory, meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Size, rng
from derivatives import check_derivatives
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layer import gated_dense
from meshes import mesh_of
from oracle import ACTIVATIONS, assert_close, f64

import ferrum_jax
from ferrum_jax import moe_mlp

pytestmark = pytest.mark.tables

SIZE, F = Size(7, 5, 2, 4), 3
FLOWS = ("packed", "pair_ids")


def arguments(size=SIZE, dtype="float32", scale=1.0, seed=0):
    """x, logits, w_gate_up, w_down, and as keywords the biases."""
    r = rng("mlp", size, seed)

    def make(*shape):
        return (scale * r.normal(size=shape)).astype(np.float32).astype(jnp.dtype(dtype))

    args = make(size.T, size.H), make(size.T, size.E), make(size.E, size.H, 2 * F), make(size.E, F, size.H)
    return args, {"b_gate_up": make(size.E, 2 * F), "b_down": make(size.E, size.H)}


def dense(x, ids, weights, w_gate_up, w_down, activation, b_gate_up=None, b_down=None):
    """NumPy loops in float64; and how large each element's terms are, down to those of the first product."""
    out, size = np.zeros(x.shape), np.zeros(x.shape)
    for t, k in np.ndindex(np.shape(ids)):
        e = int(ids[t, k])
        if 0 <= e < len(w_down):
            both = f64(x[t]) @ f64(w_gate_up[e]) + (0 if b_gate_up is None else f64(b_gate_up[e]))
            terms = np.abs(f64(x[t])) @ np.abs(f64(w_gate_up[e])) + 1
            hidden = activation(*np.split(both, 2))
            row = hidden @ f64(w_down[e]) + (0 if b_down is None else f64(b_down[e]))
            out[t] += float(weights[t, k]) * row
            gate, up = np.split(terms, 2)
            size[t] += float(weights[t, k]) * (1 + (4 * gate * (1 + gate) * (1 + up)) @ np.abs(f64(w_down[e])))
    return out, size


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_numpy_layer(activation, flow):
    for dtype, biased in (("float32", True), ("bfloat16", False)):
        (x, logits, *matrices), biases = arguments(dtype=dtype, scale=2.0)
        biases = biases if biased else {}
        ids, weights = ferrum_jax.route_topk_softmax(logits, SIZE.K)
        got = moe_mlp(x, logits, *matrices, top_k=SIZE.K, activation=activation, flow=flow, **biases)
        assert got.dtype == x.dtype
        assert_close(got, *dense(x, ids, weights, *matrices, ACTIVATIONS[activation], **biases), dtype)


@pytest.mark.parametrize("flow", FLOWS)
def test_router_output_with_pairs_that_have_no_expert(flow, implementation):
    """Their weights may be NaN: they add nothing, and no gradient."""
    (x, _, *matrices), biases = arguments()
    ids = np.array([[0, 1], [-1, 4], [5, 0], [-1, -1], [3, 2**31 - 1], [4, 3], [0, 4]], np.int32)
    weights = jnp.where((ids >= 0) & (ids < 5), jnp.asarray(rng("w").random(ids.shape).astype(np.float32)), jnp.nan)

    def layer(x, weights, *matrices, **biases):
        routed = ferrum_jax.RouterOutput(ids, weights)
        return moe_mlp(x, None, *matrices, router_output=routed, flow=flow, implementation=implementation, **biases)

    got = layer(x, weights, *matrices, **biases)
    assert_close(got, *dense(x, ids, weights, *matrices, ACTIVATIONS["silu"], **biases), "float32")

    def loss(*a):
        return jnp.sum(jnp.sin(layer(*a[:4], b_gate_up=a[4], b_down=a[5])))

    gradients = jax.jit(jax.grad(loss, range(6)))(x, weights, *matrices, *biases.values())
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)
    assert not np.any(gradients[0][3])
    assert not np.any(np.asarray(gradients[1])[~((ids >= 0) & (ids < 5))])
    for g in gradients[2:]:
        assert not np.any(g[2])  # no token chose expert 2
        assert np.all(np.any(np.asarray(g).reshape(5, -1)[[0, 1, 3, 4]], axis=1))


@pytest.mark.parametrize(
    ("flow", "activation"), [("packed", "silu"), ("pair_ids", lambda gate, up: jnp.tanh(gate) * up)]
)
def test_finite_differences_to_second_order(activation, flow):
    """Every gradient: x, logits, both matrices, both biases."""
    (x, logits, *matrices), biases = arguments(Size(3, 4, 2, 2), scale=0.5)
    logits = np.argsort(rng("l").random((3, 4)), axis=-1).astype(np.float32)  # too far apart to cross

    def layer(x, logits, gate_up, down, b_gate_up, b_down):
        biases = {"b_gate_up": b_gate_up, "b_down": b_down}
        return [moe_mlp(x, logits, gate_up, down, top_k=2, activation=activation, flow=flow, **biases)]

    check_derivatives(layer, (x, logits, *matrices, *biases.values()), seed=0, bound=2e-2)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("size", [Size(1, 5, 2, 4), Size(40, 1, 1, 130)], ids=str)
def test_gradients_equal_the_dense_layers(size, flow, biased, every_implementation):
    (x, logits, *matrices), biases = arguments(size, scale=0.5)
    args = x, logits, *matrices, *(biases.values() if biased else (None, None))
    fixed = {"top_k": size.K, "flow": flow, "implementation": every_implementation}

    def ours(*a):
        return moe_mlp(*a[:4], b_gate_up=a[4], b_down=a[5], **fixed)

    def loss(f):
        return lambda *a: jnp.sum(jnp.sin(f(*a)))

    operands = range(6 if biased else 4)

    def both(f):
        return jax.jit(lambda *a: (f(*a), *jax.grad(loss(f), operands)(*a)))(*args)

    for g, w in zip(both(ours), both(functools.partial(gated_dense, top_k=size.K)), strict=True):
        assert_close(g, f64(w), np.abs(w).max(), "float32")  # sums that cancel: their terms' size is the largest's


def beyond_float16():
    """Two tokens and one expert, float16, gates of 75,000 and -75,000: rounded to float16 they are infinite."""
    x = np.zeros((2, 4), np.float16)
    x[:, 0] = 250, -250
    w_gate_up, w_down = np.zeros((1, 4, 4), np.float16), np.full((1, 2, 4), 2.0**-4, np.float16)
    w_gate_up[0, 0] = 300, 300, 2.0**-18, 2.0**-18
    return x, w_gate_up, w_down, np.zeros((1, 4), np.float16)


@pytest.mark.parametrize("flow", FLOWS)
def test_what_float16_cannot_hold_goes_through_every_activation(flow, implementation):
    """Fused, with biases of zero, and as a function: one result, and gradients that are finite and the same."""
    x, w_gate_up, w_down, zeros = beyond_float16()
    routed = ferrum_jax.RouterOutput(np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32))

    def function(gate, up):
        assert gate.dtype == up.dtype == jnp.float32
        return jax.nn.silu(gate) * up

    def run(x, w_gate_up, w_down, b_gate_up, biased, activation):
        fixed = {"router_output": routed, "flow": flow, "implementation": implementation, "activation": activation}
        return moe_mlp(x, None, w_gate_up, w_down, b_gate_up=b_gate_up if biased else None, **fixed)

    @jax.jit
    def every(*args):
        out = []
        for biased, activation in ((False, "silu"), (True, "silu"), (False, function), (True, function)):
            y, vjp = jax.vjp(functools.partial(run, biased=biased, activation=activation), *args)
            out.append((y, *vjp(jnp.full_like(y, 1e-3))[: 4 if biased else 3]))
        return out

    fused, *others = every(x, w_gate_up, w_down, zeros)
    np.testing.assert_allclose(f64(fused[0])[:, 0], [75000 * 250 / 2**18 / 8, 0], rtol=2e-3)
    for got in others:
        assert all(np.isfinite(a).all() for a in got)
        for g, w in zip(got, fused, strict=False):
            np.testing.assert_allclose(f64(g), f64(w), rtol=2e-3)


def test_sixteen_bits_before_the_activation():
    """float16 products are float32 until they are activated; bfloat16 ones, which reach as far, stay as they are."""
    for dtype, made in (("float16", "float32"), ("bfloat16", "bfloat16")):
        (x, logits, *matrices), biases = arguments(dtype=dtype)
        run = functools.partial(moe_mlp, top_k=2, **biases)
        jaxpr = str(jax.make_jaxpr(run)(x, logits, *matrices))
        assert re.findall(r"ferrum_grouped_matmul\[\s*dtype=(\w+)", jaxpr) == [made, dtype]


@pytest.mark.parametrize("options", [{}, {"b_gate_up": np.zeros((5, 2 * F), np.float32)}], ids=["fused", "biased"])
def test_precision_reaches_every_product(options):
    """By argument or by context, which the argument overrules; also in gradients that are taken outside."""
    (x, logits, *matrices), _ = arguments()

    def found(context, **given):
        def loss(x, *matrices):
            with jax.default_matmul_precision(context):
                return jnp.sum(jnp.sin(moe_mlp(x, logits, *matrices, top_k=2, **options, **given)))

        text = str(jax.make_jaxpr(jax.grad(loss, range(3)))(x, *matrices))
        products = re.findall(r"ferrum_grouped_(?:matmul|outer)\w*\[[^\]]*?precision=(\w+)", text)
        assert len(products) == 6
        return set(products)

    assert found(None) == found("high") == found("tensorfloat32", precision="highest") == {"highest"}
    assert found("tensorfloat32") == found(None, precision="tensorfloat32") == {"default"}


@pytest.mark.parametrize("flow", FLOWS)
def test_no_tokens(flow, implementation):
    (x, logits, *matrices), biases = arguments(Size(0, 5, 2, 4))
    run = functools.partial(moe_mlp, top_k=2, flow=flow, implementation=implementation, **biases)
    out, vjp = jax.vjp(run, x, logits, *matrices)
    assert out.shape == (0, 4)
    assert not any(np.any(g) for g in vjp(out))


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(("hidden", "width", "choices"), [(0, 3, 2), (4, 0, 2), (4, 3, 0)])
def test_axes_of_no_entries(hidden, width, choices, flow, implementation):
    """No hidden width, none of the experts, no choices: of the shapes given, and 0 but for the bias of the result."""
    ids = np.tile(np.int32([0, 4]), (3, 1))[:, :choices]
    args = [np.ones(s, np.float32) for s in ((3, hidden), ids.shape, (5, hidden, 2 * width), (5, width, hidden))]
    biases = {name: np.ones((5, n), np.float32) for name, n in (("b_gate_up", 2 * width), ("b_down", hidden))}

    def layer(x, weights, *matrices):
        routed = ferrum_jax.RouterOutput(ids, weights)
        return moe_mlp(x, None, *matrices, router_output=routed, flow=flow, implementation=implementation, **biases)

    out, gradients = jax.jit(lambda *a: (layer(*a), jax.grad(lambda *a: jnp.sum(layer(*a)), range(4))(*a)))(*args)
    np.testing.assert_array_equal(out, np.full((3, hidden), 0 if width else choices))
    assert [g.shape for g in gradients] == [a.shape for a in args]


@pytest.mark.parametrize("flow", FLOWS)
def test_leading_axes_vmap_and_block_sizes(flow, every_implementation):
    (x, logits, *matrices), biases = arguments(Size(12, 5, 2, 4))
    run = functools.partial(moe_mlp, top_k=2, flow=flow, implementation=every_implementation, **biases)

    @jax.jit
    def ways(x, logits):
        x3, logits3 = x.reshape(2, 2, 3, 4), logits.reshape(2, 2, 3, 5)
        mapped = jax.vmap(run, (1, 1, None, None), 1)(x3, logits3, *matrices)
        blocks_of_three = run(x, logits, *matrices, block_size=3)
        return run(x, logits, *matrices), run(x3, logits3, *matrices), mapped, blocks_of_three

    want, *others = ways(x, logits)
    for got in others:
        np.testing.assert_allclose(got.reshape(12, 4), want, rtol=1e-5, atol=1e-6)


def test_flow_by_size():
    """Below 32 MiB of x the tokens are read directly, above they are dispatched."""
    matrices = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 1024, 64), (8, 32, 1024))]
    for tokens, dispatched in ((2**14, False), (2**14 + 1, True)):
        x, logits = (jax.ShapeDtypeStruct((tokens, n), jnp.bfloat16) for n in (1024, 8))
        jaxpr = jax.make_jaxpr(functools.partial(moe_mlp, top_k=2))(x, logits, *matrices)
        assert ("ferrum_moe_dispatch" in str(jaxpr)) is dispatched


@pytest.mark.parametrize(
    ("flow", "kind"),
    [
        ("packed", AxisType.Explicit),
        pytest.param("pair_ids", AxisType.Auto, marks=pytest.mark.full),
        pytest.param("packed", AxisType.Auto, marks=pytest.mark.full),
        pytest.param("pair_ids", AxisType.Explicit, marks=pytest.mark.full),
    ],
)
def test_data_parallel_gradient(flow, kind):
    """Tokens sharded, matrices shared: inside shard_map with check_vma, and as plain sharded arrays."""
    devices = min(4, jax.device_count())
    mesh = mesh_of(devices, kind)
    (x, logits, *matrices), biases = arguments(Size(8, 4, 2, 4))
    args, specs = (x, logits, *matrices, *biases.values()), (P("d"), P("d"), *[P()] * 4)

    def run(*a):
        return jnp.sum(jnp.sin(moe_mlp(*a[:4], top_k=2, b_gate_up=a[4], b_down=a[5], flow=flow)))

    want = jax.jit(jax.grad(run, range(6)))(*args)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]

    def local(*a):
        return jax.lax.psum(run(*a), "d")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True)
    with jax.set_mesh(mesh):
        for f in (sharded, run):
            for g, w in zip(jax.jit(jax.grad(f, range(6)))(*placed), want, strict=True):
                np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.full)], ids=lambda t: t.name
)
@pytest.mark.parametrize(
    ("flow", "spec"),
    [
        ("packed", P(None, "d")),
        ("pair_ids", P(None, "d")),
        ("packed", P(None, None, "d")),
        ("pair_ids", P("d")),
        *(pytest.param("pair_ids", s, marks=pytest.mark.full) for s in (P(None, None, "d"), P(None, "d", None))),
        *(pytest.param("packed", s, marks=pytest.mark.full) for s in (P("d"), P(None, "d", None))),
    ],
    ids=str,
)
def test_tokens_sharded_along_any_axis(spec, flow, kind):
    """As in a residual block, which adds the result to what was given."""
    mesh = mesh_of(2, kind)
    (x, logits, *matrices), _ = arguments(Size(12, 4, 2, 4))
    x, logits = (a.reshape(2, 6, -1) for a in (x, logits))
    ids, weights = ferrum_jax.route_topk_softmax(logits, 2)

    def run(x, logits, weights):
        here = {"flow": flow, "w_gate_up": matrices[0], "w_down": matrices[1]}
        routed = moe_mlp(x, None, router_output=ferrum_jax.RouterOutput(ids, weights), **here)
        given, made = (jax.typeof(y).sharding.spec[:2] for y in (x, routed))
        assert made == given
        return jnp.sum(jnp.sin(x + moe_mlp(x, logits, top_k=2, **here) + routed))

    want = jax.jit(jax.grad(run, (0, 1, 2)))(x, logits, weights)
    tokens = P(*spec[:2])
    with jax.set_mesh(mesh):
        given = (x, spec), (logits, tokens), (weights, tokens)
        placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in given]
        ids = jax.device_put(ids, NamedSharding(mesh, tokens))
        matrices = [jax.device_put(a, NamedSharding(mesh, P())) for a in matrices]
        for g, w in zip(jax.jit(jax.grad(run, (0, 1, 2)))(*placed), want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * abs(w).max())


@pytest.mark.usefixtures("x64")
def test_x64_and_export():
    (x, logits, *matrices), biases = arguments(dtype="bfloat16")
    f = jax.jit(lambda *a: moe_mlp(*a[:4], top_k=2, b_gate_up=a[4], b_down=a[5], activation="swiglu_oai"))
    args = x, logits, *matrices, *biases.values()
    stored = export.export(f, platforms=("cpu", "cuda"), disabled_checks=ferrum_jax.export_checks())(*args).serialize()
    got = export.deserialize(stored).call(*args)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, f(*args))


@pytest.mark.parametrize("flow", FLOWS)
def test_peak_memory(flow):
    """Forward and backward: a fraction of the dense formulation's; rows of the pairs, not of pairs x experts."""
    t, e, k, h, f = 512, 32, 2, 64, 64

    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    args = of(t, h), of(t, e), of(e, h, 2 * f), of(e, f, h)
    ours = functools.partial(moe_mlp, top_k=k, flow=flow)
    other = functools.partial(gated_dense, b_gate_up=None, b_down=None, top_k=k)
    for transform in (lambda g: g, lambda g: jax.grad(lambda *a: jnp.sum(g(*a) ** 2), range(4))):
        peaks = [
            jax.jit(transform(g)).lower(*args).compile().memory_analysis().temp_size_in_bytes for g in (ours, other)
        ]
        assert peaks[0] < peaks[1] / 4, peaks
        rows, matrices = 4 * t * k * (2 * h + 3 * f), 4 * e * h * 3 * f
        assert peaks[0] < 3 * rows + 2 * matrices, (peaks, rows, matrices)


ZEROS = np.zeros


def ONES(shape, dtype="float32"):
    """Of NumPy: whoever imports this file may start JAX in another way than the tests do."""
    return np.ones(shape, dtype)


NO_LOGITS, NO_BIAS = {"router_logits": None}, {"b_gate_up": None, "b_down": None}
BF16 = jnp.bfloat16
WRONG = {
    "both": ({"router_output": (ZEROS((7, 2), int), ONES((7, 2)))}, ValueError, ["router_logits", "both"]),
    "neither": (NO_LOGITS, ValueError, ["router_output", "neither"]),
    "no top_k": ({"top_k": None}, TypeError, ["top_k", "None"]),
    "top_k": ({"top_k": 6}, ValueError, ["top_k", "[1, 5]"]),
    "activation": ({"activation": "swish"}, ValueError, ["activation", "'swiglu_oai'", "'swish'"]),
    "its shape": ({"activation": lambda gate, up: gate[:, :1]}, ValueError, ["activation", "(14, 3)", "(14, 1)"]),
    "flow": ({"flow": "pairs"}, ValueError, ["flow", "'packed'", "'pairs'"]),
    "block": ({"block_size": 0}, ValueError, ["block_size", "got 0"]),
    "precision": ({"precision": "tf32"}, ValueError, ["moe_mlp", "precision", "'tensorfloat32'", "'tf32'"]),
    "implementation": ({"implementation": "cuda"}, ValueError, ["implementation", "'cuda'"]),
    "x rank": ({"x": ONES(4)}, ValueError, ["x", "[..., T, H]", "(4,)"]),
    "x dtype": ({"x": ONES((7, 4), int)}, TypeError, ["x", "int32"]),
    "logits rows": ({"router_logits": ONES((6, 5))}, ValueError, ["router_logits", "T = 7", "(6, 5)"]),
    "logits experts": ({"router_logits": ONES((7, 4))}, ValueError, ["router_logits", "5", "(7, 4)"]),
    "one dtype": ({"w_gate_up": ONES((5, 4, 6), BF16)}, TypeError, ["w_down", "bfloat16", "float32"]),
    "x and matrices": ({"x": ONES((7, 4), BF16)}, TypeError, ["w_gate_up", "bfloat16", "float32"]),
    "H": ({"x": ONES((7, 3))}, ValueError, ["w_gate_up", "H of x", "(5, 4, 6)"]),
    "F": ({"w_gate_up": ONES((5, 4, 5)), **NO_BIAS}, ValueError, ["w_gate_up", "6", "(5, 4, 5)"]),
    "no experts": (
        {
            "router_output": (ZEROS((7, 2), int), ONES((7, 2))),
            "w_gate_up": ONES((0, 4, 6)),
            "w_down": ONES((0, 3, 4)),
            "top_k": None,
            **NO_LOGITS,
            **NO_BIAS,
        },
        ValueError,
        ["w_gate_up", "E >= 1", "(0, 4, 6)"],
    ),
    "leading": (
        {"w_gate_up": ONES((1, 5, 4, 6)), "w_down": ONES((1, 5, 3, 4)), **NO_BIAS},
        ValueError,
        ["w_gate_up", "(1, 5, 4, 6)"],
    ),
    "down": ({"w_down": ONES((5, 3, 5))}, ValueError, ["w_down", "H = 4", "(5, 3, 5)"]),
    "b_gate_up": ({"b_gate_up": ONES((5, 4))}, ValueError, ["b_gate_up", "G = 6", "(5, 4)"]),
    "b_down": ({"b_down": ONES((4, 4))}, ValueError, ["b_down", "E = 5", "(4, 4)"]),
    "routed": ({"router_output": ONES((7, 2)), **NO_LOGITS}, TypeError, ["router_output", "RouterOutput"]),
    "its top_k": (
        {"router_output": (ZEROS((7, 1), int), ONES((7, 1))), **NO_LOGITS},
        ValueError,
        ["top_k", "router_output, 1", "got 2"],
    ),
    "its weights": (
        {"x": ONES((3, 7, 4)), "router_output": (ZEROS((3, 7, 2), int), ONES((1, 7, 2))), **NO_LOGITS},
        ValueError,
        ["router_output", "(3, 7, 2)", "(1, 7, 2)"],
    ),
    "its rows": (
        {"router_output": (ZEROS((6, 2), int), ONES((6, 2))), **NO_LOGITS},
        ValueError,
        ["expert_ids", "T = 7", "(6, 2)"],
    ),
}


def test_pallas_is_refused_by_name():
    (x, router_logits, w_gate_up, w_down), _ = arguments()
    with ferrum_jax.interpret_kernels(), pytest.raises(NotImplementedError, match="pallas"):
        moe_mlp(x, router_logits, w_gate_up, w_down, top_k=2, implementation="pallas")


@pytest.mark.parametrize("name", WRONG)
def test_named_error_at_trace_time(name):
    change, error, words = WRONG[name]
    (x, router_logits, w_gate_up, w_down), biases = arguments()
    given = {"x": x, "router_logits": router_logits, "w_gate_up": w_gate_up, "w_down": w_down, "top_k": 2, **biases}
    with pytest.raises(error) as info:
        jax.eval_shape(lambda: moe_mlp(**given | change))
    for word in words:
        assert word in str(info.value), str(info.value)


NAMES = ("moe_router", "moe_gate_up", "moe_down")
ROUTING = ("route_topk", "moe_align_block_size", "moe_plan")
policies = jax.checkpoint_policies
KEPT = {  # the policy -> how often the program of the gradients computes products forward, and routing with its tables
    "nothing": (policies.nothing_saveable, 4, 4),
    "dot products": (policies.dots_saveable, 4, 4),
    "router": (policies.save_only_these_names("moe_router"), 4, 2),
    "gate_up": (policies.save_only_these_names("moe_gate_up"), 3, 4),
    "down": (policies.save_only_these_names("moe_down"), 3, 4),
    "all names": (policies.save_only_these_names(*NAMES), 2, 2),
    "everything": (policies.everything_saveable, 2, 2),
}


@pytest.mark.parametrize("settings", [{}, {"flow": "packed"}, {"b_gate_up": 1}], ids=["pair ids", "packed", "bias"])
@pytest.mark.parametrize("name", KEPT)
def test_what_a_remat_policy_keeps(name, settings):
    policy, products, routing = KEPT[name]
    r = rng("remat")
    args = [r.normal(size=shape).astype(np.float32) for shape in ((9, 4), (9, 5), (5, 4, 6), (5, 3, 4))]
    if "b_gate_up" in settings:
        settings = {"b_gate_up": r.normal(size=(5, 6)).astype(np.float32)}

    def loss(*args):
        return jnp.sum(jnp.sin(ferrum_jax.moe_mlp(*args, top_k=2, **settings)))

    gradient = jax.grad(jax.checkpoint(loss, policy=policy), range(4))
    found = re.findall(r"ferrum_(\w+)\[", str(jax.make_jaxpr(gradient)(*args)))
    assert found.count("grouped_matmul") == products
    assert sum(map(found.count, ROUTING)) == routing
    if name == "all names":
        for got, want in zip(jax.jit(gradient)(*args), jax.jit(jax.grad(loss, range(4)))(*args), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
