"""Meshes: the results' shardings, and arrays brought to the sharding that a function needs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec names: None, one, or a tuple of them."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def explicit_axes(mesh: Any) -> tuple[str, ...]:
    """The names of the mesh's Explicit axes."""
    return tuple([n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit])


def result_specs(op: str, results: Any, terms: Any, avals: Any, leading: int) -> list[PartitionSpec]:
    """The results' shardings: each axis is sharded as the operands' axis of the same name.

    Where two axes of a result would be sharded over one mesh axis, only the first of them is.
    leading: the number of leading axes.
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
    """A spec of these entries, without those that name a mesh axis a second time."""
    used: set[Any] = set()
    spec = []
    for entry in entries:
        names = set(mesh_axes(entry))
        spec.append(None if names & used else entry)
        used |= names
    return PartitionSpec(*spec)


def equally_varying(operands: Sequence[Array]) -> Sequence[Array]:
    """Inside shard_map, make all operands vary over the manual axes that any of them varies over.

    JAX then sums an operand's cotangent over the axes that were added to it.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return operands
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(union - axes)), to="varying") if union - axes else x
        for x, axes in zip(operands, varying, strict=True)
    ]


def in_auto_mesh(function: Callable[..., Any], mesh: AbstractMesh, out_sharding: Any) -> Callable[..., Any]:
    """The function, traced with the mesh's Explicit axes as Auto ones, so that the compiler divides its work."""
    return jax.sharding.auto_axes(function, axes=explicit_axes(mesh), out_sharding=out_sharding)


def by_compiler(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function of x and others, whose work the compiler divides, in an Explicit mesh too; sharded as x."""

    def call(x: Array, *others: Array) -> Array:
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit not in mesh.axis_types:
            return function(x, *others)
        return in_auto_mesh(function, mesh, jax.typeof(x).sharding.spec)(x, *others)

    return call


def no_mesh() -> AbstractMesh:
    """An empty mesh that still names the kind of device, so that kernels are compiled for the right GPU."""
    return AbstractMesh((), (), abstract_device=jax.sharding.get_abstract_mesh().abstract_device)


def tokens_of(x: Array, whole: bool = False) -> Array:
    """Reshape [..., N] to [T, N]. With `whole`, replicate it on every device.

    In an Explicit mesh JAX can merge axes only if none but the first is sharded, so the others are replicated first.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        spec = [axes if i in (0, x.ndim - 1) and not whole else None for i, axes in enumerate(sharding.spec)]
        if tuple(spec) != tuple(sharding.spec):
            x = jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(*spec)))
    # The number of tokens is spelled out: JAX cannot infer a -1 where the width is 0.
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def names_of(spec: Any) -> tuple[tuple[str, ...], ...]:
    """The entries of a PartitionSpec, each as a tuple of names."""
    return tuple(map(mesh_axes, spec))


def spec_of(names: Any) -> PartitionSpec:
    """The PartitionSpec of these tuples of names."""
    return PartitionSpec(*[n or None for n in names])


def placed(x: Array, mesh: Any, spec: PartitionSpec) -> Array:
    """The array with this sharding along Explicit axes. Along Auto ones, shard_map brings it there."""
    explicit = explicit_axes(mesh)
    if not explicit:
        return x
    have = jax.typeof(x).sharding
    entries = [tuple([n for n in names if n in explicit]) for names in names_of(spec)]
    spec = spec_of((*entries, *[()] * (x.ndim - len(entries))))
    there = not any(entries) if have.mesh.empty else have.spec == spec
    return x if there else jax.sharding.reshard(x, NamedSharding(mesh, spec))


def sharded_like(out: Array, x: Any) -> Array:
    """Shard the leading axes of a layer's result as those of its input x, so that what follows stays divided too.

    x: the input's abstract value. A mesh axis that now shards a leading axis no longer shards the last one.
    """
    sharding = jax.typeof(out).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return out
    *lead, _ = x.sharding.spec
    *out_lead, last = sharding.spec
    if out_lead == lead:
        return out
    taken = {name for axes in lead for name in mesh_axes(axes)}
    last = None if taken & {*mesh_axes(last)} else last
    return jax.sharding.reshard(out, sharding.update(spec=PartitionSpec(*lead, last)))
