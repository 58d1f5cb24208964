"""Routing: the top_k experts of every token, and their weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ..core.primitive import define
from ..core.settings import one_of
from ..core.signature import as_mask, checked
from ..core.types import RouterOutput
from ..kernels import IMPLEMENTATIONS
from .scoring import Selection, Weighing, checked_settings, rankable, select, weigh, weigh_ids, weight_tangent


def route_topk(
    logits: jax.Array,
    top_k: int,
    *,
    scoring: str = "softmax",
    norm_topk_prob: bool = True,
    bias: jax.Array | None = None,
    num_groups: int | None = None,
    group_top_k: int | None = None,
    group_score: str = "top2_sum",
    scale: float = 1.0,
    zero_sum: str = "uniform",
    forced_ids: jax.Array | None = None,
    token_mask: jax.Array | None = None,
    expert_map: jax.Array | None = None,
    implementation: str | None = None,
) -> RouterOutput:
    """Choose each token's `top_k` experts, and weigh them. The settings give the routers of most published models.

    Each logit becomes a score. The `top_k` experts with the largest score plus `bias` are chosen, if there are groups
    from the `group_top_k` best ones only. Their weights are their scores, without the bias, divided by the sum of these
    if `norm_topk_prob`, times `scale`.

    The ids of a token are distinct, in [0, E) and of groups that were kept, whatever the logits and the bias hold.
    Without bias and groups, experts rank by float32 logit as in `route_topk_softmax`, because every score grows with
    the logit. The ids are then the same bits on every implementation. With a bias or groups, experts rank by float32
    score plus bias, descending, equal ones by smaller id, NaN last. Implementations then agree wherever the competing
    values differ by more than 8 ulp of the largest score or bias among them. The weights' derivative is exact, with the
    ids held constant; `bias` gets none.

    Args:
      logits: [..., E] float16, bfloat16 or float32. -inf masks an expert: its score is 0. Arithmetic is in float32.
      top_k: K, experts per token, in [1, E], and in the groups kept.
      scoring: "softmax", over all E; "topk_softmax", over the chosen experts: these rank by logit, and `norm_topk_prob`
        changes nothing; "sigmoid"; "sqrt_softplus", sqrt(log(1 + exp(logit))).
      norm_topk_prob: divide the chosen scores by their sum.
      bias: [E] of any float dtype, or with the first of the leading axes of logits, equal or of size 1: [L, E] for
        logits[L, T, E].
      num_groups: how many groups the experts form, each of E / num_groups neighbours. Goes with `group_top_k`.
      group_top_k: how many groups a token keeps, in [1, num_groups]. Equal groups rank by smaller id. No expert of the
        other groups is chosen. To keep all groups is to have none.
      group_score: what a group ranks by. "top2_sum": the sum of its two largest scores plus bias, or its only one in
        groups of one expert. "max": the largest. NaN ranks last.
      scale: a number by which the weights are multiplied last: 0, or normal and finite in float32.
      zero_sum: what the weights are if the sum to divide by is 0, as it is if every chosen logit is -inf. "uniform":
        1/K each. "zero": 0. "eps": 0 too, since 1e-20 is then added to every sum, also to one that is not 0.
      forced_ids: [..., K] of any integer dtype: ids that another routing recorded. Weights and derivatives are as if
        these had been chosen; bias and groups are not used. An id outside [0, E) comes back as -1, with weight 0.
      token_mask: [...] bool; a False token has ids -1, weights 0 and gradient 0, whatever its logits hold.
      expert_map: [E] of any integer dtype, applied to the ids last: for each expert another id, or -1. The weights do
        not change.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      RouterOutput(expert_ids[..., K] int32, expert_weights[..., K] float32).

      In rows without NaN and +inf, weights and gradients are finite, and a weight that `zero_sum` gave has gradient 0.
      With "softmax", a row that holds NaN or +inf has NaN weights; with "topk_softmax", a row that chose one of these.
      With "sigmoid" and "sqrt_softplus" a chosen NaN has a NaN weight, and so has all of its row if the weights are
      divided by their sum. +inf scores 1 with "sigmoid". With "sqrt_softplus" it scores +inf, which divided by the sum
      becomes NaN.

    Raises:
      TypeError: dtypes other than these, `top_k`, `num_groups` or `group_top_k` that is no int, `norm_topk_prob` no
        bool, `scale` no number.
      ValueError: shapes that do not fit logits, sizes out of range, E not divisible by `num_groups`, top_k above
        group_top_k * E / num_groups, one group option without the other, a `scale` neither 0 nor finite and
        normal, an unknown `scoring`, `group_score`, `zero_sum` or `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why. Only "xla" takes
        `forced_ids`.

    Scores, bias and groups are those of DeepSeek-V3, https://arxiv.org/abs/2412.19437. Replaying the routing of another
    pass, by `forced_ids`, is the method of Ma et al., https://arxiv.org/abs/2510.11370.

    >>> import jax.numpy as jnp
    >>> logits = jnp.array([[0.0, 2.0, 1.0, -1.0]])
    >>> ids, weights = route_topk(logits, 2, scoring="sigmoid", bias=jnp.array([0.9, 0, 0, 0]), scale=2.5)
    >>> ids.tolist(), [round(w, 4) for w in weights[0].tolist()]
    ([[0, 1]], [0.9053, 1.5947])
    """
    op = "route_topk"
    (logits,) = checked(op, "logits: rows[E]", logits)
    *lead, experts = logits.shape
    if not experts:
        raise ValueError(f"{op}: logits must hold at least one expert, E >= 1, for any top_k; got shape {logits.shape}")
    one_of(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    selection, weighing = checked_settings(
        op,
        experts,
        top_k,
        scoring=scoring,
        norm_topk_prob=norm_topk_prob,
        num_groups=num_groups,
        group_top_k=group_top_k,
        group_score=group_score,
        scale=scale,
        zero_sum=zero_sum,
    )
    if bias is not None:
        logits, bias = checked(op, _route.signature, logits, with_leading_axes(op, bias, len(lead)))
    forced_ids = _beside(op, "forced_ids", forced_ids, (*lead, selection.top_k))
    expert_map = _beside(op, "expert_map", expert_map, (experts,))
    token_mask = None if token_mask is None else as_mask(op, token_mask, tuple(lead))
    if token_mask is not None:  # before the routing, so that no gradient passes through what a masked row holds
        logits = jnp.where(token_mask[..., None], logits, jnp.zeros((), logits.dtype))
    if forced_ids is None:
        ids, weights = _route_op(logits, bias, selection, weighing, implementation)
    else:
        if implementation in ("triton", "pallas"):
            raise NotImplementedError(f"{op}: implementation={implementation!r} has no kernel for forced_ids")
        ids = jnp.where((forced_ids >= 0) & (forced_ids < experts), forced_ids, -1)
        weights = _weighed.bind(logits, ids, **weighing._asdict(), implementation=implementation)
    if token_mask is not None:
        ids = jnp.where(token_mask[..., None], ids, -1)
        weights = jnp.where(token_mask[..., None], weights, 0)
    if expert_map is not None:
        ids = _renamed.bind(ids, jnp.expand_dims(expert_map, tuple(range(len(lead)))), implementation=None)
    return RouterOutput(ids, weights)


def route_topk_softmax(
    logits: jax.Array, top_k: int, *, norm_topk_prob: bool = True, implementation: str | None = None
) -> RouterOutput:
    """Choose each token's `top_k` experts by logit, and weigh them by softmax.

    The experts of a token are distinct and in [0, E), whatever the logits hold. They rank by float32 logit, descending,
    equal logits by smaller id; -0 equals +0, subnormals keep their order, NaN ranks last. The ids are the same bits on
    every implementation. The weights' derivative is exact, with the ids held constant.

    Args:
      logits: [..., E] float16, bfloat16 or float32; -inf masks an expert. Arithmetic is in float32.
      top_k: K, experts per token, in [1, E].
      norm_topk_prob: divide the chosen probabilities by their sum, so that each token's weights add up to 1.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      RouterOutput(expert_ids[..., K] int32, expert_weights[..., K] float32). A row that holds NaN or +inf has NaN
      weights. A row of nothing but -inf has weights 1/K if `norm_topk_prob`, else 0, and gradient 0.

    Raises:
      TypeError: logits of another dtype, `top_k` that is no int, `norm_topk_prob` no bool.
      ValueError: `top_k` outside [1, E], logits without axes, an unknown `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    The method is that of the Ferrum engine's router, after Shazeer et al., https://arxiv.org/abs/1701.06538. But it
    ranks logits instead of probabilities, which may underflow to equal ones.

    >>> import jax.numpy as jnp
    >>> ids, weights = route_topk_softmax(jnp.array([[1.0, 3.0, 2.0, -1.0]]), 2)
    >>> ids.tolist(), [round(w, 4) for w in weights[0].tolist()]
    ([[1, 2]], [0.7311, 0.2689])
    """
    op = "route_topk_softmax"
    (logits,) = checked(op, "logits: rows[E]", logits)
    if not logits.shape[-1]:
        raise ValueError(f"{op}: logits must hold at least one expert, E >= 1, for any top_k; got shape {logits.shape}")
    one_of(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    selection, weighing = checked_settings(op, logits.shape[-1], top_k, norm_topk_prob=norm_topk_prob)
    return RouterOutput(*_route_op(logits, None, selection, weighing, implementation))


def as_pair(op: str, router_output: Any) -> tuple[Any, Any]:
    """The ids and the weights of a RouterOutput, or of a plain tuple of them."""
    if not (isinstance(router_output, tuple) and len(router_output) == 2):
        raise TypeError(f"{op}: router_output must be a RouterOutput; got {type(router_output).__name__}")
    return router_output


def _route_op(
    logits: jax.Array, bias: jax.Array | None, selection: Selection, weighing: Weighing, implementation: str | None
) -> list[jax.Array]:
    return _route.bind(logits, bias, **selection._asdict(), **weighing._asdict(), implementation=implementation)


def with_leading_axes(op: str, bias: Any, leading: int) -> jax.Array:
    """The bias with this many leading axes; the missing ones, of size 1, go before its last axis."""
    (array,) = checked(op, "bias: weights[E]", bias)
    return jnp.expand_dims(array, tuple(range(array.ndim - 1, leading)))


def _beside(op: str, name: str, value: Any, shape: tuple[Any, ...]) -> Any:
    """Check an optional array of ids that goes with the logits, and so must have this shape."""
    if value is None:
        return None
    (array,) = checked(op, f"{name}: ids[K]", value)
    if array.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, for these logits; got {array.shape}")
    return array


# ---- the op. Its parameters are the fields of Selection and Weighing.


def route_meaning(
    logits: jax.Array,
    bias: jax.Array | None,
    *,
    top_k: int,
    num_groups: int | None,
    group_top_k: int | None,
    group_score: str | None,
    scoring: str,
    norm_topk_prob: bool,
    scale: float,
    zero_sum: str,
) -> tuple[jax.Array, jax.Array]:
    x = logits.astype(jnp.float32)
    weighing = Weighing(scoring, norm_topk_prob, scale, zero_sum)
    if bias is None and num_groups is None:  # the logits that rank are those that weigh
        chosen, ids = lax.top_k(rankable(x), top_k)
        return ids.astype(jnp.int32), weigh(x, chosen, weighing)
    ids = select(x, bias, scoring, Selection(top_k, num_groups, group_top_k, group_score))
    return ids, weigh_ids(x, ids, weighing)


def route_jvp(
    primals: Any,
    results: Any,
    tangents: Any,
    *,
    scoring: str,
    norm_topk_prob: bool,
    scale: float,
    zero_sum: str,
    **unused: Any,
) -> tuple[None, jax.Array | None]:
    """The tangents: none of the ids, which are held constant, and that of the weights.

    unused: the fields of Selection, and implementation. How the ids were selected does not matter here.
    """
    ids, weights = checkpoint_name(tuple(results), "moe_router")
    weighing = Weighing(scoring, norm_topk_prob, scale, zero_sum)
    return None, weight_tangent(primals[0], ids, weights, tangents[0], weighing)


def _weigh_meaning(
    logits: jax.Array, ids: jax.Array, *, scoring: str, norm_topk_prob: bool, scale: float, zero_sum: str
) -> jax.Array:
    return weigh_ids(logits, ids, Weighing(scoring, norm_topk_prob, scale, zero_sum))


def _weigh_jvp(
    primals: Any,
    results: Any,
    tangents: Any,
    *,
    scoring: str,
    norm_topk_prob: bool,
    scale: float,
    zero_sum: str,
    implementation: str | None,
) -> tuple[jax.Array | None]:
    (logits, ids), (weights,) = primals, results
    return (weight_tangent(logits, ids, weights, tangents[0], Weighing(scoring, norm_topk_prob, scale, zero_sum)),)


def _renamed_meaning(ids: jax.Array, expert_map: jax.Array) -> jax.Array:
    local = expert_map.at[ids].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
    return jnp.where(local < 0, -1, local)


def _route_sizes(sizes: dict[str, int], top_k: int, **others: Any) -> dict[str, int]:
    return {"K": top_k}


_route = define(
    "route_topk",
    "logits: rows[E], bias?: weights[E] -> ids[K], weights[K]",
    route_meaning,
    sizes=_route_sizes,
    jvp=route_jvp,
)
_weighed = define(
    "route_weigh",
    "logits: rows[E], forced_ids: ids[K] -> weights[K]",
    _weigh_meaning,
    jvp=_weigh_jvp,
)
_renamed = define("route_rename", "expert_ids: ids[K], expert_map: ids[E] -> ids[K]", _renamed_meaning)
