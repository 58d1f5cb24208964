"""The layer whose experts are spread over mesh axes, of checked arguments, inside `jax.shard_map`.

JAX's own collectives carry the rows. Each device runs the layer on its own experts; a pair (token, choice) of another
device's expert has the id -1 there. There are three exchanges. "gather": every device gets all tokens. "ragged" and
"padded": each pair goes to the device of its expert. "ragged" packs these rows without gaps; "padded" puts them into a
fixed number of slots for each sender.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from ..core.settings import as_int
from ..core.sharding import equally_varying, in_auto_mesh, sharded_like, tokens_of
from ..ops.combine import moe_combine, moe_dispatch
from ..ops.table_sizes import usual_block_size
from ..ops.tables import moe_build_pairs_by_token
from .arguments import Exchange, Experts
from .exchange import ExchangeSizes, exchange_sizes
from .exchanged_rows import bounds_of, experts_of_rows, packed_rows_of, slotted_rows_of
from .local import Settings, local_layer, routing_of

# Up to so many bytes "gather" is cheapest: starting one more collective takes longer than carrying the bytes.
_FEW_BYTES = 2**22

# Between the GPUs of one host XLA copies each slice of a ragged exchange by one block of threads. So a device cuts what
# it sends into many slices, SLICES in all. Between hosts each slice is a message, so there is one for each receiver.
# More devices than ONE_HOST are taken to be on several hosts.
SLICES = 1024
ONE_HOST = 8


def exchanged_layer(
    x: jax.Array,
    logits: jax.Array | None,
    routed: Any,
    experts: Experts,
    settings: Settings,
    how: Exchange,
    *,
    axis_name: Any,
) -> tuple[jax.Array, jax.Array]:
    """The layer of checked arguments, and how many pairs of this device's tokens were dropped."""
    distinct = routed is None
    if logits is not None:
        routed = routing_of(logits, settings)
    x_type = jax.typeof(x)
    tokens = [tokens_of(a, whole=True) for a in (x, *routed)]
    *tokens, _ = equally_varying([*tokens, lax.axis_index(axis_name)])
    number = tokens[0].shape[0]
    if number % how.chunks:
        raise ValueError(f"{settings.op}: chunks must divide the {number} tokens of a device; got {how.chunks}")

    def layer(x: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _one_exchange(x, ids, weights, distinct, experts, settings, how, axis_name)

    if how.chunks == 1 or not number:
        out, dropped = layer(*tokens)
    else:
        # A part waits for the last but one: while one is computed, the rows of the next can travel. Each is computed
        # again for its gradient. So a GPU holds the rows of two parts at a time; XLA drops the barrier on a CPU.
        parts = list(zip(*[jnp.split(a, how.chunks) for a in tokens], strict=True))
        done: list[Any] = []
        for x, ids, weights in parts:
            if len(done) > 1:
                (out, count), x = lax.optimization_barrier((done[-2], x))
                done[-2] = out, count
            done.append(jax.checkpoint(layer)(x, ids, weights))
        outs, counts = zip(*done, strict=True)
        out, dropped = jnp.concatenate(outs), jnp.sum(jnp.stack(counts), dtype=jnp.int32)
    return sharded_like(out.reshape(x_type.shape), x_type), dropped


def _one_exchange(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    distinct: bool,
    experts: Experts,
    settings: Settings,
    how: Exchange,
    axis_name: Any,
) -> tuple[jax.Array, jax.Array]:
    """One exchange of these tokens: their results, and how many of their pairs were dropped."""
    devices, held = lax.axis_size(axis_name), experts.number
    if settings.block_size is None:
        settings = settings._replace(block_size=usual_block_size(ids.size, held))

    def local(rows: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        return local_layer(rows, None, (ids, weights), experts, settings)

    if ids.size == 0:  # collectives refuse empty arrays
        return local(x, ids, weights), _count(ids >= 0)
    if how.by == "gather" or (how.by is None and _gather_is_cheaper(x, ids.shape[-1], devices)):
        out = _gathered(local, axis_name, axis_name, x, ids, weights, held)
        return out, _count(jnp.zeros_like(ids) > 0)  # none, a number that varies over the same mesh axes as the pairs
    most = min(ids.shape[-1], held) if distinct else ids.shape[-1]  # pairs of a token that one device can get
    rows = as_int(settings.op, "rows", devices * x.shape[0] * most, 0)
    if how.capacity is not None:
        rows = min(rows, -(-how.capacity // (how.chunks * devices)) * devices)
    return _exchanged(local, settings, axis_name, how.by, x, ids, weights, held, rows)


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
    settings: Settings,
    axis_name: Any,
    exchange: str | None,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    experts: int,
    rows: int,
) -> tuple[jax.Array, jax.Array]:
    implementation = settings.implementation
    devices = lax.axis_size(axis_name)
    num_experts = as_int(settings.op, "E", devices * experts)
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
