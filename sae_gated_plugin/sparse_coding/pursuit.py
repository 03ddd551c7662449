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

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import ConfigError
from .codes import SparseCodes
from .least_squares import COARSE, factorised, moved, nnls, those, times
from .problem import Problem, refit

_ROUNDING = 1e-6  # of ‖x‖ for a correlation, of ‖x‖² for a gain: below, float32 rounds

# (gram, target, values, used) → values, all (n, k) but gram, (n, k, k)
_Update = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_Start: TypeAlias = "Tensor | SparseCodes | None"


@torch.no_grad()
def gradient_pursuit(
    x: Tensor, W_dec: Tensor, b_dec: Tensor, l0: int | Tensor, *, start: _Start = None
) -> SparseCodes:
    """Non-negative gradient pursuit: one gradient step on the support after every choice.

    x, W_dec, b_dec: as for `refit`. l0: the largest number of latents, for all tokens or per token,
    (N,). start: codes to begin with, as for `refit`. They are refitted first; a token with all its
    l0 places in use goes on exchanging: the latent most correlated with the residual comes, the one
    missed least goes, as long as the residual shrinks. So no token is worse than its refit.

    The step is the best one along the gradient, cut where a magnitude reaches 0, which frees that
    place; so the residual never grows. Magnitudes are made exact at the end.
    Sources: Blumensath & Davies 2008, *Gradient pursuits*; on SAEs: Smith 2024, *Replacing SAE
    encoders with inference-time optimisation*; exchanges: Jain, Tewari & Dhillon 2011.
    """
    return _pursue(x, W_dec, b_dec, l0, start, _gradient_step)


@torch.no_grad()
def matching_pursuit(
    x: Tensor, W_dec: Tensor, b_dec: Tensor, l0: int | Tensor, *, start: _Start = None
) -> SparseCodes:
    """Non-negative orthogonal matching pursuit: exact magnitudes after every choice.

    Arguments and result are `gradient_pursuit`'s. Source: Bruckstein, Elad & Zibulevsky 2008, *On
    the uniqueness of nonnegative sparse solutions*.
    """
    return _pursue(x, W_dec, b_dec, l0, start, _exact_step)


def _exact_step(gram: Tensor, target: Tensor, values: Tensor, used: Tensor) -> Tensor:
    return nnls(gram, target, values, used)[0]


def _gradient_step(gram: Tensor, target: Tensor, values: Tensor, used: Tensor) -> Tensor:
    step = (target - times(gram, values)).where(used, 0.0)
    curvature = (step * times(gram, step)).sum(1, keepdim=True)
    best = step.square().sum(1, keepdim=True) / curvature.clamp(min=1e-30)
    return moved(values, step, best)[0]


def _pursue(
    x: Tensor, W_dec: Tensor, b_dec: Tensor, l0: int | Tensor, start: _Start, update: _Update
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
        *_, (indices, values, iterations) = _steps(x, latents, places[rows], begin, update)
        found = problem.polished(x, indices, values / norms[indices])
        return replace(found, iterations=iterations)

    found = problem.solved(solve, places + 1, "Pursuing")
    return found if begun is None else found.or_better(begun)


def _steps(
    x: Tensor, latents: Tensor, l0: Tensor, begin: SparseCodes | None, update: _Update
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Let a latent join on every token, again and again; yield after each time.

    x: (n, d_in); latents: (d_sae, d_in), of norm 1 or zero; l0: (n,). Yields the same tensors every
    time: indices and values, (n, k), with a place more than the largest l0, for the latent that
    comes before another one goes; and the iterations of each token, (n,).
    """
    width = int(l0.max()) + 1 if len(l0) else 1
    indices, values = l0.new_zeros(len(x), width), x.new_zeros(len(x), width).double()
    if begin is not None:  # refitting may have left gaps
        largest, order = begin.values.sort(dim=1, descending=True)
        filled = min(width, largest.shape[1])
        indices[:, :filled] = begin.indices.gather(1, order)[:, :filled]
        values[:, :filled] = largest[:, :filled]
    reach = 0 if begin is None else width  # places in use are before it
    rows = latents[indices]  # (n, k, d_in)
    gram, target = (rows @ rows.mT).double(), times(rows, x).double()
    all_indices, all_values, iterations = indices.clone(), values.clone(), torch.zeros_like(l0)
    yield all_indices, all_values, iterations
    tokens = torch.arange(len(x), device=x.device)  # that are not finished, as all that follows
    going = l0 > 0
    while True:
        tokens, x, l0, indices, values, rows, gram, target = those(
            going, tokens, x, l0, indices, values, rows, gram, target
        )
        if not len(tokens):
            return
        residual = x - (values[:, :reach].to(x).unsqueeze(1) @ rows[:, :reach]).squeeze(1)
        taken = torch.where(values > 0, -torch.inf, 0.0).to(x)
        most, latent = (residual @ latents.T).scatter_add_(1, indices, taken).max(1)
        promising = most > _ROUNDING * x.norm(dim=1)
        tokens, x, l0, indices, values, rows, gram, target, latent = those(
            promising, tokens, x, l0, indices, values, rows, gram, target, latent
        )
        if not len(tokens):
            return
        row, place = latents[latent], values.argmin(1)  # a place that is not in use
        token = torch.arange(len(row), device=row.device)
        m = reach = max(reach, int(place.max()) + 1)
        indices[token, place], rows[token, place] = latent, row
        gram[token, place, :m] = gram[token, :m, place] = times(rows[:, :m], row).double()
        target[token, place] = (row * x).sum(1).double()

        G, t, v = gram[:, :m, :m], target[:, :m], values[:, :m]
        used = v > 0
        full = used.sum(1) >= l0
        used[token, place] = True
        new, better = update(G, t, v, used), torch.ones_like(full)
        if full.any():
            new[full], better[full] = _exchange(G[full], t[full], v[full], used[full], l0[full])
        values[:, :m] = new
        iterations[tokens] += 1
        all_indices[tokens], all_values[tokens] = indices, values
        yield all_indices, all_values, iterations
        # A gradient step may put latents back to 0, so l0 iterations need not fill l0 places.
        going = ((new > 0).sum(1) < l0) | (begin is not None)
        going &= better & (iterations[tokens] < 4 * l0)


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
    inverse = torch.cholesky_inverse(factorised(gram, used, COARSE))
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
