"""Sparse probing: how well a few latents classify real texts, with the sae-probes benchmark.

Kantamneni et al. 2025 (arXiv 2502.16681): on each data set the k latents whose mean activation
differs most between the classes feed a logistic regression; beside it one on all raw activations.
sae-probes has data, splits and probes; the activations come from here, so that any model that
SAELens loads, a folder's too, can be probed. They are those of each text's last token.

Shapes: N texts, D the hook point's width.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from scipy.special import stdtrit
from torch import Tensor

from ..config.run import unpackaged
from ..errors import ArtifactError, ConfigError, Interrupted, nearest
from ..files import read_json, sha256, write_json
from ..model.hook_point import HookPoint
from ..progress import counted
from ..results import PROBE_KS, probe_key, versions
from ..saes.load import load_sae, require_folded
from .activations import hook_point_of
from .model_loss import flattened_heads
from .options import DEFAULTS, EvalOptions

PROBES_FILE = "probes.json"
#: What an interrupted probing has measured so far, or an earlier one of other data sets.
UNFINISHED_FILE = "probes_unfinished.json"
#: 30 of the benchmark's 113 by default, every so many: all take hours on a CPU.
DEFAULT_DATASETS, DEFAULT_SEEDS = 30, 3
LEVEL = 0.95  # of intervals

_MODEL = "model"  # its name in the files that sae-probes looks for
_MOST_TOKENS = 1024  # of a text, the last ones; sae-probes'
_TOKENS_AT_ONCE = 8192


def probe(
    runs: Sequence[str | Path],
    datasets: Sequence[str] = (),
    *,
    n_datasets: int = DEFAULT_DATASETS,
    seeds: int = DEFAULT_SEEDS,
    options: EvalOptions = DEFAULTS,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Probe SAEs of one model and hook point; write `probes.json` beside each `results.json`.

    runs: folders of SAEs. datasets: names of sae-probes', by default `n_datasets` of them, evenly
    spread. seeds: how many splits, and probes, per data set. changes: fields of EvalOptions by
    keyword; of them model, model_name, device and trust_model_options matter.

    A result has `probe_auc_K`, the mean over data sets and seeds of the area under the curve with
    K latents, `probe_auc_raw`, that of the probe on raw activations, their 95 % intervals over
    seeds, and `by_dataset`. The means go into the run's `results.json` as well, where there is one.
    What a data set gave is kept at once; a later call with the same seeds probes neither an SAE nor
    the raw activations on it again.
    Raises ConfigError without sae-probes, for unknown data sets and for SAEs of different models,
    Interrupted on SIGINT.
    """
    started = time.perf_counter()
    options = replace(options, **changes)
    if seeds < 1 or n_datasets < 1:
        raise ConfigError(f"seeds and n_datasets must be at least 1; got {seeds}, {n_datasets}.")
    benchmark = _benchmark()
    chosen = _chosen(benchmark.DATASETS, datasets, n_datasets)
    for run in runs:  # before the hours of work
        if Path(run).is_dir() and not os.access(run, os.W_OK):
            raise ArtifactError(f"'{run}' cannot be written, and {PROBES_FILE} would go there.")
    saes = {str(run): load_sae(run, device=options.device) for run in runs}
    _require_one_place(saes)
    for sae in saes.values():
        require_folded(sae)
    first = next(iter(saes.values()))
    point = hook_point_of(first, options)
    for sae in saes.values():
        point.require_width(sae.cfg.d_in)
    model_name = unpackaged(options.model_name or first.cfg.metadata.model_name)
    about = {"model": model_name, "seeds": seeds, "sae-probes": benchmark.__version__}
    kept = {name: _Kept(Path(name), **about) for name in saes}
    done = {dataset for dataset in chosen if all(dataset in of.by_dataset for of in kept.values())}
    try:
        for dataset in counted([d for d in chosen if d not in done], "probing", "set"):
            missing = {n: sae for n, sae in saes.items() if dataset not in kept[n].by_dataset}
            raw = next((of.raw(dataset) for n, of in kept.items() if n not in missing), None)
            aucs = _probed(benchmark, point, dataset, missing, seeds, options.device, raw)
            for name in missing:
                kept[name].add(dataset, aucs[name] | aucs[""])
            done.add(dataset)
    except KeyboardInterrupt:
        raise Interrupted(
            signal.SIGINT,
            f"{len(done)} of {len(chosen)} data sets are done and kept; the same command goes on.",
        ) from None
    results: list[dict[str, Any]] = []
    for name, sae in saes.items():
        by_dataset = {dataset: kept[name].by_dataset[dataset] for dataset in chosen}
        result: dict[str, Any] = {
            "architecture": sae.cfg.architecture(),
            "model_name": model_name,
            "hook_name": point.name,
            **_means(by_dataset, seeds),
            "datasets": len(chosen),
            "seeds": seeds,
            "by_dataset": by_dataset,
            "of": kept[name].of,
            "path": name,
            "seconds": round(time.perf_counter() - started, 2),
            "versions": {**versions(), "sae-probes": benchmark.__version__},
        }
        write_json(Path(name) / PROBES_FILE, result)
        file = Path(name) / "results.json"
        if file.exists():
            means = {key: value for key, value in result.items() if key.startswith("probe_")}
            write_json(file, {**read_json(file), **means})
        kept[name].settle(by_dataset)
        results.append(result)
    return results


