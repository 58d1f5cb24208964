"""`quantize`: it rounds matrices to few bits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from ..core.quantized import (
    FORMATS,
    FP8_MAX,
    Block,
    QuantizedMatrices,
    check_width,
    checked_block,
    scale_rows,
    to_fp8,
)
from ..core.settings import ROW_DTYPES, as_bool, as_int, one_of
from ..core.sharding import in_auto_mesh


def quantize(
    w: jax.Array,
    format: str,
    *,
    block: Block | None = None,
    parts: int = 1,
    zero_points: bool = False,
    scale_dtype: Any = None,
) -> QuantizedMatrices:
    """Round matrices to few bits.

    Each block's scale is such that its largest entry is the format's largest number: "fp8": amax / 448, where amax is
    the largest magnitude; "int8" and "int4": amax / 127 and amax / 7, so that no number is cut off; with zero points
    (max - min) / 255 and / 15, where 0 counts too, and the zero point is -min / scale, rounded. "mxfp4", as its
    specification says: 2^(floor(log2(amax)) - 2), so that what is past 6 times the scale is cut off. A block of zeros
    has the scale 1. The scale is first rounded to a normal number of its dtype. Then each entry / scale is rounded to
    the nearest number of the format, ties to even. A NaN makes its whole block NaN.

    Args:
      w: [..., H, N] float16, bfloat16 or float32.
      format: "fp8", "mxfp4", "int8" or "int4".
      block: the entries of a block along N and along H; None in a place: all. Default: (128, 128) for "fp8", (1, 32)
        for "mxfp4", which has no other, (1, 128) for integers. Blocks of "fp8" may be short at the end; those of other
        formats must divide H.
      parts: how many matrices stand side by side along N, each of which begins a block: 2 for gate and up.
      zero_points: of "int8" and "int4".
      scale_dtype: float32, bfloat16 or float16. Default: bfloat16 for integers if w is bfloat16, else float32. "mxfp4"
        has e8m0.

    Returns:
      A `QuantizedMatrices`. No gradient goes to w.

    Raises:
      TypeError: w of another dtype, a `scale_dtype` that is none of the three, sizes that are no ints.
      ValueError: an unknown format; w with fewer than two axes; a block that does not fit it, or w; parts that do not
        divide N; an odd H with 4 bits; zero points or a `scale_dtype` where the format has none.

    >>> import jax.numpy as jnp
    >>> quantize(jnp.array([[[0.5, -6.0], [3.2, 0.1]]] * 16).reshape(1, 32, 2), "mxfp4").dequantize()[0, :2].tolist()
    [[0.5, -6.0], [3.0, 0.0]]
    """
    op = "quantize"
    w = lax.stop_gradient(jnp.asarray(w))
    block, scale_dtype = _checked_choice(op, w, format, block, parts, zero_points, scale_dtype)
    run = functools.partial(
        _rounded, format=format, block=block, parts=parts, zero_points=zero_points, dtype=scale_dtype
    )
    sharding = jax.typeof(w).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        *lead, h, n = sharding.spec
        as_w, whole = (sharding.update(spec=PartitionSpec(*lead, *names)) for names in ((n, h), (None, None)))
        run = in_auto_mesh(run, sharding.mesh, (as_w, whole, whole if zero_points else None))
    values, scales, zeros = run(w)
    return QuantizedMatrices(values, scales, zeros, format, block, parts, w.dtype)


def _rounded(
    w: jax.Array, format: str, block: Block, parts: int, zero_points: bool, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The values, scales and zeros of `quantize`."""
    x = jnp.swapaxes(w, -1, -2).astype(jnp.float32)
    blocks = _in_blocks(x, block, parts)
    low, high = jnp.min(blocks, (-3, -1), initial=0), jnp.max(blocks, (-3, -1), initial=0)
    scales, zeros = _scales(format, low, high, zero_points, dtype)
    of_row = scale_rows(x.shape[-2], block[0], parts)
    per_row = [None if a is None else jnp.take(a, of_row, axis=-2) for a in (scales, zeros)]
    per_entry = [
        None if a is None else jnp.repeat(a, block[1] or x.shape[-1], axis=-1)[..., : x.shape[-1]] for a in per_row
    ]
    values = _numbers(format, x, *per_entry)
    if FORMATS[format].bits == 4:
        values = values[..., ::2] | (values[..., 1::2] << 4)
    return values, scales, zeros


