"""ragged_dot beyond what every op is tested for: hostile sizes and offsets, poison, meshes, its kernel."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DTYPES, Size, groups_args, ragged_args, rng, rows
from compiled import for_h200, h200s, needs_pjrt, needs_plugin, whole_program_for_h200
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_partitioning import collectives, with_collectives

import ferrum_jax
from ferrum_jax.ops import ragged

pytestmark = pytest.mark.tables

of = jax.ShapeDtypeStruct

M, G, H, N = 9, 3, 5, 4
MOST = 2**31 - 1
SIZES = {
    "all rows": (3, 2, 4),
    "no rows": (0, 0, 0),
    "the first has all": (9, 0, 0),
    "one has all": (0, 9, 0),
    "the last has all": (0, 0, 9),
    "rows are left": (1, 1, 1),
    "negative": (-2, 3, 1),
    "negative in between": (3, -1, 4),
    "negative only": (-5, -5, -(2**31)),
    "past the rows": (4, 5, 3),
    "one past the rows": (20, 1, 1),
    "past int32": (2, MOST, MOST),
}


def check(run, sizes, *offset, dtype="float32", transposed=False, shape=(M, G, H, N)):
    """Values and both gradients, with NaN in all that must not be read."""
    num_rows, groups, width, columns = shape
    r = rng(sizes, offset)
    lhs, rhs = rows(r, (num_rows, width), dtype), rows(r, (groups, width, columns), dtype)
    g = rows(r, (num_rows, columns), dtype)
    owner = oracle.group_of_row(sizes, *(offset or [0]), num_rows=num_rows, num_groups=groups)
    lhs[owner < 0] = g[owner < 0] = np.nan
    rhs[~np.isin(np.arange(groups), owner)] = np.nan
    given = np.ascontiguousarray(rhs.swapaxes(1, 2)) if transposed else rhs
    out, dlhs, drhs = run(lhs, given, g, np.array(sizes, np.int32), *map(np.int32, offset))
    oracle.assert_matches([out], oracle.ragged_dot(lhs, rhs, sizes, *offset))
    drhs = jnp.swapaxes(drhs, 1, 2) if transposed else drhs
    oracle.assert_matches([dlhs, drhs], oracle.ragged_dot_grads(lhs, rhs, sizes, *offset, g=g))
    assert not np.any(np.asarray(drhs, np.float32)[~np.isin(np.arange(groups), owner)])


def with_gradients(**kwargs):
    def run(lhs, rhs, g, sizes, offset=None):
        def f(lhs, rhs):
            return ferrum_jax.ragged_dot(lhs, rhs, sizes, group_offset=offset, **kwargs)

        out, vjp = jax.vjp(f, lhs, rhs)
        return out, *vjp(g)

    return jax.jit(run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_group_sizes(dtype, transposed, implementation):
    run = with_gradients(transpose_rhs=transposed, implementation=implementation)
    some = ["negative in between"] if implementation == "pallas" else SIZES  # whose interpreter is slow
    for sizes in some:
        check(run, SIZES[sizes], dtype=dtype, transposed=transposed)


def test_group_sizes_that_add_up_past_2_to_the_32():
    """Of as many rows as int32 can count. A table of so many would fill the memory, so only the offsets are made."""
    sizes = jnp.array([[2, MOST, MOST, MOST, 5], [MOST, 0, MOST, MOST, MOST]])
    got = ragged._group_offsets(sizes, MOST)
    np.testing.assert_array_equal(got, [[0, 2, MOST, MOST, MOST, MOST], [0, *[MOST] * 5]])


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets(transposed, implementation):
    """The groups before, behind and among those that there are, and none of them."""
    run = with_gradients(transpose_rhs=transposed, implementation=implementation)
    for offset in (0, 1, 2, -1, 4, -3, 5, -4, MOST, -(2**31)):
        for sizes in ((2, 1, 3, 0, 2), (-1, 4, 0, 9, 1)):
            check(run, sizes, offset, transposed=transposed)


@pytest.mark.pallas
@pytest.mark.interpreted
def test_pallas_takes_rows_in_between():
    with ferrum_jax.interpret_kernels():
        check(with_gradients(implementation="pallas"), (2, 1, 3, 0, 2), 1, dtype="bfloat16")


def test_the_table_of_any_offset(implementation):
    """Blocks of 2, so that groups have several."""
    how = {"num_rows": 9, "num_groups": 3, "block_size": 2}
    run = jax.jit(functools.partial(ragged.align_groups, **how, implementation=implementation))
    sizes = np.array([5, 1, -1, 3, 2], np.int32)
    for offset in (0, 1, 3, 5, MOST, -1, -3, -(2**31)):
        oracle.assert_matches(run(sizes, np.int32(offset)), oracle.align_groups(sizes, offset, **how))


@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (1, 1, 1, 1), (40, 1, 7, 3), (7, 4, 3, 0)], ids=str)
def test_no_rows_one_group_no_columns(shape, implementation):
    run = with_gradients(implementation=implementation)
    check(run, (shape[0] - 1, *[1] * (shape[1] - 1)), shape=shape)


@pytest.mark.parametrize("offset", [False, True])
def test_blocks_of_every_size(offset, implementation):
    """Block sizes of 16 and 128, many groups, and groups of several blocks."""
    for size in (Size(150, 3, 2, 20), Size(40, 40, 1, 12)):
        args = ragged_args(rng("blocks", size), size, "bfloat16", offset)
        out = ferrum_jax.ragged_dot(*args[:3], group_offset=[*args, None][3], implementation=implementation)
        oracle.assert_matches([out], oracle.ragged_dot(*args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_jax(dtype):
    """Values and gradients, as jax.lax.ragged_dot has them."""
    lhs, rhs = rows(rng("lhs"), (M, H), dtype), rows(rng("rhs"), (G, H, N), dtype)
    for sizes in (SIZES["all rows"], SIZES["rows are left"], SIZES["one has all"]):
        runs = [
            jax.jit(lambda *a, f=f, s=sizes: jax.vjp(lambda *a: f(*a, jnp.array(s)), *a))
            for f in (ferrum_jax.ragged_dot, jax.lax.ragged_dot)
        ]
        (got, vjp), (want, lax_vjp) = (run(lhs, rhs) for run in runs)
        for mine, theirs in zip((got, *vjp(got)), (want, *lax_vjp(got)), strict=True):
            assert mine.dtype == theirs.dtype
            eps = float(jnp.finfo(dtype).eps)  # both round once, and from float32 sums in another order
            np.testing.assert_allclose(*(oracle.f64(x) for x in (mine, theirs)), rtol=2 * eps, atol=20 * eps)


def test_types_and_precision():
    """An integer type of any width; sizes of 64 bits are limited, not cut; a preferred type; TF32 where allowed."""
    lhs, rhs = rows(rng("lhs"), (M, H), "bfloat16"), rows(rng("rhs"), (G, H, N), "bfloat16")
    want = ferrum_jax.ragged_dot(lhs, rhs, [2, 9, 0])
    for sizes in (np.array([2, 2**40, 2**62]), np.array([2, 2**63, 2**63], np.uint64), np.array([2, 100, 100], "u1")):
        np.testing.assert_array_equal(ferrum_jax.ragged_dot(lhs, rhs, sizes), want)
    assert not np.any(ferrum_jax.ragged_dot(lhs, rhs, np.array([-(2**40) + 5] * 3)))
    assert not np.any(ferrum_jax.ragged_dot(lhs, rhs, [9, 9, 9], group_offset=np.int64(2**32)))
    wide = ferrum_jax.ragged_dot(lhs, rhs, [2, 9, 0], preferred_element_type="float32")
    oracle.assert_matches([wide], oracle.ragged_dot(lhs, rhs, [2, 9, 0]))
    jaxpr = jax.make_jaxpr(functools.partial(ferrum_jax.ragged_dot, precision="tensorfloat32"))
    assert "precision=default" in str(jaxpr(np.float32(lhs), np.float32(rhs), np.array([2, 9, 0])))


def dense(lhs, rhs, owner):
    """The same with a matrix for every row."""
    return jnp.where((owner >= 0)[:, None], jnp.einsum("mh,mhn->mn", lhs, rhs[owner]), 0)


@pytest.mark.parametrize("transposed", [False, True])
def test_second_derivatives(transposed):
    """Mixed ones too, which jax.lax.ragged_dot does not have."""
    sizes, offset = (2, 1, 3, 0, 2), 1
    owner = oracle.group_of_row(sizes, offset, num_rows=M, num_groups=G)
    lhs, rhs = rows(rng("lhs"), (M, H), "float32"), rows(rng("rhs"), (G, H, N), "float32")

    def mine(lhs, rhs):
        rhs = rhs.swapaxes(1, 2) if transposed else rhs
        return ferrum_jax.ragged_dot(lhs, rhs, jnp.array(sizes), group_offset=offset, transpose_rhs=transposed)

    def every(f):
        def loss(lhs, rhs):
            return jnp.sum(jnp.sin(f(lhs, rhs)))

        def slope(lhs, rhs):
            return sum(jnp.sum(jnp.cos(g)) for g in jax.grad(loss, (0, 1))(lhs, rhs))

        return jax.jit(lambda *a: (jax.hessian(loss, (0, 1))(*a), jax.grad(slope, (0, 1))(*a)))

    got, want = every(mine)(lhs, rhs), every(functools.partial(dense, owner=owner))(lhs, rhs)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_remat_in_a_scan_of_48_layers():
    owner = oracle.group_of_row((2, 3, 3), 0, num_rows=M, num_groups=G)
    x, w = rows(rng("x"), (M, H), "float32"), 0.1 * rows(rng("w"), (48, G, H, H), "float32")

    def loss(f, x, w):
        step = jax.checkpoint(lambda x, w: (x + jnp.tanh(f(x, w)), None))
        return jnp.sum(jax.lax.scan(step, x, w)[0] ** 2)

    mine = functools.partial(ferrum_jax.ragged_dot, group_sizes=jnp.array([2, 3, 3]))
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1)))(x, w)
        for f in (mine, functools.partial(dense, owner=owner))
    )
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


# ---- meshes


def on_mesh(*kinds):
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=kinds)


EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
BOTH, GATHERED, SUM = (EXPLICIT, EXPLICIT), "all-gather", "all-reduce"
LAYOUTS = {  # the axes' kinds; the shardings of lhs, rhs and sizes; and the collectives of the values
    "one axis": (BOTH, P("a"), P(), P(), []),
    "two axes": (BOTH, P(("b", "a")), P(), P(), []),
    "matrices and sizes divided likewise": (BOTH, P("a"), P("a", None, "b"), P("a"), [GATHERED] * 2),
    "the sum divided too": (BOTH, P("a", "b"), P(None, "b", "a"), P("b"), [GATHERED] * 2 + [SUM]),
    "beside an Auto axis": ((EXPLICIT, AUTO), P("a"), P(), P(), []),
    "groups": (BOTH, P(), P("a"), P(), [SUM]),
    "groups over two axes": (BOTH, P(), P(("b", "a")), P(), [SUM]),
    "rows and groups": (BOTH, P("a"), P("b"), P(), [SUM]),
    "the sum": (BOTH, P(None, "a"), P(None, "a"), P(), [SUM]),
    "the sum in the matrices": (BOTH, P(), P(None, "b"), P(), [SUM]),
    "columns": (BOTH, P(), P(None, None, "a"), P(), []),
    "rows and columns": (BOTH, P("a"), P(None, None, "b"), P(), []),
    "groups and columns": (BOTH, P(), P("b", None, "a"), P(), [SUM]),
    "groups and the sum": (BOTH, P(None, "a"), P("b", "a"), P(), [SUM]),
}


MIXED = ("one axis", "the sum divided too", "beside an Auto axis", "groups", "rows and columns")
USUAL = {
    *((name, "plain") for name in MIXED),
    ("the sum divided too", "transposed"),
    ("groups and columns", "of a stack"),
}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[] if (name, form) in USUAL else [pytest.mark.full])
        for name in LAYOUTS
        for form in ("plain", "transposed", "of a stack")
    ],
)
def test_divided_in_an_explicit_mesh(name, form):
    """Values, gradients and second derivatives, the collectives, and the result divided as lhs's rows."""
    kinds, of_lhs, of_rhs, of_sizes, expected = LAYOUTS[name]
    size = Size(8, 4, 2, 6)
    lhs, rhs, sizes, offset = ragged_args(rng(name), size, "float32", offset=True)
    lhs, rhs, sizes = np.nan_to_num(lhs), np.nan_to_num(rhs)[..., :8], np.pad(sizes, (0, 1))
    transposed = form == "transposed"
    if transposed:
        rhs, of_rhs = rhs.swapaxes(1, 2), P(*[(*of_rhs, None, None, None)[i] for i in (0, 2, 1)])

    def run(lhs, rhs, sizes):
        if form == "of a stack":
            rhs = ferrum_jax.LayerOf(rhs, 1)
        return ferrum_jax.ragged_dot(lhs, rhs, sizes, group_offset=offset, transpose_rhs=transposed)

    def every(lhs, rhs, sizes):
        gradient = jax.grad(lambda *a: jnp.sum(jnp.sin(run(*a, sizes))), (0, 1))
        slope = jax.grad(lambda *a: sum(jnp.sum(jnp.cos(g)) for g in gradient(*a)), (0, 1))
        return run(lhs, rhs, sizes), *gradient(lhs, rhs), *slope(lhs, rhs)

    if form == "of a stack":
        rhs, of_rhs = np.stack([np.full_like(rhs, np.nan), rhs]), P(None, *of_rhs)
    want = every(lhs, rhs, sizes)
    with jax.set_mesh(on_mesh(*kinds)):
        specs = of_lhs, of_rhs, of_sizes
        placed = [jax.device_put(x, spec) for x, spec in zip((lhs, rhs, sizes), specs, strict=True)]
        got = jax.jit(every)(*placed)
        assert jax.typeof(got[0]).sharding.spec[0] == (*of_lhs, None)[0]
        assert jax.typeof(got[2]).sharding.spec == jax.typeof(placed[1]).sharding.spec
        assert with_collectives(run, *placed)[1] == expected
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("specs", [(P("a"), P()), (P(), P("a")), (P(None, "a"), P(None, "a"))], ids=str)
def test_sixteen_bits_on_a_mesh_with_idle_axes(specs):
    """XLA:CPU would end the process if the other axes were left to the compiler."""
    lhs, rhs, sizes = ragged_args(rng("idle"), Size(8, 4, 2, 8), "bfloat16")
    lhs, rhs = (jnp.nan_to_num(x) for x in (lhs, rhs))
    gradient = jax.grad(lambda *a: jnp.sum(ferrum_jax.ragged_dot(*a, sizes).astype(jnp.float32)), (0, 1))
    want = ferrum_jax.ragged_dot(lhs, rhs, sizes), *gradient(lhs, rhs)
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("a", "b", "c"))):
        args = [jax.device_put(x, spec) for x, spec in zip((lhs, rhs), specs, strict=True)]
        got = jax.jit(lambda *a: (ferrum_jax.ragged_dot(*a, sizes), *gradient(*a)))(*args)
    for g, w in zip(got, want, strict=True):
        oracle.assert_near(g, np.asarray(w, np.float32), "bfloat16")


