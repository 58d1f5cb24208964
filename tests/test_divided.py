"""moe_mlp over a mesh by its arguments' shardings: values, gradients, the collectives, and the work of each device."""

import contextlib
import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Size, rng
from compiled import h200s, needs_pjrt, whole_program_for_h200
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_partitioning import collectives

import ferrum_jax
from ferrum_jax import MoESharding, moe_mlp

pytestmark = pytest.mark.tables

SIZE, F, K = Size(24, 24, 2, 12), 24, 2

HALVES = ["collective-permute"] * 2  # of w_gate_up, one array
EXCHANGE = ["all-gather"] * 3 + ["reduce-scatter"]  # of few tokens, their ids and weights
GATHER = ["all-gather"] * 2  # of both matrices

# Where the mesh's axes "a" and "b" divide what: the specs of x, of w_gate_up and of w_down; the same as an argument;
# and the collectives of the values.
BOTH = ("a", "b")
LAYOUTS = {
    "tokens": (P("a"), P(), P(), MoESharding("a"), []),
    "tokens on both": (P(BOTH), P(), P(), MoESharding((BOTH,)), []),
    "experts": (P(), P("a"), P("a"), MoESharding(experts="a"), ["all-reduce"]),
    "width": (P(), P(None, None, "a"), P(None, "a"), MoESharding(width="a"), [*HALVES, "all-reduce"]),
    "tokens, experts": (P("a"), P("b"), P("b"), MoESharding("a", "b"), ["all-reduce"]),
    "exchange": (P("a"), P("a"), P("a"), MoESharding("a", "a"), EXCHANGE),
    "exchange on both": (P(BOTH), P(BOTH), P(BOTH), MoESharding((BOTH,), BOTH), EXCHANGE),
    "exchange on one of two": (P("a"), P(BOTH), P(BOTH), MoESharding("a", BOTH), [*EXCHANGE, "all-reduce"]),
    "tokens, width": (P("a"), P(None, None, "b"), P(None, "b"), MoESharding("a", None, "b"), [*HALVES, "all-reduce"]),
    "experts, width": (P(), P("a", None, "b"), P("a", "b"), MoESharding(None, "a", "b"), [*HALVES, "all-reduce"]),
    "exchange, width": (
        *(P("a"), P("a", None, "b"), P("a", "b"), MoESharding("a", "a", "b")),
        [*HALVES, *EXCHANGE, "all-reduce"],
    ),
    "hidden": (P("a"), P(None, "a"), P(None, None, "a"), MoESharding("a", hidden="a"), GATHER),
    "width in parts": (P("a"), P(None, None, "a"), P(None, "a"), MoESharding("a", width="a"), GATHER),
    "experts, hidden": (
        *(P("a"), P("b", "a"), P("b", None, "a"), MoESharding("a", "b", hidden="a")),
        [*GATHER, "all-reduce"],
    ),
}
FORMS = ("one", "pair", "interleaved", "transposed", "biased", "routed")


def arguments(form, size=SIZE):
    """x and its routing, the matrices and biases, each with the axes that they have."""
    r = rng("divided", form)

    def make(*shape):
        return jnp.float32(r.normal(size=shape))

    routing = make(size.T, size.E)
    if form == "routed":
        ids = jnp.int32(r.integers(-1, size.E + 1, size=(size.T, K)))
        routing = ferrum_jax.RouterOutput(ids, make(size.T, K))
    gate_up, down = make(size.E, size.H, 2 * F) / size.H**0.5, make(size.E, F, size.H) / F**0.5
    biases = (make(size.E, 2 * F), make(size.E, size.H)) if form in ("biased", "interleaved") else (None, None)
    if form == "pair":
        gate_up = tuple(jnp.split(gate_up, 2, 2))
    if form == "transposed":
        gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
    return make(size.T, size.H), routing, gate_up, down, *biases


def run(form, *args, sharding=None):
    x, routing, gate_up, down, *biases = args
    logits, routed = (None, routing) if form == "routed" else (routing, None)
    how = {"b_gate_up": biases[0], "b_down": biases[1], "interleaved": form == "interleaved"}
    how |= {"transpose_rhs": form == "transposed", "router_output": routed, "sharding": sharding}
    return moe_mlp(x, logits, gate_up, down, top_k=K, **how)


