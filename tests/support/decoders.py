"""Decoders whose rows are alike, and a watch on the memory that comparing rows takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def decoder(d_sae: int = 40, d_in: int = 6, seed: int = 0) -> Tensor:
    """Rows of lengths 0.5 to 1.5, many of them close to another in so few dimensions."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64)
    lengths = 0.5 + torch.rand(d_sae, 1, generator=generator, dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True) * lengths


def cosine(W_dec: Tensor, i: int, j: int) -> Tensor:
    return W_dec[i] @ W_dec[j] / (W_dec[i].norm() * W_dec[j].norm())


class LargestTensor(TorchDispatchMode):
    """Watches how many numbers the largest result of any operation has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result
