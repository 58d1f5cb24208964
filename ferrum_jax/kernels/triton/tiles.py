"""Every choice of the Triton kernels about how work is divided, by GPU, dtype and shape.

A table lists its rows best first, and the first that holds for the GPU is taken. Its last row holds for every GPU, also
for one that nobody has tried. To tune the kernels for a GPU, add a row with its compute capability before the others.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..targets import Architectures

ANY = Architectures("any GPU")


# ---- grouped products


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program of a matrix product owns, `rows` by `columns`, and the `step` by which it walks along the sum."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Products:
    """Tiles of the grouped products, for one kind of operands.

    operands: "16 bits"; "float32", multiplied in full; or "tf32", which is float32 that may be rounded.
    multipliers: what multiplies. Tensor cores are fed by "warpgroups", by "warps", or with rounded "tf32". Without
        tensor cores "threads" multiply.
    by_block: tiles by ascending rows. The first one with as many rows as a block of the table is taken, else the last.
    outer: the tile of the gradient of the matrices.
    transposed_below: tiles with fewer rows are multiplied transposed, so that the matrix' columns lie along the tensor
        cores' long direction.
    group: row tiles that go side by side through the column tiles, so that they share experts and rows in the cache.
    named, zero_rows, zero_columns: slots, and rows and columns, of a program that notes or zeros rows.
    blocks_seen: blocks that the gradient of the matrices looks at together, at most, to find those of its expert.
    """

    operands: str
    multipliers: str
    by_block: tuple[Tile, ...]
    outer: Tile
    architectures: Architectures = ANY
    transposed_below: int = 64
    group: int = 8
    named: int = 1024
    zero_rows: int = 128
    zero_columns: int = 64
    blocks_seen: int = 4096

    def tile(self, block: int) -> Tile:
        return next((tile for tile in self.by_block if tile.rows >= block), self.by_block[-1])


# With few rows the time is that of reading the matrices, so many steps are loaded ahead. With many rows the tile is the
# largest that registers hold, so that each byte from the cache serves the most products. The tiles of warpgroups for 16
# bits were timed, the others were not.
PRODUCTS: Sequence[Products] = (
    Products(
        "16 bits",
        "warpgroups",
        by_block=(
            Tile(16, 128, 64, warps=4, stages=4),
            Tile(32, 128, 64, warps=4, stages=4),
            Tile(64, 128, 64, warps=4, stages=4),
            Tile(128, 256, 64, warps=8, stages=3),
        ),
        outer=Tile(128, 128, 64, warps=8, stages=3),
        architectures=Architectures("tensor cores that read both operands from shared memory", only=(90, 100, 103)),
    ),
    # A warp that multiplies by itself keeps its operands in registers, and there may be only 99 KiB of shared memory.
    Products(
        "16 bits",
        "warps",
        by_block=(
            Tile(16, 64, 64, warps=4, stages=4),
            Tile(32, 64, 64, warps=4, stages=4),
            Tile(64, 128, 64, warps=4, stages=4),
            Tile(128, 128, 64, warps=8, stages=3),
        ),
        outer=Tile(128, 128, 64, warps=8, stages=3),
        architectures=Architectures("tensor cores that Triton uses", least=80),
    ),
    # Without tensor cores registers are the limit. Here 16 bits are widened first.
    Products(
        "16 bits",
        "threads",
        by_block=(Tile(16, 64, 32, warps=4, stages=3), Tile(32, 64, 32, warps=4, stages=3)),
        outer=Tile(64, 64, 16, warps=4, stages=3),
        transposed_below=0,
    ),
    # As many bytes as the tiles of warpgroups have.
    Products(
        "tf32",
        "tf32",
        by_block=(
            Tile(16, 128, 32, warps=4, stages=4),
            Tile(32, 128, 32, warps=4, stages=4),
            Tile(64, 128, 32, warps=4, stages=4),
            Tile(128, 256, 32, warps=8, stages=3),
        ),
        outer=Tile(128, 128, 32, warps=8, stages=3),
        architectures=Architectures("TF32, and the shared memory for its tiles", only=(80, 90, 100, 103)),
    ),
    Products(
        "float32",
        "threads",
        by_block=(Tile(16, 64, 32, warps=4, stages=3), Tile(32, 64, 32, warps=4, stages=3)),
        outer=Tile(64, 64, 32, warps=4, stages=3),
        transposed_below=0,
    ),
)


def products(dtype: Any, precision: str, capability: int) -> Products:
    """The row for operands of this dtype. Only with `precision` "default" may float32 be rounded to TF32."""
    kinds = ["16 bits"] if dtype.itemsize == 2 else ["tf32", "float32"] if precision == "default" else ["float32"]
    rows = (row for kind in kinds for row in PRODUCTS if row.operands == kind)
    return next(row for row in rows if capability in row.architectures)


@dataclasses.dataclass(frozen=True)
class QuantizedTile(Tile):
    """A tile of a product with quantised matrices.

    swapped: the product is computed transposed, with the matrix as the operand that comes from registers.
    scaled_sums: where the entries of a step share a scale, their sum is scaled, not each of them.
    """

    swapped: bool = True
    scaled_sums: bool = True


# By the dtype of rows, and for some formats. Numbers that become floats cost registers, so that tiles have few columns
# then. The tiles of fp8 and of 16 bits were timed on a Hopper GPU, but not those of int8.
QUANTIZED: Mapping[str, tuple[QuantizedTile, ...]] = {
    "fp8": (
        QuantizedTile(16, 64, 128, warps=4, stages=4),
        QuantizedTile(32, 64, 128, warps=4, stages=4),
        QuantizedTile(64, 128, 128, warps=4, stages=4, swapped=False),
        QuantizedTile(128, 128, 128, warps=8, stages=4, swapped=False),
    ),
    "16 bits": (
        QuantizedTile(16, 64, 128, warps=4, stages=3),
        QuantizedTile(32, 64, 128, warps=4, stages=3),
        QuantizedTile(64, 128, 128, warps=4, stages=3),
        QuantizedTile(128, 64, 64, warps=4, stages=3, scaled_sums=False),
    ),
    "16 bits, int8": (
        QuantizedTile(16, 64, 128, warps=4, stages=3),
        QuantizedTile(32, 64, 128, warps=4, stages=3),
        QuantizedTile(64, 64, 64, warps=4, stages=3),
        QuantizedTile(128, 64, 64, warps=4, stages=3, scaled_sums=False),
    ),
    "16 bits, mxfp4": (
        QuantizedTile(16, 64, 128, warps=4, stages=3),
        QuantizedTile(32, 64, 128, warps=4, stages=3),
        QuantizedTile(64, 128, 64, warps=4, stages=3, swapped=False),
        QuantizedTile(128, 64, 64, warps=4, stages=3),
    ),
    "32 bits": (QuantizedTile(16, 64, 32, warps=4, stages=2),),
}
ACTIVATED = 64  # columns of a program that computes gate and up, at most
SHUFFLED = 1024  # entries of rows in a program that shuffles them


def quantized(rows: str, form: str, block: int, transposed: bool) -> QuantizedTile:
    """The tile of a product of rows of this kind with matrices of this format, for blocks of so many slots."""
    by_block = QUANTIZED.get(f"{rows}, {form}", QUANTIZED[rows])
    tile = next((tile for tile in by_block if tile.rows >= block), by_block[-1])
    # The transposed product scales every entry, for which it needs registers.
    return dataclasses.replace(tile, columns=64, step=min(tile.step, 64)) if transposed else tile


def rounded(rows: int) -> int:
    """How many of so many rows a program rounds to fp8."""
    return 1 if rows < 1024 else 16


# ---- combine and its family


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the kernels of combine's family, which stream rows of memory, divide them.

    vector: bytes that a thread loads of a row.
    unrolled: up to so many choices a token, all rows are loaded before the first is used. Of more, `portion` are.
    dotted: choices of a token in a program of `row_dot`, at most.
    differentiated, cleared: the same of `cotangents`, and the rows that a program of it may have to zero. With few of
        each, registers allow many programs, and the programs of one token share its row of g in the cache.
    inverted: pairs of a program of `invert`.
    """

    warps: int = 4
    vector: int = 16
    unrolled: int = 16
    portion: int = 8
    dotted: int = 8
    differentiated: int = 4
    cleared: int = 4
    inverted: int = 1024
    architectures: Architectures = ANY

    def tile(self, width: int, itemsize: int, rows: int = 1) -> tuple[int, int]:
        """Rows and columns of a program: one vector a thread, with narrow rows side by side."""
        elements = 32 * self.warps * self.vector // itemsize
        columns = min(next_power_of_2(width), elements)
        return max(1, min(next_power_of_2(rows), elements // columns)), columns


ROWS: Sequence[Rows] = (Rows(),)


# ---- tables


@dataclasses.dataclass(frozen=True)
class Counting:
    """How the counting sort of the pairs by expert is divided.

    one_launch: pairs times experts, up to which one launch does everything: each program counts all the pairs.
    programs: the number of tiles to aim for. least_pairs, most_pairs: the pairs of a tile.
    ranked: pairs that are compared with each other at a time.
    counted: pairs that a program counts at a time. bins: experts that it counts at a time, at most.
    filled: slots, or entries behind the last, that a program writes at a time.
    filling: up to so many tiles are made, in one launch, only to write slots.
    wide: bins above which a program of the one launch has `wide_warps`, not `warps`.
    placing_wide: the same of the last of three launches: above it `placing_wide_warps`, not `placing_warps`.
    counting_warps: warps of the first of three launches.
    scanned_tiles, scanned_experts, scanning_warps: what a program of the second takes at a time, and its warps.
    """

    one_launch: int = 2**20
    programs: int = 512
    least_pairs: int = 64
    most_pairs: int = 1024
    ranked: int = 64
    counted: int = 1024
    bins: int = 1024
    filled: int = 1024
    filling: int = 16
    wide: int = 512
    warps: int = 4
    wide_warps: int = 8
    placing_wide: int = 256
    placing_warps: int = 2
    placing_wide_warps: int = 4
    counting_warps: int = 4
    scanned_tiles: int = 1024
    scanned_experts: int = 8
    scanning_warps: int = 8
    architectures: Architectures = ANY


COUNTING: Sequence[Counting] = (Counting(),)


# ---- routing

MOST_LANES = 16384  # of a token, whose logits a program holds in registers, on any GPU


@dataclasses.dataclass(frozen=True)
class Routing:
    """How the logits of a token are spread over the lanes of warps.

    lanes: lanes that one warp takes; with more, a program has more warps, `most_warps` at most.
    logits: logits that keep a thread busy. twice: the same where a bias or groups need each logit a second time.
    programs: with few tokens a program takes fewer rows, so that there are so many programs.
    vector: bytes of neighbouring logits that a thread holds.
    sorted_lanes, sorted_choices: up to these threads sort their lanes, so that each choice is one comparison.
    planned_logits: up to so many padded logits in a program that routes and places, it has the warps of `Counting`.
    planned_warps: the warps of such a program where there are more.
    """

    lanes: int = 1024
    most_warps: int = 32
    logits: int = 32
    twice: int = 16
    programs: int = 2048
    vector: int = 16
    sorted_lanes: int = 512
    sorted_choices: int = 16
    planned_logits: int = 2048
    planned_warps: int = 8
    architectures: Architectures = ANY


ROUTING: Sequence[Routing] = (Routing(),)


Row = TypeVar("Row", Rows, Counting, Routing)


def first(table: Sequence[Row], capability: int) -> Row:
    """The table's first row that holds for the GPU."""
    return next(row for row in table if capability in row.architectures)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()
