"""The kernels without a GPU: compiled to machine code, exported, and interpreted against xla bit for bit."""

import dataclasses
import functools
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, FLOAT_CASES, SMALL, finite_args, per_primitive, rng
from compiled import for_h200, needs_pjrt, needs_plugin, whole_program_for_h200
from conftest import KERNELS
from jax import export
from meshes import mesh_of
from shapes import MODELS

import ferrum_jax

of = jax.ShapeDtypeStruct
SMOKE = ("moe_plan", "moe_combine", "grouped_matmul")


def programs(model, tokens, implementation):
    """Enough ops to launch every kernel: name -> (function, arguments, launches, whether it moves rows)."""
    experts, k, width = MODELS[model]
    ids, weights = of((tokens, k), jnp.int32), of((tokens, k), jnp.float32)
    x, rows = of((tokens, width), jnp.bfloat16), of((tokens * k, width), jnp.bfloat16)
    slots = of((tokens, k, width), jnp.bfloat16)
    as_asked = {"implementation": implementation}
    combine = functools.partial(ferrum_jax.moe_combine, **as_asked)

    def combine_vjp(rows, ids, weights, g, unique_rows):
        return jax.vjp(lambda y, w: combine(y, ids, w, unique_rows=unique_rows), rows, weights)[1](g)

    def rows_vjp(rows, ids, weights, g):
        return jax.vjp(lambda y: combine(y, ids, weights, unique_rows=True), rows)[1](g)

    def weighted_vjp(slots, weights, g):
        return jax.vjp(functools.partial(ferrum_jax.weighted_sum_batched, **as_asked), slots, weights)[1](g)

    route = functools.partial(ferrum_jax.route_topk_softmax, top_k=k, **as_asked)
    tables = {"num_experts": experts, "block_size": 64, **as_asked}
    few = tokens * k * experts <= 8192 * 128
    route_plan = functools.partial(ferrum_jax.moe_route_plan, top_k=k, block_size=64, **as_asked)
    decode = [of((min(tokens, 256 // k, 4096 >> (experts - 1).bit_length()), experts), jnp.bfloat16)]
    return {
        "route and plan": (route_plan, decode, 1, False),
        "route": (route, [of((tokens, experts), jnp.bfloat16)], 1, False),
        "plan": (functools.partial(ferrum_jax.moe_plan, **tables), [ids], 1 if few else 3, False),
        "combine": (combine, [rows, ids, weights], 1, True),
        "combine vjp": (functools.partial(combine_vjp, unique_rows=True), [rows, ids, weights, x], 2, True),
        "combine vjp, rows": (rows_vjp, [rows, ids, weights, x], 2, True),
        "combine vjp, repeated": (functools.partial(combine_vjp, unique_rows=False), [rows, ids, weights, x], 2, True),
        "weighted sum vjp": (weighted_vjp, [slots, weights, x], 2, True),
    }


@needs_plugin
@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("qwen3", 128),
        *(pytest.param(m, 8192, marks=pytest.mark.compiled) for m in MODELS),
        pytest.param("wide", 128, marks=pytest.mark.compiled),
    ],
)
def test_triton_compiles_for_an_h200_without_spills(model, tokens):
    for name, (f, args, launches, wide) in programs(model, tokens, "triton").items():
        program = for_h200(f, *args)
        assert len(program.launches) == launches, name
        for code in program.codes:
            assert code.spilled == 0, (name, code.name, code.registers)
            if wide and code.name != "ferrum_invert":
                assert re.search(r"LDG\.E[\w.]*\.128", code.sass), (name, code.name)


@needs_plugin
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=[] if case.name in ("moe_plan", "moe_combine", "grouped_matmul") else [pytest.mark.compiled]
        )
        for case in CASES
    ],
    ids=str,
)
def test_the_asked_implementation_is_what_is_lowered(case):
    args = case.args(rng(case), SMALL, "bfloat16")
    launches = {
        name: for_h200(lambda *a, name=name: case.results(*a, size=SMALL, implementation=name), *args).launches
        for name in ("xla", "triton")
    }
    assert not launches["xla"]
    # The products first note which rows are named, so that they zero only the others.
    count = {"grouped_matmul": 2, "grouped_matmul_activated": 2, "moe_combine_cotangents": 2, "ragged_dot": 3}
    assert len(launches["triton"]) == count.get(case.name.partition("-")[0], 1)
    assert all(name.startswith("triton_kernel_call") for name in launches["triton"])


