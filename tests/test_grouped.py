"""grouped_matmul beyond what every op is tested for: garbage, hostile tables, memory, code for an H200."""

import functools
import re

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DTYPES, Size, activated, activated_args, grouped_args, grouped_matmul, rng, rows
from compiled import for_h200, loops, memory_for_h200, needs_pjrt, needs_plugin
from conftest import implementations
from hypothesis import HealthCheck, given, settings
from shapes import PRODUCTS

import ferrum_jax

pytestmark = pytest.mark.tables

of = jax.ShapeDtypeStruct


def check(args, top_k, implementation, **kwargs):
    """Values and both gradients, with NaN in what no slot names."""
    lhs, rhs, *tables = args

    def f(lhs, rhs):
        return grouped_matmul(lhs, rhs, *tables, top_k=top_k, implementation=implementation, **kwargs)

    out, vjp = jax.vjp(f, jnp.asarray(lhs), jnp.asarray(rhs))
    oracle.assert_matches([out], oracle.grouped_matmul(*args, top_k=top_k))
    g = rows(rng("g"), out.shape, out.dtype)
    named = [s for s, _ in oracle.live_slots(*tables, num_pairs=len(g), num_experts=len(rhs))]
    g[~np.isin(np.arange(len(g)), named)] = np.nan
    got = vjp(jnp.asarray(g))
    oracle.assert_matches(got, oracle.grouped_matmul_grads(*args, g=g, top_k=top_k))
    unused = ~np.isin(
        np.arange(len(rhs)), [e for _, e in oracle.live_slots(*tables, num_pairs=len(g), num_experts=len(rhs))]
    )
    assert not np.any(np.asarray(got[1], np.float32)[unused])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair_ids", [False, True])
@pytest.mark.parametrize(
    "size", [Size(7, 8, 2, 130, 16), pytest.param(Size(9, 257, 10, 20, 8), marks=pytest.mark.full)], ids=str
)
def test_values_and_gradients_with_garbage(size, pair_ids, dtype, implementation):
    check(grouped_args(rng("grouped", size), size, dtype, pair_ids), size.K if pair_ids else 1, implementation)


@pytest.mark.parametrize(
    ("size", "pair_ids", "dtype"),
    [
        (Size(7, 3, 3, 70, 2), True, "bfloat16"),  # blocks below the least tile
        (Size(40, 3, 2, 20, 130), False, "float32"),  # above the largest
        (Size(1, 1, 1, 1, 1), True, "float16"),
    ],
    ids=str,
)
def test_kernels_interpreted(size, pair_ids, dtype):
    with ferrum_jax.interpret_kernels():
        check(grouped_args(rng("k", size), size, dtype, pair_ids), size.K if pair_ids else 1, "triton")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair_ids", [False, True])
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("implementation", implementations(pallas=[pytest.mark.full]), indirect=True)
def test_every_activation(activation, pair_ids, dtype, implementation):
    """With hostile weights and rows, and without weights. Pallas' activations: test_pallas_grouped.py."""
    size = Size(7, 8, 2, 20, 8)
    args = activated_args(rng("act", pair_ids), size, dtype, pair_ids)
    settings = {"top_k": size.K if pair_ids else 1, "activation": activation}
    out = activated(*args, **settings, implementation=implementation)
    oracle.assert_matches([out], oracle.grouped_matmul_activated(*args, **settings))
    ones = [*args[:2], np.ones_like(args[2]), *args[3:]]
    plain = grouped_matmul(*args[:2], *args[3:], **settings, implementation=implementation)
    oracle.assert_matches([plain], oracle.grouped_matmul_activated(*ones, **settings))


def test_weights_without_an_activation(implementation):
    size = Size(7, 8, 2, 20, 8)
    lhs, rhs, weights, *tables = activated_args(rng("w"), size, "bfloat16")
    out = activated(lhs, rhs, weights, *tables, implementation=implementation)
    (want,) = oracle.grouped_matmul(lhs, rhs, *tables, top_k=1)
    weights = np.nan_to_num(weights)[:, None]
    # Without a kernel the product is stored in bfloat16 before it is weighted.
    rounded = float(jnp.finfo("bfloat16").eps) / 2 * abs(want.value * weights)
    oracle.assert_matches([out], [(want.value * weights, want.size * abs(weights), size.H + 1, rounded)])


