"""Grouped products: one matrix product per expert, fed by the tables.

Everything here is one trilinear form of rows x, expert weights w and rows g over the live slots, L = sum over slots s
of expert e of <x[s // K] @ w[e], g[s]>. The grouped product is its derivative by g, the transposed one by x (before
the sum over a token's K choices), the outer one by w; so each of the three has the other two as its transposes.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core.primitive import define, equally_varying
from ..core.signature import INT32_MAX, ROW_DTYPES, as_bool, as_int, canonical, one_of
from ..kernels import IMPLEMENTATIONS, lead_axes
from .tables import MoePlan, MoeRouting


def _swiglu_oai(gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = jnp.minimum(gate, 7), jnp.clip(up, -7, 7)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


ACTIVATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "relu": lambda gate, up: jax.nn.relu(gate) * up,
    "relu2": lambda gate, up: jnp.square(jax.nn.relu(gate)) * up,
    "swiglu_oai": _swiglu_oai,
}

# JAX's names of precisions; `jax.default_matmul_precision` also takes names of algorithms, which count as "highest".
PRECISIONS = {
    **dict.fromkeys(("default", "fastest", "bfloat16", "tensorfloat32"), "default"),
    **dict.fromkeys(("high", "bfloat16_3x", "highest", "float32"), "highest"),
}


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    routing: MoeRouting | MoePlan,
    *,
    top_k: int = 1,
    activation: str | None = None,
    row_weights: jax.Array | None = None,
    packed_rows: bool = False,
    preferred_element_type: Any = None,
    precision: str | lax.Precision | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply each row by its expert's matrix: out[s] = lhs[s // top_k] @ rhs[e] for the slots s of expert e's blocks.

    Packed tables and top_k=1 take rows grouped by expert to rows grouped by expert. Tables of pair ids and top_k=K read
    the tokens themselves, without a gathered copy, and give rows in pair order. The work is that of the table's live
    slots, never E times it. Products are added in float32. What no slot names is not read, in the result and in every
    gradient: such rows, and matrices of experts without rows, may hold NaN; the latter's gradient is 0.

    Args:
      lhs: [..., M, H] float16, bfloat16 or float32.
      rhs: [..., E, H, N] of lhs's dtype. A leading axis of size 1 is shared by the batch, not copied.
      routing: of either kind, [...]; block_size is S / number of blocks. A block counts if it starts before
        `total_tokens_post_pad` and its expert is in [0, E); a slot in it counts if it is in [0, P). What does not count
        is passed over, wherever it stands and whatever it holds. From one block that counts to the next the expert is
        the same or a higher one, and no two slots that count name one row: so are the tables of this library. Of
        others the values are unspecified.
      top_k: rows of the result per row of lhs, >= 1.
      activation: makes the product's halves, gate and up, one row of half the width: "silu", "gelu" (exact),
        "gelu_tanh", "relu", "relu2" (squared), each times up; "swiglu_oai", that of gpt-oss: (up + 1) * gate *
        sigmoid(1.702 * gate), gate clamped above at 7 and up to [-7, 7]. In float32; a kernel that fuses it spares the
        product's way to memory and back. Where it is differentiated, the product is made, and kept for the gradient.
      row_weights: [..., P], any float; row s of the result is multiplied by row_weights[s], in float32.
      packed_rows: promises that each expert's rows lie together, as in tables of packed rows and top_k=1. Changes no
        result; None may then take a kernel that is the fastest for such rows and slow for others.
      preferred_element_type: the result's dtype, float16, bfloat16 or float32; default: lhs's. A cotangent is cast to
        lhs's dtype.
      precision: of float32 operands, in this product and its gradients. "highest" and "high": full float32.
        "tensorfloat32" and "default": operands may be rounded, on NVIDIA GPUs that have it to TF32 with its 10 bits of
        mantissa, on others as XLA does by default. JAX's other names and `jax.lax.Precision` mean the same. None: what
        `jax.default_matmul_precision` says around the call; float32 if that is not set, or names an algorithm. Operands
        of 16 bits are never rounded.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      [..., P, N] with P = M * top_k; with an `activation`, [..., P, N / 2]. Rows that no slot names are 0.

    Raises:
      TypeError: an argument of another dtype, a `routing` that is no table, a `top_k` that is no int,
        `packed_rows` no bool.
      ValueError: ranks or shapes that do not fit, `top_k` < 1, P past int32, an odd N with an `activation`, an unknown
        `activation`, `precision` or `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    Blocks of one expert as units of work are from MegaBlocks, https://arxiv.org/abs/2211.15841; gathering rows inside
    the product from ScatterMoE, https://arxiv.org/abs/2403.08245.

    >>> import jax.numpy as jnp, ferrum_jax
    >>> routing = ferrum_jax.moe_align_block_size_pair_ids(jnp.array([[1, 0], [1, 2]]), 3, 2)
    >>> x, w = jnp.array([[1.0], [10.0]]), jnp.array([[[1.0]], [[2.0]], [[3.0]]])
    >>> grouped_matmul(x, w, routing, top_k=2).tolist()
    [[2.0], [1.0], [20.0], [30.0]]
    """
    op = "grouped_matmul"
    if not isinstance(routing, MoeRouting | MoePlan):
        raise TypeError(f"{op}: routing must be a MoeRouting or a MoePlan; got {type(routing).__name__}")
    tables = routing.sorted_token_ids, routing.block_ids, routing.total_tokens_post_pad
    slots, blocks = (jnp.shape(t)[-1:] for t in tables[:2])
    if slots and blocks and (slots[0] % blocks[0] if blocks[0] else slots[0]):
        raise ValueError(
            f"{op}: routing must have a whole number of slots in each block; got {slots[0]} slots in {blocks[0]} blocks"
        )
    top_k = as_int(op, "top_k", top_k)
    rows = jnp.shape(lhs)[-2] if jnp.ndim(lhs) > 1 else 0
    if isinstance(rows, int) and rows * top_k > INT32_MAX:
        raise ValueError(f"{op}: lhs has {rows} rows and top_k is {top_k}; int32 ids allow {INT32_MAX}")
    packed_rows = as_bool(op, "packed_rows", packed_rows)
    if not isinstance(activation, str | None):
        raise TypeError(f"{op}: activation must be a name; got {type(activation).__name__}")
    one_of(op, "activation", activation, (None, *ACTIVATIONS))
    one_of(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    weights = () if row_weights is None else (row_weights,)
    lhs, rhs, *rest = canonical(op, _activated.signature, (lhs, rhs, *tables, *weights))
    settings: dict[str, Any] = {
        "top_k": top_k,
        "dtype": _dtype(op, preferred_element_type, lhs.dtype),
        "packed_rows": packed_rows and top_k == 1,
        "precision": as_precision(op, precision, lhs.dtype),
        "implementation": implementation,
    }
    if activation is None and row_weights is None:
        return _matmul(lhs, rhs, *rest, **settings)
    if activation and rhs.shape[-1] % 2:
        raise ValueError(f"{op}: rhs must be gate and up side by side, an even N; got shape {rhs.shape}")
    if row_weights is not None and rest[-1].shape[-1] != lhs.shape[-2] * top_k:
        raise ValueError(
            f"{op}: row_weights must have P = {lhs.shape[-2] * top_k} entries, one a row of the result; "
            f"got shape {rest[-1].shape}"
        )
    return _activated(lhs, rhs, *rest, activation=activation, **settings)


def _dtype(op: str, preferred: Any, default: Any) -> str:
    try:
        dtype = jnp.dtype(default if preferred is None else preferred)
    except TypeError as error:
        raise TypeError(f"{op}: preferred_element_type must be a dtype: {error}") from error
    if dtype.name not in ROW_DTYPES:
        raise TypeError(f"{op}: preferred_element_type must be float16, bfloat16 or float32; got {dtype}")
    return dtype.name


def as_precision(op: str, precision: Any, dtype: Any) -> str:
    """The parameter of all products: "default" where float32 operands may be rounded to TF32, else "highest"."""
    name = precision.name.lower() if isinstance(precision, lax.Precision) else precision
    one_of(op, "precision", name, (None, *PRECISIONS))
    if dtype != jnp.float32:
        return "highest"
    return PRECISIONS.get(jax.config.jax_default_matmul_precision if name is None else name, "highest")


def unfinished(dtype: str) -> str:
    """The dtype of a product before its bias and its activation, where these give rows of `dtype`.

    Keep float16 products in float32: they may overflow float16 before the activation brings them back into its range.
    """
    return "bfloat16" if dtype == "bfloat16" else "float32"


# ---- meanings, over any leading axes: a batch of products is one product with more blocks


def _matmul_meaning(
    lhs: jax.Array,
    rhs: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    total: jax.Array,
    *,
    top_k: int,
    dtype: str,
    packed_rows: bool,
    precision: str,
) -> jax.Array:
    return _products(lhs, rhs, (slots, blocks, total), top_k, dtype, precision, False)


def _transposed_meaning(
    g: jax.Array,
    rhs: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    total: jax.Array,
    *,
    dtype: str,
    packed_rows: bool,
    precision: str,
) -> jax.Array:
    return _products(g, rhs, (slots, blocks, total), 1, dtype, precision, True)


def _activated_meaning(
    lhs: jax.Array,
    rhs: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    total: jax.Array,
    row_weights: jax.Array | None = None,
    *,
    activation: str | None,
    dtype: str,
    implementation: str | None,
    **settings: Any,
) -> jax.Array:
    # Kept for the gradient: the product. Computed again from it: the activation's many float32 intermediates.
    @jax.checkpoint
    def finish(rows: jax.Array, weights: jax.Array | None) -> jax.Array:
        rows = rows.astype(jnp.float32)
        if activation:
            rows = ACTIVATIONS[activation](*jnp.split(rows, 2, axis=-1))
        return (rows if weights is None else rows * jnp.expand_dims(weights, -1)).astype(dtype)

    rows = _matmul(lhs, rhs, slots, blocks, total, dtype=unfinished(dtype), implementation=implementation, **settings)
    if row_weights is not None:
        row_weights = _masked(row_weights, slots, blocks, total, num_experts=rhs.shape[-3])
    return finish(rows, row_weights)


def _masked_meaning(
    row_weights: jax.Array, slots: jax.Array, blocks: jax.Array, total: jax.Array, *, num_experts: int
) -> jax.Array:
    size = slots.size // max(blocks.size, 1)
    counts = (blocks >= 0) & (blocks < num_experts) & (jnp.arange(blocks.size, dtype=jnp.int32) * size < total)
    slots = jnp.where(jnp.repeat(counts, size) & (slots >= 0), slots, row_weights.size)
    return jnp.where(jnp.zeros(row_weights.size, bool).at[slots].set(True, mode="drop"), row_weights, 0)


def _products(
    lhs: jax.Array,
    rhs: jax.Array,
    tables: tuple[jax.Array, ...],
    top_k: int,
    dtype: str,
    precision: str,
    transposed: bool,
) -> jax.Array:
    lead, (num_rows, _) = lead_axes((lhs, 2), (rhs, 3), *_with_ranks(tables)), lhs.shape[-2:]
    num_pairs, width = num_rows * top_k, rhs.shape[-2 if transposed else -1]
    if 0 in (num_pairs, *tables[0].shape, *rhs.shape):
        return jnp.zeros((*lead, num_pairs, width), dtype)
    lhs, rhs = _flat(lhs, lead), _flat(rhs, lead)
    count, live = _live_blocks(tables, lead, rhs.shape[1])
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        slice_id, expert, slot = live(i)
        zero = jnp.zeros_like(expert)
        matrix = lax.dynamic_slice(rhs, (_of(rhs, slice_id), expert, zero, zero), (1, 1, *rhs.shape[2:]))[0, 0]
        rows = _rows(lhs, slice_id, slot, top_k, num_pairs)
        rows = lax.dot_general(rows, matrix, contract, precision, preferred_element_type="float32")
        row = jnp.where((slot >= 0) & (slot < num_pairs), slot, num_pairs)
        return out.at[slice_id, row].set(rows.astype(dtype), mode="drop")

    out, _ = equally_varying([jnp.zeros((_size(lead), num_pairs, width), dtype), lhs])
    return lax.fori_loop(0, count, step, out).reshape(*lead, num_pairs, width)


def _outer_meaning(
    lhs: jax.Array,
    g: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    total: jax.Array,
    *,
    top_k: int,
    num_experts: int,
    packed_rows: bool,
    precision: str,
) -> jax.Array:
    tables = slots, blocks, total
    lead, num_pairs = lead_axes((lhs, 2), (g, 2), *_with_ranks(tables)), g.shape[-2]
    shape = num_experts, lhs.shape[-1], g.shape[-1]
    if 0 in (num_pairs, *slots.shape, *shape):
        return jnp.zeros((*lead, *shape), lhs.dtype)
    lhs, g = _flat(lhs, lead), _flat(g, lead)
    count, live = _live_blocks(tables, lead, num_experts)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        slice_id, expert, slot = live(i)
        rows, columns = (_rows(x, slice_id, slot, k, num_pairs) for x, k in ((lhs, top_k), (g, 1)))
        term = lax.dot_general(rows, columns, (((0,), (0,)), ((), ())), precision, preferred_element_type="float32")
        return out.at[slice_id, expert].add(term, mode="promise_in_bounds")

    out, _ = equally_varying([jnp.zeros((_size(lead), *shape), jnp.float32), lhs])
    return lax.fori_loop(0, count, step, out).astype(lhs.dtype).reshape(*lead, *shape)


def _with_ranks(tables: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, int], ...]:
    return tuple(zip(tables, (1, 1, 0), strict=True))


