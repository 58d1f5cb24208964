"""The layer on one device, of checked arguments: from tokens and router logits to output, made of the library's ops."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..core.sharding import sharded_like, tokens_of
from ..core.types import PACKED, PAIR_IDS
from ..ops import tables
from ..ops.activations import ACTIVATIONS
from ..ops.combine import combine_op, dispatch_op
from ..ops.grouped_ops import Matrices, product, unfinished
from ..ops.routing import route_topk_softmax
from ..ops.table_sizes import usual_block_size
from ..ops.weighted_sum import weighted_sum_op
from .arguments import Experts

_L2_BYTES = 2**25  # x of at most this size is taken to fit the L2 cache


class Settings(NamedTuple):
    """The layer's static arguments, as `moe_mlp` explains them."""

    op: str  # the function that was called, for errors
    top_k: int | None
    norm_topk_prob: bool
    activation: str | Callable[[jax.Array, jax.Array], jax.Array]
    flow: str | None
    block_size: int | None
    precision: str
    activations: str | None
    implementation: str | None


def routing_of(logits: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """The ids and weights that these router logits give."""
    assert settings.top_k is not None  # else checked_tokens has raised
    how = {"norm_topk_prob": settings.norm_topk_prob, "implementation": settings.implementation}
    return route_topk_softmax(logits, settings.top_k, **how)


def local_layer(x: jax.Array, logits: jax.Array | None, routed: Any, experts: Experts, settings: Settings) -> jax.Array:
    """The layer's output. There are either logits or `routed`, the ids and weights."""
    activation, implementation = settings.activation, settings.implementation
    x_type, num_experts = jax.typeof(x), experts.number
    x = tokens_of(x)
    if routed:
        ids, weights = map(tokens_of, routed)
    else:
        assert logits is not None
        ids, weights = routing_of(tokens_of(logits), settings)
    ids, weights = checkpoint_name((ids, weights), "moe_router")
    flow = settings.flow if settings.flow and ids.shape[-1] else _usual_flow(x, ids)
    block_size = settings.block_size or usual_block_size(ids.size, num_experts)
    plan, expert_of_row = None, ids.reshape(-1)
    if flow == PACKED:
        plan = checkpoint_name(tables.plan(ids, num_experts, block_size, False, implementation), "moe_router")
        routing, choices = plan.routing, 1
        rows = dispatch_op.bind(x, plan.packed_token_idx, plan.pairs_by_token, implementation=implementation)
        if experts.gate_up_bias or experts.down_bias is not None:
            owner = tables.expert_of_row
            expert_of_row = owner.bind(plan.packed_token_idx, plan.expert_offsets, implementation=None)
    else:
        routing = checkpoint_name(tables.align(ids, num_experts, block_size, True, implementation), "moe_router")
        rows, choices = x, ids.shape[-1]

    def times(rows: jax.Array, matrices: Matrices, **how: Any) -> jax.Array:
        how = {"activation": None, "dtype": x.dtype.name, "top_k": 1} | how
        how |= {"packed_rows": plan is not None, "precision": settings.precision, "implementation": implementation}
        how |= {"activations": settings.activations}
        return product(rows, matrices, *routing, **how)

    def of_rows(bias: jax.Array) -> jax.Array:
        return dispatch_op.bind(bias, expert_of_row, None, implementation=implementation)

    if experts.gate_up_bias or callable(activation) or experts.interleaved or experts.transpose_rhs:
        how = {"top_k": choices, "dtype": unfinished(x.dtype.name), "transpose_rhs": experts.transpose_rhs}
        parts = [times(rows, matrices, **how) for matrices in experts.gate_up]
        biases = [of_rows(bias) for bias in experts.gate_up_bias]
        rows = _activate(checkpoint_name(parts, "moe_gate_up"), biases, experts.interleaved, x.dtype, settings)
    else:
        gate, *up = experts.gate_up
        rows = times(rows, gate, up=up[0] if up else None, top_k=choices, activation=activation)
    rows = checkpoint_name(times(rows, experts.down, transpose_rhs=experts.transpose_rhs), "moe_down")
    if experts.down_bias is not None:
        rows = (_f32(rows) + _f32(of_rows(experts.down_bias))).astype(x.dtype)
    if plan:
        out = combine_op.bind(rows, plan.pairs_by_token, weights, unique_rows=True, implementation=implementation)
    else:
        if routed:  # else every id is one of an expert
            weights = jnp.where((ids >= 0) & (ids < num_experts), weights, 0)
        out = weighted_sum_op.bind(rows.reshape(*ids.shape, x.shape[-1]), weights, implementation=implementation)
    return sharded_like(out.reshape(x_type.shape), x_type)


def _activate(
    parts: list[jax.Array], biases: list[jax.Array], interleaved: bool, dtype: Any, settings: Settings
) -> jax.Array:
    """The activation of a product, or of one for gate and one for up, after their biases."""
    named = settings.activation
    activation = named if callable(named) else ACTIVATIONS[named]

    # The gradient keeps the product, and computes the activation's many float32 intermediates again from it.
    @jax.checkpoint
    def finish(parts: list[jax.Array], biases: list[jax.Array]) -> jax.Array:
        parts = [_f32(part) for part in parts]
        if biases:
            parts = [part + _f32(bias) for part, bias in zip(parts, biases, strict=True)]
        if len(parts) == 2:
            gate, up = parts
        elif interleaved:
            gate, up = parts[0][..., ::2], parts[0][..., 1::2]
        else:
            gate, up = jnp.split(parts[0], 2, axis=-1)
        hidden = activation(gate, up)
        if jnp.shape(hidden) != gate.shape:
            raise ValueError(
                f"{settings.op}: activation must give an array of shape {gate.shape}; got {jnp.shape(hidden)}"
            )
        return hidden.astype(dtype)

    return finish(parts, biases)


def _usual_flow(x: jax.Array, ids: jax.Array) -> str:
    """Pair ids if the tokens fit an L2 cache, else packed rows. Pair ids need a K >= 1: id p means token p // K."""
    few_bytes = isinstance(x.size, int) and x.size * x.dtype.itemsize <= _L2_BYTES  # a size may be symbolic
    return PAIR_IDS if few_bytes and ids.shape[-1] else PACKED


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
