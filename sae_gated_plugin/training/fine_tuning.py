"""Training that starts from a trained SAE (`from_pretrained_path`); what `sae` says holds.

SAELens trains the saved SAE itself and reads nothing of `sae`. Here `sae` says what is trained, and
the saved SAE gives the weights, as far as both compute the same; what cannot be is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class
from torch import Tensor

from ..architectures.base.training_step import TRAINING_BUFFERS
from ..errors import ConfigError, first_line
from ..plugins.records import logger
from ..saelens_internals import when_scale_is_found
from ..saes.load import load_sae, require_folded

#: Of what both forms of an SAE say, that which may change: how many latents are active is what one
#: goes on training for, and the rest is not about the function.
_FREE = ("architecture", "metadata", "device", "dtype", "k", "residual_threshold", "max_iterations")


def starting_sae(
    cfg: LanguageModelSAERunnerConfig[Any], weights: bool = True
) -> TrainingSAE[Any] | None:
    """The SAE of `cfg.sae` with the weights of `cfg.from_pretrained_path`; None without a path.

    weights: False where a checkpoint gives them, and the path need not be there any more. Raises
    ArtifactError for what is no sound SAE, ConfigError for one that `cfg.sae` cannot go on from.
    """
    path = getattr(cfg, "from_pretrained_path", None)  # which training on synthetic data lacks
    if path is None:
        return None
    architecture = cfg.sae.architecture()
    if architecture == "rescale_shift":
        raise ConfigError(
            "rescale_shift takes its weights from standard_sae; leave out from_pretrained_path."
        )
    source = _source(cfg, path) if weights else None
    sae = get_sae_training_class(architecture)[0](copy.deepcopy(cfg.sae))
    sae.cfg.metadata.fine_tuned_from = Path(path).resolve().name
    if source is not None:
        _take_weights(sae, source, f"from_pretrained_path '{path}'")
    return sae


def keep_function_when_scaled(trainer: Any) -> None:
    """Take the scale of the activations, once SAELens has found it, out of a fine-tuned SAE.

    A trained SAE has the scale of its training in its weights, and its cfg says "none".
    """
    sae: TrainingSAE[Any] = trainer.sae

    def unfold(scale: float) -> None:
        normalization = sae.cfg.normalize_activations
        sae.fold_activation_norm_scaling_factor(1 / scale)
        sae.cfg.normalize_activations = normalization

    if sae.cfg.metadata.fine_tuned_from is not None:
        when_scale_is_found(trainer, unfold)


def _source(cfg: LanguageModelSAERunnerConfig[Any], path: str) -> SAE[Any]:
    """The trained SAE, in the training form of `cfg.sae` if it is saved in that."""
    architecture = cfg.sae.architecture()
    source, where = load_sae(path, keep=architecture), f"from_pretrained_path '{path}'"
    require_folded(source)
    ours, theirs = _inference_config(cfg.sae), _inference_config(source.cfg)
    kinds = theirs["architecture"], ours["architecture"]
    if kinds[0] != kinds[1] and kinds != ("standard", "gated"):
        saved_as = "" if kinds[1] == architecture else f" (saved as {kinds[1]})"
        raise ConfigError(
            f"{where} is a {kinds[0]} SAE, but 'sae' describes a {architecture} one{saved_as}, "
            "which cannot start as the same function; set sae.architecture and its options to what "
            "was trained there, or leave out from_pretrained_path."
        )
    if ours["normalize_activations"] == "covariance_whitening":
        raise ConfigError(
            "covariance_whitening cannot be put on an SAE that is trained; its weights have that "
            "of its own training folded in: set sae.normalize_activations to none."
        )
    if ours["normalize_activations"] == "expected_average_only_in":
        ours["normalize_activations"] = "none"  # see keep_function_when_scaled
    for name in sorted(ours.keys() & theirs.keys() - set(_FREE)):
        if ours[name] != theirs[name]:
            raise ConfigError(
                f"sae.{name} is {getattr(cfg.sae, name)!r}, but {theirs[name]!r} in {where}; set "
                "it to that."
            )
    for name in ("model_name", "hook_name"):
        here, there = str(getattr(cfg, name)), source.cfg.metadata.get(name)
        if there is not None and Path(there).name != Path(here).name:
            logger.warning("%s was trained with %s '%s', not '%s'.", where, name, there, here)
    return source


def _inference_config(cfg: Any) -> dict[str, Any]:
    training = hasattr(cfg, "get_inference_sae_cfg_dict")
    return cfg.get_inference_sae_cfg_dict() if training else cfg.to_dict()


@torch.no_grad()
def _take_weights(sae: TrainingSAE[Any], source: SAE[Any], where: str) -> None:
    """Copy the weights, and make sure that both SAEs are the same function with them."""
    if getattr(sae.cfg, "control", "none") != "none":
        raise ConfigError(
            f"control '{sae.cfg.control}' starts at random, not at {where}; leave one of them out."
        )
    source.to(torch.promote_types(source.dtype, sae.dtype))
    if getattr(sae.cfg, "decoder", None) == "unit_norm":
        source.fold_W_dec_norm()
    expected = _as_saved(source, inference=True)
    state = _as_saved(source, inference=not isinstance(source, TrainingSAE))
    if "b_gate" in sae.state_dict() and "b_gate" not in state:  # of a standard SAE
        for tensors in (state, expected):
            tensors["b_gate"] = tensors["b_mag"] = tensors.pop("b_enc")
            tensors["r_mag"] = torch.zeros_like(tensors["b_gate"])
    for name in TRAINING_BUFFERS:
        state.pop(name, None)
    try:
        sae.process_state_dict_for_loading(state)
        sae.load_state_dict(state, strict=False)
    except Exception as error:  # PyTorch's for shapes, or of a third-party architecture
        sentence = f"{where} does not fit the options of 'sae': {first_line(error)}"
        raise ConfigError(sentence) from error
    found = _as_saved(sae, inference=True)
    wrong = [n for n in sorted({*found, *expected}) if not _close(found.get(n), expected.get(n))]
    if wrong:
        raise ConfigError(
            f"With the options of 'sae', {where} would be another function: its "
            f"{', '.join(wrong)} would be another; set the options to what was trained there."
        )


def _as_saved(sae: SAE[Any], inference: bool) -> dict[str, Tensor]:
    state = sae.state_dict()
    if inference and isinstance(sae, TrainingSAE):
        sae.process_state_dict_for_saving_inference(state)
    else:
        sae.process_state_dict_for_saving(state)
    return {name: tensor.clone() for name, tensor in state.items()}


def _close(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Whether two tensors are the same up to the rounding of the coarser dtype, and finite."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return False
    rounding = 8 * max(torch.finfo(t.dtype).eps for t in (ours, theirs))
    ours, theirs = ours.double(), theirs.double()
    finite = bool(ours.isfinite().all())
    return finite and torch.allclose(ours, theirs, rounding, rounding * float(theirs.abs().max()))
