"""Conversions: exact, checked before they are written, refused where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, JumpReLUSAE
from support.planted import D_IN, D_SAE, make_trainer, planted_batches

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import ArtifactError, ConfigError
from sae_gated_plugin.publish import convert
from sae_gated_plugin.saes.load import load_sae
from sae_gated_plugin.training.run import train

CASES: list[tuple[str, dict[str, Any]]] = [
    ("gated", {}),
    ("gated", {"tie_b_mag": True}),
    ("gated", {"decoder": "norm_weighted", "aux_decoder": "trainable"}),
    ("gated", {"apply_b_dec_to_input": False}),
    ("gated", {"normalize_activations": "layer_norm"}),
    ("prolu", {}),
    ("prolu", {"hybrid": True}),
    ("relu", {}),
    ("expanded", {}),
    ("sae_lens_gated", {}),
]


def trained(architecture: str, options: dict[str, Any], seed: int = 0) -> SAE[Any]:
    """An SAE after some training, its parameters shaken: negative b_mag, positive b_enc and all."""
    trainer = make_trainer(architecture, **options)
    for batch in planted_batches(10):
        trainer.step(batch)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.sae.parameters():
            if parameter.shape == (D_SAE,):
                parameter.add_(torch.randn(D_SAE, generator=generator))
    return load_sae(trainer.sae)


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_the_jumprelu_form_computes_the_same(architecture: str, options: dict[str, Any]) -> None:
    sae = trained(architecture, options)
    converted = convert.to_jumprelu(sae)
    (x,) = planted_batches(1, seed=3)
    acts = sae.encode(x)
    assert 0.02 < (acts > 0).float().mean() < 0.9
    torch.testing.assert_close(converted.encode(x), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(converted(x), sae(x), rtol=1e-5, atol=1e-5)
    assert convert.check_conversion(sae, converted, real=False) == ["random activations"]
    assert converted.cfg.metadata.converted_from == sae.cfg.architecture()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["gated", "prolu", "relu"])
def test_a_low_precision_sae_becomes_float32(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Of the same weights: a product of two bfloat16 numbers is none itself."""
    trained(architecture, {}).to(dtype=dtype).save_model(tmp_path / "run")
    convert.export(tmp_path / "run", tmp_path / "out")
    converted = SAE.load_from_disk(tmp_path / "out")
    assert converted.cfg.dtype == "float32"
    exact = SAE.load_from_disk(tmp_path / "run", dtype="float32")
    (x,) = planted_batches(1, seed=3)
    torch.testing.assert_close(converted.encode(x), exact.encode(x), rtol=1e-5, atol=1e-5)
    assert load_sae(tmp_path / "run").dtype == dtype  # checking changed nothing


@settings(max_examples=60, deadline=None)
@given(
    architecture=st.sampled_from(["gated", "prolu"]),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.01, 100),
    hybrid=st.booleans(),
)
def test_any_parameters(architecture: str, seed: int, scale: float, hybrid: bool) -> None:
    options = {"hybrid": hybrid} if architecture == "prolu" else {}
    sae = load_sae(make_trainer(architecture, **options).sae)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        if architecture == "gated":
            sae.r_mag.clamp_(-3, 3)
    x = scale * torch.randn(256, D_IN, generator=generator)
    convert.require_same(sae, convert.to_jumprelu(sae), x, "random activations")


@pytest.mark.parametrize("tensor", ["W_enc", "b_enc", "threshold"])
def test_a_wrong_conversion_is_noticed(tensor: str) -> None:
    sae = trained("gated", {})
    converted = convert.to_jumprelu(sae)
    with torch.no_grad():
        getattr(converted, tensor)[..., 3].add_(0.3)
    with pytest.raises(ArtifactError, match=r"not exact on random activations: \d+ of"):
        convert.check_conversion(sae, converted, real=False)


def test_what_has_no_jumprelu_form_is_refused() -> None:
    with pytest.raises(ArtifactError, match="untied Gated SAE has no JumpReLU form"):
        convert.to_jumprelu(trained("gated", {"tie_encoders": False}))
    with pytest.raises(ArtifactError, match="A topk SAE cannot be converted"):
        convert.to_jumprelu(load_sae(make_trainer("topk", k=4).sae))


def test_export_writes_what_was_checked_on_real_activations(
    trained_run: Path, tmp_path: Path
) -> None:
    written = convert.export(trained_run, tmp_path / "out")
    assert written["checked_on"] == ["random activations", "real activations"]
    assert (written["from"], written["architecture"]) == ("gated", "jumprelu")
    loaded, ours = SAE.load_from_disk(tmp_path / "out"), SAE.load_from_disk(trained_run)
    assert type(loaded) is JumpReLUSAE
    assert loaded.cfg.metadata.hook_name == ours.cfg.metadata.hook_name
    x = 20 * torch.randn(256, ours.cfg.d_in)
    torch.testing.assert_close(loaded.encode(x), ours.encode(x), rtol=1e-5, atol=1e-4)
    assert json.loads((tmp_path / "out" / "runner_cfg.json").read_text())


def test_a_normalised_run_is_exact_too(small_run: dict[str, Any], tmp_path: Path) -> None:
    small_run["sae"] = {
        "architecture": "prolu",
        "d_in": 128,
        "d_sae": 256,
        "normalize_activations": "expected_average_only_in",
    }
    small_run.update(training_tokens=4096, n_batches_for_norm_estimate=2)
    train(load_config(small_run), tmp_path / "run")
    assert len(convert.export(tmp_path / "run", tmp_path / "out")["checked_on"]) == 2


def test_bad_input_is_a_sentence(trained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="form is 'onnx'; allowed: native, jumprelu"):
        convert.export(trained_run, tmp_path / "out", form="onnx")
    with pytest.raises(ConfigError, match="is not empty; nothing was changed"):
        convert.export(trained_run, trained_run)
    with pytest.raises(ArtifactError, match="does not exist"):
        convert.export(tmp_path / "nowhere", tmp_path / "out")
