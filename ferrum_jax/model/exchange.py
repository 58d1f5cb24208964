"""Who sends which rows to whom, when each device holds some of the experts: offsets and sizes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core.signature import INT32_MAX, as_int, checked


class ExchangeSizes(NamedTuple):
    """What `jax.lax.ragged_all_to_all` takes after its two buffers, [devices * parts] int32 each."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


def exchange_sizes(
    expert_offsets: jax.Array, device: int | jax.Array, *, capacity: int | None = None, parts: int = 1
) -> tuple[ExchangeSizes, ExchangeSizes]:
    """Sizes and offsets for `jax.lax.ragged_all_to_all`: of packed rows to the experts' devices, and of the way back.

    Device d owns experts d*E/D to (d+1)*E/D - 1, so what it gets of a sender's packed rows (those of
    `moe_build_pairs_by_token` with all E experts) is one slice. It keeps the slices of its senders one after another:

        rows = lax.ragged_all_to_all(packed, jnp.zeros((capacity, H)), *there, axis_name=name)
        packed = lax.ragged_all_to_all(rows, jnp.zeros((P, H)), *back, axis_name=name)

    Kept on every device, whatever the offsets: what it sends lies in its expert_offsets[0] to expert_offsets[E], in
    disjoint slices; what it takes in fills rows 0 to sum(recv_sizes) - 1 <= capacity - 1 without gaps or overlaps, in
    the senders' order; each sender's send_sizes are the receivers' recv_sizes. `back` is `there` with the buffers'
    roles changed. Past `capacity`, rows stay where they are: those of later senders first, and of one sender those of
    later experts. So what stays of device s is (the rows of its expert_offsets) - sum(there.send_sizes on s).

    Args:
      expert_offsets: [D, E+1] of any integer dtype: every device's, as `jax.lax.all_gather` gives them.
      device: the caller's index among the D, as `jax.lax.axis_index` gives it.
      capacity: rows that a device takes in, >= 0; None: as many as come.
      parts: even slices into which what one device sends another is cut, >= 1. Between the GPUs of one host XLA copies
        a slice by a single thread block, so that many are many times faster; between hosts each is one more message.

    Returns:
      (there, back), an ExchangeSizes each, int32.

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


def bounds_of(offsets: jax.Array) -> jax.Array:
    """[D, D+1]: entry [s, d] is where, in sender s's packed rows, the rows for device d begin; [s, D] is their end."""
    return offsets[:, :: max((offsets.shape[1] - 1) // offsets.shape[0], 1)]


def packed_rows_of(counts: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """[sender, device]: where the sender's rows begin in the device's buffer, and how many fit. There are no gaps."""
    end = jnp.cumsum(counts, axis=0, dtype=jnp.int32)
    start = jnp.minimum(end - counts, rows)
    return start, jnp.minimum(end, rows) - start


def slotted_rows_of(counts: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """The same, where each sender has an equal share of the buffer."""
    slots = rows // counts.shape[0]
    start = jnp.broadcast_to(jnp.arange(counts.shape[0], dtype=jnp.int32)[:, None] * slots, counts.shape)
    return start, jnp.minimum(counts, slots)


def experts_of_rows(ends: jax.Array, start: jax.Array, size: jax.Array, rows: int) -> jax.Array:
    """The expert of each row in a device's buffer; -1 where none is.

    ends[s, e]: rows of sender s up to and with those of expert e; they begin at start[s], and size[s] of them came.
    """
    ends = start[:, None] + jnp.minimum(ends, size[:, None])
    passed = _passed(ends.reshape(-1), rows)
    inside = _passed(start, rows) > _passed(start + size, rows)
    return jnp.where(inside, passed % ends.shape[1], -1)


def _passed(marks: jax.Array, rows: int) -> jax.Array:
    """How many marks each row has reached."""
    return jnp.cumsum(jnp.zeros(rows + 1, jnp.int32).at[marks].add(1, mode="drop"), dtype=jnp.int32)[:rows]
