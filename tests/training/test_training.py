"""Training from a configuration into a run's folder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from sae_lens import SAE, LanguageModelSAETrainingRunner
from safetensors.torch import load_file
from support.interpreter import Interpreter
from support.runs import D_IN, HOOK_NAME, QUICKSTART, SHORT, run
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoTokenizer

from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.errors import ConfigError, Interrupted, TrainingDiverged
from sae_gated_plugin.publish import convert
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep
from sae_gated_plugin.training.run import quickstart, resume, train
from sae_gated_plugin.training.run_folder import claimed
from sae_gated_plugin.training.runner import Runner


def test_run_folder(trained_run: Path) -> None:
    assert {path.name for path in trained_run.iterdir()} == {
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "runner_cfg.json",
        "run.yaml",
        "results.json",
        "checkpoints",
    }
    checkpoints = sorted(trained_run.glob("checkpoints/*"))
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        assert (checkpoint / "sae_weights.safetensors").exists()
        assert (checkpoint / "trainer_state.pt").exists()
    results = json.loads((trained_run / "results.json").read_text())
    assert list(results)[:4] == ["architecture", "d_in", "d_sae", "model_name"]
    assert results["split"] == "validation"
    assert results["tokens"] == 4 * 16 * 63  # n_eval_batches × prompts × positions but the first
    assert results["training_tokens"] == 40_960
    assert SAE.load_from_disk(trained_run).cfg.architecture() == "gated"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(
    small_run: dict[str, Any], tmp_path: Path, umask: int, mode: int
) -> None:
    """Colleagues on a shared cluster, where it says so; safetensors would let the owner alone."""
    before = os.umask(umask)
    try:
        run(small_run, tmp_path / "run", "training_tokens=2048", "n_checkpoints=1")
        convert.export(tmp_path / "run", tmp_path / "out")
        small_run["sae"].pop("architecture")
        small_run["training_tokens"] = 2048
        small_run["sweep"] = {"eval_tokens": 128, "curves": [{"architecture": "gated"}]}
        run_sweep(load_sweep(small_run), tmp_path / "sweep")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.name == "sae_weights.safetensors" for path in files) == 4
    assert not [path for path in files if path.stat().st_mode & 0o777 != mode]


def test_run_yaml_is_a_configuration(trained_run: Path) -> None:
    config = load_config(trained_run / "run.yaml")
    assert config.mapping == yaml.safe_load((trained_run / "run.yaml").read_text())
    assert config.mapping["n_checkpoints"] == 2  # the override
    assert config.mapping["output_path"] == str(trained_run)


def test_results_hold_the_path_as_it_was_given(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = run(small_run, Path("runs/first"), "training_tokens=1024")
    assert results["path"] == "runs/first"
    assert str(tmp_path) not in Path("runs/first/results.json").read_text()
    assert results == json.loads(Path("runs/first/results.json").read_text())


def test_the_seed_decides_everything(small_run: dict[str, Any], tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(5)  # the state of the generator before does not matter
        run(small_run, tmp_path / name, f"seed={seed}")
        weights.append(load_file(tmp_path / name / "sae_weights.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["W_enc"], weights[2]["W_enc"])


def test_training_lowers_the_error(trained_run: Path, tmp_path: Path, small_run: Any) -> None:
    untrained = run(small_run, tmp_path / "run", "training_tokens=512")
    trained = json.loads((trained_run / "results.json").read_text())
    assert trained["fvu"] < 0.7 * untrained["fvu"]
    assert trained["loss_recovered"] > untrained["loss_recovered"]


@pytest.mark.parametrize(
    "architecture", ["gated", "prolu", "standard", "topk", "batchtopk", "jumprelu"]
)
def test_architectures(small_run: dict[str, Any], tmp_path: Path, architecture: str) -> None:
    small_run["sae"] = {"architecture": architecture, "d_in": D_IN, "d_sae": 128}
    if "topk" in architecture:
        small_run["sae"]["k"] = 20
    results = run(small_run, tmp_path / "run", "training_tokens=2048")
    saved = json.loads((tmp_path / "run" / "cfg.json").read_text())["architecture"]
    assert results["architecture"] == saved
    assert results["fvu"] > 0


# --- refusals before training ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cfg.json", "run.yaml", "results.json", "checkpoints"])
def test_a_folder_with_a_run_is_left_alone(
    small_run: dict[str, Any], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=f"already holds a run \\({name}\\); nothing was changed"):
        run(small_run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_a_folder_taken_while_the_model_loads(small_run: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(small_run, SHORT)
    with (
        claimed(tmp_path / "run", config),
        pytest.raises(ConfigError, match="already holds a run"),
        claimed(tmp_path / "run", config),
    ):
        pass


def test_output_that_cannot_be(small_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        run(small_run, tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written"):
        run(small_run, tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match="a run needs a folder"):
        train(load_config(small_run, ["output_path=null"]))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sae.d_in=64", f"d_in is 64, but hook point '{HOOK_NAME}' is {D_IN} wide; set sae.d_in="),
        ("hook_name=model.layer.2", "no hook point 'model.layer.2'; the nearest are 'model.layers"),
        ("model_name=./none", "model_name './none' does not exist"),
        ("model_name=nobody/none", "Model 'nobody/none' (AutoModelForCausalLM) cannot be loaded"),
        ("model_class_name=Auto", "cannot be loaded: ValueError: Unknown model class: Auto"),
        ("dataset_path=./none", "dataset_path './none' does not exist"),
        ("dataset_path=data/sets/none", "'data/sets/none' does not exist: no such file or folder"),
        ("dataset_path=tests/none", "Give a folder of .parquet or .jsonl files with a column text"),
        ("dataset_path=pyproject.toml", "is a file of an unknown kind; known: .jsonl, .json"),
        ("device=cuda", "'device': Device 'cuda' cannot be used here: "),
        ("dataset_path=nobody/none", "Dataset 'nobody/none' cannot be opened"),
    ],
)
def test_what_does_not_fit_is_said_before_training(
    small_run: dict[str, Any], tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(small_run, tmp_path / "run", override, "training_tokens=2000000")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_login_of_wandb_is_asked_for_before_anything_else(
    small_run: dict[str, Any], tmp_path: Path, interpreter: Interpreter
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**small_run, "logger": {}, "dataset_path": "./none"}))
    home = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_SILENT": "true"}
    done = interpreter.run("sae_gated_plugin", "train", config, module=True, cwd=tmp_path, **home)
    assert done.returncode == 2
    assert "Error: wandb has no login here: UsageError: No API key configured" in done.stderr
    assert "or do without: logger.log_to_wandb=false" in done.stderr


# --- data on this machine -------------------------------------------------------------------------


def tokens() -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    text = load_dataset(str(QUICKSTART / "text"), split="train[:30]")
    ids = [token for row in text for token in tokenizer(row["text"])["input_ids"]]
    rows = [ids[start : start + 64] for start in range(0, 64 * 200, 64)]
    return Dataset.from_dict({"input_ids": rows})


def as_parquet(data: Dataset, path: Path) -> None:
    path.mkdir()
    data.to_parquet(str(path / "train.parquet"))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("saved", lambda data, path: data.save_to_disk(path)),
        (
            "splits",
            lambda data, path: DatasetDict(train=data, test=data).save_to_disk(path),
        ),
        ("rows.jsonl", lambda data, path: data.to_json(path)),
        ("folder", as_parquet),
    ],
)
def test_tokens_on_this_machine(
    small_run: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Dataset, Path], Any],
) -> None:
    """However they lie there, in a home folder, and never by asking the Hub about them."""
    write(tokens(), tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    small_run.update(dataset_path=f"~/{name}", is_dataset_tokenized=True)
    results = run(small_run, tmp_path / "run", "n_eval_batches=1")
    assert results["l0"] > 0
    assert results["split"] == ("test" if name == "splits" else "train")
    assert SAE.load_from_disk(tmp_path / "run").cfg.metadata.dataset_path == str(tmp_path / name)


# --- numbers that stop being finite ---------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gated", "prolu", "standard"])
def test_nan_activations_stop_training_and_keep_good_weights(
    poisoned: dict[str, Any], tmp_path: Path, architecture: str
) -> None:
    poisoned["sae"] = {"architecture": architecture, "d_in": D_IN, "d_sae": 128}
    with pytest.raises(TrainingDiverged) as caught:
        run(poisoned, tmp_path / "run", "training_tokens=40960")
    sentence = str(caught.value)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    state = torch.load(checkpoint / "trainer_state.pt", weights_only=True)
    assert state["n_training_steps"] > 0
    assert f"Training stopped before step {state['n_training_steps']}: the loss" in sentence
    assert f"The last good weights are in '{checkpoint}'; to leave such batches out" in sentence
    assert "\n" not in sentence
    weights = load_file(checkpoint / "sae_weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (tmp_path / "run" / "cfg.json").exists()  # it is no finished run


def test_gradients_that_overflow_never_reach_the_weights(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    """The loss is finite, its gradient is not."""
    config = load_config(small_run, SHORT).with_output(tmp_path / "run")
    runner = Runner(config)
    forward = runner.sae.training_forward_pass

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * torch.inf

    def at_step_7(step_input: Any) -> Any:
        output = forward(step_input)
        if step_input.n_training_steps == 7:
            output.loss = Overflow.apply(output.loss)
        return output

    runner.sae.training_forward_pass = at_step_7  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged, match="before step 7: the loss is finite, but the grad"):
        runner.run()
    assert all(parameter.isfinite().all() for parameter in runner.sae.parameters())


# --- interrupts -----------------------------------------------------------------------------------


@pytest.fixture
def at_step() -> Any:
    """Call something after the n-th optimizer step, in the thread that trains."""
    handles: list[Any] = []

    def register(n: int, action: Callable[[], None]) -> None:
        steps = iter(range(1, 10**6))

        def hook(*_: Any) -> None:
            if next(steps) == n:
                action()

        handles.append(register_optimizer_step_post_hook(hook))

    yield register
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_weights_and_optimizer(
    small_run: dict[str, Any], tmp_path: Path, at_step: Any, number: signal.Signals
) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    at_step(5, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt):
        run(small_run, tmp_path / "run")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert {"sae_weights.safetensors", "trainer_state.pt", "runner_cfg.json"} <= {
        path.name for path in checkpoint.iterdir()
    }


# --- after the last step --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_sae_is_saved(
    small_run: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    save = LanguageModelSAETrainingRunner.save_final_sae

    def signalled(*args: Any) -> None:
        signal.raise_signal(number)
        save(*args)

    monkeypatch.setattr(LanguageModelSAETrainingRunner, "save_final_sae", signalled)
    with pytest.raises(Interrupted, match="The SAE is saved; only measuring is left") as caught:
        run(small_run, tmp_path / "run", "training_tokens=2048")
    assert caught.value.exit_code == 128 + number
    assert resume(tmp_path / "run")["l0"] > 0


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_error_while_measuring_says_that_the_sae_is_there(
    small_run: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("sae_gated_plugin.training.run.evaluate", fail)
        with pytest.raises((RuntimeError, Interrupted)) as caught:
            run(small_run, tmp_path / "run", "training_tokens=2048")
    said = caplog.text + str(caught.value)
    assert f"only measuring is left; go on with: sae-gated train --resume {tmp_path}/run" in said
    assert resume(tmp_path / "run")["l0"] > 0


def test_a_final_checkpoint_that_cannot_be_written_does_not_cost_the_sae(
    small_run: dict[str, Any], tmp_path: Path, at_step: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    at_step(4, lambda: (folder / "checkpoints").write_text("in the way"))
    run(small_run, folder, "training_tokens=2048", "save_final_checkpoint=true")
    assert "cannot be written" in caplog.text
    assert SAE.load_from_disk(folder).cfg.d_sae == 256


# --- the runner is SAELens's ----------------------------------------------------------------------


def test_plain_saelens_gives_the_same_weights(small_run: dict[str, Any], tmp_path: Path) -> None:
    run(small_run, tmp_path / "ours")
    cfg = load_config(small_run, SHORT).with_output(tmp_path / "plain").runner
    torch.manual_seed(cfg.seed)
    LanguageModelSAETrainingRunner(cfg).run()
    ours, plain = (
        load_file(tmp_path / name / "sae_weights.safetensors") for name in ("ours", "plain")
    )
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


def test_quickstart_needs_no_name_for_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["training_tokens=4096", "sae.d_sae=128", "n_eval_batches=1"]
    first = quickstart(overrides)
    second = quickstart([*overrides, "sae.architecture=prolu"])
    assert (first["path"], second["path"]) == ("quickstart", "quickstart-2")
    assert (first["architecture"], second["architecture"]) == ("gated", "prolu")
    assert first["d_sae"] == 128
    third = quickstart(overrides, "elsewhere")
    assert Path("elsewhere/results.json").exists()
    assert third["path"] == "elsewhere"


@pytest.mark.slow
def test_quickstart_reaches_its_numbers(tmp_path: Path) -> None:
    results = quickstart([], tmp_path / "run")
    assert 0.97 <= results["gamma"] <= 1.03
    assert results["l0"] == pytest.approx(16, rel=0.1)
    assert results["loss_recovered"] > 0.96
    assert results["fvu"] < 0.13
    assert results["coherence"] < 0.8  # no near-duplicates: 0.98 without a target
    assert results["dead_share"] < 0.05
