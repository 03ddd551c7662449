"""Measure any SAE that SAELens can load: the metrics of `metrics.py`, and what the model loses.

Forward passes over held-out text: the model as it is, with x̂ in place of x, and with zeros in place
of x; several SAEs of one hook point share the first and the last. Special tokens and positions
outside `seqpos_slice`, as the SAE's metadata gives them, are neither measured nor replaced (some
models have activations a hundred times larger at position 0, which would dominate every variance),
and the zero ablation touches the same positions only.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE
from torch import Tensor

from ..config.run import unpackaged
from ..errors import ArtifactError, ConfigError, UndefinedMetric
from ..metrics.decoder import COHERENCE, coherence
from ..metrics.firing import LatentDensity
from ..metrics.registered import registered_metrics
from ..model.text import open_text, token_batches, token_sequences
from ..plugins.about import about
from ..results import versions
from ..saes.load import load_sae, training_tokens
from .activations import hook_point_of
from .model_loss import Measurement, Totals, flattened_heads

DEFAULT_TOKENS = 100_000


def evaluate(
    source: str | Path | SAE[Any],
    *,
    sae_id: str | None = None,
    model: Any = None,
    model_name: str | None = None,
    dataset: Any = None,
    split: str | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "cpu",
    trust_model_options: bool = False,
) -> dict[str, Any]:
    """Evaluate an SAE on held-out text; return the dictionary that becomes `results.json`.

    source: a run's folder, a checkpoint's folder, an SAE, or with `sae_id` a SAELens release.
    model: an already loaded SAELens-wrapped model; model_name: load this instead of the one in the
        SAE's metadata. dataset: a path or name, or a loaded dataset; default the metadata's.
    split: default is the first of validation, test, train that the dataset has.
    tokens: how many tokens of text to read at most; `tokens` in the result counts measured ones.
    trust_model_options: load the model with whatever the SAE's metadata asks for, not only with
        MODEL_OPTIONS; `trust_remote_code`, for one, runs code of the model's author.

    l0, fvu, gamma, coherence, … as in `metrics.py`; loss_recovered, dimensionless; nats_lost and kl
    in nats per token. A metric without a value is None, with the reason under `undefined`.
    Raises ArtifactError for a damaged SAE, ConfigError for a model or dataset that does not fit.
    """
    sae = load_sae(source, sae_id=sae_id, device=device)
    results = evaluate_all(
        {"": sae},
        model=model,
        model_name=model_name,
        dataset=dataset,
        split=split,
        tokens=tokens,
        device=device,
        trust_model_options=trust_model_options,
    )[""]
    results["training_tokens"] = training_tokens(source)
    if not isinstance(source, SAE):
        results["path"] = "/".join(filter(None, [str(source), sae_id]))
    return results


def evaluate_all(
    saes: Mapping[str, SAE[Any]],
    *,
    model: Any = None,
    model_name: str | None = None,
    dataset: Any = None,
    split: str | None = None,
    tokens: int = DEFAULT_TOKENS,
    device: str = "cpu",
    trust_model_options: bool = False,
) -> dict[str, dict[str, Any]]:
    """Evaluate SAEs of one model and hook point on the same tokens; return name → results.

    For N SAEs the model runs N + 2 times instead of 3 N. Arguments and errors are `evaluate`'s.
    Raises ConfigError for SAEs that were not trained on the same kind of tokens.
    """
    started = time.perf_counter()
    first = next(iter(saes.values()))
    metadata = first.cfg.metadata
    for sae in saes.values():
        _require_same_tokens(sae.cfg.metadata, metadata)
        if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
            raise ArtifactError(
                f"The SAE expects activations normalised by {sae.cfg.normalize_activations}, but "
                "the statistics for it are neither folded into its weights nor stored beside them."
            )
    point = hook_point_of(first, model, model_name, device, trust_model_options)
    for sae in saes.values():
        point.require_width(sae.cfg.d_in)
    text, split = open_text(dataset if dataset is not None else metadata.dataset_path, split)
    totals = {name: Totals() for name in saes}
    metrics = {name: registered_metrics() for name in saes}
    densities = {name: LatentDensity() for name in saes}
    measurement = Measurement(saes, point)
    per_token = max(*(sae.cfg.d_sae for sae in saes.values()), point.sizes()[1])
    with contextlib.ExitStack() as stack:
        for sae in saes.values():
            stack.enter_context(flattened_heads(sae))
        for batch_tokens, index in token_batches(
            token_sequences(first, point, text), tokens, per_token
        ):
            for name, batch in measurement.measure(batch_tokens, index, totals):
                for metric in (*metrics[name].values(), densities[name]):
                    metric.update(batch)
    if not all(total.tokens for total in totals.values()):
        raise ConfigError("There is nothing to measure: no token is left after the exclusions.")
    results: dict[str, dict[str, Any]] = {}
    for name, sae in saes.items():
        values, undefined = _values(metrics[name], totals[name], sae.W_dec)
        details = sae.cfg.metadata.training_architecture_details or {}
        results[name] = {
            "architecture": sae.cfg.architecture(),
            "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae,
            "model_name": unpackaged(model_name or metadata.model_name),
            "hook_name": point.name,
            "dataset": unpackaged(
                str(dataset) if isinstance(dataset, str | Path) else metadata.dataset_path
            ),
            "tokens": totals[name].tokens,
            "training_tokens": None,
            "l1_coefficient": sae.cfg.metadata.l1_coefficient_reached
            or details.get("l1_coefficient"),
            "target_l0": details.get("target_l0"),
            **values,
            "undefined": undefined,
            "histograms": _histograms(sae, densities[name]),
            "split": split,
            "path": None,
            "seconds": round(time.perf_counter() - started, 2),
            "versions": versions(),
        }
    return results


def _require_same_tokens(metadata: Any, other: Any) -> None:
    for name in (
        "model_name",
        "hook_name",
        "hook_head_index",
        "dataset_path",
        "context_size",
        "seqpos_slice",
        "prepend_bos",
        "exclude_special_tokens",
        "sequence_separator_token",
        "disable_concat_sequences",
    ):
        ours, theirs = (
            list(value) if isinstance(value, tuple) else value  # JSON has no tuples
            for value in (metadata.get(name), other.get(name))
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
    metrics: dict[str, Any], totals: Totals, W_dec: Tensor
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the metrics off: name → value, None where there is none, and name → why."""
    values: dict[str, Any] = {}
    model_values, undefined = totals.values()

    def read(name: str, compute: Callable[[], Any]) -> None:
        try:
            values[name] = compute()
        except UndefinedMetric as error:
            values[name], undefined[name] = None, str(error)

    for name, metric in metrics.items():
        read(name, metric.compute)
        if hasattr(metric, "interval"):
            read(f"{name}_ci", metric.interval)
    values.update(model_values)
    try:
        values.update(coherence(W_dec))
    except UndefinedMetric as error:
        values.update(dict.fromkeys(COHERENCE))
        undefined.update(dict.fromkeys(COHERENCE, str(error)))
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if value is not None and not all(map(math.isfinite, cast("list[float]", numbers))):
            values[name] = None
            undefined[name] = "Activations or reconstructions hold NaN or infinity."
    return values, undefined
