"""The axes of a block's parameters and tensors: their sizes, and which part of a parameter a tensor is."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..core.settings import ROW_DTYPES
from .layouts import AXES, Layout, Tensor


def axis_sizes(terms: Iterable[tuple[str, tuple[int | None, ...]]]) -> dict[str, int]:
    """The size of every axis, by vote, so that an error names the one tensor that differs from all others.

    A size that is None has no vote.
    """
    votes: dict[str, Counter[int]] = {}
    for axes, shape in terms:
        labels = axes.split()
        for label, entries in zip(labels, shape, strict=False) if len(labels) == len(shape) else ():
            if entries is None:
                continue
            votes.setdefault(label.strip("U"), Counter())[entries // 2 if "U" in label else entries] += 1
    return {letter: vote.most_common(1)[0][0] for letter, vote in votes.items()} | {"U": 2, "1": 1}


def expected(layout: Layout, shapes: Mapping[str, tuple[int | None, ...]]) -> tuple[dict[str, int], dict[str, str]]:
    """The size of every axis, and the axes of every tensor that should be there."""
    terms, experts = [], []
    for tensor in layout:
        pattern = re.compile(pattern_of(tensor))
        matches = [match for match in map(pattern.fullmatch, shapes) if match]
        terms += [(tensor.axes, shapes[match[0]]) for match in matches]
        experts += [int(match[1]) for match in matches if match.groups()]
    size = axis_sizes(terms)
    if experts:
        size.setdefault("E", max(experts) + 1)
    names = ((tensor, name) for tensor in layout for name, _, _ in pieces(tensor, size.get("E", 1)))
    return size, {name: tensor.axes for tensor, name in names}


def show(axes: str, size: Mapping[str, int]) -> str:
    names = [f"2{label.replace('U', '')}" if "U" in label else label for label in axes.split()]
    known = zip(names, shape_of(axes, size), strict=True)
    return f"[{', '.join(name if entries < 0 or name == '1' else f'{name}={entries}' for name, entries in known)}]"


def pieces(tensor: Tensor, num_experts: int) -> Iterator[tuple[str, int | None, Any]]:
    """The parts of a tensor that are read one at a time: the name, the expert's number, and the index to read with."""
    if "{}" in tensor.name:
        yield from ((tensor.name.format(e), e, slice(None)) for e in range(num_experts))
    elif len(tensor.axes.split()) == 3:
        yield from ((tensor.name, e, e) for e in range(num_experts))
    else:
        yield tensor.name, None, slice(None)


def part(param: np.ndarray, tensor: Tensor, expert: int | None, size: Mapping[str, int]) -> np.ndarray:
    """The part of a parameter that a tensor (or one expert's part of a tensor) goes to, as a view.

    The view's axes have the tensor's order.
    """
    letters = AXES[tensor.param].replace(" ", "")
    view = param.reshape([size[letter] for letter in letters])
    if expert is not None:
        view, letters = view[expert], letters[1:]
    if tensor.half is not None:
        view = view[(slice(None),) * letters.index("U") + (tensor.half,)]
        letters = letters.replace("U", "")
    order = [letter for letter in tensor.axes.replace(" ", "") if letter in letters]
    return view.transpose([letters.index(letter) for letter in order])


def filled(shape: tuple[int | None, ...], expected: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, with sizes that are expected where it does not say one."""
    if len(shape) != len(expected):
        return tuple(-1 if size is None else size for size in shape)
    return tuple(b if a is None else a for a, b in zip(shape, expected, strict=True))


def pattern_of(tensor: Tensor) -> str:
    """The pattern of the tensor's names."""
    return re.escape(tensor.name).replace(re.escape("{}"), "(0|[1-9][0-9]*)")


def shape_of(axes: str, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an array with these axes. Where a size is unknown, its entry is negative, and no array has it."""
    return tuple(math.prod(size.get(letter, -1) for letter in label) for label in axes.split())


def as_dtype(op: str, name: str, dtype: Any) -> Any:
    """A dtype that parameters may have, or the TypeError that says which those are."""
    if jnp.dtype(dtype).name not in ROW_DTYPES:
        raise TypeError(f"{op}: {name} must be float16, bfloat16 or float32; got {jnp.dtype(dtype)}")
    return jnp.dtype(dtype)
