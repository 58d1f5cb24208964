"""The choice of implementation: `which`, and refusals that say why."""

import contextlib
import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, SMALL, rng
from compiled import needs_plugin, on_h200
from conftest import KERNELS
from meshes import mesh_of

import ferrum_jax
from ferrum_jax import kernels
from ferrum_jax.kernels import measured, targets
from ferrum_jax.ops.scoring import SCORINGS


@pytest.mark.parametrize("name", ["triton", "pallas"])
def test_kernels_refuse_a_cpu_by_name(name):
    """Eagerly, under jit, and for the op that is made of others."""
    for case in (case for case in CASES if case.name in ("moe_combine", "moe_route_plan")):
        args = case.args(rng(case), SMALL, "float32")
        with pytest.raises(NotImplementedError, match=f"implementation='{name}' cannot be used: .*NVIDIA.*cpu"):
            case.results(*args, size=SMALL, implementation=name)
        with pytest.raises(NotImplementedError, match="cpu"):
            jax.jit(lambda *a, case=case: case.results(*a, size=SMALL, implementation=name)).lower(*args)


def test_which_names_every_other_implementation():
    (case,) = (case for case in CASES if case.name == "moe_combine")
    args = case.args(rng(case), SMALL, "float32")
    choice = ferrum_jax.which(case.results, *args, size=SMALL, platform="cpu")
    assert choice.implementation == "xla"
    assert set(choice.passed_over) == {"triton", "pallas"}
    assert all("cpu" in reason for reason in choice.passed_over.values())
    assert ferrum_jax.which(case.results, *args, size=SMALL) == choice


def test_which_takes_shapes_and_keywords():
    logits = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    choice = ferrum_jax.which(ferrum_jax.route_topk_softmax, logits, top_k=2, implementation="xla", platform="cuda")
    assert choice.implementation == "xla"


def test_which_takes_arrays_by_keyword():
    (case,) = (case for case in CASES if case.name == "moe_dispatch-pairs")
    x, tokens, pairs = case.args(rng(case), SMALL, "bfloat16")
    choice = ferrum_jax.which(ferrum_jax.moe_dispatch, x, tokens, pairs_by_token=pairs, platform="cpu")
    assert choice.implementation == "xla"


def test_which_sees_through_jit_and_numpy_scalars():
    choice = ferrum_jax.which(jax.jit(ferrum_jax.weighted_sum_batched), jnp.ones((2, 3, 4)), jnp.ones((2, 3)))
    assert choice.implementation == "xla"
    assert ferrum_jax.which(ferrum_jax.route_topk_softmax, jnp.ones((2, 4)), np.int64(2)).implementation == "xla"


def test_which_of_something_else():
    with pytest.raises(ValueError, match="sin runs no op of ferrum_jax"):
        ferrum_jax.which(jnp.sin, jnp.ones(3))


X = jnp.ones((8, 4))


def route(x, top_k=2):
    return ferrum_jax.route_topk_softmax(x, top_k).expert_weights


def pad(x):
    return jnp.pad(route(x), ((0, 0), (0, 2)))


def tables(x):
    return ferrum_jax.moe_plan(x[:, :2].astype(int), 4, 2).expert_offsets.sum().astype(x.dtype) + x


def apart(x):
    """By custom derivatives."""
    jvp, vjp = jax.custom_jvp(pad), jax.custom_vjp(tables)
    jvp.defjvp(lambda primals, tangents: (pad(*primals), *tangents))
    vjp.defvjp(lambda x: (tables(x), None), lambda _, ct: (ct,))
    return jvp(vjp(x))


def sharded(f):
    mesh = mesh_of(min(4, jax.device_count()))
    spec = jax.sharding.PartitionSpec("d")
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


@pytest.mark.parametrize(
    ("f", "names"),
    [
        (lambda x: jax.lax.scan(lambda c, _: (pad(c), None), x, None, length=2)[0], ["route_topk"]),
        (lambda x: jax.lax.while_loop(lambda x: route(x).sum() < 9, tables, x), ["route_topk", "moe_plan"]),
        (lambda x: jax.lax.cond(x.sum() > 0, tables, pad, x), ["route_topk", "moe_plan"]),
        (lambda x: jax.lax.switch(2, [jnp.sin, jnp.cos, pad], x), ["route_topk"]),
        (jax.checkpoint(lambda x: tables(pad(x))), ["route_topk", "moe_plan"]),
        (apart, ["moe_plan", "route_topk"]),
        (sharded(jax.jit(pad)), ["route_topk"]),
        (jax.grad(lambda x: jax.checkpoint(route)(x).sum()), ["route_topk"]),
    ],
    ids=["scan", "while", "cond", "switch", "checkpoint", "custom", "shard_map", "grad"],
)
def test_which_sees_ops_wherever_they_stand(f, names):
    found = ferrum_jax.which(f, X, platform="cpu")
    if len(names) == 1:
        assert found.implementation == "xla"
    else:
        assert [name for name, _ in found] == names
        assert all(choice.implementation == "xla" for _, choice in found)


