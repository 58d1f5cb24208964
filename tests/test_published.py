"""Quantised checkpoints: each published form means what it should, and is written back byte for byte."""

import dataclasses
import json

import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import rng
from oracle import ACTIVATIONS, assert_close, f64
from test_checkpoint import route
from test_mlp import dense
from test_quantized import rare

from ferrum_jax import QuantizedMatrices, RouterOutput, moe_mlp, presets, quantize
from ferrum_jax.checkpoint import LAYOUTS, load_moe, to_layout

E, H, F, S, T, K = 3, 160, 64, 64, 7, 2  # of blocks of 128, F is less than one, and H's last is short
PREFIX = "model.layers.3.mlp."
NAMES = {"gate_proj": (F, H), "up_proj": (F, H), "down_proj": (H, F)}


def block(form, *, shared=None, dtype="bfloat16", prefix=PREFIX, experts="experts.{}.", names=NAMES):
    """A block's tensors, of which the experts' are published in this form; and the float64 matrices [out, in] by name.

    shared: the form of the shared expert, "plain" if it is not quantised; None: there is none.
    """
    r = rng("published", form, shared)
    tensors = {f"{prefix}gate.weight": r.normal(size=(E, H)).astype(np.float32).astype(np.dtype(dtype))}
    floats = {}
    for name, (out, inn) in names.items():
        for e in range(E):
            base = experts.format(e) + name
            own, floats[base] = formats.matrix(form, r, out, inn)
            tensors |= {f"{prefix}{base}{ending}": tensor for ending, tensor in own.items()}
        if shared:
            base = f"shared_experts.{name}"
            own, floats[base] = formats.matrix(form, r, out, inn)
            if shared == "plain":
                own = {".weight": floats[base].astype(np.dtype(dtype))}
                floats[base] = f64(own[".weight"])
            tensors |= {f"{prefix}{base}{ending}": tensor for ending, tensor in own.items()}
    if shared:
        tensors[f"{prefix}gate.e_score_correction_bias"] = r.random(E).astype(np.float32)
    return tensors, floats


def gpt_oss(prefix=PREFIX):
    """A block of gpt-oss in MXFP4: gate and up alternate. E, 2F, H and F are multiples of 32."""
    r = rng("gpt_oss")
    tensors = {prefix + "router.weight": r.normal(size=(E, H)), prefix + "router.bias": r.normal(size=E)}
    tensors |= {prefix + "experts.gate_up_proj_bias": r.normal(size=(E, 2 * F))}
    tensors |= {prefix + "experts.down_proj_bias": r.normal(size=(E, H))}
    tensors = {name: t.astype(np.float32).astype(np.dtype("bfloat16")) for name, t in tensors.items()}
    floats = {}
    for name, shape in (("gate_up_proj", (2 * F, H)), ("down_proj", (H, F))):
        blocks, scales, floats[name] = formats.mxfp4(r, E, *shape)
        tensors |= {f"{prefix}experts.{name}_blocks": blocks, f"{prefix}experts.{name}_scales": scales}
    return tensors, floats


