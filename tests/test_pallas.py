"""The Pallas kernels without a GPU: interpreted with race detection, and compiled whole for an H200."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import FLOAT_CASES, SMALL, Size, rng
from compiled import launches, needs_pjrt, needs_plugin, on_h200, whole_program_for_h200
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from shapes import MODELS

import ferrum_jax
from ferrum_jax.kernels.pallas import combine
from ferrum_jax.kernels.pallas.interpret import interpret

of = jax.ShapeDtypeStruct
PALLAS_CASES = [
    case for case in FLOAT_CASES if case.has_kernel("pallas") and not case.name.startswith(("grouped", "ragged"))
]


@pytest.fixture
def interpreting():
    with ferrum_jax.interpret_kernels():
        yield


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (SMALL, "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.interpreted)
            for case in ((Size(7, 3, 3, 130), "bfloat16"), (Size(3, 40, 17, 300), "float16"))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", PALLAS_CASES, ids=str)
@pytest.mark.usefixtures("interpreting")
def test_values(case, size, dtype):
    args = case.args(rng(case, size), size, dtype)
    got = case.results(*args, size=size, implementation="pallas")
    oracle.assert_matches(got, case.oracle(*args, size=size))


@pytest.mark.interpreted
@pytest.mark.usefixtures("interpreting", "x64")
@pytest.mark.parametrize("case", [PALLAS_CASES[0], PALLAS_CASES[4]], ids=str)
def test_x64_changes_nothing(case):
    args = case.args(rng(case), SMALL, "bfloat16")
    oracle.assert_matches(case.results(*args, size=SMALL, implementation="pallas"), case.oracle(*args, size=SMALL))


@pytest.mark.interpreted
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 8), (33, 5), (1100, 3)])
def test_ids_equal_xla_for_any_bits(experts, top_k):
    """Of four tokens a block and of the ones left over; ties, infinities, NaN of either sign, subnormals, -0."""
    bits = rng("bits", experts).integers(0, 2**32, size=(6, experts), dtype=np.uint32)
    bits[0] = bits[0] & 0x3 | 0x3F800000
    bits[1] |= 0x7F800000
    bits[4] &= 0x80000003
    x = bits.view(np.float32)
    want = ferrum_jax.route_topk_softmax(x, top_k, implementation="xla")
    with ferrum_jax.interpret_kernels():
        got = ferrum_jax.route_topk_softmax(x, top_k, implementation="pallas")
    np.testing.assert_array_equal(got.expert_ids, want.expert_ids)
    np.testing.assert_allclose(got.expert_weights, want.expert_weights, rtol=1e-5, atol=1e-30)


@pytest.mark.usefixtures("interpreting")
def test_no_tokens():
    assert ferrum_jax.route_topk_softmax(jnp.zeros((0, 8)), 2, implementation="pallas").expert_ids.shape == (0, 2)
    assert ferrum_jax.weighted_sum_batched(jnp.zeros((0, 2, 8)), jnp.zeros((0, 2)), implementation="pallas").shape == (
        0,
        8,
    )


@pytest.mark.interpreted
@pytest.mark.parametrize("axes", [(None, 0, 0), (0, None, 0), (0, 0, None)])
@pytest.mark.usefixtures("interpreting")
def test_vmap_of_some_operands(axes):
    r = rng("vmap", axes)
    shapes = ((6, 5), (3, 2), (3, 2))
    y, w = (r.normal(size=(2,) * (a == 0) + s).astype(np.float32) for a, s in zip(axes[::2], shapes[::2], strict=True))
    pairs = r.permutation(6).reshape(3, 2).astype(np.int32)
    pairs = np.stack([pairs, pairs[::-1]]) if axes[1] == 0 else pairs

    def both(name):
        def f(y, pairs, w):
            combine = functools.partial(ferrum_jax.moe_combine, unique_rows=True, implementation=name)
            return jax.value_and_grad(lambda y, w: jnp.sum(jnp.sin(combine(y, pairs, w))), (0, 1))(y, w)

        return jax.tree.leaves(jax.vmap(f, axes)(y, pairs, w))

    for a, b in zip(both("pallas"), both("xla"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ---- tests of the test: what the interpreter is there to catch, it catches


def test_the_interpreter_catches_a_row_out_of_bounds():
    def gather_one_row_too_far(rows, index, weights, out, **sizes):
        out[0, 0] = rows[0, index[0, 0] + rows.shape[1], 0]

    rows, pairs = np.ones((2, 3), np.float32), np.zeros((1, 1), np.int32)
    weights = np.ones((1, 1), np.float32)
    with pytest.MonkeyPatch.context() as patch, ferrum_jax.interpret_kernels():
        patch.setattr(combine, "gather_sum", gather_one_row_too_far)
        with pytest.raises(Exception, match="Out-of-bounds read"):
            ferrum_jax.moe_combine(rows, pairs, weights, implementation="pallas")
    with ferrum_jax.interpret_kernels():  # which is fit to run after it
        got = ferrum_jax.moe_combine(rows, pairs, weights, implementation="pallas")
    np.testing.assert_array_equal(got, rows[:1])


@pytest.mark.interpreted
@pytest.mark.parametrize("barrier", [True, False])
def test_the_interpreter_catches_a_missing_barrier(barrier):
    """A row handed from one warpgroup of a block to another. Blocks run in turn: it sees no races between them."""

    def hand_over(row, out, shared, ready):
        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            shared[...] = row[0]
            plgpu.barrier_arrive(ready)

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _():
            if barrier:
                plgpu.barrier_wait(ready)
            out[0] = shared[...]

    def wrapper(row):
        shape = of((1, 128), jnp.float32)
        scratch = [plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()]
        threads = {"num_threads": 2, "thread_name": "warpgroup"}
        return plgpu.kernel(hand_over, out_type=(shape,), scratch_types=scratch, **threads)(row)

    row = np.arange(128, dtype=np.float32)[None]
    if barrier:
        np.testing.assert_array_equal(interpret(wrapper, row)[0], row)
    else:
        with pytest.raises(Exception, match="RACE DETECTED"):
            interpret(wrapper, row)


# ---- the choice


def test_which_on_a_gpu():
    which = functools.partial(ferrum_jax.which, ferrum_jax.route_topk_softmax, jnp.ones((4, 8)), 2, platform="cuda")
    assert which(device_kind="NVIDIA H200").passed_over["pallas"] in ("triton comes first", "xla comes first")
    assert which(implementation="pallas", device_kind="NVIDIA B200").implementation == "pallas"
    assert "compute capability is 8.0" in which(device_kind="NVIDIA A100-SXM4-80GB").passed_over["pallas"]
    with on_h200():
        assert which(implementation="pallas").implementation == "pallas"


def test_what_there_is_no_kernel_for_is_refused_by_name():
    ids = np.zeros((2, 1), np.int32)
    with ferrum_jax.interpret_kernels():
        with pytest.raises(NotImplementedError, match="moe_plan has no pallas kernel"):
            ferrum_jax.moe_plan(ids, 4, 2, implementation="pallas")
        with pytest.raises(NotImplementedError, match="8192 at most; got 9000"):
            ferrum_jax.route_topk_softmax(np.zeros((1, 9000), np.float32), 2, implementation="pallas")
        with pytest.raises(NotImplementedError, match="512 at most; got 600"):
            ferrum_jax.route_topk_softmax(np.zeros((1, 1000), np.float32), 600, implementation="pallas")


# ---- compiled for an H200


def programs(model):
    experts, k, width = MODELS[model]
    ids, weights = of((8192, k), jnp.int32), of((8192, k), jnp.float32)
    x, rows = of((8192, width), jnp.bfloat16), of((8192 * k, width), jnp.bfloat16)
    use = {"implementation": "pallas"}

    def combine_vjp(rows, ids, weights, g, unique_rows):
        f = functools.partial(ferrum_jax.moe_combine, unique_rows=unique_rows, **use)
        return jax.vjp(lambda y, w: f(y, ids, w), rows, weights)[1](g)

    def rows_vjp(rows, ids, weights, g):
        f = functools.partial(ferrum_jax.moe_combine, unique_rows=True, **use)
        return jax.vjp(lambda y: f(y, ids, weights), rows)[1](g)

    def weighted(slots, weights, g):
        out, vjp = jax.vjp(functools.partial(ferrum_jax.weighted_sum_batched, **use), slots, weights)
        return out, vjp(g)

    yield functools.partial(ferrum_jax.route_topk_softmax, top_k=k, **use), [of((8192, experts), jnp.bfloat16)]
    yield functools.partial(ferrum_jax.moe_dispatch, **use), [x, of((8192 * k,), jnp.int32)]
    yield functools.partial(ferrum_jax.moe_combine, **use), [rows, ids, weights]
    yield functools.partial(combine_vjp, unique_rows=True), [rows, ids, weights, x]
    yield functools.partial(combine_vjp, unique_rows=False), [rows, ids, weights, x]
    yield rows_vjp, [rows, ids, weights, x]
    yield weighted, [of((8192, k, width), jnp.bfloat16), weights, x]


# Registers that a kernel may use, of 65,536 a multiprocessor: at 72 there are 7 blocks of 128 threads, at 152 there
# are 3, which with 8 rows of 16 bytes a thread still have 48 KB in flight; at 128 there are 4, with 5 rows 48 KB.
REGISTERS = {
    "route": 128,
    "gather_sum": 80,
    "invert": 32,
    "scatter": 48,
    "segment_sum": 56,
    "row_dot": 152,
    "cotangents": 128,
}


@needs_plugin
@needs_pjrt
@pytest.mark.compiled
def test_compiles_for_an_h200_without_spills():
    # All models in one test: what is the same in two of them, JAX 0.12 compiles once in a process.
    kernels = [k for model in MODELS for f, args in programs(model) for k in whole_program_for_h200(f, *args)[1]]
    assert {k.name.removeprefix("ferrum_") for k in kernels} == set(REGISTERS)
    for kernel in kernels:
        name = kernel.name.removeprefix("ferrum_")
        assert kernel.spilled == 0, (name, kernel.registers)
        assert kernel.registers <= REGISTERS[name], (name, kernel.registers)
        if name == "route":  # ranks are signed: as unsigned ones, every negative logit would come before the others
            assert re.search(r"redux\.sync\.max\.s32|max\.s32", kernel.ptx)
            assert not re.search(r"(max|min)\.u32", kernel.ptx)
        elif name != "invert":
            moved = re.findall(r"(?:ld|st)\.global\.(v4\.b32|v2\.b64)", kernel.ptx)
            assert moved, name
            assert re.search(r"mul\.wide|mul\.lo\.s64|mad\.wide|shl\.b64", kernel.ptx), name


@needs_plugin
@needs_pjrt
@pytest.mark.compiled
def test_rows_are_addressed_in_64_bits():
    """R * H = 2^32: the byte offset of a row is a 64-bit product of its 32-bit index."""
    rows, ids = of((2**20, 4096), jnp.bfloat16), of((8, 2), jnp.int32)
    f = functools.partial(ferrum_jax.moe_combine, implementation="pallas")
    _, (kernel,) = whole_program_for_h200(f, rows, ids, of((8, 2), jnp.float32))
    wide = re.findall(r"mul\.wide\.[su]32\s+%rd\d+, %r\d+, 8192", kernel.ptx)
    wide += re.findall(r"shl\.b64\s+%rd\d+, %rd\d+, 13", kernel.ptx)
    assert len(wide) >= 2, kernel.ptx


def routed_layer(logits, x, *, implementation):
    """Everything around the experts' products. Tables have no Pallas kernel; None takes Triton's."""
    use = {"implementation": implementation}
    ids, weights = ferrum_jax.route_topk_softmax(logits, 8, **use)
    tables = None if implementation == "pallas" else implementation
    plan = ferrum_jax.moe_plan(ids, logits.shape[1], 64, implementation=tables)
    rows = ferrum_jax.moe_dispatch(x, plan.packed_token_idx, pairs_by_token=plan.pairs_by_token, **use)
    return ferrum_jax.moe_combine(rows, plan.pairs_by_token, weights, unique_rows=True, **use), plan


@needs_plugin
@needs_pjrt
@pytest.mark.compiled
@pytest.mark.parametrize(("tokens", "launched"), [(128, 4), (8192, 6)])
def test_launches_of_a_routed_layer(tokens, launched):
    args = of((tokens, 128), jnp.bfloat16), of((tokens, 2048), jnp.bfloat16)
    count = {}
    for name in ferrum_jax.kernels.IMPLEMENTATIONS:
        text, _ = whole_program_for_h200(functools.partial(routed_layer, implementation=name), *args)
        count[name] = len(launches(text))
    assert count["triton"] == count["pallas"] == launched, count
    assert count["xla"] >= 4 * launched - 4, count
