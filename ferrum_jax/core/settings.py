"""Checks of arguments that are no arrays: sizes, choices, yes or no."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

INT32_MAX = 2**31 - 1
ROW_DTYPES = ("float16", "bfloat16", "float32")


def as_int(op: str, name: str, value: Any, least: int = 1, most: int = INT32_MAX) -> int:
    """Check a static size, and return it: a Python int in [least, most], and no bool."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{op}: {name} must be a Python int, known when the function is traced; got {type(value).__name__}"
        ) from None
    if not least <= number <= most:
        raise ValueError(f"{op}: {name} must be in [{least}, {most}]; got {number}")
    return number


def as_size(op: str, name: str, value: Any, least: int = 1) -> Any:
    """`as_int` for a size that may also be a symbol of `jax.export`, whose range nobody checks."""
    from jax import export

    return value if export.is_symbolic_dim(value) else as_int(op, name, value, least)


def as_bool(op: str, name: str, value: Any) -> bool:
    """Check a static yes or no, and return it. It must be a bool: Python takes other values for true, even "no"."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{op}: {name} must be True or False; got {type(value).__name__}")
    return bool(value)


def one_of(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Check a static choice."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
