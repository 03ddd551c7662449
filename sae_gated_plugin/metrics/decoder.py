"""How far decoder rows are from orthogonal. Shapes: L rows, one per latent, D d_in."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UndefinedMetric

#: Names of what `coherence` returns.
COHERENCE = ("coherence", "coherence_top", "babel")
#: Products of two numbers that a core makes in a minute or so, comparing rows with each other.
_AFFORDABLE = 2**40


def affordable_rows(W_dec_LD: Tensor) -> int:
    """How many rows can be compared with all others before that takes minutes; L on a GPU."""
    n_rows, width = W_dec_LD.shape
    if W_dec_LD.device.type != "cpu":
        return n_rows
    # Sorting costs as much as some 1024 products.
    return min(n_rows, max(1, _AFFORDABLE // (n_rows * max(width, 1024))))


@torch.no_grad()
def coherence(
    W_dec_LD: Tensor, k: int = 32, block: int = 512, n_rows: int | None = None
) -> dict[str, float]:
    """How far decoder rows are from orthogonal, by |cosine similarity| with each other row.

    W_dec_LD: rows of any norm; a zero row is similar to none. block: rows compared at a time;
    memory is about 3 block L numbers. n_rows: compare only so many rows, chosen by chance but each
    time the same, with all others. The first and the last are then lower bounds. Dimensionless:

    coherence       the largest similarity of any two rows (mutual coherence)
    coherence_top   of each row the largest similarity to another; mean over the 1 % of rows,
                    rounded up, where it is largest. One pair of twins alone does not move it much
    babel           over rows, the largest sum of the k largest similarities to others (Tropp 2004,
                    "Greed is good": below 1/2 every code of k latents can be recovered exactly).
                    k: 32, the middle of the L0 that our sweeps compare at; fewer where there are
                    not as many other rows
    """
    if len(W_dec_LD) < 2:
        raise UndefinedMetric("A decoder of a single row has nothing to be similar to.")
    wide = W_dec_LD.to(torch.promote_types(W_dec_LD.dtype, torch.float32))
    rows_LD = torch.nn.functional.normalize(wide)
    if not bool(rows_LD.isfinite().all()):
        raise UndefinedMetric("Decoder rows hold NaN or infinity.")
    k = min(k, len(rows_LD) - 1)
    chosen, compared = torch.arange(len(rows_LD)), rows_LD
    if n_rows is not None and n_rows < len(rows_LD):
        chosen = torch.randperm(len(rows_LD), generator=torch.Generator().manual_seed(0))[:n_rows]
        compared = rows_LD[chosen]
    largest: list[Tensor] = []  # (rows of a block, k)
    parts = list(zip(compared.split(block), chosen.to(rows_LD.device).split(block)))
    for part, own in tqdm(parts, desc="Comparing decoder rows", disable=None, leave=False):
        similar = (part @ rows_LD.T).abs_().scatter_(1, own.unsqueeze(1), 0.0)
        largest.append(similar.topk(k, dim=1).values)
    nearest = torch.cat(largest)
    top = nearest[:, 0].topk(math.ceil(len(nearest) / 100)).values
    values = (top[0], top.double().mean(), nearest.double().sum(1).max())
    return dict(zip(COHERENCE, (value.item() for value in values)))
