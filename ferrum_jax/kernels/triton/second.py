"""A second copy of Triton, which interprets kernels, beside the first, which compiles them.

Triton decides at import whether it interprets, and then the process cannot compile. So the files of Triton, and the
kernel files, are loaded a second time as modules of a package with another name. The modules of that package have an
`__import__` of their own, for which `import triton` means the copy. Nothing else can meet the copy, in any thread:
`sys.modules["triton"]` and the environment variable TRITON_INTERPRET stay as they are. Both copies share Triton's
compiled library.
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


def package(name: str, path: Sequence[str], **modules: ModuleType) -> ModuleType:
    """The package `name`, with the modules of the files in `path`, for which Triton is `name`.triton.

    modules: modules of the package, by name, that are used as they are, in place of the file of that name.
    """
    with _making:
        if name not in sys.modules:
            made = ModuleType(name)
            vars(made).update(__path__=list(path), **modules)
            sys.modules.update({f"{name}.{n}": module for n, module in modules.items()})
            first = importlib.import_module("triton")
            shared = {n: m for n, m in list(sys.modules.items()) if _within(n, "triton._C")}
            sys.modules.update({f"{name}.{n}": m for n, m in shared.items()})
            sys.meta_path.insert(0, _Finder(name, first))
            sys.modules[name] = made
    return sys.modules[name]


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


class _Finder:
    """Finds the package's modules in the usual files, and loads them with an `__import__` of their own."""

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
        """`import`, where `triton` means the copy. So it does for `importlib`, by which Triton imports backends."""
        if name == "importlib" and not (names or level):
            return SimpleNamespace(**{**vars(importlib), "import_module": self.import_module})
        if level or self.renamed(name) == name:
            return builtins.__import__(name, globals, locals, names, level)
        # The compiled library, called by the copy, also comes here, and then uses the first Triton: so import both.
        importlib.import_module(name)
        importlib.import_module(self.renamed(name))
        if names:
            return builtins.__import__(self.renamed(name), globals, locals, names, 0)
        return sys.modules[self.renamed("triton")]  # `import triton.language` binds the outermost package


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