def _checked_choice(
    op: str, w: jax.Array, form: Any, block: Any, parts: Any, zero_points: Any, scale_dtype: Any
) -> tuple[Block, Any]:
    """The block and the scales' dtype that `quantize` uses for these arguments."""
    if w.dtype.name not in ROW_DTYPES:
        raise TypeError(f"{op}: w must be float16, bfloat16 or float32; got {w.dtype}")
    if w.ndim < 2:
        raise ValueError(f"{op}: w must be [..., H, N], at least 2 axes; got shape {w.shape}")
    one_of(op, "format", form, tuple(FORMATS))
    integers = form in ("int8", "int4")
    if as_bool(op, "zero_points", zero_points) and not integers:
        raise ValueError(f"{op}: zero_points must be False for {form!r}")
    if form == "mxfp4" and scale_dtype is not None:
        raise ValueError(f"{op}: scale_dtype must be None for 'mxfp4', whose scales are e8m0; got {scale_dtype}")
    scale_dtype = jnp.dtype(scale_dtype or ("bfloat16" if integers and w.dtype == jnp.bfloat16 else "float32"))
    if scale_dtype.name not in ROW_DTYPES:
        raise TypeError(f"{op}: scale_dtype must be float16, bfloat16 or float32; got {scale_dtype}")
    block = checked_block(op, form, FORMATS[form].block if block is None else block)
    if w.shape[-1] % as_int(op, "parts", parts):
        raise ValueError(f"{op}: parts must divide the {w.shape[-1]} columns of w; got {parts}")
    check_width(op, "w", form, block, w.shape)
    return block, scale_dtype


def _in_blocks(x: jax.Array, block: Block, parts: int) -> jax.Array:
    """[..., N, H] as [..., B, rows, C, columns], filled up with zeros."""
    *lead, n, width = x.shape
    part = n // parts
    rows, columns = block[0] or part or 1, block[1] or width or 1
    x = x.reshape(*lead, parts, part, width)
    more = [(0, -part % rows), (0, -width % columns)]
    x = jnp.pad(x, [(0, 0)] * (len(lead) + 1) + more)
    return x.reshape(*lead, parts * (x.shape[-2] // rows), rows, x.shape[-1] // columns, columns)


def _scales(form: str, low: jax.Array, high: jax.Array, zero_points: bool, dtype: Any) -> tuple[jax.Array, Any]:
    """The scale of each block whose smallest and largest entries, or 0, these are; and the zero points."""
    amax = jnp.maximum(-low, high)
    if form == "mxfp4":
        exponent = (lax.bitcast_convert_type(amax, jnp.int32) >> 23) & 255
        scales = jnp.where(amax == 0, 127, jnp.where(exponent == 255, 255, jnp.maximum(exponent - 2, 0)))
        return scales.astype(jnp.uint8), None
    largest = 2 ** FORMATS[form].bits - 1
    if zero_points:
        scales = _as_scale(high / largest - low / largest, dtype)
        zeros = jnp.clip(jnp.round(-low / scales.astype(jnp.float32)), 0, largest).astype(jnp.uint8)
        return scales, zeros
    return _as_scale(amax / (FP8_MAX if form == "fp8" else largest // 2), dtype), None


def _as_scale(exact: jax.Array, dtype: Any) -> jax.Array:
    """1 for a block of zeros; else rounded to a normal number of the dtype, so that it is neither 0 nor infinite."""
    info = jnp.finfo(dtype)
    scales = jnp.clip(exact, float(info.tiny), float(info.max)).astype(dtype)  # NaN stays
    return jnp.where(exact == 0, jnp.ones_like(scales), scales)


def _numbers(form: str, x: jax.Array, scales: Any, zeros: Any) -> jax.Array:
    """The numbers, a byte each, nearest to x / scales."""
    if form == "fp8":
        return lax.bitcast_convert_type(to_fp8(x / scales.astype(jnp.float32)), jnp.uint8)
    if form == "mxfp4":
        # The inverse of the scale is a normal float32, since no block of float32 has a scale above 2^125.
        x *= lax.bitcast_convert_type(jnp.clip(254 - scales.astype(jnp.int32), 1, 254) << 23, jnp.float32)
        size = jnp.abs(x)
        # The steps between numbers are a half below 2, one below 4, and two from there on.
        steps = jnp.where(
            size < 2, jnp.round(2 * size), jnp.where(size < 4, jnp.round(size) + 2, jnp.round(size / 2) + 4)
        )
        return jnp.minimum(steps, 7).astype(jnp.uint8) | (jnp.signbit(x).astype(jnp.uint8) << 3)
    bits, zero, _ = FORMATS[form]
    zero = zero if zeros is None else zeros.astype(jnp.float32)
    numbers = jnp.round(x / scales.astype(jnp.float32)) + jnp.asarray(zero, jnp.float32)
    return jnp.nan_to_num(jnp.clip(numbers, 0, 2**bits - 1)).astype(jnp.uint8)
