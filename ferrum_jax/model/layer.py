"""`moe_mlp`: the whole layer, from tokens and router logits to output, made of the library's ops."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..core.sharding import sharded_like, tokens_of
from ..core.signature import as_int, checked, one_of, parse
from ..core.types import PACKED, PAIR_IDS, RouterOutput
from ..kernels import IMPLEMENTATIONS
from ..ops import tables
from ..ops.activations import ACTIVATIONS
from ..ops.combine import combine_op, dispatch_op
from ..ops.grouped import as_precision, product, unfinished
from ..ops.routing import as_pair, route_topk_softmax
from ..ops.weighted_sum import weighted_sum_op

_OP = "moe_mlp"  # the name in errors

FLOWS = (PACKED, PAIR_IDS)
_L2_BYTES = 2**25  # x of at most this size is taken to fit the L2 cache


def moe_mlp(
    x: jax.Array,
    router_logits: jax.Array | None,
    w_gate_up: jax.Array,
    w_down: jax.Array,
    *,
    top_k: int | None = None,
    norm_topk_prob: bool = True,
    router_output: RouterOutput | None = None,
    activation: str | Callable[[jax.Array, jax.Array], jax.Array] = "silu",
    b_gate_up: jax.Array | None = None,
    b_down: jax.Array | None = None,
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
      w_gate_up: [E, H, 2F] of x's dtype, gate then up.
      w_down: [E, F, H] of x's dtype.
      top_k: K, experts per token; needed with `router_logits`.
      norm_topk_prob: as in `route_topk_softmax`; of no effect with `router_output`.
      router_output: expert_ids[..., T, K] and expert_weights[..., T, K] made elsewhere. An id outside [0, E) is no
        expert: the pair adds nothing, whatever its weight.
      activation: "silu", "gelu" (exact), "gelu_tanh", "relu", "relu2" (squared), each times up; "swiglu_oai", that of
        gpt-oss: (up + 1) * gate * sigmoid(1.702 * gate), gate clamped above at 7 and up to [-7, 7]; or a function of
        (gate, up), float32 [P, F] each, to [P, F].
      b_gate_up, b_down: [E, 2F] and [E, H] of x's dtype.
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
      TypeError: an argument of another dtype, a size that is no int, `norm_topk_prob` no bool.
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
    act = checked_layer(activation, flow, block_size)
    one_of(_OP, "implementation", implementation, (None, *IMPLEMENTATIONS))
    x, logits, routed, w_gate_up, w_down, b_gate_up, b_down = checked_arrays(
        _OP, top_k, x, router_logits, router_output, w_gate_up, w_down, b_gate_up, b_down
    )
    x_type, num_experts = jax.typeof(x), w_gate_up.shape[0]
    if routed:
        x, ids, weights = [tokens_of(a) for a in (x, *routed)]
    else:
        x, logits = tokens_of(x), tokens_of(logits)
        assert top_k is not None  # else checked_arrays has raised
        ids, weights = route_topk_softmax(logits, top_k, norm_topk_prob=norm_topk_prob, implementation=implementation)
    ids, weights = checkpoint_name((ids, weights), "moe_router")
    flow = _usual_flow(x, ids) if flow is None or not ids.shape[-1] else flow
    block_size = usual_block_size(ids.size, num_experts) if block_size is None else block_size
    precision = as_precision(_OP, precision, x.dtype)
    plan = None
    if flow == PACKED:
        plan = checkpoint_name(tables.plan(ids, num_experts, block_size, False, implementation), "moe_router")
        routing, choices = plan.routing, 1
        rows = dispatch_op.bind(x, plan.packed_token_idx, plan.pairs_by_token, implementation=implementation)
    else:
        routing = checkpoint_name(tables.align(ids, num_experts, block_size, True, implementation), "moe_router")
        rows, choices = x, ids.shape[-1]
    table = tuple(routing)
    how: dict[str, Any] = {"packed_rows": plan is not None, "precision": precision, "implementation": implementation}

    def bias_rows(bias: jax.Array | None) -> jax.Array | None:
        if bias is None:
            return None
        expert_of_row = ids.reshape(-1)
        if plan:
            expert_of_row = tables.expert_of_row.bind(plan.packed_token_idx, plan.expert_offsets, implementation=None)
        return dispatch_op.bind(bias, expert_of_row, None, implementation=implementation)

    # The gradient keeps the product, and computes the activation's many float32 intermediates again from it.
    @jax.checkpoint
    def activate(rows: jax.Array, bias: jax.Array | None) -> jax.Array:
        gate, up = jnp.split(_plus(rows, bias), 2, axis=-1)
        hidden = act(gate, up)
        if jnp.shape(hidden) != gate.shape:
            raise ValueError(f"{_OP}: activation must give an array of shape {gate.shape}; got {jnp.shape(hidden)}")
        return hidden.astype(x.dtype)

    if b_gate_up is None and not callable(activation):
        rows = product(rows, w_gate_up, *table, top_k=choices, activation=activation, dtype=x.dtype.name, **how)
    else:
        dtype = unfinished(x.dtype.name)
        rows = product(rows, w_gate_up, *table, top_k=choices, activation=None, dtype=dtype, **how)
        rows = activate(checkpoint_name(rows, "moe_gate_up"), bias_rows(b_gate_up))
    rows = product(rows, w_down, *table, top_k=1, activation=None, dtype=x.dtype.name, **how)
    rows = checkpoint_name(rows, "moe_down")
    if b_down is not None:
        rows = _plus(rows, bias_rows(b_down)).astype(x.dtype)
    if plan:
        out = combine_op.bind(rows, plan.pairs_by_token, weights, unique_rows=True, implementation=implementation)
    else:
        weights = jnp.where((ids >= 0) & (ids < num_experts), weights, 0)
        out = weighted_sum_op.bind(rows.reshape(*ids.shape, x.shape[-1]), weights, implementation=implementation)
    return sharded_like(out.reshape(x_type.shape), x_type)


def _usual_flow(x: jax.Array, ids: jax.Array) -> str:
    """Pair ids if the tokens fit an L2 cache, else packed rows. Pair ids need a K >= 1: id p means token p // K."""
    few_bytes = isinstance(x.size, int) and x.size * x.dtype.itemsize <= _L2_BYTES  # a size may be symbolic
    return PAIR_IDS if few_bytes and ids.shape[-1] else PACKED


