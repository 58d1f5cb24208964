"""Mixture-of-Experts routing and combine for JAX, as primitives under every transformation."""

from . import checkpoint as checkpoint
from . import parallel as parallel
from . import presets as presets
from . import profile as profile
from . import viz as viz
from ._primitive import which
from .capacity import limit_capacity
from .check import check_routing
from .combine import moe_combine, moe_dispatch, weighted_sum_batched
from .grouped import grouped_matmul
from .host import route_topk_into_host, upload_moe_routing
from .kernels import export_checks, interpret_kernels
from .layer import moe_mlp
from .losses import expert_counts, load_balancing_loss, router_z_loss, update_routing_bias
from .routing import RouterOutput, moe_route_plan, route_topk, route_topk_softmax
from .stats import RoutingStats, routing_stats
from .tables import (
    MoePlan,
    MoeRouting,
    TokenPairs,
    max_aligned_rows,
    moe_align_block_size,
    moe_align_block_size_pair_ids,
    moe_build_pairs_by_token,
    moe_plan,
)

__version__ = "0.1.0"

__all__ = [
    "MoePlan",
    "MoeRouting",
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
