"""`python -m ferrum_jax bench`: the main ops beside what one would write in JAX today, checked, then timed, in one run.

On a GPU a time is that of the kernels, by CUPTI: the median over calls that rotate through inputs, 256 MiB of them or
64 sets, so that all but small inputs come from memory, not from a cache. A chain of small kernels is timed by the clock
instead, as many steps inside one jit, so that launches count; XLA puts them into CUDA graphs. The floor of a time is
the larger of its bytes over the bandwidth of a large copy and its operations over the rate of a large matrix product,
both measured in the same run, or over those of its fastest row: XLA's copy does not use all of an H200's bandwidth.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import pathlib
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import ferrum_jax

from ..model.layer import usual_block_size


class Model(NamedTuple):
    """A model's MoE layer: experts, choices per token, hidden width, expert width."""

    experts: int
    top_k: int
    hidden: int
    expert_width: int


MODELS: Mapping[str, Model] = {
    "mixtral": Model(8, 2, 4096, 14336),  # Mixtral 8x7B
    "qwen3": Model(128, 8, 2048, 768),  # Qwen3-30B-A3B
    "deepseek_v3": Model(256, 8, 7168, 2048),
    "kimi_k2": Model(384, 8, 7168, 2048),
    "qwen3_next": Model(512, 10, 2048, 512),  # Qwen3-Next-80B-A3B
    "gpt_oss": Model(128, 4, 2880, 2880),  # gpt-oss-120b
}
ON_GPU = {"shapes": "qwen3", "tokens": "16,128,1024,8192"}
ON_CPU = {"shapes": "qwen3", "tokens": "16,128"}
CPU_WIDTHS = 64, 32  # the most of hidden and expert width on a CPU, so that a run takes seconds


class Size(NamedTuple):
    """The sizes that an op is timed at: those of a model at T tokens."""

    model: str
    T: int
    E: int
    K: int
    H: int
    F: int
    dtype: Any

    @property
    def P(self) -> int:
        return self.T * self.K

    @property
    def item(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def block(self) -> int:
        return usual_block_size(self.P, self.E)

    @property
    def S(self) -> int:
        return ferrum_jax.max_aligned_rows(self.P, self.E, self.block)

    @property
    def used(self) -> float:
        """Experts that some token chose, on average over random choices."""
        return self.E * (1 - (1 - self.K / self.E) ** self.T)


def size(model: str, tokens: int) -> Size:
    """A model's shape on this machine: in bfloat16 on a GPU; in float32 and with narrower rows on a CPU."""
    experts, top_k, hidden, expert_width = MODELS[model]
    if jax.default_backend() == "gpu":
        return Size(model, tokens, experts, top_k, hidden, expert_width, jnp.bfloat16)
    widths = min(hidden, CPU_WIDTHS[0]), min(expert_width, CPU_WIDTHS[1])
    return Size(model, tokens, experts, top_k, *widths, jnp.float32)


# ---- what one writes in JAX today


def softmax_top_k(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    weights, ids = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), top_k)
    return ids, weights / weights.sum(-1, keepdims=True)


def argsort_pairs(ids: jax.Array, num_experts: int) -> tuple[jax.Array, ...]:
    order = jnp.argsort(ids.reshape(-1))
    pairs = jnp.zeros_like(order).at[order].set(jnp.arange(ids.size, dtype=order.dtype)).reshape(ids.shape)
    ends = jnp.cumsum(jnp.bincount(ids.reshape(-1), length=num_experts))
    return pairs, order // ids.shape[-1], jnp.concatenate([jnp.zeros(1, ends.dtype), ends])


