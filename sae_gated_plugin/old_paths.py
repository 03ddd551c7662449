"""Module paths of version 0.1. They still work, warn, and lead to where things are now.

To be removed in version 0.3.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = "sae_gated_plugin"

#: Old module → where its public names went, in this order.
MODULES: dict[str, tuple[str, ...]] = {
    "activation_stream": ("training.activation_stream",),
    "architectures.baselines": ("architectures.relu",),
    "architectures.thresholded": tuple(
        f"architectures.base.{name}" for name in ("training_step", "options", "code")
    ),
    "artifacts": ("saes.load", "files"),
    "checkpoints": ("training.checkpoints", "files"),
    "cli": ("cli.commands",),
    "configuration": ("config.run", "config.yaml", "config.check"),
    "convert": ("publish.convert",),
    "dead_latents": ("objectives.dead_latents", "training.divergence"),
    "divergence": ("training.divergence", "objectives.losses"),
    "evaluation": ("measure.evaluate", "measure.activations", "model.text", "results"),
    "hook_points": ("model.hook_point", "model.replay", "errors", "files"),
    "hookspecs": ("plugins.hookspecs",),
    "hub": ("publish.hub", "publish.clean", "publish.client"),
    "kernels": ("core.kernels",),
    "loaders": ("saes.loaders",),
    "losses": ("objectives.losses", "objectives.coherence_penalty"),
    "metrics": tuple(
        f"metrics.{name}" for name in ("reconstruction", "firing", "decoder", "batch", "registered")
    ),
    "model_card": ("publish.card",),
    "optimizer_hooks": ("objectives.optimizer_hooks",),
    "plots": ("report.figures", "report.style", "synthetic.heatmap"),
    "plugins": ("plugins.host", "plugins.records", "plugins.bridge"),
    "ray_engine": ("sweeps.ray",),
    "report": ("report.page", "report.reading", "report.comparison"),
    "signals": ("training.signals",),
    "sparse": tuple(f"core.{name}" for name in ("active", "support", "cost", "finding")),
    "sparse_coding": tuple(
        f"sparse_coding.{name}"
        for name in ("pursuit", "fista", "least_squares", "problem", "codes")
    ),
    "sparsity_target": ("objectives.sparsity_target",),
    "sweeps": ("sweeps.sweep", "sweeps.grid", "sweeps.folder"),
    "toy": tuple(f"synthetic.{name}" for name in ("experiment", "config", "measure")),
    "training": ("training.run", "training.runner", "training.run_folder"),
}

RENAMED = {
    "configuration.load": "load_config",
    "convert.check": "check_conversion",
    "report.read": "read_results",
    "report.write": "write_report",
    "sweeps.load": "load_sweep",
    "sweeps.run": "run_sweep",
    "toy.load": "load_toy",
    "toy.match": "match_features",
    "toy.measure": "measure_toy",
    "toy.run": "run_toy",
}


def names_of(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for the old module `module`, a name relative to the package."""

    def attribute(name: str) -> Any:
        if not name.startswith("_"):
            new_name = RENAMED.get(f"{module}.{name}", name)
            for place in MODULES[module]:
                found = vars(import_module(f"{_PACKAGE}.{place}"))
                if new_name in found and not isinstance(found[new_name], ModuleType):
                    warnings.warn(
                        f"{_PACKAGE}.{module}.{name} is now {_PACKAGE}.{place}.{new_name}; the old "
                        "path will be removed in version 0.3.",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return found[new_name]
        raise AttributeError(f"module '{_PACKAGE}.{module}' has no attribute '{name}'")

    return attribute


class _Finder(MetaPathFinder, Loader):
    """Makes modules that no longer exist. It stands last, so it is asked for nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(f"{_PACKAGE}.")
        return ModuleSpec(fullname, self) if fullname != old and old in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix(f"{_PACKAGE}.")
        vars(module)["__getattr__"] = names_of(old)


def install() -> None:
    """Let the old modules be imported. Does nothing the second time."""
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
