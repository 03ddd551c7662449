"""SAELens's runner, with checkpoints between steps and an exact resume."""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import wandb
from sae_lens import LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens.training.prefetch import PrefetchingIterator
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config.run import RunConfig
from ..distributed.ranks import RankLost, Ranks, is_loss, loss
from ..distributed.shards import WHOLE, LatentShards
from ..distributed.state import share_of, whole
from ..errors import ArtifactError, ConfigError, Interrupted, TrainingDiverged
from ..files import HIDDEN
from ..model.hook_point import HookPoint
from ..model.text import local_text
from ..saelens_internals import (
    InterruptedException,
    between_steps,
    fuse_adam,
    keep_scaling_factor,
    take_checkpoints,
    without_override_warning,
)
from . import checkpoints, together, wandb_log
from .activation_stream import ActivationStream
from .divergence import DivergenceGuard, Trainer, announce_the_end
from .fine_tuning import keep_function_when_scaled
from .parts import GENERATORS, Parts, coefficients, unrounded
from .progress import Progress
from .run_folder import begun_with, how_to_go_on, only_measuring_is_left
from .signals import Signals

logger = logging.getLogger("sae_gated_plugin")

#: What to do about a batch whose numbers are not finite.
OnDivergence = Literal["stop", "skip"]

