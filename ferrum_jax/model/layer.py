"""`moe_mlp`: the whole layer, from tokens and router logits to output, on one device or on all of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..core.settings import one_of
from ..core.types import MoESharding, RouterOutput
from ..kernels import IMPLEMENTATIONS
from ..ops.grouped import as_activations, as_precision
from ..ops.grouped_ops import Matrices
from .arguments import checked_exchange, checked_experts, checked_settings, checked_tokens
from .divided import divided_layer, division_of
from .local import Settings, local_layer

_OP = "moe_mlp"  # the name in errors


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
    activations: str | None = None,
    implementation: str | None = None,
    sharding: MoESharding | None = None,
    exchange: str | None = None,
    capacity: int | None = None,
    chunks: int = 1,
    return_dropped: bool = False,
) -> Any:
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

    On a mesh the layer runs in a `jax.shard_map` that it opens: in an Explicit mesh as the arrays are sharded, and in
    any mesh as `sharding` says. x decides: the routing is brought to its tokens' devices, and the result is sharded as
    x is. A mesh axis over E of the matrices divides the experts. With one that divides tokens too, tokens are exchanged
    as in `parallel.moe_mlp`; with another one each device computes its own experts, and results are added up. One over
    F divides each expert, at the cost of one sum; one array w_gate_up is then exchanged in each call, and a pair is
    not. H of the matrices, or F over an axis that divides tokens, is a way to store them: they are gathered before use,
    again for the gradient, and their gradients are scattered. Without either, XLA divides the ops, and may gather all
    tokens.

    Args:
      x: [..., T, H] float16, bfloat16 or float32. Leading axes are more tokens: the matrices serve all.
      router_logits: [..., T, E] float16, bfloat16 or float32, for `route_topk_softmax`; None with `router_output`.
      w_gate_up: [E, H, 2F] of x's dtype, gate then up. Or a pair (w_gate, w_up) of [E, H, F], which is not
        concatenated. Instead of an array, here and below, a `LayerOf` reads it in place out of a stack of layers.
        Matrices may also be `QuantizedMatrices`, whatever x's dtype, which have no gradient.
      w_down: [E, F, H] of x's dtype, or quantised.
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
      activations: "float8_e4m3fn": rows are rounded to fp8 before both products, as in `grouped_matmul`; for
        `QuantizedMatrices` of "fp8" alone. Where F is divided, each device rounds its part.
      implementation: None, "xla" or "triton", of each op; Pallas has no kernel of tables, and None takes its products
        where they were measured faster.
      sharding: which axes of the mesh around the call (`jax.set_mesh`) divide the layer. None: as said above.
      exchange, capacity, chunks: where tokens are exchanged, as in `parallel.moe_mlp`; elsewhere of no effect.
      return_dropped: also return how many pairs were dropped for lack of capacity.

    Returns:
      [..., T, H] in x's dtype. With `return_dropped`, (this, dropped): an int32 scalar, of all devices together.

    Raises:
      TypeError: an argument of another dtype, a size that is no int, a bool that is none, a pair of one array and one
        `LayerOf`, biases in another form than the matrices.
      ValueError: ranks or shapes that do not fit, sizes out of range, both or neither of `router_logits` and
        `router_output`, an unknown `activation`, `flow`, `precision`, `activations` or `implementation`,
        `activations` without "fp8" matrices, `sharding` without a mesh or over axes that it lacks, sizes or blocks of
        `QuantizedMatrices` that the mesh axes do not divide, an unknown `exchange`, a `capacity` < 1 or
        without `return_dropped`, `chunks` that do not divide a device's tokens.
      NotImplementedError: the implementation asked for cannot run here; the message says why.

    The layer is that of Shazeer et al., https://arxiv.org/abs/1701.06538, dropless as in MegaBlocks,
    https://arxiv.org/abs/2211.15841, with the gated units of https://arxiv.org/abs/2002.05202.

    >>> import jax.numpy as jnp
    >>> x, logits = jnp.ones((5, 4)), jnp.arange(15.0).reshape(5, 3)
    >>> moe_mlp(x, logits, jnp.ones((3, 4, 12)), jnp.ones((3, 6, 4)), top_k=2).shape
    (5, 4)
    """
    checked_settings(_OP, activation, flow, block_size)
    one_of(_OP, "implementation", implementation, (None, *IMPLEMENTATIONS))
    experts = checked_experts(_OP, w_gate_up, w_down, b_gate_up, b_down, interleaved, transpose_rhs)
    x, logits, routed = checked_tokens(_OP, experts, top_k, x, router_logits, router_output)
    precision = as_precision(_OP, precision, x.dtype)
    activations = as_activations(_OP, activations, *experts.gate_up, experts.down)
    settings = Settings(
        _OP, top_k, norm_topk_prob, activation, flow, block_size, precision, activations, implementation
    )
    how = checked_exchange(_OP, exchange, capacity, chunks, return_dropped)
    division = division_of(_OP, sharding, x, (logits, routed), experts)
    dropped = jnp.zeros((), jnp.int32)
    if division is None or not isinstance(x.size, int):  # JAX cannot export a shard_map of a symbolic number of tokens
        out = local_layer(x, logits, routed, experts, settings)
    elif not x.size:  # collectives refuse empty arrays
        out = jnp.zeros_like(x)
    else:
        out, dropped = divided_layer(division, x, logits, routed, experts, settings, how)
    return (out, dropped) if return_dropped else out


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
