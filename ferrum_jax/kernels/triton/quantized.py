"""Grouped products with quantised matrices: numbers become floats in registers, on their way to the tensor cores.

Matrices are stored [N, H]. With few rows the product is computed transposed: a tile of a matrix is the left operand,
which tensor cores take from registers, where its numbers become floats. fp8 rows are multiplied by fp8 numbers as they
are.
"""

import dataclasses
import math

import jax.numpy as jnp
import triton
import triton.language as tl

from ..shapes import ACTIVATION_BLOCK, large, lead_axes, whole
from . import tiles
from .launch import capability, launch
from .numbers import bfloat16_scale, by_words, minus, one_by_one, packed, scale_of, times
from .operands import rounded, shuffled
from .walk import INTERPRETED, activated, dot, matrix_number, tile_at, walk, zero_unnamed


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
def loaded_at(values, row, first, rows_inside, W: tl.constexpr, COUNT: tl.constexpr):
    # COUNT elements from `first` on of rows of W elements.
    column = first + tl.arange(0, COUNT)
    inside = rows_inside[:, None] & (column < W)[None, :]
    return tl.load(values + row[:, None].to(tl.int64) * W + column[None, :], mask=inside, other=0.0)


@triton.jit
def numbers_at(
    values, row, first, rows_inside,
    W: tl.constexpr, COLUMNS: tl.constexpr, FORM: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr,
    PACKED: tl.constexpr, SHUFFLED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # The numbers of rows `row` of a stored matrix and COLUMNS columns from `first` on.
    if SHUFFLED:
        loaded = loaded_at(words_of(values), row, first * BITS // 32, rows_inside, W // 4, COLUMNS * BITS // 32)
        numbers = by_words(loaded, loaded, FORM, BITS, ZEROS, DTYPE, False)
    else:
        loaded = loaded_at(values, row, first * BITS // 8, rows_inside, W, COLUMNS * BITS // 8)
        numbers = packed(loaded, FORM, BITS, ZEROS, DTYPE) if PACKED else one_by_one(loaded, FORM, BITS, ZEROS)
    return numbers


@triton.jit
def words_of(place):
    return place.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def entries_at(
    values, scales, zeros, row, first, rows_inside,
    W: tl.constexpr, H: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, PER_PART: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr,
    PACKED: tl.constexpr, SHUFFLED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # What the numbers of `numbers_at` stand for, rounded once to DTYPE; 0 outside.
    at_row = (row // PART * PER_PART + row % PART // ROWS) * C
    column = first + tl.arange(0, COLUMNS)
    scale_type: tl.constexpr = scales.dtype.element_ty
    by_pairs: tl.constexpr = PACKED and tl.bfloat16 == DTYPE and (scale_type == tl.uint8 or scale_type == tl.bfloat16)
    if SHUFFLED and by_pairs and not ZEROS:
        each: tl.constexpr = 32 // BITS
        word = first // each
        words = word + tl.arange(0, COLUMNS // each)
        loaded = loaded_at(words_of(values), row, word, rows_inside, W // 4, COLUMNS // each)
        scale = by_entry(scales, at_row, words, word, rows_inside, COLUMNS // each, BLOCK // each, C)
        entries = by_words(loaded, bfloat16_scale(scale), FORM, BITS, ZEROS, DTYPE, True)
    else:
        numbers = numbers_at(values, row, first, rows_inside, W, COLUMNS, FORM, BITS, ZEROS, PACKED, SHUFFLED, DTYPE)
        scale = by_entry(scales, at_row, column, first, rows_inside, COLUMNS, BLOCK, C)
        if ZEROS:
            zero = by_entry(zeros, at_row, column, first, rows_inside, COLUMNS, BLOCK, C)
            numbers = minus(numbers, zero.to(numbers.dtype), PACKED)
        if by_pairs:
            entries = times(numbers, bfloat16_scale(scale))
        else:
            entries = (numbers.to(tl.float32) * scale_of(scale)).to(DTYPE)
    if H % COLUMNS != 0 and H % BLOCK != 0:
        # The last block is short, and its scale may be anything.
        entries = tl.where(rows_inside[:, None] & (column < H)[None, :], entries, 0.0)
    return entries


@triton.jit
def scales_at(
    grid, first, inside, start,
    H: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, PER_PART: tl.constexpr,
    COLUMNS: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    # The grid's entry, of scales or zero points, of each of TN stored rows from `first` on, in columns of one block.
    column = 0 if COLUMNS >= H else start // COLUMNS
    if ROWS % TN == 0 and PART % TN == 0:
        at_row = first // PART * PER_PART + first % PART // ROWS
        loaded = tl.broadcast_to(tl.load(grid + at_row * C + column), [TN])
    else:
        row = first + tl.arange(0, TN)
        at_row = row // PART * PER_PART + row % PART // ROWS
        loaded = tl.load(grid + at_row * C + column, mask=inside, other=0)
    return loaded


@triton.jit
def itself(x):
    # Hides from the compiler that a product starts at 0. It would add to `sums` in the tensor cores, and then it waits
    # for each of their instructions, because one operand is in registers.
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def add_product(
    sums, a, a_scale, values, scales, zeros, first, start, inside,
    W: tl.constexpr, H: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, PER_PART: tl.constexpr,
    COLUMNS: tl.constexpr, FORM: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, PACKED: tl.constexpr,
    SHUFFLED: tl.constexpr, BY_SUMS: tl.constexpr, ROUNDED: tl.constexpr, SWAPPED: tl.constexpr,
    PRECISION: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    # Adds to sums the product of TN rows of a stored matrix from `first` on, from column `start` on, and the rows `a`.
    row = first + tl.arange(0, TN)
    if BY_SUMS:
        # The entries of a stored row that are added up here share a scale, so their sum is scaled.
        scale = scale_of(scales_at(scales, first, inside, start, H, C, PART, ROWS, PER_PART, COLUMNS, TN))
        if ROUNDED:
            numbers = loaded_at(fp8_at(values), row, start, inside, W, TK)
        else:
            numbers = numbers_at(values, row, start, inside, W, TK, FORM, BITS, ZEROS, PACKED, SHUFFLED, a.dtype)
            if ZEROS:
                zero = scales_at(zeros, first, inside, start, H, C, PART, ROWS, PER_PART, COLUMNS, TN)
                numbers = minus(numbers, zero.to(numbers.dtype)[:, None], PACKED)
            numbers = numbers.to(a.dtype)
        none = tl.zeros_like(sums)
        if SWAPPED:
            product, scale = dot(numbers, a.T, none, PRECISION), scale[:, None]
            scale = scale * a_scale[None, :] if ROUNDED else scale
        else:
            product, scale = dot(a, numbers.T, none, PRECISION), scale[None, :]
            scale = scale * a_scale[:, None] if ROUNDED else scale
        sums += product * scale
    else:
        entries = entries_at(values, scales, zeros, row, start, inside, W, H, C, PART, ROWS, PER_PART, TK, COLUMNS,
                             FORM, BITS, ZEROS, PACKED, SHUFFLED, a.dtype)  # fmt: skip
        if SWAPPED:
            if SHUFFLED and a.shape[0] <= 64:
                sums = sums + itself(dot(entries, a.T, tl.zeros_like(sums), PRECISION))
            else:
                sums = dot(entries, a.T, sums, PRECISION)
        else:
            sums = dot(a, entries.T, sums, PRECISION)
    return sums


@triton.jit
def fp8_at(place):
    return place.to(tl.pointer_type(tl.float8e4nv), bitcast=True)


@triton.jit
def quantized(
    lhs, lhs_scales, values, scales, zeros, up_values, up_scales, up_zeros, layer, up_layer, slots, blocks, total,
    owner, row_weights, out,
    M: tl.constexpr, H: tl.constexpr, N: tl.constexpr, STORED: tl.constexpr, W: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, PER_PART: tl.constexpr, COLUMNS: tl.constexpr,
    FORM: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, PACKED: tl.constexpr, SHUFFLED: tl.constexpr,
    BY_SUMS: tl.constexpr, ROUNDED: tl.constexpr, LHS_BLOCK: tl.constexpr, E: tl.constexpr, S: tl.constexpr,
    P: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, SHARED_LHS: tl.constexpr, SHARED_RHS: tl.constexpr,
    SHARED_UP: tl.constexpr, LAYERS: tl.constexpr, UP_LAYERS: tl.constexpr, PAIR: tl.constexpr,
    ACTIVATION: tl.constexpr, WEIGHTED: tl.constexpr, TRANSPOSED: tl.constexpr, SWAPPED: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, ZERO_ROWS: tl.constexpr, ZERO_COLUMNS: tl.constexpr,
):  # fmt: skip
    # The walk is that of `grouped`. H is what is added up, and N are the columns of the result. A tile of the matrix
    # is [TN, TK], its rows the result's columns; TRANSPOSED, it is [TK, TN]. Of a stored matrix there are STORED rows
    # of W bytes and B rows of C scales. A PART of the stored rows has PER_PART rows of scales, each for ROWS stored
    # rows, and a scale serves COLUMNS entries. ROUNDED: lhs is fp8, and has a scale for each LHS_BLOCK entries.
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
    expert, slot, named, column_tile = tile_at(
        program, slots, blocks, live_slots, BLOCK, E, P, columns, PARTS, TILES, GROUP, TM
    )
    if expert < 0:
        return
    row = tl.where(named, slot // TOP_K, 0).to(tl.int64) + (0 if SHARED_LHS else slice_id * M)
    col = column_tile * TN + tl.arange(0, TN)
    k = tl.arange(0, TK)
    rows = (fp8_at(lhs) if ROUNDED else lhs) + row[:, None] * H + k[None, :]
    row_scales = lhs_scales + row * ((H + LHS_BLOCK - 1) // LHS_BLOCK)
    number = matrix_number(expert, layer, slice_id, E, LAYERS, SHARED_RHS)
    values, scales, zeros = values + number * STORED * W, scales + number * B * C, zeros + number * B * C
    if PAIR:
        number = matrix_number(expert, up_layer, slice_id, E, UP_LAYERS, SHARED_UP)
        up_values, up_scales = up_values + number * STORED * W, up_scales + number * B * C
        up_zeros += number * B * C
    else:
        up_values, up_scales, up_zeros = values, scales, zeros
    first_column = column_tile * TN
    up_column = first_column if PAIR else first_column + N
    sums = tl.zeros([TN, TM], tl.float32) if SWAPPED else tl.zeros([TM, TN], tl.float32)
    up = sums
    for start in range(0, H, TK):
        a = tl.load(rows + start, mask=named[:, None] & (k < H - start)[None, :], other=0.0)
        a_scale = a
        if ROUNDED:
            a_scale = tl.load(row_scales + start // LHS_BLOCK, mask=named, other=0.0)
        if TRANSPOSED:
            b = entries_at(values, scales, zeros, start + k, first_column, k < H - start, W, N, C, PART, ROWS,
                           PER_PART, TN, COLUMNS, FORM, BITS, ZEROS, PACKED, SHUFFLED, a.dtype)  # fmt: skip
            sums = dot(b.T, a.T, sums, PRECISION) if SWAPPED else dot(a, b, sums, PRECISION)
        else:
            sums = add_product(
                sums, a, a_scale, values, scales, zeros, first_column, start, col < N, W, H, C, PART, ROWS, PER_PART,
                COLUMNS, FORM, BITS, ZEROS, PACKED, SHUFFLED, BY_SUMS, ROUNDED, SWAPPED, PRECISION, TN, TK,
            )  # fmt: skip
        if ACTIVATION != "":
            up = add_product(
                up, a, a_scale, up_values, up_scales, up_zeros, up_column, start, col < N, W, H, C, PART, ROWS,
                PER_PART, COLUMNS, FORM, BITS, ZEROS, PACKED, SHUFFLED, BY_SUMS, ROUNDED, SWAPPED, PRECISION, TN, TK,
            )  # fmt: skip
    if ACTIVATION != "":
        sums = activated(sums, up, ACTIVATION)
    if SWAPPED:
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
    rows, tables, read, *, top_k, dtype, format, block, parts, precision, activations=None, transposed=False,
    row_weights=None, up=(None, None, None, None), activation=None,
):  # fmt: skip
    # `read` and `up` are (values, scales, zeros, layer) of a stack.
    arrays = [(x, rank) for where in (read, up) for x, rank in zip(where, (4, 4, 4, 0), strict=True)]
    lead = lead_axes((rows, 2), *arrays, *zip(tables, (1, 1, 0), strict=True), (row_weights, 1))
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
    num_rows, part = rows.shape[-2], stored // parts
    of_scale = _columns(block[1], entries)
    chosen = tiles.products(rows.dtype, precision, capability())
    kind = "fp8" if activations else "32 bits" if rows.dtype.itemsize == 4 else "16 bits"
    tile = tiles.quantized(kind, format, tables[0].shape[-1] // tables[1].shape[-1], transposed)
    if activations:  # so that a step has one scale
        tile = dataclasses.replace(tile, step=min(tile.step, _step(block[1], entries)))
    if activation:
        tile = dataclasses.replace(tile, columns=min(tile.columns, tiles.ACTIVATED))
    by_sums = not transposed and of_scale % tile.step == 0 and tile.scaled_sums
    over = walk(tables, lead, chosen, tile, top_k=top_k, rows=num_rows, columns=columns, experts=num_experts)
    by_pairs = rows.dtype.itemsize == 2 and capability() >= (89 if format == "fp8" else 80) and not INTERPRETED.value
    # Numbers change places among those of one scale, or words of MXFP4 are scaled before.
    in_place = of_scale % tile.step == 0 or (format == "mxfp4" and rows.dtype == jnp.bfloat16)
    shuffles = by_pairs and not activations and tile.swapped and not transposed and width % 64 == 0 and in_place
    row_scales = rows
    if activations:
        rows, row_scales = rounded(rows)
    elif shuffles:
        rows = shuffled(rows, bits)
    return launch(
        quantized,
        *(rows, row_scales, values, scales, zeros, up_values, up_scales, up_zeros, layer, up_layer, *over.tables),
        over.owner,
        rows if row_weights is None else whole(row_weights, lead),
        out=[((*lead, num_rows * top_k, columns), dtype)],
        H=width,
        STORED=stored,
        W=words,
        B=scales.shape[-2],
        C=per_row,
        PART=part,
        ROWS=min(block[0] or part, part) or 1,
        PER_PART=scales.shape[-2] // parts,
        COLUMNS=of_scale,
        FORM=format,
        BITS=bits,
        ZEROS=read[2] is not None,
        PACKED=by_pairs and not activations,
        SHUFFLED=shuffles,
        BY_SUMS=by_sums,
        ROUNDED=bool(activations),
        LHS_BLOCK=ACTIVATION_BLOCK,
        SHARED_LHS=shared_rows,
        SHARED_RHS=shared,
        SHARED_UP=shared_up,
        LAYERS=layers,
        UP_LAYERS=up_values.shape[-4],
        PAIR=pair,
        ACTIVATION=activation or "",
        WEIGHTED=row_weights is not None,
        TRANSPOSED=transposed,
        SWAPPED=tile.swapped,
        PRECISION="ieee",
        **over.constants,
    )


def _columns(block, entries):
    """The entries of a block along H; of one that holds all of them, a power of two, so that tiles divide it."""
    return triton.next_power_of_2(max(entries, 1024)) if block is None or block >= entries else block


def refuse(call):
    if not call.params.get("activations"):
        return None
    if call.op == "quantized_matmul_transposed":
        return "its kernel of the transposed product does not round rows to fp8"
    if call.capability < 89 and not INTERPRETED.value:
        return f"products of fp8 rows need compute capability 8.9 or newer; the target's is {call.capability / 10}"
    _, columns = call.params["block"]
    if _step(columns, call.sizes["W"]) < 32:
        return f"products of fp8 rows need blocks of a multiple of 32 entries along H; they have {columns}"
    return None


def _step(columns, entries):
    """The largest step along H in which each row of a matrix has one scale, and so has each fp8 row."""
    return math.gcd(ACTIVATION_BLOCK, _columns(columns, entries))


def quantized_matmul(rows, slots, blocks, total, *read, packed_rows, **settings):
    return _product(rows, (slots, blocks, total), read, **settings)


def quantized_matmul_transposed(rows, slots, blocks, total, *read, packed_rows, **settings):
    return _product(rows, (slots, blocks, total), read, transposed=True, **settings)


def quantized_matmul_activated(rows, slots, blocks, total, *others, packed_rows, **settings):
    *read, row_weights, up_values, up_scales, up_zeros, up_layer = others
    up = up_values, up_scales, up_zeros, up_layer
    return _product(rows, (slots, blocks, total), read, row_weights=row_weights, up=up, **settings)