#: A checkpoint to start from, and its manifest.
Start = tuple[Path, dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """How to train, beside what the configuration says; `train` explains them."""

    eval_tokens: int | None = None
    on_divergence: OnDivergence = "stop"
    keep_checkpoints: int = checkpoints.KEPT
    fused_adam: bool | None = None

    def __post_init__(self) -> None:
        if self.on_divergence not in ("stop", "skip"):
            raise ConfigError(f"on_divergence is '{self.on_divergence}'; allowed: stop, skip.")


class Runner(LanguageModelSAETrainingRunner):
    """SAELens's runner, which checks before it starts, stops before bad numbers spread, and whose
    checkpoints hold everything that the next step depends on.

    start: what to continue from, beside `resume_from_checkpoint`, which SAELens reads itself.
    ranks: the processes that train together, of which this is one.
    """

    def __init__(
        self,
        config: RunConfig,
        start: Start | None = None,
        options: Options | None = None,
        ranks: Ranks | None = None,
    ):
        cfg = config.runner
        self.options, self.ranks = options or Options(), ranks or Ranks()
        together.require_supported(cfg, self.ranks)
        self._config, self._start = config, start
        self._began = time.perf_counter() - (start[1]["seconds"] if start else 0.0)
        self._go_on = how_to_go_on(str(cfg.output_path), self.ranks.size)
        self._signals = Signals(quiet=self.ranks.rank > 0)
        self._held = ExitStack()  # the signals, from the first step until the SAE is saved
        self.begun = self.saved = False
        trained = together.fine_tuned_sae(cfg, self.ranks, weights=start is None)
        point = HookPoint.for_training(cfg)
        # SAELens's runner for language models ignores cfg.seed: weights and the order of
        # activations come from torch's global generator.
        torch.manual_seed(cfg.seed)
        try:
            if trained is None:  # not `or`: the length of an SAE is deprecated
                trained = together.new_sae(cfg, self.ranks)
            with without_override_warning():
                super().__init__(
                    cfg,
                    override_model=point.model,
                    override_dataset=local_text(cfg.dataset_path),
                    override_sae=trained,
                )
        except (ValueError, OSError) as error:
            raise ConfigError(f"The run cannot start: {error}") from error
        together.read_together(self.activations_store, self.ranks)
        self._shards: LatentShards = getattr(self.sae, "shards", WHOLE)
        self._stream = ActivationStream(self.activations_store, int(cfg.prefetch_llm_batches))
        self._stream.before_model = self._before_model

    def seconds(self) -> float:
        """Seconds of work in this run, in the processes that were interrupted too."""
        return round(time.perf_counter() - self._began, 2)

    def run(self) -> TrainingSAE[Any]:
        """Train and save the final SAE. Raises as `train` does."""
        state: dict[str, Tensor] = {}
        if self._start is not None:
            path, manifest = self._start
            state = load_file(path / checkpoints.EXACT_STATE_FILE)
            if self.ranks.size > 1:
                state = together.own_state(state, self.sae)
                self.cfg.resume_from_checkpoint = self._share_of(path)
            if self.cfg.logger.log_to_wandb and manifest["wandb_id"]:
                self.cfg.logger.wandb_id = manifest["wandb_id"]
                os.environ.setdefault("WANDB_RESUME", "allow")
        self._parts = Parts(state)
        # Before SAELens's own start: it begins to prefetch before it reads a checkpoint.
        self._parts.add("stream", self._stream)
        self._parts.add("generator", GENERATORS)
        self._upload = wandb_log.uploader(self.cfg.logger)
        try:
            with wandb_log.around(self, self._go_on), self._held:
                super().run()
        except ArtifactError as error:
            raise ArtifactError(f"{error} Make room, then {self._go_on}") from error
        except RuntimeError as error:
            if self.ranks.size == 1 or not is_loss(error):
                raise
            raise RankLost(f"{loss(self.ranks.size, error)} Then {self._go_on}") from error
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
        self._parts.add("sae", unrounded(trainer.sae))
        self._parts.add("coefficient", coefficients(trainer))
        if self._start is not None:
            self.cfg.resume_from_checkpoint = str(self._start[0])
        if self.ranks.size > 1:
            together.report_all(trainer)
        keep_function_when_scaled(trainer)
        keep_scaling_factor(trainer)
        announce_the_end(trainer)
        fuse_adam(trainer, self.options.fused_adam)
        skip = self.options.on_divergence == "skip"
        guard = self._guard = DivergenceGuard(trainer, skip)
        self._fill, due = take_checkpoints(trainer, partial(self._save, trainer))

        def save_if_due() -> None:
            passed = [tokens for tokens in due if trainer.n_training_samples > tokens]
            del due[: len(passed)]
            self._stop_if_asked()
            if passed and trainer.n_training_steps and not guard.collapsed_steps:
                trainer.save_checkpoint(str(trainer.n_training_samples))

        between_steps(trainer, save_if_due)
        wandb_log.shield(trainer)
        self._room = Path(str(self.cfg.output_path)) / f"{HIDDEN}room-{self.ranks.rank}"
        room = checkpoints.reserving(self._room, [trainer.sae])
        self.ranks.in_turn(lambda: self._held.enter_context(room))
        self._held.enter_context(self._signals)
        self._progress = Progress(trainer, guard=guard if self.ranks.size > 1 else None)
        self.begun = True
        try:
            with self._progress.shown():
                return trainer.fit()
        except InterruptedException:
            where = self._save_good(trainer)
            saved = f"All is saved in '{where}'" if where else "Nothing was trained yet"
            sentence = f"{saved}; {self._go_on}"
            raise Interrupted(self._signals.number, sentence) from None
        except TrainingDiverged as error:
            collapsed = guard.collapsed_steps > 0
            where = self._newest() if collapsed else self._save_good(trainer)
            kept = f"The last good weights are in '{where}'" if where else "There is no checkpoint"
            if where and not collapsed and not skip:
                kept += f"; to leave such batches out, {self._go_on} --on-divergence skip"
            raise TrainingDiverged(error.step, f"{error.reason} {kept}.") from error

    def save_final_sae(
        self, sae: TrainingSAE[Any], output_path: str, log_feature_sparsity: Tensor | None = None
    ) -> None:
        """As in SAELens, but whole or not at all, and only then uploaded."""
        self._room.unlink(missing_ok=True)
        sparsity = log_feature_sparsity
        if sparsity is not None:
            sparsity = self._shards.joined(sparsity)
        save = super().save_final_sae

        def write() -> None:
            with checkpoints.writing_final(Path(output_path)) as new:
                save(sae, str(new), sparsity)

        wandb_log.remember_run(self.cfg.logger)
        with whole(sae):
            self.ranks.first(write)
        self.saved = True
        self._held.close()
        if self.ranks.rank == 0:
            self._upload(self, Path(output_path), ["final_model"])

    def model_to_itself(self) -> AbstractContextManager[None]:
        """Nothing is prefetched meanwhile, by which the model or the stream would change."""
        provider = self._provider
        return provider.paused() if isinstance(provider, PrefetchingIterator) else nullcontext()

    def _save(self, trainer: Trainer, checkpoint_name: str) -> None:
        """SAELens's checkpoint, with what it leaves out, then uploaded, and old ones removed."""
        path = Path(str(self.cfg.checkpoint_path)) / checkpoint_name
        about = {
            "steps": trainer.n_training_steps,
            "seconds": self.seconds(),
            **begun_with(self._config, self.ranks.size),
            "wandb_id": wandb.run.id if wandb.run is not None else None,
        }
        final = not checkpoint_name.isdecimal()  # no training continues from it
        self._stream.trained_on = self._guard.trained_on

        def write() -> None:
            with checkpoints.writing(path, about) as new:
                self._fill(new.name, new.parent)
                if not final:
                    save_file(self._parts.state_dict(), new / checkpoints.EXACT_STATE_FILE)

        try:
            with self.model_to_itself(), whole(trainer.sae, trainer):
                self.ranks.first(write)
        except ArtifactError as error:
            if not final:
                raise
            logger.warning("%s The SAE itself comes next.", error)
        else:
            if self.ranks.rank == 0:
                self._upload(trainer, path)
                checkpoints.prune(path.parent, self.options.keep_checkpoints)

    def _save_good(self, trainer: Trainer) -> Path | None:
        """Save a state between two steps, if it is worth it; return the newest checkpoint."""
        finite = all(parameter.isfinite().all() for parameter in self.sae.parameters())
        if trainer.n_training_steps and not self.ranks.largest(not finite):
            trainer.save_checkpoint(str(trainer.n_training_samples))
        return self._newest()

    def _newest(self) -> Path | None:
        return next(reversed(checkpoints.numbered(Path(str(self.cfg.checkpoint_path)))), None)

    def _before_model(self) -> None:
        self._stop_if_asked()
        if self.begun and not self.cfg.prefetch_llm_batches:  # else the steps go on meanwhile
            self._progress.reading(self._stream.filled)

    def _share_of(self, checkpoint: Path) -> str:
        """Make what this rank reads of a checkpoint, for as long as the run lasts."""
        folder = Path(self._held.enter_context(TemporaryDirectory()))
        share_of(checkpoint, folder, self.sae, without=checkpoints.EXACT_STATE_FILE)
        return str(folder)

    def _stop_if_asked(self) -> None:
        self._signals.number = self.ranks.largest(self._signals.number)
        if self._signals.number:
            raise InterruptedException
