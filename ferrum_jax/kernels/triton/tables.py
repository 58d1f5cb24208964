"""Tables: a stable counting sort of the pairs by expert, in one launch for few pairs and in three for many."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from . import launch

TILE = 1024  # pairs that a program places
BINS = 1024  # experts that it counts at a time, at most
ONE_LAUNCH_TILES = 8  # up to here each program counts every pair itself


@triton.jit
def histogram(ids, start, first, P: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr):
    # How many of the TILE pairs from `start` on each of BINS experts from `first` on has; those of no expert, nowhere.
    pair = start + tl.arange(0, TILE)
    expert = tl.load(ids + pair, mask=pair < P, other=-1)
    live = (expert >= first) & (expert < E) & (expert - first < BINS)
    return tl.histogram(tl.where(live, expert - first, 0), BINS, mask=live)


@triton.jit
def count(ids, counts, P: tl.constexpr, E: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr):
    # Launch one of three. A program counts one tile's pairs by expert and writes one row of counts[slice, tile, E].
    # It reads 4 bytes a pair, coalesced, once for every BINS experts, and writes 4 bytes an expert.
    program = tl.program_id(0).to(tl.int64)
    for first in range(0, E, BINS):
        lane = first + tl.arange(0, BINS)
        found = histogram(ids + program // TILES * P, program % TILES * TILE, first, P, E, BINS, TILE)
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
def place(
    ids, before, totals, pairs, tokens, offsets, slots, blocks, padded,
    P: tl.constexpr, E: tl.constexpr, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, PAD: tl.constexpr,
    COUNTED: tl.constexpr, PAIRS: tl.constexpr, ALIGNED: tl.constexpr, PAIR_IDS: tl.constexpr,
):  # fmt: skip
    # The last launch, and for few pairs the only one: a program sorts one tile of a slice's pairs, places them, and
    # writes its share of padding and tails. It goes through the experts BINS at a time and first learns how many pairs
    # each has, here and before: from launch two, or by counting all the pairs itself, 4 bytes a pair out of L2.
    slice_id, program = tl.program_id(0).to(tl.int64) // TILES, tl.program_id(0) % TILES
    ids += slice_id * P
    place_in_tile, start = tl.arange(0, TILE), program.to(tl.int64) * TILE
    expert = tl.load(ids + start + place_in_tile, mask=start + place_in_tile < P, other=-1)
    expert = tl.where((expert >= 0) & (expert < E), expert, E)
    # Sorting (expert, place in the tile) is stable.
    order = tl.sort((expert if E * TILE < 2**31 - TILE else expert.to(tl.int64)) * TILE + place_in_tile)
    expert, pair = (order // TILE).to(tl.int32), start + order % TILE
    row, slot = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    live_rows, live_slots, own_rows = tl.sum(row, 0), tl.sum(row, 0), tl.sum(row, 0)

    for first in range(0, E, BINS):
        lane = first + tl.arange(0, BINS)
        own = histogram(ids, start, first, P, E, BINS, TILE)
        if COUNTED:
            total = tl.load(totals + slice_id * E + lane, mask=lane < E, other=0)
            earlier = tl.load(before + (slice_id * TILES + program) * E + lane, mask=lane < E, other=0)
        else:
            total = tl.zeros([BINS], tl.int32)
            earlier = tl.zeros([BINS], tl.int32)
            for other in range(0, P, TILE):
                found = histogram(ids, other, first, P, E, BINS, TILE)
                total += found
                earlier += tl.where(other < start, found, 0)
        first_row = live_rows + tl.cumsum(total, 0) - total
        here = (expert >= first) & (expert < E) & (expert - first < BINS)
        bin = tl.where(here, expert - first, 0)
        # What a pair's place in the sorted tile is short of its row: the same for all of its expert's.
        shift = first_row + earlier - (own_rows + tl.cumsum(own, 0) - own)
        row = tl.where(here, tl.gather(shift, bin, 0) + place_in_tile, row)
        if PAIRS and program == 0:
            tl.store(offsets + slice_id * (E + 1) + lane, first_row, mask=lane < E)
        if ALIGNED:
            used = tl.where(total > 0, (total - 1) // BLOCK + 1, 0) * BLOCK
            first_slot = live_slots + tl.cumsum(used, 0) - used
            slot = tl.where(here, tl.gather(first_slot - first_row, bin, 0) + row, slot)
            mine = lane % TILES == program
            at = (first_slot + total)[:, None] + tl.arange(0, PAD)[None, :]
            end = tl.where(mine, first_slot + used, 0)[:, None]
            longest = tl.max(tl.where(mine, used - total, 0), 0)
            while longest > 0:
                tl.store(slots + slice_id * S + at, tl.full([BINS, PAD], P, tl.int32), mask=at < end)
                at += PAD
                longest -= PAD
            live_slots += tl.sum(used, 0)
        live_rows += tl.sum(total, 0)
        own_rows += tl.sum(own, 0)

    live = expert < E
    if PAIRS:
        tl.store(pairs + slice_id * P + pair, tl.where(live, row, -1), mask=pair < P)
        tl.store(tokens + slice_id * P + row, (pair // K).to(tl.int32), mask=live)
        tail = start + place_in_tile
        tl.store(tokens + slice_id * P + tail, tl.full([TILE], T, tl.int32), mask=(tail >= live_rows) & (tail < P))
        if program == 0:
            tl.store(offsets + slice_id * (E + 1) + E, live_rows)
    if ALIGNED:
        tl.store(slots + slice_id * S + slot, pair.to(tl.int32) if PAIR_IDS else row, mask=live)
        # Every live block's first slot holds a pair, which names the block's owner.
        tl.store(blocks + slice_id * (S // BLOCK) + slot // BLOCK, expert, mask=live & (slot % BLOCK == 0))
        while start < S:
            tail = start + place_in_tile
            empty = (tail >= live_slots) & (tail < S)
            tl.store(slots + slice_id * S + tail, tl.full([TILE], P, tl.int32), mask=empty)
            dead = (tail >= live_slots // BLOCK) & (tail < S // BLOCK)
            tl.store(blocks + slice_id * (S // BLOCK) + tail, tl.full([TILE], -1, tl.int32), mask=dead)
            start += TILES * TILE
        if program == 0:
            tl.store(padded + slice_id, live_slots)


def _tables(expert_ids, num_experts, block_size=1, pair_ids=False, pairs=False, aligned=False):
    *lead, num_tokens, top_k = expert_ids.shape
    num_pairs, slices = num_tokens * top_k, math.prod(lead)
    tile = min(TILE, max(16, triton.next_power_of_2(num_pairs)))
    tiles = triton.cdiv(num_pairs, tile)
    busy = min(num_experts, num_pairs)
    slots = (busy + (num_pairs - busy) // block_size) * block_size
    bins = min(BINS, max(16, triton.next_power_of_2(num_experts)))
    sizes = {"P": num_pairs, "E": num_experts, "TILES": tiles, "BINS": bins, "TILE": tile}
    counted = tiles > ONE_LAUNCH_TILES
    before = totals = expert_ids
    if counted:
        shape = (*lead, tiles, num_experts)
        (counts,) = launch(count, expert_ids, out=[(shape, jnp.int32)], grid=slices * tiles, num_warps=4, **sizes)
        before, totals = launch(
            scan,
            counts,
            out=[(shape, jnp.int32), ((*lead, num_experts), jnp.int32)],
            grid=slices * triton.cdiv(num_experts, 32),
            num_warps=4,
            E=num_experts,
            TILES=tiles,
            ROWS=64,
            COLS=32,
        )
    packed = [(*lead, num_tokens, top_k), (*lead, num_pairs), (*lead, num_experts + 1)]
    blocked = [(*lead, slots), (*lead, slots // block_size), tuple(lead)]
    absent = [(1,)] * 3  # stand where the kernel expects tables that are not wanted, and are not written
    written = launch(
        place,
        expert_ids,
        before,
        totals,
        out=[(shape, jnp.int32) for shape in (packed if pairs else absent) + (blocked if aligned else absent)],
        grid=slices * tiles,
        num_warps=4,
        T=num_tokens,
        K=top_k,
        S=slots,
        BLOCK=block_size,
        PAD=max(1, 1024 // bins),
        COUNTED=counted,
        PAIRS=pairs,
        ALIGNED=aligned,
        PAIR_IDS=pair_ids,
        **sizes,
    )
    return written[0 if pairs else 3 : 6 if aligned else 3]


def moe_build_pairs_by_token(expert_ids, *, num_experts):
    return _tables(expert_ids, num_experts, pairs=True)


def moe_align_block_size(expert_ids, *, num_experts, block_size, pair_ids):
    return _tables(expert_ids, num_experts, block_size, pair_ids, aligned=True)


def moe_plan(expert_ids, *, num_experts, block_size, pair_ids):
    return _tables(expert_ids, num_experts, block_size, pair_ids, pairs=True, aligned=True)
