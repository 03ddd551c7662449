"""Latents divided among processes: what each has, and what they tell each other.

A rank has some of the latents, whole: their encoder columns, decoder rows and biases. What is not
per latent (b_dec, a hidden layer before the encoder) every rank has, alike to the bit. All see the
same tokens. Then a rank's loss is

    |x - sum over ranks of (f W_dec) - b_dec|^2 + the sparsity of its own latents

and two operations give every parameter the gradient that one process computes:

    sum     of the partial reconstructions. The gradient of what comes out is alike on all ranks and
            is each part's: nothing to send. (Sums of sparsity losses are only for the value.)
    same    of what all ranks have and their own encoders read: b_dec, or a hidden layer's output.
            Each rank's latents give a part of its gradient: it is their sum.

A sum is begun as soon as a reconstruction is there, and waited for after the next one and the
sparsity losses. Backwards nothing crosses but `same`'s vector, which is the end of its branch: what
comes after it, for a hidden layer, needs it at once.

So per step two reconstructions and one vector of d_in cross, however many latents there are.
Conjugate operators of this kind: Shoeybi et al. 2019, "Megatron-LM".

Shapes: N tokens, d_in, d_sae latents in all, n of them here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LatentShards:
    """Latents `start` to `stop` of d_sae are here, of the `rank`-th of `size` processes.

    Every method must be called by all ranks, in the same order. The default is one process that
    has all of them, for which everything is the identity.
    """

    d_sae: int = 0
    rank: int = 0
    size: int = 1

    @property
    def start(self) -> int:
        """The first latent here."""
        return self._starts()[self.rank]

    @property
    def stop(self) -> int:
        """The one after the last."""
        return self._starts()[self.rank + 1]

    def _starts(self) -> list[int]:
        return [self.d_sae * rank // self.size for rank in range(self.size + 1)]

    # --- with gradients ---------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks; its gradient is each part's. bfloat16 and float16 become float32."""
        return self.begin_sum(tensor)()

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """`sum`, on its way; what is returned waits for it."""
        if self.size == 1:
            return lambda: tensor
        wide = torch.promote_types(tensor.dtype, torch.float32)
        arrived = _begin_all_reduce(tensor.detach().to(wide))
        return lambda: cast(Tensor, _Sum.apply(tensor, arrived))

    def same(self, tensor: Tensor) -> Tensor:
        """`tensor`, which is alike on all ranks; its gradient is the sum of theirs."""
        one = self.size == 1 or not tensor.requires_grad
        return tensor if one else cast(Tensor, _Same.apply(tensor))

    # --- without ----------------------------------------------------------------------------------

    def widths(self, widths: Sequence[int]) -> list[int]:
        """How many of the first w latents of all are here, for each w."""
        if self.size == 1:
            return list(widths)
        return [min(max(width, self.start), self.stop) - self.start for width in widths]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a tensor of any shape."""
        return tensor if self.size == 1 else _all_reduced(tensor.detach())

    def each(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor (..., its own size), in order; all but the last size are alike."""
        if self.size == 1:
            return [tensor]
        mine = torch.zeros(self.size, dtype=torch.int64, device=tensor.device)
        mine[self.rank] = tensor.shape[-1]
        widths: list[int] = self.total(mine).tolist()
        padded = tensor.new_zeros(*tensor.shape[:-1], max(widths))
        padded[..., : tensor.shape[-1]] = tensor.detach()
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [part[..., :width] for part, width in zip(found, widths)]

    def joined(self, tensor: Tensor) -> Tensor:
        """(n, ) of the latents here → (d_sae, ), on every rank."""
        return torch.cat(self.each(tensor))

    def joined_acts(self, acts: Tensor) -> Tensor:
        """Activations (N, n) → (N, d_sae), on every rank; with several, sparse COO and coalesced.

        A rank whose latents are dense sends entries too: others' may be sparse.
        """
        if self.size == 1:
            return acts
        acts = acts.to_sparse_coo()
        place = torch.tensor([[0], [self.start]], device=acts.device)
        indices = torch.cat(self.each(acts.indices() + place), dim=-1)
        values = torch.cat(self.each(acts.values()))
        size = (acts.shape[0], self.d_sae)
        return torch.sparse_coo_tensor(indices, values, size, check_invariants=False).coalesce()

    def norm(self, norms: Mapping[str, Tensor], axes: Mapping[str, int]) -> Tensor:
        """The norm of all gradients together, () float64, of those of the parameters here, by name.

        axes: the parameters that are per latent; the others are alike on all ranks.
        """
        squares = {name: norm.double().square() for name, norm in norms.items()}
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(norms.values())).device)
        own = sum((value for name, value in squares.items() if name in axes), zero)
        alike = sum((value for name, value in squares.items() if name not in axes), zero)
        return (self.total(own) + alike).sqrt()

    def names(self, names: list[str]) -> list[str]:
        """All ranks' names, each once, in the order of the first rank that has it."""
        if self.size == 1:
            return names
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, names)
        return list(dict.fromkeys(name for part in found for name in part))

    def take_first(self, tensor: Tensor) -> None:
        """Put rank 0's numbers into a tensor that is alike on all ranks, or should be."""
        dist.broadcast(tensor.detach(), 0)

    def gathered(self, tensor: Tensor, axis: int) -> Tensor | None:
        """All latents of a tensor that has some on `axis`, on rank 0's CPU; None elsewhere."""
        mine = tensor.detach().movedim(axis, 0).cpu().contiguous()
        if self.rank:
            dist.send(mine, 0)
            return None
        starts = self._starts()
        whole = mine.new_empty(self.d_sae, *mine.shape[1:])
        whole[: self.stop] = mine
        for rank in range(1, self.size):
            dist.recv(whole[starts[rank] : starts[rank + 1]], rank)
        return whole.movedim(0, axis)

    def own(self, tensor: Tensor, axis: int) -> Tensor:
        """A copy of the latents here, of a tensor that has all of them on `axis`."""
        return tensor.detach().movedim(axis, 0)[self.start : self.stop].clone().movedim(0, axis)

    def __deepcopy__(self, _: Any) -> LatentShards:
        return self


#: One process, which has all latents.
WHOLE = LatentShards()


def _all_reduced(tensor: Tensor) -> Tensor:
    return _begin_all_reduce(tensor)()


def _begin_all_reduce(tensor: Tensor) -> Callable[[], Tensor]:
    out = tensor.contiguous().clone()
    work: Any = dist.all_reduce(out, async_op=True)

    def arrived() -> Tensor:
        work.wait()
        return out

    return arrived


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, arrived: Callable[[], Tensor]) -> Tensor:
        ctx.dtype = tensor.dtype
        return arrived()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _all_reduced(grads[0])
