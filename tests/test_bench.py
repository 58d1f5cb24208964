"""`python -m ferrum_jax bench`, at sizes that take no time."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes import MODELS

import ferrum_jax
from ferrum_jax import __main__ as program
from ferrum_jax import bench
from ferrum_jax.bench import cases, report, timing

TINY = cases.Shape("mixtral", 6, 8, 2, 32, 32, jnp.float32)
ROW = {
    *("op", "model", "T", "E", "K", "H", "F", "dtype", "block_size", "bytes", "flops", "floor_us"),
    *("way", "ours", "us", "launches", "method", "error", "lowering_seconds"),
}
PEAK = {"bytes_per_s": 1e10, "flops_per_s": 1e11}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Narrow, few steps, one call for a time."""

    def clock(call, at_least):
        jax.block_until_ready(call())
        return [1e-3]

    monkeypatch.setattr(cases, "CPU_WIDTHS", (32, 32))
    monkeypatch.setattr(cases, "STEPS", 2)
    monkeypatch.setattr(timing, "_clock", clock)
    monkeypatch.setattr(timing, "peaks", lambda: PEAK)


@pytest.mark.parametrize("op", cases.WORKLOADS)
def test_every_way_of_every_op_agrees_and_is_timed(op):
    found = list(timing.rows(op, TINY, PEAK))
    assert [row["way"] for row in found] == ["xla", next(iter(cases.WORKLOADS[op].rivals(TINY)))]
    for row in found:
        assert set(row) == ROW
        assert row["error"] is None
        assert row["us"] > 0
        assert row["lowering_seconds"] > 0
        assert row["floor_us"] == pytest.approx(max(row["bytes"] / 1e10, row["flops"] / 1e11) * 1e6)
        assert 0 < row["floor_us"] < 1e3


def test_no_floor_is_above_a_time():
    """A row that moves more a second than the copy did is what the others' floors are made of."""
    times = (1e3, 2e8, "CUPTI"), (4e3, 2e8, "CUPTI"), (1e-3, 2e6, "CUPTI"), (10, 2e8, "clock")
    fast, slow, small, chain = ({"us": us, "bytes": size, "flops": 0, "method": method} for us, size, method in times)
    failed = {"us": None, "bytes": 2e8, "flops": 4e8, "method": None}
    found = {"rows": [slow, fast, small, chain, failed], **PEAK}
    report.settle(found)
    # Not the small one's, which may lie in a cache, nor a chain's, whose steps share what they read.
    assert found["bytes_per_s"] == pytest.approx(2e11)
    assert [row["floor_us"] for row in found["rows"]] == pytest.approx([1e3, 1e3, 10, 1e3, 4e3])


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    right = ferrum_jax.moe_combine
    monkeypatch.setattr(ferrum_jax, "moe_combine", lambda *args, **kwargs: right(*args, **kwargs).at[1].mul(1.01))
    assert program.main(["bench", "--op", "moe_combine", "--tokens", "3"]) == 1
    xla, today = [line for line in capsys.readouterr().out.splitlines() if line.startswith("moe_combine")]
    assert "ArithmeticError: wrong" not in xla  # what others are measured by
    assert "ArithmeticError: wrong" in today


def test_what_fails_leaves_the_others(monkeypatch):
    def fails(*args, **kwargs):
        raise MemoryError("too large")

    monkeypatch.setattr(ferrum_jax, "weighted_sum_batched", fails)
    first, second = timing.rows("weighted_sum_batched", TINY, PEAK)
    assert (first["us"], first["error"]) == (None, "MemoryError: too large")
    assert second["us"] > 0


def test_the_profiler_takes_a_rotation_as_a_jitted_function():
    """Otherwise it would jit it, and so call it on the first set of arguments alone."""
    call = timing._Rotation(lambda x, y: (x, y[:1]), [(jnp.ones(3), jnp.zeros(3)), (jnp.ones(3), jnp.ones(3))])
    assert isinstance(call, jax.stages.Wrapped)
    assert [call().tolist() for _ in range(3)] == [[0.0], [1.0], [0.0]]


