"""nnx.MoE with quantised experts: made, loaded, saved, trained beside, scanned over, and divided by a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from cases import rng
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from meshes import mesh_of
from oracle import assert_near
from test_nnx import call, make, tokens
from test_published import PREFIX, assert_bytes_equal, block, gpt_oss
from test_quantized import rare

from ferrum_jax import QuantizedMatrices, presets, quantize
from ferrum_jax.checkpoint import load_moe, to_layout
from ferrum_jax.nnx import MoE, Quantized, scan_layers

H = 160
SMALL = dataclasses.replace(presets.mixtral, num_experts=4, top_k=2)
FORMS = {
    "fp8": {"block": (2, 4)},
    "mxfp4": {},
    "int4": {"block": (1, 16), "zero_points": True},
}


def wide(form, **kwargs):
    """A module whose widths these formats' blocks fit, of float parameters; and the same, quantised."""
    r = rng("wide", form)
    floats = MoE(32, 64, SMALL, rngs=nnx.Rngs(0), **kwargs)
    floats.load(floats.params()._make(None if p is None else r.normal(size=p.shape) / 8 for p in floats.params()))
    quantized = nnx.clone(floats)
    quantized.quantize(form, **FORMS[form])
    return floats, quantized


def as_floats(module):
    """The module with the arrays that its quantised matrices stand for."""
    params = module.params()
    dense = [p.dequantize() if isinstance(p, QuantizedMatrices) else p for p in params]
    other = nnx.clone(module)
    other.load(params._make(dense))
    return other


@pytest.mark.parametrize("form", ["mxfp4", rare("fp8"), rare("int4")])
def test_a_module_is_quantised_in_place(form):
    floats, quantized = wide(form)
    for name, parts in (("w_gate_up", 2), ("w_down", 1)):
        variable, matrices = getattr(quantized, name), getattr(floats, name)[...]
        assert type(variable) is Quantized
        want = quantize(matrices, form, parts=parts, **FORMS[form])
        jax.tree.map(np.testing.assert_array_equal, variable.get_value(), want)
        assert variable.shape == matrices.shape
    assert type(quantized.router) is nnx.Param
    x = tokens(6, 32)
    dense = as_floats(quantized)
    assert type(dense.w_down) is nnx.Param
    assert_near(call(quantized, x), call(dense, x), "float32")
    assert not np.allclose(call(quantized, x), call(floats, x))  # the rounding is there
    with pytest.raises(ValueError, match=f"MoE: w_gate_up is quantised already, in format '{form}'"):
        quantized.quantize(form, **FORMS[form])


def test_gradients_and_an_optimiser_see_what_can_be_trained():
    _, module = wide("int4")
    x, target = tokens(6, 32), tokens(6, 32, dtype="float32")[::-1]

    def loss(module):
        return jnp.mean(jnp.square(module(x) - target))

    gradient = nnx.grad(loss)(module)
    assert set(gradient) == {"router"}
    assert_near(gradient["router"][...], nnx.grad(loss)(as_floats(module))["router"][...], "float32")
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)
        before = loss(module)
        matrices = jax.tree.map(np.asarray, module.w_down.get_value())
        for _ in range(5):
            optimizer.update(module, nnx.grad(loss)(module))
    assert loss(module) < before
    jax.tree.map(np.testing.assert_array_equal, module.w_down.get_value(), matrices)


@pytest.mark.parametrize(
    ("form", "layout", "preset"),
    [("fp8_block", "deepseek_v3", presets.deepseek_v3), ("ct_int4", "kimi_k2", presets.kimi_k2)],
)
def test_from_a_quantised_checkpoint_and_back(form, layout, preset):
    """With quantised or plain shared experts. The module returns the checkpoint's bytes."""
    tensors, _ = block(form, shared="plain" if form == "ct_int4" else "quantised")
    small = dataclasses.replace(preset, num_experts=3, top_k=2, num_groups=None, group_top_k=None)
    params = load_moe(tensors, layout, prefix=PREFIX)
    module = MoE.from_params(params, small)
    assert isinstance(module.w_gate_up, Quantized)
    assert isinstance(module.shared_w_down, Quantized) == (form == "fp8_block")
    assert_bytes_equal(to_layout(module.params(), layout, prefix=PREFIX), tensors)
    dense = MoE.from_params(load_moe(tensors, layout, prefix=PREFIX, dequantize="float32"), small, dtype="float32")
    x = tokens(5, H) / 8
    module.dtype = jnp.dtype("float32")
    assert_near(call(module, x), call(dense, x), "float32")
    assert module(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_gpt_oss_with_its_biases():
    tensors, _ = gpt_oss()
    small = dataclasses.replace(presets.gpt_oss, num_experts=3, top_k=2)
    module = MoE.from_params(load_moe(tensors, "gpt_oss", prefix=PREFIX), small)
    plain = MoE.from_params(load_moe(tensors, "gpt_oss", prefix=PREFIX, dequantize="bfloat16"), small)
    x = (tokens(5, H) / 8).astype(jnp.bfloat16)
    np.testing.assert_array_equal(module.w_down.get_value().dequantize(), plain.w_down[...])  # bfloat16 holds MXFP4
    got = call(module, x)
    assert got.dtype == jnp.bfloat16
    assert_near(got, call(plain, x), "bfloat16")
    assert_bytes_equal(to_layout(module.params(), "gpt_oss", prefix=PREFIX), tensors)


def test_orbax_round_trip(tmp_path):
    _, module = wide("int4")

    def build():
        module = MoE(32, 64, SMALL, rngs=nnx.Rngs(0))
        module.quantize("int4", **FORMS["int4"])
        return module

    graph, shapes = nnx.split(nnx.eval_shape(build))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(module))
        checkpointer.wait_until_finished()
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "state", shapes))
    assert type(restored.w_down) is Quantized
    jax.tree.map(np.testing.assert_array_equal, restored.params(), module.params())
    np.testing.assert_array_equal(call(restored, tokens(6, 32)), call(module, tokens(6, 32)))


