"""A run that is killed, stopped or runs out of disk goes on as if nothing had happened."""

from __future__ import annotations

import copy
import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sae_lens
import torch
import wandb
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import CacheActivationsRunnerConfig
from sae_lens.training.mixing_buffer import mixing_buffer
from safetensors.torch import load_file
from support.process import Process
from support.runs import SMALL_RUN
from torch.optim.optimizer import register_optimizer_step_post_hook

from sae_gated_plugin import files
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.config.yaml import to_yaml
from sae_gated_plugin.errors import ArtifactError, ConfigError, Interrupted
from sae_gated_plugin.files import create, locked
from sae_gated_plugin.training import checkpoints
from sae_gated_plugin.training.activation_stream import ActivationStream
from sae_gated_plugin.training.run import resume, train
from sae_gated_plugin.training.run_folder import compare_beginnings
from sae_gated_plugin.training.runner import Runner

WEIGHTS = "sae_weights.safetensors"

# 60 steps and 20 checkpoints, with state of every kind: a controller, resampling with its
# generator and learning rate, schedules, activation scaling, a shuffled buffer.
TINY: dict[str, Any] = {
    **SMALL_RUN,
    "sae": {
        "architecture": "gated",
        "d_in": 128,
        "d_sae": 128,
        "l1_coefficient": 20.0,
        "l1_warm_up_steps": 5,
        "target_l0": 4,
        "dead_latents": "resample",
        "resample_steps": [15, 35],
        "resample_warm_up_steps": 10,
        "normalize_activations": "expected_average_only_in",
    },
    "training_tokens": 7680,
    "train_batch_size_tokens": 128,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 8,
    "n_batches_for_norm_estimate": 3,
    "dead_feature_window": 1,
    "lr": 1e-2,
    "feature_sampling_window": 13,
    "lr_decay_steps": 20,
    "n_eval_batches": 1,
    "n_checkpoints": 20,
}


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(to_yaml(TINY))
    return path


@pytest.fixture(scope="session")
def whole(tiny_yaml: Path) -> bytes:
    """Weights of a run that nothing interrupts."""
    folder = tiny_yaml.parent / "whole"
    process = Process("train", tiny_yaml, "--output", folder, log=tiny_yaml.parent / "log")
    assert process.wait() == 0, process.text()
    return (folder / WEIGHTS).read_bytes()


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run interrupted at its 30th step; copy it before going on with it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    interrupted(TINY, folder)
    return folder


def at_step(n: int, action: Callable[[], Any]) -> Any:
    """Call `action` after the n-th optimizer step from now, in the middle of SAELens's step."""
    steps = itertools.count(1)
    return register_optimizer_step_post_hook(lambda *_: action() if next(steps) == n else None)


