"""Meshes: shard_map with check_vma, Explicit and Auto axes; values and gradients equal the unsharded ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import layer
import numpy as np
import pytest
from cases import CASES, FLOAT_CASES, SMALL, VARIANTS, Size, finite_args, per_primitive, rng
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import ferrum_jax

DEVICES = min(4, jax.device_count())
KINDS = [AxisType.Explicit, AxisType.Auto]
ONE_A_FAMILY = {"route_topk_softmax", "moe_plan", "moe_combine", "grouped_matmul_activated"}


def on_each_mesh(cases):
    """Every primitive with Explicit axes, and one a family with Auto ones; in a full run every op with both."""
    found = []
    for case, kind in itertools.product(cases, KINDS):
        usual = case.name in ONE_A_FAMILY or (kind == AxisType.Explicit and case.name not in VARIANTS)
        found.append(pytest.param(case, kind, marks=[] if usual else [pytest.mark.full]))
    return found


def place(mesh, specs, args):
    return [jax.device_put(a, NamedSharding(mesh, s)) for s, a in zip(specs, args, strict=True)]


@pytest.mark.parametrize(("case", "kind"), on_each_mesh(CASES), ids=str)
def test_shard_map_over_a_batch(case, kind, every_implementation):
    """The first operand differs between devices, the others do not: they vary over fewer axes."""
    slices = [finite_args(case, rng(case, i), SMALL) for i in range(DEVICES)]
    args = [np.stack([s[0] for s in slices]), *slices[0][1:]]
    mesh, f = (
        mesh_of(DEVICES, kind),
        jax.jit(functools.partial(case.results, size=SMALL, implementation=every_implementation)),
    )

    def local(x, *rest):
        return [r[None] for r in f(x[0], *rest)]

    specs = (P("d"), *(P() for _ in args[1:]))
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=True))(
        *place(mesh, specs, args)
    )
    for result, *parts in zip(got, *(f(s[0], *args[1:]) for s in slices), strict=True):
        np.testing.assert_allclose(result, np.stack(parts), rtol=1e-6)


@pytest.mark.parametrize(("case", "kind"), on_each_mesh(FLOAT_CASES), ids=str)
def test_gradient_through_shard_map(case, kind, every_implementation):
    """Operands that every device shares get the sum of all devices' gradients."""
    mesh = mesh_of(DEVICES, kind)
    slices = [finite_args(case, rng(case, i), SMALL) for i in range(DEVICES)]
    args = [np.stack([s[0] for s in slices]), *slices[0][1:]]

    def local(x, *rest):
        results = case.float_results(x[0], *rest, size=SMALL, implementation=every_implementation)
        return jax.lax.psum(sum(jnp.sum(jnp.sin(r)) for r in results), "d")

    specs = (P("d"), *(P() for _ in args[1:]))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True)

    def unsharded(x, *rest):
        return sum(jnp.sum(jnp.sin(r)) for row in x for r in case.float_results(row, *rest, size=SMALL))

    gradient = jax.jit(jax.grad(sharded, case.floats))(*place(mesh, specs, args))
    for got, want in zip(gradient, jax.jit(jax.grad(unsharded, case.floats))(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", per_primitive(CASES), ids=str)
def test_explicit_mesh(case):
    """Any operand axis sharded: the same values, under jit in set_mesh, and of the first axis eagerly without."""
    mesh = jax.make_mesh((DEVICES,), ("d",))
    size = Size(8, 8, 4, 4)
    args = finite_args(case, rng(case), size)
    f = functools.partial(case.results, size=size)
    want = f(*args)
    for axis in range(max(a.ndim for a in args)):
        spec = [P(*(["d" if i == axis else None for i in range(a.ndim)])) for a in args]
        spec = [s if axis < a.ndim and a.shape[axis] % DEVICES == 0 else P() for s, a in zip(spec, args, strict=True)]
        placed = place(mesh, spec, args)
        with jax.set_mesh(mesh):
            under = jax.jit(f)(*placed)
        for results in [under, *([f(*placed)] if axis == 0 else [])]:
            for got, w in zip(results, want, strict=True):
                # A sum along a sharded axis adds in another order.
                np.testing.assert_allclose(
                    got, w, rtol=1e-6, atol=1e-6 if case.name.startswith(("grouped", "ragged")) else 0
                )


def test_explicit_mesh_propagates_shardings():
    mesh = jax.make_mesh((2, 2), ("t", "h"))
    with jax.set_mesh(mesh):
        rows = jax.device_put(jnp.ones((8, 4)), P(None, "h"))
        pairs = jax.device_put(jnp.zeros((6, 2), jnp.int32), P("t"))
        weights = jax.device_put(jnp.ones((6, 2)), P("t"))
        out = ferrum_jax.moe_combine(rows, pairs, weights)
        assert jax.typeof(out).sharding.spec == P("t", "h")
        logits = jax.device_put(jnp.ones((8, 6)), P("t", "h"))
        assert jax.typeof(ferrum_jax.route_topk_softmax(logits, 2).expert_ids).sharding.spec == P("t", None)
        batched = jax.device_put(jnp.ones((2, 8, 6)), P("h", "t"))
        assert jax.typeof(ferrum_jax.route_topk_softmax(batched, 2).expert_weights).sharding.spec == P("h", "t", None)
        both = jax.device_put(jnp.ones((8, 4)), P(None, "t"))  # one mesh axis cannot shard two axes of the result
        assert jax.typeof(ferrum_jax.moe_combine(both, pairs, weights)).sharding.spec == P("t", None)


@pytest.mark.parametrize("case", per_primitive(FLOAT_CASES), ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_gradient_in_an_explicit_mesh(case, axis):
    mesh = jax.make_mesh((DEVICES,), ("d",))
    size = Size(8, 8, 4, 4)
    args = finite_args(case, rng(case), size)

    def loss(*a):
        return sum(jnp.sum(jnp.sin(r)) for r in case.float_results(*a, size=size))

    want = jax.jit(jax.grad(loss, case.floats))(*args)
    spec = P("d") if axis == 0 else P(None, "d")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, spec if a.ndim > axis and a.shape[axis] % DEVICES == 0 else P()) for a in args]
        for got, w in zip(jax.jit(jax.grad(loss, case.floats))(*placed), want, strict=True):
            np.testing.assert_allclose(got, w, rtol=1e-5, atol=1e-6)
        if case.name in ONE_A_FAMILY:  # eagerly, equation by equation, to one operand
            np.testing.assert_allclose(jax.grad(loss)(*placed), want[0], rtol=1e-5, atol=1e-6)


def test_gradient_of_sharded_matrices_outside_set_mesh():
    mesh = jax.make_mesh((DEVICES,), ("d",))
    routing = ferrum_jax.moe_align_block_size_pair_ids(np.arange(8).reshape(8, 1) % 4, 4, 2)

    def loss(w):
        return jnp.sum(ferrum_jax.grouped_matmul(np.ones((8, 3), np.float32), w, routing) ** 2)

    w = rng("w").normal(size=(4, 3, 5)).astype(np.float32)
    (placed,) = place(mesh, [P("d")], [w])
    gradient = jax.jit(jax.grad(loss))(placed)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(loss))(w), rtol=1e-5, atol=1e-6)
    assert gradient.sharding.spec == P("d", None, None)


