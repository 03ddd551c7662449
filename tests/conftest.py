"""The packaged language model and text, and runs trained on them: everything here is real."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub or wandb: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# The matrices here are small: on a busy machine a second thread makes the tests ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
# Before anything imports triton: without a GPU its kernels run in its interpreter.
if not os.path.exists("/dev/nvidia0"):
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from datasets import Dataset
from support.interpreter import Interpreter
from support.mangling import RAN, REFUSED
from support.runs import HOOK_NAME, QUICKSTART, SMALL_RUN
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_gated_plugin.architectures.gated import GatedSAE, GatedSAEConfig
from sae_gated_plugin.config.run import load_config
from sae_gated_plugin.model.hook_point import HookPoint
from sae_gated_plugin.training.run import train

torch.set_num_threads(1)


@pytest.fixture
def small_run() -> dict[str, Any]:
    """A configuration that trains in two seconds; a test may change its copy."""
    return copy.deepcopy(SMALL_RUN)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Runs scripts in processes that have not imported SAELens, nor this package.

    Triton compiles there, as it does for users.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    interpreter = Interpreter(environment=environment)
    yield interpreter
    interpreter.end()


@pytest.fixture(scope="session")
def hook_point() -> HookPoint:
    """The packaged model at the middle of its residual stream."""
    return HookPoint.load(str(QUICKSTART / "model"), "AutoModelForCausalLM", HOOK_NAME)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small gated run with two checkpoints; do not write into it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(load_config(SMALL_RUN, ["n_checkpoints=2"]), folder)
    return folder


@pytest.fixture
def poisoned(small_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A model with NaN for the embeddings of some tokens, and text that has none at first."""
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model")
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    clean = "It was a bright cold day and the clocks were striking thirteen. " * 40
    safe, bad = (set(tokenizer(text)["input_ids"]) for text in (clean, "ZQ#"))
    assert bad - safe
    model.get_input_embeddings().weight.data[list(bad - safe)] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_dict({"text": [clean] * 15 + ["ZQ#" * 500]}).to_parquet(
        str(tmp_path / "text" / "train.parquet")
    )
    small_run.update(model_name=str(tmp_path / "model"), dataset_path=str(tmp_path / "text"))
    return small_run


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs; skip where that is not permitted."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
        )
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the many files of test_fuzz*.py."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="session")
def run_folder(place: Path) -> Path:
    """A folder with a small Gated SAE, as a training leaves it."""
    torch.manual_seed(0)
    sae = GatedSAE(GatedSAEConfig(d_in=8, d_sae=16))
    for name, value in {"model_name": "m", "hook_name": "h", "seqpos_slice": [1, None]}.items():
        sae.cfg.metadata[name] = value
    for parameter in sae.parameters():
        parameter.data = torch.randn_like(parameter)
    sae.save_model(place / "layer_3")
    return place / "layer_3"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases of test_fuzz*.py ran, and to how many of them a sentence was the answer."""
    if RAN:
        kinds = ", ".join(f"{kind} {n} ({REFUSED[kind]})" for kind, n in RAN.items())
        terminalreporter.write_line(f"{RAN.total():,} cases ({REFUSED.total():,} refused): {kinds}")