def test_which_says_what_each_op_of_a_layer_takes():
    """In the order in which they stand; an op twice if its two calls differ, in shapes, dtypes or parameters."""
    w = jnp.ones((4, 4, 12)), jnp.ones((4, 6, 4))
    found = ferrum_jax.which(ferrum_jax.moe_mlp, X, X, *w, top_k=2, platform="cpu")
    names = ["route_topk", "moe_align_block_size", "grouped_matmul_activated", "grouped_matmul", "weighted_sum_batched"]
    assert [name for name, _ in found] == names
    bias = {"flow": "packed", "b_gate_up": jnp.ones((4, 12))}  # with expert_of_row, which has no kernel anywhere
    packed = ferrum_jax.which(ferrum_jax.moe_mlp, X, X, *w, top_k=2, **bias, platform="cpu")
    products = ["grouped_matmul", "moe_dispatch", "grouped_matmul"]
    assert [name for name, _ in packed] == ["route_topk", "moe_plan", "moe_dispatch", *products, "moe_combine"]

    def calls(x):
        return [route(x), route(x + 1), route(x, 3), route(x[:4]), route(x.astype("bfloat16")), tables(x)]

    assert [name for name, _ in ferrum_jax.which(calls, X, platform="cpu")] == ["route_topk"] * 4 + ["moe_plan"]


def test_which_says_what_each_shard_of_a_layer_takes():
    layer = functools.partial(ferrum_jax.parallel.moe_mlp, axis_name="d", top_k=2, exchange="gather")
    w = jnp.ones((4, 4, 12)), jnp.ones((4, 6, 4))
    mesh = mesh_of(min(4, jax.device_count()))
    spec = jax.sharding.PartitionSpec("d")
    f = jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec)
    found = dict(ferrum_jax.which(f, X, X, *w, platform="cpu"))
    assert {"route_topk", "grouped_matmul_activated", "weighted_sum_batched"} <= set(found)


def test_which_sees_the_two_products_of_a_tangent():
    rows, pairs, weights = jnp.ones((4, 3)), jnp.array([[0, 1], [2, 3]]), jnp.ones((2, 2))

    def combine(y, w):
        return ferrum_jax.moe_combine(y, pairs, w)

    def tangent(*a):
        return jax.jvp(combine, a, a)[1]

    assert ferrum_jax.which(tangent, rows, weights, platform="cpu").implementation == "xla"


@pytest.mark.parametrize(
    ("gpu", "capability"),
    [
        ("Tesla V100-SXM2-32GB", 70),
        ("NVIDIA TITAN V", 70),
        ("Tesla T4", 75),
        ("Quadro RTX 5000", 75),
        ("NVIDIA GeForce RTX 2080 Ti", 75),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A30", 80),
        ("NVIDIA A10G", 86),
        ("NVIDIA A40", 86),
        ("NVIDIA RTX A3000 Laptop GPU", 86),
        ("NVIDIA RTX A6000", 86),
        ("NVIDIA GeForce RTX 3090", 86),
        ("NVIDIA GeForce RTX 3050 A Laptop GPU", 89),
        ("NVIDIA L40S", 89),
        ("NVIDIA RTX 5000 Ada Generation", 89),
        ("NVIDIA RTX 4000 SFF Ada Generation", 89),
        ("NVIDIA GeForce RTX 4090", 89),
        ("NVIDIA H100 80GB HBM3", 90),
        ("NVIDIA H20-3e", 90),
        ("NVIDIA GH200 480GB", 90),
        ("h200", 90),
        ("NVIDIA B100", 100),
        ("NVIDIA GB200", 100),
        ("NVIDIA B300 SXM6 AC", 103),
        ("NVIDIA GeForce RTX 5090", 120),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 120),
        ("NVIDIA GB10", 121),
    ],
)
def test_capability_by_name(gpu, capability):
    assert kernels.target_capability(gpu) == capability


def test_the_longest_known_name_counts_wherever_it_stands():
    for names in (targets.GPUS, dict(reversed(targets.GPUS.items()))):
        assert targets.capability_by_name("NVIDIA GeForce RTX 3050 A Laptop GPU", names) == 89
        assert all(targets.capability_by_name(f"NVIDIA {name}-80GB", names) == names[name] for name in names)


