"""Stored numbers of few bits as floats, inside a Triton kernel.

Two ways lead to the same floats. Where rows have 16 bits and the GPU knows the instructions, four bytes are converted
at a time, by instructions that work on pairs of floats. Elsewhere each number is converted by itself, in float32.
"""

import triton
import triton.language as tl

from .walk import INTERPRETED

# ---- each by itself


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
def one_by_one(values, FORM: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr):
    # The numbers of these bytes as float32. Integers count from their middle, or with ZEROS from 0.
    code = tl.interleave(values & 15, values >> 4) if BITS == 4 else values
    if FORM == "fp8":
        code = code.to(tl.int32)
        return tl.where((code & 0x7F) == 0x7F, float("nan"), minifloat(code, FORM))
    elif FORM == "mxfp4":
        return minifloat(code.to(tl.int32), FORM)
    else:
        return code.to(tl.float32) - (0.0 if ZEROS else 8.0 if BITS == 4 else 128.0)


# ---- four bytes at a time: a word of int32


@triton.constexpr_function
def words_of_fp8(kind):
    # The GPU converts two to float16, which holds them all. From there to bfloat16 they go by float32.
    if kind == "f16":
        return "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
    code = "{ .reg .b16 a<2>, h<2>; .reg .b32 x; .reg .f32 f<2>; mov.b32 {a0, a1}, $2;"
    for i in range(2):
        code += f"cvt.rn.f16x2.e4m3x2 x, a{i}; mov.b32 {{h0, h1}}, x; cvt.f32.f16 f0, h0; cvt.f32.f16 f1, h1;"
        code += f"cvt.rn.bf16x2.f32 ${i}, f1, f0;"
    return code + "}"


@triton.constexpr_function
def words_of_int8(kind, middle):
    # A byte n becomes the lowest bits of a power of two, which is then a float that counts n more. The power is
    # subtracted, and with it the number that stands for 0.
    code = "{ .reg .b32 x; .reg .f32 f<2>;"
    for i in range(4):
        code += f"prmt.b32 x, $2, 0x4B000000, 0x754{i}; mov.b32 f{i % 2}, x;"
        code += f"sub.f32 f{i % 2}, f{i % 2}, 0f{0x4B000000 + middle:08X};"
        code += f"cvt.rn.{kind}x2.f32 ${i // 2}, f1, f0;" if i % 2 else ""
    return code + "}"


@triton.constexpr_function
def twice(half):
    return f"0x{half:04X}{half:04X}"


@triton.constexpr_function
def words_of_int4(kind, middle):
    # As a byte of int8: of each half of the word four numbers are cut.
    power, one = (0x4300, 0x3F80) if kind == "bf16" else (0x6400, 0x3C00)
    code = f"{{ .reg .b32 x, p, one, less; mov.b32 p, {twice(power)}; mov.b32 one, {twice(one)};"
    code += f"mov.b32 less, {twice(0x8000 + power + middle)};"
    for i in range(4):
        code += f"shr.u32 x, $4, {4 * i}; lop3.b32 x, x, 0xF000F, p, 0xEA; fma.rn.{kind}x2 ${i}, x, one, less;"
    return code + "}"


@triton.constexpr_function
def words_of_mxfp4(kind):
    # Exponent and mantissa go to where the float has them, and so does the sign. The factor makes up for the float's
    # larger bias.
    last, mask, factor = (6, "0x1C001C0", 0x7E80) if kind == "bf16" else (3, "0xE000E00", 0x7400)
    code = f"{{ .reg .b32 x, y, f, zero; mov.b32 f, {twice(factor)}; mov.b32 zero, {twice(0x8000)};"
    for i in range(4):
        right = last - 4 * (3 - i)
        code += f"shr.u32 x, $4, {right};" if right > 0 else f"shl.b32 x, $4, {-right};"
        code += f"and.b32 x, x, {mask}; shl.b32 y, $4, {12 - 4 * i}; lop3.b32 x, y, zero, x, 0xEA;"
        code += f"fma.rn.{kind}x2 ${i}, x, f, zero;"
    return code + "}"


