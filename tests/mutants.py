"""Do the tests see what they are there to see? Each mutant is one small fault, and a test that must fail on it.

`python -m tests.mutants` breaks copies of the package, runs each mutant's test there, and prints which test caught what.
Its exit status is 1 if a mutant survives, or if a test fails on the package as it is.
"""

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """A fault in words; the text in a file of the package that is replaced; the test, under tests/, that catches it."""

    fault: str
    file: str
    old: str
    new: str
    test: str


VALUES = "test_values.py::test_matches_oracle"
MUTANTS = (
    Mutant(
        "combine adds in 16 bits",
        "combine.py",
        "return jnp.sum(jnp.where(valid, weights[..., None] * taken, 0), axis=1).astype(rows.dtype)",
        "return sum(jnp.moveaxis(jnp.where(valid, weights[..., None] * taken, 0).astype(rows.dtype), 1, 0))",
        f"{VALUES}[xla-moe_combine-bfloat16-T7-E8-K2-H130-block16]",
    ),
    Mutant(
        "combine's rows in 16 bits, weighted in float32",
        "combine.py",
        "return jnp.sum(jnp.where(valid, weights[..., None] * taken, 0), axis=1).astype(rows.dtype)",
        "return jnp.sum(jnp.where(valid, weights[..., None] * taken, 0).astype(rows.dtype), axis=1)",
        f"{VALUES}[xla-moe_combine-float16-T7-E8-K2-H130-block16]",
    ),
    Mutant(
        "the weighted sum adds in 16 bits",
        "combine.py",
        "lambda slots, weights: jnp.sum(weights[..., None] * slots.astype(jnp.float32), axis=1).astype(slots.dtype)",
        "lambda slots, weights: sum(jnp.moveaxis((weights[..., None] * slots.astype('f4')).astype(slots.dtype), 1, 0))",
        f"{VALUES}[xla-weighted_sum_batched-bfloat16-T7-E8-K2-H130-block16]",
    ),
    Mutant(
        "the gradient of dispatch adds in 16 bits",
        "combine.py",
        "return _add_rows(rows.astype(jnp.float32), token, num_tokens).astype(rows.dtype)",
        "return _add_rows(rows, token, num_tokens)",
        "test_grad.py::test_dispatch_against_oracle[xla-False-bfloat16]",
    ),
    Mutant(
        "the matrices' gradient adds blocks in 16 bits",
        "grouped.py",
        "jnp.zeros((_size(lead), *shape), jnp.float32)",
        "jnp.zeros((_size(lead), *shape), lhs.dtype)",
        "test_grouped.py::test_values_and_gradients_with_garbage",
    ),
    Mutant(
        "Triton's product adds steps in 16 bits",
        "kernels/triton/grouped.py",
        "sums = dot(b.T, a.T, sums) if SWAPPED else dot(a, b, sums)\n        if ACTIVATION",
        "sums = (dot(b.T, a.T, sums) if SWAPPED else dot(a, b, sums)).to(lhs.dtype.element_ty).to(tl.float32)\n"
        "        if ACTIVATION",
        f"{VALUES}[triton-interpreted-grouped_matmul-bfloat16-T7-E8-K2-H130-block16]",
    ),
)


def run(mutant: Mutant | None, folder: str, test: str) -> tuple[int, str]:
    """pytest's exit status, and its output, on a copy of the package with this fault."""
    place = Path(folder, "as it is" if mutant is None else str(MUTANTS.index(mutant)))
    shutil.copytree(ROOT / "ferrum_jax", place / "ferrum_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "notebooks", "README.md", "pyproject.toml"):
        (place / name).symlink_to(ROOT / name)
    if mutant is not None:
        path = place / "ferrum_jax" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return -1, f"{mutant.file} holds the text {text.count(mutant.old)} times:\n{mutant.old}"
        path.write_text(text.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "", "-p", "no:cacheprovider"]
    env = os.environ | {"PYTHONPATH": str(place)}
    done = subprocess.run([*command, *test.split()], cwd=place, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr
