"""Routing: the top_k experts of every token, and their weights; with the tables that follow, for few tokens."""

import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..core.primitive import define
from ..core.signature import INT32_MAX, as_bool, as_int, as_mask, canonical, one_of, parse
from .tables import MoePlan, MoeRouting, checked, moe_plan, plan_meaning, table_sizes, tell

SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrt_softplus")
GROUP_SCORES = ("top2_sum", "max")
ZERO_SUMS = ("uniform", "zero", "eps")
_LOG_EPS = math.log(1e-20)
# Pairs, and lanes of logits, up to which routing and tables are one op: see kernels/triton/route_plan.py.
ONE_OP_PAIRS, ONE_OP_LOGITS = 256, 4096


class RouterOutput(NamedTuple):
    """expert_ids[..., K] int32, best first; expert_weights[..., K] float32."""

    expert_ids: jax.Array
    expert_weights: jax.Array


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
    (logits,) = canonical(op, parse("logits: rows[E] -> "), (logits,))
    *lead, experts = logits.shape
    if not experts:
        raise ValueError(f"{op}: logits must hold at least one expert, E >= 1, for any top_k; got shape {logits.shape}")
    top_k = as_int(op, "top_k", top_k, 1, experts)
    choice = _choice(op, experts, top_k, num_groups, group_top_k, group_score)
    weighing = _weighing(op, scoring, norm_topk_prob, scale, zero_sum)
    bias = None if bias is None else _bias(op, bias, len(lead))
    forced_ids = _beside(op, "forced_ids: ids[K]", forced_ids, (*lead, top_k))
    expert_map = _beside(op, "expert_map: ids[E]", expert_map, (experts,))
    token_mask = None if token_mask is None else as_mask(op, token_mask, tuple(lead))
    if token_mask is not None:  # before the routing, so that no gradient meets what a masked row holds
        logits = jnp.where(token_mask[..., None], logits, jnp.zeros((), logits.dtype))
    if forced_ids is None:
        given = (logits,) if bias is None else (logits, bias)
        ids, weights = _route(*given, top_k=top_k, **choice, **weighing, implementation=implementation)
    else:
        if implementation in ("triton", "pallas"):
            raise NotImplementedError(f"{op}: implementation={implementation!r} has no kernel for forced_ids")
        ids = jnp.where((forced_ids >= 0) & (forced_ids < experts), forced_ids, -1)
        weights = _weighed(logits, ids, **weighing, implementation=implementation, called=op)
    if token_mask is not None:
        ids = jnp.where(token_mask[..., None], ids, -1)
        weights = jnp.where(token_mask[..., None], weights, 0)
    if expert_map is not None:
        ids = _renamed(ids, jnp.expand_dims(expert_map, tuple(range(len(lead)))))
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
    op, shape = "route_topk_softmax", jnp.shape(logits)
    if shape and not shape[-1]:
        raise ValueError(f"{op}: logits must hold at least one expert, E >= 1, for any top_k; got shape {shape}")
    top_k = as_int(op, "top_k", top_k, 1, shape[-1] if shape else INT32_MAX)
    choice = _choice(op, INT32_MAX, top_k, None, None, "top2_sum")
    weighing = _weighing(op, "softmax", norm_topk_prob, 1.0, "uniform")
    run: dict[str, Any] = {"implementation": implementation, "called": op}
    return RouterOutput(*_route(logits, top_k=top_k, **choice, **weighing, **run))


