"""Controls with a part left at random: what moves, what does not, and how far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_gated_plugin.distributed.state import require_divisible
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.objectives.random_controls import COSINE, pull_back_

D_IN, D_SAE = 16, 48
ENCODERS = {"W_enc", "W_mag", "mlp.W_1", "mlp.b_1", "mlp.W_2"}

each = pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("gated", {}),
        ("gated", {"tie_encoders": False}),
        ("gated", {"matryoshka_widths": [8, 20]}),
        ("gated", {"decoder": "norm_weighted", "aux_decoder": "trainable"}),
        ("gated", {"dead_latents": "auxk"}),
        ("mlp_encoder", {}),
        ("prolu", {}),
        ("relu", {}),
        ("expanded", {}),
    ],
    ids=str,
)
both = pytest.mark.parametrize("backend", ["dense", "sparse"])


def build(architecture: str, **options: Any) -> Any:
    sae_class, config_class = get_sae_training_class(architecture)
    torch.manual_seed(0)
    return sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **options))


def trained(sae: Any, steps: int = 150) -> dict[str, Tensor]:
    """SAELens's own trainer at a rate that turns rows far; the parameters as they were before."""
    before = {name: value.detach().clone() for name, value in sae.named_parameters()}
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=64,
            lr=3e-2,
            lr_end=3e-2,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(()),
    )
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(8, D_IN, generator=generator)
    for _ in range(steps):
        trainer.step(torch.randn(64, 8, generator=generator) @ directions)
    return before


def moved(sae: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in sae.named_parameters() if not torch.equal(value, before[name])}


def cosines(sae: Any, start: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(sae.W_dec.detach(), start, dim=1)


@both
@each
def test_what_is_frozen_does_not_move_and_all_else_does(
    architecture: str, options: dict[str, Any], backend: str
) -> None:
    everything = {name for name, _ in build(architecture, **options).named_parameters()}
    for control, frozen in (("frozen_decoder", {"W_dec"}), ("frozen_encoder", ENCODERS)):
        sae = build(architecture, **options, control=control, backend=backend)
        before = trained(sae, steps=3)
        assert moved(sae, before) == everything - frozen, control
        assert all(getattr(sae, n).grad is None for n in frozen if "." not in n and hasattr(sae, n))


@each
def test_soft_frozen_rows_stay_near_their_start(architecture: str, options: dict[str, Any]) -> None:
    free = build(architecture, **options)
    start = trained(free)["W_dec"]
    assert cosines(free, start).min() < 0.5  # without the control they go far
    sae = build(architecture, **options, control="soft_frozen")
    assert torch.equal(sae.W_dec, start)
    before = trained(sae)
    assert moved(sae, before) == set(before)
    found = cosines(sae, start)
    assert found.min() >= COSINE - 1e-5
    assert (found < COSINE + 1e-3).float().mean() > 0.2  # and the bound is what holds them
    if sae.cfg.decoder == "unit_norm":
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_a_row_goes_to_the_nearest_allowed_direction() -> None:
    start = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    W_dec = torch.tensor([[0.0, 3, 0], [1, 9, 0], [0, 0, -2], [1, 0.1, 0.1]], dtype=torch.float64)
    given = W_dec.clone()
    pull_back_(W_dec, start)
    torch.testing.assert_close(W_dec[0], torch.tensor([0.8, 0.6, 0], dtype=torch.float64) * 3)
    assert torch.equal(W_dec[1], given[1])  # near enough, so untouched, to the bit
    torch.testing.assert_close(W_dec[2], torch.tensor([0.0, 0, 2], dtype=torch.float64))
    assert torch.equal(W_dec[3], given[3])


def test_a_resumed_one_knows_its_start_and_the_saved_one_is_plain(tmp_path: Path) -> None:
    sae = build("gated", control="soft_frozen")
    start = trained(sae)["W_dec"]
    sae.save_model(tmp_path / "checkpoint")
    resumed = sae_lens.TrainingSAE.load_from_disk(tmp_path / "checkpoint")
    assert torch.equal(resumed.W_dec_start, start)
    trained(resumed)
    assert cosines(resumed, start).min() >= COSINE - 1e-5
    sae.save_inference_model(tmp_path / "inference")
    saved = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    plain = sae_lens.GatedSAE(sae_lens.GatedSAEConfig(d_in=D_IN, d_sae=D_SAE))
    plain.load_state_dict(saved.state_dict())  # no tensor more, none less
    assert saved.cfg.metadata.training_architecture_details["control"] == "soft_frozen"


def test_bad_input_gets_a_sentence() -> None:
    with pytest.raises(ConfigError, match="control is 'frozen'; allowed: none, frozen_decoder"):
        build("gated", control="frozen")
    with pytest.raises(ConfigError, match="new directions from the data"):
        build("gated", control="frozen_decoder", dead_latents="resample", resample_steps=[5])
    with pytest.raises(ConfigError, match="soft_frozen' is not divided"):
        require_divisible(build("gated", control="soft_frozen"), 2)
