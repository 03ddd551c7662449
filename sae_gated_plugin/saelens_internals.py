"""Everything that relies on what SAELens does not promise, each with the reason.

Methods replaced on its store, trainers and runners, tables written into, names with underscores.
Tested on SAELens 6.51.2, 6.53.1 and 6.54.12. `tests/saelens/test_internals.py` has a test of each,
and its failure says what SAELens has changed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import sae_lens
import sae_lens.registry
import torch
import wandb
from sae_lens import MultiSAETrainingRunner
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

# Raised on a signal in whatever code is running, as an ordinary exception. What isolates a plugin's
# failures must let it pass, and SAELens has no public name for it.
from sae_lens.training._interruption import InterruptedException as InterruptedException
from sae_lens.training._interruption import interrupt_callback
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

Call = Callable[..., Any]


def _replace(owner: Any, name: str, make: Callable[[Call], Call]) -> Call:
    """Put `make(method)` in the place of a method of one object; return the method."""
    method = getattr(owner, name)
    setattr(owner, name, make(method))
    return method


def without_left_handler(handler: Any) -> Any:
    """A signal handler to go back to; None for SAELens's own, which its runners leave behind.

    It raises an ordinary exception wherever the program is, long after a training, and what takes
    exceptions for failures then takes Ctrl-C for one.
    """
    return None if handler is interrupt_callback else handler


# --- registries -----------------------------------------------------------------------------------


def register_classes(
    name: str, training: tuple[Any, Any] | None, inference: tuple[Any, Any] | None
) -> None:
    """Enter an architecture. `register_sae_class` refuses a name that is taken, such as `gated`.

    Inference goes first: a training config looks its inference class up while it is built.
    """
    if inference is not None:
        SAE_CLASS_REGISTRY[name] = inference
    if training is not None:
        SAE_TRAINING_CLASS_REGISTRY[name] = training


def register_loaders(loaders: Mapping[str, Call], releases: Mapping[str, Any]) -> None:
    """Enter loaders of pretrained SAEs and releases; SAELens has functions for neither."""
    NAMED_PRETRAINED_SAE_LOADERS.update(loaders)
    if releases:  # SAELens's list takes a while to read; it is read once and kept
        get_pretrained_saes_directory().update(releases)


def wrap_lookup(name: str, wrap: Callable[[Call], Call]) -> None:
    """Replace a function of `sae_lens.registry` in every module that imported it by name."""
    original = getattr(sae_lens.registry, name)
    wrapped = wrap(original)
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "sae_lens" and vars(module).get(name) is original:
            setattr(module, name, wrapped)


def wrap_training_config(wrap: Callable[[Call], Call]) -> None:
    """Wrap what SAELens's runner takes its SAE's config from; its own class does not survive it."""
    owner = sae_lens.LanguageModelSAERunnerConfig
    owner.get_training_sae_cfg_dict = wrap(owner.get_training_sae_cfg_dict)  # type: ignore


# --- the activations store ------------------------------------------------------------------------


def activations_of(store: Any) -> Iterator[Tensor]:
    """Activations of one language-model batch after another, (n, d_in), not yet mixed."""
    return store._iterate_filtered_activations()


def replace_sequences(store: Any, sequences: Callable[[], Iterator[Tensor]]) -> Call:
    """Let a store take its token sequences from here, in this epoch and in those to come; return
    its own method.
    """
    original = _replace(store, "_iterate_tokenized_sequences", lambda _: sequences)
    store.iterable_sequences = sequences()
    return original


def serve(store: Any, batches: Iterator[Tensor]) -> None:
    """Let a store hand out these batches; its own mixing buffer is a generator, without state.

    A store for many hook points, of which there is one here, hands them out by its name. Its own
    batches would have the language model's dtype, and not float32 as those of a single run.
    """
    store._dataloader = batches
    store.get_multi_hook_data_loader = lambda: ({store.hook_name: batch} for batch in batches)


def replace_reading(store: Any, make: Callable[[Call], Call]) -> None:
    """Let a store have the activations (n, positions, d_in) of tokens (n, context) from elsewhere.

    make: gets the store's own method, which runs the language model.
    """
    _replace(store, "get_activations", make)


# --- trainers -------------------------------------------------------------------------------------


def between_steps(trainer: SAETrainer[Any, Any], action: Callable[[], None]) -> None:
    """Call `action` before each step, where SAELens's counters agree with its weights.

    They do not yet where SAELens itself saves, and it has no hook. This is what its loop calls
    first.
    """

    def first(log_sparsity: Call) -> Call:
        def act() -> dict[str, Any]:
            action()
            # A run that goes on may have reset the window before its checkpoint was written.
            return log_sparsity() if trainer.n_frac_active_samples else {}

        return act

    _replace(trainer, "maybe_reset_sparsity", first)


def between_steps_of_many(trainer: MultiSAETrainer, action: Callable[[bool], None]) -> None:
    """As `between_steps`; from SAELens 6.54 on also with True, when the last step is done."""

    def first(log_sparsity: Call) -> Call:
        def act(**options: bool) -> None:  # `final` alone, and not before 6.54
            action(options.get("final", False))
            log_sparsity(**options)

        return act

    _replace(trainer, "_maybe_log_sparsity", first)


def replace_step(trainer: SAETrainer[Any, Any], step: Call) -> Call:
    """Let SAELens's loop call `step` on each batch; return its own."""
    return _replace(trainer, "step", lambda _: step)


