"""The Gated SAE's step in float64, written anew from its equations, for benchmarks/gpu.py."""

from __future__ import annotations

from typing import Any

import torch

from sae_gated_plugin.core.active import encode_active


def reference(
    sae: Any, x: torch.Tensor, active: torch.Tensor, l1: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the Gated SAE in float64, dense, 256 tokens at a time.

    active: positions in the (N, d_sae) matrix that count as active: the few that lie within
    float32 rounding of their threshold would otherwise be all that one sees.
    """
    names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    p = {name: getattr(sae, name).detach().double().requires_grad_() for name in names}
    n_tokens, d_sae = len(x), sae.cfg.d_sae
    total = 0.0
    for start in range(0, n_tokens, 256):
        part = x[start : start + 256].double()
        on = torch.zeros(len(part) * d_sae, dtype=torch.float64, device=x.device)
        inside = (active >= start * d_sae) & (active < (start + len(part)) * d_sae)
        on[active[inside] - start * d_sae] = 1
        on = on.view(len(part), d_sae)
        m = (part - p["b_dec"]) @ p["W_enc"]
        f = (p["r_mag"].exp() * m + p["b_mag"]).relu() * on
        g = (m + p["b_gate"]) * on
        first = (f @ p["W_dec"] + p["b_dec"] - part).square().sum()
        second = (g @ p["W_dec"].detach() + p["b_dec"].detach() - part).square().sum()
        loss = (first + second + l1 * g.sum()) / n_tokens
        loss.backward()
        total += loss.item()
    grads = {name: value.grad for name, value in p.items() if value.grad is not None}
    rows = p["W_dec"].detach()
    grads["W_dec"] -= rows * (grads["W_dec"] * rows).sum(1, keepdim=True)
    return total, grads


@torch.no_grad()
def support_of(sae: Any, x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Active positions of the sparse form, how many entries it holds, and how many are wrong.

    Wrong are those that float64 decides otherwise, by more than float32 can be off.
    """
    found = encode_active(x, sae.W_enc, sae.thresholds(), sae.b_dec, "sparse")
    assert found.support is not None
    flat = found.support.flat
    active = flat if found.mask is None else flat[found.mask.bool()]
    wrong, d_sae = 0, sae.cfg.d_sae
    W, limit = sae.W_enc.double(), sae.thresholds().double()
    for start in range(0, len(x), 256):
        part = x[start : start + 256].double() - sae.b_dec.double()
        margin = part @ W - limit
        slack = x.shape[1] * 2.0**-23 * part.norm(dim=1)[:, None] * W.norm(dim=0)
        on = torch.zeros(margin.numel(), dtype=torch.bool, device=x.device)
        inside = (active >= start * d_sae) & (active < (start + len(part)) * d_sae)
        on[active[inside] - start * d_sae] = True
        wrong += int(((on.view_as(margin) != (margin > 0)) & (margin.abs() > slack)).sum())
    return active, flat.numel(), wrong
