"""What we rely on and SAELens does not promise: a failure says what SAELens has changed."""

from __future__ import annotations

import copy
import inspect
import pickle
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sae_lens
import sae_lens.registry
import torch
import wandb
from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training import _interruption
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from support.planted import make_trainer, planted_batches
from support.runs import SMALL_RUN

from sae_gated_plugin import saelens_internals as internals
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.training.signals import Signals

BATCHES = list(planted_batches(6))


@pytest.fixture
def trainer() -> Any:
    """It has six batches to train on."""
    made = make_trainer("standard")
    made.data_provider = iter(BATCHES)
    made.cfg.total_training_samples = sum(map(len, BATCHES))
    return made


@pytest.fixture
def store(hook_point: Any) -> Any:
    cfg = load_config(SMALL_RUN, ["n_batches_in_buffer=9"]).runner
    return ActivationsStore.from_config(hook_point.model, cfg)


def test_a_signal_is_its_interrupted_exception() -> None:
    with pytest.raises(internals.InterruptedException):
        _interruption.interrupt_callback(signal.SIGTERM, None)
    assert issubclass(internals.InterruptedException, Exception), (
        "SAELens's exception passes `except Exception` now: what isolates plugins need not let it"
    )


def test_its_runners_leave_a_handler_behind(small_run: dict[str, Any]) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        cfg = load_config(small_run, ["training_tokens=1024"]).runner
        LanguageModelSAETrainingRunner(cfg).run()
        for number in before:
            left = signal.getsignal(number)
            assert left is _interruption.interrupt_callback, (
                "SAELens takes its handlers back now: `without_left_handler` can go"
            )
            assert internals.without_left_handler(left) is None
        with Signals():
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- registries -----------------------------------------------------------------------------------


def test_its_registries_are_read_at_each_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = sae_lens.registry.get_sae_class("standard")
    training = sae_lens.registry.get_sae_training_class("standard")
    with monkeypatch.context() as patch:
        for registry in (internals.SAE_CLASS_REGISTRY, internals.SAE_TRAINING_CLASS_REGISTRY):
            patch.setitem(registry, "a name of ours", None)  # to be taken back
        internals.register_classes("a name of ours", training, classes)
        assert sae_lens.registry.get_sae_class("a name of ours") is classes
        assert sae_lens.registry.get_sae_training_class("a name of ours") is training


def test_its_tables_of_loaders_and_releases_are_kept() -> None:
    internals.register_loaders({"ours": print}, {"our release": None})
    try:
        assert get_pretrained_saes_directory()["our release"] is None, "it is read anew each time"
    finally:
        del NAMED_PRETRAINED_SAE_LOADERS["ours"]
        del get_pretrained_saes_directory()["our release"]


def test_its_lookups_are_imported_by_name() -> None:
    """Each module that has one under this name has ours; `unknown` in one of them is a sentence."""
    for name in ("get_sae_class", "get_sae_training_class"):
        wrapped = getattr(sae_lens.registry, name)
        assert wrapped.__module__ == "sae_lens.registry"  # functools.wraps
        theirs = inspect.unwrap(wrapped)  # other tests activate again, and wrap it again
        assert theirs is not wrapped
        assert theirs.__code__.co_filename == sae_lens.registry.__file__
        for module in (sae_lens, sae_lens.saes.sae):
            if hasattr(module, name):
                assert getattr(module, name) is wrapped, f"{module.__name__} has another {name}"


# --- the activations store ------------------------------------------------------------------------


def test_a_store_makes_activations_batch_by_batch(store: Any) -> None:
    batch = next(internals.activations_of(store))
    assert batch.shape == (16 * 63, 128), "seqpos_slice and prompts are applied elsewhere now"


def test_a_store_runs_the_model_in_one_method(store: Any) -> None:
    internals.replace_reading(store, lambda read: lambda tokens: read(tokens) + 1000.0)
    batch = next(internals.activations_of(store))
    assert batch.min() > 500, "the model's activations come from elsewhere"


def test_a_store_takes_its_sequences_from_one_method(store: Any) -> None:
    seen: list[int] = []

    def counted() -> Iterator[torch.Tensor]:
        for sequence in original():
            seen.append(len(sequence))
            yield sequence

    original = internals.replace_sequences(store, counted)
    store.get_batch_tokens()
    assert seen == [64] * 16, "its token sequences come from elsewhere"
    store.iterable_sequences = iter(())
    store.get_batch_tokens()
    assert seen == [64] * 32, "the next epoch's sequences come from elsewhere"


