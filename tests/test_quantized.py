"""QuantizedMatrices: what their numbers stand for, how `quantize` rounds, products with them, and their derivatives."""

import dataclasses
import functools

import formats
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import qwix
from cases import DTYPES, rng
from derivatives import check_derivatives
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from oracle import ACTIVATIONS, assert_close, assert_near, f64
from test_mlp import dense

import ferrum_jax
from ferrum_jax import LayerOf, QuantizedMatrices, moe_mlp, quantize, ragged_dot
from ferrum_jax.core.stored import specs_of

E, H, F, T, K = 5, 64, 40, 9, 2
E8M0 = "float8_e8m0fnu"
# (format, dtype of the scales, block, zero points). H and F are such that the last block of 24 entries is short.
KINDS = {
    "fp8 blocks": ("fp8", "float32", (16, 24), False),
    "fp8 blocks, e8m0": ("fp8", E8M0, (16, 24), False),
    "fp8 rows": ("fp8", "bfloat16", (1, None), False),
    "fp8 whole": ("fp8", "float32", (None, None), False),
    "mxfp4": ("mxfp4", E8M0, (1, 32), False),
    "int8": ("int8", "float16", (1, 8), False),
    "int8 zeros": ("int8", "float32", (1, 8), True),
    "int4": ("int4", "bfloat16", (1, 8), False),
    "int4 zeros": ("int4", "float16", (1, 8), True),
    "int4, e8m0": ("int4", E8M0, (1, 8), False),
    "int4 rows": ("int4", "float32", (1, None), True),
}


USUAL = ("fp8 blocks", "mxfp4", "int4 zeros")


def rare(*values):
    """A cell that repeats others: it is part of a full run alone."""
    return pytest.param(*values, marks=pytest.mark.full)


ALL_KINDS = [*USUAL, *[rare(kind) for kind in KINDS if kind not in USUAL]]


