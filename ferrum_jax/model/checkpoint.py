"""Checkpoints of the Hugging Face hub: one MoE block's tensors, to the arguments of `moe_mlp` and back.

    params = load_moe("OLMoE-1B-7B-0924", "olmoe", prefix="model.layers.3.mlp.")
    routed = route_topk(x @ params.router, **presets.olmoe)
    y = moe_mlp(x, None, params.w_gate_up, params.w_down, router_output=routed)

which is all for OLMoE, Mixtral and Qwen3-MoE. Other families also have biases, shared experts or another activation,
which their preset and `MoEParams` name; `nnx.MoE.from_params` applies them all.

A layout is data: for each tensor of a block its name, the parameter that it is (a part of), and its axes. `LAYOUTS`
has those of the families in `presets`, under the same names: as the hub's files have them, and, with `_fused` behind
the name, as transformers 5 holds them in a model's state dict (one tensor for all experts). Their sources are
transformers' modeling files, which `presets` links to, and the conversions between the two forms,
https://github.com/huggingface/transformers/blob/main/src/transformers/conversion_mapping.py.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..core.signature import ROW_DTYPES


class MoEParams(NamedTuple):
    """The parameters of an MoE block; None where a model has none. F is an expert's width, S the shared experts'.

    As a pytree it goes through `jax.device_put`, with a sharding for each field if need be.
    """

    #: [H, E]: logits = x @ router.
    router: Any
    #: [E, H, 2F], gate then up, and [E, F, H]: those of `moe_mlp`.
    w_gate_up: Any
    w_down: Any
    #: [E]: logits = x @ router + router_bias.
    router_bias: Any = None
    #: [E]: added to the router's scores for the choice alone, the `bias` of `route_topk`.
    score_bias: Any = None
    #: [E, 2F] and [E, H]: those of `moe_mlp`.
    b_gate_up: Any = None
    b_down: Any = None
    #: [H, 2S], gate then up, and [S, H]: the MLP that serves every token.
    shared_w_gate_up: Any = None
    shared_w_down: Any = None
    #: [H, 1]: the shared MLP's output is multiplied by sigmoid(x @ shared_gate).
    shared_gate: Any = None


class Tensor(NamedTuple):
    """One tensor of a block, or one of each expert: then "{}" in its name stands for the expert.

    Its axes, with a space between two: H hidden width, E experts, F an expert's width, S the shared experts'. "UF" is
    an axis of 2F entries, gate (U = 0) then up (U = 1); "FU" has the two interleaved. `half` is U of a tensor that is
    gate or up alone.
    """

    name: str
    param: str
    axes: str
    half: int | None = None


Layout = Sequence[Tensor]

_AXES = {
    "router": "H E",
    "w_gate_up": "E H UF",
    "w_down": "E F H",
    "router_bias": "E",
    "score_bias": "E",
    "b_gate_up": "E UF",
    "b_down": "E H",
    "shared_w_gate_up": "H US",
    "shared_w_down": "S H",
    "shared_gate": "H 1",
}


def _experts(gate: str, up: str, down: str) -> Layout:
    return (
        Tensor(f"experts.{{}}.{gate}.weight", "w_gate_up", "F H", 0),
        Tensor(f"experts.{{}}.{up}.weight", "w_gate_up", "F H", 1),
        Tensor(f"experts.{{}}.{down}.weight", "w_down", "H F"),
    )


def _shared(name: str) -> Layout:
    return (
        Tensor(f"{name}.gate_proj.weight", "shared_w_gate_up", "S H", 0),
        Tensor(f"{name}.up_proj.weight", "shared_w_gate_up", "S H", 1),
        Tensor(f"{name}.down_proj.weight", "shared_w_down", "H S"),
    )


_ROUTER = (Tensor("gate.weight", "router", "E H"),)
_PROJ = _experts("gate_proj", "up_proj", "down_proj")
_W123 = _experts("w1", "w3", "w2")
_FUSED = (Tensor("experts.gate_up_proj", "w_gate_up", "E UF H"), Tensor("experts.down_proj", "w_down", "E H F"))
_QWEN3_NEXT = (*_ROUTER, *_shared("shared_expert"), Tensor("shared_expert_gate.weight", "shared_gate", "1 H"))
_DEEPSEEK = (*_ROUTER, Tensor("gate.e_score_correction_bias", "score_bias", "E"), *_shared("shared_experts"))
_MINIMAX = (*_ROUTER, Tensor("e_score_correction_bias", "score_bias", "E"))

#: The layouts by name. Prefixes are the likes of "model.layers.3.mlp."; "model.layers.3.block_sparse_moe." for Mixtral
#: and MiniMax-M2 as the hub has them; "language_model.model.layers.3.feed_forward." for Llama 4.
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "mixtral": (*_ROUTER, *_W123),
        "mixtral_fused": (*_ROUTER, *_FUSED),
        "qwen3_moe": (*_ROUTER, *_PROJ),
        "qwen3_moe_fused": (*_ROUTER, *_FUSED),
        "qwen3_next": (*_QWEN3_NEXT, *_PROJ),
        "qwen3_next_fused": (*_QWEN3_NEXT, *_FUSED),
        "deepseek_v3": (*_DEEPSEEK, *_PROJ),
        "deepseek_v3_fused": (*_DEEPSEEK, *_FUSED),
        "kimi_k2": (*_DEEPSEEK, *_PROJ),
        "kimi_k2_fused": (*_DEEPSEEK, *_FUSED),
        "glm4_moe": (*_DEEPSEEK, *_PROJ),
        "glm4_moe_fused": (*_DEEPSEEK, *_FUSED),
        "olmoe": (*_ROUTER, *_PROJ),
        "olmoe_fused": (*_ROUTER, *_FUSED),
        "gpt_oss": (
            Tensor("router.weight", "router", "E H"),
            Tensor("router.bias", "router_bias", "E"),
            Tensor("experts.gate_up_proj", "w_gate_up", "E H FU"),
            Tensor("experts.gate_up_proj_bias", "b_gate_up", "E FU"),
            Tensor("experts.down_proj", "w_down", "E F H"),
            Tensor("experts.down_proj_bias", "b_down", "E H"),
        ),
        "llama4": (
            Tensor("router.weight", "router", "E H"),
            *_shared("shared_expert"),
            Tensor("experts.gate_up_proj", "w_gate_up", "E H UF"),
            Tensor("experts.down_proj", "w_down", "E F H"),
        ),
        "minimax_m2": (*_MINIMAX, *_W123),
        "minimax_m2_fused": (*_MINIMAX, *_FUSED),
    }
)

_UNQUANTISED = "convert them to bfloat16 first, or take the model's unquantised checkpoint"
# Dtypes that only quantised checkpoints have, as NumPy, PyTorch and safetensors call them.
_FEW_BITS = re.compile(r"(torch\.)?float[468]_.*|F[468](_.*)?")
# Endings that say so behind another tensor's name, as in experts.0.w1.scale. A router's or a norm's scale is its own.
_SCALES = ("_scale", ".scale")
# Endings of names that only quantised checkpoints have, what they are, and what makes plain ones of them.
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

    Everything is checked before anything is copied. Then tensors are read one after the other, fused ones expert by
    expert: beside the result there is never more than one expert's matrix in memory.

    Args:
      tensors: a mapping of names to arrays, NumPy's, JAX's or PyTorch's on the CPU, or to what is read when it is
        indexed and has `shape` (h5py, zarr); or the path of a safetensors file, or of a folder of them, as the hub has
        them, for which the package `safetensors` must be there: `pip install '.[checkpoint]'` from a clone.
      layout: a name in `LAYOUTS`, such as "mixtral", "qwen3_moe", "olmoe", "deepseek_v3" or "gpt_oss", or a sequence of
        `Tensor` of one's own.
      prefix: what the names of the block's tensors begin with, such as "model.layers.3.mlp.". Other tensors may be
        there; under the prefix nothing but the layout's.

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
    op, chosen, source = "load_moe", _layout("load_moe", layout), _source(tensors, prefix)
    names = [name.removeprefix(prefix) for name in source if name.startswith(prefix)]
    if not names:
        raise ValueError(f"{op}: no tensor's name begins with the prefix {prefix!r}")
    _refuse_quantised(names, prefix)
    # Values are never kept: a mapping may read a tensor whenever it is asked for one.
    shapes = {name: _shape(prefix + name, source[prefix + name]) for name in names}
    size, wanted = _expected(chosen, shapes)
    wrong = [
        f"{name} is missing: it should have shape {_show(axes, size)}"
        if name not in shapes
        else f"{name} should have shape {_show(axes, size)}; got {shapes[name]}"
        for name, axes in wanted.items()
        if shapes.get(name) != _sized(axes, size)
    ]
    wrong += [f"{name}, of shape {shapes[name]}, is not of this layout" for name in shapes if name not in wanted]
    _refuse(f"{op}: the tensors under the prefix {prefix!r} are not those of layout {_name(layout)}", wrong)

    params: dict[str, np.ndarray] = {}
    for tensor in chosen:
        for name, expert, index in _pieces(tensor, size["E"]):
            piece = _read(source[prefix + name][index])
            if tensor.param not in params:
                if piece.dtype.name not in ROW_DTYPES:
                    raise TypeError(f"{op}: {prefix}{name} must be float16, bfloat16 or float32; got {piece.dtype}")
                params[tensor.param] = np.empty(_sized(_AXES[tensor.param], size), piece.dtype)
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
    """The way back: the tensors of a checkpoint, by name, from an MoE block's parameters.

    Args:
      params: as `load_moe` gives them; JAX arrays may stand in it.
      layout, prefix: as in `load_moe`.

    Returns:
      New NumPy arrays, contiguous, as `safetensors.numpy.save_file` needs them.

    Raises:
      ValueError: an unknown layout; parameters that it has no place for, or that it has and are None; shapes that do
        not fit together.

    >>> import numpy as np
    >>> params = MoEParams(np.ones((2, 4)), np.ones((4, 2, 6)), np.ones((4, 3, 2)))
    >>> {name: tensor.shape for name, tensor in to_layout(params, "mixtral_fused").items()}
    {'gate.weight': (4, 2), 'experts.gate_up_proj': (4, 6, 2), 'experts.down_proj': (4, 2, 3)}
    """
    op, chosen = "to_layout", _layout("to_layout", layout)
    arrays = {name: np.asarray(value) for name, value in params._asdict().items() if value is not None}
    needed = {tensor.param for tensor in chosen}
    size = _sizes((_AXES[name], array.shape) for name, array in arrays.items())
    wrong = [f"{name} is None, and the layout has it" for name in MoEParams._fields if name in needed - arrays.keys()]
    wrong += [f"{name} is given, and the layout has no such tensor" for name in arrays if name not in needed]
    wrong += [
        f"{name} should have shape {_show(_AXES[name], size)}; got {array.shape}"
        for name, array in arrays.items()
        if array.shape != _sized(_AXES[name], size)
    ]
    _refuse(f"{op}: params do not fit layout {_name(layout)}", wrong)

    tensors = {}
    for tensor in chosen:
        for expert in range(size["E"]) if "{}" in tensor.name else (None,):
            part = _part(arrays[tensor.param], tensor, expert, size)
            # Copied in any case: safetensors writes an array's memory, whatever its strides are.
            tensors[prefix + tensor.name.format(expert)] = np.array(part, order="C").reshape(_sized(tensor.axes, size))
    return tensors


def _layout(op: str, layout: str | Layout) -> Layout:
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise ValueError(
                f"{op}: layout must be a sequence of Tensor or one of {', '.join(LAYOUTS)}; got {layout!r}"
            )
        return LAYOUTS[layout]
    halves: dict[str, list[int | None]] = {"router": [], "w_gate_up": [], "w_down": []}
    for tensor in layout:
        axes = tensor.axes + ("E" if "{}" in tensor.name else "") + ("" if tensor.half is None else "U")
        if sorted(axes.replace(" ", "")) != sorted(_AXES.get(tensor.param, "").replace(" ", "")):
            known = ", ".join(f"{name} [{axes}]" for name, axes in _AXES.items())
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
    """A tensor in a safetensors file, read when it is indexed."""

    def __init__(self, file: Any, name: str):
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.dtype = self._slice.get_dtype()  # by the file's name for it: NumPy has not all of them

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
    except TypeError:  # PyTorch's bfloat16, which NumPy alone cannot take
        return np.asarray(jnp.from_dlpack(value))


def _refuse_quantised(names: list[str], prefix: str) -> None:
    scaled = {stem for name in names for stem in (name, name.removesuffix(".weight"))}
    for name in names:
        for endings, what, remedy in _QUANTISED:
            if name.endswith(endings) and (not name.endswith(_SCALES) or name[: -len("_scale")] in scaled):
                raise NotImplementedError(f"load_moe: {prefix}{name} says that the tensors are {what}: {remedy}")


# ---- shapes


def _sizes(terms: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """The size of every axis: what most tensors say, so that an error names the one that differs."""
    votes: dict[str, Counter[int]] = {}
    for axes, shape in terms:
        labels = axes.split()
        for label, entries in zip(labels, shape, strict=False) if len(labels) == len(shape) else ():
            votes.setdefault(label.strip("U"), Counter())[entries // 2 if "U" in label else entries] += 1
    return {letter: vote.most_common(1)[0][0] for letter, vote in votes.items()} | {"U": 2, "1": 1}


def _expected(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], dict[str, str]]:
    """The sizes, and the axes of every tensor that should be there."""
    terms, experts = [], []
    for tensor in layout:
        pattern = re.compile(re.escape(tensor.name).replace(re.escape("{}"), "(0|[1-9][0-9]*)"))
        matches = [match for match in map(pattern.fullmatch, shapes) if match]
        terms += [(tensor.axes, shapes[match[0]]) for match in matches]
        experts += [int(match[1]) for match in matches if match.groups()]
    size = _sizes(terms)
    if experts:
        size.setdefault("E", max(experts) + 1)
    names = ((tensor, name) for tensor in layout for name, _, _ in _pieces(tensor, size.get("E", 1)))
    return size, {name: tensor.axes for tensor, name in names}


def _sized(axes: str, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape; where a size is unknown a negative one, which no array has."""
    return tuple(math.prod(size.get(letter, -1) for letter in label) for label in axes.split())


