"""`moe_mlp`: the whole layer, from tokens and router logits to output, made of the library's ops."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..core.sharding import sharded_like, tokens_of
from ..core.signature import one_of
from ..core.types import PACKED, PAIR_IDS, RouterOutput
from ..kernels import IMPLEMENTATIONS
from ..ops import tables
from ..ops.combine import combine_op, dispatch_op
from ..ops.grouped import as_precision
from ..ops.grouped_ops import Matrices, product, unfinished
from ..ops.routing import route_topk_softmax
from ..ops.table_sizes import usual_block_size
from ..ops.weighted_sum import weighted_sum_op
from .arguments import checked_experts, checked_settings, checked_tokens

_OP = "moe_mlp"  # the name in errors

_L2_BYTES = 2**25  # x of at most this size is taken to fit the L2 cache


def moe_mlp(
    x: jax.Array,
    router_logits: jax.Array | None,
    w_gate_up: Matrices | tuple[Matrices, Matrices],
    w_down: Matrices,
    *,
    top_k: int | None = None,
    norm_topk_prob: bool = True,
    router_output: RouterOutput | None = None,
    activation: str | Callable[[jax.Array, jax.Array], jax.Array] = "silu",
    b_gate_up: Matrices | tuple[Matrices, Matrices] | None = None,
    b_down: Matrices | None = None,
    interleaved: bool = False,
    transpose_rhs: bool = False,
    flow: str | None = None,
    block_size: int | None = None,
    precision: str | jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """A Mixture-of-Experts layer: each token through its experts' gated MLPs, weighted and added.

    out[t] = sum over k of weight[t,k] * (act(gate, up) @ w_down[e] + b_down[e]), where e = id[t,k], and gate and up are
    the halves of x[t] @ w_gate_up[e] + b_gate_up[e]. Products and sums are in float32, and rows between them in x's
    dtype, except that a float16 product stays float32 until it is activated. The activation is in float32. The gradient
    computes it again instead of storing it. Gradients to x, the router's logits or weights, matrices and biases are
    exact, with the ids held constant; those of an expert without tokens are 0. Memory grows with T*K rows, never with
    T*K*E or with a copy of matrices.

    Under `jax.checkpoint`, a policy by names chooses what the gradient keeps, for instance
    `jax.checkpoint_policies.save_only_these_names("moe_router", "moe_gate_up", "moe_down")`. These are the routing
    and its tables; the product before its bias and activation; and the product of w_down before its bias. JAX's own
    policies for dot products keep none of them.

    Args:
      x: [..., T, H] float16, bfloat16 or float32. Leading axes are more tokens: the matrices serve all.
      router_logits: [..., T, E] float16, bfloat16 or float32, for `route_topk_softmax`; None with `router_output`.
      w_gate_up: [E, H, 2F] of x's dtype, gate then up. Or a pair (w_gate, w_up) of [E, H, F], which is not
        concatenated. Instead of an array, here and below, a `LayerOf` reads it in place out of a stack of layers.
      w_down: [E, F, H] of x's dtype.
      top_k: K, experts per token; needed with `router_logits`.
      norm_topk_prob: as in `route_topk_softmax`; of no effect with `router_output`.
      router_output: expert_ids[..., T, K] and expert_weights[..., T, K] made elsewhere. An id outside [0, E) is no
        expert: the pair adds nothing, whatever its weight.
      activation: "silu", "gelu" (exact), "gelu_tanh", "relu", "relu2" (squared), each times up; "swiglu_oai", that of
        gpt-oss: (up + 1) * gate * sigmoid(1.702 * gate), gate clamped above at 7 and up to [-7, 7]; or a function of
        (gate, up), float32 [P, F] each, to [P, F].
      b_gate_up, b_down: [E, 2F] and [E, H] of x's dtype. With a pair (w_gate, w_up), `b_gate_up` is a pair too.
      interleaved: gate and up alternate along the axis of 2F entries, beginning with gate, as in gpt-oss.
      transpose_rhs: the matrices are [E, 2F, H] and [E, H, F], as PyTorch's linear layers hold them.
      flow: "packed": dispatch copies the tokens into expert order, and combine adds up the results. "pair_ids": the
        products read the tokens themselves, and write rows in pair order. None: "pair_ids" if x has at most 32 MiB, so
        that the L2 cache holds it; to read its rows once per tile then costs less than to copy them K times. Else, and
        for a symbolic number of tokens, "packed".
      block_size: rows in a block of one expert. None: the power of two in [16, 128] that holds P/E rows, those of an
        average expert, so that most experts' matrices are read once; 64 for a symbolic number of tokens.
      precision: of float32 products with the matrices and of their gradients, as in `grouped_matmul`: "tensorfloat32"
        allows TF32. None: what `jax.default_matmul_precision` says, and full float32 if that is not set.
      implementation: None, "xla" or "triton", of each op; Pallas has no kernel of tables, and None takes its products
        where they were measured faster.

    Returns:
      [..., T, H] in x's dtype.

    Raises:
      TypeError: an argument of another dtype, a size that is no int, a bool that is none, a pair of one array and one
        `LayerOf`, biases in another form than the matrices.
      ValueError: ranks or shapes that do not fit, sizes out of range, both or neither of `router_logits` and
        `router_output`, an unknown `activation`, `flow`, `precision` or `implementation`.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    The layer is that of Shazeer et al., https://arxiv.org/abs/1701.06538, dropless as in MegaBlocks,
    https://arxiv.org/abs/2211.15841, with the gated units of https://arxiv.org/abs/2002.05202.

    >>> import jax.numpy as jnp
    >>> x, logits = jnp.ones((5, 4)), jnp.arange(15.0).reshape(5, 3)
    >>> moe_mlp(x, logits, jnp.ones((3, 4, 12)), jnp.ones((3, 6, 4)), top_k=2).shape
    (5, 4)
    """
    act = checked_settings(_OP, activation, flow, block_size)
    one_of(_OP, "implementation", implementation, (None, *IMPLEMENTATIONS))
    experts = checked_experts(_OP, w_gate_up, w_down, b_gate_up, b_down, interleaved, transpose_rhs)
    x, logits, routed = checked_tokens(_OP, experts, top_k, x, router_logits, router_output)
    x_type, num_experts = jax.typeof(x), experts.number
    if routed:
        x, ids, weights = [tokens_of(a) for a in (x, *routed)]
    else:
        x, logits = tokens_of(x), tokens_of(logits)
        assert top_k is not None  # else checked_tokens has raised
        ids, weights = route_topk_softmax(logits, top_k, norm_topk_prob=norm_topk_prob, implementation=implementation)
    ids, weights = checkpoint_name((ids, weights), "moe_router")
    flow = _usual_flow(x, ids) if flow is None or not ids.shape[-1] else flow
    block_size = usual_block_size(ids.size, num_experts) if block_size is None else block_size
    precision = as_precision(_OP, precision, x.dtype)
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
        how |= {"packed_rows": plan is not None, "precision": precision, "implementation": implementation}
        return product(rows, matrices, *routing, **how)

    def of_rows(bias: jax.Array) -> jax.Array:
        return dispatch_op.bind(bias, expert_of_row, None, implementation=implementation)

    if experts.gate_up_bias or callable(activation) or experts.interleaved or experts.transpose_rhs:
        how = {"top_k": choices, "dtype": unfinished(x.dtype.name), "transpose_rhs": experts.transpose_rhs}
        parts = [times(rows, matrices, **how) for matrices in experts.gate_up]
        biases = [of_rows(bias) for bias in experts.gate_up_bias]
        rows = _activate(checkpoint_name(parts, "moe_gate_up"), biases, act, experts.interleaved, x.dtype)
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


def pack_gate_up(gate: jax.Array, up: jax.Array, *, axis: int = -1, interleaved: bool = False) -> jax.Array:
    """One array of gate and up, as `moe_mlp` takes it: a copy of both.

    Args:
      gate, up: [..., F], arrays of one shape: matrices or biases.
      axis: the axis of F entries; -2 for matrices [E, F, H], with `transpose_rhs`.
      interleaved: whether gate and up alternate along it.

    Returns:
      The array with 2F entries along the axis: gate then up, or gate[0], up[0], gate[1] and so on.

    Raises:
      ValueError: arrays of different shapes.

    >>> import jax.numpy as jnp
    >>> pack_gate_up(jnp.array([1, 2]), jnp.array([3, 4]), interleaved=True).tolist()
    [1, 3, 2, 4]
    """
    if jnp.shape(gate) != jnp.shape(up):
        raise ValueError(f"pack_gate_up: up must have the shape of gate, {jnp.shape(gate)}; got {jnp.shape(up)}")
    if not interleaved:
        return jnp.concatenate([gate, up], axis)
    axis %= jnp.ndim(gate)
    shape = list(jnp.shape(gate))
    shape[axis] *= 2
    return jnp.stack([gate, up], axis + 1).reshape(shape)


def _activate(
    parts: list[jax.Array], biases: list[jax.Array], activation: Any, interleaved: bool, dtype: Any
) -> jax.Array:
    """The activation of a product, or of one for gate and one for up, after their biases."""

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
            raise ValueError(f"{_OP}: activation must give an array of shape {gate.shape}; got {jnp.shape(hidden)}")
        return hidden.astype(dtype)

    return finish(parts, biases)


def _usual_flow(x: jax.Array, ids: jax.Array) -> str:
    """Pair ids if the tokens fit an L2 cache, else packed rows. Pair ids need a K >= 1: id p means token p // K."""
    few_bytes = isinstance(x.size, int) and x.size * x.dtype.itemsize <= _L2_BYTES  # a size may be symbolic
    return PAIR_IDS if few_bytes and ids.shape[-1] else PACKED


def _f32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
