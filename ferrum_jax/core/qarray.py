"""Quantised matrices as other libraries hold them."""

import sys
from typing import Any

import jax.numpy as jnp
from jax import lax

from .quantized import QuantizedMatrices


def is_quantized(array: Any) -> bool:
    """Whether this is a `QuantizedMatrices`, or a `qwix.QArray`, which stands for the same."""
    return isinstance(array, QuantizedMatrices) or _is_qarray(array)


def _is_qarray(array: Any) -> bool:
    # Whoever has an array of qwix has imported it.
    qwix = sys.modules.get("qwix")
    return qwix is not None and isinstance(array, qwix.QArray)


def as_quantized(op: str, name: str, array: Any) -> QuantizedMatrices:
    """The same as a `QuantizedMatrices`, which a qwix.QArray is copied to: its numbers are stored transposed there."""
    if isinstance(array, QuantizedMatrices):
        return array
    numbers, scale, zero = array.qvalue, array.scale, array.zero_point
    kind = jnp.dtype(array.qtype).name if not isinstance(array.qtype, str) else array.qtype
    tiles = [size // count for size, count in zip(numbers.shape, scale.shape, strict=True)]
    refusal = None
    if kind not in ("int8", "int4", "float8_e4m3fn"):
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
