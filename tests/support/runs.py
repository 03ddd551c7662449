"""The packaged language model, and the configuration of a run that trains on it in two seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sae_gated_plugin
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.training.run import train

QUICKSTART = Path(sae_gated_plugin.__file__).parent / "quickstart"
HOOK_NAME, D_IN = "model.layers.2", 128

SMALL_RUN: dict[str, Any] = {
    "model_name": str(QUICKSTART / "model"),
    "model_class_name": "AutoModelForCausalLM",
    "hook_name": HOOK_NAME,
    "dataset_path": str(QUICKSTART / "text"),
    "dataset_trust_remote_code": False,
    "is_dataset_tokenized": False,
    "context_size": 64,
    "prepend_bos": False,
    "seqpos_slice": [1, None],
    "sae": {"architecture": "gated", "d_in": D_IN, "d_sae": 256, "l1_coefficient": 0.3},
    "training_tokens": 40_960,  # 80 steps
    "train_batch_size_tokens": 512,
    "store_batch_size_prompts": 16,
    "n_batches_in_buffer": 64,
    "lr": 2e-3,
    "n_eval_batches": 4,
    "logger": {"log_to_wandb": False},
    "verbose": False,
}


SHORT = ["training_tokens=10240", "n_eval_batches=1"]  # 20 steps


def run(mapping: dict[str, Any], folder: Path, *overrides: str) -> dict[str, Any]:
    return train(load_config(mapping, [*SHORT, *overrides]), folder)
