"""How much of an SAE's error is its encoder's: the same decoder, and better codes for it.

Three codes of the same held-out activations, with the same number of latents for every token: the
encoder's; its support with the best magnitudes; and the best support that a search finds. What is
gained from one to the next is the share of the error due to magnitudes and to selection; what
remains is the dictionary's at that L0. The search is greedy, so the selection's share is a lower
bound and the dictionary's an upper one.

Shapes: B sequences, P positions, N tokens, D d_in, L d_sae.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from ..errors import ArtifactError
from ..files import write_json
from ..results import GAP_FILE as GAP_FILE
from ..saes.load import load_sae
from ..sparse_coding.codes import SparseCodes
from ..sparse_coding.problem import refit
from ..sparse_coding.pursuit import gradient_pursuit
from .evaluate import evaluate_all, path_of
from .options import EvalOptions

#: A search takes some 10 ms per token at L0 32 of 4608 latents on one core: minutes, not hours.
DEFAULT_TOKENS = 10_000
CODES = ("encoder", "refit", "pursuit")
METHOD = (
    "Per token the better of the encoder's support, refitted, and of non-negative gradient pursuit "
    "from nothing; then single latents are exchanged as long as the error falls."
)
_ABOUT = ("architecture", "d_in", "d_sae", "model_name", "hook_name", "dataset", "split", "tokens")
_MEASURES = ("l0", "fvu", "gamma", "loss_recovered", "nats_lost")
_NOT_LINEAR = (
    "The decoder of this SAE ({}) is not linear in its codes through W_dec (d_sae, d_in), so other "
    "codes for it cannot be found here; encoder-gap takes SAEs with x̂ = f W_dec + b_dec."
)
_DEFAULTS = EvalOptions(tokens=DEFAULT_TOKENS)
# x_ND, W_dec_LD, b_dec_D, the encoder's codes_NL → codes
_Solve = Callable[[Tensor, Tensor, Tensor, Tensor], SparseCodes]


def encoder_gap(
    source: str | Path,
    options: EvalOptions = _DEFAULTS,
    *,
    sae_id: str | None = None,
    revision: str | None = None,
    output: str | Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Measure the encoder gap of an SAE on held-out text; return what becomes `encoder_gap.json`.

    source: a run's folder, or with `sae_id` a SAELens release. revision: as in `evaluate`.
    output: the file to write, default `encoder_gap.json` in the run's folder; a release's is
    written only where this says so.
    changes: fields of EvalOptions by keyword; `tokens` is 10,000 here.

    `encoder`, `refit` and `pursuit` hold l0, fvu, gamma, loss_recovered and nats_lost of each code,
    None with the reason under `undefined`; `shares` the parts of the encoder's FVU due to
    magnitude, selection and dictionary, which sum to 1. Raises ArtifactError for an SAE without a
    linear decoder or whose codes are negative, and what `evaluate` raises.
    """
    started = time.perf_counter()
    options = replace(options, **changes)
    file = Path(output) if output is not None else Path(source) / GAP_FILE if not sae_id else None
    sae = load_sae(source, sae_id=sae_id, revision=revision, device=options.device)
    if sae.dtype.itemsize < 4:
        sae = sae.to(torch.float32)
    rows_LD = _decoder_rows(sae)
    if file is not None and not os.access(file.parent, os.W_OK):  # before the minutes of work
        raise ArtifactError(f"'{file}' cannot be written; give another file with --output.")
    saes = (sae, _recoded(sae, rows_LD, refit), _recoded(sae, rows_LD, search))
    found = evaluate_all(dict(zip(CODES, saes)), options, coherence=False)
    measured: dict[str, dict[str, Any]] = {}
    for name, results in found.items():
        why: dict[str, str] = results["undefined"]
        measured[name] = {key: results[key] for key in _MEASURES}
        measured[name]["undefined"] = {key: why[key] for key in _MEASURES if key in why}
    result: dict[str, Any] = {
        **{key: found["encoder"][key] for key in _ABOUT},
        **measured,
        "shares": _shares(*(measured[name]["fvu"] for name in CODES)),
        "method": METHOD,
        "path": path_of(source, sae_id, revision),
        "seconds": round(time.perf_counter() - started, 2),
        "versions": found["encoder"]["versions"],
    }
    if file is not None:
        write_json(file, result)
    return result


