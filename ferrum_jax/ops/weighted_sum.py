"""The weighted sum: combine for rows that stand in pair order. The ops are one family: each transpose is another op."""

from typing import Any

import jax
import jax.numpy as jnp

from ..core.primitive import define


def weighted_sum_batched(slots: jax.Array, weights: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Add each token's K slots, weighted: out[t] = sum over k of weights[t,k] * slots[t,k], in float32, cast once.

    This is `moe_combine` for rows that already stand in pair order.

    Args:
      slots: [..., T, K, H] float16, bfloat16 or float32.
      weights: [..., T, K] of any float dtype, used in float32.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      [..., T, H] in slots' dtype.

    Raises:
      TypeError: an argument of another dtype.
      ValueError: ranks or shapes that do not fit, an unknown `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    >>> import jax.numpy as jnp
    >>> weighted_sum_batched(jnp.array([[[1.0], [10.0]]]), jnp.array([[0.5, 0.25]])).tolist()
    [[3.0]]
    """
    return weighted_sum_op(slots, weights, implementation=implementation)


# ---- the family: meanings, and the transposes by which each is differentiated


def _weighted_sum_meaning(slots: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(weights[..., None] * slots.astype(jnp.float32), axis=1).astype(slots.dtype)


def _weighted_sum_to_slots(ct: Any, slots: Any, weights: Any, *, implementation: str | None) -> jax.Array:
    return _slot_scale.bind(ct, weights, implementation=implementation)


def _weighted_sum_to_weights(ct: Any, slots: Any, weights: Any, *, implementation: str | None) -> jax.Array:
    return _slot_dot.bind(slots, ct, implementation=implementation)


def _slot_scale_meaning(g: jax.Array, weights: jax.Array) -> jax.Array:
    return (weights[..., None] * g[:, None].astype(jnp.float32)).astype(g.dtype)


def _slot_scale_to_g(ct: Any, g: Any, weights: Any, *, implementation: str | None) -> jax.Array:
    return weighted_sum_op.bind(ct, weights, implementation=implementation)


def _slot_scale_to_weights(ct: Any, g: Any, weights: Any, *, implementation: str | None) -> jax.Array:
    return _slot_dot.bind(ct, g, implementation=implementation)


def _slot_dot_meaning(slots: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.sum(slots.astype(jnp.float32) * g[:, None].astype(jnp.float32), axis=2)


def _slot_dot_to_slots(ct: Any, slots: Any, g: Any, *, implementation: str | None) -> jax.Array:
    return _slot_scale.bind(g, ct, implementation=implementation)


def _slot_dot_to_g(ct: Any, slots: Any, g: Any, *, implementation: str | None) -> jax.Array:
    return weighted_sum_op.bind(slots, ct, implementation=implementation)


weighted_sum_op = define(
    "weighted_sum_batched",
    "slots: rows[T,K,H], weights: weights[T,K] -> rows[T,H]",
    _weighted_sum_meaning,
    independent="TH",
    transposes={"slots": _weighted_sum_to_slots, "weights": _weighted_sum_to_weights},
)
_slot_scale = define(
    "slot_scale",
    "g: rows[T,H], weights: weights[T,K] -> rows[T,K,H]",
    _slot_scale_meaning,
    independent="TKH",
    transposes={"g": _slot_scale_to_g, "weights": _slot_scale_to_weights},
)
_slot_dot = define(
    "slot_dot",
    "slots: rows[T,K,H], g: rows[T,H] -> weights[T,K]",
    _slot_dot_meaning,
    independent="TK",
    transposes={"slots": _slot_dot_to_slots, "g": _slot_dot_to_g},
)
