"""Which latents fire: L0, densities, dead latents."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UndefinedMetric
from .batch import Batch, require_tokens


class _Firings:
    """Counts of tokens each latent fires on; batches without `feature_acts` do not count."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._counts = torch.zeros((), dtype=torch.int64)  # (d_sae,) after the first batch
        self._finite = True

    def update(self, batch: Batch) -> None:
        """Take in a batch of tokens."""
        if batch.firings is None:
            return
        counts, finite = batch.firings
        self.n_tokens += len(batch.x)
        self._counts = self._counts + counts
        self._finite = self._finite and finite

    def counts(self) -> Tensor:
        """(d_sae,) int64, or UndefinedMetric."""
        require_tokens(self.n_tokens, "feature activations")
        if not self._finite:
            raise UndefinedMetric("Feature activations hold NaN or infinity.")
        return self._counts


class LatentDensity(_Firings):
    """Share of tokens on which each latent fires. It is a vector, so it is not registered."""

    def compute(self) -> Tensor:
        """(d_sae,) shares in [0, 1], fp64, on the CPU."""
        return self.counts().double() / self.n_tokens


class L0(_Firings):
    """Mean number of latents that fire on a token."""

    def compute(self) -> float:
        """In latents per token."""
        return self.counts().sum().item() / self.n_tokens


class DeadShare(_Firings):
    """Share of latents that fired on none of the tokens seen; it falls as more tokens are seen."""

    def compute(self) -> float:
        """In [0, 1]."""
        return (self.counts() == 0).double().mean().item()
