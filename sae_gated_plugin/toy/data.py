"""Data of known features, from SAELens's synthetic models."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    HierarchyConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    orthogonal_initializer,
)
from sae_lens.synthetic.registry import FIRING_PROB_REGISTRY, MAGNITUDE_REGISTRY
from torch import Tensor

from ..config.check import check_config, check_sae, config_section
from ..config.grid import file_name, known_fields, require_label, take_entries
from ..config.run import read
from ..config.yaml import Origins, apply_overrides
from ..errors import ConfigError, SaeGatedError, first_line, unknown_name

#: Numbers in the matrix of true features: 1 GiB in fp32.
MOST_NUMBERS = 2**28

_SECTIONS = ("synthetic_model", "composites", "sae", "saes")
_NESTED: dict[str, Any] = {  # in synthetic_model: a class of settings, or the registry of several
    "hierarchy": HierarchyConfig,
    "orthogonalization": OrthogonalizationConfig,
    "correlation": LowRankCorrelationConfig,
    "firing_probability": FIRING_PROB_REGISTRY,
    "mean_firing_magnitudes": MAGNITUDE_REGISTRY,
    "std_firing_magnitudes": MAGNITUDE_REGISTRY,
}


@dataclass(frozen=True)
class Training:
    """How long and how fast; names and defaults are those of SAELens's SyntheticSAERunnerConfig.

    training_samples: activations per SAE; no default, for SAELens's 100 million take hours.
    eval_samples: fresh activations to measure on; 100,000, a fifth of SAELens's, tell a firing
    probability of 1 % to a thirtieth of itself. seed: of weights and data and, where
    `synthetic_model.seed` is not given, of the features.
    """

    training_samples: int
    batch_size: int = 1024
    lr: float = 3e-4
    lr_warm_up_steps: int = 0
    lr_decay_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    eval_samples: int = 100_000
    seed: int = 0


@dataclass(frozen=True)
class Composites:
    """Groups of features that fire together, besides what each does alone.

    groups: features by number, from 0. probability: of each group, per sample; all of its features
    then fire, each with a magnitude of its own. A composite's direction is the sum of its features
    times their mean magnitudes.
    """

    groups: list[list[int]]
    probability: float


@dataclass(frozen=True)
class Toy:
    """A checked configuration.

    mapping: what the file and the overrides said, merged, in full for every SAE. members:
    (composites, num_features), 1 where the feature belongs to the composite. saes: label →
    training config.
    """

    mapping: dict[str, Any]
    training: Training
    model: SyntheticModel
    members: Tensor
    saes: dict[str, Any]


def load_toy(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Toy:
    """Read a toy's configuration; an override of `sae` holds for every SAE, whatever it says.

    Raises ConfigError (UnknownArchitecture), as `load_config` does.
    """
    whole, origins = read(source, overrides)
    mapping = copy.deepcopy(whole)
    model, composites, shared = (config_section(mapping, name, origins) for name in _SECTIONS[:3])
    entries = take_entries(mapping, "saes", origins)
    training = Training(**check_config(Training, mapping, "", origins, aliases=_SECTIONS))
    saes: dict[str, Any] = {}
    said: list[dict[str, Any]] = []
    try:
        cfg = _model_config({"seed": training.seed, **model}, origins)
        built, members = _build(cfg, composites, origins)
        for entry in entries:
            merged = _merged(entry, shared, cfg.hidden_dim, overrides, origins)
            said.append(dict(merged))
            label = require_label(merged.pop("label"))
            if file_name(label) in map(file_name, saes):
                raise ConfigError(f"Two of 'saes' are called '{label}'; give each its own 'label'.")
            config_class, fields = check_sae(merged, origins)
            saes[label] = config_class(**fields)
    except SaeGatedError:
        raise
    except Exception as error:  # SAELens's own checks, or PyTorch's
        reason = str(error) if isinstance(error, ValueError) else first_line(error)
        raise ConfigError(f"{origins.default} cannot be used: {reason}") from error
    if not saes:
        raise ConfigError(f"{origins.default} has no SAE: 'saes' is empty or missing.")
    whole.pop("sae", None)
    return Toy({**whole, "saes": said}, training, built, members, saes)


def _model_config(values: dict[str, Any], origins: Origins) -> SyntheticModelConfig:
    """SAELens's configuration of the data, with what is nested in it."""
    prefix, nested = "synthetic_model.", dict[str, Any]()
    for name in [name for name in _NESTED if values.get(name) is not None]:
        kind, aliases = _NESTED[name], ()
        if type(values[name]) in (int, float):  # the same for all features
            field = "probability" if kind is FIRING_PROB_REGISTRY else "value"
            values[name] = {"generator_name": "constant", field: float(values[name])}
        section = config_section(values, name, origins, prefix)
        if isinstance(kind, dict):
            aliases = ("generator_name",)
            generator = str(section.pop("generator_name", None))
            if generator not in kind:
                raise ConfigError(unknown_name(f"{prefix}{name}.generator_name", generator, kind))
            kind = kind[generator]
        checked = check_config(kind, section, f"{prefix}{name}.", origins, aliases=aliases)
        nested[name] = kind(**checked)
    checked = check_config(SyntheticModelConfig, values, prefix, origins)
    if checked["num_features"] * checked["hidden_dim"] > MOST_NUMBERS:
        raise ConfigError(
            f"'{prefix}num_features' × 'hidden_dim' is {checked['num_features']:,} × "
            f"{checked['hidden_dim']:,}; a toy has at most {MOST_NUMBERS:,} numbers there."
        )
    return SyntheticModelConfig(**checked, **nested)