def test_what_float16_cannot_hold_goes_through_the_activation(implementation):
    """Gates of 75,000 and -75,000: with the product rounded to float16, inf and NaN."""
    routing = ferrum_jax.moe_align_block_size(jnp.zeros((2, 1), jnp.int32), 1, 16)
    x = jnp.zeros((2, 64), "float16").at[0, 0].set(250).at[1, 0].set(-250)
    w = jnp.zeros((1, 64, 128), "float16").at[0, 0, :64].set(300).at[0, 0, 64:].set(2.0**-18)
    f = functools.partial(ferrum_jax.grouped_matmul, routing=routing, activation="silu", implementation=implementation)
    out, vjp = jax.vjp(f, x, w)
    np.testing.assert_allclose(out[:, 0], [75000 * 250 / 2**18, 0], rtol=2e-3)
    np.testing.assert_array_equal(f(x, w), out)
    assert all(bool(jnp.isfinite(g).all()) for g in vjp(jnp.full_like(out, 1e-3)))


def test_differentiated_it_is_one_product_and_what_follows():
    size = Size(7, 3, 2, 16)
    args = activated_args(rng("once"), size, "float32")

    def loss(lhs, rhs):
        return jnp.sum(activated(lhs, rhs, *args[2:], activation="silu"))

    text = str(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*args[:2]))
    products = re.findall(r"ferrum_grouped_(\w+)\[", text)
    assert sorted(products) == ["matmul", "matmul_transposed", "outer", "row_weights"]
    assert "ferrum_grouped_matmul_activated[" in str(jax.make_jaxpr(loss)(*args[:2]))


def test_packed_rows_change_nothing(implementation):
    size = Size(40, 3, 2, 24)
    lhs, rhs, *tables = (np.nan_to_num(a) for a in grouped_args(rng("packed"), size, "bfloat16"))

    def both(packed):
        routing = ferrum_jax.MoeRouting(*tables, kind="packed" if packed else None)
        run = functools.partial(ferrum_jax.grouped_matmul, routing=routing, implementation=implementation)
        out, vjp = jax.vjp(run, jnp.asarray(lhs), jnp.asarray(rhs))
        return out, *vjp(out)

    for got, want in zip(both(True), both(False), strict=True):
        np.testing.assert_array_equal(got, want)


def backward(lhs, rhs, *tables, top_k=2, **kwargs):
    out, vjp = jax.vjp(lambda *a: grouped_matmul(*a, *tables, top_k=top_k, **kwargs), lhs, rhs)
    return vjp(out)