def _show(axes: str, size: Mapping[str, int]) -> str:
    names = [f"2{label.replace('U', '')}" if "U" in label else label for label in axes.split()]
    known = zip(names, _sized(axes, size), strict=True)
    return f"[{', '.join(name if entries < 0 or name == '1' else f'{name}={entries}' for name, entries in known)}]"


# ---- parts of parameters


def _pieces(tensor: Tensor, num_experts: int) -> Iterator[tuple[str, int | None, Any]]:
    """What is read at once: a tensor's name, the expert that it belongs to, the index to read it with."""
    if "{}" in tensor.name:
        yield from ((tensor.name.format(e), e, slice(None)) for e in range(num_experts))
    elif len(tensor.axes.split()) == 3:
        yield from ((tensor.name, e, e) for e in range(num_experts))
    else:
        yield tensor.name, None, slice(None)


def _part(param: np.ndarray, tensor: Tensor, expert: int | None, size: Mapping[str, int]) -> np.ndarray:
    """The view of a parameter that holds a tensor, or one expert's of it, its axes in the tensor's order."""
    letters = _AXES[tensor.param].replace(" ", "")
    view = param.reshape([size[letter] for letter in letters])
    if expert is not None:
        view, letters = view[expert], letters[1:]
    if tensor.half is not None:
        view = view[(slice(None),) * letters.index("U") + (tensor.half,)]
        letters = letters.replace("U", "")
    order = [letter for letter in tensor.axes.replace(" ", "") if letter in letters]
    return view.transpose([letters.index(letter) for letter in order])
