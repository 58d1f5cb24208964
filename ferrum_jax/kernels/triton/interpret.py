"""Triton's interpreter: the kernel files once more, with a launcher that runs their kernels on the CPU.

A second copy of Triton interprets, and a second copy of each kernel file imports that copy: see `second.py`. In the
copies this module takes the place of `launch.py`. So JAX traces the wrappers as on a GPU, and each launch is one
callback into the interpreter.
"""

import functools
import importlib
import pathlib
import sys
import threading
import types
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..targets import HOPPER
from . import second

_importing = threading.Lock()
_interpreter = threading.Lock()  # Triton keeps the program's number in a global, and JAX calls from a thread per device


@functools.cache
def interpreted(file: str) -> ModuleType:
    """A copy of a kernel file whose wrappers take and return JAX arrays, and run in Triton's interpreter."""
    # The copies are a package beside this one: so `from ..shapes import lead_axes` means the same in both.
    name = f"{__name__.rpartition('.triton.')[0]}.triton_interpreted"
    folder = str(pathlib.Path(__file__).parent)
    second.package(name, [folder], launch=sys.modules[__name__])
    with _importing:
        module = importlib.import_module(f"{name}.{file}")
        _patch_language_once(f"{name}.triton")
        _patch_conversions(f"{name}.triton")
    return module


# ---- the launcher


def capability() -> int:
    """Hopper's, whatever devices there are: interpreted kernels take the tiles that they take where no GPU is known."""
    return HOPPER


def launch(
    kernel: Any,
    *operands: jax.Array,
    out: Sequence[tuple[tuple[int, ...], Any]],
    grid: int,
    num_warps: int,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """As `launch.launch`, but interpreted. What a kernel does not write is filled with values that no test expects."""
    shapes = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out)

    def run(*operands: Any) -> tuple[np.ndarray, ...]:
        outputs = [np.full(s.shape, _poison(s.dtype), s.dtype) for s in shapes]
        tensors = [_Tensor(np.require(x, requirements="C")) for x in operands]
        with _interpreter:
            kernel[(grid,)](*tensors, *map(_Tensor, outputs), num_warps=num_warps, **constants)
        return tuple(outputs)

    return tuple(jax.pure_callback(run, shapes, *operands))


def _poison(dtype: Any) -> float:
    return {"i": -0x5A5A5A5B, "u": 0x5A}.get(np.dtype(dtype).kind, np.nan)


class _Tensor:
    """A NumPy array with the attributes of a torch tensor that Triton's interpreter uses."""

    _names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "uint8": "u8"}  # noqa: RUF012

    def __init__(self, array: np.ndarray):
        self.array, self.dtype = array, self._names[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def _itself(self, *_: Any, **__: Any) -> "_Tensor":
        return self

    untyped_storage: Callable[..., Any] = _itself
    cpu = new_empty = set_ = copy_ = storage_offset = size = stride = _itself


# ---- what the interpreter does slowly or wrong


def _patch_language_once(triton: str) -> None:
    """Patch the copy's `triton.language` for interpretation once, for good.

    Triton's interpreter patches it anew for every call of a helper, which takes milliseconds. The copy of the language
    is used by nothing but the interpreter.
    """
    interpreter, language = sys.modules[f"{triton}.runtime.interpreter"], sys.modules[f"{triton}.language"]
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return  # another version of Triton: slower, and as right
    patch = interpreter._patch_lang
    vars(interpreter).update(_patch_lang=lambda function: interpreter._LangPatchScope())
    patch(types.SimpleNamespace(__globals__={"tl": language, "core": language.core}))


def _patch_conversions(triton: str) -> None:
    """Round float32 to the nearest bfloat16 or fp8, as GPUs do.

    Triton's interpreter cuts the last bits off or loses a carry, and converts subnormals wrongly.
    """
    interpreter = sys.modules[f"{triton}.runtime.interpreter"]
    convert = getattr(interpreter, "_convert_float", None)
    if convert is None or convert.__module__ == __name__:
        return  # another version of Triton, or patched before
    kinds: dict[str, Any] = {"fp32": np.float32, "bf16": jnp.bfloat16, "fp8e4nv": jnp.float8_e4m3fn}
    bits = {"fp32": np.float32, "bf16": np.uint16, "fp8e4nv": np.uint8}  # how the interpreter holds them

    def nearest(data: np.ndarray, given: Any, wanted: Any, *rounding: Any) -> np.ndarray:
        if {given.name, wanted.name} <= kinds.keys():
            return data.view(kinds[given.name]).astype(kinds[wanted.name]).view(bits[wanted.name])
        return convert(data, given, wanted, *rounding)

    vars(interpreter).update(_convert_float=nearest)
