"""How an op becomes a JAX primitive.

`define` takes a signature, a meaning in jnp and a derivative, and gives back the op: a function that checks its
arguments and binds one equation, `ferrum_<name>`. What all ops share is decided here, once: eager calls, shapes,
batching, forward and reverse differentiation. `lowering.py` has what an equation is compiled to.

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
from .sharding import equally_varying, in_auto_mesh, result_specs

# The names of the operands that are transposed together -> the map that gives their cotangents.
Transposes = dict[str | tuple[str, ...], Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Op:
    """An op, as `define` declares it. Its parameters are `define`'s."""

    name: str
    signature: signatures.Signature
    meaning: Callable[..., Any]
    has_optional: bool
    sizes: Callable[..., dict[str, int]] | None
    leading_axes: bool
    transposes: Transposes
    jvp: Callable[..., Sequence[Any]] | None
    export_error: str | None
    made_of_ops: bool
    primitive: Primitive

    def __call__(self, *args: Any, implementation: str | None = None, called: str = "", **params: Any) -> Any:
        """Check the arguments and bind one equation. One result comes bare, several as a list.

        Errors name the function that was `called`, if that is not the op's own.
        """
        name = called or self.name
        signatures.one_of(name, "implementation", implementation, (None, *kernels.IMPLEMENTATIONS))
        args += (None,) * (len(self.signature.operands) - len(args))
        return self.bind(*signatures.checked(name, self.signature, *args), implementation=implementation, **params)

    def bind(self, *operands: Array | None, **params: Any) -> Any:
        """Bind one equation, of operands that have been checked; None is an optional one that is left out.

        The equation's operands are those that are there. Its parameter `given` names the optional ones among them.
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
    transposes: Transposes | None = None,
    jvp: Callable[..., Sequence[Any]] | None = None,
    export_error: str | None = None,
    made_of_ops: bool = False,
) -> Op:
    """Declare an op. Everything that is called with its operands gets all of them, None for one that is left out.

    name, signature: the equation is named `ferrum_<name>`; see `signature.py` for the signature's language.
    meaning(*operands, **params): the result (or a tuple of them) in jnp, of operands *without* leading axes.
    sizes(sizes, **params): sizes of the results' axes that are no operand's, from those that are.
    leading_axes: the meaning takes operands with their leading axes, and broadcasts these itself. For a meaning whose
        vmap would be wasteful.
    transposes: for an op that is linear in each of some operands: the operand's name -> the map
        (cotangent, *operands, **params) -> its cotangent; the operand itself comes as its abstract value. Cotangents of
        several results come in a list. A key may be several names, of operands in which the op is linear together: then
        all of these are abstract, and the map gives their cotangents in the key's order.
    jvp(primals, results, tangents, **params): the results' tangents (None: no dependence); `tangents` holds None
        where an operand does not vary. Without it, an op with `transposes` is differentiated in each of their operands,
        and one with neither has no derivative.
    made_of_ops: the meaning is made of other ops, and takes `implementation` for them. It is what is differentiated,
        and what runs where no kernel does it in one.
    export_error: why jax.export must not take this op, which then serves debugging and is none of the library's own.
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
    mlir.register_lowering(primitive, functools.partial(lowering.lower, op, None))
    mlir.register_lowering(primitive, functools.partial(lowering.lower, op, "cuda"), platform="cuda")
    return op


# ---- eager calls: one jit, and one compilation a shape, for each set of static parameters


def _eager(primitive: Primitive, *operands: Array, **params: Any) -> list[Array]:
    with jax.disable_jit(False):  # An equation by itself can only run through jit, also under jax.disable_jit.
        return _compiled(primitive, tuple(sorted(params.items())))(*operands)


@functools.cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., list[Array]]:
    def run(*operands: Array) -> list[Array]:
        return primitive.bind(*operands, **dict(params))

    run.__name__ = primitive.name
    # JAX marks its own eager calls so. Where jax_debug_nans finds NaN, it then names the op; else it would call the
    # function again, op by op, and each of these calls would come back here without end.
    run._apply_primitive = True  # type: ignore[attr-defined]
    return jax.jit(run)


# ---- shapes


def abstract(op: Op, *avals: Any, implementation: str | None, given: tuple[str, ...] = (), **params: Any) -> list[Any]:
    """The results' abstract values. They are made from an operand's, so that they keep its mesh and varying axes."""
    terms = [t for t in op.signature.operands if not t.optional or t.name in given]
    sizes = signatures.sizes_of(terms, avals)
    dtypes: dict[str, Any] = {"weights": jnp.dtype("float32"), "ids": jnp.dtype("int32")}
    base = avals[0]
    for term, aval in zip(terms, avals, strict=True):
        if term.kind in ("rows", "logits"):
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


