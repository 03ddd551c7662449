"""What SAELens's README and documentation tell its users to do, with this plugin's SAEs.

Names are imported from sae_lens, as there; `gated` and `prolu` come out of its registry. Measuring
with `sae_lens.evals` and hooked models are in test_promises_in_models.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from datasets import load_from_disk
from sae_lens import (
    SAE,
    ActivationsStore,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    PretokenizeRunner,
    PretokenizeRunnerConfig,
    TrainingSAE,
    upload_saes_to_huggingface,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.load_model import load_model
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from support.local_hub import LocalHub
from support.runs import D_IN, HOOK_NAME, QUICKSTART
from torch import Tensor

MODEL: dict[str, Any] = {
    "model_name": str(QUICKSTART / "model"),
    "model_class_name": "AutoModelForCausalLM",
    "dataset_path": str(QUICKSTART / "text"),
    "context_size": 64,
    "prepend_bos": False,
    "training_tokens": 12_800,  # 50 steps
}
TRAINING: dict[str, Any] = {
    "dataset_trust_remote_code": False,
    "train_batch_size_tokens": 256,
    "store_batch_size_prompts": 8,
    "n_batches_in_buffer": 16,
    "lr": 2e-3,
    "checkpoint_path": None,
    "output_path": None,
}
each = pytest.mark.parametrize("architecture", ["gated", "prolu"])


def config(architecture: str, **options: Any) -> Any:
    """The training config that SAELens's registry has under this name."""
    shape = {"d_in": D_IN, "d_sae": 256, "l1_coefficient": 0.3}
    return get_sae_training_class(architecture)[1](**{**shape, **options})


def runner(sae: Any, **options: Any) -> LanguageModelSAETrainingRunner:
    settings: dict[str, Any] = {
        **MODEL,
        **TRAINING,
        "hook_name": HOOK_NAME,
        "is_dataset_tokenized": False,
        "logger": LoggingConfig(log_to_wandb=False),
        **options,
    }
    return LanguageModelSAETrainingRunner(LanguageModelSAERunnerConfig(sae=sae, **settings))


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("AutoModelForCausalLM", MODEL["model_name"], "cpu")


@pytest.fixture(scope="module")
def x(model: Any) -> Tensor:
    """Activations at the hook point, (512, 128)."""
    store = ActivationsStore.from_config(model, runner(config("gated")).cfg)
    return torch.cat([store.next_batch(), store.next_batch()]).float()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of an SAE of this architecture, saved for inference, with a checkpoint beside it."""
    folders: dict[str, Path] = {}

    def train(architecture: str) -> Path:
        if architecture not in folders:
            folder = tmp_path_factory.mktemp(architecture)
            saving = {"checkpoint_path": str(folder / "checkpoints"), "n_checkpoints": 1}
            sae = runner(config(architecture), **saving, output_path=str(folder / "out")).run()
            sae.save_inference_model(folder / "sae")
            folders[architecture] = folder
        return folders[architecture]

    return train


def explained(sae: Any, x: Tensor) -> float:
    """The share of the variance that reconstructions explain."""
    with torch.no_grad():
        return float(1 - (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


def unit_norm(sae: Any) -> None:
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.cfg.d_sae))


@each
def test_train_an_sae_and_save_it_for_inference(
    architecture: str, trained: Callable[[str], Path], x: Tensor
) -> None:
    folder = trained(architecture)
    saved, written = (SAE.load_from_disk(folder / name) for name in ("sae", "out"))
    assert saved.cfg.architecture() == architecture
    assert torch.equal(saved.encode(x), written.encode(x))
    assert explained(saved, x) > 0.3
    assert (saved.encode(x) > 0).float().mean() < 0.9
    unit_norm(saved)


@each
def test_fine_tune_a_saved_sae(
    architecture: str, trained: Callable[[str], Path], x: Tensor
) -> None:
    before = SAE.load_from_disk(trained(architecture) / "sae")
    tuned = runner(config(architecture), from_pretrained_path=str(trained(architecture) / "sae"))
    assert explained(tuned.sae, x) == pytest.approx(explained(before, x), abs=1e-5)
    after = tuned.run()
    assert explained(after, x) > explained(before, x)
    unit_norm(after)


@each
def test_resume_from_a_checkpoint(
    architecture: str, trained: Callable[[str], Path], x: Tensor
) -> None:
    folder = trained(architecture)
    (checkpoint,) = (folder / "checkpoints").glob("*/*")
    again = runner(config(architecture), resume_from_checkpoint=str(checkpoint))
    sae = again.run()
    whole, half = SAE.load_from_disk(folder / "sae"), TrainingSAE.load_from_disk(checkpoint)
    distance = (sae.W_dec - whole.W_dec).norm() / (half.W_dec - whole.W_dec).norm()
    assert distance < 0.5  # SAELens's store fills its buffer anew
    assert explained(sae, x) == pytest.approx(explained(whole, x), abs=0.02)
    unit_norm(sae)


@each
def test_train_with_a_trainer_of_ones_own_on_ones_own_activations(
    architecture: str, x: Tensor
) -> None:
    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield x[torch.randint(len(x), (128,), generator=generator)]

    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(config(architecture).to_dict())
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=128 * 60,
            train_batch_size_samples=128,
            lr=2e-3,
            lr_end=2e-4,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=batches(),
    )
    before = explained(sae, x)
    assert trainer.fit() is sae
    assert explained(sae, x) > max(0.3, before)
    unit_norm(sae)


@each
def test_train_several_saes_at_once_on_two_layers(architecture: str, tmp_path: Path) -> None:
    layers = {"low": "model.layers.1", "high": HOOK_NAME, "theirs": HOOK_NAME}
    saes = {
        "low": config(architecture),
        "high": config(architecture, l1_coefficient=1.0),
        "theirs": sae_lens.TopKTrainingSAEConfig(d_in=D_IN, d_sae=256, k=8),
    }
    options = {**MODEL, **TRAINING, "output_path": str(tmp_path)}
    cfg = MultiSAETrainingRunnerConfig(
        saes=saes, hook_names=layers, logger=LoggingConfig(log_to_wandb=False), **options
    )
    MultiSAETrainingRunner(cfg).run()
    for name, hook_name in layers.items():
        sae = SAE.load_from_disk(tmp_path / name)
        assert sae.cfg.metadata.hook_name == hook_name
        if name != "theirs":
            assert sae.cfg.architecture() == architecture
            unit_norm(sae)


@each
def test_train_on_what_a_transcoder_reads_and_writes(architecture: str, tmp_path: Path) -> None:
    """An SAE on each side of an MLP, beside one of SAELens's transcoders, which works as ever."""
    for side in ("post_attention_layernorm", "mlp"):
        sae = runner(config(architecture), hook_name=f"{HOOK_NAME}.{side}").run()
        assert sae.cfg.metadata.hook_name.endswith(side)
        unit_norm(sae)
    torch.manual_seed(0)
    shape: Any = {"d_in": D_IN, "d_out": 64, "d_sae": 256, "apply_b_dec_to_input": False}
    transcoder = sae_lens.Transcoder(sae_lens.TranscoderConfig(**shape))
    transcoder.save_model(tmp_path)
    loaded, given = SAE.load_from_disk(tmp_path), torch.randn(9, D_IN)
    assert type(loaded) is sae_lens.Transcoder
    assert loaded(given).shape == (9, 64)
    assert torch.equal(loaded(given), transcoder(given))


