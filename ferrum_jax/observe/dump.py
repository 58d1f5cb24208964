"""The routing dump: it prints the first aligned table of a process if FERRUM_MOE_DUMP is set.

Its lines are those of the Ferrum engine, https://github.com/sizzlecar/ferrum-infer-rs.
"""

import contextlib
import functools
import os
import sys
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import min_dim

from ..core.primitive import define
from ..core.types import MoeRouting
from ..ops import tables
from . import profile

_SLOTS, _BLOCKS = 48, 32  # how many entries of a table are printed


def dump_routing(routing: MoeRouting, num_pairs: int) -> None:
    """Print an aligned table to standard error as soon as it is computed: the first of this process, and no other.

    The tables call this whenever an alignment is traced or runs eagerly. It does nothing unless FERRUM_MOE_DUMP is set,
    to any value, at that time; functions that jit has traced before do not change with the variable. With
    FERRUM_MOE_DUMP_BATCH_X_TOPK=<P>, only tables of P pairs count. P and the table are those of one slice, or of one
    shard inside shard_map. Of several slices the first is printed. Under vmap JAX makes one callback for each slice.
    The same figures go to `profile` as the event `moe_dump`.
    """
    if "FERRUM_MOE_DUMP" not in os.environ:
        return
    wanted = os.environ.get("FERRUM_MOE_DUMP_BATCH_X_TOPK", "")
    if wanted.isdecimal() and int(wanted) != num_pairs:
        return
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError as error:  # then the callback would fail, and the computation with it
        warnings.warn(f"FERRUM_MOE_DUMP: no dump without JAX's CPU backend: {error}", RuntimeWarning, stacklevel=4)
        return
    facts = {"batch_x_topk": num_pairs, "block_size": routing.block_size, "num_experts": routing.num_experts}
    slots = min_dim(_SLOTS, routing.sorted_token_ids.shape[-1])
    blocks = min_dim(_BLOCKS, routing.block_ids.shape[-1])
    summary = _summary(*routing, block_size=routing.block_size)
    jax.debug.callback(functools.partial(_print_dump, routing.kind, facts, slots, blocks), summary)


_once = threading.Lock()


def _print_dump(kind: str | None, facts: dict[str, Any], slots: int, blocks: int, summary: Any) -> None:
    """Print the dump. Any error is suppressed, so that the computation goes on."""
    with contextlib.suppress(Exception):
        slices = np.asarray(summary).reshape(-1, 3 + slots + blocks)
        if not len(slices) or not _once.acquire(blocking=False):  # never released: one dump a process
            return
        total, active, unique, *previews = slices[0].tolist()
        facts = facts | {"total_post_pad": total, "active_blocks": active, "unique_experts": unique}
        tag = f"[MOE_DUMP:{kind}]"
        with contextlib.suppress(Exception):
            sys.stderr.write(
                f"{tag} {' '.join(f'{name}={value}' for name, value in facts.items())}\n"
                f"{tag} sorted_token_ids[0..{slots}] = {previews[:slots]}\n"
                f"{tag} block_ids[0..{blocks}] = {previews[slots:]}\n"
            )
            sys.stderr.flush()
        previews = {"sorted_token_ids_preview": previews[:slots], "block_ids_preview": previews[slots:]}
        profile.event("moe_dump", shape={"kind": kind} | facts | previews)


def _summary_meaning(slots: jax.Array, blocks: jax.Array, total: jax.Array, *, block_size: int) -> jax.Array:
    """All that the dump prints, as one small array: total, number of live blocks, of their experts, first entries."""
    active = total // block_size
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), blocks])[:-1]
    # The blocks of one expert stand side by side: count where another expert's begin.
    starts = (jnp.arange(blocks.size, dtype=jnp.int32) < active) & (blocks != before)
    figures = jnp.stack([total, active, jnp.sum(starts, dtype=jnp.int32)])
    return jnp.concatenate([figures, slots[:_SLOTS], blocks[:_BLOCKS]])


def _summary_sizes(sizes: dict[str, int], block_size: int) -> dict[str, int]:
    return {"N": 3 + min_dim(_SLOTS, sizes["S"]) + min_dim(_BLOCKS, sizes["B"])}


_summary = define(
    "moe_dump",
    "sorted_token_ids: ids[S], block_ids: ids[B], total_tokens_post_pad: ids[] -> ids[N]",
    _summary_meaning,
    sizes=_summary_sizes,
    export_error="the routing dump prints in the process that traced it, so it cannot be exported: unset "
    "FERRUM_MOE_DUMP while exporting",
)

tables.on_aligned_table = dump_routing
