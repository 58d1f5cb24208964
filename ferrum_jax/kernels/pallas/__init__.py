"""The one launcher of the Pallas kernels, on Mosaic GPU: lanes and padding, the target GPU, and JAX's interpreter."""

import contextlib
import functools
import importlib
import io
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import lead_axes as lead_axes

NEEDS_JAX = (0, 11, 2)
WGMMA = ("grouped",)  # the files whose kernels are for compute capability 9.0 and no other
THREADS = 128  # a warpgroup, which is what a block of these kernels is


def refuse(capability: int | None, interpreting: bool, family: str) -> str | None:
    """Why no Pallas kernel of this file can be used, whichever it is, on a GPU of this compute capability."""
    if jax.__version_info__ < NEEDS_JAX:
        return f"it needs jax >= {'.'.join(map(str, NEEDS_JAX))}; this is jax {jax.__version__}"
    if interpreting:
        return None
    if capability is None:
        return "no target GPU is known: there is none here, and no abstract mesh names one (AbstractDevice.device_kind)"
    if capability < 90:
        return f"it needs a Hopper GPU or a newer one; the target's compute capability is {capability / 10}"
    if family in WGMMA and capability != 90:
        return f"it needs wgmma, of Hopper GPUs alone; the target's compute capability is {capability / 10}"
    return None


def launch(
    kernel: Callable[..., None],
    *operands: jax.Array | None,
    out: Sequence[tuple[tuple[int, ...], Any]],
    grid: int,
    warpgroups: int = 1,
    scratch: Sequence[Any] = (),
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Run `grid` blocks of `kernel(*operands, *outputs, *scratch, **constants)`; their axis is "program".

    `out` holds the outputs' shapes and dtypes. What the kernel does not write of them is garbage. An operand that is
    None is None in the kernel. Of a block's warpgroups, if several, the axis is "warpgroup". Before and after a copy
    between global and shared memory the threads of a warpgroup wait for each other, if there is `scratch`.
    """
    if grid > 2**31 - 1:
        raise NotImplementedError(f"{kernel.__name__}: {grid} blocks; a CUDA grid has at most {2**31 - 1}")
    from jax.experimental.pallas import mosaic_gpu as plgpu

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
        scratch_types=tuple(scratch),
        **({"num_threads": warpgroups, "thread_name": "warpgroup"} if warpgroups > 1 else {}),
        compiler_params=plgpu.CompilerParams(
            # Where every array's type says whether it is signed. Under Lane semantics a constant does not.
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            unsafe_no_auto_barriers=not scratch,  # without it no kernel here reads what it has written
        ),
    )(*(x for x in operands if x is not None))


def vector(width: int, itemsize: int) -> int:
    """How many neighbours of a row of `width` a thread holds: 16 bytes of them, or fewer where that needs padding."""
    most, lanes = 16 // itemsize, -(-width // THREADS)
    if width % THREADS:
        return min(most, 1 << (lanes - 1).bit_length())
    return min(most, lanes & -lanes)


def pad(x: jax.Array, width: int, value: float = 0) -> jax.Array:
    """`x` with its last axis filled up to `width`."""
    extra = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)], constant_values=value) if extra else x


def put(ref: Any, value: jax.Array) -> None:
    """To where no layout of `value` is fast, nor need be, which JAX 0.12 wants said."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def split(n: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """(n // by, n % by) of an n that is not negative, without the code for one that is."""
    return lax.div(n, jnp.int32(by)), lax.rem(n, jnp.int32(by))


def loop(times: Any, step: Callable[..., Any], state: Any) -> Any:
    """step(k, state) for k in [0, times), an int32 whatever the default integer is."""
    return lax.fori_loop(np.int32(0), np.int32(times) if isinstance(times, int) else times, step, state)


# ---- the interpreter


def interpreted(family: str) -> Any:
    """A kernel file's wrappers, of arrays on the CPU, run by the interpreter that comes with JAX.

    They raise on a race between warpgroups of a block, and on a read out of bounds; what is read unwritten is NaN.
    Blocks run in turn, so that races between them are not seen.
    """
    module = importlib.import_module(f"{__name__}.{family}")
    return SimpleNamespace(
        **{name: functools.partial(_interpret, f) for name, f in vars(module).items() if callable(f)}
    )


_interpreter = threading.Lock()  # it has one state, and JAX calls from a thread per device


def _interpret(wrapper: Callable[..., Any], *operands: Any, **params: Any) -> tuple[np.ndarray, ...]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    checks = plgpu.InterpretGPUParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    with _interpreter, _races_raise(), plgpu.force_gpu_interpret_mode(checks):
        return tuple(np.asarray(x) for x in wrapper(*operands, **params))


@contextlib.contextmanager
def _races_raise() -> Iterator[None]:
    """JAX 0.12 raises on a race; JAX 0.11 prints it, and goes on."""
    printed = _Tee(sys.stdout)
    with contextlib.redirect_stdout(printed):
        yield
    if "RACE DETECTED" in printed.getvalue():
        raise RuntimeError(f"{printed.getvalue()}")


class _Tee(io.StringIO):
    def __init__(self, stream: Any):
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        return super().write(text)
