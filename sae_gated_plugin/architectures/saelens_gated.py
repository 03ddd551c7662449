"""SAELens's own Gated SAE, constructed by name: it warns once, and a switch makes the name ours.

`architecture: gated` and the registry lead to our class, but a script that imports
`GatedTrainingSAE` from sae_lens gets SAELens's: a trainable auxiliary decoder and free norms.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import sae_lens
import sae_lens.saes

from ..saelens_internals import wrap_training_config
from .base.options import say_upgraded

_NAMES = ("GatedTrainingSAE", "GatedTrainingSAEConfig", "GatedSAE", "GatedSAEConfig")
_theirs: type[Any] = sae_lens.GatedTrainingSAE
_theirs_config: type[Any] = sae_lens.GatedTrainingSAEConfig


@functools.cache
def warn_when_constructed() -> None:
    """Make SAELens's class, not its subclasses, warn the first time it is constructed."""
    construct = _theirs.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is _theirs:
            _warn_once()
        construct(self, *args, **kwargs)

    _theirs.__init__ = __init__


@functools.cache
def warn_when_upgraded() -> None:
    """Say when SAELens's runner makes a config of ours of SAELens's own."""

    def wrap(get: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        @functools.wraps(get)
        def saying(self: Any) -> dict[str, Any]:
            if type(self.sae) is _theirs_config:
                say_upgraded(type(self.sae))
            return get(self)

        return saying

    wrap_training_config(wrap)


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "sae_lens.GatedTrainingSAE is SAELens's own Gated SAE, not the paper's: its auxiliary "
        "decoder is trained and its decoder rows are not of norm 1. The paper's is "
        "sae_gated_plugin.GatedTrainingSAE; sae_gated_plugin.replace_gated() makes SAELens's name "
        "mean that one.",
        stacklevel=4,
    )


def replace_gated() -> None:
    """Make `sae_lens.GatedTrainingSAE`, `GatedSAE` and their configs the plugin's, from now on.

    For scripts that construct them by name. What was imported from sae_lens before stays as it was.
    """
    from . import gated

    for module in (sae_lens, sae_lens.saes):
        for name in _NAMES:
            setattr(module, name, getattr(gated, name))