def saved(folder, tensors, *, config=None, files=2):
    """A folder as the hub has them: several files, an index, and perhaps a config.json."""
    folder.mkdir(exist_ok=True)
    names, where = list(tensors), {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        formats.save(folder / file, {name: tensors[name] for name in names[i::files]})
        where |= dict.fromkeys(names[i::files], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_bytes_equal(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].flags.c_contiguous
        assert got[name].tobytes() == tensor.tobytes(), name


def matrices_of(floats, base="experts.{}."):
    """w_gate_up and w_down in float64 out of the published matrices by name."""
    of = [{name: floats[base.format(e) + name].T for name in NAMES} for e in range(E)]
    gate_up = np.stack([np.concatenate([m["gate_proj"], m["up_proj"]], 1) for m in of])
    return gate_up, np.stack([m["down_proj"] for m in of])


# Names and shapes say the form, except that they cannot tell GPTQ's second version.
@pytest.mark.parametrize(
    ("form", "config"), [(f, c) for f in formats.FORMS for c in (True, False) if c or f != "gptq4_v2"]
)
def test_each_form_is_read_means_the_same_and_is_written_back(form, config, tmp_path):
    tensors, floats = block(form)
    said = {"quantization_config": formats.config(form), "num_experts_per_tok": 8}
    params = load_moe(saved(tmp_path / "a", tensors, config=said if config else None), "qwen3_moe", prefix=PREFIX)
    wanted = matrices_of(floats)
    for got, want in zip((params.w_gate_up, params.w_down), wanted, strict=True):
        assert isinstance(got, QuantizedMatrices)
        assert (got.shape, got.dtype) == (want.shape, jnp.bfloat16)
        np.testing.assert_array_equal(got.dequantize("float32"), want.astype(np.float32))
    assert_bytes_equal(to_layout(params, "qwen3_moe", prefix=PREFIX), tensors)
    # A mapping of arrays gives the same, and JAX's arrays too may be written.
    if not config:
        again = load_moe(tensors, "qwen3_moe", prefix=PREFIX)
        jax.tree.map(np.testing.assert_array_equal, again, params)
    assert_bytes_equal(to_layout(jax.device_put(params), "qwen3_moe", prefix=PREFIX), tensors)


@pytest.mark.parametrize("form", formats.FORMS)
def test_a_block_takes_the_memory_of_its_files(form, tmp_path):
    tensors, _ = block(form)
    config = {"quantization_config": formats.config(form)}
    params = load_moe(saved(tmp_path / "a", tensors, config=config), "qwen3_moe", prefix=PREFIX)
    published = sum(t.nbytes for name, t in tensors.items() if not name.endswith(("_shape", "g_idx")))
    zeros = sum(t.nbytes for name, t in tensors.items() if "zero" in name)
    have = sum(x.nbytes for x in jax.tree.leaves(params))
    assert have - published == (zeros if form not in ("gptq8", "ct_int8") else 0)  # zero points take a byte each


@pytest.mark.parametrize("form", ["fp8_block", "ct_int4", "gptq4", "awq4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_they_may_be_dequantised_as_they_are_read(form, dtype, tmp_path):
    tensors, floats = block(form)
    params = load_moe(saved(tmp_path / "a", tensors), "qwen3_moe", prefix=PREFIX, dequantize=dtype)
    for got, want in zip((params.w_gate_up, params.w_down), matrices_of(floats), strict=True):
        np.testing.assert_array_equal(got, want.astype(np.float32).astype(np.dtype(dtype)))
    assert params.router.dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="load_moe: dequantize must be float16, bfloat16 or float32; got int8"):
        load_moe(tensors, "qwen3_moe", prefix=PREFIX, dequantize="int8")


def test_gpt_oss(tmp_path):
    """MXFP4 whose rows of gate and up alternate, in the layout that is named after plain tensors [E, in, out]."""
    tensors, floats = gpt_oss()
    config = {"quantization_config": formats.config("mxfp4"), "num_experts_per_tok": 4, "swiglu_limit": 7.0}
    params = load_moe(saved(tmp_path / "a", tensors, config=config), "gpt_oss", prefix=PREFIX)
    gate_up = np.swapaxes(np.concatenate([floats["gate_up_proj"][:, i::2] for i in (0, 1)], 1), 1, 2)
    down = np.swapaxes(floats["down_proj"], 1, 2)
    np.testing.assert_array_equal(params.w_gate_up.dequantize("float32"), gate_up.astype(np.float32))
    np.testing.assert_array_equal(params.w_down.dequantize("float32"), down.astype(np.float32))
    assert_bytes_equal(to_layout(params, "gpt_oss", prefix=PREFIX), tensors)
    plain = load_moe(tensors, "gpt_oss", prefix=PREFIX, dequantize="float32")
    np.testing.assert_array_equal(plain.w_gate_up, gate_up.astype(np.float32))
    x = rng("x").normal(size=(T, H)).astype(np.float32)
    ids, weights = (np.array(a) for a in zip(*(route(row, None) for row in f64(x) @ f64(params.router)), strict=True))
    biases = {"b_gate_up": f64(params.b_gate_up).astype(np.float32), "b_down": f64(params.b_down).astype(np.float32)}
    routed = RouterOutput(jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32))
    got = moe_mlp(x, None, params.w_gate_up, params.w_down, router_output=routed, activation="swiglu_oai", **biases)
    assert_close(got, *dense(x, ids, weights, gate_up, down, ACTIVATIONS["swiglu_oai"], **biases), "float32")


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (f, d) if (f, d) in (("fp8_block", "float32"), ("gptq4", "float32"), ("ct_int4", "bfloat16")) else rare(f, d)
        for f in formats.FORMS
        for d in ("float32", "bfloat16")
    ],
)
def test_a_loaded_block_runs(form, dtype, tmp_path):
    tensors, floats = block(form)
    config = {"quantization_config": formats.config(form)}
    params = jax.device_put(load_moe(saved(tmp_path / "a", tensors, config=config), "qwen3_moe", prefix=PREFIX))
    x = (rng("x").normal(size=(T, H)) / 8).astype(np.float32).astype(np.dtype(dtype))
    ids, weights = (np.array(a) for a in zip(*(route(row, None) for row in f64(x) @ f64(params.router)), strict=True))
    routed = RouterOutput(jnp.asarray(ids, jnp.int32), jnp.asarray(weights, jnp.float32))
    got = moe_mlp(jnp.asarray(x), None, params.w_gate_up, params.w_down, router_output=routed)
    want, size = dense(x, ids, weights, *matrices_of(floats), ACTIVATIONS["silu"])
    if dtype == "float32":
        assert_close(got, want, size, dtype)
    else:  # rows between the products are rounded too
        np.testing.assert_allclose(f64(got), want, atol=2.0**-6 * np.abs(want).max())


