"""Checkpoints of the Hugging Face hub: one MoE block's tensors, to the arguments of `moe_mlp` and back.

    params = load_moe("OLMoE-1B-7B-0924", "olmoe", prefix="model.layers.3.mlp.")
    routed = route_topk(x @ params.router, **presets.olmoe)
    y = moe_mlp(x, None, params.w_gate_up, params.w_down, router_output=routed)

This is the whole layer for OLMoE, Mixtral and Qwen3-MoE. Other families also have biases, shared experts or another
activation, which their preset and `MoEParams` name; `nnx.MoE.from_params` applies them all.

`layouts` says what each family calls its tensors. This file reads tensors, checks them and makes parameters of them,
and makes tensors of parameters again.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .layouts import AXES, LAYOUTS, Layout, MoEParams, Tensor, as_dtype, shape_of

_UNQUANTISED = "convert them to bfloat16 first, or take the model's unquantised checkpoint"
# Dtypes that only quantised checkpoints have, as NumPy, PyTorch and safetensors call them.
_FEW_BITS = re.compile(r"(torch\.)?float[468]_.*|F[468](_.*)?")
# These endings mean a quantised tensor only where the tensor that they scale is there too: experts.0.w1.scale beside
# experts.0.w1. A router or a norm may have a scale of its own.
_SCALES = ("_scale", ".scale")
# Endings of names that only quantised checkpoints have, what such tensors are, and how to get plain ones.
_QUANTISED = (
    (
        ("_scale_inv",),
        "fp8 with block scales",
        "convert them to bfloat16 first, with inference/fp8_cast_bf16.py of https://github.com/deepseek-ai/DeepSeek-V3",
    ),
    (
        ("_blocks", "_scales"),
        "MXFP4",
        "convert them to bfloat16 first: load the model in transformers with "
        "quantization_config=Mxfp4Config(dequantize=True), and save_pretrained it",
    ),
    (
        ("weight_packed", "qweight", "qzeros", *_SCALES),
        "packed integers or scaled floats",
        _UNQUANTISED,
    ),
)


def load_moe(
    tensors: Mapping[str, Any] | str | os.PathLike[str], layout: str | Layout, *, prefix: str = ""
) -> MoEParams:
    """One MoE block's parameters, as `moe_mlp` takes them, from a checkpoint.

    Everything is checked before anything is copied. Then tensors are read one after the other, and fused tensors one
    expert after the other, so that memory holds the result and at most one expert's matrix beside it.

    Args:
      tensors: a mapping of names to arrays of NumPy, JAX or PyTorch (on the CPU), or to objects that have `shape` and
        are read when they are indexed (h5py, zarr). Or a path: of a safetensors file, or of a folder of such files, as
        the hub has them. A path needs the package `safetensors`: `pip install '.[checkpoint]'` from a clone.
      layout: a name in `LAYOUTS`, such as "mixtral", "qwen3_moe", "olmoe", "deepseek_v3" or "gpt_oss", or your own
        sequence of `Tensor`.
      prefix: the beginning of the names of the block's tensors, such as "model.layers.3.mlp.". Tensors whose names
        begin otherwise are ignored. Those that begin so must be the layout's, and all of them.

    Returns:
      MoEParams of NumPy arrays in the checkpoint's dtypes, so that `jax.device_put` can put each where it belongs.

    Raises:
      TypeError: tensors that are no arrays, or not float16, bfloat16 or float32, or of two dtypes in one parameter.
      ValueError: an unknown layout; tensors that are missing, misshapen, or not the layout's: all are named, with the
        shapes that were expected.
      NotImplementedError: a quantised checkpoint, or one in GGUF; the message says what to do.
      ImportError: a path, without the package `safetensors`.

    >>> import numpy as np
    >>> gate, up, down = (np.full(shape, i, "float32") for i, shape in enumerate([(3, 2), (3, 2), (2, 3)]))
    >>> expert = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    >>> tensors = {f"mlp.experts.{e}.{name}": tensor for e in range(4) for name, tensor in expert.items()}
    >>> tensors["mlp.gate.weight"] = np.zeros((4, 2), "float32")
    >>> params = load_moe(tensors, "olmoe", prefix="mlp.")
    >>> params.router.shape, params.w_gate_up.shape, params.w_gate_up[0, 0].tolist()
    ((2, 4), (4, 2, 6), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    """
    op, chosen, source = "load_moe", _checked_layout("load_moe", layout), _source(tensors, prefix)
    names = [name.removeprefix(prefix) for name in source if name.startswith(prefix)]
    if not names:
        raise ValueError(f"{op}: no tensor's name begins with the prefix {prefix!r}")
    _refuse_quantised(names, prefix)
    # Ask the mapping again for each tensor instead of keeping them: it may read a tensor each time it is asked.
    shapes = {name: _shape(prefix + name, source[prefix + name]) for name in names}
    size, wanted = _expected(chosen, shapes)
    wrong = [
        f"{name} is missing: it should have shape {_show(axes, size)}"
        if name not in shapes
        else f"{name} should have shape {_show(axes, size)}; got {shapes[name]}"
        for name, axes in wanted.items()
        if shapes.get(name) != shape_of(axes, size)
    ]
    wrong += [f"{name}, of shape {shapes[name]}, is not of this layout" for name in shapes if name not in wanted]
    _refuse(f"{op}: the tensors under the prefix {prefix!r} are not those of layout {_name(layout)}", wrong)

    params: dict[str, np.ndarray] = {}
    for tensor in chosen:
        for name, expert, index in _pieces(tensor, size["E"]):
            piece = _read(source[prefix + name][index])
            if tensor.param not in params:
                dtype = as_dtype(op, prefix + name, piece.dtype)
                params[tensor.param] = np.empty(shape_of(AXES[tensor.param], size), dtype)
            param = params[tensor.param]
            if piece.dtype != param.dtype:
                raise TypeError(
                    f"{op}: {prefix}{name} must have the dtype of the other tensors of {tensor.param}, {param.dtype}; "
                    f"got {piece.dtype}"
                )
            part = _part(param, tensor, expert, size)
            part[...] = piece.reshape(part.shape)
            del piece  # before the next one is read
    return MoEParams(**params)


def to_layout(params: MoEParams, layout: str | Layout, *, prefix: str = "") -> dict[str, np.ndarray]:
    """The reverse of `load_moe`: the tensors of a checkpoint, by name, from an MoE block's parameters.

    Args:
      params: as `load_moe` returns them; of NumPy or JAX arrays.
      layout, prefix: as in `load_moe`.

    Returns:
      New NumPy arrays, contiguous, as `safetensors.numpy.save_file` needs them.

    Raises:
      ValueError: an unknown layout; a parameter that the layout has no tensor for; a parameter that it has a tensor for
        and that is None; shapes that do not fit together.

    >>> import numpy as np
    >>> params = MoEParams(np.ones((2, 4)), np.ones((4, 2, 6)), np.ones((4, 3, 2)))
    >>> {name: tensor.shape for name, tensor in to_layout(params, "mixtral_fused").items()}
    {'gate.weight': (4, 2), 'experts.gate_up_proj': (4, 6, 2), 'experts.down_proj': (4, 2, 3)}
    """
    op, chosen = "to_layout", _checked_layout("to_layout", layout)
    arrays = {name: np.asarray(value) for name, value in params._asdict().items() if value is not None}
    needed = {tensor.param for tensor in chosen}
    size = _axis_sizes((AXES[name], array.shape) for name, array in arrays.items())
    wrong = [f"{name} is None, and the layout has it" for name in MoEParams._fields if name in needed - arrays.keys()]
    wrong += [f"{name} is given, and the layout has no such tensor" for name in arrays if name not in needed]
    wrong += [
        f"{name} should have shape {_show(AXES[name], size)}; got {array.shape}"
        for name, array in arrays.items()
        if array.shape != shape_of(AXES[name], size)
    ]
    _refuse(f"{op}: params do not fit layout {_name(layout)}", wrong)

    tensors = {}
    for tensor in chosen:
        for expert in range(size["E"]) if "{}" in tensor.name else (None,):
            part = _part(arrays[tensor.param], tensor, expert, size)
            # Always a contiguous copy: safetensors writes an array's memory as it lies, and ignores strides.
            tensors[prefix + tensor.name.format(expert)] = np.array(part, order="C").reshape(
                shape_of(tensor.axes, size)
            )
    return tensors


def _checked_layout(op: str, layout: str | Layout) -> Layout:
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise ValueError(
                f"{op}: layout must be a sequence of Tensor or one of {', '.join(LAYOUTS)}; got {layout!r}"
            )
        return LAYOUTS[layout]
    halves: dict[str, list[int | None]] = {"router": [], "w_gate_up": [], "w_down": []}
    for tensor in layout:
        axes = tensor.axes + ("E" if "{}" in tensor.name else "") + ("" if tensor.half is None else "U")
        if sorted(axes.replace(" ", "")) != sorted(AXES.get(tensor.param, "").replace(" ", "")):
            known = ", ".join(f"{name} [{axes}]" for name, axes in AXES.items())
            raise ValueError(f"{op}: layout must give its tensors the axes of their parameters, {known}; got {tensor}")
        halves.setdefault(tensor.param, []).append(tensor.half)
    for name, found in halves.items():
        if found not in ([None], [0, 1], [1, 0]):
            raise ValueError(f"{op}: layout must have {name}, whole or both of its halves, once; got halves {found}")
    return layout


def _name(layout: str | Layout) -> str:
    return repr(layout) if isinstance(layout, str) else "of the caller's own"


def _refuse(what: str, wrong: list[str], most: int = 20) -> None:
    if wrong:
        more = [f"and {len(wrong) - most} more"] if len(wrong) > most else []
        raise ValueError(what + ":\n  " + "\n  ".join(wrong[:most] + more))


# ---- where tensors come from


class _Slice:
    """A tensor in a safetensors file. It is read when it is indexed."""

    def __init__(self, file: Any, name: str):
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.dtype = self._slice.get_dtype()  # the file's name of the dtype, because NumPy lacks some of them

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._slice[index]


def _source(tensors: Any, prefix: str) -> Mapping[str, Any]:
    if isinstance(tensors, str | os.PathLike):
        return _in_files(Path(tensors), prefix)
    if isinstance(tensors, Mapping):
        return tensors
    raise TypeError(f"load_moe: tensors must be a mapping of names to arrays, or a path; got {type(tensors).__name__}")


def _in_files(path: Path, prefix: str) -> dict[str, _Slice]:
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if path.suffix.lower() == ".gguf" or (not paths and any(path.glob("*.gguf"))):
        raise NotImplementedError(
            f"load_moe: {path} is in GGUF, which is not read: its tensors are in blocks of quantised numbers; take the "
            "model's checkpoint in safetensors"
        )
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            "load_moe: a path needs the package safetensors: pip install '.[checkpoint]' from a clone"
        ) from error
    if not paths:
        raise FileNotFoundError(f"load_moe: {path} holds no *.safetensors")
    found: dict[str, _Slice] = {}
    for each in paths:
        file = safe_open(each, framework="numpy")
        for name in file.keys():  # noqa: SIM118 - a file is no mapping
            if name in found:
                raise ValueError(f"load_moe: {name} stands in two files of {path}; the second is {each.name}")
            if name.startswith(prefix):
                found[name] = _Slice(file, name)
    return found


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if not hasattr(value, "shape") or not hasattr(value, "__getitem__"):
        raise TypeError(
            f"load_moe: {name} must be an array, or have shape and be read when it is indexed; got "
            f"{type(value).__name__}"
        )
    if _FEW_BITS.fullmatch(dtype := str(getattr(value, "dtype", ""))):
        raise NotImplementedError(
            f"load_moe: {name} has dtype {dtype}, so that the tensors are scaled floats of few bits: {_UNQUANTISED}"
        )
    return tuple(value.shape)


def _read(value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except TypeError:  # NumPy cannot convert PyTorch's bfloat16; JAX can
        return np.asarray(jnp.from_dlpack(value))


def _refuse_quantised(names: list[str], prefix: str) -> None:
    scaled = {stem for name in names for stem in (name, name.removesuffix(".weight"))}
    for name in names:
        for endings, what, remedy in _QUANTISED:
            if name.endswith(endings) and (not name.endswith(_SCALES) or name[: -len("_scale")] in scaled):
                raise NotImplementedError(f"load_moe: {prefix}{name} says that the tensors are {what}: {remedy}")


# ---- shapes


def _axis_sizes(terms: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """The size of every axis, by vote, so that an error names the one tensor that differs from all others."""
    votes: dict[str, Counter[int]] = {}
    for axes, shape in terms:
        labels = axes.split()
        for label, entries in zip(labels, shape, strict=False) if len(labels) == len(shape) else ():
            votes.setdefault(label.strip("U"), Counter())[entries // 2 if "U" in label else entries] += 1
    return {letter: vote.most_common(1)[0][0] for letter, vote in votes.items()} | {"U": 2, "1": 1}


def _expected(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], dict[str, str]]:
    """The size of every axis, and the axes of every tensor that should be there."""
    terms, experts = [], []
    for tensor in layout:
        pattern = re.compile(re.escape(tensor.name).replace(re.escape("{}"), "(0|[1-9][0-9]*)"))
        matches = [match for match in map(pattern.fullmatch, shapes) if match]
        terms += [(tensor.axes, shapes[match[0]]) for match in matches]
        experts += [int(match[1]) for match in matches if match.groups()]
    size = _axis_sizes(terms)
    if experts:
        size.setdefault("E", max(experts) + 1)
    names = ((tensor, name) for tensor in layout for name, _, _ in _pieces(tensor, size.get("E", 1)))
    return size, {name: tensor.axes for tensor, name in names}


def _show(axes: str, size: Mapping[str, int]) -> str:
    names = [f"2{label.replace('U', '')}" if "U" in label else label for label in axes.split()]
    known = zip(names, shape_of(axes, size), strict=True)
    return f"[{', '.join(name if entries < 0 or name == '1' else f'{name}={entries}' for name, entries in known)}]"


# ---- parts of parameters


def _pieces(tensor: Tensor, num_experts: int) -> Iterator[tuple[str, int | None, Any]]:
    """The parts of a tensor that are read one at a time: the name, the expert's number, and the index to read with."""
    if "{}" in tensor.name:
        yield from ((tensor.name.format(e), e, slice(None)) for e in range(num_experts))
    elif len(tensor.axes.split()) == 3:
        yield from ((tensor.name, e, e) for e in range(num_experts))
    else:
        yield tensor.name, None, slice(None)


def _part(param: np.ndarray, tensor: Tensor, expert: int | None, size: Mapping[str, int]) -> np.ndarray:
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