def gradients(form, **how):
    """A function of the arguments that returns the gradients to all that are floats."""

    def of(*args):
        leaves, tree = jax.tree.flatten(args)
        floats = [i for i, leaf in enumerate(leaves) if leaf.dtype == jnp.float32]

        def loss(*some):
            merged = dict(enumerate(leaves)) | dict(zip(floats, some, strict=True))
            return jnp.sum(jnp.sin(run(form, *jax.tree.unflatten(tree, merged.values()), **how)))

        return jax.grad(loss, range(len(floats)))(*[leaves[i] for i in floats])

    return of


def place(mesh, layout, form, args):
    x_spec, gate_up, down, *_ = LAYOUTS[layout]

    def swapped(spec):
        spec = (*spec, *[None] * (3 - len(spec)))
        return P(spec[0], spec[2], spec[1]) if form == "transposed" else P(*spec)

    def put(tree, spec):
        return None if tree is None else jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec)), tree)

    x, routing, w1, w2, b1, b2 = args
    specs = x_spec, x_spec, swapped(gate_up), swapped(down)
    bias = P(*(*gate_up, None, None, None)[:3:2])
    return (
        *[put(a, s) for a, s in zip((x, routing, w1, w2), specs, strict=True)],
        put(b1, bias),
        put(b2, P(*gate_up[:1])),
    )


def mesh_by(kind, shape=(4, 2)):
    return jax.make_mesh(shape, ("a", "b"), axis_types=(kind,) * 2)


MIXED = ("tokens", "experts, hidden", "width in parts", "exchange on one of two")  # together, every kind of axis
USUAL = {*((layout, "one") for layout in MIXED), *(("exchange, width", form) for form in FORMS)}
CELLS = [
    pytest.param(layout, form, kind, marks=[] if (layout, form) in USUAL and kind == usual else [pytest.mark.full])
    for i, (layout, form) in enumerate(itertools.product(LAYOUTS, FORMS))
    for usual in [[AxisType.Explicit, AxisType.Auto][i % 2]]
    for kind in (AxisType.Explicit, AxisType.Auto)
]


@pytest.mark.parametrize(("layout", "form", "kind"), CELLS)
def test_values_gradients_and_collectives(layout, form, kind):
    args = arguments(form)
    how = {"sharding": LAYOUTS[layout][3]} if kind == AxisType.Auto else {}
    want = jax.jit(functools.partial(run, form))(*args), *jax.jit(gradients(form))(*args)
    mesh = mesh_by(kind)
    with jax.set_mesh(mesh):
        placed = place(mesh, layout, form, args)
        program = jax.jit(functools.partial(run, form, **how)).lower(*placed).compile()
        out = program(*placed)
        if kind == AxisType.Explicit:
            assert jax.typeof(out).sharding.spec == jax.typeof(placed[0]).sharding.spec
        got = out, *jax.jit(gradients(form, **how))(*placed)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5 * np.abs(w).max())
    if form == "one":
        assert sorted(collectives(program.as_text())) == sorted(LAYOUTS[layout][4])


LAYOUT = "exchange, width"


def placed_by(kind, layout=LAYOUT, form="one", shape=(4, 2)):
    mesh, args = mesh_by(kind, shape), arguments(form)
    return mesh, args, place(mesh, layout, form, args)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        *((layout, (3, 2)) for layout in ("exchange, width", "experts, hidden", "width")),
        *(("exchange, width", shape) for shape in ((6, 2), (3, 4))),
        *(pytest.param(name, (6, 2), marks=pytest.mark.full) for name in ("experts, hidden", "width")),
    ],
    ids=str,
)
def test_numbers_of_devices_that_are_no_powers_of_two(layout, shape):
    """Odd ones too, between which halves of w_gate_up travel otherwise."""
    mesh, args, placed = placed_by(AxisType.Explicit, layout, shape=shape)
    with jax.set_mesh(mesh):
        got = jax.jit(gradients("one"))(*placed)
    for g, w in zip(got, gradients("one")(*args), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5 * np.abs(w).max())


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name)
def test_exchange_capacity_and_chunks(kind):
    """As those of `parallel.moe_mlp` in a shard_map written by hand, and the dropped pairs of all devices."""
    options = {"exchange": "padded", "capacity": 9, "chunks": 2, "return_dropped": True, "top_k": K}
    how = {"sharding": LAYOUTS["exchange, width"][3]} if kind == AxisType.Auto else {}
    mesh, args, placed = placed_by(kind)

    def by_hand(*args):
        out, dropped = ferrum_jax.parallel.moe_mlp(*args, axis_name="a", **options)
        return out, jax.lax.psum(dropped, "a")

    with jax.set_mesh(mesh_by(AxisType.Auto, (4, 1))):
        hand = jax.shard_map(by_hand, in_specs=P("a"), out_specs=(P("a"), P()), axis_names={"a"})
        want, gone = map(np.asarray, jax.jit(hand)(*args[:4]))
    assert gone > 0
    with jax.set_mesh(mesh):
        out, dropped = map(np.asarray, jax.jit(functools.partial(moe_mlp, **options, **how))(*placed[:4]))
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    assert (dropped.dtype, dropped) == (gone.dtype, gone)


