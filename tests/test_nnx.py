"""ferrum_jax.nnx against NumPy, under Flax's transformations, in meshes, through checkpoints."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from cases import rng
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle import assert_near, f64
from test_mlp import beyond_float16
from test_package import run

import ferrum_jax
from ferrum_jax import LayerOf, checkpoint, presets
from ferrum_jax.checkpoint import MoEParams
from ferrum_jax.nnx import DroppedPairs, ExpertCounts, LoadBalancingLoss, MoE, RouterZLoss, ScoreBias, scan_layers

T, H, F, E = 6, 8, 3, 8
SMALL = {  # every kind of setting that the presets have, at a small size
    "mixtral": presets.mixtral,
    "qwen3_next": dataclasses.replace(presets.qwen3_next, num_experts=E, top_k=2),
    "deepseek_v3": dataclasses.replace(presets.deepseek_v3, num_experts=E, top_k=2, num_groups=4, group_top_k=2),
    "gpt_oss": dataclasses.replace(presets.gpt_oss, num_experts=E, top_k=2),
    "llama4": dataclasses.replace(presets.llama4, num_experts=E, top_k=2),
}


def make(preset=presets.mixtral, seed=0, **kwargs):
    """A layer with parameters from NumPy, which compiles nothing, and biases that are not 0."""
    module = nnx.eval_shape(lambda: MoE(H, F, preset, rngs=nnx.Rngs(0), **kwargs))
    r = rng("nnx", seed)

    def draw(p):
        return np.asarray(r.normal(size=p.shape) * max(p.shape[-2:-1], default=10) ** -0.5)

    module.load(module.params()._make(None if p is None else draw(p) for p in module.params()))
    return module


QUICK = {"kernel_init": nnx.initializers.uniform(0.5), "router_init": nnx.initializers.uniform()}  # to compile
call = nnx.jit(lambda module, x: module(x))


def tokens(*shape, dtype="float32"):
    return jnp.asarray(rng("x", shape).normal(size=shape).astype(np.float32)).astype(dtype)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "silu": lambda gate, up: gate * sigmoid(gate) * up,
    "swiglu_oai": lambda gate, up: (
        (np.clip(up, -7, 7) + 1) * np.minimum(gate, 7) * sigmoid(1.702 * np.minimum(gate, 7))
    ),
}


def scores_of(logits, scoring):
    return sigmoid(logits) if scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum()


def chosen(p, x, preset):
    """Each token's experts."""
    ids = []
    for row in x:
        logits = row @ p["router"] + p.get("router_bias", 0)
        biased = scores_of(logits, preset.scoring) + p.get("score_bias", 0)
        if preset.num_groups:
            groups = biased.reshape(preset.num_groups, -1)
            kept = np.argsort(-np.sort(groups)[:, -2:].sum(1))[: preset.group_top_k]
            biased = np.where(np.isin(np.arange(E) // groups.shape[1], kept), biased, -np.inf)
        ids.append(np.argsort(-biased)[: preset.top_k])
    return ids


def dense(p, x, preset, ids):
    """The layer in float64, token by token, with these experts."""
    act, out = ACTIVATIONS[preset.activation], np.zeros(x.shape)
    for t, row in enumerate(x):
        weights = scores_of(row @ p["router"] + p.get("router_bias", 0), preset.scoring)[ids[t]]
        weights = preset.scale * (weights / weights.sum() if preset.norm_topk_prob else weights)
        for e, weight in zip(ids[t], weights, strict=True):
            inner, outer = (weight, 1) if preset.weight_on_input else (1, weight)
            both = inner * row @ p["w_gate_up"][e] + (p["b_gate_up"][e] if "b_gate_up" in p else 0)
            rows = act(*np.split(both, 2)) @ p["w_down"][e] + (p["b_down"][e] if "b_down" in p else 0)
            out[t] += outer * rows
        if "shared_w_down" in p:
            shared = act(*np.split(row @ p["shared_w_gate_up"], 2)) @ p["shared_w_down"]
            out[t] += shared * (sigmoid(row @ p["shared_gate"]) if "shared_gate" in p else 1)
    return out


def slopes(f, array):
    """The gradient of f() by an array that f reads, by central differences in float64."""
    out = np.zeros(array.shape)
    for i in np.ndindex(array.shape):
        kept = array[i]
        array[i] = kept + 1e-5
        above = f()
        array[i] = kept - 1e-5
        out[i] = (above - f()) / 2e-5
        array[i] = kept
    return out


def close(got, want, dtype="float32"):
    assert_near(got, want, dtype)


@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients_against_numpy(name):
    preset, x = SMALL[name], tokens(T, H)
    module, probe = make(preset), tokens(T, H) + 0.3
    p = {name: f64(value) for name, value in module.params()._asdict().items() if value is not None}
    x64, probe64 = f64(x), f64(probe)
    ids = chosen(p, x64, preset)

    def loss64():
        return np.sum(np.sin(dense(p, x64, preset, ids)) * probe64)

    def loss(module, x):
        y = module(x)
        return jnp.sum(jnp.sin(y) * probe), y

    (_, y), (got, got_x) = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))(module, x)
    close(y, dense(p, x64, preset, ids))
    close(got_x, slopes(loss64, x64))
    assert set(got) == p.keys() - {"score_bias"}
    for param, gradient in got.items():
        close(gradient[...], slopes(loss64, p[param]))


