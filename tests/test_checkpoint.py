"""Checkpoints: every layout through a file and back, each model's block from its own tensors, errors, laziness."""

import re
import tracemalloc
import weakref
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from oracle import assert_close, f64
from safetensors import safe_open
from safetensors.numpy import save_file

from ferrum_jax import RouterOutput, moe_mlp
from ferrum_jax.checkpoint import LAYOUTS, Tensor, load_moe, to_layout
from ferrum_jax.presets import PRESETS

T, E, H, F, S, K = 9, 5, 4, 3, 7, 2
PREFIX = "model.layers.3.mlp."


def tensor_shapes(layout, E=E, H=H, F=F):
    """The tensors of each layout and their shapes, as in transformers' modeling files and on the hub."""
    model, fused = layout.removesuffix("_fused"), layout.endswith("_fused")
    router = "router" if model in ("gpt_oss", "llama4") else "gate"
    shapes = {f"{router}.weight": (E, H)}
    if model == "gpt_oss":
        shapes |= {
            "router.bias": (E,),
            "experts.gate_up_proj": (E, H, 2 * F),
            "experts.gate_up_proj_bias": (E, 2 * F),
            "experts.down_proj": (E, F, H),
            "experts.down_proj_bias": (E, H),
        }
    elif model == "llama4":
        shapes |= {"experts.gate_up_proj": (E, H, 2 * F), "experts.down_proj": (E, F, H)}
    elif fused:
        shapes |= {"experts.gate_up_proj": (E, 2 * F, H), "experts.down_proj": (E, H, F)}
    else:
        gate, up, down = (
            ("w1", "w3", "w2") if model in ("mixtral", "minimax_m2") else ("gate_proj", "up_proj", "down_proj")
        )
        for e in range(E):
            shapes |= {f"experts.{e}.{name}.weight": (F, H) for name in (gate, up)}
            shapes[f"experts.{e}.{down}.weight"] = (H, F)
    if model in ("deepseek_v3", "kimi_k2", "glm4_moe"):
        shapes["gate.e_score_correction_bias"] = (E,)
    if model == "minimax_m2":
        shapes["e_score_correction_bias"] = (E,)
    shared = {"qwen3_next": "shared_expert", "llama4": "shared_expert"}.get(model, "shared_experts")
    if PRESETS[model].shared_experts:
        shapes |= {f"{shared}.{name}_proj.weight": (S, H) for name in ("gate", "up")}
        shapes[f"{shared}.down_proj.weight"] = (H, S)
    if model == "qwen3_next":
        shapes["shared_expert_gate.weight"] = (1, H)
    return shapes


def checkpoint(layout, dtype="float32", prefix=PREFIX):
    r = rng("checkpoint", layout)
    return {
        prefix + name: r.normal(size=shape).astype(jnp.dtype(dtype)) for name, shape in tensor_shapes(layout).items()
    }


def saved(tmp_path, tensors, name="model.safetensors"):
    save_file(tensors, tmp_path / name)
    return tmp_path / name


# ---- each model's block, from its own tensors with its own formula, in float64


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu_mlp(x, gate, up, down):
    """torch.nn.Linear's [out, in] matrices. Returns the value and the magnitude of its terms."""
    g, u = gate @ x, up @ x
    size = np.abs(down) @ ((np.abs(gate) @ np.abs(x) + 1) * (np.abs(up) @ np.abs(x) + 1))
    return down @ (g * sigmoid(g) * u), size


def gpt_oss_mlp(x, gate_up, gate_up_bias, down, down_bias, alpha=1.702, limit=7.0):
    """transformers: models/gpt_oss/modeling_gpt_oss.py, GptOssExperts, with its [in, out] matrices."""
    both, terms = x @ gate_up + gate_up_bias, np.abs(x) @ np.abs(gate_up) + np.abs(gate_up_bias) + 1
    gate, up = np.minimum(both[::2], limit), np.clip(both[1::2], -limit, limit)
    size = (2 * terms[::2] * (terms[1::2] + 1)) @ np.abs(down) + np.abs(down_bias)
    return ((up + 1) * gate * sigmoid(alpha * gate)) @ down + down_bias, size


