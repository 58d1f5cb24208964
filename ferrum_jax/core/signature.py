"""What an op takes and returns, in one line of text.

    "packed_down: rows[R,H], pair_weights: weights[T,K], pairs_by_token: ids[T,K] -> rows[T,H]"

The line gives every operand's name, kind and trailing axes. Each operand may have further leading (batch) axes: the
same number on all operands, of equal sizes or of size 1, which broadcasts. From this line come the checks of a
call's arguments, the shapes and dtypes of the results, and, in an Explicit mesh, their shardings.

Kinds: `rows` (float16, bfloat16 or float32, one dtype for all of an op's rows), `weights` (any float, used in
float32), `ids` (any integer, used in int32). A result may also be a `product`: rows of the dtype that the op's
parameter `dtype` names. Trailing operands may be left out of a call.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

INT32_MAX = 2**31 - 1
ROW_DTYPES = ("float16", "bfloat16", "float32")


class Term(NamedTuple):
    name: str
    kind: str
    dims: tuple[str, ...]

    def __str__(self) -> str:
        return f"[{', '.join(('...', *self.dims))}]"


class Signature(NamedTuple):
    operands: tuple[Term, ...]
    results: tuple[Term, ...]


def parse(text: str) -> Signature:
    def terms(side: str) -> tuple[Term, ...]:
        found = re.findall(r"(?:(\w+): )?(\w+)\[([\w,]*)\]", side)
        return tuple(Term(name, kind, tuple(filter(None, dims.split(",")))) for name, kind, dims in found)

    operands, results = text.split("->")
    return Signature(terms(operands), terms(results))


# ---- a call's arguments


def as_int(op: str, name: str, value: Any, least: int = 1, most: int = INT32_MAX) -> int:
    """A static size: a Python int in [least, most], and no bool."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{op}: {name} must be a Python int, known when the function is traced; got {type(value).__name__}"
        ) from None
    if not least <= number <= most:
        raise ValueError(f"{op}: {name} must be in [{least}, {most}]; got {number}")
    return number


def as_bool(op: str, name: str, value: Any) -> bool:
    """A static yes or no. What else Python takes for true, "no" among it, is an error."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {name} must be True or False; got {type(value).__name__}")
    return bool(value)


def one_of(op: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def as_mask(op: str, token_mask: Any, shape: tuple[int, ...]) -> jax.Array:
    mask = jnp.asarray(token_mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{op}: token_mask must be bool; got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"{op}: token_mask must have shape {shape}, one entry a token; got {mask.shape}")
    return mask


def canonical(op: str, signature: Signature, args: tuple[Any, ...]) -> list[jax.Array]:
    """The arguments as arrays of their kinds' dtypes, or the error that says which one is wrong, and how."""
    terms = signature.operands[: len(args)]
    arrays = [_as_kind(op, term, arg) for term, arg in zip(terms, args, strict=True)]
    sizes(op, terms, arrays)
    rows = [(t.name, a.dtype) for t, a in zip(terms, arrays, strict=True) if t.kind == "rows"]
    for name, dtype in rows[1:]:
        if dtype != rows[0][1]:
            raise TypeError(f"{op}: {name} must have the dtype of {rows[0][0]}, {rows[0][1]}; got {dtype}")
    return arrays


def _as_kind(op: str, term: Term, arg: Any) -> jax.Array:
    try:
        array = arg if isinstance(arg, jax.Array) else np.asarray(arg)
        dtype = array.dtype
        if term.kind == "ids" and isinstance(array, np.ndarray) and np.issubdtype(dtype, np.integer):
            array = _narrow(array, np)  # in NumPy, because JAX would cut 64 bits down to 32 first
        array = array if isinstance(array, jax.Array) else jnp.asarray(array)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{op}: {term.name} must be an array, {term}; got {type(arg).__name__}: {error}") from error
    dtype = array.dtype
    if term.kind == "rows":
        if dtype.name not in ROW_DTYPES:
            raise TypeError(f"{op}: {term.name} must be float16, bfloat16 or float32; got {dtype}")
        return array
    if term.kind == "weights":
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{op}: {term.name} must be floating point; got {dtype}")
        return array.astype(jnp.float32)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{op}: {term.name} must hold integers; got {dtype}")
    return _narrow(array, jnp)


def _narrow(ids: Any, xp: Any) -> Any:
    """int32 ids; a value that int32 cannot hold becomes -1, "none", and never another id by wrapping."""
    if ids.dtype == xp.int32 or ids.dtype.itemsize < 4:
        return ids.astype(xp.int32)
    fits = (ids >= 0) & (ids <= xp.asarray(INT32_MAX, ids.dtype))
    return xp.where(fits, ids.astype(xp.int32), xp.int32(-1))


