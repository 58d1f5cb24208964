"""How an op becomes a JAX primitive.

`define` takes a signature, a meaning in jnp and a derivative, and returns the op: a function that checks its arguments
and binds one equation, `ferrum_<name>`. This file holds what all ops share: eager calls, shapes, batching, forward and
reverse differentiation. `lowering.py` says what an equation is compiled to.

Only this file and `lowering.py` touch jax.extend and jax.interpreters.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, PartitionSpec

from .. import kernels
from . import lowering
from . import signature as signatures
from .settings import one_of
from .sharding import equally_varying, in_auto_mesh, result_specs

# The name of an operand, or the names of several, -> the function that returns the cotangent of it, or of each.
Transposes = dict[str | tuple[str, ...], Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Op:
    """An op. `define` makes it, and its docstring explains the fields."""

    name: str
    signature: signatures.Signature
    meaning: Callable[..., Any]
    has_optional: bool
    sizes: Callable[..., dict[str, int]] | None
    leading_axes: bool
    independent: str
    transposes: Transposes
    jvp: Callable[..., Sequence[Any]] | None
    export_error: str | None
    made_of_ops: bool
    primitive: Primitive

    def __call__(self, *args: Any, implementation: str | None = None, **params: Any) -> Any:
        """Check the arguments and bind one equation. Returns a single result by itself, several as a list."""
        one_of(self.name, "implementation", implementation, (None, *kernels.IMPLEMENTATIONS))
        args += (None,) * (len(self.signature.operands) - len(args))
        arrays = signatures.checked(self.name, self.signature, *args)
        return self.bind(*arrays, implementation=implementation, **params)

    def bind(self, *operands: Array | None, **params: Any) -> Any:
        """Bind one equation of operands that have been checked. None stands for an optional one that is left out.

        The equation holds only the operands that are there. Its parameter `given` names the optional ones among them.
        """
        if self.has_optional:
            terms = zip(self.signature.operands, operands, strict=True)
            params["given"] = tuple([t.name for t, x in terms if t.optional and x is not None])
            operands = tuple([x for x in operands if x is not None])
        if jax.sharding.get_abstract_mesh().manual_axes:
            operands = equally_varying(operands)  # type: ignore[arg-type,assignment]
        results = self.primitive.bind(*operands, **params)
        return results if len(self.signature.results) > 1 else results[0]


def define(
    name: str,
    signature: str,
    meaning: Callable[..., Any],
    *,
    sizes: Callable[..., dict[str, int]] | None = None,
    leading_axes: bool = False,
    independent: str = "",
    transposes: Transposes | None = None,
    jvp: Callable[..., Sequence[Any]] | None = None,
    export_error: str | None = None,
    made_of_ops: bool = False,
) -> Op:
    """Declare an op. Its functions below are called with all its operands, None in place of one that is left out.

    name, signature: the equation is named `ferrum_<name>`; `signature.py` explains the signature's language.
    meaning(*operands, **params): the result, or a tuple of results, in jnp. The operands have *no* leading axes.
    sizes(sizes, **params): takes the sizes of the operands' axes by name, and returns those of the results' other axes.
    leading_axes: True if the meaning takes operands with leading axes, and broadcasts these itself. For a meaning whose
        vmap would be wasteful.
    independent: the axes along which a part of the results depends on that part of the operands alone. Where an
        Explicit mesh divides these and leading axes, each device computes its own part.
    transposes: for an op that is linear in some operands. Each operand's name has a function
        (cotangent, *operands, **params) that returns the operand's cotangent. It gets the operand itself as an abstract
        value, and of an op with several results a list of cotangents. If the op is linear in several operands taken
        together, a tuple of their names has a function too, which returns their cotangents in that order.
    jvp(primals, results, tangents, **params): returns the results' tangents, None for a result that does not depend on
        what varies. `tangents` holds None for an operand that does not vary. Without a jvp, an op with `transposes` is
        differentiated as a multilinear function of the operands that are named there. An op with neither is
        differentiated as a constant.
    made_of_ops: True if the meaning binds other ops, and takes `implementation` to pass on to them. JAX differentiates
        the meaning then, and runs it where no kernel computes the whole.
    export_error: the reason why jax.export must refuse this op. Only a debugging aid has one, and `which` skips it.
    """
    primitive = Primitive(f"ferrum_{name}")
    primitive.multiple_results = True
    parsed = signatures.parse(signature)
    op = Op(
        name,
        parsed,
        meaning,
        parsed.has_optional,
        sizes,
        leading_axes,
        independent,
        transposes or {},
        jvp,
        export_error,
        made_of_ops,
        primitive,
    )
    lowering.OPS[primitive] = op
    primitive.def_impl(functools.partial(_eager, primitive))
    primitive.def_abstract_eval(functools.partial(abstract, op))
    batching.primitive_batchers[primitive] = functools.partial(_batch, op)
    ad.primitive_jvps[primitive] = functools.partial(_jvp, op)
    if transposes:
        ad.primitive_transposes[primitive] = functools.partial(_transpose, op)
    # Not inlined: JAX writes equal equations once into a program, as a function that each of them calls.
    for platform in (None, "cuda"):
        rule = functools.partial(lowering.lower, op, platform)
        mlir.register_lowering(primitive, rule, platform=platform, inline=False)
    return op


# ---- eager calls: one jit, and one compilation a shape, for each set of static parameters


def _eager(primitive: Primitive, *operands: Array, **params: Any) -> list[Array]:
    with jax.disable_jit(False):  # an equation can only run compiled, even under jax.disable_jit
        return _compiled(primitive, tuple(sorted(params.items())))(*operands)


@functools.cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., list[Array]]:
    def call(*operands: Array) -> list[Array]:
        return primitive.bind(*operands, **dict(params))

    call.__name__ = primitive.name
    # JAX marks its own eager calls like this. Without the mark, jax_debug_nans would look for a NaN's origin by running
    # the op again, eagerly, which comes back here and never ends. With it, jax_debug_nans just names the op.
    call._apply_primitive = True  # type: ignore[attr-defined]
    return jax.jit(call)


# ---- shapes


def abstract(op: Op, *avals: Any, implementation: str | None, given: tuple[str, ...] = (), **params: Any) -> list[Any]:
    """The results' abstract values. Each is made from an operand's, to keep its mesh and the axes it varies over."""
    terms = [t for t in op.signature.operands if not t.optional or t.name in given]
    sizes = signatures.sizes_of(terms, avals)
    dtypes: dict[str, Any] = {"weights": jnp.dtype("float32"), "ids": jnp.dtype("int32")}
    base = avals[0]
    for term, aval in zip(terms, avals, strict=True):
        if term.kind in ("rows", "matrices", "logits"):
            dtypes.setdefault("rows", aval.dtype)
        if base.sharding.mesh.empty and not aval.sharding.mesh.empty:
            base = aval
    if "dtype" in params:
        dtypes["product"] = jnp.dtype(params["dtype"])
    if op.sizes:
        sizes |= op.sizes(sizes, **params)
    lead = sizes["..."]
    results = [
        base.update(
            shape=(*lead, *[sizes[axis] for axis in term.axes]),
            dtype=dtypes[term.kind],
            weak_type=False,
            sharding=base.sharding.update(spec=PartitionSpec(*[None] * (len(lead) + len(term.axes)))),
        )
        for term in op.signature.results
    ]
    if base.sharding.mesh.empty:
        return results
    specs = result_specs(op.name, op.signature.results, terms, avals, len(lead))
    return [r.update(sharding=r.sharding.update(spec=spec)) for r, spec in zip(results, specs, strict=True)]


# ---- batching: the new axis becomes the first; an operand that is not mapped gets an axis of size 1


def _batch(op: Op, operands: Sequence[Array], axes: Sequence[int | None], **params: Any) -> tuple[Any, Any]:
    operands = [
        jnp.expand_dims(x, 0) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    results = op.primitive.bind(*operands, **params)
    return results, [0] * len(results)


# ---- differentiation


def _jvp(op: Op, primals: Any, tangents: Any, *, given: tuple[str, ...] = (), **params: Any) -> tuple[Any, Any]:
    primals = op.signature.by_place(primals, given)
    tangents = op.signature.by_place([None if isinstance(t, ad.Zero) else t for t in tangents], given)
    if op.made_of_ops:
        return _jvp_of_ops(op, primals, tangents, **params)
    bound = op.bind(*primals, **params)
    results = bound if len(op.signature.results) > 1 else [bound]
    if all([t is None for t in tangents]):
        result_tangents: Sequence[Any] = [None] * len(results)
    elif op.jvp:
        result_tangents = op.jvp(primals, results, tangents, **params)
    else:
        result_tangents = [_multilinear_jvp(op, primals, tangents, **params)]
    zeros = [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]
    return results, [z if t is None else t for t, z in zip(result_tangents, zeros, strict=True)]


def _multilinear_jvp(op: Op, primals: list[Any], tangents: list[Any], **params: Any) -> Array | None:
    """Add up, over the operands that vary, the op with that operand's tangent in its place."""
    terms = [
        op.bind(*primals[:i], tangents[i], *primals[i + 1 :], **params)
        for i, term in enumerate(op.signature.operands)
        if term.name in op.transposes and tangents[i] is not None
    ]
    return functools.reduce(jnp.add, terms) if terms else None


