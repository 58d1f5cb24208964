"""Which workloads the benchmark runs: models, shapes, and for each op its inputs, its rivals, its bytes and its flops.

The letters in shapes are T tokens, E experts, K choices per token, P = T*K pairs, H hidden width, F expert width and
S slots of a block-aligned table.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import ferrum_jax

from ..ops.table_sizes import usual_block_size
from . import quantized, today

Function = Callable[..., Any]


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
# On a CPU, hidden width and expert width are cut to at most these, so that a run takes seconds.
CPU_WIDTHS = 64, 32


class Shape(NamedTuple):
    """The shape that a workload is timed at: a model's, with T tokens."""

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
        """Bytes of one entry."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def block(self) -> int:
        """The block size that `moe_mlp` would choose."""
        return usual_block_size(self.P, self.E)

    @property
    def S(self) -> int:
        return ferrum_jax.max_aligned_rows(self.P, self.E, self.block)

    @property
    def used(self) -> float:
        """How many experts at least one token chooses, on average over random choices."""
        return self.E * (1 - (1 - self.K / self.E) ** self.T)

    @property
    def pairs_entries(self) -> int:
        """Entries of the three tables of `TokenPairs`."""
        return 2 * self.P + self.E + 1

    @property
    def blocks_entries(self) -> int:
        """Entries of the three tables of `MoeRouting`."""
        return self.S + self.S // self.block + 1


def shape(model: str, tokens: int) -> Shape:
    """A model's shape on this machine: in bfloat16 on a GPU; in float32 and with narrower rows on a CPU."""
    experts, top_k, hidden, expert_width = MODELS[model]
    if jax.default_backend() == "gpu":
        return Shape(model, tokens, experts, top_k, hidden, expert_width, jnp.bfloat16)
    widths = min(hidden, CPU_WIDTHS[0]), min(expert_width, CPU_WIDTHS[1])
    return Shape(model, tokens, experts, top_k, *widths, jnp.float32)


def _no_flops(s: Shape) -> float:
    return 0


class Workload(NamedTuple):
    """One thing to time: how to make its arguments, the functions to run, and what they must move and compute.

    ours: the library's function, by the name of an implementation.
    rivals: the functions that it is compared with, by name; ratios in the report are to the first.
    bytes, flops: the least that any way of doing it must move and compute.
    steps: how many steps one call runs one after the other; 0 if the workload is no chain.
    """

    inputs: Callable[[Any, Shape], tuple[Any, ...]]
    ours: Callable[[Shape, str | None], Function]
    rivals: Callable[[Shape], dict[str, Function]]
    bytes: Callable[[Shape], float]
    flops: Callable[[Shape], float] = _no_flops
    steps: int = 0


# ---- inputs


def _normal(key: Any, s: Shape, *shape: int, scale: float = 1.0) -> jax.Array:
    return _drawn(key, shape, scale, jnp.dtype(s.dtype))


# Drawn in one program: op by op, JAX would hold several float32 copies of a large model's matrices at once.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(key: Any, shape: tuple[int, ...], scale: float, dtype: Any) -> jax.Array:
    return (scale * jax.random.normal(key, shape)).astype(dtype)


def _routing(key: Any, s: Shape) -> tuple[jax.Array, ferrum_jax.RouterOutput, ferrum_jax.MoePlan]:
    logits = _normal(key, s, s.T, s.E)
    routed = ferrum_jax.route_topk_softmax(logits, s.K, implementation="xla")
    return logits, routed, ferrum_jax.moe_plan(routed.expert_ids, s.E, s.block, implementation="xla")


def _logits(key: Any, s: Shape) -> tuple[Any, ...]:
    return (_normal(key, s, s.T, s.E),)


def _ids(key: Any, s: Shape) -> tuple[Any, ...]:
    return (_routing(key, s)[1].expert_ids,)


def _dispatch_inputs(key: Any, s: Shape) -> tuple[Any, ...]:
    plan = _routing(key, s)[2]
    return _normal(key, s, s.T, s.H), plan.packed_token_idx, plan.pairs_by_token


def _combine_inputs(key: Any, s: Shape) -> tuple[Any, ...]:
    _, routed, plan = _routing(key, s)
    return _normal(key, s, s.P, s.H), plan.pairs_by_token, routed.expert_weights


def _slots_inputs(key: Any, s: Shape) -> tuple[Any, ...]:
    return _normal(key, s, s.T, s.K, s.H), _routing(key, s)[1].expert_weights


def _grouped_inputs(key: Any, s: Shape) -> tuple[Any, ...]:
    matrices = _normal(key, s, s.E, s.H, 2 * s.F, scale=s.H**-0.5)
    return _normal(key, s, s.P, s.H), matrices, _routing(key, s)[2]


def _layer_inputs(key: Any, s: Shape) -> tuple[Any, ...]:
    keys = jax.random.split(key, 4)
    gate_up = _normal(keys[2], s, s.E, s.H, 2 * s.F, scale=s.H**-0.5)
    down = _normal(keys[3], s, s.E, s.F, s.H, scale=s.F**-0.5)
    return _normal(keys[0], s, s.T, s.H), *_logits(keys[1], s), gate_up, down


