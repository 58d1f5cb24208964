"""Which kernel serves which op, and the choice between implementations."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

IMPLEMENTATIONS = ("xla", "triton", "pallas")

# backend -> op -> the file under kernels/<backend>/ that holds a function of the op's name
KERNELS: Mapping[str, Mapping[str, str]] = {"triton": {}, "pallas": {}}


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
    reasons = {name: _refusal(name, op, platform) for name in KERNELS}
    if asked and reasons.get(asked):
        raise NotImplementedError(f"{op}: implementation={asked!r} cannot be used: {reasons[asked]}")
    able = [name for name, reason in reasons.items() if not reason]
    taken = asked or next(iter(able), "xla")
    others = {name: reasons.get(name) or f"{taken} comes first" for name in IMPLEMENTATIONS if name != taken}
    return Choice(taken, others)


def load(implementation: str, op: str) -> Callable[..., Any] | None:
    """The kernel wrapper of `op`; None where the jnp meaning is the implementation."""
    if implementation == "xla":
        return None
    return getattr(importlib.import_module(f"{__name__}.{implementation}.{KERNELS[implementation][op]}"), op)


def _refusal(backend: str, op: str, platform: str) -> str | None:
    if platform != "cuda":
        return f"it runs on NVIDIA GPUs, and this is lowered for {platform}"
    if op not in KERNELS[backend]:
        return f"{op} has no {backend} kernel"
    return None
