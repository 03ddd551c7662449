"""Bad numbers are stopped before they reach the weights, and named: step, tensor, likely cause.

Looked at in every step, before the optimizer's: the loss, the norm of each parameter's gradient as
it was before clipping (clipping turns an infinite norm into gradients of zero, or NaN), and how
many latents fired. It all crosses to the host in one small tensor.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from ..distributed.shards import WHOLE, LatentShards
from ..errors import TrainingDiverged
from ..objectives import optimizer_hooks
from ..objectives.losses import bad_loss, way_out
from ..results import NO_LATENTS
from ..saelens_internals import CLIPPED_NORM, replace_forward_pass, replace_step

logger = logging.getLogger("sae_gated_plugin")

Trainer = SAETrainer[TrainingSAE[TrainingSAEConfig], TrainingSAEConfig]

#: L0 has collapsed when it is below NO_LATENTS, or above the first as a share of d_sae, in so many
#: batches in a row: chance, or a controller at work, explains a few, not a hundred.
ALL_LATENTS, COLLAPSED_STEPS = 0.99, 100

#: Batches in a row that may be skipped: more is no accident of the data.
SKIPPED_STEPS = 10


def announce_the_end(trainer: Any) -> None:
    """Tell a trainer's SAE how many steps there are, which SAELens does not."""
    trainer.sae.total_training_steps = trainer.cfg.total_training_steps


