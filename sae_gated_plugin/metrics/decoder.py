"""How far decoder rows are from orthogonal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UndefinedMetric

#: Names of what `coherence` returns.
COHERENCE = ("coherence", "coherence_top", "babel")


@torch.no_grad()
def coherence(W_dec: Tensor, k: int = 32, block: int = 512) -> dict[str, float]:
    """How far decoder rows are from orthogonal, by |cosine similarity| with each other row.

    W_dec: (d_sae, d_in), rows of any norm; a zero row is similar to none. block: rows compared at
    a time; memory is about 3 block d_sae numbers. Dimensionless:

    coherence       the largest similarity of any two rows (mutual coherence)
    coherence_top   of each row the largest similarity to another; mean over the 1 % of rows,
                    rounded up, where it is largest. One pair of twins alone does not move it much
    babel           over rows, the largest sum of the k largest similarities to others (Tropp 2004,
                    "Greed is good": below 1/2 every code of k latents can be recovered exactly).
                    k: 32, the middle of the L0 that our sweeps compare at; fewer where there are
                    not as many other rows

    Raises UndefinedMetric for fewer than two rows, and for weights that are not finite.
    """
    if len(W_dec) < 2:
        raise UndefinedMetric("A decoder of a single row has nothing to be similar to.")
    rows = torch.nn.functional.normalize(W_dec.to(torch.promote_types(W_dec.dtype, torch.float32)))
    if not bool(rows.isfinite().all()):
        raise UndefinedMetric("Decoder rows hold NaN or infinity.")
    k = min(k, len(rows) - 1)
    largest: list[Tensor] = []  # (rows of a block, k)
    for start in range(0, len(rows), block):
        similar = (rows[start : start + block] @ rows.T).abs_()
        similar.diagonal(start).zero_()
        largest.append(similar.topk(k, dim=1).values)
    nearest = torch.cat(largest)
    top = nearest[:, 0].topk(math.ceil(len(rows) / 100)).values
    values = (top[0], top.double().mean(), nearest.double().sum(1).max())
    return dict(zip(COHERENCE, (value.item() for value in values)))