def expert(layout, t, e, x):
    if layout == "gpt_oss":
        names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        return gpt_oss_mlp(x, *(t[f"experts.{name}"][e] for name in names))
    if layout == "llama4":
        gate, up = np.split(t["experts.gate_up_proj"][e], 2, axis=-1)
        return silu_mlp(x, gate.T, up.T, t["experts.down_proj"][e].T)
    if layout.endswith("_fused"):
        gate, up = np.split(t["experts.gate_up_proj"][e], 2, axis=0)
        return silu_mlp(x, gate, up, t["experts.down_proj"][e])
    names = ("w1", "w3", "w2") if "experts.0.w1.weight" in t else ("gate_proj", "up_proj", "down_proj")
    return silu_mlp(x, *(t[f"experts.{e}.{name}.weight"] for name in names))


def shared(t, x):
    """The shared expert's output, if the checkpoint has one."""
    name = next((n for n in ("shared_expert", "shared_experts") if f"{n}.up_proj.weight" in t), None)
    if name is None:
        return 0, 0
    out, size = silu_mlp(x, *(t[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")))
    if "shared_expert_gate.weight" in t:
        out = sigmoid(t["shared_expert_gate.weight"][0] @ x) * out
    return out, size


def route(logits, score_bias):
    """Any router would do that reads the logits and the bias; this one is MiniMax-M2's, or softmax after top-k."""
    scores = logits if score_bias is None else sigmoid(logits)
    ids = np.argsort(-(scores if score_bias is None else scores + score_bias))[:K]
    weights = np.exp(scores[ids] - scores.max()) if score_bias is None else scores[ids]
    return ids, weights / weights.sum()


def block(layout, tensors, x):
    t = {name.removeprefix(PREFIX): f64(tensor) for name, tensor in tensors.items()}
    router = "router" if layout in ("gpt_oss", "llama4") else "gate"
    bias = next((t[name] for name in t if name.endswith("e_score_correction_bias")), None)
    out, size = np.zeros((2, *x.shape))
    for i, row in enumerate(f64(x)):
        for e, weight in zip(*route(t[f"{router}.weight"] @ row + t.get("router.bias", 0), bias), strict=True):
            value, magnitude = expert(layout, t, e, row)
            out[i], size[i] = out[i] + weight * value, size[i] + weight * magnitude
        value, magnitude = shared(t, row)
        out[i], size[i] = out[i] + value, size[i] + magnitude
    return out, size


def run(params, x, activation):
    """The same block from the loaded parameters: routing in NumPy, the rest by the library."""
    logits = f64(x) @ f64(params.router) + (0 if params.router_bias is None else f64(params.router_bias))
    bias = None if params.score_bias is None else f64(params.score_bias)
    ids, weights = (jnp.asarray(np.array(part)) for part in zip(*(route(row, bias) for row in logits), strict=True))
    out = moe_mlp(
        x,
        None,
        params.w_gate_up,
        params.w_down,
        router_output=RouterOutput(ids.astype(jnp.int32), weights.astype(jnp.float32)),
        activation=activation,
        b_gate_up=params.b_gate_up,
        b_down=params.b_down,
    )
    if params.shared_w_down is not None:
        gate, up = jnp.split(x @ params.shared_w_gate_up, 2, axis=-1)
        extra = (jax.nn.silu(gate) * up) @ params.shared_w_down
        out += extra if params.shared_gate is None else jax.nn.sigmoid(x @ params.shared_gate) * extra
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_block_is_that_of_the_model(layout, tmp_path):
    tensors = checkpoint(layout)
    if layout == "gpt_oss":  # so that its clamps matter
        tensors[PREFIX + "experts.gate_up_proj"] *= 8
    params = jax.device_put(load_moe(saved(tmp_path, tensors), layout, prefix=PREFIX))
    x = jnp.asarray(rng("x", layout).normal(size=(T, H)).astype(np.float32))
    want, size = block(layout, tensors, x)
    preset = PRESETS[layout.removesuffix("_fused")]
    assert_close(run(params, x, preset.activation), want, size, "float32")
    assert preset.router_bias == (params.router_bias is not None)
    assert preset.score_bias == (params.score_bias is not None)
    assert preset.expert_bias == (params.b_gate_up is not None) == (params.b_down is not None)
    assert bool(preset.shared_experts) == (params.shared_w_gate_up is not None) == (params.shared_w_down is not None)
    assert preset.shared_gate == (params.shared_gate is not None)


# ---- through files and back


@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, "bfloat16") for layout in LAYOUTS), ("gpt_oss", "float32"), ("gpt_oss", "float16")]
)
def test_round_trip_through_a_file_is_bit_exact(layout, dtype, tmp_path):
    tensors = checkpoint(layout, dtype)
    other = {"model.layers.31.mlp.gate.weight": np.zeros(3, np.int32), "model.norm.weight": np.zeros(3, np.float32)}
    params = load_moe(saved(tmp_path, tensors | other), layout, prefix=PREFIX)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    back = saved(tmp_path, to_layout(params, layout, prefix=PREFIX), "back.safetensors")
    with safe_open(back, framework="numpy") as file:
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name).view(np.uint8), tensor.view(np.uint8))


