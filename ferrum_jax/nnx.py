"""The layer as a Flax NNX module, `ferrum_jax.nnx.MoE`, and `scan_layers` over a stack of them."""

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
from .model.nnx_scan import scan_layers as scan_layers