#: Of one SAE, or of raw activations: measure → by seed.
Aucs = dict[str, list[float]]


class _Kept:
    """What is done of an SAE's probing, in a file of its folder until its results have it.

    by_dataset: data set → measure → by seed, of an earlier probing that was finished too. What was
    measured otherwise, with other weights, seeds or versions, is not taken.
    """

    def __init__(self, run: Path, **of: Any):
        self.file = run / UNFINISHED_FILE
        self.of = {"weights": sha256(run / SAE_WEIGHTS_FILENAME), **of}
        self.by_dataset: dict[str, Aucs] = {}
        for file in (run / PROBES_FILE, self.file):
            found = read_json(file) if file.exists() else {}
            if found.get("of") == self.of:
                self.by_dataset |= found["by_dataset"]

    def raw(self, dataset: str) -> Aucs:
        """What the probe on raw activations gave there."""
        key = probe_key("raw")
        return {key: self.by_dataset[dataset][key]}

    def add(self, dataset: str, aucs: Aucs) -> None:
        """Keep what was measured on a data set."""
        self.by_dataset[dataset] = aucs
        self._write()

    def settle(self, written: Mapping[str, Aucs]) -> None:
        """Leave here only what the results just written, of data sets asked for, do not have."""
        if self.by_dataset.keys() <= written.keys():
            self.file.unlink(missing_ok=True)
        else:
            self._write()

    def _write(self) -> None:
        write_json(self.file, {"of": self.of, "by_dataset": self.by_dataset})


def _benchmark() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("sae_probes")
    except ImportError as error:
        raise ConfigError(
            f"Probing needs sae-probes, which is not here ({error}); install it with: "
            "pip install 'sae-gated-plugin[probes]'"
        ) from error