def interrupted(mapping: dict[str, Any], folder: Path, *overrides: str, step: int = 30) -> None:
    hook = at_step(step, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(Interrupted):
            train(load_config(mapping, overrides), folder)
    finally:
        hook.remove()


def test_the_state_is_of_every_kind(stopped: Path) -> None:
    """Or the tests below would show less than they say."""
    path, manifest = checkpoints.newest(stopped / "checkpoints") or pytest.fail("none")
    assert manifest["steps"] == 30
    state = load_file(path / checkpoints.EXACT_STATE_FILE)
    assert len(state["stream.rows"]) > 128
    saved = load_file(path / WEIGHTS)
    assert saved["resampled_at"] == 15
    assert saved["l0_controller"][0] != 0
    assert json.loads((path / "activation_scaler.json").read_text())["scaling_factor"] > 0


# --- killed, and on again -------------------------------------------------------------------------


def progress(folder: Path) -> float:
    """The newest checkpoint's share of the run."""
    found = checkpoints.numbered(folder / "checkpoints")
    return int(found[-1].name) / TINY["training_tokens"] if found else 0.0


def killed_and_resumed(
    tiny_yaml: Path, folder: Path, whole: bytes, number: int, chance: random.Random
) -> str:
    """Start, send the signal at a random moment, maybe twice; go on; return where it hit."""
    log, hits = folder.with_suffix(".log"), []
    command: tuple[str | Path, ...] = ("train", tiny_yaml, "--output", folder)
    moments = sorted(chance.uniform(-0.2, 1) for _ in range(chance.choice([1, 1, 2])))
    for moment in moments:
        process = Process(*command, log=log)
        # By progress, for a busy machine's seconds say little; then a moment more.
        while process.runs() and progress(folder) < moment:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1 if moment > 0 else 2))
        process.kill(number)
        code = process.wait()
        assert code in (0, -number, 143), process.text()
        if code == 143:
            assert "go on with: sae-gated train --resume" in process.text()
        written = [path.name for path in folder.glob("checkpoints/*")]
        partial = ", writing" if any(name.startswith(".") for name in written) else ""
        hits.append(f"{progress(folder):.0%}{partial}")
        if (folder / "run.yaml").exists():
            command = ("train", "--resume", folder)
    process = Process(*command, log=log)
    assert process.wait() == 0, process.text()
    assert (folder / WEIGHTS).read_bytes() == whole, hits
    assert {path.name for path in folder.iterdir()} == {
        "cfg.json", "checkpoints", "results.json", "run.yaml", "runner_cfg.json", WEIGHTS,
        "sparsity.safetensors",
    }  # fmt: skip
    assert all(path.name.isdecimal() for path in folder.glob("checkpoints/*"))
    return ", ".join(hits)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_kills(tiny_yaml: Path, tmp_path: Path, whole: bytes, number: signal.Signals) -> None:
    chance = random.Random(f"{number}")
    for trial in range(2):
        killed_and_resumed(tiny_yaml, tmp_path / f"{trial}", whole, number, chance)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_fifty_kills(tiny_yaml: Path, tmp_path: Path, whole: bytes, number: signal.Signals) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    for trial in range(50):
        where = killed_and_resumed(tiny_yaml, tmp_path / f"{trial}", whole, number, chance)
        print(f"{number.name} {trial + 1}: {where}", flush=True)


def die_at(n: int) -> Callable[[], None]:
    """Make a process kill itself at the n-th touch of the disk by a checkpoint."""

    def arm() -> None:
        touches = itertools.count(1)

        def dying(action: Callable[..., Any]) -> Callable[..., Any]:
            def act(*arguments: Any, **options: Any) -> Any:
                if next(touches) == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return action(*arguments, **options)

            return act

        for owner, name in (
            (files, "sync"),
            (checkpoints, "sha256"),
            (checkpoints.os, "replace"),
            (checkpoints.os, "link"),
            (checkpoints.shutil, "rmtree"),
            (Path, "rename"),
            (Path, "mkdir"),
        ):
            setattr(owner, name, dying(getattr(owner, name)))

    return arm


def die_and_resume(tiny_yaml: Path, folder: Path, weights: bytes, n: int) -> None:
    log = folder.with_suffix(".log")
    process = Process("train", tiny_yaml, "--output", folder, log=log, before=die_at(n))
    assert process.wait() == -signal.SIGKILL, process.text()
    for path in checkpoints.numbered(folder / "checkpoints"):
        checkpoints.verify(path)  # whatever has a checkpoint's name is whole
    command = (
        ("--resume", folder) if (folder / "run.yaml").exists() else (tiny_yaml, "--output", folder)
    )
    process = Process("train", *command, log=log)
    assert process.wait() == 0, process.text()
    assert (folder / WEIGHTS).read_bytes() == weights


@pytest.mark.parametrize("n", [60, 70])
def test_a_kill_in_the_middle_of_a_checkpoint(
    tiny_yaml: Path, tmp_path: Path, whole: bytes, n: int
) -> None:
    die_and_resume(tiny_yaml, tmp_path / "run", whole, n)


