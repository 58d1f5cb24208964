"""What the quantised matrices of published checkpoints stand for, in NumPy float64, and files that contain them.

It is written from the publications of the formats and shares no code with the library:

- e4m3: OCP 8-bit floating point (OFP8),
  https://www.opencompute.org/documents/ocp-8-bit-floating-point-specification-ofp8-revision-1-0-2023-12-01-pdf-1
- e2m1, e8m0 and blocks of 32: OCP microscaling formats (MX),
  https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
- blocks of 128 x 128: DeepSeek-V3's README_WEIGHTS.md and inference/fp8_cast_bf16.py,
  https://github.com/deepseek-ai/DeepSeek-V3
- one float32 scale for a matrix: AutoFP8, https://github.com/neuralmagic/AutoFP8
- a scale for each row, and packed integers: compressed-tensors, its naive_quantized and pack_quantized,
  https://github.com/vllm-project/compressed-tensors
- GPTQ: https://github.com/AutoGPTQ/AutoGPTQ, qlinear_cuda.py. Its second version:
  https://github.com/ModelCloud/GPTQModel, utils/model.py
- AWQ, version gemm: https://github.com/casper-hansen/AutoAWQ, modules/linear/gemm.py
- MXFP4 of gpt-oss: https://github.com/huggingface/transformers, integrations/mxfp4.py
- the file: https://github.com/huggingface/safetensors

Every value here is exact: a code of at most 8 bits times a scale of at most 24 significant bits.
"""

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import ml_dtypes
import numpy as np

Tensors = dict[str, np.ndarray]

FORMS: tuple[str, ...] = (
    "fp8_block",
    "fp8_block_bf16",
    "fp8_block_e8m0",
    "fp8_channel",
    "fp8_tensor",
    "ct_int4",
    "ct_int4_zero",
    "ct_int8",
    "ct_int4_channel",
    "gptq4",
    "gptq4_v2",
    "gptq8",
    "awq4",
)

BLOCK = 128  # the rows and the columns of a matrix that share a scale in "fp8_block"

# Of eight columns, AWQ puts these into an int32, the first into its lowest 4 bits.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

NUMPY_NAMES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool float8_e4m3fn float8_e8m0fnu float8_e5m2"
)
FILE_NAMES = "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL F8_E4M3 F8_E8M0 F8_E5M2"
DTYPES = dict(zip(NUMPY_NAMES.split(), FILE_NAMES.split(), strict=True))  # safetensors' name of each of NumPy's


def minifloat(codes: Any, exponent_bits: int, fraction_bits: int) -> np.ndarray:
    """The values of codes of a sign, an exponent and a fraction, none of them infinity or NaN."""
    codes = np.asarray(codes).astype(np.int64)
    fraction = (codes % 2**fraction_bits) / 2**fraction_bits
    exponent = (codes >> fraction_bits) % 2**exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    # Exponent 0 is for subnormals: no hidden one, and the scale of exponent 1.
    size = np.ldexp(fraction + (exponent > 0), np.maximum(exponent, 1) - bias)
    return np.where(codes >> (exponent_bits + fraction_bits), -size, size)


def e4m3(codes: Any) -> np.ndarray:
    """OFP8's e4m3, as float64: no infinities, and NaN where all bits but the sign are ones."""
    return np.where(np.asarray(codes) % 128 == 127, np.nan, minifloat(codes, 4, 3))


def e2m1(codes: Any) -> np.ndarray:
    """MX's e2m1, as float64, of codes 0 to 15."""
    return minifloat(codes, 2, 1)


def e8m0(codes: Any) -> np.ndarray:
    """MX's e8m0, as float64: a power of two, from 2**-127, and NaN for 255."""
    codes = np.asarray(codes).astype(np.int64)
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127))


def spread(rng: np.random.Generator, choices: Iterable[int], shape: tuple[int, ...]) -> np.ndarray:
    """The choices in random order, each as often as any other, give or take one."""
    return rng.permutation(np.resize(rng.permutation(list(choices)), int(np.prod(shape)))).reshape(shape)


def random_scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Numbers from about 0.01 to 1, of either sign if the dtype has one: a reader only multiplies by them."""
    if dtype == ml_dtypes.float8_e8m0fnu:
        return rng.integers(120, 128, shape).astype(np.uint8).view(dtype)
    return np.asarray(rng.choice([-1, 1], shape) * 10 ** rng.uniform(-2, 0, shape)).astype(dtype)


def exact(scales: np.ndarray) -> np.ndarray:
    """The scales in float64, those of e8m0 by this module's own table."""
    is_e8m0 = scales.dtype == ml_dtypes.float8_e8m0fnu
    return e8m0(scales.view(np.uint8)) if is_e8m0 else scales.astype(np.float64)


