"""Measure any SAE that SAELens can load: the metrics of `metrics`, and what the model loses.

Forward passes over held-out text: the model as it is, with x̂ in place of x, and with zeros in place
of x; several SAEs of one hook point share the first and the last. Special tokens and positions
outside `seqpos_slice`, as the SAE's metadata gives them, are neither measured nor replaced (some
models have activations a hundred times larger at position 0, which would dominate every variance),
and the zero ablation touches the same positions only.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE
from torch import Tensor

from ..config.run import unpackaged
from ..errors import ConfigError, UndefinedMetric
from ..metrics.batch import NOT_FINITE
from ..metrics.decoder import COHERENCE, affordable_rows, coherence
from ..metrics.firing import LatentDensity
from ..metrics.registered import registered_metrics
from ..model.text import open_text, token_batches, token_sequences
from ..plugins.about import about
from ..results import shortcomings, versions
from ..saes.load import load_sae, require_folded, training_tokens
from .activations import hook_point_of
from .model_loss import Measurement, Totals, flattened_heads
from .options import DEFAULTS, EvalOptions
from .prefixes import prefixes_of, told

DEFAULT_TOKENS = DEFAULTS.tokens


def evaluate(
    source: str | Path | SAE[Any],
    options: EvalOptions = DEFAULTS,
    *,
    sae_id: str | None = None,
    revision: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Evaluate an SAE on held-out text; return the dictionary that becomes `results.json`.

    source: a run's folder, a checkpoint's folder, an SAE, or with `sae_id` a SAELens release.
    revision: a branch, tag or commit, of the repository OWNER/NAME that the release then is.
    changes: fields of EvalOptions by keyword, as in `evaluate("run", tokens=10_000)`.

    l0, fvu, gamma, coherence, … as in `metrics`; loss_recovered, dimensionless; nats_lost and kl
    in nats per token. A metric without a value is None, with the reason under `undefined`. With
    `prefixes` there is a list of that name: width, l0, fvu, … of the first so many latents.
    Raises ArtifactError for a damaged SAE, ConfigError for a model or dataset that does not fit.
    """
    options = replace(options, **changes)
    sae = load_sae(source, sae_id=sae_id, revision=revision, device=options.device)
    prefixes = prefixes_of(sae) if options.prefixes else {}
    found = evaluate_all({"": sae, **prefixes}, options)
    results = found.pop("")
    if prefixes:
        results["prefixes"] = told({**found, str(sae.cfg.d_sae): results})
    results["training_tokens"] = training_tokens(source)
    if not isinstance(source, SAE):
        results["path"] = path_of(source, sae_id, revision)
    return results


def path_of(source: str | Path, sae_id: str | None, revision: str | None) -> str:
    """Where a measured SAE was found: its folder, or REPOSITORY/ID@REVISION."""
    path = "/".join(filter(None, [str(source), sae_id]))
    return f"{path}@{revision}" if revision else path


def evaluate_all(
    saes: Mapping[str, SAE[Any]], options: EvalOptions = DEFAULTS, **changes: Any
) -> dict[str, dict[str, Any]]:
    """Evaluate SAEs of one model and hook point on the same tokens; return name → results.

    For N SAEs the model runs N + 2 times instead of 3 N. Options and errors are `evaluate`'s.
    Raises ConfigError for SAEs that were not trained on the same kind of tokens.
    """
    started = time.perf_counter()
    options = replace(options, **changes)
    _require_same_tokens(saes.values())
    first = next(iter(saes.values()))
    metadata = first.cfg.metadata
    for sae in saes.values():
        require_folded(sae)
    point = hook_point_of(first, options)
    for sae in saes.values():
        point.require_width(sae.cfg.d_in)
    dataset = options.dataset if options.dataset is not None else metadata.dataset_path
    text, split = open_text(dataset, options.split)
    totals = {name: Totals() for name in saes}
    metrics = {name: registered_metrics() for name in saes}
    densities = {name: LatentDensity() for name in saes}
    measurement = Measurement(saes, point)
    per_token = max(*(sae.cfg.d_sae for sae in saes.values()), point.sizes()[1])
    sequences = token_sequences(first, point, text)
    with contextlib.ExitStack() as stack:
        for sae in saes.values():
            stack.enter_context(flattened_heads(sae))
        for tokens_BP, index_B in token_batches(sequences, options.tokens, per_token):
            for name, batch in measurement.measure(tokens_BP, index_B, totals):
                for metric in (*metrics[name].values(), densities[name]):
                    metric.update(batch)
    if not all(total.tokens for total in totals.values()):
        raise ConfigError("There is nothing to measure: no token is left after the exclusions.")
    named = dataset if isinstance(dataset, str | Path) else metadata.dataset_path
    results: dict[str, dict[str, Any]] = {}
    compared = functools.cache(_compared_rows)  # prefixes share one decoder
    for name, sae in saes.items():
        compare = functools.partial(compared, sae.W_dec) if options.coherence else _left_out
        values, undefined = _values(metrics[name], totals[name], compare)
        details = sae.cfg.metadata.training_architecture_details or {}
        reached = sae.cfg.metadata.l1_coefficient_reached
        trained = {
            "l1_coefficient": reached or details.get("l1_coefficient"),
            "target_l0": details.get("target_l0"),
        }
        results[name] = {
            "architecture": sae.cfg.architecture(),
            "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae,
            "model_name": unpackaged(options.model_name or metadata.model_name),
            "hook_name": point.name,
            "dataset": unpackaged(named and str(named)),
            "tokens": totals[name].tokens,
            "training_tokens": None,
            **trained,
            **values,
            "undefined": undefined,
            **_notes({**values, **trained}, sae.W_dec),
            "histograms": _histograms(sae, densities[name]),
            "split": split,
            "path": None,
            "seconds": round(time.perf_counter() - started, 2),
            "versions": versions(),
        }
    return results