def test_kernels_interpreted_over_a_batch():
    """Each operand mapped, or shared by the batch."""
    size = Size(5, 6, 3, 4)
    slices = [grouped_args(rng("b", i), size, "float32", pair_ids=True) for i in range(2)]
    stacked = [np.nan_to_num(np.stack(a), nan=1) for a in zip(*slices, strict=True)]
    for mapped in [(0, None, 0, 0, 0), (None, 0, None, None, None), (0, 0, 0, 0, 0)]:
        args = [a if m == 0 else a[0] for a, m in zip(stacked, mapped, strict=True)]
        both = jax.vmap(functools.partial(backward, top_k=size.K), mapped)
        want = both(*args)
        with ferrum_jax.interpret_kernels():
            for got, w in zip(both(*args), want, strict=True):
                np.testing.assert_allclose(got, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_expert_owns_all_rows(dtype, implementation):
    """What its blocks, and a kernel's steps along its rows, add to its matrix' gradient is added in float32."""
    ids = np.full((40, 2), 3, np.int32)
    routing = ferrum_jax.moe_align_block_size_pair_ids(ids, 5, 64)
    r = rng("one")
    args = rows(r, (40, 6), dtype), rows(r, (5, 6, 7), dtype), *map(np.asarray, routing)
    check(args, 2, implementation)


def test_no_rows(implementation):
    routing = ferrum_jax.moe_plan(np.zeros((0, 2), np.int32), 5, 4)
    f = functools.partial(ferrum_jax.grouped_matmul, routing=routing, implementation=implementation)
    out, vjp = jax.vjp(f, jnp.zeros((0, 6)), jnp.full((5, 6, 7), jnp.nan))
    assert out.shape == (0, 7)
    assert not np.any(vjp(out)[1])


# Blocks of four slots, of no expert where it is negative or 3 and more: after those that count, between them, and in
# the last row before them and among those of one expert.
DEAD = [1, 2, -1], [0, -1, 2], [0, 1, 3], [-1, 0, 9, 0, -1, 1, 1, 2, -(2**31)]


def dead_args(blocks, again):
    """What a dead block names is its own, or again what the block before it names, or the last."""
    r, count = rng("dead", blocks), len(blocks)
    slots = np.arange(4 * count, dtype=np.int32).reshape(count, 4)
    dead = np.array([not 0 <= e < 3 for e in blocks])
    if again:
        slots[dead] = np.roll(slots, 4)[dead]
    args = rows(r, (4 * count, 16), "bfloat16"), rows(r, (3, 16, 8), "bfloat16")
    return *args, slots.reshape(-1), np.array(blocks, np.int32), np.int32(4 * count)


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize(("blocks", "again"), [*((blocks, True) for blocks in DEAD), (DEAD[-1], False)], ids=str)
@pytest.mark.parametrize("implementation", implementations(pallas=[pytest.mark.full]), indirect=True)
def test_blocks_of_no_expert(blocks, again, dtype, implementation):
    check(dead_args(blocks, again), 1, implementation)


@pytest.mark.parametrize("again", [False, True])
def test_blocks_of_no_expert_interpreted(again):
    with ferrum_jax.interpret_kernels():
        check(dead_args(DEAD[-1], again), 1, "triton")


hostile = st.one_of(st.integers(-2, 8), st.sampled_from([2**31 - 1, -(2**31)]))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    hnp.arrays(np.int32, (4, 3), elements=hostile, unique=True),
    hnp.arrays(np.int32, 4, elements=hostile),
    hostile,
    st.booleans(),
)
def test_hostile_tables(slots, blocks, total, kernels):
    """Any values: nothing out of bounds is read or written. Slots are unique, and the experts that count ascend."""
    counts = (blocks >= 0) & (blocks < 5)
    blocks = blocks.copy()
    blocks[counts] = np.sort(blocks[counts])
    r = rng("hostile")
    args = rows(r, (3, 2), "float32"), rows(r, (5, 2, 3), "float32"), slots.reshape(-1), blocks, np.int32(total)
    if kernels and total % 4 == 0:  # interpretation is slow: some will do
        with ferrum_jax.interpret_kernels():
            check(args, 2, "triton")
    else:
        check(args, 2, "xla")


@pytest.mark.parametrize("preferred", DTYPES)
def test_preferred_element_type(preferred, implementation):
    size = Size(7, 3, 2, 16)
    lhs, rhs, *tables = (np.nan_to_num(a) for a in grouped_args(rng("p"), size, "bfloat16"))
    f = functools.partial(grouped_matmul, preferred_element_type=preferred, implementation=implementation)
    out, vjp = jax.vjp(lambda *a: f(*a, *tables), jnp.asarray(lhs), jnp.asarray(rhs))
    oracle.assert_matches([out], oracle.grouped_matmul(lhs, rhs, *tables, top_k=1))
    assert out.dtype == preferred
    assert [x.dtype for x in vjp(out)] == [jnp.bfloat16] * 2
    tangent = jax.jvp(lambda x: f(x, rhs, *tables), (jnp.asarray(lhs),), (jnp.asarray(lhs),))[1]
    np.testing.assert_array_equal(tangent, out)


def test_shared_matrices_are_not_copied():
    """vmap over rows and routing: nothing of the shape [B, E, H, N] in the program, nor of an expert's part of it."""
    lhs, rhs = jnp.ones((5, 16, 32)), jnp.ones((7, 32, 64))
    routing = jax.vmap(lambda ids: ferrum_jax.moe_plan(ids, 7, 4))(jnp.zeros((5, 16, 1), jnp.int32))
    f = jax.jit(jax.vmap(ferrum_jax.grouped_matmul, in_axes=(0, None, 0)))
    assert "[5,7,32,64]" not in str(jax.make_jaxpr(f)(lhs, rhs, routing))
    assert "5x7x32x64" not in f.lower(lhs, rhs, routing).as_text()
    assert not re.search(r"f32\[5,(7,|1,)?32,64\]", f.lower(lhs, rhs, routing).compile().as_text())


