"""Meshes: how operands' shardings become results', and how arrays are brought into the layout that a function needs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, PartitionSpec


def result_specs(op: str, results: Any, terms: Any, avals: Any, leading: int) -> list[PartitionSpec]:
    """The results' shardings: an axis is sharded as the operands' axis of the same name.

    If two axes of a result would use one mesh axis, only the first does. leading: the number of leading axes.
    """
    by_axis: dict[Any, Any] = {}
    for term, aval in zip(terms, avals, strict=True):
        spec = aval.sharding.spec
        if spec.reduced or spec.unreduced:
            raise ValueError(f"{op}: {term.name} is {spec}: jax.sharding.reshard it first")
        for axis, size, names in zip((*range(leading), *term.axes), aval.shape, spec, strict=True):
            if names is not None and not (isinstance(axis, int) and size == 1):
                by_axis.setdefault(axis, names)
    if not by_axis:
        return [PartitionSpec(*[None] * (leading + len(result.axes))) for result in results]
    return [_first_use(by_axis.get(axis) for axis in (*range(leading), *result.axes)) for result in results]


def _first_use(entries: Any) -> PartitionSpec:
    used: set[Any] = set()
    spec = []
    for entry in entries:
        names = set(entry if isinstance(entry, tuple) else (entry,)) - {None}
        spec.append(None if names & used else entry)
        used |= names
    return PartitionSpec(*spec)


def equally_varying(operands: Sequence[Array]) -> Sequence[Array]:
    """Inside shard_map, make all operands vary over the same manual axes.

    JAX then sums the cotangent of an operand over the axes along which the operand was the same.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return operands
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    every = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(every - own)), to="varying") if every - own else x
        for x, own in zip(operands, varying, strict=True)
    ]


def in_auto_mesh(run: Callable[..., Any], mesh: AbstractMesh, out_sharding: Any) -> Callable[..., Any]:
    """`run` with the mesh's Explicit axes as Auto ones: the compiler divides what is inside."""
    axes = tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)
    return jax.sharding.auto_axes(run, axes=axes, out_sharding=out_sharding)


def no_mesh() -> AbstractMesh:
    """An empty mesh that still names the kind of device, so that kernels are compiled for the right GPU."""
    return AbstractMesh((), (), abstract_device=jax.sharding.get_abstract_mesh().abstract_device)


def tokens_of(x: Array, whole: bool = False) -> Array:
    """[..., N] as [T, N]; with `whole`, replicated on every device.

    In an Explicit mesh JAX can merge axes only if none but the first is sharded, so the others are replicated first.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        spec = [axes if i in (0, x.ndim - 1) and not whole else None for i, axes in enumerate(sharding.spec)]
        if tuple(spec) != tuple(sharding.spec):
            x = jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(*spec)))
    # Not -1 for the number of tokens: JAX cannot tell it where the width is 0.
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def as_given(out: Array, given: Any) -> Array:
    """Shard the result's tokens as the given array's are, so that what follows is divided in the same way."""
    sharding = jax.typeof(out).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return out
    *lead, _ = given.sharding.spec
    *own, last = sharding.spec
    if own == lead:
        return out
    taken = {name for axes in lead for name in (axes if isinstance(axes, tuple) else (axes,))}
    last = None if taken & {*(last if isinstance(last, tuple) else (last,))} - {None} else last
    return jax.sharding.reshard(out, sharding.update(spec=PartitionSpec(*lead, last)))
