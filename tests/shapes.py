"""Shapes of real models, those that the benchmark knows, and one wider than any: experts, choices per token, width."""

from ferrum_jax import bench

MODELS = {name: model[:3] for name, model in bench.MODELS.items()} | {"wide": (4096, 64, 2048)}
