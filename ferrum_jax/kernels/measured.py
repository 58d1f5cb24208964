"""What was measured: which implementation to try first, and what was tried in the kernels.

All times are medians of `python -m ferrum_jax bench`, under CONDITIONS unless a row says otherwise. Where two sizes
were measured, the nearer one decides about a size between them. Where xla is as fast as a kernel it comes first,
because XLA can also fuse it with what stands around the op. On a GPU for which no row holds, the first kernel that can
run is taken.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from .call import Call
from .targets import HOPPER, Architectures

CONDITIONS = {
    "dtype": "bfloat16",
    "jax": "0.11.2",
    "triton": "3.6.0",
    "days": "2026-11-25 and 2026-11-26",
    "H100": "NVIDIA H100 80GB HBM3",
    "H200": "NVIDIA H200",
    "shapes": "those of Qwen3: E=128, K=8, H=2048, and N=1536 in grouped products",
}


_HOPPER = Architectures("a Hopper GPU", only=(HOPPER,))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of the kernels of one call by each implementation; None where it was not timed."""

    shape: str
    xla: float | None = None
    triton: float | None = None
    pallas: float | None = None
    gpu: str = "H100"


@dataclasses.dataclass(frozen=True)
class Measured:
    """A measured preference: the implementation to try first, and the calls for which it is.

    where: these calls in words. fits: the test for them, by axis letters, operands and parameters.
    dtypes: of the first operand; none listed: all. architectures: the GPUs that the times tell of.
    """

    op: str
    implementation: str
    where: str
    fits: Callable[[Call], bool]
    timings: tuple[Timing, ...] = ()
    dtypes: tuple[str, ...] = ()
    architectures: Architectures = _HOPPER

    def holds(self, call: Call, capability: int) -> bool:
        """Whether it tells of this call on a GPU of this compute capability."""
        dtype = call.given[0].dtype.name
        return capability in self.architectures and (not self.dtypes or dtype in self.dtypes) and self.fits(call)


def _always(call: Call) -> bool:
    return True


def _pairs(call: Call) -> int:
    return call.sizes["T"] * call.sizes["K"]


def _few_pairs(call: Call) -> bool:
    return _pairs(call) <= 4096


def _with_table(call: Call) -> bool:
    return call.operands["pairs_by_token"] is not None


def _many_rows(call: Call) -> bool:
    """96 rows an expert or more, on average."""
    return call.sizes["M"] * call.params.get("top_k", 1) >= 96 * call.sizes["E"]


def _many_packed_rows(call: Call) -> bool:
    return call.params["packed_rows"] and _many_rows(call)


