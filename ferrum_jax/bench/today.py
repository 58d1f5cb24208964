"""What one would write in JAX today: the functions that the benchmark compares the ops with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import ferrum_jax


def softmax_top_k(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    weights, ids = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), top_k)
    return ids, weights / weights.sum(-1, keepdims=True)


def argsort_pairs(ids: jax.Array, num_experts: int) -> tuple[jax.Array, ...]:
    """The fields of `TokenPairs`."""
    order = jnp.argsort(ids.reshape(-1))
    pairs = jnp.zeros_like(order).at[order].set(jnp.arange(ids.size, dtype=order.dtype)).reshape(ids.shape)
    ends = jnp.cumsum(jnp.bincount(ids.reshape(-1), length=num_experts))
    return pairs, order // ids.shape[-1], jnp.concatenate([jnp.zeros(1, ends.dtype), ends])


def argsort_blocks(ids: jax.Array, num_experts: int, block_size: int) -> tuple[jax.Array, ...]:
    """The fields of `MoeRouting`."""
    slots_in_all = ferrum_jax.max_aligned_rows(ids.size, num_experts, block_size)
    by_expert = jnp.sort(ids.reshape(-1))
    counts = jnp.bincount(by_expert, length=num_experts)
    padded = -(-counts // block_size) * block_size
    ends, row = jnp.cumsum(padded), jnp.arange(ids.size, dtype=jnp.int32)
    shift = ends - padded - (jnp.cumsum(counts) - counts)
    slots = jnp.full(slots_in_all, ids.size, jnp.int32).at[row + shift[by_expert]].set(row)
    first = jnp.arange(0, slots_in_all, block_size, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, first, side="right").astype(jnp.int32)
    return slots, jnp.where(first < ends[-1], owner, -1), ends[-1]


def argsort_plan(ids: jax.Array, num_experts: int, block_size: int) -> tuple[jax.Array, ...]:
    """The fields of `MoePlan`."""
    return *argsort_pairs(ids, num_experts), *argsort_blocks(ids, num_experts, block_size)


def gather_einsum(rows: jax.Array, pairs: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("tkh,tk->th", rows[pairs], weights.astype(rows.dtype))


def einsum(slots: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("tkh,tk->th", slots, weights.astype(slots.dtype))


def ragged_layer(
    x: jax.Array,
    logits: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    top_k: int,
    product: Callable[..., Any] = lax.ragged_dot,
) -> jax.Array:
    """The layer of `moe_mlp`; `product(rows, matrices, group_sizes)` multiplies each group by its matrix."""
    ids, weights = softmax_top_k(logits, top_k)
    order = jnp.argsort(ids.reshape(-1))
    counts = jnp.bincount(ids.reshape(-1), length=logits.shape[-1])
    gate, up = jnp.split(product(x[order // top_k], gate_up, counts).astype(jnp.float32), 2, axis=-1)
    rows = product((jax.nn.silu(gate) * up).astype(x.dtype), down, counts).astype(jnp.float32)
    out = jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(weights.reshape(-1)[order, None] * rows)
    return out.astype(x.dtype)
