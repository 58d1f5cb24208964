"""Tensors of a checkpoint: in safetensors files, which are read here by header and memory map, or in a mapping.

The package `safetensors` reads neither fp8 nor e8m0 into NumPy. The format is that of
https://github.com/huggingface/safetensors: the length of a header in JSON, the header, and the tensors' bytes.
"""

import json
import math
import operator
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

_OP = "load_moe"  # the name in errors
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class InFile:
    """A tensor in a safetensors file. It is read when it is indexed."""

    def __init__(self, file: Path, memory: Any, name: str, fields: Any, start: int):
        try:
            self.dtype, self.shape = np.dtype(_DTYPES[fields["dtype"]]), tuple(map(operator.index, fields["shape"]))
            first, end = map(operator.index, fields["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{_OP}: {file} describes {name} as {fields}, which cannot be read") from error
        size = math.prod(self.shape) * self.dtype.itemsize
        if min(first, *self.shape, 0) < 0 or end - first != size or start + end > memory.size:
            raise ValueError(
                f"{_OP}: {file} is cut off or damaged: {name}, {self.dtype} of shape {self.shape}, should stand in "
                f"bytes {first} to {end} of {memory.size - start}"
            )
        self.file, self._memory, self._place = file, memory, slice(start + first, start + end)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._memory[self._place].view(self.dtype).reshape(self.shape)[index]


def source_of(tensors: Any, prefix: str) -> Mapping[str, Any]:
    """The tensors by name, each with a shape, and read when it is indexed; without the prefix, perhaps names alone."""
    if isinstance(tensors, str | os.PathLike):
        return _in_path(Path(tensors), prefix)
    if isinstance(tensors, Mapping):
        return tensors
    raise TypeError(f"{_OP}: tensors must be a mapping of names to arrays, or a path; got {type(tensors).__name__}")


def config_of(tensors: Any) -> Mapping[str, Any]:
    """What stands in the config.json beside the tensors; of a model with several parts, its text model's settings too.

    Empty if there is none.
    """
    path = Path(tensors) if isinstance(tensors, str | os.PathLike) else None
    file = path / "config.json" if path and path.is_dir() else None
    if file is None or not file.exists():
        return {}
    config = _object(file)
    of_text = config.get("text_config")
    return config | of_text if isinstance(of_text, dict) else config


def _object(file: Path) -> dict[str, Any]:
    """What stands in a JSON file."""
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{_OP}: {file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{_OP}: {file} should hold an object; got {type(found).__name__}")
    return found


def _in_path(path: Path, prefix: str) -> dict[str, InFile]:
    if path.suffix.lower() == ".gguf" or (path.is_dir() and any(path.glob("*.gguf")) and not _files(path)):
        raise NotImplementedError(
            f"{_OP}: {path} is in GGUF, which is not read; take the model's checkpoint in safetensors"
        )
    if not path.exists():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            hint = f"; a model of the hub must be downloaded first: huggingface_hub.snapshot_download({str(path)!r})"
        raise FileNotFoundError(f"{_OP}: there is no file or folder {path}{hint}")
    if (path / _INDEX).exists():
        return _by_index(path, prefix)
    files = _files(path) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{_OP}: {path} holds no *.safetensors")
    found: dict[str, InFile] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in found:
                raise ValueError(
                    f"{_OP}: {name} stands in two files of {path}, {found[name].file.name} and {file.name}, and there "
                    f"is no {_INDEX} to choose one"
                )
            found[name] = tensor
    return found


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _by_index(path: Path, prefix: str) -> dict[str, Any]:
    """The tensors that the index names, each from the file that it says. Other files do not matter.

    Nor do files without a tensor of this prefix; of such tensors there is the name alone.
    """
    everywhere = _object(path / _INDEX).get("weight_map")
    if not isinstance(everywhere, dict) or not all(isinstance(file, str) for file in everywhere.values()):
        raise ValueError(f"{_OP}: {path / _INDEX} should have a weight_map, from tensors' names to files")
    where = {name: file for name, file in everywhere.items() if name.startswith(prefix)}
    headers: dict[str, dict[str, InFile]] = {}
    for file in sorted(set(where.values())):
        if not (path / file).exists():
            names = sorted(name for name in where if where[name] == file)
            raise FileNotFoundError(
                f"{_OP}: {path / file} is missing: {_INDEX} says that it holds {len(names)} tensors, {names[0]} first"
            )
        headers[file] = _read_header(path / file)
    for name, file in where.items():
        if name not in headers[file]:
            raise ValueError(f"{_OP}: {path / file} lacks {name}, which {_INDEX} says that it holds")
    return {name: headers[file][name] if name in where else None for name, file in everywhere.items()}


def _read_header(file: Path) -> dict[str, InFile]:
    if file.stat().st_size < 8:
        raise ValueError(f"{_OP}: {file} is no safetensors file: it has {file.stat().st_size} bytes")
    memory = np.memmap(file, np.uint8, "r")
    length = int(memory[:8].view("<u8")[0])
    try:
        header = json.loads(bytes(memory[8 : 8 + length])) if length <= memory.size - 8 else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{_OP}: {file} is no safetensors file, or is cut off: it has no header of {length} bytes")
    return {
        name: InFile(file, memory, name, fields, 8 + length)
        for name, fields in header.items()
        if name != "__metadata__"
    }


# ---- single tensors


def where(source: Mapping[str, Any], name: str) -> str:
    """The tensor's name, and its file's if it is in one."""
    file = getattr(source.get(name), "file", None)
    return f"{name} (in {file.name})" if isinstance(file, Path) else name


def shape_of_tensor(name: str, value: Any) -> tuple[int, ...]:
    if not hasattr(value, "shape") or not hasattr(value, "__getitem__"):
        raise TypeError(
            f"{_OP}: {name} must be an array, or have shape and be read when it is indexed; got {type(value).__name__}"
        )
    return tuple(value.shape)


def dtype_of_tensor(value: Any) -> str:
    """The dtype's name, as NumPy says it."""
    return str(getattr(value, "dtype", "")).removeprefix("torch.")


def read(value: Any, index: Any = ...) -> np.ndarray:
    """A tensor, or a part of one, as a NumPy array."""
    if (name := str(getattr(value, "dtype", ""))).startswith("torch.float8"):  # NumPy and DLPack know no such dtype
        return np.asarray(value.view(sys.modules["torch"].uint8)[index]).view(name[6:])
    part = value[index]
    try:
        return np.asarray(part)
    except TypeError:  # NumPy cannot convert PyTorch's bfloat16; JAX can
        return np.asarray(jnp.from_dlpack(part))