@pytest.mark.parametrize("case", per_primitive(case for case in CASES if case.has_kernel("triton")), ids=str)
def test_every_triton_kernel_interpreted(case):
    """Each once in every run, at one small size; with all sizes and dtypes on request, by test_values."""
    args = case.args(rng(case), SMALL, "float32")
    with ferrum_jax.interpret_kernels():
        got = case.results(*args, size=SMALL, implementation="triton")
    oracle.assert_matches(got, case.oracle(*args, size=SMALL))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case", per_primitive(case for case in FLOAT_CASES if "route" not in case.name), ids=str)
def test_gradients_of_every_kernel_interpreted(case, implementation):
    """Of cotangents that are small integers, so that both implementations round alike."""
    args = finite_args(case, rng(case), SMALL)

    def backward(name, *floats):
        def f(*floats):
            given = dict(zip(case.floats, floats, strict=True))
            filled = [given.get(i, x) for i, x in enumerate(args)]
            return case.float_results(*filled, size=SMALL, implementation=name)

        out, vjp = jax.vjp(f, *floats)
        return vjp([rng("g").integers(-4, 5, size=x.shape).astype(x.dtype) for x in out])

    floats = [args[i] for i in case.floats]
    want = jax.jit(functools.partial(backward, "xla"))(*floats)
    with ferrum_jax.interpret_kernels():
        got = jax.jit(functools.partial(backward, implementation))(*floats)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@needs_plugin
def test_one_module_for_cpu_and_cuda():
    def layer(logits, x):
        ids, weights = ferrum_jax.route_topk_softmax(logits, 2)
        plan = ferrum_jax.moe_plan(ids, 6, 4)
        rows = ferrum_jax.moe_dispatch(x, plan.packed_token_idx, pairs_by_token=plan.pairs_by_token)
        return ferrum_jax.moe_combine(rows, plan.pairs_by_token, weights, unique_rows=True)

    args = rng("l").normal(size=(5, 6)).astype(np.float32), rng("x").normal(size=(5, 8)).astype(np.float32)
    both = export.export(jax.jit(layer), platforms=("cpu", "cuda"), disabled_checks=ferrum_jax.export_checks())(*args)
    assert "triton_kernel_call" in both.mlir_module()
    stored = export.deserialize(both.serialize())
    np.testing.assert_allclose(stored.call(*args), args[1], rtol=1e-6)


@needs_plugin
def test_one_process_interprets_and_compiles():
    x = jnp.asarray(rng("both").normal(size=(4, 8)).astype(np.float32))
    route = functools.partial(ferrum_jax.route_topk_softmax, top_k=2, implementation="triton")
    for _ in range(2):
        with ferrum_jax.interpret_kernels():
            ids = jax.jit(route)(x).expert_ids
        np.testing.assert_array_equal(ids, ferrum_jax.route_topk_softmax(x, 2).expert_ids)
        assert len(for_h200(route, x).launches) == 1