@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P()], ids=str)
def test_vmap_in_an_explicit_mesh(spec):
    mesh = jax.make_mesh((DEVICES,), ("d",))
    x = rng("v").normal(size=(4, 8, 6)).astype(np.float32)
    f = jax.vmap(lambda x: ferrum_jax.route_topk_softmax(x, 3).expert_weights)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, spec)
        np.testing.assert_allclose(jax.jit(f)(placed), f(x), rtol=1e-6)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(f(x)[..., 0])))(placed)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(lambda x: jnp.sum(f(x)[..., 0])))(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_layer_gradient_with_tokens_sharded(kind, every_implementation):
    """Data parallel: tokens sharded, weights shared, inside shard_map with check_vma."""
    mesh = mesh_of(DEVICES, kind)
    size = Size(8, 4, 2, 3)
    args = layer.init(3, size)
    run = functools.partial(layer.packed, top_k=2, implementation=every_implementation)

    def local(*a):
        return jax.lax.psum(jnp.sum(jnp.sin(run(*a))), "d")

    specs, every = (P("d"), P(), P(), P()), (0, 1, 2, 3)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True)
    got = jax.jit(jax.grad(sharded, every))(*place(mesh, specs, args))
    want = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(layer.packed(*a, top_k=2))), every))(*args)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_layer_gradient_in_an_explicit_mesh():
    mesh = jax.make_mesh((DEVICES,), ("d",))
    size = Size(8, 4, 2, 4)
    x, router, *_ = layer.init(4, size)

    def loss(x, router):
        ids, weights = ferrum_jax.route_topk_softmax(x @ router, 2)
        pairs = ferrum_jax.moe_build_pairs_by_token(ids, size.E)
        rows = jnp.tanh(ferrum_jax.moe_dispatch(x, pairs))
        return jnp.sum(jnp.sin(ferrum_jax.moe_combine(rows, pairs, weights)))

    want = jax.jit(jax.grad(loss, (0, 1)))(x, router)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, P("d")), jax.device_put(router, P())
        got = jax.jit(jax.grad(loss, (0, 1)))(*placed)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6)


def test_partly_manual_mesh():
    """shard_map over one axis while the other stays Explicit or Auto."""
    x = rng("partly").normal(size=(4, 8, 6)).astype(np.float32)
    want = ferrum_jax.route_topk_softmax(x, 2).expert_weights

    def f(x):
        return ferrum_jax.route_topk_softmax(x, 2).expert_weights

    def sum_of_squares(x):  # tables, and the backward that sorts
        ids, weights = ferrum_jax.route_topk_softmax(x, 2)
        plan = ferrum_jax.moe_plan(ids, 6, 2)
        rows = ferrum_jax.moe_dispatch(x, plan.packed_token_idx)
        out = ferrum_jax.moe_combine(rows, plan.pairs_by_token, weights)
        return jnp.sum(out**2)

    gradient = jax.jit(jax.grad(sum_of_squares))(x)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
        with jax.set_mesh(mesh):
            placed = jax.device_put(x, P("a", "b"))
            part = jax.shard_map(f, in_specs=P("a"), out_specs=P("a"), axis_names={"a"}, check_vma=True)
            np.testing.assert_allclose(jax.jit(part)(placed), want, rtol=1e-6)

            def total(x):
                return jax.lax.psum(sum_of_squares(x), "a")

            part = jax.shard_map(total, in_specs=P("a"), out_specs=P(), axis_names={"a"}, check_vma=True)
            np.testing.assert_allclose(jax.jit(jax.grad(part))(placed), gradient, rtol=1e-5)
