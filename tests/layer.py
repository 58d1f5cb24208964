"""A whole small MoE layer over the library's ops, in both data flows, and the same without them."""

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax


def init(seed, size, num_hidden=6):
    """x, the router's matrix, and each expert's two matrices."""
    r = np.random.default_rng(seed)
    shapes = (size.T, size.H), (size.H, size.E), (size.E, size.H, num_hidden), (size.E, num_hidden, size.H)
    x, router, up, down = (r.normal(size=shape).astype(np.float32) for shape in shapes)
    return x, router, up / np.float32(size.H**0.5), down / np.float32(num_hidden**0.5)


def expert_mlp(rows, up, down):
    return jnp.einsum("sf,sfh->sh", jnp.tanh(jnp.einsum("sh,shf->sf", rows, up)), down)


def packed(x, router, up, down, *, top_k, implementation=None):
    num_experts = router.shape[1]
    ids, weights = ferrum_jax.route_topk_softmax(x @ router, top_k, implementation=implementation)
    by = None if implementation == "pallas" else implementation  # which has no kernel for tables
    pairs, tokens, offsets = ferrum_jax.moe_build_pairs_by_token(ids, num_experts, implementation=by)
    rows = ferrum_jax.moe_dispatch(x, tokens, pairs_by_token=pairs, implementation=implementation)
    owner = jnp.searchsorted(offsets, jnp.arange(tokens.size, dtype=jnp.int32), side="right") - 1
    down_rows = expert_mlp(rows, up[owner], down[owner])
    return ferrum_jax.moe_combine(down_rows, pairs, weights, unique_rows=True, implementation=implementation)


def pair_ids(x, router, up, down, *, top_k, implementation=None):
    ids, weights = ferrum_jax.route_topk_softmax(x @ router, top_k, implementation=implementation)
    tokens = jnp.repeat(jnp.arange(len(x), dtype=jnp.int32), top_k)
    rows = ferrum_jax.moe_dispatch(x, tokens, implementation=implementation)
    slots = expert_mlp(rows, up[ids.reshape(-1)], down[ids.reshape(-1)]).reshape(*ids.shape, -1)
    return ferrum_jax.weighted_sum_batched(slots, weights, implementation=implementation)


def dense(x, router, up, down, *, top_k, implementation=None):
    """The same mathematics with lax.top_k and every expert on every token."""
    every = jnp.einsum("tef,efh->teh", jnp.tanh(jnp.einsum("th,ehf->tef", x, up)), down)
    return weighted_by_topk(x @ router, every, top_k)


def gated_dense(x, logits, w_gate_up, w_down, b_gate_up, b_down, top_k, act=jax.nn.silu):
    """What moe_mlp computes, in jnp, with every expert on every token."""
    both = jnp.einsum("th,ehf->tef", x, w_gate_up) + (0 if b_gate_up is None else b_gate_up[None])
    gate, up = jnp.split(both, 2, axis=-1)
    every = jnp.einsum("tef,efh->teh", act(gate) * up, w_down) + (0 if b_down is None else b_down[None])
    return weighted_by_topk(logits, every, top_k)


def weighted_by_topk(logits, every, top_k):
    """Sum each token's rows of its top-k experts, out of its rows of every expert [T, E, H]."""
    chosen = jax.nn.one_hot(jax.lax.top_k(logits, top_k)[1], logits.shape[-1]).sum(-2)
    weights = jax.nn.softmax(jnp.where(chosen > 0, logits, -jnp.inf), axis=-1)
    return jnp.einsum("te,teh->th", weights, every)
