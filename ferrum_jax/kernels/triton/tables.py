"""Tables: a stable counting sort of the pairs by expert, in one launch for few pairs and in three for many."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from ..shapes import lead_axes, whole
from . import tiles
from .launch import capability, launch


@triton.jit
def histogram(ids, start, end, first, E: tl.constexpr, BINS: tl.constexpr, WIDTH: tl.constexpr):
    # Counts the pairs of each of BINS experts, from expert `first` on, among WIDTH pairs from `start` on that are
    # before `end`. A pair whose id is no expert is not counted.
    pair = start + tl.arange(0, WIDTH)
    expert = tl.load(ids + pair, mask=pair < end, other=-1)
    live = (expert >= first) & (expert < E) & (expert - first < BINS)
    return tl.histogram(tl.where(live, expert - first, 0), BINS, mask=live)


@triton.jit
def count(ids, counts, P: tl.constexpr, E: tl.constexpr, TILES: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr):
    # The first of three launches. A program counts one tile's pairs by expert and writes one row of
    # counts[slice, tile, E]. It reads the tile once for every BINS experts.
    program = tl.program_id(0).to(tl.int64)
    for first in range(0, E, BINS):
        lane = first + tl.arange(0, BINS)
        found = histogram(ids + program // TILES * P, program % TILES * TILE, P, first, E, BINS, TILE)
        tl.store(counts + program * E + lane, found, mask=lane < E)


@triton.jit
def scan(counts, before, totals, E: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    # The second of three launches. A program takes COLS experts of a slice and adds their counts up over the tiles,
    # ROWS tiles at a time. It writes before[slice, tile, E], the pairs in earlier tiles, and totals[slice, E].
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
    # For each position, the number of ascending ends that are at or before it, by bisection. There must be an end
    # behind every position.
    low = tl.zeros_like(position)
    for bit in tl.static_range(BITS):
        low += tl.where(tl.gather(ends, low + (HALF >> bit) - 1, 0) <= position, HALF >> bit, 0)
    return low


@triton.jit
def fill(table, start, end, value, step, FILL: tl.constexpr):
    # table[start:end] = value. Each program writes FILL entries, then those that lie `step` further on.
    while start < end:
        entry = start + tl.arange(0, FILL)
        tl.store(table + entry, tl.full([FILL], value, tl.int32), mask=entry < end)
        start += step


@triton.jit
def fill_blocks(
    slots, blocks, start, end, step, first, first_row, total, first_slot, used,
    P: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, BITS: tl.constexpr, FILL: tl.constexpr,
    PAIR_IDS: tl.constexpr,
):  # fmt: skip
    # Writes the slots of BINS experts, from expert `first` on, in order: the blocks' owners, padding, and packed rows,
    # which ascend. The slots end before `end`. A program writes FILL of them, then those that lie `step` further on.
    while start < end:
        inside = start + tl.arange(0, FILL) < end
        slot = tl.minimum(start + tl.arange(0, FILL), end - 1).to(tl.int32)
        owner = owners(first_slot + used, slot, BINS // 2, BITS)
        behind = slot - tl.gather(first_slot, owner, 0)
        filled = behind < tl.gather(total, owner, 0)
        value = tl.where(filled, tl.gather(first_row, owner, 0) + behind, P)
        tl.store(slots + slot, value, mask=inside & ~(filled & PAIR_IDS))
        tl.store(blocks + slot // BLOCK, first + owner, mask=inside & (slot % BLOCK == 0))
        start += step


@triton.jit
def place_tile(
    program, ids, before, totals, pairs, tokens, offsets, slots, blocks, padded,
    P: tl.constexpr, E: tl.constexpr, T: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, RANKED: tl.constexpr, CHUNK: tl.constexpr,
    FILL: tl.constexpr, BITS: tl.constexpr,
    COUNTED: tl.constexpr, PAIRS: tl.constexpr, ALIGNED: tl.constexpr, PAIR_IDS: tl.constexpr,
):  # fmt: skip
    # Each of a slice's TILES programs places one tile of pairs and writes its share of padding and tails. For BINS
    # experts at a time it first finds how many pairs each has in all and in earlier tiles: COUNTED says that `scan`
    # wrote these counts, otherwise it counts all pairs itself. Then it places RANKED pairs at a time. The row of a pair
    # is its expert's next row plus the number of the expert's pairs before it among the RANKED.
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
            last_slot = live_slots + tl.sum(used, 0)
            fill_blocks(
                slots, blocks, live_slots + program * FILL, last_slot, TILES * FILL, first, first_row, total,
                first_slot, used, P, BLOCK, BINS, BITS, FILL, PAIR_IDS,
            )  # fmt: skip
            live_slots = last_slot
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


@triton.jit
def place_groups(
    sizes, offset, slots, blocks, padded,
    M: tl.constexpr, GROUPS: tl.constexpr, HELD: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, BINS: tl.constexpr, FILL: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    # The aligned table of rows that stand by group, for HELD groups from the offset on. Each of a slice's TILES
    # programs adds up all groups' sizes, BINS at a time, and writes its share of the slots.
    slice_id, program = tl.program_id(0).to(tl.int64) // TILES, tl.program_id(0) % TILES
    sizes += slice_id * GROUPS
    slots += slice_id * S
    blocks += slice_id * (S // BLOCK)
    begin = tl.minimum(tl.maximum(tl.load(offset + slice_id), -HELD), GROUPS)  # so that nothing below overflows
    rows, live_slots = tl.zeros([], tl.int64), tl.zeros([], tl.int32)
    for first in range(0, GROUPS, BINS):
        group = first + tl.arange(0, BINS)
        size = tl.maximum(tl.load(sizes + group, mask=group < GROUPS, other=0), 0).to(tl.int64)
        ends = rows + tl.cumsum(size, 0)
        first_row = tl.minimum(ends - size, M).to(tl.int32)
        held = (group >= begin) & (group - begin < HELD)
        total = tl.where(held, tl.minimum(ends, M).to(tl.int32) - first_row, 0)
        used = tl.where(total > 0, (total - 1) // BLOCK + 1, 0) * BLOCK
        first_slot = live_slots + tl.cumsum(used, 0) - used
        last_slot = live_slots + tl.sum(used, 0)
        fill_blocks(
            slots, blocks, live_slots + program * FILL, last_slot, TILES * FILL, first - begin, first_row, total,
            first_slot, used, M, BLOCK, BINS, BITS, FILL, False,
        )  # fmt: skip
        live_slots = last_slot
        rows += tl.sum(size, 0)
    fill(slots, live_slots + program * FILL, S, M, TILES * FILL, FILL)
    fill(blocks, live_slots // BLOCK + program * FILL, S // BLOCK, -1, TILES * FILL, FILL)
    if program == 0:
        tl.store(padded + slice_id, live_slots)


def chosen_tiles():
    """How the tables are divided on the target GPU."""
    return tiles.first(tiles.COUNTING, capability())


def aligned_rows(num_pairs, num_experts, block_size):
    """The slots of an aligned table: see `max_aligned_rows`."""
    busy = min(num_experts, num_pairs)
    return (busy + (num_pairs - busy) // block_size) * block_size


def sizes(num_tokens, top_k, num_experts, block_size, aligned, one_launch=False):
    """The constants of `place_tile`, and the warps of a program that counts all pairs itself.

    one_launch: there is no other launch, however many pairs there are.
    """
    chosen, num_pairs = chosen_tiles(), num_tokens * top_k
    slots = aligned_rows(num_pairs, num_experts, block_size)
    bins = min(chosen.bins, max(16, triton.next_power_of_2(num_experts)))
    counted = not one_launch and num_pairs * num_experts > chosen.one_launch
    pairs_of_tile = triton.next_power_of_2(triton.cdiv(num_pairs, chosen.programs))
    pairs_of_tile = min(max(pairs_of_tile, chosen.least_pairs), chosen.most_pairs)
    num_tiles = max(triton.cdiv(num_pairs, pairs_of_tile), 2)  # Triton 3.6 cannot compile one: all bounds are constant
    if not counted and aligned:
        num_tiles = max(num_tiles, min(triton.cdiv(slots, chosen.filled), chosen.filling))
    constants = {
        "P": num_pairs,
        "E": num_experts,
        "T": num_tokens,
        "K": top_k,
        "S": slots,
        "BLOCK": block_size,
        "TILES": num_tiles,
        "BINS": bins,
        "TILE": pairs_of_tile,
        "RANKED": min(chosen.ranked, pairs_of_tile),
        "CHUNK": chosen.counted,
        "FILL": chosen.filled,
        "BITS": bins.bit_length() - 1,
        "COUNTED": counted,
    }
    return constants, chosen.warps if bins <= chosen.wide else chosen.wide_warps


def shapes(lead, constants):
    """The shapes of the three tables of pairs, and of the three tables in blocks."""
    num_tokens, top_k, num_pairs, slots = (constants[name] for name in "TKPS")
    packed = [(*lead, num_tokens, top_k), (*lead, num_pairs), (*lead, constants["E"] + 1)]
    blocked = [(*lead, slots), (*lead, slots // constants["BLOCK"]), tuple(lead)]
    return packed, blocked


def _counts(expert_ids, constants):
    """For many pairs, in two launches: each tile's pairs of each expert in earlier tiles, and each expert's pairs."""
    *lead, _, _ = expert_ids.shape
    chosen, slices = chosen_tiles(), math.prod(lead)
    experts, num_tiles = constants["E"], constants["TILES"]
    shape = (*lead, num_tiles, experts)
    (counts,) = launch(
        count,
        expert_ids,
        out=[(shape, jnp.int32)],
        grid=slices * num_tiles,
        num_warps=chosen.counting_warps,
        **{name: constants[name] for name in ("P", "E", "TILES", "BINS", "TILE")},
    )
    return launch(
        scan,
        counts,
        out=[(shape, jnp.int32), ((*lead, experts), jnp.int32)],
        grid=slices * triton.cdiv(experts, chosen.scanned_experts),
        num_warps=chosen.scanning_warps,
        E=experts,
        TILES=num_tiles,
        ROWS=min(chosen.scanned_tiles, triton.next_power_of_2(num_tiles)),
        COLS=chosen.scanned_experts,
    )


def _tables(expert_ids, num_experts, block_size=1, pair_ids=False, pairs=False, aligned=False):
    *lead, num_tokens, top_k = expert_ids.shape
    constants, warps = sizes(num_tokens, top_k, num_experts, block_size, aligned)
    before = totals = expert_ids
    if constants["COUNTED"]:
        before, totals = _counts(expert_ids, constants)
        chosen = chosen_tiles()
        warps = chosen.placing_warps if constants["BINS"] <= chosen.placing_wide else chosen.placing_wide_warps
    packed, blocked = shapes(lead, constants)
    absent = [(1,)] * 3  # stand for tables that the kernel takes as arguments and, here, does not write
    written = launch(
        place,
        expert_ids,
        before,
        totals,
        out=[(shape, jnp.int32) for shape in (packed if pairs else absent) + (blocked if aligned else absent)],
        grid=math.prod(lead) * constants["TILES"],
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


def align_groups(group_sizes, group_offset, *, num_rows, num_groups, block_size):
    lead = lead_axes((group_sizes, 1), (group_offset, 0))
    chosen, groups = chosen_tiles(), group_sizes.shape[-1]
    slots = aligned_rows(num_rows, num_groups, block_size)
    bins = min(chosen.bins, max(16, triton.next_power_of_2(groups)))
    # Two tiles at least, as in `sizes`.
    num_tiles = max(min(triton.cdiv(slots, chosen.filled), chosen.filling), 2)
    return launch(
        place_groups,
        whole(group_sizes, lead),
        whole(group_offset, lead),
        out=[((*lead, slots), jnp.int32), ((*lead, slots // block_size), jnp.int32), (lead, jnp.int32)],
        grid=math.prod(lead) * num_tiles,
        num_warps=chosen.warps if bins <= chosen.wide else chosen.wide_warps,
        M=num_rows,
        GROUPS=groups,
        HELD=num_groups,
        S=slots,
        BLOCK=block_size,
        TILES=num_tiles,
        BINS=bins,
        FILL=chosen.filled,
        BITS=bins.bit_length() - 1,
    )
