"""Measure any SAE that SAELens can load: the metrics of `metrics.py`, and what the model loses.

Forward passes over held-out text: the model as it is, with x̂ in place of x, and with zeros in place
of x; several SAEs of one hook point share the first and the last. Special tokens and positions
outside `seqpos_slice`, as the SAE's metadata gives them, are neither measured nor replaced (some
models have activations a hundred times larger at position 0, which would dominate every variance),
and the zero ablation touches the same positions only.
"""

from __future__ import annotations

import contextlib
import errno
import math
import platform
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from datasets import get_dataset_split_names, load_dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm

from . import configuration
from .artifacts import load_sae, training_tokens
from .errors import ArtifactError, ConfigError, UndefinedMetric, unknown_name
from .hook_points import HookPoint, Passes, first_line, require_local
from .metrics import COHERENCE, Batch, LatentDensity, coherence, registered_metrics

DEFAULT_TOKENS = 100_000
_BATCH_NUMBERS = 2**25  # logits, or latents, held at once: 128 MiB in fp32
_CACHED_NUMBERS = 2**19  # what a loss works on at once: 2 MiB in fp32 stay in a core's cache
_HELD_OUT = ("validation", "test", "train")

#: What an SAE's metadata, which anybody may have written, can ask for when its model is loaded:
#: TransformerLens's options, and those of transformers that choose no code to run.
MODEL_OPTIONS = (
    *("fold_ln", "fold_value_biases", "center_writing_weights", "center_unembed"),
    *("refactor_factored_attn_matrices", "checkpoint_index", "checkpoint_value"),
    *("checkpoint_label", "first_n_layers", "n_ctx", "n_devices", "move_to_device"),
    *("default_prepend_bos", "default_padding_side", "dtype", "torch_dtype", "device_map"),
    *("low_cpu_mem_usage", "revision", "variant", "subfolder"),
)


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
    point = _hook_point(first, model, model_name, device, trust_model_options)
    for sae in saes.values():
        point.require_width(sae.cfg.d_in)
    text, split = open_text(dataset if dataset is not None else metadata.dataset_path, split)
    totals = {name: _Totals() for name in saes}
    metrics = {name: registered_metrics() for name in saes}
    densities = {name: LatentDensity() for name in saes}
    measurement = _Measurement(saes, point)
    per_token = max(*(sae.cfg.d_sae for sae in saes.values()), point.sizes()[1])
    with contextlib.ExitStack() as stack:
        for sae in saes.values():
            stack.enter_context(_flattened_heads(sae))
        for batch_tokens, index in _batches(_sequences(first, point, text), tokens, per_token):
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
            "model_name": configuration.unpackaged(model_name or metadata.model_name),
            "hook_name": point.name,
            "dataset": configuration.unpackaged(
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


def read_activations(sae: SAE[Any], tokens: int, device: str = "cpu") -> Tensor:
    """Activations of held-out text at the SAE's hook point, (N, d_in), N at most `tokens`.

    Of the positions and tokens that its metadata says it was trained on. Raises ConfigError or
    ArtifactError where its model or its text is not there.
    """
    metadata = sae.cfg.metadata
    point = _hook_point(sae, None, None, device)
    text, _ = open_text(metadata.dataset_path)
    measurement = _Measurement({"": sae}, point)
    found: list[Tensor] = []
    for batch, _ in _batches(_sequences(sae, point, text), tokens, point.sizes()[1]):
        x = point.run(batch)[1]
        found.append(x[measurement.measured(batch.to(point.device))])
    if not found:
        raise ConfigError("There is no text to read activations from.")
    return torch.cat(found)[:tokens]


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


# --- model and text -------------------------------------------------------------------------------


def _hook_point(
    sae: SAE[Any],
    model: Any,
    model_name: str | None,
    device: str,
    trust_model_options: bool = False,
) -> HookPoint:
    metadata = sae.cfg.metadata
    if metadata.hook_name is None:
        raise ArtifactError("The SAE's metadata has no hook_name, so it cannot be evaluated.")
    if metadata.hook_name_out not in (None, metadata.hook_name):
        raise ArtifactError(
            f"This is a transcoder: it reads '{metadata.hook_name}' and reconstructs "
            f"'{metadata.hook_name_out}'. Only SAEs can be evaluated."
        )
    if model is not None:
        point = HookPoint(model, metadata.hook_name, metadata.hook_head_index)
        point.require_exists(str(metadata.model_name))
        return point
    name = model_name or metadata.model_name
    if name is None:
        raise ConfigError("The SAE's metadata names no model; give one with model_name (--model).")
    options: dict[str, Any] = metadata.model_from_pretrained_kwargs or {}
    others = [option for option in options if option not in MODEL_OPTIONS]
    if others and not trust_model_options:
        raise ArtifactError(
            f"The SAE's metadata wants its model loaded with {', '.join(others)}, which may run "
            "code of whoever published it. If you trust them, allow it with trust_model_options "
            "(--trust-model-options)."
        )
    return HookPoint.load(
        name,
        metadata.model_class_name or "HookedTransformer",
        metadata.hook_name,
        metadata.hook_head_index,
        device=device,
        from_pretrained_kwargs=options,
    )


def open_text(dataset: Any, split: str | None = None) -> tuple[Any, str]:
    """Open a dataset by path or name for streaming; return it with the name of the split.

    split: default is the first of validation, test, train that exists. A loaded dataset is
    returned as it is. Raises ConfigError if it does not exist, cannot be reached, or lacks the
    split.
    """
    if not isinstance(dataset, str | Path):
        if dataset is None:
            raise ConfigError("The SAE's metadata names no dataset; give one with --dataset.")
        return dataset, split or str(getattr(dataset, "split", None) or "as given")
    require_local("dataset_path", str(dataset))
    try:
        known = get_dataset_split_names(str(dataset))
        if split is None:
            split = next((name for name in _HELD_OUT if name in known), known[0])
        if split not in known:
            raise ConfigError(unknown_name(f"split of dataset '{dataset}'", split, known))
        return load_dataset(str(dataset), split=split, streaming=True), split
    except ConfigError:
        raise
    except Exception as error:
        read_only = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS)
        hint = ". Set HF_HOME to a folder that can be written" if read_only else ""
        raise ConfigError(
            f"Dataset '{dataset}' cannot be opened: {first_line(error)}{hint}"
        ) from error


