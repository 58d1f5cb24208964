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


# ---- by pairs


@triton.constexpr_function
def fp8_pair(kind):
    # The GPU converts two to float16, which holds them all. From there to bfloat16 they go by float32.
    if kind == "f16":
        return "cvt.rn.f16x2.e4m3x2 $0, $1;"
    return """{ .reg .b32 x; .reg .b16 a, b; .reg .f32 c, d;
        cvt.rn.f16x2.e4m3x2 x, $1; mov.b32 {a, b}, x; cvt.f32.f16 c, a; cvt.f32.f16 d, b; cvt.rn.bf16x2.f32 $0, d, c; }"""


@triton.constexpr_function
def int8_pair(kind):
    # A byte n becomes the lowest bits of a power of two, which is then a float that counts n more.
    return f"""{{ .reg .b32 x, y; .reg .f32 a, b; cvt.u32.u16 x, $1;
        prmt.b32 y, x, 0x4B000000, 0x7540; mov.b32 a, y; sub.f32 a, a, 0f4B000000;
        prmt.b32 y, x, 0x4B000000, 0x7541; mov.b32 b, y; sub.f32 b, b, 0f4B000000; cvt.rn.{kind}x2.f32 $0, b, a; }}"""


@triton.constexpr_function
def integer_pair(kind, zeros):
    # The number becomes the lowest bits of a power of two, which is then a float that counts so much more. The power
    # is subtracted, and with it the number that stands for 0.
    power, one = (0x4300, 0x3F80) if kind == "bf16" else (0x6400, 0x3C00)
    less = 0x8000 + power + (0 if zeros else 8)
    return f"""{{ .reg .b32 x, p, one, less; mov.b32 p, 0x{power:04X}{power:04X}; mov.b32 one, 0x{one:04X}{one:04X};
        mov.b32 less, 0x{less:04X}{less:04X}; mul.lo.u32 x, $1, 0x1001; lop3.b32 x, x, 0xF000F, p, 0xEA;
        fma.rn.{kind}x2 $0, x, one, less; }}"""


@triton.constexpr_function
def float_pair(kind):
    # Exponent and mantissa go to where the float has them, and so does the sign. The factor makes up for the float's
    # larger bias.
    place, mask, factor = ("0x40040", "0x1C001C0", "0x7E80") if kind == "bf16" else ("0x200200", "0xE000E00", "0x7400")
    return f"""{{ .reg .b32 x, y, f, zero; mov.b32 f, {factor}{factor[2:]}; mov.b32 zero, 0x80008000;
        mul.lo.u32 x, $1, {place}; and.b32 x, x, {mask}; mul.lo.u32 y, $1, 0x1001000;
        lop3.b32 x, y, zero, x, 0xEA; fma.rn.{kind}x2 $0, x, f, zero; }}"""


@triton.constexpr_function
def times_pair(kind):
    return f"{{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.{kind}x2 $0, $1, $2, zero; }}"


@triton.constexpr_function
def minus_pair(kind):
    one = "0xBF80BF80" if kind == "bf16" else "0xBC00BC00"
    return f"{{ .reg .b32 one; mov.b32 one, {one}; fma.rn.{kind}x2 $0, $2, one, $1; }}"


@triton.jit
def packed(values, FORM: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, DTYPE: tl.constexpr):
    # The same as `one_by_one`, as 16-bit floats, which hold all these numbers.
    kind: tl.constexpr = "bf16" if DTYPE == tl.bfloat16 else "f16"
    if BITS == 4:
        # Two numbers of a byte become a word of two floats, the first in the lower half.
        asm: tl.constexpr = float_pair(kind) if FORM == "mxfp4" else integer_pair(kind, ZEROS)
        words = tl.inline_asm_elementwise(asm, "=r,r", [values.to(tl.int32)], tl.int32, is_pure=True, pack=1)
        floats = tl.interleave(words.to(tl.int16), (words >> 16).to(tl.int16)).to(DTYPE, bitcast=True)
    else:
        asm: tl.constexpr = fp8_pair(kind) if FORM == "fp8" else int8_pair(kind)
        halves = tl.inline_asm_elementwise(asm, "=r,h", [values], tl.int16, is_pure=True, pack=2)
        floats = halves.to(DTYPE, bitcast=True)
        if FORM == "int8" and not ZEROS:
            floats = minus(floats, tl.full([1, 1], 128.0, DTYPE), True)
    return floats


@triton.jit
def times(x, y):
    asm: tl.constexpr = times_pair("bf16" if x.dtype == tl.bfloat16 else "f16")
    return tl.inline_asm_elementwise(asm, "=r,r,r", [x, tl.broadcast_to(y, x.shape)], x.dtype, is_pure=True, pack=2)


@triton.jit
def minus(x, y, PACKED: tl.constexpr):
    if PACKED:
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
