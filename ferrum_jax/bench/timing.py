"""How a workload is checked and timed.

On a GPU, CUPTI times the kernels; the result is the median over calls. The calls rotate through several sets of inputs,
so that all but small inputs come from memory and not from a cache. A chain of small kernels is timed by the clock
instead, as many steps inside one jit, because there the cost of launches counts. XLA puts those into CUDA graphs.

A row's floor is the larger of two times: its bytes at the bandwidth of a large copy, and its operations at the rate of
a large matrix product. Both peaks are measured in the same run. A copy by XLA does not always use the whole bandwidth,
so `report.settle` raises the peaks to those of the fastest row.
"""

import itertools
import statistics
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import ferrum_jax

from .cases import WORKLOADS, Function, Shape, Workload

# ---- is a result right?


@jax.jit
def _error_of(got: jax.Array, want: jax.Array) -> jax.Array:
    """The largest error of a row: the norm of the difference over the norm of the row.

    A row that is smaller than usual is judged by the root mean square of all rows' norms. Integers must be equal.
    """
    if jnp.issubdtype(want.dtype, jnp.integer):
        return jnp.where(jnp.any(got.astype(jnp.int32) != want.astype(jnp.int32)), jnp.inf, 0.0)
    got, want = (jnp.atleast_2d(x.astype(jnp.float32)) for x in (got, want))
    norm, error = jnp.linalg.norm(want, axis=-1), jnp.linalg.norm(got - want, axis=-1)
    usual = jnp.sqrt(jnp.mean(norm**2)) + jnp.finfo(jnp.float32).tiny
    return jnp.max(error / jnp.maximum(norm, usual))


def error_of(got: Any, want: Any) -> float:
    return max(float(e) for e in jax.tree.leaves(jax.tree.map(_error_of, got, want)))


def _tolerance(results: Any) -> float:
    floats = [x.dtype for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) ** (2 / 3) for dtype in floats), default=0.0)


# ---- how long does it take?


class _Rotation:
    """A compiled function that each call runs on the next set of arguments. A call returns the smallest result."""

    def __init__(self, function: Function, sets: Sequence[tuple[Any, ...]]):
        self._function, self._turn = function, itertools.cycle(sets)

    def __call__(self) -> jax.Array:
        return min(jax.tree.leaves(self._function(*next(self._turn))), key=lambda x: x.size)

    # JAX's profiler jits a function that lacks the methods of a jitted one. Jitted, it would run in Python only once,
    # and so on one set of arguments. The profiler only asks whether these methods are there; nothing calls them.

    def trace(self) -> Any:
        raise NotImplementedError

    def lower(self) -> Any:
        raise NotImplementedError


def _clock(call: Callable[[], jax.Array], at_least: int) -> list[float]:
    """Seconds of each call, for a fifth of a second or `at_least` calls."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    once()
    first = once()
    return [once() for _ in range(max(at_least, min(50, int(0.2 / first))))]


def _kernels(call: _Rotation) -> tuple[list[float], int]:
    """Seconds that each call's kernels take, by CUPTI, and how many kernels a call launches."""
    from jax.experimental.mosaic.gpu import profiler

    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(3, min(64, int(0.2 / (time.perf_counter() - start))))
    kernels: Any = profiler.measure(call, aggregate=False, iterations=calls)()[1]
    if not kernels:
        raise RuntimeError("CUPTI saw no kernel")
    return [sum(ms for _, ms in launched) / 1e3 for launched in kernels], len(kernels[0])


class Time(NamedTuple):
    seconds: float
    launches: int | None
    method: str


def measure(program: Function, sets: Sequence[tuple[Any, ...]], steps: int = 0) -> Time:
    """The median time of a compiled function: of its kernels on a GPU, by the clock on a CPU.

    A chain of `steps` is timed by the clock everywhere; its time is that of one step.
    """
    call = _Rotation(program, sets)
    if jax.default_backend() != "gpu" or steps:
        return Time(statistics.median(_clock(call, 5)) / max(steps, 1), None, "clock")
    seconds, launches = _kernels(call)
    return Time(statistics.median(seconds), launches, "CUPTI")


def timed(function: Function, *args: Any) -> tuple[Any, float]:
    """A function's result under jit, and the median seconds of a call with its dispatch, compiled and warm."""
    compiled = jax.jit(function)
    result = jax.block_until_ready(compiled(*args))
    seconds = timeit.repeat(lambda: jax.block_until_ready(compiled(*args)), number=1, repeat=9)
    return result, statistics.median(seconds)


