"""Kernels compiled to an H200's machine code on a host without one."""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import jax
import pytest

from ferrum_jax.kernels import target_capability

TOOLS = pathlib.Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin"


class Code(NamedTuple):
    name: str
    registers: int
    spilled: int
    shared: int
    sass: str


class Program(NamedTuple):
    launches: list[str]
    codes: list[Code]


NEEDS_JAX = (0, 11, 2)  # of the Pallas kernels

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="lowering for CUDA needs JAX's plugin: pip install --no-deps jax-cuda13-plugin of JAX's own version",
)


@functools.cache
def assemble(ptx, capability=90, shared=0):
    target = f"sm_{capability}" + "a" * (capability >= 90)
    ptx = re.sub(r"\.target sm_\d+a?\b.*", f".target {target}", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = pathlib.Path(folder, "a.ptx"), pathlib.Path(folder, "a.cubin")
        source.write_text(ptx)
        # Of the two assemblers in the package the second is the newer one: it knows every PTX that jax-triton writes.
        command = [TOOLS / "ptxas-blackwell", "-v", f"--gpu-name={target}", source, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([TOOLS / "cuobjdump", "--dump-sass", cubin], capture_output=True, text=True, check=True)
    (name,) = re.findall(r"\.visible \.entry (\w+)", ptx)
    registers, spilled = total(r"Used (\d+) registers", log), total(r"(\d+) bytes spill", log)
    return Code(name, registers, spilled, shared, sass.stdout)


def total(pattern, log):
    """The sum of the numbers that a pattern finds in the assembler's log."""
    return sum(map(int, re.findall(pattern, log)))


def on_h200(gpu="NVIDIA H200"):
    """In this context, as far as a lowering asks, the GPU is an H200, or the other one that is named."""
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def for_h200(f, *args, gpu="NVIDIA H200"):
    """What `f` launches on an H200: the kernels' custom calls in its program, and each Triton kernel's machine code.

    Or on another GPU.
    """
    from triton.backends.nvidia.compiler import CUDABackend

    kernels, make_ptx, capability = [], CUDABackend.make_ptx, target_capability(gpu)

    def listen(self, source, metadata, *args, **kwargs):
        ptx = make_ptx(self, source, metadata, *args, **kwargs)
        kernels.append((ptx if isinstance(ptx, str) else ptx.decode(), metadata["shared"]))
        return ptx

    with pytest.MonkeyPatch.context() as patch, on_h200(gpu):
        patch.setattr(CUDABackend, "make_ptx", listen)
        text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    launches = re.findall(r"custom_call @(triton_kernel_call\w*|mosaic_gpu\w*)", text)
    return Program(launches, [assemble(ptx, capability, shared) for ptx, shared in kernels])


needs_pjrt = pytest.mark.skipif(
    not importlib.util.find_spec("jax_plugins") or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for CUDA needs XLA's plugin: pip install --no-deps jax-cuda13-pjrt of JAX's own version",
)


class Kernel(NamedTuple):
    """A Mosaic kernel's machine code, as its assembler tells of it, and the PTX it came from."""

    name: str
    registers: int
    spilled: int
    frame: int
    ptx: str

    def spills_in_wgmma_loops(self):
        body = self.ptx[: self.ptx.rindex("}") + 1]
        code = assemble(f".version 8.6\n.target sm_90a\n.address_size 64\n{body}")
        # A branch from behind the kernel's end, back from waiting, makes no loop of what lies between.
        bodies = [body for body in loops(code.sass) if "HGMMA" in body and "EXIT" not in body]
        fewest = min(body.count("HGMMA") for body in bodies)
        inner = [body for body in bodies if body.count("HGMMA") == fewest]  # the others have these in them
        return [spill for body in inner for spill in re.findall(r"\b(?:LDL|STL)\b", body)]


def h200s(count):
    """Devices to compile for, on any host: H200s of one machine."""
    from jax.experimental import topologies

    target = pathlib.Path(__file__).with_name("h200_target.txtpb").read_text()
    topology = f"1x1x{count}"
    return topologies.get_topology_desc("", platform="cuda", topology=topology, target_config=target).devices


def memory_for_h200(f, *args):
    """The bytes of temporary memory of the program that XLA compiles for an H200."""
    with on_h200(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", newer_assembler().name, prepend=os.pathsep)
        return _lowered_for_h200(f, *args).compile().memory_analysis().temp_size_in_bytes


def _lowered_for_h200(f, *args):
    there = jax.sharding.SingleDeviceSharding(h200s(1)[0])

    def own(x):
        return x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None

    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own(x) or there), args)
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))


def whole_program_for_h200(f, *args):
    """XLA's final program, compiled for an H200 on any host, and the Mosaic kernels in it.

    For several, where the arguments are ShapeDtypeStructs with shardings of their own.
    """
    with on_h200(), pytest.MonkeyPatch.context() as patch, _written_to_stdout() as log:
        patch.setenv("PATH", newer_assembler().name, prepend=os.pathsep)
        patch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
        patch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
        text = _lowered_for_h200(f, *args).compile().as_text()
    found = re.findall(r"(\.visible \.entry (\w+?)_mosaic_gpu_kernel.*?Used (\d+) registers)", log(), re.DOTALL)
    spill, frame = r"(\d+) bytes spill", r"(\d+) bytes stack frame"
    return text, [Kernel(name, int(n), total(spill, part), total(frame, part), part) for part, name, n in found]


@functools.cache
def newer_assembler():
    """A folder in which `ptxas` is the newer one of Triton's package: XLA's own does not know all PTX of Triton's.

    It lasts as long as the process: XLA looks for ptxas once.
    """
    folder = tempfile.TemporaryDirectory()
    pathlib.Path(folder.name, "ptxas").symlink_to(TOOLS / "ptxas-blackwell")
    return folder


@contextlib.contextmanager
def _written_to_stdout():
    """What compiled code writes to the file descriptors 1 and 2 in this context."""
    with tempfile.TemporaryFile() as file:
        old, text = {fd: os.dup(fd) for fd in (1, 2)}, []
        try:
            for fd in old:
                os.dup2(file.fileno(), fd)
            yield lambda: text[0]
        finally:
            for fd, copy in old.items():
                os.dup2(copy, fd)
                os.close(copy)
            file.seek(0)
            text.append(file.read().decode())


def loops(sass):
    """The bodies of the loops: from the target of each backward branch to the branch."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    for at, (address, text) in enumerate(lines):
        jump = re.search(r"BRA(?:\.\w+)* .*?0x([0-9a-f]+)", text) or re.search(r"BRA 0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < int(address, 16):
            yield "\n".join(t for a, t in lines[:at] if int(a, 16) >= int(jump[1], 16))


def launches(program):
    """What XLA's final program launches, in words: every fusion, call, sort, copy and memset of its entry."""
    entry = program[program.index("\nENTRY ") :]
    lines = re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(", entry, re.MULTILINE)
    free = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple"}
    return [f"{op} {name}" for name, op in lines if op not in free]
