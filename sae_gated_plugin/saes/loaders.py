"""Loading what others trained: dictionary_learning's Gated SAEs and ProLU checkpoints.

Only tensors are read: a pickle that wants to run code is refused. Both have SAELens's signature for
loaders, so `SAE.from_pretrained(repo, folder, converter=...)` takes them, and releases name them;
`repo` may also be a folder on this disk. What cannot be read is an ArtifactError.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ArtifactError, first_line
from ..files import read_json
from ..plugins.hookspecs import hookimpl
from ..plugins.records import logger

Loaded = tuple[dict[str, Any], dict[str, Tensor], Tensor | None]

#: Names that ProLU checkpoints in circulation give to each tensor; a weight of an nn.Linear is
#: stored transposed.
PROLU_NAMES = {
    "W_enc": ("W_enc", "encoder.weight"),
    "W_dec": ("W_dec", "decoder.weight"),
    "b_enc": ("b_enc", "encoder.bias", "bias", "b"),
    "b_dec": ("b_dec", "decoder.bias", "pre_bias"),
}

#: dictionary_learning's names for a Gated SAE's tensors.
_GATED_NAMES = {
    "W_enc": ("encoder.weight",),
    "W_dec": ("decoder.weight",),
    "b_dec": ("decoder_bias",),
    "b_gate": ("gate_bias",),
    "b_mag": ("mag_bias",),
    "r_mag": ("r_mag",),
}


def dictionary_learning_gated(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> Loaded:
    """Load a `GatedAutoEncoder` of dictionary_learning: `ae.pt` and `config.json` in a folder.

    Returns SAELens's configuration and state dictionary, and no sparsity.
    """
    where, path = _fetch(repo_id, folder_name, "config.json", force_download)
    config = read_json(path)
    try:
        trainer, buffer = config["trainer"], config.get("buffer") or {}
        kind = trainer["dict_class"]
        cfg: dict[str, Any] = {
            "architecture": "gated",
            "d_in": int(trainer["activation_dim"]),
            "d_sae": int(trainer["dict_size"]),
            "dtype": "float32",
            "device": device,
            "model_name": trainer["lm_name"].split("/")[-1],
            "prepend_bos": True,
            "dataset_path": "monology/pile-uncopyrighted",  # of its scripts; no config names it
            "context_size": buffer.get("ctx_len"),
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            **_hook_name(trainer, buffer, where),
            **(cfg_overrides or {}),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"'{where}' is not dictionary_learning's: {first_line(error)}"
        ) from error
    if kind != "GatedAutoEncoder":
        raise ArtifactError(
            f"'{where}' is no GatedAutoEncoder's but one of {kind!r}; SAELens's own loader "
            "dictionary_learning_1 reads other classes."
        )
    where, path = _fetch(repo_id, folder_name, "ae.pt", force_download)
    state = _named(load_tensors(path), _GATED_NAMES, where)
    return cfg, _checked(state, cfg["d_in"], cfg["d_sae"], where, device), None


def _hook_name(trainer: dict[str, Any], buffer: dict[str, Any], where: str) -> dict[str, str]:
    """TransformerLens's name of a layer's submodule; none, with a warning, for an unknown one."""
    submodule = str(trainer.get("submodule_name") or "resid_post")
    for part, hook in (("resid_post", "resid_post"), ("mlp", "mlp_out"), ("att", "attn_out")):
        known = re.fullmatch(rf"{part}(n|ention)?(_out)?(_?layer_?\d+)?", submodule)
        if known and buffer.get("io", "out") == "out":
            return {"hook_name": f"blocks.{int(trainer['layer'])}.hook_{hook}"}
    logger.warning(
        "'%s' was trained on submodule '%s', whose hook point is not known here: the SAE has no "
        "hook_name, so set cfg.metadata.hook_name before it is measured.",
        where,
        submodule,
    )
    return {}


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
    """
    where, path = _fetch(repo_id, folder_name, "", force_download)
    state = _named(load_tensors(path), PROLU_NAMES, where)
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


def _fetch(repo_id: str, folder: str, file: str, force_download: bool) -> tuple[str, Path]:
    """A file of a repository on the Hub, or of a folder on this disk: its name, and where it is."""
    name = str(PurePosixPath(folder.strip("/")) / file)
    where, local = f"{repo_id.rstrip('/')}/{name}", Path(repo_id) / name
    if local.is_file():
        return where, local
    if not Path(repo_id).is_dir():
        try:
            return where, Path(hf_hub_download(repo_id, name, force_download=force_download))
        except Exception as error:
            missing = isinstance(error, EntryNotFoundError)  # or out of reach:
            if not missing or isinstance(error, LocalEntryNotFoundError):
                raise ArtifactError(
                    f"'{where}' cannot be fetched: {first_line(error)} Give a repository's name, "
                    "OWNER/NAME, or a folder on this disk."
                ) from error
    needed = " It says what is in ae.pt; copy the training's beside it." if "json" in file else ""
    raise ArtifactError(f"There is no file '{where}'.{needed}")


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


def _named(
    tensors: dict[str, Tensor], names: Mapping[str, Sequence[str]], where: str
) -> dict[str, Tensor]:
    """Tensors under our names, nn.Linear's weights transposed."""
    state: dict[str, Tensor] = {}
    for name, known in names.items():
        found = next((key for key in known if key in tensors), None)
        if found is None:
            raise ArtifactError(
                f"'{where}' has no {name}, known as {' or '.join(known)}; it holds "
                f"{', '.join(sorted(tensors))}."
            )
        state[name] = tensors[found].T if found.endswith("coder.weight") else tensors[found]
    return state


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
