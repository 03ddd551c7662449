"""Matryoshka SAEs width by width: each prefix of the latents measured as an SAE of its own."""

from __future__ import annotations

import copy
from typing import Any

from sae_lens import SAE
from torch import Tensor

from ..errors import ConfigError

#: What is told of a prefix.
MEASURED = ("l0", "fvu", "gamma", "loss_recovered", "nats_lost")


def prefixes_of(sae: SAE[Any]) -> dict[str, SAE[Any]]:
    """Inner width it was trained with → an SAE that uses the first so many latents alone.

    SAELens keeps the widths in the metadata, of its `matryoshka_batchtopk` and of ours alike.
    Raises ConfigError for an SAE without.
    """
    details = sae.cfg.metadata.training_architecture_details or {}
    widths = details.get("matryoshka_widths")
    if not widths:
        raise ConfigError(
            "This SAE was not trained with matryoshka_widths, so it has no prefixes to measure; "
            "leave out --prefixes."
        )
    return {str(width): _prefix(sae, width) for width in widths if width < sae.cfg.d_sae}


def _prefix(sae: SAE[Any], width: int) -> SAE[Any]:
    prefix = copy.copy(sae)

    def encode(x: Tensor) -> Tensor:
        acts = type(sae).encode(prefix, x).to_dense().clone()
        acts[..., width:] = 0
        return acts

    prefix.encode = encode
    return prefix


def told(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of `evaluate_all`'s results, what `prefixes` in results.json says, by growing width."""
    return [
        {"width": int(name), **{key: found[key] for key in MEASURED}}
        for name, found in results.items()
    ]