#: Metadata that decides which tokens an SAE sees.
_TOKENS = (
    *("model_name", "hook_name", "hook_head_index", "dataset_path", "context_size"),
    *("seqpos_slice", "prepend_bos", "exclude_special_tokens", "sequence_separator_token"),
    "disable_concat_sequences",
)


def _require_same_tokens(saes: Iterable[SAE[Any]]) -> None:
    first, *others = (sae.cfg.metadata for sae in saes)
    for name, other in itertools.product(_TOKENS, others):
        ours, theirs = (
            list(value) if isinstance(value, tuple) else value  # JSON has no tuples
            for value in (other.get(name), first.get(name))
        )
        if ours != theirs:
            raise ConfigError(
                f"SAEs with different {name} ({ours!r} and {theirs!r}) cannot be measured together."
            )


def _histograms(sae: SAE[Any], density: LatentDensity) -> dict[str, dict[str, list[float]]]:
    """Histograms over latents, name → edges (n + 1) and counts (n): density and parameters.

    Latents that never fired are not in that of the density; `dead_share` counts them.
    """
    try:
        fired = density.compute()
    except UndefinedMetric:
        fired = torch.zeros(0)
    values = {"log10_latent_density": fired[fired > 0].log10()}
    declared = about(sae.cfg.architecture()).histograms
    for name, parameter in sae.named_parameters(recurse=False):  # not those of a layer inside it
        # Where nothing is declared: the one vector that is not per latent is b_dec.
        plotted = name != "b_dec" if declared is None else name in declared
        if plotted and parameter.shape == (sae.cfg.d_sae,):
            values[name] = parameter.detach().float().cpu()
    histograms: dict[str, dict[str, list[float]]] = {}
    for name, value in values.items():
        value = value[value.isfinite()]
        if value.numel():
            counts, edges = torch.histogram(value.double(), bins=40)
            histograms[name] = {"edges": edges.tolist(), "counts": counts.long().tolist()}
    return histograms


def _values(
    metrics: Mapping[str, Any], totals: Totals, compare: Callable[[], dict[str, float]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the metrics off: name → value, None where there is none, and name → why.

    compare: gives the decoder rows' coherence.
    """
    values: dict[str, Any] = {}
    model_values, undefined = totals.values()

    def read(names: tuple[str, ...], compute: Callable[[], Any]) -> None:
        try:
            found = compute()
            values.update(found if isinstance(found, dict) else {names[0]: found})
        except UndefinedMetric as error:
            values.update(dict.fromkeys(names))
            undefined.update(dict.fromkeys(names, str(error)))

    for name, metric in metrics.items():
        read((name,), metric.compute)
        if hasattr(metric, "interval"):
            read((f"{name}_ci",), metric.interval)
    values.update(model_values)
    read(COHERENCE, compare)
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(map(math.isfinite, cast("list[float]", numbers))):
            values[name], undefined[name] = None, NOT_FINITE
    return values, undefined


def _compared_rows(W_dec: Tensor) -> dict[str, float]:
    return coherence(W_dec, n_rows=affordable_rows(W_dec))


def _left_out() -> dict[str, float]:
    raise UndefinedMetric("Left out, as asked for with --no-coherence.")


def _notes(values: Mapping[str, Any], W_dec: Tensor) -> dict[str, dict[str, str]]:
    """`notes`, name → what to know about its value, where there is something."""
    notes = shortcomings(values)
    n_rows = affordable_rows(W_dec)
    if n_rows < len(W_dec) and values["coherence"] is not None:
        note = f"An estimate: {n_rows:,} of {len(W_dec):,} rows were compared with all others."
        notes |= dict.fromkeys(COHERENCE, note)
    return {"notes": notes} if notes else {}
