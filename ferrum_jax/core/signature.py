"""What an op takes and returns, in one line of text.

    "packed_down: rows[R,H], pairs_by_token: ids[T,K], pair_weights?: weights[T,K] -> rows[T,H]"

The line gives every operand's name, kind and trailing axes. An operand whose name ends in `?` may be left out: None
stands in its place. All operands may have further leading (batch) axes, the same number of them, of equal sizes or of
size 1, which broadcasts. The public function checks its arguments against this line, once. The shapes, dtypes and
shardings of the results follow from it too. `KINDS` lists the kinds. `matrices` are rows for which a public function
also takes a `LayerOf` and `QuantizedMatrices`, and for `biases` a `LayerOf`. A result may also be a `product`: rows of
the dtype that the op's parameter `dtype` names.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .quantized import as_quantized, checked_quantized
from .settings import INT32_MAX, ROW_DTYPES
from .types import LayerOf, is_quantized


class Kind(NamedTuple):
    """Which dtypes an argument of this kind may have, as a test and in words, and to which dtype it is cast."""

    accepts: Callable[[Any], bool]
    dtypes: str
    used_in: str | None = None  # None: it is not cast
    alike: bool = False  # True: all operands of such kinds must have one dtype


def _is_row(dtype: Any) -> bool:
    return dtype.name in ROW_DTYPES


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _is_integer(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer)


KINDS = {
    "rows": Kind(_is_row, "be float16, bfloat16 or float32", alike=True),
    "matrices": Kind(_is_row, "be float16, bfloat16 or float32", alike=True),
    "biases": Kind(_is_row, "be float16, bfloat16 or float32", alike=True),
    "logits": Kind(_is_row, "be float16, bfloat16 or float32"),
    "weights": Kind(_is_float, "be floating point", "float32"),
    "ids": Kind(_is_integer, "hold integers", "int32"),
    "bytes": Kind(lambda dtype: dtype == jnp.uint8, "be uint8"),
    "scales": Kind(lambda dtype: _is_row(dtype) or dtype == jnp.uint8, "be uint8, float16, bfloat16 or float32"),
    "counts": Kind(_is_integer, "hold integers", "int32"),
}


class Term(NamedTuple):
    """One operand or result."""

    name: str
    kind: str
    axes: tuple[str, ...]
    optional: bool = False

    def __str__(self) -> str:
        return f"[{', '.join(('...', *self.axes))}]"


class Signature(NamedTuple):
    operands: tuple[Term, ...]
    results: tuple[Term, ...]

    @property
    def has_optional(self) -> bool:
        return any([term.optional for term in self.operands])

    def by_place(self, arrays: Sequence[Any], given: tuple[str, ...]) -> list[Any]:
        """One entry for each operand, in order: its array, or None for an optional one that `given` does not name."""
        rest = iter(arrays)
        return [next(rest) if not t.optional or t.name in given else None for t in self.operands]


@functools.cache
def parse(text: str) -> Signature:
    """Read a signature line, in the language that the top of this file explains."""

    def terms(side: str) -> tuple[Term, ...]:
        parts = re.findall(r"(?:(\w+)(\??): )?(\w+)\[([\w,]*)\]", side)
        return tuple(Term(name, kind, tuple(re.findall(r"\w+", axes)), mark == "?") for name, mark, kind, axes in parts)

    operands, _, results = text.partition("->")
    return Signature(terms(operands), terms(results))


# ---- checks


def checked(op: str, signature: Signature | str, *args: Any) -> list[Any]:
    """The arguments as arrays of their kinds' dtypes. An error says which one is wrong, and how."""
    terms = (parse(signature) if isinstance(signature, str) else signature).operands
    arrays: list[Any] = []
    alike: tuple[str, Any] | None = None  # the first operand of a kind that is alike, and its dtype
    axes: dict[str, tuple[int, str]] = {}  # an axis's size, and the name of the first operand that has it
    lead: tuple[int, ...] | None = None
    for term, arg in zip(terms, args, strict=True):
        if arg is None and term.optional:
            arrays.append(None)
            continue
        kind = KINDS[term.kind]
        array: Any
        if term.kind in ("matrices", "biases") and isinstance(arg, LayerOf):
            array = _checked_layer(op, term, arg)
            shape = (*[1] * len(lead or ()), *array.shape)  # it serves all slices of a batch
        elif term.kind == "matrices" and is_quantized(arg):
            array = checked_quantized(op, term.name, as_quantized(op, term.name, arg))
            shape = array.shape
        else:
            fits_as_it_is = isinstance(arg, jax.Array) and (
                arg.dtype == kind.used_in if kind.used_in else arg.dtype.name in ROW_DTYPES
            )
            array = arg if fits_as_it_is else _as_kind(op, term, kind, arg)
            shape = array.shape
        arrays.append(array)
        if kind.alike and not is_quantized(array):
            first, dtype = alike = alike or (term.name, array.dtype)
            if array.dtype != dtype:
                raise TypeError(f"{op}: {term.name} must have the dtype of {first}, {dtype}; got {array.dtype}")
        lead = _check_shape(op, term, shape, axes, lead)
    return arrays


