"""Tables: which packed row each pair takes, and blocks of rows that belong to one expert."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..core.primitive import define
from ..core.signature import INT32_MAX, as_bool, as_int


class TokenPairs(NamedTuple):
    """pairs_by_token[..., T, K], packed_token_idx[..., P], expert_offsets[..., E+1], all int32."""

    pairs_by_token: jax.Array
    packed_token_idx: jax.Array
    expert_offsets: jax.Array


class MoeRouting(NamedTuple):
    """sorted_token_ids[..., S], block_ids[..., S/block_size], total_tokens_post_pad[...], all int32."""

    sorted_token_ids: jax.Array
    block_ids: jax.Array
    total_tokens_post_pad: jax.Array


class MoePlan(NamedTuple):
    """The fields of TokenPairs, then those of MoeRouting."""

    pairs_by_token: jax.Array
    packed_token_idx: jax.Array
    expert_offsets: jax.Array
    sorted_token_ids: jax.Array
    block_ids: jax.Array
    total_tokens_post_pad: jax.Array


def max_aligned_rows(num_pairs: int, num_experts: int, block_size: int) -> int:
    """S, the rows of a block-aligned table: enough for any routing of `num_pairs` pairs, and no block more.

    At most m = min(num_experts, num_pairs) experts own a partly filled block; what is left fills whole ones.

    Args:
      num_pairs: P = T * K, >= 0.
      num_experts: E, >= 1.
      block_size: rows in a block, >= 1.

    Returns:
      (m + (P - m) // block_size) * block_size.

    Raises:
      TypeError: an argument is no int.
      ValueError: an argument out of range, or a table too long for int32 ids.

    >>> max_aligned_rows(256, 128, 16)
    2176
    """
    op = "max_aligned_rows"
    num_pairs = as_int(op, "num_pairs", num_pairs, 0)
    num_experts, block_size = as_int(op, "num_experts", num_experts), as_int(op, "block_size", block_size)
    busy = min(num_experts, num_pairs)
    rows = (busy + (num_pairs - busy) // block_size) * block_size
    if rows > INT32_MAX:
        raise ValueError(
            f"{op}: {num_pairs} pairs, {num_experts} experts and block_size {block_size} make {rows} aligned rows; "
            f"int32 ids allow {INT32_MAX}"
        )
    return rows


def moe_build_pairs_by_token(
    expert_ids: jax.Array, num_experts: int, *, implementation: str | None = None
) -> TokenPairs:
    """Sort the pairs by expert: the packed order, in both directions.

    A stable counting sort: inside an expert, pairs stay in ascending order p = t*K + k. Deterministic, and the same
    on every implementation.

    Args:
      expert_ids: [..., T, K] of any integer dtype; a value outside [0, E) is no expert; its pair is counted nowhere.
      num_experts: E, >= 1.
      implementation: None (see `which`), "xla" or "triton"; Pallas has no kernel of tables.

    Returns:
      TokenPairs, int32:
      pairs_by_token[..., T, K]: the packed row of each pair; -1 if it has no expert.
      packed_token_idx[..., P]: the token of each packed row; T past the last live row.
      expert_offsets[..., E+1]: expert e owns packed rows expert_offsets[e] to expert_offsets[e+1].

    Raises:
      TypeError: expert_ids of a dtype that is no integer, or `num_experts` that is no int.
      ValueError: fewer than two axes, `num_experts` < 1, P past int32, an unknown `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    >>> import jax.numpy as jnp
    >>> moe_build_pairs_by_token(jnp.array([[1, 0], [1, 2]]), 3).pairs_by_token.tolist()
    [[1, 0], [2, 3]]
    """
    num_experts = as_int("moe_build_pairs_by_token", "num_experts", num_experts, most=INT32_MAX - 1)
    return TokenPairs(*_pairs(expert_ids, num_experts=num_experts, implementation=implementation))


def moe_align_block_size(
    expert_ids: jax.Array, num_experts: int, block_size: int, *, implementation: str | None = None
) -> MoeRouting:
    """Lay the packed rows out in blocks of one expert each, each expert's rows padded up to a multiple of `block_size`.

    Experts ascend; one without pairs has no block. The same on every implementation. With FERRUM_MOE_DUMP in the
    environment (any value) while this is traced, the first table that is computed is printed to standard error.

    Args:
      expert_ids: [..., T, K] of any integer dtype; a value outside [0, E) is no expert.
      num_experts: E, >= 1.
      block_size: slots in a block, >= 1.
      implementation: None (see `which`), "xla" or "triton"; Pallas has no kernel of tables.

    Returns:
      MoeRouting, int32, every entry written:
      sorted_token_ids[..., S]: at a live slot its packed row (see `moe_build_pairs_by_token`); P at padding and in
        the tail. S = `max_aligned_rows(P, E, block_size)`.
      block_ids[..., S/block_size]: the expert that owns each block; -1 past the live blocks.
      total_tokens_post_pad[...]: slots in live blocks.

    Raises:
      TypeError: expert_ids of a dtype that is no integer; a size that is no int.
      ValueError: fewer than two axes, a size < 1, P or S past int32, an unknown `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    The layout is that of vLLM's `moe_align_block_size`, https://github.com/vllm-project/vllm, with a tighter S.

    >>> import jax.numpy as jnp
    >>> routing = moe_align_block_size(jnp.array([[1, 0], [1, 2]]), 3, 2)
    >>> routing.sorted_token_ids.tolist(), routing.block_ids.tolist()
    ([0, 4, 1, 2, 3, 4], [0, 1, 2])
    """
    return _align("moe_align_block_size", expert_ids, num_experts, block_size, False, implementation)


def moe_align_block_size_pair_ids(
    expert_ids: jax.Array, num_experts: int, block_size: int, *, implementation: str | None = None
) -> MoeRouting:
    """`moe_align_block_size` with other values: a live slot holds its pair id p = t*K + k, not its packed row.

    Args, results, errors and source are those of `moe_align_block_size`. The token of a live slot is p // K.

    >>> import jax.numpy as jnp
    >>> moe_align_block_size_pair_ids(jnp.array([[1, 0], [1, 2]]), 3, 2).sorted_token_ids.tolist()
    [1, 4, 0, 2, 3, 4]
    """
    return _align("moe_align_block_size_pair_ids", expert_ids, num_experts, block_size, True, implementation)


def moe_plan(
    expert_ids: jax.Array,
    num_experts: int,
    block_size: int,
    *,
    pair_ids: bool = False,
    implementation: str | None = None,
) -> MoePlan:
    """Every table of a routing from one pass: those of `moe_build_pairs_by_token`, and the block-aligned ones.

    Args:
      expert_ids: [..., T, K] of any integer dtype; a value outside [0, E) is no expert.
      num_experts: E, >= 1.
      block_size: slots in a block, >= 1.
      pair_ids: live slots hold pair ids (`moe_align_block_size_pair_ids`), not packed rows (`moe_align_block_size`).
      implementation: None (see `which`), "xla" or "triton"; Pallas has no kernel of tables.

    Returns:
      MoePlan, int32: the fields of TokenPairs, then those of MoeRouting.

    Raises:
      As `moe_align_block_size`; TypeError also for `pair_ids` that is no bool.

    >>> import jax.numpy as jnp
    >>> plan = moe_plan(jnp.array([[1, 0], [1, 2]]), 3, 2)
    >>> plan.expert_offsets.tolist(), int(plan.total_tokens_post_pad)
    ([0, 1, 3, 4], 6)
    """
    sizes, pair_ids = checked("moe_plan", num_experts, block_size), as_bool("moe_plan", "pair_ids", pair_ids)
    plan = MoePlan(*_plan(expert_ids, **sizes, pair_ids=pair_ids, implementation=implementation))
    tell(MoeRouting(*plan[-3:]), expert_ids, pair_ids, **sizes)
    return plan


def _align(
    op: str, expert_ids: jax.Array, num_experts: int, block_size: int, pair_ids: bool, implementation: str | None
) -> MoeRouting:
    sizes = checked(op, num_experts, block_size)
    run: dict[str, Any] = {"implementation": implementation, "called": op}
    routing = MoeRouting(*_aligned(expert_ids, **sizes, pair_ids=pair_ids, **run))
    tell(routing, expert_ids, pair_ids, **sizes)
    return routing


def _tell_nobody(routing: MoeRouting, **facts: Any) -> None:
    pass


# Called with each aligned table that is traced, and with pair_ids, num_pairs, num_experts and block_size. A floor above
# sets it: the routing dump, which is built on the tables.
on_aligned_table: Callable[..., None] = _tell_nobody


def tell(routing: MoeRouting, expert_ids: jax.Array, pair_ids: bool, **sizes: int) -> None:
    on_aligned_table(routing, pair_ids=pair_ids, num_pairs=math.prod(jnp.shape(expert_ids)[-2:]), **sizes)


def checked(op: str, num_experts: int, block_size: int) -> dict[str, Any]:
    num_experts = as_int(op, "num_experts", num_experts, most=INT32_MAX - 1)
    return {"num_experts": num_experts, "block_size": as_int(op, "block_size", block_size)}


def table_sizes(size: dict[str, int], num_experts: int, block_size: int = 1, pair_ids: bool = False) -> dict[str, int]:
    """Sizes of every table's axes: P pairs, O offsets, S slots, B blocks."""
    pairs = size["T"] * size["K"]
    slots = max_aligned_rows(pairs, num_experts, block_size)
    return {"P": pairs, "O": num_experts + 1, "S": slots, "B": slots // block_size}


def _pairs_meaning(expert_ids: jax.Array, *, num_experts: int) -> tuple[jax.Array, ...]:
    return _pack(expert_ids, *counting_sort(expert_ids.reshape(-1), num_experts))


def _aligned_meaning(
    expert_ids: jax.Array, *, num_experts: int, block_size: int, pair_ids: bool
) -> tuple[jax.Array, ...]:
    return _fill_blocks(*counting_sort(expert_ids.reshape(-1), num_experts), block_size, pair_ids)


def plan_meaning(expert_ids: jax.Array, *, num_experts: int, block_size: int, pair_ids: bool) -> tuple[jax.Array, ...]:
    order, offsets = counting_sort(expert_ids.reshape(-1), num_experts)
    return *_pack(expert_ids, order, offsets), *_fill_blocks(order, offsets, block_size, pair_ids)


def counting_sort(ids: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(order[P], offsets[count+1]) of a flat array of ids: id i stands at the entries order[offsets[i]:offsets[i+1]].

    Stable; entries outside [0, count) come last.
    """
    entry = jnp.arange(ids.size, dtype=jnp.int32)
    key = jnp.where((ids >= 0) & (ids < count), ids, count)
    bits = ids.size.bit_length()
    if (count + 1) << bits <= INT32_MAX:
        # Key and entry share one integer: a sort of single words is several times faster than one of pairs of words.
        order = lax.sort(key << bits | entry) & ((1 << bits) - 1)
    else:
        order = lax.sort((key, entry), num_keys=1, is_stable=True)[1]
    # Counts come from a scatter: a binary search of the sorted keys, unrolled into its users, compiles for minutes.
    return order, jnp.cumsum(jnp.zeros(count + 2, jnp.int32).at[key + 1].add(1)[:-1], dtype=jnp.int32)


def _pack(expert_ids: jax.Array, order: jax.Array, offsets: jax.Array) -> tuple[jax.Array, ...]:
    num_tokens, top_k = expert_ids.shape
    row = jnp.arange(order.size, dtype=jnp.int32)
    live = row < offsets[-1]
    pairs = jnp.zeros_like(row).at[order].set(jnp.where(live, row, -1), unique_indices=True, mode="promise_in_bounds")
    return pairs.reshape(expert_ids.shape), jnp.where(live, order // max(top_k, 1), num_tokens), offsets


def _fill_blocks(order: jax.Array, offsets: jax.Array, block_size: int, pair_ids: bool) -> tuple[jax.Array, ...]:
    num_pairs, num_experts = order.size, offsets.size - 1
    num_blocks = max_aligned_rows(num_pairs, num_experts, block_size) // block_size
    counts = jnp.diff(offsets)
    blocks = -(-counts // block_size)
    last = jnp.cumsum(blocks, dtype=jnp.int32)
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    # A block's owner is the number of experts whose blocks end at or before it.
    owner = jnp.cumsum(jnp.zeros(num_blocks + 1, jnp.int32).at[last].add(1), dtype=jnp.int32)[:-1]
    live = block < last[-1]
    first = (last - blocks).at[owner].get(mode="clip")
    position = ((block - first) * block_size)[:, None] + jnp.arange(block_size, dtype=jnp.int32)[None]
    row = offsets.at[owner].get(mode="clip")[:, None] + position
    filled = live[:, None] & (position < counts.at[owner].get(mode="clip")[:, None])
    value = order.at[row].get(mode="clip") if pair_ids and num_pairs else row
    slots = jnp.where(filled, value, num_pairs).reshape(-1)
    return slots, jnp.where(live, owner, -1), last[-1] * block_size


def _owner_meaning(packed_token_idx: jax.Array, offsets: jax.Array) -> jax.Array:
    # The number of experts whose rows end at or before a row.
    ends = jnp.zeros(packed_token_idx.size + 1, jnp.int32).at[offsets[1:]].add(1, mode="drop")
    return jnp.cumsum(ends, dtype=jnp.int32)[:-1]


_IDS, _PAIRS, _BLOCKS = "expert_ids: ids[T,K]", "ids[T,K], ids[P], ids[O]", "ids[S], ids[B], ids[]"
_pairs = define("moe_build_pairs_by_token", f"{_IDS} -> {_PAIRS}", _pairs_meaning, sizes=table_sizes)
_aligned = define("moe_align_block_size", f"{_IDS} -> {_BLOCKS}", _aligned_meaning, sizes=table_sizes)
_plan = define("moe_plan", f"{_IDS} -> {_PAIRS}, {_BLOCKS}", plan_meaning, sizes=table_sizes)
# The expert of each packed row; E past the last live row.
expert_of_row = define("expert_of_row", "packed_token_idx: ids[P], expert_offsets: ids[O] -> ids[P]", _owner_meaning)
