"""The grouped products as ops, with their derivatives.

All ops here come from one trilinear form of rows x, expert weights w and rows g, L = sum over the live slots s of
every expert e of <x[s // K] @ w[e], g[s]>. The grouped product is its derivative by g. The transposed product is that
by x, before a token's K choices are added up. The outer product is that by w. So each of the three has the other two as
its transposes.

The matrices w are the operand `rhs`, or they are one layer of a stack. Then the operands `stack` and `layer` say where
their values are. `rhs` may stand beside these: it is the layer's own slice, which no implementation reads. It is there
because the gradient goes to it. So every derivative keeps it as an operand, and second derivatives find it too. Only a
tangent or a cotangent in the place of `rhs` is read: it is an array of its own, and comes without the stack.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core.primitive import Op, define
from ..core.quantized import QuantizedMatrices
from ..core.types import LayerOf, is_quantized
from .epilogue import TABLES, finish_rows, transposed_by, unfinished
from .grouped_meaning import outer_products, products
from .quantized_ops import quantized_product
from .rows import add_choices

Matrices = jax.Array | LayerOf | QuantizedMatrices


def product(
    lhs: jax.Array,
    rhs: Matrices,
    sorted_token_ids: jax.Array,
    block_ids: jax.Array,
    total: jax.Array,
    row_weights: jax.Array | None = None,
    *,
    up: Matrices | None = None,
    transpose_rhs: bool = False,
    top_k: int,
    activation: str | None,
    dtype: str,
    packed_rows: bool,
    precision: str,
    activations: str | None = None,
    implementation: str | None,
) -> jax.Array:
    """`grouped_matmul` of checked arguments.

    up: with an activation, the second half of the matrices, and rhs is the gate alone; None: rhs holds both halves.
    transpose_rhs: rhs is [E, N, H]. Then there is neither an activation nor row_weights.
    packed_rows: each expert's rows stand side by side in lhs.
    """
    tables, lead = (sorted_token_ids, block_ids, total), range(lhs.ndim - 2)
    settings: dict[str, Any] = {
        "top_k": top_k,
        "dtype": dtype,
        "packed_rows": packed_rows,
        "precision": precision,
        "implementation": implementation,
    }
    if is_quantized(rhs):
        settings |= {"up": up, "transpose_rhs": transpose_rhs, "activation": activation, "activations": activations}
        return quantized_product(lhs, rhs, tables, row_weights, **settings)
    matrices, stack, layer = _operands(rhs, lead)
    if activation is None and row_weights is None:
        return (_transposed if transpose_rhs else _matmul).bind(lhs, matrices, *tables, stack, layer, **settings)
    ups = _operands(up, lead)
    operands = lhs, matrices, *tables, row_weights, stack, layer, *ups
    return _activated.bind(*operands, activation=activation, **settings)


def _operands(matrices: Matrices | None, lead: range) -> tuple[Any, Any, Any]:
    """The matrices as operands of an op with these leading axes: rhs, stack and layer."""
    if not isinstance(matrices, LayerOf):
        return matrices, None, None
    arrays = matrices.own, matrices.stack, matrices.layer
    return tuple(None if x is None else jnp.expand_dims(x, tuple(lead)) for x in arrays)  # type: ignore[return-value]


# ---- meanings, for operands with any leading axes. packed_rows is for kernels: the meaning is the same.


def _product_meaning(
    transposed: bool,
    rows: jax.Array,
    rhs: jax.Array | None,
    slots: jax.Array,
    blocks: jax.Array,
    total: jax.Array,
    stack: jax.Array | None,
    layer: jax.Array | None,
    *,
    top_k: int,
    dtype: str,
    packed_rows: bool,
    precision: str,
) -> jax.Array:
    return products(rows, rhs, stack, layer, (slots, blocks, total), top_k, dtype, precision, transposed)


def _activated_meaning(
    lhs: jax.Array,
    rhs: jax.Array | None,
    slots: jax.Array,
    blocks: jax.Array,
    total: jax.Array,
    row_weights: jax.Array | None,
    stack: jax.Array | None,
    layer: jax.Array | None,
    up: jax.Array | None,
    up_stack: jax.Array | None,
    up_layer: jax.Array | None,
    *,
    activation: str | None,
    dtype: str,
    **settings: Any,  # the other parameters of `grouped_matmul`
) -> jax.Array:
    tables, settings = (slots, blocks, total), settings | {"dtype": unfinished(dtype)}
    parts = [_matmul.bind(lhs, rhs, *tables, stack, layer, **settings)]
    if up is not None or up_stack is not None:
        parts.append(_matmul.bind(lhs, up, *tables, up_stack, up_layer, **settings))
    return finish_rows(parts, row_weights, tables, _shape(rhs, stack)[-3], activation, dtype)


def _shape(rhs: Any, stack: Any) -> tuple[int, ...]:
    """The shape [..., E, H, N] of the matrices."""
    return stack.shape[-3:] if rhs is None else rhs.shape


# ---- derivatives of the family. `*tables` are the three tables, and `*rest` these, the stack and the layer.
# `**how` are the parameters that all ops of the family share: packed_rows, precision and implementation.


def _product_tangent(op: Op, primals: Any, tangents: Any, params: Any) -> list[Any]:
    rows, rhs, *tables, stack, layer = primals
    rows_tangent, rhs_tangent, *_, stack_tangent, _ = tangents
    terms = []
    if rows_tangent is not None:
        terms.append(op.bind(rows_tangent, rhs, *tables, stack, layer, **params))
    if rhs_tangent is not None:
        terms.append(op.bind(rows, rhs_tangent, *tables, None, None, **params))
    if stack_tangent is not None and rhs is None:  # beside rhs, the stack is a constant
        terms.append(op.bind(rows, None, *tables, stack_tangent, layer, **params))
    return [functools.reduce(jnp.add, terms) if terms else None]


def _matmul_jvp(primals: Any, results: Any, tangents: Any, **params: Any) -> list[Any]:
    return _product_tangent(_matmul, primals, tangents, params)


def _transposed_jvp(primals: Any, results: Any, tangents: Any, **params: Any) -> list[Any]:
    return _product_tangent(_transposed, primals, tangents, params)


def _to_rows(op: Op, ct: Any, rows: Any, rhs: Any, *rest: Any, top_k: int, **how: Any) -> jax.Array:
    """The cotangent of `rows` by the product that transposes theirs. A row's `top_k` choices are added up."""
    out = op.bind(ct.astype(rows.dtype), rhs, *rest, top_k=1, dtype=rows.dtype.name, **how)
    return add_choices(out, rows.shape[-2], top_k, rows.dtype)


