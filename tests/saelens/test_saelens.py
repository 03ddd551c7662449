"""SAELens as the host: its runners, trainer, loaders and hooked models with our architectures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from sae_lens.training.sae_trainer import SAETrainer
from support.interpreter import Interpreter
from support.runs import D_IN, HOOK_NAME, QUICKSTART

from sae_gated_plugin.architectures.gated import (
    GatedSAE,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
)
from sae_gated_plugin.architectures.prolu import (
    ProLUSAE,
    ProLUTrainingSAE,
    ProLUTrainingSAEConfig,
)

SHAPE: dict[str, Any] = {"d_in": D_IN, "d_sae": 256}
CONFIGS = {
    "gated": lambda: GatedTrainingSAEConfig(**SHAPE, l1_coefficient=0.3),
    "prolu": lambda: ProLUTrainingSAEConfig(**SHAPE, l1_coefficient=0.3),
    "plain gated": lambda: sae_lens.GatedTrainingSAEConfig(**SHAPE, l1_coefficient=0.3),
}
CLASSES = {"gated": GatedTrainingSAE, "prolu": ProLUTrainingSAE, "plain gated": GatedTrainingSAE}
INFERENCE = {"gated": GatedSAE, "prolu": ProLUSAE, "plain gated": GatedSAE}
each = pytest.mark.parametrize("name", CONFIGS)


def quiet() -> LoggingConfig:
    return LoggingConfig(log_to_wandb=False)


def language_model(**options: Any) -> dict[str, Any]:
    return {
        "model_name": str(QUICKSTART / "model"),
        "model_class_name": "AutoModelForCausalLM",
        "dataset_path": str(QUICKSTART / "text"),
        "dataset_trust_remote_code": False,
        "context_size": 64,
        "prepend_bos": False,
        "training_tokens": 20_480,
        "train_batch_size_tokens": 512,
        "store_batch_size_prompts": 16,
        "n_batches_in_buffer": 64,
        "lr": 2e-3,
        "logger": quiet(),
        **options,
    }


def norm_error(sae: Any) -> float:
    return (sae.W_dec.detach().double().norm(dim=1) - 1).abs().max().item()


def check(sae: Any, name: str) -> None:
    assert type(sae) is CLASSES[name]
    assert norm_error(sae) < 1e-6


@each
def test_language_model_runner_and_loading(name: str, tmp_path: Path) -> None:
    cfg = LanguageModelSAERunnerConfig(
        sae=CONFIGS[name](),
        hook_name=HOOK_NAME,
        is_dataset_tokenized=False,
        output_path=str(tmp_path / "out"),
        checkpoint_path=str(tmp_path / "checkpoints"),
        **language_model(),
    )
    sae = LanguageModelSAETrainingRunner(cfg).run()
    check(sae, name)
    loaded = SAE.load_from_disk(tmp_path / "out")
    assert type(loaded) is INFERENCE[name]
    assert loaded.cfg.metadata.training_architecture_details["decoder"] == "unit_norm"
    x = torch.randn(10, D_IN)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    torch.testing.assert_close(loaded(x), sae(x))


@each
def test_synthetic_runner(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    config.d_in, config.d_sae = 16, 32
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=24, hidden_dim=16),
        sae=config,
        training_samples=20_000,
        batch_size=500,
        eval_samples=2_000,
        output_path=str(tmp_path / "out"),
        checkpoint_path=None,
        logger=quiet(),
    )
    result = SyntheticSAERunner(cfg).run()
    check(result.sae, name)
    assert result.final_eval is not None
    assert type(SAE.load_from_disk(tmp_path / "out")) is INFERENCE[name]


def test_saelens_command_line_trains(tmp_path: Path) -> None:
    options = {
        "--architecture": "prolu",
        "--d_in": D_IN,
        "--d_sae": 256,
        "--gradient": "relu",
        "--model_name": QUICKSTART / "model",
        "--model_class_name": "AutoModelForCausalLM",
        "--hook_name": HOOK_NAME,
        "--dataset_path": QUICKSTART / "text",
        "--dataset_trust_remote_code": "false",
        "--is_dataset_tokenized": "false",
        "--context_size": 64,
        "--prepend_bos": "false",
        "--training_tokens": 10_240,
        "--train_batch_size_tokens": 512,
        "--store_batch_size_prompts": 16,
        "--n_batches_in_buffer": 64,
        "--log_to_wandb": "false",
        "--output_path": tmp_path / "out",
        "--checkpoint_path": tmp_path / "checkpoints",
    }
    command = [sys.executable, "-m", "sae_lens.llm_sae_training_runner"]
    command += [str(part) for pair in options.items() for part in pair]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    sae = SAE.load_from_disk(tmp_path / "out")
    assert type(sae) is ProLUSAE
    assert sae.cfg.metadata.training_architecture_details["gradient"] == "relu"


def test_a_process_without_the_plugin_reads_gated_alike(
    trained_run: Path, tmp_path: Path, interpreter: Interpreter
) -> None:
    x = torch.randn(64, D_IN)
    sae = SAE.load_from_disk(trained_run)
    assert type(sae) is GatedSAE
    torch.save({"x": x, "acts": sae.encode(x), "out": sae(x)}, tmp_path / "expected.pt")
    code = f"""
