"""Time every choice of tiles of Pallas' grouped product on this GPU, to fill in the table TILES of its file.

    python -m ferrum_jax.bench.tune E K H N T [block_size ...]

prints, for each choice and for the Triton kernel, the microseconds of all kernels of a call (a median, by CUPTI) and
the TFLOP/s, the best first.
"""

import datetime
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

import ferrum_jax

from ..kernels.pallas import grouped

MOST, DEALT = (32, 64, 96, 128, 144, 160), (False, True)


def main(experts, top_k, height, width, tokens, *block_sizes):
    keys = jax.random.split(jax.random.key(0), 3)
    _, ids = jax.lax.top_k(jax.random.normal(keys[0], (tokens, experts)), top_k)
    lhs = jax.random.normal(keys[1], (tokens * top_k, height), jnp.bfloat16)
    rhs = jax.jit(lambda key: jax.random.normal(key, (experts, height, width), jnp.bfloat16))(keys[2])
    print(jax.devices()[0].device_kind, datetime.date.today())
    found = []
    for block in block_sizes or (128,):
        plan = ferrum_jax.moe_plan(ids, experts, block)
        found.append((time("triton", lhs, rhs, plan), f"block_size={block} triton"))
        for choice in itertools.product(MOST, DEALT):
            grouped.TILES = dict.fromkeys(grouped.TILES, choice)
            found.append((time("pallas", lhs, rhs, plan), f"block_size={block} (most, dealt)={choice}"))
            print(*found[-1], flush=True)
    print("\nbest first:")
    for us, name in sorted(found):
        print(f"{us:9.1f} us {2e-6 * lhs.size * width / us:6.0f} TFLOP/s  {name}")


def time(name, lhs, rhs, plan):
    # A new function each time, so that JAX compiles again for this choice of tiles.
    f = jax.jit(lambda *args: ferrum_jax.grouped_matmul(*args, implementation=name))
    jax.block_until_ready(f(lhs, rhs, plan))
    measured: Any = profiler.measure(f, aggregate=False, iterations=5)(lhs, rhs, plan)
    return sorted(sum(ms for _, ms in run) for run in measured[1])[2] * 1e3


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
