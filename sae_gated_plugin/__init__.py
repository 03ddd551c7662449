"""Gated and ProLU sparse autoencoders for SAELens.

Importing this package activates the plugin as soon as SAELens is imported too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import old_paths, saelens_first
from .errors import (
    ArtifactError,
    ConfigError,
    HubError,
    Interrupted,
    PluginError,
    SaeGatedError,
    TrainingDiverged,
    UndefinedMetric,
    UnknownArchitecture,
)

if TYPE_CHECKING:
    from .architectures.expanded import ExpandedTrainingSAEConfig
    from .architectures.gated import GatedTrainingSAE, GatedTrainingSAEConfig
    from .architectures.mlp_encoder import MLPEncoderTrainingSAE, MLPEncoderTrainingSAEConfig
    from .architectures.prolu import ProLUTrainingSAE, ProLUTrainingSAEConfig
    from .architectures.relu import ReLUTrainingSAEConfig
    from .architectures.rescale_shift import RescaleShiftTrainingSAEConfig
    from .architectures.saelens_gated import replace_gated
    from .config.run import load_config, packaged
    from .measure.encoder_gap import encoder_gap
    from .measure.evaluate import evaluate
    from .plugins.bridge import activate, registry
    from .plugins.hookspecs import hookimpl
    from .plugins.host import make_manager
    from .plugins.records import About
    from .publish.convert import export
    from .publish.hub import list_saes, push
    from .report.page import write_report
    from .saes.load import load_sae
    from .sweeps.grid import load_sweep
    from .sweeps.sweep import run_sweep
    from .training.run import quickstart, resume, train

__version__ = "0.2.0"

#: Imported when first asked for, so that `import sae_lens` costs no more than before.
_LAZY = {
    "About": "plugins.records",
    "ExpandedTrainingSAEConfig": "architectures.expanded",
    "GatedTrainingSAE": "architectures.gated",
    "GatedTrainingSAEConfig": "architectures.gated",
    "MLPEncoderTrainingSAE": "architectures.mlp_encoder",
    "MLPEncoderTrainingSAEConfig": "architectures.mlp_encoder",
    "ProLUTrainingSAE": "architectures.prolu",
    "ProLUTrainingSAEConfig": "architectures.prolu",
    "ReLUTrainingSAEConfig": "architectures.relu",
    "RescaleShiftTrainingSAEConfig": "architectures.rescale_shift",
    "activate": "plugins.bridge",
    "encoder_gap": "measure.encoder_gap",
    "evaluate": "measure.evaluate",
    "export": "publish.convert",
    "hookimpl": "plugins.hookspecs",
    "list_saes": "publish.hub",
    "load_config": "config.run",
    "packaged": "config.run",
    "load_sae": "saes.load",
    "load_sweep": "sweeps.grid",
    "make_manager": "plugins.host",
    "push": "publish.hub",
    "quickstart": "training.run",
    "registry": "plugins.bridge",
    "replace_gated": "architectures.saelens_gated",
    "resume": "training.run",
    "run_sweep": "sweeps.sweep",
    "train": "training.run",
    "write_report": "report.page",
}

__all__ = [
    "About",
    "ArtifactError",
    "ConfigError",
    "ExpandedTrainingSAEConfig",
    "GatedTrainingSAE",
    "GatedTrainingSAEConfig",
    "HubError",
    "Interrupted",
    "MLPEncoderTrainingSAE",
    "MLPEncoderTrainingSAEConfig",
    "PluginError",
    "ProLUTrainingSAE",
    "ProLUTrainingSAEConfig",
    "ReLUTrainingSAEConfig",
    "RescaleShiftTrainingSAEConfig",
    "SaeGatedError",
    "TrainingDiverged",
    "UndefinedMetric",
    "UnknownArchitecture",
    "__version__",
    "activate",
    "encoder_gap",
    "evaluate",
    "export",
    "hookimpl",
    "list_saes",
    "load_config",
    "load_sae",
    "load_sweep",
    "make_manager",
    "packaged",
    "push",
    "quickstart",
    "registry",
    "replace_gated",
    "resume",
    "run_sweep",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


old_paths.install()
saelens_first.install()
