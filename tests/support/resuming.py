"""A small run with state of every kind, and how it is stopped at a step."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support.runs import SMALL_RUN
from torch.optim.optimizer import register_optimizer_step_post_hook

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import Interrupted
from sae_gated_plugin.training.run import train

WEIGHTS = "sae_weights.safetensors"

# 60 steps and 20 checkpoints, with state of every kind: a controller, resampling with its
# generator and learning rate, schedules, activation scaling, a shuffled buffer.
TINY: dict[str, Any] = {
    **SMALL_RUN,
    "sae": {
        "architecture": "gated",
        "d_in": 128,
        "d_sae": 128,
        "l1_coefficient": 20.0,
        "l1_warm_up_steps": 5,
        "target_l0": 4,
        "dead_latents": "resample",
        "resample_steps": [15, 35],
        "resample_warm_up_steps": 10,
        "normalize_activations": "expected_average_only_in",
    },
    "training_tokens": 7680,
    "train_batch_size_tokens": 128,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 8,
    "n_batches_for_norm_estimate": 3,
    "dead_feature_window": 1,
    "lr": 1e-2,
    "feature_sampling_window": 13,
    "lr_decay_steps": 20,
    "n_eval_batches": 1,
    "n_checkpoints": 20,
}


def at_step(n: int, action: Callable[[], Any]) -> Any:
    """Call `action` after the n-th optimizer step from now, in the middle of SAELens's step."""
    steps = itertools.count(1)
    return register_optimizer_step_post_hook(lambda *_: action() if next(steps) == n else None)


def interrupted(
    mapping: dict[str, Any], folder: Path, *overrides: str, step: int = 30, **options: Any
) -> None:
    hook = at_step(step, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(Interrupted):
            train(load_config(mapping, overrides), folder, **options)
    finally:
        hook.remove()


def few_texts(mapping: dict[str, Any], folder: Path) -> list[str]:
    texts = [
        f"The {number}th of many short texts that soon come to an end. " * 9 for number in range(30)
    ]
    Dataset.from_dict({"text": texts}).to_parquet(str(folder / "train.parquet"))
    return [f"dataset_path={folder}"]
