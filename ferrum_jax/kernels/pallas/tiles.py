"""How the Pallas kernels divide their work: the sizes of tiles, blocks and stages.

The times that these choices rest on are in docs/measurements.md. `python -m ferrum_jax.bench.tune` measures them again
and prints rows for the table PRODUCT.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# ---- grouped products

PROGRAMS = 132  # blocks that stay for the whole launch: one for each multiprocessor of a Hopper SXM card
SHARED = 227 * 1024  # bytes of shared memory that a block has on Hopper
LINE = 64  # 16-bit elements of a line of shared memory
SWIZZLE = 128  # bytes of a line of shared memory, the longest that wgmma reads
WINDOW = 32  # most tiles of one matrix that are made side by side, so that they share what they read of the matrix
PART = 160  # most slots of the parts that a table's block is cut into: a thread block gathers one part
STAGES = 6  # most stages of a product
CHUNK_BYTES = 64  # bytes of a column's results that a multiplying warpgroup stages before it stores them
COMPARED = 2**25  # up to this many pairs are compared all with all, which takes one launch in place of several


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a block makes of the product's result at a time, and how blocks get their tiles.

    Few rows an expert: reading the matrices takes the time, and a tile of few rows still reads each matrix once. Many
    rows: the products take the time, and a large tile reads fewer bytes for each. A dealt tile is the only one of its
    block, and the hardware starts the blocks. Otherwise PROGRAMS blocks share the tiles, so that a block loads without
    a pause, but the shares are never quite even.
    """

    rows: int  # at most; the tiles of an expert have even heights
    columns: int  # half of them for each of the two multiplying warpgroups
    step: int  # of the inner length, in a stage of shared memory
    dealt: bool
    unit: int  # heights are multiples of this many rows; the kernel has code for each height, and is compiled as long


_HOPPER_16_BITS = {
    16: Tile(rows=32, columns=256, step=64, dealt=False, unit=16),
    80: Tile(rows=96, columns=256, step=64, dealt=False, unit=32),
    640: Tile(rows=144, columns=256, step=64, dealt=True, unit=16),
    math.inf: Tile(rows=160, columns=256, step=64, dealt=False, unit=32),
}

# (architecture, dtype) -> the most rows that an expert has on average -> the product's tile. bfloat16 was timed.
PRODUCT: Mapping[tuple[str, str], Mapping[float, Tile]] = {
    ("sm_90", "bfloat16"): _HOPPER_16_BITS,
    ("sm_90", "float16"): _HOPPER_16_BITS,
}
# The transposed product, and one with an activation, were timed up to this mean. Beyond it they keep this mean's tile.
TIMED = 640


def product_tile(architecture: str, dtype: Any, rows: int, num_experts: int, plain: bool) -> Tile:
    """The tile for `rows` rows of all experts together. `plain`: neither transposed nor with an activation."""
    if not plain:
        rows = min(rows, TIMED * num_experts)
    return next(tile for mean, tile in PRODUCT[architecture, str(dtype)].items() if rows <= mean * num_experts)


def pipeline(tile: Tile, dtype: Any) -> tuple[int, int]:
    """How many stages fit in shared memory beside the staged results, and of how many rows these are."""
    chunk = min(CHUNK_BYTES // dtype.itemsize, tile.rows)
    half = tile.columns // 2
    others = 4096  # the row of zeros, the barriers, and what Mosaic takes for itself
    rest = SHARED - 2 * (chunk + 8) * half * dtype.itemsize - others
    return min(STAGES, rest // ((tile.rows + tile.columns) * tile.step * 2)), chunk


@dataclasses.dataclass(frozen=True)
class OuterTile:
    """What a block makes of the outer product's result at a time."""

    rows: int  # half of them for each of the two multiplying warpgroups
    columns: int
    step: int  # rows of the operands in a stage of shared memory
    stages: int


OUTER: Mapping[tuple[str, str], OuterTile] = {
    ("sm_90", "bfloat16"): OuterTile(rows=256, columns=128, step=64, stages=4),
    ("sm_90", "float16"): OuterTile(rows=256, columns=128, step=64, stages=4),
}

GATHER_COLUMNS = 256  # columns of a buffer of the gather, the widest that TMA copies
GATHER_BUFFERS = 4  # buffers of a block, side by side

# ---- combine

UNROLLED = 16  # up to this many of a token's rows are in flight at once; of more, eight at a time
DOTS = 8  # most choices of a token whose dot products a block computes
# Fewer where a block also writes the rows: with 5 rows in registers, 4 blocks fit on a multiprocessor.
COTANGENTS = 5

# ---- routing

WARP_EXPERTS = 1024  # up to here a warp holds a token's logits; beyond, the four warps of a block share them
MAX_EXPERTS, MAX_CHOICES, MAX_GROUPS = 8192, 512, 512  # that a block holds in registers
