"""Sparse codes for activations on a fixed decoder: what an SAE's encoder only approximates.

All codes are non-negative. With r = x - f W_dec - b_dec, per token:

    fista              min ½‖r‖² + λ‖f‖₁                     up to a duality gap
    refit              min ‖r‖² on a given support           exact
    gradient_pursuit   ‖r‖² small with at most L0 latents    a gradient step after every choice
    matching_pursuit   the same                              exact magnitudes after every choice

The last two are greedy: the best support is NP-hard to find, so their errors are upper bounds of
what the dictionary allows. Everything ends in one exact solver of small problems, `nnls`. Tokens
are independent of each other and go through in blocks of bounded size. Shapes: N tokens, d_in,
d_sae, k places for latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConfigError
from .codes import SparseCodes
from .least_squares import nnls, restricted_solution, times
from .problem import Problem, refit

CHECK_EVERY = 10  # steps of FISTA between two looks at the duality gap; one costs about two steps
_ROUNDING = 1e-6  # of ‖x‖ for a correlation, of ‖x‖² for a gain: below, float32 rounds


# (gram, target, values, used) → values, all (n, k) but gram, (n, k, k)
_Update = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def gradient_pursuit(
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l0: int | Tensor,
    *,
    start: Tensor | SparseCodes | None = None,
) -> SparseCodes:
    """Non-negative gradient pursuit: one gradient step on the support after every choice.

    x, W_dec, b_dec: as for `refit`. l0: the largest number of latents, for all tokens or per token,
    (N,). start: codes to begin with, as for `refit`. They are refitted first; a token with all its
    l0 places in use goes on exchanging: the latent most correlated with the residual comes, the one
    missed least goes, as long as the residual shrinks. So no token is worse than its refit.

    The step is the best one along the gradient, cut where a magnitude reaches 0, which frees that
    place; so the residual never grows. Magnitudes are made exact at the end. Raises ConfigError as
    `refit` does, for an l0 below 0 or above d_sae, and for a start with more latents than l0.
    Sources: Blumensath & Davies 2008, *Gradient pursuits*; on SAEs: Smith 2024, *Replacing SAE
    encoders with inference-time optimisation*; exchanges: Jain, Tewari & Dhillon 2011.
    """
    return _pursue(x, W_dec, b_dec, l0, start, _gradient_step)


@torch.no_grad()
def matching_pursuit(
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l0: int | Tensor,
    *,
    start: Tensor | SparseCodes | None = None,
) -> SparseCodes:
    """Non-negative orthogonal matching pursuit: exact magnitudes after every choice.

    Arguments, result and errors are `gradient_pursuit`'s. Source: Bruckstein, Elad & Zibulevsky
    2008, *On the uniqueness of nonnegative sparse solutions*.
    """
    return _pursue(x, W_dec, b_dec, l0, start, _exact_step)


def _exact_step(gram: Tensor, target: Tensor, values: Tensor, used: Tensor) -> Tensor:
    return nnls(gram, target, values, used)[0]


def _gradient_step(gram: Tensor, target: Tensor, values: Tensor, used: Tensor) -> Tensor:
    step = (target - times(gram, values)).where(used, 0.0)
    curvature = (step * times(gram, step)).sum(1, keepdim=True)
    best = step.square().sum(1, keepdim=True) / curvature.clamp(min=1e-30)
    room = torch.where(step < 0, values / -step, torch.inf)
    share = torch.minimum(best, room.amin(1, keepdim=True))
    return torch.where(room <= share, 0.0, values + share * step)


def _pursue(
    x: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    l0: int | Tensor,
    start: Tensor | SparseCodes | None,
    update: _Update,
) -> SparseCodes:
    problem = Problem(x, W_dec, b_dec)
    places = problem.places(l0)
    norms = problem.W.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    latents = problem.W / norms.unsqueeze(1)
    begun = None if start is None else refit(x, W_dec, b_dec, start)
    if begun is not None and ((begun.values > 0).sum(1) > places).any():
        raise ConfigError("The start has more latents on a token than l0; give a larger l0.")

    def solve(rows: Tensor, _k: int) -> SparseCodes:
        x, begin = problem.tokens(rows), None if begun is None else begun.of_tokens(rows)
        if begin is not None:
            begin = replace(begin, values=begin.values * norms[begin.indices])
        pursuit = _Pursuit(x, latents, places[rows], begin, update)
        while pursuit.advance():
            pass
        codes = pursuit.all_values / norms[pursuit.all_indices]
        found = problem.polished(x, pursuit.all_indices, codes)
        return replace(found, iterations=pursuit.iterations)

    found = problem.solved(solve, places + 1, "Pursuing")
    return found if begun is None else found.or_better(begun)


class _Pursuit:
    """The state of a block of n tokens; latents (d_sae, d_in) have norm 1 or are zero.

    all_indices, all_values: (n, k), with a place more than l0, for the latent that comes before
    another one goes. tokens: those not finished; x to target hold these alone.
    """

    def __init__(
        self, x: Tensor, latents: Tensor, l0: Tensor, begin: SparseCodes | None, update: _Update
    ):
        n, width = len(x), int(l0.max()) + 1 if len(l0) else 1
        self.latents, self.update, self.exchange = latents, update, begin is not None
        self.tokens = torch.arange(n, device=x.device)
        self.iterations = torch.zeros_like(l0)
        self.indices, self.values = l0.new_zeros(n, width), x.new_zeros(n, width).double()
        if begin is not None:  # refitting may have left gaps
            values, order = begin.values.sort(dim=1, descending=True)
            width = min(width, values.shape[1])
            self.indices[:, :width] = begin.indices.gather(1, order)[:, :width]
            self.values[:, :width] = values[:, :width]
        self.reach = self.values.shape[1] if self.exchange else 0  # places in use are before it
        self.x, self.l0 = x, l0
        self.rows = latents[self.indices]  # (n, k, d_in)
        self.gram = (self.rows @ self.rows.mT).double()
        self.target = times(self.rows, x).double()
        self.all_indices, self.all_values = self.indices.clone(), self.values.clone()
        self._keep(l0 > 0)

    def residual(self) -> Tensor:
        """Return r of the tokens that are not finished, (n, d_in)."""
        values, rows = self.values[:, : self.reach].to(self.x), self.rows[:, : self.reach]
        return self.x - (values.unsqueeze(1) @ rows).squeeze(1)

    def advance(self) -> bool:
        """Let one latent join on every token; return whether there are tokens left."""
        if not len(self.tokens):
            return False
        correlations = self.residual() @ self.latents.T
        taken = torch.where(self.values > 0, -torch.inf, 0.0).to(self.x)
        most, latent = correlations.scatter_add_(1, self.indices, taken).max(1)
        promising = most > _ROUNDING * self.x.norm(dim=1)
        self._keep(promising)
        if not len(self.tokens):
            return False
        latent = latent[promising]
        row, place = self.latents[latent], self.values.argmin(1)  # a place that is not in use
        token = torch.arange(len(row), device=row.device)
        m = self.reach = max(self.reach, int(place.max()) + 1)
        self.indices[token, place], self.rows[token, place] = latent, row
        inner = times(self.rows[:, :m], row).double()
        self.gram[token, place, :m] = self.gram[token, :m, place] = inner
        self.target[token, place] = (row * self.x).sum(1).double()

        gram, target, values = self.gram[:, :m, :m], self.target[:, :m], self.values[:, :m]
        used = values > 0
        full = used.sum(1) >= self.l0
        used[token, place] = True
        new, better = self.update(gram, target, values, used), torch.ones_like(full)
        if full.any():
            new[full], better[full] = _exchange(
                gram[full], target[full], values[full], used[full], self.l0[full]
            )
        self.values[:, :m] = new
        self.iterations[self.tokens] += 1
        self.all_indices[self.tokens], self.all_values[self.tokens] = self.indices, self.values
        # A gradient step may put latents back to 0, so l0 iterations need not fill l0 places.
        going = ((new > 0).sum(1) < self.l0) | self.exchange
        self._keep(going & better & (self.iterations[self.tokens] < 4 * self.l0))
        return len(self.tokens) > 0

    def _keep(self, going: Tensor) -> None:
        if not going.all():
            for name in ("tokens", "x", "l0", "indices", "values", "rows", "gram", "target"):
                setattr(self, name, getattr(self, name)[going])


def _exchange(
    gram: Tensor, target: Tensor, values: Tensor, used: Tensor, l0: Tensor
) -> tuple[Tensor, Tensor]:
    """Make the magnitudes in use exact, and let one latent go where there are more than l0.

    values, (n, k), is 0 at a place of `used`, (n, k) bool: the one that comes. Returns the values,
    unchanged where nothing is gained, and where something is, (n,) bool.
    """
    more = nnls(gram, target, values, used)[0]
    used = more > 0
    # Without latent i and with the others at their best, ½‖r‖² grows by ½ v_i² / (G⁻¹)_ii.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(restricted_solution(gram, used, 1e-4)))
    missed = more.square() / inverse.diagonal(dim1=1, dim2=2)
    least = missed.where(used, torch.inf).argmin(1)
    over = (used.sum(1) > l0).nonzero().squeeze(1)
    used[over, least[over]] = False
    fewer = nnls(gram, target, more.where(used, 0.0), used)[0]
    before = _objective(gram, target, values)
    better = before - _objective(gram, target, fewer) > _ROUNDING * before.abs()
    return torch.where(better.unsqueeze(1), fewer, values), better


def _objective(gram: Tensor, target: Tensor, values: Tensor) -> Tensor:
    return (values * (times(gram, values) / 2 - target)).sum(1)
