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
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ..core.quantized import QuantizedMatrices
from ..ops.activations import SWIGLU_LIMIT
from .axes import as_dtype, axis_sizes, expected, filled, part, pieces, shape_of, show
from .found import Config, config_of_quantization, found_tensors
from .layouts import AXES, LAYOUTS, Layout, MoEParams
from .presets import PRESETS, Preset
from .quantized_params import dequantized, kinds_of, put, quantized_matrix, refuse, tensors_of
from .tensor_files import config_of, read, source_of


def load_moe(
    tensors: Mapping[str, Any] | str | os.PathLike[str],
    layout: str | Layout,
    *,
    prefix: str = "",
    dequantize: Any = None,
    preset: Preset | None = None,
) -> MoEParams:
    """One MoE block's parameters, as `moe_mlp` takes them, from a checkpoint.

    Everything is checked before anything is copied. Then tensors are read one after the other, and fused tensors one
    expert after the other, so that memory holds the result and at most one expert's matrix beside it.

    Matrices that are published quantised stay so: they become `QuantizedMatrices`, whose numbers and scales are those
    of the files. Read are fp8 (e4m3fn) with scales for blocks, rows or whole matrices; MXFP4; and integers of 4 and 8
    bits by groups, of compressed-tensors, GPTQ (without act-order) and AWQ. Names and shapes say which it is. Scales of
    activations are not read.

    Args:
      tensors: a mapping of names to arrays of NumPy, JAX or PyTorch (on the CPU), or to objects that have `shape` and
        are read when they are indexed (h5py, zarr). Or a path: of a safetensors file, or of a folder of such files, as
        the hub has them. If the folder has a model.safetensors.index.json, that says which file holds what.
      layout: a name in `LAYOUTS`, such as "mixtral", "qwen3_moe", "olmoe", "deepseek_v3" or "gpt_oss", or your own
        sequence of `Tensor`.
      prefix: the beginning of the names of the block's tensors, such as "model.layers.3.mlp.". Tensors whose names
        begin otherwise are ignored. Those that begin so must be the layout's, and all of them.
      dequantize: a dtype, float16, bfloat16 or float32, of which quantised matrices become plain arrays. None: they
        stay quantised.
      preset: of the model, with which the folder's config.json must agree, if there is one, about top_k,
        norm_topk_prob, scale, groups, and the limit of the activation. None: that of the layout's name.

    Returns:
      MoEParams of NumPy arrays in the checkpoint's dtypes, so that `jax.device_put` can put each where it belongs.
      The dtype that `QuantizedMatrices` stand for is that of the router.

    Raises:
      TypeError: tensors that are no arrays, or not float16, bfloat16 or float32, or of two dtypes in one parameter.
      ValueError: an unknown layout; tensors that are missing, misshapen, or not the layout's: all are named, with the
        shapes that were expected; quantised tensors that do not fit together, or of two formats; a config.json that
        disagrees with the preset; a damaged file.
      NotImplementedError: a quantised format that is not read, or a checkpoint in GGUF.
      FileNotFoundError: no such path, or a file that the index names is missing.

    >>> import numpy as np
    >>> gate, up, down = (np.full(shape, i, "float32") for i, shape in enumerate([(3, 2), (3, 2), (2, 3)]))
    >>> expert = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    >>> tensors = {f"mlp.experts.{e}.{name}": tensor for e in range(4) for name, tensor in expert.items()}
    >>> tensors["mlp.gate.weight"] = np.zeros((4, 2), "float32")
    >>> params = load_moe(tensors, "olmoe", prefix="mlp.")
    >>> params.router.shape, params.w_gate_up.shape, params.w_gate_up[0, 0].tolist()
    ((2, 4), (4, 2, 6), [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    """
    op, chosen = "load_moe", _checked_layout("load_moe", layout)
    dequantize = None if dequantize is None else as_dtype(op, "dequantize", dequantize)
    source, config = source_of(tensors, prefix), config_of(tensors)
    _check_preset(layout, preset, config)
    quantization = config_of_quantization(config)
    found, others = found_tensors(source, prefix, chosen, quantization)
    if not found and (not others or others[0].startswith(".")):
        hint = _prefixes(source, prefix, chosen)
        raise ValueError(f"{op}: no tensor's name begins with the prefix {prefix!r}; {hint}")
    shapes = {name: tensor.shape for name, tensor in found.items()}
    size, wanted = expected(chosen, shapes)
    shapes = {name: filled(shape, shape_of(found[name].tensor.axes, size)) for name, shape in shapes.items()}
    wrong = [
        f"{name} is missing: it should have shape {show(axes, size)}"
        if name not in shapes
        else f"{found[name].named(name)} should have shape {show(axes, size)}; got {shapes[name]}"
        for name, axes in wanted.items()
        if shapes.get(name) != shape_of(axes, size)
    ]
    strange = {name: source[prefix + name].shape for name in others} | {n: shapes[n] for n in found if n not in wanted}
    wrong += [f"{name}, of shape {tuple(shape)}, is not of this layout" for name, shape in strange.items()]
    hint = _fitting(source, prefix, quantization, layout) if wrong else ""
    hint = hint or ("" if found else _prefixes(source, prefix, chosen))
    what = f"{op}: the tensors under the prefix {prefix!r} are not those of layout {_name(layout)}"
    refuse(what + (f"; {hint}" if hint else ""), wrong)
    kinds = kinds_of(found, shapes, quantization)

    params: dict[str, Any] = {}
    for tensor in sorted(chosen, key=lambda tensor: tensor.param != "router"):  # whose dtype the others ask for
        for name, expert, index in pieces(tensor, size["E"]):
            if tensor.param in kinds:
                kind, dtype = kinds[tensor.param], params["router"].dtype
                matrix = quantized_matrix(found[name], expert, shapes[name], kind, dtype)
                if dequantize is None:
                    put(params, tensor, expert, matrix, size)
                    continue
                piece = dequantized(found[name], matrix, dequantize)
            else:
                piece = read(source[found[name].tensors[""]], index)
            if tensor.param not in params:
                dtype = as_dtype(op, prefix + name, piece.dtype)
                params[tensor.param] = np.empty(shape_of(AXES[tensor.param], size), dtype)
            param = params[tensor.param]
            if piece.dtype != param.dtype:
                raise TypeError(
                    f"{op}: {prefix}{name} must have the dtype of the other tensors of {tensor.param}, {param.dtype}; "
                    f"got {piece.dtype}"
                )
            place = part(param, tensor, expert, size)
            place[...] = piece.reshape(place.shape)
            del piece  # before the next one is read
    return MoEParams(**params)


