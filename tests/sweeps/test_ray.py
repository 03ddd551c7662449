"""Sweeps on a real Ray cluster of two nodes, one of whose workers is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_gated_plugin.config.yaml import to_yaml
from sae_gated_plugin.errors import ConfigError
from sae_gated_plugin.sweeps.folder import PointFolder
from sae_gated_plugin.sweeps.grid import load_sweep
from sae_gated_plugin.sweeps.sweep import run_sweep

pytest.importorskip("ray")

RAY = str(Path(sys.executable).with_name("ray"))


def environment(address: str | None = None) -> dict[str, str]:
    """No usage statistics, no dashboard, quick to notice a dead worker."""
    added = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    if address:
        added["RAY_ADDRESS"] = address
    return {**os.environ, **added, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster of two nodes with one CPU each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    common = ["--num-cpus=1", "--disable-usage-stats", "--object-store-memory=200000000"]
    port = address.split(":")[1]
    head = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    for arguments in (head, [f"--address={address}"]):
        started = subprocess.run(
            [RAY, "start", *arguments, *common],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert started.returncode == 0, started.stderr
    yield address
    subprocess.run([RAY, "stop", "--force"], capture_output=True, timeout=60, check=False)


def workers() -> list[int]:
    """Processes that run one of our tasks now."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::_train" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for workers in /proc")
def test_all_points_arrive_though_a_worker_is_killed(
    cluster: str, small_run: dict[str, Any], tmp_path: Path
) -> None:
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
    command = [sys.executable, "-m", "sae_gated_plugin", "sweep", str(path), "--json"]
    command += ["--engine", "ray", "--output", str(output)]
    process = subprocess.Popen(
        command, env=environment(cluster), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(workers()) < 2:  # both nodes are at work
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    killed = workers()[0]
    os.kill(killed, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    results = json.loads(stdout)
    assert [(r["label"], r["seed"], "error" in r) for r in results] == [
        ("gated", 0, False),
        ("gated", 1, False),
        ("bad", 0, True),
        ("bad", 1, True),
    ]
    assert "not finite" in results[2]["error"]
    expected = {point.name for point in load_sweep(small_run).points}
    assert {p.name for p in (output / "points").iterdir()} == expected
    for result in results[:2]:
        folder = Path(result["path"])
        assert json.loads((folder / "results.json").read_text())["loss_recovered"] > 0.3
        assert (folder / "sae_weights.safetensors").exists()
        assert "output_path" not in (folder / "run.yaml").read_text()


def test_what_was_trained_before_is_measured_only(
    cluster: str, small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a local sweep leaves it that is killed between training and measuring."""
    small_run["sae"] = {"d_in": 128, "d_sae": 256}
    small_run.update(training_tokens=2048)
    curve = {"architecture": "gated", "l1_coefficient": 0.3}
    small_run["sweep"] = {"seeds": [0], "eval_tokens": 512, "curves": [curve]}
    sweep, output = load_sweep(small_run), tmp_path / "out"
    (local,) = run_sweep(sweep, output)
    folder = output / "points" / sweep.points[0].name
    (folder / "results.json").unlink()
    weights = (folder / "sae_weights.safetensors").read_bytes()

    for name, value in environment(cluster).items():
        monkeypatch.setenv(name, value)
    (measured,) = run_sweep(sweep, output, engine="ray")
    assert json.loads((folder / "results.json").read_text())["path"] == str(folder)
    for name in ("l0", "fvu", "label", "path", "training_tokens"):
        assert measured[name] == pytest.approx(local[name]), name
    assert (folder / "sae_weights.safetensors").read_bytes() == weights


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
