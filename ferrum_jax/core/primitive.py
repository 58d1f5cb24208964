"""How an op becomes a JAX primitive. The only file that touches jax.extend and jax.interpreters.

`define` takes a signature, a meaning in jnp and a derivative, and gives back the op: a function that checks its
arguments and binds one equation, `ferrum_<name>`. What all ops share is decided here, once: eager calls, shapes,
lowering per platform, batching, forward and reverse differentiation, meshes and shard_map.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from .. import kernels
from . import signature as signatures


class Op(NamedTuple):
    name: str
    signature: signatures.Signature
    meaning: Callable[..., Any]
    sizes: Callable[..., dict[str, int]]
    leading_axes: bool
    independent: str
    summed: str
    primitive: Primitive
    export_error: str | None = None
    made_of_ops: bool = False

    def __call__(self, *args: Any, implementation: str | None = None, called: str = "", **params: Any) -> Any:
        """Check the arguments and bind one equation. One result comes bare, several as a list.

        Errors name the function that was `called`, if that is not the op's own.
        """
        name = called or self.name
        signatures.one_of(name, "implementation", implementation, (None, *kernels.IMPLEMENTATIONS))
        operands = equally_varying(signatures.canonical(name, self.signature, args))
        results = self.primitive.bind(*operands, implementation=implementation, **params)
        return results if len(self.signature.results) > 1 else results[0]


# operand index -> the map that gives its cotangent; a pair of them -> the map that gives both
Transposes = dict[int | tuple[int, ...], Callable[..., Any]]

_ops: dict[Primitive, Op] = {}
_tangents: dict[Primitive, Callable[..., list[Array]]] = {}  # what each stands for, in equations of ops
_MESH_AXIS = "shards"


def define(
    name: str,
    signature: str,
    meaning: Callable[..., Any],
    *,
    sizes: Callable[..., dict[str, int]] = lambda size, **params: {},
    leading_axes: bool = False,
    independent: str = "",
    summed: str = "",
    transposes: Transposes | None = None,
    both_cotangents: Callable[..., Sequence[Any]] | None = None,
    jvp: Callable[..., Sequence[Any]] | None = None,
    export_error: str | None = None,
    made_of_ops: bool = False,
) -> Op:
    """Declare an op.

    name, signature: the equation is named `ferrum_<name>`; see `signature.py` for the signature's language.
    meaning(*operands, **params): the result (or a tuple of them) in jnp, of operands *without* leading axes.
    sizes(size, **params): sizes of the results' axes that are no operand's, from those that are.
    leading_axes: the meaning takes operands with their leading axes, and broadcasts these itself. For a meaning whose
        vmap would be wasteful.
    independent, summed: trailing axes, as in "T H", along which the meaning acts slice by slice, and those over which
        it adds: what shards of a mesh compute by themselves, the latter with one psum of each result without them.
    transposes: for an op linear in each of some operands (bilinear: two): operand index -> the map
        (cotangent, *operands, **params) -> that operand's cotangent; the operand itself comes as its abstract value.
        Of an op with several results the cotangents come in a list. A key may be a pair, of operands in which the op
        is linear together: then both are abstract, and the map gives both cotangents.
    both_cotangents(cotangent, *operands, **params): of an op bilinear in its first two operands, both cotangents in
        one go, for a gradient by both.
    jvp(primals, results, tangents, **params): the results' tangents (None: no dependence); `tangents` holds None
        where an operand does not vary. For an op that is not linear, or has several results. With neither, the op has
        no derivative.
    made_of_ops: the meaning is made of other ops, and takes `implementation` for them. It is what is differentiated,
        and what runs where no kernel does it in one.
    export_error: why jax.export must not take this op, which then serves debugging and is none of the library's own.
    """
    primitive = Primitive(f"ferrum_{name}")
    primitive.multiple_results = True
    op = _ops[primitive] = Op(
        name,
        signatures.parse(signature),
        meaning,
        sizes,
        leading_axes,
        independent,
        summed,
        primitive,
        export_error,
        made_of_ops,
    )

    _common_rules(op, transposes)
    mlir.register_lowering(primitive, functools.partial(_lower, op, None))
    mlir.register_lowering(primitive, functools.partial(_lower, op, "cuda"), platform="cuda")
    tangent = _define_tangent(op, transposes, both_cotangents) if transposes and both_cotangents else None
    ad.primitive_jvps[primitive] = functools.partial(_jvp, op, transposes or {}, tangent, jvp)
    return op


def _define_tangent(op: Op, transposes: Transposes, both_cotangents: Callable[..., Any]) -> Primitive:
    """`ferrum_<name>_tangent`(x, y, dx, dy, ...) = f(dx, y, ...) + f(x, dy, ...), of a bilinear op f.

    JAX transposes equation by equation: for the cotangents of dx and dy to be made together, they are in one. It has no
    kernels of its own, and is lowered as what it stands for.
    """
    x, y, *others = op.signature.operands
    primitive = Primitive(f"{op.primitive.name}_tangent")
    primitive.multiple_results = True
    signature = op.signature._replace(operands=(x, y, x, y, *others))
    tangent = op._replace(name=f"{op.name}_tangent", signature=signature, primitive=primitive)

    def meaning(x: Array, y: Array, dx: Array, dy: Array, *others: Array, **params: Any) -> list[Array]:
        bind = functools.partial(op.primitive.bind, **params)
        return [jnp.add(*bind(dx, y, *others), *bind(x, dy, *others))]

    def of_operands(transpose: Callable[..., Any], first: int, second: int) -> Callable[..., Any]:
        return lambda ct, *four, **params: transpose(ct, four[first], four[second], *four[4:], **params)

    def apart(first: int, second: int) -> Callable[..., Any]:
        return lambda ct, *operands, **params: [rules[i](ct, *operands, **params) for i in (first, second)]

    moved = {0: (0, 0, 3), 1: (1, 2, 1), 2: (0, 0, 1), 3: (1, 0, 1)}
    rules: Transposes = {new: of_operands(transposes[old], *places) for new, (old, *places) in moved.items()}
    rules |= {(2, 3): of_operands(both_cotangents, 0, 1)}
    rules |= {pair: apart(*pair) for pair in ((0, 1), (0, 2), (1, 3))}  # no term holds both of them
    _common_rules(tangent, rules)
    _tangents[primitive] = meaning
    mlir.register_lowering(primitive, functools.partial(_lower_meaning, meaning))
    ad.primitive_jvps[primitive] = functools.partial(_jvp_of_tangent, primitive)
    return primitive


def _common_rules(op: Op, transposes: Transposes | None) -> None:
    op.primitive.def_impl(functools.partial(_eager, op.primitive))
    op.primitive.def_abstract_eval(functools.partial(_abstract, op))
    batching.primitive_batchers[op.primitive] = functools.partial(_batch, op)
    if transposes:
        ad.primitive_transposes[op.primitive] = functools.partial(_transpose, op, transposes)


# ---- eager calls: one jit, and one compilation a shape, for each set of static parameters


def _eager(primitive: Primitive, *operands: Array, **params: Any) -> list[Array]:
    with jax.disable_jit(False):  # under disable_jit too: an equation by itself has no other way to run
        return _compiled(primitive, tuple(sorted(params.items())))(*operands)


@functools.cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., list[Array]]:
    def run(*operands: Array) -> list[Array]:
        return primitive.bind(*operands, **dict(params))

    run.__name__ = primitive.name
    # JAX's mark of its own eager calls. With it jax_debug_nans names the op instead of running it again, eagerly,
    # which for a primitive that runs by jit has no end.
    run._apply_primitive = True  # type: ignore[attr-defined]
    return jax.jit(run)


# ---- shapes


def _abstract(op: Op, *avals: Any, implementation: str | None, **params: Any) -> list[Any]:
    sizes = functools.partial(op.sizes, **params)
    return signatures.results(op.name, op.signature, avals, sizes, params.get("dtype"))


def equally_varying(operands: Sequence[Array]) -> list[Array]:
    """Inside shard_map, operands that vary over the same manual axes: so their cotangents are summed over the rest."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    every = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(every - own)), to="varying") if every - own else x
        for x, own in zip(operands, varying, strict=True)
    ]


