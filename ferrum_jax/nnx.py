"""The layer as a Flax NNX module, `ferrum_jax.nnx.MoE`, and `scan_layers` over a stack of them."""

from .model.nnx import MoE as MoE
from .model.nnx_scan import scan_layers as scan_layers
from .model.nnx_variables import (
    DroppedPairs as DroppedPairs,
)
from .model.nnx_variables import (
    ExpertCounts as ExpertCounts,
)
from .model.nnx_variables import (
    LoadBalancingLoss as LoadBalancingLoss,
)
from .model.nnx_variables import (
    Quantized as Quantized,
)
from .model.nnx_variables import (
    RouterZLoss as RouterZLoss,
)
from .model.nnx_variables import (
    ScoreBias as ScoreBias,
)
