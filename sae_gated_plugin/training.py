"""Configuration in, a run's folder out: SAELens's own runner, then an evaluation.

A run's folder: `cfg.json` and `sae_weights.safetensors` (SAELens's inference form),
`sparsity.safetensors`, `runner_cfg.json`, `run.yaml` (the configuration, overrides applied),
`results.json`, `checkpoints/`.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens import logger as sae_lens_logger
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer

from . import configuration
from .configuration import RunConfig
from .errors import ConfigError, TrainingDiverged
from .evaluation import evaluate, open_text
from .hook_points import HookPoint

RUN_FILE = "run.yaml"
RESULTS_FILE = "results.json"
_RUN_FILES = (
    RUN_FILE,
    RESULTS_FILE,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    RUNNER_CFG_FILENAME,
    "checkpoints",
)

Trainer = SAETrainer[TrainingSAE[TrainingSAEConfig], TrainingSAEConfig]


def train(
    config: RunConfig, output: str | Path | None = None, *, eval_tokens: int | None = None
) -> dict[str, Any]:
    """Train an SAE, write its run folder, evaluate it; return what `results.json` holds.

    output: the run's folder; default the configuration's `output_path`. eval_tokens: how many
    tokens of the dataset's validation or test split to measure on; default `evaluation_tokens`.

    Before anything is trained, raises ConfigError for a folder that already holds a run, a model,
    hook point or dataset that does not exist, or a d_in that does not fit. Raises TrainingDiverged,
    naming the step and the last good checkpoint, when the numbers stop being finite.
    """
    started = time.perf_counter()
    if output is not None or config.runner.output_path is not None:
        config = config.with_output(output or config.runner.output_path or "")
    else:
        raise ConfigError("'output_path' is null and no --output is given: a run needs a folder.")
    cfg = config.runner
    folder = Path(str(cfg.output_path))
    _require_free(folder)
    _require_inputs(cfg)
    runner = Runner(config)
    _claim(folder, config)
    try:
        runner.run()
    finally:
        if cfg.logger.log_to_wandb and wandb.run is not None:
            wandb.finish(exit_code=1)  # SAELens has finished it already unless training failed
    results = evaluate(
        folder,
        model=runner.model,
        tokens=eval_tokens or evaluation_tokens(cfg),
        device=cfg.device,
    )
    results["seconds"] = round(time.perf_counter() - started, 2)
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def evaluation_tokens(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """SAELens's own number of tokens to evaluate on."""
    prompts = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
    return cfg.n_eval_batches * prompts * cfg.context_size


def quickstart(overrides: Sequence[str] = (), output: str | Path | None = None) -> dict[str, Any]:
    """Train and evaluate on the tiny language model and the text that the package carries.

    Needs no network. output: default `quickstart`, or `quickstart-2`, … if that is taken.
    """
    packaged = Path(str(resources.files("sae_gated_plugin") / configuration.QUICKSTART))
    config = configuration.load(packaged / "quickstart.yaml", overrides)
    if output is None and "output_path" not in config.mapping:
        number = 1
        while (output := Path("quickstart" if number == 1 else f"quickstart-{number}")).exists():
            number += 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset is not tokenized")  # nor need it be
        return train(config, output)


class Runner(LanguageModelSAETrainingRunner):
    """SAELens's runner, which checks before it starts and stops before bad numbers spread."""

    def __init__(self, config: RunConfig):
        cfg = config.runner
        point = HookPoint.load(
            cfg.model_name,
            cfg.model_class_name,
            cfg.hook_name,
            cfg.hook_head_index,
            device=cfg.llm_device or cfg.device,
            from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
        )
        point.require_width(cfg.sae.d_in)
        # SAELens's runner for language models ignores cfg.seed: weights and the order of
        # activations come from torch's global generator.
        torch.manual_seed(cfg.seed)
        try:
            with without_override_warning():
                super().__init__(cfg, override_model=point.model)
        except (ValueError, OSError) as error:
            raise ConfigError(f"The run cannot start: {error}") from error

    def run_trainer_with_interruption_handling(self, trainer: Trainer) -> Any:
        """Train; on an interrupt or on numbers that are not finite, save what there is."""
        stop_before_bad_steps(trainer)
        handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
        try:
            return super().run_trainer_with_interruption_handling(trainer)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error} {self._save_last_good(trainer)}") from error
        except (KeyboardInterrupt, InterruptedException) as error:
            trainer.save_checkpoint(str(trainer.n_training_samples))
            raise KeyboardInterrupt(f"Weights are in '{self._checkpoint(trainer)}'.") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers:  # SAELens leaves its own behind
                    signal.signal(number, handler or signal.SIG_DFL)

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Save SAELens's runner state; unlike SAELens, also into a folder that is not there yet."""
        if checkpoint_path is not None:
            checkpoint_path.mkdir(parents=True, exist_ok=True)
        super().save_checkpoint(checkpoint_path)

    def _save_last_good(self, trainer: Trainer) -> str:
        """Checkpoint the weights, which are those before the bad step; return a sentence."""
        if not all(p.isfinite().all() for p in self.sae.parameters()):
            return "The weights are not finite either; no checkpoint was written."
        trainer.save_checkpoint(str(trainer.n_training_samples))
        return f"The last good weights are in '{self._checkpoint(trainer)}'."

    def _checkpoint(self, trainer: Trainer) -> Path:
        return Path(str(self.cfg.checkpoint_path)) / str(trainer.n_training_samples)


def stop_before_bad_steps(trainer: Trainer) -> None:
    """Make a trainer raise TrainingDiverged before it uses gradients that are not finite.

    Weights that were good before a bad step are good after it, whatever the architecture.
    """

    def stop_at_bad_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
        # A sum is finite if every term is: one pass over the numbers and no copy.
        sums = [g.sum(dtype=torch.float32) for g in gradients if g is not None]
        if sums and not torch.stack(sums).isfinite().all():
            raise TrainingDiverged(
                f"Training stopped before step {trainer.n_training_steps}: "
                "the loss or its gradients are not finite."
            )

    trainer.optimizer.register_step_pre_hook(stop_at_bad_gradients)


def _require_inputs(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Raise ConfigError for text, weights or cached activations that are not there."""
    open_text(cfg.dataset_path, "train")
    paths = {
        name: getattr(cfg, name) for name in ("from_pretrained_path", "resume_from_checkpoint")
    }
    if cfg.use_cached_activations:
        paths["cached_activations_path"] = cfg.cached_activations_path
    for name, path in paths.items():
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name} '{path}' does not exist.")


def _require_free(folder: Path) -> None:
    """Raise ConfigError if the folder is a file or already holds a run."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"Output folder '{folder}' is a file.")
    present = [name for name in _RUN_FILES if (folder / name).exists()]
    if present:
        raise ConfigError(
            f"Output folder '{folder}' already holds a run ({', '.join(present)}); "
            "nothing was changed. Choose another with --output."
        )


def _claim(folder: Path, config: RunConfig) -> None:
    """Write run.yaml, which makes the folder this run's; of two at once, one succeeds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / RUN_FILE).open("x", encoding="utf-8") as file:
            file.write(config.to_yaml())
    except FileExistsError:
        _require_free(folder)
        raise
    except OSError as error:
        raise ConfigError(f"Output folder '{folder}' cannot be written: {error}") from error


@contextmanager
def without_override_warning() -> Generator[None]:
    """Keep SAELens from saying that the run is not reproducible: the model is its config's own."""

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "passed in a model" not in message and "override_model overrides" not in message

    sae_lens_logger.addFilter(keep)
    try:
        yield
    finally:
        sae_lens_logger.removeFilter(keep)
