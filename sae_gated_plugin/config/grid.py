"""Names and labels of a grid's points."""

from __future__ import annotations

import dataclasses
from typing import Any

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from ..errors import ConfigError
from .check import convert_value

#: Bytes of a folder's name on common file systems, less what is put in front of it for a while.
LONGEST_NAME = 240


def require_label(label: Any) -> str:
    """Return a label. Raises ConfigError unless it is text that names something."""
    if not convert_value(str, label, "'label'").strip():
        raise ConfigError("A 'label' must not be empty; leave it out to use the architecture.")
    return label


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
