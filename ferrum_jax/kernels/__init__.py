"""Which kernel serves which op, and the choice between implementations."""

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from .targets import target_capability as target_capability

IMPLEMENTATIONS = ("xla", "triton", "pallas")

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

# backend -> file under kernels/<backend>/ -> the ops that it has a wrapper of the same name for
KERNELS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "triton": {
        "routing": ("route_topk",),
        "tables": ("moe_build_pairs_by_token", "moe_align_block_size", "moe_plan"),
        "route_plan": ("moe_route_plan",),
        "combine": _COMBINE,
        "grouped": _GROUPED,
    },
    "pallas": {
        "routing": ("route_topk",),
        "combine": _COMBINE,
        "grouped": _GROUPED,
    },
}


class Measured(NamedTuple):
    """What is taken first, and where: in words, and of the operands' shapes and the parameters."""

    implementation: str
    where: str
    holds: Callable[[Sequence[tuple[int, ...]], Mapping[str, Any]], bool]


def _pairs(shape: tuple[int, ...]) -> int:
    return math.prod(shape[-2:])


def _many_rows(shapes: Sequence[tuple[int, ...]], params: Mapping[str, Any]) -> bool:
    """Whether a grouped product has 96 rows an expert and more, on average."""
    return shapes[0][-2] * params.get("top_k", 1) >= 96 * shapes[1][-3]


# Where the first kernel of KERNELS that can run is not taken first: on Hopper GPUs. Of others nothing was measured.
# From times of `python -m ferrum_jax bench` in microseconds, xla/triton/pallas, bfloat16, jax 0.11.2, Triton 3.6.0: on
# one NVIDIA H100 80GB HBM3, 2026-11-25 and 26, or, where it says so, on one NVIDIA H200, 2026-11-26; at the K=8 and
# H=2048 of Qwen3 unless said. Between two sizes that were measured, the nearer decides. Where xla is as fast as a
# kernel, within 2%, it comes first: it can also fuse what stands around the op.
_LARGE_PACKED = Measured(
    "pallas",
    "packed rows, 96 an expert and more",
    lambda shapes, params: params["packed_rows"] and _many_rows(shapes, params),
)
MEASURED: Mapping[str, Sequence[Measured]] = {
    # T=16 2.3/2.4/2.2, T=128 3.8/3.8/3.7, T=1024 15.7/14.6/14.7, T=8192 105/103/103; H=7168 352/359/350; K=2 H=4096
    # 76/68/68.
    "moe_combine": (
        Measured(
            "xla",
            "K >= 8, but for 4096 <= T*K <= 16384",
            lambda shapes, params: shapes[1][-1] >= 8 and not 4096 <= _pairs(shapes[1]) <= 16384,
        ),
    ),
    # With pairs_by_token: T=16 2.1/3.9/2.2, T=128 3.5/5.2/3.7, T=1024 15.5/15.8/14.6, T=8192 104/104/103.
    "moe_collect": (
        Measured(
            "pallas",
            "K >= 8, 4096 <= T*K <= 16384",
            lambda shapes, params: len(shapes) == 3 and shapes[2][-1] >= 8 and 4096 <= _pairs(shapes[2]) <= 16384,
        ),
        Measured("xla", "K >= 8", lambda shapes, params: len(shapes) == 3 and shapes[2][-1] >= 8),
    ),
    # This and the next in turn, the gradients of combine: T=16 4.7/6.7/7.2, T=128 7.7/9.2/9.4, T=8192 268/278/236;
    # H=7168 965/1004/752; K=2 H=4096 156/168/150.
    "moe_spread": (
        Measured("xla", "T*K <= 4096", lambda shapes, params: params["unique_rows"] and _pairs(shapes[1]) <= 4096),
        Measured("pallas", "T*K > 4096", lambda shapes, params: params["unique_rows"]),
    ),
    "moe_row_dot": (
        Measured("xla", "T*K <= 4096", lambda shapes, params: _pairs(shapes[2]) <= 4096),
        Measured("pallas", "T*K > 4096", lambda shapes, params: True),
    ),
    # On an H200: T=16 5.0/3.9/3.8, T=128 6.2/6.0/5.7, T=512 13.2/13.1/12.3, T=1024 26.6/21.7/22.6, T=8192 186/148/167;
    # H=7168 672/502/511; K=2 H=4096 110/84/88. On an H100 T=16 5.7/4.6/4.5, T=8192 269/204/214; H=7168 966/706/704.
    "moe_combine_cotangents": (Measured("pallas", "T*K <= 4096", lambda shapes, params: _pairs(shapes[3]) <= 4096),),
    # T=16 1.7/2.5/1.7, T=128 4.3/3.6/3.2, T=8192 99/100/99.
    "weighted_sum_batched": (
        Measured("pallas", "512 <= T*K <= 8192", lambda shapes, params: 512 <= _pairs(shapes[1]) <= 8192),
        Measured("xla", "T*K < 512 or T*K > 8192", lambda shapes, params: True),
    ),
    # Both gradients of the weighted sum, which xla computes in one pass: T=16 2.0/3.9/5.1, T=128 3.9/6.2/6.9, T=8192
    # 191/212/218.
    "slot_scale": (Measured("xla", "every size tried", lambda shapes, params: True),),
    "slot_dot": (Measured("xla", "every size tried", lambda shapes, params: True),),
    # By the bench's measurement, in a script, triton/pallas on an H200, E=128 N=1536, packed rows: T=1024 231/236,
    # T=2048 272/270, T=4096 414/383; E=64 H=7168 N=4096, T=4096 2981/2732. Rows apart Pallas gathers first: T=8192
    # 699/1214. The transposed form was not timed.
    "grouped_matmul": (_LARGE_PACKED,),
    # With silu, "xla" being the product and then it: packed rows, T=16 124/123/138, T=128 190/190/206, T=1024
    # 244/231/247, T=8192 755/782/714; E=64 H=7168 N=4096, T=4096 2878/3297/2861; pair ids, T=1024 241/227, T=8192
    # 783/785. Between these sizes as the product by itself.
    "grouped_matmul_activated": (
        _LARGE_PACKED,
        Measured("xla", "96 rows an expert and more", _many_rows),
    ),
    # triton/pallas, E=128 N=1536, packed rows: T=16 403/275, T=128 448/298, T=1024 530/354, T=8192 1340/774; pair ids:
    # 406/319, 451/327, 530/426, 1344/1024.
    "grouped_outer": (Measured("pallas", "every size tried", lambda shapes, params: True),),
}