def die_on_opening(name: str) -> None:
    """Make this process kill itself when it has opened a file of such a name to write."""
    opened = io.open

    def dying(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        handle = opened(file, mode, *arguments, **options)
        if name in str(file) and mode != "r":
            os.kill(os.getpid(), signal.SIGKILL)
        return handle

    io.open = dying


def test_a_kill_in_the_middle_of_writing_the_configuration(
    tiny_yaml: Path, tmp_path: Path, whole: bytes
) -> None:
    """The folder is then nobody's: no empty run.yaml that cannot be resumed."""
    folder, log = tmp_path / "run", tmp_path / "log"
    command = ("train", tiny_yaml, "--output", folder)
    process = Process(*command, log=log, before=lambda: die_on_opening("run.yaml"))
    assert process.wait() == -signal.SIGKILL, process.text()
    assert not (folder / "run.yaml").exists()
    assert list(folder.iterdir())  # it did begin to write
    process = Process(*command, log=log)
    assert process.wait() == 0, process.text()
    assert (folder / WEIGHTS).read_bytes() == whole
    assert not list(folder.glob(".*"))


def test_a_file_is_created_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    for link in (os.link, refuse):
        monkeypatch.setattr(os, "link", link)
        create(file, "first")
        with pytest.raises(FileExistsError):
            create(file, "second")
        assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
        assert file.read_text() == "first"
        file.unlink()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_kill_at_every_touch_of_the_disk(tiny_yaml: Path, tmp_path: Path, whole: bytes) -> None:
    for n in range(1, 101):
        die_and_resume(tiny_yaml, tmp_path / f"{n}", whole, n)


# --- what the state covers ------------------------------------------------------------------------


def cached(mapping: dict[str, Any], folder: Path) -> list[str]:
    cfg = CacheActivationsRunnerConfig(
        dataset_path=mapping["dataset_path"],
        model_name=mapping["model_name"],
        model_class_name=mapping["model_class_name"],
        hook_name=mapping["hook_name"],
        d_in=128,
        training_tokens=6400,
        context_size=64,
        model_batch_size=4,
        prepend_bos=False,
        new_cached_activations_path=str(folder),
        device="cpu",
        buffer_size_gb=0.005,  # the default, 2 GB, is filled whatever training_tokens says
    )
    CacheActivationsRunner(cfg).run()
    return [
        "use_cached_activations=true",
        f"cached_activations_path={folder}",
        "seqpos_slice=[null]",
    ]


def few_texts(mapping: dict[str, Any], folder: Path) -> list[str]:
    texts = [
        f"The {number}th of many short texts that soon come to an end. " * 9 for number in range(30)
    ]
    Dataset.from_dict({"text": texts}).to_parquet(str(folder / "train.parquet"))
    return [f"dataset_path={folder}"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["prefetch_llm_batches=3", "sae.dead_latents=none", "sae.resample_steps=[]"],
        ["sae={architecture: jumprelu, d_in: 128, d_sae: 64, l0_coefficient: 0.1}"],
        few_texts,
        pytest.param(cached, marks=pytest.mark.slow),
    ],
    ids=["tiny", "prefetched", "jumprelu", "epochs", "cached"],
)
@pytest.mark.filterwarnings("ignore")
def test_resumed_is_as_if_never_interrupted(options: Any, tmp_path: Path) -> None:
    if callable(options):
        options = options(TINY, tmp_path / "data")
    train(load_config(TINY, options), tmp_path / "whole")
    interrupted(TINY, tmp_path / "run", *options)
    resume(tmp_path / "run")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("run", "whole")]
    for result in results:
        del result["seconds"], result["path"]
    assert results[0] == results[1]


