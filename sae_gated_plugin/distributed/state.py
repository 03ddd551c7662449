"""From one process's SAE, optimizer and files to a rank's share of them, and back."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ConfigError
from .shards import WHOLE, LatentShards

#: Losses that are sums over latents, as far as is known; a plugin's might compare latents.
SUMS = ("l1", "sqrt_l1", "lp", "norm_weighted_l1")

#: What a trainer of SAELens's counts per latent.
COUNTS = ("act_freq_scores", "n_forward_passes_since_fired")


def require_divisible(sae: Any, size: int) -> None:
    """Raise ConfigError where the latents of a training SAE cannot be divided among processes."""
    cfg, name = sae.cfg, sae.cfg.architecture()
    ours = type(sae).__module__.startswith("sae_gated_plugin.") and hasattr(sae, "shards")
    if not ours:
        raise ConfigError(
            f"architecture '{name}' cannot be divided among {size} processes, for its latents are "
            "not known to be independent of each other; train it in one process, or take gated, "
            "mlp_encoder, prolu, relu, expanded or rescale_shift."
        )
    if cfg.sparsity_loss not in SUMS and not cfg.sparsity_loss.startswith("lp_"):
        raise ConfigError(
            f"sparsity_loss '{cfg.sparsity_loss}' is not known to be a sum over latents, so they "
            f"cannot be divided among {size} processes; take {', '.join(SUMS)} or lp_<p>."
        )
    if cfg.decoder_coherence:
        raise ConfigError(
            "decoder_coherence compares every decoder row with the others, which "
            f"{size} processes do not have in common; set it to 0 or train in one process."
        )
    if cfg.control == "soft_frozen":
        raise ConfigError(
            f"control 'soft_frozen' is not divided among {size} processes; take frozen_decoder or "
            "train in one process."
        )
    if cfg.d_sae < size:
        raise ConfigError(f"{cfg.d_sae} latents cannot be divided among {size} processes.")


@torch.no_grad()
def shard(sae: Any, rank: int, size: int) -> Any:
    """Leave a training SAE of ours only the `rank`-th of `size` equal parts of its latents.

    In place, before an optimizer is made for it; its `cfg.d_sae` then counts those that are left.
    torch's default process group must have as many ranks, all of which call this with SAEs that
    are equal to the bit. Raises ConfigError as `require_divisible` does.
    """
    require_divisible(sae, size)
    shards = LatentShards(sae.cfg.d_sae, rank, size)
    for name, axis in sae.latent_axes.items():
        parameter = getattr(sae, name, None)
        if parameter is not None:
            own = nn.Parameter(shards.own(parameter, axis), parameter.requires_grad)
            setattr(sae, name, own)
    sae.cfg.d_sae = shards.stop - shards.start
    sae.shards = shards
    return sae


@contextmanager
def whole(sae: Any, trainer: Any = None) -> Generator[bool]:
    """A context in which rank 0's SAE, its optimizer's state and its trainer's counts have all
    latents, on the CPU, as one process has them. Yields whether this is rank 0.

    All ranks must enter it. On the others everything stays as it is.
    """
    shards: LatentShards = getattr(sae, "shards", WHOLE)  # SAELens's classes have none
    if shards.size == 1:
        yield True
        return
    restore: list[tuple[Any, str, Any]] = []

    def put(owner: Any, key: str, value: Any) -> None:
        restore.append((owner, key, owner[key]))
        owner[key] = value

    try:
        for name, parameter in list(sae.named_parameters()):
            if name not in sae.latent_axes:
                shards.take_first(parameter)
            else:
                axis = sae.latent_axes[name]
                full = shards.gathered(parameter, axis)
                if full is not None:
                    put(sae._parameters, name, nn.Parameter(full, parameter.requires_grad))
                moments = trainer.optimizer.state.get(parameter, {}) if trainer else {}
                for key, moment in list(moments.items()):
                    if moment.shape == parameter.shape:
                        full = shards.gathered(moment, axis)
                        if full is not None:
                            put(moments, key, full)
        for name in COUNTS if trainer else ():
            full = shards.gathered(getattr(trainer, name), 0)
            if full is not None:
                put(vars(trainer), name, full)
        if shards.rank == 0:
            put(vars(sae.cfg), "d_sae", shards.d_sae)
            put(vars(sae), "shards", WHOLE)
        yield shards.rank == 0
    finally:
        for owner, key, value in reversed(restore):
            owner[key] = value


def share_of(checkpoint: Path, folder: Path, sae: Any, without: str = "") -> None:
    """Fill a folder with a rank's share of one process's checkpoint, as if it were the rank's own.

    sae: the rank's, whose parameters' names and order are the optimizer's. without: a file to leave
    out. Tensors are read from the disk as far as they are wanted.
    """
    shards, axes = sae.shards, sae.latent_axes
    for file in checkpoint.iterdir():
        if file.name == without:
            continue
        if file.suffix == ".safetensors":
            tensors: dict[str, Tensor] = {}
            with safe_open(file, framework="pt") as source:
                keys: list[str] = source.keys()
                for key in keys:
                    axis = 0 if key == "sparsity" else axes.get(key)
                    piece = source.get_slice(key)
                    if axis is None or not piece.get_shape():
                        tensors[key] = source.get_tensor(key)
                    else:
                        part = slice(shards.start, shards.stop)
                        tensors[key] = piece[part] if axis == 0 else piece[:, part]
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, folder / file.name)
        elif file.suffix == ".pt":
            state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            names = [name for name, _ in sae.named_parameters()]
            for index, moments in state["optimizer"]["state"].items():
                axis = axes.get(names[index])
                for key, moment in moments.items():
                    if axis is not None and moment.ndim:
                        moments[key] = shards.own(moment, axis)
            for name in COUNTS:
                state[name] = shards.own(state[name], 0)
            torch.save(state, folder / file.name)
        elif file.is_file():
            shutil.copy(file, folder / file.name)
