"""Which tensors of a checkpoint make which matrix of a layout, plain or quantised."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core.quantized import Block
from .axes import pattern_of
from .layouts import Layout, Tensor
from .published import DTYPES, METHODS, UNREAD, Kind, Parts, Published
from .tensor_files import dtype_of_tensor, read, shape_of_tensor, where

_OP = "load_moe"  # the name in errors
# The axis along which a product with the parameter adds up.
ADDED_UP = {"w_gate_up": "H", "w_down": "F", "shared_w_gate_up": "H", "shared_w_down": "S"}
_ENDINGS = sorted({ending for method in METHODS.values() for ending in (*method.needs, *method.may)} | {*UNREAD})
# Endings of formats that are not read.
_REFUSED = {
    "_scale_2": "NVFP4",
    "_global_scale": "NVFP4",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_format": "bitsandbytes",
    ".channel_scale": "TensorRT's integers",
}
_INSTEAD = "; take another of the model's checkpoints, or convert it to bfloat16"


class Config(NamedTuple):
    """What the quantization_config of a config.json says, as far as it matters. None: it says nothing."""

    method: str | None = None
    block: Block | None = None


def config_of_quantization(config: Mapping[str, Any]) -> Config:
    """The settings in a config.json. A method or version that is not read is refused by name."""
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"{_OP}: quantization_config of config.json should be an object; got {settings!r}")
    method = settings.get("quant_method")
    if not method:
        return Config()
    known = {"fp8", "mxfp4", "compressed-tensors", "gptq", "awq"}
    details = {"gptq": ("checkpoint_format", ("gptq", "gptq_v2")), "awq": ("version", ("gemm",))}
    formats = ("pack-quantized", "float-quantized", "naive-quantized")
    details["compressed-tensors"] = "format", formats
    if method not in list(known):
        raise NotImplementedError(
            f"{_OP}: config.json says quant_method {method!r}; {sorted(known)} are read{_INSTEAD}"
        )
    field, values = details.get(method, (None, ()))
    value = str(settings.get(field) or values[0]).lower() if field else None
    if field and value not in values:
        raise NotImplementedError(f"{_OP}: config.json says {field} {value!r} of {method}; {values} are read{_INSTEAD}")
    block = settings.get("weight_block_size")
    if block and not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) for n in block)):
        raise ValueError(f"{_OP}: weight_block_size of config.json should be two numbers; got {block!r}")
    return Config(value if method == "gptq" else method, tuple(block) if block else None)


class Found(NamedTuple):
    """A matrix, or those of all experts in one, or any plain tensor of a layout.

    tensors: the names in the source by ending; a plain tensor has the ending "" alone.
    method: how it is quantised, a name in METHODS; None: it is plain.
    """

    source: Mapping[str, Any]
    tensor: Tensor
    tensors: dict[str, str]
    method: str | None

    @property
    def labels(self) -> list[str]:
        return self.tensor.axes.split()

    @property
    def input_first(self) -> bool:
        return self.labels[-2] == ADDED_UP[self.tensor.param]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, for one expert, outputs first."""
        flip = self.input_first and "" in self.tensors
        shapes = {}
        for ending, name in self.tensors.items():
            shape = shape_of_tensor(name, self.source[name])[len(self.labels) - 2 :]
            shapes[ending] = shape[::-1] if flip else shape
        return shapes

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The shape along the layout's axes, None where the tensors do not say it."""
        if self.method is None:
            return shape_of_tensor(self.tensors[""], self.source[self.tensors[""]])
        first = next(iter(self.tensors.values()))
        lead = shape_of_tensor(first, self.source[first])[: len(self.labels) - 2]
        try:
            size = METHODS[self.method].sizes(self._shapes())
        except (ValueError, IndexError):  # a tensor of another rank
            size = (None, None)
        return *lead, *(size[::-1] if self.input_first else size)

    def named(self, name: str) -> str:
        """The layout's name, with the file that the first of its tensors is in."""
        return where({name: self.source[next(iter(self.tensors.values()))]}, name)

    def matrix_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(N, H) of a matrix of this shape along the layout's axes."""
        return (shape[-1], shape[-2]) if self.input_first else (shape[-2], shape[-1])

    def kind(self, shape: tuple[int, ...], config: Config) -> Kind:
        """What `QuantizedMatrices` of this shape need to know. A ValueError says which tensor is wrong, and how."""
        assert self.method
        lead, shapes = shape[:-2], self._shapes()
        try:
            for ending, name in self.tensors.items():
                dtype, own = dtype_of_tensor(self.source[name]), shape_of_tensor(name, self.source[name])
                if dtype not in DTYPES[ending]:
                    raise ValueError(f"{ending} should be {' or '.join(DTYPES[ending])}; got {dtype}")
                if own[: len(lead)] != lead:
                    raise ValueError(f"{ending} should have {lead[0]} experts; got shape {own}")
            form, block = METHODS[self.method].kind(shapes, self.matrix_size(shape), config.block)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{where(self.source, self.tensors[self._blamed(error)])}: {error}") from error
        dtypes = {ending: dtype_of_tensor(self.source[name]) for ending, name in self.tensors.items()}
        tensors = tuple((ending, dtypes[ending], len(shapes[ending])) for ending in self.tensors)
        return Kind(form, block, Published(self.method, tensors))

    def _blamed(self, error: Exception) -> str:
        """The ending of the tensor that an error is about: its message begins with it."""
        return next((e for e in self.tensors if e and str(error).startswith(f"{e} ")), next(iter(self.tensors)))

    def parts(self, expert: int | None, size: tuple[int, int]) -> Parts:
        """One matrix of N = size[0] outputs and H = size[1] inputs, as `QuantizedMatrices` stores it."""
        assert self.method
        whole = len(self.labels) == 2
        flip = self.input_first and "" in self.tensors
        arrays = {}
        for ending, name in self.tensors.items():
            array = read(self.source[name], ... if whole else expert)
            arrays[ending] = np.array(array.T if flip else array, order="C")
        try:
            values, scales, zeros = METHODS[self.method].unpack(arrays, size)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{_OP}: {where(self.source, self.tensors[self._blamed(error)])}: {error}") from error
        return values, scales.view(np.uint8) if scales.dtype.name == "float8_e8m0fnu" else scales, zeros


