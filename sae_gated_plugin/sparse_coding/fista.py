"""FISTA for the sparse code of fixed λ, with a duality gap as certificate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .codes import SparseCodes, compact_codes
from .least_squares import those
from .problem import Problem, kkt_breach

CHECK_EVERY = 10  # steps between two looks at the duality gap; one costs about two steps


@torch.no_grad()
def fista(
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l1_coefficient: float,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 10_000,
) -> SparseCodes:
    """Minimise ½‖r‖² + λ‖f‖₁ over f >= 0, up to a duality gap of tolerance · ½‖x - b_dec‖².

    x, W_dec, b_dec: as for `refit`. l1_coefficient: λ > 0, in activation units (squared error is
    summed over d_in and halved: SAELens's λ is twice this one). tolerance: the default is what
    float32 can hold; with float64, 1e-12 is reached as cheaply, for as soon as a support stands
    still its magnitudes are made exact. A token that has not converged after max_iterations shows
    it by its duality_gap.

    Sources: Beck & Teboulle 2009; restarts: O'Donoghue & Candès 2015. The dual point is the
    residual, scaled down until no correlation is above λ.
    """
    problem = Problem(x, W_dec, b_dec)
    if not l1_coefficient > 0:
        raise ConfigError(f"l1_coefficient is {l1_coefficient}, and must be above 0.")
    least = 1e-12 if problem.W.dtype == torch.float64 else 1e-7
    if tolerance < least:
        raise ConfigError(
            f"A tolerance of {tolerance} is below what {problem.W.dtype} can hold; "
            f"give at least {least}, or activations in float64."
        )
    W = problem.W.double()
    square = W @ W.T if len(W) < W.shape[1] else W.T @ W
    lipschitz = float(torch.linalg.eigvalsh(square)[-1].clamp(min=1e-30)) * (1 + 1e-6)

    def solve(rows: Tensor, _k: int) -> SparseCodes:
        x = problem.tokens(rows)
        codes = x.new_zeros(len(x), len(W))
        live = torch.arange(len(x), device=x.device)
        iterations = torch.zeros_like(live)
        active, f, ahead, t = x, codes.clone(), codes.clone(), x.new_ones(len(x), 1)
        support = f > 0
        for iteration in range(1, max_iterations + 1):
            gradient = (active - ahead @ problem.W) @ problem.W.T - l1_coefficient
            new = (ahead + gradient / lipschitz).clamp_(min=0)
            uphill = ((ahead - new) * (new - f)).sum(1, keepdim=True) > 0
            t = torch.where(uphill, 1.0, t)
            later = (1 + (1 + 4 * t.square()).sqrt()) / 2
            f, ahead, t = new, new + (t - 1) / later * (new - f), later
            if iteration % CHECK_EVERY and iteration < max_iterations:
                continue
            still = ((f > 0) == support).all(1) & ((f > 0).sum(1) <= 2 * x.shape[1])
            f[still] = problem.exact(active[still], f[still], l1_coefficient)
            ahead[still], t[still], support = f[still], 1.0, f > 0
            codes[live], iterations[live] = f, iteration
            gap = _certificate(active, f, W, l1_coefficient)[-1]
            going = gap > tolerance / 2 * active.double().square().sum(1)
            live, active, f, ahead, t, support = those(going, live, active, f, ahead, t, support)
            if not len(live):
                break
        certificate = _certificate(x, codes, W, l1_coefficient)
        return SparseCodes(*compact_codes(codes), len(W), iterations, *certificate)

    return problem.solved(solve, torch.ones(len(x), dtype=torch.int64), "Solving")


def _certificate(
    x: Tensor, codes: Tensor, W: Tensor, l1_coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared residual, violation and duality gap of dense codes; W in fp64."""
    x, codes = x.double(), codes.double()
    residual = x - codes @ W
    correlations = residual @ W.T
    # Scaled to be feasible; 1 where it is.
    scale = (l1_coefficient / correlations.amax(1).clamp(min=1e-300)).clamp(max=1.0)
    squared = residual.square().sum(1)
    slack = l1_coefficient - scale.unsqueeze(1) * correlations
    # Primal minus dual value, written as a sum of terms none of which is negative.
    gap = (1 - scale).square() * squared / 2 + (codes * slack).sum(1)
    breach = kkt_breach(correlations - l1_coefficient, codes, x, W.norm(dim=1))
    return squared, breach, gap
