"""From YAML to SAEs on data of known features, each with a configuration of its own, checked."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from sae_lens import LoggingConfig
from sae_lens.synthetic import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModelConfig,
    SyntheticSAERunnerConfig,
)
from sae_lens.synthetic.registry import FIRING_PROB_REGISTRY, MAGNITUDE_REGISTRY
from sae_lens.synthetic.synthetic_model import SYNTHETIC_MODEL_CONFIG_FILENAME

from ..config.check import check_config, check_sae, config_section
from ..config.grid import file_name, known_fields, require_label, take_entries
from ..config.run import RunConfig, read
from ..config.yaml import Origins
from ..errors import ConfigError, SaeGatedError, first_line, unknown_name
from ..files import expanded, read_json, require_local
from ..sweeps.grid import Kind, Point, Sweep, load_sweep

#: Numbers in the matrix of true features: 1 GiB in fp32.
MOST_NUMBERS = 2**28

_SECTIONS = ("synthetic_model", "composites", "sae")
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
    probability of 1 % to a thirtieth of itself. seed: of weights and data and, in a file with
    `saes`, of the features where `synthetic_model.seed` is not given. model_folder: where a
    synthetic model is kept that takes long to build.
    """

    training_samples: int
    batch_size: int = 1024
    lr: float = 3e-4
    lr_scheduler_name: str = "constant"
    lr_end: float | None = None
    lr_warm_up_steps: int = 0
    lr_decay_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    autocast_sae: bool = False
    autocast_data: bool = False
    n_batches_for_norm_estimate: int = 1000
    n_checkpoints: int = 0
    eval_samples: int = 100_000
    device: str = "cpu"
    seed: int = 0
    model_folder: str = "models/synthetic"


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
class SyntheticConfig(RunConfig):
    """One SAE's checked configuration. runner: SAELens's, with a SyntheticModelConfig, or the
    folder or Hub name of a saved model; features: that model's configuration.
    """

    runner: Any
    training: Training
    features: SyntheticModelConfig
    composites: Composites | None

    def load(self, source: str | Path) -> SyntheticConfig:
        """Read another configuration of this kind."""
        return load_synthetic_sae(source)

    def values(self) -> dict[str, Any]:
        """What it says, however its YAML is written; without where things lie."""
        own = {"seed": self.training.seed, "composites": self.composites}
        kept = {name: value for name, value in super().values().items() if name != "device"}
        return {**kept, **json.loads(json.dumps(own, default=vars))}


