"""Single ops in an Explicit mesh: where their operands' shards are independent, each device computes its own."""

import math
from typing import Any, NamedTuple

from jax.core import ShapedArray
from jax.sharding import AxisType, PartitionSpec

from .sharding import explicit_axes, mesh_axes


class Shards(NamedTuple):
    """How an equation is divided: over which mesh axes, and the specs and one shard's abstract values.

    devices: the number of those among which the compiler divides a shard.
    """

    axes: tuple[str, ...]
    devices: int
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]
    avals_in: list[Any]
    avals_out: list[Any]


def shards_of(op: Any, avals_in: Any, avals_out: Any, given: tuple[str, ...]) -> Shards | None:
    """The shards of an equation in an Explicit mesh; None if a device would need those of other devices.

    Leading axes are independent, and so are the axes that the op names as `independent`.
    """
    mesh = avals_out[0].sharding.mesh
    if AxisType.Explicit not in mesh.axis_types or AxisType.Manual in mesh.axis_types:
        return None
    if any([not isinstance(size, int) for aval in avals_in for size in aval.shape]):
        return None  # JAX cannot lower a shard_map of symbolic sizes
    terms = [t for t in op.signature.operands if not t.optional or t.name in given]
    leading = len(avals_out[0].shape) - len(op.signature.results[0].axes)
    by_axis: dict[Any, Any] = {}
    for term, aval in zip((*terms, *op.signature.results), (*avals_in, *avals_out), strict=True):
        for axis, names in zip((*range(leading), *term.axes), aval.sharding.spec, strict=True):
            free = isinstance(axis, int) or axis in op.independent
            if names is not None and (not free or by_axis.setdefault(axis, names) != names):
                return None
    used = [name for names in by_axis.values() for name in mesh_axes(names)]
    if len(set(used)) < len(used):
        return None

    def divided(term: Any, aval: Any) -> tuple[PartitionSpec, Any]:
        axes = zip((*range(leading), *term.axes), aval.shape, strict=True)
        names = [by_axis.get(axis) if size != 1 or not isinstance(axis, int) else None for axis, size in axes]
        parts = [math.prod(mesh.shape[name] for name in mesh_axes(n)) for n in names]
        shape = tuple(size // part for size, part in zip(aval.shape, parts, strict=True))
        return PartitionSpec(*names), ShapedArray(shape, aval.dtype)

    operands = [divided(*pair) for pair in zip(terms, avals_in, strict=True)]
    results = [divided(*pair) for pair in zip(op.signature.results, avals_out, strict=True)]
    axes = explicit_axes(mesh)
    return Shards(
        axes,
        math.prod(size for name, size in mesh.shape.items() if name not in axes),
        tuple(spec for spec, _ in operands),
        tuple(spec for spec, _ in results),
        [aval for _, aval in operands],
        [aval for _, aval in results],
    )
