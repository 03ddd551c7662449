"""SAELens's tables of architectures, loaders and releases, and what is written into them.

SAELens finds architectures and loaders in module-level dictionaries. Its own functions to add to
them refuse a name that is taken, and `gated` is; there is none for loaders and releases. So the
dictionaries are written into, here and nowhere else. Seen in SAELens 6.51.2 to 6.54.12.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import sae_lens.registry
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from ..errors import PluginError, UnknownArchitecture, unknown_name
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
    architectures = active.architectures.items()
    entries: list[tuple[dict[str, Any], dict[str, Any]]] = [
        # Inference first: a training config looks its inference class up while it is built.
        (SAE_CLASS_REGISTRY, {name: one.inference for name, one in architectures}),
        (SAE_TRAINING_CLASS_REGISTRY, {name: one.training for name, one in architectures}),
        (NAMED_PRETRAINED_SAE_LOADERS, active.loaders),
    ]
    if active.releases:
        entries.append((get_pretrained_saes_directory(), active.releases))
    for table, offered in entries:
        given = {name: entry for name, entry in offered.items() if entry is not None}
        table.update(given)
        handed_over.extend(given.values())


def explain_lookups(activate: Callable[[], Any]) -> None:
    """Let SAELens's two lookups take up waiting plugins, and name the nearest architecture.

    A plugin whose import brought SAELens in is complete only after activation: a lookup is the
    first sign that its architecture is wanted.
    """
    _explain("get_sae_class", SAE_CLASS_REGISTRY, activate)
    _explain("get_sae_training_class", SAE_TRAINING_CLASS_REGISTRY, activate)


def _explain(name: str, known: dict[str, Any], activate: Callable[[], Any]) -> None:
    original = getattr(sae_lens.registry, name)

    @functools.wraps(original)
    def lookup(architecture: str) -> Any:
        if architecture not in known:
            with contextlib.suppress(PluginError):
                activate()
        if architecture not in known:
            raise UnknownArchitecture(unknown_name("architecture", architecture, known))
        return original(architecture)

    # SAELens imports the function by name into several modules; each has a binding of its own.
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("sae_lens.") and vars(module).get(name) is original:
            setattr(module, name, lookup)
