"""How long a program takes to make, and how large it is.

With kernels: equal ones are lowered and compiled once, in a program of many layers. On a CPU: a layer is not much more
than the one that a user writes with `lax.ragged_dot`.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from compiled import h200s, needs_pjrt, needs_plugin, newer_assembler, on_h200

import ferrum_jax
from ferrum_jax import bench
from ferrum_jax.bench import today

TOKENS = 16_384  # more than 32 MiB of them, where Pallas' products are taken


def of_kernels(test):
    for mark in (needs_plugin, needs_pjrt, pytest.mark.compiled, pytest.mark.pallas):
        test = mark(test)
    return test


def decoder(layers):
    """Unrolled Qwen3 layers, each with its own matrices, and their gradients, lowered for an H200."""
    experts, k, hidden, width = bench.MODELS["qwen3"]

    def loss(matrices, x):
        x = jnp.tanh(x)  # as in a model, the first layer's x is computed too
        for router, w_gate_up, w_down in matrices:
            x += ferrum_jax.moe_mlp(x, x @ router, w_gate_up, w_down, top_k=k)
        return jnp.sum(x.astype(jnp.float32))

    there = jax.sharding.SingleDeviceSharding(h200s(1)[0])

    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=there)

    matrices = [(of(hidden, experts), of(experts, hidden, 2 * width), of(experts, width, hidden))] * layers
    with on_h200():
        return jax.jit(jax.grad(loss, (0, 1))).trace(matrices, of(TOKENS, hidden)).lower(lowering_platforms=("cuda",))


def report(layers):
    """Print the seconds that lowering and compiling take, and the bytes of the module."""
    os.environ["PATH"] = newer_assembler().name + os.pathsep + os.environ["PATH"]
    start = time.perf_counter()
    program = decoder(layers)
    lowering = time.perf_counter() - start
    program.compile()
    print(json.dumps({"lowering": lowering, "all": time.perf_counter() - start, "bytes": len(program.as_text())}))


@of_kernels
def test_more_layers_add_no_kernels():
    one, eight = decoder(1).as_text(), decoder(8).as_text()
    kernels = re.findall(r"custom_call @(triton_kernel_call\w*|mosaic_gpu\w*)", one)
    assert re.findall(r"custom_call @(triton_kernel_call\w*|mosaic_gpu\w*)", eight) == kernels
    assert len(eight) < 1.3 * len(one)


@of_kernels
@pytest.mark.full
@pytest.mark.parametrize(("layers", "most"), [(1, 12), (48, 30)])
def test_seconds_and_bytes(layers, most):
    """In a process of its own, which has compiled none of the kernels yet. On a busy host it takes longer."""
    run = f"import test_compile_time as t; t.report({layers})"
    here = pathlib.Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True, cwd=here, env=env)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["all"] <= most
    assert found["bytes"] <= 5e6


LAYERS = {"ragged_dot": today.ragged_layer, "moe_mlp": ferrum_jax.moe_mlp}


def layer(name, grad):
    """One layer, small, lowered for a CPU."""
    tokens, experts, k, hidden, width = 64, 8, 2, 64, 128

    def total(*args):
        return LAYERS[name](*args, top_k=k).sum()

    shapes = (tokens, hidden), (tokens, experts), (experts, hidden, 2 * width), (experts, width, hidden)
    args = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)) if grad else total).lower(*args)


def fusions(name, grad):
    return len(re.findall(r" fusion\(", layer(name, grad).compile().as_text()))


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
def test_size_of_a_layer_on_a_cpu(grad):
    """XLA's CPU compiler spends its time on fusions, each of which becomes machine code by itself."""
    assert fusions("moe_mlp", grad) < 1.75 * fusions("ragged_dot", grad)
