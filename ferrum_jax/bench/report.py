"""How the result of a benchmark is told: the machine, the peaks, and a table of rows."""

import datetime
import importlib.metadata
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

import ferrum_jax

from . import cases, timing

# Only from this many bytes on is a rate that of the memory, and not of a cache.
LARGE = 2**27


def here() -> dict[str, Any]:
    """The head of a report: the device, the versions, and the peaks that floors are made of."""
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-triton", "triton", "tokamax")
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"ferrum_jax": ferrum_jax.__version__, **{name: version(name) for name in packages}},
        **timing.peaks(),
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def settle(report: dict[str, Any]) -> None:
    """Raise the peaks to what a large row reached, where that is more, and compute every row's floor from them."""
    for row in report["rows"]:
        if row["method"] == "CUPTI" and row["bytes"] >= LARGE:
            for amount, peak in (("bytes", "bytes_per_s"), ("flops", "flops_per_s")):
                report[peak] = max(report[peak], row[amount] / row["us"] * 1e6)
    for row in report["rows"]:
        row["floor_us"] = timing.floor_us(row, report)


# ---- printing


def print_table(title: str, rows: Iterable[Sequence[str]]) -> None:
    """A title, rows in columns as wide as their cells, and an empty line."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(title)
    for row in rows:
        print(("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip())
    print()


HEADER = ("op", "shape", "T", "by", "us", "rate", "floor us", "x floor", "launches", "x today")


def print_head(report: Mapping[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    print(textwrap.fill(f"{report['device']}, {report['date']}: {versions}", 116))
    copy, product = _rate(report["bytes_per_s"], 1e6, "B/s"), _rate(report["flops_per_s"], 1e6, "FLOP/s")
    print(f"Floors are made of {copy} of a copy and {product} of a matrix product.")
    if report["platform"] != "gpu":
        print(f"This is a CPU: no kernel runs here, widths are cut to {cases.CPU_WIDTHS}, and times are by the clock.")
    print(f"\n{_line(*HEADER)}")


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """One workload at one shape. "x today" is how many times as fast a row is as the first rival.

    The last line says in how many seconds JAX traced and lowered each row's program, before XLA compiled it.
    """
    today = next((row["us"] for row in rows if not row["ours"]), None)
    for row in rows:
        known = row["op"], row["model"], row["T"], row["way"]
        if row["us"] is None:
            print(_line(*known, "-"), "", row["error"][: 110 - 72])
            continue
        us, floor = row["us"], row["floor_us"]
        rate = _rate(row["flops"], us, "FLOP/s") if row["flops"] else _rate(row["bytes"], us, "B/s")
        times = f"{us / floor:.1f}", str(row["launches"] or ""), f"{today / us:.2f}" if today else ""
        print(_line(*known, f"{us:.1f}", rate, f"{floor:.1f}", *times))
    print("lowering_seconds:", ", ".join(f"{row['way']:.16} {row['lowering_seconds']:.2f}" for row in rows))
    print(flush=True)


def _line(op: str, shape: str, tokens: Any, by: str, us: str, *rest: str) -> str:
    numbers = "".join(f"{cell:>{width}}" for cell, width in zip(rest, (15, 9, 8, 9, 8), strict=False))
    return f"{op:<24} {shape:<11} {tokens:>6}  {by:<16.16} {us:>9}{numbers}".rstrip()


def _rate(amount: float, us: float, unit: str) -> str:
    amount, prefix = (amount / us / 1e6, "T") if amount / us >= 1e6 else (amount / us / 1e3, "G")
    return f"{amount:.2f} {prefix}{unit}"