def _size(lead: tuple[int, ...]) -> int:
    return functools.reduce(operator.mul, lead, 1)  # sizes may be symbolic: math.prod takes ints


def _flat(x: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """One leading axis: that of all slices, or of size 1 where the whole batch shares x, which is then not copied."""
    own, trailing = x.shape[: len(lead)], x.shape[len(lead) :]
    if _size(own) == 1:
        return x.reshape(1, *trailing)
    return jnp.broadcast_to(x, (*lead, *trailing)).reshape(_size(lead), *trailing)


def _of(x: jax.Array, slice_id: jax.Array) -> jax.Array:
    return jnp.zeros_like(slice_id) if x.shape[0] == 1 else slice_id


def _live_blocks(tables: tuple[jax.Array, ...], lead: tuple[int, ...], num_experts: int) -> tuple[jax.Array, Any]:
    """How many blocks count, in all slices together, and a function from i to the i-th: its slice, expert and slots."""
    slots, blocks, total = (jnp.broadcast_to(t, (*lead, *t.shape[len(lead) :])) for t in tables)
    per_slice = blocks.shape[-1]
    block_size = slots.shape[-1] // max(per_slice, 1)
    starts = jnp.arange(per_slice, dtype=jnp.int32) * block_size
    before = lax.broadcast_in_dim(starts, blocks.shape, (blocks.ndim - 1,)) < total[..., None]
    counts = ((blocks >= 0) & (blocks < num_experts) & before).reshape(-1)
    # Not flatnonzero: in a module for several platforms XLA's CPU compiler aborts on it (jaxlib 0.11.2).
    order = jnp.argsort(~counts, stable=True).astype(jnp.int32)
    blocks, slots = blocks.reshape(-1), slots.reshape(blocks.size, block_size)

    def live(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        block = order[i]
        return block // per_slice, blocks[block], slots[block]

    return jnp.sum(counts, dtype=jnp.int32), live


def _rows(x: jax.Array, slice_id: jax.Array, slot: jax.Array, top_k: int, num_pairs: int) -> jax.Array:
    """A block's rows of x; zero rows at its padding, by selection."""
    named = (slot >= 0) & (slot < num_pairs)
    rows = x.at[_of(x, slice_id), jnp.where(named, slot // top_k, 0)].get(mode="promise_in_bounds")
    return jnp.where(named[:, None], rows, 0)


# ---- the family: every op with the transposes by which it is differentiated


def _lhs_cotangent(ct: jax.Array, lhs: Any, rhs: jax.Array, *tables: jax.Array, top_k: int, **params: Any) -> jax.Array:
    rows = _transposed(ct.astype(lhs.dtype), rhs, *tables, dtype=lhs.dtype.name, **params)
    if top_k == 1:
        return rows
    choices = rows.reshape(*rows.shape[:-2], lhs.shape[-2], top_k, rows.shape[-1])
    return jnp.sum(choices, axis=-2, dtype=jnp.float32).astype(lhs.dtype)


def _activated_cotangent(operand: int) -> Callable[..., jax.Array]:
    """For jax.linear_transpose alone: a gradient is that of the meaning."""

    def transpose(ct: jax.Array, *operands: Any, activation: str | None, **params: Any) -> jax.Array:
        if activation and operand < 2:
            name = _activated.signature.operands[operand].name
            raise NotImplementedError(f"grouped_matmul: no transpose by {name}, in which an activation is not linear")

        def of_one(x: jax.Array) -> jax.Array:
            given = [*operands]
            given[operand] = x
            return _activated_meaning(*given, activation=activation, **params)

        return jax.linear_transpose(of_one, operands[operand])(ct)[0]

    return transpose


_TABLES = "sorted_token_ids: ids[S], block_ids: ids[B], total_tokens_post_pad: ids[]"

_matmul = define(
    "grouped_matmul",
    f"lhs: rows[M,H], rhs: rows[E,H,N], {_TABLES} -> product[P,N]",
    _matmul_meaning,
    sizes=lambda size, top_k, **params: {"P": size["M"] * top_k},
    leading_axes=True,
    independent="N",
    summed="H",
    transposes={
        0: lambda ct, lhs, rhs, *tables, dtype, **params: _lhs_cotangent(ct, lhs, rhs, *tables, **params),
        1: lambda ct, lhs, rhs, *tables, dtype, **params: _outer(
            lhs, ct.astype(rhs.dtype), *tables, num_experts=rhs.shape[-3], **params
        ),
    },
)
_activated = define(
    "grouped_matmul_activated",
    f"lhs: rows[M,H], rhs: rows[E,H,N], {_TABLES}, row_weights: weights[P] -> product[P,F]",
    _activated_meaning,
    sizes=lambda size, top_k, activation, **params: {
        "P": size["M"] * top_k,
        "F": size["N"] // 2 if activation else size["N"],
    },
    leading_axes=True,
    transposes={operand: _activated_cotangent(operand) for operand in (0, 1, 5)},
    made_of_ops=True,
)
# A row that no slot names is 0, whatever its weight.
_masked = define(
    "grouped_row_weights",
    f"row_weights: weights[P], {_TABLES} -> weights[P]",
    _masked_meaning,
    transposes={0: lambda ct, row_weights, *tables, **params: _masked(ct, *tables, **params)},
)
_transposed = define(
    "grouped_matmul_transposed",
    f"g: rows[P,N], rhs: rows[E,H,N], {_TABLES} -> product[P,H]",
    _transposed_meaning,
    leading_axes=True,
    independent="H",
    summed="N",
    transposes={
        0: lambda ct, g, rhs, *tables, dtype, **params: _matmul(
            ct.astype(rhs.dtype), rhs, *tables, top_k=1, dtype=g.dtype.name, **params
        ),
        1: lambda ct, g, rhs, *tables, dtype, **params: _outer(
            ct.astype(g.dtype), g, *tables, top_k=1, num_experts=rhs.shape[-3], **params
        ),
    },
)
_outer = define(
    "grouped_outer",
    f"lhs: rows[M,H], g: rows[P,N], {_TABLES} -> rows[E,H,N]",
    _outer_meaning,
    sizes=lambda size, num_experts, **params: {"E": num_experts},
    leading_axes=True,
    independent="H N",
    transposes={
        0: lambda ct, lhs, g, *tables, num_experts, **params: _lhs_cotangent(g, lhs, ct, *tables, **params),
        1: lambda ct, lhs, g, *tables, num_experts, **params: _matmul(lhs, ct, *tables, dtype=g.dtype.name, **params),
    },
)