@pytest.mark.parametrize("layout", ["tokens", "experts", None])
def test_without_an_exchange_nothing_is_dropped(layout):
    options = {"exchange": "padded", "capacity": 1, "chunks": 5, "return_dropped": True, "top_k": K}
    mesh, args, placed = placed_by(AxisType.Explicit, layout or "tokens")
    with jax.set_mesh(mesh) if layout else contextlib.nullcontext():
        out, dropped = moe_mlp(*(placed if layout else args)[:4], **options)
    np.testing.assert_allclose(out, run("one", *args), rtol=1e-4, atol=1e-5)
    assert (dropped.dtype, dropped) == (jnp.int32, 0)


def test_a_stack_divided_over_its_layers_is_refused():
    mesh, (x, logits, gate_up, down, *_), _ = placed_by(AxisType.Explicit)
    with jax.set_mesh(mesh):
        stacks = [jax.device_put(jnp.stack([a] * 4), P("a")) for a in (gate_up, down)]
        with pytest.raises(ValueError, match=r"moe_mlp: w_gate_up.stack must be whole along L .* over 'a'"):
            moe_mlp(x, logits, *[ferrum_jax.LayerOf(stack, 1) for stack in stacks], top_k=K)


def scan(form, x, routing, stacks, sharding=None, of=None):
    """Layers under remat, of a stack of matrices."""

    @jax.checkpoint
    def block(x, inputs):
        layer, own = inputs
        own = [of(stack, layer, a) for stack, a in zip(stacks, own, strict=True)] if of else own
        return x + run(form, x, routing, *own, None, None, sharding=sharding), None

    return jax.lax.scan(block, x, (jnp.arange(len(stacks[0])), stacks))[0]


@pytest.mark.parametrize(
    "of", [pytest.param(None, marks=pytest.mark.full), ferrum_jax.LayerOf], ids=["slices", "LayerOf"]
)
@pytest.mark.parametrize("layout", ["exchange, width", "experts, hidden"])
def test_scan_over_layers(layout, of):
    mesh, (x, routing, *matrices), (placed_x, placed_routing, *placed) = placed_by(AxisType.Explicit, layout)
    r = rng("stacks")

    def loss(x, routing, matrices, scales):
        stacks = [jax.vmap(jnp.multiply, (0, None))(scales, m) for m in matrices]
        return jnp.sum(jnp.sin(scan("one", x, routing, stacks, of=of)))

    scales = jnp.float32(r.normal(size=3))
    want = jax.jit(jax.grad(loss, (0, 1, 2)))(x, routing, matrices[:2], scales)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(placed_x, placed_routing, placed[:2], scales)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=5e-5 * np.abs(w).max())


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.full)], ids=lambda t: t.name
)
def test_transformations(kind):
    """jvp of the gradient, vmap, without jit, and jax.export."""
    mesh, args, placed = placed_by(kind)
    how = {"sharding": LAYOUTS[LAYOUT][3]} if kind == AxisType.Auto else {}

    def second(**how):
        def f(*args):
            grad = gradients("one", **how)
            return jax.jvp(lambda x: grad(x, *args[1:]), (args[0],), (args[0],))[1]

        return f

    def mapped(**how):
        def f(x, *rest):
            return jax.vmap(lambda x: run("one", x, *rest, **how), out_axes=1)(jnp.stack([x, x * 2]))

        return f

    want = *jax.jit(second())(*args), jax.jit(mapped())(*args), run("one", *args)
    with jax.set_mesh(mesh):
        got = *jax.jit(second(**how))(*placed), jax.jit(mapped(**how))(*placed), run("one", *placed, **how)
        exported = export.export(jax.jit(functools.partial(run, "one", **how)))(*placed)
        got += (jax.jit(export.deserialize(exported.serialize()).call)(*placed),)
    for g, w in zip(got, (*want, want[-1]), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=5e-5 * np.abs(w).max())


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name)
def test_inside_another_shard_map(kind):
    """Whose axis divides the tokens already."""
    mesh, args, _ = placed_by(kind)
    x, routing, *matrices = args
    how = {"sharding": MoESharding(experts="a")} if kind == AxisType.Auto else {}
    matrices = matrices[:2]
    want = jax.jit(gradients("one"))(x, routing, *matrices, None, None)

    def loss(x, routing, matrices):
        def on_shard(x, routing, matrices):
            out = run("one", x, routing, *matrices, None, None, **how)
            return jax.lax.psum(jnp.sum(jnp.sin(out)), "b")

        specs = P("b"), P("b"), P()
        return jax.shard_map(on_shard, in_specs=specs, out_specs=P(), axis_names={"b"})(x, routing, matrices)

    with jax.set_mesh(mesh):
        spec = P("a") if kind == AxisType.Explicit else P()
        placed = [jax.device_put(a, s) for a, s in ((x, P("b")), (routing, P("b")), (matrices, spec))]
        got = jax.jit(jax.grad(loss, (0, 1, 2)))(*placed)
    for g, w in zip(jax.tree.leaves(got), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5 * np.abs(w).max())


