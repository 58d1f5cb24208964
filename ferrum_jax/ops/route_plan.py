"""Routing and its tables together. If there is little to do, as in decode, both are one op."""

from typing import Any

import jax

from ..core.primitive import define
from ..core.settings import as_bool, as_int, one_of
from ..core.signature import checked
from ..core.types import MoePlan, RouterOutput
from ..kernels import IMPLEMENTATIONS
from .routing import route_jvp, route_meaning, route_topk, with_leading_axes
from .scoring import checked_settings
from .tables import as_plan, checked_sizes, moe_plan, plan_meaning, table_sizes

# The largest numbers of pairs and of logits for which one launch makes both: see kernels/triton/route_plan.py.
ONE_OP_PAIRS, ONE_OP_LOGITS = 256, 4096


def moe_route_plan(
    logits: jax.Array,
    top_k: int,
    block_size: int,
    *,
    pair_ids: bool = False,
    num_experts: int | None = None,
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
) -> tuple[RouterOutput, MoePlan]:
    """`route_topk`, and `moe_plan` of what it chose. If there is little to do, as in decode, one GPU launch does both.

    Both are one op if each slice of the leading axes has at most 256 pairs T*K and 4,096 logits T*E, with E rounded up
    to a power of two, none of `forced_ids`, `token_mask` and `expert_map` is given, and the bias is not one for each
    token. Else they are two ops.

    Args:
      logits: [..., T, E] float16, bfloat16 or float32.
      top_k: K, experts per token, in [1, E], and in the groups kept.
      block_size: slots in a block, >= 1.
      pair_ids: live slots hold pair ids, not packed rows, as in `moe_plan`.
      num_experts: how many experts the tables have; None: E. With an `expert_map`, as many as it maps to.
      scoring, norm_topk_prob, bias, num_groups, group_top_k, group_score, scale, zero_sum, forced_ids, token_mask,
        expert_map: as in `route_topk`; a preset gives most of them.
      implementation: None (see `which`), "xla" or "triton"; Pallas has no kernel of tables.

    Returns:
      (RouterOutput, MoePlan), as from the two functions. The tables are exactly those of the ids. The ids are the same
      bits as those of `route_topk`; with "softmax" scores and a bias or groups, they agree where `route_topk` says that
      implementations agree. A weight may differ by the rounding of the sum that it was divided by, because one launch
      may add in another order. That sum has K terms, or all E without `norm_topk_prob` or with zero_sum="eps".
      Gradients are those of `route_topk`.

    Raises:
      As `route_topk` and `moe_plan`; ValueError also for logits with fewer than two axes.

    >>> import jax.numpy as jnp
    >>> routed, plan = moe_route_plan(jnp.array([[0.0, 2.0, 1.0], [3.0, 1.0, 0.0]]), 2, 2)
    >>> routed.expert_ids.tolist(), plan.pairs_by_token.tolist(), plan.block_ids.tolist()
    ([[1, 2], [0, 1]], [[1, 3], [0, 2]], [0, 1, 2])
    """
    op = "moe_route_plan"
    (logits,) = checked(op, "logits: rows[T,E]", logits)
    *lead, tokens, experts = logits.shape
    num_experts, block_size = checked_sizes(op, experts if num_experts is None else num_experts, block_size)
    pair_ids = as_bool(op, "pair_ids", pair_ids)
    bias = None if bias is None else with_leading_axes(op, bias, len(lead))
    top_k = as_int(op, "top_k", top_k, 1, experts) if experts else top_k
    beside = forced_ids is not None or token_mask is not None or expert_map is not None
    bias_of_tokens = bias is not None and bias.ndim == logits.ndim
    if beside or bias_of_tokens or num_experts != experts or not _are_few(tokens, top_k, experts):
        routed = route_topk(
            logits,
            top_k,
            scoring=scoring,
            norm_topk_prob=norm_topk_prob,
            bias=bias,
            num_groups=num_groups,
            group_top_k=group_top_k,
            group_score=group_score,
            scale=scale,
            zero_sum=zero_sum,
            forced_ids=forced_ids,
            token_mask=token_mask,
            expert_map=expert_map,
            implementation=implementation,
        )
        plan = moe_plan(routed.expert_ids, num_experts, block_size, pair_ids=pair_ids, implementation=implementation)
        return routed, plan
    one_of(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    logits, bias = checked(op, _route_plan.signature, logits, bias)
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
    ids, weights, *tables = _route_plan.bind(
        logits,
        bias,
        **selection._asdict(),
        **weighing._asdict(),
        block_size=block_size,
        pair_ids=pair_ids,
        implementation=implementation,
    )
    return RouterOutput(ids, weights), as_plan(tables, pair_ids, num_experts, block_size)


def _are_few(tokens: int, top_k: int, experts: int) -> bool:
    """Whether there is so little to do that routing and tables are one op."""
    known = experts > 0 and isinstance(tokens, int)
    return known and tokens * top_k <= ONE_OP_PAIRS and tokens << (experts - 1).bit_length() <= ONE_OP_LOGITS


# ---- the op. `**settings` are the fields of Selection and Weighing, and in the derivative also `implementation`.


def _meaning(
    logits: jax.Array, bias: jax.Array | None, *, block_size: int, pair_ids: bool, **settings: Any
) -> tuple[jax.Array, ...]:
    def of_token(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return route_meaning(logits, bias, **settings)

    ids, weights = jax.vmap(of_token)(logits)
    tables = plan_meaning(ids, num_experts=logits.shape[1], block_size=block_size, pair_ids=pair_ids)
    return ids, weights, *tables


def _jvp(
    primals: Any, results: Any, tangents: Any, *, block_size: int, pair_ids: bool, **settings: Any
) -> tuple[Any, ...]:
    return *route_jvp(primals, results[:2], tangents, **settings), *(None for _ in results[2:])


def _sizes(sizes: dict[str, int], top_k: int, block_size: int, **others: Any) -> dict[str, int]:
    return {"K": top_k, **table_sizes({**sizes, "K": top_k}, sizes["E"], block_size)}


_route_plan = define(
    "moe_route_plan",
    "logits: rows[T,E], bias?: weights[E] -> ids[T,K], weights[T,K], ids[T,K], ids[P], ids[O], ids[S], ids[B], ids[]",
    _meaning,
    sizes=_sizes,
    jvp=_jvp,
)
