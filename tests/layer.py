"""A whole small MoE layer over the library's ops, in both data flows, and the same without them."""

import jax
import jax.numpy as jnp

import ferrum_jax


def init(key, size, num_hidden=6):
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (size.T, size.H))
    router = jax.random.normal(keys[1], (size.H, size.E))
    up = jax.random.normal(keys[2], (size.E, size.H, num_hidden)) / size.H**0.5
    down = jax.random.normal(keys[3], (size.E, num_hidden, size.H)) / num_hidden**0.5
    return x, router, up, down


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
    logits = x @ router
    chosen = jax.nn.one_hot(jax.lax.top_k(logits, top_k)[1], logits.shape[-1]).sum(-2)
    weights = jax.nn.softmax(jnp.where(chosen > 0, logits, -jnp.inf), axis=-1)
    every = jnp.einsum("tef,efh->teh", jnp.tanh(jnp.einsum("th,ehf->tef", x, up)), down)
    return jnp.einsum("te,teh->th", weights, every)
