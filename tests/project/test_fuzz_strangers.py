"""What others do wrong: a Hub that answers nonsense, plugins that raise, losses and metrics too.

How to run many: see mangling.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from hypothesis import example
from hypothesis import strategies as st
from publish.test_model_card import RESULTS
from sae_lens.saes.sae import TrainStepInput
from saes.test_loaders import config as their_config
from saes.test_loaders import gated_tensors, saved
from support.local_hub import LocalHub, Response
from support.mangling import fuzz, mutated, sentence, spliced
from support.models import linear_sae
from support.runs import D_IN

from sae_gated_plugin.architectures.gated import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_gated_plugin.errors import HubError, PluginError, TrainingDiverged
from sae_gated_plugin.measure.evaluate import _values, evaluate
from sae_gated_plugin.measure.model_loss import Totals
from sae_gated_plugin.metrics.batch import Batch
from sae_gated_plugin.metrics.decoder import coherence
from sae_gated_plugin.metrics.registered import registered_metrics, training_metrics
from sae_gated_plugin.model.hook_point import HookPoint
from sae_gated_plugin.plugins.bridge import registry
from sae_gated_plugin.plugins.host import (
    Manager,
    _add_installed,
    collect,
    hookspecs,
    warn_of_failures,
)
from sae_gated_plugin.publish import hub
from sae_gated_plugin.results import RESULT_KEYS
from sae_gated_plugin.saes import loaders
from sae_gated_plugin.saes.load import load_sae

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),  # of SAELens's configurations, and of failing plugins
]


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[tuple[LocalHub, Any]]:
    """A Hub on 127.0.0.1 and a client of it that does not wait between tries."""
    with pytest.MonkeyPatch.context() as patch, LocalHub() as server:
        api = server.patch_client(patch, place / "home")
        patch.setattr("sae_gated_plugin.publish.client.WAITS", (0.0, 0.0))
        patch.setattr("sae_gated_plugin.publish.client.MAX_WAIT", 0.0)
        clock = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        for module in (_http, file_download):
            patch.setattr(module, "time", clock)
        yield server, api


THEIRS = {"l3/ae.pt": saved(gated_tensors()), "l3/config.json": their_config()}


@fuzz(
    "their SAE",
    st.sampled_from(sorted(THEIRS)).flatmap(
        lambda name: st.tuples(
            st.just(name), spliced([THEIRS[name]], [b"null", b"8.5", b"[", b'"'])
        )
    ),
)
@example(("l3/config.json", b"{}"))
@example(("l3/config.json", b'{"trainer": 3}'))
@example(("l3/ae.pt", saved({**gated_tensors(), "r_mag": torch.full((24,), math.nan)})))
@example(("l3/ae.pt", saved({**gated_tensors(), "r_mag": torch.zeros(24, dtype=torch.int64)})))
def test_other_peoples_saes(client: tuple[LocalHub, Any], change: tuple[str, bytes]) -> None:
    server, _ = client
    server.create("tester/theirs")
    server.commit("tester/theirs", {**THEIRS, change[0]: change[1]})
    loaded = sentence(lambda: loaders.dictionary_learning_gated("tester/theirs", "l3"))
    if loaded and change[0] == "l3/ae.pt":
        assert all(tensor.isfinite().all() for tensor in loaded[1].values())
        assert loaded[1]["W_enc"].shape == (8, 24)


# --- the Hub --------------------------------------------------------------------------------------

REPO = "tester/saes"
INFO = {
    "id": REPO, "modelId": REPO, "sha": "main", "private": False, "tags": [],
    "siblings": [
        {"rfilename": "layer_3/cfg.json", "size": 9, "blobId": "x"},
        {"rfilename": "layer_3/x", "lfs": {"sha256": "x", "size": 1, "pointerSize": 1}},
    ],
}  # fmt: skip
CONTENTS = st.sampled_from([
    b"", b"<html><h1>Sign in</h1>",
    b'{"id": "x', b"\xff\xfe", b"[" * 100_000, b"x" * 3_000_000, b"null",
    [], {}, 3, "text", {"error": "a\nb"}, {"sha": "main", "siblings": 5}, {"commitOid": 3},
    {"sha": "main", "siblings": [{"rfilename": "../../x/cfg.json"}]}, {"files": [{"path": 3}]},
    {"files": []}, {"objects": None}, {"objects": [{"oid": "x", "error": {"code": 1}}]},
]) | mutated([INFO], ["sha", "siblings", "lfs"])  # fmt: skip
HEADERS = st.sampled_from([
    {}, {}, {"Location": "/api/loop"}, {"Location": "http://127.0.0.1:9/"}, {"Location": "::"},
    {"X-Error-Code": "RepoNotFound"}, {"X-Error-Code": "EntryNotFound"}, {"Retry-After": "9" * 30},
    {"X-Error-Code": "RevisionNotFound"}, {"ETag": '"x"', "X-Repo-Commit": "y"}, {"ETag": ""},
    {"X-Error-Message": "a"}, {"Content-Type": "text/html"}, {"X-Linked-Size": "-1"},
])  # fmt: skip
STATUS = st.sampled_from(
    [200, 200, 200, 201, 204, 206, 302, 307, 308, 304, 400, 401, 403, 404, 409, 412]
)
STATUS |= st.sampled_from([416, 418, 422, 429, 500, 502, 503, 504, 599])
ANSWERS = st.tuples(CONTENTS, STATUS, HEADERS)
#: Which request of a case, whether every later one too, whether it is carried out, and the answer.
FAULTS = st.tuples(st.integers(0, 9), st.booleans(), st.booleans(), ANSWERS | st.none())


@contextlib.contextmanager
def faulty(server: LocalHub, fault: Any, place: Path) -> Iterator[None]:
    """A Hub that gives one wrong answer, or from there on; no answer drops the connection."""
    first, on, carried_out, answer = fault
    numbers = itertools.count()

    def match(request: Any) -> bool:
        number = next(numbers)
        return number >= first if on else number == first

    if answer is None:
        server.drop(match, 1000, 0 if carried_out else None, "response")
    else:
        content, status, headers = answer
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        server._set("fail", match, 1000, (Response(body, status, headers), carried_out))
    with pytest.MonkeyPatch.context() as patch:
        home = tempfile.mkdtemp(dir=place)  # nothing that an earlier case has downloaded
        patch.setattr(constants, "HF_HUB_CACHE", home)
        try:
            yield
        finally:
            server._faults.clear()
            shutil.rmtree(home)


def published(server: LocalHub, run_folder: Path) -> None:
    server.repos.clear()
    server.create(REPO)
    files = {f"layer_3/{path.name}": path.read_bytes() for path in run_folder.iterdir()}
    server.commit(REPO, {**files, "layer_3/results.json": json.dumps(RESULTS).encode()})


@fuzz("Hub list", FAULTS)
@example((0, True, False, ({"sha": "main", "siblings": [{"rfilename": "../x/cfg.json"}]}, 200, {})))
def test_listing(client: Any, run_folder: Path, place: Path, fault: Any) -> None:
    server, api = client
    published(server, run_folder)
    with faulty(server, fault, place):
        listed = sentence(lambda: hub.list_saes(REPO, api=api), HubError)
    for row in listed or ():
        if row["sae_id"] == "layer_3" and row["l0"] is not None:
            assert row["l0"] == RESULTS["l0"]


@fuzz("Hub load", FAULTS)
def test_loading(client: Any, run_folder: Path, place: Path, fault: Any) -> None:
    server, _ = client
    published(server, run_folder)
    with faulty(server, fault, place):
        loaded = sentence(lambda: load_sae(REPO, sae_id="layer_3"))
    if loaded is not None:
        expected = load_sae(run_folder).state_dict()
        assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)


@fuzz("Hub push", FAULTS)
def test_pushing(client: Any, run_folder: Path, place: Path, fault: Any) -> None:
    """Whatever is answered, the repository has all of the SAE or nothing, and a new try ends it."""
    server, api = client
    server.repos.clear()

    def push() -> Any:
        return hub.push([run_folder], REPO, unmeasured=True, api=api)

    with faulty(server, fault, place):
        done = sentence(push)
    there = set(server.files(REPO)) - {".gitattributes"} if REPO in server.repos else set()
    with faulty(server, (0, False, True, ([], 200, {})), place):
        server._faults.clear()
        complete = set(push()["files"])
    assert there in (set(), complete)
    assert not done or there == complete
    for name in complete & {f"layer_3/{path.name}" for path in run_folder.iterdir()}:
        if name.endswith(".safetensors"):
            assert server.files(REPO)[name] == (run_folder / Path(name).name).read_bytes()


# --- plugins --------------------------------------------------------------------------------------

RAISES = [
    "raise ValueError('a\\nb')", "raise SystemExit(3)", "raise ImportError('x')",
    "raise GeneratorExit", "raise StopIteration", "raise MemoryError", "(", "pass",
    "raise Warning('\\ud800')", "import nothing_here", "def f(): f()\n{}f()",
    "class Panic(BaseException): pass\n{}raise Panic('x')",
    "class Odd(Exception):\n{}  def __str__(self): 1 / 0\n{}raise Odd()",
    "import sae_gated_plugin as p; p.registry()",
]  # fmt: skip
WORDS = [
    '"gated"',
    '"l1"',
    '"l0"',
    '"tokens"',
    '"gamma_ci"',
    '"a\\nb"',
    '"mine"',
    "3",
    "None",
    '""',
]
WORDS += [
    "[]",
    "int",
    "lambda *a, **k: 1 / 0",
    "object()",
    "(int, str)",
    "{}",
    '"standard"',
    "register",
]
CALLS = [
    "register({0}, {1})", "register({0})", "register()", "register({0}, {1}, {2})",
    "register({0}, training={1})", "register({0}, inference=({1}, {2}))",
    "register({0}, replaces={1})",
    "register({0}, int, releases={1})", "register({0}, int, releases={{{1}: {2}}})",
    "register('mine', int, releases={{'r': {{'repo_id': {0}, 'model': {1}, 'saes': {2}}}}})",
]  # fmt: skip
KINDS = ["architectures", "losses", "metrics", "loaders"]
NUMBER = itertools.count()


@fuzz(
    "plugin",
    st.sampled_from(["import", "register", "hook"]),
    st.sampled_from(RAISES),
    st.sampled_from([*KINDS, "nonsense"]),
    st.tuples(st.sampled_from(CALLS), *[st.sampled_from(WORDS)] * 3),
)
def test_plugins(place: Path, where: str, raising: str, kind: str, call: tuple[str, ...]) -> None:
    name = f"fuzzed_plugin_{next(NUMBER)}"
    folder = Path(tempfile.mkdtemp(dir=place))
    lines = [f"    {call[0].format(*call[1:])}"]
    if where != "register":
        lines.insert(0 if where == "hook" else 1, "    " + raising.replace("{}", "    "))
    source = f"from sae_gated_plugin import hookimpl\n@hookimpl\ndef register_{kind}(register):\n"
    source += "\n".join(lines[: 2 if where == "hook" else 1]) + "\n"
    if where == "import":
        source += raising.replace("{}", "")
    (folder / f"{name}.py").write_text(source)
    (folder / f"{name}-1.0.dist-info").mkdir()
    about = folder / f"{name}-1.0.dist-info"
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[sae_lens]\nx = {name}\n")
    manager = Manager()
    good = types.ModuleType("good")
    good.register_losses = hookspecs.hookimpl(  # type: ignore[attr-defined]
        lambda register: register("good", lambda acts, norms, n: acts.sum())
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.syspath_prepend(str(folder))
        (distribution,) = Distribution.discover(path=[str(folder)])
        (entry_point,) = distribution.entry_points
        _add_installed(manager, entry_point)
        manager.add(good, "good-dist", "1.0")
        found = collect(manager)
        warn_of_failures(found)
    bad, fine = found.plugins
    assert fine.status == "ok"
    assert "good" in found.losses
    ours = [str(warning.message) for warning in said if "was skipped" in str(warning.message)]
    if bad.status == "failed":
        assert len(ours) == 1
        assert f"of {name}-dist 1.0 was skipped: " in ours[0]
        assert ours[0].isprintable()
        for table_ in KINDS:
            assert set(getattr(found, table_)) <= {"good"}
    else:
        assert bad.status == "ok"
        assert not ours
        names = [word for table_ in KINDS for word in getattr(found, table_)]
        assert all(isinstance(word, str) and word.isprintable() for word in names)
        assert not {"gated", "standard", "tokens", "gamma_ci"} & {
            *found.architectures,
            *found.metrics,
        }
        assert all(callable(f) for f in [*found.losses.values(), *found.metrics.values()])
    sys.modules.pop(name, None)
    shutil.rmtree(folder)


def failing(*_: Any) -> Any:
    raise ValueError("out\nof luck")


def leaving(*_: Any) -> Any:
    raise SystemExit("bye")


RETURNED: list[Any] = [
    None, True, "x", [], [1, 2], (2, 1), ("a", 1), math.nan, math.inf, 3, 2.5, 10**400, 1j,
    object(), {},
    torch.tensor(2.5), torch.zeros(3), torch.tensor(math.nan), np.float32(2.5), np.float64("nan"),
]  # fmt: skip
BEHAVIOUR = st.sampled_from(
    [failing, leaving, *(lambda *_, value=value: value for value in RETURNED)]
)


def metric(behaviours: tuple[Any, ...]) -> Any:
    made, update, compute, interval = behaviours

    def make() -> Any:
        if made is not None:
            return made()
        methods = {"update": update, "compute": compute, "interval": interval}
        return type("Strange", (), {k: staticmethod(v) for k, v in methods.items() if v})()

    return make


METRIC_CASES = st.tuples(
    st.none() | BEHAVIOUR,
    st.just(lambda *_: None) | BEHAVIOUR,
    st.none() | BEHAVIOUR,
    st.none() | BEHAVIOUR,
)


def require_contained(values: dict[str, Any], undefined: dict[str, str], compute: Any) -> None:
    """A stranger's value is the number it gave or null with a reason; it is JSON either way."""
    json.dumps([values, undefined], allow_nan=False)
    if values["strange"] is None:
        assert "'strange'" in undefined["strange"]
        assert undefined["strange"].isprintable()
    else:
        assert values["strange"] == float(compute())
    ends = values.get("strange_ci")
    assert ends is None or (len(ends) == 2 and ends[0] <= ends[1])


X = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
X_HAT, CODES = 0.9 * X + 0.01, X


@fuzz("metric", METRIC_CASES)
def test_metrics_of_strangers(behaviours: tuple[Any, ...]) -> None:
    batch = Batch(X, X_HAT, CODES.relu(), torch.arange(20))
    expected = _values(registered_metrics(), Totals(tokens=20), lambda: coherence(X))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry().metrics, "strange", metric(behaviours))
        metrics = registered_metrics()
        for one in metrics.values():
            one.update(batch)
        values, undefined = _values(metrics, Totals(tokens=20), lambda: coherence(X))
        logged = training_metrics(X, X_HAT, CODES.relu())
    assert set(expected[0]) <= set(values)
    assert values["gamma"] == pytest.approx(
        float((X_HAT.double() ** 2).sum() / (X * X_HAT).sum()), rel=1e-4
    )
    assert logged["gamma"] == values["gamma"]
    assert logged.get("strange") == values["strange"]
    require_contained(values, undefined, behaviours[2])


@fuzz("evaluation", METRIC_CASES)
@example((None, failing, lambda: 3, None))
def test_evaluations_with_strangers(hook_point: HookPoint, behaviours: tuple[Any, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry().metrics, "strange", metric(behaviours))
        results = evaluate(linear_sae(torch.eye(D_IN)), model=hook_point.model, tokens=128)
    assert results["gamma"] == pytest.approx(1, rel=1e-5)
    require_contained(results, results["undefined"], behaviours[2])


def test_no_metric_can_take_the_place_of_another_result(trained_run: Path) -> None:
    results = json.loads((trained_run / "results.json").read_text())
    metrics = set(registry().metrics)
    assert {key for key in results if not key.endswith("_ci")} - metrics <= RESULT_KEYS


LOSSES: dict[str, Any] = {
    "failing": failing,
    "leaving": leaving,
    "per token": lambda acts, norms, n: acts,
    "detached": lambda acts, norms, n: acts.detach().sum(),
    "not finite": lambda acts, norms, n: acts.sum() * math.nan,
    "infinite": lambda acts, norms, n: acts.sum() / 0.0,
    "one element": lambda acts, norms, n: acts.sum()[None],
    "whole": lambda acts, norms, n: (acts > 0).sum(),
    "fine": lambda acts, norms, n: acts.sum() / n,
    "squared": lambda acts, norms, n: acts.square().sum() / n,
}


@fuzz(
    "loss",
    st.sampled_from([*LOSSES.values(), *(lambda *_, value=value: value for value in RETURNED)]),
    st.sampled_from(["sparse", "dense"]),
    st.integers(0, 99),
)
def test_losses_of_strangers(loss: Any, backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry().losses, "strange", loss)
        cfg = GatedTrainingSAEConfig(d_in=4, d_sae=8, sparsity_loss="strange", backend=backend)
        sae = GatedTrainingSAE(cfg)
        step = TrainStepInput(torch.randn(6, 4), {"l1": 0.5}, None, 0, False)
        errors = (PluginError, TrainingDiverged)
        output = sentence(lambda: sae.training_forward_pass(step), *errors)
    if output is None:
        assert loss not in (LOSSES["fine"], LOSSES["squared"])
        return
    assert loss in (LOSSES["fine"], LOSSES["squared"])
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())
    assert output.losses["l1_loss"] > 0