def peaks() -> dict[str, float]:
    """Bytes a second of a large copy, and operations a second of a large matrix product."""
    on_gpu = jax.default_backend() == "gpu"
    side, dtype = (8192, jnp.bfloat16) if on_gpu else (1024, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (4 * side, side)).astype(dtype)
    y = x[:side]
    # The copy also negates: XLA makes no kernel for a copy alone.
    copy, product = jax.jit(lambda x: -x).lower(x).compile(), jax.jit(jnp.matmul).lower(y, y).compile()
    return {
        "bytes_per_s": 2 * x.nbytes / measure(copy, [(x,)]).seconds,
        "flops_per_s": 2 * side**3 / measure(product, [(y, y)]).seconds,
    }


def floor_us(row: Mapping[str, Any], peak: Mapping[str, Any]) -> float:
    """The least microseconds that a row's bytes and operations can take at these peaks."""
    return max(row["bytes"] / peak["bytes_per_s"], row["flops"] / peak["flops_per_s"]) * 1e6


# ---- a workload at a shape

# Sets of inputs are made until they hold ROTATED bytes, but at most MOST_SETS of them.
ROTATED = 2**28
MOST_SETS = 64
# On the host, a launch by itself takes longer than a small kernel runs. CUDA graphs launch a chain's kernels together.
GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}


def _sets(work: Workload, s: Shape) -> list[tuple[Any, ...]]:
    first = work.inputs(jax.random.key(s.T), s)
    if work.steps or jax.default_backend() != "gpu":
        return [first]
    count = min(MOST_SETS, -(-ROTATED // sum(x.nbytes for x in jax.tree.leaves(first))))
    return [first, *(work.inputs(jax.random.key(s.T + i), s) for i in range(1, count))]


def _attempt(function: Function, *args: Any) -> Any:
    """What a function returns, or the exception that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error


def _compiled(functions: Iterable[Function], args: tuple[Any, ...], chain: bool) -> list[tuple[Any, float]]:
    """Each function compiled for these arguments, or the exception that came of it, and the seconds it was lowered in.

    XLA compiles them side by side.
    """
    options = GRAPHS if chain and jax.default_backend() == "gpu" else {}
    lowered, seconds = [], []
    for function in functions:
        start = time.perf_counter()
        lowered.append(_attempt(jax.jit(function).lower, *args))
        seconds.append(time.perf_counter() - start)
    with ThreadPoolExecutor() as pool:
        programs = pool.map(lambda x: x if isinstance(x, Exception) else _attempt(x.compile, options), lowered)
        return list(zip(programs, seconds, strict=True))


def rows(name: str, s: Shape, peak: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Check and time one workload at one shape: a row for every implementation, and for every rival.

    The first result that comes out is what the others are compared with.
    """
    work = WORKLOADS[name]
    sets = _sets(work, s)
    known = {"op": name, **s._asdict(), "dtype": jnp.dtype(s.dtype).name, "block_size": s.block}
    known |= {"bytes": work.bytes(s), "flops": work.flops(s)}
    known |= {"floor_us": floor_us(known, peak)}
    # A CPU has no implementation but xla, so None would time the same thing twice.
    names = (*ferrum_jax.kernels.IMPLEMENTATIONS, None) if jax.default_backend() == "gpu" else ("xla",)
    ours = {name or "default": work.ours(s, name) for name in names}
    rivals = work.rivals(s)
    programs = _compiled(ours.values(), sets[0], work.steps > 0)
    for function in rivals.values():  # one after the other: to tune ragged_dot, XLA takes half of a GPU's memory
        programs += _compiled([function], sets[0], work.steps > 0)
    want = None
    for way, (program, seconds) in zip((*ours, *rivals), programs, strict=True):
        if isinstance(program, NotImplementedError):
            continue  # there is no such kernel
        row = known | {"way": way, "ours": way in ours, "us": None, "launches": None, "method": None}
        row |= {"lowering_seconds": seconds}
        try:
            if isinstance(program, Exception):
                raise program
            got = program(*sets[0])
            want = got if want is None else want
            # A rival may round to the inputs' dtypes on its way, so those count for it.
            error, tolerance = error_of(got, want), _tolerance((want, got if way in ours else sets[0]))
            del got
            if not error <= tolerance:
                raise ArithmeticError(f"wrong: error {error:.1e} of a row, at most {tolerance:.1e} allowed")
            taken = measure(program, sets, work.steps)
            row |= {"us": taken.seconds * 1e6, "launches": taken.launches, "method": taken.method, "error": None}
        except Exception as error:  # a way may fail, for want of memory for example, and the others go on
            row |= {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        yield row
