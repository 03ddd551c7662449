"""Sweeps on a real Ray cluster of two nodes, one of whose workers is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import names
from typer.testing import CliRunner

from sae_gated_plugin.cli.commands import app
from sae_gated_plugin.config.yaml import to_yaml
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.sweeps.folder import PointFolder
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep

pytest.importorskip("ray")

RAY = str(Path(sys.executable).with_name("ray"))

#: Tells the workers of this cluster from those of another one on this machine.
MARK = f"SAE_GATED_CLUSTER={os.getpid()}"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two nodes with one CPU each, which Ray finds by its environment.

    No usage statistics, no dashboard.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    for variable in ("RAY_USAGE_STATS_ENABLED=0", "RAY_DISABLE_IMPORT_WARNING=1", MARK):
        monkeypatch.setenv(*variable.split("="))
    common = ["--block", "--num-cpus=1", "--object-store-memory=200000000"]
    port = address.split(":")[1]
    head = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    nodes: list[subprocess.Popen[bytes]] = []
    for number, arguments in enumerate((head, [f"--address={address}"])):
        log = tmp_path / f"node{number}.log"
        with log.open("wb") as file:
            command = [RAY, "start", *arguments, *common]
            nodes.append(subprocess.Popen(command, stdout=file, stderr=file))
        end = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert nodes[-1].poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
    monkeypatch.setenv("RAY_ADDRESS", address)
    yield
    for node in reversed(nodes):
        node.terminate()
        node.wait(timeout=60)


def workers() -> list[int]:
    """Processes that run one of our tasks now."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = MARK.encode() in (process / "environ").read_bytes().split(b"\0")
            if ours and b"ray::_train" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for workers in /proc")
def test_all_points_arrive_though_a_worker_is_killed(
    cluster: None, small_run: dict[str, Any], tmp_path: Path
) -> None:
    """One was trained before, as by a local sweep that was killed then: it is measured only."""
    small_run["sae"] = {"d_in": 128, "d_sae": 256}
    small_run["sweep"] = {
        "seeds": [0, 1],
        "eval_tokens": 2048,
        "curves": [
            {"architecture": "gated", "l1_coefficient": 0.3},
            {"label": "bad", "architecture": "gated", "l1_coefficient": 1e38},
        ],
    }
    path, output = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(to_yaml(small_run))
    sweep = load_sweep(path)
    local, other = run_sweep(sweep, output, only=["gated"])
    trained = Path(local["path"])
    (trained / "results.json").unlink()
    shutil.rmtree(other["path"])
    weights = (trained / "sae_weights.safetensors").read_bytes()
    killed: list[int] = []

    def kill_one() -> None:
        end = time.monotonic() + 120
        while not killed and time.monotonic() < end:
            for worker in workers()[:1]:
                os.kill(worker, signal.SIGKILL)
                killed.append(worker)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    arguments = ["sweep", str(path), "--json", "--engine", "ray", "--output", str(output)]
    done = CliRunner().invoke(app, arguments)
    killer.join()
    assert done.exit_code == 0, done.stderr
    assert killed
    results = json.loads(done.stdout)
    assert [(r["label"], r["seed"], "error" in r) for r in results] == [
        ("gated", 0, False),
        ("gated", 1, False),
        ("bad", 0, True),
        ("bad", 1, True),
    ]
    assert "not finite" in results[2]["error"]
    assert {p.name for p in (output / "points").iterdir()} == set(names(sweep))
    for result in results[:2]:
        folder = Path(result["path"])
        assert json.loads((folder / "results.json").read_text())["loss_recovered"] > 0.3
        assert (folder / "sae_weights.safetensors").exists()
        assert "output_path" not in (folder / "run.yaml").read_text()
    assert json.loads((trained / "results.json").read_text())["path"] == str(trained)
    for name in ("l0", "fvu", "label", "path", "training_tokens"):
        assert results[0][name] == pytest.approx(local[name]), name
    assert (trained / "sae_weights.safetensors").read_bytes() == weights


def test_an_sae_that_a_worker_could_not_measure_comes_back(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    place = one_place(small_run, tmp_path)
    files = {"sae_weights.safetensors": b"trained"}
    place.write_failure("RuntimeError: out of memory", files)
    assert (place.path / "sae_weights.safetensors").read_bytes() == b"trained"
    assert place.outcome()["error"] == "RuntimeError: out of memory"
    assert place.missing


def test_results_are_kept_where_another_process_has_left_an_unmeasured_sae(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    """It was trained, and not measured, while the task ran on the cluster."""
    place = one_place(small_run, tmp_path)
    folder = place.path
    place.write(lambda new: fill(new, b"theirs"))
    place.write(lambda new: fill(new, b"late, and unmeasured"))
    assert (folder / "sae_weights.safetensors").read_bytes() == b"theirs"
    place.write(lambda new: fill(new, b"ours", '{"l0": 1}'))
    place.write(lambda new: fill(new, b"late", '{"l0": 2}'))
    assert (folder / "sae_weights.safetensors").read_bytes() == b"ours"
    assert (folder / "results.json").read_text() == '{"l0": 1}'
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def one_place(small_run: dict[str, Any], folder: Path) -> PointFolder:
    small_run["sweep"] = {"curves": [{"architecture": "gated"}]}
    (point,) = load_sweep(small_run).points
    return PointFolder(point, folder / "points" / point.name)


def fill(folder: Path, weights: bytes, results: str | None = None) -> None:
    (folder / "sae_weights.safetensors").write_bytes(weights)
    if results is not None:
        (folder / "results.json").write_text(results)


def test_without_ray_it_is_a_sentence(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    small_run["sweep"] = {"curves": [{"architecture": "gated"}]}
    small_run["sae"].pop("architecture")
    with pytest.raises(ConfigError, match=r"needs Ray; install it with .*sae-gated-plugin\[ray\]"):
        run_sweep(load_sweep(small_run), tmp_path, engine="ray")
