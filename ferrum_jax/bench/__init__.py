"""`python -m ferrum_jax bench`: the main ops beside what one would write in JAX today, checked, then timed, in one run.

`cases` says which workloads there are, `today` what one would write for them, `timing` how they are checked and timed,
and `report` how the result is told.
"""

import argparse
import importlib.util
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import ferrum_jax

from . import cases, report, timing
from .cases import MODELS as MODELS

ON_GPU = {"shapes": "qwen3", "tokens": "16,128,1024,8192"}
ON_CPU = {"shapes": "qwen3", "tokens": "16,128"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a result was wrong."""
    args, todo = _parsed(argv)
    found = report.here() | {"rows": []}
    report.print_head(found)

    def save() -> None:
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + "\n")

    save()  # a file that cannot be written is an error now, before anything takes long
    for i, (name, model, tokens) in enumerate(todo):
        _progress(i, len(todo), f"{name} {model} T={tokens}")
        rows = list(timing.rows(name, cases.shape(model, tokens), found))
        _progress(i, len(todo), "")
        found["rows"] += rows
        report.settle(found)
        report.print_rows(rows)
        save()
    if args.plot and any(row["us"] for row in found["rows"]):
        figure: Any = ferrum_jax.viz.benchmark(found)[0].figure
        figure.savefig(args.plot, dpi=120)
    wrong = [row for row in found["rows"] if (row["error"] or "").startswith(ArithmeticError.__name__)]
    return 1 if wrong else 0


def _parsed(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[tuple[str, str, int]]]:
    """The options, and what is to run: a workload, a model and a number of tokens each."""
    usual = ON_GPU if jax.default_backend() == "gpu" else ON_CPU
    parser = argparse.ArgumentParser("python -m ferrum_jax bench", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--op", default="all", help=f"of {', '.join(cases.WORKLOADS)}; comma-separated; default: all")
    parser.add_argument(
        "--shapes", default=usual["shapes"], help=f"of {', '.join(MODELS)}, or all; default: %(default)s"
    )
    parser.add_argument("--tokens", default=usual["tokens"], help="T, comma-separated; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the report to a file")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it: time over T, with matplotlib")
    args = parser.parse_args(argv)
    names = _named(parser, "op", args.op, cases.WORKLOADS)
    models = _named(parser, "shapes", args.shapes, MODELS)
    if not all(count.isdecimal() and int(count) for count in args.tokens.split(",")):
        parser.error(f"argument --tokens: {args.tokens!r} must be numbers >= 1, comma-separated")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("argument --plot: matplotlib is not installed: pip install '.[viz]' from a clone")
    return args, list(itertools.product(names, models, map(int, args.tokens.split(","))))


def _named(parser: argparse.ArgumentParser, option: str, text: str, choices: Mapping[str, Any]) -> list[str]:
    names = list(choices) if text == "all" else text.split(",")
    for name in names:
        if name not in choices:
            parser.error(f"argument --{option}: {name!r} is none of {', '.join(choices)}, all")
    return names


def _progress(done: int, of: int, what: str) -> None:
    if sys.stderr.isatty():
        filled = 24 * done // of
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{of} {what}"
        print(f"\r{line:<79.79}", end="\r", file=sys.stderr, flush=True)