#: The norm that a trainer clips gradients to. It is no option, and no trainer's attribute.
CLIPPED_NORM = 1.0


def replace_forward_pass(trainer: SAETrainer[Any, Any], forward: Call) -> Call:
    """Let the trainer's step call `forward` instead of the SAE's; return the SAE's.

    It is the one place between a batch and the optimizer that sees the loss and its terms.
    """
    return _replace(trainer.sae, "training_forward_pass", lambda _: forward)


def take_checkpoints(trainer: SAETrainer[Any, Any], save: Call) -> tuple[Call, list[int]]:
    """Let a trainer save by `save`; return its own method, and after how many tokens to call it."""
    due = take_thresholds(trainer)
    return _replace(trainer, "save_checkpoint", lambda _: save), due


def take_thresholds(trainer: SAETrainer[Any, Any] | MultiSAETrainer) -> list[int]:
    """Keep a trainer from saving checkpoints; return after how many tokens they are still due.

    SAELens's loop would save one step too early.
    """
    due, trainer.checkpoint_thresholds = trainer.checkpoint_thresholds, []
    return [tokens for tokens in due if tokens >= trainer.n_training_samples]


def drop_sae(trainer: MultiSAETrainer, name: str) -> None:
    """Train one of many SAEs no more, from the next step on: the loop reads these dictionaries."""
    trainer.saes.pop(name, None)
    trainer.trainers.pop(name, None)


def keep_scaling_factor(trainer: SAETrainer[Any, Any]) -> None:
    """Keep a checkpoint's activation scale. SAELens before 6.52 estimates it anew all the same."""
    if trainer.activation_scaler.scaling_factor is not None:
        _replace(trainer.activation_scaler, "estimate_scaling_factor", lambda _: _nothing)


def keep_scaling_factors(trainer: MultiSAETrainer) -> None:
    """The same for many at once: there SAELens also takes batches, which the steps then miss."""
    _replace(trainer, "_estimate_scaling_factors", lambda _: _nothing)


def when_scale_is_found(trainer: SAETrainer[Any, Any], action: Callable[[float], None]) -> None:
    """Call `action` with the scale of the activations when a trainer has estimated it."""

    def then(estimate: Call) -> Call:
        def estimate_and_act(*args: Any, **options: Any) -> None:
            estimate(*args, **options)
            action(float(trainer.activation_scaler.scaling_factor or 1.0))

        return estimate_and_act

    _replace(trainer.activation_scaler, "estimate_scaling_factor", then)


def set_coefficient(trainer: SAETrainer[Any, Any], name: str, value: float) -> None:
    """Set where a coefficient's warm-up is. SAELens before 6.53 begins it again."""
    trainer.coefficient_schedulers[name].current_value = value


def replace_reports(
    trainer: SAETrainer[Any, Any], counted: Callable[[Call], Call], logged: Callable[[Call], Call]
) -> None:
    """Wrap what reports on a trainer's counts of firing, and what logs a step's output too."""
    for name in ("_build_sparsity_log_dict", "set_final_sae_metadata"):
        _replace(trainer, name, counted)
    _replace(trainer, "_log_train_step", logged)


def is_logging_step(trainer: SAETrainer[Any, Any]) -> bool:
    """Whether a trainer logs the step that it has just done."""
    return trainer._is_logging_step()  # pyright: ignore[reportPrivateUsage]


def shield_logging(trainer: SAETrainer[Any, Any] | MultiSAETrainer, shield: Call) -> None:
    """Wrap what SAELens's loop logs, where an exception would end the training."""
    for name in ("_log_train_step", "_run_and_log_evals"):
        _replace(trainer, name, shield)