def test_a_store_counts_texts_and_can_hand_out_other_batches(store: Any) -> None:
    internals.serve(store, iter(BATCHES))
    assert next(store) is BATCHES[0], "a store's batches come from elsewhere than _dataloader"
    assert next(store.get_multi_hook_data_loader()) == {store.hook_name: BATCHES[1]}
    before = store.n_dataset_processed
    store.get_batch_tokens(10_000 // 64)
    assert store.n_dataset_processed > before
    assert store.cached_activation_dataset is None


# --- trainers -------------------------------------------------------------------------------------


def test_its_adam_reads_in_every_step_whether_it_is_fused(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert type(trainer.optimizer) is torch.optim.Adam, "another optimizer may have other options"
    calls: list[Any] = []
    fused_adam = torch._fused_adam_
    monkeypatch.setattr(torch, "_fused_adam_", lambda *a, **k: calls.append(fused_adam(*a, **k)))
    for fused in (False, True, True, False):
        internals.fuse_adam(trainer, fused)
        trainer.step(BATCHES[0])
    assert len(calls) == 2, "the choice is made elsewhere than in the optimizer's groups"


def test_the_first_call_of_its_loop(trainer: Any) -> None:
    """Counters and weights agree there; a loop that calls it elsewhere saves one step off."""
    seen: list[tuple[int, int]] = []
    internals.between_steps(
        trainer, lambda: seen.append((trainer.n_training_steps, trainer.n_training_samples))
    )
    trainer.fit()
    assert seen == [(n, 512 * n) for n in range(6)]


def test_the_first_call_of_its_loop_for_many() -> None:
    single = make_trainer("standard")
    single.cfg.total_training_samples = 3 * 512
    seen: list[tuple[int, bool]] = []
    many = MultiSAETrainer(
        single.cfg, {"a": single.sae}, {"a": "x"}, iter({"x": batch} for batch in BATCHES)
    )
    internals.between_steps_of_many(many, lambda final: seen.append((many.n_training_steps, final)))
    many.fit()
    assert seen[:3] == [(0, False), (1, False), (2, False)]
    assert seen[3:] in ([(3, True)], []), "the end is called otherwise"


def test_its_step_and_forward_pass_are_looked_up_at_each_step(trainer: Any) -> None:
    seen: list[str] = []

    def step(batch: Any) -> Any:
        seen.append("step")
        return original_step(batch)

    def forward(step_input: Any) -> Any:
        seen.append(f"forward {step_input.n_training_steps}")
        assert step_input.sae_in is not None
        return original_forward(step_input)

    original_step = internals.replace_step(trainer, step)
    original_forward = internals.replace_forward_pass(trainer, forward)
    trainer.fit()
    assert seen[:4] == ["step", "forward 0", "step", "forward 1"]


def test_the_counters_that_a_step_changes(trainer: Any) -> None:
    """What a step that is left out must give back. A new one here needs to be given back, too."""

    def numbers() -> dict[str, Any]:
        kinds = (int, float, bool, torch.Tensor)
        found = {k: v for k, v in vars(trainer).items() if isinstance(v, kinds)}
        return copy.deepcopy(found)

    trainer.n_forward_passes_since_fired.fill_(5)
    before = numbers()
    trainer.step(BATCHES[0])
    after = numbers()
    changed = {
        k for k in after if not torch.equal(*(torch.as_tensor(n[k]) for n in (before, after)))
    }
    assert changed == {
        "act_freq_scores",
        "n_forward_passes_since_fired",
        "n_frac_active_samples",
        "n_training_samples",
    }


def test_a_trainer_has_thresholds_and_saves_by_one_method(trainer: Any, tmp_path: Any) -> None:
    trainer.checkpoint_thresholds = [100, 600, 2000]
    trainer.n_training_samples = 512
    saved: list[str] = []
    trainer.cfg.save_final_checkpoint = True
    save, due = internals.take_checkpoints(
        trainer, lambda checkpoint_name: saved.append(checkpoint_name)
    )
    assert due == [600, 2000]
    trainer.fit()
    assert saved == ["final_3072"], "its loop saves elsewhere"
    save("name", tmp_path)
    assert {"cfg.json", "sae_weights.safetensors", "trainer_state.pt"} <= {
        path.name for path in (tmp_path / "name").iterdir()
    }


def test_an_estimated_scale_is_told_before_the_first_step() -> None:
    trainer = make_trainer("standard", normalize_activations="expected_average_only_in")
    trainer.data_provider = iter(BATCHES * 2)
    trainer.cfg.n_batches_for_norm_estimate = 2
    trainer.cfg.total_training_samples = len(BATCHES[0])
    told: list[tuple[float, int]] = []
    internals.when_scale_is_found(
        trainer, lambda scale: told.append((scale, trainer.n_training_samples))
    )
    trainer.fit()
    norms = torch.cat(BATCHES[:2]).norm(dim=1)
    assert told == [(pytest.approx(4 / float(norms.mean())), 0)]


def test_a_scaling_factor_is_kept() -> None:
    trainer = make_trainer("standard", normalize_activations="expected_average_only_in")
    trainer.cfg.total_training_samples = 512
    trainer.data_provider = iter(BATCHES)
    trainer.activation_scaler.scaling_factor = 0.5
    internals.keep_scaling_factor(trainer)
    seen: list[Any] = []
    internals.between_steps(trainer, lambda: seen.append(trainer.activation_scaler.scaling_factor))
    trainer.fit()
    assert seen == [0.5], "a checkpoint's scale is estimated anew, or by another method"


def test_the_scaling_factors_of_many_are_kept_and_take_no_batches() -> None:
    single = make_trainer("standard", normalize_activations="expected_average_only_in")
    single.cfg.total_training_samples = 512
    batches = iter({"x": batch} for batch in BATCHES)
    many = MultiSAETrainer(single.cfg, {"a": single.sae}, {"a": "x"}, batches)
    scaler = many.trainers["a"].activation_scaler
    scaler.scaling_factor = 0.5
    internals.keep_scaling_factors(many)
    seen: list[Any] = []
    internals.between_steps_of_many(many, lambda _: seen.append(scaler.scaling_factor))
    many.fit()
    assert seen[0] == 0.5, "a checkpoint's scale is estimated anew, or by another method"
    assert len(list(batches)) == len(BATCHES) - 1, "batches are taken that the steps then miss"


def test_a_coefficients_warm_up_can_be_set() -> None:
    trainer = make_trainer("standard", l1_coefficient=4.0, l1_warm_up_steps=10)
    internals.set_coefficient(trainer, "l1", 3.0)
    assert trainer.get_coefficients() == {"l1": 3.0}


def test_what_its_loop_logs_goes_through_two_methods(trainer: Any) -> None:
    trainer.cfg.logger = LoggingConfig(wandb_log_frequency=1, eval_every_n_wandb_logs=1)
    trainer.cfg.feature_sampling_window = 10**6
    calls: list[str] = []
    internals.shield_logging(trainer, lambda method: lambda *_: calls.append(method.__name__))
    trainer.fit()  # without a wandb run, anything else that logs is an error here
    assert calls[:2] == ["_log_train_step", "_run_and_log_evals"]


def test_the_bar_of_its_loop(trainer: Any) -> None:
    seen: list[Any] = []

    def make(bar: Any, options: Any) -> Any:
        seen.append(options["total"])
        return bar(**options, disable=True)

    before = sae_lens.training.sae_trainer.tqdm
    with internals.replace_bar(trainer, make, lambda output, bar: seen.append((output, bar))):
        trainer.fit()
    total, *steps = seen
    assert total == trainer.cfg.total_training_samples
    assert len(steps) == len(BATCHES)
    assert all(isinstance(output, TrainStepOutput) for output, _ in steps)
    assert sae_lens.training.sae_trainer.tqdm is before


def test_what_it_says_of_its_counts_goes_through_three_methods(trainer: Any) -> None:
    trainer.cfg.logger = LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=10**6)
    trainer.cfg.feature_sampling_window = 3
    calls: list[str] = []

    def counted(method: Any) -> Any:
        return lambda *_: calls.append(method.__name__)

    internals.replace_reports(
        trainer, counted, lambda _: lambda *_: calls.append(str(internals.is_logging_step(trainer)))
    )
    trainer.fit()
    assert calls.pop() == "set_final_sae_metadata"
    assert [said for said in calls if said != "_build_sparsity_log_dict"] == ["False", "True"] * 3
    # After the second step before SAELens 6.52, since then after the third and at the end.
    assert len(calls) - 6 in (1, 2)


def test_gradients_are_clipped_to_this_norm(trainer: Any) -> None:
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append([p.grad.norm() for p in trainer.sae.parameters()])
    )
    norms: list[Any] = []
    trainer.step(100 * BATCHES[0])
    assert float(torch.stack(norms[0]).norm()) == pytest.approx(internals.CLIPPED_NORM)


