"""Routing: the top_k experts of every token, and their weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._primitive import define
from ._signature import INT32_MAX, as_int


class RouterOutput(NamedTuple):
    """expert_ids[..., K] int32, best first; expert_weights[..., K] float32."""

    expert_ids: jax.Array
    expert_weights: jax.Array


def route_topk_softmax(
    logits: jax.Array, top_k: int, *, norm_topk_prob: bool = True, implementation: str | None = None
) -> RouterOutput:
    """Choose each token's `top_k` experts by logit, and weigh them by softmax.

    The experts of a token are distinct and in [0, E), whatever the logits: ranked by float32 logit, descending, equal
    logits by smaller id; -0 equals +0, subnormals keep their order, NaN ranks last. The ids are the same bits on every
    implementation. The weights' derivative is exact, with the ids held constant.

    Args:
      logits: [..., E] float16, bfloat16 or float32; -inf masks an expert. Arithmetic is in float32.
      top_k: K, experts per token, in [1, E].
      norm_topk_prob: divide the chosen probabilities by their sum, so that each token's weights add up to 1.
      implementation: None (the fastest), "xla", "triton" or "pallas".

    Returns:
      RouterOutput(expert_ids[..., K] int32, expert_weights[..., K] float32). A row that holds NaN or +inf has NaN
      weights; a row of -inf only has 1/K each if `norm_topk_prob`, else 0, and gradient 0.

    Raises:
      TypeError: logits of another dtype, or `top_k` that is no int.
      ValueError: `top_k` outside [1, E], logits without axes, an unknown `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    The method is that of the Ferrum engine's router, after Shazeer et al., https://arxiv.org/abs/1701.06538, except
    that it ranks logits, not probabilities: these underflow to ties.

    >>> import jax.numpy as jnp
    >>> ids, weights = route_topk_softmax(jnp.array([[1.0, 3.0, 2.0, -1.0]]), 2)
    >>> ids.tolist(), [round(w, 4) for w in weights[0].tolist()]
    ([[1, 2]], [0.7311, 0.2689])
    """
    op, shape = "route_topk_softmax", jnp.shape(logits)
    if shape and not shape[-1]:
        raise ValueError(f"{op}: logits must hold at least one expert, E >= 1, for any top_k; got shape {shape}")
    top_k = as_int(op, "top_k", top_k, 1, shape[-1] if shape else INT32_MAX)
    return RouterOutput(
        *_route(logits, top_k=top_k, norm_topk_prob=bool(norm_topk_prob), implementation=implementation)
    )


def _meaning(logits: jax.Array, *, top_k: int, norm_topk_prob: bool) -> tuple[jax.Array, jax.Array]:
    x = logits.astype(jnp.float32)
    ids = lax.top_k(_rankable(x), top_k)[1].astype(jnp.int32)
    top = jnp.max(x)
    chosen = jnp.exp(x.at[ids].get(mode="promise_in_bounds") - top)
    weights = chosen / jnp.sum(chosen if norm_topk_prob else jnp.exp(x - top))
    # Said outright: the maximum of a row with NaN is not always NaN on XLA:CPU.
    weights = jnp.where(jnp.all(x < jnp.inf), weights, jnp.nan)
    return ids, jnp.where(jnp.all(x == -jnp.inf), 1 / top_k if norm_topk_prob else 0, weights)


def _rankable(x: jax.Array) -> jax.Array:
    """Floats which lax.top_k, that compares bits, ranks as the contract says: -0 as +0, and every NaN below -inf."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = jnp.where(bits == jnp.int32(-(2**31)), 0, bits)
    bits = jnp.where((bits & 0x7FFFFFFF) > 0x7F800000, -1, bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _jvp(primals, results, tangents, *, top_k: int, norm_topk_prob: bool, implementation: str | None):
    """d weights = weights * (d chosen - mean of d logits under the softmax that the weights are normalised by)."""
    (logits,), (ids, weights), (dlogits,) = primals, results, tangents
    x, dx = logits.astype(jnp.float32), dlogits.astype(jnp.float32)
    dead = jnp.all(x == -jnp.inf, axis=-1, keepdims=True)
    chosen = _take(dx, ids)
    if norm_topk_prob:
        mean = jnp.sum(weights * chosen, axis=-1, keepdims=True)
    else:
        mean = jnp.sum(jax.nn.softmax(jnp.where(dead, 0, x), axis=-1) * dx, axis=-1, keepdims=True)
    return None, jnp.where(dead, 0, weights * (chosen - mean))


_route = define(
    "route_topk_softmax",
    "logits: rows[E] -> ids[K], weights[K]",
    _meaning,
    sizes=lambda size, top_k, norm_topk_prob: {"K": top_k},
    jvp=_jvp,
)

# A token's values at its experts, and back: what the derivative of any router is made of.


def _take_meaning(values: jax.Array, ids: jax.Array) -> jax.Array:
    return values.at[ids].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _put_meaning(values: jax.Array, ids: jax.Array, *, num_experts: int) -> jax.Array:
    return jnp.zeros(num_experts, values.dtype).at[ids].add(values, mode="drop", wrap_negative_indices=False)


_take = define(
    "route_take",
    "values: weights[E], expert_ids: ids[K] -> weights[K]",
    _take_meaning,
    transposes={0: lambda ct, values, ids, **params: _put(ct, ids, num_experts=values.shape[-1], **params)},
)
_put = define(
    "route_put",
    "values: weights[K], expert_ids: ids[K] -> weights[E]",
    _put_meaning,
    sizes=lambda size, num_experts: {"E": num_experts},
    transposes={0: lambda ct, values, ids, *, num_experts, **params: _take(ct, ids, **params)},
)
