"""What plugins registered, as data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup
from torch import Tensor

from ..results import Measure
from .hookspecs import PROJECT

GROUP = PROJECT
OURS = "sae-gated-plugin"

logger = logging.getLogger("sae_gated_plugin")


@dataclass
class PluginInfo:
    """A plugin, as `sae-gated plugins` lists it.

    status: "ok", "failed" (error says why) or "waiting" (it is being imported at this moment).
    brings: kind → the names it registered.
    """

    distribution: str
    version: str
    module: str
    hooks: list[str] = field(default_factory=list[str])
    status: str = "ok"
    error: str | None = None
    brings: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.distribution} ({self.module})"


def _no_options(config: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True)
class About:
    """What an architecture says about itself, for cards, exports and reports.

    title: its name in words. describe: from a cfg.json to its options in words. jumprelu: from an
    SAE in float32 to (W_enc, b_enc, threshold, W_dec, b_dec) of the `jumprelu` that computes the
    same, or a sentence on why there is none. histograms: its parameters (d_sae,) to plot.
    """

    title: str
    describe: Callable[[Mapping[str, Any]], str] = _no_options
    jumprelu: Callable[[Any], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] | str | None = None
    histograms: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Architecture:
    """What was registered under one architecture's name; either pair may be missing."""

    training: tuple[type[Any], type[Any]] | None
    inference: tuple[type[Any], type[Any]] | None
    about: About | None = None


@dataclass
class Registry:
    """Everything that plugins registered, by name, and the plugins themselves."""

    architectures: dict[str, Architecture] = field(default_factory=dict[str, Architecture])
    losses: dict[str, Callable[..., Any]] = field(default_factory=dict[str, Callable[..., Any]])
    metrics: dict[str, Callable[[], Any]] = field(default_factory=dict[str, Callable[[], Any]])
    measures: dict[str, Measure] = field(default_factory=dict[str, Measure])  # of metrics
    loaders: dict[str, Callable[..., Any]] = field(default_factory=dict[str, Callable[..., Any]])
    releases: dict[str, PretrainedSAELookup] = field(default_factory=dict[str, PretrainedSAELookup])
    plugins: list[PluginInfo] = field(default_factory=list[PluginInfo])