def found_tensors(
    source: Mapping[str, Any], prefix: str, layout: Layout, config: Config
) -> tuple[dict[str, Found], list[str]]:
    """The layout's tensors that the source has, by the layout's names, and the names that are none of them."""
    by_name: dict[str, tuple[Tensor, dict[str, str]]] = {}
    others = []
    patterns = [(tensor, re.compile(pattern_of(tensor))) for tensor in layout]
    for full in source:
        if not full.startswith(prefix):
            continue
        name = full.removeprefix(prefix)
        for ending, base in ((e, _base(name, e)) for e in ("", *_ENDINGS)):
            tensor = next((t for t, pattern in patterns if base and pattern.fullmatch(base)), None)
            if base and tensor and (not ending or tensor.param in ADDED_UP):
                by_name.setdefault(base, (tensor, {}))[1][ending] = full
                break
        else:
            others.append(name)
    _refuse_formats(source, prefix, others)
    found = {}
    for base, (tensor, tensors) in by_name.items():
        method = _method(source, tensor, tensors, config)
        endings = (*METHODS[method].needs, *METHODS[method].may) if method else ("",)
        found[base] = Found(source, tensor, {e: tensors[e] for e in endings if e in tensors}, method)
    return found, others


def _base(name: str, ending: str) -> str | None:
    """The name without the ending, as a layout has it; None if the name does not end so."""
    if not name.endswith(ending):
        return None
    base = name[: len(name) - len(ending)]
    return base + ".weight" if ending.startswith(".") else base


def _refuse_formats(source: Mapping[str, Any], prefix: str, names: list[str]) -> None:
    for name in names:
        for ending, what in _REFUSED.items():
            if name.endswith(ending):
                raise NotImplementedError(f"{_OP}: {where(source, prefix + name)} is of {what}, not read{_INSTEAD}")


def _method(source: Mapping[str, Any], tensor: Tensor, tensors: dict[str, str], config: Config) -> str | None:
    """How a tensor of the layout is quantised; None: it is plain."""
    endings = {ending for ending in tensors if ending not in UNREAD}
    if endings == {""}:
        dtype = dtype_of_tensor(source[tensors[""]])
        if "float8" in dtype or "float4" in dtype:
            raise ValueError(
                f"{_OP}: {where(source, tensors[''])} has dtype {dtype}, and no scale beside it: no "
                f"{tensors['']}_scale_inv and no {tensors['']}_scale"
            )
        return None
    fitting = [name for name, m in METHODS.items() if {*m.needs} <= endings <= {*m.needs, *m.may}]
    if {"awq", "gptq"} <= {*fitting}:  # AWQ's words hold neighbours along N, GPTQ's along H
        columns = [shape_of_tensor(tensors[e], source[tensors[e]])[-1] for e in (".qweight", ".scales")]
        fitting = ["awq"] if columns[0] != columns[1] else ["gptq", "gptq_v2"]
    if "gptq" in fitting:
        fitting = [config.method if config.method in fitting else "gptq"]
    if not fitting:
        names = ", ".join(where(source, tensors[ending]) for ending in sorted(endings))
        raise ValueError(f"{_OP}: {names}: these make no matrix of a known format; is a tensor missing?")
    if "" in tensors and (dtype := dtype_of_tensor(source[tensors[""]])) != "float8_e4m3fn":
        raise ValueError(f"{_OP}: {where(source, tensors[''])} has a scale, and should be float8_e4m3fn; got {dtype}")
    family = {"gptq_v2": "gptq"}.get(fitting[0], fitting[0].split(" ")[0])
    said = {"gptq_v2": "gptq"}.get(config.method or family, config.method or family)
    if family != said and not (family == "fp8" and said == "compressed-tensors"):
        raise ValueError(f"{_OP}: config.json says {said}, and {where(source, tensors[min(endings)])} is of {family}")
    return fitting[0]
