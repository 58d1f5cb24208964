"""Plain jit over sharded arrays: in an Explicit mesh ops run on their shards, elsewhere XLA divides their meanings."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Size, finite_args, rng
from compiled import h200s, needs_pjrt, whole_program_for_h200
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

import ferrum_jax

SIZE = Size(8, 8, 4, 16)
BY_NAME = {case.name: case for case in CASES}
T, H, HEAD, NONE = P("d"), P(None, "d"), P(None, None, "d"), P()

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

# Layouts in which nothing is gathered: op, whether under vmap, the operands' specs, the mesh, the collectives of its
# values, and whether its gradients too gather nothing (a gradient to replicated rows needs every token).
LAYOUTS = [
    ("moe_combine", False, (NONE, T, T), EXPLICIT, [], False),
    ("moe_combine", False, (H, NONE, NONE), AUTO, [], True),
    ("moe_combine", True, (T, T, T), AUTO, [], True),
    ("moe_combine-repeated", True, (HEAD, NONE, NONE), EXPLICIT, [], True),
    ("moe_combine_cotangents", False, (H, H, NONE, NONE), AUTO, ["all-reduce"], True),
    ("moe_combine_cotangents", True, (T, T, T, T), EXPLICIT, [], True),
    ("moe_dispatch", True, (T, T), AUTO, [], True),
    ("weighted_sum_batched", False, (T, T), EXPLICIT, [], True),
    ("weighted_sum_batched", False, (HEAD, NONE), AUTO, [], True),
    ("grouped_matmul", False, (NONE, HEAD, NONE, NONE, NONE), EXPLICIT, [], True),
    ("grouped_matmul-pair_ids", False, (H, H, NONE, NONE, NONE), AUTO, ["all-reduce"], True),
    ("moe_plan", True, (T,), AUTO, [], False),
]


def collectives(program):
    names = "all-gather|all-to-all|reduce-scatter|all-reduce|collective-permute"
    return re.findall(rf"= .*? ({names})(?:-start)?\(", program)


def with_collectives(f, *args):
    compiled = jax.jit(f).lower(*args).compile()
    return compiled(*args), collectives(compiled.as_text())


@pytest.mark.parametrize(("name", "mapped", "specs", "kind", "collected", "also_gradients"), LAYOUTS)
def test_shards_are_computed_where_they_are(name, mapped, specs, kind, collected, also_gradients):
    case, mesh = BY_NAME[name], mesh_of(4, kind)
    slices = [list(finite_args(case, rng(name, i), SIZE)) for i in range(4 if mapped else 1)]
    for args in slices if name.startswith("grouped") else []:
        args[1] = np.pad(args[1], ((0, 0), (0, 0), (0, -args[1].shape[2] % 4)))
    shared = {1} if name == "grouped_matmul" and mapped else set()
    args = [np.stack(a) if mapped and i not in shared else a[0] for i, a in enumerate(zip(*slices, strict=True))]
    run = functools.partial(case.results, size=SIZE)
    f = jax.vmap(run, [None if i in shared else 0 for i in range(len(args))]) if mapped else run

    def loss(*args):
        return sum(jnp.sum(jnp.sin(r)) for r in f(*args) if jnp.issubdtype(r.dtype, jnp.floating))

    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
    results, found = with_collectives(f, *placed)
    assert found == collected
    want = f(*args)
    if also_gradients:
        gradients, found = with_collectives(jax.grad(loss, case.floats), *placed)
        assert set(found) <= {"all-reduce"}
        results, want = (*results, *gradients), (*want, *jax.grad(loss, case.floats)(*args))
    for g, w in zip(results, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_added_across_devices_in_float32(transposed):
    """Each device's part of the sum is beyond float16's range; the sum is not."""
    tables = ferrum_jax.moe_plan(np.array([[0]]), 1, 1)
    x, w = np.full((1, 8), 200, np.float16), np.full((1, 8, 8), 200, np.float16)
    x[:, 4:] = -200

    def product(x, w):
        return ferrum_jax.grouped_matmul(x, w, tables, preferred_element_type="float16")

    def cotangent_of_x(g, w):
        (dx,) = jax.vjp(lambda x: product(x, w), jnp.zeros_like(g))[1](g)
        return dx

    specs = P(None, "d"), P(None, None, "d") if transposed else P(None, "d")
    placed = [jax.device_put(a, NamedSharding(mesh_of(2), s)) for a, s in zip((x, w), specs, strict=True)]
    result, found = with_collectives(cotangent_of_x if transposed else product, *placed)
    assert found == ["all-reduce"]
    np.testing.assert_array_equal(result, np.zeros((1, 8)))


def test_two_axes_and_a_mesh_that_is_not_the_results():
    """Rows by width and tokens by count at once; a second mesh over the same devices in one program."""
    (rows, pairs, weights) = finite_args(BY_NAME["moe_combine"], rng("two"), SIZE)
    mesh = jax.make_mesh((2, 2), ("t", "h"), axis_types=(AUTO, AUTO))
    specs = P(None, "h"), P("t"), P("t")
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((rows, pairs, weights), specs, strict=True)]
    got, found = with_collectives(ferrum_jax.moe_combine, *placed)
    assert (got.sharding.spec, found) == (P("t", "h"), [])
    f = jax.jit(ferrum_jax.moe_combine, out_shardings=NamedSharding(mesh_of(4), P("d")))
    want = ferrum_jax.moe_combine(rows, pairs, weights)
    for result in (got, f(*placed)):
        np.testing.assert_allclose(result, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "mapped", "specs", "kind"),
    [
        ("route_topk_softmax", False, (T,), AUTO),
        ("route_topk_softmax", True, (T,), EXPLICIT),
        ("grouped_matmul", True, (T, NONE, T, T, T), AUTO),
    ],
)
def test_what_xla_may_gather_has_the_same_values(name, mapped, specs, kind):
    case, mesh = BY_NAME[name], mesh_of(4, kind)
    args = finite_args(case, rng(name), SIZE)
    args = [np.stack([a] * 4) if mapped and s != NONE else a for a, s in zip(args, specs, strict=True)]
    run = functools.partial(case.results, size=SIZE)
    f = jax.vmap(run, [None if s == NONE else 0 for s in specs]) if mapped else run
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]
    for got, want in zip(jax.jit(f)(*placed), f(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_any_number_of_devices():
    slots, weights = rng("n").normal(size=(24, 3, 4)).astype(np.float32), np.ones((24, 3), np.float32)
    for devices in (3, 6, 8):
        placed = [jax.device_put(a, NamedSharding(mesh_of(devices), P("d"))) for a in (slots, weights)]
        got, found = with_collectives(ferrum_jax.weighted_sum_batched, *placed)
        assert found == []
        np.testing.assert_allclose(got, slots.sum(1), rtol=1e-5, atol=1e-6)


def test_programs_without_devices_and_exported_ones():
    f = jax.jit(lambda x: tuple(ferrum_jax.route_topk_softmax(x, 2)))
    logits = rng("e").normal(size=(8, 6)).astype(np.float32)
    placed = jax.device_put(logits, NamedSharding(mesh_of(4), P("d")))
    abstract = NamedSharding(AbstractMesh((4,), ("d",), axis_types=(AUTO,)), P("d"))
    for x in (placed, jax.ShapeDtypeStruct((8, 6), np.float32, sharding=abstract)):
        exported = export.export(f)(x) if x is placed else export.export(f, platforms=("cpu",))(x)
        for g, w in zip(export.deserialize(exported.serialize()).call(placed), f(logits), strict=True):
            np.testing.assert_array_equal(g, w)


@needs_pjrt
def test_kernels_run_inside_shard_map_and_nowhere_else_on_several_gpus():
    """Triton's custom call has the shapes of one device's part."""
    mesh = jax.sharding.Mesh(np.array(h200s(4)), ("d",), axis_types=(AUTO,))
    x = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("d")))

    def route(x, implementation=None):
        return ferrum_jax.route_topk_softmax(x, 2, implementation=implementation).expert_weights

    program, _ = whole_program_for_h200(jax.shard_map(route, mesh=mesh, in_specs=P("d"), out_specs=P("d")), x)
    assert re.findall(r"f32\[([\d,]+)\][^=]*custom-call\(.*triton_kernel_call", program) == ["128,2"]
    assert collectives(program) == []
    assert "triton_kernel_call" not in whole_program_for_h200(route, x)[0]
    with pytest.raises(NotImplementedError, match=r"runs on 4 devices .*: call it inside jax.shard_map"):
        whole_program_for_h200(functools.partial(route, implementation="triton"), x)


INDEPENDENT = {  # a function; its arguments' shapes, dtypes and specs; the shape of each device's result
    "routing of divided tokens": (
        lambda x: ferrum_jax.route_topk_softmax(x, 2).expert_weights,
        [((512, 128), "bfloat16", T)],
        "128,2",
    ),
    "combine of divided tokens": (
        ferrum_jax.moe_combine,
        [((64, 256), "bfloat16", NONE), ((512, 2), "int32", T), ((512, 2), "float32", T)],
        "128,256",
    ),
    "combine of a divided H": (
        functools.partial(ferrum_jax.moe_combine, implementation="triton"),
        [((64, 512), "bfloat16", H), ((64, 2), "int32", NONE), ((64, 2), "float32", NONE)],
        "64,128",
    ),
    "dispatch of divided rows": (
        functools.partial(ferrum_jax.moe_dispatch, implementation="triton"),
        [((64, 256), "bfloat16", NONE), ((512,), "int32", T)],
        "128,256",
    ),
    "dispatch of divided leading axes": (
        functools.partial(ferrum_jax.moe_dispatch, implementation="triton"),
        [((8, 64, 256), "bfloat16", T), ((8, 128), "int32", T)],
        "2,128,256",
    ),
    "weighted sum of divided rows": (
        functools.partial(ferrum_jax.weighted_sum_batched, implementation="triton"),
        [((64, 2, 512), "bfloat16", HEAD), ((64, 2), "float32", NONE)],
        "64,128",
    ),
    "product of divided columns": (
        lambda x, w, ids: ferrum_jax.grouped_matmul(x, w, ferrum_jax.moe_align_block_size(ids, 8, 16)),
        [((128, 256), "bfloat16", NONE), ((8, 256, 512), "bfloat16", HEAD), ((64, 2), "int32", NONE)],
        "128,128",
    ),
}


@needs_pjrt
@pytest.mark.parametrize("name", INDEPENDENT)
def test_single_ops_run_on_their_shards_in_an_explicit_mesh(name):
    f, arrays, shape = INDEPENDENT[name]
    mesh = jax.sharding.Mesh(np.array(h200s(4)), ("d",), axis_types=(EXPLICIT,))
    args = [jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, spec)) for s, dtype, spec in arrays]
    program, _ = whole_program_for_h200(f, *args)
    assert shape in re.findall(r"(?:f32|bf16)\[([\d,]+)\][^=]*custom-call\(.*triton_kernel_call", program)
    assert collectives(program) == []


def test_interpreted_kernels_run_on_shards():
    """Values and gradients of rows whose tokens an Explicit mesh divides."""
    r = rng("interpreted")
    slots, weights = jnp.float32(r.normal(size=(8, 2, 16))), jnp.float32(r.normal(size=(8, 2)))

    def loss(*args):
        return jnp.sum(jnp.sin(ferrum_jax.weighted_sum_batched(*args, implementation="triton")))

    with ferrum_jax.interpret_kernels():
        want = jax.jit(jax.value_and_grad(loss, (0, 1)))(slots, weights)
        with jax.set_mesh(mesh_of(4, EXPLICIT)):
            placed = [jax.device_put(a, T) for a in (slots, weights)]
            assert ferrum_jax.which(loss, *placed).implementation == "triton"
            got = jax.jit(jax.value_and_grad(loss, (0, 1)))(*placed)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_which_says_where_kernels_run():
    x = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)
    ask = functools.partial(ferrum_jax.which, platform="cuda", device_kind="NVIDIA H200")

    def route(x):
        return ferrum_jax.route_topk_softmax(x, 2).expert_weights

    with jax.set_mesh(mesh_of(4, EXPLICIT)):
        assert ask(route, x.update(sharding=P("d"))).implementation == "triton"
        choice = ask(route, x.update(sharding=P(None, "d")))
        assert choice.implementation == "xla"
        assert "runs on 4 devices under plain jit" in choice.passed_over["triton"]


def test_which_says_where_kernels_do_not_run():
    mesh = mesh_of(4, AUTO)
    x = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("d")))

    def route(x):
        return ferrum_jax.route_topk_softmax(x, 2).expert_weights

    ask = functools.partial(ferrum_jax.which, platform="cuda", device_kind="NVIDIA H200")
    many = "runs on 4 devices under plain jit"
    for context in (jax.set_mesh(mesh), contextlib.nullcontext()):  # the mesh of the context, and the argument's
        with context:
            choice = ask(route, x)
        assert choice.implementation == "xla"
        assert many in choice.passed_over["triton"]
    with jax.set_mesh(mesh):
        inside = ask(jax.shard_map(route, in_specs=P("d"), out_specs=P("d")), x)
    assert not any(many in reason for reason in inside.passed_over.values())
