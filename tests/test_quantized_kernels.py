"""The Triton kernels of products with quantised matrices: interpreted, on a GPU, and as machine code."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DTYPES, rng
from compiled import for_h200, needs_plugin
from conftest import run_by
from test_quantized import KINDS, USUAL, E, H, K, layer_of, rare, stored

import ferrum_jax
from ferrum_jax import LayerOf, QuantizedMatrices, grouped_matmul, moe_mlp, quantize, ragged_dot
from ferrum_jax.model import parameters


@pytest.fixture(
    params=[
        pytest.param("triton-interpreted", marks=pytest.mark.interpreted),
        pytest.param("triton-gpu", marks=pytest.mark.gpu),
    ]
)
def triton(request):
    yield from run_by(request.param)


def close(got, want, size, dtype, kind, terms):
    """A kernel may round a matrix' entries once to the rows' dtype; bfloat16 holds all of MXFP4 exactly."""
    exact = dtype == "float32" or kind == "mxfp4"
    rounded = 0 if exact else float(jnp.finfo(dtype).eps) / 2 * size
    oracle.assert_close(got, want, size, dtype, terms=terms, rounded=rounded)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (k, d) if (d == "bfloat16" and k in USUAL) or (k, d) == ("fp8 blocks", "float32") else rare(k, d)
        for k in KINDS
        for d in DTYPES
    ],
)
def test_products_and_their_gradients(kind, dtype, triton):
    """H and the columns are no multiples of a tile, and blocks are short at the end."""
    sizes, owner = np.array([3, 0, 18, 1, 2], np.int32), np.repeat(np.arange(E), [3, 0, 18, 1, 2])
    width, columns = (96, 160) if kind == "mxfp4" else (104, 136)
    rows = rng("rows", kind).normal(size=(24, width)).astype(np.float32).astype(np.dtype(dtype))
    q, w = stored(kind, E, width, columns, parts=2)
    out, pull = jax.vjp(lambda x: ragged_dot(x, q, sizes, implementation=triton), jnp.asarray(rows))
    want, size = (np.einsum("mh,mhn->mn", f(oracle.f64(rows)), f(w[owner])) for f in (np.asarray, np.abs))
    close(out, want, size, dtype, kind, width)
    (back,) = pull(out)
    want, size = (np.einsum("mn,mhn->mh", f(oracle.f64(out)), f(w[owner])) for f in (np.asarray, np.abs))
    close(back, want, size, dtype, kind, columns)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(d, marks=pytest.mark.full) for d in ("float16", "float32"))]
)
@pytest.mark.parametrize(
    ("form", "block", "zeros"),
    [
        ("int4", 32, True),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (("fp8", 128, False), ("mxfp4", 32, False), ("int4", 128, False), ("int8", 128, True))
        ),
    ],
)
@pytest.mark.parametrize("experts", [1, *(pytest.param(e, marks=pytest.mark.full) for e in (8, 16, 64))])
def test_every_number(experts, form, block, zeros, dtype, triton):
    """Each stored byte stands for what `dequantize` says, also in the transposed product; in blocks of all sizes."""
    columns, each = 24, 2 if form.endswith("4") else 1
    stored_bytes = np.stack([np.roll(np.arange(256, dtype=np.uint8), 11 * i) for i in range(columns)])
    if form == "fp8":
        stored_bytes[stored_bytes % 128 == 127] = 1  # NaN
    width = 256 * each
    grid = 1, columns, width // block
    scales = jnp.asarray(2.0 ** rng("scales").integers(-3, 4, grid), "bfloat16")
    if form == "mxfp4":
        scales = rng("scales").integers(120, 130, grid).astype(np.uint8)
    points = rng("zeros").integers(0, 2 ** (8 // each), grid).astype(np.uint8) if zeros else None
    q = QuantizedMatrices(stored_bytes[None], scales, points, form, (1, block))
    want = q.dequantize(dtype)[0]
    q = jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a), experts, axis=0), q)
    got = ragged_dot(jnp.eye(width, dtype=dtype), q, jnp.full(experts, width // experts), implementation=triton)
    np.testing.assert_array_equal(got, want)
    rows = jnp.tile(jnp.eye(columns, dtype=dtype), (experts, 1))
    got = ragged_dot(rows, q, jnp.full(experts, columns), transpose_rhs=True, implementation=triton)
    np.testing.assert_array_equal(got, jnp.tile(want.T, (experts, 1)))


def test_numbers_that_are_nan(triton):
    q = quantize(np.ones((1, 256, 8), np.float32), "fp8")
    q = dataclasses.replace(q, values=q.values.at[0, 3, 7].set(0x7F).at[0, 5, 200].set(0xFF))
    for activations in (None, "float8_e4m3fn"):
        out = ragged_dot(
            jnp.ones((2, 256), "bfloat16"), q, jnp.array([2]), activations=activations, implementation=triton
        )
        np.testing.assert_array_equal(np.isnan(out), [[column in (3, 5) for column in range(8)]] * 2)


FP8_ROWS = "float8_e4m3fn"


@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        ((128, 128), "bfloat16"),
        ((1, 96), "float16"),
        pytest.param((1, None), "float32", marks=pytest.mark.full),
        pytest.param((None, None), "bfloat16", marks=pytest.mark.full),
        pytest.param((64, 128), "float32", marks=pytest.mark.full),
    ],
)
def test_products_of_fp8_rows(block, dtype, triton):
    """As xla, which multiplies the same rounded rows in float32.

    Tensor cores add up fewer bits, and where XLA's quotient is another one, an entry between two numbers of fp8 may be
    rounded to the other.
    """
    sizes = np.array([3, 0, 20, 1, 2], np.int32)
    rows = rng("rows").normal(size=(26, 264)) * 10.0 ** rng("size").integers(-3, 3, (26, 1))
    rows[5], rows[7, 130] = 0, np.nan
    q, _ = stored("fp8 blocks", E, 264, 136, parts=2)
    q = quantize(q.dequantize("float32"), "fp8", block=block, parts=2)
    run = functools.partial(ragged_dot, jnp.asarray(rows, dtype), q, sizes, activations=FP8_ROWS)
    got, want = (np.asarray(run(implementation=by), np.float64) for by in (triton, "xla"))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    size = ragged_dot(np.abs(rows), np.abs(q.dequantize("float32")), sizes, implementation="xla")
    bound = (2.0**-10 + float(jnp.finfo(dtype).eps)) * np.asarray(size, np.float64) + float(
        jnp.finfo(dtype).smallest_subnormal
    )
    ok = ~np.isnan(want)
    assert np.max(np.abs(got - want)[ok] / bound[ok]) <= 1
    x = jnp.asarray(np.nan_to_num(rows), dtype)
    one, other = (jax.grad(lambda x, by=by: run_on(x, q, sizes, by))(x) for by in (triton, "xla"))
    oracle.assert_near(one, other, dtype)


def run_on(x, q, sizes, by):
    out = ragged_dot(x, q, sizes, activations=FP8_ROWS, implementation=by)
    return jnp.sum(out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size).reshape(out.shape)))


@pytest.mark.parametrize("form", ["one", "pair", "layer"])
def test_layers_of_fp8_rows(form, triton):
    x, logits, matrices, _ = layer_of("fp8 blocks")
    gate_up, down = (quantize(w.dequantize(), "fp8", block=(16, 32), parts=w.parts) for w in matrices)
    stacks = gate_up, down
    if form == "pair":
        stacks = tuple(parameters.halves(gate_up, 2)), down
    elif form == "layer":
        stacks = [LayerOf(jax.tree.map(lambda a: jnp.stack([a[::-1], a]), w), 1) for w in stacks]
    run = functools.partial(moe_mlp, x, logits, *stacks, top_k=K, activations=FP8_ROWS)
    oracle.assert_near(run(implementation=triton), run(implementation="xla"), "bfloat16")


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (k, f) if i == j or k == "int4 zeros" else rare(k, f)
        for i, k in enumerate(("fp8 blocks", "mxfp4", "int4 zeros"))
        for j, f in enumerate(("one", "pair", "layer", "weighted"))
    ],
)
def test_epilogues_pairs_and_layers(kind, form, triton):
    """Gate and up in one array, in two, or in a stack; and row weights: as xla does it."""
    x, logits, (gate_up, down), _ = layer_of(kind)
    routing = ferrum_jax.moe_align_block_size_pair_ids(ferrum_jax.route_topk_softmax(logits, K).expert_ids, E, 4)
    width = gate_up.shape[-1] // 2
    weights = rng("weights").random(len(x) * K).astype(np.float32) if form == "weighted" else None
    rhs = LayerOf(jax.tree.map(lambda a: jnp.stack([a[::-1], a]), gate_up), 1) if form == "layer" else gate_up

    def run(implementation):
        if form == "pair":
            halves = tuple(parameters.halves(gate_up, 2))
            return moe_mlp(x, logits, halves, down, top_k=K, flow="pair_ids", implementation=implementation)
        activation = "swiglu_oai" if form == "one" else "silu"
        return grouped_matmul(
            x, rhs, routing, activation=activation, row_weights=weights, implementation=implementation
        )

    got = run(triton)
    assert got.shape[-1] == (H if form == "pair" else width)
    oracle.assert_near(got, run("xla"), "float32")


@pytest.mark.parametrize("other", ["int4", "int8 zeros"])
def test_a_pair_of_two_kinds(other, triton):
    """With zero points in one of them, or of another format: two products."""
    x, logits, (gate_up, down), _ = layer_of("int4 zeros")
    gate = parameters.halves(gate_up, 2)[0]
    up, _ = stored(other, *gate.shape)
    got, want = (
        moe_mlp(x, logits, (gate, up), down, top_k=K, flow="pair_ids", implementation=by) for by in (triton, "xla")
    )
    oracle.assert_near(got, want, "float32")


def test_unused_experts_padding_and_batches(triton):
    """Matrices without rows and rows that no slot names may hold NaN; a batch may share the matrices."""
    q, _ = stored("int8", E, H, 24)
    scales = q.scales.at[1].set(jnp.nan)
    q = dataclasses.replace(q, scales=scales)
    sizes = np.array([3, 0, 2, 1, 0], np.int32)
    x = rng("x").normal(size=(2, 8, H)).astype(np.float32)
    x[:, 6:] = np.nan
    run = functools.partial(ragged_dot, group_sizes=sizes)
    got = jax.vmap(lambda x: run(x, q, implementation=triton))(x)
    oracle.assert_near(got, jax.vmap(lambda x: run(x, q, implementation="xla"))(x), "float32")
    assert not np.any(got[:, 6:])
    two = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), q)
    x = np.nan_to_num(x)
    got, want = (jax.vmap(lambda x, q, by=by: run(x, q, implementation=by))(x, two)[1][3:5] for by in (triton, "xla"))
    oracle.assert_near(got, want, "float32")


@needs_plugin
@pytest.mark.compiled
@pytest.mark.parametrize("tokens", [16, 512, 4096])  # blocks of 16, 32 and 128 slots
@pytest.mark.parametrize(
    ("form", "block", "activations"),
    [
        ("fp8", (128, 128), None),
        ("fp8", (128, 128), FP8_ROWS),
        ("mxfp4", (1, 32), None),
        ("int4", (1, 128), None),
    ],
)
def test_machine_code(form, block, activations, tokens):
    """Tensor cores multiply, nothing is spilled, and 16 bytes are loaded at a time."""
    experts, hidden, width = 128, 2048, 768
    shapes = (experts, hidden, 2 * width), (experts, width, hidden)
    matrices = [
        jax.eval_shape(
            lambda w, parts=parts: quantize(w, form, block=block, parts=parts), jax.ShapeDtypeStruct(s, "bfloat16")
        )
        for s, parts in zip(shapes, (2, 1), strict=True)
    ]
    x, logits = (jax.ShapeDtypeStruct((tokens, n), "bfloat16") for n in (hidden, experts))
    program = for_h200(lambda *a: moe_mlp(*a, top_k=8, activations=activations), x, logits, *matrices)
    products = [code for code in program.codes if code.name.endswith("quantized")]
    assert len(products) == 2
    for code in products:
        assert code.spilled == 0, code.registers
        assert ("QGMMA" if activations else "HGMMA") in code.sass
        if activations:  # no number is converted
            assert "F2FP" not in code.sass.split("QGMMA")[1]
        loads = {load.rpartition(".")[2] for load in re.findall(r"LDGSTS[.\w]*", code.sass)}
        assert loads >= {"128"}
        assert loads <= {"128", "E"}  # scales are 4 bytes


@needs_plugin
@pytest.mark.compiled
@pytest.mark.parametrize(
    ("gpu", "kib", "form", "activations"),
    [
        ("NVIDIA A100", 163, "fp8", None),
        ("NVIDIA L4", 99, "fp8", FP8_ROWS),
        ("NVIDIA L4", 99, "mxfp4", None),
        ("NVIDIA B200", 227, "fp8", FP8_ROWS),
        ("NVIDIA GeForce RTX 5090", 99, "fp8", FP8_ROWS),
        ("NVIDIA GeForce RTX 5090", 99, "int4", None),
    ],
)
def test_machine_code_of_other_gpus(gpu, kib, form, activations):
    """It compiles, and fits into the shared memory that a program has there."""
    q = jax.eval_shape(lambda w: quantize(w, form), jax.ShapeDtypeStruct((8, 512, 256), "bfloat16"))
    for rows in (64, 512, 2048):  # blocks of 16, 64 and 128
        x, sizes = jax.ShapeDtypeStruct((rows, 512), "bfloat16"), jax.ShapeDtypeStruct((8,), "int32")
        program = for_h200(functools.partial(ragged_dot, activations=activations), x, q, sizes, gpu=gpu)
        (code,) = (code for code in program.codes if code.name.endswith("quantized"))
        assert code.shared <= kib * 2**10, code.shared
        if activations and "B200" not in gpu:
            assert re.search(r"QMMA|E4M3", code.sass)


def test_which_says_what_runs_and_what_does_not():
    args = jnp.ones((3, H), "bfloat16"), quantize(np.ones((2, H, 8), np.float32), "fp8"), jnp.array([1, 2])
    by_op = dict(ferrum_jax.which(ragged_dot, *args, platform="cuda", device_kind="NVIDIA H200"))
    assert by_op["quantized_matmul"].implementation == "triton"
    rounded = functools.partial(ragged_dot, activations=FP8_ROWS)
    for gpu, wanted in (("NVIDIA H200", "triton"), ("NVIDIA L4", "triton"), ("NVIDIA A100", "xla")):
        by_op = dict(ferrum_jax.which(rounded, *args, platform="cuda", device_kind=gpu))
        assert by_op["quantized_matmul"].implementation == wanted
    assert "compute capability 8.9 or newer; the target's is 8.0" in by_op["quantized_matmul"].passed_over["triton"]
    few = quantize(np.ones((2, H, 8), np.float32), "fp8", block=(8, 24))
    by_op = dict(ferrum_jax.which(rounded, args[0], few, args[2], platform="cuda", device_kind="NVIDIA H200"))
    assert "a multiple of 32 entries along H; they have 24" in by_op["quantized_matmul"].passed_over["triton"]
    turned = functools.partial(rounded, transpose_rhs=True)
    wide = jnp.ones((3, 8), "bfloat16"), args[1], args[2]
    by_op = dict(ferrum_jax.which(turned, *wide, platform="cuda", device_kind="NVIDIA H200"))
    assert "does not round rows to fp8" in by_op["quantized_matmul_transposed"].passed_over["triton"]
