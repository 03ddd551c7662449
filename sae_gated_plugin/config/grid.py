"""What the files of sweeps and toys have in common: many SAEs, each with a name."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, cast

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from ..errors import ConfigError
from .check import convert_value
from .yaml import Origins

#: Bytes of a folder's name on common file systems, less what is put in front of it for a while.
LONGEST_NAME = 240


def take_entries(
    mapping: dict[str, Any], name: str, origins: Origins, prefix: str = ""
) -> list[dict[str, Any]]:
    """Take a list of mappings out of the mapping; empty where there is none."""
    entries, key = mapping.pop(name, []), f"{prefix}{name}"
    if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        raise ConfigError(f"'{key}' in {origins.of(key)} must be a list of mappings.")
    return cast("list[dict[str, Any]]", entries)


def require_label(label: Any) -> str:
    """Return a label. Raises ConfigError unless it is text that names something."""
    if not convert_value(str, label, "'label'").strip():
        raise ConfigError("A 'label' must not be empty; leave it out to use the architecture.")
    return label


def file_name(words: str) -> str:
    """Return words as the name of a file or folder. Raises ConfigError where they are too many."""
    name = re.sub(r"[^\w.=+-]+", "_", words).lstrip(".") or "sae"
    if len(name.encode()) > LONGEST_NAME:
        raise ConfigError(
            f"'{words[:80]}…' is too long for the name of a file; give a short 'label', or vary "
            "less."
        )
    return name


def known_fields(sae: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Of the shared `sae` section what this architecture has; nobody's field is left to be found.

    `l1_warm_up_steps` may be shared by those that have it, while topk has no such field.
    """
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        return dict(sae)
    every = {
        field.name for _, cls in SAE_TRAINING_CLASS_REGISTRY.values() for field in _fields(cls)
    }
    own = {field.name for field in _fields(SAE_TRAINING_CLASS_REGISTRY[architecture][1])}
    return {name: value for name, value in sae.items() if name in own or name not in every}


def _fields(config_class: Any) -> tuple[Any, ...]:
    return dataclasses.fields(config_class)
