"""What a reconstruction costs the language model: loss recovered, nats lost, KL.

Shapes: B sequences, P positions, N measured tokens of both, D d_in, L d_sae, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.util import get_special_token_ids
from torch import Tensor

from ..metrics.batch import Batch
from ..model.hook_point import HookPoint
from ..model.replay import Passes

_CACHED_NUMBERS = 2**19  # what a loss works on at once: 2 MiB in fp32 stay in a core's cache


@contextlib.contextmanager
def flattened_heads(sae: SAE[Any]) -> Generator[None]:
    """Hand an SAE of hook_z flat vectors, as SAELens's own evaluation does."""
    reshaping = sae.hook_z_reshaping_mode
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if reshaping:
            sae.turn_on_forward_pass_hook_z_reshaping()


@dataclass
class Totals:
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


class Measurement:
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

    def measured(self, tokens_BP: Tensor) -> Tensor:
        """Which tokens count, (B, P) bool."""
        chosen = torch.zeros_like(tokens_BP, dtype=torch.bool)
        chosen[:, self.positions] = True
        return chosen & ~torch.isin(tokens_BP, self.excluded)

    @torch.no_grad()
    def measure(
        self, tokens_BP: Tensor, index_B: Tensor, totals: Mapping[str, Totals]
    ) -> Iterator[tuple[str, Batch]]:
        """Yield each SAE's name and batch. index_B: the sequences' numbers in the text."""
        tokens_BP = tokens_BP.to(self.point.device)
        measured_BP = self.measured(tokens_BP)
        at_BP1 = measured_BP.unsqueeze(-1)
        sequence_N = index_B.to(tokens_BP.device).unsqueeze(-1).expand_as(tokens_BP)[measured_BP]

        logits_BPV, x_BPD = self.passes.first(tokens_BP)
        original = _Original(logits_BPV, tokens_BP, measured_BP)
        del logits_BPV
        loss_ablated, _ = original.compare(
            self.passes.again(tokens_BP, lambda acts: acts.masked_fill(at_BP1, 0))
        )
        for name, sae in self.saes.items():
            # Whole sequences, for there are SAEs whose code depends on earlier positions.
            codes_BPL = sae.encode(x_BPD.to(sae.device))
            x_hat_BPD = sae.decode(codes_BPL).to(x_BPD)
            loss_spliced, kl = original.compare(
                self.passes.again(tokens_BP, partial(torch.where, at_BP1, x_hat_BPD))
            )
            total = totals[name]
            total.tokens += int(measured_BP.sum())
            total.predictions += int(measured_BP[:, :-1].sum())
            total.loss += original.loss
            total.loss_ablated += loss_ablated
            total.loss_spliced += loss_spliced
            total.kl += kl
            yield (
                name,
                Batch(
                    x=x_BPD[measured_BP],
                    x_hat=x_hat_BPD[measured_BP],
                    feature_acts=codes_BPL.to_dense()[measured_BP.to(sae.device)],
                    sequence=sequence_N,
                ),
            )


class _Original:
    """The model's own predictions on a batch, which others of the same tokens are compared with.

    loss: its cross-entropy, summed over measured positions with a next token, in nats.
    """

    def __init__(self, logits_BPV: Tensor, tokens_BP: Tensor, measured_BP: Tensor):
        self.at_N = measured_BP.flatten().nonzero().squeeze(1)
        following_BP = torch.nn.functional.pad(tokens_BP[:, 1:], (0, 1), value=-1)
        self.targets_N = following_BP.flatten()[self.at_N]
        shape = len(self.at_N), logits_BPV.shape[-1]
        self.probs_NV = logits_BPV.new_empty(shape, dtype=torch.float32)
        self.negative_entropy_N = logits_BPV.new_empty(shape[0], dtype=torch.float64)
        self.loss = 0.0
        for rows, log_probs in self._log_probs(logits_BPV):
            self.loss += self._loss(rows, log_probs)
            probs = torch.exp(log_probs, out=self.probs_NV[rows])
            self.negative_entropy_N[rows] = torch.linalg.vecdot(probs, log_probs).double()

    def compare(self, logits_BPV: Tensor) -> tuple[float, float]:
        """Summed cross-entropy of other predictions, and the KL divergence to them, in nats."""
        loss = kl = 0.0
        for rows, log_probs in self._log_probs(logits_BPV):
            loss += self._loss(rows, log_probs)
            cross = torch.linalg.vecdot(self.probs_NV[rows], log_probs)
            kl += float((self.negative_entropy_N[rows] - cross).sum())
        return loss, kl

    def _log_probs(self, logits_BPV: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the measured positions and their (rows, vocabulary) log-probabilities."""
        flat = logits_BPV.flatten(0, 1)
        step = max(1, _CACHED_NUMBERS // flat.shape[-1])
        for start in range(0, len(self.at_N), step):
            rows = slice(start, start + step)
            yield rows, flat[self.at_N[rows]].float().log_softmax(-1)

    def _loss(self, rows: slice, log_probs: Tensor) -> float:
        targets = self.targets_N[rows]
        found = log_probs.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return -float(found[targets >= 0].double().sum())
