"""What every architecture with a thresholded-ReLU code shares.

A code of this kind is active where m = (x - b_dec) W_enc exceeds a threshold per latent, and its
magnitude is a function of m and of per-latent parameters. An architecture says only that: its
`thresholds()`, and how `read_acts()` gets activations from the active values. The rest is here:
one training step on one shared support, the unit-norm decoder, metrics in SAELens's log, and what
SAELens's runners expect of a config.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from numpy.typing import NDArray
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from ... import saelens_internals
from ...core.active import Active, decode_active, decode_both
from ...core.choice import on_gpu, on_its_way
from ...core.prefixes import Prefixes
from ...errors import TrainingDiverged
from ...metrics.registered import training_metrics
from ...objectives import dead_latents, optimizer_hooks, random_controls, sparsity_target
from ...objectives.coherence_penalty import decoder_coherence
from ...objectives.losses import bad_loss, get_loss, penalty
from . import matryoshka
from .code import ThresholdedSAE

#: What `process_state_dict_for_saving_inference` leaves out: state of training, not of the SAE.
TRAINING_BUFFERS = ("l0_controller", "resampled_at", random_controls.START)

#: SAELens's name for the loss of the auxiliary reconstruction.
AUXILIARY = "auxiliary_reconstruction_loss"


class _Code(NamedTuple):
    """The codes of one batch: x (N, d_in), normalised, and what the shared support holds."""

    x: Tensor
    active: Active
    acts: Tensor
    hidden_pre: Tensor
    auxiliary: Tensor | None
    prefixes: Prefixes | None


class ThresholdedTrainingSAE(ThresholdedSAE):
    """Mixin: the training step. Its config has `decoder`, `sparsity_loss` and `backend`."""

    aux_decoder_frozen = True

    def __init__(self: Any, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)  # type: ignore[call-arg]
        self._sparsity_loss = get_loss(self.cfg.sparsity_loss)
        if self.cfg.target_l0 is not None:
            self.register_buffer("l0_controller", sparsity_target.new_state(self.device))
        if self.cfg.dead_latents == "resample":
            never = torch.tensor(-1, dtype=torch.int64, device=self.device)
            self.register_buffer("resampled_at", never)
        random_controls.freeze(self)

    def get_coefficients(self: Any) -> dict[str, float | TrainCoefficientConfig]:
        """lambda, which SAELens's scheduler warms up."""
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, self.cfg.l1_warm_up_steps)}

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
        `feature_acts` and `hidden_pre` are `SupportTensor`s in the sparse form.
        Raises TrainingDiverged when the loss is not a finite number; see `_require_finite`.
        """
        if self.cfg.dead_latents == "resample" and self.training:
            dead_latents.resample_if_due(self, step_input)
        code = self._encode(step_input.sae_in)
        decoded = self._decode(code, step_input.sae_in)
        sparsity = self._sparsity(code) if "l1" in step_input.coefficients else None
        recons, sae_out, aux_out, inner = self._reconstruct(decoded)
        losses = self._losses(step_input, code, recons, sae_out, aux_out, sparsity) | inner
        loss = torch.stack(list(losses.values())).sum()
        _require_finite(self, loss, losses, step_input)
        output = TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=code.active.matrix(code.acts),
            hidden_pre=code.active.matrix(code.hidden_pre),
            loss=loss,
            losses=losses,
        )
        if step_input.is_logging_step:
            output.metrics.update(self._metrics(step_input, output))
        return output

    def _encode(self: Any, x_ND: Tensor) -> _Code:
        x_ND = self.normalized(x_ND)
        active = self.find_active(x_ND, self.cfg.backend)
        acts, hidden_pre = self.read_acts(active)
        widths = self.cfg.matryoshka_widths
        prefixes = Prefixes(active, self.shards.widths(widths)) if widths else None
        return _Code(x_ND, active, acts, hidden_pre, self.auxiliary_code(active), prefixes)

    def _reconstruct(
        self: Any, decoded: Callable[[], tuple[Tensor, Tensor | None, dict[str, Tensor]]]
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        """Reconstruction as SAELens normalises it; it and the auxiliary one in units of the input;
        the inner prefixes' squared errors by name.
        """
        recons_ND, aux_ND, inner = decoded()
        recons_ND = self.hook_sae_recons(recons_ND)
        if aux_ND is None:
            return recons_ND, self.run_time_activation_norm_fn_out(recons_ND), None, inner
        if self.cfg.normalize_activations not in matryoshka.PER_TOKEN:
            return recons_ND, recons_ND, aux_ND, inner
        # SAELens's per-token normalisations forget their statistics once they have been undone.
        both = self.run_time_activation_norm_fn_out(torch.stack([recons_ND, aux_ND]))
        return recons_ND, both[0], both[1], inner

    def _decode(
        self: Any, code: _Code, sae_in: Tensor
    ) -> Callable[[], tuple[Tensor, Tensor | None, dict[str, Tensor]]]:
        """Reconstruction, auxiliary reconstruction, and inner prefixes' errors. Over several ranks
        their sums are on their way; what is returned waits for them.

        The auxiliary decode of the paper reads a frozen copy of the decoder.
        """
        active, acts, auxiliary = code.active, code.acts, code.auxiliary
        tangent, frozen = self.cfg.decoder == "unit_norm", self.aux_decoder_frozen
        if code.prefixes is not None:
            codes = [acts] if auxiliary is None else [acts, auxiliary]
            return matryoshka.decode(self, code.prefixes, codes, sae_in, AUXILIARY)
        if auxiliary is None:
            recons_ND = self.shards.begin_sum(decode_active(active, acts, self.W_dec, tangent))
            return lambda: (recons_ND() + self.b_dec, None, {})
        both = decode_both(active, acts, auxiliary, self.W_dec, tangent, frozen)
        recons_ND, aux_ND = (self.shards.begin_sum(part) for part in both)
        b_aux = self.b_dec.detach() if frozen else self.b_dec
        return lambda: (recons_ND() + self.b_dec, aux_ND() + b_aux, {})

    def _losses(
        self: Any,
        step_input: TrainStepInput,
        code: _Code,
        recons_ND: Tensor,
        sae_out_ND: Tensor,
        aux_out_ND: Tensor | None,
        sparsity: Tensor | None,
    ) -> dict[str, Tensor]:
        """|x - x_hat|^2 + lambda |f|_1 + |x - x_hat_frozen|^2, and what the options add."""
        cfg, active = self.cfg, code.active
        unit_norm = cfg.decoder == "unit_norm"
        losses = {"mse_loss": _squared_error(sae_out_ND, step_input.sae_in)}
        if sparsity is not None:
            l1_coefficient = self._l1_coefficient(step_input.coefficients["l1"], code.acts, active)
            losses["l1_loss"] = l1_coefficient * self.shards.sum(sparsity)
        if aux_out_ND is not None:
            losses[AUXILIARY] = _squared_error(aux_out_ND, step_input.sae_in)
        if cfg.dead_latents == "auxk" and step_input.dead_neuron_mask is not None:
            residual_ND = (code.x - recons_ND).detach()
            losses["auxk_loss"] = cfg.auxk_coefficient * dead_latents.auxk_loss(
                self, active, residual_ND, step_input.dead_neuron_mask, tangent=unit_norm
            )
        if cfg.decoder_coherence:
            losses["coherence_loss"] = cfg.decoder_coherence * decoder_coherence(
                self.W_dec, cfg.decoder_coherence_cap, seed=step_input.n_training_steps
            )
        return losses

    def _sparsity(self: Any, code: _Code) -> Tensor:
        """The sparsity of the latents here, before lambda."""
        acts = code.acts if code.auxiliary is None else code.auxiliary
        if self.cfg.decoder != "unit_norm":
            acts = acts * code.active.per_latent(self.W_dec.norm(dim=1))
        slices = [acts] if code.prefixes is None else code.prefixes.split(acts)
        name, loss, n_tokens = self.cfg.sparsity_loss, self._sparsity_loss, code.active.n_tokens
        return matryoshka.prefix_penalty([penalty(name, loss, part, n_tokens) for part in slices])

    def _metrics(self: Any, step_input: TrainStepInput, output: TrainStepOutput) -> dict[str, Any]:
        """What goes into SAELens's log beside its own metrics."""
        metrics: dict[str, Any] = {}
        if self.cfg.target_l0 is not None:
            scheduled = step_input.coefficients["l1"]
            metrics["l1_coefficient"] = scheduled * self.l0_controller[0].exp()
        acts = self.shards.joined_acts(output.feature_acts)
        metrics |= training_metrics(output.sae_in, output.sae_out.detach(), acts)
        if step_input.dead_neuron_mask is not None:
            # SAELens's window, not this batch alone, says what is dead.
            metrics["dead_share"] = self.shards.joined(step_input.dead_neuron_mask.float()).mean()
        return metrics

    def _l1_coefficient(
        self: Any, scheduled: float, acts: Tensor, active: Active
    ) -> float | Tensor:
        """Lambda for this step: the scheduler's; with `target_l0` that times the controller's."""
        cfg = self.cfg
        if cfg.target_l0 is None:
            return scheduled
        if self.training:
            l0 = self.shards.total((acts.detach() > 0).sum()) / active.n_tokens
            warming_up = scheduled < cfg.l1_coefficient
            sparsity_target.advance(self.l0_controller, l0, cfg.target_l0, hold=warming_up)
        return scheduled * self.l0_controller[0].exp()

    def decode(self: Any, feature_acts: Tensor) -> Tensor:
        """As in SAELens, from the activations (..., n) of the latents that are here."""
        sae_out = self.shards.sum(feature_acts @ self.W_dec) + self.b_dec
        sae_out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(sae_out))
        return self.reshape_fn_out(sae_out, self.d_head)

    def calculate_aux_loss(self: Any, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Unused: `training_forward_pass` shares one support between all terms."""
        raise NotImplementedError("the losses are computed in training_forward_pass")

    def parameters_to_plot(self: Any) -> tuple[str, ...]:
        """Names of what has one number per latent; histograms of it go into SAELens's log."""
        known = dict(self.named_parameters())
        return tuple(name for name in self.latent_axes if name in known and known[name].ndim == 1)

    def log_histograms(self: Any) -> dict[str, NDArray[Any]]:
        """Histograms for SAELens's log: decoder norms, and this architecture's parameters."""
        plotted = {"W_dec_norms": self.W_dec.norm(dim=1)}
        plotted.update({name: getattr(self, name) for name in self.parameters_to_plot()})
        # float64: wandb cannot cut the range between norms of 1 and 1 + 1e-7 into float32 bins.
        whole = {name: self.shards.joined(value.detach()) for name, value in plotted.items()}
        return {f"weights/{k}": v.double().cpu().numpy() for k, v in whole.items()}

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
        return saelens_internals.without_closures(vars(self))

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        """Make the closures of a copy anew; unit norm holds for it as for the original."""
        super().__setstate__(state)  # type: ignore[misc]
        saelens_internals.renew_closures(self)
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
    sae: Any, loss: Tensor, losses: dict[str, Tensor], step_input: TrainStepInput
) -> None:
    """Raise TrainingDiverged where the loss is not finite.

    On a GPU the host would have to wait for it in the middle of the step. There it is the last
    step's loss that is looked at, and none where a `DivergenceGuard` does that before the
    optimizer's step.
    """
    if on_gpu(loss) and getattr(sae, "loss_is_guarded", False):
        return
    detached = {name: value.detach() for name, value in losses.items()}
    seen = _Loss(on_its_way(loss.detach()), detached, step_input)
    if on_gpu(loss):
        seen, _LAST_LOSS[sae] = _LAST_LOSS.get(sae), seen
    if seen is not None and not math.isfinite(seen.number()):
        _LAST_LOSS.pop(sae, None)
        step, sae_in = seen.step_input.n_training_steps, seen.step_input.sae_in
        raise TrainingDiverged(step, bad_loss(seen.losses, sae_in, sae.dtype))


class _Loss(NamedTuple):
    """A step's loss, which may still be on its way to the host, its terms and its input."""

    number: Callable[[], float]
    losses: dict[str, Tensor]
    step_input: TrainStepInput


#: Of each training SAE on a GPU, the loss that was not looked at yet.
_LAST_LOSS: WeakKeyDictionary[nn.Module, _Loss] = WeakKeyDictionary()
