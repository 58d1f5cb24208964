"""Combine: rows to the experts and back. The ops are one family: the transposes of each are other ops of it.

They all come from one trilinear form of rows y, weights w and tokens g, L = sum over the pairs (t, k) of
w[t,k] * <y[pairs[t,k]], g[t]>. Combine is its derivative by g, spread that by y, and row_dot that by w. So each of the
three has the other two as its transposes. With unique rows, one op more (`moe_combine_cotangents`) computes both
cotangents of combine, and reads g and the rows once. Dispatch and collect are spread and combine with unit weights.
`weighted_sum.py` has the same family for rows that stand in pair order.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core.primitive import define
from ..core.settings import as_bool, one_of
from ..core.signature import checked
from ..core.types import MoePlan, TokenPairs
from ..kernels import IMPLEMENTATIONS
from .rows import add_rows, rows_at
from .tables import packed_order


def moe_dispatch(
    x: jax.Array,
    packed_token_idx: jax.Array | TokenPairs | MoePlan,
    *,
    pairs_by_token: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Gather each packed row's token: out[r] = x[packed_token_idx[r]].

    Args:
      x: [..., T, H] float16, bfloat16 or float32.
      packed_token_idx: [..., R] of any integer dtype; an index outside [0, T) gives a zero row. Or the table that holds
        it, whose pairs_by_token is then used too.
      pairs_by_token: [..., T, K] of the same routing, or None. With it the gradient to x gathers each token's K rows,
        and adds them. Without it the rows must be sorted by token first. Sums are in float32, in a fixed order.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      [..., R, H] in x's dtype.

    Raises:
      TypeError: an argument of another dtype, a table of another type.
      ValueError: ranks or shapes that do not fit, a plan of pair ids, a table and `pairs_by_token` too, an unknown
        `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    >>> import jax.numpy as jnp
    >>> moe_dispatch(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0, 2])).tolist()
    [[3.0, 4.0], [1.0, 2.0], [0.0, 0.0]]
    """
    if dataclasses.is_dataclass(packed_token_idx):
        if pairs_by_token is not None:
            raise ValueError("moe_dispatch: pairs_by_token must be None with a table, which holds it")
        table = packed_order("moe_dispatch", packed_token_idx)
        packed_token_idx, pairs_by_token = table.packed_token_idx, table.pairs_by_token
    return dispatch_op(x, packed_token_idx, pairs_by_token, implementation=implementation)


