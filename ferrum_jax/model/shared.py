"""The gated MLP that every token goes through, beside its experts."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core.quantized import QuantizedMatrices
from ..core.sharding import by_compiler


def shared_mlp(x: jax.Array, matrices: Sequence[Any], activation: Callable[..., Any], precision: Any) -> jax.Array:
    """The float32 output for the tokens x[..., H].

    matrices: gate and up, [H, 2S]; down, [S, H]; and perhaps [H, 1], whose product's sigmoid multiplies the output.
      Quantised ones are rounded to x's dtype as they are used.
    """

    def mlp(x: jax.Array, *matrices: Any) -> jax.Array:
        w_gate_up, w_down, *shared_gate = [
            w.dequantize(x.dtype) if isinstance(w, QuantizedMatrices) else w for w in matrices
        ]
        gate, up = jnp.split(product(x, w_gate_up, precision), 2, axis=-1)
        out = product(activation(gate, up).astype(x.dtype), w_down, precision)
        for w_gate in shared_gate:
            out *= jax.nn.sigmoid(product(x, w_gate, precision))
        return out

    return by_compiler(mlp)(x, *matrices)


def product(x: jax.Array, matrix: jax.Array, precision: Any = None) -> jax.Array:
    """Summed in float32."""
    return jnp.matmul(x, matrix, precision=precision, preferred_element_type=jnp.float32)
