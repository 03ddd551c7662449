"""Exact conversions to SAELens's `jumprelu`, for machines without this plugin.

    f = h where h > threshold, else 0,   h = (x - b_dec) W_enc + b_enc

An architecture declares its form, or why it has none, where it is registered (`About`). All of it,
and the saved result, is in float32: bfloat16 and float16 would round what a conversion multiplies
or subtracts. Every conversion is checked on activations before it is written.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from torch import Tensor

from ..errors import ArtifactError, ConfigError, SaeGatedError, first_line
from ..measure.activations import read_activations
from ..plugins.about import about
from ..saes.load import load_sae, require_folded
from ..training.checkpoints import obey_umask

FORMS = ("native", "jumprelu")

#: What an architecture declares as its form, in this order.
_TENSORS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")

#: Tokens of random activations, and at most of real ones, that a conversion is checked on.
CHECKED_TOKENS = 4096

#: Tokens checked at once, so that large SAEs need little memory.
AT_ONCE = 256

#: Float32 rounding between two orders of the same operations, relative to the numbers' size.
ROUNDING = 1e-4


@torch.no_grad()
def to_jumprelu(sae: SAE[Any]) -> JumpReLUSAE:
    """Return the same function as SAELens's JumpReLU SAE in float32, new tensors throughout.

    Raises ArtifactError, with the reason, for an architecture without such a form.
    """
    architecture = sae.cfg.architecture()
    form, refusal = about(architecture).jumprelu, f"A {architecture} SAE cannot be converted to "
    if not callable(form):
        raise ArtifactError(form or f"{refusal}jumprelu: it declares no such form.")
    names = {field.name for field in dataclasses.fields(JumpReLUSAEConfig)}
    shared = {f.name: getattr(sae.cfg, f.name) for f in dataclasses.fields(sae.cfg)}
    shared = {k: v for k, v in shared.items() if k in names - {"metadata", "dtype"}}
    converted = JumpReLUSAE(JumpReLUSAEConfig(**shared))  # float32 is its default
    converted.cfg.metadata = type(sae.cfg.metadata)(**sae.cfg.metadata.to_dict())
    converted.cfg.metadata.converted_from = architecture
    try:
        tensors = form(_in_float32(sae))
        for name, tensor in zip(_TENSORS, tensors, strict=True):
            cast(Tensor, getattr(converted, name)).copy_(tensor)
    except Exception as error:  # of a plugin
        raise ArtifactError(f"{refusal}jumprelu: {first_line(error)}") from error
    converted.threshold.clamp_min_(0.0)  # below 0 it is the same function, by the ReLU
    return converted


def _in_float32(sae: SAE[Any]) -> SAE[Any]:
    return copy.deepcopy(sae).to(dtype=torch.float32)


@torch.no_grad()
def require_same(sae: SAE[Any], converted: JumpReLUSAE, x: Tensor, what: str) -> None:
    """Raise ArtifactError unless both give the same activations on x, (N, d_in).

    An activation may be there in one and not in the other only where its pre-activation is within
    rounding of the threshold.
    """
    wrong = 0
    for part in x.split(AT_ONCE):
        ours, theirs = sae.encode(part), converted.encode(part)
        pre = converted.process_sae_in(part) @ converted.W_enc + converted.b_enc
        scale = pre.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
        off = (ours - theirs).abs() > ROUNDING * scale
        at_threshold = (pre - converted.threshold).abs() <= ROUNDING * scale
        # NaN is neither off nor at the threshold, and is wrong.
        wrong += int(((off & ~at_threshold) | ~ours.isfinite()).sum())
    if wrong:
        raise ArtifactError(
            f"The conversion is not exact on {what}: {wrong} of {len(x) * sae.cfg.d_sae} "
            "activations differ beyond rounding. Nothing was written."
        )


def check_conversion(sae: SAE[Any], converted: JumpReLUSAE, real: bool = True) -> list[str]:
    """Check a conversion on random and, where its model and text are there, real activations.

    Returns what it was checked on. Raises ArtifactError where it is not exact.
    """
    sae = _in_float32(sae)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CHECKED_TOKENS, sae.cfg.d_in, generator=generator).to(sae.device, sae.dtype)
    # As long as real activations are, roughly: long enough for latents to fire, and 100 times less.
    lengths = torch.logspace(-1, 2, CHECKED_TOKENS).to(x)
    require_same(sae, converted, x * lengths[:, None] + sae.b_dec, "random activations")
    checked = ["random activations"]
    if real:
        try:
            x = read_activations(sae, CHECKED_TOKENS)
        except SaeGatedError:
            return checked  # its model or text is not here
        require_same(sae, converted, x.to(sae.device, sae.dtype), "real activations")
        checked.append("real activations")
    return checked


def in_form(sae: SAE[Any], form: str) -> tuple[SAE[Any], list[str]]:
    """The SAE in one of FORMS, and what the conversion was checked on; ConfigError for others."""
    if form not in FORMS:
        raise ConfigError(f"form is '{form}'; allowed: {', '.join(FORMS)}.")
    require_folded(sae)
    metadata = vars(sae.cfg.metadata)
    if "l0" in metadata:  # SAELens's name for it; beside held-out results it would contradict them
        metadata["l0_in_last_training_window"] = metadata.pop("l0")
    if form == "native":
        return sae, []
    converted = to_jumprelu(sae)
    return converted, check_conversion(sae, converted)


def require_empty(path: str | Path) -> Path:
    """The path of a folder to be filled. Raises ConfigError where there is something already."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"Output folder '{folder}' is not empty; nothing was changed.")
    return folder


def export(source: str | Path, output: str | Path, form: str = "jumprelu") -> dict[str, Any]:
    """Write a run's SAE in another form, checked, into a new folder.

    Returns the folder, both architectures and what the conversion was checked on. Raises
    ArtifactError for what has no such form, ConfigError for a folder that is not empty.
    """
    folder = require_empty(output)
    sae = load_sae(source)
    exported, checked = in_form(sae, form)
    exported.save_model(folder)
    for name in (SPARSITY_FILENAME, RUNNER_CFG_FILENAME):
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, folder / name)
    obey_umask(folder)
    return {
        "path": str(folder),
        "from": sae.cfg.architecture(),
        "architecture": exported.cfg.architecture(),
        "checked_on": checked,
    }
