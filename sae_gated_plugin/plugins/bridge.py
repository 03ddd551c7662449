"""Activation: from the registered plugins into SAELens's registries."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from ..errors import PluginError, UnknownArchitecture, unknown_name
from ..saelens_internals import register_classes, register_loaders, wrap_lookup
from .host import collect, make_manager, warn_of_failures
from .records import OURS, Registry, handed_over, logger

_lock = threading.RLock()
_active: Registry | None = None
_activating = False


def activate() -> Registry:
    """Load every plugin and hand its architectures and loaders to SAELens; once per process.

    Called again, it only takes up plugins that were waiting. Raises PluginError when a plugin
    asks for the registry while it is being loaded.
    """
    global _active, _activating
    with _lock:
        if _activating:
            raise PluginError("Plugins are being loaded: the registry can be read once they are.")
        first = _active is None
        if _active is None or any(info.status == "waiting" for info in _active.plugins):
            _activating = True
            try:
                _active = collect(make_manager())
                _bridge(_active)
            finally:
                _activating = False
            if first:
                _explain_unknown_architectures()
                if "gated" in _active.architectures:
                    logger.info("`gated` is now the Gated SAE of %s.", OURS)
            warn_of_failures(_active)  # last: where warnings are errors, the rest is in place
        return _active


def registry() -> Registry:
    """What is active in this process."""
    return activate()


def _bridge(active: Registry) -> None:
    for name, architecture in active.architectures.items():
        handed_over.architectures[name] = architecture
        register_classes(name, architecture.training, architecture.inference)
    handed_over.loaders.update(active.loaders)
    handed_over.releases.update(active.releases)
    register_loaders(active.loaders, active.releases)


def _explain_unknown_architectures() -> None:
    """Give SAELens's two lookups a sentence instead of a bare KeyError."""
    for name, known in (
        ("get_sae_class", SAE_CLASS_REGISTRY),
        ("get_sae_training_class", SAE_TRAINING_CLASS_REGISTRY),
    ):
        wrap_lookup(name, functools.partial(_explaining, known=known))


def _explaining(lookup: Callable[[str], Any], known: dict[str, Any]) -> Callable[[str], Any]:
    @functools.wraps(lookup)
    def explain(architecture: str) -> Any:
        if architecture not in known:
            with contextlib.suppress(PluginError):
                activate()  # its plugin may have been waiting
        if architecture not in known:
            raise UnknownArchitecture(unknown_name("architecture", architecture, known))
        return lookup(architecture)

    return explain