WATCHED = """
import importlib, os, sys, threading

seen, done = set(), threading.Event()

def watch():
    while not done.is_set():
        triton = importlib.import_module("triton")
        kernel = triton.jit(importlib.import_module)
        seen.add((triton is sys.modules.get("triton"), triton.__name__, triton.knobs.runtime.interpret,
                  type(kernel).__name__, os.environ.get("TRITON_INTERPRET")))

sys.setswitchinterval(1e-5)
thread = threading.Thread(target=watch)
thread.start()
from ferrum_jax.kernels import triton as kernels
interpreted = [kernels.interpreted(family) for family in ("combine", "grouped")]
done.set()
thread.join()
assert interpreted[1].INTERPRETED.value
print(seen)
"""


def test_other_threads_do_not_meet_the_interpreting_triton():
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str({(True, "triton", False, "JITFunction", None)})


def test_interpretation_ends_with_its_context():
    x = jnp.ones((2, 4))
    f = jax.jit(lambda x: ferrum_jax.route_topk_softmax(x, 2, implementation="triton"))
    with ferrum_jax.interpret_kernels():
        assert ferrum_jax.which(ferrum_jax.route_topk_softmax, x, 2).implementation == "triton"
        f(x)
    assert ferrum_jax.which(ferrum_jax.route_topk_softmax, x, 2).implementation == "xla"
    with pytest.raises(NotImplementedError, match="interpret_kernels"):
        f(x)


@pytest.mark.interpreted
@pytest.mark.parametrize("seed", range(10))
def test_ids_and_tables_equal_xla_bit_for_bit(seed):
    """Fifty random cases a seed, batched into few calls: shapes differ between calls, hostile values inside one."""
    r = rng("equal", seed)
    experts, tokens, block = (int(r.integers(1, most)) for most in (9, 10, 9))
    k = int(r.integers(1, min(experts, 9) + 1))
    bits = r.integers(0, 2**32, size=(50, tokens, experts), dtype=np.uint32)
    bits[::3] = bits[::3] & 0x3 | 0x3F800000  # many ties
    bits[1::3] |= 0x7F800000  # infinities and NaN
    ids = r.integers(-2, experts + 2, size=(50, tokens, k)).astype(np.int32)

    def every(bits, ids):
        x = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return ferrum_jax.route_topk_softmax(x, k).expert_ids, *ferrum_jax.moe_plan(ids, experts, block)

    want = jax.jit(every)(bits, ids)
    with ferrum_jax.interpret_kernels():
        got = jax.jit(every)(bits, ids)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


def divided(monkeypatch, **changes):
    """The interpreted file of the tables, with changes of its tiles."""
    from ferrum_jax.kernels import triton

    tables = triton.interpreted("tables")
    (usual,) = tables.tiles.COUNTING
    monkeypatch.setattr(tables.tiles, "COUNTING", (dataclasses.replace(usual, **changes),))
    return tables


def test_three_launches_equal_one(monkeypatch):
    """For many pairs the counts go through memory. Small tiles, so that there are many of them."""
    tables = divided(monkeypatch, one_launch=0, least_pairs=32, most_pairs=32, ranked=16, filled=64)
    ids = rng("tiles").integers(-1, 8, size=(3, 150, 2)).astype(np.int32)
    for pair_ids in (False, True):
        got = tables.moe_plan(ids, num_experts=7, block_size=4, pair_ids=pair_ids)
        for g, w in zip(got, ferrum_jax.moe_plan(ids, 7, 4, pair_ids=pair_ids), strict=True):
            np.testing.assert_array_equal(g, w)


