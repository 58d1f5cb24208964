"""Kernels compiled to an H200's machine code on a host without one."""

import functools
import importlib.util
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import jax
import pytest


class Code(NamedTuple):
    name: str
    registers: int
    spilled: int
    sass: str


class Program(NamedTuple):
    launches: list[str]
    codes: list[Code]


needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="lowering for CUDA needs JAX's plugin: pip install --no-deps jax-cuda13-plugin of JAX's own version",
)


@functools.cache
def assemble(ptx):
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    ptx = re.sub(r"\.target sm_90a?\b.*", ".target sm_90a", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = pathlib.Path(folder, "a.ptx"), pathlib.Path(folder, "a.cubin")
        source.write_text(ptx)
        # Of the two assemblers in the package the second is the newer one: it knows every PTX that jax-triton writes.
        command = [tools / "ptxas-blackwell", "-v", "--gpu-name=sm_90a", source, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([tools / "cuobjdump", "--dump-sass", cubin], capture_output=True, text=True, check=True)
    (name,) = re.findall(r"\.visible \.entry (\w+)", ptx)
    number = lambda pattern: sum(map(int, re.findall(pattern, log)))  # noqa: E731
    return Code(name, number(r"Used (\d+) registers"), number(r"(\d+) bytes spill"), sass.stdout)


def for_h200(f, *args):
    """What `f` launches on an H200: the kernels' custom calls in its program, and each Triton kernel's machine code."""
    from triton.backends.nvidia.compiler import CUDABackend

    kernels, make_ptx = [], CUDABackend.make_ptx

    def listen(self, *args, **kwargs):
        ptx = make_ptx(self, *args, **kwargs)
        kernels.append(ptx if isinstance(ptx, str) else ptx.decode())
        return ptx

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh):
        patch.setattr(CUDABackend, "make_ptx", listen)
        text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    launches = re.findall(r"custom_call @(triton_kernel_call\w*|mosaic_gpu\w*)", text)
    return Program(launches, [assemble(ptx) for ptx in kernels])
