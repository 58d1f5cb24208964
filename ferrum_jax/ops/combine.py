"""Combine: rows to the experts and back. One family, in which each op is another's transpose.

Everything here is one trilinear form of rows y, weights w and tokens g over the pairs (t, k), L = sum of
w[t,k] * <y[pairs[t,k]], g[t]>. Combine is its derivative by g, spread by y, row_dot by w; so each of the three has
the other two as its transposes; both of combine's at once, of unique rows, are one op more, which passes over g and
the rows once. Weighted sum, slot_scale and slot_dot are the same with rows already in pair order, dispatch and collect
with unit weights.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core.primitive import define
from ..core.signature import as_bool
from .tables import counting_sort


def moe_dispatch(
    x: jax.Array,
    packed_token_idx: jax.Array,
    *,
    pairs_by_token: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Gather each packed row's token: out[r] = x[packed_token_idx[r]].

    Args:
      x: [..., T, H] float16, bfloat16 or float32.
      packed_token_idx: [..., R] of any integer dtype; an index outside [0, T) gives a zero row.
      pairs_by_token: [..., T, K], the table of the same routing, if there is one. The gradient to x is then the sum of
        each token's K rows, one gather; without it rows are added in float32 in a fixed order, which takes a sort.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      [..., R, H] in x's dtype.

    Raises:
      TypeError: an argument of another dtype.
      ValueError: ranks or shapes that do not fit, an unknown `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    >>> import jax.numpy as jnp
    >>> moe_dispatch(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0, 2])).tolist()
    [[3.0, 4.0], [1.0, 2.0], [0.0, 0.0]]
    """
    tables = (packed_token_idx,) if pairs_by_token is None else (packed_token_idx, pairs_by_token)
    return _dispatch(x, *tables, implementation=implementation)


