"""What a metric is given, and what it must offer. N is the number of tokens of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..core.support_tensor import SupportTensor
from ..errors import UndefinedMetric

#: A difference of two sums smaller than this share of them is rounding, not signal.
ROUNDING = 1e-12

NOT_FINITE = "Activations or reconstructions hold NaN or infinity."


@dataclass(frozen=True)
class Batch:
    """What the metrics see of N tokens. Raises ValueError where the shapes do not fit together."""

    x: Tensor
    """(N, d_in) activations."""
    x_hat: Tensor
    """(N, d_in) their reconstructions."""
    feature_acts: Tensor | None = None
    """(N, d_sae), dense or sparse; None where only reconstructions are known."""
    sequence: Tensor | None = None
    """(N,) int64, the text that a token is from, by the same number in every batch; or unknown."""

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

        None without feature_acts. Cached: several metrics ask, and dense acts take a while to read.
        """
        if self.feature_acts is None:
            return None
        acts = values = self.feature_acts.detach()
        if isinstance(acts, SupportTensor) and acts.entries is not None:
            fired, values = (acts != 0).sum(0), acts.entries[1]
        elif acts.layout is torch.strided:
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


def require_tokens(n_tokens: int, what: str = "tokens") -> None:
    """Raise UndefinedMetric if nothing has been seen."""
    if not n_tokens:
        raise UndefinedMetric(f"No {what} have been seen.")
