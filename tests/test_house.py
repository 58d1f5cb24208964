"""The house: which room may import from which, and how long its files and functions may be.

Imports point down, never up, and never in a circle. `pytest -s` prints them, and the lengths.
"""

import ast
import graphlib
from collections import defaultdict
from pathlib import Path

import pytest

import ferrum_jax

PACKAGE = Path(ferrum_jax.__file__).parent
# From the ground up. The modules at the top name what users import; the command line and the benchmark use these.
FLOORS = [{"kernels"}, {"core"}, {"ops"}, {"model", "observe"}, {""}, {"bench"}, {"__main__"}]


def modules():
    """Every module by its name inside the package: "ops.combine", "kernels", and "" for the package itself."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(name, path, known):
    """The package's modules that this module imports, at its top or inside its functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                parts = [p for p in package.split(".") if p]
                base = parts[: len(parts) - node.level + 1] + (node.module or "").split(".")
            elif (node.module or "").split(".")[0] == "ferrum_jax":
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                within = ".".join(p for p in [*base, alias.name] if p)
                yield within if within in known else ".".join(p for p in base if p)
        elif isinstance(node, ast.Import) and any(a.name.split(".")[0] == "ferrum_jax" for a in node.names):
            yield ""


def graph():
    known = dict(modules())
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


def room(name):
    """The room of a module: its first folder. "" for files at the top, which only name what stands below."""
    first = name.split(".")[0]
    return first if first in set().union(*FLOORS) else ""


def floor(name):
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_imports_point_down():
    arrows = defaultdict(set)
    for name, targets in graph().items():
        for target in targets:
            assert floor(target) <= floor(name), f"{name} imports {target}, which stands above it"
            assert floor(target) < floor(name) or room(target) == room(name), f"{name} imports {target}, beside it"
            if room(target) != room(name):
                arrows[room(name)].add(room(target))
    for rooms in reversed(FLOORS):
        for name in sorted(rooms):
            below = ", ".join(other or "ferrum_jax" for other in sorted(arrows[name]))
            print(f"{name or 'ferrum_jax'} -> {below or 'nothing'}")


def test_no_module_imports_itself_by_way_of_others():
    # A package and its files count as one here: to import either is to import the other too.
    whole = {name: {t for t in targets if not name.startswith(f"{t}.") and t} for name, targets in graph().items()}
    list(graphlib.TopologicalSorter(whole).static_order())  # raises CycleError


BELOW = {  # what users import -> the modules whose public names it lists
    "checkpoint": ["model.checkpoint", "model.layouts"],
    "nnx": ["model.nnx", "model.nnx_scan", "model.nnx_variables"],
    "parallel": ["model.parallel", "model.exchange"],
    "presets": ["model.presets"],
    "profile": ["observe.profile"],
    "viz": ["observe.viz"],
}


@pytest.mark.parametrize("name", BELOW)
def test_what_users_import_stands_below(name):
    """The module at the top names all that is public there, and nothing else."""
    top, *below = (__import__(f"ferrum_jax.{module}", fromlist=["_"]) for module in (name, *BELOW[name]))
    mine = {n for n in vars(top) if not n.startswith("_")}
    public = {n: v for module in below for n, v in vars(module).items() if not n.startswith("_")}
    own = {module.__name__ for module in below}
    assert {n for n, v in public.items() if getattr(v, "__module__", "") in own} <= mine
    assert all(getattr(top, n) is public[n] for n in mine)


# ---- lengths


MOST_LINES, MOST_OF_A_FUNCTION = 400, 60
KERNEL_FOLDERS = ("kernels/triton/", "kernels/pallas/")  # a kernel's body may be longer than other functions


def lengths():
    """(lines, path) of every file; (lines, path, name) of every function, whose docstring is not counted."""
    files, functions = [], []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        files.append((len(path.read_text().splitlines()), name))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                size = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                functions.append((size, name, node.name))
    return sorted(files), sorted(functions)


def test_files_and_functions_are_short():
    files, functions = lengths()
    for kind, rows in (("file", files), ("function", functions)):
        print(f"{len(rows)} {kind}s, median {rows[len(rows) // 2][0]} lines, longest {rows[-1]}")
    assert [f for f in files if f[0] > MOST_LINES] == []
    long = [f for f in functions if f[0] > MOST_OF_A_FUNCTION and not f[1].startswith(KERNEL_FOLDERS)]
    assert long == []


def test_no_lambda_is_given_a_name():
    for path in [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        text = path.read_text()
        assert "noqa: " + "E731" not in text, path
        for node in ast.walk(ast.parse(text)):
            named = isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and isinstance(node.value, ast.Lambda)
            assert not named, f"{path}:{node.lineno}"
