"""The GPU that a program is lowered for: its compute capability, from the GPU that is here or from a GPU's name."""

import contextlib
import dataclasses
import re
from collections.abc import Mapping

import jax

HOPPER = 90  # compute capability 9.0, which is also what counts where no GPU is known


@dataclasses.dataclass(frozen=True)
class Architectures:
    """Some GPUs, by compute capability (90 for 9.0): those in `only`, or, if it is empty, all from `least` on.

    words: what such a GPU is or has, as the end of "it needs ...".
    """

    words: str
    least: int = 0
    only: tuple[int, ...] = ()

    def __contains__(self, capability: int) -> bool:
        return capability in self.only if self.only else capability >= self.least


# Known GPUs with tensor cores, by compute capability. A name matches a GPU whose own name holds the same words side by
# side: "A100" matches "NVIDIA A100-SXM4-80GB", but "A30" does not match "NVIDIA RTX A3000". If several names match, the
# longest counts.
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
    """The compute capability, such as 90 for 9.0, of the GPU that is lowered for.

    The GPU is the one named by `device_kind`, else the one that the abstract mesh names, else the one that is here. A
    GPU that is here is asked for its compute capability, whatever its name is. None: there is no GPU and no name.

    Raises:
      ValueError: the named GPU is not here, and its name is not known.
    """
    mesh_device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device_kind or (mesh_device.device_kind if mesh_device else None)
    with contextlib.suppress(RuntimeError):  # no CUDA backend on this host
        here = jax.local_devices(backend="cuda")[0]
        if kind is None or kind == here.device_kind:
            return int(here.compute_capability.replace(".", ""))
    return capability_by_name(kind) if kind else None


def capability_by_name(kind: str, gpus: Mapping[str, int] = GPUS) -> int:
    """The compute capability of the known GPU whose name `kind` holds; ValueError if it holds none."""
    words = f" {_words(kind)} "
    known = [name for name in gpus if f" {_words(name)} " in words]
    if not known:
        names = ", ".join(gpus)
        raise ValueError(f"device_kind must name a GPU that is here or that is known; got {kind!r}; known are {names}")
    return gpus[max(known, key=len)]


def _words(name: str) -> str:
    return " ".join(re.findall(r"\w+", name.casefold()))
