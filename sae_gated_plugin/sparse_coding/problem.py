"""The sparse coding problem of one SAE: its decoder, data and blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..progress import Lines
from .codes import SparseCodes, compact_codes, widened
from .least_squares import nnls, times

# Correlations of a block with all latents: on a CPU they stay in cache until their maximum is
# found; a GPU needs more at once. The decoder rows that a block has gathered may be 8 times that.
_BLOCK_NUMBERS, _BLOCK_NUMBERS_GPU = 2**20, 2**26


@torch.no_grad()
def refit(x: Tensor, W_dec: Tensor, b_dec: Tensor, codes: Tensor | SparseCodes) -> SparseCodes:
    """Give codes the best non-negative magnitudes on their own supports.

    x: (N, d_in); W_dec: (d_sae, d_in); b_dec: (d_in,), of any float dtype, computed in float32 or
    float64. codes: (N, d_sae), dense or sparse, >= 0. No token's residual is larger than with the
    codes given. Raises ConfigError for shapes that do not fit, negative and infinite numbers.
    """
    problem = Problem(x, W_dec, b_dec)
    indices, values = problem.compact(codes)
    places = torch.arange(1, values.shape[1] + 1, device=values.device)
    in_use = torch.where(values > 0, places, 1).amax(1)  # up to a token's last place in use

    def solve(rows: Tensor, k: int) -> SparseCodes:
        return problem.polished(problem.tokens(rows), indices[rows, :k], values[rows, :k])

    return problem.solved(solve, in_use, "Refitting")


def kkt_breach(gradient: Tensor, values: Tensor, x: Tensor, norms: Tensor) -> Tensor:
    """Largest violation of the optimality conditions per token, as a share of ‖x‖‖d‖."""
    found = torch.where(values > 0, gradient.abs(), gradient.clamp(min=0))
    return (found / (x.norm(dim=1, keepdim=True) * norms).clamp(min=1e-300)).amax(1)


class Problem:
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

    def tokens(self, rows: Tensor) -> Tensor:
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
        whole: dict[str, Tensor] = {}
        done = 0
        bar = tqdm(total=len(k), desc=what, unit=" tokens", disable=None, leave=False, delay=5)
        with bar:
            lines = Lines(bar, "tok")
            while True:
                most = int(k[order[done]]) if len(k) else 1
                rows = order[done : done + self.block_size(most)]
                found = solve(rows, most)
                # Into one place at once: small results kept between a block's large temporaries
                # would keep the allocator from using their memory for the next block's.
                for name, part in found.tensors().items():
                    old = whole.get(name)
                    old = part.new_zeros(len(k), *part.shape[1:]) if old is None else old
                    whole[name] = widened(old, part)
                    whole[name][rows] = widened(part, old)
                done += len(rows)
                bar.update(len(rows))
                lines.write(what, done)
                if done >= len(k):
                    return replace(found, **whole)

    def block_size(self, k: int) -> int:
        """How many tokens a block may have, for codes with k places."""
        numbers = _BLOCK_NUMBERS if self.W.device.type == "cpu" else _BLOCK_NUMBERS_GPU
        d_sae, d_in = self.W.shape
        return max(1, min(numbers // d_sae, 8 * numbers // (k * (k + d_in))))

    def compact(self, codes: Tensor | SparseCodes) -> tuple[Tensor, Tensor]:
        """Return the indices and values, (N, k), of codes given."""
        n, d_sae = len(self.given), len(self.W)
        compact = isinstance(codes, SparseCodes)
        shape = (len(codes.values), codes.d_sae) if compact else tuple(codes.shape)
        if shape != (n, d_sae):
            raise ConfigError(f"codes are {shape}, and must be ({n}, {d_sae}): (N, d_sae).")
        indices, values = (
            (codes.indices, codes.values) if compact else compact_codes(codes.detach())
        )
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
        target = times(rows, x) - l1_coefficient
        found, iterations = nnls(rows @ rows.mT, target, values, values > 0)

        def residual(values: Tensor) -> Tensor:
            return x - (values.double().unsqueeze(1) @ rows).squeeze(1)

        def objective(values: Tensor) -> Tensor:
            return residual(values).square().sum(1) / 2 + l1_coefficient * values.double().sum(1)

        start, found = values.to(self.W), found.to(self.W)
        found = found.where((objective(found) <= objective(start)).unsqueeze(1), start)
        r = residual(found)
        gradient = (times(rows, r) - l1_coefficient).where(start > 0, 0.0)
        breach = kkt_breach(gradient, found, x, rows.norm(dim=2))
        return SparseCodes(indices, found, len(self.W), iterations, r.square().sum(1), breach)

    def exact(self, x: Tensor, codes: Tensor, l1_coefficient: float) -> Tensor:
        """`polished` for dense codes, (n, d_sae)."""
        indices, values = compact_codes(codes)
        exact = codes.clone()
        for rows in torch.arange(len(x), device=x.device).split(self.block_size(indices.shape[1])):
            found = self.polished(x[rows], indices[rows], values[rows], l1_coefficient)
            exact[rows] = found.dense()
        return exact


def _require_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ConfigError(f"{name} holds NaN or infinity.")
