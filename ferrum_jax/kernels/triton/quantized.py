"""Grouped products with quantised matrices: numbers become floats in registers, on their way to the tensor cores.

Matrices are stored [N, H], so a tile of theirs is the left operand, and rows are the right one: the product is computed
transposed.
"""

import math

import triton
import triton.language as tl

from ..shapes import large, lead_axes, whole
from . import tiles
from .grouped import INTERPRETED, activated, dot, matrix_number, named_by, zero_unnamed
from .launch import capability, launch


@triton.jit
def scale_of(s):
    # A stored scale as float32: e8m0 by its bits, whose 0 is a subnormal.
    if s.dtype == tl.uint8:
        bits = tl.where(s == 0, 0x400000, tl.where(s == 255, 0x7FC00000, s.to(tl.int32) << 23))
        return bits.to(tl.float32, bitcast=True)
    return s.to(tl.float32)


@triton.jit
def minifloat(code, FORM: tl.constexpr):
    # A float of few bits as float32: its exponent is moved to float32's place.
    if FORM == "fp8":
        magnitude, sign = (code & 0x7F) << 20, (code & 0x80) << 24
    else:
        magnitude, sign = (code & 7) << 22, (code & 8) << 28
    if INTERPRETED:
        # Where subnormals count as 0, the exponent gets float32's bias, with which exponent 0 has a hidden one and half
        # its scale. Both are undone.
        rebiased = magnitude + (120 << 23 if FORM == "fp8" else 126 << 23)
        hidden = 2.0**-7 if FORM == "fp8" else 0.5
        floats = rebiased.to(tl.float32, bitcast=True)
        floats = tl.where(magnitude < (1 << 23), 2 * (floats - hidden), floats)
        return tl.where(sign != 0, -floats, floats)
    return (magnitude | sign).to(tl.float32, bitcast=True) * (2.0**120 if FORM == "fp8" else 2.0**126)


@triton.jit
def numbers(values, FORM: tl.constexpr, FP8: tl.constexpr):
    # The stored numbers as float32, without zero points. FP8: the GPU converts fp8.
    if FORM == "fp8":
        if FP8:
            return values.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
        code = values.to(tl.int32)
        return tl.where((code & 0x7F) == 0x7F, float("nan"), minifloat(code, FORM))
    elif FORM == "mxfp4":
        return minifloat(values.to(tl.int32), FORM)
    else:
        return values.to(tl.float32)