@settings(max_examples=50, deadline=None)
@given(
    batch_size=st.integers(1, 7),
    extra=st.integers(0, 30),
    mix=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    sizes=st.lists(st.integers(1, 9), min_size=60, max_size=60),
    cut=st.integers(1, 12),
    untrained=st.integers(0, 2),
)
def test_the_stream_is_saelens_own_and_goes_on_anywhere(
    batch_size: int, extra: int, mix: float, sizes: list[int], cut: int, untrained: int
) -> None:
    """Any batch size, buffer and share; saved and restored after any batch, some prefetched."""
    size = batch_size + extra
    numbers = torch.arange(sum(sizes)).unsqueeze(1)
    rows = list(numbers.split(sizes))

    def store() -> Any:
        made: Any = SimpleNamespace(
            n_batches_in_buffer=size,
            training_context_size=1,
            activations_mixing_fraction=mix,
            train_batch_size_tokens=batch_size,
            n_dataset_processed=0,
            cached_activation_dataset=None,
            device="cpu",
        )

        def sequences() -> Iterator[torch.Tensor]:
            for row in rows:
                yield row
                made.n_dataset_processed += 1

        def activations() -> Iterator[torch.Tensor]:
            while True:
                try:
                    yield next(made.iterable_sequences)
                except StopIteration:
                    return

        made._iterate_tokenized_sequences = sequences
        made._iterate_filtered_activations = activations
        return made

    def take(stream: Iterator[torch.Tensor], n: int) -> list[list[int]]:
        batches = []
        for _ in range(n):
            try:
                batches.append(next(stream).flatten().tolist())
            except StopIteration:
                break
        return batches

    torch.manual_seed(0)
    expected = take(mixing_buffer(size, batch_size, iter(rows), mix), cut + 8)
    torch.manual_seed(0)
    stream = ActivationStream(store(), prefetched=2)
    before = [next(stream) for _ in range(min(cut, len(expected) - 8))]
    if len(before) <= untrained:
        return
    trained_on = before[len(before) - 1 - untrained]
    stream.trained_on = trained_on
    state, generator = stream.state_dict(), torch.get_rng_state()
    torch.manual_seed(1)
    resumed = ActivationStream(store(), prefetched=2)
    resumed.load_state_dict(state)
    torch.set_rng_state(generator)
    done = len(before) - untrained
    after = take(resumed, len(expected) - 8 - done)
    assert [batch.flatten().tolist() for batch in before[:done]] + after == expected[
        : len(expected) - 8
    ]


def test_plain_saelens_resumes_from_our_checkpoints(stopped: Path) -> None:
    """With the same weights, optimizer, λ, controller and schedules; its data starts elsewhere."""
    path = checkpoints.numbered(stopped / "checkpoints")[-1]
    cfg = load_config(TINY, ["training_tokens=3968"]).runner  # one step more
    cfg.resume_from_checkpoint, cfg.checkpoint_path = str(path), None
    runner = LanguageModelSAETrainingRunner(cfg)
    seen: dict[str, Any] = {}
    handle = runner.run_trainer_with_interruption_handling

    def look(trainer: Any) -> Any:
        seen.update(
            state=copy.deepcopy(trainer.sae.state_dict()),
            optimizer=copy.deepcopy(trainer.optimizer.state_dict()["state"]),
            steps=trainer.n_training_steps,
            lr=trainer.lr_scheduler.get_last_lr(),
            λ=trainer.get_coefficients(),
            scale=trainer.activation_scaler.scaling_factor,
        )
        return handle(trainer)

    runner.run_trainer_with_interruption_handling = look  # type: ignore[method-assign]
    runner.run()
    saved = load_file(path / WEIGHTS)
    assert seen["state"].keys() == saved.keys()
    assert all(torch.equal(seen["state"][name], saved[name]) for name in saved)
    assert saved["l0_controller"][3] == 30
    trainer_state = torch.load(path / "trainer_state.pt", weights_only=True)
    for index, moments in trainer_state["optimizer"]["state"].items():
        assert torch.equal(seen["optimizer"][index]["exp_avg_sq"], moments["exp_avg_sq"])
    assert seen["steps"] == 30
    if tuple(map(int, sae_lens.__version__.split(".")[:2])) >= (6, 54):
        assert seen["λ"] == {"l1": 20.0}  # older ones begin their own warm-up again
    assert seen["lr"] == trainer_state["lr_scheduler"]["_last_lr"]
    assert seen["scale"] is not None
    TrainingSAE.load_from_disk(path)


# --- what --resume says ---------------------------------------------------------------------------


@pytest.fixture
def on_copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


def test_only_the_last_two_are_kept(stopped: Path, tmp_path: Path) -> None:
    assert [p.name for p in checkpoints.numbered(stopped / "checkpoints")] == ["3712", "3840"]
    for name in ("1", "2", "10", "final_9", "damaged-3", ".partial-4"):
        (tmp_path / name).mkdir()
    checkpoints.prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "10", "final_9", "damaged-3"}
    checkpoints.prune(tmp_path, 0)
    assert len(checkpoints.numbered(tmp_path)) == 2


