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
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from .errors import ConfigError

# Correlations of a block with all latents: on a CPU they stay in cache until their maximum is
# found; a GPU needs more at once. The decoder rows that a block has gathered may be 8 times that.
_BLOCK_NUMBERS, _BLOCK_NUMBERS_GPU = 2**20, 2**26
_CHECK_EVERY = 10  # steps of FISTA between two looks at the duality gap; one costs about two steps
_ROUNDING = 1e-6  # of ‖x‖ for a correlation, of ‖x‖² for a gain: below, float32 rounds


@dataclass(frozen=True)
class SparseCodes:
    """Codes of N tokens with at most k latents each, and a certificate per token.

    indices: (N, k) int64 latents; values: (N, k), >= 0; places not in use hold the value 0.
    iterations: (N,) int64. squared_residual: (N,) ‖r‖², fp64.
    violation: (N,) fp64, the largest breach of the optimality conditions, as a share of ‖x‖‖d‖:
        |r·d - λ| for a latent in use, r·d - λ above 0 for another one of the support (for `fista`:
        of all latents; for the rest λ is 0). Rounding to float32 leaves about 1e-7.
    duality_gap: (N,) fp64, `fista`'s objective is at most that much above its minimum.
    """

    indices: Tensor
    values: Tensor
    d_sae: int
    iterations: Tensor
    squared_residual: Tensor
    violation: Tensor
    duality_gap: Tensor | None = None

    def dense(self) -> Tensor:
        """Return the codes as a matrix, (N, d_sae)."""
        matrix = self.values.new_zeros(len(self.values), self.d_sae)
        return matrix.scatter_add_(1, self.indices, self.values)

    def sparse(self) -> Tensor:
        """Return the codes as a sparse COO matrix, (N, d_sae)."""
        rows, places = self.values.nonzero(as_tuple=True)
        where = torch.stack([rows, self.indices[rows, places]])
        size, values = (len(self.values), self.d_sae), self.values[rows, places]
        return torch.sparse_coo_tensor(where, values, size, check_invariants=False).coalesce()

    def of_tokens(self, rows: Tensor) -> SparseCodes:
        """Return the codes of some tokens; rows: their numbers, int64."""
        return replace(self, **{name: value[rows] for name, value in _tensors(self).items()})

    def or_better(self, other: SparseCodes) -> SparseCodes:
        """Return, for each token, whichever of two codes has the smaller residual."""
        both = _joined([replace(codes, duality_gap=None) for codes in (self, other)])
        rows = torch.arange(len(self.values), device=self.values.device)
        return both.of_tokens(rows + len(rows) * (other.squared_residual < self.squared_residual))


# --- exact magnitudes -----------------------------------------------------------------------------