def stored(kind, *shape, parts=1, seed=0):
    """Random matrices of this kind [..., H, N], and what they stand for in float64."""
    form, dtype, block, zero_points = KINDS[kind]
    *lead, h, n = shape
    r, rows, columns = rng("stored", kind, shape, seed), block[0] or n // parts, block[1] or h
    grid = *lead, parts * -(-(n // parts) // rows), -(-h // columns)
    codes = r.integers(0, 16 if form in ("mxfp4", "int4") else 256, (*lead, n, h)).astype(np.uint8)
    if form == "fp8":
        codes[codes % 128 == 127] = 0  # NaN has a test of its own
    # Scales such that entries are about 1 at most.
    scales, less = formats.random_scales(r, grid, np.dtype(dtype)), {"fp8": 9, "mxfp4": 3, "int8": 8, "int4": 4}[form]
    scales = (scales.view(np.uint8) - less).view(dtype) if dtype == E8M0 else (scales / 2**less).astype(dtype)
    middle = {"int4": 8, "int8": 128}.get(form)
    zeros = r.integers(0, 2 * middle, grid).astype(np.uint8) if zero_points else None

    def entry_of(grid):
        """Each entry's scale, by loops over the blocks."""
        wide, part = np.zeros((*lead, n, h)), n // parts
        per_part = grid.shape[-2] // parts
        for i, j in np.ndindex(grid.shape[-2:]):
            first = (i // per_part) * part + (i % per_part) * rows
            last = min(first + rows, (i // per_part + 1) * part)
            wide[..., first:last, j * columns : (j + 1) * columns] = grid[..., i, j, None, None]
        return wide

    decode = {"fp8": formats.e4m3, "mxfp4": formats.e2m1}.get(form, np.float64)
    offset = 0 if middle is None else middle if zeros is None else entry_of(f64(zeros))
    w = (decode(codes) - offset) * entry_of(formats.exact(scales))
    values = codes if form in ("fp8", "int8") else codes[..., ::2] + 16 * codes[..., 1::2]
    scales = scales.view(np.uint8) if dtype == E8M0 else scales
    matrices = QuantizedMatrices(values, scales, zeros, form, block, parts, jnp.dtype("bfloat16"))
    return jax.tree.map(jnp.asarray, matrices), np.swapaxes(w, -1, -2)


def layer_of(kind, seed=0):
    """x, logits; w_gate_up and w_down, quantised; and both in float64."""
    r = rng("layer", kind, seed)
    x, logits = (r.normal(size=shape).astype(np.float32) for shape in ((T, H), (T, E)))
    width = H if kind == "mxfp4" else F
    pairs = stored(kind, E, H, 2 * width, parts=2, seed=seed), stored(kind, E, width, H, seed=seed + 1)
    return x, logits, *map(list, zip(*pairs, strict=True))


# ---- what the numbers stand for


@pytest.mark.parametrize(
    ("kind", "parts"), [(k, p) if p == 2 or k == "int4" else rare(k, p) for k in KINDS for p in (1, 2)]
)
def test_the_array_bit_for_bit(kind, parts):
    q, w = stored(kind, 2, 64, 80, parts=parts)
    assert (q.shape, q.ndim, q.dtype) == ((2, 64, 80), 3, jnp.bfloat16)
    for dtype in DTYPES:
        want = w.astype(np.float32).astype(np.dtype(dtype))
        for got in (q.dequantize(dtype), jax.jit(QuantizedMatrices.dequantize, static_argnums=1)(q, dtype)):
            assert got.dtype == dtype
            np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.ascontiguousarray(want).view(np.uint8))
    assert q.dequantize().dtype == jnp.bfloat16
    assert q.astype("float16").dequantize().dtype == jnp.float16
    assert q.nbytes == sum(x.nbytes for x in jax.tree.leaves(q))


@pytest.mark.parametrize(("form", "decode", "codes"), [("fp8", formats.e4m3, 256), ("mxfp4", formats.e2m1, 16)])
def test_every_number_times_every_power_of_two(form, decode, codes):
    """Subnormal products are kept, past the largest number there is infinity, and 255 and NaN are NaN."""
    numbers = np.repeat(np.arange(codes, dtype=np.uint8), 32).reshape(codes, 32)
    numbers = np.broadcast_to(numbers, (256, codes, 32))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, codes, 1))
    values = numbers if form == "fp8" else numbers[..., ::2] + 16 * numbers[..., 1::2]
    got = QuantizedMatrices(values, scales, None, form, (1, 32)).dequantize("float32")
    with np.errstate(over="ignore"):
        want = (decode(numbers) * formats.e8m0(scales)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(got), np.swapaxes(want, -1, -2))
    assert np.any((want != 0) & (np.abs(want) < np.finfo(np.float32).tiny))  # XLA for a CPU takes these for 0


# ---- rounding


def nearest(x, numbers):
    """The nearest of the sorted numbers, of two equally near ones that at the even place."""
    place = np.clip(np.searchsorted(numbers, x), 1, len(numbers) - 1)
    low, high = numbers[place - 1], numbers[place]
    down = (x - low < high - x) | ((x - low == high - x) & ((place - 1) % 2 == 0))
    return np.where(down, low, high)


def test_fp8_is_rounded_to_nearest_and_saturates():
    r = rng("fp8")
    w = np.concatenate([r.normal(size=4000), [0.0, 448, -448, 447, 2.0**-9, 2.0**-10, 2.0**-11]]).astype(np.float32)
    w = np.resize(w, (1, 64, 64))
    w[0, 0, 0] = 448  # so that the scale is 1
    got = quantize(jnp.asarray(w), "fp8", block=(None, None))
    assert got.scales.tolist() == [[[1.0]]]
    np.testing.assert_array_equal(got.dequantize("float32"), w.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize("parts", [1, 2])
def test_fp8_blocks_have_the_scale_of_their_largest_entry(parts):
    w = rng("blocks").normal(size=(2, 40, 72)).astype(np.float32)
    got = quantize(jnp.asarray(w), "fp8", block=(16, 24), parts=parts)
    part = 72 // parts
    rows = [(i * part + j, min(i * part + j + 16, (i + 1) * part)) for i in range(parts) for j in range(0, part, 16)]
    assert got.scales.shape == (2, len(rows), 2)
    for e, (i, (first, last)), j in np.ndindex(2, 1, 1) and [
        (e, row, j) for e in range(2) for row in enumerate(rows) for j in range(2)
    ]:
        block = w[e, 24 * j : 24 * j + 24, first:last]
        scale = np.float32(np.abs(block).max()) / np.float32(448)
        assert abs(got.scales[e, i, j] - scale) <= np.spacing(scale)
        want = f64((block / np.asarray(got.scales[e, i, j])).astype(ml_dtypes.float8_e4m3fn))
        np.testing.assert_array_equal(
            got.dequantize("float32")[e, 24 * j : 24 * j + 24, first:last],
            (want * f64(got.scales[e, i, j])).astype(np.float32),
        )


def test_mxfp4_is_rounded_as_its_specification_says():
    w = np.concatenate([rng("mx").normal(size=(1, 32, 200)), np.linspace(-7, 7, 32 * 57).reshape(1, 32, 57)], -1)
    w = w.astype(np.float32)
    got = quantize(jnp.asarray(w), "mxfp4")
    numbers = np.sort(formats.e2m1(np.arange(8)))
    scale = 2.0 ** (np.floor(np.log2(np.abs(w).max(1))) - 2)
    np.testing.assert_array_equal(formats.e8m0(got.scales)[..., 0], scale)
    want = np.sign(w) * nearest(np.abs(w) / scale[:, None], numbers) * scale[:, None]
    np.testing.assert_array_equal(got.dequantize("float32"), want.astype(np.float32))


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize(("form", "bits"), [("int4", 4), ("int8", 8)])
@pytest.mark.parametrize("dtype", ["bfloat16", rare("float32"), rare("float16")])
def test_integers_are_within_half_a_step(form, bits, zero_points, dtype):
    w = jnp.asarray(1 + rng("int").normal(size=(2, 64, 7)), dtype)
    got = quantize(w, form, block=(1, 16), zero_points=zero_points)
    assert (got.scales.dtype, got.dtype) == (w.dtype, w.dtype)
    groups = f64(w).reshape(2, 4, 16, 7)
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    step = (high - low) / (2**bits - 1) if zero_points else np.maximum(-low, high) / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(f64(got.scales), np.swapaxes(step, 1, 2), rtol=4 * float(jnp.finfo(dtype).eps))
    wide = np.repeat(np.swapaxes(f64(got.scales), 1, 2), 16, axis=1)
    error = np.abs(f64(got.dequantize("float32")) - f64(w))
    # A scale that is rounded down, and a zero point that is rounded, each cut off up to a step's part at the ends.
    room = 2 ** (bits - 1) * float(jnp.finfo(dtype).eps) + (0.5 if zero_points else 0)
    assert np.all(error <= wide * (0.5 + room + 1e-3))


def test_zeros_and_nan_in_a_block():
    w = np.zeros((1, 64, 3), np.float32)
    for nan in (np.nan, -np.nan):
        w[0, 40, 1] = nan
        for form in ("fp8", "mxfp4", "int8", "int4"):
            got = quantize(jnp.asarray(w), form, block=(1, 32))
            scales = np.asarray(got.scales)
            assert formats.exact(scales.view(E8M0) if form == "mxfp4" else scales)[0, 0, 0] == 1
            floats = np.asarray(got.dequantize("float32"))
            assert np.all(np.isnan(floats[0, 32:, 1]))
            assert not np.any(floats[0, :32])
            assert not np.any(floats[0, :, ::2])


def test_matrices_of_no_entries():
    for shape in ((0, 128, 4), (2, 128, 0), (2, 0, 4)):
        for form in ("fp8", "mxfp4", "int8"):
            got = quantize(jnp.zeros(shape), form)
            assert got.shape == shape
            assert got.dequantize().shape == shape


def test_scales_of_few_bits_are_normal_numbers():
    """float16 has no scale for the smallest entries of float16, and none for the largest of float32."""
    tiny = np.full((32, 1), 1e-5, np.float16)
    for how in ({}, {"scale_dtype": "float16"}):
        got = quantize(tiny, "int8", block=(1, None), **how).dequantize("float32")
        step = 2.0**-14 if how else 1e-5 / 127
        np.testing.assert_allclose(got, f64(tiny), atol=step / 2 * 1.01)
    huge = np.full((32, 1), 3e38, np.float32)
    huge[0] = -3e38
    for how in ({"scale_dtype": "float16"}, {}):
        assert np.all(np.isfinite(quantize(huge, "fp8", **how).dequantize("float32")))
        assert np.all(np.isfinite(quantize(huge, "int8", block=(1, 32), zero_points=True, **how).dequantize("float32")))


@pytest.mark.parametrize("divided", [0, 1, 2])
def test_quantize_in_an_explicit_mesh(divided):
    mesh, w = mesh_of(2, AxisType.Explicit), rng("mesh").normal(size=(2, 64, 48)).astype(np.float32)
    with jax.set_mesh(mesh):
        placed = jax.device_put(w, NamedSharding(mesh, P(*["d" if i == divided else None for i in range(3)])))
        got = quantize(placed, "int4", block=(1, 16), zero_points=True)
    want = quantize(w, "int4", block=(1, 16), zero_points=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ---- products


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, d) if d == "float32" or k == "int4 zeros" else rare(k, d) for k in KINDS for d in DTYPES],
)
def test_ragged_dot_of_any_rows(kind, dtype):
    sizes = np.array([3, 0, 4, 1, 2], np.int32)
    x = rng("rows").normal(size=(T + 1, H)).astype(np.float32).astype(np.dtype(dtype))
    owner = np.repeat(np.arange(E), sizes)
    for transpose in (False, True):
        other = H if kind == "mxfp4" else 40
        q, w = stored(kind, E, *((other, H) if transpose else (H, other)), parts=2)
        matrices = np.swapaxes(w, -1, -2) if transpose else w
        got = jax.jit(functools.partial(ragged_dot, transpose_rhs=transpose))(x, q, sizes)
        assert got.dtype == dtype
        want = np.einsum("mh,mhn->mn", f64(x), matrices[owner])
        size = np.einsum("mh,mhn->mn", np.abs(f64(x)), np.abs(matrices[owner]))
        assert_close(got, want, size, dtype, terms=H)


@pytest.mark.parametrize("flow", ["packed", "pair_ids"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_layer(kind, flow):
    x, logits, quantized, floats = layer_of(kind)
    ids, weights = ferrum_jax.route_topk_softmax(logits, K)
    biases = {"b_gate_up": rng("b").normal(size=(E, floats[0].shape[-1])).astype(np.float32)}
    for more in ({}, biases):
        got = jax.jit(functools.partial(moe_mlp, top_k=K, flow=flow))(x, logits, *quantized, **more)
        assert_close(got, *dense(x, ids, weights, *floats, ACTIVATIONS["silu"], **more), "float32")


@pytest.mark.parametrize(
    "kind", ["fp8 blocks", "int4 zeros", *[rare(k) for k in KINDS if k not in ("fp8 blocks", "int4 zeros")]]
)
def test_gradients_are_those_of_the_dequantised_matrices(kind):
    """To x, to the router, to biases: and none to the scales. In both flows, with a pair for gate and up too."""
    x, logits, (gate_up, down), _ = layer_of(kind)
    float_gate_up, float_down = gate_up.dequantize("float32"), down.dequantize("float32")
    bias = rng("b").normal(size=(E, H)).astype(np.float32)

    def loss(x, logits, bias, gate_up, down, flow):
        return jnp.sum(jnp.sin(moe_mlp(x, logits, gate_up, down, top_k=K, b_down=bias, flow=flow)))

    for flow in ("packed", "pair_ids"):
        run = jax.jit(jax.grad(functools.partial(loss, flow=flow), (0, 1, 2)))
        got, want = run(x, logits, bias, gate_up, down), run(x, logits, bias, float_gate_up, float_down)
        for g, w in zip(got, want, strict=True):
            assert_near(g, w, "float32")
    to_scales = jax.grad(lambda s: loss(x, logits, bias, dataclasses.replace(gate_up, scales=s), down, None))
    if gate_up.scales.dtype != jnp.uint8:
        assert not np.any(to_scales(gate_up.scales))
        assert not np.any(
            jax.grad(lambda s: dataclasses.replace(gate_up, scales=s).dequantize("float32").sum())(gate_up.scales)
        )


@pytest.mark.parametrize(
    ("kind", "flow"),
    [("fp8 blocks", "packed"), ("int4 zeros", "pair_ids"), rare("fp8 blocks", "pair_ids"), rare("mxfp4", "packed")],
)
def test_finite_differences_to_second_order(kind, flow):
    x, _, matrices, _ = layer_of(kind)
    logits = np.argsort(rng("l").random((T, E)), axis=-1).astype(np.float32)  # too far apart to cross

    def layer(x, logits):
        return [moe_mlp(x, logits, *matrices, top_k=K, flow=flow)]

    check_derivatives(layer, (x * np.float32(0.1), logits), seed=0, bound=2e-2)


def test_every_transformation():
    """vmap of some operands, nested and of gradients; jvp, linearize; a scan over LayerOf with remat; donation."""
    x, logits, matrices, _ = layer_of("int4 zeros")
    x3, logits2 = np.stack([x, 2 * x, -x]), np.stack([logits, -logits])

    def run(matrices):
        layer = functools.partial(moe_mlp, top_k=K)
        two = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), tuple(matrices))
        over_tokens = jax.vmap(layer, (0, None, None, None))

        def of_x(x):
            return layer(x, logits, *matrices)

        def slope(x, *matrices):
            return jax.grad(lambda x: layer(x, logits, *matrices).sum())(x)

        def model(stacks, x):
            @jax.checkpoint
            def block(x, inputs):
                layer, own = inputs
                of_stacks = [LayerOf(stack, layer, a) for stack, a in zip(stacks, own, strict=True)]
                return x + moe_mlp(x, logits, *of_stacks, top_k=K), None

            return lax.scan(block, x, (jnp.arange(2), stacks))[0]

        return [
            over_tokens(x3, logits, *matrices),
            jax.vmap(layer, (None, None, 0, 0))(x, logits, *two),
            jax.vmap(over_tokens, (None, 0, 0, 0))(x3, logits2, *two),
            jax.vmap(slope, (None, 0, 0))(x, *two),
            *jax.jvp(of_x, (x,), (x[::-1],)),
            jax.linearize(of_x, x)[1](x),
            jax.jit(model)(two, x),
            jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(model(two, x)))))(x),
        ]

    for got, want in zip(run(matrices), run([q.dequantize("float32") for q in matrices]), strict=True):
        assert_near(got, want, "float32")
    donated = jax.tree.map(jnp.copy, matrices[0])
    kept = jax.jit(lambda q: jax.tree.map(lambda a: a, q), donate_argnums=0)(donated)
    np.testing.assert_array_equal(kept.values, matrices[0].values)
    assert moe_mlp(x[:0], logits[:0], *matrices, top_k=K).shape == (0, H)