def _checked_layer(op: str, term: Term, arg: LayerOf) -> LayerOf:
    """A LayerOf of arrays. An error names the field that is wrong."""
    stack = Term(f"{term.name}.stack", term.kind, ("L", *term.axes))
    layer, own = Term(f"{term.name}.layer", "ids", ()), Term(f"{term.name}.own", term.kind, term.axes, optional=True)
    own_array = None if is_quantized(arg) else arg.own  # what is quantised has no gradient
    parts = (stack, arg.stack), (own, own_array), (layer, arg.layer)
    for part, array in parts:
        if array is not None and np.ndim(array) != len(part.axes):
            raise ValueError(f"{op}: {part.name} must be [{', '.join(part.axes)}]; got shape {np.shape(array)}")
    arrays = checked(op, Signature((stack, own, layer), ()), *[array for _, array in parts])
    if not arrays[0].shape[0]:
        raise ValueError(f"{op}: {stack.name} must hold at least one layer, L >= 1; got shape {arrays[0].shape}")
    if names := jax.typeof(jax.tree.leaves(arrays[0])[0]).sharding.spec[0]:
        raise ValueError(
            f"{op}: {stack.name} must be whole along L on each device, which reads one layer of it; "
            f"the mesh divides it over {names!r}"
        )
    return LayerOf(arrays[0], arrays[2], arrays[1])


def _check_shape(
    op: str, term: Term, shape: tuple[int, ...], axes: dict[str, tuple[int, str]], lead: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Check one operand's shape against those before it. Add its axes to `axes`; return the broadcast leading axes."""
    leading = len(shape) - len(term.axes)
    if leading < 0:
        raise ValueError(f"{op}: {term.name} must be {term}, at least {len(term.axes)} axes; got shape {shape}")
    for axis, size in zip(term.axes, shape[leading:], strict=True):
        known, source = axes.setdefault(axis, (size, term.name))
        if size != known:
            raise ValueError(
                f"{op}: {term.name} must be {term} with {axis} = {known}, as in {source}; got shape {shape}"
            )
        # No id counts along H, the width of a row.
        if axis != "H" and isinstance(size, int) and size > INT32_MAX:
            raise ValueError(f"{op}: {term.name} has {size} entries along {axis}; int32 ids allow {INT32_MAX}")
    own = shape[:leading]
    together = own if lead is None or own == lead else broadcast(own, lead)
    if together is None:
        raise ValueError(
            f"{op}: {term.name} must be {term} with leading axes that match {lead}, those of what is "
            f"before it (equal sizes, or 1); got shape {shape}"
        )
    return together


def broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that both leading axes broadcast to; None if they do not match. Sizes may be symbolic."""
    if len(one) != len(other):
        return None
    pairs = list(zip(one, other, strict=True))
    if any([a != b and 1 not in (a, b) for a, b in pairs]):
        return None
    return tuple([b if a == 1 else a for a, b in pairs])


def _as_kind(op: str, term: Term, kind: Kind, arg: Any) -> jax.Array:
    """One argument as an array of its kind's dtype."""
    try:
        array = arg if isinstance(arg, jax.Array) else np.asarray(arg)
        narrow = {"ids": _narrow, "counts": _limit}.get(term.kind)
        if narrow and isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.integer):
            array = narrow(array, np)  # in NumPy, because JAX would cut 64 bits down to 32 first
        array = array if isinstance(array, jax.Array) else jnp.asarray(array)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{op}: {term.name} must be an array, {term}; got {type(arg).__name__}: {error}") from error
    if not kind.accepts(array.dtype):
        raise TypeError(f"{op}: {term.name} must {kind.dtypes}; got {array.dtype}")
    if narrow:
        return narrow(array, jnp)
    return array.astype(kind.used_in) if kind.used_in else array


def _narrow(ids: Any, xp: Any) -> Any:
    """Ids as int32. A value that int32 cannot hold becomes -1, which is no id: a plain cast would make it another id.

    xp: numpy or jax.numpy.
    """
    if ids.dtype == xp.int32 or ids.dtype.itemsize < 4:
        return ids.astype(xp.int32)
    fits = (ids >= 0) & (ids <= xp.asarray(INT32_MAX, ids.dtype))
    return xp.where(fits, ids.astype(xp.int32), xp.int32(-1))


def _limit(counts: Any, xp: Any) -> Any:
    """Counts as int32. A value that int32 cannot hold becomes the nearest one that it can."""
    info = jnp.iinfo(counts.dtype)
    return xp.clip(counts, max(info.min, -INT32_MAX), min(info.max, INT32_MAX)).astype(xp.int32)


def sizes_of(terms: Sequence[Term], arrays: Sequence[Any]) -> dict[str, Any]:
    """The sizes of all axes of checked operands, by name, and the broadcast leading axes, by the name "..."."""
    sizes: dict[str, Any] = {"...": ()}
    for term, array in zip(terms, arrays, strict=True):
        leading = len(array.shape) - len(term.axes)
        sizes.update(zip(term.axes, array.shape[leading:], strict=True))
        own, lead = array.shape[:leading], sizes["..."]
        sizes["..."] = own if not lead or own == lead else broadcast(own, lead)
    return sizes


def as_mask(op: str, token_mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """Check a mask of tokens, and return it as an array."""
    mask = jnp.asarray(token_mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{op}: token_mask must be bool; got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"{op}: token_mask must have shape {shape}, one entry a token; got {mask.shape}")
    return mask
