"""The grouped products on wgmma: interpreted with race detection, and compiled for an H200 at real models' shapes."""

import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Size, grouped_args, grouped_matmul, rng, rows
from compiled import needs_pjrt, needs_plugin, on_h200, whole_program_for_h200
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from meshes import mesh_of
from shapes import PRODUCTS
from test_grouped import DEAD, check, dead_args

import ferrum_jax
from ferrum_jax.kernels import pallas
from ferrum_jax.kernels.pallas import grouped, grouped_tables, tiles
from ferrum_jax.kernels.pallas.activations import ACTIVATIONS
from ferrum_jax.ops import grouped as meaning

of = jax.ShapeDtypeStruct


@pytest.fixture
def interpreting():
    with ferrum_jax.interpret_kernels():
        yield


@pytest.mark.interpreted
@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize(
    ("size", "dtype", "pair_ids"),
    [
        (Size(9, 3, 2, 70, 8), "bfloat16", False),  # runs of rows from anywhere, rows and columns no whole tiles
        (Size(7, 3, 3, 20, 2), "float16", True),  # gathered rows, blocks below the least tile
    ],
    ids=str,
)
def test_values_and_gradients(size, dtype, pair_ids):
    check(grouped_args(rng("w", size), size, dtype, pair_ids), size.K if pair_ids else 1, "pallas")


@pytest.mark.interpreted
@pytest.mark.parametrize("tile", tiles.PRODUCT["sm_90", "bfloat16"].values(), ids=str)
def test_blocks_beyond_a_tile_many_columns_and_float32_results(tile):
    """One expert's rows in two tiles and more; more columns than one tile; experts without rows."""
    r = rng("large")
    routing = ferrum_jax.moe_plan(np.full((200, 1), 1, np.int32), 3, 256, implementation="xla")
    lhs, rhs = rows(r, (200, 64), "bfloat16"), rows(r, (3, 64, 320), "bfloat16")
    rhs[[0, 2]] = np.nan
    tables = routing.sorted_token_ids, routing.block_ids, routing.total_tokens_post_pad
    product = pallas.interpreted("grouped").grouped_matmul
    settings = {"dtype": "float32", "packed_rows": False, "precision": "highest", "tile": tile}
    (got,) = product(lhs, rhs, *tables, None, None, top_k=1, **settings)
    want = np.asarray(lhs, np.float64) @ np.asarray(rhs[1], np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.interpreted
@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize("again", [False, True])
def test_blocks_of_no_expert(again):
    check(dead_args(DEAD[-1], again), 1, "pallas")


@pytest.mark.interpreted
@pytest.mark.usefixtures("interpreting")
def test_a_batch_and_tables_made_by_hand():
    """Runs, a run that is cut, scattered slots, a dead block, and rows that nobody names, over mapped slices."""
    r = rng("hand")
    slots = np.array(
        [[9, 10, 11, 12, 0, 1, -1, -1, 3, 5, -1, 4], [0, 1, 2, 3, 8, 7, 99, 6, 4, 5, 9, 2**31 - 1]], np.int32
    )
    blocks, total = np.array([[0, 0, 2], [1, 2, -1]], np.int32), np.array([12, 12], np.int32)
    lhs, rhs = rows(r, (2, 13, 16), "bfloat16"), rows(r, (1, 3, 16, 24), "bfloat16")

    def both(name):
        def f(lhs, rhs):
            return grouped_matmul(lhs, rhs, slots, blocks, total, implementation=name)

        out, vjp = jax.vjp(f, lhs, rhs)
        return out, *vjp(out)

    for got, want in zip(both("pallas"), both("xla"), strict=True):
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=0.02, atol=0.02)


EPILOGUES = [
    ("silu", False, True, "bfloat16"),
    ("swiglu_oai", True, False, "float16"),
    *((a, True, True, "bfloat16") for a in ("swiglu_oai", "gelu_tanh")),
    *(pytest.param(a, True, True, "bfloat16", marks=pytest.mark.full) for a in ("silu", "gelu", "relu", "relu2")),
    (None, False, True, "float16"),
]


