"""Lowering: an op's equation is compiled to a kernel, or to its meaning in jnp."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.interpreters import mlir
from jax.sharding import AxisType

from .. import kernels
from .sharding import in_auto_mesh, no_mesh
from .shards import Shards, shards_of
from .signature import sizes_of

OPS: dict[Any, Any] = {}  # every op that `define` has declared, by its primitive


def lower(
    op: Any,
    platform: str | None,
    ctx: Any,
    *operands: Any,
    implementation: str | None,
    given: tuple[str, ...] = (),
    **params: Any,
) -> Any:
    """Compile one equation: to a kernel if `kernels.choose` picks one, else to the op's meaning in jnp.

    platform: "cuda", or None in the rule that JAX uses for every other platform.
    """
    if op.export_error and ctx.module_context.lowering_parameters.for_export:
        raise NotImplementedError(f"{op.name}: {op.export_error}")
    platform = platform or "/".join(p for p in ctx.module_context.platforms if p != "cuda")
    avals_in, avals_out, mesh = ctx.avals_in, ctx.avals_out, ctx.avals_out[0].sharding.mesh
    devices, shards = _devices(ctx.module_context.axis_context), shards_of(op, avals_in, avals_out, given)
    if shards:
        devices, avals_in, avals_out = shards.devices, shards.avals_in, shards.avals_out
    choice = choose_for_equation(op, implementation, avals_in, given, params, platform, devices=devices)
    empty = any([0 in aval.shape for aval in (*ctx.avals_in, *ctx.avals_out)])
    compute: Callable[..., Any]
    if op.made_of_ops and (empty or choice.implementation == "xla"):
        compute = functools.partial(over_leading_axes(op), implementation=implementation)
    elif empty or choice.implementation == "xla":
        compute = over_leading_axes(op)
    else:
        compute = kernels.load(choice.implementation, op.name, avals_out)
    if shards:
        return _on_shards(op, shards, mesh, compute, given, params, ctx, operands)
    if AxisType.Explicit in mesh.axis_types:
        compute = in_auto_mesh(compute, mesh, tuple(a.sharding.spec for a in ctx.avals_out))
    else:
        # What one device computes is traced without a mesh. Only the kind of the device is kept, for the kernels.
        mesh = no_mesh()
        ctx = ctx.replace(avals_in=_local(ctx.avals_in), avals_out=_local(ctx.avals_out))

    def traced(*operands: Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh), jax.named_scope(op.primitive.name):
            return compute(*op.signature.by_place(operands, given), **params)

    return mlir.lower_fun(traced, multiple_results=True)(ctx, *operands)


def _on_shards(
    op: Any, shards: Shards, mesh: Any, compute: Any, given: tuple[str, ...], params: Any, ctx: Any, operands: Any
) -> Any:
    """Compile an equation of which each device computes its own shards."""

    def on_device(*operands: Array) -> tuple[Array, ...]:
        with jax.named_scope(op.primitive.name):
            return tuple(compute(*op.signature.by_place(operands, given), **params))

    def traced(*operands: Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            how = {"mesh": mesh, "in_specs": shards.in_specs, "out_specs": shards.out_specs}
            return jax.shard_map(on_device, axis_names=set(shards.axes), check_vma=False, **how)(*operands)

    return mlir.lower_fun(traced, multiple_results=True)(ctx, *operands)


def _devices(axis_context: Any) -> int:
    """The number of devices among which the compiler divides this computation.

    Inside shard_map it divides a shard along the mesh axes that are not manual.
    """
    mesh = getattr(axis_context, "mesh", None)
    if mesh is None:
        return getattr(axis_context, "num_devices", 1) or 1
    return math.prod(size for name, size in mesh.shape.items() if name not in axis_context.manual_axes)


def _local(avals: Sequence[Any]) -> list[Any]:
    """The abstract values without their shardings."""
    return [ShapedArray(a.shape, a.dtype) for a in avals]


def over_leading_axes(op: Any) -> Callable[..., tuple[Array, ...]]:
    """The op's meaning, for operands with any leading axes. Axes of size 1 broadcast, and nothing is copied for it."""

    def over_axes(*operands: Any, **params: Any) -> tuple[Array, ...]:
        if op.leading_axes or operands[0].ndim == len(op.signature.operands[0].axes):
            results = op.meaning(*operands, **params)
            return results if isinstance(results, tuple) else (results,)
        axes = tuple([None if x is None or x.shape[0] == 1 else 0 for x in operands])
        slices = [
            jnp.squeeze(x, 0) if x is not None and axis is None else x for x, axis in zip(operands, axes, strict=True)
        ]
        one_axis_less = functools.partial(over_axes, **params)
        if not any([axis == 0 for axis in axes]):
            return tuple([jnp.expand_dims(x, 0) for x in one_axis_less(*slices)])
        return jax.vmap(one_axis_less, in_axes=axes)(*slices)

    return over_axes


def choose_for_equation(
    op: Any,
    asked: str | None,
    avals: Sequence[Any],
    given: tuple[str, ...],
    params: Mapping[str, Any],
    platform: str,
    device_kind: str | None = None,
    devices: int = 1,
) -> kernels.Choice:
    """What `kernels.choose` picks for one equation. An op that is made of other ops and has no kernel runs as those."""
    if op.made_of_ops and not kernels.served(op.name):
        return kernels.Choice("xla", {})
    terms, operands = op.signature.operands, op.signature.by_place(avals, given)
    present = [(t, x) for t, x in zip(terms, operands, strict=True) if x is not None]
    by_name = {t.name: x for t, x in zip(terms, operands, strict=True)}
    sizes = sizes_of(*zip(*present, strict=True))
    call = kernels.Call(op.name, by_name, sizes, params, devices, op.made_of_ops)
    return kernels.choose(call, asked, platform, device_kind)