def test_the_coefficient_in_its_log() -> None:
    trainer = make_trainer("gated", target_l0=2.0, l1_coefficient=3.0)
    trainer.cfg.logger = LoggingConfig(wandb_log_frequency=1)
    trainer.sae.l0_controller[0] = 1.0
    output = trainer.step(BATCHES[0])
    before = trainer.build_train_step_log_dict(output=output, n_training_samples=1)
    assert before["details/l1_coefficient"] == 3.0
    internals.log_reached_coefficient(trainer)
    after = trainer.build_train_step_log_dict(output=output, n_training_samples=1)
    assert after["details/l1_coefficient"] == before.pop("metrics/l1_coefficient") > 6
    assert after.keys() == before.keys()


def test_an_sae_leaves_the_loop_for_many() -> None:
    first, second = make_trainer("standard"), make_trainer("standard")
    first.cfg.total_training_samples = 3 * 512
    saes = {"a": first.sae, "b": second.sae}
    many = MultiSAETrainer(
        first.cfg, saes, dict.fromkeys(saes, "x"), iter({"x": batch} for batch in BATCHES)
    )
    trained = dict(many.trainers)
    internals.between_steps_of_many(
        many, lambda _: internals.drop_sae(many, "b") if many.n_training_steps == 1 else None
    )
    assert list(many.fit()) == ["a"]
    assert [trained[name].n_training_samples for name in "ab"] == [3 * 512, 512]