def search(x_ND: Tensor, W_dec_LD: Tensor, b_dec_D: Tensor, codes_NL: Tensor) -> SparseCodes:
    """Find a good support with each token's own L0; never worse than the refit of the codes."""
    l0_N = (codes_NL > 0).sum(1)
    pursued = gradient_pursuit(x_ND, W_dec_LD, b_dec_D, l0_N)
    start = refit(x_ND, W_dec_LD, b_dec_D, codes_NL).or_better(pursued)
    return gradient_pursuit(x_ND, W_dec_LD, b_dec_D, l0_N, start=start)


def _shares(encoder: float | None, refitted: float | None, pursued: float | None) -> Any:
    if not encoder or refitted is None or pursued is None:
        return None
    return {
        "magnitude": (encoder - refitted) / encoder,
        "selection": (refitted - pursued) / encoder,
        "dictionary": pursued / encoder,
    }


def _decoder_rows(sae: SAE[Any]) -> Tensor:
    """What a latent of activation 1 adds to a reconstruction, (L, D)."""
    W_dec = getattr(sae, "W_dec", None)
    if not isinstance(W_dec, Tensor) or W_dec.shape != (sae.cfg.d_sae, sae.cfg.d_in):
        raise ArtifactError(_NOT_LINEAR.format(sae.cfg.architecture()))
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):  # SAELens's topk divides by it
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    return W_dec.detach()


def _recoded(sae: SAE[Any], rows_LD: Tensor, solve: _Solve) -> SAE[Any]:
    """Return an SAE that differs in nothing but the code its `encode` gives."""
    recoded = copy.copy(sae)
    # Elsewhere nothing is measured, and a code may have thousands of latents.
    positions = slice(*(sae.cfg.metadata.seqpos_slice or (None,)))
    normalise, restore = sae.run_time_activation_norm_fn_in, sae.run_time_activation_norm_fn_out

    def encode(x: Tensor) -> Tensor:
        codes_BPL = type(sae).encode(recoded, x).to_dense()
        if (codes_BPL < 0).any():
            raise ArtifactError(
                f"The codes of this SAE ({sae.cfg.architecture()}) hold negative numbers; "
                "encoder-gap takes SAEs whose codes are at least 0."
            )
        x_BPD = x.to(sae.dtype)

        def of_this_x(function: Callable[[Tensor], Tensor], argument: Tensor) -> Tensor:
            normalise(x_BPD)  # leaves the scale behind that the next way back uses up
            return function(argument)

        zero = of_this_x(restore, torch.zeros_like(x_BPD))
        scale = of_this_x(restore, torch.ones_like(x_BPD)) - zero
        scale = torch.where(scale == 0, 1.0, scale)
        offset = of_this_x(recoded.decode, torch.zeros_like(codes_BPL))
        expected = offset + scale * (codes_BPL @ rows_LD)
        decoded = of_this_x(recoded.decode, codes_BPL)
        if not torch.allclose(decoded, expected, rtol=1e-4, atol=1e-4 * float(x_BPD.abs().max())):
            raise ArtifactError(_NOT_LINEAR.format(sae.cfg.architecture()))
        target_ND = ((x_BPD - offset) / scale)[:, positions].flatten(0, 1)
        given = codes_BPL[:, positions]
        found = solve(target_ND, rows_LD, rows_LD.new_zeros(rows_LD.shape[1]), given.flatten(0, 1))
        normalise(x_BPD)
        codes_BPL = codes_BPL.clone()
        codes_BPL[:, positions] = found.dense().to(codes_BPL.dtype).view_as(given)
        return codes_BPL

    recoded.encode = encode
    return recoded
