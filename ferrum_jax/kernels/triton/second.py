"""A second copy of Triton and of the kernel files, which interprets, beside the first, which compiles.

Triton decides at import whether it interprets, and a process that does so cannot compile. The copy's modules are of the
same files, under other names, in a package of their own, and `import triton` in one of them means the copy: each has an
`__import__` that sees to it. So nobody else meets the copy, in whatever thread, nor an environment that is not his:
`sys.modules["triton"]` and TRITON_INTERPRET stay as they are. The compiled library is common to both copies.
"""

import builtins
import importlib
import importlib.util
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType, SimpleNamespace
from typing import Any

_making = threading.Lock()


def package(name: str, path: Sequence[str], **names: Any) -> ModuleType:
    """The package `name`: its modules are of the files in `path`, and their Triton is `name`.triton."""
    with _making:
        if name not in sys.modules:
            made = ModuleType(name)
            vars(made).update(__path__=list(path), **names)
            first = importlib.import_module("triton")
            shared = {n: m for n, m in list(sys.modules.items()) if _within(n, "triton._C")}
            sys.modules.update({f"{name}.{n}": m for n, m in shared.items()})
            sys.meta_path.insert(0, _Finder(name, first))
            sys.modules[name] = made
    return sys.modules[name]


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


class _Finder:
    """Finds the package's modules in the usual files, for a loader that gives them their own `__import__`."""

    def __init__(self, package: str, first: ModuleType):
        self.package, self.first = package, first
        self.builtins = {**vars(builtins), "__import__": self.import_in_copy}

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(f"{self.package}."):
            return None
        if name == f"{self.package}.triton":
            inside = list(self.first.__path__)
            spec = importlib.util.spec_from_file_location(name, self.first.__file__, submodule_search_locations=inside)
        else:
            spec = PathFinder.find_spec(name, path)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(self, spec.loader.name, spec.loader.path)
        return spec

    def renamed(self, name: str) -> str:
        return f"{self.package}.{name}" if _within(name, "triton") and not _within(name, "triton._C") else name

    def import_module(self, name: str, package: str | None = None) -> ModuleType:
        return importlib.import_module(self.renamed(name), package)

    def import_in_copy(self, name: str, globals: Any = None, locals: Any = None, names: Any = (), level: int = 0):
        """`import` as it is, but for `triton`, and for `importlib`, by which Triton imports its backends."""
        if name == "importlib" and not (names or level):
            return SimpleNamespace(**{**vars(importlib), "import_module": self.import_module})
        if level or self.renamed(name) == name:
            return builtins.__import__(name, globals, locals, names, level)
        importlib.import_module(name)  # the compiled library, called by the copy, comes here too, and means the first
        importlib.import_module(self.renamed(name))
        if names:
            return builtins.__import__(self.renamed(name), globals, locals, names, 0)
        return sys.modules[self.renamed("triton")]  # `import triton.language` is of the outermost package


class _Loader(SourceFileLoader):
    def __init__(self, finder: _Finder, name: str, path: str):
        super().__init__(name, path)
        self.finder = finder

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = self.finder.builtins
        super().exec_module(module)
        if module.__name__ == self.finder.renamed("triton.knobs"):
            module.propagate_env = False  # type: ignore[attr-defined]
            module.runtime.interpret = True
