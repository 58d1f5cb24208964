"""A layer's parameters: how matrices are made, and cut into gate and up."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core.sharding import names_of, placed, spec_of

Initializer = Callable[..., jax.Array]


def matrices(init: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A matrix, or one for each expert. Under vmap, an initialiser sees one expert's matrix and takes its fan-in."""
    if len(shape) == 2:
        return init(key, shape, dtype)
    return jax.vmap(lambda key: init(key, shape[1:], dtype))(jax.random.split(key, shape[0]))


def halves(value: Any, number: int) -> list[Any]:
    """The array, or with the number 2 its halves, gate and up. No arrays for the number 0."""
    width = value.shape[-1] // number if number else 0
    if number > 1 and isinstance(value, jax.Array):  # JAX cannot cut an axis that an Explicit mesh divides
        sharding = jax.typeof(value).sharding
        value = placed(value, sharding.mesh, spec_of((*names_of(sharding.spec)[:-1], ())))
    return [value[..., i * width : (i + 1) * width] for i in range(number)]


def joined(arrays: Sequence[Any]) -> Any:
    """What `halves` cut; None of no arrays."""
    if len(arrays) < 2:
        return arrays[0] if arrays else None
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(joined, arrays)
    return jnp.concatenate(arrays, -1)
