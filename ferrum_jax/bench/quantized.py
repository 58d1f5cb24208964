"""The layer with quantised matrices, beside the same layer that first turns them into floats."""

from collections.abc import Callable
from typing import Any

import jax

import ferrum_jax

from ..core.quantized import rounded_rows
from . import today

# By the name of a workload: the matrices' format, and the dtype that rows are rounded to.
KINDS = {"fp8": ("fp8", None), "fp8_rows": ("fp8", "float8_e4m3fn"), "int4": ("int4", None), "mxfp4": ("mxfp4", None)}


def workloads(layer: Any) -> dict[str, Any]:
    """The layer's workload with matrices of each kind."""
    return {f"moe_mlp.{name}": _workload(layer, *kind) for name, kind in KINDS.items()}


def _workload(layer: Any, form: str, activations: str | None) -> Any:
    def inputs(key: Any, s: Any) -> tuple[Any, ...]:
        x, logits, *matrices = layer.inputs(key, s)
        return x, logits, *(_quantised(w, form, parts) for w, parts in zip(matrices, (2, 1), strict=True))

    def ours(s: Any, name: str | None) -> Callable[..., Any]:
        def run(*args: Any) -> jax.Array:
            return ferrum_jax.moe_mlp(*args, top_k=s.K, activations=activations, implementation=name)

        return run

    def product(rows: jax.Array, matrices: Any, sizes: jax.Array) -> jax.Array:
        dtype = rows.dtype
        rows = rounded_rows(rows).astype(dtype) if activations else rows
        return ferrum_jax.ragged_dot(rows, matrices.dequantize(dtype), sizes)

    def read(s: Any) -> float:
        _, _, *matrices = jax.eval_shape(lambda key: inputs(key, s), jax.random.key(0))
        return 2 * s.T * s.H * s.item + sum(w.nbytes for w in matrices) * s.used / s.E

    def dequantised(s: Any) -> dict[str, Callable[..., Any]]:
        return {"dequantise first": lambda *args: today.ragged_layer(*args, top_k=s.K, product=product)}

    return layer._replace(inputs=inputs, ours=ours, rivals=dequantised, bytes=read)


def _quantised(w: jax.Array, form: str, parts: int) -> ferrum_jax.QuantizedMatrices:
    block = (1, 128 if w.shape[-2] % 128 == 0 else 32) if form == "int4" else None
    return jax.jit(lambda w: ferrum_jax.quantize(w, form, block=block, parts=parts))(w)
