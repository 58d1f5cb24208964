"""Routing by model family, as data: what each model's router does, in the keywords of `route_topk`.

    ids, weights = route_topk(logits, **presets.deepseek_v3, bias=score_bias)

A preset is the routing of one published model, which `source` names. Other models of its family may have another number
of experts or another scale; make their preset with `dataclasses.replace(preset, num_experts=32)`. `PRESETS` finds a
preset by name.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_ROUTING = ("top_k", "scoring", "norm_topk_prob", "num_groups", "group_top_k", "group_score", "scale", "zero_sum")


class Source(NamedTuple):
    """A model's name on the Hugging Face hub, and the addresses of its numbers (config) and its formula (code)."""

    model: str
    config: str
    code: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A model's routing. `**preset` passes the first eight fields, which are keywords of `route_topk`, and no others.

    The other fields say what else a model has: its number of experts, and which parameters.

    >>> from ferrum_jax import presets
    >>> dict(**presets.mixtral)["top_k"], presets.mixtral.num_experts
    (2, 8)
    """

    top_k: int
    scoring: str = "softmax"
    norm_topk_prob: bool = True
    num_groups: int | None = None
    group_top_k: int | None = None
    group_score: str = "top2_sum"
    scale: float = 1.0
    zero_sum: str = "uniform"

    num_experts: int
    #: Experts that every token goes through. They are one MLP, this many times as wide as an expert.
    shared_experts: int = 0
    #: The shared experts' output is multiplied by the sigmoid of one more product with the token.
    shared_gate: bool = False
    #: The router adds a bias to its scores, for the choice only: the `bias` of `route_topk`.
    score_bias: bool = False
    #: The router's product has a bias, which is part of the logits.
    router_bias: bool = False
    #: The experts' products have biases, `b_gate_up` and `b_down` of `moe_mlp`.
    expert_bias: bool = False
    #: The weights multiply the experts' input, not their output. With top_k = 1, call `moe_mlp` on x * weight with
    #: weights of 1.
    weight_on_input: bool = False
    #: The `activation` of `moe_mlp`.
    activation: str = "silu"
    source: Source | None = None

    def keys(self) -> tuple[str, ...]:
        return _ROUTING

    def __getitem__(self, name: str) -> Any:
        if name not in _ROUTING:
            raise KeyError(name)
        return getattr(self, name)


def _published(model: str, code: str) -> Source:
    hub = f"https://huggingface.co/{model}/blob/main"
    transformers = "https://github.com/huggingface/transformers/blob/main/src/transformers/models"
    where = f"{hub}/{code}" if code.endswith(".py") else f"{transformers}/{code}/modeling_{code}.py"
    return Source(model, f"{hub}/config.json", where)


# One group in a published config means no groups, so it is left out here. DeepSeek's formula, which Kimi and GLM share,
# adds 1e-20 to the sum that it divides by: zero_sum="eps". For a softmax this is left out: there the sum is never 0.

# https://arxiv.org/abs/2401.04088
mixtral = Preset(num_experts=8, top_k=2, source=_published("mistralai/Mixtral-8x7B-v0.1", "mixtral"))

# https://arxiv.org/abs/2505.09388
qwen3_moe = Preset(num_experts=128, top_k=8, source=_published("Qwen/Qwen3-30B-A3B", "qwen3_moe"))

qwen3_next = Preset(
    num_experts=512,
    top_k=10,
    shared_experts=1,
    shared_gate=True,
    source=_published("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next"),
)

# https://arxiv.org/abs/2412.19437
deepseek_v3 = Preset(
    num_experts=256,
    top_k=8,
    scoring="sigmoid",
    num_groups=8,
    group_top_k=4,
    group_score="top2_sum",
    scale=2.5,
    zero_sum="eps",
    score_bias=True,
    shared_experts=1,
    source=_published("deepseek-ai/DeepSeek-V3", "deepseek_v3"),
)

# https://arxiv.org/abs/2507.20534
kimi_k2 = Preset(
    num_experts=384,
    top_k=8,
    scoring="sigmoid",
    scale=2.827,
    zero_sum="eps",
    score_bias=True,
    shared_experts=1,
    source=_published("moonshotai/Kimi-K2-Instruct", "modeling_deepseek.py"),
)

# https://arxiv.org/abs/2508.06471. GLM-4.5-Air: 128 experts, scale 1.
glm4_moe = Preset(
    num_experts=160,
    top_k=8,
    scoring="sigmoid",
    scale=2.5,
    zero_sum="eps",
    score_bias=True,
    shared_experts=1,
    source=_published("zai-org/GLM-4.5", "glm4_moe"),
)

# https://arxiv.org/abs/2409.02060
olmoe = Preset(num_experts=64, top_k=8, norm_topk_prob=False, source=_published("allenai/OLMoE-1B-7B-0924", "olmoe"))

# https://arxiv.org/abs/2508.10925. gpt-oss-20b: 32 experts.
gpt_oss = Preset(
    num_experts=128,
    top_k=4,
    scoring="topk_softmax",
    router_bias=True,
    expert_bias=True,
    activation="swiglu_oai",
    source=_published("openai/gpt-oss-120b", "gpt_oss"),
)

# Scout; Maverick: 128 experts.
llama4 = Preset(
    num_experts=16,
    top_k=1,
    scoring="sigmoid",
    norm_topk_prob=False,
    weight_on_input=True,
    shared_experts=1,
    source=_published("meta-llama/Llama-4-Scout-17B-16E", "llama4"),
)

minimax_m2 = Preset(
    num_experts=256,
    top_k=8,
    scoring="sigmoid",
    score_bias=True,
    source=_published("MiniMaxAI/MiniMax-M2", "minimax_m2"),
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {name: value for name, value in globals().items() if isinstance(value, Preset)}
)
