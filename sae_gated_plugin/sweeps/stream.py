"""One stream: points that are trained side by side on the same activations, then measured."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import shutil
from collections.abc import Generator, Sequence, Set
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.prefetch import PrefetchingIterator
from safetensors.torch import load_file, save_file

from ..errors import ArtifactError, ConfigError, Interrupted
from ..files import locked, read_json
from ..measure.evaluate import evaluate_all
from ..model.hook_point import HookPoint
from ..model.text import local_text
from ..saelens_internals import (
    InterruptedException,
    ManySAEsRunner,
    without_override_warning,
)
from ..saes.load import load_sae
from ..training import wandb_log
from ..training.activation_stream import ActivationStream
from ..training.checkpoints import EXACT_STATE_FILE
from ..training.fine_tuning import starting_sae
from ..training.parts import GENERATORS, Parts
from ..training.progress import Progress
from ..training.run_folder import evaluation_tokens
from ..training.signals import Signals
from .folder import FAILED_FILE, PointFolder, sentence
from .grid import Point
from .side_by_side import GO_ON, OWN, fit_side_by_side, only_checkpoint

#: SAEs measured together: more share the original and the ablated pass, fewer are lost by a kill.
EVALUATED_TOGETHER = 8

#: How often a stream's state is saved, at least, so that an interrupted sweep loses little.
MIN_CHECKPOINTS = 4


def streams_of(
    places: Sequence[PointFolder],
    folder: Path,
    eval_tokens: int | None,
    kind: type[Stream] | None = None,
) -> list[Stream]:
    """Streams of a sweep in `folder`: points that share all but `sae`, seed, output and `OWN`.

    kind: the class of the streams, default `Stream`.
    """
    kind, groups = kind or Stream, dict[str, list[PointFolder]]()
    for place in places:
        groups.setdefault(_shared_by(place.point, (*kind.not_shared, *OWN)), []).append(place)
    streams: list[Stream] = []
    for shared, group in groups.items():  # another process may be at other points of the same one
        alike = {_shared_by(place.point, kind.not_shared) for place in group}
        if len(alike) == 1:  # the name of version 0.1, whose checkpoints are there
            (shared,) = alike
        names = _digest("\n".join(sorted(place.point.name for place in group)))
        streams.append(kind(group, folder / "streams" / f"{shared}-{names}", eval_tokens))
    return streams


def _shared_by(point: Point, not_shared: Sequence[str]) -> str:
    shared = {k: v for k, v in point.config.mapping.items() if k not in not_shared}
    shared["d_in"] = point.config.runner.sae.d_in
    return _digest(json.dumps(shared, sort_keys=True))


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12]


class Stream:
    """Points that one stream of activations trains side by side. checkpoints: its own folder.

    Where the activations come from, and what SAEs are measured on, is in `_open`, `_fit` and
    `_results`.
    """

    #: Keys of a configuration in which the points of a stream may differ, beside `OWN`.
    not_shared: tuple[str, ...] = ("sae", "seed", "output_path")

    #: As of `train`.
    fused_adam: bool | None = None

    def __init__(self, places: Sequence[PointFolder], checkpoints: Path, eval_tokens: int | None):
        self.places = {place.point.name: place for place in places}
        self.checkpoints = checkpoints
        self.cfg = places[0].point.config.runner
        self.eval_tokens = eval_tokens

    def missing(self) -> list[PointFolder]:
        """What is left to do, as it is now."""
        return [place for place in self.places.values() if place.missing]

    @contextlib.contextmanager
    def to_itself(self) -> Generator[None]:
        """Keep other processes from training or measuring the same points meanwhile.

        The lock's file stays: who opened one that is then removed would hold a lock of its own.
        """
        streams = self.checkpoints.parent
        lock = streams / f"{self.checkpoints.name}.lock"
        streams.mkdir(parents=True, exist_ok=True)
        lock.touch()
        with locked(lock, f"This sweep in '{streams.parent}'"):
            yield

    def run(self) -> None:
        """Train what has no weights yet, then measure what has no results yet."""
        missing = self.missing()
        if not missing:
            return
        source = self._open()
        untrained = {place.point.name: place for place in missing if not place.trained}
        with wandb_log.until_measured(self.cfg.logger):
            if untrained:
                self._train(untrained, source)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            trained = self.missing()
            if trained and not untrained:  # by a process that has ended since
                wandb_log.reopen(self.cfg.logger, trained[0].path)
            for start in range(0, len(trained), EVALUATED_TOGETHER):
                self._measure(trained[start : start + EVALUATED_TOGETHER], source)

    def _open(self) -> Any:
        """The language model."""
        return HookPoint.for_training(self.cfg).model

    def _train(self, places: dict[str, PointFolder], source: Any) -> None:
        saes: dict[str, Any] = {}
        for name, place in places.items():
            torch.manual_seed(place.point.seed)
            with place.isolated():
                cfg = place.point.config.runner
                sae_class, _ = get_sae_training_class(cfg.sae.architecture())
                trained = starting_sae(cfg)
                saes[name] = sae_class(copy.deepcopy(cfg.sae)) if trained is None else trained
        if not saes:
            return
        try:
            signals = self._fit(saes, places, source, self._newest_checkpoint(saes.keys()))
        except ArtifactError as error:
            raise ArtifactError(f"{error} {GO_ON}") from error
        except (ValueError, OSError) as error:
            raise ConfigError(f"The sweep cannot be trained: {error}") from error
        if signals.number:  # it came too late to stop the training
            raise Interrupted(signals.number, GO_ON)

    def _fit(
        self,
        saes: dict[str, Any],
        places: dict[str, PointFolder],
        source: Any,
        checkpoint: str | None,
    ) -> Signals:
        """Train and save SAEs, from a checkpoint's folder on where there is one."""
        config = _multi_config(self.cfg, {name: sae.cfg for name, sae in saes.items()})
        config.checkpoint_path = str(self.checkpoints)
        config.resume_from_checkpoint = checkpoint
        torch.manual_seed(self.cfg.seed)
        with without_override_warning():
            runner = _Runner(config, source, saes, places)
        runner.fused_adam = self.fused_adam
        runner.run()
        return runner.signals

    def _newest_checkpoint(self, names: Set[str]) -> str | None:
        """The newest that is complete and has these SAEs; one that had failed has no part in it."""
        usable: list[Path] = []
        for file in self.checkpoints.glob(f"*/{RUNNER_CFG_FILENAME}"):
            failures = file.with_name(FAILED_FILE)  # version 0.1 wrote one
            failed = read_json(failures) if failures.exists() else {}
            has = {path.parent.name for path in file.parent.glob(f"*/{SAE_WEIGHTS_FILENAME}")}
            if names <= has - failed.keys():
                usable.append(file.parent)
        return str(max(usable, key=lambda path: int(path.name))) if usable else None

    def _measure(self, places: list[PointFolder], source: Any) -> None:
        """Measure points together; where that fails, one by one, and record which cannot be."""
        try:
            results = self._results(places, source)
        except InterruptedException:
            raise
        except Exception as error:
            if len(places) > 1:
                for place in places:
                    self._measure([place], source)
                return
            reason = f"It is trained, but cannot be measured: {sentence(error).rstrip('.')}."
            places[0].write_failure(f"{reason} The same command tries again.")
            return
        for place in places:
            measured = results[place.point.name]
            place.write_results(measured)
            wandb_log.summarize(self.cfg.logger, measured, f"{place.point.name}/")

    def _results(self, places: list[PointFolder], source: Any) -> dict[str, dict[str, Any]]:
        """What `results.json` of each point says, by its name."""
        saes = {p.point.name: load_sae(p.path, device=self.cfg.device) for p in places}
        tokens = self.eval_tokens or evaluation_tokens(self.cfg)
        results = evaluate_all(saes, model=source, tokens=tokens, device=self.cfg.device)
        trained_on = {"training_tokens": self.cfg.training_tokens}
        return {name: {**measured, **trained_on} for name, measured in results.items()}


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
    )
    common["logger"].run_name = None
    return MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=cfg.hook_name,
        hook_head_indices=cfg.hook_head_index,
        **common,
    )