def load_toy(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Sweep:
    """Read SAEs on synthetic data: a list `saes`, one SAE each, or a `sweep` with curves and seeds.

    An override of `sae` holds for every SAE, whatever it says. Raises ConfigError
    (UnknownArchitecture), as `load_config` does.
    """
    whole, origins = read(source, overrides)
    if "sweep" in whole:
        if "saes" in whole:
            raise ConfigError(f"{origins.default} has both 'saes' and 'sweep'; give one of them.")
        sweep = load_sweep(source, overrides, KIND)
        if sweep.eval_tokens is not None:
            raise ConfigError("'sweep.eval_tokens' counts tokens of text; give 'eval_samples'.")
        return sweep
    mapping = copy.deepcopy(whole)
    entries = take_entries(mapping, "saes", origins)
    shared = config_section(mapping, "sae", origins)
    model = mapping.get("synthetic_model")
    if isinstance(model, dict) and "seed" in mapping:
        mapping["synthetic_model"] = {"seed": mapping["seed"], **model}
    of_saes = [text for text in overrides if text.strip().split("=")[0] != "saes"]
    points: dict[str, Point] = {}
    said: list[dict[str, Any]] = []
    for entry in entries:
        architecture = str(entry.get("architecture", shared.get("architecture")))
        sae = {**known_fields(shared, architecture), **entry}
        label = sae.pop("label", architecture)
        config = load_synthetic_sae({**mapping, "sae": sae}, of_saes)
        name = file_name(require_label(label))
        if name in points:
            raise ConfigError(f"Two of 'saes' are called '{label}'; give each its own 'label'.")
        points[name] = Point(name, label, config.training.seed, {}, config)
        said.append({"label": label, **config.mapping["sae"]})
    if not points:
        raise ConfigError(f"{origins.default} has no SAE: 'saes' is empty or missing.")
    whole.pop("sae", None)
    return Sweep({**whole, "saes": said}, list(points.values()), None)


def load_synthetic_sae(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> SyntheticConfig:
    """Read one SAE's configuration: `sae`, `synthetic_model` and the fields of Training."""
    mapping, origins = read(source, overrides)
    built = copy.deepcopy(mapping)
    try:
        given, features = _model_config(built, origins)
        composites = _composites(config_section(built, "composites", origins), features, origins)
        sae = config_section(built, "sae", origins)
        training = Training(**check_config(Training, built, "", origins, aliases=_SECTIONS))
        width = features.hidden_dim
        if sae.setdefault("d_in", width) != width:
            raise ConfigError(f"'sae.d_in' is {sae['d_in']}, hidden_dim {width}; leave d_in out.")
        mapping["sae"] = dict(sae)
        config_class, fields = check_sae(sae, origins)
        own = {f.name for f in dataclasses.fields(SyntheticSAERunnerConfig)}
        runner: Any = SyntheticSAERunnerConfig(
            synthetic_model=given,
            sae=config_class(**fields),
            logger=LoggingConfig(log_to_wandb=False),
            **{name: value for name, value in vars(training).items() if name in own},
        )
    except SaeGatedError:
        raise
    except Exception as error:  # SAELens's own checks, or PyTorch's
        reason = str(error) if isinstance(error, ValueError) else first_line(error)
        raise ConfigError(f"{origins.default} cannot be used: {reason}") from error
    return SyntheticConfig(mapping, runner, training, features, composites)


def _model_config(
    mapping: dict[str, Any], origins: Origins
) -> tuple[SyntheticModelConfig | str, SyntheticModelConfig]:
    """`synthetic_model` as SAELens's runner takes it, and that model's configuration."""
    source = mapping.get("synthetic_model")
    if isinstance(source, str):
        return mapping.pop("synthetic_model"), saved_config(source)
    values = config_section(mapping, "synthetic_model", origins)
    prefix, nested = "synthetic_model.", dict[str, Any]()
    values.setdefault("seed", 0)  # of all SAEs of a sweep, whatever their own
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
            f"{checked['hidden_dim']:,}; at most {MOST_NUMBERS:,} numbers are allowed there."
        )
    cfg = SyntheticModelConfig(**checked, **nested)
    probabilities = cfg.firing_probability.generate(cfg.num_features, seed=cfg.seed)
    _require_probabilities(f"{prefix}firing_probability", probabilities)
    return cfg, cfg


def saved_config(source: str) -> SyntheticModelConfig:
    """The configuration of a model in a folder or, as OWNER/NAME or OWNER/NAME:FOLDER, on the Hub.

    Raises ConfigError where there is none.
    """
    allowed = (
        "Give a folder that SAELens's SyntheticModel.save wrote, OWNER/NAME or OWNER/NAME:FOLDER "
        "on the Hugging Face Hub, or the model's configuration."
    )
    require_local("Synthetic model", source, allowed)
    folder = expanded(source)
    try:
        file = folder / SYNTHETIC_MODEL_CONFIG_FILENAME if folder.is_dir() else _downloaded(source)
        return SyntheticModelConfig.from_dict(read_json(file))
    except Exception as error:  # the Hub's, SAELens's
        reason = first_line(error).rstrip(".")
        raise ConfigError(
            f"Synthetic model '{source}' cannot be read: {reason}. {allowed}"
        ) from error


@functools.lru_cache(maxsize=8)  # each point of a sweep asks for it
def _downloaded(source: str) -> Path:
    repo, _, inner = source.partition(":")
    name = SYNTHETIC_MODEL_CONFIG_FILENAME
    return Path(hf_hub_download(repo, f"{inner}/{name}" if inner else name))


def _composites(
    values: dict[str, Any], features: SyntheticModelConfig, origins: Origins
) -> Composites | None:
    if not values:
        return None
    composites = Composites(**check_config(Composites, values, "composites.", origins))
    _require_probabilities("composites.probability", torch.tensor([composites.probability]))
    for group in composites.groups:
        if len(set(group)) < max(2, len(group)) or not set(group) <= set(
            range(features.num_features)
        ):
            raise ConfigError(
                "Each of 'composites.groups' must be two or more different features out of 0 to "
                f"{features.num_features - 1}, not {group}."
            )
    return composites


def _require_probabilities(key: str, values: torch.Tensor) -> None:
    low, high = (end.item() for end in values.aminmax())
    if low < 0 or high > 1:
        raise ConfigError(f"'{key}' must lie between 0 and 1; it is {low:g} to {high:g}.")


#: SAEs on synthetic data, as points of a sweep.
KIND = Kind(
    frozenset({*(field.name for field in dataclasses.fields(Training)), *_SECTIONS}) - {"sae"},
    load_synthetic_sae,
)
