"""The layer over many devices: each holds some of the experts, and tokens travel to them and back.

It is called inside `jax.shard_map`. JAX's own collectives carry the rows. Each device runs `ferrum_jax.moe_mlp` on its
own experts; a pair (token, choice) of another device's expert has the id -1 there. There are three exchanges. "gather":
every device gets all tokens. "ragged" and "padded": each pair goes to the device of its expert. "ragged" packs these
rows without gaps; "padded" puts them into a fixed number of slots for each sender.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from ..core.sharding import equally_varying, in_auto_mesh, sharded_like, tokens_of
from ..core.signature import as_bool, as_int, one_of
from ..core.types import RouterOutput
from ..ops.combine import moe_combine, moe_dispatch
from ..ops.grouped import as_precision
from ..ops.grouped_ops import Matrices
from ..ops.table_sizes import usual_block_size
from ..ops.tables import moe_build_pairs_by_token
from .arguments import Experts, checked_experts, checked_settings, checked_tokens
from .exchange import ExchangeSizes, bounds_of, exchange_sizes, experts_of_rows, packed_rows_of, slotted_rows_of
from .local import Settings, local_layer, routing_of

EXCHANGES = ("gather", "padded", "ragged")
_OP = "parallel.moe_mlp"

# Up to so many bytes "gather" is cheapest: starting one more collective takes longer than carrying the bytes.
_FEW_BYTES = 2**22

# Between the GPUs of one host XLA copies each slice of a ragged exchange by one block of threads. So a device cuts what
# it sends into many slices, SLICES in all. Between hosts each slice is a message, so there is one for each receiver.
# More devices than ONE_HOST are taken to be on several hosts.
SLICES = 1024
ONE_HOST = 8


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
    return_dropped: bool = False,
    block_size: int | None = None,
    precision: str | lax.Precision | None = None,
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
      return_dropped: also return how many pairs of this device's tokens were dropped, exactly.
      block_size: as in `ferrum_jax.moe_mlp`; None: for the rows of an average expert, as if routing were balanced.
      precision: as in `ferrum_jax.moe_mlp`.
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
        a device, an unknown `exchange`, a `capacity` < 1 or without `return_dropped`.

    Tokens may also be sharded over an Explicit axis of the mesh that is not manual here. They are gathered along it,
    and the result is sharded over it again.

    Under `jax.vmap`, JAX's ragged_all_to_all needs routing that is mapped too. With one routing for all slices, use
    another exchange.

    Expert parallelism is that of GShard, https://arxiv.org/abs/2006.16668, without its capacity as in MegaBlocks,
    https://arxiv.org/abs/2211.15841.

    >>> import jax, jax.numpy as jnp, ferrum_jax
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
    one_of(_OP, "exchange", exchange, (None, *EXCHANGES))
    return_dropped = as_bool(_OP, "return_dropped", return_dropped)
    if capacity is not None:
        capacity = as_int(_OP, "capacity", capacity)
        if not return_dropped:
            raise ValueError(f"{_OP}: capacity may drop pairs; pass return_dropped=True to get their count too")
    checked_settings(_OP, activation, flow, block_size)
    experts = checked_experts(_OP, w_gate_up, w_down, b_gate_up, b_down, interleaved, transpose_rhs)
    x, logits, routed = checked_tokens(_OP, experts, top_k, x, router_logits, router_output, devices)
    precision = as_precision(_OP, precision, x.dtype)
    settings = Settings(_OP, top_k, norm_topk_prob, activation, flow, block_size, precision, implementation)
    how = {"axis_name": axis_name, "exchange": exchange, "capacity": capacity}
    out, dropped = exchanged_layer(x, logits, routed, experts, settings, **how)
    return (out, dropped) if return_dropped else out


def exchanged_layer(
    x: jax.Array,
    logits: jax.Array | None,
    routed: Any,
    experts: Experts,
    settings: Settings,
    *,
    axis_name: Any,
    exchange: str | None = None,
    capacity: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The layer of checked arguments, and how many pairs of this device's tokens were dropped."""
    devices, distinct = lax.axis_size(axis_name), routed is None
    if logits is not None:
        routed = routing_of(logits, settings)
    ids, weights = routed
    x_type, held = jax.typeof(x), experts.number
    x, ids, weights = (tokens_of(a, whole=True) for a in (x, ids, weights))
    x, ids, weights, _ = equally_varying([x, ids, weights, lax.axis_index(axis_name)])
    if settings.block_size is None:
        settings = settings._replace(block_size=usual_block_size(ids.size, held))

    def local(rows: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        return local_layer(rows, None, (ids, weights), experts, settings)

    worst = as_int(_OP, "rows", devices * x.shape[0] * (min(ids.shape[-1], held) if distinct else ids.shape[-1]), 0)
    rows = worst if capacity is None else min(worst, -(-capacity // devices) * devices)
    if exchange is None and _gather_is_cheaper(x, ids.shape[-1], devices):
        exchange = "gather"
    if ids.size == 0:  # collectives refuse empty arrays
        out, dropped = local(x, ids, weights), _count(ids >= 0)
    elif exchange == "gather":
        out = _gathered(local, axis_name, axis_name, x, ids, weights, held)
        dropped = _count(jnp.zeros_like(ids) > 0)  # none, as a number that varies over the same mesh axes as the pairs
    else:
        out, dropped = _exchanged(local, axis_name, exchange, x, ids, weights, held, rows, settings.implementation)
    return sharded_like(out.reshape(x_type.shape), x_type), dropped


def gathered_layer(
    x: jax.Array, routed: Any, experts: Experts, settings: Settings, *, axis_name: Any, gathered: tuple[str, ...]
) -> jax.Array:
    """What this device's experts add to the tokens' results, where experts are spread over `axis_name`.

    gathered: those of the axes over which tokens are divided. The results are added up over these alone.
    """
    x_type = jax.typeof(x)
    x, ids, weights = map(tokens_of, (x, *routed))

    def local(rows: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        return local_layer(rows, None, (ids, weights), experts, settings)

    return _gathered(local, axis_name, gathered, x, ids, weights, experts.number).reshape(x_type.shape)


def _axis_size(axis_name: Any) -> int:
    try:
        return lax.axis_size(axis_name)
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_OP}: axis_name must name an axis of a jax.shard_map around the call; got {axis_name!r}"
        ) from error


def _gather_is_cheaper(x: jax.Array, top_k: int, devices: int) -> bool:
    """Compare the bytes that a device takes in, there and back, if routing is balanced."""
    item = x.dtype.itemsize
    gather = x.size * (devices - 1) * (item + 4)
    pairs = x.size * (devices - 1) * 2 * item * top_k // devices
    return gather <= max(_FEW_BYTES, pairs)


# ---- gather: all tokens to every device


def _gathered(
    local: Any, axis_name: Any, gathered: Any, x: jax.Array, ids: jax.Array, weights: jax.Array, experts: int
) -> jax.Array:
    """The results of this device's experts, added up over the axes `gathered`, along which the tokens are gathered."""
    gather, scatter = (
        _auto(functools.partial(collective, axis_name=gathered, tiled=True), jax.typeof(x).sharding.mesh)
        for collective in (lax.all_gather, lax.psum_scatter)
    )
    if gathered:
        x, ids, weights = map(gather, (x, ids, weights))
    dtype, first = x.dtype, lax.axis_index(axis_name) * experts
    mine = (ids >= first) & (ids < first + experts)
    part = local(x, jnp.where(mine, ids - first, -1), weights)
    return scatter(part.astype(jnp.float32)).astype(dtype) if gathered else part


def _auto(collective: Any, mesh: Any) -> Any:
    """The collective, run with Explicit axes as Auto. JAX lacks psum_scatter and all_gather's gradient for Explicit."""
    return in_auto_mesh(collective, mesh, PartitionSpec()) if AxisType.Explicit in mesh.axis_types else collective


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


# ---- ragged and padded: each pair's row to the device of its expert


class _Tables(NamedTuple):
    """Where this device's pairs go, and all devices' offsets."""

    ids: jax.Array  # [T, K], of all E experts
    pairs: jax.Array  # [T, K]: each pair's row in the packed order, or -1
    tokens: jax.Array  # [P]: each packed row's token
    offsets: jax.Array  # [D, E+1]: expert_offsets of every device


def _exchanged(
    local: Any,
    axis_name: Any,
    exchange: str | None,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    experts: int,
    rows: int,
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    devices = lax.axis_size(axis_name)
    num_experts = as_int(_OP, "E", devices * experts)
    pairs, tokens, offsets = moe_build_pairs_by_token(ids, num_experts, implementation=implementation)
    tables = _Tables(ids, pairs, tokens, lax.all_gather(offsets, axis_name))

    def by_exchange(step: Any, *args: Any) -> Any:
        step = functools.partial(step, axis_name=axis_name, rows=rows, implementation=implementation)
        ragged, padded = (functools.partial(step, name) for name in ("ragged", "padded"))
        if exchange:
            return (ragged if exchange == "ragged" else padded)(*args)
        # The platform is known only at lowering: trace both exchanges, and lower one.
        return lax.platform_dependent(*args, cuda=ragged, default=padded)

    received, local_ids, returned, dropped = by_exchange(_send, x, tables)
    done = local(received, local_ids[:, None], jnp.ones((rows, 1), jnp.float32))
    return by_exchange(_bring_back, done, weights, returned, tables.offsets), dropped


def _send(
    exchange: str, x: jax.Array, tables: _Tables, *, axis_name: Any, rows: int, implementation: str | None
) -> tuple[jax.Array, ...]:
    """Send this device's rows to their experts' devices, and receive the rows of its own experts.

    Returns the received rows [rows, H]; the local expert of each, or -1; for each pair of this device, the row that
    will hold its result among those that come back, or -1; and how many of the pairs were dropped.
    """
    ids, pairs, tokens, offsets = tables
    me, devices = lax.axis_index(axis_name), offsets.shape[0]
    experts = (offsets.shape[1] - 1) // devices
    bounds = bounds_of(offsets)
    start, size = (packed_rows_of if exchange == "ragged" else slotted_rows_of)(jnp.diff(bounds), rows)
    device = jnp.clip(ids // experts, 0, devices - 1)
    place = pairs - bounds[me][device]
    fits = (pairs >= 0) & (place < size[me][device])
    dispatch = functools.partial(moe_dispatch, implementation=implementation)
    if exchange == "ragged":
        there, _ = exchange_sizes(offsets, me, capacity=rows, parts=_parts(devices))
        packed = dispatch(x, tokens, pairs_by_token=pairs)
        received = _ragged(packed, rows, there, axis_name)
        returned = jnp.where(fits, pairs, -1)
    else:
        slots = rows // devices
        returned = jnp.where(fits, device * slots + place, -1)
        slot = jnp.arange(slots, dtype=jnp.int32)[None]
        token = tokens.at[bounds[me, :-1, None] + slot].get(mode="clip")
        token = jnp.where(slot < size[me][:, None], token, x.shape[0]).reshape(rows)
        received = lax.all_to_all(dispatch(x, token, pairs_by_token=returned), axis_name, 0, 0, tiled=True)
    ends = lax.dynamic_slice_in_dim(offsets, me * experts, experts + 1, axis=1)
    local_ids = experts_of_rows(ends[:, 1:] - ends[:, :1], start[:, me], size[:, me], rows)
    return received, local_ids, returned, _count((pairs >= 0) & ~fits)


def _bring_back(
    exchange: str,
    done: jax.Array,
    weights: jax.Array,
    returned: jax.Array,
    offsets: jax.Array,
    *,
    axis_name: Any,
    rows: int,
    implementation: str | None,
) -> jax.Array:
    """Send the results back to their pairs' devices, and add up those of each token."""
    if exchange == "ragged":
        parts = _parts(offsets.shape[0])
        _, back = exchange_sizes(offsets, lax.axis_index(axis_name), capacity=rows, parts=parts)
        done = _ragged(done, returned.size, back, axis_name)
    else:
        done = lax.all_to_all(done, axis_name, 0, 0, tiled=True)
    return moe_combine(done, returned, weights, unique_rows=True, implementation=implementation)


def _parts(devices: int) -> int:
    """Into how many slices a device cuts what it sends to another one."""
    return SLICES // devices if devices <= ONE_HOST else 1


def _ragged(packed: jax.Array, rows: int, sizes: ExchangeSizes, axis_name: Any) -> jax.Array:
    empty, packed = equally_varying([jnp.zeros((rows, packed.shape[1]), packed.dtype), packed])
    return lax.ragged_all_to_all(packed, empty, *sizes, axis_name=axis_name)
