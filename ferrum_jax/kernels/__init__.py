"""Which kernel serves which op, and the choice between implementations.

`KERNELS` is the registry. `choose` asks it what can run a call, and `measured.py` what to try first; `load` imports the
kernel that was chosen.
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from .call import Call as Call
from .measured import MEASURED, Measured
from .shapes import lead_axes as lead_axes
from .targets import HOPPER, Architectures
from .targets import target_capability as target_capability

BACKENDS = ("triton", "pallas")  # in the order in which they are tried where nothing was measured
IMPLEMENTATIONS = ("xla", *BACKENDS)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of an op: its wrapper is kernels/<backend>/<file>.py's function of the op's name, or `function`.

    The wrapper takes the op's operands and parameters and returns its results. The file may have a function `refuse`,
    which says in words why a call of the op cannot be served, or None.
    """

    op: str
    backend: str
    file: str
    architectures: Architectures
    function: str = ""

    @property
    def wrapper(self) -> str:
        return self.function or self.op


_SM70_ON = Architectures("a Volta GPU or a newer one", least=70)
_SM90_ON = Architectures("a Hopper GPU or a newer one", least=90)
_WGMMA = Architectures("wgmma, of Hopper GPUs alone", only=(90,))

_TABLES = "moe_build_pairs_by_token", "moe_align_block_size", "moe_plan", "align_groups"
_COMBINE = (
    "moe_dispatch",
    "moe_collect",
    "moe_combine",
    "moe_spread",
    "moe_row_dot",
    "moe_combine_cotangents",
    "weighted_sum_batched",
    "slot_scale",
    "slot_dot",
)
_GROUPED = "grouped_matmul", "grouped_matmul_activated", "grouped_matmul_transposed", "grouped_outer"
_QUANTIZED = "quantized_matmul", "quantized_matmul_activated", "quantized_matmul_transposed"

# Of an op's rows with one backend, the first whose architectures hold the target GPU is taken.
KERNELS: Sequence[Kernel] = (
    Kernel("route_topk", "triton", "routing", _SM70_ON),
    *(Kernel(op, "triton", "tables", _SM70_ON) for op in _TABLES),
    Kernel("moe_route_plan", "triton", "route_plan", _SM70_ON),
    *(Kernel(op, "triton", "combine", _SM70_ON) for op in _COMBINE),
    *(Kernel(op, "triton", "grouped", _SM70_ON) for op in _GROUPED),
    *(Kernel(op, "triton", "quantized", _SM70_ON) for op in _QUANTIZED),
    Kernel("route_topk", "pallas", "routing", _SM90_ON),
    *(Kernel(op, "pallas", "combine", _SM90_ON) for op in _COMBINE),
    *(Kernel(op, "pallas", "grouped", _WGMMA) for op in _GROUPED),
)


class Choice(NamedTuple):
    """An implementation's name, and for each other one why it is passed over."""

    implementation: str
    passed_over: dict[str, str]


def choose(call: Call, asked: str | None, platform: str, device_kind: str | None = None) -> Choice:
    """The implementation that runs the call; NotImplementedError if one was `asked` for that cannot.

    An op that is made of others has a second way to run: as these others, each of which chooses its own implementation.
    This way is called "xla". It is taken where the asked backend has a kernel of the op that refuses only the call's
    parameters. A backend that can run the op with no parameters cannot run the others either.
    """
    capability = _capability(call.op, asked, platform, device_kind)
    reasons = {name: _refusal(name, call, platform, capability) for name in BACKENDS}
    if asked and reasons.get(asked):
        whatever_params = dataclasses.replace(call, params={})
        if not call.made_of_ops or _refusal(asked, whatever_params, platform, capability):
            raise NotImplementedError(f"{call.op}: implementation={asked!r} cannot be used: {reasons[asked]}")
        asked = "xla"
    row = _measured(call, capability) if not asked and platform == "cuda" else None
    order = (*([row.implementation] if row else []), *BACKENDS, "xla")
    taken = asked or next(name for name in order if not reasons.get(name))
    why = "was asked for" if asked else "comes first"
    if row and taken == row.implementation:
        why += f", measured as fast or faster on {row.architectures.words} at {row.where}"
    others = {name: reasons.get(name) or f"{taken} {why}" for name in IMPLEMENTATIONS if name != taken}
    return Choice(taken, others)


def _capability(op: str, asked: str | None, platform: str, device_kind: str | None) -> int | None:
    """The target GPU's compute capability; None where no GPU is known, or where it does not matter.

    xla runs on any GPU: if it is asked for, the GPU that the mesh names need not be a known one.
    """
    if platform != "cuda" or _interpreting.value or not served(op):
        return None
    try:
        return target_capability(device_kind)
    except ValueError:
        if device_kind or asked != "xla":
            raise
        return None


def _measured(call: Call, capability: int | None) -> Measured | None:
    """The row of measured.py that holds for the call. Interpreted kernels have none: there a kernel comes first."""
    if _interpreting.value or call.symbolic:
        return None
    return next((row for row in MEASURED if row.op == call.op and row.holds(call, capability or HOPPER)), None)


