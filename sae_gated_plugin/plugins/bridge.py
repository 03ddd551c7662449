"""Activation: once per process, plugins are loaded and handed to SAELens."""

from __future__ import annotations

import threading

from ..errors import PluginError
from . import host
from .records import OURS, Registry, logger
from .saelens_tables import explain_lookups, hand_over

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
                _active = host.collect(host.make_manager())
                hand_over(_active)
            finally:
                _activating = False
            if first:
                explain_lookups(activate)
                if "gated" in _active.architectures:
                    logger.info("`gated` is now the Gated SAE of %s.", OURS)
            host.warn_of_failures(_active)  # last: where warnings are errors, the rest is in place
        return _active


def registry() -> Registry:
    """What is active in this process."""
    return activate()
