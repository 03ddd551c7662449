"""What stops a training, what it says, and that nothing bad has reached the weights."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.training.activations_store import ActivationsStore
from support.planted import D_SAE, make_trainer, planted_batches
from support.runs import D_IN as RUN_D_IN
from torch import Tensor

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import TrainingDiverged
from sae_gated_plugin.training import checkpoints
from sae_gated_plugin.training import run as training
from sae_gated_plugin.training.divergence import DivergenceGuard
from sae_gated_plugin.training.run import resume

BATCHES = list(planted_batches(12))


def guarded(architecture: str, skip: bool = False, **options: Any) -> tuple[Any, DivergenceGuard]:
    trainer = make_trainer(architecture, **options)
    return trainer, DivergenceGuard(trainer, skip)


def train(trainer: Any, batches: list[Tensor]) -> None:
    for batch in batches:
        trainer.maybe_reset_sparsity()
        trainer.step(batch)
        trainer.n_training_steps += 1


def everything(trainer: Any) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "sae": trainer.sae.state_dict(),
            "optimizer": trainer.optimizer.state_dict()["state"],
            "samples": torch.tensor(trainer.n_training_samples),
            "firing": trainer.act_freq_scores,
            "since": trainer.n_forward_passes_since_fired,
            "counted": torch.tensor(trainer.n_frac_active_samples),
        }
    )


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert torch.equal(a, b)


def nan_activations(trainer: Any) -> Tensor:
    batch = BATCHES[5].clone()
    batch[[3, 7], 2] = torch.nan
    return batch


def loss_too_large(trainer: Any) -> Tensor:
    return BATCHES[5] * 1e25


def gradient_too_large(trainer: Any) -> Tensor:
    """Finite itself; clipping makes zeros of it, for its norm is not."""
    guard = trainer.sae.training_forward_pass.__self__
    forward = guard._forward

    def overflowing(step_input: Any) -> Any:
        guard._forward = forward
        output = forward(step_input)
        output.loss = output.loss + (trainer.sae.b_dec * 1e30).sum()
        return output

    guard._forward = overflowing
    return BATCHES[5]


@pytest.mark.parametrize("architecture", ["gated", "standard", "topk"])
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            nan_activations,
            r"the loss is not finite \(2 of 512 tokens have NaN or infinite activations: float16",
        ),
        (
            loss_too_large,
            r"the loss is not finite \(mse_loss.* overflowed on finite activations; a",
        ),
        (gradient_too_large, r"the loss is finite, but the gradient of b_dec is NaN, infinite or"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_a_bad_batch_changes_nothing(
    architecture: str, spoil: Any, sentence: str, skip: bool, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"k": 4} if architecture == "topk" else {}
    if architecture == "gated":
        options["target_l0"] = 4
    trainer, guard = guarded(architecture, skip, **options)
    train(trainer, BATCHES[:5])
    before = everything(trainer)
    bad = spoil(trainer)
    if skip:
        train(trainer, [bad])
        assert caplog.messages[0].startswith("Step 5 was skipped: the loss is")
        before["samples"] += 512  # it counts as read
        assert guard.trained_on is bad
    else:
        with pytest.raises(TrainingDiverged, match=f"^Training stopped before step 5: {sentence}"):
            train(trainer, [bad])
        assert guard.trained_on is BATCHES[4]
    assert_same(everything(trainer), before)
    train(trainer, BATCHES[6:8])
    assert all(parameter.isfinite().all() for parameter in trainer.sae.parameters())
    assert not torch.equal(trainer.sae.W_dec, before["sae"]["W_dec"])


def test_skipping_is_leaving_out() -> None:
    """The weights are those of a training in which the batch does not exist."""
    trainer, _ = guarded("gated", skip=True)
    train(trainer, [*BATCHES[:5], nan_activations(trainer), *BATCHES[5:]])
    without, _ = guarded("gated")
    train(without, BATCHES)
    assert_same(dict(trainer.sae.state_dict()), dict(without.sae.state_dict()))
    assert trainer.n_training_samples == without.n_training_samples + 512


@pytest.mark.parametrize("architecture", ["gated", "prolu", "standard"])
def test_float16_is_named_and_what_to_take_instead(architecture: str) -> None:
    trainer, _ = guarded(architecture, dtype="float16")
    with pytest.raises(TrainingDiverged, match=r"dtype is float16, .*; take float32 or bfloat16"):
        train(trainer, [batch.half() for batch in BATCHES])
    trainer, _ = guarded(architecture, dtype="float16")
    with pytest.raises(TrainingDiverged, match=r"float16 overflows, which bfloat16 and float32 do"):
        train(trainer, [(BATCHES[0] * 1e6).half()])
    trainer, _ = guarded(architecture, lr=1e25)
    with pytest.raises(TrainingDiverged, match="a lower lr or coefficient may help"):
        train(trainer, BATCHES)


def test_there_is_an_end_to_skipping() -> None:
    trainer, _ = guarded("standard", skip=True)
    train(trainer, BATCHES[:2])
    with pytest.raises(TrainingDiverged, match="before step 12"):
        train(trainer, [nan_activations(trainer)] * 20)


def test_an_infinite_penalty_whose_clipped_gradients_are_zero() -> None:
    trainer, _ = guarded("standard", l1_coefficient=1e38)
    with pytest.raises(TrainingDiverged, match=r"before step 0: the loss is not finite \(l1_loss"):
        train(trainer, BATCHES[:1])


def test_bad_batches_do_not_resample() -> None:
    trainer, _ = guarded(
        "gated", dead_feature_window=1, dead_latents="resample", resample_steps=(5,)
    )
    train(trainer, BATCHES[:5])
    trainer.n_forward_passes_since_fired[:9] = 100
    with pytest.raises(TrainingDiverged, match="2 of 512 tokens"):
        train(trainer, [nan_activations(trainer)])
    assert all(parameter.isfinite().all() for parameter in trainer.sae.parameters())


@pytest.mark.parametrize("spoil", [nan_activations, gradient_too_large])
def test_a_step_left_out_takes_its_resampling_along(spoil: Any) -> None:
    """Weights, moments and all later steps are those of a training without that batch."""
    trainers: list[Any] = []
    for bad in (True, False):
        options = {"resample_steps": (5,), "resample_warm_up_steps": 10, "dead_feature_window": 1}
        trainer, _ = guarded("gated", skip=True, dead_latents="resample", **options)
        train(trainer, BATCHES[:5])
        trainer.n_forward_passes_since_fired[:9] = 100
        before = everything(trainer)
        if bad:
            train(trainer, [spoil(trainer)])
            before["samples"] += 512
            assert_same(everything(trainer), before)
        else:
            trainer.n_training_steps += 1
        assert trainer.sae.resampled_at == -1
        train(trainer, BATCHES[6:9])
        trainers.append(everything(trainer))
    del trainers[0]["samples"], trainers[1]["samples"]
    assert_same(*trainers)


def test_steps_left_out_in_a_warm_up_leave_the_learning_rate_alone() -> None:
    rates: list[list[float]] = []
    for bad in (True, False):
        options = {"resample_steps": (2,), "resample_warm_up_steps": 6, "dead_feature_window": 1}
        trainer, _ = guarded("gated", skip=True, dead_latents="resample", **options)
        trainer.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, 50)
        rates.append([])
        for i, batch in enumerate(BATCHES):
            trainer.n_forward_passes_since_fired[:9] = 100
            train(trainer, [gradient_too_large(trainer) if bad and i in (4, 5) else batch])
            rates[-1].append(trainer.optimizer.state_dict()["param_groups"][0]["lr"])
        assert trainer.sae.resampled_at == 2
    assert rates[0] == rates[1]


# --- L0 -------------------------------------------------------------------------------------------


def spread(architecture: str, bias: float, **options: Any) -> Any:
    trainer, guard = guarded(architecture, lr=1e-8, **options)
    with torch.no_grad():
        for name in ("b_gate", "b_mag") if architecture == "gated" else ("b_enc",):
            getattr(trainer.sae, name).fill_(bias)
    return trainer, guard


@pytest.mark.parametrize("architecture", ["gated", "standard"])
@pytest.mark.parametrize(
    ("bias", "sentence"),
    [
        (-1e3, r"next to no latent is active \(L0 = 0\), so none can learn"),
        (1e3, rf"every latent is active on every token \(L0 = {D_SAE} of {D_SAE}\)"),
    ],
)
def test_l0_collapses(
    architecture: str, bias: float, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_gated_plugin.training.divergence.COLLAPSED_STEPS", 5)
    trainer, _ = spread(architecture, bias)
    trainer.cfg.feature_sampling_window = 3  # SAELens's counts begin again in between
    pattern = f"before step 4: L0 has collapsed: for 5 batches {sentence}"
    with pytest.raises(TrainingDiverged, match=pattern):
        train(trainer, BATCHES)


def test_dead_latents_that_will_be_resampled_are_no_collapse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sae_gated_plugin.training.divergence.COLLAPSED_STEPS", 5)
    trainer, _ = spread("gated", -1e3, dead_latents="resample", resample_steps=(1000,))
    train(trainer, BATCHES)


def test_a_few_are_no_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_gated_plugin.training.divergence.COLLAPSED_STEPS", 5)
    trainer, _ = guarded("gated", lr=1e-8)
    zeros = torch.zeros_like(BATCHES[0])
    train(trainer, [zeros] * 4 + BATCHES[:1] + [zeros] * 4)


def test_the_error_survives_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(TrainingDiverged(7, "the reason.")))
    assert (error.step, error.reason) == (7, "the reason.")
    assert str(error) == "Training stopped before step 7: the reason."


# --- whole runs -----------------------------------------------------------------------------------


def test_a_collapsed_run_names_the_good_checkpoint(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of the collapsed weights do not push the good ones out."""
    monkeypatch.setattr("sae_gated_plugin.training.divergence.COLLAPSED_STEPS", 20)
    small_run.update(n_checkpoints=20, lr=0.1)
    small_run["sae"].update(architecture="standard", l1_coefficient=1e3, l1_warm_up_steps=20)
    with pytest.raises(
        TrainingDiverged, match=r"next to no latent.*The last good weights are in '"
    ) as caught:
        training.train(load_config(small_run), tmp_path / "run")
    kept = checkpoints.numbered(tmp_path / "run" / "checkpoints")
    assert str(caught.value).endswith(f"'{kept[-1]}'.")
    assert checkpoints.verify(kept[-1])["steps"] <= caught.value.step - 19