@triton.jit
def by_entry(grid, at_row, column, first, inside, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    # The grid's entries, of scales or zero points, for a tile of COLUMNS columns from `first` on. Where columns of a
    # block stand side by side in the tile, each entry is loaded once.
    if BLOCK % COLUMNS == 0:
        return tl.load(grid + at_row + first // BLOCK, mask=inside, other=0)[:, None]
    elif COLUMNS % BLOCK == 0:
        groups: tl.constexpr = COLUMNS // BLOCK
        group = first // BLOCK + tl.arange(0, groups)
        loaded = tl.load(grid + at_row[:, None] + group[None, :], mask=inside[:, None] & (group < C)[None, :], other=0)
        wide = tl.broadcast_to(loaded[:, :, None], [loaded.shape[0], groups, BLOCK])
        return tl.reshape(wide, [loaded.shape[0], COLUMNS])
    else:
        place = at_row[:, None] + column[None, :] // BLOCK
        return tl.load(grid + place, mask=inside[:, None] & (column < BLOCK * C)[None, :], other=0)


@triton.jit
def tile_of(
    values, scales, zeros, row, first, rows_inside,
    W: tl.constexpr, H: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, PER_PART: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    # Rows `row` of a stored matrix and COLUMNS columns from `first` on, as float32; 0 outside.
    column = first + tl.arange(0, COLUMNS)
    if BITS == 4:
        word = first // 2 + tl.arange(0, COLUMNS // 2)
        inside = rows_inside[:, None] & (word < W)[None, :]
        packed = tl.load(values + row[:, None].to(tl.int64) * W + word[None, :], mask=inside, other=0)
        code = tl.interleave(packed & 15, packed >> 4)
    else:
        inside = rows_inside[:, None] & (column < W)[None, :]
        code = tl.load(values + row[:, None].to(tl.int64) * W + column[None, :], mask=inside, other=0)
    at_row = (row // PART * PER_PART + row % PART // ROWS) * C
    scale = scale_of(by_entry(scales, at_row, column, first, rows_inside, COLUMNS, BLOCK, C))
    floats = numbers(code, FORM, FP8)
    if FORM == "int4" or FORM == "int8":
        if ZEROS:
            floats -= by_entry(zeros, at_row, column, first, rows_inside, COLUMNS, BLOCK, C).to(tl.float32)
        else:
            floats -= 8.0 if FORM == "int4" else 128.0
    # An entry outside has a scale that may be anything.
    return tl.where(rows_inside[:, None] & (column < H)[None, :], floats * scale, 0.0)


@triton.jit
def quantized(
    lhs, values, scales, zeros, up_values, up_scales, up_zeros, layer, up_layer, slots, blocks, total, owner,
    row_weights, out,
    M: tl.constexpr, H: tl.constexpr, N: tl.constexpr, STORED: tl.constexpr, W: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, PER_PART: tl.constexpr, COLUMNS: tl.constexpr,
    FORM: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, FP8: tl.constexpr, E: tl.constexpr,
    S: tl.constexpr, P: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, SHARED_LHS: tl.constexpr,
    SHARED_RHS: tl.constexpr, SHARED_UP: tl.constexpr, LAYERS: tl.constexpr, UP_LAYERS: tl.constexpr,
    PAIR: tl.constexpr, ACTIVATION: tl.constexpr, WEIGHTED: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ZERO_ROWS: tl.constexpr, ZERO_COLUMNS: tl.constexpr,
):  # fmt: skip
    # The walk is that of `grouped`. H is what is added up, and N are the columns of the result. A tile of the matrix
    # is [TN, TK], its rows the result's columns; TRANSPOSED, it is [TK, TN]. Of a stored matrix there are STORED rows
    # of W bytes and B rows of C scales. PARTS of a block's slots are tiles; a PART of the stored rows has PER_PART rows
    # of scales, each for ROWS stored rows, and a scale serves COLUMNS entries.
    slice_id = tl.program_id(0).to(tl.int64) // PROGRAMS
    program = tl.program_id(0) % PROGRAMS
    slots, blocks = slots + slice_id * S, blocks + slice_id * (S // BLOCK)
    out += slice_id * P * N
    live_slots = tl.load(total + slice_id)
    columns: tl.constexpr = (N + TN - 1) // TN
    if program >= TILES * columns:
        zero_unnamed(
            program - TILES * columns, slots, blocks, live_slots, owner + slice_id * P, out, S, BLOCK, E, P, N,
            ZERO_ROWS, ZERO_COLUMNS,
        )  # fmt: skip
        return
    first = program // (GROUP * columns) * GROUP
    across = min(TILES - first, GROUP)
    tile = first + program % (GROUP * columns) % across
    block = tile // PARTS
    if block * BLOCK >= live_slots:
        return
    expert = tl.load(blocks + block).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    in_block = tile % PARTS * TM + tl.arange(0, TM)
    slot = tl.load(slots + block * BLOCK + in_block, mask=in_block < BLOCK, other=-1)
    named = (slot >= 0) & (slot < P)
    row = tl.where(named, slot // TOP_K, 0).to(tl.int64) + (0 if SHARED_LHS else slice_id * M)
    col = program % (GROUP * columns) // across * TN + tl.arange(0, TN)
    k = tl.arange(0, TK)
    rows = lhs + row[:, None] * H + k[None, :]
    number = matrix_number(expert, layer, slice_id, E, LAYERS, SHARED_RHS)
    values, scales, zeros = values + number * STORED * W, scales + number * B * C, zeros + number * B * C
    if PAIR:
        number = matrix_number(expert, up_layer, slice_id, E, UP_LAYERS, SHARED_UP)
        up_values, up_scales = up_values + number * STORED * W, up_scales + number * B * C
        up_zeros += number * B * C
    first_column = program % (GROUP * columns) // across * TN
    sums = tl.zeros([TN, TM], tl.float32)
    up = sums
    for start in range(0, H, TK):
        a = tl.load(rows + start, mask=named[:, None] & (k < H - start)[None, :], other=0.0)
        if TRANSPOSED:
            b = tile_of(values, scales, zeros, start + k, first_column, k < H - start, W, N, C, PART, ROWS, PER_PART,
                        TN, COLUMNS, FORM, BITS, ZEROS, FP8)  # fmt: skip
            sums = dot(b.to(a.dtype).T, a.T, sums, PRECISION)
        else:
            b = tile_of(values, scales, zeros, col, start, col < N, W, H, C, PART, ROWS, PER_PART,
                        TK, COLUMNS, FORM, BITS, ZEROS, FP8)  # fmt: skip
            sums = dot(b.to(a.dtype), a.T, sums, PRECISION)
        if ACTIVATION != "":
            if PAIR:
                b = tile_of(up_values, up_scales, up_zeros, col, start, col < N, W, H, C, PART, ROWS, PER_PART,
                            TK, COLUMNS, FORM, BITS, ZEROS, FP8)  # fmt: skip
            else:
                b = tile_of(values, scales, zeros, col + N, start, col < N, W, H, C, PART, ROWS, PER_PART,
                            TK, COLUMNS, FORM, BITS, ZEROS, FP8)  # fmt: skip
            up = dot(b.to(a.dtype), a.T, up, PRECISION)
    if ACTIVATION != "":
        sums = activated(sums, up, ACTIVATION)
    sums = sums.T
    if WEIGHTED:
        sums *= tl.load(row_weights + slice_id * P + slot, mask=named, other=0.0)[:, None]
    tl.store(out + slot[:, None].to(tl.int64) * N + col[None, :], sums.to(out.dtype.element_ty),
             mask=named[:, None] & (col < N)[None, :])  # fmt: skip


# ---- wrappers


def _stack(read, lead):
    """The values, scales and zeros of a stack of layers, and whether all slices of the batch share them."""
    arrays = [x for x in read[:3] if x is not None]
    shared = all(math.prod(x.shape[: len(lead)]) == 1 for x in arrays)
    values, scales, *zeros = arrays if shared else [whole(x, lead) for x in arrays]
    return values, scales, zeros[0] if zeros else scales, shared


def _product(
    rows, tables, read, *, top_k, dtype, format, block, parts, precision, transposed=False, row_weights=None,
    up=(None, None, None, None), activation=None,
):  # fmt: skip
    # `read` and `up` are (values, scales, zeros, layer) of a stack.
    arrays = [(x, rank) for where in (read, up) for x, rank in zip(where, (4, 4, 4, 0), strict=True)]
    lead = lead_axes((rows, 2), *arrays, *zip(tables, (1, 1, 0), strict=True), (row_weights, 1))
    slots, blocks, total = (whole(table, lead) for table in tables)
    rows, shared_rows = large(rows, lead)
    values, scales, zeros, shared = _stack(read, lead)
    pair = up[0] is not None
    up_values, up_scales, up_zeros, shared_up = _stack(up, lead) if pair else (values, scales, zeros, shared)
    layer = whole(read[3], lead)
    up_layer = whole(up[3], lead) if pair else layer
    bits = 8 if format in ("fp8", "int8") else 4
    layers, num_experts, stored, words = values.shape[-4:]
    entries, per_row = words * 8 // bits, scales.shape[-1]
    width, columns = (stored, entries) if transposed else (entries, stored // (2 if activation and not pair else 1))
    num_rows, num_pairs, size = rows.shape[-2], rows.shape[-2] * top_k, slots.shape[-1] // blocks.shape[-1]
    chosen = tiles.products(rows.dtype, precision, capability())
    tile = tiles.quantized(rows.dtype.itemsize, size)
    row_parts = triton.cdiv(size, tile.rows)
    row_tiles = blocks.shape[-1] * row_parts
    programs = row_tiles * triton.cdiv(columns, tile.columns) + triton.cdiv(num_pairs, chosen.zero_rows)
    part = stored // parts
    return launch(
        quantized,
        *(rows, values, scales, zeros, up_values, up_scales, up_zeros, layer, up_layer, slots, blocks, total),
        named_by(slots, blocks, total, lead, num_experts, num_pairs, chosen),
        rows if row_weights is None else whole(row_weights, lead),
        out=[((*lead, num_pairs, columns), dtype)],
        grid=math.prod(lead) * programs,
        num_warps=tile.warps,
        num_stages=tile.stages,
        M=num_rows,
        H=width,
        N=columns,
        STORED=stored,
        W=words,
        B=scales.shape[-2],
        C=per_row,
        PART=part,
        ROWS=min(block[0] or part, part) or 1,
        PER_PART=scales.shape[-2] // parts,
        COLUMNS=_columns(block[1], entries),
        FORM=format,
        BITS=bits,
        ZEROS=read[2] is not None,
        FP8=format == "fp8" and capability() >= 89 and not INTERPRETED.value,
        E=num_experts,
        S=slots.shape[-1],
        P=num_pairs,
        TOP_K=top_k,
        BLOCK=size,
        SHARED_LHS=shared_rows,
        SHARED_RHS=shared,
        SHARED_UP=shared_up,
        LAYERS=layers,
        UP_LAYERS=up_values.shape[-4],
        PAIR=pair,
        ACTIVATION=activation or "",
        WEIGHTED=row_weights is not None,
        TRANSPOSED=transposed,
        PRECISION="ieee",
        PARTS=row_parts,
        TILES=row_tiles,
        PROGRAMS=programs,
        GROUP=chosen.group,
        TM=tile.rows,
        TN=tile.columns,
        TK=tile.step,
        ZERO_ROWS=chosen.zero_rows,
        ZERO_COLUMNS=chosen.zero_columns,
    )


def _columns(block, entries):
    """The entries of a block along H; of one that holds all of them, a power of two, so that tiles divide it."""
    return triton.next_power_of_2(max(entries, 1024)) if block is None or block >= entries else block


def refuse(call):
    if call.params["activations"]:
        return "its kernel does not round rows to fp8"
    return None


def quantized_matmul(rows, slots, blocks, total, *read, packed_rows, activations, **settings):
    return _product(rows, (slots, blocks, total), read, **settings)


def quantized_matmul_transposed(rows, slots, blocks, total, *read, packed_rows, activations, **settings):
    return _product(rows, (slots, blocks, total), read, transposed=True, **settings)


def quantized_matmul_activated(rows, slots, blocks, total, *others, packed_rows, activations, **settings):
    *read, row_weights, up_values, up_scales, up_zeros, up_layer = others
    up = up_values, up_scales, up_zeros, up_layer
    return _product(rows, (slots, blocks, total), read, row_weights=row_weights, up=up, **settings)
