"""Mixture-of-Experts routing and combine for JAX, as primitives under every transformation."""

from . import parallel as parallel
from . import profile as profile
from . import viz as viz
from ._primitive import which
from .combine import moe_combine, moe_dispatch, weighted_sum_batched
from .grouped import grouped_matmul
from .host import route_topk_into_host, upload_moe_routing
from .kernels import export_checks, interpret_kernels
from .layer import moe_mlp
from .routing import RouterOutput, route_topk_softmax
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
    "export_checks",
    "grouped_matmul",
    "interpret_kernels",
    "max_aligned_rows",
    "moe_align_block_size",
    "moe_align_block_size_pair_ids",
    "moe_build_pairs_by_token",
    "moe_combine",
    "moe_dispatch",
    "moe_mlp",
    "moe_plan",
    "route_topk_into_host",
    "route_topk_softmax",
    "routing_stats",
    "upload_moe_routing",
    "weighted_sum_batched",
    "which",
]