@pytest.mark.parametrize("gpu", ["Nonsense GPU", "NVIDIA A3000", "NVIDIA T400", "RTX", "H1000", "TITAN X"])
def test_a_name_that_is_not_known_is_an_error(gpu):
    """Not another GPU, of which it holds the name as a part of a word."""
    for name in (None, "triton", "xla"):
        with pytest.raises(ValueError, match=f"device_kind .*{gpu!r}; known are V100, .* RTX 3090,.* GB10"):
            ferrum_jax.which(ferrum_jax.route_topk_softmax, X, 2, platform="cuda", device_kind=gpu, implementation=name)


@needs_plugin
def test_a_mesh_whose_gpu_is_not_known():
    """xla runs on any; a kernel has to know."""
    with on_h200("Nonsense GPU"):

        def run(name):
            route = jax.jit(lambda x: ferrum_jax.route_topk_softmax(x, 2, implementation=name).expert_ids)
            return route.trace(X).lower(lowering_platforms=("cuda",))

        run("xla")
        with pytest.raises(ValueError, match="Nonsense GPU"):
            run(None)


@needs_plugin
def test_a_gpu_that_is_here_is_asked(monkeypatch):
    """Whatever its name."""

    class Device:
        device_kind, compute_capability = "Nonsense GPU", "8.6"

    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device])
    pairs = jax.ShapeDtypeStruct((64, 8), jnp.int32)
    args = jax.ShapeDtypeStruct((512, 16), jnp.bfloat16), pairs, jax.ShapeDtypeStruct((64, 8), jnp.float32)
    for kind in (None, "Nonsense GPU"):
        assert kernels.target_capability(kind) == 86
        choice = ferrum_jax.which(ferrum_jax.moe_combine, *args, platform="cuda", device_kind=kind)
        assert (choice.implementation, choice.passed_over["xla"]) == ("triton", "triton comes first")
    assert kernels.target_capability("NVIDIA H200") == 90
    monkeypatch.setattr(Device, "compute_capability", "6.1")
    choice = ferrum_jax.which(ferrum_jax.moe_combine, *args, platform="cuda")
    assert choice.implementation == "xla"
    assert "6.1" in choice.passed_over["triton"]


def test_an_older_jax_than_pallas_needs_is_refused_by_version(monkeypatch):
    x = jnp.ones((2, 4))
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    passed_over = ferrum_jax.which(ferrum_jax.route_topk_softmax, x, 2, platform="cuda").passed_over
    assert passed_over["pallas"] == "it needs jax >= 0.11.2; this is jax 0.10.2"
    with ferrum_jax.interpret_kernels(), pytest.raises(NotImplementedError, match=r"0\.11\.2.*0\.10\.2"):
        ferrum_jax.route_topk_softmax(x, 2, implementation="pallas")