@pytest.mark.parametrize("spec", [P("a", "b"), P("a", None, "b"), P(None, "a"), P(None, ("a", "b"))], ids=str)
def test_axes_of_tokens_and_a_divided_hidden_axis(spec):
    """x as models hold it, [B, S, H]. What is given divided along H comes back so."""
    mesh, (x, routing, *matrices), _ = placed_by(AxisType.Explicit)
    x, routing = (a.reshape(3 if spec[0] is None else 4, -1, a.shape[-1]) for a in (x, routing))
    want = run("one", x, routing, *matrices)
    with jax.set_mesh(mesh):
        out = jax.jit(functools.partial(run, "one"))(jax.device_put(x, spec), routing, *matrices)
    assert jax.typeof(out).sharding.spec == P(*(*spec, None)[:3])
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


def by_hand(x, logits, gate_up, down):
    """The layouts "tokens, experts" and "exchange", as one writes them in shard_map."""
    return ferrum_jax.parallel.moe_mlp(x, logits, gate_up, down, axis_name="a", top_k=K)


def test_work_of_a_device():
    mesh, _, placed = placed_by(AxisType.Explicit, "exchange")
    with jax.set_mesh(mesh):
        ours = jax.jit(functools.partial(run, "one")).lower(*placed).compile()
        hand = jax.jit(jax.shard_map(by_hand, in_specs=P("a"), out_specs=P("a"), axis_names={"a"}))
        flops = [program.cost_analysis()["flops"] for program in (ours, hand.lower(*placed[:4]).compile())]
    assert flops[0] <= 1.1 * flops[1]


