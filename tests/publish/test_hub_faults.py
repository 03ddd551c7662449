"""Faults of the network and of the Hub, kills, and memory: a push is whole or did not happen."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from support.hub_records import REPO
from support.local_hub import LocalHub

from sae_gated_plugin.architectures.gated import GatedSAE, GatedSAEConfig
from sae_gated_plugin.errors import HubError
from sae_gated_plugin.publish import hub

EVERYTHING = re.compile(
    r"gated_layer_2/(cfg\.json|sae_weights\.safetensors|results\.json)|README.md"
)


def assert_all_or_nothing(server: LocalHub, complete: bool) -> None:
    files = [path for path in server.files(REPO) if EVERYTHING.fullmatch(path)]
    assert len(files) == (4 if complete else 0)


REQUESTS = {
    "info": ("GET", "/api/models/"),
    "tree": ("GET", "/tree/"),
    "create": ("POST", "/repos/create"),
    "preupload": ("POST", "/preupload/"),
    "upload": ("PUT", ""),
    "commit": ("POST", "/commit/"),
}


@pytest.mark.parametrize(
    ("request_name", "status"),
    [("info", 500), ("create", 500), ("upload", 502), ("commit", 500), ("commit", 429)],
)
def test_a_fault_that_passes_is_survived(
    server: LocalHub, api: HfApi, runs: dict[str, Path], request_name: str, status: int
) -> None:
    headers = {"Retry-After": "0"} if status == 429 else {}
    server.fail(REQUESTS[request_name], status, times=1, headers=headers)
    hub.push([runs["gated"]], REPO, api=api)
    assert_all_or_nothing(server, complete=True)


@pytest.mark.parametrize(
    ("request_name", "where"),
    [("commit", "request"), ("commit", "response"), ("info", "response"), ("upload", "request")],
)
def test_a_dropped_connection_is_survived(
    server: LocalHub, api: HfApi, runs: dict[str, Path], request_name: str, where: Any
) -> None:
    server.drop(REQUESTS[request_name], times=1, where=where)
    hub.push([runs["gated"]], REPO, api=api)
    assert_all_or_nothing(server, complete=True)
    assert len(server.repos[REPO].commits) == 2  # the initial one and ours


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    server: LocalHub, api: HfApi, runs: dict[str, Path]
) -> None:
    server.fail(REQUESTS["commit"], 504, after=True)
    hub.push([runs["gated"]], REPO, api=api)
    assert len(server.repos[REPO].commits) == 2


@pytest.mark.parametrize(
    "request_name",
    ["commit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("preupload", "upload"))],
)
def test_a_fault_that_stays_is_a_sentence_and_changes_nothing(
    server: LocalHub,
    api: HfApi,
    runs: dict[str, Path],
    request_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "sae_gated_plugin.publish.client.WAITS", ()
    )  # the client has its own patience, which is enough here
    server.fail(REQUESTS[request_name], 503, times=1000)
    with pytest.raises(HubError, match=f"The Hub refused the push to '{REPO}'.*503"):
        hub.push([runs["gated"]], REPO, api=api)
    assert_all_or_nothing(server, complete=False)


def test_a_commit_by_somebody_else_in_between_is_not_lost(
    server: LocalHub, api: HfApi, runs: dict[str, Path]
) -> None:
    server.create(REPO)
    server.before(REQUESTS["commit"], lambda: server.commit(REPO, {"README.md": b"# Theirs\n"}))
    hub.push([runs["gated"]], REPO, api=api)
    assert_all_or_nothing(server, complete=True)
    assert "# Theirs" in server.files(REPO)["README.md"].decode()
    assert [request.status for request in server.calls("POST", "/commit/")] == [412, 200]


def test_what_arrives_wrong_is_noticed(
    server: LocalHub, api: HfApi, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_info = HfApi.model_info

    def wrong(self: HfApi, *args: Any, **kwargs: Any) -> Any:
        info = model_info(self, *args, **kwargs)
        for sibling in info.siblings or []:
            if sibling.rfilename.endswith("sae_weights.safetensors"):
                sibling.lfs.sha256 = "0" * 64
        return info

    monkeypatch.setattr(HfApi, "model_info", wrong)
    with pytest.raises(HubError, match=r"not what was sent: gated_layer_2/sae_weights"):
        hub.push([runs["gated"]], REPO, api=api)


@pytest.mark.slow
def test_killed_at_random_moments_it_always_ends_right(
    server: LocalHub, runs: dict[str, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "sae_gated_plugin", "push", str(runs["gated"])]
    command += [str(runs["prolu"]), "--repo", REPO]
    environment = server.environment(tmp_path / "home")
    started = time.monotonic()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    whole = time.monotonic() - started
    expected = server.files(REPO)
    rng = random.Random(0)
    for _ in range(20):
        del server.repos[REPO]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        first = len(server.requests)
        while len(server.requests) == first and process.poll() is None:
            time.sleep(0.005)  # imports take most of the time, and are not interesting
        time.sleep(rng.uniform(0, 0.3 * whole))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if REPO in server.repos:
            assert server.files(REPO).keys() in ({".gitattributes"}, expected.keys())
        subprocess.run(command, env=environment, check=True, capture_output=True)
        assert server.files(REPO) == expected


MEMORY = """
import sys
from pathlib import Path
from sae_gated_plugin import hub

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
before = kib("VmRSS")
done = hub.push(sys.argv[2:], sys.argv[1])
print(len(done["sent"]), (kib("VmHWM") - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_five_large_saes_need_little_memory_and_show_a_bar(
    server: LocalHub, tmp_path: Path
) -> None:
    folders: list[str] = []
    for layer in range(5):
        torch.manual_seed(layer)
        sae = GatedSAE(GatedSAEConfig(d_in=768, d_sae=8192))
        folders.append(str(tmp_path / f"layer_{layer}"))
        sae.save_model(folders[-1])
    assert (Path(folders[0]) / "sae_weights.safetensors").stat().st_size > 50e6
    results = {"architecture": "gated", "undefined": {}}
    for folder in folders:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    environment = server.environment(tmp_path / "home") | {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, REPO, *folders],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    sent, mib = done.stdout.split()
    print(f"{sent} files, peak {float(mib):.0f} MiB above the start")
    assert int(sent) == 5 * 3 + 1
    assert float(mib) < 200
    assert "%|" in done.stderr  # the client's own progress bar