@pytest.mark.parametrize("shared", ["quantised", "plain"])
def test_shared_experts_are_quantised_or_plain(shared, tmp_path):
    tensors, floats = block("fp8_block", shared=shared)
    params = load_moe(saved(tmp_path / "a", tensors), "deepseek_v3", prefix=PREFIX)
    assert isinstance(params.shared_w_gate_up, QuantizedMatrices) == (shared == "quantised")
    want = {name: floats[f"shared_experts.{name}"].T for name in NAMES}
    gate_up = np.concatenate([want["gate_proj"], want["up_proj"]], 1)
    for got, each in ((params.shared_w_gate_up, gate_up), (params.shared_w_down, want["down_proj"])):
        assert got.shape == each.shape
        floats_of = got.dequantize("float32") if shared == "quantised" else got
        np.testing.assert_array_equal(f64(floats_of), each.astype(np.float32))
    assert_bytes_equal(to_layout(params, "deepseek_v3", prefix=PREFIX), tensors)


@pytest.mark.parametrize("width", [64, 128])
def test_fused_fp8_and_from_one_layout_to_the_other(width, tmp_path):
    """One tensor of all experts; gate and up share blocks unless these divide F."""
    r, names = rng("fused"), {"gate_proj": (width, H), "up_proj": (width, H), "down_proj": (H, width)}
    tensors = {PREFIX + "gate.weight": r.normal(size=(E, H)).astype(np.float32)}
    wanted = []
    for name, (out, inn) in {"gate_up_proj": (2 * width, H), "down_proj": (H, width)}.items():
        own, floats = zip(*(formats.matrix("fp8_block", r, out, inn) for _ in range(E)), strict=True)
        for ending in (".weight", ".weight_scale_inv"):
            fused = np.stack([tensors_of_one[ending] for tensors_of_one in own])
            tensors[f"{PREFIX}experts.{name}{ending.removeprefix('.weight')}"] = fused
        wanted.append(np.stack(floats).swapaxes(1, 2))
    params = load_moe(saved(tmp_path / "a", tensors), "qwen3_moe_fused", prefix=PREFIX)
    for got, want in zip((params.w_gate_up, params.w_down), wanted, strict=True):
        np.testing.assert_array_equal(got.dequantize("float32"), want.astype(np.float32))
    assert_bytes_equal(to_layout(params, "qwen3_moe_fused", prefix=PREFIX), tensors)
    if width % 128:
        with pytest.raises(ValueError, match=r"experts.\{\}.gate_proj.weight cannot be written: blocks of 128 columns"):
            to_layout(params, "qwen3_moe")
    else:
        single = to_layout(params, "qwen3_moe")
        again = load_moe(single, "qwen3_moe")
        for got, want in zip((again.w_gate_up, again.w_down), wanted, strict=True):
            np.testing.assert_array_equal(got.dequantize("float32"), want.astype(np.float32))
        assert {name.split(".")[-2] for name in single if "experts" in name} == names.keys()