class _Runner(ManySAEsRunner):
    """SAELens's runner for many SAEs, of which one that fails does not stop the others, and whose
    checkpoints hold everything that the next step depends on.
    """

    def __init__(
        self,
        config: MultiSAETrainingRunnerConfig,
        model: Any,
        saes: dict[str, Any],
        places: dict[str, PointFolder],
    ):
        super().__init__(
            config,
            override_model=model,
            override_saes=saes,
            override_dataset=local_text(config.dataset_path),
        )
        self.stream = ActivationStream(self.activations_store, int(config.prefetch_llm_batches))
        self.places = places
        self.signals = Signals()
        self.begun = self.saved = False
        self.fused_adam: bool | None = None
        self._upload = wandb_log.uploader(config.logger)

    def run(self) -> dict[str, Any]:
        """Train and save."""
        state = Path(self.cfg.resume_from_checkpoint or "") / EXACT_STATE_FILE
        self._parts = Parts(load_file(state) if state.exists() else {})  # version 0.1 had none
        # Before SAELens's own start: it begins to prefetch before it reads a checkpoint.
        self._parts.add("stream", self.stream)
        self._parts.add("generator", GENERATORS)
        with wandb_log.around(self, "start the same sweep again."):
            super().run()
        return self.saes

    def run_trainer_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, Any]:
        self._trainer = trainer

        def begin() -> None:
            wandb_log.shield(trainer)
            self.begun = True

        def trained_on(batch: torch.Tensor) -> None:
            self.stream.trained_on = batch

        folder = Path(str(self.cfg.checkpoint_path))
        progress = Progress(trainer)
        if not self.cfg.prefetch_llm_batches:  # else the steps go on meanwhile
            self.stream.before_model = lambda: progress.reading(self.stream.filled)
        fit_side_by_side(
            trainer,
            self.places,
            self._parts,
            folder,
            self.signals,
            self.cfg.resume_from_checkpoint,
            begin,
            trained_on,
            self.fused_adam,
            progress,
        )
        self.saved = True
        return trainer.saes

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """As in SAELens, which writes runner_cfg.json last; then older checkpoints can go."""
        if checkpoint_path is None:
            return
        provider = self._trainer.data_provider
        prefetches = isinstance(provider, PrefetchingIterator)
        with provider.paused() if prefetches else contextlib.nullcontext():
            save_file(self._parts.state_dict(), checkpoint_path / EXACT_STATE_FILE)
        super().save_checkpoint(checkpoint_path)
        only_checkpoint(checkpoint_path)
        for name, trainer in self._trainer.trainers.items():
            self._upload(trainer, checkpoint_path / name)
