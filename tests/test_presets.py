"""Every preset against its model's router, restated in float64 from the model's own code, figures and all."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from oracle import assert_close, f64

import ferrum_jax
from ferrum_jax import presets
from ferrum_jax.presets import PRESETS


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def best(scores, k):
    return np.argsort(-scores, kind="stable")[:k]


# transformers: models/mixtral/modeling_mixtral.py, MixtralTopKRouter; https://arxiv.org/abs/2401.04088, section 2.1
def mixtral(x, bias):
    p = softmax(x)
    ids = best(p, 2)
    return ids, p[ids] / p[ids].sum()


# transformers: models/qwen3_moe/modeling_qwen3_moe.py, Qwen3MoeTopKRouter, with "norm_topk_prob": true
def qwen3_moe(x, bias):
    p = softmax(x)
    ids = best(p, 8)
    return ids, p[ids] / p[ids].sum()


# transformers: models/qwen3_next/modeling_qwen3_next.py, Qwen3NextTopKRouter
def qwen3_next(x, bias):
    p = softmax(x)
    ids = best(p, 10)
    return ids, p[ids] / p[ids].sum()


# transformers: models/olmoe/modeling_olmoe.py, OlmoeTopKRouter, with "norm_topk_prob": false
def olmoe(x, bias):
    p = softmax(x)
    ids = best(p, 8)
    return ids, p[ids]


# transformers: models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3TopkRouter; https://arxiv.org/abs/2412.19437,
# section 2.1.2, equations 12 to 16, with 4 of 8 groups by the sum of their two best biased scores
def deepseek_v3(x, bias):
    scores = sigmoid(x)
    groups = (scores + bias).reshape(8, 32)
    kept = best(np.sort(groups, axis=1)[:, -2:].sum(axis=1), 4)
    choice = np.full((8, 32), -np.inf)
    choice[kept] = groups[kept]
    ids = best(choice.reshape(256), 8)
    return ids, 2.5 * scores[ids] / (scores[ids].sum() + 1e-20)


# huggingface.co/moonshotai/Kimi-K2-Instruct: modeling_deepseek.py, MoEGate, with one group
def kimi_k2(x, bias):
    scores = sigmoid(x)
    ids = best(scores + bias, 8)
    return ids, 2.827 * scores[ids] / (scores[ids].sum() + 1e-20)


# transformers: models/glm4_moe/modeling_glm4_moe.py, Glm4MoeTopkRouter, with one group
def glm4_moe(x, bias):
    scores = sigmoid(x)
    ids = best(scores + bias, 8)
    return ids, 2.5 * scores[ids] / (scores[ids].sum() + 1e-20)


# transformers: models/gpt_oss/modeling_gpt_oss.py, GptOssTopKRouter
def gpt_oss(x, bias):
    ids = best(x, 4)
    return ids, softmax(x[ids])


# transformers: models/llama4/modeling_llama4.py, Llama4Router
def llama4(x, bias):
    ids = best(x, 1)
    return ids, sigmoid(x[ids])


# transformers: models/minimax_m2/modeling_minimax_m2.py, MiniMaxM2TopKRouter
def minimax_m2(x, bias):
    scores = sigmoid(x)
    ids = best(scores + bias, 8)
    return ids, scores[ids] / scores[ids].sum()


ROUTERS = {
    router.__name__: (router, num_experts, has_bias)
    for router, num_experts, has_bias in (
        (mixtral, 8, False),
        (qwen3_moe, 128, False),
        (qwen3_next, 512, False),
        (deepseek_v3, 256, True),
        (kimi_k2, 384, True),
        (glm4_moe, 160, True),
        (olmoe, 64, False),
        (gpt_oss, 128, False),
        (llama4, 16, False),
        (minimax_m2, 256, True),
    )
}


@pytest.mark.parametrize("name", ROUTERS)
def test_routes_as_the_model_does(name):
    router, num_experts, has_bias = ROUTERS[name]
    preset, r = PRESETS[name], rng(name)
    assert (preset.num_experts, preset.score_bias) == (num_experts, has_bias)
    logits = r.normal(size=(17, num_experts)).astype(np.float32) * 2
    logits[-1] = -60  # scores so small that it shows what is added to their sum
    # Biases of both signs, larger than the scores: some groups hold negative scores only.
    bias = r.normal(size=num_experts).astype(np.float32) if has_bias else None
    given = {} if bias is None else {"bias": jnp.asarray(bias)}
    ids, weights = ferrum_jax.route_topk(jnp.asarray(logits), **preset, **given)
    wanted = [router(row, bias if bias is None else f64(bias)) for row in f64(logits)]
    np.testing.assert_array_equal(ids, [ids for ids, _ in wanted])
    want = np.array([weights for _, weights in wanted])
    assert_close(weights, want, want, "float32")


def test_every_preset_is_tested_and_found_by_name():
    assert PRESETS.keys() == ROUTERS.keys()
    assert all(PRESETS[name] is getattr(presets, name) for name in PRESETS)


def test_a_preset_unpacks_to_keywords_of_route_topk_and_nothing_else():
    keywords = inspect.signature(ferrum_jax.route_topk).parameters
    for preset in PRESETS.values():
        routing = dict(**preset)
        assert routing.keys() <= keywords.keys() - {"logits", "bias"}
        assert routing == {name: getattr(preset, name) for name in routing}
        defaults = {name: keywords[name].default for name in routing.keys() - {"top_k"}}
        unset = presets.Preset(top_k=1, num_experts=1)
        assert {name: unset[name] for name in defaults} == defaults
    with pytest.raises(KeyError, match="num_experts"):
        presets.mixtral["num_experts"]


def test_presets_are_immutable_hashable_and_replaced_by_field():
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.gpt_oss.top_k = 2
    with pytest.raises(TypeError):
        PRESETS["gpt_oss"] = presets.mixtral
    small = dataclasses.replace(presets.gpt_oss, num_experts=32)
    assert len({small, presets.gpt_oss, presets.gpt_oss}) == 2
    assert dict(**small) == dict(**presets.gpt_oss)


def test_every_preset_names_its_source():
    for preset in PRESETS.values():
        assert preset.source.config == f"https://huggingface.co/{preset.source.model}/blob/main/config.json"
        assert preset.source.code.startswith("https://")
        assert preset.source.code.endswith(".py")
