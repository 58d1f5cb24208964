"""The arguments of `jax.lax.ragged_all_to_all` for an exchange of rows with the devices of their experts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.settings import INT32_MAX, as_int
from ..core.signature import checked
from .exchanged_rows import bounds_of, packed_rows_of

EXCHANGES = ("gather", "padded", "ragged")


class ExchangeSizes(NamedTuple):
    """What `jax.lax.ragged_all_to_all` takes after its two buffers, [devices * parts] int32 each."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


def exchange_sizes(
    expert_offsets: jax.Array, device: int | jax.Array, *, capacity: int | None = None, parts: int = 1
) -> tuple[ExchangeSizes, ExchangeSizes]:
    """Sizes and offsets for `jax.lax.ragged_all_to_all`, which sends packed rows to their experts' devices and back.

    Device d owns experts d*E/D to (d+1)*E/D - 1. So of a sender's packed rows (those of `moe_build_pairs_by_token` with
    all E experts) it gets one slice. It keeps the slices of all senders one after another:

        rows = lax.ragged_all_to_all(packed, jnp.zeros((capacity, H)), *there, axis_name=name)
        packed = lax.ragged_all_to_all(rows, jnp.zeros((P, H)), *back, axis_name=name)

    These hold on every device, whatever the offsets are. What the device sends are disjoint slices between its
    expert_offsets[0] and expert_offsets[E]. What it takes in fills rows 0 to sum(recv_sizes) - 1 <= capacity - 1
    without gaps or overlaps, in the order of the senders. Each sender's send_sizes are the receivers' recv_sizes.
    `back` is `there` with the buffers' roles exchanged.

    Rows past `capacity` are not sent: first those of later senders, and of one sender those of later experts. Device s
    keeps (the rows of its expert_offsets) - sum(there.send_sizes on s) of them.

    Args:
      expert_offsets: [D, E+1] of any integer dtype: every device's, as `jax.lax.all_gather` gives them.
      device: the caller's index among the D, as `jax.lax.axis_index` gives it.
      capacity: the most rows that a device takes in, >= 0; None: as many as come.
      parts: into how many slices of even size a device cuts the rows that it sends to another one, >= 1. Between the
        GPUs of one host XLA copies each slice by a single thread block, so many slices are many times faster. Between
        hosts each slice is one more message.

    Returns:
      (there, back): an ExchangeSizes for each way, int32.

    Raises:
      TypeError: expert_offsets of a dtype that is no integer, a `capacity` or `parts` that is no int.
      ValueError: expert_offsets of another rank, E no multiple of D, `capacity` < 0, `parts` < 1.

    >>> import jax.numpy as jnp
    >>> there, _ = exchange_sizes(jnp.array([[0, 1, 3], [0, 2, 5]]), 1)
    >>> there.input_offsets.tolist(), there.send_sizes.tolist()
    ([0, 2], [2, 3])
    >>> there.output_offsets.tolist(), there.recv_sizes.tolist()
    ([1, 2], [2, 3])
    """
    op = "exchange_sizes"
    (offsets,) = checked(op, "expert_offsets: ids[D,E]", expert_offsets)
    shape = offsets.shape
    if len(shape) != 2 or not shape[0] or shape[1] < 2 or (shape[1] - 1) % shape[0]:
        raise ValueError(f"{op}: expert_offsets must be [D, E+1] with E a multiple of D, both >= 1; got shape {shape}")
    bounds = bounds_of(offsets)
    rows = INT32_MAX if capacity is None else as_int(op, "capacity", capacity, 0)
    parts = as_int(op, "parts", parts)
    start, size = packed_rows_of(jnp.diff(bounds), rows)

    def cut(read: jax.Array, sent: jax.Array, put: jax.Array, received: jax.Array) -> ExchangeSizes:
        (begin, sent), (_, received) = _cut(sent, parts), _cut(received, parts)
        return ExchangeSizes(*(a.reshape(-1) for a in (read[:, None] + begin, sent, put[:, None] + begin, received)))

    there = cut(bounds[device, :-1], size[device], start[device], size[:, device])
    back = cut(start[:, device], size[:, device], bounds[:, device], size[device])
    return there, back


def _cut(size: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Cut each slice into parts: where each part begins, and its size, both [D, parts]."""
    part = jnp.arange(parts, dtype=jnp.int32)[None]
    each, more = (size // parts)[:, None], (size % parts)[:, None]
    return each * part + jnp.minimum(part, more), each + (part < more).astype(jnp.int32)
