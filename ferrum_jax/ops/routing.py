"""Routing: the top_k experts of every token, and their weights."""

from typing import Any

import jax
import jax.numpy as jnp

from ..core.primitive import define
from ..core.signature import as_mask, checked, one_of
from ..core.types import RouterOutput
from ..kernels import IMPLEMENTATIONS
from .scoring import Selection, Weighing, checked_settings, select, weigh, weight_tangent


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
    """Choose each token's `top_k` experts, and weigh them: the routers of most published models, by their settings.

    A logit becomes a score; the `top_k` best are chosen by score plus `bias`, in the `group_top_k` best groups only;
    the weights are the chosen scores, without the bias, divided by their sum if `norm_topk_prob`, times `scale`.

    The ids of a token are distinct, in [0, E) and of groups that were kept, whatever the logits and the bias hold.
    Without bias and groups experts rank by float32 logit, as in `route_topk_softmax`, since every score grows with
    it: the ids are the same bits on every implementation. With either they rank by float32 score plus bias, descending,
    equal ones by smaller id, NaN last; implementations agree wherever what competes differs by more than 8 ulp of the
    largest score or bias in it. The weights' derivative is exact, with the ids held constant; `bias` gets none.

    Args:
      logits: [..., E] float16, bfloat16 or float32; -inf masks an expert: its score is 0. Arithmetic is in float32.
      top_k: K, experts per token, in [1, E], and in the groups kept.
      scoring: "softmax" over all E; "topk_softmax", over the chosen ones (the score that ranks them is the logit, and
        `norm_topk_prob` changes nothing); "sigmoid"; "sqrt_softplus", sqrt(log(1 + exp(logit))).
      norm_topk_prob: divide the chosen scores by their sum.
      bias: [E] of any float dtype, or with the first of the leading axes of logits, equal or of size 1: [L, E] for
        logits[L, T, E].
      num_groups: the experts form this many groups of E / num_groups neighbours; with `group_top_k`.
      group_top_k: how many groups a token keeps, in [1, num_groups], equal ones by smaller id. The others are as if
        masked by -inf. To keep all of them is to have no groups.
      group_score: a group ranks by the sum of its two largest biased scores, "top2_sum" (by its one, where groups have
        one expert), or by its largest, "max"; NaN ranks last, as among the scores.
      scale: a number that the weights are multiplied by, last: 0, or normal and finite in float32.
      zero_sum: the weights where the sum to divide by is 0, which it is where every chosen logit is -inf: "uniform",
        1/K each; "zero"; or "eps", which divides by sum + 1e-20, always.
      forced_ids: [..., K] of any integer dtype, the ids that another routing recorded. Weights and derivatives are as
        if these had been chosen; bias and groups are not used. An id outside [0, E) comes back as -1, with weight 0.
      token_mask: [...] bool; a False token has ids -1, weights 0 and gradient 0, whatever its logits hold.
      expert_map: [E] of any integer dtype, applied to the ids last: an expert's id elsewhere, or -1. Weights stay.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      RouterOutput(expert_ids[..., K] int32, expert_weights[..., K] float32). NaN weights: all of a row that holds NaN
      or +inf with "softmax", or that chose one with "topk_softmax"; else that of a NaN logit, or, where divided by
      their sum, all of its row. A logit of +inf scores 1 with "sigmoid", and +inf with "sqrt_softplus", NaN divided.
      In rows without NaN or +inf weights and gradients are finite, and a weight that the zero sum made has gradient 0.

    Raises:
      TypeError: dtypes other than these, `top_k`, `num_groups` or `group_top_k` that is no int, `norm_topk_prob` no
        bool, `scale` no number.
      ValueError: shapes that do not fit logits, sizes out of range, E not divisible by `num_groups`, top_k above
        group_top_k * E / num_groups, one group option without the other, a `scale` neither 0 nor finite and
        normal, an unknown `scoring`, `group_score`, `zero_sum` or `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why. `forced_ids` have xla's
        alone.

    Scores, bias and groups are those of DeepSeek-V3, https://arxiv.org/abs/2412.19437; to replay the routing of another
    pass is the method of Ma et al., https://arxiv.org/abs/2510.11370.

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
    if token_mask is not None:  # before the routing, so that no gradient touches what a masked row holds
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

    The experts of a token are distinct and in [0, E), whatever the logits: ranked by float32 logit, descending, equal
    logits by smaller id; -0 equals +0, subnormals keep their order, NaN ranks last. The ids are the same bits on every
    implementation. The weights' derivative is exact, with the ids held constant.

    Args:
      logits: [..., E] float16, bfloat16 or float32; -inf masks an expert. Arithmetic is in float32.
      top_k: K, experts per token, in [1, E].
      norm_topk_prob: divide the chosen probabilities by their sum, so that each token's weights add up to 1.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      RouterOutput(expert_ids[..., K] int32, expert_weights[..., K] float32). A row that holds NaN or +inf has NaN
      weights; a row of -inf only has 1/K each if `norm_topk_prob`, else 0, and gradient 0.

    Raises:
      TypeError: logits of another dtype, `top_k` that is no int, `norm_topk_prob` no bool.
      ValueError: `top_k` outside [1, E], logits without axes, an unknown `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    The method is that of the Ferrum engine's router, after Shazeer et al., https://arxiv.org/abs/1701.06538, except
    that it ranks logits, not probabilities: these underflow to ties.

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
    """The bias, with leading axes of size 1 put in until it has as many as the operand beside it."""
    (array,) = checked(op, "bias: weights[E]", bias)
    return jnp.expand_dims(array, tuple(range(array.ndim - 1, leading)))


def _beside(op: str, name: str, value: Any, shape: tuple[Any, ...]) -> Any:
    """An optional array of ids that goes with the logits, of the shape that these give it."""
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
    ids = select(x, bias, scoring, Selection(top_k, num_groups, group_top_k, group_score))
    return ids, weigh(x, ids, Weighing(scoring, norm_topk_prob, scale, zero_sum))


def route_jvp(
    primals: Any,
    results: Any,
    tangents: Any,
    *,
    scoring: str,
    norm_topk_prob: bool,
    scale: float,
    zero_sum: str,
    **selection: Any,
) -> tuple[None, jax.Array | None]:
    """The tangent of the weights: the ids are held constant, so how they were selected does not matter."""
    ids, weights = results
    weighing = Weighing(scoring, norm_topk_prob, scale, zero_sum)
    return None, weight_tangent(primals[0], ids, weights, tangents[0], weighing)


def _weigh_meaning(
    logits: jax.Array, ids: jax.Array, *, scoring: str, norm_topk_prob: bool, scale: float, zero_sum: str
) -> jax.Array:
    return weigh(logits, ids, Weighing(scoring, norm_topk_prob, scale, zero_sum))


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


def _route_sizes(sizes: dict[str, int], top_k: int, **settings: Any) -> dict[str, int]:
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