# ---- lowering


def _lower(op: Op, platform: str | None, ctx: Any, *operands: Any, implementation: str | None, **params: Any) -> Any:
    """The kernel that `kernels.choose` picks on an NVIDIA GPU; elsewhere, and where it picks none, the jnp meaning."""
    if op.export_error and ctx.module_context.lowering_parameters.for_export:
        raise NotImplementedError(f"{op.name}: {op.export_error}")
    platform = platform or "/".join(p for p in ctx.module_context.platforms if p != "cuda")
    choice = kernels.choose(_call(op, ctx.avals_in, params), implementation, platform)
    empty = any(0 in aval.shape for aval in (*ctx.avals_in, *ctx.avals_out))
    divided = None if empty else _for_partitioning(ctx.module_context)
    if op.made_of_ops and (empty or divided or choice.implementation == "xla"):
        run = functools.partial(_with_leading_axes(op), implementation=implementation)
    elif divided:
        ctx = ctx.replace(module_context=divided)
        run = _by_shards(op, ctx.avals_in, ctx.avals_out, implementation)
    else:
        run = (None if empty else kernels.load(choice.implementation, op.name, ctx.avals_out)) or _with_leading_axes(op)
    mesh = ctx.avals_out[0].sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        run = in_auto_mesh(run, mesh, tuple(a.sharding.spec for a in ctx.avals_out))
    else:
        mesh = _no_mesh()
        ctx = ctx.replace(avals_in=_local(ctx.avals_in), avals_out=_local(ctx.avals_out))

    def traced(*operands: Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh), jax.named_scope(op.primitive.name):
            return run(*operands, **params)

    return mlir.lower_fun(traced, multiple_results=True)(ctx, *operands)


