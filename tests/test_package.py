"""What a user meets first: the import, the names, the documents."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ferrum_jax

ROOT = Path(__file__).parent.parent


def run(code, **environ):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environ}, check=True)
    return done.stdout.strip()


def test_import_is_light_and_starts_no_backend():
    # jax.extend itself brings the definitions of jax._src.pallas; what compiles kernels is jax.experimental.pallas.
    loaded = run(
        "import sys, ferrum_jax\n"
        "kernels = ('triton', 'jax_triton', 'torch', 'jax.experimental.pallas', 'matplotlib', 'flax', 'safetensors')\n"
        "import jax._src.xla_bridge as bridge\n"
        "print([m for m in kernels if m in sys.modules], bridge.backends_are_initialized())"
    )
    assert loaded == "[] False"


@pytest.mark.slow
def test_import_adds_less_than_100_ms_to_jax():
    # Of the processor's time: what other processes do meanwhile does not count. Nor does compiling to bytecode, which
    # the first import of an installed package does for all others, unless the environment forbids it.
    code = "import time, jax; t = time.process_time(); import ferrum_jax; print(time.process_time() - t)"
    times = [float(run(code, PYTHONDONTWRITEBYTECODE="")) for _ in range(5)]
    assert min(times) < 0.1, times


def test_every_public_name_is_documented():
    for name in ferrum_jax.__all__:
        assert getattr(ferrum_jax, name).__doc__, name
    for name in (n for n in ferrum_jax.__all__ if n[0].islower()):
        assert ">>> " in getattr(ferrum_jax, name).__doc__, name


def test_only_core_touches_jax_internals():
    for path in (ROOT / "ferrum_jax").rglob("*.py"):
        text = path.read_text()
        assert "jax._src" not in text, path
        if path.parent.name != "core":
            assert not re.search(r"jax\.(extend|interpreters)", text), path


def test_install_hints_name_extras_of_a_clone():
    """The package index has no ferrum_jax."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    hints = [
        (path.name, hint)
        for path in (ROOT / "README.md", *(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "ferrum_jax").rglob("*.py"))
        for hint in re.findall(r"pip install (?:-e )?'([^']*)'", path.read_text())
    ]
    assert {name for name, _ in hints} >= {"README.md", "quickstart.ipynb", "nnx.py"}
    assert [(name, hint) for name, hint in hints if hint not in {f".[{extra}]" for extra in extras}] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
def test_readme_code_runs(block):
    run(block)


def test_paths_named_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`([\w.]+(?:/[\w.]*)+)`", text)
    assert {"tests/cases.py", "kernels/__init__.py"} <= set(paths)
    assert [path for path in paths if not any((folder / path).exists() for folder in (ROOT, ROOT / "ferrum_jax"))] == []
