"""Capacity: each expert takes at most so many pairs, and the others are dropped."""

import jax
import jax.numpy as jnp
from jax import lax

from ..core.primitive import define
from ..core.settings import INT32_MAX, as_int, as_size, one_of
from ..core.signature import checked
from ..core.types import RouterOutput
from .routing import as_pair
from .scoring import rankable
from .tables import moe_build_pairs_by_token

PRIORITIES = ("token", "weight")


def limit_capacity(
    router_output: RouterOutput, num_experts: int, capacity: int, *, priority: str = "token"
) -> tuple[RouterOutput, jax.Array]:
    """Keep at most `capacity` pairs of each expert, and drop the others: id -1, weight 0.

    Shapes stay as they are. Kept weights stay the same bits, and pass their gradient on; they are not normalised again.
    The gradient of a dropped weight is 0.

    Args:
      router_output: expert_ids[..., T, K] of any integer dtype and expert_weights[..., T, K] of any float dtype, used
        in float32. Leading axes are slices of their own: each has the whole capacity.
      num_experts: E, >= 1.
      capacity: pairs an expert takes, >= 0: a Python int, or under `jax.export` a symbolic size.
      priority: which pairs stay. "token": the first, by pair id t*K + k. "weight": those of largest weight, the first
        of equal ones; -0 equals +0, NaN comes last.

    Returns:
      (RouterOutput(expert_ids[..., T, K] int32, expert_weights[..., T, K] float32), dropped[...] int32). `dropped`
      counts the pairs that had an expert and lost it. A pair whose id is outside [0, E) had none. It also comes out
      with id -1 and weight 0, but is not counted, and takes no capacity.

    Raises:
      TypeError: `router_output` that is no pair of arrays, an array of another dtype, a size that is no int.
      ValueError: shapes that do not fit, a size out of range, an unknown `priority`.

    A capacity in the order of tokens is that of GShard, https://arxiv.org/abs/2006.16668, and Switch Transformers,
    https://arxiv.org/abs/2101.03961; by weight, the batch prioritized routing of https://arxiv.org/abs/2106.05974, for
    pairs in place of tokens.

    >>> import jax.numpy as jnp
    >>> routing = RouterOutput(jnp.array([[0, 1], [0, 2], [0, 1]]), jnp.array([[0.5, 0.5], [0.9, 0.1], [0.7, 0.3]]))
    >>> kept, dropped = limit_capacity(routing, 3, 1)
    >>> kept.expert_ids.tolist(), int(dropped)
    ([[0, 1], [-1, 2], [-1, -1]], 3)
    >>> limit_capacity(routing, 3, 1, priority="weight")[0].expert_ids.tolist()
    [[-1, 1], [0, 2], [-1, -1]]
    """
    op = "limit_capacity"
    one_of(op, "priority", priority, PRIORITIES)
    num_experts = as_int(op, "num_experts", num_experts, most=INT32_MAX - 1)
    capacity = as_size(op, "capacity", capacity, 0)
    ids, weights = checked(op, "expert_ids: ids[T,K], expert_weights: weights[T,K]", *as_pair(op, router_output))
    if ids.shape != weights.shape:
        raise ValueError(f"{op}: expert_weights must have the shape of expert_ids, {ids.shape}; got {weights.shape}")
    rank = _rank.bind(ids, weights if priority == "weight" else None, num_experts=num_experts, implementation=None)
    kept = (rank >= 0) & (rank < capacity)
    dropped = jnp.sum(rank >= capacity, axis=(-2, -1), dtype=jnp.int32)
    return RouterOutput(jnp.where(kept, ids, -1), jnp.where(kept, weights, 0)), dropped


def _rank_meaning(expert_ids: jax.Array, weights: jax.Array | None = None, *, num_experts: int) -> jax.Array:
    ids, pair = expert_ids.reshape(-1), jnp.arange(expert_ids.size, dtype=jnp.int32)
    order = pair if weights is None else lax.sort((_descending(weights.reshape(-1)), pair), num_keys=1)[1]
    ids = ids[order]
    row, _, offsets = moe_build_pairs_by_token(ids[:, None], num_experts)
    row = row[:, 0]
    rank = jnp.where(row < 0, -1, row - offsets.at[ids].get(mode="clip", wrap_negative_indices=False))
    rank = jnp.zeros_like(rank).at[order].set(rank, unique_indices=True, mode="promise_in_bounds")
    return rank.reshape(expert_ids.shape)


def _descending(weights: jax.Array) -> jax.Array:
    """Integers that ascend where the weights descend. XLA may take subnormal floats for 0 when it compares them."""
    bits = lax.bitcast_convert_type(rankable(weights), jnp.int32)
    return ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))


# Each pair's place among its expert's pairs, in the order of pair ids, or of weights if these are given. A pair without
# an expert has -1.
_rank = define(
    "rank_in_expert",
    "expert_ids: ids[T,K], expert_weights?: weights[T,K] -> ids[T,K]",
    _rank_meaning,
)