def test_linear_transposes():
    """By the rows and by the row weights, each alone: <f(x), y> = <x, f'(y)>."""
    x, logits, (gate_up, down), _ = layer_of("int8")
    routing = ferrum_jax.moe_align_block_size_pair_ids(ferrum_jax.route_topk_softmax(logits, K).expert_ids, E, 4)
    rows, weights = rng("t").normal(size=(T * K, F)).astype(np.float32), rng("w").random(T * K).astype(np.float32)
    product = functools.partial(ferrum_jax.grouped_matmul, rhs=down, routing=routing)
    for f, at in (
        (product, rows),
        (lambda rows: product(rows, row_weights=weights), rows),
        (lambda weights: product(rows, row_weights=weights), weights),
        (lambda w: ferrum_jax.grouped_matmul(x, gate_up, routing, activation="silu", row_weights=w), weights),
    ):
        y = jnp.cos(f(at))
        np.testing.assert_allclose(jnp.vdot(f(at), y), jnp.vdot(at, jax.linear_transpose(f, at)(y)[0]), rtol=1e-4)
    with pytest.raises(NotImplementedError, match="no transpose by lhs, in which an activation is not linear"):
        jax.linear_transpose(lambda x: ferrum_jax.grouped_matmul(x, gate_up, routing, activation="silu"), x)(
            jnp.ones((T * K, F))
        )


