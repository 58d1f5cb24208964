"""For training a router: auxiliary losses, counts of an expert's pairs, and the update of a routing bias."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core.settings import INT32_MAX, as_int, one_of
from ..core.signature import as_mask, checked
from .tables import moe_build_pairs_by_token

NORMALIZATIONS = ("huggingface", "switch", "deepseek")
LOSS_SCORINGS = ("softmax", "sigmoid")
AxisName = str | Sequence[str] | None


def load_balancing_loss(
    logits: jax.Array,
    expert_ids: jax.Array,
    num_experts: int,
    *,
    normalization: str = "huggingface",
    scoring: str = "softmax",
    token_mask: jax.Array | None = None,
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
) -> jax.Array:
    """The auxiliary loss that spreads tokens over experts: E * sum over e of f_e * P_e.

    There are n tokens. c_e of their pairs chose expert e. A token's scores p[t,e] add up to 1 over the experts. Then
    P_e = sum over t of p[t,e] / n, and f_e is c_e / n ("huggingface") or c_e / (K * n) ("switch" and "deepseek"). An
    even load gives a loss of K, or of 1. The gradient goes to the logits through P; the counts are constants. The loss
    has no coefficient: multiply it with your own.

    - "huggingface": `load_balancing_loss_func` of https://github.com/huggingface/transformers, for all tokens together.
    - "switch": the same divided by K. At K = 1 it is the loss of Switch Transformers, https://arxiv.org/abs/2101.03961.
    - "deepseek": the loss "switch" of each sequence, averaged over the sequences that have a token. It is the
      expert-level loss of DeepSeek-V2, https://arxiv.org/abs/2405.04434. With scoring="sigmoid", and ids that were
      chosen without the bias, it is the sequence-wise loss of DeepSeek-V3, https://arxiv.org/abs/2412.19437.

    Args:
      logits: [..., T, E] float16, bfloat16 or float32; arithmetic is in float32. Leading axes are more tokens; with
        "deepseek" they are sequences, of T tokens each.
      expert_ids: [..., T, K] of any integer dtype. A pair whose id is outside [0, E), such as one that `limit_capacity`
        dropped, is not counted; its token still is.
      num_experts: E, that of the logits.
      normalization: "huggingface", "switch" or "deepseek".
      scoring: p is the "softmax" of the logits, or their "sigmoid" divided by its sum over the experts.
      token_mask: [..., T] bool. A False token, its pairs and its logits, even NaN, count nowhere. A token whose logits
        are all -inf counts as masked.
      axis_name: inside shard_map (with check_vma, JAX's default), the mesh axes that tokens are spread over. Value and
        gradient are then those of all tokens together, however many are masked on each device. With "deepseek" these
        are the axes that cut sequences into parts.
      batch_axis_name: the mesh axes that whole sequences, the leading axes, are spread over. Only "deepseek" tells it
        from `axis_name`.

    Returns:
      A float32 scalar; 0 without any token.

    Raises:
      TypeError: an argument of another dtype, `num_experts` that is no int.
      ValueError: shapes that do not fit, an unknown `normalization` or `scoring`.

    >>> import jax.numpy as jnp
    >>> ids = jnp.array([[0, 1], [2, 3]])
    >>> [float(load_balancing_loss(jnp.zeros((2, 4)), ids, 4, normalization=n)) for n in ("huggingface", "switch")]
    [2.0, 1.0]
    """
    op = "load_balancing_loss"
    one_of(op, "normalization", normalization, NORMALIZATIONS)
    one_of(op, "scoring", scoring, LOSS_SCORINGS)
    logits, ids = checked(op, "logits: rows[T,E], expert_ids: ids[T,K]", logits, expert_ids)
    num_experts = as_int(op, "num_experts", num_experts, most=INT32_MAX - 1)
    if logits.shape[-1] != num_experts:
        raise ValueError(f"{op}: logits must have num_experts = {num_experts} entries a row; got shape {logits.shape}")
    if logits.shape[:-1] != ids.shape[:-1]:
        raise ValueError(
            f"{op}: expert_ids must have the axes {logits.shape[:-1]} of logits before its last; got shape {ids.shape}"
        )
    x, live = _tokens(op, logits, token_mask)
    scores = jax.nn.softmax(jax.nn.log_sigmoid(x) if scoring == "sigmoid" else x, axis=-1)
    counts = _counts(jnp.where(live[..., None], ids, -1), num_experts).astype(jnp.float32)
    mass = jnp.sum(jnp.where(live[..., None], scores, 0), axis=-2)
    tokens = jnp.sum(live, axis=-1, dtype=jnp.int32)
    sums = counts, mass, tokens
    choices = 1 if normalization == "huggingface" else max(ids.shape[-1], 1)
    if normalization != "deepseek":
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=tuple(range(tokens.ndim)), dtype=x.dtype), sums)
        counts, mass, tokens = _psum(sums, (*_names(axis_name), *_names(batch_axis_name)))
        return _balance(counts, mass, tokens, choices)
    counts, mass, tokens = _psum(sums, _names(axis_name))
    total, sequences = jnp.sum(_balance(counts, mass, tokens, choices)), jnp.sum(tokens > 0, dtype=jnp.int32)
    return _mean(*_psum((total, sequences), _names(batch_axis_name)))


def router_z_loss(logits: jax.Array, *, token_mask: jax.Array | None = None, axis_name: AxisName = None) -> jax.Array:
    """The auxiliary loss that keeps logits small: the mean over tokens of logsumexp(logits)^2.

    Args:
      logits: [..., E] float16, bfloat16 or float32; arithmetic is in float32. All axes but the last are tokens.
      token_mask: [...] bool. The logits of a False token, even NaN, count nowhere. A token whose logits are all -inf
        counts as masked.
      axis_name: inside shard_map (with check_vma, JAX's default), the mesh axes that tokens are spread over. Value and
        gradient are then those of all tokens together, however many are masked on each device.

    Returns:
      A float32 scalar; 0 without any token.

    Raises:
      TypeError: an argument of another dtype.
      ValueError: shapes that do not fit.

    The loss of ST-MoE, https://arxiv.org/abs/2202.08906, without its coefficient.

    >>> import jax.numpy as jnp
    >>> round(float(router_z_loss(jnp.array([[0.0, 0.0], [1.0, 1.0]]))), 4)
    1.6736
    """
    op = "router_z_loss"
    (logits,) = checked(op, "logits: rows[E]", logits)
    x, live = _tokens(op, logits, token_mask)
    squares = jnp.where(live, jnp.square(jax.nn.logsumexp(x, axis=-1)), 0)
    return _mean(*_psum((jnp.sum(squares), jnp.sum(live, dtype=jnp.int32)), _names(axis_name)))


def expert_counts(
    expert_ids: jax.Array,
    num_experts: int,
    *,
    token_mask: jax.Array | None = None,
    axis_name: AxisName = None,
) -> jax.Array:
    """How many pairs chose each expert.

    Args:
      expert_ids: [..., T, K] of any integer dtype; a value outside [0, E) is no expert and counts nowhere. Leading axes
        (layers, sequences) are slices of their own.
      num_experts: E, >= 1.
      token_mask: [..., T] bool; the pairs of a False token count nowhere.
      axis_name: inside shard_map, the mesh axes to add the counts over.

    Returns:
      [..., E] int32; sums past 2^31 - 1, possible over many devices only, wrap.

    Raises:
      TypeError: an argument of another dtype, `num_experts` that is no int.
      ValueError: shapes that do not fit, `num_experts` < 1.

    >>> import jax.numpy as jnp
    >>> expert_counts(jnp.array([[0, 1], [1, -1], [1, 3]]), 3).tolist()
    [1, 3, 0]
    """
    op = "expert_counts"
    (ids,) = checked(op, "expert_ids: ids[T,K]", expert_ids)
    num_experts = as_int(op, "num_experts", num_experts, most=INT32_MAX - 1)
    if token_mask is not None:
        ids = jnp.where(as_mask(op, token_mask, ids.shape[:-1])[..., None], ids, -1)
    return _psum(_counts(ids, num_experts), _names(axis_name))


def update_routing_bias(bias: jax.Array, counts: jax.Array, rate: jax.Array | float) -> jax.Array:
    """Balance the experts by a bias instead of a loss: bias + rate * sign(mean of the counts - counts).

    The bias of an expert with fewer pairs than the mean of all experts grows, so that it is chosen more often. That of
    an expert with more pairs shrinks. The comparison with the mean is exact.

    Args:
      bias: [..., E] float16, bfloat16 or float32: the bias that is added to the scores by which experts are chosen.
      counts: [..., E] of any integer dtype: each expert's pairs in a whole step, on all devices, as `expert_counts`
        gives them. A count above 2^31 - 1 is taken for 2^31 - 1.
      rate: a scalar, 0.001 in DeepSeek-V3.

    Returns:
      [..., E] in bias's dtype, added up in float32.

    Raises:
      TypeError: an argument of another dtype.
      ValueError: shapes that do not fit, E above 46,341.

    Algorithm 1 of https://arxiv.org/abs/2408.15664, as in DeepSeek-V3, https://arxiv.org/abs/2412.19437.

    >>> import jax.numpy as jnp
    >>> update_routing_bias(jnp.zeros(3), jnp.array([4, 2, 0]), 0.5).tolist()
    [-0.5, 0.0, 0.5]
    """
    op = "update_routing_bias"
    bias, counts = checked(op, "bias: rows[E], counts: ids[E]", bias, _at_most_int32(counts))
    if jnp.ndim(rate) != 0:
        raise ValueError(f"{op}: rate must be a scalar; got shape {jnp.shape(rate)}")
    if not any(jnp.issubdtype(jnp.result_type(rate), kind) for kind in (jnp.integer, jnp.floating)):
        raise TypeError(f"{op}: rate must be a real number; got {jnp.result_type(rate)}")
    if counts.shape[-1] > _MOST_EXPERTS:
        raise ValueError(f"{op}: counts must be of at most {_MOST_EXPERTS} experts; got shape {counts.shape}")
    # In integers, because a rounded mean would move experts that stand exactly at it. The mean is made of quotients and
    # remainders, because the sum of the counts may not fit int32.
    experts = max(counts.shape[-1], 1)
    whole, rest = (
        jnp.sum(part, axis=-1, keepdims=True, dtype=jnp.int32) for part in (counts // experts, counts % experts)
    )
    below, above = counts < whole - (-rest // experts), counts > whole + rest // experts
    sign = below.astype(jnp.float32) - above.astype(jnp.float32)
    return (bias.astype(jnp.float32) + jnp.asarray(rate).astype(jnp.float32) * sign).astype(bias.dtype)


_MOST_EXPERTS = 46_341  # int32 holds the sum of E remainders, each at most E - 1, up to this E


def _at_most_int32(counts: Any) -> Any:
    """Bound counts by the largest int32. They are checked as ids, and an id past int32 would become -1."""
    array = counts if isinstance(counts, jax.Array) else np.asarray(counts)
    if not jnp.issubdtype(array.dtype, jnp.integer) or jnp.iinfo(array.dtype).max <= INT32_MAX:
        return counts
    return (jnp if isinstance(array, jax.Array) else np).minimum(array, array.dtype.type(INT32_MAX))


def _tokens(op: str, logits: jax.Array, token_mask: Any) -> tuple[jax.Array, jax.Array]:
    """(logits in float32, with zeros for tokens that do not count, and which tokens count)."""
    x = logits.astype(jnp.float32)
    live = ~jnp.all(x == -jnp.inf, axis=-1)
    if token_mask is not None:
        live &= as_mask(op, token_mask, live.shape)
    return jnp.where(live[..., None], x, 0), live


def _counts(ids: jax.Array, num_experts: int) -> jax.Array:
    return jnp.diff(moe_build_pairs_by_token(ids, num_experts).expert_offsets)


def _balance(counts: jax.Array, mass: jax.Array, tokens: jax.Array, choices: int) -> jax.Array:
    """E * sum of f_e * P_e over the last axis. mass: the sum of each expert's scores over the tokens."""
    n = jnp.maximum(tokens, 1).astype(jnp.float32)[..., None]
    return jnp.sum(counts / (n * choices) * (mass / n), axis=-1) * counts.shape[-1]


def _mean(total: jax.Array, number: jax.Array) -> jax.Array:
    return total / jnp.maximum(number, 1).astype(jnp.float32)


def _names(axis_name: AxisName) -> tuple[str, ...]:
    return () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _psum(sums: Any, names: tuple[str, ...]) -> Any:
    return lax.psum(sums, names) if names else sums
