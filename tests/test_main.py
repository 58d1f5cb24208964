"""`python -m ferrum_jax` in a process of its own, as a user runs it."""

import importlib.metadata
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import ferrum_jax
from ferrum_jax import __main__ as program
from ferrum_jax.bench import products
from ferrum_jax.bench import text as texts

OPS = [
    name
    for name in ferrum_jax.__all__
    if "implementation" in inspect.signature(getattr(ferrum_jax, name)).parameters
    and name not in ("moe_mlp", "ragged_dot")  # which run several ops
]
BROKEN = """
import sys
import types
from ferrum_jax.model import local
from ferrum_jax import __main__ as program
program.SMALL = program.SMALL._replace(num_experts=8, hidden=32, expert_width=32, tokens=48)
right = local.{op}
local.{op} = types.SimpleNamespace(bind=lambda *args, **kwargs: right.bind(*args, **kwargs) * {factor})
sys.exit(program.main(["demo"]))
"""


def run(*args):
    return subprocess.run(
        [sys.executable, *args],
        cwd=pathlib.Path(ferrum_jax.__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def line(output, start):
    found = [text.strip() for text in output.splitlines() if text.strip().startswith(start)]
    assert found, f"no line starts with {start!r}:\n{output}"
    return found[0]


@pytest.mark.slow
def test_everything():
    ended = run("-m", "ferrum_jax")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    out = ended.stdout
    for op in OPS:
        assert line(out, f"{op} ").split()[1] == "xla"
    for name in ("python", "ferrum_jax", "jax", "jaxlib", "triton", "jax_triton", "tokens", "imbalance", "padding"):
        assert len(line(out, f"{name} ").split()) > 1
    for flow in ("packed rows", "pair ids", "ragged_dot"):
        assert all(" ok " in line(out, f"{flow}: {part}") for part in ("expert ids", "expert weights", "layer"))
    assert [float(ms) > 0 for ms in line(out, program.WHOLE).removeprefix(program.WHOLE).split()] == [True] * 3
    assert line(out, "Load:")
    assert out.count("#") > program.SMALL.num_experts
    assert out.endswith("All checks passed.\n")
    assert len(out.splitlines()) <= 70
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("op", "factor", "right", "wrong"),
    [
        ("combine_op", "1.001", "pair ids: layer", "packed rows: layer"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("combine_op", "float('nan')", "pair ids: layer", "packed rows: layer"),
                ("weighted_sum_op", "1.001", "packed rows: layer", "pair ids: layer"),
            )
        ),
    ],
)
def test_a_failed_check_is_the_exit_status(op, factor, right, wrong):
    ended = run("-c", BROKEN.format(op=op, factor=factor))
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert " ok " in line(ended.stdout, right)
    assert " FAILED " in line(ended.stdout, wrong)
    last = ended.stdout.splitlines()[-1]
    assert last.startswith(f"FAILED: {wrong}, largest error ")
    assert right not in last
    assert "of its bound" in last


@pytest.mark.parametrize(
    ("command", "there", "not_there"), [("info", "because", "Checks"), ("demo", "Checks", "because")]
)
def test_one_part(command, there, not_there, capsys, monkeypatch):
    monkeypatch.setattr(program, "demo", lambda layer: print("Checks") or 0)
    monkeypatch.setattr(program, "info", lambda layer: print("because"))
    assert program.main([command]) == 0
    printed = capsys.readouterr().out
    assert there in printed
    assert not_there not in printed


def test_grouped_product_beside_ragged_dot(capsys):
    products.main(rows=64, width=16)
    rows = [text.split() for text in capsys.readouterr().out.splitlines()[2:4]]
    assert [row[0] for row in rows] == ["128", "8"]
    assert all(float(ms) > 0 for row in rows for ms in row[1:4])
    assert all(float(row[4]) < 1e-5 for row in rows)


SPREAD = """
import sys
from ferrum_jax import __main__ as program
program.SMALL = program.SMALL._replace(num_experts=8, hidden=32, expert_width=32, tokens=48)
sys.exit(program.main(["parallel", "--devices", "{devices}"]))
"""


@pytest.mark.slow
def test_layer_over_several_devices(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    ended = run("-c", SPREAD.format(devices=2))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert line(ended.stdout, "On 2 devices, cpu")
    for name in ("one device", "gather", "padded"):
        assert " ok " in line(ended.stdout, f"{name}: layer")
    assert int(line(ended.stdout, "padded, 96 rows").split()[-1]) > 0  # an uneven router overflows an even share
    assert ended.stdout.endswith("All checks passed.\n")


@pytest.mark.parametrize("devices", [0, 7, 16])
def test_devices_that_are_not_here(devices, capsys):
    assert program.parallel(devices) == 2
    said = f"--devices must be one of 1, 2, 4, 8: they divide 32 experts and 512 tokens; got {devices}\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("devices", ["0", "3", "1000000"])
def test_a_cpu_has_as_many_devices_as_divide_the_layer(devices, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    ended = run("-m", "ferrum_jax", "parallel", "--devices", devices)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert line(ended.stdout, "--devices must be one of 1, 2, 4, 8, 16, 32: they divide").endswith(f"got {devices}")


def test_bench_comes_first(capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(["--devices", "2", "bench"])
    assert "bench comes first" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        program.main(("bench", "--help"))
    assert "--shapes" in capsys.readouterr().out


class Installed:
    def __init__(self, metadata, files):
        self.metadata, self.read_text = metadata, files.get


@pytest.mark.parametrize(
    ("installed", "name", "text"),
    [
        (Installed({"Description": "Read."}, {"LICENSE": "Take it."}), "the README in the package's metadata", "Read"),
        (Installed({}, {"LICENSE": "Take it."}), "LICENSE in the package's metadata", "Take it."),
        (Installed({}, {"licenses/LICENSE": "Take it."}), "licenses/LICENSE in the package's metadata", "Take it."),
        (Installed({"Description": "\n"}, {}), "the package's own source", "moe_combine"),
        (None, "the package's own source", "moe_combine"),
    ],
)
def test_there_is_always_a_text(installed, name, text, monkeypatch):
    def distribution(package):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    found, words = texts.read()
    assert found == name
    assert text.encode() in words
