"""Shapes of real models: experts, choices per token, hidden width."""

MODELS = {
    "mixtral": (8, 2, 4096),
    "qwen3": (128, 8, 2048),
    "deepseek_v3": (256, 8, 7168),
    "kimi_k2": (384, 8, 7168),
    "qwen3_next": (512, 10, 2048),
    "wide": (4096, 64, 2048),
}