def to_layout(params: MoEParams, layout: str | Layout, *, prefix: str = "") -> dict[str, np.ndarray]:
    """The reverse of `load_moe`: the tensors of a checkpoint, by name, from an MoE block's parameters.

    Args:
      params: as `load_moe` returns them; of NumPy or JAX arrays.
      layout, prefix: as in `load_moe`.

    Returns:
      New NumPy arrays, contiguous, as `safetensors.numpy.save_file` needs them. `QuantizedMatrices` become the tensors
      that they were read from, byte for byte. Those that were not read from a checkpoint become fp8 with `_scale_inv`
      or `_scale`, MXFP4, or integers of compressed-tensors.

    Raises:
      ValueError: an unknown layout; a parameter that the layout has no tensor for; a parameter that it has a tensor for
        and that is None; shapes that do not fit together; quantised matrices that cannot be published so.

    >>> import numpy as np
    >>> params = MoEParams(np.ones((2, 4)), np.ones((4, 2, 6)), np.ones((4, 3, 2)))
    >>> {name: tensor.shape for name, tensor in to_layout(params, "mixtral_fused").items()}
    {'gate.weight': (4, 2), 'experts.gate_up_proj': (4, 6, 2), 'experts.down_proj': (4, 2, 3)}
    """
    op, chosen = "to_layout", _checked_layout("to_layout", layout)
    given = {name: value for name, value in params._asdict().items() if value is not None}
    arrays: dict[str, Any] = {name: jax.tree.map(np.asarray, value) for name, value in given.items()}
    needed = {tensor.param for tensor in chosen}
    size = axis_sizes((AXES[name], array.shape) for name, array in arrays.items())
    wrong = [f"{name} is None, and the layout has it" for name in MoEParams._fields if name in needed - arrays.keys()]
    wrong += [f"{name} is given, and the layout has no such tensor" for name in arrays if name not in needed]
    wrong += [
        f"{name} should have shape {show(AXES[name], size)}; got {array.shape}"
        for name, array in arrays.items()
        if array.shape != shape_of(AXES[name], size)
    ]
    refuse(f"{op}: params do not fit layout {_name(layout)}", wrong)

    tensors = {}
    for tensor in chosen:
        for expert in range(size["E"]) if "{}" in tensor.name else (None,):
            array = arrays[tensor.param]
            if isinstance(array, QuantizedMatrices):
                tensors |= tensors_of(op, prefix, array, tensor, expert)
                continue
            view = part(array, tensor, expert, size)
            # Always a contiguous copy: safetensors writes an array's memory as it lies, and ignores strides.
            tensors[prefix + tensor.name.format(expert)] = np.array(view, order="C").reshape(
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


# ---- errors


def _check_preset(layout: str | Layout, preset: Preset | None, config: Mapping[str, Any]) -> None:
    """Refuse a config.json that says something else than the preset about the routing."""
    if preset is None and isinstance(layout, str):
        preset = PRESETS.get(layout.removesuffix("_fused"))
    if preset is None:
        return
    groups = config.get("n_group") if config.get("n_group") != 1 else None
    said = {
        "top_k": config.get("num_experts_per_tok"),
        "norm_topk_prob": config.get("norm_topk_prob"),
        "scale": config.get("routed_scaling_factor"),
        "num_groups": groups,
        "group_top_k": config.get("topk_group") if groups else None,
    }
    wrong = [
        f"{name} is {value} in config.json, and {getattr(preset, name)} in the preset"
        for name, value in said.items()
        if value is not None and value != getattr(preset, name)
    ]
    if config.get("n_group") == 1 and preset.num_groups:
        wrong.append(f"num_groups is 1 in config.json, and {preset.num_groups} in the preset")
    if preset.activation == "swiglu_oai" and config.get("swiglu_limit", SWIGLU_LIMIT) != SWIGLU_LIMIT:
        wrong.append(f"swiglu_limit is {config['swiglu_limit']} in config.json, and {SWIGLU_LIMIT} in 'swiglu_oai'")
    refuse("load_moe: config.json disagrees with the preset; pass preset=dataclasses.replace(...) of your model", wrong)


def _prefixes(source: Mapping[str, Any], prefix: str, layout: Layout) -> str:
    """Words for an error: which prefixes there would be."""
    if any(name.startswith(prefix + ".") for name in source):
        return f"{prefix + '.'!r}? Its final dot is part of a prefix"
    router = next(tensor.name for tensor in layout if tensor.param == "router")
    found = [name.removesuffix(router) for name in source if name.endswith(router)]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        return f"{', '.join(map(repr, found[:5]))}{more} would have a {router}"
    return f"no tensor is named {router} either; the first names are {', '.join(list(source)[:3])}"


def _fitting(source: Mapping[str, Any], prefix: str, config: Config, layout: str | Layout) -> str:
    """Words for an error: the layouts whose names are those under the prefix."""
    fitting = []
    for name, each in LAYOUTS.items():
        found, others = found_tensors(source, prefix, each, config)
        if name != layout and not others and {t.tensor for t in found.values()} == {*each}:
            fitting.append(name)
    return f"the names are those of layout {' or '.join(map(repr, fitting))}" if fitting else ""