@pytest.mark.parametrize("form", ["int4", rare("fp8"), rare("mxfp4")])
def test_scan_layers_reads_them_in_place(form):
    def build(key):
        module = MoE(32, 64, SMALL, rngs=nnx.Rngs(key))
        module.quantize(form, **FORMS[form])
        return module

    blocks = nnx.vmap(build)(jax.random.split(jax.random.key(0), 3))
    x = tokens(6, 32)

    def loss(run):
        def of(blocks, x):
            return jnp.sum(jnp.sin(run(blocks, x)))

        return nnx.jit(nnx.value_and_grad(of, argnums=(0, 1)))(blocks, x)

    def in_place(blocks, x):
        return scan_layers(nnx.remat(lambda moe, x: (x + moe(x), None)), blocks, x)[0]

    def one_by_one(blocks, x):
        graph, state = nnx.split(blocks)
        for i in range(3):
            x = x + nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state))(x)
        return x

    (got, (of_blocks, of_x)), (want, (wanted_blocks, wanted_x)) = loss(in_place), loss(one_by_one)
    assert_near(got, want, "float32")
    assert_near(of_x, wanted_x, "float32")
    assert_near(of_blocks["router"][...], wanted_blocks["router"][...], "float32")
    assert set(of_blocks) == {"router"}


@pytest.mark.parametrize("partition", [rare({"E": "d"}), {"F": "d"}, {"H": "d"}])
def test_loaded_into_a_module_that_a_mesh_divides(partition):
    """Each device gets its part of the numbers, and the scales that belong to it."""
    _, module = wide("int4")
    x, params = tokens(8, 32), module.params()
    want = call(module, x)
    mesh = mesh_of(2, AxisType.Explicit)
    with jax.set_mesh(mesh):
        divided = MoE(32, 64, SMALL, rngs=nnx.Rngs(0), partition=partition)
        divided.load(params)
        matrices = divided.w_down.get_value()
        for leaf in (matrices.values, matrices.scales):
            assert isinstance(leaf.sharding, NamedSharding)
            assert leaf.addressable_shards[0].data.size * 2 == leaf.size
        got = call(divided, jax.device_put(x, jax.P("d")))
        back = divided.params()
        divided.load(back)
    assert_near(got, want, "float32")
    np.testing.assert_array_equal(back.w_gate_up.dequantize("float32"), params.w_gate_up.dequantize("float32"))


def test_a_module_is_quantised_whole_or_not_at_all():
    module = MoE(32, 17, SMALL, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="w must have a multiple of 8 entries along H"):
        module.quantize("int8", block=(1, 8))
    assert type(module.w_gate_up) is nnx.Param


def test_shapes_that_do_not_fit():
    _, module = wide("int4")
    params = make(SMALL).params()
    with pytest.raises(ValueError, match=r"w_gate_up must be \(4, 32, 128\); got \(4, 8, 6\)"):
        module.load(params)


def test_fp8_rows():
    _, module = wide("fp8", activations="float8_e4m3fn")
    _, plain = wide("fp8")
    x = tokens(6, 32)
    got, want = call(module, x), call(plain, x)
    assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()
    with pytest.raises(ValueError, match="MoE: activations must be one of None, 'float8_e4m3fn'; got 'int8'"):
        wide("fp8", activations="int8")
    with pytest.raises(ValueError, match="activations='float8_e4m3fn' needs QuantizedMatrices of format 'fp8'"):
        wide("int4", activations="float8_e4m3fn")[1](x)
