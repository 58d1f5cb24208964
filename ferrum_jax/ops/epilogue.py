"""What follows a grouped product: the activation of gate and up, and row weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..core.primitive import Op, define
from .activations import ACTIVATIONS
from .grouped_meaning import Tables

TABLES = "sorted_token_ids: ids[S], block_ids: ids[B], total_tokens_post_pad: ids[]"


def unfinished(dtype: str) -> str:
    """The dtype of a product that a bias or an activation turns into rows of `dtype`.

    A float16 layer keeps such products in float32: they may overflow float16 before the activation brings them back
    into its range.
    """
    return "bfloat16" if dtype == "bfloat16" else "float32"


def finish_rows(
    parts: list[jax.Array], row_weights: Any, tables: Tables, num_experts: int, activation: str | None, dtype: str
) -> jax.Array:
    """Rows of a product, or of gate and of up, after the activation and times the row weights."""

    # The gradient keeps the product, and computes the activation's many float32 intermediates again from it.
    @jax.checkpoint
    def finish(parts: list[jax.Array], weights: jax.Array | None) -> jax.Array:
        parts = [part.astype(jnp.float32) for part in parts]
        if activation:
            rows = ACTIVATIONS[activation](*(parts if len(parts) == 2 else jnp.split(parts[0], 2, axis=-1)))
        else:
            (rows,) = parts
        return (rows if weights is None else rows * jnp.expand_dims(weights, -1)).astype(dtype)

    parts = checkpoint_name(parts, "moe_gate_up") if activation else parts
    if row_weights is not None:
        row_weights = _masked.bind(row_weights, *tables, num_experts=num_experts, implementation=None)
    return finish(parts, row_weights)


def transposed_by(
    op: Op, operand: str, ct: jax.Array, *operands: Any, activation: str | None, **settings: Any
) -> jax.Array:
    """The transpose, by one operand, of an op that is a product and what follows it.

    Only jax.linear_transpose asks for it: a gradient is that of the meaning.
    """
    if activation and operand != "row_weights":
        raise NotImplementedError(f"grouped_matmul: no transpose by {operand}, in which an activation is not linear")
    place = [term.name for term in op.signature.operands].index(operand)

    def of_one(x: jax.Array) -> jax.Array:
        return op.meaning(*operands[:place], x, *operands[place + 1 :], activation=activation, **settings)

    return jax.linear_transpose(of_one, operands[place])(ct)[0]


def _masked_meaning(
    row_weights: jax.Array, slots: jax.Array, blocks: jax.Array, total: jax.Array, *, num_experts: int
) -> jax.Array:
    size = slots.size // max(blocks.size, 1)
    counts = (blocks >= 0) & (blocks < num_experts) & (jnp.arange(blocks.size, dtype=jnp.int32) * size < total)
    slots = jnp.where(jnp.repeat(counts, size) & (slots >= 0), slots, row_weights.size)
    return jnp.where(jnp.zeros(row_weights.size, bool).at[slots].set(True, mode="drop"), row_weights, 0)


def _masked_to_weights(ct: Any, weights: Any, *tables: Any, num_experts: int, implementation: str | None) -> jax.Array:
    return _masked.bind(ct, *tables, num_experts=num_experts, implementation=implementation)


# The row weights, with 0 for rows that no slot names: so such a row is 0 even if its weight is NaN.
_masked = define(
    "grouped_row_weights",
    f"row_weights: weights[P], {TABLES} -> weights[P]",
    _masked_meaning,
    transposes={"row_weights": _masked_to_weights},
)
