"""Quantised matrices as the hub publishes them, to the form of `QuantizedMatrices` and back, without a float between.

A published matrix is several tensors. Their names are the layout's name for the matrix, X.weight, with an ending:
`_scale_inv` makes X.weight_scale_inv. An ending that begins with a dot replaces `.weight`: `.qweight` makes X.qweight.
The sources: fp8 with block scales, https://github.com/deepseek-ai/DeepSeek-V3; MXFP4 of gpt-oss,
https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/mxfp4.py; compressed-tensors,
https://github.com/vllm-project/compressed-tensors; GPTQ, https://github.com/AutoGPTQ/AutoGPTQ, and its second version,
https://github.com/ModelCloud/GPTQModel; AWQ, https://github.com/casper-hansen/AutoAWQ.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core.quantized import FORMATS, Block, QuantizedMatrices, scale_shape
from ..core.settings import ROW_DTYPES

Arrays = dict[str, np.ndarray]
Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # values [N, W], scales [B, C] and zeros, of one matrix

_E8M0 = "float8_e8m0fnu"
_SCALES = (*ROW_DTYPES, _E8M0, "uint8")
# The dtypes that a tensor of this ending may have. uint8 scales are e8m0.
DTYPES: Mapping[str, tuple[str, ...]] = {
    "": ("float8_e4m3fn",),
    **dict.fromkeys(("_packed", "_zero_point", ".qweight", ".qzeros"), ("int32",)),
    **dict.fromkeys(("_shape", "_g_idx", ".g_idx"), ("int32", "int64")),
    "_blocks": ("uint8",),
    "_scales": ("uint8", _E8M0),
    **dict.fromkeys(("_scale", "_scale_inv", ".scale", ".scales"), _SCALES),
}

# A nibble's place in AWQ's words: bits 4p to 4p + 3 hold column _AWQ_ORDER[p] of eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Published(NamedTuple):
    """How files hold a matrix: the method, and each tensor's ending, dtype and number of axes."""

    method: str
    tensors: tuple[tuple[str, str, int], ...]


class Kind(NamedTuple):
    """What all matrices of one parameter have in common."""

    format: str
    block: Block
    published: Published


class Method(NamedTuple):
    """A way to publish.

    needs, may: the endings that must be there, and that may.
    sizes(shapes): (N, H) of a matrix whose tensors have these shapes; None for a size that they do not say.
    kind(shapes, size, found): the format and the block of a matrix of this size; a ValueError says what is wrong.
    unpack(arrays, size): the matrix as it is stored here.
    pack(w, endings): the tensors again, by ending, of one matrix; `endings` are those that are wanted.
    """

    needs: tuple[str, ...]
    may: tuple[str, ...]
    sizes: Callable[..., tuple[int | None, int | None]]
    kind: Callable[..., tuple[str, Block]]
    unpack: Callable[..., Parts]
    pack: Callable[..., Arrays]


# ---- words of several numbers


def _bytes_of(words: np.ndarray) -> np.ndarray:
    """[..., n] words as [..., n * itemsize] bytes, the lowest bits first."""
    words = np.ascontiguousarray(words)
    return words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8)


def _words_of(numbers: np.ndarray) -> np.ndarray:
    """The reverse, in words of 32 bits."""
    return np.ascontiguousarray(numbers).view("<i4").astype(np.int32, copy=False)


def _codes_of(packed: np.ndarray, bits: int) -> np.ndarray:
    """A byte for each number, of bytes that hold one or two."""
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    return codes if bits == 8 else codes[..., ::2] | (codes[..., 1::2] << 4)


def _transposed(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T)


# ---- fp8 with a scale for each block, row or matrix


def _fp8_scale(arrays: Mapping[str, Any]) -> str:
    return next(ending for ending in ("_scale_inv", "_scale", ".scale") if ending in arrays)


