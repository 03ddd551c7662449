from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE
from safetensors.torch import load_file, save_file
from support.planted import make_trainer, planted_batches
from support.runs import D_IN

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import ArtifactError, UnknownArchitecture
from sae_gated_plugin.measure.evaluate import evaluate
from sae_gated_plugin.model.hook_point import HookPoint
from sae_gated_plugin.saes.load import load_sae
from sae_gated_plugin.training.run import train


def test_checkpoints_are_measured_in_their_inference_form(
    small_run: dict[str, Any], hook_point: HookPoint, tmp_path: Path
) -> None:
    """Scaled activations and JumpReLU's log-thresholds: a checkpoint differs in both."""
    small_run["sae"] = {
        "architecture": "jumprelu",
        "d_in": D_IN,
        "d_sae": 256,
        "normalize_activations": "expected_average_only_in",
    }
    overrides = ["n_batches_for_norm_estimate=4", "save_final_checkpoint=true"]
    config = load_config(small_run, [*overrides, "training_tokens=10240"])
    train(config, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("final_*")
    final, last = (
        evaluate(folder, model=hook_point.model, tokens=512)
        for folder in (tmp_path / "run", checkpoint)
    )
    assert last["training_tokens"] >= 10_240
    for name in ("l0", "fvu", "gamma", "loss_recovered"):
        assert last[name] == pytest.approx(final[name], rel=1e-4), name


def test_training_sae_in_memory(trained_run: Path, hook_point: HookPoint, tmp_path: Path) -> None:
    checkpoint = sorted((trained_run / "checkpoints").iterdir())[-1]
    sae = TrainingSAE.load_from_disk(checkpoint)
    results = evaluate(sae, model=hook_point.model, tokens=512)
    from_disk = evaluate(checkpoint, model=hook_point.model, tokens=512)
    assert results["gamma"] == from_disk["gamma"]
    assert results["path"] is None


@pytest.mark.parametrize("architecture", ["relu", "batchtopk", "jumprelu", "gated"])
def test_what_a_script_saved_of_a_training_sae_is_read_as_that(
    architecture: str, tmp_path: Path
) -> None:
    """`TrainingSAE.save_model` leaves no trainer's state beside it."""
    sae = make_trainer(architecture, **({"k": 4} if "topk" in architecture else {})).sae
    sae.save_model(tmp_path)
    (x,) = planted_batches(1)
    torch.testing.assert_close(load_sae(tmp_path).encode(x), load_sae(sae).encode(x))


@pytest.fixture
def copied_run(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'none' does not exist"):
        load_sae("none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file, not a run's folder"):
        load_sae(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"holds no cfg\.json"):
        load_sae(tmp_path)


def test_config_without_weights(copied_run: Path) -> None:
    (copied_run / "sae_weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has a cfg\.json but no sae_weights\.safetensors"):
        load_sae(copied_run)


@pytest.mark.parametrize("keep", [0, 5, 100, -1000])
def test_weights_cut_short(copied_run: Path, keep: int) -> None:
    weights = copied_run / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="are damaged or cut short"):
        load_sae(copied_run)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("\xff", "is not valid JSON"),
        ("{}", "cannot be loaded"),
        (
            '{"architecture": "gated", "d_in": "x", "d_sae": 256}',
            r"'d_in' in '.*cfg\.json' must be a whole number, not 'x'",
        ),
    ],
)
def test_damaged_config(copied_run: Path, text: str, sentence: str) -> None:
    (copied_run / "cfg.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=sentence):
        load_sae(copied_run)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_unknown_architecture_in_a_config(copied_run: Path) -> None:
    edit_config(copied_run, architecture="gatd")
    with pytest.raises(UnknownArchitecture, match="Did you mean 'gated'"):
        load_sae(copied_run)


def test_width_that_the_weights_do_not_have(copied_run: Path) -> None:
    edit_config(copied_run, d_sae=128)
    with pytest.raises(ArtifactError, match="size mismatch"):
        load_sae(copied_run)


def test_tensors_that_do_not_fit_are_listed(copied_run: Path) -> None:
    path = copied_run / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["surplus"] = tensors.pop("b_mag")
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=r'Missing key.*"b_mag".*Unexpected key.*"surplus"'):
        load_sae(copied_run)
