"""What becomes of rows before a product with quantised matrices: rounded to fp8, or with entries in another order."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from ..shapes import ACTIVATION_BLOCK, FP8_MAX
from . import tiles
from .launch import launch
from .walk import at_least, at_most


@triton.jit
def round_rows(
    x, values, scales, ROWS: tl.constexpr, H: tl.constexpr, LHS_BLOCK: tl.constexpr, MOST: tl.constexpr,
    TM: tl.constexpr,
):  # fmt: skip
    # Rounds TM rows to fp8, LHS_BLOCK entries to a scale, as `core.quantized.rounded_rows` does. MOST: the largest fp8.
    blocks: tl.constexpr = (H + LHS_BLOCK - 1) // LHS_BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64) * TM + tl.arange(0, TM)
    block = tl.program_id(0) % blocks
    col = block * LHS_BLOCK + tl.arange(0, LHS_BLOCK)
    inside = (row < ROWS)[:, None] & (col < H)[None, :]
    place = row[:, None] * H + col[None, :]
    floats = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    # Without the sign, the largest bits are those of the largest number, or of NaN.
    largest = tl.max(floats.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    scale = tl.where(largest == 0, 1.0, at_least(largest * (1 / MOST), 2.0**-126))
    rounded = at_most(at_least(floats * tl.div_rn(1.0, scale)[:, None], -MOST), MOST)
    tl.store(values + place, rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=inside)
    tl.store(scales + row * blocks + block, scale, mask=row < ROWS)


@triton.jit
def shuffle(x, out, TOTAL: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr):
    # Puts each 64 entries of rows in the order of `numbers.by_words`.
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    pair, thread, second = entry % 64 // 8, entry % 8 // 2, entry % 2
    source = 16 * thread + (pair // 4 * 8 + 4 * second + pair % 4 if BITS == 4 else 2 * pair + second)
    loaded = tl.load(x + entry // 64 * 64 + source, mask=entry < TOTAL)
    tl.store(out + entry, loaded, mask=entry < TOTAL)


# ---- wrappers


def rounded(rows):
    """Rows [..., H] as fp8 numbers, in bytes, and their scales [..., blocks]."""
    *lead, width = rows.shape
    count, blocks = math.prod(lead), triton.cdiv(width, ACTIVATION_BLOCK)
    together = tiles.rounded(count)
    return launch(
        round_rows,
        rows,
        out=[(rows.shape, jnp.uint8), ((*lead, blocks), jnp.float32)],
        grid=triton.cdiv(count, together) * blocks,
        num_warps=together // 4 or 1,
        ROWS=count,
        H=width,
        LHS_BLOCK=ACTIVATION_BLOCK,
        MOST=float(FP8_MAX),
        TM=together,
    )


def shuffled(rows, bits):
    """Rows whose entries stand in the order of `numbers.by_words`."""
    return launch(
        shuffle,
        rows,
        out=[(rows.shape, rows.dtype)],
        grid=triton.cdiv(rows.size, tiles.SHUFFLED),
        num_warps=4,
        TOTAL=rows.size,
        BITS=bits,
        TILE=tiles.SHUFFLED,
    )[0]