@triton.jit
def converted(loaded, FORM: tl.constexpr, ZEROS: tl.constexpr, KIND: tl.constexpr):
    # Words of two 16-bit floats, which hold the numbers exactly, in a new last axis. Of 8 bits there are two words, of
    # neighbours. Of 4 bits there are four: the first has a word's first and fifth number, and so on.
    if FORM == "int4" or FORM == "mxfp4":
        asm: tl.constexpr = words_of_mxfp4(KIND) if FORM == "mxfp4" else words_of_int4(KIND, 0 if ZEROS else 8)
        a, b, c, d = tl.inline_asm_elementwise(
            asm, "=&r,=&r,=&r,=&r,r", [loaded], (tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
        pairs = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [loaded.shape[0], loaded.shape[1], 4])
    else:
        asm: tl.constexpr = words_of_fp8(KIND) if FORM == "fp8" else words_of_int8(KIND, 0 if ZEROS else 128)
        a, b = tl.inline_asm_elementwise(asm, "=&r,=&r,r", [loaded], (tl.int32, tl.int32), is_pure=True, pack=1)
        pairs = tl.join(a, b)
    return pairs


@triton.constexpr_function
def times_pair(kind):
    return f"{{ .reg .b32 zero; mov.b32 zero, {twice(0x8000)}; fma.rn.{kind}x2 $0, $1, $2, zero; }}"


@triton.jit
def by_words(
    loaded, scale, FORM: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    # The numbers of these words as 16-bit floats. Each 64 numbers of a row stand in the order in which tensor cores
    # take an operand from registers, two for each of four threads by turns. So all of a thread's numbers lie side by
    # side in memory, and it loads them together. `operands.shuffle` puts the other operand's entries in this order.
    # SCALED: each word's numbers are multiplied by its bfloat16 scale.
    kind: tl.constexpr = "bf16" if tl.bfloat16 == DTYPE else "f16"
    rows: tl.constexpr = loaded.shape[0]
    entries: tl.constexpr = loaded.shape[1] * 32 // BITS
    pairs = converted(loaded, FORM, ZEROS, kind)
    if SCALED:
        both = (scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
        both = tl.broadcast_to(tl.broadcast_to(both, loaded.shape)[:, :, None], pairs.shape)
        pairs = tl.inline_asm_elementwise(times_pair(kind), "=r,r,r", [pairs, both], tl.int32, is_pure=True, pack=1)
    pairs = tl.permute(tl.reshape(pairs, [rows, entries // 64, 4, 8]), (0, 1, 3, 2))
    pairs = tl.reshape(pairs, [rows, entries // 2])
    return tl.interleave(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(DTYPE, bitcast=True)


# ---- a byte or a pair of floats at a time


@triton.constexpr_function
def pair_of_int4(kind, middle):
    # As `words_of_int4`, of a byte.
    power, one = (0x4300, 0x3F80) if kind == "bf16" else (0x6400, 0x3C00)
    return f"""{{ .reg .b32 x, p, one, less; mov.b32 p, {twice(power)}; mov.b32 one, {twice(one)};
        mov.b32 less, {twice(0x8000 + power + middle)}; mul.lo.u32 x, $1, 0x1001; lop3.b32 x, x, 0xF000F, p, 0xEA;
        fma.rn.{kind}x2 $0, x, one, less; }}"""


@triton.constexpr_function
def pair_of_mxfp4(kind):
    # As `words_of_mxfp4`, of a byte.
    place, mask, factor = ("0x40040", "0x1C001C0", 0x7E80) if kind == "bf16" else ("0x200200", "0xE000E00", 0x7400)
    return f"""{{ .reg .b32 x, y, f, zero; mov.b32 f, {twice(factor)}; mov.b32 zero, {twice(0x8000)};
        mul.lo.u32 x, $1, {place}; and.b32 x, x, {mask}; mul.lo.u32 y, $1, 0x1001000;
        lop3.b32 x, y, zero, x, 0xEA; fma.rn.{kind}x2 $0, x, f, zero; }}"""


@triton.jit
def packed(values, FORM: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, DTYPE: tl.constexpr):
    # The numbers of these bytes as 16-bit floats, in their order.
    kind: tl.constexpr = "bf16" if tl.bfloat16 == DTYPE else "f16"
    if BITS == 4:
        asm: tl.constexpr = pair_of_mxfp4(kind) if FORM == "mxfp4" else pair_of_int4(kind, 0 if ZEROS else 8)
        pairs = tl.inline_asm_elementwise(asm, "=r,r", [values.to(tl.int32)], tl.int32, is_pure=True, pack=1)
        floats = tl.interleave(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    else:
        # Each byte becomes a float, whichever four of them go together.
        asm: tl.constexpr = words_of_fp8(kind) if FORM == "fp8" else words_of_int8(kind, 0 if ZEROS else 128)
        floats = tl.inline_asm_elementwise(asm, "=&r,=&r,r", [values], tl.int16, is_pure=True, pack=4)
    return floats.to(DTYPE, bitcast=True)


@triton.constexpr_function
def minus_pair(kind):
    one = 0xBF80 if kind == "bf16" else 0xBC00
    return f"{{ .reg .b32 one; mov.b32 one, {twice(one)}; fma.rn.{kind}x2 $0, $2, one, $1; }}"


@triton.jit
def times(x, y):
    # Products of 16-bit floats, two at a time.
    asm: tl.constexpr = times_pair("bf16" if x.dtype == tl.bfloat16 else "f16")
    return tl.inline_asm_elementwise(asm, "=r,r,r", [x, tl.broadcast_to(y, x.shape)], x.dtype, is_pure=True, pack=2)


@triton.jit
def minus(x, y, PAIRS: tl.constexpr):
    if PAIRS:
        asm: tl.constexpr = minus_pair("bf16" if x.dtype == tl.bfloat16 else "f16")
        operands = [x, tl.broadcast_to(y, x.shape)]
        difference = tl.inline_asm_elementwise(asm, "=r,r,r", operands, x.dtype, is_pure=True, pack=2)
    else:
        difference = x - y
    return difference


@triton.jit
def bfloat16_scale(s):
    # A scale of e8m0 or bfloat16 as bfloat16.
    if s.dtype == tl.uint8:
        bits = tl.where(s == 0, 0x40, tl.where(s == 255, 0x7FC0, s.to(tl.int32) << 7))
        scale = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        scale = s
    return scale