def moe_combine(
    packed_down: jax.Array,
    pairs_by_token: jax.Array,
    pair_weights: jax.Array,
    *,
    unique_rows: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Add each token's K rows, weighted: out[t] = sum over k of pair_weights[t,k] * packed_down[pairs_by_token[t,k]].

    The sum is in float32, cast once at the end. A pair whose index is outside [0, R) is skipped by selection, never by
    multiplying with 0, in the result and in every gradient: rows that nobody names may hold NaN.

    Args:
      packed_down: [..., R, H] float16, bfloat16 or float32, rows grouped by expert.
      pairs_by_token: [..., T, K] of any integer dtype.
      pair_weights: [..., T, K] of any float dtype, used in float32.
      unique_rows: a promise that no row is named twice, true of what `moe_build_pairs_by_token` makes; it makes the
        gradient to packed_down cheaper. If it is false, that gradient's values are unspecified.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      [..., T, H] in packed_down's dtype.

    Raises:
      TypeError: an argument of another dtype, `unique_rows` that is no bool.
      ValueError: ranks or shapes that do not fit, an unknown `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    >>> import jax.numpy as jnp
    >>> rows, pairs = jnp.array([[1.0], [10.0]]), jnp.array([[0, 1], [1, -1]])
    >>> moe_combine(rows, pairs, jnp.array([[0.5, 0.5], [2.0, 9.0]])).tolist()
    [[5.5], [20.0]]
    """
    unique_rows = as_bool("moe_combine", "unique_rows", unique_rows)
    return _combine(packed_down, pair_weights, pairs_by_token, unique_rows=unique_rows, implementation=implementation)


def weighted_sum_batched(slots: jax.Array, weights: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Add each token's K slots, weighted: out[t] = sum over k of weights[t,k] * slots[t,k], in float32, cast once.

    The sum of `moe_combine` for rows that already stand in pair order.

    Args:
      slots: [..., T, K, H] float16, bfloat16 or float32.
      weights: [..., T, K] of any float dtype, used in float32.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      [..., T, H] in slots' dtype.

    Raises:
      TypeError: an argument of another dtype.
      ValueError: ranks or shapes that do not fit, an unknown `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    >>> import jax.numpy as jnp
    >>> weighted_sum_batched(jnp.array([[[1.0], [10.0]]]), jnp.array([[0.5, 0.25]])).tolist()
    [[3.0]]
    """
    return _weighted_sum(slots, weights, implementation=implementation)


# ---- meanings, for one slice without leading axes


def _rows_at(rows: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """rows[index] in float32, and where the index is a row; the other entries of the result are some row.

    XLA would fuse whatever makes the index, and compute it anew for each of a row's elements: up to 30 times slower.
    """
    index = lax.optimization_barrier(index)
    valid = (index >= 0) & (index < rows.shape[0])
    taken = rows.at[index].get(mode="clip", wrap_negative_indices=False)
    return taken.astype(jnp.float32), valid[..., None]


def _dispatch_meaning(x: jax.Array, token: jax.Array, pairs: jax.Array | None = None) -> jax.Array:
    if x.shape[0] == 0:
        return jnp.zeros((token.size, x.shape[1]), x.dtype)
    rows, valid = _rows_at(x, token)
    return jnp.where(valid, rows, 0).astype(x.dtype)


def _collect_meaning(
    rows: jax.Array, token: jax.Array, pairs: jax.Array | None = None, *, num_tokens: int
) -> jax.Array:
    if pairs is not None:
        return _combine_meaning(rows, jnp.ones(pairs.shape, jnp.float32), pairs, unique_rows=True)
    return _add_rows(rows.astype(jnp.float32), token, num_tokens).astype(rows.dtype)


def _combine_meaning(rows: jax.Array, weights: jax.Array, pairs: jax.Array, *, unique_rows: bool) -> jax.Array:
    if rows.shape[0] == 0:
        return jnp.zeros((pairs.shape[0], rows.shape[1]), rows.dtype)
    taken, valid = _rows_at(rows, pairs)
    return jnp.sum(jnp.where(valid, weights[..., None] * taken, 0), axis=1).astype(rows.dtype)


def _spread_meaning(
    g: jax.Array, weights: jax.Array, pairs: jax.Array, *, num_rows: int, unique_rows: bool
) -> jax.Array:
    if pairs.size == 0:
        return jnp.zeros((num_rows, g.shape[1]), g.dtype)
    if not unique_rows:
        terms = weights[..., None] * g[:, None].astype(jnp.float32)
        return _add_rows(terms.reshape(pairs.size, -1), pairs.reshape(-1), num_rows).astype(g.dtype)
    pair = jnp.arange(pairs.size, dtype=jnp.int32)
    owner = jnp.full(num_rows, -1, jnp.int32).at[pairs.reshape(-1)].set(pair, mode="drop", wrap_negative_indices=False)
    taken, valid = _rows_at(g, jnp.where(owner < 0, -1, owner // pairs.shape[1]))
    weight = weights.reshape(-1).at[owner].get(mode="clip", wrap_negative_indices=False)
    return jnp.where(valid, weight[:, None] * taken, 0).astype(g.dtype)


def _row_dot_meaning(rows: jax.Array, g: jax.Array, pairs: jax.Array, *, unique_rows: bool) -> jax.Array:
    if rows.shape[0] == 0:
        return jnp.zeros(pairs.shape, jnp.float32)
    taken, valid = _rows_at(rows, pairs)
    return jnp.sum(jnp.where(valid, taken * g[:, None].astype(jnp.float32), 0), axis=2)


def _cotangents_meaning(
    g: jax.Array, rows: jax.Array, weights: jax.Array, pairs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    g_rows = _spread_meaning(g, weights, pairs, num_rows=rows.shape[0], unique_rows=True)
    return g_rows, _row_dot_meaning(rows, g, pairs, unique_rows=True)


def _add_rows(terms: jax.Array, dest: jax.Array, num_rows: int) -> jax.Array:
    """out[r] = the sum of the terms whose dest is r, in a fixed order: a pairwise tree over each destination's terms.

    Terms a b c d e of one destination, side by side after the sort, become (a+b) . (c+d) . e, then (a+b+c+d) . . . e,
    then their sum in the first place. A scatter-add would leave the order to atomics on a GPU. The tree's depth is the
    logarithm of the most terms that any destination has, found at run time.
    """
    if terms.shape[0] == 0 or num_rows == 0:
        return jnp.zeros((num_rows, *terms.shape[1:]), terms.dtype)
    order, offsets = counting_sort(dest, num_rows)
    counts = jnp.diff(offsets)
    index = jnp.arange(terms.shape[0], dtype=jnp.int32)
    dest = dest[order]  # one that is no row takes the bounds of some row: its sums are in nobody's place
    first = offsets.at[dest].get(mode="clip", wrap_negative_indices=False)
    end = jnp.where(index < offsets[-1], offsets.at[dest + 1].get(mode="clip", wrap_negative_indices=False), 0)

    def add_neighbours(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        step, sums = state
        pair_up = ((index - first) % (2 * step) == 0) & (index + step < end)
        return 2 * step, sums + jnp.where(pair_up[:, None], sums.at[index + step].get(mode="clip"), 0)

    longest = jnp.max(counts)
    _, sums = lax.while_loop(lambda state: state[0] < longest, add_neighbours, (jnp.ones_like(longest), terms[order]))
    return jnp.where(counts[:, None] > 0, sums.at[offsets[:-1]].get(mode="clip"), 0)


# ---- the family: every op with the transposes by which it is differentiated


def _both_cotangents(
    ct: jax.Array, rows: jax.Array, weights: jax.Array, pairs: jax.Array, *, unique_rows: bool, **params: Any
) -> Sequence[jax.Array]:
    if unique_rows:
        return _cotangents(ct, rows, weights, pairs, **params)
    params["unique_rows"] = unique_rows
    return _spread(ct, weights, pairs, num_rows=rows.shape[-2], **params), _row_dot(rows, ct, pairs, **params)


def _cotangent_of_rows(cts: Any, g: jax.Array, rows: Any, weights: Any, pairs: jax.Array, **params: Any) -> jax.Array:
    return _spread(g, cts[1], pairs, num_rows=rows.shape[-2], unique_rows=True, **params)


def _cotangent_of_weights(
    cts: Any, g: jax.Array, rows: Any, weights: Any, pairs: jax.Array, **params: Any
) -> jax.Array:
    return _row_dot(cts[0], g, pairs, unique_rows=True, **params)


def _cotangents_jvp(primals: Any, results: Any, tangents: Any, **params: Any) -> list[jax.Array | None]:
    (g, rows, weights, pairs), (dg, drows, dweights, _) = primals, tangents
    params["unique_rows"] = True
    spread = functools.partial(_spread, num_rows=rows.shape[-2], **params)
    to_rows = [spread(dg, weights, pairs)] if dg is not None else []
    to_rows += [spread(g, dweights, pairs)] if dweights is not None else []
    to_weights = [_row_dot(rows, dg, pairs, **params)] if dg is not None else []
    to_weights += [_row_dot(drows, g, pairs, **params)] if drows is not None else []
    # Beginning with zeros: slices may share what a term is made of, and differ in the result.
    total = lambda terms, result: functools.reduce(jnp.add, terms, jnp.zeros_like(result)) if terms else None  # noqa: E731
    return [total(terms, result) for terms, result in zip((to_rows, to_weights), results, strict=True)]


_TABLES = "packed_token_idx: ids[R], pairs_by_token: ids[T,K]"

_dispatch = define(
    "moe_dispatch",
    f"x: rows[T,H], {_TABLES} -> rows[R,H]",
    _dispatch_meaning,
    independent="R H",
    transposes={0: lambda ct, x, *tables, **params: _collect(ct, *tables, num_tokens=x.shape[-2], **params)},
)
_collect = define(
    "moe_collect",
    f"rows: rows[R,H], {_TABLES} -> rows[T,H]",
    _collect_meaning,
    sizes=lambda size, num_tokens: {"T": num_tokens},
    independent="H",
    transposes={0: lambda ct, rows, *tables, num_tokens, **params: _dispatch(ct, *tables, **params)},
)
_combine = define(
    "moe_combine",
    "packed_down: rows[R,H], pair_weights: weights[T,K], pairs_by_token: ids[T,K] -> rows[T,H]",
    _combine_meaning,
    independent="T H",
    transposes={
        0: lambda ct, rows, weights, pairs, **params: _spread(ct, weights, pairs, num_rows=rows.shape[-2], **params),
        1: lambda ct, rows, weights, pairs, **params: _row_dot(rows, ct, pairs, **params),
    },
    both_cotangents=_both_cotangents,
)
_spread = define(
    "moe_spread",
    "g: rows[T,H], pair_weights: weights[T,K], pairs_by_token: ids[T,K] -> rows[R,H]",
    _spread_meaning,
    sizes=lambda size, num_rows, unique_rows: {"R": num_rows},
    independent="H",
    transposes={
        0: lambda ct, g, weights, pairs, *, num_rows, **params: _combine(ct, weights, pairs, **params),
        1: lambda ct, g, weights, pairs, *, num_rows, **params: _row_dot(ct, g, pairs, **params),
    },
)
_row_dot = define(
    "moe_row_dot",
    "packed_down: rows[R,H], g: rows[T,H], pairs_by_token: ids[T,K] -> weights[T,K]",
    _row_dot_meaning,
    independent="T",
    summed="H",
    transposes={
        0: lambda ct, rows, g, pairs, **params: _spread(g, ct, pairs, num_rows=rows.shape[-2], **params),
        1: lambda ct, rows, g, pairs, **params: _combine(rows, ct, pairs, **params),
    },
)
_cotangents = define(
    "moe_combine_cotangents",
    "g: rows[T,H], packed_down: rows[R,H], pair_weights: weights[T,K], pairs_by_token: ids[T,K]"
    " -> rows[R,H], weights[T,K]",
    _cotangents_meaning,
    summed="H",
    transposes={
        0: lambda cts, g, rows, weights, pairs, **params: jnp.add(
            _combine(cts[0], weights, pairs, unique_rows=True, **params),
            _combine(rows, cts[1], pairs, unique_rows=True, **params),
        ),
        1: _cotangent_of_rows,
        2: _cotangent_of_weights,
        (1, 2): lambda *args, **params: [f(*args, **params) for f in (_cotangent_of_rows, _cotangent_of_weights)],
    },
    jvp=_cotangents_jvp,
)
_weighted_sum = define(
    "weighted_sum_batched",
    "slots: rows[T,K,H], weights: weights[T,K] -> rows[T,H]",
    lambda slots, weights: jnp.sum(weights[..., None] * slots.astype(jnp.float32), axis=1).astype(slots.dtype),
    independent="T H",
    transposes={
        0: lambda ct, slots, weights, **params: _slot_scale(ct, weights, **params),
        1: lambda ct, slots, weights, **params: _slot_dot(slots, ct, **params),
    },
)
_slot_scale = define(
    "slot_scale",
    "g: rows[T,H], weights: weights[T,K] -> rows[T,K,H]",
    lambda g, weights: (weights[..., None] * g[:, None].astype(jnp.float32)).astype(g.dtype),
    independent="T K H",
    transposes={
        0: lambda ct, g, weights, **params: _weighted_sum(ct, weights, **params),
        1: lambda ct, g, weights, **params: _slot_dot(ct, g, **params),
    },
)
_slot_dot = define(
    "slot_dot",
    "slots: rows[T,K,H], g: rows[T,H] -> weights[T,K]",
    lambda slots, g: jnp.sum(slots.astype(jnp.float32) * g[:, None].astype(jnp.float32), axis=2),
    independent="T K",
    summed="H",
    transposes={
        0: lambda ct, slots, g, **params: _slot_scale(g, ct, **params),
        1: lambda ct, slots, g, **params: _weighted_sum(slots, ct, **params),
    },
)
