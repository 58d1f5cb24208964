"""The interpreter that comes with JAX: it runs the Pallas kernels on a CPU, and checks what they do with memory."""

import contextlib
import functools
import importlib
import inspect
import io
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np


def interpreted(family: str) -> Any:
    """The wrappers of a family of kernels, to be called with NumPy arrays and run by the interpreter.

    They raise on a race between the warpgroups of a block and on a read out of bounds. Memory that was never written
    reads as NaN. The interpreter runs one block after the other, so it sees no race between blocks.
    """
    module = importlib.import_module(f"{__package__}.{family}")
    own = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    return SimpleNamespace(**{name: functools.partial(interpret, f) for name, f in own.items()})


# The interpreter has one global state, and JAX calls it from a thread for each device.
_lock = threading.Lock()


def interpret(wrapper: Callable[..., Any], *operands: Any, **params: Any) -> tuple[np.ndarray, ...]:
    """Call a wrapper and run its kernels in the interpreter."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    checks = plgpu.InterpretGPUParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    with _lock, _races_raise(), plgpu.force_gpu_interpret_mode(checks):
        return tuple(np.asarray(x) for x in wrapper(*operands, **params))


@contextlib.contextmanager
def _races_raise() -> Iterator[None]:
    """Raise on a race. JAX 0.12 raises by itself; JAX 0.11 only prints a message."""
    printed = _Tee(sys.stdout)
    with contextlib.redirect_stdout(printed):
        yield
    if "RACE DETECTED" in printed.getvalue():
        raise RuntimeError(f"{printed.getvalue()}")


class _Tee(io.StringIO):
    """Keeps what is written to it, and writes it to a stream too."""

    def __init__(self, stream: Any):
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        return super().write(text)