def moe_route_plan(
    logits: jax.Array,
    top_k: int,
    block_size: int,
    *,
    pair_ids: bool = False,
    num_experts: int | None = None,
    implementation: str | None = None,
    **router: Any,
) -> tuple[RouterOutput, MoePlan]:
    """`route_topk`, and `moe_plan` of what it chose: on a GPU in one launch where there is little to do, as in decode.

    One op, that is, up to 256 pairs T*K and 4,096 logits T*E, E rounded up to a power of two, of each slice of the
    leading axes; with none of `forced_ids`, `token_mask` and `expert_map`, and no bias for each token. Else two.

    Args:
      logits: [..., T, E] float16, bfloat16 or float32.
      top_k: K, experts per token, in [1, E], and in the groups kept.
      block_size: slots in a block, >= 1.
      pair_ids: live slots hold pair ids, not packed rows, as in `moe_plan`.
      num_experts: experts of the tables; None: E, the usual. With an `expert_map`, as many as it maps to.
      implementation: None (see `which`), "xla" or "triton"; Pallas has no kernel of tables.
      router: `scoring`, `norm_topk_prob`, `bias`, `num_groups`, `group_top_k`, `group_score`, `scale`, `zero_sum`,
        `forced_ids`, `token_mask`, `expert_map`, as in `route_topk`: a preset, for one.

    Returns:
      (RouterOutput, MoePlan), those of the two functions. The ids are the same bits, and the tables are bit for bit
      those of the ids; with "softmax" scores and a bias or groups, ids agree where `route_topk` says that
      implementations agree. A weight may differ by the rounding of the sum that it was divided by, since one launch
      may add in another order: K terms, or all E without `norm_topk_prob` or with zero_sum="eps". Gradients are those
      of `route_topk`.

    Raises:
      As `route_topk` and `moe_plan`; ValueError also for logits with fewer than two axes.

    >>> import jax.numpy as jnp
    >>> routed, plan = moe_route_plan(jnp.array([[0.0, 2.0, 1.0], [3.0, 1.0, 0.0]]), 2, 2)
    >>> routed.expert_ids.tolist(), plan.pairs_by_token.tolist(), plan.block_ids.tolist()
    ([[1, 2], [0, 1]], [[1, 3], [0, 2]], [0, 1, 2])
    """
    op = "moe_route_plan"
    (logits,) = canonical(op, parse("logits: rows[T,E] -> "), (logits,))
    *lead, tokens, experts = logits.shape
    run: dict[str, Any] = {"implementation": implementation}
    for name in set(router) - set(route_topk.__kwdefaults__ or ()):
        raise TypeError(f"{op}: got an unexpected keyword argument {name!r}")
    sizes = checked(op, experts if num_experts is None else num_experts, block_size)
    pair_ids = as_bool(op, "pair_ids", pair_ids)
    bias, beside = router.pop("bias", None), ("forced_ids", "token_mask", "expert_map")
    if bias is not None:
        bias = _bias(op, bias, len(lead))
    together = sizes["num_experts"] == experts and all(router.get(name) is None for name in beside)
    together &= bias is None or bias.ndim == len(lead) + 1
    top_k = as_int(op, "top_k", top_k, 1, experts) if experts else top_k
    few = experts and tokens * top_k <= ONE_OP_PAIRS and tokens << (experts - 1).bit_length() <= ONE_OP_LOGITS
    if not (together and few):
        routed = route_topk(logits, top_k, bias=bias, **router, **run)
        return routed, moe_plan(routed.expert_ids, **sizes, pair_ids=pair_ids, **run)
    settings = checked_settings(op, experts, top_k, **{k: v for k, v in router.items() if k not in beside})
    given = (logits,) if bias is None else (logits, bias)
    found = _route_plan(*given, **settings, block_size=sizes["block_size"], pair_ids=pair_ids, **run)
    routed, plan = RouterOutput(*found[:2]), MoePlan(*found[2:])
    tell(MoeRouting(*plan[-3:]), routed.expert_ids, pair_ids, **sizes)
    return routed, plan


def as_pair(op: str, router_output: Any) -> tuple[Any, Any]:
    """The ids and the weights of a RouterOutput, or of a plain tuple of them."""
    if not (isinstance(router_output, tuple) and len(router_output) == 2):
        raise TypeError(f"{op}: router_output must be a RouterOutput; got {type(router_output).__name__}")
    return router_output


# ---- the settings, checked, in the one form that each meaning has


def _choice(op: str, experts: int, top_k: int, num_groups: Any, group_top_k: Any, group_score: str) -> dict[str, Any]:
    """How experts are chosen. Groups that are all kept are none."""
    one_of(op, "group_score", group_score, GROUP_SCORES)
    none = {"num_groups": None, "group_top_k": None, "group_score": None}
    if num_groups is None and group_top_k is None:
        return none
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
        return none
    if num_groups == experts:
        group_score = "max"  # which the sum of one is
    return {"num_groups": num_groups, "group_top_k": group_top_k, "group_score": group_score}


def _weighing(op: str, scoring: str, norm_topk_prob: bool, scale: Any, zero_sum: str) -> dict[str, Any]:
    """How the chosen experts are weighed."""
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
    return {"scoring": scoring, "norm_topk_prob": norm, "scale": float(scale), "zero_sum": zero_sum}


def checked_settings(
    op: str,
    experts: int,
    top_k: int,
    *,
    scoring: str = "softmax",
    norm_topk_prob: bool = True,
    num_groups: int | None = None,
    group_top_k: int | None = None,
    group_score: str = "top2_sum",
    scale: float = 1.0,
    zero_sum: str = "uniform",
) -> dict[str, Any]:
    """All of them, by the names and defaults of `route_topk`."""
    top_k = as_int(op, "top_k", top_k, 1, experts)
    choice = _choice(op, experts, top_k, num_groups, group_top_k, group_score)
    return {"top_k": top_k, **choice, **_weighing(op, scoring, norm_topk_prob, scale, zero_sum)}


