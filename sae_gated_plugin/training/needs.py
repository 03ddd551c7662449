"""What a training needs of each of several processes: memory, and bytes that cross per step.

An account, not a measurement; benchmarks/RESULTS.md says how far it was compared with one. The
language model is not in it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from sae_lens.registry import get_sae_training_class

from ..architectures.base.training_step import ThresholdedTrainingSAE
from ..config.run import RunConfig
from ..distributed.state import require_divisible

#: Tensors of a latent's parameters in a step: weight, gradient, Adam's two moments, and what Adam
#: computes them into.
COPIES = 5

#: Matrices of tokens × d_in that a step of gated holds at once: 6 were measured on a CPU
#: (benchmarks/RESULTS.md), and there are the input and a copy for each of the sums over ranks.
TOKEN_MATRICES = 10

#: More of them for each inner prefix of `matryoshka_widths` and each code: its part, its sum with
#: those before it, and its errors. Read off the code of several processes, not measured.
PREFIX_MATRICES = 3

#: Matrices of tokens × latents in a step's dense form, which the first steps of a training take:
#: 9.1 were measured for gated, 6.0 for prolu and relu.
LATENT_MATRICES = 9

#: The shuffling buffer while it is shuffled: what was there, what is new, and the shuffled rows.
BUFFERS = 3


def needs(config: RunConfig, sizes: tuple[int, ...] = (1, 2, 4, 8, 16)) -> list[dict[str, Any]]:
    """For each number of processes: bytes in each of them, by what they are for, and in a step.

    latents: parameters per latent with gradients and Adam's state. common: those that all have.
    step: what a step of the dense form holds. buffer: the shuffling buffer, which all have.
    sent: what a process hands to collectives in a step; `read` counts the activations it receives.
    Raises ConfigError for an SAE that several processes cannot train.
    """
    cfg, options = config.runner, config.runner.sae
    sae = _on_meta(options)
    require_divisible(sae, min(sizes[-1], options.d_sae))
    width = torch.tensor([], dtype=getattr(torch, options.dtype)).element_size()
    divided = _state(sae, width, per_latent=True)
    common = _state(sae, width, per_latent=False)
    tokens = cfg.train_batch_size_tokens
    positions = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    buffer = BUFFERS * cfg.n_batches_in_buffer * positions * options.d_in * 4
    rows: list[dict[str, Any]] = []
    for size in sizes:
        latents = -(-options.d_sae // size)
        codes, prefixes = _reconstructions(sae)
        matrices = TOKEN_MATRICES + PREFIX_MATRICES * codes * (prefixes - 1)
        step = width * tokens * (matrices * options.d_in + LATENT_MATRICES * latents)
        parts = {
            "latents": -(-divided // size),
            "common": common,
            "step": step,
            "buffer": buffer,
        }
        sent = bytes_per_step(sae, tokens, width) if size > 1 else 0
        read = tokens * options.d_in * 4 if size > 1 else 0
        total = sum(parts.values())
        rows.append({"processes": size, **parts, "memory": total, "sent": sent, "read": read})
    return rows


def bytes_per_step(sae: Any, tokens: int, width: int = 4) -> int:
    """What a rank hands to collectives in a step, but for some numbers (less than 100 bytes).

    Reconstructions, and the gradient of what all encoders read: b_dec, or a hidden layer's output.
    Each prefix of `matryoshka_widths` has reconstructions of its own. auxk adds one, and the
    candidates where more latents are dead than it takes.
    """
    cfg, d_in = sae.cfg, sae.cfg.d_in
    codes, prefixes = _reconstructions(sae)
    reconstructions = codes * prefixes + (getattr(cfg, "dead_latents", "none") == "auxk")
    hidden = hasattr(sae, "mlp")
    shared = tokens * d_in if hidden else d_in * bool(cfg.apply_b_dec_to_input)
    return width * (reconstructions * tokens * d_in + shared)


def _reconstructions(sae: Any) -> tuple[int, int]:
    """How many codes are decoded in a step, and by how many prefixes each."""
    auxiliary = type(sae).auxiliary_code is not ThresholdedTrainingSAE.auxiliary_code
    return 1 + auxiliary, max(1, len(sae.cfg.matryoshka_widths or ()))


def _on_meta(options: Any) -> Any:
    """The training SAE of a configuration, without its numbers."""
    sae_class, config_class = get_sae_training_class(options.architecture())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sae_class(config_class.from_dict({**options.to_dict(), "device": "meta"}))


def _state(sae: Any, width: int, per_latent: bool) -> int:
    """Bytes of the parameters that are, or are not, per latent, and of what training adds."""
    axes = getattr(sae, "latent_axes", {})
    return sum(
        parameter.numel() * width * (COPIES if parameter.requires_grad else 1)
        for name, parameter in sae.named_parameters()
        if (name in axes) == per_latent
    )