def test_an_exported_program():
    x, logits, matrices, _ = layer_of("fp8 blocks")
    matrices = [dataclasses.replace(q, published=("fp8", (("", "float8_e4m3fn", 2),))) for q in matrices]

    def run(x, logits, *matrices):
        return moe_mlp(x, logits, *matrices, top_k=K, activations="float8_e4m3fn"), matrices[0]

    exported = export.export(jax.jit(run), platforms=("cpu", "cuda"), disabled_checks=ferrum_jax.export_checks())
    again = export.deserialize(exported(x, logits, *matrices).serialize())
    (got, same), (want, _) = again.call(x, logits, *matrices), run(x, logits, *matrices)
    assert_near(got, want, "float32")
    assert jax.tree.structure(same) == jax.tree.structure(matrices[0])


def test_matrices_are_turned_into_floats_as_they_are_used():
    """The program's own memory is below that of one expert's matrix in float32."""
    width, hidden = 1024, 1024
    sizes = jnp.array([8] * 8, jnp.int32)
    for form in ("fp8", "mxfp4", "int4"):
        shape = jax.ShapeDtypeStruct((8, hidden, 4 * width), jnp.float32)
        q = jax.eval_shape(lambda w, form=form: quantize(w, form), shape)
        for dtype in DTYPES:
            x = jax.ShapeDtypeStruct((64, hidden), dtype)
            run = jax.jit(
                lambda x, q: jax.vjp(lambda x: ragged_dot(x, q, sizes), x)[1](jnp.ones((64, 4 * width), x.dtype))
            )
            with jax.disable_jit(False):
                memory = run.lower(x, q).compile().memory_analysis()
            assert memory.temp_size_in_bytes < 4 * hidden * 4 * width, (form, dtype, memory.temp_size_in_bytes)


