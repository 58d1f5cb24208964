"""A checker of the tables: each of their invariants written down once, for host arrays and under jit.

The rules are written for one slice, without leading axes, and for `xp`: NumPy, or jax.numpy where values are traced.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..core.settings import INT32_MAX, as_bool, as_int
from ..core.types import PAIR_IDS, MoePlan, MoeRouting, TokenPairs

_OP = "check_routing"
_PAIRS = ("pairs_by_token", "packed_token_idx", "expert_offsets")
_BLOCKS = ("sorted_token_ids", "block_ids", "total_tokens_post_pad")

# An invariant: the name of the table, a mask that is True where the table is right, words for what an entry must be,
# and the entries themselves, in the mask's shape.
Rule = tuple[str, Any, str, Any]


def check_routing(
    tables: TokenPairs | MoeRouting | MoePlan,
    num_experts: int | None = None,
    *,
    block_size: int | None = None,
    num_pairs: int | None = None,
    pair_ids: bool | None = None,
    expert_ids: Any = None,
) -> list[str]:
    """Say what is wrong with tables, made here or elsewhere; nothing if they could be this library's own.

    - TokenPairs: offsets start at 0, ascend and end at most at P; every packed row before their end is named by one
      pair, and names that pair's token; the rows after it name no token; an expert's pairs ascend.
    - MoeRouting: the total is a multiple of the block size; live blocks have owners, ascending, and the blocks after
      have none; an expert's padding comes after its pairs, in its last block, and none of its blocks is empty; packed
      rows count up, or pair ids ascend inside an expert and come once; padding and tail hold P.
    - MoePlan: all of these; and every packed row stands in a block of its expert.
    - With `expert_ids`: these ids make these tables.

    On host arrays and device arrays, outside every function that JAX traces, the checks run in NumPy. On traced values
    the same checks are `jax.experimental.checkify.check`s: transform the function with `checkify.checkify`, jit that,
    and `err.throw()` says the first thing wrong. Without checkify, JAX raises its error "not functionalized".

    Args:
      tables: TokenPairs, MoeRouting or MoePlan, of any integer dtype, with any leading axes.
      num_experts: E, >= 1; None: what the tables say, and it must be given where they do not know it.
      block_size: slots in a block, for the blocks of MoeRouting and MoePlan; None: as many as the tables or, where they
        do not know it, the shapes say.
      num_pairs: P, needed for MoeRouting without `expert_ids`; elsewhere the shapes say it.
      pair_ids: live slots hold pair ids (`moe_align_block_size_pair_ids`), not packed rows (`moe_align_block_size`);
        None: what the tables say, and packed rows where they do not know it.
      expert_ids: [..., T, K] of any integer dtype: what the tables were made from, if that is to be checked too.

    Returns:
      A sentence for each invariant that does not hold, naming the first entry where; empty: all is right, or the values
      are traced.

    Raises:
      TypeError: tables of another type, entries that are no integers, a size that is no int, `pair_ids` no bool.
      ValueError: shapes that do not fit each other or the sizes, a size out of range or missing, an argument that
        says otherwise than the tables.

    >>> import jax.numpy as jnp, ferrum_jax
    >>> plan = ferrum_jax.moe_plan(jnp.array([[1, 0], [1, 2]]), 3, 2)
    >>> check_routing(plan)
    []
    >>> routing = ferrum_jax.upload_moe_routing([0, 4, 1, 2, 3, 4], [0, 2, 1], 6)
    >>> check_routing(routing, 3, num_pairs=4)
    ['block_ids[2] must be at least the owner of the block before; got 1']
    """
    if not isinstance(tables, TokenPairs | MoeRouting | MoePlan):
        raise TypeError(f"{_OP}: tables must be TokenPairs, MoeRouting or MoePlan; got {type(tables).__name__}")
    num_experts, block_size, pair_ids = _facts(tables, num_experts, block_size, pair_ids)
    pairs_too, blocks_too = not isinstance(tables, MoeRouting), not isinstance(tables, TokenPairs)
    fields = (*(_PAIRS if pairs_too else ()), *(_BLOCKS if blocks_too else ()))
    named: dict[str, Any] = {name: getattr(tables, name) for name in fields}
    if expert_ids is not None:
        named["expert_ids"] = expert_ids
    traced = any(isinstance(x, Tracer) for x in named.values())
    xp: Any = jnp if traced else np
    arrays = {name: _as_int32(xp, name, x) for name, x in named.items()}
    lead, sizes = _lead_and_sizes(arrays, num_experts, block_size, num_pairs)
    if 0 in lead:
        return []
    wrong = []
    for rule in _of_all_slices(traced, lead, arrays, functools.partial(_rules, xp, pair_ids=pair_ids, **sizes)):
        ok = rule[1]
        if ok.size == 0:
            continue
        if traced:
            from jax.experimental import checkify

            sentence, values = first_wrong(xp, rule)
            checkify.check(jnp.all(ok), sentence, *values)
        elif not ok.all():
            sentence, values = first_wrong(xp, rule)
            wrong.append(sentence.format(*values))
    return wrong


def _facts(
    tables: TokenPairs | MoeRouting | MoePlan, num_experts: Any, block_size: Any, pair_ids: Any
) -> tuple[int, int | None, bool]:
    """What the caller says of the tables, and what they say themselves, if these agree."""
    if num_experts is not None:
        num_experts = as_int(_OP, "num_experts", num_experts, most=INT32_MAX - 1)
    if block_size is not None:
        block_size = as_int(_OP, "block_size", block_size)
    if pair_ids is not None:
        pair_ids = as_bool(_OP, "pair_ids", pair_ids)
    kind = getattr(tables, "kind", None)
    known = {
        "num_experts": (num_experts, tables.num_experts),
        "block_size": (block_size, getattr(tables, "block_size", None)),
        "pair_ids": (pair_ids, None if kind is None else kind == PAIR_IDS),
    }
    for name, (said, fact) in known.items():
        if None not in (said, fact) and said != fact:
            raise ValueError(f"{_OP}: {name} must be {fact}, which these tables are of; got {said}")
    num_experts, block_size, pair_ids = [fact if said is None else said for said, fact in known.values()]
    if num_experts is None:
        raise ValueError(f"{_OP}: num_experts must be given for tables that do not know it")
    return num_experts, block_size, bool(pair_ids)


def _of_all_slices(
    traced: bool, lead: tuple[int, ...], arrays: dict[str, Any], rules: Callable[..., Iterator[Rule]]
) -> list[Rule]:
    """The rules of every slice, stacked along the leading axes: made one by one in NumPy, by vmap in JAX."""
    words: list[tuple[str, str]] = []

    def of_slice(arrays: dict[str, Any]) -> list[tuple[Any, Any]]:
        found = list(rules(arrays))
        words[:] = [(name, must) for name, _, must, _ in found]
        return [(ok, got) for _, ok, _, got in found]

    if traced:
        for _ in lead:
            of_slice = jax.vmap(of_slice)
        masks = of_slice(arrays)
    else:
        with np.errstate(over="ignore"):  # wrong tables may overflow, and one of the rules reports that
            each = [of_slice({name: x[index] for name, x in arrays.items()}) for index in np.ndindex(lead)]
        masks = [
            tuple(np.reshape(parts, (*lead, *np.shape(parts[0]))) for parts in zip(*rule, strict=True))
            for rule in zip(*each, strict=True)
        ]
    return [(name, ok, must, got) for (name, must), (ok, got) in zip(words, masks, strict=True)]


def first_wrong(xp: Any, rule: Rule) -> tuple[str, tuple[Any, ...]]:
    """A sentence about the first entry that breaks a rule, and the values that belong into its braces."""
    name, ok, must, got = rule
    first = xp.argmin(ok.reshape(-1))
    entry = f"{name}[{', '.join(['{}'] * ok.ndim)}]" if ok.ndim else name
    return f"{entry} must be {must}; got {{}}", (*xp.unravel_index(first, ok.shape), got.reshape(-1)[first])


def as_integers(op: str, name: str, values: Any, *, host: bool = False) -> Any:
    """An array of integers of any width: JAX's or NumPy's, or NumPy's alone with `host`."""
    try:
        array = values if isinstance(values, jax.Array) and not host else np.asarray(values)
    except (TypeError, ValueError, OverflowError) as error:
        kind = "a host array" if host else "an array"
        raise TypeError(f"{op}: {name} must be {kind}; got {type(values).__name__}: {error}") from error
    if array.size == 0 and not hasattr(values, "dtype"):
        array = array.astype(np.int32)  # NumPy makes float64 of an empty list
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{op}: {name} must hold integers; got {array.dtype}")
    return array


