"""What plugins registered, as data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from ..errors import PluginError
from . import hookspecs

GROUP = hookspecs.PROJECT
OURS = "sae-gated-plugin"
HOST = "sae-lens"
NOUNS = {
    "architectures": "architecture",
    "losses": "loss",
    "metrics": "metric",
    "loaders": "loader",
}

logger = logging.getLogger("sae_gated_plugin")


@dataclass
class PluginInfo:
    """A plugin, as `sae-gated plugins` lists it.

    status: "ok", "failed" (error says why) or "waiting" (it is being imported at this moment).
    """

    distribution: str
    version: str
    module: str
    hooks: list[str] = field(default_factory=list[str])
    status: str = "ok"
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Architecture:
    """What was registered under one architecture's name; either pair may be missing."""

    training: tuple[type[Any], type[Any]] | None
    inference: tuple[type[Any], type[Any]] | None


@dataclass
class Registry:
    """Everything that plugins registered, by name, and the plugins themselves."""

    architectures: dict[str, Architecture] = field(default_factory=dict[str, Architecture])
    losses: dict[str, Callable[..., Any]] = field(default_factory=dict[str, Callable[..., Any]])
    metrics: dict[str, Callable[[], Any]] = field(default_factory=dict[str, Callable[[], Any]])
    loaders: dict[str, Callable[..., Any]] = field(default_factory=dict[str, Callable[..., Any]])
    releases: dict[str, PretrainedSAELookup] = field(default_factory=dict[str, PretrainedSAELookup])
    plugins: list[PluginInfo] = field(default_factory=list[PluginInfo])


def release_of(name: str, about: Mapping[str, Any], loader: str) -> PretrainedSAELookup:
    """A release as SAELens's directory has it. Raises PluginError for what is missing."""
    missing = {"repo_id", "model", "saes"} - set(about)
    texts = (name, about.get("repo_id"), about.get("model"))
    fits = isinstance(about.get("saes"), Mapping) and all(isinstance(t, str) for t in texts)
    if missing or not fits or not about["saes"]:
        raise PluginError(f"Release '{name}' needs repo_id, model and saes (sae_id → path).")
    saes = {str(sae_id): str(path) for sae_id, path in about["saes"].items()}
    return PretrainedSAELookup(
        release=name,
        repo_id=about["repo_id"],
        model=about["model"],
        conversion_func=loader,
        saes_map=saes,
        expected_var_explained=dict.fromkeys(saes, 1.0),
        expected_l0=dict.fromkeys(saes, 0.0),
        neuronpedia_id={},
        norm_scaling_factor={},
        config_overrides=about.get("config_overrides"),
    )


def host_owner(kind: str, name: str) -> str | None:
    """Who holds the name in SAELens: SAELens, or whoever wrote into its registries; never we."""
    if kind == "loaders":
        held, ours = NAMED_PRETRAINED_SAE_LOADERS.get(name), handed_over.loaders.get(name)
        return HOST if held is not None and held is not ours else None
    if kind == "architectures":
        ours = handed_over.architectures.get(name, Architecture(None, None))
        owners: set[str] = set()
        for held, own in (
            (SAE_TRAINING_CLASS_REGISTRY.get(name), ours.training),
            (SAE_CLASS_REGISTRY.get(name), ours.inference),
        ):
            if held is not None and held != own:
                module = held[0].__module__
                owners.add(HOST if module.startswith("sae_lens.") else f"module {module}")
        return min(owners - {HOST} or owners, default=None)
    return None


handed_over = Registry()  # what the bridge wrote into SAELens's own tables
