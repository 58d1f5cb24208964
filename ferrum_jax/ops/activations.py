"""The activations of gated MLPs, each a function of (gate, up), with the meaning that every implementation follows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

SWIGLU_LIMIT = 7  # of "swiglu_oai"


def _swiglu_oai(gate: jax.Array, up: jax.Array) -> jax.Array:
    gate, up = jnp.minimum(gate, SWIGLU_LIMIT), jnp.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


ACTIVATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu": lambda gate, up: jax.nn.gelu(gate, approximate=False) * up,
    "gelu_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "relu": lambda gate, up: jax.nn.relu(gate) * up,
    "relu2": lambda gate, up: jnp.square(jax.nn.relu(gate)) * up,
    "swiglu_oai": _swiglu_oai,
}