def test_leading_axes_and_no_tokens():
    module, x = make(SMALL["deepseek_v3"]), tokens(2, 3, H)
    want = call(module, x.reshape(6, H))
    np.testing.assert_allclose(call(module, x).reshape(6, H), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(call(module, x[1, 2]), want[5], rtol=1e-5, atol=1e-6)
    nothing = nnx.jit(lambda m: nnx.capture(m, LoadBalancingLoss, ExpertCounts)(x[:0]))
    y, balance, counts = nothing(module)
    assert y.shape == (0, 3, H)
    assert (sown(balance), sown(counts).sum()) == (0, 0)


def test_dtypes():
    """float32 wins unless told otherwise; the router is float32 whatever the rest is."""
    x = tokens(T, H, dtype="bfloat16")

    def of(module, x):
        return nnx.eval_shape(call, module, x).dtype

    assert of(make(), x) == of(make(), x.astype("float16")) == of(make(param_dtype="float16"), x) == jnp.float32
    assert of(make(dtype="bfloat16"), x.astype("float32")) == jnp.bfloat16
    module = make(SMALL["qwen3_next"], param_dtype="bfloat16")
    y = call(module, x)
    assert y.dtype == module.w_gate_up.dtype == module.shared_gate.dtype == jnp.bfloat16
    assert module.router.dtype == module.logits(x).dtype == jnp.float32
    close(module.logits(x), f64(x) @ f64(module.router))
    p = {name: f64(value) for name, value in module.params()._asdict().items() if value is not None}
    want = dense(p, f64(x), module.preset, chosen(p, f64(x), module.preset))
    close(y, want, "bfloat16")
    assert make(SMALL["gpt_oss"], router_dtype="float16").router_bias.dtype == jnp.float16
    assert make(SMALL["deepseek_v3"], param_dtype="float16").score_bias.dtype == jnp.float32


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_what_float16_cannot_hold_goes_through_every_activation(weight_on_input):
    """Experts and shared MLP, with gates of 75,000 and -75,000: fused, with biases of zero, and as a function."""
    x, gate_up, down, bias = beyond_float16()
    params = MoEParams(np.ones((4, 1), np.float16), gate_up, down, shared_w_gate_up=gate_up[0], shared_w_down=down[0])
    biased = params._replace(b_gate_up=bias, b_down=bias)

    def same(gate, up):
        return jax.nn.silu(gate) * up

    settings = {"top_k": 1, "router_dtype": "float16", "weight_on_input": weight_on_input}
    modules = [
        MoE.from_params(p, activation=activation, **settings) for p in (params, biased) for activation in ("silu", same)
    ]

    @nnx.jit
    def every(modules):
        def loss(module, x):
            y = module(x)
            return jnp.sum(y.astype(jnp.float32)) * 1e-3, y

        return [nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(module, x) for module in modules]

    for (_, y), (gradients, of_x) in every(modules):
        np.testing.assert_allclose(f64(y)[:, 0], [2 * 75000 * 250 / 2**18 / 8, 0], rtol=2e-3)
        assert all(np.isfinite(g).all() for g in (of_x, *jax.tree.leaves(gradients)))


def test_initial_values():
    """An expert's fan-in is its own; initialisers see one matrix; biases start at 0."""
    settings = {"num_experts": 16, "top_k": 2, "expert_bias": True, "router_bias": True, "shared_width": 48}
    module = nnx.jit(lambda: MoE(64, 32, rngs=nnx.Rngs(1), **settings))()
    params = {"w_gate_up": 64, "w_down": 32, "router": 64, "shared_w_gate_up": 64, "shared_w_down": 48}
    for name, fan_in in params.items():
        matrix = np.asarray(getattr(module, name))
        for one in matrix if matrix.ndim == 3 else [matrix]:
            np.testing.assert_allclose(one.std(), fan_in**-0.5, rtol=0.1)
    assert len(np.unique(module.w_down)) > 0.99 * module.w_down.size
    assert not any(np.any(bias) for bias in (module.b_gate_up, module.b_down, module.router_bias))
    seen = []

    def zeros(key, shape, dtype):
        seen.append(shape)
        return jnp.zeros(shape, dtype)

    nnx.eval_shape(lambda: MoE(8, 4, num_experts=3, top_k=1, kernel_init=zeros, router_init=zeros, rngs=nnx.Rngs(0)))
    assert seen == [(8, 3), (8, 8), (4, 8)]


def sown(state, *path):
    """The one value of a type that a layer sowed."""
    for key in path:
        state = state[key]
    (value,) = jax.tree.leaves(state)
    return value


@pytest.mark.parametrize("normalization", ["huggingface", "deepseek"])
def test_what_is_sown_equals_the_loss_functions(normalization):
    module, x = make(SMALL["deepseek_v3"], normalization=normalization), tokens(2, T, H)
    mask = jnp.asarray(rng("mask").random((2, T)) < 0.7)
    before = nnx.graphdef(module)
    forward = nnx.jit(lambda m, x: nnx.capture(m, LoadBalancingLoss, RouterZLoss, ExpertCounts)(x, token_mask=mask))
    y, balance, z, counts = forward(module, x)
    assert not np.any(module.route(module.logits(x), token_mask=mask).expert_weights[~mask])
    np.testing.assert_allclose(y[mask], call(module, x)[mask], rtol=1e-5, atol=1e-6)

    logits = module.logits(x)
    routing = {**presets.deepseek_v3, "top_k": 2, "num_groups": 4, "group_top_k": 2, "token_mask": mask}
    routing["bias"] = None if normalization == "deepseek" else module.score_bias[...]  # of the scores alone
    ids = jax.jit(lambda logits: ferrum_jax.route_topk(logits, **routing).expert_ids)(logits)
    options = {"normalization": normalization, "scoring": "sigmoid", "token_mask": mask}
    want = jax.jit(lambda *a: ferrum_jax.load_balancing_loss(*a, E, **options))(logits, ids)
    np.testing.assert_allclose(sown(balance, "load_balancing_loss"), want, rtol=1e-6)
    np.testing.assert_allclose(sown(z, "router_z_loss"), ferrum_jax.router_z_loss(logits, token_mask=mask), rtol=1e-6)
    ids = np.asarray(module.route(logits).expert_ids)[np.asarray(mask)]
    np.testing.assert_array_equal(sown(counts, "expert_counts"), np.bincount(ids.ravel(), minlength=E))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # flax warns of what is sown and not captured
        call(module, x)
    assert nnx.graphdef(module) == before


def test_a_captured_loss_trains_the_router_alone():
    def loss(module, x):
        _, balance, z = nnx.capture(module, LoadBalancingLoss, RouterZLoss)(x)
        return optax.tree.sum(balance) + optax.tree.sum(z)

    gradients = nnx.jit(nnx.grad(loss))(make(), tokens(T, H))
    assert {name for name, g in gradients.items() if np.any(g[...])} == {"router"}


def test_score_bias_moves_the_choice_and_nothing_else():
    module, x = make(dataclasses.replace(presets.minimax_m2, num_experts=E, top_k=2)), tokens(64, H)
    module.score_bias[...] = jnp.zeros(E)
    optimizer = nnx.Optimizer(module, optax.sgd(1e-2), wrt=nnx.Param)
    logits = module.logits(x)
    optimizer.update(module, nnx.jit(nnx.grad(lambda m, x: jnp.sum(m(x) ** 2)))(module, x))
    assert not np.any(module.score_bias)
    assert np.any(module.logits(x) != logits)

    logits, worst = module.logits(x), []
    count = nnx.jit(lambda m, x: nnx.capture(m, ExpertCounts)(x)[1])
    for _ in range(60):
        counts = sown(count(module, x), "expert_counts")
        worst.append(int(counts.max()))
        want = ferrum_jax.update_routing_bias(module.score_bias[...], counts, 0.01)
        module.update_score_bias(counts, 0.01)
        np.testing.assert_array_equal(module.score_bias, want)
    assert worst[-1] <= 20 < worst[0]  # 16 is even
    ids, weights = module.route(logits)
    scores = np.take_along_axis(sigmoid(f64(logits)), np.asarray(ids), axis=-1)
    close(weights, scores / scores.sum(-1, keepdims=True))


def test_scan_over_layers_equals_layers_one_by_one():
    """With remat, sown losses and counts, gradients, and the update of all layers' biases at once."""
    preset, x = dataclasses.replace(presets.minimax_m2, num_experts=E, top_k=2), tokens(T, H)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stacked(rngs):
        return MoE(H, F, preset, rngs=rngs)

    layers, singles = nnx.eval_shape(lambda: stacked(nnx.Rngs(0))), nnx.List([make(preset, seed) for seed in range(3)])
    layers.load(jax.tree.map(lambda *a: np.stack(a), *(layer.params() for layer in singles)))
    assert layers.w_down.shape == (3, E, F, H)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def scanned(layer, x):
        return x + layer(x)

    def one_by_one(layers, x):
        for layer in layers:
            x = x + call(layer, x)
        return x

    def loss(run, layers):
        y, balance, counts = nnx.capture(lambda layers: run(layers, x), LoadBalancingLoss, ExpertCounts)(layers)
        return jnp.sum(jnp.sin(y)) + optax.tree.sum(balance), (y, counts)

    run = nnx.value_and_grad(loss, argnums=1, has_aux=True)
    (value, (y, counts)), gradients = nnx.jit(run, static_argnums=0)(scanned, layers)
    (want, (want_y, want_counts)), want_gradients = run(one_by_one, singles)
    np.testing.assert_allclose(y, want_y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    together = jnp.stack([sown(want_counts, i, "expert_counts") for i in range(3)])
    np.testing.assert_array_equal(sown(counts, "expert_counts"), together)
    for name, gradient in gradients.items():
        close(gradient[...], f64(jnp.stack([want_gradients[i][name][...] for i in range(3)])))
    layers.update_score_bias(together)
    for i, layer in enumerate(singles):
        layer.update_score_bias(together[i])
        np.testing.assert_array_equal(layers.score_bias[i], layer.score_bias)


def build(**kwargs):
    return MoE(H, F, SMALL["gpt_oss"], **QUICK, rngs=nnx.Rngs(3), **kwargs)


loss = nnx.value_and_grad(lambda module, x: jnp.sum(jnp.sin(module(x))))


@pytest.fixture(scope="module")
def unsharded():
    module = nnx.jit(build)()
    return module, *nnx.jit(loss)(module, tokens(T, H))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_parameters_are_made_sharded(kind, unsharded):
    whole, want, want_gradients = unsharded
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        module = nnx.jit(lambda: build(partition={"E": "expert"}))()
        again = MoE.from_params(whole.params(), SMALL["gpt_oss"], partition={"E": "expert"})
        value, gradients = nnx.jit(loss)(module, tokens(T, H))
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        for made in (module, again):
            array = getattr(made, name)[...]
            assert array.sharding.spec[0] == "expert"
            assert {shard.data.shape for shard in array.addressable_shards} == {(E // 4, *array.shape[1:])}
    assert module.router.sharding.is_fully_replicated
    for got in (module, again):
        jax.tree.map(np.testing.assert_array_equal, got.params(), whole.params())
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for name, gradient in want_gradients.items():
        close(gradients[name][...], f64(gradient[...]))


@pytest.mark.parametrize(
    ("partition", "spec", "kind"),
    [
        pytest.param(partition, spec, kind, marks=[] if kind == usual else [pytest.mark.full])
        for partition, spec, usual in (
            ({"E": "a", "F": "b"}, P("a"), AxisType.Explicit),
            ({"E": "b", "H": "a"}, P("a", "b"), AxisType.Auto),
            ({"F": "a"}, P("a"), AxisType.Explicit),
        )
        for kind in (AxisType.Explicit, AxisType.Auto)
    ],
)
def test_a_mesh_divides_the_layer(partition, spec, kind):
    """Tokens, experts, F and H: by the parameters' types, or by `sharding`; with a shared MLP."""
    preset, x = dataclasses.replace(presets.mixtral, shared_experts=1), tokens(4, 2, 16)

    def build(**kwargs):
        return MoE(16, 8, preset, **QUICK, rngs=nnx.Rngs(3), **kwargs)

    want = nnx.jit(loss)(nnx.jit(build)(), x)
    sharding = ferrum_jax.MoESharding(tuple(spec), *[partition.get(letter) for letter in "EFH"])
    with jax.set_mesh(jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)):
        how = {"sharding": sharding} if kind == AxisType.Auto else {}
        module = nnx.jit(lambda: build(partition=partition, **how))()
        got = nnx.jit(loss)(module, jax.device_put(x, spec))
        again = MoE.from_params(module.params(), preset, partition=partition)
        again.load(module.params())
        jax.tree.map(np.testing.assert_array_equal, again.params(), module.params())
    halved = "F" in partition  # then gate and up are parameters of their own
    assert (module.w_gate_up is None, module.w_gate is None) == (halved, not halved)
    (got, gradients), (want, want_gradients) = got, want
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for name, gradient in want_gradients.items():
        names = ("w_gate", "w_up") if halved and name == "w_gate_up" else (name,)
        g, w = jnp.concatenate([gradients[n][...] for n in names], -1), np.asarray(gradient[...])
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5 * np.abs(w).max())


def test_gate_and_up_of_a_layer_that_divides_f():
    """The same layer, its parameters in two arrays: made, loaded, scanned, and given back as one."""
    with jax.set_mesh(jax.make_mesh((1,), ("a",), axis_types=(AxisType.Auto,))):
        whole, x = build(), tokens(T, H)
        module = build(partition={"F": "a"})
        jax.tree.map(np.testing.assert_array_equal, module.params(), whole.params())
        again = MoE.from_params(whole.params(), SMALL["gpt_oss"], partition={"F": "a"})
        assert again.b_up.shape == (E, F)
        assert again.w_gate_up is None
        np.testing.assert_allclose(call(again, x), call(whole, x), rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match=r"w_gate_up must be \(8, 8, 6\)"):
            again.load(whole.params()._replace(w_gate_up=np.zeros((E, H, F))))
        make = nnx.vmap(lambda rngs: MoE(H, F, partition={"F": "a"}, **QUICK, num_experts=4, top_k=2, rngs=rngs))
        blocks = make(nnx.Rngs(0).split(3))

        def total(scan, blocks):
            return jnp.sum(jnp.sin(scan(lambda moe, x: (x + moe(x), None), blocks, x)[0]))

        plain = nnx.scan(lambda moe, x: x + moe(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        want = nnx.grad(lambda blocks: jnp.sum(jnp.sin(plain(blocks, x))))(blocks)
        got = nnx.grad(functools.partial(total, ferrum_jax.nnx.scan_layers))(blocks)
        for name, gradient in want.items():
            np.testing.assert_allclose(got[name][...], gradient[...], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.full)], ids=lambda t: t.name
)
def test_losses_counts_and_masks_on_a_mesh(kind):
    """What is sown, its gradients, and the output, with a mask: those of one device."""
    x, mask = tokens(4, 2, H), np.asarray(rng("mask").random((4, 2)) < 0.7)

    def run(module, x, mask):
        def loss(module, x):
            kinds = LoadBalancingLoss, RouterZLoss, ExpertCounts
            out, *found = nnx.capture(lambda module, x: module(x, token_mask=mask), *kinds)(module, x)
            *losses, counts = map(sown, found, ("load_balancing_loss", "router_z_loss", "expert_counts"))
            return sum(losses) + jnp.sum(jnp.sin(out)), (out, counts)

        return nnx.value_and_grad(loss, has_aux=True)(module, x)

    want = nnx.jit(run)(nnx.jit(build)(), x, mask)
    with jax.set_mesh(jax.make_mesh((4,), ("a",), axis_types=(kind,))):
        how = {"sharding": ferrum_jax.MoESharding("a", "a")} if kind == AxisType.Auto else {}
        module = nnx.jit(lambda: build(partition={"E": "a"}, **how))()
        got = nnx.jit(run)(module, *(jax.device_put(a, jax.P("a")) for a in (x, mask)))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name)
def test_capacity_and_chunks(kind):
    """Dropped pairs are sown, those of all devices together."""
    x, options = tokens(16, H), {"exchange": "padded", "capacity": 4, "chunks": 2}
    with jax.set_mesh(jax.make_mesh((4,), ("a",), axis_types=(kind,))):
        how = {"sharding": ferrum_jax.MoESharding("a", "a")} if kind == AxisType.Auto else {}
        module = nnx.jit(lambda: build(partition={"E": "a"}, **options, **how))()
        run = nnx.jit(nnx.capture(lambda module, x: module(x), DroppedPairs))
        out, dropped = run(module, jax.device_put(x, jax.P("a")))
    ids = np.asarray(build().route(build().logits(x)).expert_ids)
    parts = (ids // (E // 4)).reshape(4 * 2, -1)  # the devices that the pairs of a device and chunk go to, one to each
    assert int(sown(dropped, "dropped_pairs")) == sum(part.size - len(set(part)) for part in parts) > 0
    assert np.all(np.isfinite(out))


def test_partition_names_every_axis_and_survives_vmap():
    names = {"E": "expert", "H": ("data", "host"), "F": "model"}
    with nnx.use_eager_sharding(False):

        def make_one(rngs):
            return MoE(H, F, SMALL["qwen3_next"], partition=names, rngs=rngs)

        stack = nnx.vmap(make_one, transform_metadata={nnx.PARTITION_NAME: "layer"})
        layers = nnx.eval_shape(lambda: stack(nnx.Rngs(0).split(2)))
    specs = {name: tuple(v.get_metadata("out_sharding")) for name, v in nnx.state(layers, nnx.Param).items()}
    assert specs == {
        "router": ("layer", ("data", "host"), None),
        "w_gate": ("layer", "expert", ("data", "host"), "model"),
        "w_up": ("layer", "expert", ("data", "host"), "model"),
        "w_down": ("layer", "expert", "model", ("data", "host")),
        "shared_w_gate_up": ("layer", ("data", "host"), "model"),
        "shared_w_down": ("layer", "model", ("data", "host")),
        "shared_gate": ("layer", ("data", "host"), None),
    }


def test_orbax_round_trip(tmp_path):
    module = make(SMALL["deepseek_v3"])
    abstract = nnx.eval_shape(lambda: MoE(H, F, SMALL["deepseek_v3"], rngs=nnx.Rngs(9)))
    graph, shapes = nnx.split(abstract)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(module))
        checkpointer.wait_until_finished()
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "state", shapes))
    assert isinstance(restored.score_bias, ScoreBias)
    jax.tree.map(np.testing.assert_array_equal, restored.params(), module.params())
    np.testing.assert_array_equal(call(restored, tokens(T, H)), call(module, tokens(T, H)))


