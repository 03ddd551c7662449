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
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE, LoggingConfig
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    HierarchyConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    orthogonal_initializer,
)
from sae_lens.synthetic.registry import FIRING_PROB_REGISTRY, MAGNITUDE_REGISTRY
from sae_lens.util import cosine_similarities
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from . import configuration, plots
from .artifacts import load_sae, write_json
from .configuration import Origins
from .errors import ConfigError, SaeGatedError, UndefinedMetric, unknown_name
from .evaluation import versions
from .hook_points import first_line
from .metrics import Batch, registered_metrics
from .sweeps import LONGEST_NAME, known_fields, require_label

RESULTS_FILE = "toy.json"
CONFIG_FILE = "toy.yaml"

#: A feature is found by a latent of its own whose cosine with it is above this.
FOUND = 0.95

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
_UNDEFINED = {
    "feature_precision": "No latent fires.",
    "firing_recall": "No feature fires.",
    "firing_precision": "No latent that is matched with a feature fires.",
    "composites_found": "There are no composites.",
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


# --- configuration --------------------------------------------------------------------------------


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Toy:
    """Read a toy's configuration; an override of `sae` holds for every SAE, whatever it says.

    Raises ConfigError (UnknownArchitecture) with a sentence, as `configuration.load` does.
    """
    whole, origins = configuration.read(source, overrides)
    mapping = copy.deepcopy(whole)
    model, composites, shared = (
        configuration.section(mapping, name, origins) for name in _SECTIONS[:3]
    )
    entries = mapping.pop("saes", None)
    training = Training(**configuration.check(Training, mapping, "", origins, aliases=_SECTIONS))
    if not (isinstance(entries, list) and entries and all(isinstance(e, dict) for e in entries)):
        where = origins.of("saes")
        raise ConfigError(f"'saes' in {where} must be a list of mappings, one or more.")
    saes: dict[str, Any] = {}
    said: list[dict[str, Any]] = []
    try:
        cfg = _model_config({"seed": training.seed, **model}, origins)
        built, members = _build(cfg, composites, origins)
        for entry in cast("list[dict[str, Any]]", entries):
            merged = _merged(entry, shared, cfg.hidden_dim, overrides, origins)
            said.append(dict(merged))
            label = require_label(merged.pop("label"))
            if len(_file_name(label).encode()) > LONGEST_NAME:
                raise ConfigError(f"The label '{label[:80]}…' is too long for a file's name.")
            if _file_name(label) in map(_file_name, saes):
                raise ConfigError(f"Two of 'saes' are called '{label}'; give each its own 'label'.")
            config_class, fields = configuration.check_sae(merged, origins)
            saes[label] = config_class(**fields)
    except SaeGatedError:
        raise
    except Exception as error:  # SAELens's own checks, or PyTorch's
        reason = str(error) if isinstance(error, ValueError) else first_line(error)
        raise ConfigError(f"{origins.default} cannot be used: {reason}") from error
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
        section = configuration.section(values, name, origins, prefix)
        if isinstance(kind, dict):
            aliases = ("generator_name",)
            generator = str(section.pop("generator_name", None))
            if generator not in kind:
                raise ConfigError(unknown_name(f"{prefix}{name}.generator_name", generator, kind))
            kind = kind[generator]
        checked = configuration.check(kind, section, f"{prefix}{name}.", origins, aliases=aliases)
        nested[name] = kind(**checked)
    checked = configuration.check(SyntheticModelConfig, values, prefix, origins)
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
    composites = Composites(**configuration.check(Composites, values, "composites.", origins))
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

    modifier = model.hierarchy and model.hierarchy.modifier
    hierarchy = [modifier] if modifier else []
    model.activation_generator = ActivationGenerator(
        cfg.num_features,
        alone.firing_probabilities,
        alone.std_firing_magnitudes,
        alone.mean_firing_magnitudes,
        modify_activations=[fire_composites, *hierarchy],
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
            configuration.apply(override, {"sae": sae}, origins)
    if sae.setdefault("d_in", d_in) != d_in:
        raise ConfigError(f"'sae.d_in' is {sae['d_in']}, hidden_dim {d_in}; leave d_in out.")
    return sae


def _require_probabilities(key: str, values: Tensor) -> None:
    low, high = (end.item() for end in values.aminmax())
    if low < 0 or high > 1:
        raise ConfigError(f"'{key}' must lie between 0 and 1; it is {low:g} to {high:g}.")


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", label).lstrip(".") or "sae"


# --- measuring ------------------------------------------------------------------------------------


def match(cosines: Tensor) -> Tensor:
    """Pair columns with rows one to one so that the sum of their cosines is the largest possible.

    cosines: (rows, columns). Returns (columns,) int64, each column's row, or -1 where none is left.
    """
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    row_of = torch.full((cosines.shape[1],), -1)
    row_of[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return row_of


@torch.no_grad()
def measure(
    sae: SAE[Any], model: SyntheticModel, members: Tensor, samples: int, batch_size: int
) -> dict[str, Any]:
    """Hold an SAE against the true features, on `samples` activations drawn from the model.

    Cosines are between decoder rows and true directions, with their sign. A latent fires where its
    activation is not zero; firing is compared between each feature and the latent matched with it,
    whether that is near it or not, and averaged over features. Returns what `toy.json` says of an
    SAE, shares in [0, 1]; what is undefined is None, with the reason in "undefined".
    """
    features = model.feature_dict.feature_vectors
    composites = (members * model.activation_generator.mean_firing_magnitudes) @ features
    directions = torch.cat([features, composites])
    cosines = cosine_similarities(sae.W_dec, directions)
    of_features, of_composites = cosines.split([len(features), len(composites)], dim=1)
    latent_of, cosine = _matched(of_features)
    _, composite_cosine = _matched(of_composites)

    metrics = registered_metrics()
    fired = torch.zeros(3, len(features))  # samples: the feature, its latent, both at once
    alive = torch.zeros(len(cosines), dtype=torch.bool)
    for start in range(0, samples, batch_size):
        x, feature_acts = model.sample_with_features(min(batch_size, samples - start))
        acts = sae.encode(x)
        for metric in metrics.values():
            metric.update(Batch(x, sae.decode(acts), acts))
        feature, latent = feature_acts > 0, (acts != 0)[:, latent_of] & (latent_of >= 0)
        fired += torch.stack([feature.sum(0), latent.sum(0), (feature & latent).sum(0)])
        alive |= (acts != 0).any(0)
    recall, precision = fired[2] / fired[0], fired[2] / fired[1]  # NaN where nothing fires
    found = cosine > FOUND

    values: dict[str, Any] = {}
    undefined: dict[str, str] = {}
    for name, metric in metrics.items():
        try:
            values[name] = metric.compute()
        except UndefinedMetric as error:
            values[name], undefined[name] = None, str(error)
    values.update(
        true_l0=fired[0].sum().item() / samples,
        mmcs_features=of_features.amax(0).mean().item(),
        mmcs_latents=of_features.amax(1).mean().item(),
        features_found=found.double().mean().item(),
        feature_precision=_number((found & alive[latent_of]).sum() / alive.sum()),
        firing_recall=_number(recall.nanmean()),
        firing_precision=_number(precision.nanmean()),
        composites_found=_number((composite_cosine > FOUND).double().mean()),
        b_dec_norm=sae.b_dec.norm().item(),
    )
    undefined |= {name: why for name, why in _UNDEFINED.items() if values[name] is None}
    order = _drawn_order(cosines)
    return {
        **values,
        "undefined": undefined,
        "matches": {
            "latent": [row if row >= 0 else None for row in latent_of.tolist()],
            "cosine": [_number(value) for value in cosine],
            "firing_recall": [_number(value) for value in recall],
            "firing_precision": [_number(value) for value in precision],
        },
        "heatmap": {
            "latents": order,
            "dead": [row for row in order if not alive[row]],
            "cosines": [[round(c, 4) for c in row] for row in cosines[order].tolist()],
            "bias": [
                round(c, 4) for c in cosine_similarities(sae.b_dec[None], directions)[0].tolist()
            ],
        },
    }


def _matched(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's row by `match`, and its cosine there, NaN where it has none."""
    row_of = match(cosines)
    cosine = cosines[row_of, torch.arange(len(row_of))]
    return row_of, torch.where(row_of >= 0, cosine, torch.nan)


def _drawn_order(cosines: Tensor) -> list[int]:
    """Latents by the column they are matched with, then the others by their nearest column."""
    matched = [row for row in match(cosines).tolist() if row >= 0]
    nearest = cosines.argmax(1).argsort(stable=True).tolist()
    return matched + [row for row in nearest if row not in set(matched)]


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


# --- running --------------------------------------------------------------------------------------


def run(toy: Toy, output: str | Path) -> dict[str, Any]:
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
        (folder / CONFIG_FILE).write_text(configuration.to_yaml(toy.mapping), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Output folder '{folder}' cannot be written: {error}") from error
    results: list[dict[str, Any]] = []
    for label, config in toy.saes.items():
        started, name = time.perf_counter(), _file_name(label)
        _train(toy, label, folder / "saes" / name)
        sae = load_sae(folder / "saes" / name)
        torch.manual_seed(training.seed + 1)  # other activations than those trained on
        measured = measure(sae, toy.model, toy.members, training.eval_samples, training.batch_size)
        share = f"{measured['features_found']:.0%} of features found"
        figure = plots.cosine_heatmap(f"{label}: {share}", measured, toy.members.shape[1])
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
