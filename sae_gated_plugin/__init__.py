"""Gated and ProLU sparse autoencoders for SAELens. Importing this package activates the plugin."""

# First, because its registries are what activation fills.
import sae_lens  # noqa: F401  # pyright: ignore[reportUnusedImport]

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