def of(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def chosen(f, *shapes, device_kind="NVIDIA H200", **kwargs):
    args = [
        jax.ShapeDtypeStruct(s, jnp.int32 if i in kwargs.get("ids", ()) else jnp.bfloat16) for i, s in enumerate(shapes)
    ]
    kwargs.pop("ids", None)
    return ferrum_jax.which(f, *args, platform="cuda", device_kind=device_kind, **kwargs)


@needs_plugin
@pytest.mark.parametrize(
    ("tokens", "k", "taken", "other", "why"),
    [
        (64, 8, "xla", "triton", "xla comes first, measured as fast or faster on a Hopper GPU at K >= 8, but for"),
        (1024, 8, "triton", "xla", "triton comes first"),
        (8192, 8, "xla", "triton", "xla comes first"),
        (64, 2, "triton", "xla", "triton comes first"),
    ],
)
def test_combine_takes_what_was_measured(tokens, k, taken, other, why):
    rows, pairs = (tokens * k, 16), (tokens, k)
    choice = chosen(ferrum_jax.moe_combine, rows, pairs, pairs, ids=(1,))
    assert choice.implementation == taken
    assert choice.passed_over[other].startswith(why)
    # Leading axes are not choices per token.
    batched = chosen(ferrum_jax.moe_combine, (9, *rows), (9, *pairs), (9, *pairs), ids=(1,))
    assert batched.implementation == taken


@needs_plugin
@pytest.mark.pallas
@pytest.mark.parametrize(("tokens", "taken"), [(128, "xla"), (1024, "pallas"), (8192, "xla")])
def test_the_gradient_of_dispatch_by_its_size(tokens, taken):
    rows, slots, pairs = of((9, 4)), of((9,), "int32"), of((tokens, 8), "int32")
    operands = {"rows": rows, "packed_token_idx": slots, "pairs_by_token": pairs}
    call = kernels.Call("moe_collect", operands, {"...": (), "R": 9, "H": 4, "T": tokens, "K": 8}, {})
    assert kernels.choose(call, None, "cuda", "NVIDIA H100 80GB HBM3").implementation == taken
    # Nothing was measured on other GPUs, nor without pairs_by_token.
    assert kernels.choose(call, None, "cuda", "NVIDIA A100-SXM4-80GB").implementation == "triton"
    alone = dataclasses.replace(call, operands={**operands, "pairs_by_token": None}, sizes={"...": (), "R": 9, "H": 4})
    assert kernels.choose(alone, None, "cuda", "NVIDIA H100 80GB HBM3").implementation == "triton"


@needs_plugin
@pytest.mark.parametrize(("pairs", "taken"), [((16, 8), "xla"), ((128, 8), "pallas"), ((8192, 8), "xla")])
@pytest.mark.pallas
def test_the_weighted_sum_by_its_size(pairs, taken):
    choice = chosen(ferrum_jax.weighted_sum_batched, (*pairs, 16), pairs)
    assert choice.implementation == taken
    assert "T*K" in choice.passed_over["triton"]
    # What was measured on one GPU says nothing of another: no word of a measurement then.
    for gpu in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200"):
        other = chosen(ferrum_jax.weighted_sum_batched, (*pairs, 16), pairs, device_kind=gpu)
        assert (other.implementation, other.passed_over["xla"]) == ("triton", "triton comes first")


@needs_plugin
@pytest.mark.pallas
@pytest.mark.parametrize(
    ("tokens", "unique", "taken"), [(16, True, "xla"), (8192, True, "pallas"), (16, False, "triton")]
)
def test_the_gradient_of_combine_by_its_size(tokens, unique, taken):
    """Repeated rows were not measured: there the first kernel is taken."""
    operands = {"g": of((tokens, 4)), "pair_weights": of((tokens, 8)), "pairs_by_token": of((tokens, 8), "int32")}
    params = {"num_rows": tokens * 8, "unique_rows": unique}
    call = kernels.Call("moe_spread", operands, {"...": (), "T": tokens, "H": 4, "K": 8}, params)
    assert kernels.choose(call, None, "cuda", "NVIDIA H100 80GB HBM3").implementation == taken


@needs_plugin
@pytest.mark.pallas
@pytest.mark.parametrize(("tokens", "taken"), [(16, "pallas"), (8192, "triton")])
def test_both_gradients_of_combine_by_their_size(tokens, taken):
    tables = {"pair_weights": of((tokens, 8)), "pairs_by_token": of((tokens, 8), "int32")}
    operands = {"g": of((tokens, 4)), "packed_down": of((tokens * 8, 4)), **tables}
    sizes = {"...": (), "T": tokens, "H": 4, "R": tokens * 8, "K": 8}
    call = kernels.Call("moe_combine_cotangents", operands, sizes, {})
    assert kernels.choose(call, None, "cuda", "NVIDIA H100 80GB HBM3").implementation == taken
    assert kernels.choose(call, None, "cuda", "NVIDIA A100-SXM4-80GB").implementation == "triton"


@needs_plugin
@pytest.mark.pallas
@pytest.mark.parametrize(
    ("rows", "packed", "activation", "taken"),
    [
        (64, True, None, "triton"),
        (512, True, None, "pallas"),
        (512, False, None, "triton"),
        (64, False, "silu", "triton"),
        (512, True, "silu", "pallas"),
        (512, False, "silu", "xla"),
    ],
)
def test_the_grouped_product_by_the_rows_of_an_expert(rows, packed, activation, taken):
    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    tables = of("int32", 8 * rows + 64), of("int32", 8 * rows // 8 + 8), of("int32")

    def product(x, w, *tables):
        routing = ferrum_jax.MoeRouting(*tables, kind="packed" if packed else None)
        return ferrum_jax.grouped_matmul(x, w, routing, activation=activation)

    def which(dtype, gpu):
        operands = of(dtype, 8 * rows, 64), of(dtype, 8, 64, 256)
        return ferrum_jax.which(product, *operands, *tables, platform="cuda", device_kind=gpu).implementation

    assert which("bfloat16", "NVIDIA H200") == taken
    assert which("bfloat16", "NVIDIA B200") == "triton"
    assert which("float32", "NVIDIA H200") == ("triton" if taken == "pallas" else taken)


def test_interpretation_takes_a_kernel_whatever_was_measured():
    with ferrum_jax.interpret_kernels():
        assert chosen(ferrum_jax.moe_combine, (512, 16), (64, 8), (64, 8), ids=(1,)).implementation == "triton"


@needs_plugin
def test_what_was_asked_for_is_the_reason():
    choice = chosen(ferrum_jax.moe_combine, (512, 16), (64, 8), (64, 8), ids=(1,), implementation="triton")
    assert choice.implementation == "triton"
    assert choice.passed_over["xla"] == "triton was asked for"


def test_measured_names_ops_and_implementations():
    for row in kernels.MEASURED:
        assert kernels.served(row.op)
        assert row.implementation in kernels.IMPLEMENTATIONS
        assert row.where
        assert row.timings
        assert all(time.gpu in measured.CONDITIONS for time in row.timings)


def test_a_measurement_of_one_dtype_says_nothing_of_others(monkeypatch):
    rows = tuple(dataclasses.replace(row, dtypes=("bfloat16",)) for row in kernels.MEASURED)
    monkeypatch.setattr(kernels, "MEASURED", rows)
    for dtype, says in (("bfloat16", True), ("float32", False)):
        call = route_call(dtype)
        call = dataclasses.replace(call, op="slot_scale")
        assert any(row.op == call.op and row.holds(call, 90) for row in rows) == says


def route_call(dtype="float32", **known):
    params = {"top_k": 2, "num_groups": None}
    return kernels.Call(
        "route_topk", {"logits": of((4, 8), dtype), "bias": None}, {"...": (4,), "E": 8}, params, **known
    )


def test_a_program_that_the_compiler_divides_has_no_kernels():
    """Interpreted or not, by whatever backend."""
    call = route_call(devices=4)
    why = "the program runs on 4 devices under plain jit, and a kernel is not divided: call it inside jax.shard_map"
    for interpreting in (False, True):
        with kernels.interpret_kernels() if interpreting else contextlib.nullcontext():
            choice = kernels.choose(call, None, "cuda", "NVIDIA H200")
            assert choice == ("xla", {"triton": why, "pallas": why})
            for name in kernels.BACKENDS:
                with pytest.raises(NotImplementedError, match=f"implementation='{name}' cannot be used: the program"):
                    kernels.choose(call, name, "cuda", "NVIDIA H200")
            assert kernels.choose(call, "xla", "cuda", "NVIDIA H200").implementation == "xla"


@needs_plugin
def test_a_kernel_of_another_architecture_stands_beside_the_first(monkeypatch):
    """Another file for the same op, without a change of the op. It is imported only where it is chosen."""
    blackwell = targets.Architectures("a Blackwell GPU", only=(100, 103))
    row = kernels.Kernel("route_topk", "triton", "no_such_file", blackwell, function="route_topk_sm100")
    monkeypatch.setattr(kernels, "KERNELS", (row, *kernels.KERNELS))
    call = route_call()
    assert kernels.choose(call, None, "cuda", "NVIDIA H200").implementation == "triton"
    with pytest.raises(ModuleNotFoundError, match="no_such_file"):
        kernels.choose(call, None, "cuda", "NVIDIA B200")
    with on_h200():
        assert kernels.load("triton", "route_topk", ()).__name__ == "route_topk"
    with on_h200("NVIDIA B200"), pytest.raises(ModuleNotFoundError, match="no_such_file"):
        kernels.load("triton", "route_topk", ())
    only = tuple(row for row in kernels.KERNELS if row.op != "route_topk")
    monkeypatch.setattr(kernels, "KERNELS", (row, *only))
    reason = kernels.choose(call, None, "cuda", "NVIDIA H200").passed_over["triton"]
    assert reason == "it needs a Blackwell GPU; the target's compute capability is 9.0"


@needs_plugin
def test_every_kernel_of_the_registry_is_there():
    for row in kernels.KERNELS:
        if row.backend == "triton" or "pallas" in KERNELS:
            file = importlib.import_module(f"ferrum_jax.kernels.{row.backend}.{row.file}")
            assert callable(getattr(file, row.wrapper))
            assert row.backend in kernels.BACKENDS


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_refuses_scores_that_it_does_not_compute(backend):
    """And it computes all that there are: a new one is refused until its kernel has it."""
    routing = importlib.import_module(f"ferrum_jax.kernels.{backend}.routing")
    settings = {"top_k": 2, "num_groups": None}
    call = kernels.Call("route_topk", {}, {"E": 8}, settings)
    for scoring in SCORINGS:
        assert routing.refuse(dataclasses.replace(call, params={**settings, "scoring": scoring})) is None
    reason = routing.refuse(dataclasses.replace(call, params={**settings, "scoring": "cosine"}))
    assert "does not compute the scores of 'cosine'" in reason
