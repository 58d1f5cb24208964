"""What an op's equation is compiled to."""

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
from .signature import sizes_of

OPS: dict[Any, Any] = {}  # primitive -> op: all that `define` has declared


def lower(
    op: Any,
    platform: str | None,
    ctx: Any,
    *operands: Any,
    implementation: str | None,
    given: tuple[str, ...] = (),
    **params: Any,
) -> Any:
    """The kernel that `kernels.choose` picks on an NVIDIA GPU; elsewhere, and where it picks none, the jnp meaning."""
    if op.export_error and ctx.module_context.lowering_parameters.for_export:
        raise NotImplementedError(f"{op.name}: {op.export_error}")
    platform = platform or "/".join(p for p in ctx.module_context.platforms if p != "cuda")
    devices = _devices(ctx.module_context.axis_context)
    choice = choose(op, implementation, ctx.avals_in, given, params, platform, devices=devices)
    empty = any([0 in aval.shape for aval in (*ctx.avals_in, *ctx.avals_out)])
    run: Callable[..., Any]
    if op.made_of_ops and (empty or choice.implementation == "xla"):
        run = functools.partial(over_leading_axes(op), implementation=implementation)
    elif empty or choice.implementation == "xla":
        run = over_leading_axes(op)
    else:
        run = kernels.load(choice.implementation, op.name, ctx.avals_out)
    mesh = ctx.avals_out[0].sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        run = in_auto_mesh(run, mesh, tuple(a.sharding.spec for a in ctx.avals_out))
    else:
        # Trace the computation of one device outside any mesh.
        mesh = no_mesh()
        ctx = ctx.replace(avals_in=_local(ctx.avals_in), avals_out=_local(ctx.avals_out))

    def traced(*operands: Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh), jax.named_scope(op.primitive.name):
            return run(*op.signature.by_place(operands, given), **params)

    return mlir.lower_fun(traced, multiple_results=True)(ctx, *operands)


def _devices(axis_context: Any) -> int:
    """Over how many devices the compiler will divide the op. Axes that shard_map has divided already do not count."""
    mesh = getattr(axis_context, "mesh", None)
    if mesh is None:
        return getattr(axis_context, "num_devices", 1) or 1
    return math.prod(size for name, size in mesh.shape.items() if name not in axis_context.manual_axes)


def _local(avals: Sequence[Any]) -> list[Any]:
    return [ShapedArray(a.shape, a.dtype) for a in avals]


def over_leading_axes(op: Any) -> Callable[..., tuple[Array, ...]]:
    """The meaning, mapped over leading axes. An operand whose axis has size 1 is shared by the slices, not copied."""

    def run(*operands: Any, **params: Any) -> tuple[Array, ...]:
        if op.leading_axes or operands[0].ndim == len(op.signature.operands[0].axes):
            results = op.meaning(*operands, **params)
            return results if isinstance(results, tuple) else (results,)
        axes = tuple([None if x is None or x.shape[0] == 1 else 0 for x in operands])
        slices = [
            jnp.squeeze(x, 0) if x is not None and axis is None else x for x, axis in zip(operands, axes, strict=True)
        ]
        inner = functools.partial(run, **params)
        if not any([axis == 0 for axis in axes]):
            return tuple([jnp.expand_dims(x, 0) for x in inner(*slices)])
        return jax.vmap(inner, in_axes=axes)(*slices)

    return run


def choose(
    op: Any,
    asked: str | None,
    avals: Sequence[Any],
    given: tuple[str, ...],
    params: Mapping[str, Any],
    platform: str,
    device_kind: str | None = None,
    devices: int = 1,
) -> kernels.Choice:
    """What `kernels.choose` picks for one equation. An op that is made of others and has no kernel is run as those."""
    if op.made_of_ops and not kernels.served(op.name):
        return kernels.Choice("xla", {})
    terms, operands = op.signature.operands, op.signature.by_place(avals, given)
    present = [(t, x) for t, x in zip(terms, operands, strict=True) if x is not None]
    by_name = {t.name: x for t, x in zip(terms, operands, strict=True)}
    sizes = sizes_of(*zip(*present, strict=True))
    call = kernels.Call(op.name, by_name, sizes, params, devices, op.made_of_ops)
    return kernels.choose(call, asked, platform, device_kind)