def test_one_layout_converts_to_another_and_jax_arrays_may_stand_in_it():
    tensors = checkpoint("deepseek_v3", "bfloat16")
    params = load_moe(tensors, "deepseek_v3", prefix=PREFIX)
    fused = to_layout(jax.device_put(params), "deepseek_v3_fused")
    gate_up = [
        np.concatenate([tensors[f"{PREFIX}experts.{e}.{n}_proj.weight"] for n in ("gate", "up")]) for e in range(E)
    ]
    np.testing.assert_array_equal(fused["experts.gate_up_proj"], gate_up)
    again = load_moe(fused, "deepseek_v3_fused")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_parameters_keep_their_own_dtypes():
    tensors = checkpoint("deepseek_v3", "bfloat16")
    name = PREFIX + "gate.e_score_correction_bias"
    tensors[name] = tensors[name].astype(np.float32)
    params = load_moe(tensors, "deepseek_v3", prefix=PREFIX)
    assert (params.score_bias.dtype, params.router.dtype) == (np.float32, jnp.bfloat16)
    np.testing.assert_array_equal(params.score_bias, tensors[name])


def test_a_folder_of_files_is_one_checkpoint(tmp_path):
    tensors = checkpoint("olmoe")
    names = list(tensors)
    for i in range(3):
        saved(tmp_path, {name: tensors[name] for name in names[i::3]}, f"model-{i}.safetensors")
    whole = load_moe(tensors, "olmoe", prefix=PREFIX)
    jax.tree.map(np.testing.assert_array_equal, load_moe(tmp_path, "olmoe", prefix=PREFIX), whole)
    saved(tmp_path, {names[0]: tensors[names[0]]}, "model-3.safetensors")
    with pytest.raises(ValueError, match=rf"{re.escape(names[0])} stands in two files .* model-3.safetensors"):
        load_moe(tmp_path, "olmoe", prefix=PREFIX)


def test_a_layout_of_ones_own():
    layout = (Tensor("wg", "router", "H E"), Tensor("wi", "w_gate_up", "E H FU"), Tensor("wo.{}", "w_down", "F H"))
    params = load_moe(checkpoint("olmoe"), "olmoe", prefix=PREFIX)
    tensors = to_layout(params, layout)
    assert {name: t.shape for name, t in tensors.items()} == {
        "wg": (H, E),
        "wi": (E, H, 2 * F),
        **{f"wo.{e}": (F, H) for e in range(E)},
    }
    np.testing.assert_array_equal(tensors["wi"][2, :, 1::2], params.w_gate_up[2, :, F:])
    jax.tree.map(np.testing.assert_array_equal, load_moe(tensors, layout), params)