def load(implementation: str, op: str, results: Sequence[Any]) -> Callable[..., Any]:
    """The wrapper of the kernel of `op` by this backend, interpreted where kernels are.

    results: the abstract values of the op's results.
    """
    kernel = kernel_for(implementation, op, None if _interpreting.value else target_capability())
    assert kernel, f"{op} has no {implementation} kernel here"
    backend = importlib.import_module(f"{__name__}.{implementation}")
    if not _interpreting.value:
        return getattr(importlib.import_module(f"{backend.__name__}.{kernel.file}"), kernel.wrapper)
    wrapper = getattr(backend.interpreted(kernel.file), kernel.wrapper)
    if implementation == "triton":  # each of whose launches is a callback already
        return wrapper
    shapes = tuple(jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results)

    def interpreted(*operands: jax.Array, **params: Any) -> Any:
        return jax.pure_callback(functools.partial(wrapper, **params), shapes, *operands)

    return interpreted


def _refusal(backend: str, call: Call, platform: str, capability: int | None) -> str | None:
    """Why the backend cannot run the call, in words; None if it can."""
    if platform != "cuda" and not _interpreting.value:
        return f"it runs on NVIDIA GPUs, and this is lowered for {platform} (see ferrum_jax.interpret_kernels)"
    rows = _kernels(backend, call.op)
    if not rows:
        return f"{call.op} has no {backend} kernel"
    if call.devices > 1:
        return (
            f"the program runs on {call.devices} devices under plain jit, and a kernel is not divided: "
            "call it inside jax.shard_map"
        )
    if call.symbolic:
        return "a kernel's grid and blocks are made for sizes that are numbers, and there are symbolic ones"
    kernel = kernel_for(backend, call.op, capability)
    if not kernel:
        needs = " or ".join(dict.fromkeys(row.architectures.words for row in rows))
        return f"it needs {needs}; the target's compute capability is {(capability or HOPPER) / 10}"
    package = importlib.import_module(f"{__name__}.{backend}")
    reason = package.refuse(capability, _interpreting.value)
    if reason:
        return reason
    refuse = getattr(importlib.import_module(f"{package.__name__}.{kernel.file}"), "refuse", None)
    if not refuse:
        return None
    return refuse(dataclasses.replace(call, capability=capability or HOPPER))


def served(op: str) -> bool:
    """Whether there is a kernel of `op` at all."""
    return any(kernel.op == op for kernel in KERNELS)


def _kernels(backend: str, op: str) -> list[Kernel]:
    return [kernel for kernel in KERNELS if (kernel.backend, kernel.op) == (backend, op)]


def kernel_for(backend: str, op: str, capability: int | None) -> Kernel | None:
    """The op's first row that holds for a GPU of this compute capability, or for Hopper where no GPU is known.

    The interpreter needs no GPU: if no row holds, the first one is interpreted.

    >>> kernel_for("triton", "grouped_matmul", 90).file
    'grouped'
    """
    rows = _kernels(backend, op)
    held = (row for row in rows if (capability or HOPPER) in row.architectures)
    return next(held, rows[0] if rows and _interpreting.value else None)


_interpreting = jax.make_user_context(False)


def interpreting() -> bool:
    """Whether kernels are interpreted here: see `interpret_kernels`."""
    return _interpreting.value


def interpret_kernels() -> contextlib.AbstractContextManager[Any]:
    """In this context the GPU kernels run on the CPU, interpreted, under the normal API: eager, jit, vmap, grad.

    Use it to debug and test, on a machine without a GPU, what will run on one. It is slow: one call can take a tenth of
    a second and more. `implementation=None` takes a kernel wherever there is one. Functions that were compiled outside
    the context are compiled again inside it, and the other way round.

    Returns:
      A context manager.

    Raises:
      NotImplementedError: in the context an op raises it if the asked implementation has no kernel of the op, or if
        its package is not installed.

    Triton kernels run in Triton's interpreter, https://triton-lang.org, which computes with NumPy. Pallas kernels run
    in JAX's own interpreter, which also finds races and reads out of bounds.

    >>> import jax.numpy as jnp, ferrum_jax
    >>> with ferrum_jax.interpret_kernels():
    ...     ids, _ = ferrum_jax.route_topk_softmax(jnp.array([[1.0, 3.0, 2.0]]), 2, implementation="triton")
    >>> ids.tolist()
    [[1, 2]]
    """
    return _interpreting(True)


def export_checks() -> list[Any]:
    """The custom calls of the kernels, for `jax.export.export(..., disabled_checks=export_checks())`.

    JAX does not promise that these calls stay the same from version to version: load an exported program with the
    versions that exported it. An exported Triton kernel is machine code for one GPU architecture, the one that it was
    lowered for.

    Returns:
      A list of `jax.export.DisabledSafetyCheck`.

    >>> import jax, jax.numpy as jnp, ferrum_jax
    >>> f = jax.jit(lambda x: ferrum_jax.route_topk_softmax(x, 2, implementation="xla"))
    >>> jax.export.export(f, platforms=("cpu", "cuda"), disabled_checks=export_checks())(jnp.zeros((4, 8))).platforms
    ('cpu', 'cuda')
    """
    from jax import export

    calls = ("triton_kernel_call", "triton_kernel_call_ffi")
    return [export.DisabledSafetyCheck.custom_call(name) for name in calls]
