"""jax.export: written, read back and executed; with symbolic numbers of tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import layer
import numpy as np
import pytest
from cases import CASES, FLOAT_CASES, SMALL, Size, finite_args, per_primitive, rng
from compiled import on_h200
from jax import export

import ferrum_jax

CHECKS = ferrum_jax.export_checks()


@pytest.mark.parametrize("case", per_primitive(CASES), ids=str)
def test_round_trip(case):
    args = case.args(rng(case), SMALL, "float32")
    f = functools.partial(case.results, size=SMALL)
    stored = export.export(jax.jit(f), platforms=("cpu", "cuda"), disabled_checks=CHECKS)(*args).serialize()
    for got, want in zip(export.deserialize(stored).call(*args), f(*args), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("case", per_primitive(FLOAT_CASES), ids=str)
def test_with_derivatives(case):
    args = finite_args(case, rng(case), SMALL)

    def loss(x):
        return (case.float_results(x, *args[1:], size=SMALL)[0] ** 2).sum()

    stored = export.export(jax.jit(loss))(args[0]).serialize(vjp_order=1)
    got = jax.grad(export.deserialize(stored).call)(args[0])
    np.testing.assert_allclose(got, jax.grad(loss)(args[0]), rtol=1e-5, atol=1e-6)


def test_whole_layer():
    size = Size(5, 4, 2, 3)
    args = layer.init(0, size)
    f = functools.partial(layer.packed, top_k=2)
    exported = export.export(jax.jit(f))(*args)
    np.testing.assert_allclose(exported.call(*args), f(*args), rtol=1e-6)


# ---- symbolic sizes

of = jax.ShapeDtypeStruct
(T,) = export.symbolic_shape("T")
B, S = export.symbolic_shape("B, S")
COUNTS = 1, 2, 40  # of tokens: fewer pairs than experts, as many, and more
E, K, H, F = 4, 2, 6, 3


def exported(f, *args, platforms=("cpu", "cuda")):
    """For a GPU too, on which None would take kernels. Written and read back."""
    with on_h200():
        stored = export.export(jax.jit(f), platforms=platforms, disabled_checks=CHECKS)(*args).serialize(vjp_order=1)
    return export.deserialize(stored).call


def assert_same(got, want, **tolerance):
    assert jax.tree.map(jnp.shape, list(jax.tree.leaves(got))) == jax.tree.map(jnp.shape, list(jax.tree.leaves(want)))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        if tolerance:
            np.testing.assert_allclose(g, w, **tolerance)
        else:
            np.testing.assert_array_equal(g, w)


def logits_of(*shape):
    return rng("logits", shape).normal(size=shape).astype(np.float32)


def routed(logits):
    return ferrum_jax.route_topk_softmax(logits, K)


def ids_of(logits):
    """With a pair without an expert."""
    ids = routed(logits).expert_ids
    return ids.at[-1, -1].set(-1)


def masked(logits):
    return logits[:, 0] > 0


BIAS = np.linspace(-1, 1, E, dtype=np.float32)
TABLES = {  # functions of logits[T,E]
    "softmax": routed,
    "topk": lambda x: ferrum_jax.route_topk(
        x, K, scoring="sigmoid", bias=BIAS, num_groups=2, group_top_k=1, token_mask=masked(x), expert_map=np.arange(E)
    ),
    "bias of each token": lambda x: ferrum_jax.route_topk(x, K, scoring="sqrt_softplus", bias=x * 2),
    "replay": lambda x: ferrum_jax.route_topk(x, K, forced_ids=ids_of(x)),
    "presets": lambda x: ferrum_jax.route_topk(x, **dataclasses.replace(ferrum_jax.presets.gpt_oss, num_experts=E)),
    "pairs": lambda x: ferrum_jax.moe_build_pairs_by_token(ids_of(x), E),
    "align": lambda x: ferrum_jax.moe_align_block_size(ids_of(x), E, 3),
    "align pair ids": lambda x: ferrum_jax.moe_align_block_size_pair_ids(ids_of(x), E, 16),
    "plan": lambda x: ferrum_jax.moe_plan(ids_of(x), E, 3),
    "plan of pair ids": lambda x: ferrum_jax.moe_plan(ids_of(x), E, 1, pair_ids=True),
    "plan of many experts": lambda x: ferrum_jax.moe_plan(ids_of(x), 300, 4),
    "route plan": lambda x: ferrum_jax.moe_route_plan(x, K, 4),
    "capacity": lambda x: ferrum_jax.limit_capacity(routed(x), E, 3),
    "capacity by weight": lambda x: ferrum_jax.limit_capacity(routed(x), E, 2, priority="weight"),
    "capacity by tokens": lambda x: ferrum_jax.limit_capacity(routed(x), E, x.shape[0] // E + 1),
    "huggingface": lambda x: ferrum_jax.load_balancing_loss(x, ids_of(x), E, token_mask=masked(x)),
    "deepseek": lambda x: ferrum_jax.load_balancing_loss(x, ids_of(x), E, normalization="deepseek", scoring="sigmoid"),
    "z loss": lambda x: ferrum_jax.router_z_loss(x, token_mask=masked(x)),
    "counts": lambda x: ferrum_jax.expert_counts(ids_of(x), E, token_mask=masked(x)),
    "stats": lambda x: ferrum_jax.routing_stats(ferrum_jax.RouterOutput(ids_of(x), x[:, :K]), E, block_size=8),
}


# The others do the same with other settings.
USUAL = ("presets", "plan", "route plan", "capacity by tokens", "deepseek", "z loss", "counts", "stats")


@pytest.mark.parametrize(
    ("name", "x64"),
    [
        *(pytest.param(name, False, marks=[] if name in USUAL else [pytest.mark.full]) for name in TABLES),
        ("plan", True),
        *(pytest.param(name, True, marks=pytest.mark.full) for name in ("stats", "capacity")),
    ],
)
def test_symbolic_routing_and_tables(name, x64):
    f = TABLES[name]
    with jax.enable_x64(x64):
        call = exported(f, of((T, E), "float32"))
        for tokens in COUNTS:
            logits = logits_of(tokens, E)
            # Integers and weights by the same steps: equal bits, but for sums whose order XLA chooses by the shape.
            assert_same(call(logits), jax.jit(f)(logits), rtol=1e-6, atol=1e-7)


def product(kind, x, logits, w, weights):
    """A grouped product with an activation and weights, fed by tables of either kind."""
    plan = ferrum_jax.moe_plan(ids_of(logits), E, 4, pair_ids=kind == "pair_ids")
    rows = x if kind == "pair_ids" else ferrum_jax.moe_dispatch(x, plan)
    return ferrum_jax.grouped_matmul(rows, w, plan, activation="silu", row_weights=weights.reshape(-1))


def aligned_product(x, logits, w, weights):
    """The same without the table that tells how many pairs there are: S tells it."""
    routing = ferrum_jax.moe_align_block_size_pair_ids(ids_of(logits), E, 4)
    return ferrum_jax.grouped_matmul(x, w, routing)


def combined(unique, x, logits, w, weights):
    pairs, tokens, _ = ferrum_jax.moe_build_pairs_by_token(ids_of(logits), E)
    rows = ferrum_jax.moe_dispatch(x, tokens, pairs_by_token=pairs if unique else None)
    return ferrum_jax.moe_combine(rows * 2, pairs, weights, unique_rows=unique)


def layer_of(x, logits, w, weights, **settings):
    out = ferrum_jax.moe_mlp(x, logits, w, w[:, :, :F].swapaxes(1, 2), top_k=K, **settings)
    return out * weights.sum(-1, keepdims=True)


def layer_with_biases(x, logits, w, weights):
    routing = ferrum_jax.RouterOutput(ids_of(logits), weights)
    b_down = jnp.ones((E, H))
    down = w[:, :, :F].swapaxes(1, 2)
    return ferrum_jax.moe_mlp(
        x, None, w, down, router_output=routing, b_gate_up=jnp.ones((E, 2 * F)), b_down=b_down, activation="swiglu_oai"
    )


LAYERS = {  # functions of x[T,H], logits[T,E], w[E,H,2F], weights[T,K]
    "product": functools.partial(product, "packed"),
    "product of pair ids": functools.partial(product, "pair_ids"),
    "product without a plan": aligned_product,
    "combine": functools.partial(combined, False),
    "combine of unique rows": functools.partial(combined, True),
    "moe_mlp": layer_of,
    "moe_mlp, packed": functools.partial(layer_of, flow="packed", block_size=2),
    "moe_mlp, pair ids": functools.partial(layer_of, flow="pair_ids"),
    "moe_mlp with biases": layer_with_biases,
}


def layer_args(tokens):
    r = rng("layer", tokens)
    shapes = (tokens, H), (tokens, E), (E, H, 2 * F), (tokens, K)
    return [r.normal(size=shape).astype(np.float32) for shape in shapes]


MOST = "moe_mlp with biases"  # does what the others do, and more


@pytest.mark.parametrize(
    ("name", "platforms"),
    [
        *(pytest.param(n, ("cpu", "cuda"), marks=[pytest.mark.full] if n != MOST else []) for n in LAYERS),
        ("moe_mlp", ("cpu",)),
    ],
    ids=str,
)
def test_symbolic_layers_and_gradients(name, platforms):
    """Values; gradients exported as a function; gradients through the exported values."""
    f = LAYERS[name]

    def gradients(f):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), range(4))

    args = of((T, H), "float32"), of((T, E), "float32"), of((E, H, 2 * F), "float32"), of((T, K), "float32")
    value, gradient = (exported(g, *args, platforms=platforms) for g in (f, gradients(f)))
    for tokens in (1, 37):
        args = layer_args(tokens)
        want, wanted = jax.jit(f)(*args), jax.jit(gradients(f))(*args)
        # Another flow and block size add the same terms in another order.
        assert_same(value(*args), want, rtol=1e-5, atol=1e-5)
        assert_same(gradient(*args), wanted, rtol=1e-4, atol=1e-4)
        assert_same(gradients(value)(*args), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"normalization": "deepseek"}, marks=pytest.mark.full),
        {"score_bias": True, "weight_on_input": True},
    ],
    ids=str,
)
def test_symbolic_axes_of_a_module(options):
    """nnx.MoE on [B, S, H], with its losses and counts."""
    from flax import nnx

    from ferrum_jax.nnx import ExpertCounts, LoadBalancingLoss, MoE, RouterZLoss

    preset = dataclasses.replace(ferrum_jax.presets.qwen3_next, num_experts=E, top_k=K)
    graph, state = nnx.split(MoE(H, F, preset, rngs=nnx.Rngs(0), **options))
    arrays, tree = jax.tree.flatten(state)

    def run(x, *arrays):
        moe = nnx.merge(graph, jax.tree.unflatten(tree, arrays))
        return jax.tree.leaves(nnx.capture(moe, LoadBalancingLoss, RouterZLoss, ExpertCounts)(x))

    call = exported(run, of((B, S, H), "float32"), *(of(x.shape, x.dtype) for x in arrays))
    for batch, length in ((1, 1), (2, 7)):
        x = logits_of(batch, length, H)
        assert_same(call(x, *arrays), jax.jit(run)(x, *arrays), rtol=1e-5, atol=1e-5)


def test_symbolic_tables_come_and_go():
    """Results are inputs of another exported function, with their facts; those that are symbolic are unknown."""

    def make(logits):
        output, plan = ferrum_jax.moe_route_plan(logits, K, 4)
        pairs = ferrum_jax.moe_build_pairs_by_token(output.expert_ids, E)
        return output, plan, pairs, ferrum_jax.moe_align_block_size_pair_ids(output.expert_ids, E, 4)

    def use(x, w, output, plan, pairs, routing):
        down = w[:, :, :F].swapaxes(1, 2)
        rows = ferrum_jax.grouped_matmul(ferrum_jax.moe_dispatch(x, pairs), w, plan)
        out = ferrum_jax.moe_combine(rows, plan, output.expert_weights)
        out += ferrum_jax.moe_mlp(x, None, w, down, router_output=output)
        return out, ferrum_jax.grouped_matmul(x, w, routing), plan, pairs, routing, output

    made = exported(make, of((T, E), "float32"))
    abstract = jax.eval_shape(make, of((T, E), "float32"))
    slots = ferrum_jax.max_aligned_rows(K * T, E, 4)
    assert abstract[1].sorted_token_ids.shape == abstract[3].sorted_token_ids.shape == (slots,)
    used = exported(use, of((T, H), "float32"), of((E, H, 2 * F), "float32"), *abstract)
    for tokens in COUNTS:
        results = made(logits_of(tokens, E))
        assert (results[1].block_size, results[1].top_k, results[2].num_experts) == (4, K, E)
        args = logits_of(tokens, H), logits_of(E, H, 2 * F), *results
        assert_same(used(*args), use(*args), rtol=1e-5, atol=1e-5)
    (k,) = export.symbolic_shape("K")
    pairs = jax.eval_shape(lambda i: ferrum_jax.moe_build_pairs_by_token(i, E), of((5, k), "int32"))
    assert pairs.top_k is None


def test_symbolic_sizes_have_no_kernels():
    f = functools.partial(ferrum_jax.moe_mlp, top_k=K, implementation="triton")
    args = of((T, H), "float32"), of((T, E), "float32"), of((E, H, 2 * F), "float32"), of((E, F, H), "float32")
    with pytest.raises(NotImplementedError, match="implementation='triton' cannot be used: a kernel's grid"):
        exported(f, *args)


def test_symbolic_rows_with_tables_of_known_sizes():
    tables = of((96,), "int32"), of((6,), "int32"), of((), "int32")

    def product(x, w, *r):
        return ferrum_jax.grouped_matmul(x, w, ferrum_jax.MoeRouting(*r, kind="packed"), activation="silu")

    args = of((T, 4), "float32"), of((4, 4, 6), "float32"), *tables
    assert jax.eval_shape(product, *args).shape == (T, 3)
    exported(product, *args)
    weighted = of((T, 2, 4), "float32"), of((T, 2), "float32")
    assert jax.eval_shape(ferrum_jax.weighted_sum_batched, *weighted).shape == (T, 4)
    exported(ferrum_jax.weighted_sum_batched, *weighted)


def test_symbolic_batch():
    f = jax.jit(lambda i: ferrum_jax.moe_plan(i, 4, 2))
    ids = rng("b").integers(0, 4, (3, 5, 2)).astype(np.int32)
    exported = export.export(f)(of((B, 5, 2), np.int32))
    for got, want in zip(exported.call(ids), f(ids), strict=True):
        np.testing.assert_array_equal(got, want)
