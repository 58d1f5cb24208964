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
from ferrum_jax import LayerOf, grouped_matmul, moe_mlp, quantize, ragged_dot
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
@pytest.mark.parametrize("tokens", [16, 1024])
@pytest.mark.parametrize(("form", "block"), [("fp8", (128, 128)), ("mxfp4", (1, 32)), ("int4", (1, 128))])
def test_machine_code(form, block, tokens):
    """Tensor cores multiply, nothing is spilled, and loads are wide."""
    experts, hidden, width = 128, 2048, 768
    shapes = (experts, hidden, 2 * width), (experts, width, hidden)
    matrices = [
        jax.eval_shape(
            lambda w, parts=parts: quantize(w, form, block=block, parts=parts), jax.ShapeDtypeStruct(s, "bfloat16")
        )
        for s, parts in zip(shapes, (2, 1), strict=True)
    ]
    x, logits = (jax.ShapeDtypeStruct((tokens, n), "bfloat16") for n in (hidden, experts))
    program = for_h200(lambda *a: moe_mlp(*a, top_k=8), x, logits, *matrices)
    products = [code for code in program.codes if code.name.endswith("quantized")]
    assert len(products) == 2
    for code in products:
        assert code.spilled == 0, code.registers
        assert "HGMMA" in code.sass
        assert re.search(r"LDG\.E[\w.]*\.128|LDGSTS[\w.]*\.128", code.sass)


def test_which_says_what_runs_and_what_does_not():
    args = jnp.ones((3, H), "bfloat16"), quantize(np.ones((2, H, 8), np.float32), "fp8"), jnp.array([1, 2])
    by_op = dict(ferrum_jax.which(ragged_dot, *args, platform="cuda", device_kind="NVIDIA H200"))
    assert by_op["quantized_matmul"].implementation == "triton"
    rounded = functools.partial(ragged_dot, activations="float8_e4m3fn")
    by_op = dict(ferrum_jax.which(rounded, *args, platform="cuda", device_kind="NVIDIA H200"))
    assert by_op["quantized_matmul"].implementation == "xla"
    assert "does not round rows to fp8" in by_op["quantized_matmul"].passed_over["triton"]
