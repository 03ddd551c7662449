"""Training the points of one stream side by side on the same activations."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import ArtifactError, ConfigError, Interrupted
from ..files import read_json, write_json
from ..measure.evaluate import evaluate_all
from ..model.hook_point import HookPoint
from ..saes.load import load_sae
from ..training import wandb_log
from ..training.divergence import DivergenceGuard, announce_the_end, nothing
from ..training.run_folder import RESULTS_FILE, evaluation_tokens
from ..training.runner import without_override_warning
from ..training.signals import Signals
from .folder import (
    FAILED_FILE,
    is_trained,
    missing_points,
    noting,
    point_folder,
    sentence,
    write_failure,
    write_point,
)
from .grid import Point

#: What somebody is told who interrupts a sweep.
GO_ON = "What is done is kept; the same command goes on."

#: SAEs measured together: more share the original and the ablated pass, fewer are lost by a kill.
EVALUATED_TOGETHER = 8

#: How often a stream's state is saved, at least, so that an interrupted sweep loses little.
MIN_CHECKPOINTS = 4
_NOT_SHARED = ("sae", "seed", "output_path")


def streams_of(points: list[Point]) -> list[list[Point]]:
    """Points by what they share: all but `sae`, seed and output."""
    streams: dict[str, list[Point]] = {}
    for point in points:
        streams.setdefault(_stream_key(point), []).append(point)
    return list(streams.values())


def _stream_key(point: Point) -> str:
    shared = {k: v for k, v in point.config.mapping.items() if k not in _NOT_SHARED}
    shared["d_in"] = point.config.runner.sae.d_in
    return sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]


def stream_name(points: Sequence[Point]) -> str:
    """Of these points: another process may be at others of the same stream."""
    names = sha256("\n".join(sorted(point.name for point in points)).encode()).hexdigest()[:12]
    return f"{_stream_key(points[0])}-{names}"


class Stream:
    """Points that one stream of activations trains side by side."""

    def __init__(self, points: list[Point], folder: Path, eval_tokens: int | None):
        self.points = {point.name: point for point in points}
        self.folder = folder
        self.checkpoints = folder / "streams" / stream_name(points)
        self.cfg = points[0].config.runner
        self.tokens = eval_tokens or evaluation_tokens(self.cfg)
        self.model = HookPoint.for_training(self.cfg)

    def run(self) -> None:
        """Train what has no weights yet, then measure what has no results yet."""
        missing = missing_points(self.folder, list(self.points.values()))
        untrained = {point.name: point for point in missing if not is_trained(self.folder, point)}
        if untrained:
            self._train(untrained)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        trained = missing_points(self.folder, missing)
        for start in range(0, len(trained), EVALUATED_TOGETHER):
            self._measure(trained[start : start + EVALUATED_TOGETHER])

    def _train(self, points: dict[str, Point]) -> None:
        saes: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for name, point in points.items():
            torch.manual_seed(point.seed)
            sae_class, _ = get_sae_training_class(point.config.runner.sae.architecture())
            with noting(failed, name):
                saes[name] = sae_class(copy.deepcopy(point.config.runner.sae))
        if saes:
            self._train_together(points, saes, failed)
        for name, error in failed.items():
            write_failure(self.folder, points[name], error)

    def _train_together(
        self, points: dict[str, Point], saes: dict[str, Any], failed: dict[str, str]
    ) -> None:
        """Train SAEs on the stream, save each; add those that fail to `failed`."""

        def save(name: str, trainer: Any) -> None:
            with noting(failed, name, OSError, SafetensorError, ArtifactError):  # of the disk
                self._save(points[name], trainer)

        config = _multi_config(self.cfg, {name: sae.cfg for name, sae in saes.items()})
        config.checkpoint_path = str(self.checkpoints)
        start = config.resume_from_checkpoint = self._newest_checkpoint(saes)
        torch.manual_seed(self.cfg.seed)
        try:
            with without_override_warning():
                runner = _Runner(config, save, self.model.model, saes)
            if start is not None:
                runner.take_up_failures(Path(start) / FAILED_FILE)
            runner.run()
        except (ValueError, OSError) as error:
            raise ConfigError(f"The sweep cannot be trained: {error}") from error
        if runner.signals.number:  # it came too late to stop the training
            raise Interrupted(runner.signals.number, GO_ON)
        failed.update(runner.failed)

    def _newest_checkpoint(self, names: Iterable[str]) -> str | None:
        complete = self.checkpoints.glob(f"*/{RUNNER_CFG_FILENAME}")
        usable = [
            path.parent
            for path in complete
            if all((path.parent / name / SAE_WEIGHTS_FILENAME).exists() for name in names)
        ]
        return str(max(usable, key=lambda path: int(path.name))) if usable else None

    def _save(self, point: Point, trainer: Any) -> None:
        def fill(new: Path) -> None:
            trainer.sae.save_inference_model(str(new))
            save_file({"sparsity": trainer.log_feature_sparsity}, new / SPARSITY_FILENAME)
            write_json(new / RUNNER_CFG_FILENAME, point.config.runner.to_dict())

        write_point(self.folder, point, fill)

    def _measure(self, points: list[Point]) -> None:
        """Measure points together; where that fails, one by one, and record which cannot be."""
        folders = {point.name: point_folder(self.folder, point) for point in points}
        try:
            saes = {name: load_sae(path, device=self.cfg.device) for name, path in folders.items()}
            results = evaluate_all(
                saes, model=self.model.model, tokens=self.tokens, device=self.cfg.device
            )
        except InterruptedException:
            raise
        except Exception as error:
            if len(points) > 1:
                for point in points:
                    self._measure([point])
                return
            reason = f"It is trained, but cannot be measured: {sentence(error).rstrip('.')}."
            write_failure(self.folder, points[0], f"{reason} The same command tries again.")
            return
        for point in points:
            result = {**point.about(), **results[point.name]}
            result["path"] = str(folders[point.name])
            result["training_tokens"] = self.cfg.training_tokens
            (folders[point.name] / FAILED_FILE).unlink(missing_ok=True)
            write_json(folders[point.name] / RESULTS_FILE, result)


def _multi_config(
    cfg: LanguageModelSAERunnerConfig[Any], saes: dict[str, Any]
) -> MultiSAETrainingRunnerConfig:
    """SAELens's configuration for many SAEs, with what it has in common with that for one."""
    names = {field.name for field in dataclasses.fields(MultiSAETrainingRunnerConfig) if field.init}
    common = {
        field.name: copy.deepcopy(getattr(cfg, field.name))
        for field in dataclasses.fields(cfg)
        if field.name in names
    }
    common.update(
        output_path=None,
        checkpoint_path=None,
        n_checkpoints=max(cfg.n_checkpoints, MIN_CHECKPOINTS),
        exclude_special_tokens=cfg.exclude_special_tokens,
    )
    common["logger"].run_name = None
    return MultiSAETrainingRunnerConfig(saes=saes, hook_names=cfg.hook_name, **common)