class DivergenceGuard:
    """Makes a trainer raise TrainingDiverged, its state being that before the bad step.

    skip: leave a bad batch out instead, with a warning; after SKIPPED_STEPS in a row it stops all
    the same. `trained_on` is the last batch that a step was completed on, `l0` the last L0.

    Where the latents are divided among ranks, all of them see the same numbers and raise together;
    gradients are clipped by the norm of all ranks' together, not by each rank's own.
    """

    def __init__(self, trainer: Trainer, skip: bool = False):
        self.trained_on: Tensor | None = None
        self.collapsed_steps = 0
        self._trainer = trainer
        self._skip = skip
        self._skipped_steps = 0
        self._norms: dict[str, Tensor] = {}
        self._unclipped: list[tuple[Tensor, Tensor]] = []
        self._seen: tuple[TrainStepInput, TrainStepOutput] | None = None
        self._last: TrainStepOutput | None = None
        self._shards: LatentShards = getattr(trainer.sae, "shards", WHOLE)
        firings = self._shards.total(trainer.act_freq_scores.sum())
        self._firings = float(firings)  # of the window so far
        self.l0 = 1.0  # of the last batch
        sae: Any = trainer.sae
        sae.loss_is_guarded = True  # so the SAE itself need not wait for it
        for name, parameter in sae.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._measure, name))
        trainer.optimizer.register_step_pre_hook(self._check)
        self._forward = replace_forward_pass(trainer, self._remember)
        self._train_step = replace_step(trainer, self.step)

    def step(self, batch: Tensor) -> TrainStepOutput:
        """SAELens's step on a batch (N, d_in), or what `skip` makes of it."""
        trainer, before = self._trainer, self._state()
        try:
            output = self._train_step(batch)
        except TrainingDiverged as error:
            self._restore(before)
            if not self._skip or self._skipped_steps == SKIPPED_STEPS:
                raise
            logger.warning("Step %d was skipped: %s", error.step, error.reason)
            self._skipped_steps += 1
            trainer.n_training_samples += len(batch)
            trainer.lr_scheduler.step()
            for scheduler in trainer.coefficient_schedulers.values():
                scheduler.step()
            output = self._last or nothing(batch)
        else:
            self._skipped_steps = 0
            self._watch_l0()
        finally:
            self._seen = None
            self._norms.clear()
            self._unclipped.clear()
        self.trained_on = batch
        self._last = output if self._skip else None
        return output

    def _remember(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = self._forward(step_input)
        self._seen = step_input, output
        return output

    def _measure(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self._norms[name] = torch.linalg.vector_norm(parameter.grad).to(wide)
            if self._shards.size > 1:  # SAELens would clip it by the norm of what is here alone
                self._unclipped.append((parameter, parameter.grad))
                parameter.grad = None

    def _check(self, *_: Any) -> None:
        trainer = self._trainer
        if self._seen is None:
            return  # the step is not SAELens's
        step_input, output = self._seen
        if self._shards.size > 1:
            sae: Any = trainer.sae
            total = self._shards.norm(self._norms, sae.latent_axes)
        else:
            total = torch.linalg.vector_norm(torch.stack(list(self._norms.values())))
        firings_here = trainer.act_freq_scores.sum()
        numbers = [output.loss.detach(), total, self._shards.total(firings_here)]
        loss, norm, firings = torch.stack([number.float() for number in numbers]).tolist()
        step = trainer.n_training_steps
        if not abs(loss) < torch.inf:
            reason = bad_loss(output.losses, step_input.sae_in, trainer.sae.dtype)
            raise TrainingDiverged(step, reason)
        if not norm < torch.inf:
            bad = [name for name, value in self._norms.items() if not value.isfinite()]
            bad = self._shards.names(bad)
            raise TrainingDiverged(
                step,
                f"the loss is finite, but the gradient of {', '.join(bad) or 'all parameters'} is "
                f"NaN, infinite or too large for float32; {way_out(trainer.sae.dtype)}.",
            )
        # Counts of a window that SAELens has reset since begin at zero again.
        before = self._firings if firings >= self._firings else 0.0
        self.l0 = (firings - before) / len(step_input.sae_in)
        self._firings = firings
        # As torch.nn.utils.clip_grad_norm_ does.
        share = (CLIPPED_NORM / (total + 1e-6)).clamp(max=1.0)
        for parameter, gradient in self._unclipped:
            parameter.grad = gradient.mul_(share.to(gradient.dtype))

    def _watch_l0(self) -> None:
        """Raise TrainingDiverged where L0 has been next to 0, or to d_sae, for too long."""
        cfg: Any = self._trainer.sae.cfg
        none = self.l0 < NO_LATENTS and getattr(cfg, "dead_latents", "none") == "none"
        d_sae = self._shards.d_sae or cfg.d_sae
        every = self.l0 > ALL_LATENTS * d_sae
        self.collapsed_steps = self.collapsed_steps + 1 if none or every else 0
        if self.collapsed_steps < COLLAPSED_STEPS:
            return
        cause = (
            f"every latent is active on every token (L0 = {self.l0:.4g} of {d_sae}); the "
            "sparsity coefficient is too low, or lr too high"
            if every
            else f"next to no latent is active (L0 = {self.l0:.2g}), so none can learn; the "
            "sparsity coefficient or lr is too high, or dead_latents=resample is needed"
        )
        raise TrainingDiverged(
            self._trainer.n_training_steps,
            f"L0 has collapsed: for {COLLAPSED_STEPS} batches {cause}.",
        )

    def _state(self) -> tuple[dict[str, Any], list[Tensor]]:
        """What SAELens's step changes before the optimizer's, and the SAE's buffers."""
        trainer = self._trainer
        counters = {
            "n_training_samples": trainer.n_training_samples,
            "n_frac_active_samples": trainer.n_frac_active_samples,
            "act_freq_scores": trainer.act_freq_scores.clone(),
            "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired.clone(),
        }
        return counters, [buffer.clone() for buffer in trainer.sae.buffers()]

    @torch.no_grad()
    def _restore(self, state: tuple[dict[str, Any], list[Tensor]]) -> None:
        counters, buffers = state
        vars(self._trainer).update(counters)
        for buffer, value in zip(self._trainer.sae.buffers(), buffers):
            buffer.copy_(value)
        optimizer_hooks.take_back(self._trainer.sae)
        self._trainer.optimizer.zero_grad()


def nothing(batch: Tensor) -> TrainStepOutput:
    """What a step that was not done hands to SAELens's progress bar."""
    zero = torch.zeros(())
    acts = torch.zeros(len(batch), 1)
    return TrainStepOutput(
        sae_in=batch, sae_out=batch, feature_acts=acts, hidden_pre=acts, loss=zero, losses={}
    )
