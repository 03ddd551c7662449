"""What a run does otherwise where several processes train one SAE together.

All of them run the same program on the same batches, each with its share of the latents, and meet
where `LatentShards` and `Ranks` exchange something. Rank 0 writes the files, which are one
process's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from ..distributed.ranks import Ranks
from ..distributed.state import COUNTS, shard
from ..errors import ConfigError
from ..saelens_internals import is_logging_step, replace_reading, replace_reports
from .fine_tuning import starting_sae


def require_supported(cfg: LanguageModelSAERunnerConfig[Any], ranks: Ranks) -> None:
    """Raise ConfigError for what several processes cannot do together."""
    if ranks.size == 1:
        return
    refused = {
        "prefetch_llm_batches": "batches are read by all processes at the same moment",
        "compile_sae": "a compiled step cannot meet the other processes",
        "use_cached_activations": "activations are read from the language model",
    }
    for name, reason in refused.items():
        if getattr(cfg, name):
            raise ConfigError(
                f"{name} is not supported with {ranks.size} processes, for {reason}; leave it out."
            )
    for name in ("device", "llm_device", "act_store_device"):
        value = str(getattr(cfg, name))
        if value not in ("cpu", "cuda"):
            raise ConfigError(
                f"{name} is '{value}'; with {ranks.size} processes it must be cpu or cuda, which "
                "is the GPU of each process."
            )


def fine_tuned_sae(
    cfg: LanguageModelSAERunnerConfig[Any], ranks: Ranks, weights: bool
) -> TrainingSAE[Any] | None:
    """This rank's share of what `starting_sae` gives."""
    if ranks.size == 1 or cfg.from_pretrained_path is None:
        return starting_sae(cfg, weights)
    return _share(lambda on_cpu: starting_sae(on_cpu, weights), cfg, ranks)


def new_sae(cfg: LanguageModelSAERunnerConfig[Any], ranks: Ranks) -> TrainingSAE[Any] | None:
    """This rank's share of the SAE that one process would begin with; None for SAELens to do it."""
    if ranks.size == 1:
        return None

    def make(on_cpu: Any) -> Any:
        return TrainingSAE.from_dict(on_cpu.sae.to_dict())

    return _share(make, cfg, ranks)


def _share(make: Callable[[Any], Any], cfg: Any, ranks: Ranks) -> TrainingSAE[Any]:
    """An SAE is made on the CPU and cut, by one rank after the other, so that no GPU ever holds all
    of it, and a host one at a time.
    """
    on_cpu = copy.copy(cfg)
    on_cpu.sae = copy.deepcopy(cfg.sae)
    on_cpu.sae.device = "cpu"
    sae = ranks.in_turn(lambda: shard(make(on_cpu), ranks.rank, ranks.size))
    sae.cfg.device = cfg.device
    return sae.to(cfg.device)


def read_together(store: Any, ranks: Ranks) -> None:
    """Let each rank run the language model on its share of the texts; all get all activations."""
    if ranks.size > 1:
        replace_reading(store, lambda read: partial(ranks.in_parts, read))


def report_all(trainer: Any) -> None:
    """Let a trainer of SAELens's report on all latents, where it knows those of its rank."""
    shards = trainer.sae.shards

    @contextmanager
    def all_counts() -> Generator[None]:
        own = {name: getattr(trainer, name) for name in COUNTS}
        vars(trainer).update({name: shards.joined(value) for name, value in own.items()})
        try:
            yield
        finally:
            vars(trainer).update(own)

    def with_all(report: Any) -> Any:
        def reporting(*arguments: Any) -> Any:
            with all_counts():
                return report(*arguments)

        return reporting

    def log_step(log: Any) -> Any:
        def logging_step(output: TrainStepOutput) -> None:
            if is_logging_step(trainer):
                acts = shards.joined_acts(output.feature_acts)
                with all_counts():
                    log(replace(output, feature_acts=acts))

        return logging_step

    evaluate = trainer.evaluator

    def evaluate_all(*arguments: Any) -> dict[str, Any]:
        measured = evaluate(*arguments)
        of_latents = measured.get("sparsity", {})  # all else is of sae_out
        for name in of_latents.keys() & {"l0", "l1"}:
            of_latents[name] = float(shards.total(torch.tensor(of_latents[name])))
        return measured

    trainer.evaluator = evaluate and evaluate_all
    replace_reports(trainer, with_all, log_step)


def own_state(state: dict[str, Tensor], sae: Any) -> dict[str, Tensor]:
    """What belongs to a rank of a checkpoint's exact state: of `sae.NAME` its share of latents."""
    axes = {f"sae.{name}": axis for name, axis in sae.latent_axes.items()}
    return {
        key: sae.shards.own(value, axes[key]) if key in axes else value
        for key, value in state.items()
    }