def _bias(op: str, bias: Any, leading: int) -> jax.Array:
    """The bias with as many leading axes as an operand beside it."""
    (array,) = canonical(op, parse("bias: weights[E] -> "), (bias,))
    return jnp.expand_dims(array, tuple(range(array.ndim - 1, leading)))


def _beside(op: str, term: str, value: Any, shape: tuple[Any, ...]) -> Any:
    """An optional array that goes with the logits, of the shape that these give it."""
    if value is None:
        return None
    name = term.partition(":")[0]
    (array,) = canonical(op, parse(f"{term} -> "), (value,))
    if array.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, for these logits; got {array.shape}")
    return array


# ---- the choice


def _choose(
    x: jax.Array,
    bias: jax.Array | None,
    scoring: str,
    top_k: int,
    num_groups: int | None,
    group_top_k: int | None,
    group_score: str | None,
) -> jax.Array:
    if bias is None and num_groups is None:
        return lax.top_k(rankable(x), top_k)[1].astype(jnp.int32)
    scores = _score(x, scoring) if bias is None else _score(x, scoring) + bias
    if num_groups is None or group_top_k is None:
        return lax.top_k(rankable(scores), top_k)[1].astype(jnp.int32)
    # The groups kept, in order of their experts' ids, side by side: what is not there cannot be chosen, NaN or not.
    groups = scores.reshape(num_groups, -1)
    best = lax.top_k(rankable(groups), 2 if group_score == "top2_sum" else 1)[0]
    kept = jnp.sort(lax.top_k(rankable(jnp.sum(best, axis=1)), group_top_k)[1])
    place = lax.top_k(rankable(groups[kept].reshape(-1)), top_k)[1]
    size = groups.shape[1]
    return (kept[place // size] * size + place % size).astype(jnp.int32)


def rankable(x: jax.Array) -> jax.Array:
    """Floats which lax.top_k, that compares bits, ranks as the contract says: -0 as +0, and every NaN below -inf."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = jnp.where(bits == jnp.int32(-(2**31)), 0, bits)
    bits = jnp.where((bits & 0x7FFFFFFF) > 0x7F800000, -1, bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _score(x: jax.Array, scoring: str) -> jax.Array:
    """What a bias is added to, of one row."""
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
    """(exponent, factor): a score is factor * exp(exponent), so that scores too small for a float still compare."""
    if scoring == "sigmoid":
        return jnp.minimum(x, 0), 1 / (1 + jnp.exp(-jnp.abs(x)))
    if scoring == "sqrt_softplus":  # below -40 it is exp(x / 2), to the last bit
        return jnp.minimum(x + 40, 0) / 2, jnp.sqrt(jax.nn.softplus(jnp.maximum(x, -40)))
    return x, jnp.ones_like(x)


def _finite(largest: jax.Array) -> jax.Array:
    return jnp.where(largest == -jnp.inf, 0, largest)


def _weigh(
    logits: jax.Array, ids: jax.Array, *, scoring: str, norm_topk_prob: bool, scale: float, zero_sum: str
) -> jax.Array:
    """The weights of the experts `ids` of one token; an id outside [0, E) is no expert."""
    x = logits.astype(jnp.float32)
    live = (ids >= 0) & (ids < x.shape[0])
    chosen = x.at[ids].get(mode="fill", fill_value=-jnp.inf, wrap_negative_indices=False)
    exponent, factor = _parts(chosen, scoring)
    # Relative to the largest of them, the terms' sum is 0 only where each of them really is.
    largest = exponent if norm_topk_prob else x if scoring == "softmax" else jnp.zeros_like(x)
    base = _finite(jnp.max(largest))
    weights = factor * jnp.exp(exponent - base)
    if norm_topk_prob:
        total = jnp.sum(weights)
        if zero_sum == "eps" and scoring != "topk_softmax":  # 1e-20, relative like the terms
            total += jnp.sum(jnp.exp(x - base + _LOG_EPS)) if scoring == "softmax" else jnp.exp(_LOG_EPS - base)
    else:
        total = jnp.sum(jnp.exp(x - base)) if scoring == "softmax" else jnp.float32(1)
    otherwise = 1 / ids.shape[0] if norm_topk_prob and zero_sum == "uniform" else 0
    weights = jnp.where(total == 0, otherwise, weights / total)
    if scoring == "softmax":
        # Said outright: the maximum of a row with NaN is not always NaN on XLA:CPU.
        weights = jnp.where(jnp.all(x < jnp.inf), weights, jnp.nan)
    weights = jnp.where(live, weights, 0)
    return weights if scale == 1 else weights * jnp.float32(scale)


def _tangent(
    logits: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    dlogits: jax.Array | None,
    *,
    scoring: str,
    norm_topk_prob: bool,
    scale: float,
    zero_sum: str,
) -> jax.Array | None:
    """d weights = weights * (d log score - its mean under what the weights are normalised by), with constant ids."""
    if dlogits is None or scale == 0:
        return None
    x, dx = logits.astype(jnp.float32), dlogits.astype(jnp.float32)
    live = (ids >= 0) & (ids < x.shape[-1])
    chosen = _take(x, ids)
    change = _take(dx, ids)
    if scoring == "sigmoid":
        change *= jax.nn.sigmoid(-chosen)
    elif scoring == "sqrt_softplus":
        bounded = jnp.maximum(chosen, -40)  # where it is 1/2, to the last bit
        change *= jax.nn.sigmoid(bounded) / (2 * jax.nn.softplus(bounded))
    constant, mean, outside = ~live, jnp.zeros_like(change), jnp.ones((), x.dtype)
    if norm_topk_prob:
        shares = weights / scale
        mean = jnp.sum(shares * change, axis=-1, keepdims=True)
        outside = 1 - jnp.sum(shares, axis=-1, keepdims=True)  # what the 1e-20 of "eps" has of the sum
        summed_to_zero = jnp.all(~live | (chosen == -jnp.inf), axis=-1, keepdims=True)
        constant |= summed_to_zero & ~jnp.isnan(weights)
    if scoring == "softmax" and (not norm_topk_prob or zero_sum == "eps"):
        masked = jnp.all(x == -jnp.inf, axis=-1, keepdims=True)
        every = jnp.sum(jax.nn.softmax(jnp.where(masked, 0, x), axis=-1) * dx, axis=-1, keepdims=True)
        mean += outside * every
    return jnp.where(constant, 0, weights * (change - mean))


def _meaning(
    logits: jax.Array,
    bias: jax.Array | None = None,
    *,
    top_k: int,
    num_groups: int | None,
    group_top_k: int | None,
    group_score: str | None,
    **weighing: Any,
) -> tuple[jax.Array, jax.Array]:
    x = logits.astype(jnp.float32)
    ids = _choose(x, bias, weighing["scoring"], top_k, num_groups, group_top_k, group_score)
    return ids, _weigh(x, ids, **weighing)


def _jvp(
    primals: Any,
    results: Any,
    tangents: Any,
    *,
    top_k: int,
    num_groups: int | None,
    group_top_k: int | None,
    group_score: str | None,
    implementation: str | None,
    **weighing: Any,
) -> tuple[None, jax.Array | None]:
    ids, weights = results
    return None, _tangent(primals[0], ids, weights, tangents[0], **weighing)


def _weigh_jvp(
    primals: Any, results: Any, tangents: Any, *, implementation: str | None, **weighing: Any
) -> tuple[jax.Array | None]:
    (logits, ids), (weights,) = primals, results
    return (_tangent(logits, ids, weights, tangents[0], **weighing),)


_route = define(
    "route_topk",
    "logits: rows[E], bias: weights[E] -> ids[K], weights[K]",
    _meaning,
    sizes=lambda size, top_k, **settings: {"K": top_k},
    jvp=_jvp,
)


def _route_plan_meaning(
    logits: jax.Array, bias: jax.Array | None = None, *, block_size: int, pair_ids: bool, **settings: Any
) -> tuple[jax.Array, ...]:
    ids, weights = jax.vmap(functools.partial(_meaning, **settings), in_axes=(0, None))(logits, bias)
    tables = plan_meaning(ids, num_experts=logits.shape[1], block_size=block_size, pair_ids=pair_ids)
    return ids, weights, *tables


def _route_plan_jvp(
    primals: Any, results: Any, tangents: Any, *, block_size: int, pair_ids: bool, **settings: Any
) -> tuple[Any, ...]:
    return *_jvp(primals, results[:2], tangents, **settings), *(None for _ in results[2:])


_route_plan = define(
    "moe_route_plan",
    "logits: rows[T,E], bias: weights[E] -> ids[T,K], weights[T,K], ids[T,K], ids[P], ids[O], ids[S], ids[B], ids[]",
    _route_plan_meaning,
    sizes=lambda size, top_k, block_size, pair_ids, **settings: {
        "K": top_k,
        **table_sizes({**size, "K": top_k}, size["E"], block_size),
    },
    jvp=_route_plan_jvp,
)
_weighed = define(
    "route_weigh",
    "logits: rows[E], forced_ids: ids[K] -> weights[K]",
    _weigh,
    jvp=_weigh_jvp,
)


def _renamed_meaning(ids: jax.Array, expert_map: jax.Array) -> jax.Array:
    local = expert_map.at[ids].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
    return jnp.where(local < 0, -1, local)


_renamed = define("route_rename", "expert_ids: ids[K], expert_map: ids[E] -> ids[K]", _renamed_meaning)

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
