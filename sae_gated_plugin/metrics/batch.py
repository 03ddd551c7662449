"""What a metric is given, and what it must offer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UndefinedMetric

#: A difference of two sums smaller than this share of them is rounding, not signal.
ROUNDING = 1e-12

NOT_FINITE = "Activations or reconstructions hold NaN or infinity."


@dataclass(frozen=True)
class Batch:
    """What the metrics see of N tokens.

    x: (N, d_in) activations. x_hat: (N, d_in) their reconstructions. feature_acts: (N, d_sae),
    dense or sparse, or None where only reconstructions are known. sequence: (N,) int64, which text
    each token comes from, the same number in every batch that holds a part of that text; None
    where that is not known. Raises ValueError when the shapes do not fit together.
    """

    x: Tensor
    x_hat: Tensor
    feature_acts: Tensor | None = None
    sequence: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.x.shape != self.x_hat.shape:
            raise ValueError(
                "x and x_hat must both be (N, d_in); "
                f"got {tuple(self.x.shape)} and {tuple(self.x_hat.shape)}"
            )
        n_tokens = self.x.shape[0]
        acts, sequence = self.feature_acts, self.sequence
        if acts is not None and (acts.ndim != 2 or acts.shape[0] != n_tokens):
            raise ValueError(f"feature_acts must be ({n_tokens}, d_sae); got {tuple(acts.shape)}")
        if sequence is not None and sequence.shape != (n_tokens,):
            raise ValueError(f"sequence must be ({n_tokens},); got {tuple(sequence.shape)}")

    @cached_property
    def firings(self) -> tuple[Tensor, bool] | None:
        """On how many tokens each latent fires, (d_sae,) int64, and whether all acts are finite.

        Kept, for several metrics ask and a dense feature_acts takes a while to read. None without
        feature_acts.
        """
        if self.feature_acts is None:
            return None
        acts = values = self.feature_acts.detach()
        if acts.layout is torch.strided:
            fired = (acts != 0).sum(0)
        else:
            # Coalescing first: several entries for one place are one activation, their sum.
            acts = acts.to_sparse_coo().coalesce()
            values = acts.values()
            fired = torch.bincount(acts.indices()[1][values != 0], minlength=acts.shape[1])
        finite = not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())
        return fired.cpu(), finite


class Metric(Protocol):
    """What `register_metrics` asks of a metric."""

    def update(self, batch: Batch) -> None:
        """Take in a batch of tokens."""
        ...

    def compute(self) -> float:
        """Return the value over all tokens so far, or raise UndefinedMetric."""
        ...


def as_double(tensor: Tensor) -> Tensor:
    """The same numbers in fp64, on the CPU where the device has none."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def sum_by(ids: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids (S,), and the sums (S, k) of the rows of terms (N, k) that belong to each."""
    distinct, index = ids.unique(return_inverse=True)
    sums = torch.zeros(len(distinct), terms.shape[1], dtype=terms.dtype)
    return distinct, sums.index_add_(0, index, terms)


def require_tokens(n_tokens: int, what: str = "tokens") -> None:
    """Raise UndefinedMetric if nothing has been seen."""
    if not n_tokens:
        raise UndefinedMetric(f"No {what} have been seen.")
