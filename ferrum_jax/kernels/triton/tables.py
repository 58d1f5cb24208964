"""Tables: a stable counting sort of the pairs by expert, in one launch for few pairs and in three for many."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from . import launch

TILE = 1024
MAX_EXPERTS = 2**19
ONE_LAUNCH_TILES = 8  # up to here each program counts every pair itself


@triton.jit
def tile_histogram(ids, first, P: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr):
    # How many of the TILE pairs from `first` on each expert has; pairs without an expert count nowhere.
    pair = first + tl.arange(0, TILE)
    expert = tl.load(ids + pair, mask=pair < P, other=-1)
    live = (expert >= 0) & (expert < E)
    return tl.histogram(tl.where(live, expert, 0), BINS, mask=live)


@triton.jit
def count(ids, counts, P: tl.constexpr, E: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr):
    # Launch one of three. A program counts one tile's pairs by expert and writes one row of counts[slice, tile, E].
    # It reads 4 bytes a pair, coalesced, and writes 4 bytes an expert.
    program = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BINS)
    found = tile_histogram(ids + program // TILES * P, program % TILES * TILE, P, E, BINS, TILE)
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
    TILES: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
    COUNTED: tl.constexpr, PAIRS: tl.constexpr, ALIGNED: tl.constexpr, PAIR_IDS: tl.constexpr,
):  # fmt: skip
    # The last launch, and for few pairs the only one. The first TILES programs of a slice place one tile of pairs each
    # and write its share of the tails; with ALIGNED, E more write one expert's padding and blocks each. Every program
    # first learns each expert's total, from launch two or by counting all the pairs: 4 bytes a pair, out of L2.
    programs = TILES + (E if ALIGNED else 0)
    slice_id, program = tl.program_id(0).to(tl.int64) // programs, tl.program_id(0) % programs
    ids += slice_id * P
    lane = tl.arange(0, BINS)
    if COUNTED:
        total = tl.load(totals + slice_id * E + lane, mask=lane < E, other=0)
        counted = tl.where(program < TILES, E, 0)
        earlier = tl.load(before + (slice_id * TILES + program) * E + lane, mask=lane < counted, other=0)
    else:
        total = tl.zeros([BINS], tl.int32)
        earlier = tl.zeros([BINS], tl.int32)
        for start in range(0, P, TILE):
            found = tile_histogram(ids, start, P, E, BINS, TILE)
            total += found
            earlier += tl.where(start < program * TILE, found, 0)
    used = tl.where(total > 0, (total - 1) // BLOCK + 1, 0) * BLOCK
    row_end, slot_end = tl.cumsum(total, 0), tl.cumsum(used, 0)
    live_rows, live_slots = tl.sum(total, 0), tl.sum(used, 0)
    slot_start = slot_end - used
    place_in_tile = tl.arange(0, TILE)

    if program < TILES:
        # Sorting (expert, place in the tile) is stable; what is left is each expert's first row less its first place.
        pair = program.to(tl.int64) * TILE + place_in_tile
        expert = tl.load(ids + pair, mask=pair < P, other=-1)
        expert = tl.where((expert >= 0) & (expert < E), expert, E)
        order = tl.sort(expert * TILE + place_in_tile)
        expert, pair = order // TILE, program.to(tl.int64) * TILE + order % TILE
        own = tile_histogram(ids, program.to(tl.int64) * TILE, P, E, BINS, TILE)
        shift = row_end - total + earlier - (tl.cumsum(own, 0) - own)
        bin = tl.minimum(expert, BINS - 1)
        row = tl.gather(shift, bin, 0) + place_in_tile
        live = expert < E
        if PAIRS:
            tl.store(pairs + slice_id * P + pair, tl.where(live, row, -1), mask=pair < P)
            tl.store(tokens + slice_id * P + row, (pair // K).to(tl.int32), mask=live)
            tail = program.to(tl.int64) * TILE + place_in_tile
            tl.store(tokens + slice_id * P + tail, tl.full([TILE], T, tl.int32), mask=(tail >= live_rows) & (tail < P))
            if program == 0:
                tl.store(offsets + slice_id * (E + 1) + lane, row_end - total, mask=lane < E)
                tl.store(offsets + slice_id * (E + 1) + E, live_rows)
        if ALIGNED:
            slot = tl.gather(slot_start - row_end + total, bin, 0) + row
            value = pair.to(tl.int32) if PAIR_IDS else row
            tl.store(slots + slice_id * S + slot, value, mask=live)
            start = program * TILE
            while start < S:
                tail = start + place_in_tile.to(tl.int64)
                empty = (tail >= live_slots) & (tail < S)
                tl.store(slots + slice_id * S + tail, tl.full([TILE], P, tl.int32), mask=empty)
                dead = (tail >= live_slots // BLOCK) & (tail < S // BLOCK)
                tl.store(blocks + slice_id * (S // BLOCK) + tail, tl.full([TILE], -1, tl.int32), mask=dead)
                start += TILES * TILE
            if program == 0:
                tl.store(padded + slice_id, live_slots)
    else:
        this = program - TILES
        expert_slot = tl.sum(tl.where(lane == this, slot_start + total, 0), 0)
        expert_block = tl.sum(tl.where(lane == this, slot_start, 0), 0) // BLOCK
        end = tl.sum(tl.where(lane == this, slot_end, 0), 0)
        while expert_slot < end:
            at = expert_slot + place_in_tile
            tl.store(slots + slice_id * S + at, tl.full([TILE], P, tl.int32), mask=at < end)
            expert_slot += TILE
        while expert_block < end // BLOCK:
            at = expert_block + place_in_tile
            tl.store(blocks + slice_id * (S // BLOCK) + at, place_in_tile * 0 + this, mask=at < end // BLOCK)
            expert_block += TILE


def refuse(operands, params):
    if params["num_experts"] > MAX_EXPERTS:
        return f"a program counts each expert in registers, {MAX_EXPERTS} at most; got {params['num_experts']}"
    return None


def _tables(expert_ids, num_experts, block_size=1, pair_ids=False, pairs=False, aligned=False):
    *lead, num_tokens, top_k = expert_ids.shape
    num_pairs, slices = num_tokens * top_k, math.prod(lead)
    tile = min(TILE, max(16, triton.next_power_of_2(num_pairs)))
    tiles = triton.cdiv(num_pairs, tile)
    busy = min(num_experts, num_pairs)
    slots = (busy + (num_pairs - busy) // block_size) * block_size
    bins = max(16, triton.next_power_of_2(num_experts))
    sizes = {"P": num_pairs, "E": num_experts, "TILES": tiles, "BINS": bins, "TILE": tile}
    warps = min(32, max(4, bins // 256))
    counted = tiles > ONE_LAUNCH_TILES
    before = totals = expert_ids
    if counted:
        shape = (*lead, tiles, num_experts)
        (counts,) = launch(count, expert_ids, out=[(shape, jnp.int32)], grid=slices * tiles, num_warps=warps, **sizes)
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
        grid=slices * (tiles + (num_experts if aligned else 0)),
        num_warps=warps,
        T=num_tokens,
        K=top_k,
        S=slots,
        BLOCK=block_size,
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
