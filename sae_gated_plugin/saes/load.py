"""Reading SAEs back: a run's folder, a checkpoint's folder, a SAELens release, or one in memory."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError

from ..config.check import convert_value, field_types
from ..errors import (
    ArtifactError,
    ConfigError,
    SaeGatedError,
    UnknownArchitecture,
    first_line,
    unknown_name,
)
from ..files import expanded, read_json


def load_sae(
    source: str | Path | SAE[Any],
    *,
    sae_id: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    keep: str | None = None,
) -> SAE[Any]:
    """Load an SAE in its inference form, from a folder or, with `sae_id`, from a SAELens release.

    A folder in SAELens's training form, such as a checkpoint's, is read as that and converted.
    revision: a branch, tag or commit of the repository that the release then must be.
    keep: the name of an architecture whose training form is left as it is, with nothing but its
    activation statistics folded in.
    Raises ArtifactError (UnknownArchitecture) with a sentence saying what is missing or damaged.
    """
    if isinstance(source, TrainingSAE):
        return _inference_form(source, device)
    if isinstance(source, SAE):
        return source
    what = f"SAE in '{source}'" if sae_id is None else f"SAE '{sae_id}' of '{source}'"
    try:
        if revision is not None:
            source, sae_id = _fetch(str(source), sae_id, revision), None
        if sae_id is None:
            sae = _from_folder(expanded(str(source)), device, keep)
        else:
            sae = SAE.from_pretrained(str(source), sae_id, device=device)
    except SaeGatedError:
        raise
    except SafetensorError as error:
        sentence = f"The weights of the {what} are damaged or cut short: {error}"
        raise ArtifactError(sentence) from error
    except Exception as error:  # SAELens's, PyTorch's, or of a third-party architecture
        # PyTorch lists missing and unexpected tensors and wrong shapes over several lines.
        whole = " ".join(str(error).split()) or type(error).__name__
        reason = whole if sae_id is None else first_line(error)
        raise ArtifactError(f"The {what} cannot be loaded: {reason}") from error
    for name, tensor in sae.state_dict().items():
        if not tensor.isfinite().all():
            raise ArtifactError(f"'{name}' of the {what} holds NaN or infinity.")
    return sae


def _fetch(repo: str, sae_id: str | None, revision: str) -> Path:
    """The folder on this disk of an SAE at a revision; SAELens's loaders know the newest alone."""
    if sae_id is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(
            f"--revision is one of a repository on the Hub: give its name, OWNER/NAME, and the "
            f"SAE's with --sae-id; '{repo}' with {sae_id or 'no --sae-id'} is none."
        )
    names = [SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME]
    wanted = [str(PurePosixPath(sae_id.strip("/")) / name) for name in names]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except RevisionNotFoundError as error:
        raise ArtifactError(f"There is no revision '{revision}' of '{repo}'.") from error
    if not all((folder / path).is_file() for path in wanted):
        raise ArtifactError(
            f"There is no SAE '{sae_id}' at revision '{revision}' of '{repo}'; `sae-gated list "
            f"{repo} --revision {revision}` tells which there are."
        )
    return folder / sae_id.strip("/")


def _from_folder(folder: Path, device: str, keep: str | None) -> SAE[Any]:
    config = _read_config(folder)
    training_form = _is_training_form(folder, config)
    known = SAE_TRAINING_CLASS_REGISTRY if training_form else SAE_CLASS_REGISTRY
    architecture = str(config.get("architecture", "standard"))
    if architecture not in known:
        raise UnknownArchitecture(unknown_name("architecture", architecture, known))
    _require_types(config, known[architecture][1], folder / SAE_CFG_FILENAME)
    if not training_form:
        return SAE.load_from_disk(folder, device=device)
    sae = TrainingSAE.load_from_disk(folder, device=device)
    _fold_normalization(sae, folder / ACTIVATION_SCALER_CFG_FILENAME)
    return sae if architecture == keep else _inference_form(sae, device)


def _is_training_form(folder: Path, config: dict[str, Any]) -> bool:
    if (folder / TRAINER_STATE_FILENAME).exists():
        return True
    architecture = str(config.get("architecture", "standard"))
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        return False
    if architecture not in SAE_CLASS_REGISTRY:
        return True
    if "metadata" not in config:  # SAELens 5 and older kept all options in one place
        return False
    # `TrainingSAE.save_model` in a script writes no trainer's state, but the training's options.
    only_in_training = field_types(SAE_TRAINING_CLASS_REGISTRY[architecture][1]).keys()
    only_in_training -= field_types(SAE_CLASS_REGISTRY[architecture][1]).keys()
    return bool(only_in_training & config.keys())


