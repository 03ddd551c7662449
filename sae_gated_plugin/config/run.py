"""YAML and dotted overrides in, SAELens's own runner configuration out, strictly checked.

A configuration is SAELens's: the keys are the fields of `LanguageModelSAERunnerConfig`; `sae` holds
`architecture` and the fields of that architecture's training config; `logger` holds the fields of
`LoggingConfig`. Whatever is not such a field is an error, for a misspelt key that is silently
ignored costs a training run.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

from ..errors import ConfigError, first_line
from ..files import expanded
from .check import check_config, check_sae, config_section
from .yaml import Origins, apply_overrides, read_yaml, to_yaml

#: As model_name and dataset_path: the language model and the text that the package carries.
QUICKSTART = "quickstart"


#: Where `~` is the home folder, as in a shell.
_PATHS = (
    *("model_name", "dataset_path", "output_path", "cached_activations_path"),
    *("from_pretrained_path", "resume_from_checkpoint"),
)


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration.

    mapping: what the file and the overrides said, merged, and nothing else; becomes `run.yaml`.
    runner: SAELens's configuration built from it.
    """

    mapping: dict[str, Any]
    runner: LanguageModelSAERunnerConfig[Any]

    def with_output(self, folder: str | Path) -> RunConfig:
        """Return a copy whose results go to `folder`, checkpoints to `folder/checkpoints`.

        SAELens appends a random id to `checkpoint_path` while it builds a configuration; a run's
        folder is already its own, so here the id is left out.
        """
        folder = expanded(folder)
        runner = copy.deepcopy(self.runner)
        runner.output_path = str(folder)
        runner.checkpoint_path = str(Path(folder) / "checkpoints")
        return RunConfig({**copy.deepcopy(self.mapping), "output_path": str(folder)}, runner)

    def to_yaml(self) -> str:
        """Return the merged mapping as YAML that `load` reads back to an equal configuration."""
        return to_yaml(self.mapping)

    def load(self, source: str | Path) -> RunConfig:
        """Read another configuration of this kind."""
        return load_config(source)

    def values(self) -> dict[str, Any]:
        """What it says, however its YAML is written; without where its folder lies."""
        values = json.loads(json.dumps(self.runner.to_dict(), default=str))
        return {k: v for k, v in values.items() if k not in ("output_path", "checkpoint_path")}


def packaged(key: str) -> str:
    """Return where the package carries its `model_name` or its `dataset_path`."""
    folder = {"model_name": "model", "dataset_path": "text"}[key]
    return str(resources.files("sae_gated_plugin") / QUICKSTART / folder)


def unpackaged(path: Any) -> Any:
    """Return QUICKSTART for a path that is the package's own, anything else as it is."""
    return QUICKSTART if path in (packaged("model_name"), packaged("dataset_path")) else path


def best_device() -> str:
    """The device for a configuration that names none: cuda, mps or cpu, by what there is."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration, apply the overrides, check every key and value, build SAELens's config.

    source: a YAML file, or an equal mapping. overrides: `dotted.key=value`, values in YAML.
    Raises ConfigError (UnknownArchitecture for that one name) with a sentence that names the key,
    where it came from, and the nearest valid one.
    """
    mapping, origins = read(source, overrides)
    built = copy.deepcopy(mapping)
    for key in ("model_name", "dataset_path"):
        if built.get(key) == QUICKSTART:
            built[key] = packaged(key)
    for key in _PATHS:
        if isinstance(built.get(key), str) and built[key].startswith("~"):
            built[key] = os.path.expanduser(built[key])  # a Path would make // one of a name
    return RunConfig(mapping, _build(built, origins))


def read(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], Origins]:
    """Return a copy with the overrides applied, unchecked, and where its keys come from.

    Raises ConfigError for a file or an override that does not parse.
    """
    if isinstance(source, Mapping):
        mapping, origins = copy.deepcopy(dict(source)), Origins("the configuration")
    else:
        mapping, origins = read_yaml(source), Origins(f"'{source}'")
    for override in overrides:
        apply_overrides(override, mapping, origins)
    return mapping, origins


def _build(mapping: dict[str, Any], origins: Origins) -> LanguageModelSAERunnerConfig[Any]:
    for section, command in (("synthetic_model", "synth"), ("saes", "synth"), ("sweep", "sweep")):
        if section in mapping:
            raise ConfigError(
                f"{origins.of(section)} has a section '{section}', which a single run has not; "
                f"start it with: sae-gated {command}"
            )
    sae = config_section(mapping, "sae", origins)
    logger = config_section(mapping, "logger", origins)
    if not sae:
        raise ConfigError(f"{origins.default} has no 'sae' section; it names the architecture.")
    config_class, sae = check_sae(sae, origins)
    top = check_config(
        LanguageModelSAERunnerConfig, mapping, "", origins, sections=("sae", "logger")
    )
    logger = check_config(LoggingConfig, logger, "logger.", origins)
    if not top.get("dataset_path"):
        raise ConfigError(f"'dataset_path' is missing in {origins.default}.")
    top.setdefault("device", best_device())
    try:
        runner = LanguageModelSAERunnerConfig(
            sae=config_class(**sae), logger=LoggingConfig(**logger), **top
        )
        positions = len(range(runner.context_size)[slice(*runner.seqpos_slice)])
    except Exception as error:  # SAELens's own checks, or those of somebody's architecture
        reason = str(error) if isinstance(error, ValueError) else first_line(error)
        raise ConfigError(f"{origins.default} cannot be used: {reason}") from error
    if runner.n_batches_in_buffer * positions < runner.train_batch_size_tokens:
        raise ConfigError(  # SAELens counts one sequence per batch here, and finds out in training
            f"A buffer of n_batches_in_buffer × positions = {runner.n_batches_in_buffer} × "
            f"{positions} is smaller than train_batch_size_tokens = "
            f"{runner.train_batch_size_tokens}; raise n_batches_in_buffer."
        )
    return runner