def test_a_finished_run(trained_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (trained_run / "results.json").read_bytes()
    assert resume(trained_run) == json.loads(before)
    assert f"Run '{trained_run}' is finished; nothing was done." in caplog.text
    assert (trained_run / "results.json").read_bytes() == before


def test_a_trained_run_is_measured(
    trained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(trained_run, tmp_path / "run"))
    (folder / "results.json").unlink()
    results = resume(folder)
    assert "is trained already; it is measured" in caplog.text
    assert results["gamma"] == json.loads((trained_run / "results.json").read_text())["gamma"]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match=r"is not the folder of a run: it holds no run\.yaml"):
            resume(folder)


def test_a_changed_configuration(on_copy: Path) -> None:
    mapping = yaml.safe_load((on_copy / "run.yaml").read_text())
    mapping["lr"] = 1.0
    (on_copy / "run.yaml").write_text(to_yaml(mapping))
    with pytest.raises(ConfigError, match=r"run\.yaml' was changed \(lr\) since .* new folder"):
        resume(on_copy)


def test_another_machine_is_said(on_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, manifest = checkpoints.newest(on_copy / "checkpoints") or pytest.fail("none")
    manifest["machine"].update(threads=8, torch="1.0")
    compare_beginnings(on_copy, load_config(on_copy / "run.yaml"), manifest)
    assert f"torch 1.0, now {torch.__version__}" in caplog.text
    assert "threads 8, now 1" in caplog.text
    assert "may differ in their last bits" in caplog.text


def test_other_texts_are_refused(on_copy: Path, tmp_path: Path) -> None:
    """A data set that was replaced under the same name."""
    mapping = yaml.safe_load((on_copy / "run.yaml").read_text())
    config = load_config(mapping, few_texts(mapping, tmp_path / "data")).with_output(on_copy)
    config.runner.resume_from_checkpoint = str(checkpoints.numbered(on_copy / "checkpoints")[-1])
    start = checkpoints.newest(on_copy / "checkpoints")
    with pytest.raises(ConfigError, match="texts are not those that the run has read"):
        Runner(config, start).run()


# --- damage ---------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_every_damage_is_found(
    on_copy: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    before, newest = checkpoints.numbered(on_copy / "checkpoints")
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) == 9
    for name in names:
        caplog.clear()
        good = Path(shutil.copytree(newest, on_copy / "good"))
        damage(newest / name)
        path, _ = checkpoints.newest(on_copy / "checkpoints") or pytest.fail("none")
        assert path == before
        what = "missing" if damage is Path.unlink or name == "manifest.json" else "not as written"
        assert f"{name} is {what}" in caplog.text
        assert f"set aside as '{on_copy / 'checkpoints' / 'damaged-3840'}'" in caplog.text
        good.rename(newest)