def test_matrices_of_several_tiles():
    """Wide matrices are turned into floats a few of their rows at a time, each with the scales of its own."""
    q, w = stored("fp8 blocks", 2, 512, 4100, parts=2)  # 2,050 columns of a part end in a short block
    x, sizes = rng("wide").normal(size=(3, 512)).astype(np.float32), np.array([2, 1], np.int32)
    owner = np.repeat(np.arange(2), sizes)
    out, pull = jax.vjp(jax.jit(lambda x: ragged_dot(x, q, sizes)), x)
    want, size = (np.einsum("mh,mhn->mn", f(f64(x)), f(w[owner])) for f in (np.asarray, np.abs))
    assert_close(out, want, size, "float32", terms=512)
    g = f64(out)
    want, size = (np.einsum("mn,mhn->mh", f(g), f(w[owner])) for f in (np.asarray, np.abs))
    assert_close(pull(out)[0], want, size, "float32", terms=4100)


# ---- rows rounded to fp8


def rounded(x):
    """Rows with a scale of amax / 448 for each 128 entries."""
    out = np.zeros(x.shape)
    for first in range(0, x.shape[-1], 128):
        block = x[..., first : first + 128].astype(np.float32)
        amax = np.abs(block).max(-1, keepdims=True)
        scale = np.where(amax == 0, np.float32(1), amax / np.float32(448)).astype(np.float32)
        out[..., first : first + 128] = f64((block / scale).astype(ml_dtypes.float8_e4m3fn)) * f64(scale)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_rounded_to_fp8(dtype):
    """Each 128 entries, the last of them few; zeros; NaN stays; the gradient is straight through."""
    h, sizes = 200, np.array([3, 0, 2, 1, 0], np.int32)
    x = rng("fp8 rows").normal(size=(6, h)).astype(np.float32)
    x[0, :128], x[4] = 0, 0
    x = x.astype(np.dtype(dtype))
    q, w = stored("fp8 blocks", E, h, 24)
    product = functools.partial(ragged_dot, rhs=q, group_sizes=sizes, preferred_element_type="float32")
    owner = np.repeat(np.arange(E), sizes)
    rows = rounded(x.astype(np.float32))
    want, size = np.einsum("mh,mhn->mn", rows, w[owner]), np.einsum("mh,mhn->mn", np.abs(rows), np.abs(w[owner]))
    assert_close(product(x, activations="float8_e4m3fn"), want, size, "float32", terms=h)
    for order in (lambda f: jax.grad(lambda x: jnp.sum(f(x))), lambda f: lambda x: jax.jvp(f, (x,), (x,))[1]):
        got, plain = (order(functools.partial(product, activations=a))(x) for a in ("float8_e4m3fn", None))
        np.testing.assert_array_equal(got, plain)
    x = jnp.asarray(x).at[5, 3].set(jnp.nan)
    assert np.all(np.isnan(product(x, activations="float8_e4m3fn")[5]))
    assert np.all(np.isfinite(product(x, activations="float8_e4m3fn")[:5]))


def test_a_layer_of_fp8_rows():
    """Both products round their rows."""
    x, logits, quantized, (gate_up, down) = layer_of("fp8 blocks")
    ids, weights = ferrum_jax.route_topk_softmax(logits, K)
    want = np.zeros(x.shape)
    for t, k in np.ndindex(ids.shape):
        e = int(ids[t, k])
        hidden = ACTIVATIONS["silu"](*np.split(rounded(x[t]) @ gate_up[e], 2))
        want[t] += float(weights[t, k]) * (rounded(hidden.astype(np.float32)) @ down[e])
    for flow in ("packed", "pair_ids"):
        got = moe_mlp(x, logits, *quantized, top_k=K, flow=flow, activations="float8_e4m3fn")
        # A hidden entry between two numbers of fp8 may be rounded to either, by the last bit of its float32 sum.
        assert np.mean(np.abs(f64(got) - want) > 1e-5 * np.abs(want).max()) < 0.2
        assert np.abs(f64(got) - want).max() < 2.0**-4 * np.abs(want).max()


# ---- devices


def put(mesh, q, names, halves=None):
    """The matrices on the mesh, whose axes divide them so."""
    specs = specs_of("test", "w", q, names, mesh, halves)
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), q, specs)