class Choice(NamedTuple):
    """An implementation's name, and for each other one why it is passed over."""

    implementation: str
    passed_over: dict[str, str]


class Call(NamedTuple):
    """What is known of one call when its kernel is chosen."""

    op: str
    operands: Mapping[str, Any]
    sizes: Mapping[str, Any]
    params: Mapping[str, Any]
    devices: int = 1
    made_of_ops: bool = False


def choose(call: Call, asked: str | None, platform: str, device_kind: str | None = None) -> Choice:
    op, params, made_of_ops = call.op, call.params, call.made_of_ops
    operands = [x for x in call.operands.values() if x is not None]
    capability = _capability(op, asked, platform, device_kind)
    reasons = {name: _refusal(name, op, operands, params, platform, capability) for name in KERNELS}
    if call.devices > 1:
        many = (
            f"the program runs on {call.devices} devices under plain jit, and a kernel is not divided: call it inside "
            "jax.shard_map"
        )
        reasons = {name: reason or many for name, reason in reasons.items()}
    if asked and reasons.get(asked):
        if not made_of_ops or _refusal(asked, op, operands, {}, platform, capability):
            raise NotImplementedError(f"{op}: implementation={asked!r} cannot be used: {reasons[asked]}")
        asked = "xla"
    order, where = (*KERNELS, "xla"), ""
    if not asked and platform == "cuda":
        order, where = _order(op, operands, params, capability)
    taken = asked or next(name for name in order if not reasons.get(name))
    why = "was asked for" if asked else "comes first"
    if where and taken == order[0] and not asked:
        why += f", measured as fast or faster on a Hopper GPU at {where}"
    others = {name: reasons.get(name) or f"{taken} {why}" for name in IMPLEMENTATIONS if name != taken}
    return Choice(taken, others)


def _capability(op: str, asked: str | None, platform: str, device_kind: str | None) -> int | None:
    """The target GPU's; None where none is known or none counts. To lower xla, its name need not be known."""
    if platform != "cuda" or _interpreting.value or not served(op):
        return None
    try:
        return target_capability(device_kind)
    except ValueError:
        if device_kind or asked != "xla":
            raise
        return None


def _order(
    op: str, operands: Sequence[Any], params: Mapping[str, Any], capability: int | None
) -> tuple[tuple[str, ...], str]:
    """The implementations, best first, and where that was measured: for Hopper, which counts where no GPU is known.

    Kernels are first where they are interpreted.
    """
    usual, shapes = (*KERNELS, "xla"), [x.shape for x in operands]
    if capability not in (90, None) or _interpreting.value or _symbolic(operands, params):
        return usual, ""
    for first, where, holds in MEASURED.get(op, ()):
        if holds(shapes, params):
            return tuple(dict.fromkeys((first, *usual))), where
    return usual, ""


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
    capability: int | None,
) -> str | None:
    if platform != "cuda" and not _interpreting.value:
        return f"it runs on NVIDIA GPUs, and this is lowered for {platform} (see ferrum_jax.interpret_kernels)"
    family = _family(backend, op)
    if family is None:
        return f"{op} has no {backend} kernel"
    if _symbolic(operands, params):
        return "a kernel's grid and blocks are made for sizes that are numbers, and there are symbolic ones"
    if backend == "triton":
        if capability is not None and capability < 70:
            return f"it needs a Volta GPU or a newer one; the target's compute capability is {capability / 10}"
        for package in ["triton"] if _interpreting.value else ["triton", "jax_triton"]:
            try:
                importlib.import_module(package)
            except Exception as error:  # jax-triton 0.3 fails in its own ways where JAX's CUDA plugin is not installed
                return f"{package} cannot be imported ({error}): pip install '.[cuda]' from a clone"
    if backend == "pallas":
        reason = importlib.import_module(f"{__name__}.pallas").refuse(capability, _interpreting.value, family)
        if reason:
            return reason
    refuse = getattr(importlib.import_module(f"{__name__}.{backend}.{family}"), "refuse", None)
    return refuse(operands, params) if refuse else None


def _symbolic(operands: Sequence[Any], params: Mapping[str, Any]) -> bool:
    from jax import export

    return any(map(export.is_symbolic_dim, (*(n for x in operands for n in x.shape), *params.values())))


def served(op: str) -> bool:
    """Whether there is a kernel of `op` at all."""
    return any(_family(backend, op) for backend in KERNELS)


def _family(backend: str, op: str) -> str | None:
    return next((file for file, ops in KERNELS[backend].items() if op in ops), None)


def lead_axes(*operands: tuple[Any, int]) -> tuple[int, ...]:
    """The broadcast leading axes of operands, each given with its count of trailing axes; None has none."""
    leads = (x.shape[: x.ndim - trailing] for x, trailing in operands if x is not None)
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*leads, strict=True))


_interpreting = jax.make_user_context(False)


def interpreting() -> bool:
    return _interpreting.value


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