@pytest.mark.interpreted
@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize(("activation", "pair_ids", "weighted", "dtype"), EPILOGUES)
def test_epilogues(activation, pair_ids, weighted, dtype):
    """Columns of two tiles, the second not whole, and rows of which some are not named."""
    r, experts, top_k, width = rng("epilogue"), 3, 2 if pair_ids else 1, 192
    ids = r.integers(-1, experts, size=(9, 2)).astype(np.int32)
    routing = ferrum_jax.moe_plan(ids, experts, 8, pair_ids=pair_ids, implementation="xla")
    lhs, rhs = rows(r, (18 // top_k, 70), dtype), rows(r, (experts, 70, 2 * width if activation else width), dtype)
    args = lhs, rhs, r.normal(size=18).astype(np.float32) if weighted else np.ones(18, np.float32), *routing.routing
    settings = {"top_k": top_k, "activation": activation}
    weights = args[2] if weighted else None
    got = grouped_matmul(lhs, rhs, *routing.routing, row_weights=weights, implementation="pallas", **settings)
    if activation:
        oracle.assert_matches([got], oracle.grouped_matmul_activated(*args, **settings))
    else:
        (want,) = oracle.grouped_matmul(lhs, rhs, *routing.routing, top_k=top_k)
        oracle.assert_matches([got], [(want.value * args[2][:, None], want.size * abs(args[2][:, None]), 71)])


def loss(f, *args):
    return jnp.sum(jnp.sin(f(*args).astype(jnp.float32)))


def both_gradients(f):
    return jax.grad(functools.partial(loss, f), (0, 1))


def of_gradients(f, *args):
    return sum(jnp.sum(jnp.cos(g.astype(jnp.float32))) for g in both_gradients(f)(*args))


def repeated(f, x, matrices):
    """The product again and again, its results computed anew for the gradient."""

    def step(x, _):
        return jax.checkpoint(f)(x, matrices), None

    return jax.lax.scan(step, x, None, length=2)[0]


def sharded(f, x, matrices, axis_types):
    """The batch over as many devices as there are, up to two: by hand in an Auto mesh, by shardings in an Explicit."""
    mesh = mesh_of(min(2, jax.device_count()), axis_types)
    by_batch = jax.sharding.PartitionSpec("d")
    if axis_types == AxisType.Explicit:
        with jax.set_mesh(mesh):
            return jax.jit(jax.vmap(f, (0, None)))(jax.device_put(x, by_batch), matrices)
    run = jax.vmap(f, (0, None))
    return jax.shard_map(run, mesh=mesh, in_specs=(by_batch, jax.sharding.PartitionSpec()), out_specs=by_batch)(
        x, matrices
    )


# name -> a result of the product f, of x[2, P, H] and of matrices m[2, E, H, H]
TRANSFORMATIONS = {
    "jit": lambda f, x, m: jax.jit(f)(x[0], m[0]),
    "vmap of x": lambda f, x, m: jax.vmap(f, (1, None), 2)(jnp.moveaxis(x, 0, 1), m[0]),
    "vmap of the matrices": lambda f, x, m: jax.vmap(f, (None, -1))(x[0], jnp.moveaxis(m, 0, -1)),
    "vmap in vmap": lambda f, x, m: jax.vmap(jax.vmap(f, (0, None)), (None, 0))(x, m),
    "jvp": lambda f, x, m: jax.jvp(f, (x[0], m[0]), (x[1], m[1])),
    "grad": lambda f, x, m: both_gradients(f)(x[0], m[0]),
    "vmap of grad": lambda f, x, m: jax.vmap(both_gradients(f), (0, None))(x, m[0]),
    "grad of vmap": lambda f, x, m: both_gradients(jax.vmap(f, (0, None)))(x, m[0]),
    "grad of grad": lambda f, x, m: jax.grad(functools.partial(of_gradients, f), (0, 1))(x[0], m[0]),
    "remat in scan": lambda f, x, m: both_gradients(functools.partial(repeated, f))(x[0], m[0]),
    "shard_map": lambda f, x, m: both_gradients(functools.partial(sharded, f, axis_types=AxisType.Auto))(x, m[0]),
    "Explicit mesh": lambda f, x, m: sharded(f, x, m[0], AxisType.Explicit),
}


@pytest.mark.full
@pytest.mark.parametrize("where", [pytest.param(w, marks=getattr(pytest.mark, w)) for w in ("interpreted", "gpu")])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations(name, activation, where):
    """Of products that wgmma can multiply, which those of the tests of every op, in float32, are not."""
    routing = ferrum_jax.moe_plan(rng("t").integers(-1, 3, size=(5, 2)).astype(np.int32), 3, 8, implementation="xla")
    r = rng("transformed")
    height, width = (64, 128) if activation else (24, 24)
    x, matrices = rows(r, (2, 10, height), "bfloat16"), rows(r, (2, 3, height, width), "bfloat16") * 0.3

    def product(name, x, matrices):
        return ferrum_jax.grouped_matmul(x, matrices, routing, activation=activation, implementation=name)

    with ferrum_jax.interpret_kernels() if where == "interpreted" else contextlib.nullcontext():
        got, want = (
            jax.tree.leaves(TRANSFORMATIONS[name](functools.partial(product, by), x, matrices.astype(x.dtype)))
            for by in ("pallas", "xla")
        )
    for g, w in zip(got, want, strict=True):  # both store rows: up to two products and two of their gradients
        oracle.assert_near(g, w, "bfloat16", stored=8)


@pytest.mark.parametrize("width", [64, 192, 256, 320])
@pytest.mark.parametrize("top_k", [1, 2])
def test_what_is_stored_as_one_piece_of_memory_ends_with_its_row(width, top_k, monkeypatch):
    """Mosaic copies such a piece by addresses, past the row's end into the next; its interpreter does not."""
    args = grouped_args(rng("piece"), Size(5, 3, 2, 256, 8), "bfloat16", pair_ids=top_k == 2)
    copy, pieces = plgpu.copy_smem_to_gmem, []

    def spy(source, to, **kwargs):
        (rows, columns), whole = to.shape, to.ref.shape[1]
        pieces.extend([(columns, whole)] if len(to.shape) == 2 and (rows == 1 or columns == whole) else [])
        return copy(source, to, **kwargs)

    monkeypatch.setattr(plgpu, "copy_smem_to_gmem", spy)
    rhs = np.zeros((3, 256, width), args[1].dtype)
    jax.make_jaxpr(
        lambda *a: grouped.grouped_matmul(
            *a, None, None, top_k=top_k, dtype="bfloat16", packed_rows=False, precision="highest"
        )
    )(args[0], rhs, *args[2:])
    assert pieces
    assert all(whole % columns == 0 for columns, whole in pieces), pieces


def test_activations_are_those_of_the_op():
    """Mosaic has no erf, which "gelu" needs."""
    assert set(ACTIVATIONS) == set(meaning.ACTIVATIONS) - {"gelu"}
    gate, up = jnp.float32(rng("activations").normal(size=(2, 100)) * 5)
    for name, activation in ACTIVATIONS.items():
        np.testing.assert_allclose(activation(gate, up), meaning.ACTIVATIONS[name](gate, up), rtol=1e-4, atol=1e-5)


# ---- tiles


@pytest.mark.parametrize(
    ("rows", "plain", "tile"),
    [(16 * 8, True, 32), (16 * 8 + 1, True, 96), (641 * 8, True, 160), (641 * 8, False, 144)],
)
def test_the_tile_of_a_mean(rows, plain, tile):
    assert tiles.product_tile("sm_90", np.dtype("float16"), rows, 8, plain).rows == tile


# ---- what the kernels are told about a table


def test_runs_are_told_from_other_slots():
    slots = jnp.array([[4, 5, 6], [4, 5, -1], [4, 6, -1], [4, -1, 6], [-1, 4, 5], [-1, -1, -1], [0, 9, -7], [5, 4, 3]])
    live, last, first = grouped_tables.runs(slots, jnp.zeros(8, jnp.int32), 9)
    assert first.tolist() == [4, 4, -1, -1, -1, -1, 0, -1]
    assert live.tolist() == [3, 2, 2, 2, 2, 0, 1, 3]
    assert last.tolist() == [3, 2, 2, 3, 3, 0, 1, 3]
    assert grouped_tables.runs(slots, jnp.full(8, -1, jnp.int32), 9)[0].tolist() == [0] * 8


@pytest.mark.parametrize(("most", "unit"), [(16, 16), (32, 16), (144, 16), (160, 32)])
def test_tiles_hold_each_row_once_and_experts_stay_together(most, unit):
    r = rng("tiles")
    rows_of = r.integers(0, 2000, size=14) * r.integers(0, 2, size=14)
    rows_of[0], rows_of[1], rows_of[-1] = 0, most, 1
    high = np.cumsum(rows_of)
    low = high - rows_of
    low[rows_of == 0] = high[rows_of == 0] = 0
    across = 3
    low, high, tile = jnp.int32(low), jnp.int32(high), tiles.Tile(most, 256, 64, False, unit)
    table, count = grouped_tables.cut_into_tiles(low, high, tile, grouped_tables.most_tiles(int(high[-1]), 14, tile))
    at = np.arange(count[0] * across)
    begin, size = np.divmod(np.asarray(table)[3, at // across], tiles.WINDOW + 1)
    column, number = np.divmod(at - begin * across, size)
    owner, first, height, _ = np.asarray(table)[:, begin + number]
    assert (np.diff(owner) >= 0).all()
    most_tiles = 0
    for e in range(14):
        if low[e] == high[e]:
            assert not (owner == e).any()
            continue
        mine = (owner == e) & (column == 0)
        covered = [row for t in np.flatnonzero(mine) for row in range(first[t], first[t] + height[t])]
        assert covered == list(range(covered[0], covered[-1] + 1))
        assert covered[0] == low[e] // 8 * 8
        assert high[e] <= covered[-1] + 1 < high[e] + unit
        assert (first[mine] % 8 == 0).all()
        assert (height[mine] % unit == 0).all()
        assert max(height[mine]) <= most
        assert max(height[mine]) - min(height[mine]) <= unit
        assert mine.sum() == -(-len(covered) // most)
        most_tiles = max(most_tiles, mine.sum())
        for c in range(1, across):
            assert (first[(owner == e) & (column == c)] == first[mine]).all()
    side_by_side = [len(list(run)) for _, run in itertools.groupby(zip(owner, column, strict=True))]
    assert max(side_by_side) == min(tiles.WINDOW, most_tiles)


def test_tiles_of_tables_that_break_the_rules_stay_inside():
    """Every expert claims every row: more tiles than there is room for."""
    low, high, tile = jnp.zeros(5, jnp.int32), jnp.full(5, 100, jnp.int32), tiles.Tile(16, 256, 64, False, 16)
    (_, _, _, order), count = grouped_tables.cut_into_tiles(low, high, tile, 9)
    begin, size = np.divmod(np.asarray(order), tiles.WINDOW + 1)
    assert count.tolist() == [9]
    assert (size > 0).all()
    assert (begin + size <= 9).all()


def test_an_expert_is_read_where_it_lies_if_its_rows_lie_together():
    # Rows 2 to 4; two runs; none; 7 and 1; after an end that is not full, row 0
    slots = jnp.array([[2, 3], [4, -1], [5, 6], [8, 9], [-1, -1], [7, 1], [10, -1], [0, -1]])
    owner = jnp.array([0, 0, 1, 1, 2, 3, 4, 4])
    low, high, apart = grouped_tables.row_ranges(slots, owner, 1, 5, 11, 1)
    assert apart.tolist() == [0, 1, 0, 1, 1]
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == [(2, 5), (4, 8), (0, 0), (10, 12), (12, 15)]
    # The same after a block of no expert, behind which there may be more of one expert: apart, if only maybe so.
    holed = jnp.array([0, grouped_tables.NO_EXPERT, 1, 1, 2, 2, grouped_tables.PAST_END, grouped_tables.PAST_END])
    after = jnp.array([[0, 1], [2, 3], [4, 5], [6, 7], [8, -1], [9, 10], [0, 1], [2, 3]])
    low, high, apart = grouped_tables.row_ranges(after, holed, 1, 5, 11, 1)
    assert [x.tolist() for x in (low, high, apart)] == [[0, 4, 8, 0, 0], [2, 8, 11, 0, 0], [0, 1, 0, 0, 0]]
    # Blocks of which the last slots are none, one's rows going on in the next's.
    padded = jnp.array([[2, 3, 4, -1], [5, 6, -1, -1]])
    assert [x.tolist() for x in grouped_tables.row_ranges(padded, jnp.zeros(2, jnp.int32), 1, 1, 11, 1)] == [
        [2],
        [7],
        [0],
    ]
    two = grouped_tables.row_ranges(slots, jnp.where(jnp.arange(8) < 4, owner, owner + 5), 2, 5, 11, 1)
    assert [x[:5].tolist() + x[5:].tolist() for x in two][2] == [0, 1, 0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("compared", [0, 2**25])
def test_unnamed_rows_are_those_that_no_slot_names(compared, monkeypatch):
    monkeypatch.setattr(grouped_tables, "COMPARED", compared)
    slots = np.full((4, 8), -1, np.int32)  # two blocks of each of two slices of 13 rows
    slots[:3, :5] = np.stack([rng("holes").permutation(13)[:5] for _ in range(3)])
    slots[1, :5] = np.setdiff1d(np.arange(13), slots[0, :5])[:5]
    slots[2, 5], slots[3] = 13, np.arange(8)  # no row, and a block that does not count
    holes = np.asarray(grouped_tables.unnamed_rows(jnp.asarray(slots), jnp.array([0, 2, 3, -1]), 2, 13, 16, 128))
    assert holes.shape == (128,)
    unnamed = [s * 16 + r for s in range(2) for r in range(13) if r not in slots[2 * s : 3]]
    assert [8 * g + j for g in range(128) for j in range(8) if holes[g] >> j & 1] == unnamed


@needs_plugin
@pytest.mark.parametrize(("block", "dtype"), [(144, "bfloat16"), (128, "float32")])
def test_shared_memory_suffices(block, dtype):
    """At the sizes that leave the least of it: lowering fails where it does not."""
    tables = of((4 * block,), jnp.int32), of((4,), jnp.int32), of((), jnp.int32)
    run = functools.partial(grouped_matmul, preferred_element_type=dtype, implementation="pallas")
    args = of((64, 64), jnp.bfloat16), of((3, 64, 256), jnp.bfloat16), *tables
    with on_h200():
        assert "mosaic_gpu" in jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@needs_plugin
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", [pytest.param(None, marks=pytest.mark.compiled), "silu"])
def test_lowered_under_x64(activation):
    tables = of((64,), jnp.int32), of((4,), jnp.int32), of((), jnp.int32)

    def run(lhs, rhs, *tables):
        f = functools.partial(grouped_matmul, activation=activation, implementation="pallas")
        out, vjp = jax.vjp(lambda *a: f(*a, *tables), lhs, rhs)
        return f(lhs, rhs, *tables), vjp(out)

    args = of((64, 64), jnp.bfloat16), of((3, 64, 256), jnp.bfloat16), *tables
    with on_h200():
        assert "mosaic_gpu" in jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


# ---- refusals


def test_float32_and_other_gpus_are_refused_by_name():
    size = Size(4, 3, 2, 16, 8)

    def call(dtype, kind):
        return ferrum_jax.which(
            grouped_matmul,
            *grouped_args(rng("r"), size, dtype),
            platform="cuda",
            device_kind=kind,
            implementation="pallas",
        )

    assert call("bfloat16", "NVIDIA H200").implementation == "pallas"
    with pytest.raises(NotImplementedError, match=r"wgmma multiplies float16 and bfloat16; got float32"):
        call("float32", "NVIDIA H200")
    with pytest.raises(NotImplementedError, match=r"wgmma, of Hopper.* is 10\.0"):
        call("bfloat16", "NVIDIA B200")


def test_an_epilogue_that_pallas_lacks_is_left_to_the_parts():
    args = grouped_args(rng("r"), Size(4, 3, 2, 16, 8), "bfloat16")

    def call(width, activation):
        return ferrum_jax.which(
            grouped_matmul,
            *(args[0], np.zeros((3, 16, width), args[1].dtype), *args[2:]),
            activation=activation,
            platform="cuda",
            device_kind="NVIDIA H200",
            implementation="pallas",
        )

    assert call(256, "silu").implementation == "pallas"
    assert call(256, "gelu").implementation == "xla"
    assert "no function that 'gelu' needs" in call(256, "gelu").passed_over["pallas"]
    assert "multiple of 64 columns; they have 96" in call(192, "silu").passed_over["pallas"]
    with pytest.raises(NotImplementedError, match="wgmma multiplies float16 and bfloat16; got float32"):
        ferrum_jax.which(
            grouped_matmul,
            *grouped_args(rng("r"), Size(4, 3, 2, 16, 8), "float32"),
            row_weights=np.ones(8, np.float32),
            platform="cuda",
            device_kind="NVIDIA H200",
            implementation="pallas",
        )


# ---- machine code


@needs_plugin
@needs_pjrt
@pytest.mark.compiled
@pytest.mark.parametrize(
    ("model", "tokens", "block", "dtype", "pair_ids", "gradients"),
    [
        ("qwen3", 8192, 128, "bfloat16", False, True),
        ("qwen3", 16, 16, "float16", True, False),
        ("mixtral", 4096, 160, "bfloat16", False, False),
        ("deepseek_v3", 4096, 64, "bfloat16", False, False),
        ("qwen3_down", 256, 16, "bfloat16", False, False),
    ],
)
def test_code_for_an_h200(model, tokens, block, dtype, pair_ids, gradients):
    """wgmma in the loops and no spills; what does not fit in shared memory would not compile."""
    experts, k, height, width = PRODUCTS[model]
    slots = ferrum_jax.max_aligned_rows(tokens * k, experts, block)
    tables = of((slots,), jnp.int32), of((slots // block,), jnp.int32), of((), jnp.int32)
    top_k = k if pair_ids else 1

    def run(lhs, rhs, g, *tables):
        f = functools.partial(grouped_matmul, top_k=top_k, implementation="pallas")
        if not gradients:
            return f(lhs, rhs, *tables)
        out, vjp = jax.vjp(lambda *a: f(*a, *tables), lhs, rhs)
        return out, vjp(g)

    shapes = (tokens * k // top_k, height), (experts, height, width), (tokens * k, width)
    _, kernels = whole_program_for_h200(run, *(of(s, dtype) for s in shapes), *tables)
    products = [kernel for kernel in kernels if not kernel.name.endswith("gather")]
    names = ["ferrum_outer", "ferrum_product", "ferrum_product"] if gradients else ["ferrum_product"]
    assert sorted(p.name for p in products) == names
    for kernel in kernels:
        assert_registers_suffice(kernel)
    for kernel in products:
        bodies = sorted(ptx_loops(kernel.ptx), key=len)
        multiplying = next(body for body in bodies if "wgmma.mma_async" in body)
        assert "mbarrier.try_wait" in multiplying, kernel.name
        assert "cp.async" not in multiplying, kernel.name
        assert any(re.search(r"cp\.async\.bulk\.tensor.*complete_tx", body) for body in bodies), kernel.name
        assert "ld.local" not in kernel.ptx


@needs_plugin
@needs_pjrt
@pytest.mark.compiled
@pytest.mark.parametrize(
    ("tokens", "block", "activation", "weighted", "dtype"),
    [
        (8192, 128, "swiglu_oai", True, "bfloat16"),
        (1024, 64, "silu", False, "float16"),
        (16, 16, None, True, "float16"),
    ],
)
def test_code_of_an_epilogue(tokens, block, activation, weighted, dtype):
    experts, k, height, width = PRODUCTS["qwen3"]
    slots = ferrum_jax.max_aligned_rows(tokens * k, experts, block)
    tables = of((slots,), jnp.int32), of((slots // block,), jnp.int32), of((), jnp.int32)
    weights = [of((tokens * k,), jnp.float32)] if weighted else []

    def run(lhs, rhs, slots, blocks, total, *weights):
        settings = {"activation": activation, "row_weights": weights[0] if weights else None}
        return grouped_matmul(lhs, rhs, slots, blocks, total, implementation="pallas", **settings)

    shapes = of((tokens * k, height), dtype), of((experts, height, width), dtype)
    _, kernels = whole_program_for_h200(run, *shapes, *tables, *weights)
    assert [kernel.name for kernel in kernels if not kernel.name.endswith("gather")] == ["ferrum_product"]
    for kernel in kernels:
        assert_registers_suffice(kernel)


def assert_registers_suffice(kernel):
    """No spills. The assembler of CUDA 13.4 keeps a few barriers' addresses on the stack, though there is room for
    them: that many, if no product's loop touches them.
    """
    if kernel.spilled:
        assert kernel.frame <= 16, (kernel.name, kernel.registers)
        assert not kernel.spills_in_wgmma_loops(), kernel.name


def ptx_loops(ptx):
    """The bodies of the loops: from a label to a branch back to it."""
    lines = ptx.splitlines()
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.startswith("$L")}
    for at, line in enumerate(lines):
        jump = re.search(r"bra(?:\.uni)?\s+(\$L\w+);", line)
        if jump and labels[jump[1]] < at:
            yield "\n".join(lines[labels[jump[1]] : at])
