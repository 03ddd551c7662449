"""SAEs side by side in SAELens's trainer: one that fails stops no other, checkpoints are exact."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from torch import Tensor

from ..errors import Interrupted
from ..files import HIDDEN, write_json
from ..saelens_internals import (
    between_steps_of_many,
    drop_sae,
    fuse_adam,
    keep_scaling_factors,
    replace_step,
    take_thresholds,
)
from ..training import wandb_log
from ..training.checkpoints import reserving
from ..training.divergence import DivergenceGuard, announce_the_end, nothing
from ..training.fine_tuning import keep_function_when_scaled
from ..training.parts import Parts, coefficients, unrounded
from ..training.progress import Progress
from ..training.signals import Signals
from .folder import PointFolder, disk_errors

#: Keys in which SAEs of one stream may differ: each has an optimizer of its own.
OWN = (
    *("lr", "lr_scheduler_name", "lr_end", "lr_warm_up_steps", "lr_decay_steps"),
    *("n_restart_cycles", "adam_beta1", "adam_beta2"),
)

#: What is said when a signal has stopped a sweep.
GO_ON = "What is done is kept; the same command goes on."


def fit_side_by_side(
    trainer: MultiSAETrainer,
    places: dict[str, PointFolder],
    parts: Parts,
    checkpoints: Path,
    signals: Signals,
    checkpoint: str | None = None,
    begin: Callable[[], None] = lambda: None,
    trained_on: Callable[[Tensor], None] = lambda batch: None,
    fused_adam: bool | None = None,
    progress: Progress | None = None,
) -> None:
    """Train, then save each SAE in its place; its exception is its point's failure.

    parts: has what the next step depends on beside the SAEs, which are added here. checkpoints:
    the folder of those that are due, and of one when a signal comes; Interrupted is then raised.
    checkpoint: the one that `trainer` was read from. begin: called last before the first step.
    trained_on: called with each batch, (N, d_in). fused_adam: as of `train`. progress: what is
    shown meanwhile, default a new one.
    """
    failed: list[str] = []

    def isolated(name: str, single: Any) -> Any:
        step = single.step

        def attempt(batch: Tensor) -> TrainStepOutput:
            samples = single.n_training_samples + len(batch)
            trained_on(batch)
            with places[name].isolated():
                return step(batch)
            failed.append(name)
            single.n_training_samples = samples  # SAELens's loop ends by this count
            return nothing(batch)

        return attempt

    _own_schedules(trainer, places, checkpoint)
    if checkpoint:
        keep_scaling_factors(trainer)
    for name, single in trainer.trainers.items():
        parts.add(f"{name}/sae", unrounded(single.sae))
        parts.add(f"{name}/coefficient", coefficients(single))
        keep_function_when_scaled(single)
        announce_the_end(single)
        fuse_adam(single, fused_adam)
        DivergenceGuard(single)
        replace_step(single, isolated(name, single))
    due = take_thresholds(trainer)

    def between_steps(final: bool) -> None:
        for name in failed:
            drop_sae(trainer, name)
        if not trainer.trainers:
            raise _AllFailed
        stopped = signals.number and not final
        passed = [tokens for tokens in due if trainer.n_training_samples > tokens]
        del due[: len(passed)]
        path = checkpoints / str(trainer.n_training_samples)
        new = trainer.n_training_steps and not (path / RUNNER_CFG_FILENAME).exists()
        if new and (passed or stopped):
            with disk_errors(f"Checkpoint '{path}'", RuntimeError):
                trainer.save_checkpoint(checkpoint_name=path.name)
        if stopped:
            raise Interrupted(signals.number, GO_ON)

    between_steps_of_many(trainer, between_steps)
    begin()
    room = checkpoints.with_name(f"{HIDDEN}room-{checkpoints.name}")
    with signals, reserving(room, trainer.saes.values()):
        with contextlib.suppress(_AllFailed), (progress or Progress(trainer)).shown():
            trainer.fit()
        room.unlink(missing_ok=True)
        for name, single in trainer.trainers.items():
            with places[name].isolated():
                _save(single, places[name])


class _AllFailed(Exception):
    """No SAE is left to train."""


def _own_schedules(
    trainer: MultiSAETrainer, places: dict[str, PointFolder], checkpoint: str | None
) -> None:
    """Give each SAE the optimizer of its own configuration: SAELens has one setting for all."""
    for name, single in trainer.trainers.items():
        own = places[name].point.config.runner.to_sae_trainer_config()
        cfg = dataclasses.replace(single.cfg, **{key: getattr(own, key) for key in OWN})
        if cfg == single.cfg:
            continue
        trainer.trainers[name] = SAETrainer(cfg, single.sae, data_provider=iter(()))
        if checkpoint:
            trainer.trainers[name].load_trainer_state(Path(checkpoint) / name)


def only_checkpoint(path: Path) -> None:
    """Remove the checkpoints beside this one."""
    for other in path.parent.iterdir():
        if other != path:
            shutil.rmtree(other)


def _save(trainer: Any, place: PointFolder) -> None:
    def fill(new: Path) -> None:
        trainer.sae.save_inference_model(str(new))
        save_file({"sparsity": trainer.log_feature_sparsity}, new / SPARSITY_FILENAME)
        wandb_log.remember_run(place.point.config.runner.logger)
        write_json(new / RUNNER_CFG_FILENAME, place.point.config.runner.to_dict())

    place.write(fill)