def require_folded(sae: SAE[Any]) -> None:
    """Raise ArtifactError for an SAE whose input must be scaled by statistics that it lacks."""
    if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise ArtifactError(
            f"The SAE expects activations normalised by {sae.cfg.normalize_activations}, but the "
            "statistics for it are neither folded into its weights nor stored beside them."
        )


#: What is read of the metadata, of which SAELens checks nothing.
_METADATA: dict[str, Any] = {
    **dict.fromkeys(("model_name", "model_class_name", "hook_name", "hook_name_out"), str | None),
    **dict.fromkeys(("dataset_path", "training_architecture", "fine_tuned_from"), str | None),
    **dict.fromkeys(("prepend_bos", "disable_concat_sequences"), bool | None),
    **dict.fromkeys(("hook_head_index", "context_size"), int | None),
    "seqpos_slice": list[int | None] | None,
    "exclude_special_tokens": bool | list[int] | None,
    "l1_coefficient_reached": float | None,
    "training_architecture_details": dict[str, Any] | None,
    "model_from_pretrained_kwargs": dict[str, Any] | None,
}


def _require_types(config: dict[str, Any], config_class: type[Any], path: Path) -> None:
    """Raise ArtifactError where a value of a cfg.json is not what its field holds.

    Python would take `"false"` for true. Keys that are not known here are left to SAELens.
    """
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ArtifactError(f"'metadata' in '{path}' must be an object.")
    hints = field_types(config_class)
    try:
        for name in hints.keys() & config.keys() - {"metadata"}:
            convert_value(hints[name], config[name], f"'{name}' in '{path}'")
        for name in _METADATA.keys() & cast("dict[str, Any]", metadata).keys():
            where = f"'metadata.{name}' in '{path}'"
            convert_value(_METADATA[name], metadata[name], where)
    except ConfigError as error:
        raise ArtifactError(str(error)) from None


def _read_config(folder: Path) -> dict[str, Any]:
    """Check what a folder must hold, and return its cfg.json."""
    config_path, weights_path = folder / SAE_CFG_FILENAME, folder / SAE_WEIGHTS_FILENAME
    if not folder.is_dir():
        what = "is a file, not a run's folder" if folder.exists() else "does not exist"
        raise ArtifactError(f"'{folder}' {what}.")
    if not config_path.exists():
        raise ArtifactError(f"'{folder}' holds no {SAE_CFG_FILENAME}: it is not a finished run.")
    if not weights_path.exists():
        raise ArtifactError(f"'{folder}' has a {SAE_CFG_FILENAME} but no {SAE_WEIGHTS_FILENAME}.")
    return read_json(config_path)


def _fold_normalization(sae: TrainingSAE[Any], scaler_path: Path) -> None:
    """Fold a checkpoint's activation statistics into its weights, as SAELens does at the end."""
    scaler = ActivationScaler()
    if scaler_path.exists():
        scaler.load(scaler_path)
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    whitening = getattr(scaler, "whitening", None)  # SAELens 6.52 on
    if whitening is not None:
        sae.fold_activation_whitening(
            mean=whitening.mean,
            whitening_matrix=whitening.matrix,
            unwhitening_matrix=whitening.inverse_matrix,
        )


def _inference_form(sae: TrainingSAE[Any], device: str) -> SAE[Any]:
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device=device)


def training_tokens(source: str | Path | SAE[Any]) -> int | None:
    """Return how many tokens an SAE was trained on, if its folder tells."""
    if isinstance(source, SAE):
        return None
    state, runner = (Path(source) / n for n in (TRAINER_STATE_FILENAME, RUNNER_CFG_FILENAME))
    try:
        if state.exists():  # a checkpoint; its runner_cfg.json tells how many were planned
            tokens = torch.load(state, weights_only=True, mmap=True)["n_training_samples"]
        else:
            tokens = read_json(runner)["training_tokens"]
    except Exception:  # torch has no one class for what it cannot read
        return None
    return tokens if type(tokens) is int else None