def memory_on_a_cpu(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=[pytest.mark.compiled, needs_pjrt])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_are_not_copied_to_another_dtype(dtype, gpu):
    """Product, transposed and outer by `xla`, for a CPU and for an H200: a few experts' matrices, never all 64."""
    plan = jax.eval_shape(lambda ids: ferrum_jax.moe_plan(ids, 64, 16), of((8, 4), jnp.int32))
    lhs, rhs, g = (of(shape, dtype) for shape in ((32, 256), (64, 256, 128), (32, 128)))
    f = functools.partial(ferrum_jax.grouped_matmul, implementation="xla")
    for name, one, *args in (
        ("product", lambda lhs, rhs, plan: f(lhs, rhs, plan), lhs, rhs),
        ("transposed", lambda g, rhs, plan: jax.linear_transpose(lambda x: f(x, rhs, plan), lhs)(g), g, rhs),
        ("outer", lambda g, lhs, plan: jax.linear_transpose(lambda x: f(lhs, x, plan), rhs)(g), g, lhs),
    ):
        peak, matrix = (memory_for_h200 if gpu else memory_on_a_cpu)(one, *args, plan), 4 * 256 * 128
        assert peak < 8 * matrix, (name, peak / matrix)


def test_work_does_not_grow_with_experts():
    """The same rows over 4 and over 64 experts: the same number of products, and no product of the whole of rhs."""
    for experts in (4, 64):
        plan = jax.eval_shape(lambda ids, e=experts: ferrum_jax.moe_plan(ids, e, 16), of((256, 1), jnp.int32))
        text = (
            jax.jit(ferrum_jax.grouped_matmul)
            .lower(of((256, 8), "float32"), of((experts, 8, 12), "float32"), plan)
            .as_text()
        )
        assert re.findall(r"dot_general.*: \((.*?)\) ->", text) == ["tensor<16x8xf32>, tensor<8x12xf32>"]


# ---- precision of float32 operands

HIGHEST, TF32 = "highest", "default"
PRECISIONS = [  # the argument, `jax.default_matmul_precision` around it, and the equation's
    *((name, None, TF32) for name in ("default", "tensorfloat32", "fastest", "bfloat16", jax.lax.Precision.DEFAULT)),
    *((name, None, HIGHEST) for name in ("high", "highest", "bfloat16_3x", "float32", jax.lax.Precision.HIGH)),
    *((None, name, TF32) for name in ("default", "tensorfloat32", "bfloat16")),
    *((None, name, HIGHEST) for name in (None, "high", "highest", "float32", "TF32_TF32_F32", "BF16_BF16_F32")),
    ("highest", "tensorfloat32", HIGHEST),
    ("tensorfloat32", "highest", TF32),
]


def precisions(f, *args):
    """The products' equations in f's jaxpr, in its order: name and precision."""
    text = str(jax.make_jaxpr(f)(*args))
    return re.findall(r"ferrum_grouped_(\w+)\[[^\]]*?precision=(\w+)", text)


