"""How a routing loads the experts, in numbers and in words."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from ..core.settings import INT32_MAX, as_int
from ..core.types import RouterOutput
from ..ops.losses import expert_counts
from ..ops.routing import as_pair


class RoutingStats(NamedTuple):
    """What `routing_stats` returns, a pytree; `...` are the leading axes of the expert ids.

    tokens_per_expert[..., E] int32: the number of pairs that chose each expert.
    load_imbalance[...] float32: the busiest expert's pairs / the mean of all E; 1 means an even load, E means that one
      expert has all of it.
    entropy[...] float32: the entropy of the experts' shares of the load, in nats; log(E) means an even load, 0 means
      that one expert has all of it.
    unused_experts[...] int32: the number of experts without a pair.
    pairs_without_expert[...] int32: the number of pairs whose id is outside [0, E).
    padding_waste[...] float32: the share of the slots in live blocks that hold no pair.
    block_size[] int32: the block size that `padding_waste` was computed for.

    Without any pair, load_imbalance is 1, entropy and padding_waste are 0.
    """

    tokens_per_expert: jax.Array
    load_imbalance: jax.Array
    entropy: jax.Array
    unused_experts: jax.Array
    pairs_without_expert: jax.Array
    padding_waste: jax.Array
    block_size: jax.Array

    def summary(self) -> str:
        """The numbers in words, a paragraph for each slice. It needs values, so call it outside jit.

        >>> import jax.numpy as jnp
        >>> ids = jnp.array([[0, 1], [0, 2], [0, -1]])
        >>> print(routing_stats(RouterOutput(ids, jnp.ones((3, 2))), 4, block_size=4).summary())
        5 pairs on 4 experts, 1.2 an expert.
        The busiest, expert 0, has 3: 2.40 times the mean. 1 expert is unused.
        Entropy 0.95 nats of 1.39: as if 2.6 experts shared the load evenly.
        Blocks of 4: 12 slots, of which 58.3% are padding.
        1 pair has no expert.
        """
        lead = np.shape(self.load_imbalance)
        slices = [
            RoutingStats._make([*(np.asarray(x)[i] for x in self[:-1]), self.block_size]) for i in np.ndindex(lead)
        ]
        if not lead:
            return slices[0]._words()
        return "\n\n".join(f"{list(i)}: {s._words()}" for i, s in zip(np.ndindex(lead), slices, strict=True))

    def _words(self) -> str:
        load, size = np.asarray(self.tokens_per_expert), int(np.ravel(self.block_size)[0])  # under vmap it has axes
        pairs, experts = int(load.sum()), load.size
        lines = [f"{_count(pairs, 'pair')} on {_count(experts, 'expert')}, {pairs / experts:.1f} an expert."]
        if pairs:
            unused = int(self.unused_experts)
            busiest = int(np.argmax(load))
            lines += [
                f"The busiest, expert {busiest}, has {load[busiest]}: {float(self.load_imbalance):.2f} times the mean. "
                f"{_count(unused, 'expert')} {'is' if unused == 1 else 'are'} unused.",
                f"Entropy {float(self.entropy):.2f} nats of {math.log(experts):.2f}: as if "
                f"{math.exp(float(self.entropy)):.1f} experts shared the load evenly.",
                f"Blocks of {size}: {int(np.sum(-(-load // size))) * size} slots, of which "
                f"{float(self.padding_waste):.1%} are padding.",
            ]
        strays = int(self.pairs_without_expert)
        lines += [f"{_count(strays, 'pair')} {'has' if strays == 1 else 'have'} no expert."] if strays else []
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


export.register_namedtuple_serialization(RoutingStats, serialized_name="ferrum_jax.RoutingStats")


def routing_stats(router_output: RouterOutput, num_experts: int, *, block_size: int = 64) -> RoutingStats:
    """How evenly a routing loads the experts, and what that costs in padded rows. Works under jit and vmap.

    Args:
      router_output: expert_ids[..., T, K] of any integer dtype, and weights, which are ignored. Each slice of the
        leading axes (layers, steps) has statistics of its own.
      num_experts: E, >= 1.
      block_size: slots in a block, >= 1, for the padding.

    Returns:
      RoutingStats; its `summary()` puts them in words.

    Raises:
      TypeError: `router_output` is not a pair of arrays, expert ids are not integers, or a size is not an int.
      ValueError: fewer than two axes, a size < 1.

    Entropy is Shannon's; load imbalance is the maximum over the mean, as Switch Transformers count their capacity
    factor, https://arxiv.org/abs/2101.03961.

    >>> import jax.numpy as jnp
    >>> stats = routing_stats(RouterOutput(jnp.array([[0, 1], [0, 2]]), jnp.ones((2, 2))), 4, block_size=2)
    >>> stats.tokens_per_expert.tolist(), float(stats.load_imbalance), int(stats.unused_experts)
    ([2, 1, 1, 0], 2.0, 1)
    """
    op = "routing_stats"
    num_experts = as_int(op, "num_experts", num_experts, most=INT32_MAX - 1)
    block_size = as_int(op, "block_size", block_size)
    ids, _ = as_pair(op, router_output)
    load = expert_counts(ids, num_experts)
    pairs = jnp.sum(load, axis=-1, dtype=jnp.int32)
    # There may be more slots than int32 can count. Only a share is computed from them, so float32 is precise enough.
    slots = jnp.sum((-(-load // block_size)).astype(jnp.float32), axis=-1) * block_size
    wide = pairs.astype(jnp.float32)
    some, least = pairs > 0, jnp.maximum(wide, 1)
    share = load.astype(jnp.float32) / least[..., None]
    return RoutingStats(
        load,
        jnp.where(some, jnp.max(share, axis=-1) * num_experts, 1),
        jnp.sum(jax.scipy.special.entr(share), axis=-1),
        jnp.sum(load == 0, axis=-1, dtype=jnp.int32),
        jnp.int32(math.prod(jnp.shape(ids)[-2:])) - pairs,
        jnp.where(some, 1 - wide / jnp.maximum(slots, 1), 0),
        jnp.asarray(block_size, jnp.int32),
    )