def test_a_diverged_run_goes_on_without_the_bad_batch(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends where a run ends that skips from the beginning."""
    original = ActivationsStore.get_activations

    def poisoned(self: Any, *arguments: Any, **options: Any) -> Tensor:
        activations = original(self, *arguments, **options)
        if getattr(self._dataloader, "_n_sequences", None) == 160:  # of the text, in training
            activations[3, 5, 0] = torch.nan
        return activations

    monkeypatch.setattr(ActivationsStore, "get_activations", poisoned)
    overrides = ["training_tokens=20480", f"sae.d_in={RUN_D_IN}"]
    config = load_config(small_run, overrides)
    folder = tmp_path / "run"
    with pytest.raises(TrainingDiverged) as caught:
        training.train(config, folder)
    assert str(caught.value).endswith(
        f"; to leave such batches out, go on with: sae-gated train --resume {folder} "
        "--on-divergence skip."
    )
    with pytest.raises(TrainingDiverged) as again:
        resume(folder)
    assert again.value.step == caught.value.step
    resume(folder, on_divergence="skip")
    training.train(config, tmp_path / "skipping", on_divergence="skip")
    weights = [
        (path / "sae_weights.safetensors").read_bytes() for path in (folder, tmp_path / "skipping")
    ]
    assert weights[0] == weights[1]
    assert json.loads((folder / "results.json").read_text())["fvu"] > 0