def _into(stack: Any, layer: Any, matrices: jax.Array) -> jax.Array:
    """The stack's cotangent: these matrices in the layer's place, and zeros."""
    layers = lax.broadcasted_iota(jnp.int32, (stack.shape[-4], 1, 1, 1), 0)
    layer = jnp.clip(layer, 0, stack.shape[-4] - 1)
    return jnp.where(jnp.expand_dims(layer, (-4, -3, -2, -1)) == layers, jnp.expand_dims(matrices, -4), 0)


def _matmul_to_lhs(ct: Any, lhs: Any, rhs: Any, *rest: Any, dtype: str, **settings: Any) -> jax.Array:
    return _to_rows(_transposed, ct, lhs, rhs, *rest, **settings)


def _matmul_to_rhs(ct: Any, lhs: Any, rhs: Any, *rest: Any, dtype: str, **settings: Any) -> jax.Array:
    *tables, stack, _ = rest
    return _outer.bind(lhs, ct.astype(lhs.dtype), *tables, num_experts=_shape(rhs, stack)[-3], **settings)


def _matmul_to_stack(ct: Any, lhs: Any, rhs: Any, *rest: Any, **settings: Any) -> jax.Array:
    *_, stack, layer = rest
    return _into(stack, layer, _matmul_to_rhs(ct, lhs, rhs, *rest, **settings))


def _transposed_to_g(ct: Any, g: Any, rhs: Any, *rest: Any, dtype: str, **settings: Any) -> jax.Array:
    return _to_rows(_matmul, ct, g, rhs, *rest, **settings)


def _transposed_to_rhs(ct: Any, g: Any, rhs: Any, *rest: Any, dtype: str, top_k: int, **how: Any) -> jax.Array:
    *tables, stack, _ = rest
    g = g if top_k == 1 else jnp.repeat(g, top_k, axis=-2)
    return _outer.bind(ct.astype(g.dtype), g, *tables, top_k=1, num_experts=_shape(rhs, stack)[-3], **how)


def _transposed_to_stack(ct: Any, g: Any, rhs: Any, *rest: Any, **settings: Any) -> jax.Array:
    *_, stack, layer = rest
    return _into(stack, layer, _transposed_to_rhs(ct, g, rhs, *rest, **settings))


def _outer_to_lhs(ct: Any, lhs: Any, g: Any, *tables: Any, num_experts: int, **settings: Any) -> jax.Array:
    return _to_rows(_transposed, g, lhs, ct, *tables, None, None, **settings)


def _outer_to_g(ct: Any, lhs: Any, g: Any, *tables: Any, num_experts: int, **settings: Any) -> jax.Array:
    return _matmul.bind(lhs, ct, *tables, None, None, dtype=g.dtype.name, **settings)


def _activated_to(operand: str, ct: Any, *operands: Any, **settings: Any) -> jax.Array:
    return transposed_by(_activated, operand, ct, *operands, **settings)


def _product_sizes(sizes: dict[str, int], top_k: int, activation: str | None = None, **others: Any) -> dict[str, int]:
    both = activation and "U" not in sizes  # rhs holds gate and up
    return {"P": sizes["M"] * top_k, "F": sizes["N"] // 2 if both else sizes["N"]}


def _outer_sizes(sizes: dict[str, int], num_experts: int, **others: Any) -> dict[str, int]:
    return {"E": num_experts}


_STACK = "stack?: rows[L,E,H,N], layer?: ids[]"

_matmul = define(
    "grouped_matmul",
    f"lhs: rows[M,H], rhs?: rows[E,H,N], {TABLES}, {_STACK} -> product[P,N]",
    functools.partial(_product_meaning, False),
    independent="N",
    sizes=_product_sizes,
    leading_axes=True,
    jvp=_matmul_jvp,
    transposes={"lhs": _matmul_to_lhs, "rhs": _matmul_to_rhs, "stack": _matmul_to_stack},
)
_activated = define(
    "grouped_matmul_activated",
    f"lhs: rows[M,H], rhs?: rows[E,H,N], {TABLES}, row_weights?: weights[P], {_STACK}, "
    "up?: rows[E,H,U], up_stack?: rows[J,E,H,U], up_layer?: ids[] -> product[P,F]",
    _activated_meaning,
    sizes=_product_sizes,
    leading_axes=True,
    transposes={name: functools.partial(_activated_to, name) for name in ("lhs", "rhs", "row_weights", "stack")},
    made_of_ops=True,
)
_transposed = define(
    "grouped_matmul_transposed",
    f"g: rows[M,N], rhs?: rows[E,H,N], {TABLES}, {_STACK} -> product[P,H]",
    functools.partial(_product_meaning, True),
    independent="H",
    sizes=_product_sizes,
    leading_axes=True,
    jvp=_transposed_jvp,
    transposes={"g": _transposed_to_g, "rhs": _transposed_to_rhs, "stack": _transposed_to_stack},
)
_outer = define(
    "grouped_outer",
    f"lhs: rows[M,H], g: rows[P,N], {TABLES} -> rows[E,H,N]",
    outer_products,
    independent="HN",
    sizes=_outer_sizes,
    leading_axes=True,
    transposes={"lhs": _outer_to_lhs, "g": _outer_to_g},
)
