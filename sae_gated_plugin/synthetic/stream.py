"""One stream of synthetic activations that many SAEs are trained on side by side, then measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.synthetic import SyntheticModel
from sae_lens.synthetic.training import SyntheticActivationIterator
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import temporary_seed
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import write_json
from ..progress import counted
from ..results import versions
from ..saes.load import load_sae
from ..sweeps.folder import PointFolder
from ..sweeps.side_by_side import fit_side_by_side, only_checkpoint
from ..sweeps.stream import MIN_CHECKPOINTS, Stream
from ..training.checkpoints import EXACT_STATE_FILE
from ..training.parts import GENERATORS, Parts
from ..training.progress import Progress
from ..training.signals import Signals
from .config import SyntheticConfig
from .measure import Drawn, measure_toy
from .model import model_name, open_model

#: The hook point of every SAE: SAELens's trainer of many wants one, and so does a report.
HOOK_NAME = "synthetic activations"

_NO_MODEL = "Synthetic data has no language model."


class Samples(Iterator[dict[str, Tensor]]):
    """Batches of activations, each drawn from a seed of its own: what SAEs draw meanwhile changes
    nothing, and the number of the next batch is all the state.
    """

    def __init__(self, model: SyntheticModel, config: SyntheticConfig):
        self._batches = SyntheticActivationIterator(
            model.feature_dict,
            model.activation_generator,
            config.training.batch_size,
            config.training.autocast_data,
        )
        self._seed, self._number = config.training.seed, 0

    def __next__(self) -> dict[str, Tensor]:
        # The CPU's generator takes 32 bits of a seed: a million batches until the next seed's.
        with temporary_seed((self._seed * 1_000_003 + self._number) % 2**32):
            batch = self._batches.next_batch()
        self._number += 1
        return {HOOK_NAME: batch}

    def state_dict(self) -> dict[str, Tensor]:
        """The number of the next batch."""
        return {"number": torch.tensor(self._number)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with this batch."""
        self._number = int(state["number"])


class SyntheticStream(Stream):
    """Points on one synthetic model."""

    not_shared = ("sae", "seed", "output_path", "model_folder", "device")

    @property
    def _config(self) -> SyntheticConfig:
        config = next(iter(self.places.values())).point.config
        assert isinstance(config, SyntheticConfig)
        return config

    def _open(self) -> tuple[SyntheticModel, Tensor]:
        return open_model(self._config)

    def _fit(
        self,
        saes: dict[str, Any],
        places: dict[str, PointFolder],
        source: Any,
        checkpoint: str | None,
    ) -> Signals:
        samples, parts = Samples(source[0], self._config), Parts({})
        if checkpoint:
            parts = Parts(load_file(Path(checkpoint) / EXACT_STATE_FILE))

        def save(checkpoint_path: Path | None) -> None:
            assert checkpoint_path is not None
            save_file(parts.state_dict(), checkpoint_path / EXACT_STATE_FILE)
            write_json(checkpoint_path / RUNNER_CFG_FILENAME, self.cfg.to_dict())  # the last file
            only_checkpoint(checkpoint_path)

        shared = self.cfg.to_sae_trainer_config()
        shared.checkpoint_path = str(self.checkpoints)
        shared.n_checkpoints = max(shared.n_checkpoints, MIN_CHECKPOINTS)
        trainer = MultiSAETrainer(
            shared, saes, dict.fromkeys(saes, HOOK_NAME), samples, save_checkpoint_fn=save
        )
        for sae in saes.values():
            sae.to(shared.device)
            sae.cfg.metadata.hook_name = HOOK_NAME
        if checkpoint:
            trainer.load_checkpoint(checkpoint)
        parts.add("stream", samples)
        parts.add("generator", GENERATORS)
        signals = Signals()
        progress = Progress(trainer, "training", "samples")
        fit_side_by_side(
            trainer,
            places,
            parts,
            self.checkpoints,
            signals,
            checkpoint,
            fused_adam=self.fused_adam,
            progress=progress,
        )
        return signals

    def _results(self, places: list[PointFolder], source: Any) -> dict[str, dict[str, Any]]:
        results: dict[str, dict[str, Any]] = {}
        model, members = source
        common = self._config.training
        with temporary_seed(2**31 + common.seed):  # no batch of a training's is like these
            drawn = Drawn(model.activation_generator, common.eval_samples, common.batch_size)
        for place in counted(places, "measuring", "SAE"):
            started, config = time.perf_counter(), place.point.config
            assert isinstance(config, SyntheticConfig)
            training, trained = config.training, config.runner.sae
            sae = load_sae(place.path, device=training.device)
            measured = measure_toy(
                sae, model, members, training.eval_samples, training.batch_size, drawn
            )
            reached = sae.cfg.metadata.l1_coefficient_reached
            undefined = measured.pop("undefined")
            results[place.point.name] = {
                "architecture": trained.architecture(),
                "d_in": trained.d_in,
                "d_sae": trained.d_sae,
                "model_name": model_name(config),
                "dataset": model_name(config),
                "num_features": model.cfg.num_features,
                "hidden_dim": model.cfg.hidden_dim,
                "composites": [row.nonzero()[:, 0].tolist() for row in members],
                "hook_name": HOOK_NAME,
                "tokens": training.eval_samples,
                "training_tokens": training.training_samples,
                "lr": training.lr,
                "l1_coefficient": reached or getattr(trained, "l1_coefficient", None),
                "target_l0": getattr(trained, "target_l0", None),
                **measured,
                **dict.fromkeys(("loss_recovered", "nats_lost", "kl")),
                "undefined": {
                    **undefined,
                    **dict.fromkeys(("loss_recovered", "nats_lost", "kl"), _NO_MODEL),
                },
                "seconds": round(time.perf_counter() - started, 2),
                "versions": versions(),
            }
        return results
