"""Leading axes of operands: they broadcast from size 1, and large operands are not copied for it."""

import math
from typing import Any

import jax
import jax.numpy as jnp

FP8_MAX = 448  # the largest number of float8_e4m3fn
ACTIVATION_BLOCK = 128  # the entries of a row that share a scale, where rows are rounded to fp8


def lead_axes(*operands: tuple[Any, int]) -> tuple[int, ...]:
    """The broadcast leading axes of operands, each given with its number of trailing axes; None has no axes."""
    leads = (x.shape[: x.ndim - trailing] for x, trailing in operands if x is not None)
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*leads, strict=True))


def whole(x: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """`x` broadcast to all leading axes. For ids and weights: they are small, so a copy is cheap."""
    return jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :]))


def large(x: jax.Array, lead: tuple[int, ...]) -> tuple[jax.Array, bool]:
    """`x` for all leading axes, and whether all slices share one copy of it. For rows and matrices.

    Where every leading axis of `x` has size 1, `x` comes back as it is.
    """
    own = x.shape[: len(lead)]
    shared = math.prod(own) == 1
    return (x, shared) if shared or own == lead else (whole(x, lead), False)


def shared_by(x: jax.Array, lead: tuple[int, ...]) -> tuple[jax.Array, int]:
    """`x` over its outer leading axes, up to the last one that is not of size 1; and how many slices share each row."""
    outer = max((axis + 1 for axis, size in enumerate(x.shape[:-1]) if size != 1), default=0)
    return jnp.broadcast_to(x, (*lead[:outer], *x.shape[outer:])), math.prod(lead[outer:])


def matrices(rhs: Any, stack: Any, layer: Any, lead: tuple[int, ...]) -> tuple[Any, bool, Any, int]:
    """Where a product's matrices are.

    Returns the array that holds them, whether all slices share it, each slice's layer in it, and its number of layers.
    For matrices that are in no stack the last two are None and 0.
    """
    if stack is None:
        return (*large(rhs, lead), None, 0)
    return (*large(stack, lead), whole(layer, lead), stack.shape[-4])