def _jvp_of_ops(op: Op, primals: list[Any], tangents: list[Any], **params: Any) -> tuple[Any, Any]:
    """Differentiate the op's meaning, which is made of other ops."""
    varying = [i for i, t in enumerate(tangents) if t is not None]

    # Every operand is an argument, even one that does not vary: in_auto_mesh changes the shardings of arguments only,
    # not of values that the function closes over.
    def jvp(primals: list[Any], tangents: list[Array]) -> tuple[Any, Any]:
        def of_varying(*some: Array) -> tuple[Array, ...]:
            by_place = dict(zip(varying, some, strict=True))
            operands = [by_place.get(i, x) for i, x in enumerate(primals)]
            return lowering.over_leading_axes(op)(*operands, **params)

        return jax.jvp(of_varying, tuple(primals[i] for i in varying), tuple(tangents))

    present = {t.name: jax.typeof(x) for t, x in zip(op.signature.operands, primals, strict=True) if x is not None}
    results = abstract(op, *present.values(), given=tuple(present), **params)
    mesh, specs = results[0].sharding.mesh, tuple(r.sharding.spec for r in results)
    # Not inside shard_map: a gradient would have to keep scalars from in there, and JAX cannot keep those.
    if AxisType.Explicit in mesh.axis_types and AxisType.Manual not in mesh.axis_types:
        jvp = in_auto_mesh(jvp, mesh, (specs, specs))
    return jvp(list(primals), [tangents[i] for i in varying])


