"""How a router chooses experts by their scores, and weighs them: the settings, the meaning in jnp, the derivative."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..core.primitive import define
from ..core.settings import as_bool, as_int, one_of

SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrt_softplus")
GROUP_SCORES = ("top2_sum", "max")
ZERO_SUMS = ("uniform", "zero", "eps")
_LOG_EPS = math.log(1e-20)


class Selection(NamedTuple):
    """Which experts a token takes: settings of `route_topk`. Without groups the last three are None."""

    top_k: int
    num_groups: int | None
    group_top_k: int | None
    group_score: str | None


class Weighing(NamedTuple):
    """How the chosen experts are weighed: settings of `route_topk`."""

    scoring: str
    norm_topk_prob: bool
    scale: float
    zero_sum: str


def _checked_selection(
    op: str, experts: int, top_k: Any, num_groups: Any, group_top_k: Any, group_score: str
) -> Selection:
    """Check these settings. Settings that mean the same come back the same: without groups, if all are kept."""
    top_k = as_int(op, "top_k", top_k, 1, experts)
    one_of(op, "group_score", group_score, GROUP_SCORES)
    without_groups = Selection(top_k, None, None, None)
    if num_groups is None and group_top_k is None:
        return without_groups
    if num_groups is None or group_top_k is None:
        raise ValueError(
            f"{op}: num_groups and group_top_k must be given together; got num_groups={num_groups}, "
            f"group_top_k={group_top_k}"
        )
    num_groups = as_int(op, "num_groups", num_groups, 1, experts)
    group_top_k = as_int(op, "group_top_k", group_top_k, 1, num_groups)
    if experts % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {experts} experts of logits; got {num_groups}")
    if top_k > group_top_k * (experts // num_groups):
        raise ValueError(
            f"{op}: top_k must be at most {group_top_k * (experts // num_groups)}, the experts of group_top_k = "
            f"{group_top_k} groups of {experts // num_groups}; got {top_k}"
        )
    if group_top_k == num_groups:
        return without_groups
    if num_groups == experts:
        group_score = "max"  # the same as "top2_sum" in groups of one expert
    return Selection(top_k, num_groups, group_top_k, group_score)


def _checked_weighing(op: str, scoring: str, norm_topk_prob: Any, scale: Any, zero_sum: str) -> Weighing:
    one_of(op, "scoring", scoring, SCORINGS)
    one_of(op, "zero_sum", zero_sum, ZERO_SUMS)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"{op}: scale must be a Python number, known when the function is traced; got {type(scale).__name__}"
        )
    try:
        number = abs(float(scale))
    except OverflowError:
        number = math.inf
    if number and not float(jnp.finfo(jnp.float32).tiny) <= number <= float(jnp.finfo(jnp.float32).max):
        raise ValueError(f"{op}: scale must be 0, or finite and normal in float32; got {scale}")
    norm = as_bool(op, "norm_topk_prob", norm_topk_prob) or scoring == "topk_softmax"
    return Weighing(scoring, norm, float(scale), zero_sum)


def checked_settings(
    op: str,
    experts: int,
    top_k: Any,
    *,
    scoring: str = "softmax",
    norm_topk_prob: Any = True,
    num_groups: Any = None,
    group_top_k: Any = None,
    group_score: str = "top2_sum",
    scale: Any = 1.0,
    zero_sum: str = "uniform",
) -> tuple[Selection, Weighing]:
    """Check a router's settings. Names and defaults are those of `route_topk`."""
    selection = _checked_selection(op, experts, top_k, num_groups, group_top_k, group_score)
    return selection, _checked_weighing(op, scoring, norm_topk_prob, scale, zero_sum)


# ---- the selection