def nnls(
    gram: Tensor, target: Tensor, start: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Minimise ½ vᵀGv - tᵀv over v >= 0, for N small problems at once, from a feasible start.

    gram: (N, k, k), positive semi-definite; target, start: (N, k); allowed: (N, k) bool, places
    that may be above 0, default all. Returns v, (N, k), and the number of iterations, (N,), none
    of which makes the objective larger; all in fp64.

    The active-set method of Lawson & Hanson (1974), from a warm start: Newton's step on the places
    in use, as far as it is feasible; where these are in balance, the place with the steepest
    gradient joins. The ridge that a singular G (equal latents) needs for its factorisation bounds
    the objective from above, so that no step goes too far.
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
        gradient = target - _times(gram, v)
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
        if not moves.all():
            live, gram, target, allowed = live[moves], gram[moves], target[moves], allowed[moves]
            v, used, gradient = v[moves], used[moves], gradient[moves]
        step = _newton(gram, gradient.where(used, 0.0), used)
        room = torch.where(step < 0, v / -step, torch.inf)
        share = room.amin(1, keepdim=True).clamp(max=1.0)
        v = torch.where(room <= share, 0.0, v + share * step)
        values[live] = v
        iterations[live] += 1
        allowed = allowed & ~(used & (share == 0))  # joins and leaves at once: rounding
    return values / scale, iterations


def _newton(gram: Tensor, gradient: Tensor, used: Tensor) -> Tensor:
    """Solve G step = gradient on the places in use; 0 elsewhere."""
    matrix = _restricted(gram, used, 1e-14)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():  # singular up to the rounding of the float32 numbers it was made from
        again = failed.nonzero().squeeze(1)
        factor[again] = torch.linalg.cholesky(_restricted(gram[again], used[again], 1e-4))
    return torch.cholesky_solve(gradient.unsqueeze(2), factor).squeeze(2).where(used, 0.0)


def _restricted(gram: Tensor, used: Tensor, ridge: float) -> Tensor:
    """G on the places in use, with a ridge; the identity on the others."""
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    matrix = torch.where(used.unsqueeze(1) & used.unsqueeze(2), gram, eye)
    matrix.diagonal(dim1=1, dim2=2).add_(ridge)
    return matrix


@torch.no_grad()
def refit(x: Tensor, W_dec: Tensor, b_dec: Tensor, codes: Tensor | SparseCodes) -> SparseCodes:
    """Give codes the best non-negative magnitudes on their own supports.

    x: (N, d_in); W_dec: (d_sae, d_in); b_dec: (d_in,), of any float dtype, computed in float32 or
    float64. codes: (N, d_sae), dense or sparse, >= 0. No token's residual is larger than with the
    codes given. Raises ConfigError for shapes that do not fit, negative and infinite numbers.
    """
    problem = _Problem(x, W_dec, b_dec)
    indices, values = problem.compact(codes)

    def solve(rows: Tensor, k: int) -> SparseCodes:
        return problem.polished(problem.tokens(rows), indices[rows, :k], values[rows, :k])

    return problem.solved(solve, _length(values), "Refitting")


# --- greedy selection -----------------------------------------------------------------------------

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
    step = (target - _times(gram, values)).where(used, 0.0)
    curvature = (step * _times(gram, step)).sum(1, keepdim=True)
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
    problem = _Problem(x, W_dec, b_dec)
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
        self.target = _times(self.rows, x).double()
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
        inner = _times(self.rows[:, :m], row).double()
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
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_restricted(gram, used, 1e-4)))
    missed = more.square() / inverse.diagonal(dim1=1, dim2=2)
    least = missed.where(used, torch.inf).argmin(1)
    over = (used.sum(1) > l0).nonzero().squeeze(1)
    used[over, least[over]] = False
    fewer = nnls(gram, target, more.where(used, 0.0), used)[0]
    before = _objective(gram, target, values)
    better = before - _objective(gram, target, fewer) > _ROUNDING * before.abs()
    return torch.where(better.unsqueeze(1), fewer, values), better


def _objective(gram: Tensor, target: Tensor, values: Tensor) -> Tensor:
    return (values * (_times(gram, values) / 2 - target)).sum(1)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(2)).squeeze(2)