def _sequences(sae: SAE[Any], point: HookPoint, text: Any) -> Iterator[Tensor]:
    """Yield the token sequences, (context_size,), that training on this text would have seen."""
    metadata = sae.cfg.metadata
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset is not tokenized")
        try:
            store = ActivationsStore.from_sae(
                point.model,
                sae,
                text,
                total_tokens=1,
                disable_concat_sequences=bool(metadata.disable_concat_sequences),
                sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
            )
        except ValueError as error:
            raise ConfigError(f"The text does not fit this SAE: {error}") from error
    return store.iterable_sequences


def _batches(
    sequences: Iterator[Tensor], tokens: int, numbers_per_token: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (batch, position) tokens and (batch,) sequence numbers, up to `tokens` in all."""
    bar = tqdm(total=tokens, desc="Evaluating", unit=" tokens", disable=None, leave=False)
    with bar:
        read, count = 0, 0
        held: list[Tensor] = []
        for sequence in sequences:
            held.append(sequence)
            read += len(sequence)
            enough = read >= tokens
            if enough or len(held) * len(sequence) * numbers_per_token >= _BATCH_NUMBERS:
                yield torch.stack(held), torch.arange(count, count + len(held))
                bar.update(len(held) * len(sequence))
                count += len(held)
                held = []
            if enough:
                return
        if held:
            yield torch.stack(held), torch.arange(count, count + len(held))


# --- measuring ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _flattened_heads(sae: SAE[Any]) -> Generator[None]:
    """Hand an SAE of hook_z flat vectors, as SAELens's own evaluation does."""
    reshaping = sae.hook_z_reshaping_mode
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if reshaping:
            sae.turn_on_forward_pass_hook_z_reshaping()


@dataclass
class _Totals:
    """Pooled sums over measured tokens; losses in nats, where a next token is there to predict."""

    tokens: int = 0
    predictions: int = 0
    loss: float = 0.0
    loss_spliced: float = 0.0
    loss_ablated: float = 0.0
    kl: float = 0.0

    def values(self) -> tuple[dict[str, float | None], dict[str, str]]:
        """Return loss_recovered, nats_lost and kl, and why one of them has no value."""
        nats_lost = (self.loss_spliced - self.loss) / max(self.predictions, 1)
        nats_at_stake = (self.loss_ablated - self.loss) / max(self.predictions, 1)
        values = {"loss_recovered": None, "nats_lost": nats_lost, "kl": self.kl / self.tokens}
        if nats_at_stake <= 0:
            reason = "Zeros in place of the activations do not raise the model's loss."
            return values, {"loss_recovered": reason}
        return {**values, "loss_recovered": 1 - nats_lost / nats_at_stake}, {}


class _Measurement:
    """Runs the forward passes on a batch, adds to the totals, hands out each SAE's x and x̂."""

    def __init__(self, saes: Mapping[str, SAE[Any]], point: HookPoint):
        metadata = next(iter(saes.values())).cfg.metadata
        excluded = metadata.exclude_special_tokens or []
        if excluded is True:
            excluded = get_special_token_ids(point.model.tokenizer)
        self.saes = saes
        self.point = point
        self.passes = Passes(point)
        self.excluded = torch.tensor(excluded, dtype=torch.long, device=point.device)
        self.positions = slice(*(metadata.seqpos_slice or (None,)))

    def measured(self, tokens: Tensor) -> Tensor:
        """Which of tokens (batch, position) count, bool."""
        chosen = torch.zeros_like(tokens, dtype=torch.bool)
        chosen[:, self.positions] = True
        return chosen & ~torch.isin(tokens, self.excluded)

    @torch.no_grad()
    def measure(
        self, tokens: Tensor, index: Tensor, totals: Mapping[str, _Totals]
    ) -> Iterator[tuple[str, Batch]]:
        """tokens: (batch, position); index: (batch,), the sequences' numbers in the text."""
        tokens = tokens.to(self.point.device)
        measured = self.measured(tokens)
        at = measured.unsqueeze(-1)
        sequence = index.to(tokens.device).unsqueeze(-1).expand_as(tokens)[measured]

        logits, x = self.passes.first(tokens)
        ablated = self.passes.again(tokens, lambda acts: acts.masked_fill(at, 0))
        original = _Original(logits, tokens, measured)
        del logits
        loss_ablated, _ = original.compare(ablated)
        del ablated
        for name, sae in self.saes.items():
            # Whole sequences, for there are SAEs whose code depends on earlier positions.
            codes = sae.encode(x.to(sae.device))
            x_hat = sae.decode(codes).to(x)
            spliced = self.passes.again(tokens, _putting(x_hat, at))
            loss_spliced, kl = original.compare(spliced)
            del spliced
            totals[name].tokens += int(measured.sum())
            totals[name].predictions += int(measured[:, :-1].sum())
            totals[name].loss += original.loss
            totals[name].loss_ablated += loss_ablated
            totals[name].loss_spliced += loss_spliced
            totals[name].kl += kl
            here = measured.to(sae.device)
            yield (
                name,
                Batch(
                    x=x[measured],
                    x_hat=x_hat[measured],
                    feature_acts=(codes if codes.layout == torch.strided else codes.to_dense())[
                        here
                    ],
                    sequence=sequence,
                ),
            )


def _putting(x_hat: Tensor, at: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda acts: torch.where(at, x_hat, acts)


class _Original:
    """The model's own predictions on a batch, which others of the same tokens are compared with.

    loss: its cross-entropy, summed over measured positions with a next token, in nats.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, measured: Tensor):
        """logits: (batch, position, vocabulary); tokens, measured: (batch, position)."""
        self.at = measured.flatten().nonzero().squeeze(1)
        following = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-1)
        self.targets = following.flatten()[self.at]
        self.probs = logits.new_empty(len(self.at), logits.shape[-1], dtype=torch.float32)
        self.negative_entropy = logits.new_empty(len(self.at), dtype=torch.float64)
        self.loss = 0.0
        for rows, log_probs in self._log_probs(logits):
            self.loss += self._loss(rows, log_probs)
            probs = torch.exp(log_probs, out=self.probs[rows])
            self.negative_entropy[rows] = torch.linalg.vecdot(probs, log_probs).double()

    def compare(self, logits: Tensor) -> tuple[float, float]:
        """Summed cross-entropy of other predictions, and the KL divergence to them, in nats."""
        loss = kl = 0.0
        for rows, log_probs in self._log_probs(logits):
            loss += self._loss(rows, log_probs)
            cross = torch.linalg.vecdot(self.probs[rows], log_probs)
            kl += float((self.negative_entropy[rows] - cross).sum())
        return loss, kl

    def _log_probs(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the measured positions and their (rows, vocabulary) log-probabilities."""
        flat = logits.flatten(0, 1)
        step = max(1, _CACHED_NUMBERS // flat.shape[-1])
        for start in range(0, len(self.at), step):
            rows = slice(start, start + step)
            yield rows, flat[self.at[rows]].float().log_softmax(-1)

    def _loss(self, rows: slice, log_probs: Tensor) -> float:
        targets = self.targets[rows]
        found = log_probs.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return -float(found[targets >= 0].double().sum())


def _histograms(sae: SAE[Any], density: LatentDensity) -> dict[str, dict[str, list[float]]]:
    """Histograms over latents, name → edges (n + 1) and counts (n): density and parameters.

    Latents that never fired are not in that of the density; `dead_share` counts them.
    """
    try:
        fired = density.compute()
    except UndefinedMetric:
        fired = torch.zeros(0)
    values = {"log10_latent_density": fired[fired > 0].log10()}
    # SAELens's own classes declare no axes; their one vector that is not per latent is b_dec.
    declared = getattr(sae, "latent_axes", None)
    for name, parameter in sae.named_parameters(recurse=False):  # not those of a layer inside it
        per_latent = name != "b_dec" if declared is None else name in declared
        if per_latent and parameter.shape == (sae.cfg.d_sae,):
            values[name] = parameter.detach().float().cpu()
    histograms: dict[str, dict[str, list[float]]] = {}
    for name, value in values.items():
        value = value[value.isfinite()]
        if value.numel():
            counts, edges = torch.histogram(value.double(), bins=40)
            histograms[name] = {"edges": edges.tolist(), "counts": counts.long().tolist()}
    return histograms


def _values(
    metrics: dict[str, Any], totals: _Totals, W_dec: Tensor
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


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("sae-gated-plugin", "sae-lens", "torch", "transformer-lens", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found
