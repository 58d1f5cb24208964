"""LayerOf: matrices read in place out of a stack, against the same function of the slices themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Size, rng
from compiled import memory_for_h200, needs_pjrt
from derivatives import check_derivatives
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import ferrum_jax
from ferrum_jax import LayerOf, moe_mlp

pytestmark = pytest.mark.tables

LAYERS, SIZE, F = 3, Size(7, 5, 2, 4), 3
FORMS = ("own", "stack")
USUALLY_OWN = ["own", pytest.param("stack", marks=pytest.mark.full)]  # where the stack alone repeats what others test


def stacks(seed=0, size=SIZE):
    """x, logits, and the layers' gate, up and down."""
    r, e = rng("layer of", size, seed), (LAYERS, size.E)
    shapes = (size.T, size.H), (size.T, size.E), (*e, size.H, F), (*e, size.H, F), (*e, F, size.H)
    arrays = [r.normal(size=shape).astype(np.float32) for shape in shapes]
    return [a if a.ndim == 2 else a / np.float32(a.shape[-2] ** 0.5) for a in arrays]


def of(form, stack, layer, own=None):
    """One layer's matrices: the slice, or a LayerOf with it or without."""
    own = stack[layer] if own is None else own
    return own if form == "slice" else LayerOf(stack, layer, own if form == "own" else None)


def scanned(form, x, logits, gate, up, down, *, pair=False, **options):
    """A model: a scan over the layers, each computed again for its gradient."""
    gate_up = (gate, up) if pair else (jnp.concatenate([gate, up], -1),)

    @jax.checkpoint
    def block(x, inputs):
        layer, own_gate_up, own_down = inputs
        matrices = tuple(of(form, *a) for a in zip(gate_up, (layer, layer), own_gate_up, strict=False))
        out = moe_mlp(
            x, logits, matrices if pair else matrices[0], of(form, down, layer, own_down), top_k=SIZE.K, **options
        )
        return x + out, None

    return lax.scan(block, x, (jnp.arange(LAYERS), gate_up, down))[0]


def loss(form, *args, **options):
    out = scanned(form, *args, **options)
    return jnp.sum(jnp.sin(out) * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


def second_gradients(f, *args):
    """Of a function of the first gradients, by every argument: all mixed second derivatives take part."""

    def of_gradients(*args):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(f, range(len(args)))(*args))

    return jax.grad(of_gradients, range(len(args)))(*args)


