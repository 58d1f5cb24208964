"""The grouped products with quantised matrices as ops, with their derivatives.

The product and the transposed product are linear in their rows, and each is the other's transpose. Matrices and scales
are constants. One op takes single matrices and layers of a stack: single matrices are a stack of one layer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..core.primitive import Op, define
from ..core.quantized import FORMATS, QuantizedMatrices
from ..core.types import LayerOf
from .epilogue import TABLES, finish_rows, transposed_by, unfinished
from .grouped_meaning import Tables
from .quantized_meaning import quantized_products
from .rows import add_choices

Matrices = QuantizedMatrices | LayerOf


def quantized_product(
    lhs: jax.Array,
    rhs: Any,
    tables: Tables,
    row_weights: jax.Array | None,
    *,
    up: Any,
    transpose_rhs: bool,
    activation: str | None,
    **settings: Any,
) -> jax.Array:
    """`grouped_ops.product` with quantised matrices. With `transpose_rhs`, rhs is [E, N, H], stored [E, H, N]."""
    read, facts = _operands(rhs, lhs.ndim - 2)
    if activation is None and row_weights is None:
        return (_transposed if transpose_rhs else _matmul).bind(lhs, *tables, *read, **facts, **settings)
    if up is None:
        of_up: tuple[Any, ...] = (None,) * 4
    else:
        of_up, facts_of_up = _operands(up, lhs.ndim - 2)
        # A kernel reads gate and up in one format.
        if facts_of_up != facts or (read[2] is None) != (of_up[2] is None):
            parts = [
                _matmul.bind(lhs, *tables, *a, **f, **settings | {"dtype": unfinished(settings["dtype"])})
                for a, f in ((read, facts), (of_up, facts_of_up))
            ]
            return finish_rows(parts, row_weights, tables, rhs.shape[-3], activation, settings["dtype"])
    return _activated.bind(lhs, *tables, *read, row_weights, *of_up, activation=activation, **facts, **settings)


def _operands(matrices: Matrices, leading: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operands of an op with so many leading axes, a stack of layers and which of them; and its parameters."""
    lead = tuple(range(leading))
    if isinstance(matrices, LayerOf):
        stack: QuantizedMatrices = jax.tree.map(lambda x: jnp.expand_dims(x, lead), matrices.stack)
        layer = jnp.expand_dims(matrices.layer, lead)
    else:
        stack = jax.tree.map(lambda x: jnp.expand_dims(x, -4), matrices)
        layer = jnp.zeros((1,) * leading, jnp.int32)
    facts = {"format": stack.format, "block": stack.block, "parts": stack.parts}
    return (stack.values, stack.scales, stack.zeros, layer), facts


def _meaning(
    transposed: bool,
    rows: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    total: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    layer: jax.Array,
    *,
    format: str,
    packed_rows: bool,  # for kernels: the meaning is the same
    precision: str,  # also: here float32 rows are never rounded
    **settings: Any,
) -> jax.Array:
    stored, each = values.shape[-2], 8 // FORMATS[format].bits
    width = values.shape[-1] * each if transposed else stored
    tables, settings = (slots, blocks, total), settings | {"form": format, "width": width, "transposed": transposed}
    return quantized_products(rows, tables, values, scales, zeros, layer, **settings)


def _activated_meaning(
    lhs: jax.Array,
    slots: jax.Array,
    blocks: jax.Array,
    total: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None,
    layer: jax.Array,
    row_weights: jax.Array | None,
    *of_up: Any,
    activation: str | None,
    dtype: str,
    **settings: Any,
) -> jax.Array:
    tables, settings = (slots, blocks, total), settings | {"dtype": unfinished(dtype)}
    matrices = [(values, scales, zeros, layer), of_up][: 1 if of_up[0] is None else 2]
    parts = [_matmul.bind(lhs, *tables, *read, **settings) for read in matrices]
    return finish_rows(parts, row_weights, tables, values.shape[-3], activation, dtype)


def _jvp(name: str, primals: Any, results: Any, tangents: Any, *, activations: str | None, **params: Any) -> list[Any]:
    """The tangent passes by the rounding of rows as if they were not rounded: straight through."""
    if tangents[0] is None:
        return [None]
    return [_OPS[name].bind(tangents[0], *primals[1:], activations=None, **params)]


def _to_rows(
    by: str, ct: Any, rows: Any, *rest: Any, top_k: int, dtype: str, activations: str | None, **how: Any
) -> jax.Array:
    """The cotangent of the rows, by the op that transposes theirs."""
    assert activations is None  # tangents are not rounded
    out = _OPS[by].bind(ct.astype(rows.dtype), *rest, top_k=1, dtype=rows.dtype.name, activations=None, **how)
    return add_choices(out, rows.shape[-2], top_k, rows.dtype)


def _activated_to(operand: str, ct: Any, *operands: Any, **settings: Any) -> jax.Array:
    return transposed_by(_activated, operand, ct, *operands, **settings)


def _sizes(
    sizes: dict[str, int], top_k: int, format: str, activation: str | None = None, **others: Any
) -> dict[str, int]:
    both = activation and "J" not in sizes  # one array holds gate and up
    width = sizes["N"] // 2 if both else sizes["N"]
    return {"P": sizes["M"] * top_k, "H": sizes["W"] * (8 // FORMATS[format].bits), "F": width}


_STORED = (
    f"{TABLES.replace('[B]', '[I]')}, "
    "values: bytes[L,E,N,W], scales: scales[L,E,B,C], zeros?: bytes[L,E,B,C], layer: ids[]"
)

_matmul = define(
    "quantized_matmul",
    f"lhs: rows[M,K], {_STORED} -> product[P,N]",
    functools.partial(_meaning, False),
    sizes=_sizes,
    leading_axes=True,
    jvp=functools.partial(_jvp, "lhs"),
    transposes={"lhs": functools.partial(_to_rows, "g")},
)
_transposed = define(
    "quantized_matmul_transposed",
    f"g: rows[M,N], {_STORED} -> product[P,H]",
    functools.partial(_meaning, True),
    sizes=_sizes,
    leading_axes=True,
    jvp=functools.partial(_jvp, "g"),
    transposes={"g": functools.partial(_to_rows, "lhs")},
)
_activated = define(
    "quantized_matmul_activated",
    f"lhs: rows[M,K], {_STORED}, row_weights?: weights[P], up_values?: bytes[J,E,N,W], up_scales?: scales[J,E,B,C], "
    "up_zeros?: bytes[J,E,B,C], up_layer?: ids[] -> product[P,F]",
    _activated_meaning,
    sizes=_sizes,
    leading_axes=True,
    transposes={name: functools.partial(_activated_to, name) for name in ("lhs", "row_weights")},
    made_of_ops=True,
)
# By the name of their rows.
_OPS: dict[str, Op] = {"lhs": _matmul, "g": _transposed}
