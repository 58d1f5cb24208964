"""Routing and its tables in one launch, for few tokens: each program routes all of them, then places its tile of pairs.

Each program repeats the routing of the others, which for few tokens takes less time than a second launch.
"""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from ..shapes import lead_axes
from . import tiles
from .launch import capability, launch
from .routing import refuse as refuse
from .routing import route_rows, settings
from .tables import place_tile, shapes, sizes


@triton.jit
def route_and_place(
    logits, bias, ids, weights, pairs, tokens, offsets, slots, blocks, padded,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    CHOICES: tl.constexpr, SCORING: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, ZERO_SUM: tl.constexpr,
    BIAS_TOKENS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr, VECTOR: tl.constexpr, WHOLE: tl.constexpr,
    P: tl.constexpr, T: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, RANKED: tl.constexpr, CHUNK: tl.constexpr,
    FILL: tl.constexpr, BITS: tl.constexpr, COUNTED: tl.constexpr, PAIR_IDS: tl.constexpr,
):  # fmt: skip
    # The place of a tile depends on the ids of all tokens of its slice. A program does not wait for others: it computes
    # all these ids itself, writes them (all programs write the same bits) and reads them back. Then TILES programs of a
    # slice place one tile each, and one more computes the weights of the chosen experts.
    program = tl.program_id(0).to(tl.int64)
    slice_id, tile = program // (TILES + 1), program % (TILES + 1)
    first_row = slice_id * T
    end_row = first_row + T
    while first_row < end_row:
        route_rows(
            logits, bias, ids, weights, first_row, end_row, E, K, ROWS, LANES, CHOICES, SCORING, NORM, SCALE, ZERO_SUM,
            BIAS_TOKENS, GROUPS, KEPT, TOP2, SIZE, WIDTH, EXACT, VECTOR, WHOLE, tile == TILES,
        )  # fmt: skip
        first_row += ROWS
    if tile < TILES:
        tl.debug_barrier()
        place_tile(
            slice_id * TILES + tile, ids, ids, ids, pairs, tokens, offsets, slots, blocks, padded, P, E, T, K, S, BLOCK,
            TILES, BINS, TILE, RANKED, CHUNK, FILL, BITS, COUNTED, True, True, PAIR_IDS,
        )  # fmt: skip


def moe_route_plan(logits, bias=None, *, block_size, pair_ids, **params):
    lead = lead_axes((logits, 2), (bias, 1))
    num_tokens, experts = logits.shape[-2:]
    logits = jnp.broadcast_to(logits, (*lead, num_tokens, experts))
    bias = None if bias is None else jnp.expand_dims(bias, -2)
    constants, warps = sizes(num_tokens, params["top_k"], experts, block_size, True, one_launch=True)
    chosen = tiles.first(tiles.ROUTING, capability())
    if num_tokens * triton.next_power_of_2(experts) > chosen.planned_logits:
        warps = chosen.planned_warps
    bias, routed = settings(logits, bias, (*lead, num_tokens), warps, num_tokens, **params)
    packed, blocked = shapes(lead, constants)
    routing = [((*lead, num_tokens, params["top_k"]), dtype) for dtype in (jnp.int32, jnp.float32)]
    return launch(
        route_and_place,
        logits,
        bias,
        out=routing + [(shape, jnp.int32) for shape in packed + blocked],
        grid=math.prod(lead) * (constants["TILES"] + 1),
        num_warps=warps,
        PAIR_IDS=pair_ids,
        WHOLE=num_tokens % routed["ROWS"] == 0,
        **routed | constants,
    )
