"""A run's folder: its files, and who may write there."""

from __future__ import annotations

import shlex
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from ..config.run import RunConfig
from ..errors import ConfigError
from ..files import create, locked

RUN_FILE = "run.yaml"
RESULTS_FILE = "results.json"
_RUN_FILES = (
    RUN_FILE,
    RESULTS_FILE,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    RUNNER_CFG_FILENAME,
    "checkpoints",
)


def only_measuring_is_left(folder: Path | str) -> str:
    """What to do for a run that is trained and not measured."""
    return f"The SAE is saved; only measuring is left; {how_to_go_on(folder)}"


def how_to_go_on(folder: Path | str) -> str:
    """The command that continues a run."""
    return f"go on with: sae-gated train --resume {shlex.quote(str(folder))}"


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
