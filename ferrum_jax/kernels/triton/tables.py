"""Tables: a stable counting sort of the pairs by expert, in one launch for few pairs and in three for many."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from . import launch

# What was changed, what was expected of it, if anything was, and what came: microseconds of moe_plan's kernels, E=128
# and K=8 unless said, on one H100 80GB, Triton 3.6.0, 2026-11-25. Before and after stood side by side in one run, but
# for the last change.
#
#   change                                                          P        before  expected  after
#   ranks by comparing 64 pairs with each other, in place of        1024     10.3    4         3.2   kept
#     a sort of 1024; few pairs: a program for 64                   8192     14.0              7.5   kept
#                                                                   524288   41.9    20        34.4  kept
#   three launches: two warps a program, not four                   524288   34.4              26.3  kept
#   two warps comparing 128 pairs, not 64                           524288   26.7              33.0
#   scan: 8 experts of 256 tiles at a time, not 32 of 64            524288   38.7              34.4  kept
#   three launches: 256 tiles of 256 pairs, not 64 of 1024          65536    16.7              9.0   kept
#   one launch: pairs counted by 512, by 2048, not by 1024          8192     7.5               9.4, 8.8
#   three launches in place of one, E=512 K=10                      8000     16.6    7         6.7   kept
#   slots and owners written in order, an owner found by bisection  524288   26.1    18        23.5  kept
#     in the offsets, not scattered from the pairs; so it is no     65536    9.0               9.4   kept
#     slower where all tokens go to one expert                      1024     3.2     3.8       3.4   kept

ONE_LAUNCH = 2**20  # pairs times experts, up to which each program counts all the pairs itself
PROGRAMS = 512  # programs among which more pairs than that are divided, while a program's tile is within ...
TILE = (64, 1024)  # ... these numbers of pairs
RANKED = 64  # pairs that are compared with each other at a time
CHUNK = 1024  # pairs that a program counts at a time
BINS = 1024  # experts that are counted at a time, at most
FILL = 1024  # slots, or entries of tails, written at a time


@triton.jit
def histogram(ids, start, end, first, E: tl.constexpr, BINS: tl.constexpr, WIDTH: tl.constexpr):
    # How many of the pairs from `start` on, WIDTH of them and none from `end` on, each of BINS experts from `first` on
    # has; those of no expert count nowhere.
    pair = start + tl.arange(0, WIDTH)
    expert = tl.load(ids + pair, mask=pair < end, other=-1)
    live = (expert >= first) & (expert < E) & (expert - first < BINS)
    return tl.histogram(tl.where(live, expert - first, 0), BINS, mask=live)


@triton.jit
def count(ids, counts, P: tl.constexpr, E: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr):
    # Launch one of three. A program counts one tile's pairs by expert and writes one row of counts[slice, tile, E].
    # It reads 4 bytes a pair, coalesced, once for every BINS experts, and writes 4 bytes an expert.
    program = tl.program_id(0).to(tl.int64)
    for first in range(0, E, BINS):
        lane = first + tl.arange(0, BINS)
        found = histogram(ids + program // TILES * P, program % TILES * TILE, P, first, E, BINS, TILE)
        tl.store(counts + program * E + lane, found, mask=lane < E)


@triton.jit
def scan(counts, before, totals, E: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    # Launch two of three. A program takes COLS experts of a slice and adds their counts up over the tiles, ROWS tiles
    # at a time, each row of bytes whole sectors: before[slice, tile, E] (what earlier tiles hold) and totals[slice, E].
    chunks: tl.constexpr = (E + COLS - 1) // COLS
    slice_id = tl.program_id(0).to(tl.int64) // chunks
    expert = tl.program_id(0) % chunks * COLS + tl.arange(0, COLS)[None, :]
    carry = tl.zeros([1, COLS], tl.int32)
    for start in range(0, TILES, ROWS):
        tile = start + tl.arange(0, ROWS)[:, None]
        at = (slice_id * TILES + tile) * E + expert
        live = (tile < TILES) & (expert < E)
        own = tl.load(counts + at, mask=live, other=0)
        tl.store(before + at, carry + tl.cumsum(own, 0) - own, mask=live)
        carry += tl.sum(own, 0)[None, :]
    tl.store(totals + slice_id * E + expert, carry, mask=expert < E)


@triton.jit
def owners(ends, position, HALF: tl.constexpr, BITS: tl.constexpr):
    # For each position how many of the ascending ends are at or before it, by bisection; fewer than all of them.
    low = tl.zeros_like(position)
    for bit in tl.static_range(BITS):
        low += tl.where(tl.gather(ends, low + (HALF >> bit) - 1, 0) <= position, HALF >> bit, 0)
    return low


@triton.jit
def fill(table, start, end, value, step, FILL: tl.constexpr):
    # table[start:end] = value, by programs `step` apart.
    while start < end:
        entry = start + tl.arange(0, FILL)
        tl.store(table + entry, tl.full([FILL], value, tl.int32), mask=entry < end)
        start += step


@triton.jit
def place_tile(
    program, ids, before, totals, pairs, tokens, offsets, slots, blocks, padded,
    P: tl.constexpr, E: tl.constexpr, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, RANKED: tl.constexpr, CHUNK: tl.constexpr,
    FILL: tl.constexpr, BITS: tl.constexpr,
    COUNTED: tl.constexpr, PAIRS: tl.constexpr, ALIGNED: tl.constexpr, PAIR_IDS: tl.constexpr,
):  # fmt: skip
    # Of TILES programs a slice each places one tile of its pairs, and writes its share of padding and tails. It goes
    # through the experts BINS at a time and first learns how many pairs each has, here and before: from launch two, or
    # by counting all the pairs itself, 4 bytes a pair out of L2. Then it takes RANKED pairs at a time: a pair's row is
    # its expert's next one plus the number of its expert's pairs before it.
    slice_id, program = program // TILES, program % TILES
    ids += slice_id * P
    pairs += slice_id * P
    tokens += slice_id * P
    offsets += slice_id * (E + 1)
    slots += slice_id * S
    blocks += slice_id * (S // BLOCK)
    start = program * TILE
    end = tl.minimum(start + TILE, P)
    number = tl.arange(0, RANKED)
    live_rows, live_slots = tl.zeros([], tl.int32), tl.zeros([], tl.int32)

    for first in range(0, E, BINS):
        lane = first + tl.arange(0, BINS)
        if COUNTED:
            total = tl.load(totals + slice_id * E + lane, mask=lane < E, other=0)
            earlier = tl.load(before + (slice_id * TILES + program) * E + lane, mask=lane < E, other=0)
        else:
            earlier = tl.zeros([BINS], tl.int32)
            total = tl.zeros([BINS], tl.int32)
            other = start * 0
            while other < tl.minimum(start, P):
                earlier += histogram(ids, other, tl.minimum(start, P), first, E, BINS, CHUNK)
                other += CHUNK
            other = start
            while other < P:
                total += histogram(ids, other, P, first, E, BINS, CHUNK)
                other += CHUNK
            total += earlier
        first_row = live_rows + tl.cumsum(total, 0) - total
        next_row = first_row + earlier
        used = tl.where(total > 0, (total - 1) // BLOCK + 1, 0) * BLOCK
        first_slot = live_slots + tl.cumsum(used, 0) - used
        if PAIRS and program == 0:
            tl.store(offsets + lane, first_row, mask=lane < E)

        at = start
        while at < end:
            pair = at + number
            expert = tl.load(ids + pair, mask=pair < end, other=-1)
            live = (expert >= 0) & (expert < E)
            here = live & (expert >= first) & (expert - first < BINS)
            bin = tl.where(here, expert - first, 0)
            earlier_equal = (expert[:, None] == expert[None, :]) & (number[:, None] < number[None, :])
            row = tl.gather(next_row, bin, 0) + tl.sum(earlier_equal.to(tl.int32), 0)
            if PAIRS:
                tl.store(pairs + pair, tl.where(live, row, -1), mask=here | (~live & (first == 0) & (pair < end)))
                tl.store(tokens + row, (pair // K).to(tl.int32), mask=here)
            if ALIGNED and PAIR_IDS:
                slot = tl.gather(first_slot - first_row, bin, 0) + row
                tl.store(slots + slot, pair.to(tl.int32), mask=here)
            if TILE > RANKED:
                next_row += tl.histogram(bin, BINS, mask=here)
            at += RANKED

        if ALIGNED:
            # Slots in turn, with whom they belong to: their blocks' owners, padding, and packed rows, which ascend.
            ahead, last_slot = live_slots + program * FILL, live_slots + tl.sum(used, 0)
            while ahead < last_slot:
                inside = ahead + tl.arange(0, FILL) < last_slot
                slot = tl.minimum(ahead + tl.arange(0, FILL), last_slot - 1).to(tl.int32)
                owner = owners(first_slot + used, slot, BINS // 2, BITS)
                behind = slot - tl.gather(first_slot, owner, 0)
                filled = behind < tl.gather(total, owner, 0)
                value = tl.where(filled, tl.gather(first_row, owner, 0) + behind, P)
                tl.store(slots + slot, value, mask=inside & ~(filled & PAIR_IDS))
                tl.store(blocks + slot // BLOCK, first + owner, mask=inside & (slot % BLOCK == 0))
                ahead += TILES * FILL
            live_slots += tl.sum(used, 0)
        live_rows += tl.sum(total, 0)

    ahead, step = program * FILL, TILES * FILL
    if PAIRS:
        fill(tokens, live_rows + ahead, P, T, step, FILL)
        if program == 0:
            tl.store(offsets + E, live_rows)
    if ALIGNED:
        fill(slots, live_slots + ahead, S, P, step, FILL)
        fill(blocks, live_slots // BLOCK + ahead, S // BLOCK, -1, step, FILL)
        if program == 0:
            tl.store(padded + slice_id, live_slots)


@triton.jit
def place(
    ids, before, totals, pairs, tokens, offsets, slots, blocks, padded,
    P: tl.constexpr, E: tl.constexpr, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, RANKED: tl.constexpr, CHUNK: tl.constexpr,
    FILL: tl.constexpr, BITS: tl.constexpr,
    COUNTED: tl.constexpr, PAIRS: tl.constexpr, ALIGNED: tl.constexpr, PAIR_IDS: tl.constexpr,
):  # fmt: skip
    # The last launch, and for few pairs the only one.
    place_tile(
        tl.program_id(0).to(tl.int64), ids, before, totals, pairs, tokens, offsets, slots, blocks, padded, P, E, T, K,
        S, BLOCK, TILES, BINS, TILE, RANKED, CHUNK, FILL, BITS, COUNTED, PAIRS, ALIGNED, PAIR_IDS,
    )  # fmt: skip


def sizes(num_tokens, top_k, num_experts, block_size, aligned, one_launch=False):
    """A table's constants, and how many warps a program has where it counts all pairs itself."""
    num_pairs = num_tokens * top_k
    busy = min(num_experts, num_pairs)
    slots = (busy + (num_pairs - busy) // block_size) * block_size
    bins = min(BINS, max(16, triton.next_power_of_2(num_experts)))
    counted = not one_launch and num_pairs * num_experts > ONE_LAUNCH
    tile = min(max(triton.next_power_of_2(triton.cdiv(num_pairs, PROGRAMS)), TILE[0]), TILE[1])
    tiles = max(triton.cdiv(num_pairs, tile), 2)  # Triton 3.6 fails on one: all bounds are constant
    if not counted and aligned:  # hands for the filling
        tiles = max(tiles, min(triton.cdiv(slots, FILL), 16))
    constants = {
        "P": num_pairs,
        "E": num_experts,
        "T": num_tokens,
        "K": top_k,
        "S": slots,
        "BLOCK": block_size,
        "TILES": tiles,
        "BINS": bins,
        "TILE": tile,
        "RANKED": min(RANKED, tile),
        "CHUNK": CHUNK,
        "FILL": FILL,
        "BITS": bins.bit_length() - 1,
        "COUNTED": counted,
    }
    return constants, 4 if bins <= 512 else 8


def shapes(lead, constants):
    """Of the pairs' three tables, and of the three in blocks."""
    num_tokens, top_k, num_pairs, slots = (constants[name] for name in "TKPS")
    packed = [(*lead, num_tokens, top_k), (*lead, num_pairs), (*lead, constants["E"] + 1)]
    blocked = [(*lead, slots), (*lead, slots // constants["BLOCK"]), tuple(lead)]
    return packed, blocked


def _tables(expert_ids, num_experts, block_size=1, pair_ids=False, pairs=False, aligned=False):
    *lead, num_tokens, top_k = expert_ids.shape
    constants, warps = sizes(num_tokens, top_k, num_experts, block_size, aligned)
    slices, tiles = math.prod(lead), constants["TILES"]
    before = totals = expert_ids
    if constants["COUNTED"]:
        warps = 2 if constants["BINS"] <= 256 else 4
        shape = (*lead, tiles, num_experts)
        (counts,) = launch(
            count,
            expert_ids,
            out=[(shape, jnp.int32)],
            grid=slices * tiles,
            num_warps=4,
            **{name: constants[name] for name in ("P", "E", "TILES", "BINS", "TILE")},
        )
        before, totals = launch(
            scan,
            counts,
            out=[(shape, jnp.int32), ((*lead, num_experts), jnp.int32)],
            grid=slices * triton.cdiv(num_experts, 8),
            num_warps=8,
            E=num_experts,
            TILES=tiles,
            ROWS=min(1024, triton.next_power_of_2(tiles)),
            COLS=8,
        )
    packed, blocked = shapes(lead, constants)
    absent = [(1,)] * 3  # stand where the kernel expects tables that are not wanted, and are not written
    written = launch(
        place,
        expert_ids,
        before,
        totals,
        out=[(shape, jnp.int32) for shape in (packed if pairs else absent) + (blocked if aligned else absent)],
        grid=slices * tiles,
        num_warps=warps,
        PAIRS=pairs,
        ALIGNED=aligned,
        PAIR_IDS=pair_ids,
        **constants,
    )
    return written[0 if pairs else 3 : 6 if aligned else 3]


def moe_build_pairs_by_token(expert_ids, *, num_experts):
    return _tables(expert_ids, num_experts, pairs=True)


def moe_align_block_size(expert_ids, *, num_experts, block_size, pair_ids):
    return _tables(expert_ids, num_experts, block_size, pair_ids, aligned=True)


def moe_plan(expert_ids, *, num_experts, block_size, pair_ids):
    return _tables(expert_ids, num_experts, block_size, pair_ids, pairs=True, aligned=True)
