"""Call shapes of other code, as docs/migration.md has them: layouts, scans, remat policies, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Size, rng
from jax.sharding import PartitionSpec as P
from layer import gated_dense
from meshes import mesh_of

import ferrum_jax
from ferrum_jax import LayerOf

pytestmark = pytest.mark.tables
SIZE, F, LAYERS = Size(8, 4, 2, 6), 5, 3


def arrays(layers=None):
    """x, logits, gate and up [E, H, F], and down; of several layers the matrices are stacked."""
    r, lead = rng("migration", layers), () if layers is None else (layers,)
    e, h = (*lead, SIZE.E), SIZE.H
    shapes = (SIZE.T, h), (SIZE.T, SIZE.E), (*e, h, F), (*e, h, F), (*e, F, h)
    return [(r.normal(size=shape) / shape[-2] ** 0.5).astype(np.float32) for shape in shapes]


def dense(x, logits, gate, up, down, act=jax.nn.silu):
    return gated_dense(x, logits, np.concatenate([gate, up], -1), down, None, None, SIZE.K, act)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def by_hand(product, x, logits, gate, up, down):
    """The usual layer of JAX: rows sorted by expert, products of groups, a sum by token."""
    scores, ids = jax.lax.top_k(logits, SIZE.K)
    order = jnp.argsort(ids.reshape(-1))
    tokens = order // SIZE.K
    sizes = jnp.bincount(ids.reshape(-1), length=SIZE.E)
    rows = x[tokens]
    rows = jax.nn.silu(product(rows, gate, sizes)) * product(rows, up, sizes)
    rows = product(rows, down, sizes) * jax.nn.softmax(scores).reshape(-1)[order][:, None]
    return jnp.zeros_like(x).at[tokens].add(rows)


def test_ragged_dot_in_place_of_jaxs():
    args = arrays()
    ours, jaxs = (functools.partial(by_hand, f) for f in (ferrum_jax.ragged_dot, jax.lax.ragged_dot))
    close(jax.jit(ours)(*args), dense(*args))

    def gradients(f):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), range(5))(*args)

    for got, want in zip(gradients(ours), gradients(jaxs), strict=True):
        close(got, want)


def test_groups_of_a_plan():
    x, logits, gate, *_ = arrays()
    plan = ferrum_jax.moe_plan(ferrum_jax.route_topk_softmax(logits, SIZE.K).expert_ids, SIZE.E, 4)
    rows = ferrum_jax.moe_dispatch(x, plan)
    got = ferrum_jax.ragged_dot(rows, gate, jnp.diff(plan.expert_offsets))
    close(got, ferrum_jax.grouped_matmul(rows, gate, plan))


def test_a_shard_of_groups():
    """A device multiplies the rows of its own groups, as megablox' gmm does with an offset."""
    x, _, gate, *_ = arrays()
    sizes = jnp.array([3, 0, 4, 1])
    parts = [ferrum_jax.ragged_dot(x, gate[o : o + 2], sizes, group_offset=jnp.int32(o)) for o in (0, 2)]
    close(parts[0] + parts[1], jax.lax.ragged_dot(x, gate, sizes))


def test_maxtext_scans_wi_0_wi_1_and_wo_with_a_remat_policy():
    x, logits, *stacks = arrays(LAYERS)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("moe_gate_up", "moe_down"))
    def block(x, inputs):
        layer, (wi_0, wi_1, wo) = inputs
        wi_0, wi_1, wo = (LayerOf(s, layer, own) for s, own in zip(stacks, (wi_0, wi_1, wo), strict=True))
        return x + ferrum_jax.moe_mlp(x, logits, (wi_0, wi_1), wo, top_k=SIZE.K), None

    def model(x, parameters):
        return jax.lax.scan(block, x, (jnp.arange(LAYERS), parameters))[0]

    def reference(x, parameters):
        for layer in range(LAYERS):
            x = x + gated_dense(
                x, logits, jnp.concatenate([parameters[0][layer], parameters[1][layer]], -1), parameters[2][layer],
                None, None, SIZE.K,
            )  # fmt: skip
        return x

    got, want = (
        jax.jit(jax.value_and_grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1)))(x, tuple(stacks))
        for f in (model, reference)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b)


def test_maxtexts_experts_over_a_mesh():
    x, logits, gate, up, down = arrays()

    def layer(x, logits, wi_0, wi_1, wo):
        return ferrum_jax.parallel.moe_mlp(x, logits, (wi_0, wi_1), wo, axis_name="d", top_k=SIZE.K)

    spread = jax.shard_map(layer, mesh=mesh_of(4), in_specs=P("d"), out_specs=P("d"))
    close(jax.jit(spread)(x, logits, gate, up, down), dense(x, logits, gate, up, down))


def test_a_gating_einsum():
    """Gate and up in one array [E, 2, F, H], as models after Gemma hold them."""
    x, logits, gate, up, down = arrays()
    gating_einsum = np.stack([gate, up], 1).swapaxes(-1, -2)
    pair = gating_einsum[:, 0], gating_einsum[:, 1]
    got = ferrum_jax.moe_mlp(
        x, logits, pair, down.swapaxes(-1, -2), top_k=SIZE.K, activation="gelu_tanh", transpose_rhs=True
    )
    close(got, dense(x, logits, gate, up, down, functools.partial(jax.nn.gelu, approximate=True)))


def test_vllms_and_hugging_faces_layouts():
    """w13 or gate_up_proj [E, 2F, H], w2 or down_proj [E, H, F], and a routing that is made elsewhere."""
    x, logits, gate, up, down = arrays()
    w13, w2 = np.concatenate([gate, up], -1).swapaxes(-1, -2), down.swapaxes(-1, -2)
    topk_weights, topk_ids = jax.lax.top_k(jax.nn.softmax(logits), SIZE.K)
    topk_weights /= topk_weights.sum(-1, keepdims=True)
    got = ferrum_jax.moe_mlp(x, None, w13, w2, router_output=(topk_ids, topk_weights), transpose_rhs=True)
    close(got, dense(x, logits, gate, up, down))
    interleaved = np.stack([gate, up], -1).reshape(SIZE.E, SIZE.H, 2 * F)
    got = ferrum_jax.moe_mlp(x, logits, interleaved, down, top_k=SIZE.K, interleaved=True)
    close(got, dense(x, logits, gate, up, down))