class _Runner(MultiSAETrainingRunner):
    """SAELens's runner for many SAEs, of which one that fails does not stop the others."""

    def __init__(
        self,
        config: MultiSAETrainingRunnerConfig,
        save: Callable[[str, Any], None],
        model: Any,
        saes: dict[str, Any],
    ):
        super().__init__(config, override_model=model, override_saes=saes)
        self.failed: dict[str, str] = {}
        self.trainers: dict[str, Any] = {}
        self.signals = Signals()
        self.begun = self.saved = False
        self._save = save
        self._uploads = wandb_log.Uploads(config.logger)

    def run(self) -> dict[str, Any]:
        """Train; each SAE is saved before SAELens ends its run of wandb."""
        try:
            with wandb_log.around(self, "start the same sweep again."):
                super().run()
        finally:
            if self.cfg.logger.log_to_wandb:
                wandb_log.finish(exit_code=1)  # SAELens has done it already unless training failed
        return self.saes

    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, Any]:
        self.trainers = trainer.trainers
        for name, single in trainer.trainers.items():
            announce_the_end(single)
            DivergenceGuard(single)
            single.step = self._isolated(name, single)
            if name in self.failed:
                _silence(single)
        loop: Any = trainer
        log_sparsity = loop._maybe_log_sparsity

        def between_steps(final: bool = False) -> None:
            if self.signals.number and not final:
                self._save_for_later(trainer)
                raise Interrupted(self.signals.number, GO_ON)
            if len(self.failed) == len(self.trainers):
                raise _AllFailed
            log_sparsity(final=final)

        # What SAELens's loop calls first. SAELens itself would stop in the middle of a step, and go
        # on raising its exception, at any signal to this process, when the training is long over.
        loop._maybe_log_sparsity = between_steps
        wandb_log.shield(trainer)
        self.begun = True
        with self.signals:
            with contextlib.suppress(_AllFailed):
                trainer.fit()
            for name in trainer.trainers.keys() - self.failed.keys():
                self._save(name, trainer.trainers[name])
            self.saved = True
        return trainer.saes

    def _save_for_later(self, trainer: MultiSAETrainer) -> None:
        assert self.cfg.checkpoint_path is not None
        name = str(trainer.n_training_samples)
        saved = Path(self.cfg.checkpoint_path) / name / RUNNER_CFG_FILENAME
        if trainer.n_training_steps and not saved.exists():
            trainer.save_checkpoint(checkpoint_name=name)

    def _isolated(self, name: str, trainer: Any) -> Any:
        step, last = trainer.step, []

        def isolated(batch: torch.Tensor) -> TrainStepOutput:
            samples = trainer.n_training_samples + len(batch)
            if name not in self.failed:
                with noting(self.failed, name):
                    last[:] = [step(batch)]
                if name in self.failed:
                    _silence(trainer)
            trainer.n_training_samples = samples  # SAELens's loop ends by this count
            return last[0] if last else nothing(batch)

        return isolated

    def take_up_failures(self, file: Path) -> None:
        """SAEs that had failed at a checkpoint do not go on from it: they have missed batches."""
        if file.exists():
            self.failed = {n: text for n, text in read_json(file).items() if n in self.saes}

    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        """As in SAELens, which writes runner_cfg.json last; then older checkpoints can go."""
        if checkpoint_path is not None:
            write_json(checkpoint_path / FAILED_FILE, self.failed)
        super()._save_runner_checkpoint_files(checkpoint_path)
        if checkpoint_path is not None:
            for older in checkpoint_path.parent.iterdir():
                if older != checkpoint_path:
                    shutil.rmtree(older)
            self._uploads.send()


class _AllFailed(Exception):
    """No SAE is left to train."""


def _silence(trainer: Any) -> None:
    """Keep SAELens from logging an SAE that no longer trains."""
    trainer.optimizer.zero_grad()
    trainer.maybe_reset_sparsity = trainer.full_sparsity_window_log = dict
    trainer.build_train_step_log_dict = _no_log


def _no_log(**_: Any) -> dict[str, Any]:
    return {}