def _call(op: Op, avals: Sequence[Any], params: dict[str, Any]) -> kernels.Call:
    """What a kernel's choice may look at."""
    terms = op.signature.operands
    operands = dict.fromkeys(term.name for term in terms) | {t.name: a for t, a in zip(terms, avals, strict=False)}
    sizes = signatures.sizes(op.name, terms[: len(avals)], avals)
    return kernels.Call(op.name, operands, sizes, params, made_of_ops=op.made_of_ops)


def in_auto_mesh(run: Callable[..., Any], mesh: AbstractMesh, out_sharding: Any) -> Callable[..., Any]:
    axes = tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)
    return jax.sharding.auto_axes(run, axes=axes, out_sharding=out_sharding)


def _lower_meaning(meaning: Callable[..., list[Array]], ctx: Any, *operands: Any, **params: Any) -> Any:
    def traced(*operands: Array) -> list[Array]:
        with jax.sharding.use_abstract_mesh(ctx.avals_out[0].sharding.mesh):
            return meaning(*operands, **params)

    return mlir.lower_fun(traced, multiple_results=True)(ctx, *operands)


def _for_partitioning(module_context: Any) -> Any:
    """The context in which `custom_partitioning` lowers a program that will be divided among devices; else None.

    It wants a mesh, to say in its terms how arrays are sharded. The program's own, of which there may be several or
    none with devices, are not known to a lowering rule. But only shapes count, and where a prime's power is the number
    of devices, the axes of any mesh are products of the axes of one whose sizes are that prime.
    """
    axes, backend = module_context.axis_context, module_context.backend
    if not all(hasattr(axes, field) for field in ("num_devices", "device_assignment", "abstract_mesh")):
        return None  # inside shard_map (or a JAX that names them otherwise: then the compiler decides, as it can)
    if module_context.lowering_parameters.for_export or kernels.interpreting():
        return None  # callbacks into this process: an exported program has none, and one that is divided loses them
    count = axes.num_devices
    prime = next((p for p in range(2, count + 1) if count % p == 0), 1)
    power = round(math.log(count, prime)) if prime > 1 else 0
    if count == 1 or prime**power != count or not _shardy():
        return None
    if backend is None or backend.device_count() < count:
        return None
    mesh = AbstractMesh((prime,) * power, tuple(f"{_MESH_AXIS}{i}" for i in range(power)))
    axes = dataclasses.replace(axes, device_assignment=tuple(backend.devices()[:count]), abstract_mesh=mesh)
    return module_context.replace(axis_context=axes)


