"""A penalty on decoder rows that are almost parallel."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import widened

#: Rows of the decoder that one estimate of `decoder_coherence` compares with all others: as many
#: tokens would be 6 % of the encoder's product at batch 4096.
COHERENCE_ROWS = 256


def decoder_coherence(
    W_dec: Tensor, cap: float, seed: int = 0, n_rows: int = COHERENCE_ROWS
) -> Tensor:
    """Sum over the other rows of max(0, |cosine similarity| - cap)², mean over rows.

    W_dec: (d_sae, d_in), rows of any norm; gradients are orthogonal to them. cap: in [0, 1). With
    more than n_rows rows an unbiased estimate, from n_rows of them against all: memory and work
    grow with n_rows d_sae. seed: of the choice; the global random numbers are left alone, for in a
    sweep they are everybody's. Returns a 0-d tensor, dimensionless.

    Source: readers' proposal to cap the cosine similarity, after the restricted isometry property
    of Candès & Tao 2005, which knows no sign. It is what `metrics.coherence` measures.
    """
    with torch.no_grad():
        chosen = torch.randperm(len(W_dec), generator=torch.Generator().manual_seed(seed))
        chosen = chosen[:n_rows].to(W_dec.device)
        lengths = W_dec.norm(dim=1)
        products = (W_dec[chosen] @ W_dec.T).abs()
        near = (products > cap * lengths[chosen, None] * lengths).any(dim=0)
        near[chosen] = False
    # Most rows are near none of the chosen: gradients and their memory are for those that are.
    rows = W_dec.index_select(0, torch.cat([chosen, near.nonzero().squeeze(1)]))
    rows = torch.nn.functional.normalize(widened(rows), dim=1)
    excess = ((rows[: len(chosen)] @ rows.T).abs() - cap).relu()
    itself = torch.eye(*excess.shape, dtype=torch.bool, device=excess.device)
    return excess.masked_fill(itself, 0.0).square().sum() / len(chosen)