def moe_combine(
    packed_down: jax.Array,
    pairs_by_token: jax.Array | TokenPairs | MoePlan,
    pair_weights: jax.Array,
    *,
    unique_rows: bool | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Add each token's K rows, weighted: out[t] = sum over k of pair_weights[t,k] * packed_down[pairs_by_token[t,k]].

    The sum is in float32, cast once at the end. A pair whose index is outside [0, R) adds nothing, in the result and in
    every gradient. It is left out by selection, not multiplied by 0, so rows that no pair names may hold NaN.

    Args:
      packed_down: [..., R, H] float16, bfloat16 or float32, rows grouped by expert.
      pairs_by_token: [..., T, K] of any integer dtype; or the table that holds it, and then packed_down has its P rows.
      pair_weights: [..., T, K] of any float dtype, used in float32.
      unique_rows: True promises that no row is named twice, as is so in what `moe_build_pairs_by_token` makes. The
        gradient to packed_down is then cheaper, and its values are unspecified if the promise is broken. None: True
        with a table, False with an array.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      [..., T, H] in packed_down's dtype.

    Raises:
      TypeError: an argument of another dtype, a table of another type, `unique_rows` that is no bool.
      ValueError: ranks or shapes that do not fit, a plan of pair ids, a table of another P or K, an unknown
        `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    >>> import jax.numpy as jnp
    >>> rows, pairs = jnp.array([[1.0], [10.0]]), jnp.array([[0, 1], [1, -1]])
    >>> moe_combine(rows, pairs, jnp.array([[0.5, 0.5], [2.0, 9.0]])).tolist()
    [[5.5], [20.0]]
    """
    op, table = "moe_combine", None
    if dataclasses.is_dataclass(pairs_by_token):
        table = packed_order(op, pairs_by_token)
        pairs_by_token = table.pairs_by_token
    unique_rows = as_bool(op, "unique_rows", table is not None if unique_rows is None else unique_rows)
    one_of(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    rows, pairs, weights = checked(op, combine_op.signature, packed_down, pairs_by_token, pair_weights)
    if table is not None and rows.shape[-2] != table.packed_token_idx.shape[-1]:
        raise ValueError(
            f"{op}: packed_down must have the P = {table.packed_token_idx.shape[-1]} rows of the table; "
            f"got shape {rows.shape}"
        )
    return combine_op.bind(rows, pairs, weights, unique_rows=unique_rows, implementation=implementation)


# ---- meanings, for one slice without leading axes


def _dispatch_meaning(x: jax.Array, token: jax.Array, pairs: jax.Array | None = None) -> jax.Array:
    if x.shape[0] == 0:
        return jnp.zeros((token.size, x.shape[1]), x.dtype)
    rows, valid = rows_at(x, token)
    return jnp.where(valid, rows, 0).astype(x.dtype)


def _collect_meaning(
    rows: jax.Array, token: jax.Array, pairs: jax.Array | None = None, *, num_tokens: int
) -> jax.Array:
    if pairs is not None:
        return _combine_meaning(rows, pairs, jnp.ones(pairs.shape, jnp.float32), unique_rows=True)
    return add_rows(rows.astype(jnp.float32), token, num_tokens).astype(rows.dtype)


def _combine_meaning(rows: jax.Array, pairs: jax.Array, weights: jax.Array, *, unique_rows: bool) -> jax.Array:
    if rows.shape[0] == 0:
        return jnp.zeros((pairs.shape[0], rows.shape[1]), rows.dtype)
    taken, valid = rows_at(rows, pairs)
    return jnp.sum(jnp.where(valid, weights[..., None] * taken, 0), axis=1).astype(rows.dtype)


def _spread_meaning(
    g: jax.Array, pairs: jax.Array, weights: jax.Array, *, num_rows: int, unique_rows: bool
) -> jax.Array:
    if pairs.size == 0:
        return jnp.zeros((num_rows, g.shape[1]), g.dtype)
    if not unique_rows:
        terms = weights[..., None] * g[:, None].astype(jnp.float32)
        return add_rows(terms.reshape(pairs.size, -1), pairs.reshape(-1), num_rows).astype(g.dtype)
    pair = jnp.arange(pairs.size, dtype=jnp.int32)
    owner = jnp.full(num_rows, -1, jnp.int32).at[pairs.reshape(-1)].set(pair, mode="drop", wrap_negative_indices=False)
    taken, valid = rows_at(g, jnp.where(owner < 0, -1, owner // pairs.shape[1]))
    weight = weights.reshape(-1).at[owner].get(mode="clip", wrap_negative_indices=False)
    return jnp.where(valid, weight[:, None] * taken, 0).astype(g.dtype)


def _row_dot_meaning(rows: jax.Array, g: jax.Array, pairs: jax.Array, *, unique_rows: bool) -> jax.Array:
    if rows.shape[0] == 0:
        return jnp.zeros(pairs.shape, jnp.float32)
    taken, valid = rows_at(rows, pairs)
    return jnp.sum(jnp.where(valid, taken * g[:, None].astype(jnp.float32), 0), axis=2)


def _cotangents_meaning(
    g: jax.Array, rows: jax.Array, pairs: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    g_rows = _spread_meaning(g, pairs, weights, num_rows=rows.shape[0], unique_rows=True)
    return g_rows, _row_dot_meaning(rows, g, pairs, unique_rows=True)


# ---- transposes and derivatives of the family


def _dispatch_to_x(ct: Any, x: Any, *tables: Any, implementation: str | None) -> jax.Array:
    return _collect.bind(ct, *tables, num_tokens=x.shape[-2], implementation=implementation)


def _collect_to_rows(ct: Any, rows: Any, *tables: Any, num_tokens: int, implementation: str | None) -> jax.Array:
    return dispatch_op.bind(ct, *tables, implementation=implementation)


# `**how` are the parameters that combine, spread and row_dot share: unique_rows and implementation.


def _combine_to_rows(ct: Any, rows: Any, pairs: Any, weights: Any, **how: Any) -> jax.Array:
    return _spread.bind(ct, pairs, weights, num_rows=rows.shape[-2], **how)


def _combine_to_weights(ct: Any, rows: Any, pairs: Any, weights: Any, **how: Any) -> jax.Array:
    return _row_dot.bind(rows, ct, pairs, **how)


def _combine_jvp(primals: Any, results: Any, tangents: Any, **how: Any) -> list[jax.Array]:
    (rows, pairs, weights), (d_rows, _, d_weights) = primals, tangents
    if d_rows is not None and d_weights is not None:
        return [_combine_tangent.bind(rows, pairs, weights, d_rows, d_weights, **how)]
    return [
        combine_op.bind(rows if d_rows is None else d_rows, pairs, weights if d_weights is None else d_weights, **how)
    ]


# The op `moe_combine_tangent` is linear in each of rows, weights, d_rows and d_weights.


def _tangent_meaning(rows: Any, pairs: Any, weights: Any, d_rows: Any, d_weights: Any, **how: Any) -> jax.Array:
    return combine_op.bind(d_rows, pairs, weights, **how) + combine_op.bind(rows, pairs, d_weights, **how)


def _tangent_to_rows(ct: Any, rows: Any, pairs: Any, w: Any, d_rows: Any, d_weights: Any, **how: Any) -> jax.Array:
    return _combine_to_rows(ct, rows, pairs, d_weights, **how)


def _tangent_to_weights(ct: Any, rows: Any, pairs: Any, w: Any, d_rows: Any, d_weights: Any, **how: Any) -> jax.Array:
    return _combine_to_weights(ct, d_rows, pairs, w, **how)


def _tangent_to_d_rows(ct: Any, rows: Any, pairs: Any, weights: Any, *tangents: Any, **how: Any) -> jax.Array:
    return _combine_to_rows(ct, rows, pairs, weights, **how)


def _tangent_to_d_weights(ct: Any, rows: Any, pairs: Any, weights: Any, *tangents: Any, **how: Any) -> jax.Array:
    return _combine_to_weights(ct, rows, pairs, weights, **how)


def _tangent_to_both(
    ct: Any, rows: Any, pairs: Any, weights: Any, *tangents: Any, unique_rows: bool, implementation: str | None
) -> Sequence[jax.Array]:
    if unique_rows:
        return _cotangents.bind(ct, rows, pairs, weights, implementation=implementation)
    how: dict[str, Any] = {"unique_rows": False, "implementation": implementation}
    return _combine_to_rows(ct, rows, pairs, weights, **how), _combine_to_weights(ct, rows, pairs, weights, **how)


def _each(*maps: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
    """A transpose by several operands at once, made of the transposes by each."""

    def transpose(*args: Any, **how: Any) -> list[jax.Array]:
        return [to_one(*args, **how) for to_one in maps]

    return transpose


def _spread_to_g(ct: Any, g: Any, pairs: Any, weights: Any, *, num_rows: int, **how: Any) -> jax.Array:
    return combine_op.bind(ct, pairs, weights, **how)


def _spread_to_weights(ct: Any, g: Any, pairs: Any, weights: Any, *, num_rows: int, **how: Any) -> jax.Array:
    return _row_dot.bind(ct, g, pairs, **how)


def _row_dot_to_rows(ct: Any, rows: Any, g: Any, pairs: Any, **how: Any) -> jax.Array:
    return _spread.bind(g, pairs, ct, num_rows=rows.shape[-2], **how)


def _row_dot_to_g(ct: Any, rows: Any, g: Any, pairs: Any, **how: Any) -> jax.Array:
    return combine_op.bind(rows, pairs, ct, **how)


# The op `moe_combine_cotangents` has two results, combine's cotangents to rows and to weights. `cts` are the cotangents
# of these two. The op is linear in g. It is also linear in rows and in weights, taken together or each alone.


def _cotangents_to_g(cts: Any, g: Any, rows: Any, pairs: Any, weights: Any, *, implementation: str | None) -> jax.Array:
    how: dict[str, Any] = {"unique_rows": True, "implementation": implementation}
    return combine_op.bind(cts[0], pairs, weights, **how) + combine_op.bind(rows, pairs, cts[1], **how)


def _cotangents_to_rows(
    cts: Any, g: Any, rows: Any, pairs: Any, weights: Any, *, implementation: str | None
) -> jax.Array:
    num_rows = rows.shape[-2]
    return _spread.bind(g, pairs, cts[1], num_rows=num_rows, unique_rows=True, implementation=implementation)


def _cotangents_to_weights(
    cts: Any, g: Any, rows: Any, pairs: Any, weights: Any, *, implementation: str | None
) -> jax.Array:
    return _row_dot.bind(cts[0], g, pairs, unique_rows=True, implementation=implementation)


def _cotangents_jvp(primals: Any, results: Any, tangents: Any, *, implementation: str | None) -> list[jax.Array | None]:
    (g, rows, pairs, weights), (d_g, d_rows, _, d_weights) = primals, tangents
    how: dict[str, Any] = {"unique_rows": True, "implementation": implementation}
    to_rows, to_weights = [], []
    if d_g is not None:
        to_rows.append(_spread.bind(d_g, pairs, weights, num_rows=rows.shape[-2], **how))
        to_weights.append(_row_dot.bind(rows, d_g, pairs, **how))
    if d_weights is not None:
        to_rows.append(_spread.bind(g, pairs, d_weights, num_rows=rows.shape[-2], **how))
    if d_rows is not None:
        to_weights.append(_row_dot.bind(d_rows, g, pairs, **how))
    # Start from zeros of the result's full shape: a term may have a leading axis of size 1, which broadcasts.
    return [
        functools.reduce(jnp.add, terms, jnp.zeros_like(result)) if terms else None
        for terms, result in zip((to_rows, to_weights), results, strict=True)
    ]


def _collect_sizes(sizes: dict[str, int], num_tokens: int) -> dict[str, int]:
    return {"T": num_tokens}


def _spread_sizes(sizes: dict[str, int], num_rows: int, unique_rows: bool) -> dict[str, int]:
    return {"R": num_rows}


_TABLES = "packed_token_idx: ids[R], pairs_by_token?: ids[T,K]"
_PAIRS = "pairs_by_token: ids[T,K]"
_WEIGHTED = f"{_PAIRS}, pair_weights: weights[T,K]"

dispatch_op = define(
    "moe_dispatch",
    f"x: rows[T,H], {_TABLES} -> rows[R,H]",
    _dispatch_meaning,
    independent="RH",
    transposes={"x": _dispatch_to_x},
)
_collect = define(
    "moe_collect",
    f"rows: rows[R,H], {_TABLES} -> rows[T,H]",
    _collect_meaning,
    independent="H",
    sizes=_collect_sizes,
    transposes={"rows": _collect_to_rows},
)
combine_op = define(
    "moe_combine",
    f"packed_down: rows[R,H], {_WEIGHTED} -> rows[T,H]",
    _combine_meaning,
    independent="TH",
    transposes={"packed_down": _combine_to_rows, "pair_weights": _combine_to_weights},
    jvp=_combine_jvp,
)
# Combine's derivative by rows and weights at once. JAX transposes one equation at a time. Because the sum of both terms
# is one equation, its transpose can be one op that makes both cotangents and reads the rows once.
_combine_tangent = define(
    "moe_combine_tangent",
    f"packed_down: rows[R,H], {_WEIGHTED}, d_packed_down: rows[R,H], d_pair_weights: weights[T,K] -> rows[T,H]",
    _tangent_meaning,
    independent="TH",
    leading_axes=True,
    transposes={
        "packed_down": _tangent_to_rows,
        "pair_weights": _tangent_to_weights,
        "d_packed_down": _tangent_to_d_rows,
        "d_pair_weights": _tangent_to_d_weights,
        ("d_packed_down", "d_pair_weights"): _tangent_to_both,
        # No term of the sum holds both operands of such a pair, so each has its own cotangent.
        ("packed_down", "pair_weights"): _each(_tangent_to_rows, _tangent_to_weights),
        ("packed_down", "d_packed_down"): _each(_tangent_to_rows, _tangent_to_d_rows),
        ("pair_weights", "d_pair_weights"): _each(_tangent_to_weights, _tangent_to_d_weights),
    },
    made_of_ops=True,
)
_spread = define(
    "moe_spread",
    f"g: rows[T,H], {_WEIGHTED} -> rows[R,H]",
    _spread_meaning,
    independent="H",
    sizes=_spread_sizes,
    transposes={"g": _spread_to_g, "pair_weights": _spread_to_weights},
)
_row_dot = define(
    "moe_row_dot",
    f"packed_down: rows[R,H], g: rows[T,H], {_PAIRS} -> weights[T,K]",
    _row_dot_meaning,
    independent="T",
    transposes={"packed_down": _row_dot_to_rows, "g": _row_dot_to_g},
)
_cotangents = define(
    "moe_combine_cotangents",
    f"g: rows[T,H], packed_down: rows[R,H], {_WEIGHTED} -> rows[R,H], weights[T,K]",
    _cotangents_meaning,
    transposes={
        "g": _cotangents_to_g,
        "packed_down": _cotangents_to_rows,
        "pair_weights": _cotangents_to_weights,
        ("packed_down", "pair_weights"): _each(_cotangents_to_rows, _cotangents_to_weights),
    },
    jvp=_cotangents_jvp,
)