def _chosen(known: Sequence[str], wanted: Sequence[str], most: int) -> list[str]:
    for name in wanted:
        if name not in known:
            raise ConfigError(
                f"sae-probes has no data set '{name}'.{nearest(name, known)} It has {len(known)}, "
                f"such as {', '.join(known[:3])}; sae_probes.DATASETS lists them."
            )
    if wanted:
        return list(dict.fromkeys(wanted))
    number = min(most, len(known))
    return [known[i * len(known) // number] for i in range(number)]


def _require_one_place(saes: Mapping[str, SAE[Any]]) -> None:
    if not saes:
        raise ConfigError("Give at least one RUN to probe.")
    first = next(iter(saes.values())).cfg.metadata
    for name, sae in saes.items():
        for key in ("model_name", "hook_name", "hook_head_index"):
            here, there = sae.cfg.metadata.get(key), first.get(key)
            if here != there:
                raise ConfigError(
                    f"'{name}' has {key} {here!r}, the first SAE {there!r}; SAEs that are probed "
                    "together share their activations. Probe them one by one."
                )


@contextlib.contextmanager
def _quiet() -> Any:
    """sae-probes prints a line per probe, scikit-learn warns of what sae-probes asks of it."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _probed(
    benchmark: Any,
    point: HookPoint,
    dataset: str,
    saes: Mapping[str, SAE[Any]],
    seeds: int,
    device: str,
    raw: Aucs | None,
) -> dict[str, Aucs]:
    """Areas under the curve on one data set, by SAE, and under "" those of raw activations.

    raw: those, where they are known; they take most of the time.
    """
    aucs: dict[str, Aucs] = {"": raw or {}}
    with tempfile.TemporaryDirectory() as cache, _quiet():
        _write_activations(point, dataset, Path(cache))
        for seed in range(seeds):
            common: dict[str, Any] = {
                "model_name": _MODEL,
                "hook_name": point.name,
                "setting": "normal",
                "model_cache_path": cache,
                "datasets": [dataset],
                "device": device,
                "seed": seed,
            }
            if raw is None:
                with tempfile.TemporaryDirectory() as folder:
                    benchmark.run_baseline_evals(**common, results_path=folder)
                    _collect(aucs[""], Path(folder), raw=True)
            for name, sae in saes.items():
                own: dict[str, Any] = {"sae": sae, "reg_type": "l1", "ks": list(PROBE_KS)}
                with tempfile.TemporaryDirectory() as folder, flattened_heads(sae):
                    benchmark.run_sae_evals(**own, **common, results_path=folder)
                    _collect(aucs.setdefault(name, {}), Path(folder), raw=False)
    return aucs


def _write_activations(point: HookPoint, dataset: str, cache: Path) -> None:
    """Where sae-probes would keep those of a model that it loads itself, and so finds them."""
    data = importlib.import_module("sae_probes.utils_data")
    folder = cache / f"model_activations_{_MODEL}"
    folder.mkdir()
    texts: list[str] = data.read_numbered_dataset_df(dataset)["prompt"].astype(str).tolist()
    torch.save(_last_tokens(point, texts), folder / f"{dataset}_{point.name}.pt")


def _last_tokens(point: HookPoint, texts: Sequence[str]) -> Tensor:
    """Activations at each text's last token, (N, D) float32 on the CPU."""
    most = min(_MOST_TOKENS, point.positions() or _MOST_TOKENS)
    encode = point.model.tokenizer
    tokens = [torch.tensor((encode(text)["input_ids"] or [0])[-most:]) for text in texts]
    by_length = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    found: dict[int, Tensor] = {}
    while by_length:
        size = max(1, _TOKENS_AT_ONCE // len(tokens[by_length[-1]]))
        part, by_length = by_length[-size:], by_length[:-size]
        # Causal models: what stands after the last token changes nothing at it.
        padded_BP = torch.nn.utils.rnn.pad_sequence([tokens[i] for i in part], batch_first=True)
        acts_BPD = point.read(padded_BP)
        for row, i in enumerate(part):
            found[i] = acts_BPD[row, len(tokens[i]) - 1].float().cpu()
    return torch.stack([found[i] for i in range(len(texts))])


def _collect(aucs: Aucs, folder: Path, raw: bool) -> None:
    """Add what sae-probes has just written of one data set and seed."""
    (file,) = folder.rglob("*.json")
    for metrics in json.loads(file.read_text("utf-8")):
        key = probe_key("raw" if raw else metrics["k"])
        aucs.setdefault(key, []).append(float(metrics["test_auc"]))


def _means(by_dataset: Mapping[str, Mapping[str, list[float]]], seeds: int) -> dict[str, Any]:
    """Means over data sets and seeds, and Student's intervals over seeds."""
    values: dict[str, Any] = {}
    for key in map(probe_key, (*PROBE_KS, "raw")):
        of_seed = [
            statistics.fmean(found[key][seed] for found in by_dataset.values())
            for seed in range(seeds)
        ]
        mean = statistics.fmean(of_seed)
        values[key], values[f"{key}_ci"] = mean, None
        if seeds > 1:
            error = statistics.stdev(of_seed) / math.sqrt(seeds)
            half = float(stdtrit(seeds - 1, 0.5 + LEVEL / 2)) * error
            values[f"{key}_ci"] = [mean - half, mean + half]
    return values