def test_a_device_multiplies_its_own_rows():
    """Eagerly, without set_mesh. Nothing is gathered; the matrices' gradient is added up."""
    mesh = on_mesh(EXPLICIT, EXPLICIT)
    lhs, rhs, sizes = ragged_args(rng("own"), Size(16, 3, 1, 6), "float32")
    args = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((lhs, P(("a", "b"))), (rhs, P()), (sizes, P()))]
    oracle.assert_matches([ferrum_jax.ragged_dot(*args)], oracle.ragged_dot(lhs, rhs, sizes))
    assert with_collectives(ferrum_jax.ragged_dot, *args)[1] == []
    lhs, rhs = (jnp.nan_to_num(x) for x in args[:2])
    gradient = jax.grad(lambda *a: jnp.sum(ferrum_jax.ragged_dot(*a, args[2])), (0, 1))
    assert set(with_collectives(gradient, lhs, rhs)[1]) == {"all-reduce"}
    exported = jax.export.export(jax.jit(gradient))(lhs, rhs)
    got = jax.export.deserialize(exported.serialize()).call(lhs, rhs)
    for g, w in zip(got, jax.jit(gradient)(lhs, rhs), strict=True):
        np.testing.assert_array_equal(g, w)


def test_divided_rows_in_a_batch_and_inside_shard_map():
    """vmap over what is divided, of each operand alone; and one axis manual, the other one Explicit."""
    mesh = on_mesh(EXPLICIT, EXPLICIT)
    size = Size(8, 4, 1, 6)
    batches = [[np.nan_to_num(x) for x in ragged_args(rng("b", i), size, "float32", offset=True)] for i in range(2)]

    def run(lhs, rhs, sizes, offset):
        return ferrum_jax.ragged_dot(lhs, rhs, sizes, group_offset=offset)

    def loss(lhs, rhs, sizes, offset):
        return jnp.sum(jnp.sin(run(lhs, rhs, sizes, offset)))

    with jax.set_mesh(mesh):
        for i in range(4):
            args = [np.stack([b[j] for b in batches]) if i == j else batches[0][j] for j in range(4)]
            axes = [0 if i == j else None for j in range(4)]
            args[0] = jax.device_put(args[0], P(None, "a") if i == 0 else P("a"))
            got = jax.jit(jax.vmap(run, axes))(*args)
            for b, out in zip(batches, got, strict=True):
                want = run(*(b[j] if i == j else batches[0][j] for j in range(4)))
                np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)
        lhs = np.stack([b[0] for b in batches])
        inside = jax.shard_map(
            lambda lhs, *rest: jax.lax.psum(loss(lhs[0], *rest), "a"),
            in_specs=(P("a"), P(), P(), P()),
            out_specs=P(),
            axis_names={"a"},
            check_vma=True,
        )
        got = jax.jit(jax.grad(inside, (0, 1)))(jax.device_put(lhs, P("a", "b")), *batches[0][1:])
    want = jax.grad(lambda lhs, *rest: sum(loss(x, *rest) for x in lhs), (0, 1))(lhs, *batches[0][1:])
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