@pytest.mark.interpreted
def test_experts_are_counted_in_portions(monkeypatch):
    """More experts than a program counts at a time: here 16, in one launch and in three."""
    tables = divided(monkeypatch, one_launch=40 * 70, least_pairs=16, most_pairs=16, bins=16)
    for tokens in (20, 90):
        ids = rng("portions", tokens).integers(-1, 71, size=(2, tokens, 2)).astype(np.int32)
        for pair_ids in (False, True):
            got = tables.moe_plan(ids, num_experts=70, block_size=3, pair_ids=pair_ids)
            for g, w in zip(got, ferrum_jax.moe_plan(ids, 70, 3, pair_ids=pair_ids), strict=True):
                np.testing.assert_array_equal(g, w)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("router", "step"),
    [
        ({}, 2.0**-23),
        ({"num_groups": 4, "group_top_k": 2}, 0.5),
        ({"scoring": "sigmoid", "bias": np.ones(64, "f4")}, 0.5),
    ],
    ids=["last bits", "groups", "bias"],
)
def test_programs_of_one_launch_write_the_same(router, step, monkeypatch):
    """Each routes all tokens and reads the ids back, which others may then still write: never another value."""
    from ferrum_jax.kernels import triton

    builder = triton.interpreted("route_plan").triton.runtime.interpreter.InterpreterBuilder
    store, written = builder.create_masked_store, {}

    def listen(self, ptrs, value, mask, *settings):
        for pointer, bits in zip(ptrs.data[mask.data], value.data[mask.data], strict=True):
            written.setdefault(int(pointer), set()).add(bits.tobytes())
        return store(self, ptrs, value, mask, *settings)

    # Values close together, and rows with NaN, which counts as the best until it is seen.
    logits = (1 + rng("same").integers(0, 4, size=(30, 64)) * step).astype(np.float32)
    logits[::5, ::3] = np.nan
    monkeypatch.setattr(builder, "create_masked_store", listen)
    with ferrum_jax.interpret_kernels():
        got = ferrum_jax.moe_route_plan(logits, 2, 4, implementation="triton", **router)
    assert len(written) >= sum(x.size for x in jax.tree.leaves(got))
    assert all(len(values) == 1 for values in written.values())
    monkeypatch.undo()
    with ferrum_jax.interpret_kernels():
        routed = ferrum_jax.route_topk(logits, 2, implementation="triton", **router)
    np.testing.assert_allclose(got[0].expert_weights, routed.expert_weights, rtol=2 * np.finfo(np.float32).eps)
    want = routed.expert_ids, ferrum_jax.moe_plan(routed.expert_ids, 64, 4)
    for g, w in zip(jax.tree.leaves((got[0].expert_ids, got[1])), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.interpreted
def test_devices_share_the_interpreter():
    """JAX calls back from a thread per device, and Triton's interpreter has one state."""
    x = rng("threads").normal(size=(4, 16, 8)).astype(np.float32)
    mesh = mesh_of(4)
    spec = jax.sharding.PartitionSpec("d")
    route = jax.jit(
        jax.shard_map(lambda x: ferrum_jax.route_topk_softmax(x, 8), mesh=mesh, in_specs=spec, out_specs=spec)
    )
    want = route(x)
    with ferrum_jax.interpret_kernels():
        for _ in range(3):
            for g, w in zip(route(x), want, strict=True):
                np.testing.assert_allclose(g, w, rtol=1e-6)


@needs_pjrt
@pytest.mark.compiled
def test_xla_computes_an_index_once():
    """What makes an index stays out of the loop over a row's elements, which would compute it for each of them."""

    def combine(rows, weights, ids, begin):
        return ferrum_jax.moe_combine(rows, ids * 100 + begin[ids // 3], weights, implementation="xla")

    def loops(f):
        shapes = ((4096, 512), jnp.bfloat16), ((512, 8), jnp.float32), ((512, 8), jnp.int32), ((6,), jnp.int32)
        program, _ = whole_program_for_h200(f, *(jax.ShapeDtypeStruct(*s) for s in shapes))
        fusions = re.findall(r"^%?fused.*?^\}", program, re.MULTILINE | re.DOTALL)
        return [text for text in fusions if "bf16[4096,512]" in text]

    (loop,) = loops(combine)
    assert loop.count(" gather(") == 1
    (both,) = loops(lambda rows, weights, ids, begin: rows.at[ids * 100 + begin[ids // 3]].get(mode="clip") + 1)
    assert both.count(" gather(") == 2  # so it would be