def _decode_inputs(key: Any, s: Shape) -> tuple[Any, ...]:
    return *_logits(key, s), _normal(key, s, s.P, s.H)


# ---- functions to time


def _route(s: Shape, name: str | None) -> Function:
    return lambda logits: tuple(ferrum_jax.route_topk_softmax(logits, s.K, implementation=name))


def _plan(s: Shape, name: str | None) -> Function:
    return lambda ids: tuple(ferrum_jax.moe_plan(ids, s.E, s.block, implementation=name))


def _route_plan(s: Shape, name: str | None) -> Function:
    def run(logits: jax.Array) -> tuple[jax.Array, ...]:
        routed, plan = ferrum_jax.moe_route_plan(logits, s.K, s.block, implementation=name)
        return *routed, *plan

    return run


def _route_plan_today(s: Shape) -> Function:
    def run(logits: jax.Array) -> tuple[jax.Array, ...]:
        ids, weights = today.softmax_top_k(logits, s.K)
        return ids, weights, *today.argsort_plan(ids, s.E, s.block)

    return run


def _dispatch(s: Shape, name: str | None) -> Function:
    return lambda x, tokens, pairs: ferrum_jax.moe_dispatch(x, tokens, pairs_by_token=pairs, implementation=name)


def _combine(s: Shape, name: str | None) -> Function:
    return functools.partial(ferrum_jax.moe_combine, unique_rows=True, implementation=name)


def _products(make: Callable[[Function], Function]) -> dict[str, Function]:
    """`make` applied to every grouped product that is installed: JAX's own, and tokamax's if it is there."""
    found = {"ragged_dot": make(lax.ragged_dot)}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        found["tokamax"] = make(lambda x, w, sizes: tokamax.ragged_dot(x, w, sizes))
    return found


def _gradient(argnums: tuple[int, ...], cotangent: Callable[[Shape], tuple[int, ...]], forward: Workload) -> Workload:
    """A workload's gradient by some of its arguments. The functions take the result's cotangent, last."""

    def pullback(function: Function) -> Function:
        def run(*args: Any) -> Any:
            def of(*varied: Any) -> Any:
                given = dict(zip(argnums, varied, strict=True))
                return function(*(given.get(i, arg) for i, arg in enumerate(args[:-1])))

            return jax.vjp(of, *(args[i] for i in argnums))[1](args[-1])

        return run

    return forward._replace(
        inputs=lambda key, s: (*forward.inputs(key, s), _normal(jax.random.fold_in(key, 1), s, *cotangent(s))),
        ours=lambda s, name: pullback(forward.ours(s, name)),
        rivals=lambda s: {name: pullback(function) for name, function in forward.rivals(s).items()},
    )


# ---- chains of steps

STEPS = 200


def _many(step: Callable[[Any], Any], start: Any) -> Any:
    # Unrolled, because one turn of XLA's loop costs as much as several launches.
    return lax.fori_loop(0, STEPS, lambda _, carry: step(carry), start, unroll=20)


