"""What is known of an architecture by name: what it declared, or a table of SAELens's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import first_line
from .bridge import registry
from .records import About, logger


def _relu(sae: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ReLU(m + b_enc): a JumpReLU with threshold 0."""
    return sae.W_enc, sae.b_enc, torch.zeros_like(sae.b_enc), sae.W_dec, sae.b_dec


def _itself(sae: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec


_NO_THRESHOLD = "cannot be converted to jumprelu: which latents fire depends on the others."

#: What SAELens has without a plugin.
SAELENS = {
    "standard": About("SAELens's standard SAE", jumprelu=_relu),
    "gated": About("SAELens's built-in Gated SAE"),  # ours has declared itself while it is active
    "jumprelu": About("JumpReLU SAE", jumprelu=_itself),
    "topk": About("TopK SAE", jumprelu=f"A topk SAE {_NO_THRESHOLD}"),
    "abstopk": About("AbsTopK SAE", jumprelu=f"An abstopk SAE {_NO_THRESHOLD}"),
    "batchtopk": About("BatchTopK SAE"),  # these two are saved as `jumprelu`
    "matryoshka_batchtopk": About("Matryoshka BatchTopK SAE"),
    "matching_pursuit": About("SAE that encodes by matching pursuit"),
    "temporal": About("temporal SAE"),
    "transcoder": About("transcoder"),
    "skip_transcoder": About("transcoder with a skip connection"),
    "jumprelu_transcoder": About("JumpReLU transcoder"),
    "jumprelu_skip_transcoder": About("JumpReLU transcoder with a skip connection"),
}


def about(architecture: str) -> About:
    """What an architecture declared, SAELens's, or a title made from its name."""
    registered = registry().architectures.get(architecture)
    declared = registered and registered.about
    return declared or SAELENS.get(architecture) or About(f"{architecture} SAE")


def in_words(architecture: str, config: Mapping[str, Any]) -> str:
    """Title and options of an SAE, by the architecture it was trained as and its cfg.json."""
    known = about(architecture)
    try:
        options = known.describe(config)
    except Exception as error:  # a plugin's, or a cfg.json that holds something else
        logger.warning("The options of a %s SAE are not named: %s", architecture, first_line(error))
        options = ""
    return ", ".join(filter(None, [known.title, options]))