@pytest.mark.parametrize("name", SMALL)
def test_from_a_checkpoint_and_back(name):
    preset, x = SMALL[name], tokens(T, H)
    module = make(preset, param_dtype="bfloat16", router_dtype="bfloat16")
    tensors = checkpoint.to_layout(module.params(), name, prefix="mlp.")
    loaded = MoE.from_params(checkpoint.load_moe(tensors, name, prefix="mlp."), preset)
    assert nnx.graphdef(loaded) == nnx.graphdef(module)
    np.testing.assert_array_equal(call(loaded, x), call(module, x))
    wide = MoE.from_params(module.params(), preset, param_dtype="float32", dtype="bfloat16")
    assert wide.w_down.dtype == jnp.float32
    other = make(preset, seed=1)
    other.load(wide.params())
    jax.tree.map(np.testing.assert_array_equal, other.params(), wide.params())


def test_loaded_parameters_are_no_more_bound_to_a_device_than_the_layers_own():
    module = MoE(H, F, presets.mixtral, rngs=nnx.Rngs(0), **QUICK)
    module.load(module.params())
    spread = jax.NamedSharding(jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,)), jax.P("d"))
    x = tokens(T, H)
    np.testing.assert_allclose(call(module, jax.device_put(x, spread)), call(module, x), rtol=1e-5, atol=1e-6)
    there = jax.devices()[1]
    for variable in jax.tree.leaves(nnx.variables(module), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        variable.set_value(jax.device_put(variable.get_value(), there))
    module.load(make().params())
    assert all(p is None or p.devices() == {there} for p in module.params())


def test_how_it_is_run_is_passed_on():
    x = jax.ShapeDtypeStruct((T, H), jnp.float32)

    def lowered(**how):
        return str(jax.make_jaxpr(make(**how))(x))

    assert "ferrum_moe_dispatch" not in lowered()
    assert "ferrum_moe_dispatch" in lowered(flow="packed")
    assert "block_size=32" in lowered(block_size=32)
    assert "implementation=xla" in lowered(implementation="xla")
    assert "implementation=xla" not in lowered()


def test_precision_is_that_of_experts_and_shared_mlp():
    """The router's product stays in full float32; so is every product without an argument and a context."""
    x = jax.ShapeDtypeStruct((T, H), jnp.float32)

    def found(context, precision=None, dtype="float32"):
        module = make(SMALL["qwen3_next"], precision=precision, dtype=dtype)
        with jax.default_matmul_precision(context):
            equations = jax.make_jaxpr(module)(x).eqns
        router, *shared = (e.params["precision"] for e in equations if e.primitive.name == "dot_general")
        assert router == (jax.lax.Precision.HIGHEST,) * 2
        assert len(shared) == 3  # with that of the shared gate
        experts = {e.params["precision"] for e in equations if e.primitive.name.startswith("ferrum_grouped")}
        return experts, set(shared)

    full = {"highest"}, {(jax.lax.Precision.HIGHEST,) * 2}
    rounded = {"default"}, {(jax.lax.Precision.DEFAULT,) * 2}
    assert found(None) == found("high") == found("tensorfloat32", "highest") == full
    assert found("tensorfloat32") == found(None, "tensorfloat32") == found(None, jax.lax.Precision.DEFAULT) == rounded
    assert found(None, "tensorfloat32", "bfloat16") == ({"highest"}, {None})


ERRORS = {
    "a missing setting": (lambda: MoE(H, F, top_k=2, rngs=nnx.Rngs(0)), TypeError, "num_experts must be given"),
    "an unknown setting": (lambda: make(topk=3), TypeError, "top_k.*topk"),
    "too few experts": (lambda: make(num_experts=0), ValueError, "num_experts.*0"),
    "a width": (lambda: MoE(H, 0, presets.mixtral, rngs=nnx.Rngs(0)), ValueError, "expert_width.*0"),
    "a dtype": (lambda: make(param_dtype=jnp.int32), TypeError, "param_dtype.*int32"),
    "a partition": (lambda: make(partition={"experts": "d"}), ValueError, "partition.*'E'.*experts"),
    "a normalization": (lambda: make(normalization="hf"), ValueError, "normalization.*'switch'.*'hf'"),
    "a precision": (lambda: make(precision="tf32"), ValueError, "precision.*'tensorfloat32'.*'tf32'"),
    "a gate of nothing": (lambda: make(shared_gate=True), ValueError, "shared_experts"),
    "x's width": (lambda: make()(tokens(T, 5)), ValueError, r"H = 8.*\(6, 5\)"),
    "x's dtype": (lambda: make()(jnp.ones((T, H), int)), TypeError, "x must be.*int32"),
    "a flag": (lambda: make(score_bias="no"), TypeError, "MoE: score_bias must be True or False; got str"),
    "shared experts": (lambda: make(shared_experts=True), TypeError, "MoE: shared_experts must be a Python int.*bool"),
    "no score bias": (lambda: make().update_score_bias(jnp.ones(E, int)), ValueError, "score_bias=True"),
    "params": (
        lambda: make().load(make(expert_bias=True).params()._replace(router=np.ones((H, 5)))),
        ValueError,
        r"router must be \(8, 8\); got \(8, 5\).*b_down must be None; got \(8, 8\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_named_errors(name):
    call, kind, words = ERRORS[name]
    with pytest.raises(kind, match=words):
        call()


SETTINGS = {
    "scoring": "sofmax",
    "top_k": E + 1,
    "num_groups": 3,
    "group_top_k": 2,
    "group_score": "mean",
    "zero_sum": "none",
    "scale": 0.0j,
    "norm_topk_prob": "no",
    "activation": "swish",
    "flow": "pairs",
    "block_size": 0,
    "implementation": "cuda",
}


@pytest.mark.parametrize(("name", "wrong"), [*SETTINGS.items(), ("top_k", True), ("block_size", 16.0)])
def test_the_constructor_refuses_a_setting_as_a_call_would(name, wrong):
    given = {name: wrong, **({"group_top_k": 1} if name == "num_groups" else {})}
    with pytest.raises((TypeError, ValueError)) as made:
        nnx.eval_shape(lambda: MoE(H, F, presets.mixtral, rngs=nnx.Rngs(0), **given))
    module, p = make(), presets.mixtral
    if hasattr(p, name):
        module.preset = dataclasses.replace(p, **given)
    else:
        setattr(module, name, wrong)
    with pytest.raises((TypeError, ValueError)) as called:
        nnx.eval_shape(lambda m: m(tokens(T, H)), module)
    assert (made.type, str(made.value)) == (called.type, str(called.value))
    assert name in str(made.value)


def test_flax_is_imported_here_only():
    said = run(
        "import sys; sys.modules['flax'] = None\n"
        "import ferrum_jax\n"
        "try:\n    import ferrum_jax.nnx\nexcept ImportError as error:\n    print(error)"
    )
    assert "pip install '.[nnx]'" in said


@pytest.mark.parametrize("name", ["qwen3_next", "gpt_oss"])
def test_a_masked_token_that_holds_nan_harms_no_gradient(name):
    module, mask = make(SMALL[name]), jnp.array([False] + [True] * (T - 1))
    clean = tokens(T, H).at[0].set(0)
    gradient = nnx.jit(nnx.grad(lambda module, x: module(x, token_mask=mask).sum()))
    got, want = gradient(module, clean.at[0].set(jnp.nan)), gradient(module, clean)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(got), nnx.to_pure_dict(want))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


class Block(nnx.Module):
    """A layer of a model: a norm, the experts and dropout, whose stream changes at each call."""

    def __init__(self, rngs, **settings):
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.moe = MoE(16, 4, num_experts=6, top_k=2, expert_bias=True, rngs=rngs, **settings)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.moe(self.norm(x))).astype(x.dtype)


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"dtype": jnp.bfloat16}, marks=pytest.mark.full)],
    ids=["float32", "cast to bfloat16"],
)
def test_scan_layers_equals_nnx_scan(settings):
    """Values, gradients, what the layers sow, and the streams of dropout; in place, where nothing is cast."""
    blocks = nnx.vmap(functools.partial(Block, **settings))(nnx.Rngs(0).split(3))
    x = jax.random.normal(jax.random.key(1), (5, 16))
    seen = []

    def sown(block, x):
        seen.append(type(block.moe.w_gate_up.get_value()))
        x, balance = nnx.capture(block, LoadBalancingLoss)(x)
        return x, optax.tree.sum(balance)

    def ours(blocks, x):
        return scan_layers(nnx.remat(sown), blocks, x)

    def theirs(blocks, x):
        return nnx.scan(lambda x, block: sown(block, x), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, blocks)

    results = []
    for scan in (ours, theirs):
        model = nnx.clone(blocks)

        def loss(model, x, scan=scan):
            y, balance = scan(model, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))) + jnp.sum(balance)

        found = nnx.jit(nnx.value_and_grad(loss))(model, x)
        results.append(jax.tree.leaves((found, nnx.state(model, nnx.RngCount))))
    assert LayerOf in seen
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-2 if settings else 1e-4, atol=1e-4)


def test_scan_layers_of_no_variables():
    with pytest.raises(ValueError, match="scan_layers: blocks must have variables"):
        scan_layers(lambda block, x: (x, None), nnx.Dict(), jnp.ones(3))
