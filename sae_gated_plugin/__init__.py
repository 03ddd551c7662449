"""Gated and ProLU sparse autoencoders for SAELens. Importing this package activates the plugin."""

import sae_lens as _sae_lens  # noqa: F401  first: its registries are what activation fills

from .errors import (
    ArtifactError,
    ConfigError,
    PluginError,
    SaeGatedError,
    TrainingDiverged,
    UndefinedMetric,
    UnknownArchitecture,
)
from .hookspecs import hookimpl
from .plugins import activate, make_manager, registry

__version__ = "0.1.0"

activate()

__all__ = [
    "ArtifactError",
    "ConfigError",
    "PluginError",
    "SaeGatedError",
    "TrainingDiverged",
    "UndefinedMetric",
    "UnknownArchitecture",
    "__version__",
    "activate",
    "hookimpl",
    "make_manager",
    "registry",
]