def test_integers_must_be_equal_and_rows_close():
    x = np.array([[3.0, 4.0], [30.0, 40.0]], np.float32)
    assert timing.error_of({"ids": jnp.arange(3), "x": x}, {"ids": jnp.arange(3), "x": x}) == 0
    assert timing.error_of(jnp.array([1, 2]), jnp.array([1, 3])) == np.inf
    assert timing.error_of(x + np.float32([[0, 0], [0.5, 0]]), jnp.asarray(x)) == pytest.approx(0.5 / 50, rel=1e-3)
    usual = ((5**2 + 50**2) / 2) ** 0.5  # beside which a small row's error is judged
    assert timing.error_of(x + np.float32([[0.5, 0], [0, 0]]), jnp.asarray(x)) == pytest.approx(0.5 / usual, rel=1e-3)
    assert np.isnan(timing.error_of(x * [[np.nan], [1]], jnp.asarray(x)))


def test_bytes_and_flops_are_those_of_the_shapes():
    """The bytes of what goes in and comes out, once each, where an op reads all of its arguments."""
    s = TINY._replace(T=400)  # so many that every expert is used
    for name in ("moe_plan", "weighted_sum_batched"):
        args = cases.WORKLOADS[name].inputs(jax.random.key(0), s)
        out = cases.WORKLOADS[name].ours(s, "xla")(*args)
        assert cases.WORKLOADS[name].bytes(s) == sum(x.nbytes for x in jax.tree.leaves((args, out))), name
    args = cases.WORKLOADS["grouped_matmul"].inputs(jax.random.key(0), s)
    x, w, _ = args
    out = cases.WORKLOADS["grouped_matmul"].ours(s, "xla")(*args)
    assert cases.WORKLOADS["grouped_matmul"].bytes(s) == pytest.approx(x.nbytes + w.nbytes + out.nbytes)
    assert cases.WORKLOADS["grouped_matmul"].flops(s) == 2 * s.P * s.H * 2 * s.F


def test_table_json_and_picture(tmp_path, capsys):
    saved, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--op", "moe_align_block_size,moe_combine", "--shapes", "mixtral,gpt_oss", "--tokens", "2"]
    assert program.main(["bench", *options, "--json", str(saved), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "This is a CPU" in out
    assert f"jax {jax.__version__}" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("moe_")]
    assert len(lines) == 2 * 2 * 2
    assert max(map(len, out.splitlines())) <= 120
    assert len(re.findall(r"^lowering_seconds: xla \d+\.\d\d, ", out, re.MULTILINE)) == 2 * 2
    found = json.loads(saved.read_text())
    assert {"device", "platform", "date", "versions", "bytes_per_s", "flops_per_s", "rows"} == set(found)
    assert found["platform"] == "cpu"
    assert [[row["op"], row["model"], str(row["T"]), row["way"]] for row in found["rows"]] == [r[:4] for r in lines]
    assert all(set(row) == ROW for row in found["rows"])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    axes = ferrum_jax.viz.benchmark(found)
    assert [ax.get_title() for ax in axes] == [
        f"{op}, {model}" for op in ("moe_align_block_size", "moe_combine") for model in ("mixtral", "gpt_oss")
    ]
    assert [line.get_label() for line in axes[0].lines] == ["xla", "argsort", "floor"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--op", "moe_plan,moe_sort"], ("'moe_sort'", "route_topk_softmax", "decode_step")),
        (["--shapes", "gpt2"], ("'gpt2'", "mixtral", "kimi_k2", "gpt_oss", "all")),
        (["--tokens", "0"], ("'0'", ">= 1")),
        (["--tokens", "8,many"], ("many", ">= 1")),
    ],
)
def test_what_is_unknown_is_refused_with_the_choices(options, words, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["bench", *options])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def test_a_report_without_times_is_no_picture():
    with pytest.raises(ValueError, match=r"must have times.*no time"):
        ferrum_jax.viz.benchmark({"rows": []})


def test_models_are_those_of_the_tests():
    assert set(bench.MODELS) < set(MODELS)
    assert MODELS["deepseek_v3"] == (256, 8, 7168)