ERRORS = {
    "another type": (None, "a", "sharding must be a MoESharding; got 'a'"),
    "no mesh": (None, MoESharding("a"), "sharding needs a mesh around the call"),
    "another axis": ((4, 2), MoESharding("data"), "sharding must name axes of the mesh, a, b; got 'data'"),
    "too many axes": (
        (4, 2),
        MoESharding(("a", "b")),
        "sharding.tokens must have an entry for each of the 1 axes of x",
    ),
    "tokens": ((5, 1), MoESharding("a"), "axis 0 of x has 24 entries, which 'a' of size 5 cannot divide; leave these"),
    "experts": ((5, 1), MoESharding(experts="a"), "E has 24 entries, which 'a' of size 5 cannot divide"),
    "width": ((5, 1), MoESharding(width="a"), "F has 24 entries, which 'a' of size 5 cannot divide"),
    "hidden": ((8, 1), MoESharding("a", hidden="a"), "H has 12 entries, which 'a' of size 8 cannot divide"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_named_error(name):
    shape, sharding, message = ERRORS[name]
    around = contextlib.nullcontext() if shape is None else jax.set_mesh(mesh_by(AxisType.Auto, shape))
    with around, pytest.raises((TypeError, ValueError), match="moe_mlp: " + re.escape(message)):
        run("one", *arguments("one"), sharding=sharding)


@pytest.mark.parametrize("spec", [P(), P("a")], ids=str)
def test_no_tokens(spec):
    mesh, (x, routing, *_), (_, _, *matrices) = placed_by(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x, routing = (jax.device_put(a[:0], spec) for a in (x, routing))
        assert run("one", x, routing, *matrices).shape == (0, SIZE.H)
        assert not any(np.any(g) for g in jax.jit(gradients("one"))(x, routing, *matrices))


@pytest.mark.slow
def test_the_next_process_finds_the_program_in_the_cache(tmp_path):
    """As JAX's persistent cache has it: the second start compiles nothing."""
    code = (
        "import jax, test_divided as t, functools, os\n"
        "mesh, _, placed = t.placed_by(t.AxisType.Explicit)\n"
        "with jax.set_mesh(mesh):\n"
        "    jax.jit(functools.partial(t.run, 'one'))(*placed)\n"
    )
    here = pathlib.Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path]), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    found = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=here, env=env, capture_output=True)
        found.append({path.name for path in tmp_path.iterdir() if path.name.endswith("-cache")})
    assert found[0]
    assert found[1] == found[0]


@needs_pjrt
@pytest.mark.compiled
@pytest.mark.parametrize("layout", ["tokens", "exchange, width", "experts, hidden"])
def test_kernels_on_eight_gpus(layout):
    """Each H200 runs kernels on its own part, and exchanges what it does on a CPU."""
    mesh = jax.sharding.Mesh(np.array(h200s(8)).reshape(4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    experts, tokens, width = 16, 1024, 256
    x_spec, gate_up, down, _, expected = LAYOUTS[layout]
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))
        for shape, spec in (
            ((tokens, 512), x_spec),
            ((tokens, experts), x_spec),
            ((experts, 512, 2 * width), gate_up),
            ((experts, width, 512), down),
        )
    ]
    program, _ = whole_program_for_h200(lambda *args: moe_mlp(*args, top_k=K), *args)
    gathered = "exchange" in layout
    own_experts = experts // (4 if gathered else 2 if "experts" in layout else 1)
    own_width = width // (2 if "width" in layout else 1)
    assert program.count("triton_kernel_call") >= 4
    assert f"bf16[{own_experts},{own_width},512]" in program
    assert set(collectives(program)) == set(expected)


def test_arrays_that_are_not_on_the_mesh():
    """As a notebook has them after `jax.set_mesh`: every device computes the same, to the second derivative."""
    mesh, (x, *rest), _ = placed_by(AxisType.Explicit)

    def second(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(gradients("one")(x, *rest)[0])))(x)

    want = second(x)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(second(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name)
def test_sixteen_bits_on_a_mesh_with_idle_axes(kind):
    """XLA:CPU would end the process if the other axes were left to the compiler."""
    args = [a.astype(jnp.bfloat16) for a in arguments("one")[:4]]
    how = {"sharding": MoESharding("a")} if kind == AxisType.Auto else {}

    def gradient(*args, **how):
        return jax.grad(lambda *a: jnp.sum(moe_mlp(*a, top_k=K, **how).astype(jnp.float32)), (0, 2, 3))(*args)

    want = gradient(*args)
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(kind,) * 3)):
        placed = [jax.device_put(a, P("a") if i < 2 else P()) for i, a in enumerate(args)]
        got = jax.jit(functools.partial(gradient, **how))(*placed)
    for g, w in zip(got, want, strict=True):
        w = np.asarray(w, np.float32)
        np.testing.assert_allclose(np.asarray(g, np.float32), w, atol=2e-2 * abs(w).max())


def test_explicit_and_auto_axes_in_one_mesh():
    """The types say what the Explicit axis divides, and the argument what both divide."""
    args = arguments("one")
    with jax.set_mesh(jax.make_mesh((4, 2), BOTH, axis_types=(AxisType.Explicit, AxisType.Auto))):
        placed = [None if a is None else jax.device_put(a, P("a")) for a in args]
        for sharding in (None, LAYOUTS[LAYOUT][3]):
            out = jax.jit(functools.partial(run, "one", sharding=sharding))(*placed)
            np.testing.assert_allclose(out, run("one", *args), rtol=1e-4, atol=1e-5)