def test_matrices_that_were_quantised_here_are_written_too():
    """In the usual form of their format; loading gives them back."""
    r = rng("here")
    gate_up, down = (r.normal(size=shape).astype(np.float32) for shape in ((E, H, 2 * F), (E, F, H)))
    router = r.normal(size=(H, E)).astype(np.float32)
    empty = load_moe(block("fp8_block")[0], "qwen3_moe", prefix=PREFIX)
    for form, how in (
        ("fp8", {}),
        ("fp8", {"block": (1, None)}),
        ("fp8", {"block": (None, None)}),
        ("int4", {"block": (1, 32)}),
        ("int4", {"block": (1, 32), "zero_points": True}),
        ("int8", {"block": (1, None)}),
    ):
        matrices = quantize(gate_up, form, parts=2, **how), quantize(down, form, **how)
        params = empty._replace(router=router, w_gate_up=matrices[0], w_down=matrices[1])
        again = load_moe(to_layout(params, "qwen3_moe"), "qwen3_moe")
        for got, want in zip((again.w_gate_up, again.w_down), matrices, strict=True):
            np.testing.assert_array_equal(got.dequantize("float32"), want.dequantize("float32"))
            jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(got), jax.tree.leaves(want))
    mx = [quantize(w, "mxfp4", parts=parts) for w, parts in ((gate_up, 2), (down, 1))]
    params = empty._replace(router=router, w_gate_up=mx[0], w_down=mx[1])
    again = load_moe(to_layout(params, "qwen3_moe_fused"), "qwen3_moe_fused")
    np.testing.assert_array_equal(again.w_gate_up.values, mx[0].values)


def test_scales_of_e8m0_keep_their_bytes():
    """As float8_e8m0fnu or as uint8, of floats and of integers."""
    tensors, _ = block("fp8_block_e8m0")
    plain = {n: t.view(np.uint8) if n.endswith("_scale_inv") else t for n, t in tensors.items()}
    for each in (tensors, plain):
        params = load_moe(each, "qwen3_moe", prefix=PREFIX)
        assert params.w_down.scales.dtype == np.uint8
        assert_bytes_equal(to_layout(params, "qwen3_moe", prefix=PREFIX), each)
    params = load_moe(block("ct_int4")[0], "qwen3_moe", prefix=PREFIX)
    gate_up, down = (
        dataclasses.replace(q, scales=np.full(q.scales.shape, 120, np.uint8), published=None)
        for q in (params.w_gate_up, params.w_down)
    )
    written = to_layout(params._replace(w_gate_up=gate_up, w_down=down), "qwen3_moe")
    again = load_moe(written, "qwen3_moe")
    np.testing.assert_array_equal(again.w_down.scales, down.scales)
    np.testing.assert_array_equal(again.w_gate_up.dequantize("float32"), gate_up.dequantize("float32"))


def test_blocks_that_alternating_gate_and_up_would_mix_are_refused():
    r = rng("mixed")
    gate_up = quantize(r.normal(size=(2, 128, 256)).astype(np.float32), "fp8", parts=2)
    down = quantize(r.normal(size=(2, 128, 128)).astype(np.float32), "fp8")
    empty = load_moe(gpt_oss()[0], "gpt_oss", prefix=PREFIX)
    zeros = {"router": (128, 2), "router_bias": (2,), "b_gate_up": (2, 256), "b_down": (2, 128)}
    params = empty._replace(w_gate_up=gate_up, w_down=down, **{n: np.zeros(s, np.float32) for n, s in zeros.items()})
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj alternates gate and up, which blocks of"):
        to_layout(params, "gpt_oss")
    by_rows = {
        n: quantize(w.dequantize(), "fp8", block=(1, None)) for n, w in (("w_gate_up", gate_up), ("w_down", down))
    }
    rows = params._replace(**by_rows)
    again = load_moe(to_layout(rows, "gpt_oss"), "gpt_oss")
    np.testing.assert_array_equal(again.w_gate_up.dequantize("float32"), rows.w_gate_up.dequantize("float32"))


# ---- which file holds what


