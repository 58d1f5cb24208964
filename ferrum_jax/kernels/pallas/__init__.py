"""The Pallas kernels, on Mosaic GPU. This file is what the registry asks; it imports no kernel."""

import jax

from .interpret import interpreted as interpreted

NEEDS_JAX = (0, 11, 2)
WGMMA = ("grouped",)  # families whose kernels use wgmma, which only compute capability 9.0 has


def refuse(capability: int | None, interpreting: bool, family: str) -> str | None:
    """Why no Pallas kernel of this family can run on a GPU of this compute capability; None if they can."""
    if jax.__version_info__ < NEEDS_JAX:
        return f"it needs jax >= {'.'.join(map(str, NEEDS_JAX))}; this is jax {jax.__version__}"
    if interpreting:
        return None
    if capability is None:
        return "no target GPU is known: there is none here, and no abstract mesh names one (AbstractDevice.device_kind)"
    if capability < 90:
        return f"it needs a Hopper GPU or a newer one; the target's compute capability is {capability / 10}"
    if family in WGMMA and capability != 90:
        return f"it needs wgmma, of Hopper GPUs alone; the target's compute capability is {capability / 10}"
    return None
