"""Activation: from the registered plugins into SAELens's registries."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import sae_lens.registry
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from ..errors import PluginError, UnknownArchitecture, unknown_name
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
        # Inference first: a training config looks its inference class up while it is built.
        # `register_sae_class` would refuse the name `gated`.
        handed_over.architectures[name] = architecture
        if architecture.inference is not None:
            SAE_CLASS_REGISTRY[name] = architecture.inference
        if architecture.training is not None:
            SAE_TRAINING_CLASS_REGISTRY[name] = architecture.training
    handed_over.loaders.update(active.loaders)
    NAMED_PRETRAINED_SAE_LOADERS.update(active.loaders)
    if active.releases:  # SAELens's list takes a while to read
        handed_over.releases.update(active.releases)
        get_pretrained_saes_directory().update(active.releases)


def _explain_unknown_architectures() -> None:
    """Give SAELens's two lookups a sentence instead of a bare KeyError.

    They are imported by name into several of its modules, so each binding is replaced.
    """
    for function_name, known in (
        ("get_sae_class", SAE_CLASS_REGISTRY),
        ("get_sae_training_class", SAE_TRAINING_CLASS_REGISTRY),
    ):
        original = getattr(sae_lens.registry, function_name)
        explaining = _explaining(original, known)
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == "sae_lens" and (
                vars(module).get(function_name) is original
            ):
                setattr(module, function_name, explaining)


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