def test_the_index_says_which_file_holds_what(tmp_path):
    """Overlays and stray files do not matter, nor does a missing file of other blocks."""
    tensors, _ = block("fp8_block")
    path = saved(tmp_path / "a", tensors)
    gate = PREFIX + "gate.weight"
    formats.save(path / "consolidated.safetensors", tensors)
    formats.save(path / "model-overlay.safetensors", {gate: tensors[gate] + tensors[gate]})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {gate: "model-overlay.safetensors", "model.layers.4.mlp.gate.weight": "not-here.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    params = load_moe(path, "qwen3_moe", prefix=PREFIX)
    np.testing.assert_array_equal(params.router.T, tensors[gate] + tensors[gate])
    with pytest.raises(FileNotFoundError, match=r"not-here.safetensors is missing: .* holds 1 tensors, model.layers.4"):
        load_moe(path, "qwen3_moe", prefix="model.layers.4.mlp.")
    index["weight_map"][PREFIX + "experts.9.up_proj.weight"] = "model-overlay.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-overlay.safetensors lacks .*experts.9.up_proj.weight"):
        load_moe(path, "qwen3_moe", prefix=PREFIX)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_or_config_that_is_damaged(text, tmp_path):
    path = saved(tmp_path / "a", block("fp8_block")[0])
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"load_moe: .*model.safetensors.index.json (is no JSON|should h)"):
        load_moe(path, "qwen3_moe", prefix=PREFIX)
    path = saved(tmp_path / "b", block("fp8_block")[0])
    (path / "config.json").write_text(text)
    if text in ("", "[]"):
        with pytest.raises(ValueError, match=r"load_moe: .*config.json (is no JSON|should hold an object)"):
            load_moe(path, "qwen3_moe", prefix=PREFIX)


def test_damaged_files(tmp_path):
    tensors, _ = block("fp8_block")
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    formats.save(good, tensors)
    whole = good.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length]
    for data, message in (
        (b"abc", "is no safetensors file: it has 3 bytes"),
        (whole[:100], "it has no header of"),
        (b"\xff" * 7 + b"\x7f" + whole[8:], "it has no header of"),
        (whole[:8] + header.replace(b"{", b"[", 1) + whole[8 + length :], "it has no header of"),
        (whole[:-1], "is cut off or damaged: .*should stand in bytes"),
        (
            whole[:8] + header.replace(b'"F8_E4M3"', b'"F9_E4M3"', 1) + whole[8 + length :],
            "describes .* cannot be read",
        ),
        (whole[:8] + header.replace(b"[3,", b"[9,", 1).replace(b"[3, ", b"[9, ", 1) + whole[8 + length :], "damaged"),
    ):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_moe(bad, "qwen3_moe", prefix=PREFIX)


def test_a_path_that_is_none(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder Qwen/Qwen3.*snapshot_download\('Qwen/Qwen3-30B-A3B'\)"
    ):
        load_moe("Qwen/Qwen3-30B-A3B", "qwen3_moe")
    with pytest.raises(FileNotFoundError, match=r"no file or folder \S*/nothing$"):
        load_moe(tmp_path / "nothing", "qwen3_moe")


# ---- what config.json says


@pytest.mark.parametrize(
    ("layout", "said", "message"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 4}, "top_k is 4 in config.json, and 8 in the preset"),
        ("qwen3_moe_fused", {"norm_topk_prob": False}, "norm_topk_prob is False in config.json, and True"),
        ("deepseek_v3", {"routed_scaling_factor": 1.0}, "scale is 1.0 in config.json, and 2.5"),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}, "num_groups is 1 in config.json, and 8"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 3}, "group_top_k is 3 in config.json, and 4"),
        ("gpt_oss", {"text_config": {"swiglu_limit": 8.0}}, "swiglu_limit is 8.0 in config.json, and 7"),
    ],
)
def test_a_config_that_disagrees_with_the_preset(layout, said, message, tmp_path):
    path = saved(tmp_path / "a", block("fp8_block")[0], config=said)
    with pytest.raises(ValueError, match=f"load_moe: config.json disagrees with the preset(.|\n)*{message}"):
        load_moe(path, layout, prefix=PREFIX)