def _shardy() -> bool:
    """Whether Shardy partitions, as `custom_partitioning` here wants: where it is JAX's only way, JAX has no flag."""
    return getattr(jax.config, "jax_use_shardy_partitioner", True)


def _by_shards(
    op: Op, operands: Sequence[Any], results: Sequence[Any], implementation: str | None
) -> Callable[..., Any]:
    """The op in a program that is partitioned after this lowering: bound again, on shards that need no others."""
    from jax.experimental.custom_partitioning import custom_partitioning

    without = _no_mesh()
    factors = signatures.factors(op.signature, operands, results, op.independent, op.summed)
    dtypes = [r.dtype for r in results]

    def run(*operands: Array, **params: Any) -> tuple[Array, ...]:
        bind = functools.partial(op.primitive.bind, implementation=implementation, **params)

        def partition(mesh: Any, operands: Any, results: Any) -> tuple[Any, ...]:
            arrays = *operands, *results
            specs = [x.sharding.spec for x in arrays]
            found = signatures.shards(factors, [x.shape for x in arrays], specs, mesh.shape)
            # What is added across devices is made, and added, in float32.
            wide = {"dtype": "float32"} if "dtype" in params and any(map(found.get, factors.summed)) else {}

            def added(part: Array, axes: tuple[str, ...], dtype: Any) -> Array:
                over = tuple(axis for name in factors.summed if name not in axes for axis in found.get(name, ()))
                return (jax.lax.psum(part.astype(jnp.float32), over) if over else part).astype(dtype)

            def on_shards(*operands: Array) -> list[Array]:
                with jax.sharding.use_abstract_mesh(without):
                    return list(map(added, bind(*operands, **wide), factors.results, dtypes))

            of = lambda axes: NamedSharding(mesh, PartitionSpec(*map(found.get, axes)))  # noqa: E731
            return mesh, on_shards, list(map(of, factors.results)), tuple(map(of, factors.operands))

        call = custom_partitioning(lambda *operands: bind(*operands))
        call.def_partition(partition, sharding_rule=str(factors), need_replication_factors=factors.whole)
        return tuple(call(*operands))

    return run


def _no_mesh() -> AbstractMesh:
    """What an op computes on one device has nothing to do with meshes: it is traced without, but for the same GPU."""
    return AbstractMesh((), (), abstract_device=jax.sharding.get_abstract_mesh().abstract_device)


def _local(avals: Sequence[Any]) -> list[Any]:
    return [ShapedArray(a.shape, a.dtype) for a in avals]


def _with_leading_axes(op: Op) -> Callable[..., tuple[Array, ...]]:
    """The meaning over leading axes, which broadcast from size 1 without being copied."""

    def run(*operands: Array, **params: Any) -> tuple[Array, ...]:
        if op.leading_axes or operands[0].ndim == len(op.signature.operands[0].dims):
            results = op.meaning(*operands, **params)
            return results if isinstance(results, tuple) else (results,)
        shared = [x.shape[0] == 1 for x in operands]
        inner = functools.partial(run, **params)
        if all(shared):
            return tuple(jnp.expand_dims(x, 0) for x in inner(*(jnp.squeeze(x, 0) for x in operands)))
        return jax.vmap(inner, in_axes=tuple(None if s else 0 for s in shared))(
            *(jnp.squeeze(x, 0) if s else x for x, s in zip(operands, shared, strict=True))
        )

    return run


# ---- batching: the new axis goes first; an operand without it gets one of size 1