_COMBINE_TIMES = (
    Timing("T=16", 2.3, 2.4, 2.2),
    Timing("T=128", 3.8, 3.8, 3.7),
    Timing("T=1024", 15.7, 14.6, 14.7),
    Timing("T=8192", 105, 103, 103),
    Timing("T=8192 H=7168", 352, 359, 350),
    Timing("T=8192 K=2 H=4096", 76, 68, 68),
)
_COLLECT_TIMES = (  # with pairs_by_token
    Timing("T=16", 2.1, 3.9, 2.2),
    Timing("T=128", 3.5, 5.2, 3.7),
    Timing("T=1024", 15.5, 15.8, 14.6),
    Timing("T=8192", 104, 104, 103),
)
_SPREAD_AND_DOT_TIMES = (  # moe_spread, then moe_row_dot: the two gradients of combine
    Timing("T=16", 4.7, 6.7, 7.2),
    Timing("T=128", 7.7, 9.2, 9.4),
    Timing("T=8192", 268, 278, 236),
    Timing("T=8192 H=7168", 965, 1004, 752),
    Timing("T=8192 K=2 H=4096", 156, 168, 150),
)
_COTANGENTS_TIMES = (
    Timing("T=16", 5.0, 3.9, 3.8, "H200"),
    Timing("T=128", 6.2, 6.0, 5.7, "H200"),
    Timing("T=512", 13.2, 13.1, 12.3, "H200"),
    Timing("T=1024", 26.6, 21.7, 22.6, "H200"),
    Timing("T=8192", 186, 148, 167, "H200"),
    Timing("T=8192 H=7168", 672, 502, 511, "H200"),
    Timing("T=8192 K=2 H=4096", 110, 84, 88, "H200"),
    Timing("T=16", 5.7, 4.6, 4.5),
    Timing("T=8192", 269, 204, 214),
    Timing("T=8192 H=7168", 966, 706, 704),
)
_WEIGHTED_SUM_TIMES = (
    Timing("T=16", 1.7, 2.5, 1.7),
    Timing("T=128", 4.3, 3.6, 3.2),
    Timing("T=8192", 99, 100, 99),
)
_SLOT_TIMES = (  # slot_scale and slot_dot together, which xla computes in one pass
    Timing("T=16", 2.0, 3.9, 5.1),
    Timing("T=128", 3.9, 6.2, 6.9),
    Timing("T=8192", 191, 212, 218),
)
# The transposed product was not timed. Pallas gathers rows that are not packed before it multiplies them.
_PRODUCT_TIMES = (
    Timing("T=1024, packed rows", None, 231, 236, "H200"),
    Timing("T=2048, packed rows", None, 272, 270, "H200"),
    Timing("T=4096, packed rows", None, 414, 383, "H200"),
    Timing("T=4096 E=64 H=7168 N=4096, packed rows", None, 2981, 2732, "H200"),
    Timing("T=8192, pair ids", None, 699, 1214, "H200"),
)
# With silu. "xla" is the product by a kernel, and then the activation.
_ACTIVATED_TIMES = (
    Timing("T=16, packed rows", 124, 123, 138),
    Timing("T=128, packed rows", 190, 190, 206),
    Timing("T=1024, packed rows", 244, 231, 247),
    Timing("T=8192, packed rows", 755, 782, 714),
    Timing("T=4096 E=64 H=7168 N=4096, packed rows", 2878, 3297, 2861),
    Timing("T=1024, pair ids", 241, 227),
    Timing("T=8192, pair ids", 783, 785),
)
_OUTER_TIMES = (
    Timing("T=16, packed rows", None, 403, 275),
    Timing("T=128, packed rows", None, 448, 298),
    Timing("T=1024, packed rows", None, 530, 354),
    Timing("T=8192, packed rows", None, 1340, 774),
    Timing("T=16, pair ids", None, 406, 319),
    Timing("T=128, pair ids", None, 451, 327),
    Timing("T=1024, pair ids", None, 530, 426),
    Timing("T=8192, pair ids", None, 1344, 1024),
)

