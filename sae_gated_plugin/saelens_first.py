"""SAELens first: importing this package waits for SAELens, and activates the plugin right after it.

SAELens takes seconds to import, which `sae-gated --help` need not wait for. So the package imports
it with the first module that builds on it, before that module's own code runs: activation loads
the plugins, and finds no module of ours half imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: Rooms and modules that do without SAELens, and without PyTorch but for some of `distributed`.
LIGHT = ("cli", "distributed", "errors", "files", "old_paths", "report", "results", "__main__")


class _Finder(MetaPathFinder):
    _asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        if package == __package__ and rest.split(".")[0] not in LIGHT:
            import sae_lens  # noqa: F401  # pyright: ignore[reportUnusedImport]
        if fullname != "sae_lens" or self._asking:
            return None
        # This finder stays: the caller may only want to know whether SAELens is installed.
        self._asking = True  # the finder that activates on `import sae_lens` asks all others, too
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None:
            _activate_after(spec.loader)
        return spec


def _activate_after(loader: Any) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _activate()

    loader.exec_module = exec_module


def _activate() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder) is not _Finder]
    from .plugins.bridge import activate

    activate()


def install() -> None:
    """Activate the plugin: now where SAELens has been imported, else when it is."""
    if "sae_lens" in sys.modules:
        _activate()
    else:
        sys.meta_path.insert(0, _Finder())
