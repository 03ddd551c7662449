"""What every architecture with a thresholded-ReLU code shares.

A code of this kind is active where m = (x - b_dec) W_enc exceeds a threshold per latent, and its
magnitude is a function of m and of per-latent parameters. An architecture says only that: its
`thresholds()`, and how `read_acts()` gets activations from the active values. The rest is here:
one training step on one shared support, the unit-norm decoder, metrics in SAELens's log, and what
SAELens's runners expect of a config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from ...core.active import Active, decode_active
from ...errors import TrainingDiverged
from ...metrics.registered import training_metrics
from ...objectives import dead_latents, optimizer_hooks, sparsity_target
from ...objectives.coherence_penalty import decoder_coherence
from ...objectives.losses import bad_loss, get_loss, penalty
from .code import ThresholdedSAE

#: What `process_state_dict_for_saving_inference` leaves out: state of training, not of the SAE.
TRAINING_BUFFERS = ("l0_controller", "resampled_at")


class ThresholdedTrainingSAE(ThresholdedSAE):
    """Mixin: the training step. Its config has `decoder`, `sparsity_loss` and `backend`."""

    aux_decoder_frozen = True

    def prepare_training(self: Any) -> None:
        """Fail early, with a sentence, on what the training step cannot use; add its buffers."""
        self._sparsity_loss = get_loss(self.cfg.sparsity_loss)
        if self.cfg.target_l0 is not None:
            self.register_buffer("l0_controller", sparsity_target.new_state(self.device))
        if self.cfg.dead_latents == "resample":
            never = torch.tensor(-1, dtype=torch.int64, device=self.device)
            self.register_buffer("resampled_at", never)

    # --- the step ---------------------------------------------------------------------------------

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature activations and hidden pre-activations, both (..., d_sae)."""
        return self.encode_densely(x)

    def auxiliary_code(self, active: Active) -> Tensor | None:
        """The code of an auxiliary reconstruction, which then is also what the penalty is taken of.

        Like `read_acts`'s activations; None where there is no auxiliary reconstruction.
        """
        return None

    def training_forward_pass(self: Any, step_input: TrainStepInput) -> TrainStepOutput:
        """One forward pass; every loss term reads the same support.

        step_input.sae_in: (N, d_in). Losses are sums over d_in or latents, means over tokens.
        `feature_acts` and `hidden_pre` come as sparse COO tensors in the sparse form.
        Raises TrainingDiverged when the loss is not a finite number.
        """
        cfg = self.cfg
        if cfg.dead_latents == "resample" and self.training:
            dead_latents.resample_if_due(self, step_input)
        x = self.normalized(step_input.sae_in)
        active = self.find_active(x, cfg.backend)
        acts, hidden_pre = self.read_acts(active)
        auxiliary_code = self.auxiliary_code(active)
        unit_norm = cfg.decoder == "unit_norm"
        recons = decode_active(active, acts, self.W_dec, tangent=unit_norm) + self.b_dec
        recons = self.hook_sae_recons(recons)
        auxiliary = None
        if auxiliary_code is not None:
            W_aux, b_aux = self.W_dec, self.b_dec
            if self.aux_decoder_frozen:
                W_aux, b_aux = W_aux.detach(), b_aux.detach()
            auxiliary = decode_active(active, auxiliary_code, W_aux, tangent=unit_norm) + b_aux
        sae_out, auxiliary = self._undo_normalization(recons, auxiliary)

        losses = {"mse_loss": _squared_error(sae_out, step_input.sae_in)}
        if "l1" in step_input.coefficients:
            penalised = acts if auxiliary_code is None else auxiliary_code
            if not unit_norm:
                penalised = penalised * active.per_latent(self.W_dec.norm(dim=1))
            l1_coefficient = self._l1_coefficient(step_input.coefficients["l1"], acts, active)
            losses["l1_loss"] = l1_coefficient * penalty(
                cfg.sparsity_loss, self._sparsity_loss, penalised, active.n_tokens
            )
        if auxiliary is not None:
            losses["auxiliary_reconstruction_loss"] = _squared_error(auxiliary, step_input.sae_in)
        if cfg.dead_latents == "auxk" and step_input.dead_neuron_mask is not None:
            residual = (x - recons).detach()
            losses["auxk_loss"] = cfg.auxk_coefficient * dead_latents.auxk_loss(
                self, active, residual, step_input.dead_neuron_mask, tangent=unit_norm
            )
        if cfg.decoder_coherence:
            losses["coherence_loss"] = cfg.decoder_coherence * decoder_coherence(
                self.W_dec, cfg.decoder_coherence_cap, seed=step_input.n_training_steps
            )
        loss = torch.stack(list(losses.values())).sum()
        _require_finite(loss, losses, step_input, self.dtype)

        output = TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=active.coo(acts.detach()),
            hidden_pre=active.coo(hidden_pre.detach()),
            loss=loss,
            losses=losses,
        )
        if step_input.is_logging_step:
            if cfg.target_l0 is not None:
                output.metrics["l1_coefficient"] = (
                    step_input.coefficients["l1"] * self.l0_controller[0].exp()
                )
            output.metrics.update(
                training_metrics(step_input.sae_in, sae_out.detach(), output.feature_acts)
            )
            if step_input.dead_neuron_mask is not None:
                # SAELens's window, not this batch alone, says what is dead.
                output.metrics["dead_share"] = step_input.dead_neuron_mask.float().mean()
        return output

    def _l1_coefficient(
        self: Any, scheduled: float, acts: Tensor, active: Active
    ) -> float | Tensor:
        """Lambda for this step: the scheduler's; with `target_l0` that times the controller's."""
        cfg = self.cfg
        if cfg.target_l0 is None:
            return scheduled
        if self.training:
            l0 = (acts.detach() > 0).sum() / active.n_tokens
            warming_up = scheduled < cfg.l1_coefficient
            sparsity_target.advance(self.l0_controller, l0, cfg.target_l0, hold=warming_up)
        return scheduled * self.l0_controller[0].exp()

    def _undo_normalization(
        self: Any, recons: Tensor, auxiliary: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        # SAELens's per-token normalisations forget their statistics once they have been undone.
        if auxiliary is None:
            return self.run_time_activation_norm_fn_out(recons), None
        if self.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
            both = self.run_time_activation_norm_fn_out(torch.stack([recons, auxiliary]))
            return both[0], both[1]
        return recons, auxiliary

    def calculate_aux_loss(self: Any, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Unused: `training_forward_pass` shares one support between all terms."""
        raise NotImplementedError("the losses are computed in training_forward_pass")

    def parameters_to_plot(self) -> tuple[str, ...]:
        """Names of the per-latent parameters whose histograms go into SAELens's log."""
        raise NotImplementedError

    def log_histograms(self: Any) -> dict[str, NDArray[Any]]:
        """Histograms for SAELens's log: decoder norms, and this architecture's parameters."""
        plotted = {"W_dec_norms": self.W_dec.norm(dim=1)}
        plotted.update({name: getattr(self, name) for name in self.parameters_to_plot()})
        # float64: wandb cannot cut the range between norms of 1 and 1 + 1e-7 into float32 bins.
        return {f"weights/{k}": v.detach().double().cpu().numpy() for k, v in plotted.items()}

    # --- the unit-norm decoder --------------------------------------------------------------------

    def initialize_weights(self: Any) -> None:
        """SAELens's initialisation, then unit decoder rows and W_enc = W_dec transposed.

        W_enc keeps its (d_in, d_sae) shape, but each latent's column is contiguous: the sparse
        products read and write whole columns.
        """
        super().initialize_weights()  # type: ignore[misc]
        with torch.no_grad():
            if self.cfg.decoder == "unit_norm":
                optimizer_hooks.renormalize_(self.W_dec)
                self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)
            else:
                self.W_enc = nn.Parameter(_column_contiguous(self.W_enc.detach()))
        optimizer_hooks.watch(self)

    def fold_activation_norm_scaling_factor(self: Any, scaling_factor: float) -> None:
        """SAELens's folding, then the decoder rows back to norm 1 by an exact rescaling."""
        super().fold_activation_norm_scaling_factor(scaling_factor)  # type: ignore[misc]
        self._refold_unit_norm()

    def fold_activation_whitening(self: Any, *args: Any, **kwargs: Any) -> None:
        """SAELens's folding, then the decoder rows back to norm 1 by an exact rescaling."""
        super().fold_activation_whitening(*args, **kwargs)  # type: ignore[misc]
        self._refold_unit_norm()

    def _refold_unit_norm(self: Any) -> None:
        if self.cfg.decoder == "unit_norm":
            self.fold_W_dec_norm()

    # --- copying, saving and loading --------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """All but SAELens's closures over this object: a copy needs its own; pickle refuses."""
        closures = ("reshape_fn_", "run_time_activation_norm_fn_")
        return {key: value for key, value in vars(self).items() if not key.startswith(closures)}

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        """Make the closures of a copy anew; unit norm holds for it as for the original."""
        super().__setstate__(state)  # type: ignore[misc]
        if self.hook_z_reshaping_mode:
            self.turn_on_forward_pass_hook_z_reshaping()
        else:
            self.turn_off_forward_pass_hook_z_reshaping()
        self._setup_activation_normalization()
        optimizer_hooks.watch(self)

    def process_state_dict_for_saving(self: Any, state_dict: dict[str, Any]) -> None:
        """Row-major tensors for safetensors."""
        super().process_state_dict_for_saving(state_dict)  # type: ignore[misc]
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()

    def process_state_dict_for_saving_inference(self: Any, state_dict: dict[str, Any]) -> None:
        """As for saving, without the state of training."""
        super().process_state_dict_for_saving_inference(state_dict)  # type: ignore[misc]
        for name in TRAINING_BUFFERS:
            state_dict.pop(name, None)

    def save_inference_model(self: Any, path: str | Path) -> tuple[Path, Path]:
        """As in SAELens; the metadata then also tells what lambda `target_l0` arrived at."""
        if self.cfg.target_l0 is not None:
            reached = self.cfg.l1_coefficient * float(self.l0_controller[0].exp())
            self.cfg.metadata.l1_coefficient_reached = reached
        return super().save_inference_model(path)  # type: ignore[misc]

    def process_state_dict_for_loading(self: Any, state_dict: dict[str, Any]) -> None:
        """Column-contiguous encoders, as `initialize_weights` makes them."""
        super().process_state_dict_for_loading(state_dict)  # type: ignore[misc]
        state_dict["W_enc"] = _column_contiguous(state_dict["W_enc"])


def _column_contiguous(W_enc: Tensor) -> Tensor:
    return W_enc.T.contiguous().T


def _squared_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    return (reconstruction - target).square().sum() / target.shape[:-1].numel()


def _require_finite(
    loss: Tensor, losses: dict[str, Tensor], step_input: TrainStepInput, dtype: torch.dtype
) -> None:
    if not torch.isfinite(loss.detach()):
        reason = bad_loss(losses, step_input.sae_in, dtype)
        raise TrainingDiverged(step_input.n_training_steps, reason)
