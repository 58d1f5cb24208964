"""The Triton kernels: what they need, and how they are interpreted."""

import importlib

from .interpret import interpreted as interpreted


def refuse(capability: int | None, interpreting: bool) -> str | None:
    """Why no Triton kernel can be used; None if one can."""
    for package in ["triton"] if interpreting else ["triton", "jax_triton"]:
        try:
            importlib.import_module(package)
        except Exception as error:  # jax-triton 0.3 fails in its own ways where JAX's CUDA plugin is not installed
            return f"{package} cannot be imported ({error}): pip install '.[cuda]' from a clone"
    return None
