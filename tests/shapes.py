"""Shapes of real models, those that the benchmark knows, and one wider than any of them."""

from ferrum_jax import bench

# Experts, choices per token, and width.
MODELS = {name: model[:3] for name, model in bench.MODELS.items()} | {"wide": (4096, 64, 2048)}

# Grouped products: experts, choices per token, and the two widths of an expert's matrix. A model's is the product with
# gate and up side by side; "qwen3_down" is the product that follows.
PRODUCTS = {
    name: (experts, top_k, hidden, 2 * width) for name, (experts, top_k, hidden, width) in bench.MODELS.items()
} | {"qwen3_down": (128, 8, 768, 2048)}
