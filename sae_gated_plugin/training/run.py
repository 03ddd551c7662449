"""Configuration in, a run's folder out: SAELens's own runner, then an evaluation.

A run's folder: `cfg.json` and `sae_weights.safetensors` (SAELens's inference form),
`sparsity.safetensors`, `runner_cfg.json`, `run.yaml` (the configuration, overrides applied),
`results.json`, `checkpoints/`. While a process trains it, it holds a lock on `run.yaml`.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME

from ..config.run import QUICKSTART, RunConfig, load_config
from ..distributed.ranks import Ranks, joined
from ..errors import ConfigError, Interrupted
from ..files import locked, read_json, write_json
from ..measure.evaluate import evaluate
from ..model.hook_point import require_devices
from ..model.text import open_text
from ..results import shortcomings, versions
from . import checkpoints, wandb_log
from .run_folder import (
    RESULTS_FILE,
    RUN_FILE,
    claimed,
    compare_beginnings,
    evaluation_tokens,
    only_measuring_is_left,
    require_free,
)
from .runner import OnDivergence, Options, Runner, Start, logger


def train(
    config: RunConfig,
    output: str | Path | None = None,
    *,
    eval_tokens: int | None = None,
    on_divergence: OnDivergence = "stop",
    keep_checkpoints: int = checkpoints.KEPT,
    fused_adam: bool | None = None,
) -> dict[str, Any]:
    """Train an SAE, write its run folder, evaluate it; return what `results.json` holds.

    output: the run's folder; default the configuration's `output_path`. eval_tokens: how many
    tokens of the dataset's validation or test split to measure on; default `evaluation_tokens`.
    on_divergence: "skip" leaves out a batch whose numbers are not finite. keep_checkpoints: how
    many of the newest to keep, 0 for all. fused_adam: PyTorch's fused Adam, equal up to rounding;
    default on CUDA, and in a run that goes on what it began with.

    Raises ConfigError before anything is trained, TrainingDiverged when the numbers stop being
    finite or L0 collapses, Interrupted on SIGINT and SIGTERM, when everything is saved, and
    ArtifactError on a full disk.
    """
    options = Options(eval_tokens, on_divergence, keep_checkpoints, fused_adam)
    if output is None and config.runner.output_path is None:
        raise ConfigError("'output_path' is null and no --output is given: a run needs a folder.")
    config = config.with_output(output or config.runner.output_path or "")
    folder = Path(str(config.runner.output_path))
    with joined() as ranks:
        ranks.require_alike({**config.mapping, **vars(options), "versions": versions()})
        if ranks.restarts and ranks.first(lambda: _is_begun(folder, config)):
            return _resume(folder, options, ranks)
        ranks.first(lambda: require_free(folder))
        start = None
        path = Path(config.runner.resume_from_checkpoint or "")
        if (path / checkpoints.EXACT_STATE_FILE).exists():
            start = path, checkpoints.verify(path)
        elif config.runner.resume_from_checkpoint:
            checkpoints.require_tensors_only(path)
            if ranks.size > 1:
                raise ConfigError(
                    f"'{path}' is SAELens's checkpoint, from which one process can go on, not "
                    f"{ranks.size}; take one that sae-gated train has written."
                )
            logger.warning("'%s' is SAELens's: batches will be others than without a stop.", path)
        _require_inputs(config.runner, start)
        runner = Runner(config, start, options, ranks)
        with ExitStack() as held:
            ranks.first(lambda: held.enter_context(claimed(folder, config)))
            return _train_and_measure(runner, folder)


def resume(
    run: str | Path,
    *,
    eval_tokens: int | None = None,
    on_divergence: OnDivergence = "stop",
    keep_checkpoints: int = checkpoints.KEPT,
    fused_adam: bool | None = None,
) -> dict[str, Any]:
    """Continue a run from its newest sound checkpoint, as if it had never been interrupted.

    run: its folder. Without a checkpoint it starts from the beginning, with a warning; a run that
    is trained is measured; a finished one is left alone, with a warning. Parameters, results and
    errors are those of `train`; ConfigError also for a folder that is no run, a run that another
    process is training, and a `run.yaml` that was changed.
    """
    options = Options(eval_tokens, on_divergence, keep_checkpoints, fused_adam)
    folder = Path(run)
    with joined() as ranks:
        ranks.require_alike({"run": folder, **vars(options), "versions": versions()})
        return _resume(folder, options, ranks)


def _resume(folder: Path, options: Options, ranks: Ranks) -> dict[str, Any]:
    if not (folder / RUN_FILE).is_file():
        raise ConfigError(f"'{folder}' is not the folder of a run: it holds no {RUN_FILE}.")
    if (folder / RESULTS_FILE).exists():
        logger.warning("Run '%s' is finished; nothing was done.", folder)
        return read_json(folder / RESULTS_FILE)
    with ExitStack() as held:
        ranks.first(lambda: held.enter_context(locked(folder / RUN_FILE)))
        config = load_config(folder / RUN_FILE).with_output(folder)
        ranks.require_alike(config.mapping)
        if (folder / RUNNER_CFG_FILENAME).exists():
            logger.warning("Run '%s' is trained already; it is measured.", folder)
            return _measure_alone(folder, config.runner, options) if ranks.rank == 0 else {}
        start = ranks.first(lambda: checkpoints.newest(folder / "checkpoints"))
        if start is None:
            logger.warning("Run '%s' has no checkpoint; it starts from the beginning.", folder)
        else:
            compare_beginnings(folder, config, start[1], ranks.size)
            config.runner.resume_from_checkpoint = str(start[0])
        _require_inputs(config.runner, start)
        return _train_and_measure(Runner(config, start, options, ranks), folder)


def _is_begun(folder: Path, config: RunConfig) -> bool:
    """Whether a folder holds this run, which torchrun starts again after a process has ended."""
    file = folder / RUN_FILE
    return file.is_file() and load_config(file).mapping == config.mapping


def _train_and_measure(runner: Runner, folder: Path) -> dict[str, Any]:
    with wandb_log.until_measured(runner.cfg.logger):
        runner.run()
        runner.ranks.leave()
        if runner.ranks.rank:
            return {}  # one process measures the whole SAE, read back from the disk
        with runner.model_to_itself():
            results = _measure(folder, runner.cfg, runner.options, runner)
        wandb_log.summarize(runner.cfg.logger, results)
    return results


def _measure_alone(
    folder: Path, cfg: LanguageModelSAERunnerConfig[Any], options: Options
) -> dict[str, Any]:
    results = _measure(folder, cfg, options)
    with wandb_log.until_measured(cfg.logger):
        wandb_log.reopen(cfg.logger, folder)
        wandb_log.summarize(cfg.logger, results)
    return results


def _measure(
    folder: Path,
    cfg: LanguageModelSAERunnerConfig[Any],
    options: Options,
    runner: Runner | None = None,
) -> dict[str, Any]:
    """Evaluate a trained run, write and return its results."""
    try:
        results = evaluate(
            folder,
            model=runner.model if runner else None,
            tokens=options.eval_tokens or evaluation_tokens(cfg),
            device=cfg.device,
            trust_model_options=True,  # they are the configuration's
        )
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, only_measuring_is_left(folder)) from None
    except Exception:
        logger.warning(only_measuring_is_left(folder))
        raise
    if runner:
        results["seconds"] = runner.seconds()
    write_json(folder / RESULTS_FILE, results)
    for sentence in shortcomings(results).values():
        logger.warning("Run '%s' ended with L0 %.4g. %s", folder, results["l0"], sentence)
    return results


def quickstart(overrides: Sequence[str] = (), output: str | Path | None = None) -> dict[str, Any]:
    """Train and evaluate on the tiny language model and the text that the package carries.

    Needs no network. output: default `quickstart`, or `quickstart-2`, … if that is taken.
    """
    packaged = Path(str(resources.files("sae_gated_plugin") / QUICKSTART))
    config = load_config(packaged / "quickstart.yaml", overrides)
    if output is None and "output_path" not in config.mapping:
        number = 1
        while (output := Path("quickstart" if number == 1 else f"quickstart-{number}")).exists():
            number += 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset is not tokenized")  # nor need it be
        return train(config, output)


def _require_inputs(cfg: LanguageModelSAERunnerConfig[Any], start: Start | None) -> None:
    """Raise ConfigError for text, weights or cached activations that are not there."""
    wandb_log.require_login(cfg.logger)
    require_devices(cfg)
    open_text(cfg.dataset_path, "train")
    paths = {"resume_from_checkpoint": cfg.resume_from_checkpoint}
    if start is None:  # otherwise the weights are the checkpoint's
        paths["from_pretrained_path"] = cfg.from_pretrained_path
    if cfg.use_cached_activations:
        paths["cached_activations_path"] = cfg.cached_activations_path
    for name, path in paths.items():
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name} '{path}' does not exist.")
