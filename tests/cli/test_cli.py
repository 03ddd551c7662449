from __future__ import annotations

import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from support.interpreter import Interpreter
from support.process import Process
from support.runs import D_IN, HOOK_NAME
from torch.optim.optimizer import register_optimizer_step_post_hook
from typer.testing import CliRunner, Result

import sae_gated_plugin
from sae_gated_plugin.cli import commands
from sae_gated_plugin.cli.commands import app
from sae_gated_plugin.cli.tables import quickstart_table, results_table
from sae_gated_plugin.measure import encoder_gap
from sae_gated_plugin.measure import evaluate as evaluation
from sae_gated_plugin.training.run import train as train_sae

KEYS = {
    *("architecture", "d_in", "d_sae", "hook_name", "tokens", "l0", "fvu", "gamma", "gamma_ci"),
    *("gamma_centered", "loss_recovered", "nats_lost", "kl", "dead_share", "path", "seconds"),
    "versions",
}
SHORT = ["training_tokens=2048", "sae.d_sae=128"]


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def config_file(small_run: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small_run))
    return path


# --- what it prints -------------------------------------------------------------------------------


def test_train_and_eval_print_json_alone(config_file: Path, tmp_path: Path) -> None:
    trained = call("train", config_file, *SHORT, "--output", tmp_path / "run", "--json")
    assert trained.exit_code == 0, trained.stderr
    results = json.loads(trained.stdout)
    assert set(results) >= KEYS
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    evaluated = call("eval", tmp_path / "run", "--json", "--tokens", 1024, "--split", "train")
    assert evaluated.exit_code == 0, evaluated.stderr
    again = json.loads(evaluated.stdout)
    assert (again["split"], again["tokens"]) == ("train", 1024 // 64 * 63)
    assert again["d_sae"] == 128


def test_eval_agrees_with_train(trained_run: Path) -> None:
    expected = json.loads((trained_run / "results.json").read_text())
    options = ("--json", "--no-coherence", "--tokens", 4 * 16 * 64)
    again = json.loads(call("eval", trained_run, *options).stdout)
    assert again["coherence"] is None
    for name in ("l0", "fvu", "gamma", "gamma_ci", "loss_recovered", "kl", "dead_share"):
        assert again[name] == pytest.approx(expected[name], rel=1e-6), name


def test_eval_says_that_it_writes_nothing(trained_run: Path) -> None:
    before = sorted(trained_run.rglob("*"))
    printed = call("eval", trained_run, "--tokens", 512).stdout
    assert printed.endswith("Nothing was written; --json > FILE keeps the numbers.\n")
    assert "Files:" not in printed
    assert sorted(trained_run.rglob("*")) == before


def test_quickstart_prints_a_table_and_where_the_files_are(tmp_path: Path) -> None:
    result = call("quickstart", *SHORT, "n_eval_batches=1", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    for text in ("loss recovered", "γ, below 1 is shrinkage", "dead latents", "L0, active"):
        assert text in result.stdout
    assert f"gated SAE, {D_IN} to 128, at {HOOK_NAME} after 2,048 training tokens" in result.stdout
    assert "tokens of split 'validation'" in result.stdout
    assert f"Files: {tmp_path / 'run'}\n" in result.stdout
    assert list((tmp_path / "run" / "report" / "figures").glob("*.png"))
    assert f"Figures: {tmp_path / 'run' / 'report' / 'report.html'}\n" in result.stdout


def test_what_the_quickstart_says_comes_next_runs(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_run, "my run")
    results = {**json.loads(Path("my run/results.json").read_text()), "path": "my run"}
    lines = map(str, quickstart_table("page", results))
    typed = [shlex.split(line) for line in lines if line.startswith("  sae-gated ")]
    assert [words[1] for words in typed] == ["quickstart", "report", "push"]
    for words in typed:
        short = [*SHORT, "n_eval_batches=1"] if words[1] == "quickstart" else []
        done = call(*words[1:], *short)
        assert done.exit_code == 0, done.output
    assert Path("page/report.html").exists()
    assert "Load, encode, attach" in Path("card/README.md").read_text()


def test_table_names_what_has_no_value_and_strangers_metrics(trained_run: Path) -> None:
    results = json.loads((trained_run / "results.json").read_text())
    results.update(gamma=None, gamma_ci=None, sparkle=0.25, split="train")
    results["undefined"] = {"gamma": "Every reconstruction is zero."}
    results["notes"] = {"coherence": "An estimate."}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*results_table(results))
    text = console.export_text()
    assert re.search(r"γ, below 1 is shrinkage *│ *none *│ *Every reconstruction is zero\.", text)
    assert re.search(r"sparkle *│ *0\.25", text)
    assert re.search(r"cosine similarity of decoder rows *│ *0\.\d+ *│ *An estimate\.", text)
    assert "split 'train', which training may have seen" in text


def test_plugins() -> None:
    listed = json.loads(call("plugins", "--json").stdout)
    ours = {row["module"].split(".")[-1]: row for row in listed}
    assert {"gated", "prolu", "losses", "registered"} <= set(ours)
    assert ours["gated"]["distribution"] == "sae-gated-plugin"
    assert ours["gated"]["status"] == "ok"
    assert "register_architectures" in ours["gated"]["hooks"]
    assert "l0" in ours["registered"]["brings"]["metrics"]


def test_a_sweep_and_its_report(small_run: dict[str, Any], tmp_path: Path) -> None:
    small_run["sae"] = {"d_in": D_IN, "d_sae": 128}
    small_run.update(training_tokens=2048)
    small_run["sweep"] = {
        "eval_tokens": 1024,
        "curves": [
            {"architecture": "topk", "k": [4, 8]},
            {"label": "bad", "architecture": "gated", "l1_coefficient": 1e38},
        ],
    }
    path, output = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(small_run))
    result = call("sweep", path, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert "k=4" in result.stdout
    assert re.search(r"\nfailed: bad, no settings, seed \d+: .*finite", result.stdout)
    drawn = call("report", output, "--output", tmp_path / "page")
    assert drawn.exit_code == 0, drawn.stderr
    page = tmp_path / "page" / "report.html"
    assert f"Page: {page}" in drawn.stdout
    assert "not finite" in page.read_text()
    written = json.loads(call("report", output, "--output", tmp_path / "p2", "--json").stdout)
    assert (written["points"], written["failed"]) == (2, 1)


def test_version_and_help() -> None:
    assert call("--version").stdout.strip() == f"sae-gated-plugin {sae_gated_plugin.__version__}"
    for command in ("quickstart", "train", "sweep", "toy", "report", "eval", "plugins"):
        assert command in call("--help").stdout
        help_text = re.sub(r"\x1b\[[0-9;]*m", "", call(command, "--help").stdout)
        assert "--json" in help_text
        assert "--debug" in help_text


# --- bad input: a sentence, exit code 2, no traceback ---------------------------------------------


def assert_refused(result: Result, sentence: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert sentence in line


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sae.l1_coeficient=3", "Did you mean 'sae.l1_coefficient'?"),
        ("sae.architecture=prolo", "Did you mean 'prolu'?"),
        ("sae.d_in=64", f"hook point '{HOOK_NAME}' is {D_IN} wide"),
        ("hook_name=model.layer.2", "the nearest are 'model.layers."),
        ("model_name=./none", "does not exist"),
        ("dataset_path=./none", "does not exist"),
        ("lr=fast", "'lr' in the override 'lr=fast' must be a finite number"),
        ("lr=[1", "is not valid YAML"),
    ],
)
def test_bad_overrides(config_file: Path, tmp_path: Path, override: str, sentence: str) -> None:
    output = tmp_path / "run"
    assert_refused(call("train", config_file, override, "--output", output, "--json"), sentence)
    assert not output.exists()


