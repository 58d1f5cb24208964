"""Matrices of few bits: `QuantizedMatrices`, and what its numbers stand for.

A format says what a stored number is; the scales, and the zero points if there are any, say what it counts for. This
file holds the formats' arithmetic and the checks of what a caller hands over. `ops/quantize.py` rounds floats to them.
"""

import dataclasses
import json
import sys
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.sharding import AxisType, PartitionSpec

from ..kernels.shapes import ACTIVATION_BLOCK, FP8_MAX
from .settings import ROW_DTYPES, as_int, one_of
from .sharding import in_auto_mesh

_SMALLEST = 2.0**-126  # the smallest float32 that XLA does not take for 0
_BFLOAT16 = jnp.dtype("bfloat16")

Block = tuple[int | None, int | None]


class Format(NamedTuple):
    """bits of a number; zero: the number that stands for 0 without zero points, or None of floats; the usual block."""

    bits: int
    zero: int | None
    block: Block


FORMATS = {
    "fp8": Format(8, None, (128, 128)),
    "mxfp4": Format(4, None, (1, 32)),
    "int8": Format(8, 128, (1, 128)),
    "int4": Format(4, 8, (1, 128)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedMatrices:
    """Matrices [..., H, N] as a quantised checkpoint holds them: numbers of few bits, and scales.

    `moe_mlp`, `grouped_matmul`, `ragged_dot`, `parallel.moe_mlp`, `nnx.MoE` and `LayerOf` take it where matrices go.
    Its `shape` and `dtype` are those of the array that it stands for. An entry is (number - zero) * scale, computed in
    float32. Numbers and scales are constants: no gradient goes to them. `quantize` makes one, and `checkpoint.load_moe`
    reads one. It is a pytree; numbers, scales and zeros are its leaves.

    The matrices are stored transposed, one output after the other, so that the entries that a product adds up lie side
    by side. A block is a rectangle of entries that share a scale.

    values: uint8 [..., N, H], a number each; of formats of 4 bits [..., N, H/2], where a byte holds two numbers, the
      first in its lower half.
    scales: [..., B, C], one for each block: of N, and of H. float32, bfloat16 or float16; or uint8, which is e8m0: the
      scale 2^(scale - 127), and NaN for 255.
    zeros: None, or uint8 of the shape of the scales: the zero points of "int4" and "int8".
    format: "fp8", e4m3fn; "mxfp4", e2m1 with e8m0 scales; "int4" and "int8", unsigned numbers, of which without `zeros`
      8 and 128 stand for 0.
    block: the entries of a block along N and along H. None: all that there are. The last block may be short.
    parts: so many matrices stand side by side along N, each of them N / parts wide, and each begins a block. Gate and
      up are two.
    dtype: of the array that it stands for.
    published: how a checkpoint's files hold it, if it is from one: `checkpoint.to_layout` writes it so.

    The formats are those of https://arxiv.org/abs/2209.05433 (e4m3fn) and of the OCP Microscaling specification
    (e2m1, e8m0), https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.

    >>> import jax.numpy as jnp, ferrum_jax
    >>> w = ferrum_jax.quantize(jnp.arange(12.0).reshape(1, 4, 3), "int8", block=(1, 4))
    >>> w.shape, w.values.shape, w.scales.shape, w.dequantize().round().astype(int)[0, 1].tolist()
    ((1, 4, 3), (1, 3, 4), (1, 3, 1), [3, 4, 5])
    """

    values: Any
    scales: Any
    zeros: Any = None
    format: str = "fp8"
    block: Block = (128, 128)
    parts: int = 1
    dtype: Any = _BFLOAT16
    published: Any = None

    facts: ClassVar[tuple[str, ...]] = ("format", "block", "parts", "dtype", "published")

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, n, words = self.values.shape
        return *lead, words * (8 // FORMATS[self.format].bits), n

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """The bytes of all that is stored."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @classmethod
    def of(cls, array: Any) -> "QuantizedMatrices":
        """A `qwix.QArray` of int4, int8 or float8_e4m3fn, stored as it is here. Others are a NotImplementedError."""
        return as_quantized("QuantizedMatrices.of", "array", array)

    def astype(self, dtype: Any) -> Self:
        """The same numbers, standing for an array of this dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array [..., H, N] of this dtype, by default its own: float32 products, rounded once."""
        dtype = self.dtype if dtype is None else dtype

        def floats(values: jax.Array, scales: jax.Array, zeros: jax.Array | None) -> jax.Array:
            of_row = scale_rows(self.shape[-1], self.block[0], self.parts)
            scales, zeros = jax.tree.map(lambda x: jnp.take(x, of_row, axis=-2), (scales, zeros))
            return jnp.swapaxes(entries(self.format, self.block[1], values, scales, zeros), -1, -2).astype(dtype)

        leaves = jax.tree.map(jnp.asarray, (self.values, self.scales, self.zeros))
        sharding = jax.typeof(leaves[0]).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return floats(*leaves)
        *lead, n, h = sharding.spec
        return in_auto_mesh(floats, sharding.mesh, sharding.update(spec=PartitionSpec(*lead, h, n)))(*leaves)


def _written(facts: tuple[Any, ...]) -> bytes:
    named = dict(zip(QuantizedMatrices.facts, facts, strict=True))
    return json.dumps([*(named | {"dtype": jnp.dtype(named["dtype"]).name}).values()]).encode()


def _read(data: bytes) -> tuple[Any, ...]:
    def as_tuple(fact: Any) -> Any:
        return tuple(map(as_tuple, fact)) if isinstance(fact, list) else fact

    facts = dict(zip(QuantizedMatrices.facts, as_tuple(json.loads(data)), strict=True))
    return tuple((facts | {"dtype": jnp.dtype(facts["dtype"])}).values())


jax.tree_util.register_dataclass(QuantizedMatrices, ("values", "scales", "zeros"), QuantizedMatrices.facts)
export.register_pytree_node_serialization(
    QuantizedMatrices,
    serialized_name="ferrum_jax.QuantizedMatrices",
    serialize_auxdata=_written,
    deserialize_auxdata=_read,
)


def scale_rows(width: int, block: int | None, parts: int) -> np.ndarray:
    """Which row of the scales belongs to each of the N stored rows."""
    part = width // parts
    block = min(block or part, part) or 1
    each = np.arange(part, dtype=np.int32) // block
    return np.concatenate([each + i * -(-part // block) for i in range(parts)]).astype(np.int32)


def scale_shape(shape: tuple[int, ...], block: Block, parts: int) -> tuple[int, ...]:
    """The shape of the scales of matrices [..., H, N]."""
    *lead, entries_, width = shape
    rows, columns = block
    part = width // parts
    return *lead, parts * -(-part // (rows or part or 1)), -(-entries_ // (columns or entries_ or 1))


# ---- what the stored numbers stand for


def entries(form: str, block: int | None, values: Any, scales: Any, zeros: Any = None) -> jax.Array:
    """[..., n, H] float32: what these rows stand for. The scales and zeros [..., n, C] are those of each row."""
    bits, zero, _ = FORMATS[form]
    width = values.shape[-1] * (8 // bits)
    scales = lax.stop_gradient(scales)

    def over_blocks(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, block or width, axis=-1)[..., :width] if x.shape[-1] != width else x

    if bits == 4:
        nibble = jnp.arange(width, dtype=jnp.int32) % 2 == 1
        values = jnp.repeat(values, 2, axis=-1)
        values = jnp.where(nibble, values >> 4, values & 15)
    if form == "fp8":
        numbers = lax.bitcast_convert_type(values, jnp.float8_e4m3fn).astype(jnp.float32)
    elif form == "mxfp4":
        numbers = _e2m1(values)
    else:
        numbers = values.astype(jnp.float32) - (zero if zeros is None else over_blocks(zeros).astype(jnp.float32))
    if scales.dtype == jnp.uint8:
        return times_e8m0(numbers, over_blocks(scales))
    return numbers * over_blocks(scales).astype(jnp.float32)


def _e2m1(codes: jax.Array) -> jax.Array:
    """The numbers of these codes: sign, two bits of exponent, one of mantissa."""
    codes = codes.astype(jnp.int32)
    magnitude, half = codes & 7, (codes & 1) << 22
    exponent = (magnitude >> 1) + 126
    bits = jnp.where(magnitude > 1, (exponent << 23) | half, jnp.where(magnitude == 1, 126 << 23, 0))
    return lax.bitcast_convert_type(bits | ((codes & 8) << 28), jnp.float32)


def times_e8m0(x: jax.Array, scales: jax.Array) -> jax.Array:
    """x * 2^(scales - 127) in integers, because XLA for a CPU takes subnormal factors and products for 0.

    x is 0, NaN, or a normal number of few bits, so that no bit is lost in a subnormal product.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    sign, exponent = bits & jnp.int32(-(2**31)), (bits >> 23) & 255
    shifted = exponent + scales.astype(jnp.int32) - 127
    mantissa = bits & 0x7FFFFF
    normal = (shifted << 23) | mantissa
    subnormal = (mantissa | (1 << 23)) >> jnp.clip(1 - shifted, 0, 31)
    product = jnp.where(shifted > 254, 255 << 23, jnp.where(shifted > 0, normal, subnormal))
    product = jnp.where(exponent == 0, 0, product)
    product = jnp.where((exponent == 255) | (scales == 255), 0x7FC00000, product)
    return lax.bitcast_convert_type(sign | product, jnp.float32)


# ---- rounding


def to_fp8(x: jax.Array) -> jax.Array:
    """Rounded to nearest, ties to even; past the largest number to that; NaN stays."""
    return jnp.clip(x, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)


def rounded_rows(x: jax.Array) -> jax.Array:
    """Rows [..., H] as fp8 with a scale for each 128 entries holds them, in float32: scale = amax / 448, or 1 for 0.

    Divisions are products with reciprocals, as XLA makes them anyway, so that kernels can round the same.
    """
    width = x.shape[-1]
    x = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -width % ACTIVATION_BLOCK)])
    blocks = x.reshape(*x.shape[:-1], -1, ACTIVATION_BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    scales = jnp.where(amax == 0, 1, jnp.maximum(amax * jnp.float32(1 / FP8_MAX), _SMALLEST))
    # Without the barrier, XLA for a GPU takes the conversion and the one back for nothing.
    rounded = lax.optimization_barrier(to_fp8(blocks * (1 / scales))).astype(jnp.float32) * scales
    return rounded.reshape(x.shape)[..., :width]


# ---- checks


def checked_block(op: str, form: str, block: Any) -> Block:
    """A block that the format may have."""
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise ValueError(f"{op}: block must be two numbers of entries, along N and along H; got {block!r}")
    rows, columns = (None if size is None else as_int(op, "block", size) for size in block)
    if form != "fp8" and rows != 1:
        raise ValueError(f"{op}: block must be (1, entries along H) for {form!r}; got {block!r}")
    if form == "mxfp4" and columns != 32:
        raise ValueError(f"{op}: block must be (1, 32) for 'mxfp4'; got {block!r}")
    return rows, columns


def check_width(op: str, name: str, form: str, block: Block, shape: tuple[int, ...]) -> None:
    """Refuse an H that blocks or bytes do not divide."""
    width = shape[-2]
    if form != "fp8" and block[1] and width % block[1]:
        raise ValueError(
            f"{op}: {name} must have a multiple of {block[1]} entries along H, its groups; got shape {shape}"
        )
    if width % (8 // FORMATS[form].bits):
        raise ValueError(f"{op}: {name} must have an even H, two numbers in a byte; got shape {shape}")


def checked_quantized(op: str, name: str, w: QuantizedMatrices) -> QuantizedMatrices:
    """The same, of JAX arrays. An error names the field that is wrong."""
    one_of(op, f"{name}.format", w.format, tuple(FORMATS))
    w = jax.tree.map(jnp.asarray, w)
    values, scales, zeros = w.values, w.scales, w.zeros
    for field, x in (("values", values), ("zeros", zeros)):
        if x is not None and x.dtype != jnp.uint8:
            raise TypeError(f"{op}: {name}.{field} must be uint8; got {x.dtype}")
    zero = FORMATS[w.format].zero
    if scales.dtype.name not in (*ROW_DTYPES, "uint8") or (w.format == "mxfp4" and scales.dtype != jnp.uint8):
        kinds = "uint8" if w.format == "mxfp4" else "float16, bfloat16, float32 or uint8"
        raise TypeError(f"{op}: {name}.scales must be {kinds} for {w.format!r}; got {scales.dtype}")
    if zeros is not None and zero is None:
        raise ValueError(f"{op}: {name}.zeros must be None for {w.format!r}, whose numbers are floats")
    if values.ndim < 2:
        raise ValueError(f"{op}: {name}.values must be [..., N, H], at least 2 axes; got shape {values.shape}")
    w = dataclasses.replace(w, block=checked_block(f"{op}: {name}", w.format, w.block), dtype=jnp.dtype(w.dtype))
    check_width(op, name, w.format, w.block, w.shape)
    if w.shape[-1] % as_int(op, f"{name}.parts", w.parts):
        raise ValueError(f"{op}: {name}.parts must divide its {w.shape[-1]} columns; got {w.parts}")
    want = scale_shape(w.shape, w.block, w.parts)
    for field, x in (("scales", scales), ("zeros", zeros)):
        if x is not None and x.shape != want:
            raise ValueError(
                f"{op}: {name}.{field} must have shape {want}, one for each block {w.block}; got {x.shape}"
            )
    part = w.shape[-1] // w.parts
    # Where a part ends with a block, parts are no more than their columns: devices may divide these.
    return w if w.block[0] is None or part % w.block[0] else dataclasses.replace(w, parts=1)


# ---- arrays of qwix


def is_qarray(array: Any) -> bool:
    """Whether this is a `qwix.QArray`."""
    # Whoever has an array of qwix has imported it.
    qwix = sys.modules.get("qwix")
    return qwix is not None and isinstance(array, qwix.QArray)


def as_quantized(op: str, name: str, array: Any) -> QuantizedMatrices:
    """The same as a `QuantizedMatrices`, which a qwix.QArray is copied to: its numbers are stored transposed there."""
    if isinstance(array, QuantizedMatrices):
        return array
    if not is_qarray(array):
        raise TypeError(f"{op}: {name} must be QuantizedMatrices or a qwix.QArray; got {type(array).__name__}")
    numbers, scale, zero = array.qvalue, array.scale, array.zero_point
    kind = jnp.dtype(array.qtype).name if not isinstance(array.qtype, str) else array.qtype
    tiles = [size // count for size, count in zip(numbers.shape, scale.shape, strict=True)]
    refusal = None
    if array.ndim < 2 or (kind == "int4" and numbers.shape[-2] % 2):
        refusal = f"shape {array.shape}; two numbers of 4 bits share a byte along H"
    elif kind not in ("int8", "int4", "float8_e4m3fn"):
        refusal = f"qtype {kind}, which is none of int8, int4 and float8_e4m3fn"
    elif kind != "float8_e4m3fn" and tiles[-1] != 1:
        refusal = f"a scale for {tiles[-1]} columns together; integers have one for each column"
    elif zero is not None and zero.shape != scale.shape:
        refusal = f"zero points of shape {zero.shape} beside scales of shape {scale.shape}"
    if refusal:
        raise NotImplementedError(f"{op}: {name} is a qwix.QArray with {refusal}")
    lead = numbers.shape[:-2]
    scale, zero = (
        None if x is None else jnp.swapaxes(jnp.broadcast_to(x, (*lead, *x.shape[-2:])), -1, -2) for x in (scale, zero)
    )
    numbers, block = jnp.swapaxes(numbers, -1, -2), (tiles[-1], tiles[-2])
    if kind == "float8_e4m3fn":
        values = lax.bitcast_convert_type(numbers.astype(jnp.float8_e4m3fn), jnp.uint8)
        return QuantizedMatrices(values, scale, None, "fp8", block, 1, array.dtype)
    middle = 8 if kind == "int4" else 128
    values = (numbers.astype(jnp.int32) + middle).astype(jnp.uint8)
    if kind == "int4":
        values = values[..., ::2] | (values[..., 1::2] << 4)
    zeros = None if zero is None else (zero.astype(jnp.int32) + middle).astype(jnp.uint8)
    return QuantizedMatrices(values, scale, zeros, kind, block, 1, array.dtype)