def test_a_layout_of_ones_own_that_is_not_whole_or_not_of_its_parameters_shape():
    params = load_moe(checkpoint("olmoe"), "olmoe", prefix=PREFIX)
    router, _, down = LAYOUTS["olmoe_fused"]
    gate = Tensor("gate_proj", "w_gate_up", "E F H", 0)
    for layout, message in (
        ((router, gate, down), r"must have w_gate_up, whole or both of its halves, once; got halves \[0\]"),
        ((router, down), r"must have w_gate_up, whole or both of its halves, once; got halves \[\]"),
        ((router, gate, gate._replace(half=None), down), r"w_down \[E F H\].*; got Tensor\(name='gate_proj'"),
        ((router, gate._replace(param="w_gate"), down), r"w_gate_up \[E H UF\].*; got .*'w_gate'"),
    ):
        with pytest.raises(ValueError, match=message):
            to_layout(params, layout)
        with pytest.raises(ValueError, match=message):
            load_moe({}, layout)


class Torch:
    """What PyTorch's bfloat16 tensors do: NumPy is refused, DLPack served."""

    def __init__(self, array):
        self.array, self.shape = jnp.asarray(array), array.shape

    def __getitem__(self, index):
        return Torch(self.array[index])

    def __array__(self, *args, **kwargs):
        raise TypeError("Got unsupported ScalarType BFloat16")

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_tensors_that_only_dlpack_can_read():
    tensors = checkpoint("olmoe_fused", "bfloat16")
    wrapped = {name: Torch(tensor) for name, tensor in tensors.items()}
    got, want = (load_moe(each, "olmoe_fused", prefix=PREFIX) for each in (wrapped, tensors))
    assert got.router.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ---- memory


class OnAccess(Mapping):
    """Makes a tensor whenever it is asked for one, and counts how many are alive."""

    def __init__(self, shapes):
        self.shapes, self.most, self.alive = shapes, 0, weakref.WeakSet()

    def __getitem__(self, name):
        class Counted(np.ndarray):
            __hash__ = object.__hash__

        tensor = np.ones(self.shapes[name], np.float32).view(Counted)
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def test_a_mapping_that_reads_on_access_has_one_tensor_alive_at_a_time():
    tensors = OnAccess(tensor_shapes("deepseek_v3"))
    load_moe(tensors, "deepseek_v3")
    assert tensors.most == 1