# ---- kernels


@pytest.mark.parametrize("groups", [5, pytest.param(70, marks=pytest.mark.interpreted)])
def test_the_kernel_equals_xla(groups, monkeypatch):
    """Batches with hostile sizes and offsets; with many groups also in portions of 16."""
    from ferrum_jax.kernels import triton

    kernel = triton.interpreted("tables")
    (usual,) = kernel.tiles.COUNTING
    r = rng("kernel", groups)
    sizes = r.integers(-2, 9, size=(12, groups)).astype(np.int32)
    sizes[::4, 1] = MOST
    offsets = r.integers(-groups, groups + 1, size=12).astype(np.int32)
    offsets[:2] = MOST, -(2**31)
    for bins in (usual.bins, 16):
        monkeypatch.setattr(kernel.tiles, "COUNTING", (dataclasses.replace(usual, bins=bins, filled=32),))
        how = {"num_rows": 4 * groups, "num_groups": groups - 2, "block_size": 4}
        for given in (offsets, offsets[3:4]):
            want = ragged.align_groups(sizes, given, **how)
            for g, w in zip(kernel.align_groups(sizes, given, **how), want, strict=True):
                np.testing.assert_array_equal(g, w)


@needs_plugin
@pytest.mark.parametrize("groups", [128, pytest.param(4096, marks=pytest.mark.compiled)])
def test_code_for_an_h200(groups):
    """The table is one launch, without spills, also for more groups than a program counts at a time."""
    args = [of((2048, 256), jnp.bfloat16), of((8, 256, 512), jnp.bfloat16), of((groups,), jnp.int32), of((), jnp.int32)]
    program = for_h200(lambda x, w, s, o: ferrum_jax.ragged_dot(x, w, s, group_offset=o), *args)
    assert len(program.launches) == 3
    (code,) = (code for code in program.codes if "place_groups" in code.name)
    assert code.spilled == 0, code.registers


