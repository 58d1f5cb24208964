"""The gated MLP that every token goes through, beside its experts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core.sharding import by_compiler


def shared_mlp(
    x: jax.Array, matrices: Sequence[jax.Array], activation: Callable[..., Any], precision: Any
) -> jax.Array:
    """The float32 output for the tokens x[..., H].

    matrices: gate and up, [H, 2S]; down, [S, H]; and perhaps [H, 1], whose product's sigmoid multiplies the output.
    """

    def mlp(x: jax.Array, w_gate_up: jax.Array, w_down: jax.Array, *shared_gate: jax.Array) -> jax.Array:
        gate, up = jnp.split(product(x, w_gate_up, precision), 2, axis=-1)
        out = product(activation(gate, up).astype(x.dtype), w_down, precision)
        for w_gate in shared_gate:
            out *= jax.nn.sigmoid(product(x, w_gate, precision))
        return out

    return by_compiler(mlp)(x, *matrices)


def product(x: jax.Array, matrix: jax.Array, precision: Any = None) -> jax.Array:
    """Summed in float32."""
    return jnp.matmul(x, matrix, precision=precision, preferred_element_type=jnp.float32)
