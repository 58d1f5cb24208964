"""The GPU that a program is lowered for: its compute capability, by asking the one that is here, or by its name."""

import contextlib
import re
from collections.abc import Mapping

import jax

# NVIDIA's GPUs with tensor cores, by compute capability. A name holds for every GPU whose own has the same words side
# by side: "A100" for "NVIDIA A100-SXM4-80GB", but not "A30" for "NVIDIA RTX A3000". Of several the longest holds.
_NAMES = {
    70: "V100, V100S, GV100, TITAN V",
    75: "T4, T4G, T10, TITAN RTX, RTX 2060, RTX 2070, RTX 2080,"
    " Quadro RTX 3000, Quadro RTX 4000, Quadro RTX 5000, Quadro RTX 6000, Quadro RTX 8000",
    80: "A100, A100X, A800, AX800, A30, A30X",
    86: "A40, A10, A10G, A10M, A16, A2, RTX A400, RTX A500, RTX A1000, RTX A2000, RTX A3000, RTX A4000, RTX A4500,"
    " RTX A5000, RTX A5500, RTX A6000, RTX 2050, RTX 3050, RTX 3060, RTX 3070, RTX 3080, RTX 3090",
    89: "L2, L4, L20, L40, L40G, L40S, Ada, RTX 3050 A, RTX 4050, RTX 4060, RTX 4070, RTX 4080, RTX 4090",
    90: "H20, H100, H200, H800, GH200",
    100: "B100, B200, GB200",
    103: "B300, GB300",
    120: "RTX PRO, RTX 5050, RTX 5060, RTX 5070, RTX 5080, RTX 5090",
    121: "GB10",
}
GPUS = {name: capability for capability, names in _NAMES.items() for name in names.split(", ")}


def target_capability(device_kind: str | None = None) -> int | None:
    """90 for compute capability 9.0: that of the GPU of this name, or of the one that the mesh names, or that is here.

    One that is here is asked, whatever its name. ValueError: one that is not here, and whose name is not known. None:
    nothing names one.
    """
    mesh_device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device_kind or (mesh_device.device_kind if mesh_device else None)
    with contextlib.suppress(RuntimeError):  # no CUDA backend on this host
        here = jax.local_devices(backend="cuda")[0]
        if kind is None or kind == here.device_kind:
            return int(here.compute_capability.replace(".", ""))
    return capability_by_name(kind) if kind else None


def capability_by_name(kind: str, gpus: Mapping[str, int] = GPUS) -> int:
    words = f" {_words(kind)} "
    known = [name for name in gpus if f" {_words(name)} " in words]
    if not known:
        names = ", ".join(gpus)
        raise ValueError(f"device_kind must name a GPU that is here or that is known; got {kind!r}; known are {names}")
    return gpus[max(known, key=len)]


def _words(name: str) -> str:
    return " ".join(re.findall(r"\w+", name.casefold()))
