"""Training that starts from a trained SAE: its weights, and the options of the `sae` section."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_training_class
from support.planted import make_trainer
from support.runs import D_IN, SMALL_RUN

from sae_gated_plugin.config.run import RunConfig, load_config
from sae_gated_plugin.config.yaml import to_yaml
from sae_gated_plugin.errors import ConfigError, SaeGatedError
from sae_gated_plugin.publish.card import Card, Entry, render
from sae_gated_plugin.saes.load import load_sae
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep
from sae_gated_plugin.training.run import resume, train
from sae_gated_plugin.training.runner import Runner

WEIGHTS = "sae_weights.safetensors"
SHORT = {**SMALL_RUN, "training_tokens": 5120}  # 10 steps
STILL = "lr=1e-12"  # a training that changes next to nothing


def saved(folder: Path, architecture: str, *, training: bool = False, **options: Any) -> Path:
    """An SAE of 128 → 256 on the disk, with every parameter at random, some norms far from 1."""
    torch.manual_seed(1)
    sae_class, config_class = get_sae_training_class(architecture)
    sae = sae_class(config_class(**{"d_in": D_IN, "d_sae": 256, **options}))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(noise.abs() + 0.01 if "threshold" in name else parameter + noise)
    (sae.save_model if training else sae.save_inference_model)(folder)
    return folder


def config(source: Path, *overrides: str, **sae: Any) -> RunConfig:
    mapping = {**copy.deepcopy(SHORT), "from_pretrained_path": str(source)}
    mapping["sae"] = {"architecture": "gated", "d_in": D_IN, "d_sae": 256, **sae}
    return load_config(mapping, overrides)


def same_function(ours: SAE[Any], theirs: SAE[Any]) -> None:
    """What each latent adds to a reconstruction, and reconstructions, on random activations."""
    x = 3 * torch.randn(512, D_IN, generator=torch.Generator().manual_seed(2))
    acts = [sae.encode(x).to_dense() for sae in (ours, theirs)]
    if not getattr(ours.cfg, "rescale_acts_by_decoder_norm", False):  # else it is in them already
        acts = [a * sae.W_dec.norm(dim=1) for a, sae in zip(acts, (ours, theirs))]
    assert (acts[1] > 0).any()
    torch.testing.assert_close(*acts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "options", "of", "its_options"),
    [
        ("gated", {}, "gated", {"decoder": "norm_weighted", "aux_decoder": "trainable"}),
        ("gated", {}, "sae_lens_gated", {}),
        ("gated", {"decoder": "norm_weighted", "aux_decoder": "trainable"}, "gated", {}),
        ("gated", {"learn_r_mag": False}, "gated", {}),
        ("gated", {"tie_b_mag": True}, "gated", {"tie_b_mag": True}),
        ("gated", {"tie_encoders": False}, "gated", {"tie_encoders": False}),
        ("gated", {}, "standard", {}),
        ("sae_lens_gated", {}, "gated", {}),
        ("mlp_encoder", {"d_hidden": 8}, "mlp_encoder", {"d_hidden": 8}),
        ("relu", {}, "standard", {}),
        ("standard", {}, "expanded", {}),
        ("expanded", {}, "expanded", {}),
        ("prolu", {"gradient": "relu"}, "prolu", {}),
        ("prolu", {"hybrid": True}, "prolu", {"hybrid": True}),
        ("jumprelu", {"l0_coefficient": 3.0}, "jumprelu", {}),
        ("topk", {"k": 8}, "topk", {"k": 8}),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_it_starts_as_the_same_function_with_the_sections_options(
    architecture: str,
    options: dict[str, Any],
    of: str,
    its_options: dict[str, Any],
    training: bool,
    tmp_path: Path,
) -> None:
    source = saved(tmp_path / "source", of, training=training, **its_options)
    sae = Runner(config(source, architecture=architecture, **options)).sae
    assert sae.cfg.architecture() == architecture
    for name, value in options.items():
        assert getattr(sae.cfg, name) == value
    same_function(sae, load_sae(source))
    if getattr(sae.cfg, "decoder", None) == "unit_norm":
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(256))


def test_a_batchtopk_goes_on_from_its_checkpoint_alone(tmp_path: Path) -> None:
    """Its inference form is a jumprelu, whose thresholds no batchtopk can take."""
    made = make_trainer("batchtopk", d_in=D_IN, d_sae=256, k=8).sae
    made.topk_threshold.fill_(0.3)
    made.save_model(tmp_path / "source")
    sae = Runner(config(tmp_path / "source", architecture="batchtopk", k=8)).sae
    assert float(sae.topk_threshold) == pytest.approx(0.3)
    assert torch.equal(sae.W_enc, TrainingSAE.load_from_disk(tmp_path / "source").W_enc)
    sae.save_inference_model(tmp_path / "inference")
    with pytest.raises(ConfigError, match="threshold would be another"):
        Runner(config(tmp_path / "inference", architecture="batchtopk", k=8))


def test_a_topk_may_go_on_with_another_k(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "topk", k=8)
    sae = Runner(config(source, architecture="topk", k=4)).sae
    assert torch.equal(sae.W_enc, load_sae(source).W_enc)
    assert (sae.encode(torch.randn(9, D_IN)).to_dense() > 0).sum(1).max() == 4


def test_a_low_precision_sae_goes_on_in_float32(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "gated", dtype="bfloat16")
    sae = Runner(config(source)).sae
    assert sae.dtype == torch.float32
    same_function(sae, load_sae(source).to(torch.float32))


@pytest.mark.parametrize(
    ("of", "its_options", "options", "sentence"),
    [
        ("gated", {}, {"control": "soft_frozen"}, "starts at random"),
        ("gated", {"d_sae": 128}, {}, "sae.d_sae is 256, but 128 in from_pretrained_path"),
        ("gated", {"d_in": 64}, {}, "sae.d_in is 128, but 64 in"),
        ("prolu", {}, {}, "a prolu SAE.*a gated"),
        ("gated", {}, {"architecture": "prolu"}, "a gated SAE.*a prolu"),
        ("gated", {}, {"tie_encoders": False}, "a gated SAE.*gated_untied"),
        ("gated", {"tie_encoders": False}, {}, "a gated_untied SAE"),
        ("gated", {}, {"tie_b_mag": True}, "b_mag would be another"),
        ("prolu", {"hybrid": True}, {"architecture": "prolu"}, "sae.hybrid is False, but True"),
        ("gated", {"apply_b_dec_to_input": False}, {}, "sae.apply_b_dec_to_input is True"),
        ("gated", {"normalize_activations": "layer_norm"}, {}, "sae.normalize_activations is"),
        ("gated", {}, {"normalize_activations": "layer_norm"}, "sae.normalize_activations is"),
        ("gated", {}, {"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ("gated", {}, {"architecture": "rescale_shift", "standard_sae": "x"}, "standard_sae"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    of: str,
    its_options: dict[str, Any],
    options: dict[str, Any],
    sentence: str,
    training: bool,
    tmp_path: Path,
) -> None:
    source = saved(tmp_path / "source", of, training=training, **its_options)
    with pytest.raises(ConfigError, match=sentence):
        train(config(source, "model_name=not/there", **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_sae_is_a_sentence(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "gated")
    (source / WEIGHTS).write_bytes(b"damaged")
    for path in (source, tmp_path):
        with pytest.raises(SaeGatedError, match=str(path)):
            train(config(path), tmp_path / "run")


@pytest.mark.skipif(
    not hasattr(SAE, "fold_activation_whitening"), reason="this SAELens has no covariance_whitening"
)
def test_the_statistics_of_a_checkpoint_without_them_are_asked_for(tmp_path: Path) -> None:
    source = saved(
        tmp_path / "source", "prolu", training=True, normalize_activations="covariance_whitening"
    )
    with pytest.raises(SaeGatedError, match="statistics"):
        Runner(config(source, architecture="prolu"))


@pytest.mark.parametrize("architecture", ["gated", "prolu", "standard"])
@pytest.mark.parametrize("sweep", [False, True])
def test_a_run_on_scaled_activations_goes_on_with_them(
    architecture: str, sweep: bool, tmp_path: Path
) -> None:
    """The finished run has the scale in its weights; it comes out again, and back in the end."""
    norm = {"normalize_activations": "expected_average_only_in", "l1_coefficient": 5.0}
    scaled = ["n_batches_for_norm_estimate=3", "save_final_checkpoint=true"]
    first = {**copy.deepcopy(SHORT), "sae": {**SHORT["sae"], "architecture": architecture, **norm}}
    train(load_config(first, scaled), tmp_path / "first")
    (checkpoint,) = (tmp_path / "first" / "checkpoints").iterdir()
    for number, source in enumerate((tmp_path / "first", checkpoint)):
        again = config(source, *scaled, STILL, architecture=architecture, **norm)
        folder = tmp_path / f"again{number}"
        if sweep:
            curves = [{"label": "again", "architecture": architecture}]
            mapping = {**again.mapping, "sweep": {"curves": curves, "eval_tokens": 512}}
            (point,) = run_sweep(load_sweep(mapping), folder)
            assert "error" not in point
            folder = Path(point["path"])
        else:
            train(again, folder)
        same_function(load_sae(folder), load_sae(tmp_path / "first"))


def test_what_was_trained_is_what_the_files_say(trained_run: Path, tmp_path: Path) -> None:
    """Four lambdas give four SAEs, each with its lambda in its files."""
    weights: set[bytes] = set()
    for l1 in (0.1, 0.3, 1.0, 3.0):
        folder = tmp_path / f"l1-{l1}"
        train(config(trained_run, l1_coefficient=l1, sparsity_loss="sqrt_l1"), folder)
        weights.add((folder / WEIGHTS).read_bytes())
        metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
        assert metadata["training_architecture_details"]["l1_coefficient"] == l1
        assert metadata["training_architecture_details"]["sparsity_loss"] == "sqrt_l1"
        assert metadata["fine_tuned_from"] == trained_run.name
        assert yaml.safe_load((folder / "run.yaml").read_text())["sae"]["l1_coefficient"] == l1
        assert json.loads((folder / "results.json").read_text())["l1_coefficient"] == l1
    assert len(weights) == 4
    with_it = json.loads((tmp_path / "l1-0.1" / "cfg.json").read_text())
    assert "fine-tuned from run" in render(Card("o/r", [Entry("a", with_it)]))


def test_a_target_l0_begins_its_search_anew(tmp_path: Path) -> None:
    options = {"target_l0": 8, "dead_latents": "resample", "resample_steps": [3]}
    sae = make_trainer("gated", d_in=D_IN, d_sae=256, **options).sae
    sae.l0_controller[0] = 5.0  # what an earlier training has come to
    sae.resampled_at.fill_(7)
    sae.save_model(tmp_path / "source")
    found = Runner(config(tmp_path / "source", **options)).sae
    assert found.l0_controller[0] == 0
    assert found.resampled_at == -1


def test_another_hook_point_is_warned_of(trained_run: Path, caplog: Any) -> None:
    Runner(config(trained_run, "hook_name=model.layers.1"))
    assert "'model.layers.2'" in caplog.text
    caplog.clear()
    Runner(config(trained_run))
    assert not caplog.text


def test_an_interrupted_one_goes_on_exactly_and_without_its_source(
    trained_run: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(trained_run, tmp_path / "source")
    options = {"l1_coefficient": 1.0, "normalize_activations": "expected_average_only_in"}
    settings = ["n_checkpoints=1", "n_batches_for_norm_estimate=3"]
    run = config(source, *settings, **options)
    train(run, tmp_path / "run")
    names = ("cfg.json", WEIGHTS)
    whole = [(tmp_path / "run" / name).read_bytes() for name in names]
    for name in (*names, "runner_cfg.json", "results.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(source)
    resume(tmp_path / "run")
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == whole
    for path in (tmp_path / "run").glob("*.json"):
        path.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match=r"from_pretrained_path.*does not exist"):
        resume(tmp_path / "run")


def test_a_sweep_fine_tunes(trained_run: Path, tmp_path: Path) -> None:
    """One SAE with several lambdas, and one that cannot be, which is said before anything runs."""
    mapping = {**config(trained_run, STILL).mapping}
    mapping["sweep"] = {"eval_tokens": 512, "curves": [{"l1_coefficient": [0.5, 2.0]}]}
    points = run_sweep(load_sweep(mapping), tmp_path / "sweep")
    assert [point["l1_coefficient"] for point in points] == [0.5, 2.0]
    for point in points:
        same_function(load_sae(point["path"]), load_sae(trained_run))
    mapping["sweep"]["curves"].append({"architecture": "prolu"})
    with pytest.raises(ConfigError, match=r"a gated SAE.*a prolu"):
        run_sweep(load_sweep(mapping), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tilde_is_expanded(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(trained_run.parent))
    found = config(Path("~") / trained_run.name)
    assert found.runner.from_pretrained_path == str(trained_run)
    assert "~" in to_yaml(found.mapping)