WAYS = ("E", "F", "stored H", "tokens and E")
MORE = (("mxfp4", "stored H"), ("int4 zeros", "F"))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (k, w) if (k, w) in (*MORE, ("fp8 blocks", "E"), ("fp8 blocks", "F")) else rare(k, w)
        for k in ("fp8 blocks", "mxfp4", "int4 zeros", "fp8 whole")
        for w in WAYS
    ],
)
def test_a_layer_that_a_mesh_divides(kind, what):
    """By the types of an Explicit mesh and by `sharding`: the output and the gradients are those of one device."""
    form, _, block, zero_points = KINDS[kind]
    experts, width, hidden = 4, 64, 64
    r = rng("mesh", kind)
    block = (16, 16) if kind == "fp8 blocks" else block
    x, logits = r.normal(size=(8, hidden)).astype(np.float32), r.normal(size=(8, experts)).astype(np.float32)
    make = functools.partial(quantize, format=form, block=block, zero_points=zero_points)
    gate_up = make(r.normal(size=(experts, hidden, 2 * width)).astype(np.float32) / 16, parts=2)
    down = make(r.normal(size=(experts, width, hidden)).astype(np.float32) / 16)

    def loss(x, logits, gate_up, down, **how):
        out = moe_mlp(x, logits, gate_up, down, top_k=K, **how)
        return jnp.sum(jnp.sin(out)), out

    want = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, logits, gate_up, down)
    axis = what.split(" ")[-1]
    tokens = "d" if what in ("tokens and E", "stored H") else None
    names = {letter: ("d",) if letter == axis else () for letter in "EHF"}
    for kind_of_axis in (AxisType.Explicit, AxisType.Auto):
        mesh, how = mesh_of(2, kind_of_axis), {}
        if kind_of_axis == AxisType.Auto:
            along = {"experts": "E", "width": "F", "hidden": "H"}
            sharding = {name: "d" if letter == axis else None for name, letter in along.items()}
            how = {"sharding": ferrum_jax.MoESharding(tokens=tokens, **sharding)}
        with jax.set_mesh(mesh):
            args = [
                *(jax.device_put(a, NamedSharding(mesh, P(tokens))) for a in (x, logits)),
                put(mesh, gate_up, [names[letter] for letter in "EHF"], halves=2),
                put(mesh, down, [names[letter] for letter in "EFH"]),
            ]
            run = jax.jit(jax.value_and_grad(functools.partial(loss, **how), (0, 1), has_aux=True))
            jax.tree.map(lambda g, w: assert_near(g, w, "float32"), run(*args), want)


def test_blocks_that_a_mesh_would_cut_are_refused():
    r = rng("cut")
    gate_up = quantize(r.normal(size=(2, 64, 96)).astype(np.float32), "fp8", block=(32, 32), parts=2)
    down = quantize(r.normal(size=(2, 48, 64)).astype(np.float32), "fp8", block=(32, 32))
    x, logits = np.ones((4, 64), np.float32), np.ones((4, 2), np.float32)
    with (
        jax.set_mesh(mesh_of(2)),
        pytest.raises(ValueError, match=r"w_gate_up has blocks of 32 entries.*'d' would cut"),
    ):
        moe_mlp(x, logits, gate_up, down, top_k=1, sharding=ferrum_jax.MoESharding(width="d"))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name)
def test_parts_that_a_mesh_would_cut_are_refused(kind):
    """A device with other columns than gate's and up's alike would take wrong scales. Whole blocks may be divided."""
    r, mesh = rng("parts"), mesh_of(2, kind)
    x, logits = r.normal(size=(4, 64)).astype(np.float32), r.normal(size=(4, 2)).astype(np.float32)
    down = quantize(r.normal(size=(2, 24, 64)).astype(np.float32), "fp8", block=(1, 12))
    how = {} if kind == AxisType.Explicit else {"sharding": ferrum_jax.MoESharding(width="d")}
    for gate_up, options in (
        (
            quantize(r.normal(size=(2, 64, 48)).astype(np.float32), "fp8", block=(None, None), parts=2),
            {"interleaved": True},
        ),
        (quantize(r.normal(size=(2, 64, 48)).astype(np.float32), "fp8", block=(None, None), parts=4), {}),
    ):
        with jax.set_mesh(mesh):
            placed = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P())), gate_up)
            values = jax.device_put(gate_up.values, NamedSharding(mesh, P(None, "d")))
            placed = dataclasses.replace(placed, values=values)
            with pytest.raises(ValueError, match=r"w_gate_up has \d matrices side by side, .* 'd' would cut"):
                moe_mlp(x, logits, placed, down, top_k=1, **options, **how)
    q = quantize(r.normal(size=(2, 64, 64)).astype(np.float32), "fp8", block=(8, 16), parts=2)
    sizes = jnp.array([3, 1])
    if kind == AxisType.Explicit:
        with jax.set_mesh(mesh):
            got = ragged_dot(x, put(mesh, dataclasses.replace(q, parts=1), [(), (), ("d",)]), sizes)
        assert_near(got, ragged_dot(x, q, sizes), "float32")


def test_experts_spread_over_devices_of_ones_own_shard_map():
    x, logits, matrices, _ = layer_of("int4 zeros")
    x, logits, matrices = x[:8], logits[:8, :4], jax.tree.map(lambda a: a[:4], matrices)

    def with_gradient(layer):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(layer(x, logits, *matrices)))))(x)

    want = with_gradient(functools.partial(moe_mlp, top_k=K))
    for exchange in ("gather", "padded"):
        layer = functools.partial(ferrum_jax.parallel.moe_mlp, axis_name="d", top_k=K, exchange=exchange)
        got = with_gradient(jax.shard_map(layer, mesh=mesh_of(4), in_specs=P("d"), out_specs=P("d")))
        jax.tree.map(lambda g, w: assert_near(g, w, "float32"), got, want)


@pytest.mark.parametrize("what", ["rows", "groups", "contracted", "columns"])
def test_ragged_dot_in_an_explicit_mesh(what):
    q = quantize(rng("ragged").normal(size=(4, 64, 48)).astype(np.float32), "int4", block=(1, 16))
    x, sizes = rng("rows").normal(size=(8, 64)).astype(np.float32), np.array([3, 1, 0, 4], np.int32)
    divided = {"groups": 0, "contracted": 1, "columns": 2}.get(what)

    def with_gradient(x, q):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(ragged_dot(x, q, sizes)))))(x)

    want, mesh = with_gradient(x, q), mesh_of(2, AxisType.Explicit)
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, P("d") if what == "rows" else P()))
        got = with_gradient(rows, put(mesh, q, [("d",) if i == divided else () for i in range(3)]))
    jax.tree.map(lambda g, w: assert_near(g, w, "float32"), got, want)


