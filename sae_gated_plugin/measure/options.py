"""What an SAE is measured on, and how: the options of every measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..model.hook_point import require_device


@dataclass(frozen=True)
class EvalOptions:
    """Options of `evaluate`, `evaluate_all` and `encoder_gap`, which take them by keyword too."""

    model: Any = None
    """An already loaded SAELens-wrapped model."""
    model_name: str | None = None
    """The model to load instead of the one that the SAE's metadata names."""
    dataset: Any = None
    """A path or name, or a loaded dataset; default the metadata's."""
    split: str | None = None
    """Default: the first of validation, test, train that the dataset has."""
    tokens: int = 100_000
    """Tokens of text to read at most; `tokens` in the results counts measured ones."""
    device: str = "cpu"
    trust_model_options: bool = False
    """Load the model with whatever the SAE's metadata asks for, not only with MODEL_OPTIONS;
    `trust_remote_code`, for one, runs code of the model's author."""
    prefixes: bool = False
    """Also measure every Matryoshka prefix, in `evaluate`; each costs another pass of the model."""
    coherence: bool = True
    """Compare decoder rows with each other, which of a wide SAE takes a minute."""

    def __post_init__(self) -> None:
        require_device(self.device)


DEFAULTS = EvalOptions()
