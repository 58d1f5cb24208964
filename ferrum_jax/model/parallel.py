"""The layer over many devices: each holds some of the experts, and tokens travel to them and back.

It is called inside `jax.shard_map`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from ..core.types import RouterOutput
from ..ops.grouped import as_activations, as_precision
from ..ops.grouped_ops import Matrices
from .arguments import checked_exchange, checked_experts, checked_settings, checked_tokens
from .local import Settings
from .spread import exchanged_layer

_OP = "parallel.moe_mlp"


def moe_mlp(
    x: jax.Array,
    router_logits: jax.Array | None,
    w_gate_up: Matrices | tuple[Matrices, Matrices],
    w_down: Matrices,
    *,
    axis_name: str | Sequence[str],
    top_k: int | None = None,
    norm_topk_prob: bool = True,
    router_output: RouterOutput | None = None,
    exchange: str | None = None,
    capacity: int | None = None,
    chunks: int = 1,
    return_dropped: bool = False,
    block_size: int | None = None,
    precision: str | lax.Precision | None = None,
    activations: str | None = None,
    implementation: str | None = None,
    activation: str | Callable[[jax.Array, jax.Array], jax.Array] = "silu",
    flow: str | None = None,
    b_gate_up: Matrices | tuple[Matrices, Matrices] | None = None,
    b_down: Matrices | None = None,
    interleaved: bool = False,
    transpose_rhs: bool = False,
) -> Any:
    """`ferrum_jax.moe_mlp` with experts spread over a mesh axis: called inside `jax.shard_map`, on each device's part.

    Each of the D devices along the axis holds T tokens and E/D experts: device d owns experts d*E/D to (d+1)*E/D - 1.
    The result is that of the unsharded layer for this device's tokens. Gradients are exact, also through the exchange
    (with shard_map's check_vma, its default). Nothing is dropped unless a `capacity` is given.

    Args:
      x: [..., T, H] float16, bfloat16 or float32: this device's tokens.
      router_logits: [..., T, E], over the experts of all devices; None with `router_output`.
      w_gate_up: [E/D, H, 2F] of x's dtype: this device's experts.
      w_down: [E/D, F, H] of x's dtype.
      axis_name: the mesh axis, or several, over which experts are spread.
      top_k, norm_topk_prob: as in `ferrum_jax.moe_mlp`.
      router_output: ids over the experts of all devices. An id outside [0, E) is no expert, so a device may leave out
        some or all of its tokens.
      exchange: "gather": all-gather the tokens, compute this device's experts, reduce-scatter the results in float32.
        "ragged": `jax.lax.ragged_all_to_all` of one row per pair that has an expert, there and back; GPUs have it,
        XLA:CPU does not. "padded": `jax.lax.all_to_all` of a fixed number of slots for every two devices. None:
        "gather" if it moves few bytes, or fewer than the pairs' rows have (decode, few devices). Else "ragged" on
        NVIDIA GPUs and "padded" elsewhere, which is decided at lowering.
      capacity: the most rows that a device takes in, rounded up to a multiple of D and limited to the worst case.
        "padded" shares them evenly among the senders. A pair whose row does not fit adds nothing, as if it had no
        expert, and is counted: pass `return_dropped=True`. None: the worst case, T*D*min(K, E/D) rows (T*D*K with
        `router_output`, which may name an expert twice). "gather" sends no such rows, and drops nothing.
      chunks: into how many equal parts, one after the other, a device's tokens are cut, each with an exchange of its
        own and its share of `capacity`. On a GPU the rows of two parts are in memory at a time: those of one travel
        while those of the other are computed. Each part is computed again for its gradients, as `jax.checkpoint` does.
      return_dropped: also return how many pairs of this device's tokens were dropped, exactly.
      block_size: as in `ferrum_jax.moe_mlp`; None: for the rows of an average expert, as if routing were balanced.
      precision, activations: as in `ferrum_jax.moe_mlp`.
      implementation: None, "xla" or "triton", of each op; Pallas has no kernel of tables, and None takes its products
        where they were measured faster.
      activation, flow, interleaved, transpose_rhs: as in `ferrum_jax.moe_mlp`.
      b_gate_up, b_down: [E/D, 2F] and [E/D, H] of x's dtype: this device's experts. They and the matrices may have all
        the forms that they may have there. The stack of a `LayerOf` is [L, E/D, ...].

    Returns:
      [..., T, H] in x's dtype. With `return_dropped`, (this, dropped): an int32 scalar that varies over the axis, whose
      `jax.lax.psum` is the total.

    Raises:
      TypeError, ValueError, NotImplementedError: as `ferrum_jax.moe_mlp`; and TypeError for `return_dropped` that is no
        bool, ValueError for an `axis_name` that is no mapped axis around the call, E that is not D times the experts of
        a device, an unknown `exchange`, a `capacity` < 1 or without `return_dropped`, `chunks` that do not divide the
        tokens.

    Tokens may also be sharded over an Explicit axis of the mesh that is not manual here. They are gathered along it,
    and the result is sharded over it again.

    Under `jax.vmap`, JAX's ragged_all_to_all needs routing that is mapped too. With one routing for all slices, use
    another exchange.

    Expert parallelism is that of GShard, https://arxiv.org/abs/2006.16668, without its capacity as in MegaBlocks,
    https://arxiv.org/abs/2211.15841.

    >>> import functools, jax, jax.numpy as jnp, ferrum_jax
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh, layer = jax.make_mesh((1,), ("expert",)), ferrum_jax.parallel.moe_mlp
    >>> layer = jax.shard_map(functools.partial(layer, axis_name="expert", top_k=2), mesh=mesh, out_specs=P("expert"))
    >>> with jax.set_mesh(mesh):
    ...     args = jnp.ones((5, 4)), jnp.ones((5, 3)), jnp.ones((3, 4, 12)), jnp.ones((3, 6, 4))
    ...     layer(*(jax.device_put(a, P("expert")) for a in args)).shape
    (5, 4)
    """
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    devices = _axis_size(axis_name)
    how = checked_exchange(_OP, exchange, capacity, chunks, return_dropped)
    checked_settings(_OP, activation, flow, block_size)
    experts = checked_experts(_OP, w_gate_up, w_down, b_gate_up, b_down, interleaved, transpose_rhs)
    x, logits, routed = checked_tokens(_OP, experts, top_k, x, router_logits, router_output, devices)
    precision = as_precision(_OP, precision, x.dtype)
    activations = as_activations(_OP, activations, *experts.gate_up, experts.down)
    settings = Settings(
        _OP, top_k, norm_topk_prob, activation, flow, block_size, precision, activations, implementation
    )
    out, dropped = exchanged_layer(x, logits, routed, experts, settings, how, axis_name=axis_name)
    return (out, dropped) if return_dropped else out


def _axis_size(axis_name: Any) -> int:
    try:
        return lax.axis_size(axis_name)
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_OP}: axis_name must name an axis of a jax.shard_map around the call; got {axis_name!r}"
        ) from error
