"""What must not be published: local paths, tokens, names of machines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ..config.run import unpackaged

#: Of a run's configuration, what is about the machine or the person and not about the SAE.
PRIVATE = (
    "logger",
    "output_path",
    "checkpoint_path",
    "cached_activations_path",
    "resume_from_checkpoint",
    "from_pretrained_path",
    "path",
)


def clean(value: Any, renamed: Mapping[str, str] | None = None) -> Any:
    """A copy without what is private: folders of this machine become names, tokens go.

    renamed: key → value to put in its place, at any depth.
    """
    renamed = renamed or {}
    if isinstance(value, dict):
        return {
            key: renamed[key] if key in renamed and inner is not None else clean(inner, renamed)
            for key, inner in cast("dict[str, Any]", value).items()
            if key not in PRIVATE
        }
    if isinstance(value, list | tuple):
        return [clean(inner, renamed) for inner in cast("list[Any]", value)]
    if not isinstance(value, str):
        return value
    value = re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_(removed)", value)
    value = unpackaged(value)
    relative = "/" in value and "\n" not in value and len(value) < 1024 and Path(value).exists()
    if relative or re.match(r"[~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return re.sub(r"(?<![\w:/.])/(?:[^/\s'\"]+/)*([^/\s'\"]+)", r"\1", value)
