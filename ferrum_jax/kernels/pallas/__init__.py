"""The Pallas kernels, on Mosaic GPU. This file is what the registry asks; it imports no kernel."""

import jax

from .interpret import interpreted as interpreted

NEEDS_JAX = (0, 11, 2)


def refuse(capability: int | None, interpreting: bool) -> str | None:
    """Why no Pallas kernel can be used; None if one can."""
    if jax.__version_info__ < NEEDS_JAX:
        return f"it needs jax >= {'.'.join(map(str, NEEDS_JAX))}; this is jax {jax.__version__}"
    if interpreting:
        return None
    if capability is None:
        return "no target GPU is known: there is none here, and no abstract mesh names one (AbstractDevice.device_kind)"
    return None