# ---- training beside them


def test_a_lora_step_on_frozen_mxfp4_experts_lowers_the_loss():
    """An optimiser sees the adapters; the experts are a part of the same tree."""
    r = rng("lora")
    x, logits = r.normal(size=(16, H)).astype(np.float32), r.normal(size=(16, E)).astype(np.float32)
    gate_up, down = (
        quantize(r.normal(size=shape).astype(np.float32) / 8, "mxfp4") for shape in ((E, H, 2 * H), (E, H, H))
    )
    target = r.normal(size=(16, H)).astype(np.float32)
    tree = {
        "experts": (gate_up, down),
        "a": r.normal(size=(H, 4)).astype(np.float32) / 8,
        "b": np.zeros((4, H), np.float32),
        "router": r.normal(size=(H, E)).astype(np.float32) / 8,
    }
    trained = {"experts": jax.tree.map(lambda _: False, (gate_up, down)), "a": True, "b": True, "router": True}
    optimizer = optax.masked(optax.adam(1e-2), trained)

    def loss(tree):
        y = moe_mlp(x, x @ tree["router"] + logits, *tree["experts"], top_k=K) + x @ tree["a"] @ tree["b"]
        return jnp.mean((y - target) ** 2)

    @jax.jit
    def step(tree, state):
        value, gradient = jax.value_and_grad(loss, allow_int=True)(tree)
        gradient["experts"] = jax.tree.map(jnp.zeros_like, tree["experts"])
        updates, state = optimizer.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state, value

    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        state, values = optimizer.init(tree), []
        for _ in range(10):
            tree, state, value = step(tree, state)
            values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    jax.tree.map(np.testing.assert_array_equal, tree["experts"], (gate_up, down))


# ---- qwix


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("int4", {"channelwise_axes": [0, 2], "tiled_axes": {1: 16}}),
        ("int8", {"channelwise_axes": [0, 2]}),
        ("int8", {"channelwise_axes": [2], "calibration_method": "minmax"}),
        ("float8_e4m3fn", {"channelwise_axes": [0], "tiled_axes": {1: 16, 2: 8}}),
    ],
)
def test_arrays_of_qwix(kind, how):
    r = rng("qwix")
    x, w = r.normal(size=(6, H)).astype(np.float32), r.normal(size=(E, H, 24)).astype(np.float32)
    array = qwix.quantize(jnp.asarray(w), kind, **how)
    sizes = np.array([1, 2, 0, 3, 0], np.int32)
    want = ragged_dot(x, qwix.dequantize(array), sizes)
    assert_near(ragged_dot(x, array, sizes), want, "float32")
    once = QuantizedMatrices.of(array)
    assert_near(ragged_dot(x, once, sizes), want, "float32")
    assert_near(
        moe_mlp(x, x[:, :E], array, jnp.ones((E, 12, H)), top_k=K),
        moe_mlp(x, x[:, :E], once, jnp.ones((E, 12, H)), top_k=K),
        "float32",
    )


def test_arrays_of_qwix_that_are_none_of_the_formats():
    w = jnp.ones((2, 64, 8))
    for array, why in (
        (qwix.quantize(w, "int2", channelwise_axes=[0, 2]), "qtype int2"),
        (qwix.quantize(w, "int8", channelwise_axes=[0]), "a scale for 8 columns together"),
    ):
        with pytest.raises(NotImplementedError, match=f"rhs is a qwix.QArray with {why}"):
            ragged_dot(jnp.ones((3, 64)), array, jnp.array([1, 2]))


# ---- errors

GOOD = quantize(np.ones((2, 64, 8), np.float32), "fp8", block=(4, 16))
INT4 = quantize(np.ones((2, 64, 8), np.float32), "int4", block=(1, 16))