# --- runners --------------------------------------------------------------------------------------


def test_its_runners_end_wandbs_run_by_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(wandb, "finish", lambda: ended.append("ended"))
    for module in (sae_lens.llm_sae_training_runner, sae_lens.multi_sae_training_runner):
        assert "wandb.finish()" in inspect.getsource(module)
        module.wandb.finish()
        with internals.keep_wandb_running():
            module.wandb.finish()
    assert ended == ["ended"] * 2


def test_the_methods_of_its_runners_that_are_ours() -> None:
    """Overridden by a name that SAELens calls: a name of its own would never be called."""
    for owner, name, caller in (
        (LanguageModelSAETrainingRunner, "run_trainer_with_interruption_handling", "run"),
        (LanguageModelSAETrainingRunner, "save_final_sae", "run"),
        (sae_lens.MultiSAETrainingRunner, "_run_with_interruption_handling", "run"),
        (sae_lens.MultiSAETrainingRunner, "_save_runner_checkpoint_files", "run"),
        (SAETrainer, "maybe_reset_sparsity", "fit"),
        (MultiSAETrainer, "_maybe_log_sparsity", "fit"),
    ):
        source = inspect.getsource(getattr(owner, caller))
        assert f"self.{name}" in source, f"{owner.__name__}.{caller} calls no {name} any more"


def test_uploads_go_through_the_logging_config(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[Any] = []
    monkeypatch.setattr(LoggingConfig, "log", lambda _, *files: uploaded.append(files))
    config = LoggingConfig()
    upload = internals.take_uploads(config)
    config.log(None, "weights", "cfg")  # type: ignore[arg-type, call-arg]
    assert not uploaded
    upload(None, "weights", "cfg")
    assert uploaded == [(None, "weights", "cfg")]


def test_its_warning_of_an_overridden_model(
    hook_point: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = load_config(SMALL_RUN).runner
    LanguageModelSAETrainingRunner(cfg, override_model=hook_point.model)
    assert "passed in a model" in caplog.text, "SAELens words its warning otherwise"
    caplog.clear()
    with internals.without_override_warning():
        LanguageModelSAETrainingRunner(cfg, override_model=hook_point.model)
    assert not caplog.text


# --- SAEs -----------------------------------------------------------------------------------------


def test_the_closures_of_an_sae() -> None:
    """A copy without them would normalise by the original's statistics; with others, no pickle."""
    sae: Any = make_trainer("standard", normalize_activations="layer_norm").sae
    own = internals.without_closures(vars(sae))
    left_out = vars(sae).keys() - own.keys()
    assert left_out >= {"reshape_fn_in", "run_time_activation_norm_fn_in"}
    closures = [k for k, v in own.items() if getattr(v, "__closure__", None)]
    assert not closures, f"SAELens has the closures {closures}, too"
    bare = copy.copy(sae)
    for name in left_out:
        delattr(bare, name)
    internals.renew_closures(bare)
    assert vars(bare).keys() >= left_out
    pickle.dumps(SimpleNamespace(**{k: v for k, v in own.items() if k != "cfg"}))