@needs_pjrt
@pytest.mark.compiled
@pytest.mark.parametrize(
    ("specs", "result", "expected"),
    [
        ((P("d"), P()), "bf16[128,32]", []),
        ((P(), P("d")), "bf16[512,32]", ["all-reduce"]),
        ((P(None, "d"), P(None, "d")), "f32[512,32]", ["all-reduce"]),
        ((P(), P(None, None, "d")), "bf16[512,8]", []),
    ],
    ids=["rows", "groups", "sum", "columns"],
)
def test_divided_products_take_kernels(specs, result, expected):
    """On four H200s, each with the shapes of its own part."""
    mesh = jax.sharding.Mesh(np.array(h200s(4)), ("d",), axis_types=(EXPLICIT,))
    x, w, sizes = (
        of(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((512, 64), "bfloat16", specs[0]),
            ((8, 64, 32), "bfloat16", specs[1]),
            ((8,), "int32", P()),
        )
    )
    product = functools.partial(ferrum_jax.ragged_dot, implementation="triton")
    program, _ = whole_program_for_h200(product, x, w, sizes)
    assert re.findall(r"((?:bf16|f32)\[[\d,]+\])[^=]*custom-call\(.*triton_kernel_call", program) == [result]
    assert collectives(program) == expected


def test_the_table_is_the_library_s_own():
    sizes, offset = groups_args(rng("own"), Size(9, 4, 2, 1))
    tables = ragged.align_groups(sizes, offset * 0, num_rows=18, num_groups=7, block_size=4)
    routing = ferrum_jax.MoeRouting(*tables, kind="packed", num_experts=7, block_size=4)
    assert ferrum_jax.check_routing(routing, num_pairs=18) == []


@pytest.mark.parametrize("transposed", [False, True])
def test_a_symbolic_number_of_rows(transposed):
    (rows,) = export.symbolic_shape("M")
    w, sizes = rng("symbolic", transposed).normal(size=(3, 4, 4)).astype(np.float32), np.array([2, 0, 3])
    f = jax.jit(functools.partial(ferrum_jax.ragged_dot, transpose_rhs=transposed))
    given = jax.ShapeDtypeStruct((rows, 4), np.float32), w, sizes
    exported = export.export(f, platforms=("cpu", "cuda"), disabled_checks=ferrum_jax.export_checks())(*given)
    for n in (1, 9):
        x = rng("symbolic rows", n).normal(size=(n, 4)).astype(np.float32)
        np.testing.assert_allclose(exported.call(x, w, sizes), f(x, w, sizes), rtol=1e-5, atol=1e-6)