def sizes(op: str, terms: tuple[Term, ...], arrays: Any) -> dict[str, int]:
    """The size of every named axis, and of the broadcast leading axes under the name "..."."""
    found: dict[str, tuple[int, str]] = {}
    lead: tuple[int, ...] | None = None
    for term, array in zip(terms, arrays, strict=True):
        shape, rank = tuple(array.shape), len(term.dims)
        if len(shape) < rank:
            raise ValueError(f"{op}: {term.name} must be {term}, at least {rank} axes; got shape {shape}")
        own = shape[: len(shape) - rank]
        for dim, size in zip(term.dims, shape[len(own) :], strict=True):
            known, source = found.setdefault(dim, (size, term.name))
            if size != known:
                raise ValueError(
                    f"{op}: {term.name} must be {term} with {dim} = {known}, as in {source}; got shape {shape}"
                )
            if dim != "H" and isinstance(size, int) and size > INT32_MAX:
                raise ValueError(f"{op}: {term.name} has {size} entries along {dim}; int32 ids allow {INT32_MAX}")
        lead = own if lead is None else lead
        if len(own) != len(lead) or any(a != b and 1 not in (a, b) for a, b in zip(own, lead, strict=True)):
            raise ValueError(
                f"{op}: {term.name} must be {term} with leading axes that match {lead}, those of what is "
                f"before it (equal sizes, or 1); got shape {shape}"
            )
        lead = tuple(b if a == 1 else a for a, b in zip(own, lead, strict=True))
    return {"...": lead or (), **{dim: size for dim, (size, _) in found.items()}}  # type: ignore[dict-item]


# ---- the results


def results(
    op: str, signature: Signature, avals: tuple[Any, ...], derive: Callable[..., dict[str, int]], product: str | None
) -> list[Any]:
    """Abstract values of the results. Each starts from an operand's and keeps what that carries: mesh, varying axes."""
    terms = signature.operands[: len(avals)]
    size: dict[str, Any] = sizes(op, terms, avals)
    size |= derive(size)
    for term, aval in zip(terms, avals, strict=True):
        if aval.sharding.spec.reduced or aval.sharding.spec.unreduced:
            raise ValueError(f"{op}: {term.name} is {aval.sharding.spec}: jax.sharding.reshard it first")
    base = next((a for a in avals if not a.sharding.mesh.empty), avals[0])
    rows = next((a.dtype for t, a in zip(terms, avals, strict=True) if t.kind == "rows"), None)
    dtypes = {"rows": rows, "weights": jnp.dtype("float32"), "ids": jnp.dtype("int32")}
    dtypes |= {"product": jnp.dtype(product)} if product else {}
    return [
        base.update(
            shape=(*size["..."], *(size[d] for d in term.dims)),
            dtype=dtypes[term.kind],
            weak_type=False,
            sharding=base.sharding.update(spec=_spec(term, terms, avals, len(size["..."]))),
        )
        for term in signature.results
    ]


def _spec(result: Term, terms: tuple[Term, ...], avals: tuple[Any, ...], leads: int) -> PartitionSpec:
    """A result's axis is sharded as the operand axis of its name is; a mesh axis serves one result axis, the first."""
    by_name: dict[Any, Any] = {}
    for term, aval in zip(terms, avals, strict=True):
        names = (*range(leads), *term.dims)
        for name, size, entry in zip(names, aval.shape, aval.sharding.spec, strict=True):
            if entry is not None and not (isinstance(name, int) and size == 1):
                by_name.setdefault(name, entry)
    used: set[Any] = set()
    spec = []
    for name in (*range(leads), *result.dims):
        entry = by_name.get(name)
        axes = set(entry if isinstance(entry, tuple) else (entry,)) - {None}
        spec.append(None if axes & used else entry)
        used |= axes
    return PartitionSpec(*spec)


# ---- shards


class Factors(NamedTuple):
    """The axes of all operands and results by factor: axes of one factor go together, shard by shard.

    whole: factors that no mesh axis may shard. summed: those along which results of shards are added.
    """

    operands: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]
    whole: tuple[str, ...]
    summed: tuple[str, ...]

    def __str__(self) -> str:
        return " -> ".join(", ".join(" ".join(axes) for axes in side) for side in (self.operands, self.results))


def factors(signature: Signature, operands: Any, results: Any, independent: str, summed: str) -> Factors:
    """Factors of an op's axes, from its signature: leading axes, the trailing ones named, and the others, kept whole.

    independent, summed: names of trailing axes, as in "T H": along the former the op acts slice by slice, as along
    leading ones; along the latter it adds.
    """
    split, whole = {*independent.split(), *summed.split()}, []

    def factor(name: str | int, size: int) -> str:
        if size != 1 and (isinstance(name, int) or name in split):
            return f"lead{name}" if isinstance(name, int) else name
        whole.append(f"whole{len(whole)}")  # also what broadcasts
        return whole[-1]

    def sides(terms: tuple[Term, ...], arrays: Any) -> tuple[tuple[str, ...], ...]:
        return tuple(
            tuple(map(factor, (*range(len(a.shape) - len(t.dims)), *t.dims), a.shape))
            for t, a in zip(terms, arrays, strict=True)
        )

    both = sides(signature.operands[: len(operands)], operands), sides(signature.results, results)
    present = {name for axes in both[0] for name in axes}
    return Factors(*both, tuple(whole), tuple(name for name in summed.split() if name in present))


def shards(of: Factors, shapes: Any, specs: Any, mesh_shape: Any) -> dict[str, tuple[Any, ...]]:
    """The mesh axes of each factor that is sharded: the first that the specs [operands, results] name, each once.

    What they do not divide evenly stays whole: a shard's padding would count where shards are added.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for axes, shape, spec in zip((*of.operands, *of.results), shapes, specs, strict=True):
        for name, size, entry in zip(axes, shape, spec, strict=True):
            names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
            free = not {*names} & {n for used in found.values() for n in used}
            parts = math.prod(mesh_shape[n] for n in names)
            if names and free and size % parts == 0 and name not in (*of.whole, *found):
                found[name] = names
    return found