def select(x: jax.Array, bias: jax.Array | None, scoring: str, selection: Selection) -> jax.Array:
    """The ids of one token's experts, best first, by its float32 logits, and a bias or groups."""
    top_k, num_groups, group_top_k, group_score = selection
    scores = _score(x, scoring) if bias is None else _score(x, scoring) + bias
    if num_groups is None or group_top_k is None:
        return lax.top_k(rankable(scores), top_k)[1].astype(jnp.int32)
    # Choose among the kept groups alone, set side by side in the order of their experts' ids. Masking the other groups
    # would not do: a masked expert ranks above a NaN.
    groups = scores.reshape(num_groups, -1)
    best = lax.top_k(rankable(groups), 2 if group_score == "top2_sum" else 1)[0]
    kept = jnp.sort(lax.top_k(rankable(jnp.sum(best, axis=1)), group_top_k)[1])
    place = lax.top_k(rankable(groups[kept].reshape(-1)), top_k)[1]
    size = groups.shape[1]
    return (kept[place // size] * size + place % size).astype(jnp.int32)


def rankable(x: jax.Array) -> jax.Array:
    """Floats that lax.top_k, which compares bits, ranks as `route_topk` promises: -0 as +0, every NaN below -inf."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = lax.select(bits == jnp.int32(-(2**31)), lax.full_like(bits, 0), bits)
    bits = lax.select((bits & 0x7FFFFFFF) > 0x7F800000, lax.full_like(bits, -1), bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _score(x: jax.Array, scoring: str) -> jax.Array:
    """The scores of one token's experts, to which a bias is added."""
    if scoring == "topk_softmax":
        return x
    exponent, factor = _parts(x, scoring)
    if scoring != "softmax":
        return factor * jnp.exp(exponent)
    score = jnp.exp(x - _finite(jnp.max(x)))
    total = jnp.sum(score)
    return score / jnp.where(total == 0, 1, total)


# ---- the weights of chosen experts


def _parts(x: jax.Array, scoring: str) -> tuple[jax.Array, jax.Array]:
    """(exponent, factor) such that the score is factor * exp(exponent).

    With the exponents apart, scores that would underflow can still be compared and divided.
    """
    if scoring == "sigmoid":
        return jnp.minimum(x, 0), 1 / (1 + jnp.exp(-jnp.abs(x)))
    if scoring == "sqrt_softplus":  # for x below -40 the score is exp(x / 2), to the last bit
        return jnp.minimum(x + 40, 0) / 2, jnp.sqrt(jax.nn.softplus(jnp.maximum(x, -40)))
    return x, jnp.ones_like(x)


def _finite(largest: jax.Array) -> jax.Array:
    return lax.select(largest == -jnp.inf, lax.full_like(largest, 0), largest)


def weigh(logits: jax.Array, chosen: jax.Array, weighing: Weighing) -> jax.Array:
    """The weights of one token's chosen experts, whose float32 logits are `chosen`, -inf for what is no expert."""
    scoring, norm_topk_prob, scale, zero_sum = weighing
    x = logits.astype(jnp.float32)
    exponent, factor = _parts(chosen, scoring)
    # Take all terms relative to the largest one: then their sum is 0 only if each of them is exactly 0.
    largest = exponent if norm_topk_prob else x if scoring == "softmax" else jnp.zeros_like(x)
    base = _finite(jnp.max(largest))
    weights = factor * jnp.exp(exponent - base)
    if norm_topk_prob:
        total = jnp.sum(weights)
        if zero_sum == "eps" and scoring != "topk_softmax":  # add 1e-20, relative to the largest term too
            total += jnp.sum(jnp.exp(x - base + _LOG_EPS)) if scoring == "softmax" else jnp.exp(_LOG_EPS - base)
    else:
        total = jnp.sum(jnp.exp(x - base)) if scoring == "softmax" else jnp.float32(1)
    if scoring == "softmax":
        # Ask for NaN and +inf explicitly: on a CPU, XLA's maximum of a row that holds NaN is not always NaN. Ask by a
        # sum of floats, because XLA's CPU compiler takes longer over other reductions.
        total += jnp.sum(lax.select(x < jnp.inf, lax.full_like(x, 0), lax.full_like(x, jnp.nan)))
    otherwise = 1 / chosen.shape[0] if norm_topk_prob and zero_sum == "uniform" else 0
    weights = lax.select(total == 0, lax.full_like(weights, otherwise), weights / total)
    return weights if scale == 1 else weights * jnp.float32(scale)


def weigh_ids(logits: jax.Array, ids: jax.Array, weighing: Weighing) -> jax.Array:
    """The weights of the experts `ids` of one token; an id outside [0, E) is no expert."""
    x = logits.astype(jnp.float32)
    chosen = x.at[ids].get(mode="fill", fill_value=-jnp.inf, wrap_negative_indices=False)
    return jnp.where((ids >= 0) & (ids < x.shape[0]), weigh(x, chosen, weighing), 0)


def weight_tangent(
    logits: jax.Array, ids: jax.Array, weights: jax.Array, dlogits: jax.Array | None, weighing: Weighing
) -> jax.Array | None:
    """The tangent of the weights, with constant ids: weights * (d log score - mean).

    mean: that of d log score over the experts whose scores make up the divisor of the weights, each by its share of it.
    """
    scoring, norm_topk_prob, scale, zero_sum = weighing
    if dlogits is None or scale == 0:
        return None
    x, dx = logits.astype(jnp.float32), dlogits.astype(jnp.float32)
    live = (ids >= 0) & (ids < x.shape[-1])
    chosen = _take.bind(x, ids, implementation=None)
    change = _take.bind(dx, ids, implementation=None)
    if scoring == "sigmoid":
        change *= jax.nn.sigmoid(-chosen)
    elif scoring == "sqrt_softplus":
        bounded = jnp.maximum(chosen, -40)  # from -40 down the factor is 1/2, to the last bit
        change *= jax.nn.sigmoid(bounded) / (2 * jax.nn.softplus(bounded))
    constant, mean, outside = ~live, jnp.zeros_like(change), jnp.ones((), x.dtype)
    if norm_topk_prob:
        shares = weights / scale
        mean = jnp.sum(shares * change, axis=-1, keepdims=True)
        outside = 1 - jnp.sum(shares, axis=-1, keepdims=True)  # the share that the 1e-20 of "eps" has of the sum
        summed_to_zero = jnp.all(~live | (chosen == -jnp.inf), axis=-1, keepdims=True)
        constant |= summed_to_zero & ~jnp.isnan(weights)
    if scoring == "softmax" and (not norm_topk_prob or zero_sum == "eps"):
        masked = jnp.all(x == -jnp.inf, axis=-1, keepdims=True)
        over_all = jnp.sum(jax.nn.softmax(jnp.where(masked, 0, x), axis=-1) * dx, axis=-1, keepdims=True)
        mean += outside * over_all
    return jnp.where(constant, 0, weights * (change - mean))


# The derivative of every router is made of these two ops: one takes a token's values at its experts' places, its
# transpose puts values into these places.


def _take_meaning(values: jax.Array, ids: jax.Array) -> jax.Array:
    return values.at[ids].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _put_meaning(values: jax.Array, ids: jax.Array, *, num_experts: int) -> jax.Array:
    return jnp.zeros(num_experts, values.dtype).at[ids].add(values, mode="drop", wrap_negative_indices=False)


def _take_to_values(ct: Any, values: Any, ids: Any, *, implementation: str | None) -> jax.Array:
    return _put.bind(ct, ids, num_experts=values.shape[-1], implementation=implementation)


def _put_to_values(ct: Any, values: Any, ids: Any, *, num_experts: int, implementation: str | None) -> jax.Array:
    return _take.bind(ct, ids, implementation=implementation)


def _put_sizes(sizes: dict[str, int], num_experts: int) -> dict[str, int]:
    return {"E": num_experts}


_take = define(
    "route_take",
    "values: weights[E], expert_ids: ids[K] -> weights[K]",
    _take_meaning,
    transposes={"values": _take_to_values},
)
_put = define(
    "route_put",
    "values: weights[K], expert_ids: ids[K] -> weights[E]",
    _put_meaning,
    sizes=_put_sizes,
    transposes={"values": _put_to_values},
)
