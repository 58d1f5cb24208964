"""Parameters of a block that a checkpoint holds quantised: read into `QuantizedMatrices`, and written again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ..core.quantized import QuantizedMatrices
from .found import ADDED_UP, Config, Found
from .layouts import AXES, Tensor
from .published import METHODS, Kind, published_as


def kinds_of(found: Mapping[str, Found], shapes: Mapping[str, Any], config: Config) -> dict[str, Kind]:
    """The kind of each parameter that is quantised. All tensors of a parameter, and of all experts, have one kind."""
    kinds: dict[str, Kind] = {}
    first: dict[str, tuple[str, Kind | None]] = {}
    wrong = []
    for name, tensor in found.items():
        param = tensor.tensor.param
        try:
            kind = tensor.kind(shapes[name], config) if tensor.method else None
        except ValueError as error:
            wrong.append(str(error))
            continue
        of_experts = "experts" if param in ("w_gate_up", "w_down") else param
        other, expected = first.setdefault(of_experts, (name, kind))
        if (kind and kind._replace(block=())) != (expected and expected._replace(block=())) or (
            param in kinds and kinds[param] != kind
        ):
            wrong.append(f"{tensor.named(name)} is {_words(kind)}, and {other} is {_words(expected)}")
        elif kind:
            kinds[param] = kind
    refuse("load_moe: quantised tensors do not fit together", wrong)
    return kinds


def _words(kind: Kind | None) -> str:
    if kind is None:
        return "not quantised"
    tensors = ", ".join(f"{ending or 'itself'} {dtype}" for ending, dtype, _ in kind.published.tensors)
    return f"{kind.format} in blocks of {kind.block} ({kind.published.method}: {tensors})"


def quantized_matrix(tensor: Found, expert: int | None, shape: Any, kind: Kind, dtype: Any) -> QuantizedMatrices:
    """One matrix [H, N]."""
    parts = tensor.parts(expert, tensor.matrix_size(shape))
    return QuantizedMatrices(*parts, kind.format, kind.block, 1, np.dtype(dtype), kind.published)


def dequantized(tensor: Found, matrix: QuantizedMatrices, dtype: Any) -> np.ndarray:
    """One matrix as floats, with the axes that the layout gives it."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        floats = np.asarray(matrix.dequantize(dtype))
    return floats if tensor.input_first else floats.T


def put(
    params: dict[str, Any], tensor: Tensor, expert: int | None, matrix: QuantizedMatrices, size: Mapping[str, int]
) -> None:
    """Put one matrix into its parameter, which is made if it is the first."""
    parts = 1 if tensor.half is None else 2
    if tensor.param not in params:
        lead = (size["E"],) if AXES[tensor.param].startswith("E") else ()

        def empty(x: np.ndarray) -> np.ndarray:
            return np.empty((*lead, x.shape[0] * parts, *x.shape[1:]), x.dtype)

        params[tensor.param] = dataclasses.replace(jax.tree.map(empty, matrix), parts=parts)
    _check_interleaved("load_moe", tensor, matrix)
    for whole, part in zip(jax.tree.leaves(params[tensor.param]), jax.tree.leaves(matrix), strict=True):
        view = _rows(whole if expert is None else whole[expert], tensor)
        view[...] = part.reshape(view.shape)


def _check_interleaved(op: str, tensor: Tensor, w: QuantizedMatrices) -> None:
    """Refuse blocks of several rows where rows of gate and up alternate, unless one scale serves all rows."""
    if "FU" in tensor.axes.split() and w.block[0] != 1 and w.scales.shape[-2] != 1:
        raise ValueError(f"{op}: {tensor.name} alternates gate and up, which blocks of {w.block} would mix")


def _rows(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """The rows of one stored matrix, or of its scales, that are the tensor's, as a view in the tensor's order."""
    n, width = array.shape
    if tensor.half is not None:
        return array.reshape(2, n // 2, width)[tensor.half]
    if "FU" in tensor.axes.split() and n > 1:  # gate and up alternate
        return array.reshape(2, n // 2, width).swapaxes(0, 1)
    return array


def tensors_of(op: str, prefix: str, w: QuantizedMatrices, tensor: Tensor, expert: int | None) -> dict[str, np.ndarray]:
    """The tensors that hold quantised matrices in files: one expert's, or those of all in one."""
    published = published_as(w)
    _check_halves(op, prefix + tensor.name, w, tensor)
    _check_interleaved(op, tensor, w)
    experts = [None] if w.ndim == 2 else [expert] if expert is not None else list(range(len(w.values)))
    matrices = []
    for each in experts:
        own = [x if each is None else x[each] for x in jax.tree.leaves(w)]
        rows = [_rows(x, tensor) for x in own]
        leaves = [np.ascontiguousarray(x).reshape(-1, x.shape[-1]) for x in rows]
        matrices.append(jax.tree.unflatten(jax.tree.structure(w), leaves))
    name, fused = prefix + tensor.name.format(expert), w.ndim == 3 and expert is None
    endings = [ending for ending, *_ in published.tensors]
    flip = tensor.axes.split()[-2] == ADDED_UP[tensor.param] and "" in endings
    tensors = {}
    try:
        packed = [METHODS[published.method].pack(matrix, endings) for matrix in matrices]
        for ending, dtype, ndim in published.tensors:
            arrays = [_as_in_file(each[ending].T if flip else each[ending], dtype, ndim) for each in packed]
            tensors[_name_in_files(name, ending)] = np.stack(arrays) if fused else arrays[0]
    except ValueError as error:
        raise ValueError(f"{op}: {name} cannot be written as {published.method}: {error}") from error
    return tensors


def _check_halves(op: str, name: str, w: QuantizedMatrices, tensor: Tensor) -> None:
    """Refuse blocks that hold gate and up, where the layout has two tensors; and the other way round."""
    parts, width = 1 if tensor.half is None else 2, w.shape[-1] // 2
    both = "w_gate_up" in tensor.param
    if both and w.parts != parts and (w.block[0] is None or width % w.block[0]):
        raise ValueError(
            f"{op}: {name} cannot be written: blocks of {w.block[0] or 'all'} columns begin anew with each of "
            f"{w.parts} matrices side by side, and the layout's tensors hold {3 - parts} of gate and up"
        )


def _as_in_file(array: np.ndarray, dtype: str, ndim: int) -> np.ndarray:
    """A new contiguous array."""
    shape = array.shape if array.ndim == ndim else (-1,) * ndim
    if {array.dtype.name, dtype} == {"uint8", "float8_e8m0fnu"}:  # the same bytes
        array = np.ascontiguousarray(array).view(dtype)
    return np.array(array, np.dtype(dtype), order="C").reshape(shape)


def _name_in_files(name: str, ending: str) -> str:
    if not ending.startswith("."):
        return name + ending
    if not name.endswith(".weight"):
        raise ValueError(f"its name does not end in .weight, which {ending} would replace")
    return name.removesuffix(".weight") + ending


def refuse(what: str, wrong: list[str], most: int = 20) -> None:
    if wrong:
        more = [f"and {len(wrong) - most} more"] if len(wrong) > most else []
        raise ValueError(what + ":\n  " + "\n  ".join(wrong[:most] + more))
