"""The one launcher of the Triton kernels: both generations of jax-triton, the target GPU, and Triton's interpreter."""

import contextlib
import functools
import importlib
import inspect
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np

from .. import lead_axes as lead_axes
from .. import target_capability as target_capability


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
            compute_capability=target_capability() or 90,
            **options,
            **constants,
        )
    )


# ---- the interpreter: a second copy of Triton and of the kernel files, because Triton decides at import whether it
# interprets, and a process that does so cannot compile


@functools.cache
def interpreted(family: str) -> ModuleType:
    """A copy of a kernel file whose wrappers take and return NumPy arrays, and run in Triton's interpreter.

    Copies are modules of a package of their own, beside the one whose files they are read from.
    """
    name = f"{__name__}._interpreted"
    with _second_triton():
        if name not in sys.modules:
            package = sys.modules[name] = ModuleType(name)
            shared = {"lead_axes": lead_axes, "target_capability": target_capability}
            vars(package).update(__path__=__path__, launch=_interpret, **shared)
        module = importlib.import_module(f"{name}.{family}")
        for other in [m for n, m in sys.modules.items() if n.startswith(f"{name}.")]:
            vars(other).update(jnp=np)
        _patch_language_once()
        _round_to_nearest()
    return module


def _patch_language_once() -> None:
    """Triton's interpreter patches its language anew for every call of a helper, which takes milliseconds.

    The second copy of the language serves nothing but the interpreter, so it is patched once, for good.
    """
    interpreter, language = sys.modules["triton.runtime.interpreter"], sys.modules["triton.language"]
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return  # another generation of it: slower, and as right
    patch = interpreter._patch_lang
    vars(interpreter).update(_patch_lang=lambda function: interpreter._LangPatchScope())
    patch(types.SimpleNamespace(__globals__={"tl": language, "core": language.core}))


@functools.cache
def _round_to_nearest() -> None:
    """Triton's interpreter cuts a float32 off where it becomes bfloat16. A GPU rounds it to nearest, ties to even."""
    interpreter = sys.modules["triton.runtime.interpreter"]
    builder, language = interpreter.InterpreterBuilder, interpreter.tl
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (language.float32, language.bfloat16):
            return cast(self, source, dtype)
        return interpreter.TensorHandle(source.data.astype("bfloat16").view(np.uint16), dtype.scalar)

    builder.cast_impl = cast_impl


_second: dict[str, ModuleType] = {}
_importing, _interpreter = threading.Lock(), threading.Lock()


@contextlib.contextmanager
def _second_triton() -> Iterator[None]:
    """In here `import triton` finds the copy that interprets.

    The compiled library is common to both copies.
    """
    of_triton = lambda n: n.split(".")[0] == "triton" and not n.startswith("triton._C")  # noqa: E731

    def swap(modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
        taken = {name: sys.modules.pop(name) for name in list(sys.modules) if of_triton(name)}
        sys.modules.update(modules)
        return taken

    with _importing:
        flag, first = os.environ.get("TRITON_INTERPRET"), swap(_second)
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            yield
        finally:
            _second.update(swap(first))
            del os.environ["TRITON_INTERPRET"]
            os.environ.update({} if flag is None else {"TRITON_INTERPRET": flag})


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