def _build(
    cfg: SyntheticModelConfig, values: dict[str, Any], origins: Origins
) -> tuple[SyntheticModel, Tensor]:
    """SAELens's generator of activations, in which the composites fire too; and their members."""
    features = FeatureDictionary(  # as SyntheticModel would, without its progress bar
        cfg.num_features,
        cfg.hidden_dim,
        cfg.bias,
        orthogonal_initializer(**vars(cfg.orthogonalization)) if cfg.orthogonalization else None,
        seed=cfg.seed,
    )
    model = SyntheticModel(cfg, feature_dict=features)
    alone = model.activation_generator
    _require_probabilities("synthetic_model.firing_probability", alone.firing_probabilities)
    if not values:
        return model, torch.zeros(0, cfg.num_features)
    composites = Composites(**check_config(Composites, values, "composites.", origins))
    _require_probabilities("composites.probability", torch.tensor([composites.probability]))
    members = torch.zeros(len(composites.groups), cfg.num_features)
    for row, group in zip(members, composites.groups):
        if len(set(group)) < max(2, len(group)) or not set(group) <= set(range(len(row))):
            raise ConfigError(
                "Each of 'composites.groups' must be two or more different features out of 0 to "
                f"{len(row) - 1}, not {group}."
            )
        row[group] = 1

    def fire_composites(feature_acts: Tensor, generator: ActivationGenerator) -> Tensor:
        fires = torch.rand(len(feature_acts), len(members)) < composites.probability
        means, spread = generator.mean_firing_magnitudes, generator.std_firing_magnitudes
        magnitudes = (means + spread * torch.randn_like(feature_acts)).relu()
        joining = (fires.to(members) @ members > 0) & (feature_acts == 0)
        return torch.where(joining, magnitudes, feature_acts)

    hierarchy = [model.hierarchy.modifier] if model.hierarchy else []
    model.activation_generator = ActivationGenerator(
        cfg.num_features,
        alone.firing_probabilities,
        alone.std_firing_magnitudes,
        alone.mean_firing_magnitudes,
        modify_activations=[fire_composites, *filter(None, hierarchy)],
        correlation_matrix=model.correlation_matrix,
    )
    return model, members


def _merged(
    entry: dict[str, Any],
    shared: dict[str, Any],
    d_in: int,
    overrides: Sequence[str],
    origins: Origins,
) -> dict[str, Any]:
    """What one of `saes` comes to with what it shares with the others and the overrides of that."""
    architecture = str(entry.get("architecture", shared.get("architecture")))
    sae = {"label": architecture, **known_fields(shared, architecture), **entry}
    for override in overrides:
        if override.strip().startswith("sae."):
            apply_overrides(override, {"sae": sae}, origins)
    if sae.setdefault("d_in", d_in) != d_in:
        raise ConfigError(f"'sae.d_in' is {sae['d_in']}, hidden_dim {d_in}; leave d_in out.")
    return sae


def _require_probabilities(key: str, values: Tensor) -> None:
    low, high = (end.item() for end in values.aminmax())
    if low < 0 or high > 1:
        raise ConfigError(f"'{key}' must lie between 0 and 1; it is {low:g} to {high:g}.")
