"""Between device and host: routing read back, and tables made on the host."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from ..core.signature import INT32_MAX, as_int
from ..core.types import MoeRouting
from ..ops.routing import route_topk_softmax


def route_topk_into_host(
    logits: jax.Array, top_k: int, *, norm_topk_prob: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """`route_topk_softmax`, its results read back to the host: when this returns, they are there.

    Args:
      logits: [..., E] float16, bfloat16 or float32, on any device, in any sharding whose devices this process sees.
      top_k: K, experts per token, in [1, E].
      norm_topk_prob: divide the chosen probabilities by their sum.

    Returns:
      (expert_ids[..., K] uint32, expert_weights[..., K] float32), NumPy arrays of the caller's own.

    Raises:
      TypeError: called in a function that JAX traces (jit, vmap, grad, shard_map, ...); else as `route_topk_softmax`.
      ValueError: as `route_topk_softmax`.

    The Ferrum engine's `route_topk_into_host`, with one transfer for each result.

    >>> import numpy as np
    >>> ids, weights = route_topk_into_host(np.array([[1.0, 3.0, 2.0]], np.float32), 2)
    >>> ids, weights.dtype
    (array([[1, 2]], dtype=uint32), dtype('float32'))
    """
    results = route_topk_softmax(logits, top_k, norm_topk_prob=norm_topk_prob)
    if any(isinstance(x, Tracer) for x in (logits, *results)):
        raise TypeError(
            "route_topk_into_host: logits must be values, and the call must stand outside every function that JAX "
            "traces (jit, vmap, grad, shard_map, ...): the host gets no values there. Inside, use route_topk_softmax"
        )
    ids, weights = jax.device_get(tuple(results))
    return np.array(ids, np.uint32), np.array(weights)


def upload_moe_routing(
    sorted_token_ids: Any,
    block_ids: Any,
    total_tokens_post_pad: Any,
    *,
    num_pairs: int | None = None,
    num_experts: int | None = None,
    block_size: int | None = None,
    device: Any = None,
) -> MoeRouting:
    """Check block-aligned tables made on the host, and put them on a device: int32, whatever integers came.

    Always checked: block_size = S / B divides S, and is the one given; every slot is in [0, 2^31); the total is a
    multiple of block_size in [0, S]; the blocks before it have owners >= 0, the blocks past it -1. With `num_experts`:
    owners are in [0, E). With `num_pairs`: slots are in [0, P]; none past the total is live, and no value below P
    stands in two slots. Blocks may come in any order.

    Args:
      sorted_token_ids: [S], any integers: packed rows or pair ids; P at padding and in the tail.
      block_ids: [B], any integers: the expert that owns each block; -1 past the live blocks.
      total_tokens_post_pad: slots in live blocks, a scalar or of length 1.
      num_pairs, num_experts, block_size: P, E and the slots in a block, if they are to be checked.
      device: a `jax.Device` or a `jax.sharding.Sharding`; default: JAX's default device. The total is replicated.

    Returns:
      MoeRouting of device arrays: sorted_token_ids[S], block_ids[B], total_tokens_post_pad[].

    Raises:
      TypeError: an argument that is no host array of integers; a size that is no int.
      ValueError: a check that failed, with the entry's index and value.

    The Ferrum engine's `upload_moe_routing`; its tables are those of `moe_align_block_size`.

    >>> upload_moe_routing([0, 4, 1, 2, 3, 4], [0, 1, 2], 6, num_pairs=4, num_experts=3).block_ids.tolist()
    [0, 1, 2]
    """
    op = "upload_moe_routing"
    slots = _integers("sorted_token_ids", sorted_token_ids)
    blocks = _integers("block_ids", block_ids)
    total = _integers("total_tokens_post_pad", total_tokens_post_pad)
    for name, array in (("sorted_token_ids", slots), ("block_ids", blocks)):
        if array.ndim != 1:
            raise ValueError(f"{op}: {name} must have one axis; got shape {array.shape}")
    if total.shape not in ((), (1,)):
        raise ValueError(f"{op}: total_tokens_post_pad must be a scalar or of length 1; got shape {total.shape}")

    if slots.size % max(blocks.size, 1) or bool(slots.size) != bool(blocks.size):
        raise ValueError(
            f"{op}: sorted_token_ids must hold equally many slots, at least 1, for each of the {blocks.size} "
            f"block_ids; got {slots.size}"
        )
    size = slots.size // blocks.size if blocks.size else 1
    if block_size is not None:
        block_size = as_int(op, "block_size", block_size)
        if slots.size != blocks.size * block_size:
            raise ValueError(
                f"{op}: sorted_token_ids must hold {blocks.size} blocks of block_size {block_size}, "
                f"{blocks.size * block_size} slots; got {slots.size}"
            )
        size = block_size

    most = INT32_MAX if num_pairs is None else as_int(op, "num_pairs", num_pairs, 0)
    _refuse("sorted_token_ids", slots, (slots < 0) | (slots > most), f"in [0, {most}]")
    end = int(total.reshape(()))
    if not 0 <= end <= slots.size or end % size:
        raise ValueError(
            f"{op}: total_tokens_post_pad must be a multiple of block_size {size} in [0, {slots.size}]; got {end}"
        )
    live = end // size
    experts = INT32_MAX if num_experts is None else as_int(op, "num_experts", num_experts)
    index = np.arange(blocks.size)
    owned = (blocks >= 0) & (blocks < experts)
    _refuse("block_ids", blocks, (index < live) & ~owned, f"in [0, {experts}) in the {live} live blocks")
    _refuse("block_ids", blocks, (index >= live) & (blocks != -1), f"-1 past the {live} live blocks")
    if num_pairs is not None:
        place = np.arange(slots.size)
        tail = (place >= end) & (slots != most)
        _refuse("sorted_token_ids", slots, tail, f"{most}, num_pairs, past the {end} slots of live blocks")
        again = np.ones(slots.size, bool)
        again[np.unique(slots, return_index=True)[1]] = False
        _refuse("sorted_token_ids", slots, again & (slots != most), "distinct at live slots, and it has come before")

    put = lambda array, where: jax.device_put(array.astype(np.int32), where)  # noqa: E731
    whole = NamedSharding(device.mesh, PartitionSpec()) if isinstance(device, NamedSharding) else device
    return MoeRouting(put(slots, device), put(blocks, device), put(total.reshape(()), whole))


def _integers(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            f"upload_moe_routing: {name} must be a host array; got {type(values).__name__}: {error}"
        ) from error
    if array.size == 0 and not hasattr(values, "dtype"):
        array = array.astype(np.int32)  # NumPy calls an empty list float64
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"upload_moe_routing: {name} must hold integers; got {array.dtype}")
    return array


def _refuse(name: str, values: np.ndarray, wrong: np.ndarray, rule: str) -> None:
    """Raise if an entry is wrong, naming the first one."""
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(f"upload_moe_routing: {name}[{first}] must be {rule}; got {values[first]}")
