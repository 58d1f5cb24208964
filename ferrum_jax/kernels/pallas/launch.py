"""The launcher of the Pallas kernels on Mosaic GPU, and the small steps that all of them share."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import lead_axes as lead_axes
from .tiles import SWIZZLE

THREADS = 128  # of a warpgroup, which is what Mosaic calls a thread


def launch(
    kernel: Callable[..., None],
    *operands: jax.Array | None,
    out: Sequence[tuple[tuple[int, ...], Any]],
    grid: int,
    warpgroups: int = 1,
    scratch: Sequence[Any] = (),
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Run `grid` blocks of `kernel(*operands, *outputs, *scratch, **constants)`.

    `out` holds the shapes and dtypes of the outputs; what the kernel does not write of them is garbage. An operand that
    is None is None in the kernel. The axis of the blocks is "program". With several warpgroups a block, their axis is
    "warpgroup". With `scratch`, the threads of a warpgroup wait for each other before and after each copy between
    global and shared memory.
    """
    if grid > 2**31 - 1:
        raise NotImplementedError(f"{kernel.__name__}: {grid} blocks; a CUDA grid has at most {2**31 - 1}")
    given = [x is not None for x in operands]

    def body(*refs: Any) -> None:
        rest = iter(refs)
        kernel(*(next(rest) if here else None for here in given), *rest, **constants)

    body.__name__ = f"ferrum_{kernel.__name__}"
    return plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out),
        grid=(grid,),
        grid_names=("program",),
        num_threads=warpgroups if warpgroups > 1 else None,
        thread_name="warpgroup" if warpgroups > 1 else None,
        scratch_types=tuple(scratch),
        compiler_params=plgpu.CompilerParams(
            # Under these semantics the type of every array says whether it is signed. Under Lane semantics the type of
            # a constant does not.
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=not scratch,  # a kernel without scratch reads nothing that it has written
        ),
    )(*(x for x in operands if x is not None))


def vector(width: int, itemsize: int) -> int:
    """How many neighbours of a row of `width` elements a thread holds.

    That is 16 bytes of them, or fewer if 16 bytes a thread would pad the row by more.
    """
    most, lanes = 16 // itemsize, -(-width // THREADS)
    if width % THREADS:
        return min(most, 1 << (lanes - 1).bit_length())
    return min(most, lanes & -lanes)


def pad(x: jax.Array, width: int, value: float = 0) -> jax.Array:
    """`x` with its last axis filled up to `width`."""
    extra = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)], constant_values=value) if extra else x


def put(ref: Any, value: jax.Array) -> None:
    """Store a value whose layout allows no fast store. JAX 0.12 and later want to be told so. For small values only."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def split(n: jax.Array, by: Any) -> tuple[jax.Array, jax.Array]:
    """(n // by, n % by) for n >= 0, without the instructions that a negative n would need."""
    return lax.div(n, jnp.int32(by)), lax.rem(n, jnp.int32(by))


def loop(times: Any, step: Callable[..., Any], state: Any) -> Any:
    """Apply state = step(k, state) for each k in [0, times). k is an int32, whatever JAX's default integer is."""
    return lax.fori_loop(np.int32(0), np.int32(times) if isinstance(times, int) else times, step, state)


def for_each(times: Any, body: Callable[[Any], None]) -> None:
    """Call body(k) for each k in [0, times)."""

    def step(k: Any, state: tuple[()]) -> tuple[()]:
        body(k)
        return state

    loop(times, step, ())


def tiled(dtype: Any) -> tuple[Any, Any]:
    """Shared memory as wgmma and TMA want it: lines of 128 bytes, eight of them swizzled against each other."""
    lines = plgpu.TilingTransform((8, SWIZZLE // dtype.itemsize))  # pyright: ignore[reportAbstractUsage]
    return lines, plgpu.SwizzleTransform(SWIZZLE)  # pyright: ignore[reportAbstractUsage]


def store_row(row: Any, out: Any, index: Any, column: Any) -> None:
    """Copy a row from shared memory to out[index, column:].

    Mosaic copies a piece that is contiguous in memory by addresses, without a look at the array's shape: past the row's
    end the copy would run on into the next row. So the row is cut into pieces whose width divides that of `out`.
    """
    width = math.gcd(row.shape[1], out.shape[1])
    for start in range(0, row.shape[1], width):
        to = pl.multiple_of(column + start, width)

        @pl.when(to < out.shape[1])
        def store_piece(start: int = start, to: Any = to) -> None:
            plgpu.copy_smem_to_gmem(row.at[:, pl.ds(start, width)], out.at[pl.ds(index, 1), pl.ds(to, width)])
