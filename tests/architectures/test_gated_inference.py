"""The Gated SAE for inference: SAELens's own in numbers, fields and hooks."""

from __future__ import annotations

from typing import Any

import sae_lens
import torch
from support.gated import D_IN, D_SAE, N, build, data

from sae_gated_plugin.architectures import gated
from sae_gated_plugin.architectures.gated import (
    GatedSAE,
    GatedSAEConfig,
)


def test_inference_is_saelens_own_in_numbers_and_fields() -> None:
    import dataclasses

    assert [f.name for f in dataclasses.fields(GatedSAEConfig)] == [
        f.name for f in dataclasses.fields(sae_lens.GatedSAEConfig)
    ]
    ours = GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE))
    plain = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=D_IN, d_sae=D_SAE))
    assert set(ours.state_dict()) == set(plain.state_dict())
    state = {name: value for name, value in build("float32").state_dict().items()}
    ours.load_state_dict(state)
    plain.load_state_dict(state)
    x = data(dtype=torch.float32).unflatten(0, (1, N))
    torch.testing.assert_close(ours.encode(x), plain.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)


def test_inference_on_active_latents_alone_gives_the_same() -> None:
    """Many tokens, few active, no gradients: the sparse form, shapes and hooks as ever."""
    torch.manual_seed(0)
    sae = GatedSAE(GatedSAEConfig(d_in=32, d_sae=256))
    plain = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=32, d_sae=256))
    with torch.no_grad():
        sae.W_enc.div_(sae.W_enc.norm(dim=0))
        sae.b_gate.fill_(-2.3)
        sae.b_mag.fill_(-1.0)
    plain.load_state_dict(sae.state_dict())
    x = torch.randn(8, 100, 32)
    with torch.no_grad():
        acts = sae.encode(x)
        assert 0.001 < (acts > 0).float().mean() < 0.05
        torch.testing.assert_close(acts, plain.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae(x), plain(x), rtol=1e-5, atol=1e-5)
        seen = []
        sae.hook_sae_acts_post.add_hook(lambda acts, hook: seen.append(acts.shape))
        torch.testing.assert_close(sae(x), plain(x), rtol=1e-5, atol=1e-5)
        assert seen == [(8, 100, 256)]


def test_inference_can_be_differentiated_twice() -> None:
    sae = GatedSAE(GatedSAEConfig(d_in=5, d_sae=9, dtype="float64"))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: sae(x).square().sum(), x)


def test_encoder_runs_one_matmul() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(sae: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            sae.encode(data(dtype=torch.float32))
        return counter.get_total_flops()

    one = 2 * N * D_IN * D_SAE
    assert flops(GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE))) == one
    assert flops(sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=D_IN, d_sae=D_SAE))) == 2 * one


def test_register_hook_is_a_plugin_hook() -> None:
    names: list[str] = []
    gated.register_architectures(lambda name, **_: names.append(name))
    assert names == ["gated", "gated_untied"]
