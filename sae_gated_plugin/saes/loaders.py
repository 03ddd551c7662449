"""Loading what others trained: dictionary_learning's Gated SAEs and ProLU checkpoints.

Only tensors are read: a pickle that wants to run code is refused. Both have SAELens's signature for
loaders, so `SAE.from_pretrained(repo, folder, converter=...)` takes them, and releases name them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from sae_lens.loading.pretrained_sae_loaders import get_dictionary_learning_config_1_from_hf
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ArtifactError, first_line
from ..plugins.hookspecs import hookimpl

Loaded = tuple[dict[str, Any], dict[str, Tensor], Tensor | None]

#: Names that ProLU checkpoints in circulation give to each tensor; a weight of an nn.Linear is
#: stored transposed.
PROLU_NAMES = {
    "W_enc": ("W_enc", "encoder.weight"),
    "W_dec": ("W_dec", "decoder.weight"),
    "b_enc": ("b_enc", "encoder.bias", "bias", "b"),
    "b_dec": ("b_dec", "decoder.bias", "pre_bias"),
}


def dictionary_learning_gated(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> Loaded:
    """Load a `GatedAutoEncoder` of dictionary_learning: `ae.pt` and `config.json` in a folder.

    Returns SAELens's configuration and state dictionary, and no sparsity. Raises ArtifactError for
    another class of SAE, a pickle with code in it, missing tensors or wrong shapes.
    """
    try:
        cfg = get_dictionary_learning_config_1_from_hf(
            repo_id, folder_name, device, force_download, cfg_overrides
        )
        cfg["d_in"], cfg["d_sae"] = int(cfg["d_in"]), int(cfg["d_sae"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"'{repo_id}/{folder_name}/config.json' is not dictionary_learning's: "
            f"{first_line(error)}"
        ) from error
    if cfg["architecture"] != "gated":
        raise ArtifactError(
            f"'{repo_id}/{folder_name}' is no GatedAutoEncoder but a {cfg['architecture']} SAE; "
            "SAELens's own loader dictionary_learning_1 reads it."
        )
    tensors = load_tensors(
        hf_hub_download(repo_id, f"{folder_name}/ae.pt", force_download=force_download)
    )
    where = f"{repo_id}/{folder_name}/ae.pt"
    state = {
        "W_enc": _take(tensors, "encoder.weight", where).T,
        "W_dec": _take(tensors, "decoder.weight", where).T,
        "b_dec": _take(tensors, "decoder_bias", where),
        "b_gate": _take(tensors, "gate_bias", where),
        "b_mag": _take(tensors, "mag_bias", where),
        "r_mag": _take(tensors, "r_mag", where),
    }
    return cfg, _checked(state, cfg["d_in"], cfg["d_sae"], where, device), None


def prolu_checkpoint(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> Loaded:
    """Load a ProLU SAE from a bare file of tensors, `folder_name` being its path in the repository.

    There is no configuration in such a file: sizes are read off the tensors, and `cfg_overrides`
    says what else is known, `metadata` above all. Encoders are subtracted b_dec from their input.
    Raises ArtifactError for a pickle with code in it, missing tensors or wrong shapes.
    """
    where = f"{repo_id}/{folder_name}"
    try:
        path = hf_hub_download(repo_id, folder_name, force_download=force_download)
    except EntryNotFoundError as error:
        raise ArtifactError(f"There is no file '{where}'.") from error
    tensors = load_tensors(path)
    state: dict[str, Tensor] = {}
    for name, known in PROLU_NAMES.items():
        found = next((key for key in known if key in tensors), None)
        if found is None:
            raise ArtifactError(f"'{where}' has no {name} under any of {', '.join(known)}.")
        state[name] = tensors[found].T if found.endswith("coder.weight") else tensors[found]
    if state["W_enc"].ndim != 2:
        raise ArtifactError(f"'{where}': W_enc is {tuple(state['W_enc'].shape)}, no matrix.")
    d_in, d_sae = state["W_enc"].shape
    cfg: dict[str, Any] = {
        "architecture": "prolu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": device,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "hybrid": False,
        "metadata": {"sae_lens_version": "6.51.2"},
        **(cfg_overrides or {}),
    }
    return cfg, _checked(state, d_in, d_sae, where, device), None


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a .safetensors file, or a .pt file that holds tensors and nothing that runs.

    A state dictionary may lie under `state_dict` or `model`. Raises ArtifactError otherwise.
    """
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"'{Path(path).name}' is a pickle that asks for more than tensors, and could run "
            f"anything: refused ({first_line(error, 120)}). Ask its author for safetensors."
        ) from error
    except Exception as error:
        raise ArtifactError(f"'{Path(path).name}' cannot be read: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ArtifactError(f"'{Path(path).name}' holds no named tensors.")
    named = cast("Mapping[str, Any]", loaded)
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _take(tensors: dict[str, Tensor], name: str, where: str) -> Tensor:
    if name not in tensors:
        raise ArtifactError(f"'{where}' has no '{name}'; it holds {', '.join(sorted(tensors))}.")
    return tensors[name]


def _checked(
    state: dict[str, Tensor], d_in: int, d_sae: int, where: str, device: str
) -> dict[str, Tensor]:
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in state.items():
        expected = shapes.get(name, (d_sae,))
        if tuple(tensor.shape) != expected:
            raise ArtifactError(
                f"'{where}': {name} is {tuple(tensor.shape)}, and should be {expected}."
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            found = "NaN or infinity" if tensor.is_floating_point() else f"{tensor.dtype}"
            raise ArtifactError(f"'{where}': {name} holds {found} where numbers should be.")
    return {name: tensor.float().contiguous().to(device) for name, tensor in state.items()}


@hookimpl
def register_loaders(register: Callable[..., None]) -> None:
    """Both, under names that SAELens's release lists can use."""
    register("dictionary_learning_gated", dictionary_learning_gated)
    register("prolu_checkpoint", prolu_checkpoint)
