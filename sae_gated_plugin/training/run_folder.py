"""A run's folder: its files, who may write there, and what it was begun with."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from ..config.run import RunConfig
from ..errors import ConfigError
from ..files import create, locked
from ..results import versions

logger = logging.getLogger("sae_gated_plugin")

RUN_FILE = "run.yaml"
RESULTS_FILE = "results.json"
_SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, RUNNER_CFG_FILENAME)
_RUN_FILES = (RUN_FILE, RESULTS_FILE, *_SAE_FILES, "checkpoints")


def how_to_go_on(folder: Path | str, ranks: int = 1) -> str:
    """The command that continues a run, which as many processes trained."""
    command = "sae-gated"
    if ranks > 1:
        command = f"torchrun --nproc-per-node {ranks} -m sae_gated_plugin"
    return f"go on with: {command} train --resume {shlex.quote(str(folder))}"


def only_measuring_is_left(folder: Path | str) -> str:
    """What to do for a run that is trained and not measured."""
    return f"The SAE is saved; only measuring is left; {how_to_go_on(folder)}"


def evaluation_tokens(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """SAELens's own number of tokens to evaluate on."""
    prompts = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
    return cfg.n_eval_batches * prompts * cfg.context_size


def require_free(folder: Path) -> None:
    """Raise ConfigError if the folder is a file or already holds a run."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"Output folder '{folder}' is a file.")
    present = [name for name in _RUN_FILES if (folder / name).exists()]
    if present:
        raise ConfigError(
            f"Output folder '{folder}' already holds a run ({', '.join(present)}); "
            "nothing was changed. Choose another with --output, or go on with --resume "
            f"{shlex.quote(str(folder))}."
        )


@contextmanager
def claimed(folder: Path, config: RunConfig) -> Generator[None]:
    """Write run.yaml, which makes the folder this run's, and lock it; of two, one succeeds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        create(folder / RUN_FILE, config.to_yaml())
    except FileExistsError:
        require_free(folder)
        raise
    except OSError as error:
        raise ConfigError(f"Output folder '{folder}' cannot be written: {error}") from error
    with locked(folder / RUN_FILE):
        yield


def begun_with(config: RunConfig, ranks: int = 1) -> dict[str, Any]:
    """What a checkpoint says of its run: the configuration, without where its folder lies, and the
    machine, on which the last bits of the numbers depend. ranks: how many processes train it.
    """
    mapping = {k: v for k, v in config.mapping.items() if k != "output_path"}
    device = config.runner.device
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    machine = {**versions(), "threads": threads, "device": device, "processes": ranks}
    return {"run": json.loads(json.dumps(mapping, default=str)), "machine": machine}


def compare_beginnings(
    folder: Path, config: RunConfig, manifest: dict[str, Any], ranks: int = 1
) -> None:
    """Raise ConfigError for a configuration that is not the checkpoint's; warn where the machine
    is another one.
    """
    now = begun_with(config, ranks)
    changed = _differences(manifest["run"], now["run"])
    if changed:
        raise ConfigError(
            f"'{folder / RUN_FILE}' was changed ({', '.join(changed)}) since the checkpoint was "
            "written; a run can only be resumed as it was begun. Put it back, or train with the "
            "change in a new folder."
        )
    then, here = {"processes": 1, **manifest["machine"]}, now["machine"]
    if others := _differences(then, here):
        logger.warning(
            "The checkpoint was written under other circumstances (%s): numbers may differ in "
            "their last bits from an uninterrupted run's.",
            "; ".join(f"{name}: {then.get(name)}, now {here.get(name)}" for name in others),
        )


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(key for key in {**then, **now} if then.get(key) != now.get(key))
