"""A layer's results against the same layer in NumPy, dense and in float64."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax

from .report import print_table


class Ran(NamedTuple):
    """What a run of the layer gives."""

    logits: jax.Array
    routing: ferrum_jax.RouterOutput
    out: jax.Array


class Check(NamedTuple):
    """A compared result: the largest error of an element, and the largest ratio of an error to its bound."""

    name: str
    error: float
    ratio: float


def checks(name: str, inputs: tuple[jax.Array, ...], ran: Ran) -> list[Check]:
    """Compare the ids, the weights and the result of a run with x, router, gate_up and down = inputs.

    The choice is checked from the run's own logits: another program may round them otherwise and so choose otherwise.
    """
    logits, top_k = _f64(ran.logits), ran.routing.expert_ids.shape[-1]
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    weights = np.exp(np.take_along_axis(logits, ids, 1))
    weights /= weights.sum(1, keepdims=True)
    return [
        _compare(f"{name}: expert ids", ran.routing.expert_ids.astype(jnp.float32), ids, np.zeros(ids.shape)),
        _compare(f"{name}: expert weights", ran.routing.expert_weights, weights, weights),
        _compare(f"{name}: layer", ran.out, *_dense(inputs, ids, weights)),
    ]


def print_checks(found: Sequence[Check]) -> int:
    """Print the checks; the exit status. A NaN fails."""
    rows = [
        (name, "ok" if ratio <= 1 else "FAILED", f"largest error {error:.2g}", f"{ratio:.2g} of its bound")
        for name, error, ratio in found
    ]
    print_table("Checks, against NumPy in float64", rows)
    failed = [f"{name}, {error}, {ratio}" for name, result, error, ratio in rows if result == "FAILED"]
    print("FAILED: " + "; ".join(failed) if failed else "All checks passed.")
    return 1 if failed else 0


def _dense(inputs: tuple[jax.Array, ...], ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The layer expert by expert, and how large the terms of each element are.

    The F terms of a row round independently of each other, so their errors add up like the root of the sum of their
    squares. The sum of their magnitudes would be a far larger bound: in bfloat16 it would let any row pass.
    """
    x, (gate_up, down) = _f64(inputs[0]), inputs[2:]
    out, size = np.zeros(x.shape), np.zeros(x.shape)
    for expert in range(len(down)):
        token, choice = np.nonzero(ids == expert)
        gate, up = np.split(x[token] @ _f64(gate_up[expert]), 2, axis=1)
        hidden, matrix, weight = gate / (1 + np.exp(-gate)) * up, _f64(down[expert]), weights[token, choice, None]
        row = hidden @ matrix
        out[token] += weight * row
        size[token] += weight * (np.abs(row) + np.sqrt(hidden**2 @ matrix**2))
    return out, size


def _f64(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def _compare(name: str, got: jax.Array, want: np.ndarray, size: np.ndarray) -> Check:
    """The bound is eps^(2/3) * size + tiny. Results that must be exact have size 0."""
    kind, error = jnp.finfo(got.dtype), np.abs(_f64(got) - want)
    return Check(name, error.max(), (error / (float(kind.eps) ** (2 / 3) * size + float(kind.tiny))).max())
