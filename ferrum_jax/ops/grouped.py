"""`grouped_matmul`: one matrix product per expert, fed by the tables."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core.settings import INT32_MAX, ROW_DTYPES, as_int, one_of
from ..core.signature import checked, parse
from ..core.types import PACKED, LayerOf, MoePlan, MoeRouting
from ..kernels import IMPLEMENTATIONS
from .activations import ACTIVATIONS
from .grouped_ops import TABLES, Matrices, product
from .tables import rows_per_row

# JAX's names of precisions, and what they mean here. `jax.default_matmul_precision` also takes names of algorithms,
# which count as "highest".
PRECISIONS = {
    **dict.fromkeys(("default", "fastest", "bfloat16", "tensorfloat32"), "default"),
    **dict.fromkeys(("high", "bfloat16_3x", "highest", "float32"), "highest"),
}


def grouped_matmul(
    lhs: jax.Array,
    rhs: Matrices,
    routing: MoeRouting | MoePlan,
    *,
    top_k: int | None = None,
    activation: str | None = None,
    row_weights: jax.Array | None = None,
    preferred_element_type: Any = None,
    precision: str | lax.Precision | None = None,
    activations: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiply each row by its expert's matrix: out[s] = lhs[s // top_k] @ rhs[e] for the slots s of expert e's blocks.

    With tables of packed rows, lhs and the result are rows grouped by expert. With tables of pair ids, the result is
    P = T * K rows in pair order. lhs is then the T tokens themselves, which are read without a gathered copy, or P rows
    in pair order, as in the second product of a layer.

    The work is that of the table's live slots, never E times it. Products are added in float32. Rows that no slot names
    and matrices of experts without rows are never read, in the result and in every gradient, so they may hold NaN. The
    gradient of such a matrix is 0.

    Args:
      lhs: [..., M, H] float16, bfloat16 or float32.
      rhs: [..., E, H, N] of lhs's dtype. A leading axis of size 1 is shared by the batch, not copied. Or a `LayerOf` of
        [E, H, N], which serves the whole batch. Or `QuantizedMatrices` of this shape, or a `LayerOf` of them; lhs then
        has any of the three dtypes, and no gradient goes to the matrices. An entry is used as float32; a
        kernel may round it once to lhs's dtype. All entries are never floats at once.
      routing: of either kind, [...]; its block size is S / number of blocks. Its kind, E, K and P are checked against
        lhs, rhs and `top_k`, as far as it knows them. A block counts if it starts before `total_tokens_post_pad` and
        its expert is in [0, E). A slot in such a block counts if it is in [0, P). All others are passed over, wherever
        they stand and whatever they hold. Experts must not descend from one block that counts to the next, and no two
        slots that count may name one row. Tables of this library are so; with others that are not, values are
        unspecified.
      top_k: rows of the result per row of lhs, >= 1. None: as the routing says. That is 1 with packed rows, and where
        the routing does not know its kind; with pair ids it is K if lhs has T rows, and 1 if lhs has P. Give it where
        a MoeRouting of pair ids fits both T and P rows, which happens if there are few; a MoePlan can always tell.
      activation: turns the product's halves, gate and up, into one row of half the width: "silu", "gelu" (exact),
        "gelu_tanh", "relu", "relu2" (squared), each times up; "swiglu_oai", that of gpt-oss: (up + 1) * gate *
        sigmoid(1.702 * gate), gate clamped above at 7 and up to [-7, 7]. It is computed in float32. A kernel that fuses
        it never writes the product to memory. Under differentiation the product is written, and kept for the gradient.
      row_weights: [..., P], any float; row s of the result is multiplied by row_weights[s], in float32.
      preferred_element_type: the result's dtype, float16, bfloat16 or float32; default: lhs's. A cotangent is cast to
        lhs's dtype.
      precision: of float32 operands, in this product and its gradients. "highest" and "high": full float32.
        "tensorfloat32" and "default": operands may be rounded: to TF32, with 10 bits of mantissa, on NVIDIA GPUs that
        have it; elsewhere as XLA does by default. JAX's other names and `jax.lax.Precision` are taken for one of these
        two. None: what `jax.default_matmul_precision` says around the call, and full float32 if that is not set or
        names an algorithm. Operands of 16 bits are never rounded, and float32 rows never beside quantised matrices.
      activations: "float8_e4m3fn": rows are rounded to fp8 before they are multiplied by `QuantizedMatrices` of "fp8".
        Each 128 entries of a row have a float32 scale, their largest magnitude / 448, or 1 for zeros. Numbers are
        rounded to nearest, ties to even; NaN stays. The gradient is that of rows that are not rounded. None: no.
      implementation: None (see `which`), "xla", "triton" or "pallas".

    Returns:
      [..., P, N] with P = M * top_k; with an `activation`, [..., P, N / 2]. Rows that no slot names are 0.

    Raises:
      TypeError: an argument of another dtype, a `routing` that is no table, a `top_k` that is no int.
      ValueError: ranks or shapes that do not fit, a routing of another kind, E, K or P, `top_k` < 1, P past int32, an
        odd N with an `activation`, an unknown `activation`, `precision`, `activations` or `implementation`,
        `activations` without "fp8" matrices, `QuantizedMatrices` whose fields do not fit together.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    Blocks of one expert as units of work are from MegaBlocks, https://arxiv.org/abs/2211.15841; gathering rows inside
    the product from ScatterMoE, https://arxiv.org/abs/2403.08245.

    >>> import jax.numpy as jnp, ferrum_jax
    >>> routing = ferrum_jax.moe_align_block_size_pair_ids(jnp.array([[1, 0], [1, 2]]), 3, 2)
    >>> x, w = jnp.array([[1.0], [10.0]]), jnp.array([[[1.0]], [[2.0]], [[3.0]]])
    >>> grouped_matmul(x, w, routing).tolist()
    [[2.0], [1.0], [20.0], [30.0]]
    """
    op = "grouped_matmul"
    if not isinstance(activation, str | None):
        raise TypeError(f"{op}: activation must be a name; got {type(activation).__name__}")
    one_of(op, "activation", activation, (None, *ACTIVATIONS))
    one_of(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    if not isinstance(routing, MoeRouting | MoePlan):
        raise TypeError(f"{op}: routing must be a MoeRouting or a MoePlan; got {type(routing).__name__}")
    tables = routing.sorted_token_ids, routing.block_ids, routing.total_tokens_post_pad
    lhs, rhs, slots, blocks, total, row_weights = checked(op, _ARGUMENTS, lhs, rhs, *tables, row_weights)
    top_k = _checked_routing(op, routing, lhs, rhs, top_k)
    if activation and rhs.shape[-1] % 2:
        raise ValueError(f"{op}: rhs must be gate and up side by side, an even N; got shape {rhs.shape}")
    if row_weights is not None and row_weights.shape[-1] != lhs.shape[-2] * top_k:
        raise ValueError(
            f"{op}: row_weights must have P = {lhs.shape[-2] * top_k} entries, one a row of the result; "
            f"got shape {row_weights.shape}"
        )
    return product(
        lhs,
        rhs,
        slots,
        blocks,
        total,
        row_weights,
        top_k=top_k,
        activation=activation,
        dtype=as_dtype(op, preferred_element_type, lhs.dtype),
        packed_rows=routing.kind == PACKED,
        precision=as_precision(op, precision, lhs.dtype),
        activations=as_activations(op, activations, rhs),
        implementation=implementation,
    )


def _checked_routing(op: str, routing: MoeRouting | MoePlan, lhs: jax.Array, rhs: Any, top_k: Any) -> int:
    """Check that the routing fits these rows and matrices; return the rows of the result per row of lhs."""
    slots, blocks = jnp.shape(routing.sorted_token_ids)[-1], jnp.shape(routing.block_ids)[-1]
    if slots % blocks if blocks else slots:
        raise ValueError(
            f"{op}: routing must have a whole number of slots in each block; got {slots} slots in {blocks} blocks"
        )
    if routing.block_size is not None and slots != blocks * routing.block_size:
        raise ValueError(
            f"{op}: routing must have {routing.block_size} slots in each of its {blocks} blocks; got {slots} in all"
        )
    if routing.num_experts is not None and routing.num_experts != rhs.shape[-3]:
        raise ValueError(f"{op}: rhs must have the {routing.num_experts} experts of routing; got shape {rhs.shape}")
    if top_k is not None:
        top_k = as_int(op, "top_k", top_k)
        if isinstance(lhs.shape[-2], int) and lhs.shape[-2] * top_k > INT32_MAX:
            raise ValueError(f"{op}: lhs has {lhs.shape[-2]} rows and top_k is {top_k}; int32 ids allow {INT32_MAX}")
    return rows_per_row(op, routing, lhs.shape[-2], top_k)


def as_dtype(op: str, preferred: Any, default: Any) -> str:
    try:
        dtype = jnp.dtype(default if preferred is None else preferred)
    except TypeError as error:
        raise TypeError(f"{op}: preferred_element_type must be a dtype: {error}") from error
    if dtype.name not in ROW_DTYPES:
        raise TypeError(f"{op}: preferred_element_type must be float16, bfloat16 or float32; got {dtype}")
    return dtype.name


def as_precision(op: str, precision: Any, dtype: Any) -> str:
    """The ops' parameter `precision`: "default" if operands are float32 and may be rounded, else "highest"."""
    name = precision.name.lower() if isinstance(precision, lax.Precision) else precision
    if name is not None:
        one_of(op, "precision", name, (None, *PRECISIONS))
    if dtype != jnp.float32:
        return "highest"
    return PRECISIONS.get(jax.config.jax_default_matmul_precision if name is None else name, "highest")


def as_activations(op: str, activations: Any, *matrices: Any) -> str | None:
    """The ops' parameter `activations`, checked: only products with fp8 matrices round their rows."""
    one_of(op, "activations", activations, (None, "float8_e4m3fn"))
    formats = [getattr(m.stack if isinstance(m, LayerOf) else m, "format", None) for m in matrices]
    if activations and any([form != "fp8" for form in formats]):
        raise ValueError(f"{op}: activations={activations!r} needs QuantizedMatrices of format 'fp8'; got {formats}")
    return activations


_ARGUMENTS = parse(f"lhs: rows[M,H], rhs: matrices[E,H,N], {TABLES}, row_weights?: weights[P]")
