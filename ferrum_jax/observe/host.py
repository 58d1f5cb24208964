"""Between device and host: routing read back, and tables made on the host."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from ..core.settings import as_int
from ..core.types import MoeRouting
from ..ops.routing import route_topk_softmax
from .check import as_integers, distinct_rule, entry_rules, first_wrong


def route_topk_into_host(
    logits: jax.Array, top_k: int, *, norm_topk_prob: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Run `route_topk_softmax` and read its results back; when this returns, the host has them.

    Args:
      logits: [..., E] float16, bfloat16 or float32, on any device, in any sharding whose devices this process sees.
      top_k: K, experts per token, in [1, E].
      norm_topk_prob: divide the chosen probabilities by their sum.

    Returns:
      (expert_ids[..., K] uint32, expert_weights[..., K] float32), NumPy arrays that the caller may write to.

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
    """Check block-aligned tables made on the host, and put them on a device as int32.

    It always checks that every block has S / B slots (`block_size` if that is given); that slots are in [0, 2^31); that
    the total is a multiple of the block size in [0, S]; and that blocks before the total have owners >= 0, and blocks
    past it -1. With `num_experts`, owners must be in [0, E). With `num_pairs`, slots must be in [0, P], slots past the
    total must hold P, and no value below P may stand in two slots. Blocks may come in any order.

    Args:
      sorted_token_ids: [S], any integers: packed rows or pair ids; P at padding and in the tail.
      block_ids: [B], any integers: the expert that owns each block; -1 past the live blocks.
      total_tokens_post_pad: slots in live blocks, a scalar or of length 1.
      num_pairs, num_experts, block_size: P, E and the slots in a block, if they are to be checked.
      device: a `jax.Device` or a `jax.sharding.Sharding`; default: JAX's default device. The total is replicated.

    Returns:
      MoeRouting of device arrays: sorted_token_ids[S], block_ids[B], total_tokens_post_pad[]. It knows its block size,
      and E if that is given.

    Raises:
      TypeError: an argument that is no host array of integers; a size that is no int.
      ValueError: a check that failed, with the entry's index and value.

    The Ferrum engine's `upload_moe_routing`; its tables are those of `moe_align_block_size`.

    >>> upload_moe_routing([0, 4, 1, 2, 3, 4], [0, 1, 2], 6, num_pairs=4, num_experts=3).block_ids.tolist()
    [0, 1, 2]
    """
    op = "upload_moe_routing"
    slots = as_integers(op, "sorted_token_ids", sorted_token_ids, host=True)
    blocks = as_integers(op, "block_ids", block_ids, host=True)
    total = as_integers(op, "total_tokens_post_pad", total_tokens_post_pad, host=True)
    num_pairs = None if num_pairs is None else as_int(op, "num_pairs", num_pairs, 0)
    num_experts = None if num_experts is None else as_int(op, "num_experts", num_experts)
    block_size = _block_size(op, slots, blocks, total, block_size)
    total, value = total.reshape(()), "packed row or pair id"
    rules = list(entry_rules(np, slots, blocks, total, num_experts, num_pairs, block_size, value))
    if num_pairs is not None:
        rules.append(distinct_rule(np, slots, num_pairs, value))
    for rule in rules:
        if not np.all(rule[1]):
            sentence, values = first_wrong(np, rule)
            raise ValueError(f"{op}: {sentence.format(*values)}")

    def put(array: np.ndarray, where: Any) -> jax.Array:
        return jax.device_put(array.astype(np.int32), where)

    whole = NamedSharding(device.mesh, PartitionSpec()) if isinstance(device, NamedSharding) else device
    facts: dict[str, Any] = {"num_experts": num_experts, "block_size": block_size}
    return MoeRouting(put(slots, device), put(blocks, device), put(total, whole), **facts)


def _block_size(op: str, slots: np.ndarray, blocks: np.ndarray, total: np.ndarray, given: int | None) -> int:
    """The number of slots in a block; or the ValueError that says which shapes do not fit."""
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
    if given is None:
        return size
    given = as_int(op, "block_size", given)
    if slots.size != blocks.size * given:
        raise ValueError(
            f"{op}: sorted_token_ids must hold {blocks.size} blocks of block_size {given}, "
            f"{blocks.size * given} slots; got {slots.size}"
        )
    return given
