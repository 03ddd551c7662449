"""Toy models: SAEs trained on activations whose true features are known, and held against them.

    seed: 0
    training_samples: 400_000                      and the other fields of Training
    synthetic_model: {num_features: 10, hidden_dim: 16, firing_probability: 0.05}
    composites: {groups: [[0, 1], [2, 3]], probability: 0.1}
    sae: {d_sae: 10}                               what the SAEs share
    saes:
      - {label: gated, architecture: gated, l1_coefficient: 0.4}
      - {label: topk, architecture: topk, k: 2}

`synthetic_model` is SAELens's SyntheticModelConfig; a probability or magnitude is a number or one
of SAELens's generators, {generator_name: zipfian, max_prob: 0.3}. Data and training are those of
`sae_lens.synthetic`. The folder: `toy.yaml`, `toy.json`, and for every SAE its heatmap `NAME.png`
and `saes/NAME/` as SAELens saves it.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from sae_lens import LoggingConfig
from sae_lens.synthetic import SyntheticSAERunner, SyntheticSAERunnerConfig

from ..config.grid import file_name
from ..config.yaml import to_yaml
from ..errors import ConfigError
from ..files import write_json
from ..results import versions
from ..saes.load import load_sae
from .data import Toy
from .heatmap import cosine_heatmap
from .measure import measure_toy

RESULTS_FILE = "toy.json"
CONFIG_FILE = "toy.yaml"


def run_toy(toy: Toy, output: str | Path) -> dict[str, Any]:
    """Train every SAE on the same activations, measure and draw it; return what `toy.json` holds.

    Raises ConfigError for a folder that holds a toy already or cannot be written, and
    TrainingDiverged.
    """
    folder, training = Path(output), toy.training
    if (folder / RESULTS_FILE).exists() or (folder.exists() and not folder.is_dir()):
        what = "already holds a toy" if folder.is_dir() else "is a file"
        raise ConfigError(f"Output folder '{folder}' {what}; choose another with --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(to_yaml(toy.mapping), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Output folder '{folder}' cannot be written: {error}") from error
    results: list[dict[str, Any]] = []
    for label, config in toy.saes.items():
        started, name = time.perf_counter(), file_name(label)
        _train(toy, label, folder / "saes" / name)
        sae = load_sae(folder / "saes" / name)
        torch.manual_seed(training.seed + 1)  # other activations than those trained on
        measured = measure_toy(
            sae, toy.model, toy.members, training.eval_samples, training.batch_size
        )
        share = f"{measured['features_found']:.0%} of features found"
        figure = cosine_heatmap(f"{label}: {share}", measured, toy.members.shape[1])
        (folder / f"{name}.png").write_bytes(figure)
        about = {"label": label, "architecture": config.architecture(), "d_sae": config.d_sae}
        seconds = round(time.perf_counter() - started, 2)
        results.append({**about, "seconds": seconds, "figure": f"{name}.png", **measured})
    found = {
        "path": str(folder),
        "num_features": toy.model.cfg.num_features,
        "hidden_dim": toy.model.cfg.hidden_dim,
        "composites": [row.nonzero()[:, 0].tolist() for row in toy.members],
        "eval_samples": training.eval_samples,
        "versions": versions(),
        "saes": results,
    }
    write_json(folder / RESULTS_FILE, found)
    return found


def _train(toy: Toy, label: str, folder: Path) -> None:
    """Let SAELens train one SAE and save it in the folder."""
    settings = dataclasses.asdict(toy.training)
    seed = settings.pop("seed")
    torch.manual_seed(seed)
    runner = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=toy.model.cfg,
            sae=copy.deepcopy(toy.saes[label]),
            output_path=str(folder),
            run_final_eval=False,
            logger=LoggingConfig(log_to_wandb=False),
            **settings,
        ),
        override_synthetic_model=toy.model,
    )
    torch.manual_seed(seed)  # the same batches for every SAE, whatever it drew for its weights
    sae = runner.run().sae
    if not all(parameter.isfinite().all() for parameter in sae.parameters()):
        raise ConfigError(f"The weights of '{label}' are not finite any more; lower 'lr'.")
