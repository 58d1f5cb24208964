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
from .grouped_meaning import Tables
from .quantized_meaning import quantized_products
from .rows import add_choices


def quantized_product(
    lhs: jax.Array,
    rhs: QuantizedMatrices | LayerOf,
    tables: Tables,
    *,
    transpose_rhs: bool,
    activations: str | None,
    **settings: Any,
) -> jax.Array:
    """`grouped_ops.product` with quantised matrices, without an activation or row weights.

    With `transpose_rhs`, rhs is [E, N, H], stored [E, H, N].
    """
    if isinstance(rhs, LayerOf):
        matrices: QuantizedMatrices = jax.tree.map(lambda x: jnp.expand_dims(x, tuple(range(lhs.ndim - 2))), rhs.stack)
        layer = jnp.expand_dims(rhs.layer, tuple(range(lhs.ndim - 2)))
    else:
        matrices = jax.tree.map(lambda x: jnp.expand_dims(x, -4), rhs)
        layer = jnp.zeros((1,) * (lhs.ndim - 2), jnp.int32)
    op = _transposed if transpose_rhs else _matmul
    return op.bind(
        lhs,
        *tables,
        matrices.values,
        matrices.scales,
        matrices.zeros,
        layer,
        format=matrices.format,
        block=matrices.block,
        parts=matrices.parts,
        activations=activations,
        **settings,
    )


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


def _sizes(sizes: dict[str, int], top_k: int, format: str, **others: Any) -> dict[str, int]:
    return {"P": sizes["M"] * top_k, "H": sizes["W"] * (8 // FORMATS[format].bits)}


_STORED = (
    "sorted_token_ids: ids[S], block_ids: ids[I], total_tokens_post_pad: ids[], "
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
# By the name of their rows.
_OPS: dict[str, Op] = {"lhs": _matmul, "g": _transposed}