def test_bad_files(config_file: Path, tmp_path: Path) -> None:
    assert_refused(call("train", tmp_path / "none.yaml"), "does not exist")
    for section, command in (("sweep", "sweep"), ("synthetic_model", "synth")):
        config_file.write_text(f"lr: 0.1\n{section}: {{}}\n")
        assert_refused(
            call("train", config_file),
            f"which a single run has not; start it with: sae-gated {command}",
        )
    config_file.write_text("sae: {architecture: gated\nlr: [")
    assert_refused(call("train", config_file), "is not valid YAML at line 2, column 3")
    config_file.write_text("sae: {architecture: gated}\n")
    assert_refused(call("train", config_file), "'sae.d_in' of architecture 'gated' is missing")


def test_output_folder_that_holds_a_run(config_file: Path, trained_run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in trained_run.rglob("*")}
    result = call("train", config_file, *SHORT, "--output", trained_run)
    assert_refused(result, "already holds a run")
    assert {p: p.stat().st_mtime_ns for p in trained_run.rglob("*")} == before


def test_damaged_artifacts(trained_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    weights = run / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(call("eval", run), "damaged or cut short")
    weights.unlink()
    assert_refused(call("eval", run), "has a cfg.json but no sae_weights.safetensors")
    (run / "cfg.json").unlink()
    assert_refused(call("eval", run), "holds no cfg.json")
    assert_refused(call("eval", tmp_path / "none"), "does not exist")
    assert_refused(call("eval", "no-such-release", "--sae-id", "x"), "cannot be loaded")


def test_nan_in_activations(poisoned: dict[str, Any], config_file: Path, tmp_path: Path) -> None:
    config_file.write_text(yaml.safe_dump(poisoned))
    result = call("train", config_file, "--output", tmp_path / "run")
    assert_refused(result, "Training stopped before step")
    assert "The last good weights are in" in result.stderr
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    evaluated = call("eval", checkpoint, "--tokens", 512, "--json")
    assert evaluated.exit_code == 0, evaluated.stderr


def test_usage_errors() -> None:
    for arguments in (("train",), ("eval", "x", "--tokens", "many"), ("nonsense",)):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = call("eval", "none", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "ArtifactError" in result.stderr


def test_what_nobody_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("sae_gated_plugin.training.run.quickstart", broken)
    result = call("quickstart")
    assert result.exit_code == 1
    assert result.stderr == (
        "Unexpected RuntimeError: the disk is on fire\n--debug shows where it happened.\n"
    )


def test_interrupt(config_file: Path, tmp_path: Path) -> None:
    handle = register_optimizer_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        result = call("train", config_file, "--output", tmp_path / "run")
    finally:
        handle.remove()
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("*/sae_weights.safetensors"))


# --- without SAELens and PyTorch, which take seconds to import ------------------------------------


def test_version_help_usage_errors_and_reports_import_no_model(trained_run: Path) -> None:
    code = """
        import sys
        from sae_gated_plugin.cli.commands import app
        from typer.testing import CliRunner

        for arguments in (
            *(["--version"], ["--help"], ["eval", "--help"], ["nonsense"], ["train"], ["eval"]),
            *(["eval", "x", "--tokens", "many"], ["train", "x", "--resume", "y"]),
            ["report", sys.argv[1], "--output", sys.argv[2]],
        ):
            result = CliRunner().invoke(app, arguments)
            found = {"torch", "sae_lens", "transformers", "wandb"} & set(sys.modules)
            assert not found, (arguments, found)
            print(result.exit_code)
    """
    arguments = [str(trained_run), str(trained_run.parent / "page")]
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0", "0", "2", "2", "2", "2", "2", "0"]


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "sae_gated_plugin", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"sae-gated-plugin {sae_gated_plugin.__version__}\n", done.stderr


def test_defaults_are_those_of_the_functions() -> None:
    keep = inspect.signature(train_sae).parameters["keep_checkpoints"].default
    for function, name, expected in (
        (commands.evaluate, "tokens", evaluation.DEFAULT_TOKENS),
        (commands.measure_encoder_gap, "tokens", encoder_gap.DEFAULT_TOKENS),
        (commands.train, "keep_checkpoints", keep),
    ):
        assert inspect.signature(function).parameters[name].default == expected


# --- as a program ---------------------------------------------------------------------------------


def test_program_trains_and_is_silent_off_a_terminal(config_file: Path, tmp_path: Path) -> None:
    options = ("train", str(config_file), *SHORT, "--output", "run", "--json")
    command = [sys.executable, "-m", "sae_gated_plugin", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == "run"
    assert "it/s" not in done.stderr
    assert "%|" not in done.stderr


def test_program_refuses_in_a_sentence(
    config_file: Path, tmp_path: Path, interpreter: Interpreter
) -> None:
    options = ("train", config_file, "sae.d_inn=3")
    done = interpreter.run("sae_gated_plugin", *options, module=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Unknown key 'sae.d_inn'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_program_stopped_by_sigterm_saves_a_checkpoint(config_file: Path, tmp_path: Path) -> None:
    options = ("train", config_file, "training_tokens=500_000_000", "n_checkpoints=100_000")
    process = Process(
        *options, "--output", "run", log=tmp_path / "log", before=lambda: os.chdir(tmp_path)
    )
    process.wait_for(tmp_path / "run" / "checkpoints")
    process.kill(signal.SIGTERM)
    assert process.wait() == 143, process.text()
    said = process.text()
    assert said.splitlines()[-1].startswith("Interrupted. All is saved in 'run/checkpoints/")
    assert "Traceback" not in said
    assert list((tmp_path / "run" / "checkpoints").glob("*/sae_weights.safetensors"))
