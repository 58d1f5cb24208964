"""Sizes that only a GPU runs in a test's time. `pytest -m gpu` also runs every test that takes an implementation.

Those that take long even there are part of a full run alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import rng
from conftest import KERNELS
from test_quantized import KINDS, E, H, layer_of, stored
from test_quantized_kernels import close

import ferrum_jax
from ferrum_jax.ops.grouped_ops import product

pytestmark = pytest.mark.gpu
DTYPES = ("float32", "bfloat16")


def full(*cases):
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]


@pytest.fixture(params=[pytest.param("xla", marks=pytest.mark.full), *KERNELS])
def name(request):
    return request.param


@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1024, 128, 8), *full((65536, 256, 8), (2**17, 384, 8), (4096, 4096, 64))]
)
@pytest.mark.parametrize("name", ["xla", "triton"])
def test_tables(tokens, experts, k, name):
    ids = np.random.default_rng(tokens).integers(-1, experts + 1, size=(tokens, k)).astype(np.int32)
    ids[: tokens // 2, 0] = 3
    flat, pair = ids.reshape(-1), np.arange(ids.size)
    live = (flat >= 0) & (flat < experts)
    order = np.argsort(np.where(live, flat, experts), kind="stable")
    counts = np.bincount(flat[live], minlength=experts)
    rows = np.empty(ids.size, np.int64)
    rows[order] = pair
    blocks = -(-counts // 64)
    sizes = {"num_experts": experts, "block_size": 64, "implementation": name}
    for pair_ids in (False, True):
        plan = jax.jit(functools.partial(ferrum_jax.moe_plan, **sizes, pair_ids=pair_ids))(ids)
        np.testing.assert_array_equal(plan.pairs_by_token.reshape(-1), np.where(live, rows, -1))
        np.testing.assert_array_equal(plan.packed_token_idx, np.where(pair < live.sum(), order // k, tokens))
        np.testing.assert_array_equal(plan.expert_offsets, np.cumsum([0, *counts]))
        slots = np.full(plan.sorted_token_ids.shape, ids.size)
        starts = np.repeat(np.cumsum(blocks) - blocks, counts) * 64
        inside = np.arange(live.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        slots[starts + inside] = order[: live.sum()] if pair_ids else np.arange(live.sum())
        np.testing.assert_array_equal(plan.sorted_token_ids, slots)
        owners = np.full(plan.block_ids.shape, -1)
        owners[: blocks.sum()] = np.repeat(np.arange(experts), blocks)
        np.testing.assert_array_equal(plan.block_ids, owners)
        assert int(plan.total_tokens_post_pad) == blocks.sum() * 64


@pytest.mark.full
@pytest.mark.parametrize("name", ["xla", "triton"])
def test_tables_of_millions_of_experts(name):
    """So many that an expert and a place in its tile no longer share 32 bits."""
    ids = np.random.default_rng(3).integers(-1, 3_000_000, size=(700, 3)).astype(np.int32)
    ids[::7] = 2_999_999
    got = jax.jit(lambda ids: ferrum_jax.moe_build_pairs_by_token(ids, 3_000_000, implementation=name))(ids)
    order = np.argsort(np.where(ids < 0, 2**31 - 1, ids).reshape(-1), kind="stable")
    live = (ids >= 0).sum()
    np.testing.assert_array_equal(got.packed_token_idx, np.where(np.arange(ids.size) < live, order // 3, 700))
    counts = np.bincount(ids[ids >= 0], minlength=3_000_000)
    np.testing.assert_array_equal(got.expert_offsets, np.cumsum([0, *counts]))


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "dtype"),
    [
        (8192, 512, 10, "bfloat16"),
        *full((8192, 512, 10, "float32"), *((*s, d) for s in ((65536, 256, 8), (2048, 4096, 64)) for d in DTYPES)),
    ],
)
def test_routing(tokens, experts, k, dtype, name):
    x = jax.random.normal(jax.random.key(tokens), (tokens, experts)).astype(dtype)
    ids, weights = jax.jit(lambda x: ferrum_jax.route_topk_softmax(x, k, implementation=name))(x)
    wide = np.asarray(x.astype(jnp.float32))
    order = np.argsort(-wide, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    chosen = np.take_along_axis(wide.astype(np.float64), order, axis=1)
    want = np.exp(chosen - chosen.max(1, keepdims=True))
    np.testing.assert_allclose(weights, want / want.sum(1, keepdims=True), rtol=1e-5)


@pytest.mark.full
def test_rows_beyond_32_bit_offsets(name):
    """R * H of 2^31 and more: the last rows are as far away as they seem."""
    rows, width = 2**19 + 8, 4096
    y = jax.random.normal(jax.random.key(0), (rows, width), jnp.bfloat16)
    pairs = jnp.array([[rows - 1, 0], [rows, 5], [rows - 2, rows - 3]], jnp.int32)
    weights = jnp.array([[1.0, 2.0], [3.0, 4.0], [0.5, 0.25]])
    g = jnp.ones((3, width), jnp.bfloat16)

    def combine(y, w):
        return ferrum_jax.moe_combine(y, pairs, w, unique_rows=True, implementation=name)

    out, vjp = jax.vjp(combine, y, weights)
    few = y[jnp.array([rows - 1, 0, 5, rows - 2, rows - 3])].astype(jnp.float32)
    want = jnp.stack([few[0] + 2 * few[1], 4 * few[2], 0.5 * few[3] + 0.25 * few[4]])
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=0.01, atol=0.02)
    dy, dw = vjp(g)
    assert float(dy[-1, 0]) == 1
    assert float(dy[0, -1]) == 2
    assert float(jnp.sum(dy.astype(jnp.float32)[-4:])) == width * 1.75
    np.testing.assert_allclose(dw[2], few[3:].sum(1), rtol=1e-3, atol=0.5)
    assert float(dw[1, 0]) == 0
    tokens = jnp.array([rows - 1, rows, -1, 1], jnp.int32)
    np.testing.assert_array_equal(ferrum_jax.moe_dispatch(y, tokens, implementation=name)[0], y[-1])


@pytest.mark.parametrize(
    ("router", "terms"),
    [
        ({}, 8),
        ({"norm_topk_prob": False}, 128),
        ({"scoring": "sigmoid", "bias": np.linspace(0, 1e-6, 128, dtype=np.float32)}, 8),
    ],
    ids=["softmax", "softmax over all", "sigmoid with bias"],
)
@pytest.mark.full
def test_programs_of_a_routed_plan_do_not_disturb_each_other(router, terms):
    """Each routes all tokens, and some of these twice: values close together, and NaN.

    As two launches do: ids and tables to the bit, weights but for the rounding of the sum that divides them. Two sums
    of n positive terms differ by (n - 1) eps at most, whatever the order, and two quotients by one more.
    """
    logits = (1 + np.random.default_rng(0).integers(0, 4, size=(32, 128)) * 2.0**-23).astype(np.float32)
    logits[::5, ::3] = np.nan
    routed = jax.jit(lambda x: ferrum_jax.route_topk(x, 8, implementation="triton", **router))(logits)
    both = jax.jit(lambda x: ferrum_jax.moe_route_plan(x, 8, 16, implementation="triton", **router))
    first, tables = both(logits)
    want = routed.expert_ids, *ferrum_jax.moe_plan(routed.expert_ids, 128, 16)
    for g, w in zip((first.expert_ids, *tables), want, strict=True):
        np.testing.assert_array_equal(g, w)
    rounding = terms * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(first.expert_weights, routed.expert_weights, rtol=rounding)
    for _ in range(200):
        for g, w in zip(jax.tree.leaves(both(logits)), jax.tree.leaves((first, tables)), strict=True):
            np.testing.assert_array_equal(g, w)


@pytest.mark.full
@pytest.mark.parametrize("unique_rows", [True, False])
def test_gradients_are_the_same_bits_every_time(unique_rows, name):
    tokens, k, width = 4096, 8, 256
    keys = jax.random.split(jax.random.key(1), 3)
    y, g = (jax.random.normal(key, (n, width)) for key, n in ((keys[0], tokens * k), (keys[1], tokens)))
    pairs = jax.random.randint(keys[2], (tokens, k), 0, 500 if not unique_rows else tokens * k)
    if unique_rows:
        pairs = jax.random.permutation(keys[2], tokens * k).reshape(tokens, k).astype(jnp.int32)
    weights = jnp.ones((tokens, k))

    def combine(y, w):
        return ferrum_jax.moe_combine(y, pairs, w, unique_rows=unique_rows, implementation=name)

    backward = jax.jit(lambda y, w, g: jax.vjp(combine, y, w)[1](g))
    first = backward(y, weights, g)
    for _ in range(5):
        for a, b in zip(first, backward(y, weights, g), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("block", "pair_ids", "dtype"),
    [
        (128, False, "float16"),
        *full(*((block, pair_ids, "bfloat16") for block in (16, 64, 128, 192) for pair_ids in (False, True))),
        *full((16, True, "float16"), (64, False, "float16"), (128, True, "float16"), (192, True, "float16")),
    ],
)
def test_grouped_products(block, pair_ids, dtype, name):
    """Values and both gradients, every tenth pair without an expert, against products in float64."""
    tokens, experts, k, height, width = 1500, 40, 4, 512, 832
    r = np.random.default_rng(block)
    ids = np.where(r.random((tokens, k)) < 0.1, -1, r.integers(0, experts, size=(tokens, k))).astype(np.int32)
    plan, choices = ferrum_jax.moe_plan(ids, experts, block, pair_ids=pair_ids), k if pair_ids else 1
    shapes = (tokens * k // choices, height), (experts, height, width), (tokens * k, width)
    x, w, g = (jnp.asarray(r.normal(size=shape), dtype) for shape in shapes)
    f = functools.partial(ferrum_jax.grouped_matmul, routing=plan, top_k=choices, implementation=name)
    out, vjp = jax.vjp(f, x, w)
    wide = [oracle.f64(a) for a in (x, w, g)]
    (out_want, rows, dw), (out_size, row_sizes, dw_size) = (
        _grouped(*map(f, wide), plan, choices) for f in (np.array, np.abs)
    )
    dx, dx_size, stored = (a.reshape(len(x), choices, -1).sum(1) for a in (rows, row_sizes, np.abs(rows)))
    # A token's rows are stored before they are added.
    rounded = float(jnp.finfo(dtype).eps) / 2 * stored if choices > 1 else 0.0
    oracle.assert_matches(
        (out, *vjp(g)),
        [
            oracle.Sum(out_want, out_size, height),
            oracle.Sum(dx, dx_size, width * choices, rounded),
            oracle.Sum(dw, dw_size, tokens * k),
        ],
    )


@pytest.mark.parametrize("pair_ids", [False, True])
@pytest.mark.parametrize("tokens", [300, *full(16, 4000)])
def test_epilogues_of_grouped_products(tokens, pair_ids, name):
    """Of few, some and many rows an expert: the activation and weights against the same of a product in float64."""
    experts, k, height, width = 20, 4, 512, 448
    r = np.random.default_rng(tokens)
    ids = np.where(r.random((tokens, k)) < 0.1, -1, r.integers(0, experts, size=(tokens, k))).astype(np.int32)
    plan, choices = ferrum_jax.moe_plan(ids, experts, 64, pair_ids=pair_ids), k if pair_ids else 1
    shapes = (tokens * k // choices, height), (experts, height, 2 * width)
    x, w = (
        jnp.asarray(r.normal(size=shape) * scale, "bfloat16") for shape, scale in zip(shapes, (1, 0.05), strict=True)
    )
    weights = r.normal(size=tokens * k).astype(np.float32)
    settings = {"top_k": choices, "activation": "silu", "row_weights": weights}
    got = ferrum_jax.grouped_matmul(x, w, plan, implementation=name, **settings)
    wide = [oracle.f64(a) for a in (x, w)]
    none = np.zeros((tokens * k, 2 * width))
    halves = [np.split(_grouped(*map(f, wide), none, plan, choices)[0], 2, axis=1) for f in (np.array, np.abs)]
    (gate, up), (gate_size, up_size) = halves
    want = gate / (1 + np.exp(-gate)) * up * weights[:, None]
    size = (1.1 * gate_size * (1 + abs(up)) + abs(gate) * (1 + up_size)) * abs(weights[:, None])
    # Where no kernel fuses them, the product is stored in bfloat16 before the activation.
    rounded = float(jnp.finfo("bfloat16").eps) / 2 * (1.1 * abs(gate * up) + abs(gate * up)) * abs(weights[:, None])
    oracle.assert_close(got, want, size, "bfloat16", height, rounded)


def _grouped(x, w, g, plan, choices):
    """The product and both cotangents, each expert's rows at once."""
    slots = np.asarray(plan.sorted_token_ids).reshape(len(plan.block_ids), -1)
    owners = np.asarray(plan.block_ids)
    out, rows, dw = np.zeros_like(g), np.zeros((len(g), x.shape[1])), np.zeros_like(w)
    for expert in range(len(w)):
        names = slots[owners == expert].reshape(-1)
        names = names[names < len(g)]
        out[names] = x[names // choices] @ w[expert]
        rows[names] = g[names] @ w[expert].T
        dw[expert] = x[names // choices].T @ g[names]
    return out, rows, dw


@pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
@pytest.mark.parametrize("flow", ["packed", "pair_ids"])
def test_a_layer_of_more_elements_than_32_bits_count(flow, pair, name):
    """Of a stack of more than 2^31 elements, the last layer: values and gradients of the layer's own array."""
    layers, experts, k, height, width, tokens = 9, 64, 2, 2048, 2048, 700
    keys = jax.random.split(jax.random.key(0), 5)
    stacks = [_layers(key, (layers, experts, height, width)) for key in keys[: 1 + pair]]
    assert stacks[0].size > 2**31
    x = jax.random.normal(keys[2], (tokens * (k if flow == "packed" else 1), height), jnp.bfloat16)
    ids = jax.random.randint(keys[3], (tokens, k), 0, experts, jnp.int32)
    plan = ferrum_jax.moe_plan(ids, experts, 32, pair_ids=flow == "pair_ids")
    settings = {"packed_rows": flow == "packed", "precision": "highest", "implementation": name}
    settings |= {"top_k": 1 if flow == "packed" else k, "dtype": "bfloat16", "activation": "silu" if pair else None}

    def f(x, *matrices):
        return product(x, matrices[0], *plan.routing, up=matrices[1] if pair else None, **settings)

    def with_gradients(x, owns, place):
        out, back = jax.vjp(lambda x, *owns: f(x, *map(place, stacks, owns)), x, *owns)
        return out, back(jnp.sin(out.astype(jnp.float32)).astype(out.dtype))

    owns = [stack[-1] for stack in stacks]
    got = with_gradients(x, owns, lambda stack, own: ferrum_jax.LayerOf(stack, layers - 1, own))
    want = with_gradients(x, owns, lambda stack, own: own)
    assert float(jnp.max(jnp.abs(got[0]))) > 1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@functools.partial(jax.jit, static_argnums=1)
def _layers(key, shape):
    keys = jax.random.split(key, shape[0])
    return jax.lax.map(lambda key: jax.random.normal(key, shape[1:], jnp.bfloat16) / 32, keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_matrices(kind, dtype):
    """The product, its transposed form, and the layer in both flows, forward and by gradient."""
    sizes, x = np.array([3, 0, 4, 1, 2], np.int32), rng("gpu", kind).normal(size=(10, H)).astype(np.float32)
    rows, owner = x.astype(np.dtype(dtype)), np.repeat(np.arange(E), sizes)
    q, w = stored(kind, E, H, H, parts=2)
    for transpose in (False, True):
        matrices = np.swapaxes(w, -1, -2) if transpose else w
        product = functools.partial(ferrum_jax.ragged_dot, rhs=q, group_sizes=sizes, transpose_rhs=transpose)
        got, pull = jax.vjp(jax.jit(product), jnp.asarray(rows))
        terms = np.einsum("mh,mhn->mn", np.abs(oracle.f64(rows)), np.abs(matrices[owner]))
        close(got, np.einsum("mh,mhn->mn", oracle.f64(rows), matrices[owner]), terms, dtype, kind, H)
        (back,) = pull(got)
        terms = np.einsum("mn,mhn->mh", np.abs(oracle.f64(got)), np.abs(matrices[owner]))
        close(back, np.einsum("mn,mhn->mh", oracle.f64(got), matrices[owner]), terms, dtype, kind, H)
    x, logits, quantized, floats = layer_of(kind)
    floats = [jnp.asarray(w, jnp.float32) for w in floats]
    for flow in ("packed", "pair_ids"):
        layer = functools.partial(ferrum_jax.moe_mlp, top_k=2, flow=flow)
        run = jax.jit(jax.value_and_grad(lambda x, *m, f=layer: jnp.sum(jnp.sin(f(x, logits, *m)))))
        for got, want in zip(run(x, *quantized), run(x, *floats), strict=True):
            oracle.assert_near(got, want, "float32")
