"""Non-negative least squares on small Gram matrices, exact, many at a time."""

from __future__ import annotations

import torch
from torch import Tensor

FINE, COARSE = 1e-14, 1e-4  # ridges, for a diagonal of ones


def nnls(
    gram: Tensor, target: Tensor, start: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Minimise ½ vᵀGv - tᵀv over v >= 0, for N small problems at once, from a feasible start.

    gram: (N, k, k), positive semi-definite; target, start: (N, k); allowed: (N, k) bool, places
    that may be above 0, default all. Returns v, (N, k), and the number of iterations, (N,), none
    of which makes the objective larger; all in fp64.

    The active-set method of Lawson & Hanson (1974), from a warm start: Newton's step on the places
    in use, as far as it is feasible; where these are in balance, the place with the steepest
    gradient joins. scipy's nnls starts from nothing every time and is slower in a pursuit.
    """
    scale = gram.diagonal(dim1=1, dim2=2).double().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    gram = gram.double() / (scale.unsqueeze(1) * scale.unsqueeze(2))
    target, values = target.double() / scale, start.double() * scale
    allowed = torch.ones_like(values, dtype=torch.bool) if allowed is None else allowed
    iterations = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    live = torch.arange(len(values), device=values.device)
    v = values.clone()
    for _ in range(3 * values.shape[1] + 20):
        gradient = target - times(gram, v)
        # What fp64 may leave of a gradient that is zero.
        limit = 1e-14 * v.shape[1] * torch.maximum(v, target.abs()).amax(1, keepdim=True)
        used = v > 0
        balanced = (gradient.abs().where(used, 0.0) <= limit).all(1)
        most, place = gradient.where(allowed & ~used, -torch.inf).max(1)
        joins = balanced & (most > limit.squeeze(1))
        used[joins.nonzero().squeeze(1), place[joins]] = True
        moves = ~balanced | joins
        if not moves.any():
            break
        live, gram, target, allowed, v, used, gradient = those(
            moves, live, gram, target, allowed, v, used, gradient
        )
        factor = factorised(gram, used, FINE)
        step = torch.cholesky_solve(gradient.where(used, 0.0).unsqueeze(2), factor).squeeze(2)
        v, share = moved(v, step.where(used, 0.0), v.new_ones(len(v), 1))
        values[live] = v
        iterations[live] += 1
        allowed = allowed & ~(used & (share == 0))  # joins and leaves at once: rounding
    return values / scale, iterations


def moved(v: Tensor, step: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Go a share (N, 1) of a step, or less: until a place of v, (N, k), reaches 0."""
    room = torch.where(step < 0, v / -step, torch.inf)
    share = torch.minimum(share, room.amin(1, keepdim=True))
    return torch.where(room <= share, 0.0, v + share * step), share


def factorised(gram: Tensor, used: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of G on the places in use, with a ridge; of the identity on the others.

    Where G is singular, up to the rounding of the float32 numbers it was made from (equal latents),
    the ridge is COARSE. It bounds the objective from above, so that no step goes too far.
    """
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    matrix = torch.where(used.unsqueeze(1) & used.unsqueeze(2), gram, eye)
    matrix.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(matrix, check_errors=ridge == COARSE)
    if failed.any():
        again = failed.nonzero().squeeze(1)
        factor[again] = factorised(gram[again], used[again], COARSE)
    return factor


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """(N, k, k) matrices times (N, k) vectors."""
    return (matrix @ vector.unsqueeze(2)).squeeze(2)


def those(rows: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Return the rows (N,) bool of tensors, uncopied where these are all."""
    return parts if rows.all() else tuple(part[rows] for part in parts)
