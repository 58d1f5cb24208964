"""The launcher of the Triton kernels, for both generations of jax-triton, and the GPU that they are compiled for.

For interpreted kernel files `interpret.py`, which offers the same names, takes the place of this module.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import jax

from ..targets import HOPPER, target_capability


def capability() -> int:
    """The compute capability that is compiled for, 90 for 9.0: Hopper's where no GPU is known."""
    return target_capability() or HOPPER


def launch(
    kernel: Any,
    *operands: Any,
    out: Sequence[tuple[tuple[int, ...], Any]],
    grid: int,
    num_warps: int,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Run `grid` programs of `kernel(*operands, *outputs, **constants)`.

    out: the outputs' shapes and dtypes. What the kernel does not write of them is uninitialised.
    constants: the kernel's `tl.constexpr` parameters by name, and options of Triton's compiler, such as `num_stages`.
    """
    if grid > 2**31 - 1:
        raise NotImplementedError(f"{kernel.__name__}: {grid} programs; a CUDA grid has at most {2**31 - 1}")
    import jax_triton

    shapes = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out)
    options: dict[str, Any] = {"out_shape": shapes}
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:  # jax-triton 0.4
        moved = sum(x.size * x.dtype.itemsize for x in (*operands, *shapes))
        options = {"out_type": shapes, "cost_estimate": {"bytes_accessed": moved}}
    return tuple(
        jax_triton.triton_call(
            *operands,
            kernel=kernel,
            name=f"ferrum_{kernel.__name__}",
            grid=(grid,),
            num_warps=num_warps,
            compute_capability=capability(),
            **options,
            **constants,
        )
    )