def _as_int32(xp: Any, name: str, values: Any) -> Any:
    """int32. A value that int32 cannot hold becomes the nearest one that it can, which no table may hold."""
    array = as_integers(_OP, name, values)
    if array.dtype.itemsize >= 4 and array.dtype != np.int32:
        least = 0 if jnp.issubdtype(array.dtype, jnp.unsignedinteger) else -(2**31)
        # A NumPy array is clipped in NumPy, because JAX would cut 64 bits down to 32 first.
        array = (jnp if isinstance(array, jax.Array) else np).clip(array, least, INT32_MAX)
    return xp.asarray(array.astype(np.int32))


def _lead_and_sizes(
    arrays: dict[str, Any], num_experts: int, block_size: int | None, num_pairs: int | None
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The leading axes of the tables, and the sizes of one slice; or the ValueError that says what does not fit."""
    ranks = {"pairs_by_token": 2, "expert_ids": 2, "total_tokens_post_pad": 0}
    leads = {}
    for name, x in arrays.items():
        rank = ranks.get(name, 1)
        if x.ndim < rank:
            raise ValueError(f"{_OP}: {name} must have at least {rank} axes; got shape {x.shape}")
        leads[name] = x.shape[: x.ndim - rank]
    lead = next(iter(leads.values()))
    for name, own in leads.items():
        if own != lead:
            raise ValueError(f"{_OP}: {name} must have the leading axes {lead}; got shape {arrays[name].shape}")
    own = {name: x.shape[len(lead) :] for name, x in arrays.items()}
    pairs = [(name, own[name]) for name in ("pairs_by_token", "expert_ids") if name in own]
    sizes = {"num_experts": num_experts}
    if num_pairs is not None:
        sizes["num_pairs"] = as_int(_OP, "num_pairs", num_pairs, 0)
    elif not pairs:
        raise ValueError(f"{_OP}: num_pairs must be given for MoeRouting without expert_ids")
    for name, shape in pairs:
        if shape != pairs[0][1] or sizes.setdefault("num_pairs", shape[0] * shape[1]) != shape[0] * shape[1]:
            what = f"shape {pairs[0][1]}" if shape != pairs[0][1] else f"num_pairs = {num_pairs} entries"
            raise ValueError(f"{_OP}: {name} must have {what} after the leading axes {lead}; got {shape}")
    lengths = {"packed_token_idx": sizes["num_pairs"], "expert_offsets": num_experts + 1}
    for name, length in lengths.items():
        if own.get(name, (length,)) != (length,):
            raise ValueError(f"{_OP}: {name} must have {length} entries; got {own[name][0]}")
    if "block_ids" in own:
        (slots,), (blocks,) = own["sorted_token_ids"], own["block_ids"]
        size = slots // max(blocks, 1) if block_size is None else as_int(_OP, "block_size", block_size)
        sizes["block_size"] = size = max(size, 1)
        if slots != blocks * size:
            raise ValueError(
                f"{_OP}: sorted_token_ids must have {size} slots for each of the {blocks} block_ids; got {slots}"
            )
    elif block_size is not None:
        raise ValueError(f"{_OP}: block_size must be None for TokenPairs, which have no blocks; got {block_size}")
    return lead, sizes


# ---- the invariants, of one slice


def _rules(
    xp: Any, tables: dict[str, Any], *, num_experts: int, num_pairs: int, block_size: int = 1, pair_ids: bool
) -> Iterator[Rule]:
    ids = offsets = owner_of_pair = None
    if "expert_ids" in tables:
        ids = tables["expert_ids"].reshape(-1)
        ids = xp.where((ids >= 0) & (ids < num_experts), ids, num_experts)
        edges = xp.arange(num_experts + 1, dtype=np.int32)
        offsets, owner_of_pair = xp.searchsorted(xp.sort(ids), edges), ids
    if "pairs_by_token" in tables:
        pairs_by_token, packed_token_idx, offsets = (tables[name] for name in _PAIRS)
        yield from _pairs_rules(xp, pairs_by_token, packed_token_idx, offsets, ids)
        rows = pairs_by_token.reshape(-1)
        owner_of_pair = xp.where(rows < 0, num_experts, xp.searchsorted(offsets, rows, side="right") - 1)
    if "block_ids" in tables:
        slots, blocks, total = (tables[name] for name in _BLOCKS)
        value = "pair id" if pair_ids else "packed row"
        yield from entry_rules(xp, slots, blocks, total, num_experts, num_pairs, block_size, value)
        yield from _order_rules(xp, slots, blocks, total, num_pairs, block_size, value)
        if offsets is not None:
            owner = owner_of_pair if pair_ids else None
            yield from _content_rules(xp, offsets, owner, slots, blocks, total, num_pairs, block_size)


def _pairs_rules(xp: Any, pairs_by_token: Any, packed_token_idx: Any, expert_offsets: Any, ids: Any) -> Iterator[Rule]:
    (num_tokens, top_k), num_pairs, offsets = pairs_by_token.shape, packed_token_idx.size, expert_offsets
    before = xp.concatenate([xp.zeros(1, np.int32), offsets[:-1]])
    edge = xp.arange(offsets.size, dtype=np.int32)
    yield "expert_offsets", (edge > 0) | (offsets == 0), "0 at the first expert", offsets
    yield "expert_offsets", offsets >= before, "at least the offset before", offsets
    yield "expert_offsets", offsets <= num_pairs, f"at most the number of pairs, {num_pairs}", offsets
    if num_pairs == 0:
        return

    end, row = offsets[-1], xp.arange(num_pairs, dtype=np.int32)
    rows, pair = pairs_by_token.reshape(-1), xp.arange(num_pairs, dtype=np.int32)
    live = (rows >= 0) & (rows < end)
    ok = (live | (rows == -1)).reshape(pairs_by_token.shape)
    yield "pairs_by_token", ok, "-1, or a packed row before the last of expert_offsets", pairs_by_token
    order = xp.argsort(xp.where(live, rows, num_pairs), stable=True)  # pairs in the order of their rows
    named = xp.where(live, rows, num_pairs)[order]
    times = xp.searchsorted(named, row, side="right") - xp.searchsorted(named, row, side="left")
    yield "packed row ", (row >= end) | (times == 1), "named by one entry of pairs_by_token", times
    inside = xp.clip(rows, 0, num_pairs - 1)
    token = packed_token_idx[inside]
    ok = (~live | (token == pair // top_k)).reshape(pairs_by_token.shape)
    yield "pairs_by_token", ok, "the packed row that packed_token_idx gives to this token", pairs_by_token
    must = f"{num_tokens}, no token, from the last of expert_offsets on"
    yield "packed_token_idx", (row < end) | (packed_token_idx == num_tokens), must, packed_token_idx
    expert = xp.searchsorted(offsets, row, side="right")
    same = xp.concatenate([xp.zeros(1, bool), (expert[1:] == expert[:-1]) & (row[1:] < end)])
    ok = ~same | (order >= xp.concatenate([order[:1], order[:-1]]))
    yield "packed row ", ok, "that of a pair after the one before, of the same expert", order
    if ids is not None:
        first, last = offsets[ids], offsets[xp.clip(ids + 1, 0, offsets.size - 1)]
        ok = xp.where(ids == offsets.size - 1, rows == -1, (rows >= first) & (rows < last))
        must = "a packed row of this pair's expert in expert_ids, or -1 if that has none"
        yield "pairs_by_token", ok.reshape(pairs_by_token.shape), must, pairs_by_token


def entry_rules(
    xp: Any,
    slots: Any,
    blocks: Any,
    total: Any,
    num_experts: int | None,
    num_pairs: int | None,
    block_size: int,
    value: str,
) -> Iterator[Rule]:
    """Blocks by themselves: what each entry must be, whatever the order of blocks and slots.

    A number that is None is unknown: its bound is then that of int32, and nothing is known about padding.
    """
    ok = (total >= 0) & (total <= slots.size) & (total % block_size == 0)
    must = f"a multiple of the block size {block_size}, from 0 to the {slots.size} slots"
    yield "total_tokens_post_pad", ok, must, total
    if slots.size == 0:
        return

    busy = xp.arange(blocks.size, dtype=np.int32) * block_size < total
    ok = ~busy | ((blocks >= 0) & (blocks < (INT32_MAX if num_experts is None else num_experts)))
    expert = f"in [0, {INT32_MAX})" if num_experts is None else f"an expert of {num_experts}"
    yield "block_ids", ok, f"{expert} in a block before the total", blocks
    yield "block_ids", busy | (blocks == -1), "-1 in a block past the total", blocks

    most = INT32_MAX if num_pairs is None else num_pairs
    must = f"a {value} in [0, {most}]" if num_pairs is None else f"a {value}, or {most} for padding"
    yield "sorted_token_ids", (slots >= 0) & (slots <= most), must, slots
    if num_pairs is not None:
        ok = (xp.arange(slots.size, dtype=np.int32) < total) | (slots == num_pairs)
        yield "sorted_token_ids", ok, f"{num_pairs}, no pair, past the total", slots


def distinct_rule(xp: Any, slots: Any, num_pairs: int, value: str) -> Rule:
    order = xp.argsort(slots, stable=True)
    ascending = slots[order]
    again = xp.concatenate([xp.zeros(1, bool), ascending[1:] == ascending[:-1]]) & (ascending != num_pairs)
    ok = ~again[xp.argsort(order, stable=True)]
    return "sorted_token_ids", ok, f"a {value} that no slot before holds", slots


def _order_rules(
    xp: Any, slots: Any, blocks: Any, total: Any, num_pairs: int, block_size: int, value: str
) -> Iterator[Rule]:
    """Blocks by themselves: the order of the experts, and of the slots of one expert."""
    if slots.size == 0:
        return
    busy = xp.arange(blocks.size, dtype=np.int32) * block_size < total
    ok = ~busy | (blocks >= xp.concatenate([blocks[:1], blocks[:-1]]))
    yield "block_ids", ok, "at least the owner of the block before", blocks

    slot, padding = xp.arange(slots.size, dtype=np.int32), slots == num_pairs
    before = slot < total
    ok = ~before | (slot % block_size > 0) | ~padding
    yield "sorted_token_ids", ok, f"a {value} at the start of a block", slots
    owner = xp.repeat(blocks, block_size)
    same = before & xp.concatenate([xp.zeros(1, bool), owner[1:] == owner[:-1]])
    last = xp.concatenate([slots[:1], slots[:-1]])
    ok = ~same | padding | (last != num_pairs)
    yield "sorted_token_ids", ok, f"{num_pairs} where the slot before, of the same expert, is padding", slots
    if value == "pair id":
        ok = ~same | padding | (slots > last)
        yield "sorted_token_ids", ok, "a pair id above that of the slot before, of the same expert", slots
        yield distinct_rule(xp, slots, num_pairs, value)
    else:
        place = xp.cumsum((before & ~padding).astype(np.int32), dtype=np.int32) - 1
        yield "sorted_token_ids", ~before | padding | (slots == place), "the next packed row", slots


def _content_rules(
    xp: Any,
    offsets: Any,
    owner_of_pair: Any,
    slots: Any,
    blocks: Any,
    total: Any,
    num_pairs: int,
    block_size: int,
) -> Iterator[Rule]:
    """Blocks against offsets: every pair of an expert stands in one of that expert's blocks."""
    counts = offsets[1:] - offsets[:-1]
    want = xp.sum(-(-counts // block_size), dtype=np.int32) * block_size
    must = "the sum of every expert's pairs, rounded up to the block size"
    yield "total_tokens_post_pad", total == want, must, total
    if slots.size == 0 or num_pairs == 0:
        return
    live = (slots >= 0) & (slots < num_pairs)
    inside = xp.clip(slots, 0, num_pairs - 1)
    if owner_of_pair is None:
        owner = xp.searchsorted(offsets, inside, side="right") - 1
        must = "a packed row of the expert that owns this block"
    else:
        owner, must = owner_of_pair[inside], "a pair of the expert that owns this block"
    yield "sorted_token_ids", ~live | (owner == xp.repeat(blocks, block_size)), must, slots
    held = xp.sum(live, dtype=np.int32)
    yield "sorted_token_ids together", held == offsets[-1], "as many pairs as have an expert", held
