"""Mixture-of-Experts routing and combine for JAX, as primitives under every transformation."""

from . import checkpoint as checkpoint
from . import parallel as parallel
from . import presets as presets
from . import profile as profile
from . import viz as viz
from .core.quantized import QuantizedMatrices
from .core.types import LayerOf, MoePlan, MoeRouting, MoESharding, RouterOutput, TokenPairs
from .core.which import which
from .kernels import export_checks, interpret_kernels
from .model.layer import moe_mlp, pack_gate_up
from .observe.check import check_routing
from .observe.host import route_topk_into_host, upload_moe_routing
from .observe.stats import RoutingStats, routing_stats
from .ops.capacity import limit_capacity
from .ops.combine import moe_combine, moe_dispatch
from .ops.grouped import grouped_matmul
from .ops.losses import expert_counts, load_balancing_loss, router_z_loss, update_routing_bias
from .ops.quantize import quantize
from .ops.ragged import ragged_dot
from .ops.route_plan import moe_route_plan
from .ops.routing import route_topk, route_topk_softmax
from .ops.table_sizes import max_aligned_rows
from .ops.tables import (
    moe_align_block_size,
    moe_align_block_size_pair_ids,
    moe_build_pairs_by_token,
    moe_plan,
)
from .ops.weighted_sum import weighted_sum_batched

__version__ = "0.1.0"

__all__ = [
    "LayerOf",
    "MoESharding",
    "MoePlan",
    "MoeRouting",
    "QuantizedMatrices",
    "RouterOutput",
    "RoutingStats",
    "TokenPairs",
    "check_routing",
    "expert_counts",
    "export_checks",
    "grouped_matmul",
    "interpret_kernels",
    "limit_capacity",
    "load_balancing_loss",
    "max_aligned_rows",
    "moe_align_block_size",
    "moe_align_block_size_pair_ids",
    "moe_build_pairs_by_token",
    "moe_combine",
    "moe_dispatch",
    "moe_mlp",
    "moe_plan",
    "moe_route_plan",
    "pack_gate_up",
    "quantize",
    "ragged_dot",
    "route_topk",
    "route_topk_into_host",
    "route_topk_softmax",
    "router_z_loss",
    "routing_stats",
    "update_routing_bias",
    "upload_moe_routing",
    "weighted_sum_batched",
    "which",
]
