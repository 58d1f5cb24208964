"""Which kernel serves which op, and the choice between implementations."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

IMPLEMENTATIONS = ("xla", "triton", "pallas")

_COMBINE = (
    "moe_dispatch",
    "moe_collect",
    "moe_combine",
    "moe_spread",
    "moe_row_dot",
    "weighted_sum_batched",
    "slot_scale",
    "slot_dot",
)

# backend -> file under kernels/<backend>/ -> the ops that it has a wrapper of the same name for
KERNELS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "triton": {
        "routing": ("route_topk_softmax",),
        "tables": ("moe_build_pairs_by_token", "moe_align_block_size", "moe_plan"),
        "combine": _COMBINE,
        "grouped": ("grouped_matmul", "grouped_matmul_transposed", "grouped_outer"),
    },
    "pallas": {
        "routing": ("route_topk_softmax",),
        "combine": _COMBINE,
        "grouped": ("grouped_matmul", "grouped_matmul_transposed", "grouped_outer"),
    },
}


# Compute capability by the GPU's name, for a GPU that is named but not there. Longer names before the shorter ones
# that they contain.
_CAPABILITIES = {
    "B300": 103, "B200": 100, "GH200": 90, "H200": 90, "H100": 90, "H800": 90, "H20": 90,
    "L40": 89, "L4": 89, "RTX 40": 89, "RTX 50": 120, "RTX PRO": 120, "A100": 80, "A30": 80, "A10": 86, "T4": 75,
}  # fmt: skip


class Choice(NamedTuple):
    """An implementation's name, and for each other one why it is passed over."""

    implementation: str
    passed_over: dict[str, str]


def choose(
    op: str,
    asked: str | None,
    operands: Sequence[Any],
    params: Mapping[str, Any],
    platform: str,
    device_kind: str | None = None,
) -> Choice:
    """The implementation that runs `op` on these shapes; NotImplementedError if one was asked for that cannot."""
    reasons = {name: _refusal(name, op, operands, params, platform, device_kind) for name in KERNELS}
    if asked and reasons.get(asked):
        raise NotImplementedError(f"{op}: implementation={asked!r} cannot be used: {reasons[asked]}")
    able = [name for name, reason in reasons.items() if not reason]
    taken = asked or next(iter(able), "xla")
    others = {name: reasons.get(name) or f"{taken} comes first" for name in IMPLEMENTATIONS if name != taken}
    return Choice(taken, others)


def load(implementation: str, op: str, results: Sequence[Any]) -> Callable[..., Any] | None:
    """The kernel wrapper of `op`, interpreted where kernels are; None where the jnp meaning is the implementation."""
    if implementation == "xla":
        return None
    backend, family = importlib.import_module(f"{__name__}.{implementation}"), _family(implementation, op)
    if not _interpreting.value:
        return getattr(importlib.import_module(f"{backend.__name__}.{family}"), op)
    wrapper = getattr(backend.interpreted(family), op)
    shapes = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results]
    return lambda *operands, **params: jax.pure_callback(functools.partial(wrapper, **params), tuple(shapes), *operands)


def _refusal(
    backend: str,
    op: str,
    operands: Sequence[Any],
    params: Mapping[str, Any],
    platform: str,
    device_kind: str | None,
) -> str | None:
    if platform != "cuda" and not _interpreting.value:
        return f"it runs on NVIDIA GPUs, and this is lowered for {platform} (see ferrum_jax.interpret_kernels)"
    family = _family(backend, op)
    if family is None:
        return f"{op} has no {backend} kernel"
    if backend == "triton":
        for package in ["triton"] if _interpreting.value else ["triton", "jax_triton"]:
            try:
                importlib.import_module(package)
            except Exception as error:  # jax-triton 0.3 fails in its own ways where JAX's CUDA plugin is not installed
                return f"{package} cannot be imported ({error}): pip install 'ferrum_jax[cuda]'"
    if backend == "pallas":
        reason = importlib.import_module(f"{__name__}.pallas").refuse(device_kind, _interpreting.value, family)
        if reason:
            return reason
    refuse = getattr(importlib.import_module(f"{__name__}.{backend}.{family}"), "refuse", None)
    return refuse(operands, params) if refuse else None


def _family(backend: str, op: str) -> str | None:
    return next((file for file, ops in KERNELS[backend].items() if op in ops), None)


def target_capability(device_kind: str | None = None) -> int | None:
    """90 for compute capability 9.0: that of the GPU of this name, or of the one that the mesh names, or that is here.

    A GPU that is not here and whose name is not known counts as Hopper's, 90. None: nothing names one.
    """
    mesh_device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device_kind or (mesh_device.device_kind if mesh_device else None)
    with contextlib.suppress(RuntimeError):  # no CUDA backend on this host
        here = jax.local_devices(backend="cuda")[0]
        if kind is None or kind == here.device_kind:
            return int(here.compute_capability.replace(".", ""))
    return next((c for name, c in _CAPABILITIES.items() if name in kind), 90) if kind else None


_interpreting = jax.make_user_context(False)


def interpret_kernels() -> contextlib.AbstractContextManager[Any]:
    """In this context the GPU kernels run on the CPU, interpreted, under the normal API: eager, jit, vmap, grad.

    For debugging and testing on a machine without a GPU what will run on one. Slow: a tenth of a second and more a
    call. `implementation=None` takes a kernel wherever there is one. What was compiled outside is not used inside, nor
    the other way round.

    Returns:
      A context manager.

    Raises:
      NotImplementedError: inside, by an op whose asked implementation has no kernel, or whose package is not installed.

    The interpreters are Triton's, https://triton-lang.org, where NumPy does the work, and JAX's own for Pallas kernels,
    which finds races and reads out of bounds too.

    >>> import jax.numpy as jnp, ferrum_jax
    >>> with ferrum_jax.interpret_kernels():
    ...     ids, _ = ferrum_jax.route_topk_softmax(jnp.array([[1.0, 3.0, 2.0]]), 2, implementation="triton")
    >>> ids.tolist()
    [[1, 2]]
    """
    return _interpreting(True)


def export_checks() -> list[Any]:
    """For `jax.export.export(..., disabled_checks=export_checks())`: the custom calls that the kernels are.

    JAX promises no stability for them across its versions: load what is exported with the versions that exported it.
    An exported Triton kernel is machine code of one GPU architecture: the one it was lowered for.

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
