"""SAELens's tables of architectures, loaders and releases, and what is written into them.

How they are written into is in saelens_internals.py; here is who owns which name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from ..errors import PluginError, UnknownArchitecture, unknown_name
from ..saelens_internals import register_classes, register_loaders, wrap_lookup
from .records import Registry

HOST = "sae-lens"

#: Entries that were written into the tables from here: nobody else owns their names.
handed_over: list[Any] = []


def _tables(kind: str) -> list[dict[str, Any]]:
    if kind == "release":
        return [get_pretrained_saes_directory()]  # takes a while to read
    architectures = [SAE_TRAINING_CLASS_REGISTRY, SAE_CLASS_REGISTRY]
    known = {"architecture": architectures, "loader": [NAMED_PRETRAINED_SAE_LOADERS]}
    return known.get(kind, [])


def owner_of(kind: str, name: str) -> str | None:
    """Who has put the name into SAELens's tables: SAELens or a module; None if nobody, or we."""
    entries = [table[name] for table in _tables(kind) if name in table]
    others = [entry for entry in entries if not any(entry is own for own in handed_over)]
    modules = {(other[0] if isinstance(other, tuple) else other).__module__ for other in others}
    outside = sorted(module for module in modules if not module.startswith("sae_lens."))
    return f"module {outside[0]}" if outside else HOST if modules else None


def as_release(name: str, about: Mapping[str, Any], loader: str) -> PretrainedSAELookup:
    """A release as SAELens's directory has it. Raises PluginError for what is missing."""
    texts = (name, about.get("repo_id"), about.get("model"))
    saes = about.get("saes")
    if not (isinstance(saes, Mapping) and saes and all(isinstance(text, str) for text in texts)):
        raise PluginError(f"Release '{name}' needs repo_id, model and saes (sae_id → path).")
    paths = {str(sae_id): str(path) for sae_id, path in saes.items()}
    return PretrainedSAELookup(
        release=name,
        repo_id=about["repo_id"],
        model=about["model"],
        conversion_func=loader,
        saes_map=paths,
        expected_var_explained=dict.fromkeys(paths, 1.0),
        expected_l0=dict.fromkeys(paths, 0.0),
        neuronpedia_id={},
        norm_scaling_factor={},
        config_overrides=about.get("config_overrides"),
    )


def hand_over(active: Registry) -> None:
    """Write what plugins registered into SAELens's tables."""
    for name, architecture in active.architectures.items():
        register_classes(name, architecture.training, architecture.inference)
        handed_over.extend(filter(None, (architecture.training, architecture.inference)))
    register_loaders(active.loaders, active.releases)
    handed_over.extend([*active.loaders.values(), *active.releases.values()])


def explain_lookups(activate: Callable[[], Any]) -> None:
    """Let SAELens's two lookups take up waiting plugins, and name the nearest architecture.

    A plugin whose import brought SAELens in is complete only after activation: a lookup is the
    first sign that its architecture is wanted.
    """
    _explain("get_sae_class", SAE_CLASS_REGISTRY, activate)
    _explain("get_sae_training_class", SAE_TRAINING_CLASS_REGISTRY, activate)


def _explain(name: str, known: dict[str, Any], activate: Callable[[], Any]) -> None:
    def explained(original: Callable[[str], Any]) -> Callable[[str], Any]:
        @functools.wraps(original)
        def lookup(architecture: str) -> Any:
            if architecture not in known:
                with contextlib.suppress(PluginError):
                    activate()
            if architecture not in known:
                raise UnknownArchitecture(unknown_name("architecture", architecture, known))
            return original(architecture)

        return lookup

    wrap_lookup(name, explained)
