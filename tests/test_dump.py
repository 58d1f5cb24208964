"""The routing dump: its text and its event, under every way of running, and nothing at all when it is off."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ferrum_jax as fj
from ferrum_jax.observe import dump

IDS = np.array([[1, 0], [1, 3]], np.int32)  # E = 4, blocks of 2: S = 8, three live blocks, one in the tail
PACKED = """\
[MOE_DUMP:packed] batch_x_topk=4 block_size=2 num_experts=4 total_post_pad=6 active_blocks=3 unique_experts=3
[MOE_DUMP:packed] sorted_token_ids[0..8] = [0, 4, 1, 2, 3, 4, 4, 4]
[MOE_DUMP:packed] block_ids[0..4] = [0, 1, 3, -1]
"""
PAIR_IDS = """\
[MOE_DUMP:pair_ids] batch_x_topk=4 block_size=2 num_experts=4 total_post_pad=6 active_blocks=3 unique_experts=3
[MOE_DUMP:pair_ids] sorted_token_ids[0..8] = [1, 4, 0, 2, 3, 4, 4, 4]
[MOE_DUMP:pair_ids] block_ids[0..4] = [0, 1, 3, -1]
"""


def packed(ids):
    return fj.moe_align_block_size(ids, 4, 2)


@pytest.fixture
def dumped(monkeypatch, capsys):
    """Run a function as in a process of its own that has the variable set; what it printed to standard error."""

    def run(function, *args, **variables):
        monkeypatch.setattr(dump, "_once", threading.Lock())
        for name, value in {"FERRUM_MOE_DUMP": "", **variables}.items():
            monkeypatch.setenv(name, value)
        jax.block_until_ready(function(*args))
        jax.effects_barrier()
        return capsys.readouterr().err

    return run


def in_process(code, **variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FERRUM_")}
    prelude = "import jax, numpy as np, ferrum_jax as fj\nids = np.array([[1, 0], [1, 3]], np.int32)\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code],
        cwd=Path(__file__).parent.parent,
        env=clean | {"JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


def test_a_process_prints_once_and_writes_an_event(tmp_path):
    file = tmp_path / "events.jsonl"
    code = (
        "fj.moe_build_pairs_by_token(ids, 4)\n"  # no alignment
        "fj.moe_plan(ids[:1], 4, 2)\n"  # not the size waited for
        "jax.jit(lambda i: fj.moe_plan(i, 4, 2))(ids)\n"  # nobody waits for it
        "fj.moe_align_block_size(ids, 4, 4)\n"
    )
    got = in_process(code, FERRUM_MOE_DUMP="0", FERRUM_MOE_DUMP_BATCH_X_TOPK="4", FERRUM_PROFILE_JSONL=str(file))
    assert got == PACKED
    (line,) = file.read_text().splitlines()
    event = json.loads(line)
    assert list(event) == [
        "event",
        "commit_sha",
        "env_hash",
        "model",
        "concurrency",
        "shape",
        "stage_us",
        "graph_enabled",
        "runtime_flags",
    ]
    assert list(event["shape"].items()) == [
        ("kind", "packed"),
        ("batch_x_topk", 4),
        ("block_size", 2),
        ("num_experts", 4),
        ("total_post_pad", 6),
        ("active_blocks", 3),
        ("unique_experts", 3),
        ("sorted_token_ids_preview", [0, 4, 1, 2, 3, 4, 4, 4]),
        ("block_ids_preview", [0, 1, 3, -1]),
    ]
    assert (event["event"], event["stage_us"], event["graph_enabled"]) == ("moe_dump", {}, False)


def test_a_process_without_the_variable_prints_nothing():
    code = (
        "import os\nfj.moe_plan(ids, 4, 2)\nos.environ['FERRUM_MOE_DUMP'] = '1'\nfj.moe_plan(ids, 4, 2, pair_ids=True)"
    )
    assert in_process("fj.moe_plan(ids, 4, 2)", FERRUM_MOE_DUMP_BATCH_X_TOPK="4") == ""
    assert in_process(code) == PAIR_IDS  # set later: seen by the next eager call, of shapes already compiled too


def test_not_one_equation_when_off(monkeypatch):
    functions = [packed, lambda ids: fj.moe_align_block_size_pair_ids(ids, 4, 2), lambda ids: fj.moe_plan(ids, 4, 2)]
    monkeypatch.setenv("FERRUM_MOE_DUMP_BATCH_X_TOPK", "4")
    off = [jax.make_jaxpr(lambda ids, f=f: f(ids))(IDS) for f in functions]
    assert [len(j.eqns) for j in off] == [1, 1, 1]
    assert all(not j.effects for j in off)
    monkeypatch.setenv("FERRUM_MOE_DUMP", "1")
    assert all(len(jax.make_jaxpr(lambda ids, f=f: f(ids))(IDS).eqns) > 1 for f in functions)
    assert fj.which(fj.moe_plan, IDS, 4, 2, platform="cpu").implementation == "xla"


@pytest.mark.parametrize("function", [packed, lambda ids: fj.moe_plan(ids, 4, 2)], ids=["align", "plan"])
def test_eager_and_jit(dumped, function):
    assert dumped(function, IDS) == PACKED
    assert dumped(jax.jit(lambda ids: function(ids)), IDS) == PACKED
    assert (
        dumped(jax.jit(lambda ids: next(iter(function(ids))).sum()), IDS) == PACKED
    )  # of one table, the others unused


def test_pair_ids(dumped):
    assert dumped(lambda: fj.moe_align_block_size_pair_ids(IDS, 4, 2)) == PAIR_IDS
    assert dumped(lambda: fj.moe_plan(IDS, 4, 2, pair_ids=True)) == PAIR_IDS


def test_slices(dumped):
    """P is that of one slice, however the others come."""
    batch = np.stack([IDS] * 3)
    assert dumped(packed, batch) == PACKED
    assert dumped(jax.vmap(packed), batch) == PACKED
    assert dumped(jax.jit(jax.vmap(jax.vmap(packed))), batch[None]) == PACKED
    assert dumped(packed, batch[:0]) == ""  # no slice, no dump


def test_scan(dumped):
    def step(carry, ids):
        return carry + packed(ids).total_tokens_post_pad, None

    assert dumped(lambda: jax.lax.scan(step, jnp.int32(0), np.stack([IDS, 0 * IDS]))) == PACKED


def test_grad_and_remat(dumped):
    @jax.checkpoint
    def loss(x):
        ids, _ = fj.route_topk_softmax(x, 2)
        return jnp.sum(fj.moe_dispatch(x, packed(ids).sorted_token_ids // 2) ** 2)

    x = np.array([[2.0, 3.0, 0.0, 1.0], [0.0, 3.0, 1.0, 2.0]], np.float32)  # routed as IDS
    assert dumped(jax.jit(jax.grad(loss)), x) == PACKED


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_meshes(dumped, kind):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    sharded = jax.device_put(np.concatenate([IDS, IDS]), NamedSharding(mesh, P("d")))
    local = jax.shard_map(lambda ids: [*packed(ids)][:2], mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=True)
    assert dumped(jax.jit(local), sharded) == PACKED  # P of one shard
    batch = jax.device_put(np.stack([IDS, IDS]), NamedSharding(mesh, P("d")))
    assert dumped(jax.jit(lambda ids: packed(ids)), batch) == PACKED
    assert dumped(packed, batch) == PACKED


def test_partly_manual_mesh(dumped):
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
    local = jax.shard_map(
        lambda ids: [*packed(ids)][:2], mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}, check_vma=True
    )
    assert dumped(jax.jit(local), np.concatenate([IDS, IDS])) == PACKED


def test_the_size_waited_for(dumped):
    def both():
        return packed(IDS[:1]), packed(IDS)

    assert "batch_x_topk=2 " in dumped(both)
    assert dumped(both, FERRUM_MOE_DUMP_BATCH_X_TOPK="4") == PACKED
    assert dumped(both, FERRUM_MOE_DUMP_BATCH_X_TOPK="5") == ""
    assert "batch_x_topk=2 " in dumped(both, FERRUM_MOE_DUMP_BATCH_X_TOPK="many")  # as in Ferrum: no size


def test_long_and_empty_tables(dumped):
    ids = np.random.default_rng(3).integers(-1, 9, (40, 2), np.int32)
    slots, blocks, total = (table.value for table in oracle.moe_align_block_size(ids, num_experts=8, block_size=2))
    live = blocks[: total // 2]
    assert dumped(fj.moe_align_block_size, ids, 8, 2).splitlines() == [
        f"[MOE_DUMP:packed] batch_x_topk=80 block_size=2 num_experts=8 total_post_pad={total} "
        f"active_blocks={len(live)} unique_experts={len(set(live))}",
        f"[MOE_DUMP:packed] sorted_token_ids[0..48] = {slots[:48].tolist()}",
        f"[MOE_DUMP:packed] block_ids[0..32] = {blocks[:32].tolist()}",
    ]
    assert dumped(packed, IDS[:0]).splitlines()[1:] == [
        "[MOE_DUMP:packed] sorted_token_ids[0..0] = []",
        "[MOE_DUMP:packed] block_ids[0..0] = []",
    ]


def test_x64(dumped, x64):
    assert dumped(packed, IDS) == PACKED


def test_a_failing_dump_breaks_nothing(dumped, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    dumped(packed, IDS)
    monkeypatch.setattr(dump.profile, "event", lambda *args, **kwargs: 1 / 0)
    dumped(packed, IDS)


def test_without_a_cpu_backend(dumped, monkeypatch):
    def none(backend):
        raise RuntimeError("no cpu")

    monkeypatch.setattr(jax, "local_devices", none)
    with pytest.warns(RuntimeWarning, match="FERRUM_MOE_DUMP: no dump"):
        assert dumped(packed, IDS) == ""


def test_export_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("FERRUM_MOE_DUMP", "1")
    symbolic = jax.ShapeDtypeStruct((*export.symbolic_shape("T"), 2), jnp.int32)
    for ids in (IDS, symbolic):
        with pytest.raises(NotImplementedError, match="FERRUM_MOE_DUMP"):
            export.export(jax.jit(lambda ids: packed(ids)))(ids)
    monkeypatch.delenv("FERRUM_MOE_DUMP")
    export.export(jax.jit(lambda ids: packed(ids)))(IDS)
