"""SAELens's runner, with checkpoints between steps and an exact resume."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import wandb
from sae_lens import LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens import logger as sae_lens_logger
from sae_lens.training.prefetch import PrefetchingIterator
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config.run import RunConfig
from ..errors import ArtifactError, ConfigError, Interrupted, TrainingDiverged
from ..model.hook_point import HookPoint
from ..results import versions
from . import checkpoints, wandb_log
from .activation_stream import ActivationStream
from .divergence import DivergenceGuard, Trainer, announce_the_end
from .run_folder import RUN_FILE, how_to_go_on, only_measuring_is_left
from .signals import Signals

logger = logging.getLogger("sae_gated_plugin")

#: What to do about a batch whose numbers are not finite.
OnDivergence = Literal["stop", "skip"]

#: A checkpoint to start from, and its manifest.
Start = tuple[Path, dict[str, Any]]


class Runner(LanguageModelSAETrainingRunner):
    """SAELens's runner, which checks before it starts, stops before bad numbers spread, and whose
    checkpoints hold everything that the next step depends on.

    start: what to continue from, beside `resume_from_checkpoint`, which SAELens reads itself.
    """

    def __init__(
        self,
        config: RunConfig,
        start: Start | None = None,
        *,
        on_divergence: OnDivergence = "stop",
        keep_checkpoints: int = checkpoints.KEPT,
    ):
        if on_divergence not in ("stop", "skip"):
            raise ConfigError(f"on_divergence is '{on_divergence}'; allowed: stop, skip.")
        cfg = config.runner
        self._began = time.perf_counter()
        self._mapping = _comparable(config)
        self._start = start
        self._skip = on_divergence == "skip"
        self._keep = keep_checkpoints
        self._signals = Signals()
        self._held = ExitStack()  # the signals, from the first step until the SAE is saved
        self.begun = self.saved = False
        point = HookPoint.for_training(cfg)
        # SAELens's runner for language models ignores cfg.seed: weights and the order of
        # activations come from torch's global generator.
        torch.manual_seed(cfg.seed)
        try:
            with without_override_warning():
                super().__init__(cfg, override_model=point.model)
        except (ValueError, OSError) as error:
            raise ConfigError(f"The run cannot start: {error}") from error
        self._stream = ActivationStream(self.activations_store, int(cfg.prefetch_llm_batches))
        self._stream.before_model = self._stop_if_asked

    def seconds(self) -> float:
        """Seconds of work in this run, in the processes that were interrupted too."""
        before = self._start[1]["seconds"] if self._start else 0.0
        return before + time.perf_counter() - self._began

    def run(self) -> TrainingSAE[Any]:
        """Train and save the final SAE. Raises as `train` does."""
        self._exact: dict[str, Tensor] = {}
        if self._start is not None:
            path, manifest = self._start
            self._exact = load_file(path / checkpoints.EXACT_STATE_FILE)
            # Before SAELens's own start: it begins to prefetch before it reads a checkpoint.
            self._stream.restore(_section(self._exact, "stream."))
            _set_generators(self._exact)
            if self.cfg.logger.log_to_wandb and manifest["wandb_id"]:
                self.cfg.logger.wandb_id = manifest["wandb_id"]
                os.environ.setdefault("WANDB_RESUME", "allow")
        self._uploads = wandb_log.Uploads(self.cfg.logger)
        try:
            with wandb_log.around(self, self._how_to_go_on()), self._held:
                super().run()
        except ArtifactError as error:
            raise ArtifactError(f"{error} Make room, then {self._how_to_go_on()}") from error
        except KeyboardInterrupt:
            if not self.saved:
                raise
            self._signals.number = self._signals.number or signal.SIGINT
        if self._signals.number:  # it came too late to stop the training
            left = only_measuring_is_left(str(self.cfg.output_path))
            raise Interrupted(self._signals.number, left)
        return self.sae

    def run_trainer_with_interruption_handling(self, trainer: Trainer) -> TrainingSAE[Any]:
        """Train; on an interrupt or on bad numbers, save what there is and say how to go on."""
        self._provider = trainer.data_provider
        self._take_up(trainer)
        announce_the_end(trainer)
        guard = self._guard = DivergenceGuard(trainer, self._skip)
        self._due, trainer.checkpoint_thresholds = trainer.checkpoint_thresholds, []
        self._fill, trainer.save_checkpoint = trainer.save_checkpoint, partial(self._save, trainer)
        reset_sparsity = trainer.maybe_reset_sparsity

        def between_steps() -> dict[str, Any]:
            due = [tokens for tokens in self._due if trainer.n_training_samples > tokens]
            del self._due[: len(due)]
            self._stop_if_asked()
            if due and trainer.n_training_steps and not guard.collapsed_steps:
                trainer.save_checkpoint(str(trainer.n_training_samples))
            # The window may have been reset already before the checkpoint was written.
            return reset_sparsity() if trainer.n_frac_active_samples else {}

        # What SAELens's loop calls first: the counters agree with the weights here, and do not
        # yet where SAELens itself saves.
        trainer.maybe_reset_sparsity = between_steps
        wandb_log.shield(trainer)
        self._held.enter_context(self._signals)
        self.begun = True
        try:
            return trainer.fit()
        except _Stop:
            where = self._save_good(trainer)
            saved = f"All is saved in '{where}'" if where else "Nothing was trained yet"
            sentence = f"{saved}; {self._how_to_go_on()}"
            raise Interrupted(self._signals.number, sentence) from None
        except TrainingDiverged as error:
            collapsed = guard.collapsed_steps > 0
            where = self._newest() if collapsed else self._save_good(trainer)
            kept = f"The last good weights are in '{where}'" if where else "There is no checkpoint"
            if where and not collapsed and not self._skip:
                kept += f"; to leave such batches out, {self._how_to_go_on()} --on-divergence skip"
            raise TrainingDiverged(error.step, f"{error.reason} {kept}.") from error

    def save_final_sae(
        self, sae: TrainingSAE[Any], output_path: str, log_feature_sparsity: Tensor | None = None
    ) -> None:
        """As in SAELens, but whole or not at all, and only then uploaded."""
        with checkpoints.writing_final(Path(output_path)) as new:
            super().save_final_sae(sae, str(new), log_feature_sparsity)
        self.saved = True
        self._held.close()
        self._uploads.send(Path(output_path))

    # --- checkpoints ------------------------------------------------------------------------------

    def _save(
        self,
        trainer: Trainer,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """SAELens's checkpoint, with what it leaves out, then uploaded, and old ones removed."""
        path = Path(base_path or str(self.cfg.checkpoint_path)) / checkpoint_name
        about = {
            "steps": trainer.n_training_steps,
            "seconds": round(self.seconds(), 2),
            "run": self._mapping,
            "machine": _machine(self.cfg.device),
            "wandb_id": wandb.run.id if wandb.run is not None else None,
        }
        final = not checkpoint_name.isdecimal()  # no training continues from it
        try:
            with self.model_to_itself(), checkpoints.writing(path, about) as new:
                self._fill(new.name, new.parent, wandb_aliases)
                if not final:
                    save_file(self._exact_state(trainer), new / checkpoints.EXACT_STATE_FILE)
        except ArtifactError as error:
            if not final:
                raise
            logger.warning("%s The SAE itself comes next.", error)
            return self._uploads.forget()
        self._uploads.send(path)
        checkpoints.prune(path.parent, self._keep)

    def _exact_state(self, trainer: Trainer) -> dict[str, Tensor]:
        """What the next step depends on beyond SAELens's checkpoint."""
        sae: Any = trainer.sae
        state = {f"stream.{k}": v for k, v in self._stream.state(self._guard.trained_on).items()}
        state["generator.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            for index, generator in enumerate(torch.cuda.get_rng_state_all()):
                state[f"generator.cuda.{index}"] = generator
        for name, scheduler in trainer.coefficient_schedulers.items():
            state[f"coefficient.{name}"] = torch.tensor(scheduler.value, dtype=torch.float64)
        saved = sae.state_dict()  # SAELens rounds some on saving: exp(log_threshold)
        sae.process_state_dict_for_saving(saved)
        for name, tensor in sae.state_dict().items():
            if name not in saved or not torch.equal(saved[name], tensor):
                state[f"sae.{name}"] = tensor.contiguous()
        return state

    def _take_up(self, trainer: Trainer) -> None:
        """Give back what `_exact_state` took; SAELens has read its own part."""
        trainer.sae.load_state_dict(_section(self._exact, "sae."), strict=False)
        for name, value in _section(self._exact, "coefficient.").items():
            trainer.coefficient_schedulers[name].current_value = float(value)
        self._exact.clear()
        done, thresholds = trainer.n_training_samples, trainer.checkpoint_thresholds
        trainer.checkpoint_thresholds = [tokens for tokens in thresholds if tokens >= done]
        scaler: Any = trainer.activation_scaler
        if scaler.scaling_factor is not None:
            # Before 6.52 SAELens estimates it anew although the checkpoint had it.
            scaler.estimate_scaling_factor = _do_nothing

    def _save_good(self, trainer: Trainer) -> Path | None:
        """Save a state between two steps, if it is worth it; return the newest checkpoint."""
        finite = all(parameter.isfinite().all() for parameter in self.sae.parameters())
        if trainer.n_training_steps and finite:
            trainer.save_checkpoint(str(trainer.n_training_samples))
        return self._newest()

    def _newest(self) -> Path | None:
        return next(reversed(checkpoints.numbered(Path(str(self.cfg.checkpoint_path)))), None)

    def model_to_itself(self) -> AbstractContextManager[None]:
        """Nothing is prefetched meanwhile, by which the model or the stream would change."""
        provider = self._provider
        return provider.paused() if isinstance(provider, PrefetchingIterator) else nullcontext()

    # --- signals ----------------------------------------------------------------------------------

    def _stop_if_asked(self) -> None:
        if self._signals.number:
            raise _Stop

    def _how_to_go_on(self) -> str:
        return how_to_go_on(str(self.cfg.output_path))


def _do_nothing(**_: Any) -> None:
    pass


class _Stop(Exception):
    """A signal has come, and the state is one that can be saved."""


def _section(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _set_generators(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["generator.cpu"])
    for name, generator in _section(state, "generator.cuda.").items():
        if int(name) < torch.cuda.device_count():
            torch.cuda.set_rng_state(generator, int(name))


def _comparable(config: RunConfig) -> dict[str, Any]:
    """A run's configuration as JSON has it, without where its folder lies."""
    mapping = {k: v for k, v in config.mapping.items() if k != "output_path"}
    return json.loads(json.dumps(mapping, default=str))


def _machine(device: str) -> dict[str, Any]:
    """What the last bits of the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {**versions(), "threads": torch.get_num_threads(), "device": name}


def require_unchanged(folder: Path, config: RunConfig, manifest: dict[str, Any]) -> None:
    """Raise ConfigError for a configuration that is not the checkpoint's."""
    then, now = manifest["run"], _comparable(config)
    changed = sorted(key for key in {**then, **now} if then.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"'{folder / RUN_FILE}' was changed ({', '.join(changed)}) since the checkpoint was "
            "written; a run can only be resumed as it was begun. Put it back, or train with the "
            "change in a new folder."
        )


def warn_of_differences(manifest: dict[str, Any], device: str) -> None:
    """Warn where this machine is not the checkpoint's: the weights may differ in the last bits."""
    then, now = manifest["machine"], _machine(device)
    differences = [f"{k} {then.get(k)}, now {v}" for k, v in now.items() if then.get(k) != v]
    if differences:
        logger.warning(
            "The run began with %s: its numbers may differ in their last bits from an "
            "uninterrupted run's.",
            "; ".join(differences),
        )


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
