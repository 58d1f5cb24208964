"""The one launcher of the Triton kernels: both generations of jax-triton, the target GPU, and Triton's interpreter."""

import functools
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import lead_axes as lead_axes
from .. import target_capability
from . import second


def capability() -> int:
    """The compute capability that is compiled for: Hopper's where nothing names another."""
    return target_capability() or 90


def launch(
    kernel: Any,
    *operands: Any,
    out: Sequence[tuple[tuple[int, ...], Any]],
    grid: int,
    num_warps: int,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Run `grid` programs of `kernel(*operands, *outputs, **constants)`.

    `out` holds the outputs' shapes and dtypes. What the kernel does not write of them is garbage.
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


# ---- the interpreter, in a second copy of Triton and of the kernel files


@functools.cache
def interpreted(family: str) -> ModuleType:
    """A copy of a kernel file whose wrappers take and return NumPy arrays, and run in Triton's interpreter."""
    own = {"launch": _interpret, "lead_axes": lead_axes, "capability": capability}
    name = second.package(f"{__name__}._interpreted", __path__, **own).__name__
    with _importing:
        module = importlib.import_module(f"{name}.{family}")
        for other in (m for n, m in list(sys.modules.items()) if n.startswith(f"{name}.") and "jnp" in vars(m)):
            vars(other).update(jnp=np)
        _patch_language_once(f"{name}.triton")
        _patch_bfloat16(f"{name}.triton")
    return module


def _patch_language_once(triton: str) -> None:
    """Triton's interpreter patches its language anew for every call of a helper, which takes milliseconds.

    The second copy of the language serves nothing but the interpreter, so it is patched once, for good.
    """
    interpreter, language = sys.modules[f"{triton}.runtime.interpreter"], sys.modules[f"{triton}.language"]
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return  # another generation of it: slower, and as right
    patch = interpreter._patch_lang
    vars(interpreter).update(_patch_lang=lambda function: interpreter._LangPatchScope())
    patch(types.SimpleNamespace(__globals__={"tl": language, "core": language.core}))


def _patch_bfloat16(triton: str) -> None:
    """GPUs round float32 to the nearest bfloat16. Triton's interpreter cuts it off, and takes subnormals wrong."""
    interpreter = sys.modules[f"{triton}.runtime.interpreter"]
    convert = getattr(interpreter, "_convert_float", None)
    if convert is None or convert.__module__ == __name__:
        return  # another generation of it, or done before

    def nearest(data: np.ndarray, given: Any, wanted: Any, *rounding: Any) -> np.ndarray:
        if (given.name, wanted.name) == ("fp32", "bf16"):
            return data.astype(jnp.bfloat16).view(np.uint16)
        if (given.name, wanted.name) == ("bf16", "fp32"):
            return data.view(jnp.bfloat16).astype(np.float32)
        return convert(data, given, wanted, *rounding)

    vars(interpreter).update(_convert_float=nearest)


_importing, _interpreter = threading.Lock(), threading.Lock()


def _interpret(
    kernel: Any,
    *operands: Any,
    out: Sequence[tuple[tuple[int, ...], Any]],
    grid: int,
    num_warps: int,
    **constants: Any,
) -> tuple[np.ndarray, ...]:
    """`launch`, interpreted. What a kernel leaves unwritten shows: outputs are poisoned first."""
    outputs = [np.full(shape, _poison(dtype), dtype) for shape, dtype in out]
    tensors = [_Tensor(np.require(x, requirements="C")) for x in operands]
    with _interpreter:  # which keeps the program's number in a global, and JAX calls from a thread per device
        kernel[(grid,)](*tensors, *map(_Tensor, outputs), num_warps=num_warps, **constants)
    return tuple(outputs)


def _poison(dtype: Any) -> float:
    return -0x5A5A5A5B if np.dtype(dtype).kind == "i" else np.nan


class _Tensor:
    """As much of a torch tensor as the interpreter asks for, over the memory of a NumPy array."""

    _names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}  # noqa: RUF012

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, self._names[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def _itself(self, *_: Any, **__: Any) -> "_Tensor":
        return self

    untyped_storage: Callable[..., Any] = _itself
    cpu = new_empty = set_ = copy_ = storage_offset = size = stride = _itself
