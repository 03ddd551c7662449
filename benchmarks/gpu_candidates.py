"""The training SAEs that benchmarks/gpu.py sets side by side, and their step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sae_lens
import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

from sae_gated_plugin.architectures.gated import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_gated_plugin.architectures.prolu import ProLUTrainingSAE, ProLUTrainingSAEConfig

#: The forms of our Gated SAE.
OURS = ("auto", "sparse", "dense")

L1 = 0.7


def thresholds(d_sae: int, l0: float, device: str) -> torch.Tensor:
    """(d_sae,) thresholds for standard normal m, with log-normal densities of mean l0 / d_sae."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.exp(1.5 * torch.randn(d_sae, generator=generator) - 1.5**2 / 2)
    density = (l0 / d_sae * spread).clamp(1e-7, 0.5).double()
    density[0] = 0.5
    return (2**0.5 * torch.erfinv(1 - 2 * density)).float().to(device)


def build(name: str, shape: tuple[int, int, float], device: str) -> Any:
    """A training SAE of that name; latents are active as `thresholds` says."""
    d_in, d_sae, l0 = shape
    common: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "device": device}
    torch.manual_seed(2)
    if name in OURS:
        sae = GatedTrainingSAE(GatedTrainingSAEConfig(**common, backend=name))
    elif name == "prolu":
        sae = ProLUTrainingSAE(ProLUTrainingSAEConfig(**common))
    elif name == "gated":
        sae = sae_lens.GatedTrainingSAE(sae_lens.GatedTrainingSAEConfig(**common))
    else:
        sae_class, config_class = get_sae_training_class(name)
        k = {"k": round(l0)} if "topk" in name else {}
        sae = sae_class(config_class(**common, **k))
    with torch.no_grad():
        limit = thresholds(d_sae, l0, device)
        sae.W_enc.div_(sae.W_enc.norm(dim=0))
        if hasattr(sae, "b_gate"):
            sae.b_gate.copy_(-limit)
            sae.b_mag.copy_(0.1 - limit)
            sae.r_mag.normal_(0, 0.1)
        elif hasattr(sae, "log_threshold"):
            sae.log_threshold.copy_(limit.clamp_min(1e-3).log())
        elif hasattr(sae, "b_enc"):
            sae.b_enc.copy_(-limit)
    return sae


def forward_backward(sae: Any, x: torch.Tensor, autocast: bool) -> None:
    for parameter in sae.parameters():
        parameter.grad = None
    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=x.device)
    coefficients = {
        name: L1 if name == "l1" else getattr(value, "value", value)
        for name, value in sae.get_coefficients().items()
    }
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        output = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))
    output.loss.backward()


def sparsify_step(
    shape: tuple[int, int, float], x: torch.Tensor, autocast: bool
) -> Callable[[], None]:
    """Forward and backward of EleutherAI's sparsify, its topk with its own kernels."""
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore

    d_in, d_sae, l0 = shape
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=round(l0)), device=x.device)

    def step() -> None:
        coder.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            output = coder(x)
        output.fvu.backward()

    return step