def float_args(dtype="float32"):
    """An even number of columns, and nothing hostile: lhs, rhs, and the tables of pair ids for top_k=2."""
    lhs, rhs, *tables = (np.nan_to_num(a) for a in grouped_args(rng("precision"), Size(7, 3, 2, 16), dtype, True))
    return lhs, rhs[..., : rhs.shape[-1] // 2 * 2], *tables


@pytest.mark.parametrize(("argument", "context", "want"), PRECISIONS, ids=str)
def test_precision_is_read_when_the_op_is_bound(argument, context, want):
    args = float_args()
    run = functools.partial(grouped_matmul, top_k=2, precision=argument)
    with jax.default_matmul_precision(context):
        assert precisions(run, *args) == [("matmul", want)]
        assert precisions(functools.partial(run, activation="silu"), *args) == [("matmul_activated", want)]


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_gradient_keeps_the_precision_of_its_product(activation):
    """Taken outside of the context; and a gradient's own gradients, of all three forms."""
    lhs, rhs, *tables = float_args()

    def value(lhs, rhs):
        with jax.default_matmul_precision("tensorfloat32"):
            return jnp.sum(jnp.sin(grouped_matmul(lhs, rhs, *tables, top_k=2, activation=activation)))

    def slope(lhs, rhs):
        return sum(jnp.sum(g**2) for g in jax.grad(value, (0, 1))(lhs, rhs))

    for f in (value, slope):
        found = precisions(jax.grad(f, (0, 1)), lhs, rhs)
        assert {name for name, _ in found} == {"matmul", "matmul_transposed", "outer"}
        assert {precision for _, precision in found} == {TF32}


def test_sixteen_bits_have_one_precision():
    args = float_args("bfloat16")
    texts = {
        str(jax.make_jaxpr(functools.partial(backward, precision=precision))(*args))
        for precision in ("default", "highest")
    }
    assert len(texts) == 1
    with pytest.raises(ValueError, match=r"precision must be one of .*'tensorfloat32'.*'tf32'"):
        backward(*args, precision="tf32")


def test_precision_of_what_is_lowered():
    """Of the value and of both gradients; jit traces again where the context is another."""
    args, f = float_args(), jax.jit(backward)

    def lowered():
        return re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", f.lower(*args).as_text())

    for context, want in ((None, "HIGHEST"), ("tensorfloat32", "DEFAULT"), ("highest", "HIGHEST")):
        with jax.default_matmul_precision(context):
            assert lowered() == [(want, want)] * 3


def test_tensorfloat32_rounds_each_operand_once(implementation):
    """TF32 holds 10 bits of mantissa: rounded or cut off, an operand is 2^-10 of itself away at most.

    So a term is 2^-9 of itself away. CPUs and the interpreters multiply float32 in full.
    """
    args = float_args()
    run = functools.partial(grouped_matmul, top_k=2, precision="tensorfloat32", implementation=implementation)
    out, vjp = jax.vjp(lambda *a: run(*a, *args[2:]), *map(jnp.asarray, args[:2]))
    g = rows(rng("g"), out.shape, out.dtype)
    wanted = *oracle.grouped_matmul(*args, top_k=2), *oracle.grouped_matmul_grads(*args, g=g, top_k=2)
    for got, (want, size, *_) in zip((out, *vjp(jnp.asarray(g))), wanted, strict=True):
        assert np.all(np.abs(oracle.f64(got) - want) <= 1.01 * 2.0**-9 * size)


@pytest.mark.parametrize(
    ("gpu", "want"),
    [("NVIDIA H100", ("tf32", "warpgroups")), ("NVIDIA A100", ("tf32", "warps")), ("NVIDIA L4", ("threads", "warps"))],
)
def test_tensorfloat32_where_its_tiles_fit(gpu, want):
    """An L4 has too little shared memory for them, as a T4 has no TF32."""
    from ferrum_jax.kernels.triton.grouped import _multipliers

    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert (_multipliers(jnp.float32, "default"), _multipliers(jnp.bfloat16, "highest")) == want
        assert _multipliers(jnp.float32, "highest") == "threads"


# ---- code for an H200

CODE = [
    ("qwen3", 128, 16, "bfloat16", True),
    ("qwen3", 1024, 64, "float16", False),
    ("qwen3", 8192, 128, "bfloat16", False),
    ("mixtral", 4096, 128, "bfloat16", True),
    ("deepseek_v3", 4096, 128, "bfloat16", False),
    ("qwen3", 8192, 128, "float32", False),
    ("qwen3", 128, 16, "tensorfloat32", True),
    ("mixtral", 4096, 128, "tensorfloat32", False),
]


def dtype_and_precision(kind):
    return ("float32", kind) if kind == "tensorfloat32" else (kind, None)


def check_code(code, kind):
    """No spills, and one loop that loads and multiplies: by wgmma, but for float32 in full."""
    assert code.spilled == 0, (code.name, code.registers)
    pattern = {"float32": r"\bFFMA\b", "tensorfloat32": r"HGMMA\.\w+\.F32\.TF32"}.get(kind, r"HGMMA\.\w+\.F32")
    assert any(re.search(pattern, loop) and "LDGSTS" in loop for loop in loops(code.sass)), code.name
    assert ("HGMMA" in code.sass) is (kind != "float32"), code.name
    assert ("TF32" in code.sass) is (kind == "tensorfloat32"), code.name
    assert "HMMA" not in code.sass.replace("HGMMA", ""), code.name


@needs_plugin
@pytest.mark.parametrize(
    ("model", "tokens", "block", "kind", "pair_ids"),
    [CODE[0], *(pytest.param(*case, marks=pytest.mark.compiled) for case in CODE[1:])],
)
def test_code_for_an_h200(model, tokens, block, kind, pair_ids):
    """All three forms, with asynchronous loads of 16 bytes; TF32's wgmma wants some operands turned, by 4 bytes."""
    experts, k, height, width = PRODUCTS[model]
    dtype, precision = dtype_and_precision(kind)
    slots = ferrum_jax.max_aligned_rows(tokens * k, experts, block)
    tables = of((slots,), jnp.int32), of((slots // block,), jnp.int32), of((), jnp.int32)
    top_k = k if pair_ids else 1

    def forward_and_back(lhs, rhs, g, *tables):
        run = functools.partial(grouped_matmul, top_k=top_k, implementation="triton", precision=precision)
        out, vjp = jax.vjp(lambda *a: run(*a, *tables), lhs, rhs)
        return out, vjp(g)

    shapes = (tokens * k // top_k, height), (experts, height, width), (tokens * k, width)
    program = for_h200(forward_and_back, *(of(s, dtype) for s in shapes), *tables)
    assert len(program.launches) == 5  # each product with the table of named rows, and the outer product
    codes = [c for c in program.codes if not c.name.endswith("name_rows")]
    assert [c.name.removeprefix("ferrum_") for c in codes] == ["grouped", "outer", "grouped"]
    for code in codes:
        check_code(code, kind)
        turned = kind == "tensorfloat32" and code.name.endswith("outer")
        assert turned or re.search(r"LDGSTS\.E[\w.]*\.128", code.sass), code.name


@needs_plugin
@pytest.mark.compiled
@pytest.mark.parametrize(
    ("tokens", "block", "kind", "activation", "weighted"),
    [
        (16, 16, "bfloat16", "silu", False),
        (1024, 64, "float16", "gelu", True),
        (8192, 128, "bfloat16", "swiglu_oai", True),
        (8192, 128, "float32", "gelu_tanh", False),
        (16, 16, "tensorfloat32", "silu", False),
        (8192, 128, "tensorfloat32", "swiglu_oai", True),
    ],
)
def test_code_of_an_epilogue(tokens, block, kind, activation, weighted):
    experts, k, height, width = PRODUCTS["qwen3"]
    dtype, precision = dtype_and_precision(kind)
    slots = ferrum_jax.max_aligned_rows(tokens * k, experts, block)
    tables = of((slots,), jnp.int32), of((slots // block,), jnp.int32), of((), jnp.int32)
    weights = [of((tokens * k,), jnp.float32)] if weighted else []

    def run(lhs, rhs, slots, blocks, total, *weights):
        settings = {"activation": activation, "row_weights": weights[0] if weights else None}
        settings |= {"implementation": "triton", "precision": precision}
        return grouped_matmul(lhs, rhs, slots, blocks, total, **settings)

    program = for_h200(run, of((tokens * k, height), dtype), of((experts, height, width), dtype), *tables, *weights)
    (code,) = (c for c in program.codes if not c.name.endswith("name_rows"))
    check_code(code, kind)


@needs_plugin
@pytest.mark.compiled
@pytest.mark.parametrize(
    ("gpu", "block", "kib"),
    [
        ("Tesla T4", 128, 64),
        ("NVIDIA A100", 16, 163),
        ("NVIDIA A100", 128, 163),
        ("NVIDIA GeForce RTX 3090", 64, 99),
        ("NVIDIA GeForce RTX 5090", 128, 99),
    ],
)
def test_code_for_other_gpus(gpu, block, kib):
    """Tiles fit into the shared memory that a program has there, and into registers. Triton multiplies by tensor cores
    from an A100 on.
    """
    slots = ferrum_jax.max_aligned_rows(4096, 8, block)
    tables = of((slots,), jnp.int32), of((slots // block,), jnp.int32), of((), jnp.int32)
    run = functools.partial(grouped_matmul, implementation="triton")

    def layer(x, w, down, g, *tables):
        rows = run(x, w, *tables, activation="silu")
        out, vjp = jax.vjp(lambda *a: run(*a, *tables), rows, down)
        return out, vjp(g)

    shapes = (4096, 512), (8, 512, 1536), (8, 768, 512), (4096, 512)
    program = for_h200(layer, *(of(s, jnp.bfloat16) for s in shapes), *tables, gpu=gpu)
    codes = [c for c in program.codes if not c.name.endswith("name_rows")]
    assert len(codes) == 4  # with the activation, without, transposed, and the outer product
    for code in codes:
        assert code.spilled == 0, (code.name, code.registers)
        assert code.shared <= kib * 1024, code.name
        assert ("HMMA" in code.sass) == (gpu != "Tesla T4"), code.name
