"""Tables: which packed row each pair takes, and which expert owns each block of rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core.primitive import define
from ..core.settings import INT32_MAX, as_bool, as_int, one_of
from ..core.signature import checked
from ..core.types import PACKED, PAIR_IDS, MoePlan, MoeRouting, TokenPairs
from ..kernels import IMPLEMENTATIONS
from .table_sizes import aligned_rows


def moe_build_pairs_by_token(
    expert_ids: jax.Array, num_experts: int, *, implementation: str | None = None
) -> TokenPairs:
    """Sort the pairs by expert: the packed order, in both directions.

    A stable counting sort: inside an expert, pairs stay in ascending order p = t*K + k. Deterministic, and the same
    on every implementation.

    Args:
      expert_ids: [..., T, K] of any integer dtype; a pair whose value is outside [0, E) has no expert, and no row.
      num_experts: E, >= 1.
      implementation: None (see `which`), "xla" or "triton"; Pallas has no kernel of tables.

    Returns:
      TokenPairs of int32 arrays. It also knows E and K.
      pairs_by_token[..., T, K]: the packed row of each pair; -1 if it has no expert.
      packed_token_idx[..., P]: the token of each packed row; T past the last row that a pair has.
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
    tables = _pairs(expert_ids, num_experts=num_experts, implementation=implementation)
    return TokenPairs(*tables, num_experts=num_experts, top_k=_known(tables[0].shape[-1]))


def moe_align_block_size(
    expert_ids: jax.Array, num_experts: int, block_size: int, *, implementation: str | None = None
) -> MoeRouting:
    """Lay the packed rows out in blocks of one expert each, each expert's rows padded up to a multiple of `block_size`.

    Blocks stand in ascending order of their experts; an expert without pairs has no block. The table is the same on
    every implementation. If FERRUM_MOE_DUMP is in the environment (with any value) while this is traced, the first
    table that the process computes is printed to standard error.

    Args:
      expert_ids: [..., T, K] of any integer dtype; a value outside [0, E) is no expert.
      num_experts: E, >= 1.
      block_size: slots in a block, >= 1.
      implementation: None (see `which`), "xla" or "triton"; Pallas has no kernel of tables.

    Returns:
      MoeRouting of int32 arrays, with every entry written. It also knows its kind, E, K and `block_size`.
      sorted_token_ids[..., S]: the packed row of each slot (see `moe_build_pairs_by_token`); P in slots that pad a
        block, and past the last block. S = `max_aligned_rows(P, E, block_size)`.
      block_ids[..., S/block_size]: the expert that owns each block; -1 past the last block.
      total_tokens_post_pad[...]: how many slots the blocks have, padding included.

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
    op = "moe_align_block_size"
    num_experts, block_size = checked_sizes(op, num_experts, block_size)
    return align(checked_ids(op, expert_ids, implementation), num_experts, block_size, False, implementation)


def moe_align_block_size_pair_ids(
    expert_ids: jax.Array, num_experts: int, block_size: int, *, implementation: str | None = None
) -> MoeRouting:
    """`moe_align_block_size` with pair ids p = t*K + k in the slots, where that has packed rows.

    Args, results, errors and source are those of `moe_align_block_size`. The token of a slot is p // K.

    >>> import jax.numpy as jnp
    >>> moe_align_block_size_pair_ids(jnp.array([[1, 0], [1, 2]]), 3, 2).sorted_token_ids.tolist()
    [1, 4, 0, 2, 3, 4]
    """
    op = "moe_align_block_size_pair_ids"
    num_experts, block_size = checked_sizes(op, num_experts, block_size)
    return align(checked_ids(op, expert_ids, implementation), num_experts, block_size, True, implementation)


def moe_plan(
    expert_ids: jax.Array,
    num_experts: int,
    block_size: int,
    *,
    pair_ids: bool = False,
    implementation: str | None = None,
) -> MoePlan:
    """All tables of a routing in one pass: those of `moe_build_pairs_by_token`, and the block-aligned ones.

    Args:
      expert_ids: [..., T, K] of any integer dtype; a value outside [0, E) is no expert.
      num_experts: E, >= 1.
      block_size: slots in a block, >= 1.
      pair_ids: whether slots hold pair ids (`moe_align_block_size_pair_ids`) or packed rows (`moe_align_block_size`).
      implementation: None (see `which`), "xla" or "triton"; Pallas has no kernel of tables.

    Returns:
      MoePlan of int32 arrays: those of TokenPairs, then those of MoeRouting. It also knows its kind, E, K and
      `block_size`.

    Raises:
      As `moe_align_block_size`; TypeError also for `pair_ids` that is no bool.

    >>> import jax.numpy as jnp
    >>> plan = moe_plan(jnp.array([[1, 0], [1, 2]]), 3, 2)
    >>> plan.expert_offsets.tolist(), int(plan.total_tokens_post_pad)
    ([0, 1, 3, 4], 6)
    """
    num_experts, block_size = checked_sizes("moe_plan", num_experts, block_size)
    pair_ids = as_bool("moe_plan", "pair_ids", pair_ids)
    expert_ids = checked_ids("moe_plan", expert_ids, implementation)
    return plan(expert_ids, num_experts, block_size, pair_ids, implementation)


def plan(
    expert_ids: jax.Array, num_experts: int, block_size: int, pair_ids: bool, implementation: str | None
) -> MoePlan:
    """`moe_plan` of checked arguments."""
    tables = _plan.bind(
        expert_ids, num_experts=num_experts, block_size=block_size, pair_ids=pair_ids, implementation=implementation
    )
    return as_plan(tables, pair_ids, num_experts, block_size)


def align(
    expert_ids: jax.Array, num_experts: int, block_size: int, pair_ids: bool, implementation: str | None
) -> MoeRouting:
    """`moe_align_block_size`, or with `pair_ids` `moe_align_block_size_pair_ids`, of checked arguments."""
    tables = _aligned.bind(
        expert_ids, num_experts=num_experts, block_size=block_size, pair_ids=pair_ids, implementation=implementation
    )
    num_tokens, top_k = jnp.shape(expert_ids)[-2:]
    kind = PAIR_IDS if pair_ids else PACKED
    routing = MoeRouting(*tables, kind=kind, num_experts=num_experts, top_k=_known(top_k), block_size=block_size)
    on_aligned_table(routing, num_tokens * top_k)
    return routing


def as_plan(tables: Any, pair_ids: bool, num_experts: int, block_size: int) -> MoePlan:
    """Make a plan of its six arrays, and pass its aligned table to `on_aligned_table`."""
    num_tokens, top_k = tables[0].shape[-2:]
    kind = PAIR_IDS if pair_ids else PACKED
    plan = MoePlan(*tables, kind=kind, num_experts=num_experts, top_k=_known(top_k), block_size=block_size)
    on_aligned_table(plan.routing, num_tokens * top_k)
    return plan


def _known(size: Any) -> int | None:
    """A size as a table's fact. A symbolic one becomes None, unknown."""
    return size if isinstance(size, int) else None