def _plus(rows: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Rows plus their biases, in float32."""
    return rows.astype(jnp.float32) + (0 if bias is None else bias.astype(jnp.float32))


def usual_block_size(num_pairs: int, num_experts: int) -> int:
    """The power of two in [16, 128] that holds the rows of an average expert; 64 if their number is symbolic."""
    if not isinstance(num_pairs, int):
        return 64
    average = -(-num_pairs // num_experts)
    return min(max(1 << (average - 1).bit_length() if average else 0, 16), 128)


def checked_layer(activation: Any, flow: Any, block_size: Any) -> Any:
    """Check the settings that can be checked without arrays. Return the activation as a function."""
    if not callable(activation) and activation not in list(ACTIVATIONS):  # a list, for values that cannot be hashed
        choices = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{_OP}: activation must be a function or one of {choices}; got {activation!r}")
    one_of(_OP, "flow", flow, (None, *FLOWS))
    if block_size is not None:
        as_int(_OP, "block_size", block_size)
    return activation if callable(activation) else ACTIVATIONS[activation]


def checked_arrays(
    op: str,
    top_k: Any,
    x: Any,
    router_logits: Any,
    router_output: Any,
    w_gate_up: Any,
    w_down: Any,
    b_gate_up: Any,
    b_down: Any,
) -> tuple[Any, ...]:
    """The arguments as arrays, each checked against the others. None stays None.

    Returns x, router_logits, (expert_ids, expert_weights) or None, and the matrices and biases.
    """
    if (router_logits is None) == (router_output is None):
        got = "neither" if router_logits is None else "both"
        raise ValueError(f"{op}: give one of router_logits (with top_k) and router_output; got {got}")
    ids, weights = (None, None) if router_output is None else as_pair(op, router_output)
    x, logits, ids, weights = checked(op, _TOKENS, x, router_logits, ids, weights)
    w_gate_up, w_down, b_gate_up, b_down = checked(op, _MATRICES, w_gate_up, w_down, b_gate_up, b_down)
    shape = w_gate_up.shape
    if len(shape) != 3:
        raise ValueError(f"{op}: w_gate_up must be [E, H, 2F], without leading axes; got shape {shape}")
    if not shape[0]:
        raise ValueError(f"{op}: w_gate_up must hold at least one expert, E >= 1; got shape {shape}")
    if shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: w_gate_up must have {x.shape[-1]} entries along axis 1, H of x; got shape {shape}")
    if shape[2] != 2 * w_down.shape[1]:
        raise ValueError(
            f"{op}: w_gate_up must have {2 * w_down.shape[1]} entries along axis 2, 2F of w_down; got shape {shape}"
        )
    if logits is not None and logits.shape[-1] != shape[0]:
        raise ValueError(
            f"{op}: router_logits must have {shape[0]} entries along axis -1, E of w_gate_up; got shape {logits.shape}"
        )
    if w_gate_up.dtype != x.dtype:
        raise TypeError(f"{op}: w_gate_up must have the dtype of x, {x.dtype}; got {w_gate_up.dtype}")
    name, other = ("router_output", ids) if logits is None else ("router_logits", logits)
    if other.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: {name} must have the axes {x.shape[:-1]} of x before its last; got shape {other.shape}"
        )
    if ids is None:
        if top_k is None:
            raise TypeError(f"{op}: top_k must be an int with router_logits; got None")
        return x, logits, None, w_gate_up, w_down, b_gate_up, b_down
    if ids.shape != weights.shape:
        raise ValueError(
            f"{op}: router_output must hold ids and weights of one shape; got {ids.shape} and {weights.shape}"
        )
    if top_k is not None and as_int(op, "top_k", top_k, 0) != ids.shape[-1]:
        raise ValueError(f"{op}: top_k must be that of router_output, {ids.shape[-1]}; got {top_k}")
    return x, logits, (ids, weights), w_gate_up, w_down, b_gate_up, b_down


_TOKENS = parse("x: rows[T,H], router_logits?: logits[T,E], expert_ids?: ids[T,K], expert_weights?: weights[T,K]")
_MATRICES = parse("w_gate_up: rows[E,H,G], w_down: rows[E,F,H], b_gate_up?: rows[E,G], b_down?: rows[E,H]")