def test_a_damaged_newest_and_no_sound_one(
    on_copy: Path, whole: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    again = Path(shutil.copytree(on_copy, on_copy.with_name("again")))
    flip(on_copy / "checkpoints" / "3840" / WEIGHTS)
    resume(on_copy)
    assert (on_copy / WEIGHTS).read_bytes() == whole
    for path in checkpoints.numbered(again / "checkpoints"):
        truncate(path / "exact_state.safetensors")
    resume(again)
    assert "has no checkpoint; it starts from the beginning" in caplog.text
    assert (again / WEIGHTS).read_bytes() == whole


def test_no_checkpoint_runs_code(on_copy: Path) -> None:
    """Also not one whose manifest somebody has made to fit."""
    path = checkpoints.numbered(on_copy / "checkpoints")[-1]

    class Code:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {on_copy}/ran",)

    torch.save({"optimizer": Code()}, path / "trainer_state.pt")
    with pytest.raises(ArtifactError, match="cannot be read as tensors"):
        checkpoints.require_tensors_only(path)
    assert not (on_copy / "ran").exists()


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_more_signals_while_saving(
    tiny_yaml: Path, tmp_path: Path, whole: bytes, number: int, code: int
) -> None:
    """The first stops the training; those that come while it is saved change nothing."""

    def before() -> None:
        sync = files.sync

        def interrupted_sync(path: Path) -> None:
            if path.parent.name == ".partial-2560":
                for again in (number, signal.SIGTERM, signal.SIGINT):
                    signal.raise_signal(again)
            sync(path)

        files.sync = interrupted_sync
        at_step(20, lambda: signal.raise_signal(number))

    folder, log = tmp_path / "a run", tmp_path / "log"
    process = Process("train", tiny_yaml, "--output", folder, log=log, before=before)
    assert process.wait() == code, process.text()
    (sentence,) = [line for line in process.text().splitlines() if line.startswith("Interrupted")]
    newest = folder / "checkpoints" / "2560"
    assert sentence == (
        f"Interrupted. All is saved in '{newest}'; go on with: sae-gated train --resume '{folder}'"
    )
    assert checkpoints.verify(newest)["steps"] == 20
    assert not list(folder.glob("checkpoints/.*"))
    resume(folder)
    assert (folder / WEIGHTS).read_bytes() == whole


def test_a_signal_before_the_first_step(tiny_yaml: Path, tmp_path: Path) -> None:
    config = load_config(TINY)
    hook = at_step(10**6, lambda: None)
    folder = tmp_path / "run"
    original = ActivationStream.__next__

    def stopping(self: ActivationStream) -> torch.Tensor:
        signal.raise_signal(signal.SIGTERM)
        return original(self)

    try:
        ActivationStream.__next__ = stopping
        with pytest.raises(Interrupted, match=r"Nothing was trained yet; go on with: sae-gated"):
            train(config, folder)
    finally:
        ActivationStream.__next__ = original
        hook.remove()
    assert not list(folder.glob("checkpoints/*"))


# --- two at once, full disks, folders that cannot be written --------------------------------------


def test_two_trainings_in_one_folder(tiny_yaml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = Process(
        "train", tiny_yaml, "training_tokens=1000000", "--output", folder, log=tmp_path / "log"
    )
    process.wait_for(folder / "checkpoints")
    with pytest.raises(
        ConfigError, match=r"already holds a run \(run\.yaml.*or go on with --resume"
    ):
        train(load_config(tiny_yaml), folder)
    with pytest.raises(ConfigError, match="is being trained by another process; nothing was"):
        resume(folder)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with locked(folder / "run.yaml"):  # the lock has died with its process
        pass


def test_a_full_disk(
    tiny_yaml: Path, tmp_path: Path, whole: bytes, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=1100k")
    folder, log = disk / "run", tmp_path / "log"
    process = Process("train", tiny_yaml, "--output", folder, log=log)
    assert process.wait() == 2, process.text()
    (sentence,) = [line for line in process.text().splitlines() if line.startswith("Error")]
    assert "Checkpoint" in sentence
    assert "cannot be written: " in sentence
    assert f"Make room, then go on with: sae-gated train --resume {folder}" in sentence
    kept = checkpoints.numbered(folder / "checkpoints")
    assert kept
    for path in kept:
        checkpoints.verify(path)
    assert not list(folder.glob("checkpoints/.*"))
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    resume(folder)
    assert (folder / WEIGHTS).read_bytes() == whole


@pytest.mark.slow
def test_a_home_that_cannot_be_written(
    tiny_yaml: Path, tmp_path: Path, mounted: Callable[[str], Path]
) -> None:
    home = mounted("ro,size=1m")
    command = ["sae-gated", "train", str(tiny_yaml), "--output"]
    environment = {k: v for k, v in os.environ.items() if k != "HF_HOME"} | {"HOME": str(home)}

    def last_line(folder: Path, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [*command, str(folder)], env={**environment, **more}, capture_output=True, text=True
        )
        return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).splitlines()[
            -1
        ]

    code, line = last_line(tmp_path / "run")
    assert code == 2
    assert "Read-only file system" in line
    assert line.endswith("Set HF_HOME to a folder that can be written")
    assert not (tmp_path / "run").exists()
    assert last_line(tmp_path / "run", HF_HOME=str(tmp_path / "cache"))[0] == 0


def test_a_folder_that_cannot_be_written(mounted: Callable[[str], Path]) -> None:
    folder = mounted("ro,size=1m") / "run"
    with pytest.raises(ConfigError, match=r"cannot be written: .*Read-only file system"):
        train(load_config(TINY), folder)


# --- wandb ----------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_RESUME", raising=False)
    mapping = {**TINY, "logger": {"wandb_log_frequency": 5}}
    interrupted(mapping, tmp_path / "run")
    resume(tmp_path / "run")
    wandb.teardown()
    files = sorted(path.name for path in tmp_path.rglob("*.wandb"))
    assert len(files) == 2
    assert files[0] == files[1]