# --- with an L1 penalty ---------------------------------------------------------------------------


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
    it by its duality_gap. Raises ConfigError as `refit` does, and for numbers out of range.

    Sources: Beck & Teboulle 2009; restarts: O'Donoghue & Candès 2015. The dual point is the
    residual, scaled down until no correlation is above λ.
    """
    problem = _Problem(x, W_dec, b_dec)
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
        live = torch.arange(len(x), device=x.device)
        codes = x.new_zeros(len(x), len(W))
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
            if iteration % _CHECK_EVERY and iteration < max_iterations:
                continue
            count = (f > 0).sum(1)
            still = ((f > 0) == support).all(1) & (count <= 2 * x.shape[1])
            f[still] = problem.exact(active[still], f[still], l1_coefficient)
            ahead[still], t[still], support = f[still], 1.0, f > 0
            gap = _certificate(active, f, W, l1_coefficient)[-1]
            going = gap > tolerance / 2 * active.double().square().sum(1)
            codes[live], iterations[live] = f, iteration
            if not going.any():
                break
            if not going.all():
                live, active, f, ahead = live[going], active[going], f[going], ahead[going]
                t, support = t[going], support[going]
        indices, values = _compact(codes)
        certificate = _certificate(x, codes, W, l1_coefficient)
        return SparseCodes(indices, values, len(W), iterations, *certificate)

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
    breach = _breach(correlations - l1_coefficient, codes, x, W.norm(dim=1))
    return squared, breach, gap


def _breach(gradient: Tensor, values: Tensor, x: Tensor, norms: Tensor) -> Tensor:
    """Largest violation of the optimality conditions per token, as a share of ‖x‖‖d‖."""
    found = torch.where(values > 0, gradient.abs(), gradient.clamp(min=0))
    return (found / (x.norm(dim=1, keepdim=True) * norms).clamp(min=1e-300)).amax(1)


# --- blocks of tokens -----------------------------------------------------------------------------


class _Problem:
    """Checked activations, decoder and bias, in the dtype to compute in."""

    def __init__(self, x: Tensor, W_dec: Tensor, b_dec: Tensor):
        d_in = W_dec.shape[-1]
        if W_dec.ndim != 2 or not len(W_dec) or x.ndim != 2 or x.shape[1] != d_in:
            raise ConfigError(
                f"x is {tuple(x.shape)} and W_dec {tuple(W_dec.shape)}; they must be (N, d_in) and "
                "(d_sae, d_in) of the same d_in."
            )
        if b_dec.shape != (d_in,):
            raise ConfigError(f"b_dec is {tuple(b_dec.shape)}, and must be ({d_in},), as W_dec is.")
        if not (x.is_floating_point() and W_dec.is_floating_point()):
            raise ConfigError(
                f"x is {x.dtype} and W_dec {W_dec.dtype}; give floating-point numbers."
            )
        _require_finite(W_dec=W_dec, b_dec=b_dec)
        dtype = torch.promote_types(torch.promote_types(x.dtype, W_dec.dtype), torch.float32)
        self.given = x
        self.W, self.b_dec = (part.detach().to(x.device, dtype) for part in (W_dec, b_dec))

    def tokens(self, rows: slice | Tensor) -> Tensor:
        """Return some tokens' activations minus b_dec, (n, d_in)."""
        x = self.given[rows].detach().to(self.W.dtype) - self.b_dec
        _require_finite(x=x)
        return x

    def solved(
        self, solve: Callable[[Tensor, int], SparseCodes], k: Tensor, what: str
    ) -> SparseCodes:
        """Solve all tokens in blocks, (rows, most places) → codes; k: (N,), places each needs.

        Tokens of one block need about as many, so that none waits for another.
        """
        order = k.argsort(descending=True, stable=True).to(self.W.device)
        found: SparseCodes | None = None
        whole: dict[str, Tensor] = {}
        done = 0
        bar = tqdm(total=len(k), desc=what, unit=" tokens", disable=None, leave=False, delay=5)
        with bar:
            while found is None or done < len(k):
                most = int(k[order[done]]) if len(k) else 1
                rows = order[done : done + self.block_size(most)]
                found = solve(rows, most)
                # Into one place at once: small results kept between a block's large temporaries
                # would keep the allocator from using their memory for the next block's.
                for name, part in _tensors(found).items():
                    if name not in whole:
                        whole[name] = part.new_zeros(len(k), *part.shape[1:])
                    if part.ndim == 2 and part.shape[1] > whole[name].shape[1]:
                        whole[name] = pad(whole[name], (0, part.shape[1] - whole[name].shape[1]))
                    place = whole[name][:, : part.shape[1]] if part.ndim == 2 else whole[name]
                    place[rows] = part
                done += len(rows)
                bar.update(len(rows))
        return replace(found, **whole)

    def block_size(self, k: int) -> int:
        """How many tokens a block may have, for codes with k places."""
        numbers = _BLOCK_NUMBERS if self.W.device.type == "cpu" else _BLOCK_NUMBERS_GPU
        d_sae, d_in = self.W.shape
        return max(1, min(numbers // d_sae, 8 * numbers // (k * (k + d_in))))

    def compact(self, codes: Tensor | SparseCodes) -> tuple[Tensor, Tensor]:
        """Return the indices and values, (N, k), of codes given."""
        n, d_sae = len(self.given), len(self.W)
        shape = (len(codes.values), codes.d_sae) if isinstance(codes, SparseCodes) else codes.shape
        if tuple(shape) != (n, d_sae):
            raise ConfigError(f"codes are {tuple(shape)}, and must be ({n}, {d_sae}): (N, d_sae).")
        if isinstance(codes, SparseCodes):
            return codes.indices, codes.values.to(self.W)
        indices, values = _compact(codes.detach())
        _require_finite(codes=values)
        if values.numel() and values.min() < 0:
            raise ConfigError("codes hold negative numbers; only codes >= 0 have a place here.")
        return indices, values.to(self.W)

    def places(self, l0: int | Tensor) -> Tensor:
        """Return l0 per token, (N,) int64."""
        n, d_sae = len(self.given), len(self.W)
        given = torch.as_tensor(l0, device=self.W.device)
        if given.is_floating_point() or given.shape not in ((), (n,)):
            raise ConfigError(f"l0 must be a whole number or ({n},) of them, one per token.")
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) <= d_sae:
            wrong = int(given.min()) if given.min() < 0 else int(given.max())
            raise ConfigError(f"l0 is {wrong}; give 0 to {d_sae}, the number of latents.")
        return given.long().expand(n)

    def polished(
        self, x: Tensor, indices: Tensor, values: Tensor, l1_coefficient: float = 0.0
    ) -> SparseCodes:
        """Make magnitudes exact on the supports given, (n, k); never worse than they were."""
        rows, x = self.W[indices].double(), x.double()
        start = values.to(self.W)
        target = _times(rows, x) - l1_coefficient
        found, iterations = nnls(rows @ rows.mT, target, start, start > 0)

        def residual(values: Tensor) -> Tensor:
            return x - (values.double().unsqueeze(1) @ rows).squeeze(1)

        def objective(values: Tensor) -> Tensor:
            return residual(values).square().sum(1) / 2 + l1_coefficient * values.double().sum(1)

        found = found.to(self.W)
        found = found.where((objective(found) <= objective(start)).unsqueeze(1), start)
        r = residual(found)
        gradient = (_times(rows, r) - l1_coefficient).where(start > 0, 0.0)
        breach = _breach(gradient, found, x, rows.norm(dim=2))
        return SparseCodes(indices, found, len(self.W), iterations, r.square().sum(1), breach)

    def exact(self, x: Tensor, codes: Tensor, l1_coefficient: float) -> Tensor:
        """`polished` for dense codes, (n, d_sae)."""
        indices, values = _compact(codes)
        exact = codes.clone()
        size = self.block_size(indices.shape[1])
        for rows in torch.arange(len(x), device=x.device).split(size):
            found = self.polished(x[rows], indices[rows], values[rows], l1_coefficient)
            exact[rows] = found.dense()
        return exact


def _compact(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and values, (N, k), of codes (N, d_sae), dense or sparse."""
    if codes.layout == torch.strided:
        rows, latents = codes.nonzero(as_tuple=True)
        values = codes[rows, latents]
    else:
        entries = codes.to_sparse_coo().coalesce()
        (rows, latents), values = entries.indices(), entries.values()
    counts = rows.bincount(minlength=len(codes))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    k = max(1, int(counts.max()) if len(codes) else 0)
    compact = torch.zeros(len(codes), k, dtype=torch.int64, device=rows.device)
    magnitudes = values.new_zeros(len(codes), k)
    compact[rows, place], magnitudes[rows, place] = latents, values
    return compact, magnitudes


def _length(values: Tensor) -> Tensor:
    """How many places a token needs, (N,): those up to its last in use, and at least 1."""
    places = torch.arange(1, values.shape[1] + 1, device=values.device)
    return torch.where(values > 0, places, 1).amax(1)


def _joined(parts: list[SparseCodes]) -> SparseCodes:
    """Put the tokens of all blocks one after another, with as many places as the widest has."""
    width = max(part.values.shape[1] for part in parts)

    def join(name: str) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        wide = tensors[0].ndim == 2
        return torch.cat([pad(t, (0, width - t.shape[1])) if wide else t for t in tensors])

    return replace(parts[0], **{name: join(name) for name in _tensors(parts[0])})


def _tensors(codes: SparseCodes) -> dict[str, Tensor]:
    return {name: value for name, value in vars(codes).items() if torch.is_tensor(value)}


def _require_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ConfigError(f"{name} holds NaN or infinity.")
