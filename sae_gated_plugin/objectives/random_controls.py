"""What an SAE has to beat: the same with a part left at random (Korznikov et al. 2026, 2602.14111).

    frozen_decoder  W_dec stays where it started
    frozen_encoder  W_enc does, and whatever else encodes; thresholds and magnitudes learn
    soft_frozen     W_dec learns, each row within a cosine similarity of 0.8 of its start

Encoder and decoder start as they always do, at random directions, the one the other's transpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COSINE = 0.8  # Korznikov et al.
START = "W_dec_start"


def freeze(sae: Any) -> None:
    """Hold what `sae.cfg.control` says. sae: a training SAE of ours, its weights initialised.

    soft_frozen adds a buffer `W_dec_start`, (d_sae, d_in).
    """
    control = sae.cfg.control
    if control == "frozen_decoder":
        sae.W_dec.requires_grad_(False)
    elif control == "frozen_encoder":
        for name, axis in sae.latent_axes.items():
            if axis == 1 and hasattr(sae, name):
                getattr(sae, name).requires_grad_(False)
        for layer in sae.children():  # a hidden layer before the encoder
            layer.requires_grad_(False)
    elif control == "soft_frozen":
        sae.register_buffer(START, sae.W_dec.detach().clone())


@torch.no_grad()
def pull_back_(W_dec: Tensor, start: Tensor) -> None:
    """Turn rows of W_dec (d_sae, d_in) back, in place, until they are within COSINE of their start.

    start: (d_sae, d_in). Norms stay; a row goes to the nearest direction that is allowed.
    """
    norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    first = torch.nn.functional.normalize(start, dim=1)
    along = torch.linalg.vecdot(W_dec, first)[:, None]
    across = torch.nn.functional.normalize(W_dec - along * first, dim=1)
    nearest = COSINE * first + (1 - COSINE**2) ** 0.5 * across
    # A row that points exactly the other way has no nearest direction: it goes to its start.
    nearest = torch.nn.functional.normalize(nearest, dim=1) * norms
    W_dec.copy_(torch.where(along < COSINE * norms, nearest, W_dec))
