"""Time the tiles of Pallas' grouped product on the GPU that is here, to refill PRODUCT in kernels/pallas/tiles.py.

    python -m ferrum_jax.bench.tune E K H N T [block_size ...]

Prints a row of that table for each tile, the best first, with its time in microseconds and its TFLOP/s. The time is
that of all kernels of a call, the median of five runs, by CUPTI. The Triton kernel's stands with them to compare.
"""

import datetime
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

import ferrum_jax

from ..kernels.pallas import grouped
from ..kernels.pallas.tiles import Tile

CANDIDATES = [
    Tile(rows=rows, columns=256, step=64, dealt=dealt, unit=unit)
    for (rows, unit), dealt in itertools.product(
        [(rows, unit) for rows in (32, 64, 96, 128, 144, 160) for unit in (16, 32, 48) if rows % unit == 0],
        (False, True),
    )
]


def main(experts: int, top_k: int, height: int, width: int, tokens: int, *block_sizes: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    _, ids = jax.lax.top_k(jax.random.normal(keys[0], (tokens, experts)), top_k)
    lhs = jax.random.normal(keys[1], (tokens * top_k, height), jnp.bfloat16)
    rhs = jax.jit(lambda key: jax.random.normal(key, (experts, height, width), jnp.bfloat16))(keys[2])
    print(f"{jax.devices()[0].device_kind}, {datetime.date.today()}, E={experts} K={top_k} H={height} N={width}")
    for block_size in block_sizes or (128,):
        print(f"\nT={tokens} block_size={block_size}: mean rows of an expert: tile,  # time")
        plan = ferrum_jax.moe_plan(ids, experts, block_size)
        tables = plan.sorted_token_ids, plan.block_ids, plan.total_tokens_post_pad
        found = [(microseconds(functools.partial(pallas, tile), lhs, rhs, *tables), tile) for tile in CANDIDATES]
        flops = 2 * lhs.size * width
        for us, tile in sorted(found, key=lambda pair: pair[0]):
            print(f"{row(-(-len(lhs) // experts), tile)}  # {us:.1f} us, {1e-6 * flops / us:.0f} TFLOP/s")
        us = microseconds(functools.partial(ferrum_jax.grouped_matmul, implementation="triton"), lhs, rhs, plan)
        print(f"# Triton: {us:.1f} us, {1e-6 * flops / us:.0f} TFLOP/s", flush=True)


def row(mean: int, tile: Tile) -> str:
    """A row of a table of PRODUCT."""
    return f"    {mean}: {tile},"


def pallas(
    tile: Tile, lhs: jax.Array, rhs: jax.Array, slots: jax.Array, blocks: jax.Array, total: jax.Array
) -> tuple[jax.Array, ...]:
    how: dict[str, Any] = {"top_k": 1, "dtype": lhs.dtype, "packed_rows": True, "precision": "highest", "tile": tile}
    return grouped.grouped_matmul(lhs, rhs, slots, blocks, total, None, None, **how)


def microseconds(product: Callable[..., Any], *args: Any) -> float:
    run = jax.jit(product)
    jax.block_until_ready(run(*args))
    measured: Any = profiler.measure(run, aggregate=False, iterations=5)(*args)
    return sorted(sum(ms for _, ms in kernels) for kernels in measured[1])[2] * 1e3


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
