"""A layer's parameters: how matrices are made, and cut into gate and up."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..core.quantized import QuantizedMatrices
from ..core.sharding import names_of, placed, spec_of

Initializer = Callable[..., jax.Array]


def matrices(init: Initializer, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A matrix, or one for each expert. Under vmap, an initialiser sees one expert's matrix and takes its fan-in."""
    if len(shape) == 2:
        return init(key, shape, dtype)
    return jax.vmap(lambda key: init(key, shape[1:], dtype))(jax.random.split(key, shape[0]))


def halves(value: Any, number: int) -> list[Any]:
    """The array, or with the number 2 its halves, gate and up. No arrays for the number 0."""
    if isinstance(value, QuantizedMatrices):
        return [value] if number == 1 else [_quantized_half(value, i) for i in range(number)]
    width = value.shape[-1] // number if number else 0
    if number > 1 and isinstance(value, jax.Array):  # JAX cannot cut an axis that an Explicit mesh divides
        sharding = jax.typeof(value).sharding
        value = placed(value, sharding.mesh, spec_of((*names_of(sharding.spec)[:-1], ())))
    return [value[..., i * width : (i + 1) * width] for i in range(number)]


def _quantized_half(w: QuantizedMatrices, number: int) -> QuantizedMatrices:
    """Gate (0) or up (1), which begin a block each."""
    width, block = w.shape[-1] // 2, w.block[0]

    def half(x: Any) -> Any:
        rows = x.shape[-2] // 2
        if isinstance(x, jax.Array):  # JAX cannot cut an axis that an Explicit mesh divides
            sharding = jax.typeof(x).sharding
            names = names_of(sharding.spec)
            x = placed(x, sharding.mesh, spec_of((*names[:-2], (), *names[-1:])))
        return x[..., number * rows : (number + 1) * rows, :]

    if w.parts == 1 and block is None:  # one scale for both
        return dataclasses.replace(w, values=half(w.values))
    if w.parts % 2 and width % (block or 1):
        raise ValueError(f"MoE: gate and up share blocks of {block} columns; make them with parts=2")
    return dataclasses.replace(jax.tree.map(half, w), parts=max(w.parts // 2, 1))


def joined(arrays: Sequence[Any]) -> Any:
    """What `halves` cut; None of no arrays."""
    if len(arrays) < 2:
        return arrays[0] if arrays else None
    if isinstance(arrays[0], QuantizedMatrices):
        together = jax.tree.map(lambda *parts: jnp.concatenate(parts, -2), *arrays)
        return dataclasses.replace(together, parts=sum(array.parts for array in arrays))
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(joined, arrays)
    return jnp.concatenate(arrays, -1)