# ---- batching: the new axis goes first; an operand without it gets one of size 1


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
    known = op.signature.by_place([None if isinstance(t, ad.Zero) else t for t in tangents], given)
    if op.made_of_ops:
        return _jvp_of_ops(op, primals, known, **params)
    bound = op.bind(*primals, **params)
    results = bound if len(op.signature.results) > 1 else [bound]
    if all([t is None for t in known]):
        out: Sequence[Any] = [None] * len(results)
    elif op.jvp:
        out = op.jvp(primals, results, known, **params)
    else:
        out = [_multilinear_jvp(op, primals, known, **params)]
    zeros = [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]
    return results, [z if t is None else t for t, z in zip(out, zeros, strict=True)]


def _multilinear_jvp(op: Op, primals: list[Any], tangents: list[Any], **params: Any) -> Array | None:
    """The sum, over the operands that vary, of the op with the operand's tangent in its place."""
    terms = [
        op.bind(*primals[:i], tangents[i], *primals[i + 1 :], **params)
        for i, term in enumerate(op.signature.operands)
        if term.name in op.transposes and tangents[i] is not None
    ]
    return functools.reduce(jnp.add, terms) if terms else None


def _jvp_of_ops(op: Op, primals: list[Any], tangents: list[Any], **params: Any) -> tuple[Any, Any]:
    varying = [i for i, t in enumerate(tangents) if t is not None]

    # Every operand is an argument of `run`, also one that does not vary: in_auto_mesh changes the sharding of
    # arguments, and not that of values which a function closes over.
    def run(primals: list[Any], tangents: list[Array]) -> tuple[Any, Any]:
        def of_varying(*some: Array) -> tuple[Array, ...]:
            by_place = dict(zip(varying, some, strict=True))
            operands = [by_place.get(i, x) for i, x in enumerate(primals)]
            return lowering.over_leading_axes(op)(*operands, **params)

        return jax.jvp(of_varying, tuple(primals[i] for i in varying), tuple(tangents))

    present = {t.name: jax.typeof(x) for t, x in zip(op.signature.operands, primals, strict=True) if x is not None}
    results = abstract(op, *present.values(), given=tuple(present), **params)
    mesh, specs = results[0].sharding.mesh, tuple(r.sharding.spec for r in results)
    # Not inside shard_map: there JAX cannot save scalars from inside in_auto_mesh for the gradient.
    if AxisType.Explicit in mesh.axis_types and AxisType.Manual not in mesh.axis_types:
        run = in_auto_mesh(run, mesh, (specs, specs))
    return run(list(primals), [tangents[i] for i in varying])


def _transpose(op: Op, cotangents: Any, *operands: Any, given: tuple[str, ...] = (), **params: Any) -> list[Any]:
    by_name = dict(zip([t.name for t in op.signature.operands], op.signature.by_place(operands, given), strict=True))
    asked = {name: x.aval for name, x in by_name.items() if ad.is_undefined_primal(x)}
    if all([isinstance(ct, ad.Zero) for ct in cotangents]):
        found = [ad.Zero(a.to_cotangent_aval() if hasattr(a, "to_cotangent_aval") else a) for a in asked.values()]
    else:
        several, (first, *_) = len(asked) > 1, asked
        transpose = op.transposes.get(tuple(asked) if several else first)
        if not transpose:
            raise TypeError(_not_linear(op, asked))
        cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
        found = transpose(cotangents if len(cotangents) > 1 else cotangents[0], *(by_name | asked).values(), **params)
        found = [_like(ct, aval) for ct, aval in zip(found if several else [found], asked.values(), strict=True)]
    by_operand = dict(zip(asked, found, strict=True))
    return [by_operand.get(name) for name, x in by_name.items() if x is not None]


def _not_linear(op: Op, together: Iterable[str]) -> str:
    def listed(names: Iterable[str]) -> str:
        *most, last = names
        return f"{', '.join(most)} and {last}" if most else last

    linear, asked = listed(name for name in op.transposes if isinstance(name, str)), listed(together)
    at_once = "both" if linear == asked else asked
    return f"{op.name}: it is linear in each of {linear}, and not in {at_once} at once: it cannot be transposed so"


def _like(cotangent: Array, aval: Any) -> Array:
    """Give a cotangent its primal's shape and sharding: sum over leading axes along which the primal was broadcast."""
    wide = tuple([i for i, (have, want) in enumerate(zip(cotangent.shape, aval.shape, strict=True)) if have != want])
    if wide:
        cotangent = jnp.sum(cotangent, axis=wide, keepdims=True)
    have, want = jax.typeof(cotangent).sharding, aval.sharding
    if AxisType.Explicit in want.mesh.axis_types and have.spec != want.spec:
        cotangent = jax.sharding.reshard(cotangent, want)
    return cotangent
