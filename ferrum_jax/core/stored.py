"""Matrices that a mesh divides, in the form in which they are stored: an array, quantised, or a layer of a stack."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from .quantized import QuantizedMatrices
from .sharding import names_of, spec_of
from .types import LayerOf

Names = tuple[str, ...]


def names_of_array(array: Any) -> tuple[Names, ...]:
    """The mesh axes that divide each axis of an array, of quantised matrices, or of one layer's."""
    if isinstance(array, LayerOf):
        return names_of_array(array.stack)[1:]
    if isinstance(array, QuantizedMatrices):
        *lead, n, h = names_of(jax.typeof(array.values).sharding.spec)
        return *lead, h, n
    return names_of(jax.typeof(array).sharding.spec)


def specs_of(op: str, name: str, array: Any, names: Sequence[Names], mesh: Any, halves: int | None = None) -> Any:
    """The PartitionSpecs of all that is stored of an array whose axes these mesh axes divide.

    halves: the axis along which gate and up stand side by side, each of which the mesh divides.
    A scale stays whole along an axis where all entries share it; else the mesh must divide whole blocks.
    """
    if isinstance(array, LayerOf):
        stack = specs_of(op, f"{name}.stack", array.stack, ((), *names), mesh, None if halves is None else halves + 1)
        return LayerOf(stack, PartitionSpec(), None if array.own is None else spec_of(names))
    if not isinstance(array, QuantizedMatrices):
        return spec_of(names)
    *lead, h, n = names
    of_scales = list(names)
    for axis in (-1, -2):
        if not names[axis]:
            continue
        if _one_block(array, axis):
            of_scales[axis] = ()
            continue
        devices = math.prod(mesh.shape[name] for name in names[axis])
        parts = 2 if halves is not None and halves == len(names) + axis else 1
        own, block = array.shape[axis] // (devices * parts), array.block[0 if axis == -1 else 1]
        if own % (block or own):
            raise ValueError(
                f"{op}: {name} has blocks of {block} entries, which share a scale, and "
                f"{' and '.join(map(repr, names[axis]))} would cut them: each device would have {own} entries"
            )
    *_, of_h, of_n = of_scales
    scales = spec_of((*lead, of_n, of_h))
    return _like(array, spec_of((*lead, n, h)), scales)


def on_leaves(function: Callable[[jax.Array, int], jax.Array], array: Any, axis: int) -> Any:
    """The array with `function(x, axis)` of all that is stored of it, and that is divided along this axis."""
    if not isinstance(array, QuantizedMatrices):
        return function(array, axis)
    place = axis - array.ndim
    stored = {-1: -2, -2: -1}.get(place, place) + array.ndim
    scales, zeros = array.scales, array.zeros
    if place < -2 or not _one_block(array, place):
        scales, zeros = (None if x is None else function(x, stored) for x in (scales, zeros))
    new = _like(array, function(array.values, stored), scales)
    return new if zeros is None else jax.tree.unflatten(jax.tree.structure(array), [new.values, scales, zeros])


def _one_block(array: QuantizedMatrices, axis: int) -> bool:
    """Whether all entries of a part share their scale along this axis, N (-1) or H (-2)."""
    return array.scales.shape[-2 if axis == -1 else -1] == (array.parts if axis == -1 else 1)


def _like(array: QuantizedMatrices, values: Any, scales: Any) -> Any:
    leaves = [values, scales] if array.zeros is None else [values, scales, scales]
    return jax.tree.unflatten(jax.tree.structure(array), leaves)