def assert_alike(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(np.max(np.abs(b), initial=0)) or 1.0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(("form", "flow", "pair"), [("own", "packed", False), ("stack", "pair_ids", True)], ids=FORMS)
def test_a_scan_equals_a_scan_over_slices(form, flow, pair):
    def every(form, *args):
        return jax.value_and_grad(functools.partial(loss, form, flow=flow, pair=pair), range(5))(*args)

    ours, slices = (jax.jit(functools.partial(every, name))(*stacks()) for name in (form, "slice"))
    assert_alike(ours, slices)


def test_second_gradients_through_a_scan():
    ours, slices = (jax.jit(functools.partial(second_gradients, functools.partial(loss, f))) for f in ("own", "slice"))
    assert_alike(ours(*stacks()), slices(*stacks()))


def test_second_derivatives_by_the_slice():
    """Mixed ones too, where the stack is no argument: whatever drops the slice on the way gives zeros."""
    x, logits, gate, up, down = stacks()
    gate_up = np.concatenate([gate, up], -1)

    def f(place, x, own_gate_up, own_down):
        w_gate_up, w_down = place(gate_up, own_gate_up), place(down, own_down)
        return jnp.sum(jnp.sin(moe_mlp(x, logits, w_gate_up, w_down, top_k=2)))

    args = x, gate_up[1], down[1]
    got = second_gradients(functools.partial(f, lambda stack, own: LayerOf(stack, 1, own)), *args)
    assert_alike(got, second_gradients(functools.partial(f, lambda stack, own: own), *args))


@pytest.mark.parametrize("form", USUALLY_OWN)
def test_derivatives_by_finite_differences(form):
    def one_layer(x, gate_up, down):
        return moe_mlp(x, LOGITS, of(form, gate_up, 1), of(form, down, 1), top_k=2, activation="gelu")

    x, LOGITS, gate, up, down = stacks()
    check_derivatives(one_layer, (x, jnp.concatenate([gate, up], -1), down), seed=7)


def test_only_the_layers_own_experts_with_rows_are_read():
    """NaN in every other layer, in experts without tokens, and in the slice itself."""
    x, logits, gate, up, down = stacks()
    logits[:, 3] = -1e4  # no token has this expert
    gate_up = np.concatenate([gate, up], -1)
    want = moe_mlp(x, logits, gate_up[1], down[1], top_k=2)
    for stack in (gate_up, down):
        stack[[0, 2]] = np.nan
        stack[1, 3] = np.nan

    def layer(x, own_gate_up, own_down):
        return moe_mlp(x, logits, LayerOf(gate_up, 1, own_gate_up), LayerOf(down, 1, own_down), top_k=2)

    own = [np.full_like(stack[1], np.nan) for stack in (gate_up, down)]
    np.testing.assert_allclose(layer(x, *own), want, rtol=1e-5)
    gradients = jax.jit(jax.grad(lambda *a: jnp.sum(layer(*a) ** 2), range(3)))(x, *own)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not gradients[1][3].any()


@pytest.mark.parametrize(("layer", "read"), [(-1, 0), (-(2**31), 0), (LAYERS, LAYERS - 1), (2**31 - 1, LAYERS - 1)])
def test_a_layer_outside_is_clamped(layer, read, implementation):
    x, logits, gate, _, _ = stacks()
    plan = ferrum_jax.moe_plan(ferrum_jax.route_topk_softmax(logits, 2).expert_ids, SIZE.E, 4, pair_ids=True)

    def product(stack, layer):
        return ferrum_jax.grouped_matmul(x, LayerOf(stack, layer), plan, top_k=2, implementation=implementation)

    got, back = jax.vjp(functools.partial(product, layer=layer), gate)
    want, back_of_slice = jax.vjp(functools.partial(product, layer=read), gate)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(back(got)[0], back_of_slice(got)[0])


MAPPED = {  # how x, the stack, the layer and the own slice are mapped
    "layer": (None, None, 0, None),
    "layer and slice": (None, None, 0, 0),
    "slice": (None, None, None, 0),
    "x": (1, None, None, None),
    "stack": (None, 2, None, None),
    "stack and layer": (None, 1, 0, None),
    "all": (0, 4, 0, 1),
}


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        *((name, None) for name in MAPPED),
        *(pytest.param(name, "silu", marks=[] if name == "all" else [pytest.mark.full]) for name in MAPPED),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_vmap_equals_a_loop(name, form, activation):
    axes, n = MAPPED[name], 2
    r = rng("vmap", name)
    shapes = (SIZE.T, SIZE.H), (LAYERS, SIZE.E, SIZE.H, 2 * F), (), (SIZE.E, SIZE.H, 2 * F)
    ids = ferrum_jax.route_topk_softmax(r.normal(size=(SIZE.T, SIZE.E)).astype(np.float32), 2).expert_ids
    plan = ferrum_jax.moe_plan(ids, SIZE.E, 4, pair_ids=True)

    def make(shape, axis):
        wide = shape if axis is None else (*shape[:axis], n, *shape[axis:])
        return r.integers(0, LAYERS, wide).astype(np.int32) if shape == () else r.normal(size=wide).astype(np.float32)

    args = [make(shape, axis) for shape, axis in zip(shapes, axes, strict=True)]

    def f(x, stack, layer, own):
        def product(x, stack, own):
            matrices = LayerOf(stack, layer, own if form == "own" else None)
            return ferrum_jax.grouped_matmul(x, matrices, plan, top_k=2, activation=activation)

        out, back = jax.vjp(product, x, stack, own)
        return out, back(jnp.cos(out))

    got = jax.jit(jax.vmap(f, axes))(*args)
    for i in range(n):
        one = [a if axis is None else np.take(a, i, axis) for a, axis in zip(args, axes, strict=True)]
        assert_alike(jax.tree.map(lambda x, i=i: x[i], got), f(*one))


def test_the_gradient_goes_to_the_slice_and_the_stack_is_constant():
    x, logits, gate, up, down = stacks()
    gate_up = np.concatenate([gate, up], -1)

    def both(gate_up, own):
        return jnp.sum(moe_mlp(x, logits, LayerOf(gate_up, 2, own), down[2], top_k=2) ** 2)

    of_stack, of_own = jax.grad(both, (0, 1))(gate_up, gate_up[2])
    assert not np.any(of_stack)
    want = jax.grad(lambda w: jnp.sum(moe_mlp(x, logits, w, down[2], top_k=2) ** 2))(gate_up[2])
    assert_alike(of_own, want)


@pytest.mark.parametrize("form", USUALLY_OWN)
@pytest.mark.parametrize("kind", AxisType)
def test_meshes(kind, form):
    """Tokens divided over four devices: in shard_map with check_vma, in an Explicit and in an Auto mesh."""
    args = stacks(size=Size(8, 5, 2, 4))
    want = jax.value_and_grad(functools.partial(loss, "slice"), range(5))(*args)
    mesh = mesh_of(4, AxisType.Auto if kind == AxisType.Manual else kind)
    x, logits, *matrices = args
    tokens, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        x, logits = (jax.device_put(a, tokens) for a in (x, logits))
        matrices = [jax.device_put(a, whole) for a in matrices]

        def f(*args):
            model = functools.partial(scanned, form)
            if kind == AxisType.Manual:
                model = jax.shard_map(model, in_specs=(P("d"), P("d"), P(), P(), P()), out_specs=P("d"))
            out = model(*args)
            weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
            return jnp.sum(jnp.sin(out) * weights)

        got = jax.jit(jax.value_and_grad(f, range(5)))(x, logits, *matrices)
    assert_alike(got, want)


@pytest.mark.parametrize("exchange", ["gather", "padded"])
@pytest.mark.parametrize("form", USUALLY_OWN)
def test_experts_spread_over_devices(form, exchange):
    """parallel.moe_mlp, of stacks [L, E/D, ...]: values and gradients of one device."""
    size = Size(8, 8, 2, 4)
    args = stacks(size=size)
    layer = functools.partial(ferrum_jax.parallel.moe_mlp, axis_name="d", top_k=2, exchange=exchange)

    def model(form, layer, x, logits, gate, up, down):
        return layer(x, logits, (of(form, gate, 1), of(form, up, 1)), of(form, down, 1))

    def total(model, *args):
        return jnp.sum(jnp.sin(model(*args)))

    specs = P("d"), P("d"), *[P(None, "d")] * 3
    ours = jax.shard_map(functools.partial(model, form, layer), mesh=mesh_of(4), in_specs=specs, out_specs=P("d"))
    one = functools.partial(model, "slice", functools.partial(moe_mlp, top_k=2))
    got, want = (jax.jit(jax.grad(functools.partial(total, f), range(5)))(*args) for f in (ours, one))
    assert_alike(got, want)


@pytest.mark.parametrize("form", USUALLY_OWN)
def test_no_tokens_and_export(form):
    x, logits, gate, up, down = stacks(size=SIZE._replace(T=0))
    assert scanned(form, x, logits, gate, up, down).shape == x.shape
    f = jax.jit(jax.grad(functools.partial(loss, form), range(5)))
    args = stacks()
    checks = ferrum_jax.export_checks()
    exported = export.export(f, platforms=("cpu", "cuda"), disabled_checks=checks)(*args)
    exported = export.deserialize(exported.serialize())
    assert_alike(exported.call(*args), f(*args))


def test_a_layer_of_is_a_pytree_that_can_be_exported():
    x, logits, gate, up, down = stacks()
    f = jax.jit(lambda x, *matrices: moe_mlp(x, logits, *matrices, top_k=2))
    args = x, LayerOf(np.concatenate([gate, up], -1), np.int32(1)), LayerOf(down, np.int32(1), down[1])
    exported = export.deserialize(export.export(f)(*args).serialize())
    assert_alike(exported.call(*args), f(*args))


@pytest.mark.parametrize(
    ("form", "pair"),
    [
        ("own", False),
        ("stack", True),
        *(pytest.param(*cell, marks=pytest.mark.full) for cell in (("own", True), ("stack", False))),
    ],
)
def test_kernels_interpreted(form, pair):
    size = Size(7, 5, 2, 64)
    x, logits, gate, up, down = stacks(size=size)
    args = x, logits, gate, up, down
    ours = functools.partial(loss, form, pair=pair)
    with ferrum_jax.interpret_kernels():
        got = jax.grad(functools.partial(ours, implementation="triton"), range(5))(*args)
    assert_alike(got, jax.grad(functools.partial(ours, implementation="xla"), range(5))(*args))


def test_biases():
    x, logits, gate, up, down = stacks()
    r = rng("biases of layers")
    b_gate_up, b_down = (r.normal(size=(LAYERS, SIZE.E, n)).astype(np.float32) for n in (2 * F, SIZE.H))
    gate_up = np.concatenate([gate, up], -1)

    def f(form, *arrays):
        w_gate_up, w_down, b_gate_up, b_down = (of(form, a, 1) for a in arrays)
        out = moe_mlp(x, logits, w_gate_up, w_down, top_k=2, b_gate_up=b_gate_up, b_down=b_down)
        return jnp.sum(jnp.sin(out))

    arrays = gate_up, down, b_gate_up, b_down
    want = jax.value_and_grad(functools.partial(f, "slice"), range(4))(*arrays)
    for form in FORMS:
        assert_alike(jax.value_and_grad(functools.partial(f, form), range(4))(*arrays), want)


GATE_UP = np.ones((3, 5, 4, 6), np.float32)
WRONG = {
    "stack rank": (LayerOf(GATE_UP[0], 0), ValueError, ["w_gate_up.stack", "[L, E, H, G]", "(5, 4, 6)"]),
    "leading axes": (LayerOf(GATE_UP[None], 0), ValueError, ["w_gate_up.stack", "[L, E, H, G]", "(1, 3, 5, 4, 6)"]),
    "own": (LayerOf(GATE_UP, 0, GATE_UP), ValueError, ["w_gate_up.own", "[E, H, G]", "(3, 5, 4, 6)"]),
    "own's size": (LayerOf(GATE_UP, 0, GATE_UP[0, :4]), ValueError, ["w_gate_up.own", "E = 5", "(4, 4, 6)"]),
    "own's dtype": (LayerOf(GATE_UP, 0, GATE_UP[0].astype(np.float16)), TypeError, ["w_gate_up.own", "float16"]),
    "layer's dtype": (LayerOf(GATE_UP, 1.0), TypeError, ["w_gate_up.layer", "integers", "float"]),
    "layers": (LayerOf(GATE_UP, np.zeros(3, int)), ValueError, ["w_gate_up.layer", "(3,)"]),
    "no layers": (LayerOf(GATE_UP[:0], 0), ValueError, ["w_gate_up.stack", "L >= 1", "(0, 5, 4, 6)"]),
    "stack's dtype": (LayerOf(GATE_UP.astype(int), 0), TypeError, ["w_gate_up.stack", "int"]),
    "width": (LayerOf(GATE_UP[..., :5], 0), ValueError, ["w_gate_up", "2F of w_down", "(5, 4, 5)"]),
    "mixed": ((LayerOf(GATE_UP[..., :3], 0), GATE_UP[0, ..., :3]), TypeError, ["w_gate_up", "LayerOf"]),
    "no matrices": (3, TypeError, ["w_gate_up", "int"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_named_error(name):
    matrices, error, words = WRONG[name]
    x, logits, down = np.ones((7, 4), np.float32), np.ones((7, 5), np.float32), np.ones((5, 3, 4), np.float32)
    with pytest.raises(error) as info:
        moe_mlp(x, logits, matrices, down, top_k=2)
    for word in words:
        assert word in str(info.value), str(info.value)


def test_rows_are_no_matrices():
    with pytest.raises(TypeError, match="lhs"):
        ferrum_jax.grouped_matmul(LayerOf(GATE_UP, 0), GATE_UP[0], ferrum_jax.moe_plan(np.zeros((4, 1), int), 5, 4))


@pytest.mark.compiled
@needs_pjrt
@pytest.mark.parametrize("form", FORMS)
def test_an_h200_makes_no_copy_of_matrices(form):
    """A scan over layers, compiled: its temporary memory is a fraction of one layer's matrices.

    With gradients there is besides the gradient of the layer's slice, before it goes into the stack of gradients.
    """
    size, width = Size(64, 16, 2, 256), 256
    e, h = size.E, size.H
    shapes = (size.T, h), (size.T, e), (LAYERS, e, h, width), (LAYERS, e, h, width), (LAYERS, e, width, h)
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    one_layer = 3 * e * h * width * 2

    def model(x, logits, gate, up, down):
        return jnp.sum(scanned(form, x, logits, gate, up, down, pair=True).astype(jnp.float32))

    assert memory_for_h200(model, *args) < one_layer / 8
    if form == "own":
        assert memory_for_h200(jax.grad(model, range(5)), *args) < 1.2 * one_layer
