"""A small model of random weights, and an SAE whose reconstruction is known exactly."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

from .runs import HOOK_NAME, QUICKSTART

TEXT = str(QUICKSTART / "text")
CONTEXT = 64


def transformer(**options: Any) -> HookedTransformer:
    """One layer, 4 heads, 50 tokens, no tokenizer; the same weights every time."""
    defaults = {"n_layers": 1, "d_model": 16, "d_head": 4, "n_ctx": 32, "d_vocab": 50, "seed": 0}
    torch.manual_seed(0)
    return HookedTransformer(HookedTransformerConfig(**{**defaults, "act_fn": "gelu", **options}))


def linear_sae(decoder: torch.Tensor, b_dec: torch.Tensor | None = None, **metadata: Any) -> SAE:
    """x̂ = x · decoder + b_dec, exactly: ±x go through ReLU as two halves of the latents."""
    d_in = decoder.shape[0]
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=2 * d_in, apply_b_dec_to_input=False))
    identity = torch.eye(d_in)
    sae.W_enc.data = torch.cat([identity, -identity], dim=1)
    sae.W_dec.data = torch.cat([decoder, -decoder])
    sae.b_dec.data = torch.zeros(d_in) if b_dec is None else b_dec
    defaults = {
        "hook_name": HOOK_NAME,
        "context_size": CONTEXT,
        "prepend_bos": False,
        "model_name": "tiny",
        "dataset_path": TEXT,
    }
    for key, value in {**defaults, **metadata}.items():
        sae.cfg.metadata[key] = value
    return sae
