"""What a block's tensors are called in each family's checkpoints, and which parameters they are.

A layout is data: for each tensor of a block its name, the parameter that it is (or is a part of), and its axes.
`LAYOUTS` has those of the families in `presets`, under the same names: as the hub's files have them, and, with `_fused`
behind the name, as transformers 5 holds them in a model's state dict (one tensor for all experts). The sources are
transformers' modeling files, which `presets` links to, and the conversions between the two forms,
https://github.com/huggingface/transformers/blob/main/src/transformers/conversion_mapping.py.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple


class MoEParams(NamedTuple):
    """The parameters of an MoE block. A parameter that a model lacks is None.

    H is the hidden width, E the number of experts, F an expert's width, S the width of the shared experts. It is a
    pytree, so `jax.device_put` takes it, with one sharding for all fields or an `MoEParams` of shardings.
    """

    #: [H, E]: logits = x @ router.
    router: Any
    #: [E, H, 2F], gate then up, and [E, F, H]: as `moe_mlp` takes them, arrays or `QuantizedMatrices`.
    w_gate_up: Any
    w_down: Any
    #: [E]: logits = x @ router + router_bias.
    router_bias: Any = None
    #: [E]: added to the router's scores for the choice alone, the `bias` of `route_topk`.
    score_bias: Any = None
    #: [E, 2F] and [E, H]: as `moe_mlp` takes them.
    b_gate_up: Any = None
    b_down: Any = None
    #: [H, 2S], gate then up, and [S, H]: the MLP that every token goes through. Quantised, too, if it is published so.
    shared_w_gate_up: Any = None
    shared_w_down: Any = None
    #: [H, 1]: the shared MLP's output is multiplied by sigmoid(x @ shared_gate).
    shared_gate: Any = None


class Tensor(NamedTuple):
    """One tensor of a block, or one tensor of each expert.

    name: the tensor's name; "{}" in it stands for the expert's number.
    param: the field of `MoEParams` that the tensor is, or is a part of.
    axes: its axes, with a space between two. H is the hidden width, E the experts, F an expert's width, S the shared
      experts' width. "UF" is an axis of 2F entries, gate (U = 0) then up (U = 1); "FU" has the two interleaved.
    half: of a tensor that is gate or up alone: 0 for gate, 1 for up.
    """

    name: str
    param: str
    axes: str
    half: int | None = None


Layout = Sequence[Tensor]

#: The axes of each parameter, in the letters of `Tensor`.
AXES = {
    "router": "H E",
    "w_gate_up": "E H UF",
    "w_down": "E F H",
    "router_bias": "E",
    "score_bias": "E",
    "b_gate_up": "E UF",
    "b_down": "E H",
    "shared_w_gate_up": "H US",
    "shared_w_down": "S H",
    "shared_gate": "H 1",
}


def _experts(gate: str, up: str, down: str) -> Layout:
    return (
        Tensor(f"experts.{{}}.{gate}.weight", "w_gate_up", "F H", 0),
        Tensor(f"experts.{{}}.{up}.weight", "w_gate_up", "F H", 1),
        Tensor(f"experts.{{}}.{down}.weight", "w_down", "H F"),
    )


def _shared(name: str) -> Layout:
    return (
        Tensor(f"{name}.gate_proj.weight", "shared_w_gate_up", "S H", 0),
        Tensor(f"{name}.up_proj.weight", "shared_w_gate_up", "S H", 1),
        Tensor(f"{name}.down_proj.weight", "shared_w_down", "H S"),
    )


_ROUTER = (Tensor("gate.weight", "router", "E H"),)
# An expert has three tensors, named one way or the other; or one tensor holds those of all experts.
_PROJ = _experts("gate_proj", "up_proj", "down_proj")
_W123 = _experts("w1", "w3", "w2")
_FUSED = (Tensor("experts.gate_up_proj", "w_gate_up", "E UF H"), Tensor("experts.down_proj", "w_down", "E H F"))
_QWEN3_NEXT = (*_ROUTER, *_shared("shared_expert"), Tensor("shared_expert_gate.weight", "shared_gate", "1 H"))
_DEEPSEEK = (*_ROUTER, Tensor("gate.e_score_correction_bias", "score_bias", "E"), *_shared("shared_experts"))
_MINIMAX = (*_ROUTER, Tensor("e_score_correction_bias", "score_bias", "E"))

#: The layouts by name. Usual prefixes: "model.layers.3.mlp."; "model.layers.3.block_sparse_moe." for Mixtral
#: and MiniMax-M2 as the hub has them; "language_model.model.layers.3.feed_forward." for Llama 4.
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "mixtral": (*_ROUTER, *_W123),
        "mixtral_fused": (*_ROUTER, *_FUSED),
        "qwen3_moe": (*_ROUTER, *_PROJ),
        "qwen3_moe_fused": (*_ROUTER, *_FUSED),
        "qwen3_next": (*_QWEN3_NEXT, *_PROJ),
        "qwen3_next_fused": (*_QWEN3_NEXT, *_FUSED),
        "deepseek_v3": (*_DEEPSEEK, *_PROJ),
        "deepseek_v3_fused": (*_DEEPSEEK, *_FUSED),
        "kimi_k2": (*_DEEPSEEK, *_PROJ),
        "kimi_k2_fused": (*_DEEPSEEK, *_FUSED),
        "glm4_moe": (*_DEEPSEEK, *_PROJ),
        "glm4_moe_fused": (*_DEEPSEEK, *_FUSED),
        "olmoe": (*_ROUTER, *_PROJ),
        "olmoe_fused": (*_ROUTER, *_FUSED),
        "gpt_oss": (
            Tensor("router.weight", "router", "E H"),
            Tensor("router.bias", "router_bias", "E"),
            Tensor("experts.gate_up_proj", "w_gate_up", "E H FU"),
            Tensor("experts.gate_up_proj_bias", "b_gate_up", "E FU"),
            Tensor("experts.down_proj", "w_down", "E F H"),
            Tensor("experts.down_proj_bias", "b_down", "E H"),
        ),
        "llama4": (
            Tensor("router.weight", "router", "E H"),
            *_shared("shared_expert"),
            Tensor("experts.gate_up_proj", "w_gate_up", "E H UF"),
            Tensor("experts.down_proj", "w_down", "E F H"),
        ),
        "minimax_m2": (*_MINIMAX, *_W123),
        "minimax_m2_fused": (*_MINIMAX, *_FUSED),
    }
)