def _fp8_kind(shapes: Any, size: tuple[int, int], block: Block | None) -> tuple[str, Block]:
    ending = _fp8_scale(shapes)
    shape = shapes[ending]
    if len(shape) < 2:
        if int(np.prod(shape)) == 1:
            return "fp8", (None, None)
        if shape == (size[0],):
            return "fp8", (1, None)
    for each in [block] if block else [(128, 128), (1, None), (None, None)]:
        if shape == scale_shape(size[::-1], each, 1):
            return "fp8", each
    blocks = f"blocks of {block}" if block else "blocks of 128 by 128, rows or the whole"
    raise ValueError(f"{ending} should have one scale for each of {blocks} of a matrix {size}; got shape {shape}")


def _fp8_unpack(arrays: Arrays, size: tuple[int, int]) -> Parts:
    scale = arrays[_fp8_scale(arrays)]
    return arrays[""].view(np.uint8), scale.reshape(scale.shape if scale.ndim == 2 else (-1, 1)), None


def _fp8_pack(w: QuantizedMatrices, endings: Any) -> Arrays:
    return {"": w.values.view("float8_e4m3fn"), _fp8_scale(dict.fromkeys(endings)): w.scales}


# ---- MXFP4: bytes of two numbers, sixteen for each scale


def _mxfp4_kind(shapes: Any, size: tuple[int, int], _: Any) -> tuple[str, Block]:
    n, h = size
    for ending, want in (("_blocks", (n, h // 32, 16)), ("_scales", (n, h // 32))):
        if shapes[ending] != want:
            raise ValueError(f"{ending} should have shape {want}; got {shapes[ending]}")
    return "mxfp4", (1, 32)


def _mxfp4_unpack(arrays: Arrays, size: tuple[int, int]) -> Parts:
    return arrays["_blocks"].reshape(size[0], -1), arrays["_scales"], None


def _mxfp4_pack(w: QuantizedMatrices, _: Any) -> Arrays:
    return {"_blocks": w.values.reshape(*w.scales.shape, 16), "_scales": w.scales}


# ---- integers in words of 32 bits


def _integers(words: int, across: int, what: str) -> str:
    """The format of numbers of which so many stand in so many words."""
    bits = 32 * words / across if across else 0
    if bits not in (4, 8):
        raise ValueError(f"{what} has {words} words for {across} numbers, {bits:g} bits each; 4 and 8 are read")
    return f"int{bits:.0f}"


def _groups(columns: int, width: int, ending: str) -> int | None:
    """The entries along H that share a scale; None: all."""
    if not columns or width % columns:
        raise ValueError(f"{ending} has {columns} groups, which do not divide the {width} entries along H")
    return None if columns == 1 else width // columns


def _expect(shapes: Any, ending: str, want: tuple[int, ...]) -> None:
    if ending in shapes and shapes[ending] != want:
        raise ValueError(f"{ending} should have shape {want}; got {shapes[ending]}")


def _ct_kind(shapes: Any, size: tuple[int, int], _: Any) -> tuple[str, Block]:
    n, h = size
    form = _integers(shapes["_packed"][1], h, "_packed")
    columns = shapes["_scale"][-1] if len(shapes["_scale"]) == 2 else 1
    _expect(shapes, "_packed", (n, shapes["_packed"][1]))
    _expect(shapes, "_scale", (n, columns) if len(shapes["_scale"]) == 2 else (n,))
    _expect(shapes, "_zero_point", (-(-n * FORMATS[form].bits // 32), columns))
    return form, (1, _groups(columns, h, "_scale"))


def _ct_unpack(arrays: Arrays, size: tuple[int, int]) -> Parts:
    n, h = size
    values, scales = _bytes_of(arrays["_packed"]), arrays["_scale"]
    if "_shape" in arrays and tuple(arrays["_shape"].tolist()) != size:
        raise ValueError(f"_shape should be {size}; got {arrays['_shape'].tolist()}")
    _in_order(arrays.get("_g_idx"), h, scales.size // n)
    zeros = arrays.get("_zero_point")
    if zeros is not None:  # packed along N
        zeros = _transposed(_codes_of(_bytes_of(_transposed(zeros)), 8 * values.shape[1] // h)[:, :n])
    return values, scales.reshape(n, -1), zeros


def _ct_pack(w: QuantizedMatrices, _: Any) -> Arrays:
    (h, n), bits = w.shape, FORMATS[w.format].bits
    arrays = {"_packed": _words_of(w.values), "_scale": w.scales, "_shape": np.array([n, h])}
    arrays["_g_idx"] = np.arange(h) // (h // w.scales.shape[1])
    if w.zeros is not None:
        zeros = np.pad(w.zeros, [(0, -n % (32 // bits)), (0, 0)])
        arrays["_zero_point"] = _transposed(_words_of(_packed(_transposed(zeros), bits)))
    return arrays


def _in_order(g_idx: np.ndarray | None, h: int, columns: int) -> None:
    """Refuse groups that are not made of neighbours, as GPTQ's `desc_act` makes them."""
    if g_idx is not None and not np.array_equal(g_idx, np.arange(h) // (h // columns)):
        raise NotImplementedError(
            "g_idx puts entries that are no neighbours into one group (desc_act, or act-order), which is not read"
        )


def _gptq_kind(shapes: Any, size: tuple[int, int], _: Any) -> tuple[str, Block]:
    n, h = size
    form = _integers(shapes[".qweight"][0], h, ".qweight")
    columns = shapes[".scales"][0]
    _expect(shapes, ".qweight", (shapes[".qweight"][0], n))
    _expect(shapes, ".scales", (columns, n))
    _expect(shapes, ".qzeros", (columns, n * FORMATS[form].bits // 32))
    _expect(shapes, ".g_idx", (h,))
    return form, (1, _groups(columns, h, ".scales"))


def _gptq_unpack(arrays: Arrays, size: tuple[int, int], shift: int = 1) -> Parts:
    values = _bytes_of(_transposed(arrays[".qweight"]))
    zeros = _codes_of(_bytes_of(arrays[".qzeros"]), 8 * values.shape[1] // size[1])
    if shift and np.any(zeros == 255):
        raise ValueError(".qzeros holds 255, which is zero - 1 of no zero point in [0, 255]")
    _in_order(arrays.get(".g_idx"), size[1], len(zeros))
    return values, _transposed(arrays[".scales"]), _transposed(zeros + np.uint8(shift))


def _gptq_pack(w: QuantizedMatrices, _: Any, shift: int = 1) -> Arrays:
    h, bits = w.shape[0], FORMATS[w.format].bits
    zeros = _zeros_of(w) - np.uint8(shift)
    return {
        ".qweight": _transposed(_words_of(w.values)),
        ".qzeros": _words_of(_packed(_transposed(zeros), bits)),
        ".scales": _transposed(w.scales),
        ".g_idx": np.arange(h) // (h // len(w.scales.T)),
    }


def _zeros_of(w: QuantizedMatrices) -> np.ndarray:
    """The zero points, of symmetric integers too."""
    return np.full(w.scales.shape, FORMATS[w.format].zero, np.uint8) if w.zeros is None else w.zeros


def _awq_kind(shapes: Any, size: tuple[int, int], _: Any) -> tuple[str, Block]:
    n, h = size
    if (form := _integers(shapes[".qweight"][1], n, ".qweight")) != "int4":
        raise ValueError(f".qweight holds {form}; AWQ's 4 bits are read")
    columns = shapes[".scales"][0]
    _expect(shapes, ".qweight", (h, n // 8))
    _expect(shapes, ".scales", (columns, n))
    _expect(shapes, ".qzeros", (columns, n // 8))
    return form, (1, _groups(columns, h, ".scales"))


def _awq_codes(words: np.ndarray) -> np.ndarray:
    """[..., n/8] words in AWQ's order as [..., n] codes."""
    codes = _codes_of(_bytes_of(words), 4).reshape(*words.shape, 8)
    return codes[..., np.argsort(_AWQ_ORDER)].reshape(*words.shape[:-1], -1)


def _awq_words(codes: np.ndarray) -> np.ndarray:
    codes = codes.reshape(*codes.shape[:-1], -1, 8)[..., _AWQ_ORDER]
    return _words_of(_packed(codes.reshape(*codes.shape[:-2], -1), 4))


def _awq_unpack(arrays: Arrays, size: tuple[int, int]) -> Parts:
    values = _packed(_transposed(_awq_codes(arrays[".qweight"])), 4)
    return values, _transposed(arrays[".scales"]), _transposed(_awq_codes(arrays[".qzeros"]))


def _awq_pack(w: QuantizedMatrices, _: Any) -> Arrays:
    return {
        ".qweight": _awq_words(_transposed(_codes_of(w.values, 4))),
        ".qzeros": _awq_words(_transposed(_zeros_of(w))),
        ".scales": _transposed(w.scales),
    }


def _of_fp8(shapes: Any) -> tuple[int, int]:
    return shapes[""]


def _of_mxfp4(shapes: Any) -> tuple[int, int]:
    n, h, _ = shapes["_blocks"]
    return n, 32 * h


def _of_ct(shapes: Any) -> tuple[int, None]:
    return shapes["_packed"][0], None


def _of_gptq(shapes: Any) -> tuple[int, int | None]:
    return shapes[".qweight"][1], shapes.get(".g_idx", (None,))[0]


def _of_awq(shapes: Any) -> tuple[int, int]:
    return shapes[".scales"][1], shapes[".qweight"][0]


_GPTQ = (".qweight", ".qzeros", ".scales")
METHODS: dict[str, Method] = {
    "fp8": Method(("", "_scale_inv"), (), _of_fp8, _fp8_kind, _fp8_unpack, _fp8_pack),
    "fp8 by rows": Method(("", "_scale"), (), _of_fp8, _fp8_kind, _fp8_unpack, _fp8_pack),
    "fp8 as in DeepSeek's code": Method(("", ".scale"), (), _of_fp8, _fp8_kind, _fp8_unpack, _fp8_pack),
    "mxfp4": Method(("_blocks", "_scales"), (), _of_mxfp4, _mxfp4_kind, _mxfp4_unpack, _mxfp4_pack),
    "compressed-tensors": Method(
        ("_packed", "_scale"), ("_shape", "_zero_point", "_g_idx"), _of_ct, _ct_kind, _ct_unpack, _ct_pack
    ),
    "awq": Method(_GPTQ, (), _of_awq, _awq_kind, _awq_unpack, _awq_pack),
    "gptq": Method(_GPTQ, (".g_idx",), _of_gptq, _gptq_kind, _gptq_unpack, _gptq_pack),
    "gptq_v2": Method(
        _GPTQ,
        (".g_idx",),
        _of_gptq,
        _gptq_kind,
        functools.partial(_gptq_unpack, shift=0),
        functools.partial(_gptq_pack, shift=0),
    ),
}
# Endings of what is known and not read: the numbers do not need it, or the library has no such format.
UNREAD = (".input_scale", "_input_scale", ".activation_scale")


def published_as(w: QuantizedMatrices) -> Published:
    """How to write these matrices: as they were read, or in the usual form of their format."""
    if w.published is not None:
        return Published(*w.published)
    scales = "float8_e8m0fnu" if w.scales.dtype == np.uint8 else w.scales.dtype.name
    if w.format == "fp8":
        ending = "_scale_inv" if None not in w.block and w.block != (1, None) else "_scale"
        return Published(
            "fp8" if ending == "_scale_inv" else "fp8 by rows", (("", "float8_e4m3fn", 2), (ending, scales, 2))
        )
    if w.format == "mxfp4":
        return Published("mxfp4", (("_blocks", "uint8", 3), ("_scales", "uint8", 2)))
    zeros = [] if w.zeros is None else [("_zero_point", "int32", 2)]
    return Published(
        "compressed-tensors", (("_packed", "int32", 2), ("_scale", scales, 2), ("_shape", "int64", 1), *zeros)
    )