def _batch(op: Op, operands: Sequence[Array], axes: Sequence[int | None], **params: Any) -> tuple[Any, Any]:
    operands = [
        jnp.expand_dims(x, 0) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    results = op.primitive.bind(*operands, **params)
    return results, [0] * len(results)


# ---- differentiation


def _jvp(
    op: Op, transposes: Transposes, tangent: Primitive | None, jvp: Any, primals: Any, tangents: Any, **params: Any
) -> tuple[Any, Any]:
    if op.made_of_ops:
        return _jvp_of_ops(op, primals, tangents, **params)
    results = op.primitive.bind(*primals, **params)
    varying = [i for i in transposes if isinstance(i, int) and not isinstance(tangents[i], ad.Zero)]
    if tangent and varying == [0, 1]:
        out = tangent.bind(*equally_varying([*primals[:2], *tangents[:2], *primals[2:]]), **params)
    elif varying and not jvp:
        terms = [
            op.primitive.bind(*equally_varying([*primals[:i], tangents[i], *primals[i + 1 :]]), **params)[0]
            for i in varying
        ]
        out = [functools.reduce(jnp.add, terms)]
    elif jvp and not all(isinstance(t, ad.Zero) for t in tangents):
        known = [None if isinstance(t, ad.Zero) else t for t in tangents]
        out = jvp(primals, results, known, **params)
    else:
        out = [None] * len(results)
    zeros = [ad.Zero(jax.typeof(r).to_tangent_aval()) for r in results]
    return results, [z if t is None else t for t, z in zip(out, zeros, strict=True)]


def _jvp_of_ops(op: Op, primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    varying = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    # All operands are its arguments, also those that do not vary: a mesh's other view of them is made of arguments.
    def run(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
        def of_varying(*some: Array) -> tuple[Array, ...]:
            given = dict(zip(varying, some, strict=True))
            return _with_leading_axes(op)(*(given.get(i, x) for i, x in enumerate(primals)), **params)

        return jax.jvp(of_varying, tuple(primals[i] for i in varying), tangents)

    results = _abstract(op, *map(jax.typeof, primals), **params)
    mesh, specs = results[0].sharding.mesh, tuple(r.sharding.spec for r in results)
    # Inside shard_map JAX cannot keep the scalars of another view for a gradient.
    if AxisType.Explicit in mesh.axis_types and AxisType.Manual not in mesh.axis_types:
        run = in_auto_mesh(run, mesh, (specs, specs))
    return run(tuple(primals), tuple(tangents[i] for i in varying))


def _jvp_of_tangent(primitive: Primitive, primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    x, y, dx, dy, *others = primals
    bind = lambda *four: primitive.bind(*equally_varying([*four, *others]), **params)  # noqa: E731
    # Zeros too become arrays: each term then has the leading axes of the whole.
    along_x, along_y, along_dx, along_dy = map(ad.instantiate_zeros, tangents[:4])
    # Exchanging (x, y) and (dx, dy) exchanges its two terms: it is linear in either.
    terms = bind(x, y, along_dx, along_dy), bind(dx, dy, along_x, along_y)
    return bind(x, y, dx, dy), [jnp.add(*terms[0], *terms[1])]


def _transpose(op: Op, transposes: Transposes, cotangents: Any, *operands: Any, **params: Any) -> list[Any]:
    out: list[Any] = [None] * len(operands)
    avals = {i: x.aval for i, x in enumerate(operands) if ad.is_undefined_primal(x)}
    if all(isinstance(ct, ad.Zero) for ct in cotangents):
        found = [ad.Zero(a.to_cotangent_aval() if hasattr(a, "to_cotangent_aval") else a) for a in avals.values()]
    else:
        known = [avals.get(i, x) for i, x in enumerate(operands)]
        both, (first, *_) = len(avals) > 1, avals
        transpose = transposes.get(tuple(avals) if both else first)
        if not transpose:
            raise TypeError(_not_linear(op, transposes, avals))
        cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
        found = transpose(cotangents if len(cotangents) > 1 else cotangents[0], *known, **params)
        found = map(_like, found if both else [found], avals.values())
    for i, ct in zip(avals, found, strict=True):
        out[i] = ct
    return out


def _not_linear(op: Op, transposes: Transposes, together: Iterable[int]) -> str:
    def names(operands: Iterable[int]) -> str:
        *most, last = (op.signature.operands[i].name for i in operands)
        return f"{', '.join(most)} and {last}" if most else last

    linear, asked = names(i for i in transposes if isinstance(i, int)), names(together)
    at_once = "both" if linear == asked else asked
    return f"{op.name}: it is linear in each of {linear}, and not in {at_once} at once: it cannot be transposed so"


def _like(cotangent: Array, aval: Any) -> Array:
    """The cotangent in its primal's shape and sharding: summed over the leading axes along which that was broadcast."""
    wide = tuple(i for i, (have, want) in enumerate(zip(cotangent.shape, aval.shape, strict=True)) if have != want)
    if wide:
        cotangent = jnp.sum(cotangent, axis=wide, keepdims=True)
    have, want = jax.typeof(cotangent).sharding, aval.sharding
    if AxisType.Explicit in want.mesh.axis_types and have.spec != want.spec:
        cotangent = jax.sharding.reshard(cotangent, want)
    return cotangent


# ---- which implementation would run


def which(
    op_function: Callable[..., Any],
    *args: Any,
    platform: str | None = None,
    device_kind: str | None = None,
    **kwargs: Any,
) -> kernels.Choice | Any:  # Any is the tuple: so type checkers let a call of one op be used as a Choice
    """The implementation that `implementation=None` takes, and why each other one is passed over.

    Args:
      op_function: a function of this library, such as `moe_combine`, or any function that runs some of them.
      *args, **kwargs: its arguments; arrays, also inside tuples, may be `jax.ShapeDtypeStruct`s.
      platform: "cpu", "cuda" (or "gpu"), "tpu", ...; default: that of JAX's default backend.
      device_kind: the GPU's name, such as "NVIDIA H200", one that is here or whose generation is known by its name;
        default: the abstract mesh's device, else the live GPU. Without any, Triton compiles for compute capability 9.0,
        and Pallas for nothing.

    Returns:
      Choice(implementation, passed_over): a name, and a dict from every other name to the reason in words. Of a
      function that runs several ops, such as `moe_mlp`: a tuple of (op's name, Choice), one for each distinct call,
      by shapes, dtypes and parameters, in the order in which they first stand in its program. Loops, branches,
      shard_map and functions with derivatives of their own are looked into. Ops without any kernel are left out where
      others have some; where none has, the first stands for all. An op that can be run as others, such as
      `moe_route_plan`, counts as one, and its "xla" is those others, each of which then chooses for itself.

    Raises:
      ValueError: `op_function` runs no op of this library; the GPU is not here, and its name not among the known ones,
        which the message lists.
      NotImplementedError: the call asks for an implementation that cannot run there.

    >>> import jax, jax.numpy as jnp, ferrum_jax
    >>> x = jnp.zeros((16, 128))
    >>> ferrum_jax.which(ferrum_jax.route_topk_softmax, x, 8, platform="cpu").implementation
    'xla'
    >>> f = lambda x: ferrum_jax.moe_plan(ferrum_jax.route_topk_softmax(x, 8).expert_ids, 128, 16)
    >>> [(op, choice.implementation) for op, choice in ferrum_jax.which(f, x, platform="cpu")]
    [('route_topk', 'xla'), ('moe_plan', 'xla')]
    """
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)  # noqa: E731
    leaves, tree = jax.tree.flatten((args, kwargs))

    def call(*arrays: Any) -> Any:
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(tree, [next(given) if is_array(x) else x for x in leaves])
        return op_function(*args, **kwargs)

    found = list(_equations(jax.make_jaxpr(call)(*filter(is_array, leaves)).jaxpr))
    if not found:
        raise ValueError(f"which: {getattr(op_function, '__name__', op_function)} runs no op of ferrum_jax")
    platform = platform or jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    choices: dict[Any, tuple[str, kernels.Choice]] = {}
    for equation in [e for e in found if kernels.served(_ops[e.primitive].name)] or found[:1]:
        op, avals, params = _ops[equation.primitive], [v.aval for v in equation.invars], dict(equation.params)
        key = op.name, tuple((a.shape, a.dtype) for a in avals), tuple(sorted(params.items()))
        asked = params.pop("implementation")
        if key not in choices:
            choice = kernels.choose(_call(op, avals, params), asked, platform, device_kind)
            choices[key] = op.name, choice
    (_, first), *more = several = tuple(choices.values())
    return several if more else first


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The ops' equations, also those inside others: of calls, loops, branches, shards."""
    for equation in jaxpr.eqns:
        op, meaning = _ops.get(equation.primitive), _tangents.get(equation.primitive)
        if op and not op.export_error:
            yield equation
        elif meaning:
            run = functools.partial(meaning, **equation.params)
            yield from _equations(jax.make_jaxpr(run)(*(v.aval for v in equation.invars)))
        else:
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    if hasattr(inner, "eqns"):
                        yield from _equations(inner)
