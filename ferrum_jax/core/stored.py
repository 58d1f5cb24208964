"""Matrices that a mesh divides, in the form in which they are stored: an array, quantised, or a layer of a stack."""

import dataclasses
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

    halves: the axis along which gate and up stand side by side, each of which the mesh divides, so that a device has a
      part of both.
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
        size, block = _size(array, axis)
        of_halves = halves is not None and halves == len(names) + axis
        if axis == -1 and array.parts > 1 and not (of_halves and array.parts == 2):
            raise ValueError(
                f"{op}: {name} has {array.parts} matrices side by side, each with scales of its own, and "
                f"{' and '.join(map(repr, names[axis]))} would cut between them"
            )
        if block is None or block >= size:
            of_scales[axis] = ()
            continue
        devices = math.prod(mesh.shape[name] for name in names[axis])
        own = array.shape[axis] // (devices * (2 if of_halves else 1))
        if own % block:
            raise ValueError(
                f"{op}: {name} has blocks of {block} entries, which share a scale, and "
                f"{' and '.join(map(repr, names[axis]))} would cut them: each device would have {own} entries"
            )
    *_, of_h, of_n = of_scales
    scales = spec_of((*lead, of_n, of_h))
    zeros = None if array.zeros is None else scales
    return dataclasses.replace(array, values=spec_of((*lead, n, h)), scales=scales, zeros=zeros)


def on_leaves(function: Callable[[jax.Array, int], jax.Array], array: Any, axis: int) -> Any:
    """A device's array with `function(x, axis)` of all that is stored of it, and that the mesh divides along this axis.

    Where all devices share a scale, a device's part is smaller than a block.
    """
    if not isinstance(array, QuantizedMatrices):
        return function(array, axis)
    place = axis - array.ndim
    stored = {-1: -2, -2: -1}.get(place, place) + array.ndim
    scales, zeros = array.scales, array.zeros
    size, block = _size(array, place) if place >= -2 else (0, 0)
    if block is not None and block <= size:
        scales, zeros = (None if x is None else function(x, stored) for x in (scales, zeros))
    return dataclasses.replace(array, values=function(array.values, stored), scales=scales, zeros=zeros)


def _size(array: QuantizedMatrices, axis: int) -> tuple[int, int | None]:
    """The entries along N (-1) of one part, or along H (-2), and those of a block."""
    return array.shape[axis] // (array.parts if axis == -1 else 1), array.block[0 if axis == -1 else 1]
