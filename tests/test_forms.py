"""The forms of moe_mlp's matrices: a pair of gate and up, interleaved, transposed; each against the usual form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Size, rng
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import ferrum_jax
from ferrum_jax import moe_mlp, pack_gate_up

pytestmark = pytest.mark.tables

SIZE, F = Size(8, 5, 2, 4), 3
FORMS = {  # the form -> gate and up, their biases, down, and the options
    "pair": (lambda g, u: (g, u), lambda g, u: (g, u), lambda d: d, {}),
    "interleaved": (
        functools.partial(pack_gate_up, interleaved=True),
        functools.partial(pack_gate_up, interleaved=True),
        lambda d: d,
        {"interleaved": True},
    ),
    "transposed": (
        lambda g, u: pack_gate_up(_turned(g), _turned(u), axis=-2),
        pack_gate_up,
        lambda d: _turned(d),
        {"transpose_rhs": True},
    ),
    "transposed pair": (
        lambda g, u: [_turned(g), _turned(u)],
        lambda g, u: [g, u],
        lambda d: _turned(d),
        {"transpose_rhs": True},
    ),
    "transposed interleaved": (
        lambda g, u: pack_gate_up(_turned(g), _turned(u), axis=1, interleaved=True),
        functools.partial(pack_gate_up, interleaved=True),
        lambda d: _turned(d),
        {"transpose_rhs": True, "interleaved": True},
    ),
}


def _turned(x):
    return jnp.swapaxes(x, -1, -2)


def arrays(size=SIZE, width=F):
    r = rng("forms", size, width)
    e, h = size.E, size.H
    shapes = (size.T, h), (size.T, e), (e, h, width), (e, h, width), (e, width), (e, width), (e, width, h), (e, h)
    made = [r.normal(size=shape).astype(np.float32) for shape in shapes]
    return [a if a.ndim == 2 else a / np.float32(a.shape[-2] ** 0.5) for a in made]


def layer(name, x, logits, gate, up, b_gate, b_up, down, b_down, *, biased, function=moe_mlp, **options):
    matrices, biases, last, settings = FORMS.get(name) or (pack_gate_up, pack_gate_up, lambda d: d, {})
    if biased:
        options |= {"b_gate_up": biases(b_gate, b_up), "b_down": b_down}
    return function(x, logits, matrices(gate, up), last(down), top_k=2, **settings, **options)


def assert_alike(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def derivatives(f, second, *args):
    """The result and the gradients, and gradients of these."""

    def total(*args):
        return jnp.sum(jnp.sin(f(*args)))

    def of_gradients(*args):
        return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(total, every)(*args))

    every = range(len(args))
    return f(*args), jax.grad(total, every)(*args), jax.grad(of_gradients, every)(*args) if second else None


@pytest.mark.parametrize(
    ("name", "flow", "biased"),
    [
        pytest.param(name, *cell, marks=[] if i % 2 == j else [pytest.mark.full])
        for i, name in enumerate(FORMS)
        for j, cell in enumerate([("packed", True), ("pair_ids", False)])
    ],
)
def test_equals_the_usual_form(name, flow, biased):
    args = arrays()
    got, want = (
        jax.jit(functools.partial(derivatives, functools.partial(layer, form, flow=flow, biased=biased), not biased))(
            *args
        )
        for form in (name, None)
    )
    assert_alike(got, want)


@pytest.mark.parametrize("name", FORMS)
def test_activations_and_vmap_of_the_matrices(name):
    args = arrays()
    many = [np.stack([a, a[::-1]]) for a in args[2:]]
    for activation in ("swiglu_oai", lambda gate, up: jnp.tanh(gate) * up):
        got, want = (
            jax.vmap(functools.partial(layer, form, *args[:2], biased=False, activation=activation))(*many)
            for form in (name, None)
        )
        assert_alike(got, want)


@pytest.mark.parametrize("name", FORMS)
def test_experts_spread_over_devices(name):
    size = Size(8, 8, 2, 4)
    args = arrays(size)

    def spread(*args):
        function = functools.partial(ferrum_jax.parallel.moe_mlp, axis_name="d")
        return layer(name, *args, biased=True, function=function)

    ours = jax.shard_map(spread, mesh=mesh_of(4), in_specs=P("d"), out_specs=P("d"))
    assert_alike(jax.jit(ours)(*args), layer(None, *args, biased=True))


@pytest.mark.parametrize("name", FORMS)
def test_kernels_interpreted(name):
    args = arrays(Size(5, 3, 2, 16), 16)

    def total(implementation, *args):
        return jnp.sum(jnp.sin(layer(name, *args, biased=False, implementation=implementation)))

    with ferrum_jax.interpret_kernels():
        got = jax.grad(functools.partial(total, "triton"), (0, 2, 3, 6))(*args)
    assert_alike(got, jax.grad(functools.partial(total, "xla"), (0, 2, 3, 6))(*args))


def test_a_pair_is_not_concatenated():
    """No value of the program, forward or with gradients, has the shape of both matrices together."""
    x, logits, gate, up, _, _, down, _ = arrays()

    def total(gate, up):
        return jnp.sum(moe_mlp(x, logits, (gate, up), down, top_k=2))

    text = str(jax.make_jaxpr(jax.value_and_grad(total, (0, 1)))(gate, up))
    assert f"[{SIZE.E},{SIZE.H},{F}]" in text
    assert f"[{SIZE.E},{SIZE.H},{2 * F}]" not in text


@pytest.mark.parametrize(("axis", "interleaved"), [*itertools.product((-1, -2, 0, 1), (False, True))])
def test_pack_gate_up(axis, interleaved):
    gate, up = (np.arange(6.0).reshape(2, 3) + n for n in (0, 10))
    packed = np.asarray(pack_gate_up(gate, up, axis=axis, interleaved=interleaved))
    parts = [np.take(packed, range(i, packed.shape[axis], 2), axis) for i in range(2)]
    parts = parts if interleaved else np.split(packed, 2, axis)
    np.testing.assert_array_equal(parts[0], gate)
    np.testing.assert_array_equal(parts[1], up)


def test_pack_gate_up_of_two_shapes():
    with pytest.raises(ValueError, match=r"up must have the shape of gate, \(2, 3\); got \(2, 4\)"):
        pack_gate_up(np.ones((2, 3)), np.ones((2, 4)))


ONES = np.ones
WRONG = {
    "three": ({"w_gate_up": (ONES((5, 4, 3)),) * 3}, TypeError, ["w_gate_up", "pair", "3 entries"]),
    "two widths": (
        {"w_gate_up": (ONES((5, 4, 3)), ONES((5, 4, 2)))},
        ValueError,
        ["w_gate_up[1]", "F = 3", "(5, 4, 2)"],
    ),
    "width": ({"w_gate_up": (ONES((5, 4, 2)),) * 2}, ValueError, ["w_down", "F = 2", "(5, 3, 4)"]),
    "one bias": (
        {"w_gate_up": (ONES((5, 4, 3)),) * 2, "b_gate_up": ONES((5, 6))},
        TypeError,
        ["b_gate_up", "pair", "w_gate_up"],
    ),
    "two biases": ({"b_gate_up": (ONES((5, 3)),) * 2}, TypeError, ["b_gate_up", "pair", "w_gate_up"]),
    "interleaved pair": (
        {"w_gate_up": (ONES((5, 4, 3)),) * 2, "interleaved": True},
        ValueError,
        ["interleaved", "pair"],
    ),
    "interleaved": ({"interleaved": 1}, TypeError, ["interleaved", "True or False"]),
    "transpose_rhs": ({"transpose_rhs": "yes"}, TypeError, ["transpose_rhs", "True or False"]),
    "not transposed": ({"transpose_rhs": True}, ValueError, ["w_down", "(5, 3, 4)"]),
    "transposed H": (
        {"transpose_rhs": True, "w_gate_up": ONES((5, 6, 7)), "w_down": ONES((5, 7, 3))},
        ValueError,
        ["w_gate_up", "axis 2", "H of x", "(5, 6, 7)"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_named_error(name):
    change, error, words = WRONG[name]
    given = {"w_gate_up": ONES((5, 4, 6)), "w_down": ONES((5, 3, 4)), "top_k": 2} | change
    given = jax.tree.map(lambda a: a.astype(np.float32) if isinstance(a, np.ndarray) else a, given)
    with pytest.raises(error) as info:
        moe_mlp(ONES((7, 4), np.float32), ONES((7, 5), np.float32), **given)
    for word in words:
        assert word in str(info.value), str(info.value)