def _kept_whole(tables: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """The tables, which XLA must now compute in full, and a number that depends on each of them."""
    whole = list(lax.optimization_barrier(tables))
    return whole, functools.reduce(jnp.add, (table.reshape(-1)[0] for table in whole))


def _plan_chain(plan: Function) -> Function:
    """Tables alone. Each step's ids depend on the tables of the step before, so that no step can be left out."""

    def run(ids: jax.Array) -> tuple[jax.Array, ...]:
        # The number is never negative, so the ids stay the same. XLA does not know that.
        return plan(_many(lambda ids: ids + jnp.minimum(_kept_whole(plan(ids))[1], 0), ids))

    return run


def _decode_chain(s: Shape, route_plan: Function, combine: Function) -> Function:
    """What a decoder does around its products. Each step's logits depend on the result of the step before."""

    def step(carry: Any) -> Any:
        logits, seen, rows = carry
        _, weights, *tables = route_plan(logits)
        tables, entry = _kept_whole(tables)
        out = lax.optimization_barrier(combine(rows, tables[0], weights))
        seen += out[:, 0].astype(jnp.float32)
        # What is added is too small to change a logit. XLA does not know that.
        return (logits + 1e-30 * (seen[:, None] + entry.astype(jnp.float32))).astype(s.dtype), seen, rows

    def run(logits: jax.Array, rows: jax.Array) -> Any:
        logits, seen, _ = _many(step, (logits, jnp.zeros(s.T), rows))
        return logits, seen.astype(s.dtype)

    return run


# ---- the workloads

_ROUTE = Workload(
    inputs=_logits,
    ours=_route,
    rivals=lambda s: {"softmax+top_k": lambda logits: today.softmax_top_k(logits, s.K)},
    bytes=lambda s: s.T * s.E * s.item + 8 * s.P,
)
_PAIRS = Workload(
    inputs=_ids,
    ours=lambda s, name: lambda ids: tuple(ferrum_jax.moe_build_pairs_by_token(ids, s.E, implementation=name)),
    rivals=lambda s: {"argsort": lambda ids: today.argsort_pairs(ids, s.E)},
    bytes=lambda s: 4 * (s.P + s.pairs_entries),
)
_ALIGN = Workload(
    inputs=_ids,
    ours=lambda s, name: lambda ids: tuple(ferrum_jax.moe_align_block_size(ids, s.E, s.block, implementation=name)),
    rivals=lambda s: {"argsort": lambda ids: today.argsort_blocks(ids, s.E, s.block)},
    bytes=lambda s: 4 * (s.P + s.blocks_entries),
)
_PLAN = Workload(
    inputs=_ids,
    ours=_plan,
    rivals=lambda s: {"argsort": lambda ids: today.argsort_plan(ids, s.E, s.block)},
    bytes=lambda s: 4 * (s.P + s.pairs_entries + s.blocks_entries),
)
_ROUTE_PLAN = Workload(
    inputs=_logits,
    ours=_route_plan,
    rivals=lambda s: {"softmax+top_k, argsort": _route_plan_today(s)},
    bytes=lambda s: s.T * s.E * s.item + 8 * s.P + 4 * (s.P + s.pairs_entries + s.blocks_entries),
)
_DISPATCH = Workload(
    inputs=_dispatch_inputs,
    ours=_dispatch,
    rivals=lambda s: {"gather": lambda x, tokens, pairs: x[tokens]},
    bytes=lambda s: (s.T + s.P) * s.H * s.item + 4 * s.P,
)
_COMBINE = Workload(
    inputs=_combine_inputs,
    ours=_combine,
    rivals=lambda s: {"gather+einsum": today.gather_einsum},
    bytes=lambda s: (s.T + s.P) * s.H * s.item + 8 * s.P,
)
_WEIGHTED_SUM = Workload(
    inputs=_slots_inputs,
    ours=lambda s, name: functools.partial(ferrum_jax.weighted_sum_batched, implementation=name),
    rivals=lambda s: {"einsum": today.einsum},
    bytes=lambda s: (s.T + s.P) * s.H * s.item + 4 * s.P,
)
_GROUPED = Workload(
    inputs=_grouped_inputs,
    ours=lambda s, name: functools.partial(ferrum_jax.grouped_matmul, implementation=name),
    rivals=lambda s: _products(lambda dot: lambda x, w, plan: dot(x, w, jnp.diff(plan.expert_offsets))),
    bytes=lambda s: (s.P * (s.H + 2 * s.F) + s.used * s.H * 2 * s.F) * s.item,
    flops=lambda s: 2 * s.P * s.H * 2 * s.F,
)
_LAYER = Workload(
    inputs=_layer_inputs,
    ours=lambda s, name: functools.partial(ferrum_jax.moe_mlp, top_k=s.K, implementation=name),
    rivals=lambda s: _products(lambda dot: functools.partial(today.ragged_layer, top_k=s.K, product=dot)),
    bytes=lambda s: (2 * s.T * s.H + s.used * 3 * s.H * s.F) * s.item,
    flops=lambda s: 2 * s.P * 3 * s.H * s.F,
)
_PLAN_STEP = Workload(
    inputs=_ids,
    ours=lambda s, name: _plan_chain(_plan(s, name)),
    rivals=lambda s: {"argsort": _plan_chain(lambda ids: today.argsort_plan(ids, s.E, s.block))},
    bytes=lambda s: 4 * (2 * s.P + s.pairs_entries + s.blocks_entries),
    steps=STEPS,
)
_DECODE_STEP = Workload(
    inputs=_decode_inputs,
    ours=lambda s, name: _decode_chain(s, _route_plan(s, name), _combine(s, name)),
    rivals=lambda s: {"argsort, einsum": _decode_chain(s, _route_plan_today(s), today.gather_einsum)},
    bytes=lambda s: 2 * s.T * s.E * s.item + (s.T + s.P) * s.H * s.item + 4 * (5 * s.P + s.E + s.S + s.S // s.block),
    steps=STEPS,
)

WORKLOADS: Mapping[str, Workload] = {
    "route_topk_softmax": _ROUTE,
    "moe_build_pairs_by_token": _PAIRS,
    "moe_align_block_size": _ALIGN,
    "moe_plan": _PLAN,
    "moe_route_plan": _ROUTE_PLAN,
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
    "ragged_dot": _GROUPED._replace(
        ours=lambda s, name: (
            lambda x, w, plan: ferrum_jax.ragged_dot(x, w, jnp.diff(plan.expert_offsets), implementation=name)
        )
    ),
    "moe_mlp": _LAYER,
    "moe_mlp.train": _gradient((0, 1, 2, 3), lambda s: (s.T, s.H), _LAYER)._replace(
        bytes=lambda s: (4 * s.T * s.H + (s.used + s.E) * 3 * s.H * s.F) * s.item,
        flops=lambda s: 6 * s.P * 3 * s.H * s.F,
    ),
    **quantized.workloads(_LAYER),
    "plan_step": _PLAN_STEP,
    "decode_step": _DECODE_STEP,
}