import sys, torch, sae_lens
assert "sae_gated_plugin" not in sys.modules
sae = sae_lens.SAE.load_from_disk({str(trained_run)!r})
assert type(sae) is sae_lens.GatedSAE, type(sae)
saved = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(sae.encode(saved["x"]), saved["acts"], rtol=1e-5, atol=1e-5)
torch.testing.assert_close(sae(saved["x"]), saved["out"], rtol=1e-5, atol=1e-5)
assert (saved["acts"] > 0).any()
"""
    done = interpreter.run(code, SAE_GATED_PLUGIN_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr


# --- the trainer ----------------------------------------------------------------------------------


def activations(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    while True:
        present = torch.rand(512, 40, generator=generator) < 0.05
        yield (present * torch.rand(512, 40, generator=generator)) @ directions * 3 + 0.5


def trainer_for(sae: Any, steps: int, **options: Any) -> Any:
    cfg = SAETrainerConfig(
        total_training_samples=512 * steps,
        train_batch_size_samples=512,
        lr=3e-3,
        lr_end=3e-4,
        logger=quiet(),
        n_batches_for_norm_estimate=5,
        **options,
    )
    return SAETrainer(cfg=cfg, sae=sae, data_provider=activations(1))


@pytest.mark.parametrize("architecture", ["gated", "prolu"])
@pytest.mark.parametrize(
    "normalization",
    [
        "none",
        "expected_average_only_in",
        "layer_norm",
        "constant_norm_rescale",
        "covariance_whitening",
    ],
)
def test_every_normalisation_trains_folds_and_loads(
    architecture: str, normalization: str, tmp_path: Path
) -> None:
    sae_class, config_class = get_sae_training_class(architecture)
    try:
        cfg = config_class(
            d_in=16, d_sae=64, l1_coefficient=0.1, normalize_activations=normalization
        )
    except ValueError:
        assert normalization == "covariance_whitening"
        pytest.skip("this SAELens has no covariance_whitening")
    torch.manual_seed(0)
    sae = sae_class(cfg)
    x = next(activations(2))
    trainer = trainer_for(sae, 150, save_final_checkpoint=False)
    trainer.fit()
    assert norm_error(sae) < 1e-6  # after the last step and after SAELens's folding
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    folded = {"none", "expected_average_only_in", "covariance_whitening"}
    assert loaded.cfg.normalize_activations == (
        "none" if normalization in folded else normalization
    )
    torch.testing.assert_close(loaded(x), sae(x))
    # On raw activations it explains most of the variance: the folding undid the normalisation.
    unexplained = (loaded(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert unexplained < 0.35


@pytest.mark.parametrize("architecture", ["gated", "prolu"])
def test_resuming_saelens_own_checkpoint(architecture: str, tmp_path: Path) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        config = CONFIGS[architecture]()
        config.d_in, config.d_sae, config.l1_warm_up_steps = 16, 64, 20
        return CLASSES[architecture](config)

    whole = trainer_for(fresh(), 40)
    whole.fit()

    first = trainer_for(fresh(), 40)
    for _ in range(25):
        first.step(next(first.data_provider))
        first.n_training_steps += 1
    first.save_checkpoint("half", tmp_path)
    state = TrainingSAE.load_from_disk(tmp_path / "half")
    assert norm_error(state) < 1e-6

    second = trainer_for(fresh(), 40)
    second.data_provider = first.data_provider
    second.load_trainer_state(tmp_path / "half")
    second.sae.load_weights_from_checkpoint(tmp_path / "half")
    second.fit()
    check(second.sae, architecture)
    if tuple(map(int, sae_lens.__version__.split(".")[:2])) < (6, 54):
        pytest.skip("this SAELens does not resume its own schedulers exactly")
    for name, parameter in whole.sae.named_parameters():
        assert torch.equal(parameter, dict(second.sae.named_parameters())[name]), name


def test_fine_tuning_a_loaded_sae_keeps_unit_norm(tmp_path: Path) -> None:
    sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=16, d_sae=64))
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    trainer_for(again, 10).fit()
    assert norm_error(again) < 1e-6


def test_compiled_training_step_gives_the_same_loss() -> None:
    sae = GatedTrainingSAE(GatedTrainingSAEConfig(d_in=16, d_sae=64, backend="sparse"))
    step = TrainStepInput(next(activations(2)), {"l1": 0.1}, None, 0, False)
    expected = sae.training_forward_pass(step)
    compiled = torch.compile(sae.training_forward_pass, backend="aot_eager")(step)
    torch.testing.assert_close(compiled.loss, expected.loss)
    compiled.loss.backward()
    assert sae.W_enc.grad is not None