def test_a_preset_that_agrees_is_taken(tmp_path):
    path = saved(tmp_path / "a", block("fp8_block")[0], config={"num_experts_per_tok": 4, "n_group": 1})
    mine = dataclasses.replace(presets.qwen3_moe, top_k=4)
    assert load_moe(path, "qwen3_moe", prefix=PREFIX, preset=mine).router.shape == (H, E)
    assert load_moe(path, LAYOUTS["qwen3_moe"], prefix=PREFIX).router.shape == (H, E)  # a layout without a name


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            NotImplementedError,
            "config.json says quant_method .bitsandbytes",
        ),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            NotImplementedError,
            "checkpoint_format 'marlin' of gptq",
        ),
        ({"quant_method": "awq", "version": "gemv"}, NotImplementedError, "version 'gemv' of awq"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, NotImplementedError, "nvfp4"),
        ("fp8", ValueError, "quantization_config of config.json should be an object; got 'fp8'"),
        ({"quant_method": ["fp8"]}, NotImplementedError, "config.json says quant_method"),
        ({"quant_method": "fp8", "weight_block_size": 128}, ValueError, "should be two numbers; got 128"),
        ({"quant_method": "awq"}, ValueError, r"config.json says awq, and .*\(in model-.*safetensors\) is of fp8"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, ValueError, r"blocks of \(64, 64\) of a matrix"),
    ],
)
def test_a_quantization_config_of_something_else(said, error, message, tmp_path):
    path = saved(tmp_path / "a", block("fp8_block")[0], config={"quantization_config": said})
    with pytest.raises(error, match=f"load_moe: (.|\n)*{message}"):
        load_moe(path, "qwen3_moe", prefix=PREFIX)


# ---- tensors that do not fit together

EXPERT = PREFIX + "experts.1.up_proj"


def changed(form, ending, change):
    tensors, _ = block(form)
    tensors[EXPERT + ending] = change(tensors[EXPERT + ending])
    return tensors