def _transpose(op: Op, cotangents: Any, *operands: Any, given: tuple[str, ...] = (), **params: Any) -> list[Any]:
    by_name = dict(zip([t.name for t in op.signature.operands], op.signature.by_place(operands, given), strict=True))
    linear = {name: x.aval for name, x in by_name.items() if ad.is_undefined_primal(x)}  # those to transpose
    if all([isinstance(ct, ad.Zero) for ct in cotangents]):
        results = [ad.Zero(a.to_cotangent_aval() if hasattr(a, "to_cotangent_aval") else a) for a in linear.values()]
    else:
        names = list(linear)
        transpose = op.transposes.get(tuple(names) if len(names) > 1 else names[0])
        if not transpose:
            raise TypeError(_not_linear(op, names))
        cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
        args = (by_name | linear).values()
        results = transpose(cotangents if len(cotangents) > 1 else cotangents[0], *args, **params)
        results = results if len(names) > 1 else [results]
        results = [_like(ct, aval) for ct, aval in zip(results, linear.values(), strict=True)]
    by_operand = dict(zip(linear, results, strict=True))
    return [by_operand.get(name) for name, x in by_name.items() if x is not None]


def _not_linear(op: Op, together: Iterable[str]) -> str:
    def in_words(names: Iterable[str]) -> str:
        *most, last = names
        return f"{', '.join(most)} and {last}" if most else last

    linear, wanted = in_words(name for name in op.transposes if isinstance(name, str)), in_words(together)
    at_once = "both" if linear == wanted else wanted
    return f"{op.name}: it is linear in each of {linear}, and not in {at_once} at once: it cannot be transposed so"


def _like(cotangent: Array, aval: Any) -> Array:
    """Bring a cotangent to its primal's shape and sharding. Sum the leading axes along which the primal broadcast."""
    wide = tuple([i for i, (have, want) in enumerate(zip(cotangent.shape, aval.shape, strict=True)) if have != want])
    if wide:
        cotangent = jnp.sum(cotangent, axis=wide, keepdims=True)
    have, want = jax.typeof(cotangent).sharding, aval.sharding
    if AxisType.Explicit in want.mesh.axis_types and have.spec != want.spec:
        cotangent = jax.sharding.reshard(cotangent, want)
    return cotangent
