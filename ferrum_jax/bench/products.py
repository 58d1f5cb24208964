"""The grouped product alone, beside JAX's own: `python -m ferrum_jax grouped`."""

import jax
import jax.numpy as jnp

import ferrum_jax

from .report import print_table
from .timing import timed


def main(rows: int = 1024, width: int = 512) -> int:
    """Time `grouped_matmul` against `jax.lax.ragged_dot` in float32, with many and with few experts."""
    lines = []
    for experts in (128, 8):
        keys = jax.random.split(jax.random.key(experts), 3)
        ids = jax.random.randint(keys[0], (rows, 1), 0, experts)
        plan = ferrum_jax.moe_plan(ids, experts, max(16, rows // experts))
        x, w = jax.random.normal(keys[1], (rows, width)), jax.random.normal(keys[2], (experts, width, width))
        ours, seconds = timed(ferrum_jax.grouped_matmul, x, w, plan)
        other, ragged = timed(jax.lax.ragged_dot, x, w, jnp.diff(plan.expert_offsets))
        cells = (f"{number:.2f}" for number in (seconds * 1e3, ragged * 1e3, ragged / seconds))
        lines.append((str(experts), *cells, f"{jnp.max(jnp.abs(ours - other)):.1e}"))
    title = f"{rows} rows, {width}x{width}, float32, on {jax.devices()[0].device_kind}: milliseconds, median of 9"
    print_table(title, [("experts", "grouped_matmul", "ragged_dot", "times as fast", "largest difference"), *lines])
    return 0