@pytest.mark.parametrize(
    ("form", "ending", "change", "error", "message"),
    [
        (
            "fp8_block",
            ".weight_scale_inv",
            lambda s: np.ones((3, 3), s.dtype),
            ValueError,
            r"one scale for each of .*got shape \(3, 3\)",
        ),
        (
            "fp8_block",
            ".weight_scale_inv",
            lambda s: s.astype("bfloat16"),
            ValueError,
            "is fp8 in .*bfloat16.*, and experts.0.gate_proj",
        ),
        (
            "fp8_block",
            ".weight",
            lambda w: w.view("float8_e5m2"),
            ValueError,
            "should be float8_e4m3fn; got float8_e5m2",
        ),
        ("ct_int4", ".weight_packed", lambda w: w[:, :-1], ValueError, "_packed has 19 words for 160 numbers"),
        ("ct_int4", ".weight_packed", lambda w: np.repeat(w, 4, 1), ValueError, "16 bits each; 4 and 8 are read"),
        (
            "ct_int4",
            ".weight_scale",
            lambda s: s[:, :3],
            ValueError,
            "_scale has 3 groups, which do not divide",
        ),
        ("ct_int4", ".weight_scale", lambda s: s[:3], ValueError, r"_scale should have shape \(64, 5\); got \(3, 5\)"),
        ("ct_int4_zero", ".weight_zero_point", lambda z: z[:1], ValueError, r"_zero_point should have shape \(8, 5\)"),
        ("ct_int4", ".weight_shape", lambda s: s[::-1], ValueError, r"_shape should be \(64, 160\); got \[160, 64\]"),
        ("gptq4", ".g_idx", lambda g: g[::-1], NotImplementedError, r"g_idx puts .*\(desc_act, or act-order\)"),
        ("gptq4", ".qzeros", lambda z: z[:, :1], ValueError, r".qzeros should have shape \(5, 8\); got \(5, 1\)"),
        ("gptq8", ".qzeros", lambda z: np.full_like(z, -1), ValueError, "qzeros holds 255"),
        (
            "ct_int4",
            ".weight_packed",
            lambda w: w.astype(np.float32),
            ValueError,
            "_packed should be int32; got float32",
        ),
        ("gptq4", ".qweight", lambda w: w.astype(np.int64), ValueError, ".qweight should be int32; got int64"),
        ("fp8_block", ".weight_scale_inv", lambda s: s.astype(int), ValueError, "_scale_inv should be .*; got int64"),
        ("awq4", ".qzeros", lambda z: z[:, :1], ValueError, r".qzeros should have shape \(5, 8\); got \(5, 1\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_file(form, ending, change, error, message, tmp_path):
    path = saved(tmp_path / "a", changed(form, ending, change))
    with pytest.raises(error, match=message) as caught:
        load_moe(path, "qwen3_moe", prefix=PREFIX)
    assert "experts.1.up_proj" in str(caught.value)
    assert ".safetensors)" in str(caught.value)


def test_two_formats_in_one_block_and_missing_tensors():
    fp8, int4 = block("fp8_block")[0], block("ct_int4")[0]
    mixed = {name: t for name, t in fp8.items() if "experts.2." not in name}
    mixed |= {name: t for name, t in int4.items() if "experts.2." in name}
    with pytest.raises(
        ValueError, match=r"experts.2.gate_proj.weight is int4 in blocks of .*, and experts.0.* is fp8 in"
    ):
        load_moe(mixed, "qwen3_moe", prefix=PREFIX)
    plain = {name: t for name, t in fp8.items() if "experts.2." not in name}
    plain |= {f"{PREFIX}experts.2.{n}.weight": np.zeros(shape, np.float32) for n, shape in NAMES.items()}
    with pytest.raises(ValueError, match=r"experts.2.gate_proj.weight is not quantised, and experts.0.* is fp8 in"):
        load_moe(plain, "qwen3_moe", prefix=PREFIX)
    for form, ending in (("ct_int4", ".weight_scale"), ("gptq4", ".qzeros"), ("awq4", ".scales")):
        tensors, _ = block(form)
        del tensors[EXPERT + ending]
        with pytest.raises(ValueError, match=r"experts.1.up_proj.*: these make no matrix of a known format"):
            load_moe(tensors, "qwen3_moe", prefix=PREFIX)


@pytest.mark.parametrize(
    ("ending", "what"),
    [(".weight_scale_2", "NVFP4"), (".weight.absmax", "bitsandbytes"), (".SCB", "bitsandbytes")],
)
def test_formats_that_are_not_read(ending, what):
    tensors, _ = block("fp8_block")
    with pytest.raises(NotImplementedError, match=f"experts.1.up_proj{ending} is of {what}, not read"):
        load_moe(tensors | {EXPERT + ending: np.ones(1, np.float32)}, "qwen3_moe", prefix=PREFIX)


def test_scales_of_activations_are_left_aside():
    tensors, _ = block("fp8_tensor")
    more = {name.replace("weight_scale", "input_scale"): t for name, t in tensors.items() if "weight_scale" in name}
    params = load_moe(tensors | more, "qwen3_moe", prefix=PREFIX)
    assert_bytes_equal(to_layout(params, "qwen3_moe", prefix=PREFIX), tensors)


def test_a_scale_that_is_nan_is_nan():
    """e8m0 255 is NaN by its definition, and so is all that it scales."""
    tensors, _ = gpt_oss()
    tensors[PREFIX + "experts.down_proj_scales"][1, 5, 0] = 255
    down = load_moe(tensors, "gpt_oss", prefix=PREFIX).w_down.dequantize("float32")
    assert np.all(np.isnan(down[1, :32, 5]))
    assert np.isnan(down).sum() == 32


# ---- hints


def test_what_an_error_suggests(tmp_path):
    tensors, _ = block("ct_int4")
    for prefix, hint in (
        (PREFIX[:-1], r"'model.layers.3.mlp.'\? Its final dot is part of a prefix"),
        ("model.layers.4.mlp.", "'model.layers.3.mlp.' would have a gate.weight"),
    ):
        for source in (tensors, saved(tmp_path / "a", tensors)):
            with pytest.raises(ValueError, match=f"no tensor's name begins with the prefix '{prefix}'; {hint}"):
                load_moe(source, "qwen3_moe", prefix=prefix)
    with pytest.raises(ValueError, match=r"not those of layout 'mixtral'; the names are those of layout .*'qwen3_moe'"):
        load_moe(tensors, "mixtral", prefix=PREFIX)
    with pytest.raises(ValueError, match=r"no tensor is named router.weight either; the first names are model.layers"):
        load_moe(tensors, "gpt_oss", prefix="model.")
