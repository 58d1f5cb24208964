"""Routing: one launch, one read of the logits."""

import math

import jax.numpy as jnp
import triton
import triton.language as tl

from . import launch

_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def route(
    logits, ids, weights,
    tokens: tl.constexpr, E: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    # A program routes ROWS tokens. Up to 1,024 experts it is one warp, which keeps its rows in registers and shares
    # nothing. It reads the logits once and K times takes each row's largest rank key, of equal ones the smallest id;
    # the key is the logit's bits, so the chosen logits come back from it, and K ids and weights are all it writes.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    live = (row < tokens) & (lane < E)
    x = tl.load(logits + row * E + lane, mask=live, other=float("-inf")).to(tl.float32)

    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == _LOWEST, 0, bits)
    key = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LOWEST + 1)
    key = tl.where(lane < E, key, _LOWEST)
    column = tl.arange(0, CHOICES)[None, :]
    chosen_id = tl.zeros([ROWS, CHOICES], tl.int32)
    chosen_key = tl.full([ROWS, CHOICES], _LOWEST, tl.int32)
    for k in range(K):
        best = tl.max(key, 1)[:, None]
        first = tl.min(tl.where(key == best, lane, LANES), 1)[:, None]
        chosen_id = tl.where(column == k, first, chosen_id)
        chosen_key = tl.where(column == k, best, chosen_key)
        key = tl.where(lane == first, _LOWEST, key)

    top = tl.max(tl.where(x == x, x, float("-inf")), 1)[:, None]
    broken = tl.max(tl.where((x == x) & (x < float("inf")), 0, 1), 1)[:, None] > 0
    base = tl.where(top == float("-inf"), 0.0, top)
    chosen = (chosen_key ^ ((chosen_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    term = tl.where(column < K, tl.exp(tl.where(column < K, chosen, 0.0) - base), 0.0)
    total = tl.sum(term, 1)[:, None] if NORM else tl.sum(tl.exp(x - base), 1)[:, None]
    weight = tl.where(total > 0, term / tl.where(total > 0, total, 1.0), (1.0 / K) if NORM else 0.0)
    weight = tl.where(broken, float("nan"), weight)
    kept = (row < tokens) & (column < K)
    tl.store(ids + row * K + column, chosen_id, mask=kept)
    tl.store(weights + row * K + column, weight, mask=kept)


def route_topk_softmax(logits, *, top_k, norm_topk_prob):
    *lead, experts = logits.shape
    tokens, lanes = math.prod(lead), triton.next_power_of_2(experts)
    # 16 logits a lane keep a warp busy, unless that leaves multiprocessors idle: 4 warps for each of about 128.
    rows = max(1, min(512 // lanes, triton.next_power_of_2(triton.cdiv(tokens, 512))))
    return launch(
        route,
        logits,
        out=[((*lead, top_k), jnp.int32), ((*lead, top_k), jnp.float32)],
        grid=triton.cdiv(tokens, rows),
        num_warps=min(32, max(1, lanes // 1024)),
        tokens=tokens,
        E=experts,
        K=top_k,
        NORM=norm_topk_prob,
        ROWS=rows,
        LANES=lanes,
        CHOICES=triton.next_power_of_2(top_k),
    )