# Of an op's rows the first that holds counts.
MEASURED: Sequence[Measured] = (
    Measured(
        "moe_combine",
        "xla",
        "K >= 8, but for 4096 <= T*K <= 16384",
        lambda call: call.sizes["K"] >= 8 and not 4096 <= _pairs(call) <= 16384,
        _COMBINE_TIMES,
    ),
    Measured(
        "moe_collect",
        "pallas",
        "K >= 8, 4096 <= T*K <= 16384",
        lambda call: _with_table(call) and call.sizes["K"] >= 8 and 4096 <= _pairs(call) <= 16384,
        _COLLECT_TIMES,
    ),
    Measured(
        "moe_collect",
        "xla",
        "K >= 8",
        lambda call: _with_table(call) and call.sizes["K"] >= 8,
        _COLLECT_TIMES,
    ),
    Measured(
        "moe_spread",
        "xla",
        "T*K <= 4096",
        lambda call: call.params["unique_rows"] and _few_pairs(call),
        _SPREAD_AND_DOT_TIMES,
    ),
    Measured("moe_spread", "pallas", "T*K > 4096", lambda call: call.params["unique_rows"], _SPREAD_AND_DOT_TIMES),
    Measured("moe_row_dot", "xla", "T*K <= 4096", _few_pairs, _SPREAD_AND_DOT_TIMES),
    Measured("moe_row_dot", "pallas", "T*K > 4096", _always, _SPREAD_AND_DOT_TIMES),
    Measured("moe_combine_cotangents", "pallas", "T*K <= 4096", _few_pairs, _COTANGENTS_TIMES),
    Measured(
        "weighted_sum_batched",
        "pallas",
        "512 <= T*K <= 8192",
        lambda call: 512 <= _pairs(call) <= 8192,
        _WEIGHTED_SUM_TIMES,
    ),
    Measured("weighted_sum_batched", "xla", "T*K < 512 or T*K > 8192", _always, _WEIGHTED_SUM_TIMES),
    Measured("slot_scale", "xla", "every size tried", _always, _SLOT_TIMES),
    Measured("slot_dot", "xla", "every size tried", _always, _SLOT_TIMES),
    Measured("grouped_matmul", "pallas", "packed rows, 96 an expert and more", _many_packed_rows, _PRODUCT_TIMES),
    Measured(
        "grouped_matmul_activated",
        "pallas",
        "packed rows, 96 an expert and more",
        _many_packed_rows,
        _ACTIVATED_TIMES,
    ),
    Measured("grouped_matmul_activated", "xla", "96 rows an expert and more", _many_rows, _ACTIVATED_TIMES),
    Measured("grouped_outer", "pallas", "every size tried", _always, _OUTER_TIMES),
)


@dataclasses.dataclass(frozen=True)
class Tried:
    """A change that was tried in a Triton kernel: shape -> (before, after), and whether it stayed."""

    kernel: str
    change: str
    figures: Mapping[str, tuple[float | None, float]]
    kept: bool = True
    unit: str = "microseconds"
    gpu: str = "H100"


_A_TOKEN = "a warp's instructions a token, in machine code for an H200"

TRIED: Sequence[Tried] = (
    # Routing: each change stands on those before it.
    Tried("route", "best rank, then the first lane that has it", {"E=128": (None, 341), "E=256": (None, 570)},
          unit=_A_TOKEN),
    Tried("route", "one maximum over a word of rank and lane", {"E=128": (341, 185), "E=256": (570, 480)},
          unit=_A_TOKEN),
    Tried("route", "four rows a warp also at E=256, so that lanes share the weights", {"E=256": (480, 315)},
          unit=_A_TOKEN),
    Tried("route", "rank and word in one; offsets of 32 bits in the tile", {"E=128": (185, 174), "E=256": (315, 293)},
          unit=_A_TOKEN),
    Tried("route", "ids stored and read back, so that each weight is computed once",
          {"E=128": (174, 155), "E=256": (293, 244)}, unit=_A_TOKEN),
    Tried("route", "+inf looked for beside NaN", {"E=128": (155, 162), "E=256": (244, 252), "E=512 K=10": (None, 560)},
          unit=_A_TOKEN),
    Tried("route", "each thread sorts its words",
          {"E=128": (162, 164), "E=256": (252, 208), "E=512 K=10": (560, 420)}, unit=_A_TOKEN),
    Tried("route", "words of 32 bits by one addition; rows with NaN apart",
          {"E=128": (164, 137), "E=256": (208, 182), "E=512 K=10": (420, 368)}, unit=_A_TOKEN),
    Tried("route", "loads without masks where all tokens are there",
          {"E=128": (137, 133), "E=256": (182, 177), "E=512 K=10": (368, 361)}, unit=_A_TOKEN),
    Tried("route", "words move up by a conditional multiplication, not by a selection",
          {"E=128": (133, 136), "E=256": (177, 182), "E=512 K=10": (361, 368)}, unit=_A_TOKEN),
    Tried("route", "the same: instructions of comparison, selection and bits",
          {"E=128": (88, 76), "E=256": (114, 90), "E=512 K=10": (256, 216)}, unit=_A_TOKEN),
    Tried("route", "the same", {"E=128": (3.8, 3.8), "E=256": (19.3, 17.1), "E=512 K=10": (37.8, 34.0)}),
    Tried("route", "from +inf beside NaN to loads without masks",
          {"E=128": (3.8, 3.6), "E=256": (22.5, 19.0), "E=512 K=10": (46.9, 37.7)}, gpu="H200"),
    Tried("route", "two neighbours of 16 bits loaded as one number",
          {"E=128": (3.8, 3.8), "E=256": (17.1, 17.1), "E=512 K=10": (34.0, 35.7)}, kept=False),
    Tried("route", "half as many rows a program",
          {"E=128": (3.8, 3.8), "E=256": (17.1, 24.5), "E=512 K=10": (34.0, 50.0)}, kept=False),
    Tried("route", "twice as many rows a program",
          {"E=128": (3.8, 3.8), "E=256": (17.1, 18.1), "E=512 K=10": (34.0, 33.5)}, kept=False),
    Tried("route", "two warps a program",
          {"E=128": (3.8, 4.5), "E=256": (17.1, 18.5), "E=512 K=10": (34.0, 41.4)}, kept=False),
    Tried("route", "two turns a program",
          {"E=128": (3.8, 4.7), "E=256": (17.1, 18.5), "E=512 K=10": (34.0, 37.7)}, kept=False),
    Tried("route", "logits prefetched for a later program",
          {"E=128": (3.8, 5.9), "E=256": (17.1, 18.7), "E=512 K=10": (34.0, 34.5)}, kept=False),
    # Tables: moe_plan, by the number of pairs.
    Tried("place", "ranks by comparing 64 pairs, not by a sort of 1024; few pairs: one program for 64",
          {"P=1024": (10.3, 3.2), "P=8192": (14.0, 7.5), "P=524288": (41.9, 34.4)}),
    Tried("place", "three launches: two warps a program, not four", {"P=524288": (34.4, 26.3)}),
    Tried("place", "two warps comparing 128 pairs, not 64", {"P=524288": (26.7, 33.0)}, kept=False),
    Tried("scan", "8 experts of 256 tiles at a time, not 32 of 64", {"P=524288": (38.7, 34.4)}),
    Tried("place", "three launches: 256 tiles of 256 pairs, not 64 of 1024", {"P=65536": (16.7, 9.0)}),
    Tried("place", "one launch: pairs counted by 512, not by 1024", {"P=8192": (7.5, 9.4)}, kept=False),
    Tried("place", "one launch: pairs counted by 2048, not by 1024", {"P=8192": (7.5, 8.8)}, kept=False),
    Tried("place", "three launches, not one", {"P=8000 E=512 K=10": (16.6, 6.7)}),
    Tried("place", "slots written in order with owners by bisection, not scattered from the pairs",
          {"P=524288": (26.1, 23.5), "P=65536": (9.0, 9.4), "P=1024": (3.2, 3.4)}),
    # Routing and tables in one launch, against two.
    Tried("route_and_place", "one launch, programs of 4 warps",
          {"T=16": (4.8, 4.3), "T=32": (4.7, 5.5), "T=64": (4.6, 9.6), "T=128": (5.0, 16.2), "T=256": (5.7, 25.0),
           "T=512": (7.2, 47.2)}),
    Tried("route_and_place", "one launch, programs of 8 warps",
          {"T=16": (4.8, 4.5), "T=32": (4.7, 5.0), "T=64": (4.6, 7.0)}),
    Tried("route_and_place", "one launch, programs of 16 warps",
          {"T=16": (4.8, 4.6), "T=32": (4.7, 5.2), "T=64": (4.6, 6.3)}, kept=False),
)  # fmt: skip
