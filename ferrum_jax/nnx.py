"""The layer as a Flax NNX module: see `ferrum_jax.nnx.MoE`."""

from .model.nnx import (
    ExpertCounts as ExpertCounts,
)
from .model.nnx import (
    LoadBalancingLoss as LoadBalancingLoss,
)
from .model.nnx import (
    MoE as MoE,
)
from .model.nnx import (
    RouterZLoss as RouterZLoss,
)
from .model.nnx import (
    ScoreBias as ScoreBias,
)
