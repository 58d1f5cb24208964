"""The variable types of the Flax NNX module: the score bias, and what a layer sows."""

from flax import nnx


class ScoreBias(nnx.Variable):
    """A bias that only takes part in the choice of experts. It is no `nnx.Param`, so no gradient trains it."""


class Quantized(nnx.Variable):
    """Quantised matrices of a layer. They are no `nnx.Param`, so no gradient and no optimiser touches them."""


class LoadBalancingLoss(nnx.Intermediate):
    """What `MoE` sows as `load_balancing_loss`: that function of its logits and choices, a float32 scalar."""


class RouterZLoss(nnx.Intermediate):
    """What `MoE` sows as `router_z_loss`: that function of its logits, a float32 scalar."""


class ExpertCounts(nnx.Intermediate):
    """What `MoE` sows as `expert_counts`: the pairs of each expert in this call, [E] int32."""


class DroppedPairs(nnx.Intermediate):
    """What `MoE` sows as `dropped_pairs`: the pairs that were dropped for lack of capacity, an int32 scalar."""
