"""Ours beside SAELens's own classes, for tests of what SAELens promises of them.

For `gated` that is the built-in `sae_lens.GatedSAE` with the same state dict and config. SAELens
has no `prolu`; there it is its own JumpReLU SAE, exactly converted.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import sae_lens
import torch
from torch import Tensor

from sae_gated_plugin.architectures.gated import GatedSAE, GatedSAEConfig
from sae_gated_plugin.architectures.prolu import ProLUSAE, ProLUSAEConfig
from sae_gated_plugin.core.cost import MIN_TOKENS
from sae_gated_plugin.publish.convert import to_jumprelu

Pair = tuple[Any, Any]
D_IN, D_SAE, N = 32, 512, 2 * MIN_TOKENS
CLASSES: Any = {"gated": (GatedSAE, GatedSAEConfig), "prolu": (ProLUSAE, ProLUSAEConfig)}
each = pytest.mark.parametrize("name", CLASSES)
#: With gradients ours runs dense operations, without them on the active latents alone.
both_modes = pytest.mark.parametrize("gradients", [True, False])


def oracle(ours: Any) -> Any:
    """SAELens's own class with the parameters and the config of ours."""
    if isinstance(ours, ProLUSAE):
        return to_jumprelu(ours)
    options = {f.name: getattr(ours.cfg, f.name) for f in dataclasses.fields(ours.cfg)}
    options["metadata"] = copy.deepcopy(ours.cfg.metadata)
    theirs = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**options))
    theirs.load_state_dict(ours.state_dict())
    return theirs


def pair(name: str, d_in: int = D_IN, bias: float = -4.0, **options: Any) -> Pair:
    """Ours and SAELens's, no parameter at a special value, sparse enough for the sparse form."""
    generator = torch.Generator().manual_seed(0)
    sae_class, config_class = CLASSES[name]
    ours = sae_class(config_class(d_in=d_in, d_sae=D_SAE, **options))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        ours.W_dec.mul_(torch.rand(D_SAE, 1, generator=generator) / 2)
        (ours.b_gate if name == "gated" else ours.b_enc).add_(bias)
    return ours, oracle(ours)


def data(*shape: int) -> Tensor:
    return 1.5 * torch.randn(shape or (N, D_IN), generator=torch.Generator().manual_seed(1))


def same(saes: Pair, compute: Callable[[Any], Any], **tolerance: Any) -> Any:
    """Assert that both give the same, also in dtype and shape; returns SAELens's."""
    ours, theirs = compute(saes[0]), compute(saes[1])
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **tolerance)
    return theirs


def same_error(saes: Pair, compute: Callable[[Any], Any]) -> None:
    raised = []
    for sae in saes:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            compute(sae)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


def computed(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return sae.encode(x), sae(x)


EDITS: dict[str, Callable[..., Tensor]] = {
    "raise all": lambda x, hook: x + 1.0,
    "lower all": lambda x, hook: x - 1.0,
    "negate": lambda x, hook: -x,
    "set one latent": lambda x, hook: x.index_fill(1, torch.tensor([3]), 10.0),
    "ablate": lambda x, hook: x * 0,
}