@pytest.mark.parametrize("layout", ["qwen3_moe", "gpt_oss"])
def test_beside_the_result_there_is_no_copy(layout, tmp_path):
    hidden, width = 64, 1024
    shapes = tensor_shapes(layout, 8, hidden, width)
    path = saved(tmp_path, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    tracemalloc.start()
    try:
        params = load_moe(path, layout)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert result <= peak < result + 4 * hidden * width // 2, (result, peak)  # the files are mapped, not copied


# ---- errors


def refused(tensors, layout="olmoe", error=ValueError, prefix=PREFIX):
    with pytest.raises(error) as caught:
        load_moe(tensors, layout, prefix=prefix)
    return str(caught.value)


def test_missing_extra_and_misshapen_tensors_are_all_named_with_the_expected_shapes():
    tensors = checkpoint("olmoe")
    del tensors[PREFIX + "experts.1.up_proj.weight"]
    tensors[PREFIX + "experts.2.down_proj.weight"] = np.ones((F, H), np.float32)
    tensors[PREFIX + "experts.0.gate_proj.bias"] = np.ones(F, np.float32)
    tensors[PREFIX + f"experts.{E}.up_proj.weight"] = np.ones((F, H), np.float32)
    message = refused(tensors)
    assert message.splitlines() == [
        f"load_moe: the tensors under the prefix {PREFIX!r} are not those of layout 'olmoe':",
        "  experts.1.up_proj.weight is missing: it should have shape [F=3, H=4]",
        "  experts.2.down_proj.weight should have shape [H=4, F=3]; got (3, 4)",
        "  experts.0.gate_proj.bias, of shape (3,), is not of this layout",
        "  experts.5.up_proj.weight, of shape (3, 4), is not of this layout",
    ]


def test_whole_experts_and_the_router_may_be_missing():
    tensors = checkpoint("olmoe")
    without = {name: t for name, t in tensors.items() if f"experts.{E - 1}." not in name}
    assert refused(without).count(f"experts.{E - 1}.") == 3
    del tensors[PREFIX + "gate.weight"]
    assert refused(tensors).splitlines()[1:] == ["  gate.weight is missing: it should have shape [E=5, H=4]"]


def test_fused_shapes_and_other_models_layouts_are_told():
    tensors = checkpoint("gpt_oss")
    tensors[PREFIX + "experts.gate_up_proj"] = np.ones((E, H, 2 * F + 1), np.float32)
    message = refused(tensors, "gpt_oss")
    assert message.splitlines()[1:] == [
        "  experts.gate_up_proj should have shape [E=5, H=4, 2F=6]; got (5, 4, 7)",
    ]
    message = refused(checkpoint("mixtral"), "qwen3_moe_fused")
    assert "experts.gate_up_proj is missing: it should have shape [E=5, 2F, H=4]" in message
    assert "experts.0.w1.weight, of shape (3, 4), is not of this layout" in message


def test_a_long_list_is_cut():
    tensors = {PREFIX + "gate.weight": np.ones((128, H), np.float32)}
    lines = refused(tensors).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 364 more"


def test_a_prefix_that_nothing_has_and_a_layout_that_nobody_has():
    assert "no tensor's name begins with the prefix 'model.layers.4.mlp.'" in refused(
        checkpoint("olmoe"), prefix="model.layers.4.mlp."
    )
    message = refused({}, layout="qwen9")
    assert "'qwen9'" in message
    assert all(name in message for name in LAYOUTS)


def test_dtypes():
    tensors = checkpoint("olmoe")
    name = PREFIX + "experts.1.up_proj.weight"
    message = refused(tensors | {name: tensors[name].astype(np.float16)}, error=TypeError)
    assert message.startswith(f"load_moe: {name} must have the dtype of the other tensors of w_gate_up, float32; got")
    name = PREFIX + "gate.weight"
    for other in (np.float64, np.int8):
        message = refused(tensors | {name: tensors[name].astype(other)}, error=TypeError)
        assert f"{name} must be float16, bfloat16 or float32; got {np.dtype(other)}" in message
    assert f"{name} must be an array" in refused(tensors | {name: [[1.0]]}, error=TypeError)
    assert "must be a mapping of names to arrays, or a path; got list" in refused([], error=TypeError)


def test_a_routers_own_scale_says_nothing_of_quantised_tensors():
    message = refused(checkpoint("olmoe") | {PREFIX + "router.scale": np.ones(H, np.float32)})
    assert message.splitlines()[1:] == ["  router.scale, of shape (4,), is not of this layout"]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_of_eight_bits_without_a_scale_are_refused(dtype, tmp_path):
    tensors = checkpoint("mixtral")
    name = PREFIX + "experts.1.w2.weight"
    tensors[name] = tensors[name].astype(dtype)
    for source, file in ((tensors, ""), (saved(tmp_path, tensors), r" \(in model.safetensors\)")):
        with pytest.raises(ValueError, match=f"{re.escape(name)}{file} has dtype {dtype}, and no scale beside it"):
            load_moe(source, "mixtral", prefix=PREFIX)


def test_gguf_files_are_refused(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model-Q4_K_M.gguf"):
        with pytest.raises(NotImplementedError, match=r"GGUF.*safetensors"):
            load_moe(path, "olmoe")


def test_to_layout_names_what_does_not_fit():
    params = load_moe(checkpoint("gpt_oss"), "gpt_oss", prefix=PREFIX)
    with pytest.raises(ValueError, match=r"router_bias is given, and the layout has no such tensor(.|\n)*b_down"):
        to_layout(params, "olmoe")
    with pytest.raises(ValueError, match="params do not fit layout 'gpt_oss':\n  b_down is None"):
        to_layout(params._replace(b_down=None), "gpt_oss")
    with pytest.raises(ValueError, match=r"w_down should have shape \[E=5, F=3, H=4\]; got \(5, 4, 3\)"):
        to_layout(params._replace(w_down=params.w_down.transpose(0, 2, 1)), "gpt_oss")
    with pytest.raises(ValueError, match=r"layout must be .*'qwen9'"):
        to_layout(params, "qwen9")


def test_a_folder_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors"):
        load_moe(tmp_path, "olmoe")


def test_every_preset_has_its_layout():
    assert {name.removesuffix("_fused") for name in LAYOUTS} == PRESETS.keys()
