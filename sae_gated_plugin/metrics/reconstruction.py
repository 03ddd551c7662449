"""How close reconstructions are, and whether they are shrunk: streaming metrics.

Every metric is a ratio of sums over all tokens seen, never an average of ratios over batches, so
the value does not depend on how the tokens were split or ordered. Sums are fp64. Give activations
as the model has them (un-normalised) and leave special tokens out. What has no value on the data
raises UndefinedMetric, which says why.
"""

from __future__ import annotations

import math

import torch
from scipy.special import stdtrit
from torch import Tensor

from ..errors import UndefinedMetric
from .batch import NOT_FINITE, ROUNDING, Batch, as_double, require_tokens


def gamma(sum_recon_sq: float, sum_dot: float) -> float:
    """Relative reconstruction bias γ: below 1, reconstructions are shrunk.

    It is the g that minimises Σ‖x̂/g - x‖². sum_recon_sq, sum_dot: sums of ‖x̂‖² and x·x̂ over
    tokens (activation units²). Dimensionless.
    Source: Rajamanoharan et al. 2024, arXiv 2404.16014 v2, eq. 10 as corrected.
    """
    if not (math.isfinite(sum_recon_sq) and math.isfinite(sum_dot)):
        raise UndefinedMetric(NOT_FINITE)
    if sum_recon_sq == 0:
        raise UndefinedMetric("Every reconstruction is zero, so no rescaling of them fits.")
    if sum_dot <= 0:
        raise UndefinedMetric(
            f"Activations and reconstructions do not point the same way (Σ x·x̂ = {sum_dot:.3g}, "
            "not above 0), so no rescaling of the reconstructions fits."
        )
    return sum_recon_sq / sum_dot


class Gamma:
    """γ over all tokens, with a confidence interval. See the function `gamma`."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self.sums = torch.zeros(2, dtype=torch.float64)  # Σ‖x̂‖², Σ x·x̂
        self._clusters: list[tuple[Tensor, Tensor]] = []  # per batch: ids (S,), sums (S, 2)
        self._clustered = True

    def update(self, batch: Batch) -> None:
        """Take in a batch of tokens; `sequence` is needed for the interval only."""
        x, x_hat = as_double(batch.x), as_double(batch.x_hat)
        if not len(x):
            return
        terms = torch.stack([x_hat.square().sum(1), (x * x_hat).sum(1)], dim=1).cpu()
        self.n_tokens += len(terms)
        self.sums += terms.sum(0)
        if batch.sequence is None:
            self._clustered = False
        else:
            self._clusters.append(_sum_by(batch.sequence.cpu(), terms))

    def compute(self) -> float:
        """Return γ."""
        require_tokens(self.n_tokens)
        return gamma(*self.sums.tolist())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the confidence interval (low, high) of γ; tokens of one sequence are correlated.

        Sequences are the independent units. Leaving out sequence k moves γ by e_k / (Σ x·x̂ of the
        others), where e_k = Σ‖x̂‖² - γ Σ x·x̂ over its own tokens: the delta method's residual, and
        exact. The spread of these moves gives the standard error (the jackknife), with Student's t
        on (number of sequences - 1) degrees of freedom. In simulations the 95 % interval covered
        the truth in 93.7 to 94.6 % of cases with 30 or 100 sequences, 91.8 to 94.1 % with 5 or 10.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1; got {level}")
        value = self.compute()
        if not self._clustered:
            raise UndefinedMetric("The interval needs to know which sequence each token is from.")
        ids, terms = (torch.cat(parts) for parts in zip(*self._clusters))
        recon_sq, dot = _sum_by(ids, terms)[1].unbind(1)
        n = len(dot)
        if n < 2:
            raise UndefinedMetric("The interval needs at least two sequences; there is one.")
        others = dot.sum() - dot
        if others.min() <= ROUNDING * dot.sum():
            raise UndefinedMetric("Without one of its sequences γ itself would be undefined.")
        moves = (recon_sq - value * dot) / others
        error = math.sqrt((n - 1) / n * moves.square().sum().item())
        half = float(stdtrit(n - 1, 0.5 + level / 2)) * error
        return value - half, value + half


def _sum_by(ids: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids (S,), and the sums (S, k) of the rows of terms (N, k) that belong to each."""
    distinct, index = ids.unique(return_inverse=True)
    sums = torch.zeros(len(distinct), terms.shape[1], dtype=terms.dtype)
    return distinct, sums.index_add_(0, index, terms)


class _Moments:
    """Sums over tokens of x and x̂ relative to an origin, the first token ever seen.

    Sums of squares about a mean are differences of large numbers. From a point of the data itself
    at most a factor N is lost, and the variation of a constant comes out as exactly zero.
    """

    def __init__(self) -> None:
        self.n_tokens = 0
        self._origin: Tensor | None = None  # (1, d_in)
        self._sum_x = self._sum_x_hat = torch.zeros(())  # (d_in,) after the first batch
        self._x_sq = self._recon_sq = self._dot = self._error = 0.0

    def update(self, batch: Batch) -> None:
        """Take in a batch of tokens."""
        x, x_hat = as_double(batch.x), as_double(batch.x_hat)
        if not len(x):
            return
        if self._origin is None:
            self._origin = x[:1].clone()
        x, x_hat = x - self._origin, x_hat - self._origin
        self.n_tokens += len(x)
        self._sum_x = self._sum_x + x.sum(0)
        self._sum_x_hat = self._sum_x_hat + x_hat.sum(0)
        self._x_sq += x.square().sum().item()
        self._recon_sq += x_hat.square().sum().item()
        self._dot += (x * x_hat).sum().item()
        self._error += (x - x_hat).square().sum().item()


class GammaCentered(_Moments):
    """γ about the mean of x: Σ‖x̂ - μ‖² / Σ (x - μ)·(x̂ - μ), dimensionless.

    A large mean activation, which a decoder bias alone can reproduce, pulls plain γ towards 1;
    here it is taken out of both sides. μ is pooled over all tokens.
    """

    def compute(self) -> float:
        """Return γ about the mean; undefined also where x, or x̂, is the same for all tokens."""
        require_tokens(self.n_tokens)
        mean = self._sum_x / self.n_tokens
        along_mean = (mean @ self._sum_x_hat).item()
        recon_sq = self._recon_sq - 2 * along_mean + self.n_tokens * mean.square().sum().item()
        dot = self._dot - along_mean
        if math.isfinite(dot) and abs(dot) <= ROUNDING * (abs(self._dot) + abs(along_mean)):
            raise UndefinedMetric("About the mean, reconstructions do not vary with activations.")
        return gamma(recon_sq, dot)


class FVU(_Moments):
    """Fraction of variance unexplained, Σ‖x - x̂‖² / Σ‖x - μ‖², μ the mean of x over all tokens.

    Dimensionless; 0 is perfect, 1 is what predicting μ achieves. Explained variance is 1 - FVU.
    """

    def compute(self) -> float:
        """Return FVU."""
        require_tokens(self.n_tokens)
        variation = self._x_sq - self._sum_x.square().sum().item() / self.n_tokens
        if not (math.isfinite(variation) and math.isfinite(self._error)):
            raise UndefinedMetric(NOT_FINITE)
        if variation <= ROUNDING * self._x_sq:
            raise UndefinedMetric("All activations are the same, so there is nothing to explain.")
        return self._error / variation
