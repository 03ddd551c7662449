"""SAELens's synthetic models: opened, or built once and kept, with composites where asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path

import torch
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    SyntheticModel,
    SyntheticModelConfig,
    orthogonal_initializer,
)
from torch import Tensor

from ..errors import ConfigError, SaeGatedError, first_line
from ..files import HIDDEN, expanded, locked
from .config import Composites, SyntheticConfig

logger = logging.getLogger("sae_gated_plugin")

#: Multiplications of an orthogonalisation above which its result is kept: half a minute of a core.
COSTLY = 1e11


def open_model(config: SyntheticConfig) -> tuple[SyntheticModel, Tensor]:
    """The model that an SAE is trained on, and its composites' members.

    members: (composites, num_features), 1 where the feature belongs to the composite. Raises
    ConfigError where the model cannot be built or read.
    """
    source, cfg, device = config.runner.synthetic_model, config.features, config.training.device
    try:
        if isinstance(source, str):
            source = str(expanded(source)) if expanded(source).exists() else source
            model = SyntheticModel.load_from_source(source, device=device)
        elif _cost(cfg) < COSTLY:
            model = _build(cfg, device, show_progress=False)
        else:
            model = _kept(cfg, device, expanded(config.training.model_folder))
        members = torch.zeros(0, cfg.num_features, device=device)
        if config.composites:
            members = _add_composites(model, config.composites)
    except SaeGatedError:
        raise
    except Exception as error:  # SAELens's own checks, PyTorch's, safetensors', the Hub's
        reason = str(error) if isinstance(error, ValueError) else first_line(error)
        raise ConfigError(f"The synthetic model cannot be made: {reason}") from error
    return model, members


def model_name(config: SyntheticConfig) -> str:
    """A name for the model, the same for equal ones."""
    source = config.runner.synthetic_model
    return source if isinstance(source, str) else f"synthetic-{_digest(source, 'cpu')}"


def _cost(cfg: SyntheticModelConfig) -> float:
    steps = cfg.orthogonalization.num_steps if cfg.orthogonalization else 0
    return float(steps) * cfg.num_features**2 * cfg.hidden_dim


def _digest(cfg: SyntheticModelConfig, device: str) -> str:
    kind = torch.device(device).type  # a seed gives other numbers on a GPU than on a CPU
    described = json.dumps([cfg.to_dict(), *([kind] if kind != "cpu" else [])], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def _kept(cfg: SyntheticModelConfig, device: str, folder: Path) -> SyntheticModel:
    """The model of this configuration from `folder`, built first where it is not there."""
    place = folder / _digest(cfg, device)
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / f"{place.name}.lock"
        lock.touch()
        with locked(lock, f"Synthetic model '{place}'"):
            if not place.exists():
                logger.warning(
                    "Building a synthetic model of %s features, once; it is then kept in '%s'. "
                    "16,384 features in 768 dimensions take 80 minutes of a CPU core.",
                    f"{cfg.num_features:,}",
                    place,
                )
                with tempfile.TemporaryDirectory(dir=folder, prefix=HIDDEN) as temporary:
                    _build(cfg, device, show_progress=True).save(Path(temporary) / "new")
                    (Path(temporary) / "new").rename(place)
    return SyntheticModel.load_from_disk(place, device=device)


def _build(cfg: SyntheticModelConfig, device: str, show_progress: bool) -> SyntheticModel:
    """As SyntheticModel does by itself, which always draws a progress bar."""
    orthogonalization = cfg.orthogonalization
    initializer = (
        orthogonal_initializer(**orthogonalization.to_dict(), show_progress=show_progress)
        if orthogonalization
        else None
    )
    features = FeatureDictionary(
        cfg.num_features, cfg.hidden_dim, cfg.bias, initializer, device=device, seed=cfg.seed
    )
    return SyntheticModel(cfg, feature_dict=features, device=device)


def _add_composites(model: SyntheticModel, composites: Composites) -> Tensor:
    """Let composites fire too, in place; return their members."""
    alone = model.activation_generator
    members = torch.zeros(len(composites.groups), model.cfg.num_features, device=model.device)
    for row, group in zip(members, composites.groups):
        row[group] = 1

    def fire_composites(feature_acts: Tensor, generator: ActivationGenerator) -> Tensor:
        fires = torch.rand(len(feature_acts), len(members)) < composites.probability
        means, spread = generator.mean_firing_magnitudes, generator.std_firing_magnitudes
        magnitudes = (means + spread * torch.randn_like(feature_acts)).relu()
        joining = (fires.to(members) @ members > 0) & (feature_acts == 0)
        return torch.where(joining, magnitudes, feature_acts)

    hierarchy = [model.hierarchy.modifier] if model.hierarchy else []
    model.activation_generator = ActivationGenerator(
        model.cfg.num_features,
        alone.firing_probabilities,
        alone.std_firing_magnitudes,
        alone.mean_firing_magnitudes,
        modify_activations=[fire_composites, *filter(None, hierarchy)],
        correlation_matrix=model.correlation_matrix,
        device=model.device,
    )
    return members
