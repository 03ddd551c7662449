"""A run that is killed, stopped or runs out of disk goes on as if nothing had happened."""

from __future__ import annotations

import copy
import errno
import io
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sae_lens
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens.cache_activations_runner import CacheActivationsRunner
from sae_lens.config import CacheActivationsRunnerConfig
from sae_lens.training.mixing_buffer import mixing_buffer
from safetensors.torch import load_file
from support.process import Process
from support.resuming import TINY, WEIGHTS, few_texts, interrupted

from sae_gated_plugin import files
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.files import create
from sae_gated_plugin.training import checkpoints
from sae_gated_plugin.training.activation_stream import ActivationStream
from sae_gated_plugin.training.run import resume, train


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


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["prefetch_llm_batches=3", "sae.dead_latents=none", "sae.resample_steps=[]"],
        ["sae={architecture: jumprelu, d_in: 128, d_sae: 64, l0_coefficient: 0.1}"],
        ["sae.matryoshka_widths=[32, 64]"],
        few_texts,
        pytest.param(cached, marks=pytest.mark.slow),
    ],
    ids=["tiny", "prefetched", "jumprelu", "matryoshka", "epochs", "cached"],
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