def pack(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Puts 32 / bits unsigned codes into each int32 along an axis, the first into the lowest bits; zeros fill up."""
    per = 32 // bits
    rows = np.moveaxis(codes, axis, -1).astype(np.uint64)
    rows = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % per)])
    fields = rows.reshape(*rows.shape[:-1], -1, per) << np.arange(0, 32, bits, dtype=np.uint64)
    return np.moveaxis(fields.sum(axis=-1, dtype=np.uint64).astype(np.uint32).view(np.int32), -1, axis)


def awq_columns(codes: np.ndarray) -> np.ndarray:
    """Reorders every eight columns as AWQ packs them."""
    return codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].reshape(codes.shape)


def fp8(form: str, rng: np.random.Generator, out: int, inn: int) -> tuple[Tensors, np.ndarray]:
    """`matrix` for the forms of e4m3 codes. DeepSeek's scale_inv is, despite its name, what a code is multiplied by."""
    blocks = (-(-out // BLOCK), -(-inn // BLOCK))
    ending, shape, dtype = {
        "fp8_block": (".weight_scale_inv", blocks, np.float32),
        "fp8_block_bf16": (".weight_scale_inv", blocks, ml_dtypes.bfloat16),
        "fp8_block_e8m0": (".weight_scale_inv", blocks, ml_dtypes.float8_e8m0fnu),
        "fp8_channel": (".weight_scale", (out, 1), ml_dtypes.bfloat16),
        "fp8_tensor": (".weight_scale", (), np.float32),
    }[form]
    codes = spread(rng, (c for c in range(256) if c % 128 != 127), (out, inn)).astype(np.uint8)
    scales = random_scales(rng, shape, dtype)
    wide = exact(scales)
    if ending == ".weight_scale_inv":
        wide = wide.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)[:out, :inn]
    return {".weight": codes.view(ml_dtypes.float8_e4m3fn), ending: scales}, e4m3(codes) * wide


def integers(form: str, rng: np.random.Generator, out: int, inn: int, group: int) -> tuple[Tensors, np.ndarray]:
    """`matrix` for the forms of unsigned codes, a zero and a scale for each group of a row: (code - zero) * scale."""
    bits = 8 if form in ("ct_int8", "gptq8") else 4
    group = inn if form == "ct_int4_channel" else group
    shape = (out, -(-inn // group))
    # The first version of GPTQ stores zero - 1. Its readers disagree on a zero of 0, so there is none here.
    less = 1 if form in ("gptq4", "gptq8") else 0
    symmetric = form in ("ct_int4", "ct_int8", "ct_int4_channel")
    codes = spread(rng, range(2**bits), (out, inn))
    zeros = np.full(shape, 2 ** (bits - 1)) if symmetric else spread(rng, range(less, 2**bits), shape)
    scales = random_scales(rng, shape, ml_dtypes.bfloat16 if form.startswith("ct") else np.float16)
    wide_zeros, wide_scales = (x.repeat(group, axis=1)[:, :inn] for x in (zeros, exact(scales)))
    w = (codes - wide_zeros) * wide_scales
    if form.startswith("ct"):
        tensors = {".weight_packed": pack(codes, bits, 1), ".weight_scale": scales}
        tensors[".weight_shape"] = np.array(w.shape, np.int64)
        if not symmetric:
            tensors[".weight_zero_point"] = pack(zeros, bits, 0)
    elif form == "awq4":
        packed = {".qweight": pack(awq_columns(codes.T), bits, 1), ".qzeros": pack(awq_columns(zeros.T), bits, 1)}
        tensors = {**packed, ".scales": scales.T}
    else:
        packed = {".qweight": pack(codes.T, bits, 0), ".qzeros": pack(zeros.T - less, bits, 1)}
        tensors = {**packed, ".scales": scales.T, ".g_idx": (np.arange(inn) // group).astype(np.int32)}
    return tensors, w


def matrix(form: str, rng: np.random.Generator, out: int, inn: int, group: int = 32) -> tuple[Tensors, np.ndarray]:
    """A random matrix in one of FORMS: its tensors by the ending of their name, and its [out, inn] values.

    All codes occur if there are as many elements. GPTQ and AWQ need multiples of 8 (gptq8: of 4) for out and inn.
    """
    assert form in FORMS, form
    tensors, w = fp8(form, rng, out, inn) if form.startswith("fp8") else integers(form, rng, out, inn, group)
    return {ending: np.array(x, order="C") for ending, x in tensors.items()}, w


def mxfp4(rng: np.random.Generator, experts: int, out: int, inn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """gpt-oss' blocks [E, out, inn/32, 16] and scales [E, out, inn/32], and the values [E, out, inn]."""
    blocks = spread(rng, range(256), (experts, out, inn // 32, 16)).astype(np.uint8)
    scales = spread(rng, range(110, 131), blocks.shape[:-1]).astype(np.uint8)
    codes = np.stack([blocks % 16, blocks // 16], axis=-1).reshape(*scales.shape, 32)  # the low half is first
    return blocks, scales, (e2m1(codes) * e8m0(scales)[..., None]).reshape(experts, out, inn)


def config(form: str, group: int = 32) -> dict[str, Any]:
    """The quantization_config of a model whose matrices have one of FORMS, or "mxfp4"."""
    if form.startswith("fp8_block"):
        blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
        return {**blocks, "scale_fmt": "ue8m0"} if form == "fp8_block_e8m0" else blocks
    if form == "fp8_tensor":
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
    if form == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router", "lm_head"]}
    bits = 8 if form in ("ct_int8", "gptq8", "fp8_channel") else 4
    if form == "awq4":
        return {"quant_method": "awq", "bits": bits, "group_size": group, "version": "gemm", "zero_point": True}
    if form.startswith("gptq"):
        version = "gptq_v2" if form == "gptq4_v2" else "gptq"
        how = {"desc_act": False, "sym": False, "lm_head": False, "true_sequential": True}
        return {"quant_method": "gptq", "checkpoint_format": version, "bits": bits, "group_size": group, **how}
    channel, is_float = "channel" in form, form == "fp8_channel"
    weights = {"num_bits": bits, "type": "float" if is_float else "int", "symmetric": form != "ct_int4_zero"}
    weights |= {"strategy": "channel" if channel else "group", "group_size": None if channel else group}
    weights |= {"dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax"}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs if is_float else None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if is_float else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme, "output_activations": None}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
    }


def save(path: str | PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, which the package cannot do for every dtype. The data is in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, x in tensors.items():
        start, end = end, end + x.nbytes
        header[name] = {"dtype": DTYPES[x.dtype.name], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.tobytes())