def _ignore(routing: MoeRouting, num_pairs: int) -> None:
    pass


# A hook: called with each aligned table that is traced, and with its number of pairs. The routing dump sets it. That is
# built on the tables, so they cannot import it.
on_aligned_table: Callable[[MoeRouting, int], None] = _ignore


def checked_sizes(op: str, num_experts: Any, block_size: Any) -> tuple[int, int]:
    """Check the static sizes of a block-aligned table."""
    num_experts = as_int(op, "num_experts", num_experts, most=INT32_MAX - 1)
    return num_experts, as_int(op, "block_size", block_size)


def checked_ids(op: str, expert_ids: Any, implementation: Any) -> jax.Array:
    """Check the other arguments of a block-aligned table."""
    one_of(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    return checked(op, _aligned.signature, expert_ids)[0]


# ---- what a consumer reads off a table


def packed_order(op: str, table: Any) -> TokenPairs | MoePlan:
    """Check that a table is one of packed rows, as dispatch and combine need."""
    if not isinstance(table, TokenPairs | MoePlan):
        raise TypeError(f"{op}: the table must be a TokenPairs or a MoePlan; got {type(table).__name__}")
    if isinstance(table, MoePlan) and table.kind == PAIR_IDS:
        raise ValueError(
            f"{op}: the plan must be of packed rows, moe_plan(..., pair_ids=False); got one of pair ids, whose "
            "products read and write rows in pair order"
        )
    return table


def rows_per_row(op: str, routing: MoeRouting | MoePlan, rows: Any, top_k: int | None) -> int:
    """How many rows of a grouped product each of lhs's `rows` rows gives: read off the table, or checked against it."""
    if routing.kind is None:
        return 1 if top_k is None else top_k
    if routing.kind == PACKED:
        possible: tuple[int, ...] = (1,)
    elif routing.top_k is not None:
        possible = (1,) if routing.top_k == 1 else (routing.top_k, 1)
    elif top_k is not None:
        possible = (top_k,)
    else:
        raise ValueError(f"{op}: top_k must be given with a routing of pair ids that does not know its K")
    if top_k is not None and top_k not in possible:
        of = "packed rows" if routing.kind == PACKED else f"pair ids with K = {routing.top_k}"
        allowed = " or ".join(map(str, possible))
        raise ValueError(f"{op}: top_k must be {allowed} with a routing of {of}; got {top_k}")
    candidates = possible if top_k is None else (top_k,)
    answers = [(k, _fits(routing, rows * k)) for k in candidates]
    fits = [k for k, answer in answers if answer] or [k for k, answer in answers if answer is None]
    if not fits:
        wanted = " or ".join([f"{rows * k} rows of the result (top_k={k})" for k in candidates])
        raise ValueError(f"{op}: routing is of another number of pairs: lhs has {rows} rows, which make {wanted}")
    if len(fits) > 1 and not (isinstance(rows, int) and rows == 0):  # no rows give none, whatever K is
        raise ValueError(
            f"{op}: top_k must be given here: lhs has {rows} rows, which with this routing may be tokens "
            f"(top_k={fits[0]}) or pairs (top_k=1)"
        )
    return fits[0]


def _fits(routing: MoeRouting | MoePlan, num_pairs: Any) -> bool | None:
    """Whether this may be a table of `num_pairs` pairs; None if the table's facts or symbolic sizes do not tell.

    A plan has an array of P entries. A MoeRouting has only arrays of S entries, and S must be that of `num_pairs`.
    """
    if isinstance(routing, MoePlan):
        return jnp.shape(routing.packed_token_idx)[-1] == num_pairs
    if routing.num_experts is None or routing.block_size is None:
        return None
    slots = jnp.shape(routing.sorted_token_ids)[-1]
    wanted = aligned_rows(num_pairs, routing.num_experts, routing.block_size)
    known = isinstance(slots, int) and isinstance(wanted, int)
    return slots == wanted or (False if known else None)


# ---- meanings. They call lax.cumsum, because jnp.cumsum is jitted. Into a module for several platforms JAX writes a
# jitted function only once, as one of them computes it, and XLA for a CPU aborts on a GPU's cumsum.


def table_sizes(sizes: dict[str, int], num_experts: int, block_size: int = 1, pair_ids: bool = False) -> dict[str, int]:
    """The sizes of the tables' axes: P pairs, O offsets, S slots, B blocks. They do not depend on `pair_ids`."""
    pairs = sizes["T"] * sizes["K"]
    slots = aligned_rows(pairs, num_experts, block_size)
    return {"P": pairs, "O": num_experts + 1, "S": slots, "B": slots // block_size}


def _pairs_meaning(expert_ids: jax.Array, *, num_experts: int) -> tuple[jax.Array, ...]:
    return _token_pairs(expert_ids, *counting_sort(expert_ids.reshape(-1), num_experts))


def _aligned_meaning(
    expert_ids: jax.Array, *, num_experts: int, block_size: int, pair_ids: bool
) -> tuple[jax.Array, ...]:
    ids = expert_ids.reshape(-1)
    return _fill_blocks(ids, *_sorted(ids, num_experts), block_size, pair_ids)[1:]


def plan_meaning(expert_ids: jax.Array, *, num_experts: int, block_size: int, pair_ids: bool) -> tuple[jax.Array, ...]:
    ids = expert_ids.reshape(-1)
    key, order, counts = _sorted(ids, num_experts)
    offsets, *aligned = _fill_blocks(ids, key, order, counts, block_size, pair_ids)
    return *_token_pairs(expert_ids, order, offsets), *aligned


def counting_sort(ids: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(order[P], offsets[count+1]) of a flat array of ids: ids[order[offsets[i]:offsets[i+1]]] are those that equal i.

    The sort is stable. Entries outside [0, count) come last.
    """
    _, order, counts = _sorted(ids, count)
    return order, _offsets(lax.cumsum(counts))


def _sorted(ids: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids[order], order, how often each of [0, count) occurs). An id outside [0, count) becomes count."""
    entry = lax.iota(jnp.int32, ids.size)
    key = lax.select((ids >= 0) & (ids < count), ids, lax.full_like(ids, count))
    # Count by a scatter. A binary search of the sorted keys would be unrolled into all its users, and XLA would compile
    # for minutes.
    counts = lax.full((count,), 0, jnp.int32).at[ids].add(1, mode="drop", wrap_negative_indices=False)
    bits = ids.size.bit_length() if isinstance(ids.size, int) else None
    if bits is None or (count + 1) << bits > INT32_MAX:
        key, order = lax.sort((key, entry), num_keys=1, is_stable=True)
        return key, order, counts
    # Key and entry share one integer, because XLA sorts single words much faster than pairs of words.
    words = lax.sort(key << bits | entry)
    return words >> bits, words & ((1 << bits) - 1), counts


def _offsets(ends: jax.Array) -> jax.Array:
    return lax.pad(ends, jnp.int32(0), [(1, 0, 0)])


def _token_pairs(expert_ids: jax.Array, order: jax.Array, offsets: jax.Array) -> tuple[jax.Array, ...]:
    num_tokens, top_k = expert_ids.shape
    row = lax.iota(jnp.int32, order.size)
    live = row < offsets[-1]
    pairs = lax.full_like(row, 0).at[order].set(jnp.where(live, row, -1), unique_indices=True, mode="promise_in_bounds")
    return pairs.reshape(expert_ids.shape), jnp.where(live, order // max(top_k, 1), num_tokens), offsets


def _fill_blocks(
    ids: jax.Array, key: jax.Array, order: jax.Array, counts: jax.Array, block_size: int, pair_ids: bool
) -> tuple[jax.Array, ...]:
    """The offsets of packed rows, then the block-aligned table. key, order and counts: `_sorted` of ids."""
    num_pairs, num_experts = ids.size, counts.size
    num_slots = aligned_rows(num_pairs, num_experts, block_size)
    row = lax.iota(jnp.int32, num_pairs)
    size = jnp.int32(block_size)
    padded = (lax.div(counts, size) + lax.sign(lax.rem(counts, size))) * size  # counts + size may pass int32
    # One sum over both, because XLA's CPU compiler takes long over each.
    end, padded_end = lax.cumsum(lax.concatenate([counts[None], padded[None]], 0), axis=1)
    shift = (padded_end - padded) - (end - counts)  # from an expert's first packed row to its first slot
    slot = row + shift.at[key].get(mode="clip", wrap_negative_indices=False)
    slot = lax.select(key < num_experts, slot, lax.full_like(slot, num_slots))
    slots = lax.full((num_slots,), num_pairs, jnp.int32)
    slots = slots.at[slot].set(order if pair_ids else row, mode="drop", wrap_negative_indices=False)
    first = slots.reshape(-1, block_size)[:, 0]  # the first slot of a live block is never padding
    owner = (ids if pair_ids else key).at[first].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
    return _offsets(end), slots, owner, padded_end[-1]


def _owner_meaning(packed_token_idx: jax.Array, offsets: jax.Array) -> jax.Array:
    # A row's owner is the number of experts whose rows end at or before it.
    ends = jnp.zeros(packed_token_idx.size + 1, jnp.int32).at[offsets[1:]].add(1, mode="drop")
    return lax.cumsum(ends)[:-1]


_IDS, _PAIRS, _BLOCKS = "expert_ids: ids[T,K]", "ids[T,K], ids[P], ids[O]", "ids[S], ids[B], ids[]"
_pairs = define("moe_build_pairs_by_token", f"{_IDS} -> {_PAIRS}", _pairs_meaning, sizes=table_sizes)
_aligned = define("moe_align_block_size", f"{_IDS} -> {_BLOCKS}", _aligned_meaning, sizes=table_sizes)
_plan = define("moe_plan", f"{_IDS} -> {_PAIRS}, {_BLOCKS}", plan_meaning, sizes=table_sizes)
# The expert of each packed row; E past the last row that a pair has.
expert_of_row = define("expert_of_row", "packed_token_idx: ids[P], expert_offsets: ids[O] -> ids[P]", _owner_meaning)