@each
def test_pretokenize_a_dataset_and_train_on_it(architecture: str, tmp_path: Path) -> None:
    made_of = PretokenizeRunnerConfig(
        tokenizer_name=MODEL["model_name"],
        dataset_path=MODEL["dataset_path"],
        split="train[:3%]",
        num_proc=1,
        context_size=64,
        begin_batch_token=None,
        sequence_separator_token=None,
        save_path=str(tmp_path / "tokens"),
    )
    tokens = PretokenizeRunner(made_of).run()
    assert len(load_from_disk(tmp_path / "tokens")) == len(tokens)
    options = {"is_dataset_tokenized": True, "dataset_path": str(tmp_path / "tokens")}
    settings = {**MODEL, **TRAINING, **options, "hook_name": HOOK_NAME}
    cfg = LanguageModelSAERunnerConfig(
        sae=config(architecture), logger=LoggingConfig(log_to_wandb=False), **settings
    )
    made = LanguageModelSAETrainingRunner(cfg, override_dataset=tokens)
    unit_norm(made.run())


@each
def test_cache_activations_and_train_on_them(architecture: str, tmp_path: Path, x: Tensor) -> None:
    cache = CacheActivationsRunnerConfig(
        **MODEL,
        hook_name=HOOK_NAME,
        d_in=D_IN,
        model_batch_size=10,
        new_cached_activations_path=str(tmp_path),
        buffer_size_gb=0.0033,  # SAELens fills its buffers: two of 6400 tokens
        device="cpu",
    )
    CacheActivationsRunner(cache).run()
    cached = {"use_cached_activations": True, "cached_activations_path": str(tmp_path)}
    sae = runner(config(architecture), **cached, store_batch_size_prompts=10).run()
    assert explained(sae, x) > 0.3
    unit_norm(sae)


@each
@pytest.mark.parametrize("how", [{"autocast": True, "autocast_lm": True}, {"dtype": "bfloat16"}])
def test_follow_the_advice_for_faster_training(
    architecture: str, how: dict[str, Any], x: Tensor
) -> None:
    sae_options = {"dtype": how["dtype"]} if "dtype" in how else {}
    sae = runner(config(architecture, **sae_options), **how).run().to(torch.float32)
    assert explained(sae, x) > 0.3


@each
def test_upload_it_to_the_hub_and_load_it_from_there(
    architecture: str,
    trained: Callable[[str], Path],
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    sae = SAE.load_from_disk(trained(architecture) / "sae")
    with LocalHub() as server:
        server.patch_client(monkeypatch, tmp_path / "home")
        saes: Any = {"object": sae, "folder": trained(architecture) / "sae"}
        upload_saes_to_huggingface(saes, hf_repo_id="tester/saes")
        for name in saes:
            loaded = SAE.from_pretrained("tester/saes", name)
            assert torch.equal(loaded.encode(x), sae.encode(x))
