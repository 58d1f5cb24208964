"""`which`: it says which implementation a call would run, without running it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

from .. import kernels
from .lowering import OPS, choose_for_equation, over_leading_axes
from .shards import shards_of


def which(
    op_function: Callable[..., Any],
    *args: Any,
    platform: str | None = None,
    device_kind: str | None = None,
    **kwargs: Any,
) -> kernels.Choice | Any:  # Any is the tuple: so type checkers let a call of one op be used as a Choice
    """Say which implementation a call would run, and why each other one is passed over.

    Args:
      op_function: a function of this library, such as `moe_combine`, or any function that runs some of them.
      *args, **kwargs: its arguments; arrays, also inside tuples, may be `jax.ShapeDtypeStruct`s.
      platform: "cpu", "cuda" (or "gpu"), "tpu", ...; default: that of JAX's default backend.
      device_kind: the GPU's name, such as "NVIDIA H200": a GPU of this machine, or one whose generation is known by
        its name. Default: the device of the abstract mesh, else this machine's GPU. Without either, Triton counts as
        compiling for compute capability 9.0, and Pallas as unable to compile.

    Returns:
      Choice(implementation, passed_over): a name, and a dict from every other name to the reason in words. For a
      function that runs several ops, such as `moe_mlp`, a tuple of (op's name, Choice) in the order of the program.
      Calls of one op with the same shapes, dtypes and parameters are listed once. Ops inside loops, branches, shard_map
      and functions with derivatives of their own are listed too. Ops that have no kernel on any GPU are left out; if
      the function runs no others, the first of them is returned. A grouped product with an activation or row weights is
      one op. Its "xla" means several, among them the bare product, and each of these chooses for itself.

    Raises:
      ValueError: `op_function` runs no op of this library; the GPU is not of this machine, and its name is not among
        the known ones, which the message lists.
      NotImplementedError: the call asks for an implementation that cannot run there.

    >>> import jax, jax.numpy as jnp, ferrum_jax
    >>> x = jnp.zeros((16, 128))
    >>> ferrum_jax.which(ferrum_jax.route_topk_softmax, x, 8, platform="cpu").implementation
    'xla'
    >>> f = lambda x: ferrum_jax.moe_plan(ferrum_jax.route_topk_softmax(x, 8).expert_ids, 128, 16)
    >>> [(op, choice.implementation) for op, choice in ferrum_jax.which(f, x, platform="cpu")]
    [('route_topk', 'xla'), ('moe_plan', 'xla')]
    """
    leaves, tree = jax.tree.flatten((args, kwargs))

    def call(*arrays: Any) -> Any:
        traced = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(traced) if _is_array(x) else x for x in leaves])
        return op_function(*args, **kwargs)

    equations = list(_equations(jax.make_jaxpr(call)(*filter(_is_array, leaves)).jaxpr))
    if not equations:
        raise ValueError(f"which: {getattr(op_function, '__name__', op_function)} runs no op of ferrum_jax")
    platform = platform or jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    choices: dict[Any, tuple[str, kernels.Choice]] = {}
    for equation in [e for e in equations if kernels.served(OPS[e.primitive].name)] or equations[:1]:
        op, avals, params = OPS[equation.primitive], [v.aval for v in equation.invars], dict(equation.params)
        key = op.name, tuple((a.shape, a.dtype) for a in avals), tuple(sorted(params.items()))
        asked, given = params.pop("implementation"), params.pop("given", ())
        if key not in choices:
            devices = _devices([a.sharding.mesh for a in avals], leaves)
            if shards := shards_of(op, avals, [v.aval for v in equation.outvars], given):
                devices, avals = shards.devices, shards.avals_in
            choice = choose_for_equation(op, asked, avals, given, params, platform, device_kind, devices)
            choices[key] = op.name, choice
    by_op = list(choices.values())
    return tuple(by_op) if len(by_op) > 1 else by_op[0][1]


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _devices(meshes: list[Any], arguments: list[Any]) -> int:
    """The number of devices among which the compiler divides an op.

    They are those of its operands' mesh, else of the mesh that is set, else of the arguments' meshes.
    """
    for mesh in (*meshes, jax.sharding.get_abstract_mesh()):
        if not mesh.empty:
            axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
            return math.prod(size for size, kind in axes if kind != AxisType.Manual)
    shardings = [getattr(x, "sharding", None) for x in arguments]
    return max([s.mesh.size for s in shardings if isinstance(s, NamedSharding)], default=1)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of ops, also inside calls, loops, branches and shard_map.

    In place of an op that is made of others and has no kernel, these others come.
    """
    for equation in jaxpr.eqns:
        op = OPS.get(equation.primitive)
        if op and op.made_of_ops and not kernels.served(op.name):
            yield from _equations(_parts(op, equation))
        elif op and not op.export_error:
            yield equation
        else:
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    if hasattr(inner, "eqns"):
                        yield from _equations(inner)


def _parts(op: Any, equation: Any) -> Any:
    """The jaxpr of an op that is made of others."""
    params = dict(equation.params)
    given = params.pop("given", ())

    def meaning(*operands: Any) -> Any:
        return over_leading_axes(op)(*op.signature.by_place(operands, given), **params)

    return jax.make_jaxpr(meaning)(*(v.aval for v in equation.invars))