@pytest.mark.parametrize(
    ("matrices", "error", "message"),
    [
        (dataclasses.replace(GOOD, format="fp6"), ValueError, "rhs.format must be one of 'fp8'.*got 'fp6'"),
        (dataclasses.replace(GOOD, values=GOOD.values.astype(int)), TypeError, "rhs.values must be uint8; got int"),
        (dataclasses.replace(GOOD, scales=GOOD.scales[:, :1]), ValueError, r"rhs.scales must have shape \(2, 2, 4\)"),
        (dataclasses.replace(GOOD, scales=GOOD.scales.astype(int)), TypeError, "rhs.scales must be float16"),
        (dataclasses.replace(GOOD, zeros=GOOD.values), ValueError, "rhs.zeros must be None for 'fp8'"),
        (dataclasses.replace(GOOD, block=(4, 15)), ValueError, r"rhs.scales must have shape \(2, 2, 5\)"),
        (dataclasses.replace(GOOD, block=4), ValueError, "rhs: block must be two numbers of entries"),
        (dataclasses.replace(GOOD, parts=3), ValueError, "rhs.parts must divide its 8 columns; got 3"),
        (dataclasses.replace(INT4, block=(1, 24)), ValueError, "rhs must have a multiple of 24 entries along H"),
        (dataclasses.replace(INT4, block=(2, 16)), ValueError, r"rhs: block must be \(1, entries along H\)"),
        (dataclasses.replace(INT4, zeros=INT4.values), ValueError, r"rhs.zeros must have shape \(2, 8, 4\)"),
        (dataclasses.replace(INT4, format="mxfp4", block=(1, 32)), TypeError, "rhs.scales must be uint8 for 'mxfp4'"),
        (
            LayerOf(jax.tree.map(lambda a: a[None], dataclasses.replace(GOOD, scales=GOOD.scales[:, :1])), 0),
            ValueError,
            "rhs.stack.scales must have shape",
        ),
        (jax.tree.map(lambda a: a[0], GOOD), ValueError, r"rhs must be .*, at least 3 axes"),
        (
            dataclasses.replace(INT4, values=INT4.values[..., :24], scales=INT4.scales[..., :3]),
            ValueError,
            r"rhs must be .* with H = 64, as in lhs; got shape \(2, 48, 8\)",
        ),
    ],
)
def test_matrices_whose_fields_do_not_fit(matrices, error, message):
    with pytest.raises(error, match=f"ragged_dot: {message}"):
        ragged_dot(jnp.ones((3, 64)), matrices, jnp.array([1, 2]))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"format": "fp6"}, ValueError, "format must be one of"),
        ({"w": np.ones((4, 4), int), "format": "fp8"}, TypeError, "w must be float16, bfloat16 or float32; got int"),
        ({"w": np.ones(4, np.float32), "format": "fp8"}, ValueError, r"w must be \[..., H, N\]"),
        ({"format": "int4", "block": (1, 3)}, ValueError, "w must have a multiple of 3 entries along H"),
        ({"format": "int4", "block": (1, None), "w": np.ones((5, 4), np.float32)}, ValueError, "w must have an even H"),
        ({"format": "mxfp4", "block": (1, 16)}, ValueError, r"block must be \(1, 32\) for 'mxfp4'"),
        ({"format": "fp8", "block": (0, 1)}, ValueError, r"block must be in \[1"),
        ({"format": "fp8", "block": ("a", 1)}, TypeError, "block must be a Python int"),
        ({"format": "fp8", "parts": 3}, ValueError, "parts must divide the 4 columns of w; got 3"),
        ({"format": "fp8", "zero_points": True}, ValueError, "zero_points must be False for 'fp8'"),
        ({"format": "int8", "block": (1, 8), "zero_points": 1}, TypeError, "zero_points must be True or False"),
        ({"format": "mxfp4", "scale_dtype": "float32"}, ValueError, "scale_dtype must be None for 'mxfp4'"),
        ({"format": "fp8", "scale_dtype": "float64"}, TypeError, "scale_dtype must be float16"),
    ],
)
def test_arguments_of_quantize(how, error, message):
    with pytest.raises(error, match=f"quantize: {message}"):
        quantize(**{"w": np.ones((32, 4), np.float32)} | how)


def test_activations_are_for_fp8_matrices():
    x, sizes = jnp.ones((3, 64)), jnp.array([1, 2])
    for matrices in (INT4, GOOD.dequantize("float32"), LayerOf(INT4.dequantize("float32")[None], 0)):
        with pytest.raises(ValueError, match=r"activations='float8_e4m3fn' needs QuantizedMatrices of format 'fp8'"):
            ragged_dot(x, matrices, sizes, activations="float8_e4m3fn")
    with pytest.raises(ValueError, match=r"activations must be one of None, 'float8_e4m3fn'; got 'int8'"):
        ragged_dot(x, GOOD, sizes, activations="int8")


def test_a_pair_of_two_kinds_and_biases_that_are_quantised():
    x, logits, (gate_up, down), _ = layer_of("int8")
    gate, up = (
        dataclasses.replace(jax.tree.map(lambda a, i=i: a[:, i * F : (i + 1) * F], gate_up), parts=1) for i in (0, 1)
    )
    want = moe_mlp(x, logits, gate_up, down, top_k=K)
    assert_near(moe_mlp(x, logits, (gate, up), down, top_k=K), want, "float32")
    with pytest.raises(TypeError, match="w_gate_up must be a pair of arrays, of QuantizedMatrices or of LayerOf"):
        moe_mlp(x, logits, (gate, up.dequantize("float32")), down, top_k=K)
    with pytest.raises(TypeError, match="b_down must be an array"):
        moe_mlp(x, logits, gate_up, down, top_k=K, b_down=quantize(np.ones((E, H), np.float32), "fp8"))
    with pytest.raises(TypeError, match="b_down must have the dtype of x, float32; got bfloat16"):
        moe_mlp(x, logits, gate_up, down, top_k=K, b_down=jnp.ones((E, H), "bfloat16"))


def test_a_block_may_be_a_list_and_a_dtype_a_type():
    q = dataclasses.replace(GOOD, block=[4, 16], dtype=jnp.bfloat16)
    x, sizes = jnp.ones((3, 64)), jnp.array([1, 2])
    assert_near(jax.jit(lambda q: ragged_dot(x, q, sizes))(GOOD), ragged_dot(x, q, sizes), "float32")
    stored = export.export(jax.jit(lambda q: ragged_dot(x, q, sizes)))(dataclasses.replace(GOOD, dtype=jnp.bfloat16))
    assert len(stored.serialize()) > 0
    with pytest.raises(TypeError, match=r"array must be QuantizedMatrices or a qwix.QArray; got ndarray"):
        QuantizedMatrices.of(np.ones((2, 4, 4)))
    with pytest.raises(NotImplementedError, match="two numbers of 4 bits share a byte"):
        QuantizedMatrices.of(qwix.quantize(jnp.ones((2, 31, 8)), "int4", channelwise_axes=(0, 2)))