@contextmanager
def replace_bar(
    trainer: SAETrainer[Any, Any] | MultiSAETrainer, make: Call, update: Call
) -> Generator[None]:
    """Show another bar in a trainer's loop: `make(tqdm, options)`; `update(output, bar)` moves it.

    Its own says nothing but losses, every hundred steps, and is too long for 80 columns. `fit`
    takes the class from its module, and hands the bar to one method after each step.
    """
    module: Any = sys.modules[type(trainer).__module__]
    original = module.tqdm

    def bar(**options: Any) -> Any:
        return make(original, options)

    module.tqdm = bar
    _replace(trainer, "_update_pbar", lambda _: update)
    try:
        yield
    finally:
        module.tqdm = original


def log_reached_coefficient(trainer: SAETrainer[Any, Any]) -> None:
    """Log one λ, the one that `target_l0` arrived at, under the name that SAELens's charts show.

    SAELens knows its scheduler's alone, from which the controller goes on.
    """

    def replaced(build: Call) -> Call:
        def act(*arguments: Any, **options: Any) -> dict[str, Any]:
            log = build(*arguments, **options)
            if (reached := log.pop("metrics/l1_coefficient", None)) is not None:
                log["details/l1_coefficient"] = reached
            return log

        return act

    _replace(trainer, "build_train_step_log_dict", replaced)


def fuse_adam(trainer: SAETrainer[Any, Any], fused: bool | None) -> None:
    """Let a trainer's Adam take each step in one kernel, or not; None: as its checkpoint did, and
    in a new training where it is on a CUDA device.

    SAELens builds it without asking; torch reads the choice from its groups, in every step. What a
    checkpoint has of it goes where that kind wants it. The CPU's kernel goes through memory in one
    order: a moment must lie as its parameter does.
    """
    state = trainer.optimizer.state
    for group in trainer.optimizer.param_groups:
        on_cuda = any(parameter.is_cuda for parameter in group["params"])
        as_before = bool(group["fused"]) if state else on_cuda
        group["fused"] = as_before if fused is None else fused
        for parameter in group["params"]:
            held = state.get(parameter, {})
            for name, value in held.items():
                if value.shape == parameter.shape:
                    held[name] = torch.empty_like(parameter).copy_(value)
                elif name == "step":
                    held[name] = value.to(parameter.device if group["fused"] else "cpu")


def _nothing(*_: Any, **__: Any) -> dict[str, Any]:
    return {}


# --- runners --------------------------------------------------------------------------------------


class ManySAEsRunner(MultiSAETrainingRunner):
    """SAELens's runner for many SAEs. It has private methods where that for one has public ones."""

    def run_trainer_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, Any]:
        """Train. SAELens's own stops in the middle of a step, and goes on raising its exception at
        any signal when the training is long over.
        """
        raise NotImplementedError

    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, Any]:
        return self.run_trainer_with_interruption_handling(trainer)

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Write what belongs to no SAE alone; `runner_cfg.json` comes last of a checkpoint."""
        super()._save_runner_checkpoint_files(checkpoint_path)

    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        self.save_checkpoint(checkpoint_path)


def take_uploads(config: sae_lens.LoggingConfig) -> Call:
    """Keep SAELens from uploading, which it does between its files; return what does it."""
    config.log = _nothing  # type: ignore[method-assign]
    return partial(type(config).log, config)


@contextmanager
def keep_wandb_running() -> Generator[None]:
    """Keep SAELens from ending wandb's run, which it does before the SAE is measured."""
    finish, wandb.finish = wandb.finish, _nothing
    try:
        yield
    finally:
        wandb.finish = finish


@contextmanager
def without_override_warning() -> Generator[None]:
    """Keep SAELens from doubting that the run is reproducible: model and text are its config's.

    A model that is handed over is one that was looked at before, for the hook point and its width.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("You just passed in a", "override_"))

    sae_lens.logger.addFilter(keep)
    try:
        yield
    finally:
        sae_lens.logger.removeFilter(keep)


# --- SAEs -----------------------------------------------------------------------------------------


def without_closures(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """An SAE's attributes less SAELens's closures over it, which a copy needs anew and no pickle
    takes.
    """
    closures = ("reshape_fn_", "run_time_activation_norm_fn_")
    return {name: value for name, value in attributes.items() if not name.startswith(closures)}


def renew_closures(sae: Any) -> None:
    """Make what `without_closures` left out."""
    if sae.hook_z_reshaping_mode:
        sae.turn_on_forward_pass_hook_z_reshaping()
    else:
        sae.turn_off_forward_pass_hook_z_reshaping()
    sae._setup_activation_normalization()
