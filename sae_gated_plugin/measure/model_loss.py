"""What a reconstruction costs the language model: loss recovered, nats lost, KL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
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

    def measured(self, tokens: Tensor) -> Tensor:
        """Which of tokens (batch, position) count, bool."""
        chosen = torch.zeros_like(tokens, dtype=torch.bool)
        chosen[:, self.positions] = True
        return chosen & ~torch.isin(tokens, self.excluded)

    @torch.no_grad()
    def measure(
        self, tokens: Tensor, index: Tensor, totals: Mapping[str, Totals]
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