def argsort_blocks(ids: jax.Array, num_experts: int, block_size: int) -> tuple[jax.Array, ...]:
    size = ferrum_jax.max_aligned_rows(ids.size, num_experts, block_size)
    by_expert = jnp.sort(ids.reshape(-1))
    counts = jnp.bincount(by_expert, length=num_experts)
    padded = -(-counts // block_size) * block_size
    ends, row = jnp.cumsum(padded), jnp.arange(ids.size, dtype=jnp.int32)
    shift = ends - padded - (jnp.cumsum(counts) - counts)
    slots = jnp.full(size, ids.size, jnp.int32).at[row + shift[by_expert]].set(row)
    first = jnp.arange(0, size, block_size, dtype=jnp.int32)
    owner = jnp.searchsorted(ends, first, side="right").astype(jnp.int32)
    return slots, jnp.where(first < ends[-1], owner, -1), ends[-1]


def argsort_plan(ids: jax.Array, num_experts: int, block_size: int) -> tuple[jax.Array, ...]:
    return *argsort_pairs(ids, num_experts), *argsort_blocks(ids, num_experts, block_size)


def gather_einsum(rows: jax.Array, pairs: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("tkh,tk->th", rows[pairs], weights.astype(rows.dtype))


def einsum(slots: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("tkh,tk->th", slots, weights.astype(slots.dtype))


def ragged_layer(
    x: jax.Array, logits: jax.Array, gate_up: jax.Array, down: jax.Array, top_k: int, product: Any = lax.ragged_dot
) -> jax.Array:
    ids, weights = softmax_top_k(logits, top_k)
    order = jnp.argsort(ids.reshape(-1))
    counts = jnp.bincount(ids.reshape(-1), length=logits.shape[-1])
    gate, up = jnp.split(product(x[order // top_k], gate_up, counts).astype(jnp.float32), 2, axis=-1)
    rows = product((jax.nn.silu(gate) * up).astype(x.dtype), down, counts).astype(jnp.float32)
    out = jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(weights.reshape(-1)[order, None] * rows)
    return out.astype(x.dtype)


# ---- the ops: a row each


class Op(NamedTuple):
    """How to make an op's arguments, what to time, and the least that must be moved and computed."""

    inputs: Callable[[Any, Size], tuple[Any, ...]]
    ours: Callable[[Size, str | None], Callable[..., Any]]  # the function, by implementation
    today: Callable[[Size], dict[str, Callable[..., Any]]]  # the functions that it is compared with, the first by ratio
    bytes: Callable[[Size], float]
    flops: Callable[[Size], float] = lambda s: 0
    steps: int = 0  # of a chain, in one call


def _normal(key: Any, s: Size, *shape: int, scale: float = 1.0) -> jax.Array:
    return _drawn(key, shape, scale, jnp.dtype(s.dtype))


# One program: step by step, a large model's matrices would be kept in float32 too, several times.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(key: Any, shape: tuple[int, ...], scale: float, dtype: Any) -> jax.Array:
    return (scale * jax.random.normal(key, shape)).astype(dtype)


def _routing(key: Any, s: Size) -> tuple[jax.Array, ferrum_jax.RouterOutput, ferrum_jax.MoePlan]:
    logits = _normal(key, s, s.T, s.E)
    routed = ferrum_jax.route_topk_softmax(logits, s.K, implementation="xla")
    return logits, routed, ferrum_jax.moe_plan(routed.expert_ids, s.E, s.block, implementation="xla")


def _logits(key: Any, s: Size) -> tuple[Any, ...]:
    return (_normal(key, s, s.T, s.E),)


def _ids(key: Any, s: Size) -> tuple[Any, ...]:
    return (_routing(key, s)[1].expert_ids,)


def _dispatch_inputs(key: Any, s: Size) -> tuple[Any, ...]:
    plan = _routing(key, s)[2]
    return _normal(key, s, s.T, s.H), plan.packed_token_idx, plan.pairs_by_token


def _combine_inputs(key: Any, s: Size) -> tuple[Any, ...]:
    _, routed, plan = _routing(key, s)
    return _normal(key, s, s.P, s.H), plan.pairs_by_token, routed.expert_weights


def _slots_inputs(key: Any, s: Size) -> tuple[Any, ...]:
    return _normal(key, s, s.T, s.K, s.H), _routing(key, s)[1].expert_weights


def _grouped_inputs(key: Any, s: Size) -> tuple[Any, ...]:
    matrices = _normal(key, s, s.E, s.H, 2 * s.F, scale=s.H**-0.5)
    return _normal(key, s, s.P, s.H), matrices, _routing(key, s)[2]


def _layer_inputs(key: Any, s: Size) -> tuple[Any, ...]:
    keys = jax.random.split(key, 4)
    gate_up = _normal(keys[2], s, s.E, s.H, 2 * s.F, scale=s.H**-0.5)
    down = _normal(keys[3], s, s.E, s.F, s.H, scale=s.F**-0.5)
    return _normal(keys[0], s, s.T, s.H), *_logits(keys[1], s), gate_up, down


def _decode_inputs(key: Any, s: Size) -> tuple[Any, ...]:
    return *_logits(key, s), _normal(key, s, s.P, s.H)


def _gradient(argnums: tuple[int, ...], shape: Callable[[Size], tuple[int, ...]], op: Op) -> Op:
    """The op's gradient by some arguments: the function's last argument is the result's cotangent."""

    def pullback(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            def of(*some: Any) -> Any:
                given = dict(zip(argnums, some, strict=True))
                return function(*(given.get(i, arg) for i, arg in enumerate(args[:-1])))

            return jax.vjp(of, *(args[i] for i in argnums))[1](args[-1])

        return run

    return op._replace(
        inputs=lambda key, s: (*op.inputs(key, s), _normal(jax.random.fold_in(key, 1), s, *shape(s))),
        ours=lambda s, name: pullback(op.ours(s, name)),
        today=lambda s: {name: pullback(function) for name, function in op.today(s).items()},
    )


STEPS = 200


def _many(step: Callable[[Any], Any], start: Any) -> Any:
    # Unrolled, because a turn of XLA's loop by itself takes as long as several launches.
    return lax.fori_loop(0, STEPS, lambda _, carry: step(carry), start, unroll=20)


def _seen(tables: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """The tables, all of them whole though only a part of each is used, and a number that depends on each."""
    whole = list(lax.optimization_barrier(tables))
    return whole, functools.reduce(jnp.add, (table.reshape(-1)[0] for table in whole))


def _plans(plan: Callable[..., Any]) -> Callable[..., Any]:
    """Tables alone: each step's ids come from the last one's tables."""

    def run(ids: jax.Array) -> tuple[jax.Array, ...]:
        # Their first entries are no less than 0, so that no id changes, which XLA does not know.
        return plan(_many(lambda ids: ids + jnp.minimum(_seen(plan(ids))[1], 0), ids))

    return run


def _decode(s: Size, route_plan: Callable[..., Any], combine: Callable[..., Any]) -> Callable[..., Any]:
    """What decoders do around their products: each step's logits come from the last one's result."""

    def step(carry: Any) -> Any:
        logits, seen, rows = carry
        _, weights, *tables = route_plan(logits)
        tables, entry = _seen(tables)
        out = lax.optimization_barrier(combine(rows, tables[0], weights))
        seen += out[:, 0].astype(jnp.float32)
        # Too little to change a logit, which XLA does not know.
        return (logits + 1e-30 * (seen[:, None] + entry.astype(jnp.float32))).astype(s.dtype), seen, rows

    def run(logits: jax.Array, rows: jax.Array) -> Any:
        logits, seen, _ = _many(step, (logits, jnp.zeros(s.T), rows))
        return logits, seen.astype(s.dtype)

    return run


def _route(s: Size, name: str | None) -> Callable[..., Any]:
    return lambda logits: tuple(ferrum_jax.route_topk_softmax(logits, s.K, implementation=name))


def _plan(s: Size, name: str | None) -> Callable[..., Any]:
    return lambda ids: tuple(ferrum_jax.moe_plan(ids, s.E, s.block, implementation=name))


def _route_plan(s: Size, name: str | None) -> Callable[..., Any]:
    def run(logits: jax.Array) -> tuple[jax.Array, ...]:
        routed, plan = ferrum_jax.moe_route_plan(logits, s.K, s.block, implementation=name)
        return *routed, *plan

    return run


def _route_plan_today(s: Size) -> Callable[..., Any]:
    def run(logits: jax.Array) -> tuple[jax.Array, ...]:
        ids, weights = softmax_top_k(logits, s.K)
        return ids, weights, *argsort_plan(ids, s.E, s.block)

    return run


def _combine(s: Size, name: str | None) -> Callable[..., Any]:
    return functools.partial(ferrum_jax.moe_combine, unique_rows=True, implementation=name)


def _products(of: Callable[[Any], Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """`of` every grouped product that can be had: JAX's own, and tokamax's if it is installed."""
    found = {"ragged_dot": of(lax.ragged_dot)}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        found["tokamax"] = of(lambda x, w, sizes: tokamax.ragged_dot(x, w, sizes))
    return found


_ROUTE = Op(
    _logits,
    _route,
    lambda s: {"softmax+top_k": lambda logits: softmax_top_k(logits, s.K)},
    lambda s: s.T * s.E * s.item + 8 * s.P,
)
_DISPATCH = Op(
    _dispatch_inputs,
    lambda s, name: (
        lambda x, tokens, pairs: ferrum_jax.moe_dispatch(x, tokens, pairs_by_token=pairs, implementation=name)
    ),
    lambda s: {"gather": lambda x, tokens, pairs: x[tokens]},
    lambda s: (s.T + s.P) * s.H * s.item + 4 * s.P,
)
_COMBINE = Op(
    _combine_inputs,
    _combine,
    lambda s: {"gather+einsum": gather_einsum},
    lambda s: (s.T + s.P) * s.H * s.item + 8 * s.P,
)
_WEIGHTED_SUM = Op(
    _slots_inputs,
    lambda s, name: functools.partial(ferrum_jax.weighted_sum_batched, implementation=name),
    lambda s: {"einsum": einsum},
    lambda s: (s.T + s.P) * s.H * s.item + 4 * s.P,
)
_GROUPED = Op(
    _grouped_inputs,
    lambda s, name: functools.partial(ferrum_jax.grouped_matmul, packed_rows=True, implementation=name),
    lambda s: _products(lambda dot: lambda x, w, plan: dot(x, w, jnp.diff(plan.expert_offsets))),
    lambda s: (s.P * (s.H + 2 * s.F) + s.used * s.H * 2 * s.F) * s.item,
    lambda s: 2 * s.P * s.H * 2 * s.F,
)
_LAYER = Op(
    _layer_inputs,
    lambda s, name: functools.partial(ferrum_jax.moe_mlp, top_k=s.K, implementation=name),
    lambda s: _products(lambda dot: functools.partial(ragged_layer, top_k=s.K, product=dot)),
    lambda s: (2 * s.T * s.H + s.used * 3 * s.H * s.F) * s.item,
    lambda s: 2 * s.P * 3 * s.H * s.F,
)

OPS: Mapping[str, Op] = {
    "route_topk_softmax": _ROUTE,
    "moe_build_pairs_by_token": Op(
        _ids,
        lambda s, name: lambda ids: tuple(ferrum_jax.moe_build_pairs_by_token(ids, s.E, implementation=name)),
        lambda s: {"argsort": lambda ids: argsort_pairs(ids, s.E)},
        lambda s: 4 * (3 * s.P + s.E + 1),
    ),
    "moe_align_block_size": Op(
        _ids,
        lambda s, name: lambda ids: tuple(ferrum_jax.moe_align_block_size(ids, s.E, s.block, implementation=name)),
        lambda s: {"argsort": lambda ids: argsort_blocks(ids, s.E, s.block)},
        lambda s: 4 * (s.P + s.S + s.S // s.block + 1),
    ),
    "moe_plan": Op(
        _ids,
        _plan,
        lambda s: {"argsort": lambda ids: argsort_plan(ids, s.E, s.block)},
        lambda s: 4 * (3 * s.P + s.E + 1 + s.S + s.S // s.block + 1),
    ),
    "moe_route_plan": Op(
        _logits,
        _route_plan,
        lambda s: {"softmax+top_k, argsort": _route_plan_today(s)},
        lambda s: s.T * s.E * s.item + 4 * (5 * s.P + s.E + 1 + s.S + s.S // s.block + 1),
    ),
    "moe_dispatch": _DISPATCH,
    "moe_dispatch.backward": _gradient((0,), lambda s: (s.P, s.H), _DISPATCH),
    "moe_combine": _COMBINE,
    "moe_combine.backward": _gradient((0, 2), lambda s: (s.T, s.H), _COMBINE)._replace(
        bytes=lambda s: (s.T + 2 * s.P) * s.H * s.item + 12 * s.P
    ),
    "weighted_sum_batched": _WEIGHTED_SUM,
    "weighted_sum.backward": _gradient((0, 1), lambda s: (s.T, s.H), _WEIGHTED_SUM)._replace(
        bytes=lambda s: (s.T + 2 * s.P) * s.H * s.item + 8 * s.P
    ),
    "grouped_matmul": _GROUPED,
    "grouped_matmul.backward": _gradient((0, 1), lambda s: (s.P, 2 * s.F), _GROUPED)._replace(
        bytes=lambda s: (s.P * (2 * s.H + 2 * s.F) + (s.used + s.E) * s.H * 2 * s.F) * s.item,
        flops=lambda s: 4 * s.P * s.H * 2 * s.F,
    ),
    "moe_mlp": _LAYER,
    "moe_mlp.train": _gradient((0, 1, 2, 3), lambda s: (s.T, s.H), _LAYER)._replace(
        bytes=lambda s: (4 * s.T * s.H + (s.used + s.E) * 3 * s.H * s.F) * s.item,
        flops=lambda s: 6 * s.P * 3 * s.H * s.F,
    ),
    "plan_step": Op(
        _ids,
        lambda s, name: _plans(_plan(s, name)),
        lambda s: {"argsort": _plans(lambda ids: argsort_plan(ids, s.E, s.block))},
        lambda s: 4 * (4 * s.P + s.E + 1 + s.S + s.S // s.block + 1),
        steps=STEPS,
    ),
    "decode_step": Op(
        _decode_inputs,
        lambda s, name: _decode(s, _route_plan(s, name), _combine(s, name)),
        lambda s: {"argsort, einsum": _decode(s, _route_plan_today(s), gather_einsum)},
        lambda s: 2 * s.T * s.E * s.item + (s.T + s.P) * s.H * s.item + 4 * (5 * s.P + s.E + s.S + s.S // s.block),
        steps=STEPS,
    ),
}


# ---- a measurement


@jax.jit
def _error_of(got: jax.Array, want: jax.Array) -> jax.Array:
    """The largest over all rows of the difference's norm over the row's, or over the usual row's if that is larger.

    Integers must be equal.
    """
    if jnp.issubdtype(want.dtype, jnp.integer):
        return jnp.where(jnp.any(got.astype(jnp.int32) != want.astype(jnp.int32)), jnp.inf, 0.0)
    got, want = (jnp.atleast_2d(x.astype(jnp.float32)) for x in (got, want))
    size, error = jnp.linalg.norm(want, axis=-1), jnp.linalg.norm(got - want, axis=-1)
    usual = jnp.sqrt(jnp.mean(size**2)) + jnp.finfo(jnp.float32).tiny
    return jnp.max(error / jnp.maximum(size, usual))


def _error(got: Any, want: Any) -> float:
    return max(float(e) for e in jax.tree.leaves(jax.tree.map(_error_of, got, want)))


def _tolerance(results: Any) -> float:
    floats = [x.dtype for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) ** (2 / 3) for dtype in floats), default=0.0)


def _rotating(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Callable[[], jax.Array]:
    """Calls a compiled function on the next set of arguments; gives the smallest of its results."""
    turn = itertools.cycle(sets)
    return lambda: min(jax.tree.leaves(function(*next(turn))), key=lambda x: x.size)


def _clock(call: Callable[[], jax.Array], at_least: int) -> list[float]:
    """Seconds of each call, in a fifth of a second or a few calls."""

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    once()
    first = once()
    return [once() for _ in range(max(at_least, min(50, int(0.2 / first))))]


def _kernels(call: Callable[[], jax.Array]) -> tuple[list[float], int]:
    """Seconds of each call's kernels, by CUPTI, and how many kernels a call launches."""
    from jax.experimental.mosaic.gpu import profiler

    # `measure` would trace a plain function, and so call it once; what has a jitted function's methods it calls.
    call.trace = call.lower = call  # type: ignore[attr-defined]
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(3, min(64, int(0.2 / (time.perf_counter() - start))))
    kernels = profiler.measure(call, aggregate=False, iterations=calls)()[1]
    if not kernels:
        raise RuntimeError("CUPTI saw no kernel")
    return [sum(ms for _, ms in launched) / 1e3 for launched in kernels], len(kernels[0])


class Time(NamedTuple):
    seconds: float
    launches: int | None
    method: str


def measure(program: Callable[..., Any], sets: Sequence[tuple[Any, ...]], steps: int = 0) -> Time:
    """The median time of a compiled function: of its kernels on a GPU, by the clock on a CPU, and of `steps` each."""
    call = _rotating(program, sets)
    if jax.default_backend() != "gpu" or steps:
        return Time(statistics.median(_clock(call, 5)) / max(steps, 1), None, "clock")
    seconds, launches = _kernels(call)
    return Time(statistics.median(seconds), launches, "CUPTI")


# Each launch by itself takes several microseconds of the host's time, longer than a small kernel runs.
GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}


def _programs(ways: Iterable[Callable[..., Any]], args: tuple[Any, ...], chain: bool) -> list[Any]:
    """Each way compiled for these arguments, or the exception that it ends in; XLA compiles them side by side."""
    options = GRAPHS if chain and jax.default_backend() == "gpu" else {}

    def attempt(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            return error

    lowered = [attempt(lambda f=f: jax.jit(f).lower(*args)) for f in ways]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda x: x if isinstance(x, Exception) else attempt(x.compile, options), lowered))


def peaks() -> dict[str, float]:
    """Bytes a second of a large copy, and operations a second of a large matrix product."""
    on_gpu = jax.default_backend() == "gpu"
    side, dtype = (8192, jnp.bfloat16) if on_gpu else (1024, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (4 * side, side)).astype(dtype)
    y = x[:side]
    copy, product = jax.jit(lambda x: -x).lower(x).compile(), jax.jit(jnp.matmul).lower(y, y).compile()
    return {  # negated, because a mere copy is no kernel
        "bytes_per_s": 2 * x.nbytes / measure(copy, [(x,)]).seconds,
        "flops_per_s": 2 * side**3 / measure(product, [(y, y)]).seconds,
    }


ROTATED = 2**28  # bytes of inputs in turn, at least, ...
MOST_SETS = 64  # ... but no more sets than this


def _sets(op: Op, s: Size) -> list[tuple[Any, ...]]:
    first = op.inputs(jax.random.key(s.T), s)
    if op.steps or jax.default_backend() != "gpu":
        return [first]
    count = min(MOST_SETS, -(-ROTATED // sum(x.nbytes for x in jax.tree.leaves(first))))
    return [first, *(op.inputs(jax.random.key(s.T + i), s) for i in range(1, count))]


def rows(op_name: str, s: Size, peak: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Check and time one op at one size: a row for every implementation, and for each way to write it today."""
    op, want = OPS[op_name], None
    sets = _sets(op, s)
    known = {"op": op_name, **s._asdict(), "dtype": jnp.dtype(s.dtype).name, "block_size": s.block}
    known |= {"bytes": op.bytes(s), "flops": op.flops(s)}
    known |= {"floor_us": _floor_us(known, peak)}
    # On a CPU there is but xla, which is the default too.
    names = (*ferrum_jax.kernels.IMPLEMENTATIONS, None) if jax.default_backend() == "gpu" else ("xla",)
    ours = {name: op.ours(s, name) for name in names}
    today = op.today(s)
    programs = _programs(ours.values(), sets[0], op.steps > 0)
    for function in today.values():  # one after the other: XLA tries out ragged_dot in half of a GPU's memory
        programs += _programs([function], sets[0], op.steps > 0)
    for way, program in zip((*ours, *today), programs, strict=True):
        row = known | {"way": way or "default", "ours": way in ours, "us": None, "launches": None, "method": None}
        if isinstance(program, NotImplementedError):
            continue  # there is no such kernel
        try:
            if isinstance(program, Exception):
                raise program
            got = program(*sets[0])
            want = got if want is None else want
            error, tolerance = _error(got, want), _tolerance((want, got if way in ours else sets[0]))
            del got
            if not error <= tolerance:
                raise ArithmeticError(f"wrong: error {error:.1e} of a row, at most {tolerance:.1e} allowed")
            taken = measure(program, sets, op.steps)
            row |= {"us": taken.seconds * 1e6, "launches": taken.launches, "method": taken.method, "error": None}
        except Exception as error:  # one way that fails, for want of memory, say, leaves the others
            row |= {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        yield row


LARGE = 2**27  # bytes from which on a rate is that of the memory


def settle(report: dict[str, Any]) -> None:
    """Raise the peaks to what a large row reached, if that is more, and make every row's floor of them."""
    for row in report["rows"]:
        if row["method"] == "CUPTI" and row["bytes"] >= LARGE:
            for amount, peak in (("bytes", "bytes_per_s"), ("flops", "flops_per_s")):
                report[peak] = max(report[peak], row[amount] / row["us"] * 1e6)
    for row in report["rows"]:
        row["floor_us"] = _floor_us(row, report)


def _floor_us(row: Mapping[str, Any], peak: Mapping[str, Any]) -> float:
    return max(row["bytes"] / peak["bytes_per_s"], row["flops"] / peak["flops_per_s"]) * 1e6


# ---- the report


def here() -> dict[str, Any]:
    """What runs where, and the peaks that floors are made of."""
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-triton", "triton", "tokamax")
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"ferrum_jax": ferrum_jax.__version__, **{name: version(name) for name in packages}},
        **peaks(),
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_here(found: Mapping[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    print(textwrap.fill(f"{found['device']}, {found['date']}: {versions}", 116))
    copy, product = _rate(found["bytes_per_s"], 1e6, "B/s"), _rate(found["flops_per_s"], 1e6, "FLOP/s")
    print(f"Floors are made of {copy} of a copy and {product} of a matrix product.")
    if found["platform"] != "gpu":
        print(f"This is a CPU: no kernel runs here, widths are cut to {CPU_WIDTHS}, and times are by the clock.")
    print(f"\n{_line(*HEADER)}")


HEADER = ("op", "shape", "T", "by", "us", "rate", "floor us", "x floor", "launches", "x today")


def _line(op: str, shape: str, tokens: Any, by: str, us: str, *rest: str) -> str:
    numbers = "".join(f"{cell:>{width}}" for cell, width in zip(rest, (15, 9, 8, 9, 8), strict=False))
    return f"{op:<24} {shape:<11} {tokens:>6}  {by:<16.16} {us:>9}{numbers}".rstrip()


def _print_rows(found: Sequence[Mapping[str, Any]]) -> None:
    """One op at one size. "x today": how many times as fast as the first way of writing it today."""
    today = next((r["us"] for r in found if not r["ours"]), None)
    for r in found:
        known = r["op"], r["model"], r["T"], r["way"]
        if r["us"] is None:
            print(_line(*known, "-"), "", r["error"][: 110 - 72])
            continue
        rate = _rate(r["flops"], r["us"], "FLOP/s") if r["flops"] else _rate(r["bytes"], r["us"], "B/s")
        times = f"{r['us'] / r['floor_us']:.1f}", str(r["launches"] or ""), f"{today / r['us']:.2f}" if today else ""
        print(_line(*known, f"{r['us']:.1f}", rate, f"{r['floor_us']:.1f}", *times))
    print(flush=True)


def _rate(amount: float, us: float, unit: str) -> str:
    amount, prefix = (amount / us / 1e6, "T") if amount / us >= 1e6 else (amount / us / 1e3, "G")
    return f"{amount:.2f} {prefix}{unit}"


def _bar(done: int, of: int, what: str) -> None:
    if sys.stderr.isatty():
        filled = 24 * done // of
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{of} {what}"
        print(f"\r{line:<79.79}", end="\r", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a result was wrong."""
    usual = ON_GPU if jax.default_backend() == "gpu" else ON_CPU
    parser = argparse.ArgumentParser("python -m ferrum_jax bench", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--op", default="all", help=f"of {', '.join(OPS)}; comma-separated; default: all")
    parser.add_argument(
        "--shapes", default=usual["shapes"], help=f"of {', '.join(MODELS)}, or all; default: %(default)s"
    )
    parser.add_argument("--tokens", default=usual["tokens"], help="T, comma-separated; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the report to a file")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it: time over T, with matplotlib")
    args = parser.parse_args(argv)
    ops, shapes = _chosen(parser, "op", args.op, OPS), _chosen(parser, "shapes", args.shapes, MODELS)
    if not all(count.isdecimal() and int(count) for count in args.tokens.split(",")):
        parser.error(f"argument --tokens: {args.tokens!r} must be numbers >= 1, comma-separated")
    todo = list(itertools.product(ops, shapes, map(int, args.tokens.split(","))))
    report = here() | {"rows": []}
    _print_here(report)

    def save() -> None:
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + "\n")

    # Where it cannot be drawn or saved, before anything takes long.
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("argument --plot: matplotlib is not installed: pip install '.[viz]' from a clone")
    save()
    for i, (name, shape, tokens) in enumerate(todo):
        _bar(i, len(todo), f"{name} {shape} T={tokens}")
        found = list(rows(name, size(shape, tokens), report))
        _bar(i, len(todo), "")
        report["rows"] += found
        settle(report)
        _print_rows(found)
        save()
    if args.plot and any(row["us"] for row in report["rows"]):
        figure: Any = ferrum_jax.viz.benchmark(report)[0].figure
        figure.savefig(args.plot, dpi=120)
    wrong = [r for r in report["rows"] if (r["error"] or "").startswith(ArithmeticError.__name__)]
    return 1 if wrong else 0


def _chosen(parser: argparse.ArgumentParser, option: str, text: str, choices: Mapping[str, Any]) -> list[str]:
    names = list(choices) if text == "all" else text.split(",")
    for name in names:
        if name not in choices:
            parser.error(f"argument --{option}: {name!r} is none of {', '.join(choices)}, all")
    return names
