"""What the grouped products share: how programs walk over blocks and columns, and what follows the sums."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from ..shapes import whole
from . import tiles
from .launch import launch

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers, so there operands are widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def at_least(x, least):
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, most):
    return tl.minimum(x, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return gate * sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        return gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(x)) / 2 is sigmoid(2 x)
        return gate * sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    elif ACTIVATION == "relu":
        return at_least(gate, 0.0) * up
    elif ACTIVATION == "relu2":
        return at_least(gate, 0.0) * at_least(gate, 0.0) * up
    else:
        tl.static_assert(ACTIVATION == "swiglu_oai")
        gate = at_most(gate, 7.0)
        return (at_most(at_least(up, -7.0), 7.0) + 1) * gate * sigmoid(1.702 * gate)


@triton.jit
def name_rows(
    slots, blocks, total, owner,
    S: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, P: tl.constexpr, TOTAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Writes, for each row, the slot that names it. Only slots of live blocks with an expert count: another slot with
    # the same row must not be written in their place. A program takes TILE slots. Entries of rows that no slot names
    # are left uninitialised: a reader checks that slots[entry] == row.
    slot = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = tl.load(slots + slot, mask=slot < TOTAL, other=-1)
    expert = tl.load(blocks + slot // BLOCK, mask=slot < TOTAL, other=-1)
    live_slots = tl.load(total + slot // S, mask=slot < TOTAL, other=0)
    counts = (expert >= 0) & (expert < E) & (slot % S // BLOCK * BLOCK < live_slots)
    tl.store(owner + slot // S * P + row, (slot % S).to(tl.int32), mask=counts & (row >= 0) & (row < P))


@triton.jit
def zero_unnamed(
    part, slots, blocks, live_slots, owner, out,
    S: tl.constexpr, BLOCK: tl.constexpr, E: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Writes zeros to those of ROWS rows of the result that no live slot names. Most rows cost two small reads and no
    # write.
    row = part * ROWS + tl.arange(0, ROWS)
    slot = tl.load(owner + row, mask=row < P, other=-1)
    known = (slot >= 0) & (slot < S)
    named = known & (tl.load(slots + slot, mask=known, other=-1) == row) & (slot // BLOCK * BLOCK < live_slots)
    expert = tl.load(blocks + slot // BLOCK, mask=named, other=-1)
    zero = (row < P) & ((expert < 0) | (expert >= E))
    if tl.max(zero.to(tl.int32), 0) > 0:
        for start in range(0, N, COLS):
            col = start + tl.arange(0, COLS)[None, :]
            at = out + row[:, None].to(tl.int64) * N + col
            tl.store(at, tl.zeros([ROWS, COLS], out.dtype.element_ty), mask=zero[:, None] & (col < N))


@triton.jit
def tile_at(
    program, slots, blocks, live_slots,
    BLOCK: tl.constexpr, E: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, TM: tl.constexpr,
):  # fmt: skip
    # Which tile is a program's: its expert, or -1 if there is nothing to do; its slots' values, and which of them name
    # a row; and the number of its tile of columns, of which there are COLUMNS. PARTS of a block's slots are tiles.
    # GROUP row tiles go side by side through the column tiles, so that programs which run at the same time read few
    # experts and few rows, and these stay in the L2 cache.
    first = program // (GROUP * COLUMNS) * GROUP
    across = min(TILES - first, GROUP)
    tile = first + program % (GROUP * COLUMNS) % across
    block = tile // PARTS
    expert = tl.load(blocks + block, mask=block * BLOCK < live_slots, other=-1)
    expert = tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int64)
    in_block = tile % PARTS * TM + tl.arange(0, TM)
    slot = tl.load(slots + block * BLOCK + in_block, mask=in_block < BLOCK, other=-1)
    return expert, slot, (slot >= 0) & (slot < P), program % (GROUP * COLUMNS) // across


@triton.jit
def matrix_number(expert, layer, slice_id, E: tl.constexpr, LAYERS: tl.constexpr, SHARED: tl.constexpr):
    # Which matrix of the array it is. LAYERS > 0: the array is a stack, and `layer` holds each slice's place in it.
    number = expert
    if LAYERS > 0:
        number += tl.minimum(tl.maximum(tl.load(layer + slice_id), 0), LAYERS - 1).to(tl.int64) * E
    if not SHARED:
        number += slice_id * (E * LAYERS if LAYERS > 0 else E)
    return number


# ---- wrappers


class Walk(NamedTuple):
    """The operands of a product's kernel that say what to walk over, and the constants that say how."""

    tables: tuple[jax.Array, ...]
    owner: jax.Array
    constants: dict[str, Any]


def walk(
    tables: tuple[jax.Array, ...], lead: tuple[int, ...], chosen: tiles.Products, tile: tiles.Tile, *, top_k: int,
    rows: int, columns: int, experts: int,
) -> Walk:  # fmt: skip
    """A walk over the tables' blocks, and over columns of the result, by programs that own a tile."""
    slots, blocks, total = (whole(table, lead) for table in tables)
    pairs, block = rows * top_k, slots.shape[-1] // blocks.shape[-1]
    parts = triton.cdiv(block, tile.rows)
    row_tiles = blocks.shape[-1] * parts
    programs = row_tiles * triton.cdiv(columns, tile.columns) + triton.cdiv(pairs, chosen.zero_rows)
    constants = {
        "grid": math.prod(lead) * programs,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **{"M": rows, "N": columns, "E": experts, "S": slots.shape[-1], "P": pairs, "TOP_K": top_k, "BLOCK": block},
        **{"PARTS": parts, "TILES": row_tiles, "PROGRAMS": programs, "GROUP": chosen.group},
        **{"TM": tile.rows, "TN": tile.columns, "TK": tile.step},
        **{"ZERO_ROWS": chosen.zero_rows, "ZERO_COLUMNS": chosen.zero_columns},
    }
    owner = _named_by(slots, blocks, total, lead, experts, pairs, chosen)
    return Walk((slots, blocks, total), owner, constants)


def _named_by(slots, blocks, total, lead, num_experts, num_pairs, chosen):
    """The slot that names each row: see `name_rows`."""
    all_slots = math.prod(slots.shape)
    (owner,) = launch(
        name_rows,
        *(slots, blocks, total),
        out=[((*lead, num_pairs), jnp.int32)],
        grid=triton.cdiv(all_slots, chosen.named),
        num_warps=4,
        S=slots.shape[-1],
        BLOCK=slots.shape[-1] // blocks.shape[-1],
        E=num_experts,
        P=num_pairs,
        TOTAL=all_slots,
        TILE=chosen.named,
    )
    return owner
