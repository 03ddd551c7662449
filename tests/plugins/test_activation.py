"""Activation in real environments: a wheel, an editable install and a stranger's plugin.

The environments see the packages of the one that runs the tests through a path line, which brings
its modules along but runs none of its .pth files, so what is activated is what is installed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.interpreter import Interpreter

ROOT = Path(__file__).parents[2]
STRANGER = Path(__file__).parents[1] / "support" / "third_party_plugin"
#: Nothing comes from the checkout, and the plugin is not switched off.
ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SAE_GATED_PLUGIN_AUTOLOAD")
}


def pip(*args: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, args)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def make_environment(folder: Path, *what: str | Path) -> Path:
    """A virtual environment with `what` installed into it; its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    inside = run(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    Path(inside, "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip("--python", python, "install", "--no-deps", "--no-index", "--no-build-isolation", *what)
    return python


def run(python: Path, code: str, *options: str, **environ: str) -> str:
    done = subprocess.run(
        [str(python), *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environ},
        cwd=python.parent,  # not the checkout: nothing may come from the working directory
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def printed(forks: Interpreter, code: str, folder: Path) -> str:
    """What the code prints in that folder, whose modules and distributions are found."""
    done = forks.run(textwrap.dedent(code), cwd=folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("wheels")
    for source in (ROOT, STRANGER):
        pip("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    return sorted(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("wheel") / "env", *wheels)


@pytest.fixture(scope="module")
def forks(python: Path) -> Iterator[Interpreter]:
    """Forks of that environment's python; they need not import what is not ours."""
    interpreter = Interpreter(python, ENVIRONMENT)
    yield interpreter
    interpreter.end()


ONLY_SAELENS = """
    import sae_lens
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as registry
    print(registry["gated"][0].__module__, "prolu" in registry)
"""


def test_it_can_be_switched_off_and_then_imported_by_hand(python: Path) -> None:
    code = ONLY_SAELENS + "    import sae_gated_plugin; print(registry['gated'][0].__module__)"
    assert run(python, code, SAE_GATED_PLUGIN_AUTOLOAD="0") == (
        "sae_lens.saes.gated_sae False\nsae_gated_plugin.architectures.gated\n"
    )


def test_editable_install(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env", "--editable", ROOT)
    assert run(python, ONLY_SAELENS) == "sae_gated_plugin.architectures.gated True\n"


def test_spawned_workers_and_a_strangers_plugin(forks: Interpreter, tmp_path: Path) -> None:
    code = """
        import multiprocessing, sys, torch

        def worker(_):
            import sae_lens
            from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as registry
            return registry["gated"][0].__module__

        if __name__ == "__main__":
            import json
            import sae_stranger  # before SAELens: its own import is under way during activation
            import sae_gated_plugin
            from sae_lens.registry import get_sae_training_class
            from sae_lens.saes.sae import TrainStepInput

            training_class, config_class = get_sae_training_class("stranger")
            sae = training_class(config_class(d_in=4, d_sae=8))
            step = TrainStepInput(torch.randn(3, 4), {"l1": 1.0}, None, 0, False)
            sae.training_forward_pass(step).loss.backward()
            assert sae.W_enc.grad.abs().sum() > 0

            gated, gated_config = get_sae_training_class("gated")
            sae = gated(gated_config(d_in=4, d_sae=8, sparsity_loss="half_l1"))
            full = gated(gated_config(d_in=4, d_sae=8))
            full.load_state_dict(sae.state_dict())
            halves = [s.training_forward_pass(step).losses["l1_loss"] for s in (sae, full)]
            torch.testing.assert_close(2 * halves[0], halves[1])

            infos = {p.module: p.as_dict() for p in sae_gated_plugin.registry().plugins}
            print(json.dumps(infos["sae_stranger"]))
    """
    script = tmp_path / "strangers.py"
    spawned = """
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(worker, [0])[0])
    """
    script.write_text(textwrap.dedent(code) + textwrap.indent(textwrap.dedent(spawned), "    "))
    done = forks.run(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    info, module = done.stdout.splitlines()
    assert '"distribution": "sae-stranger", "version": "1.2.3"' in info
    assert '"status": "ok"' in info
    assert module == "sae_gated_plugin.architectures.gated"


def test_the_contract_suite_holds_for_a_stranger(forks: Interpreter, tmp_path: Path) -> None:
    suite = ROOT / "tests" / "architectures" / "test_contract.py"
    options = ("-q", "-p", "no:cacheprovider", "-k", "stranger")
    done = forks.run("pytest", *options, suite, module=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_saelens_command_line_knows_prolu(forks: Interpreter, tmp_path: Path) -> None:
    options = ("--architecture", "prolu", "--help")
    done = forks.run("sae_lens.llm_sae_training_runner", *options, module=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for option in ("--gradient", "--hybrid", "--sparsity_loss"):
        assert option in done.stdout


def test_a_broken_plugin_never_breaks_saelens(forks: Interpreter, tmp_path: Path) -> None:
    code = """
        import sys, types, warnings
        broken = types.ModuleType("sae_gated_plugin.plugins.hookspecs")  # an import error half way
        sys.modules["sae_gated_plugin.plugins.hookspecs"] = broken
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import sae_lens
        print([str(w.message) for w in caught if "sae-gated-plugin" in str(w.message)])
        print(sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY["gated"][0].__module__)
    """
    out = printed(forks, code, tmp_path)
    assert "could not be activated: ImportError" in out
    assert "sae_lens.saes.gated_sae" in out


def test_a_strangers_class_may_be_imported_first_and_a_plugin_may_exit(
    forks: Interpreter, tmp_path: Path
) -> None:
    quitter = tmp_path / "quitter-1.0.dist-info"
    quitter.mkdir()
    (quitter / "METADATA").write_text("Metadata-Version: 2.1\nName: quitter\nVersion: 1.0\n")
    (quitter / "entry_points.txt").write_text("[sae_lens]\nquitter = quitter\n")
    (tmp_path / "quitter.py").write_text("raise SystemExit('I am a script')\n")
    code = """
        import json, warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from stranger_architecture import StrangerTrainingConfig  # imports SAELens itself
        skipped = [str(w.message) for w in caught if "was skipped" in str(w.message)]
        StrangerTrainingConfig(d_in=4, d_sae=8).get_inference_config_class()
        from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as registry
        import sae_gated_plugin
        status = {p.module: p.status for p in sae_gated_plugin.registry().plugins}
        print(json.dumps([skipped, status, sorted({"gated", "stranger"} & set(registry))]))
    """
    skipped, status, known = json.loads(printed(forks, code, tmp_path))
    assert skipped == ["Plugin 'quitter' of quitter 1.0 was skipped: SystemExit: I am a script"]
    assert status.pop("quitter") == "failed"
    assert set(status.values()) == {"ok"}
    assert "sae_stranger" in status
    assert known == ["gated", "stranger"]


def test_an_interpreter_that_does_not_use_saelens_loads_one_small_module(python: Path) -> None:
    code = "import sys; print(*sorted(sys.modules))"
    with_plugin = set(run(python, code).split())
    without = set(run(python, code, SAE_GATED_PLUGIN_AUTOLOAD="0").split())
    assert with_plugin == without  # the finder itself needs nothing
    bare = set(run(python, code, "-S").split())
    assert "_sae_gated_autoload" in with_plugin - bare
    assert not {"sae_gated_plugin", "importlib.metadata", "logging", "re", "torch"} & with_plugin


def test_importing_saelens_is_enough_from_many_threads_and_after_a_look(
    forks: Interpreter, tmp_path: Path
) -> None:
    code = """
        import sys, threading, _sae_gated_autoload as autoload
        autoload.install(); autoload.install()
        assert sys.meta_path.count(autoload._Finder) == 1
        import importlib.util
        assert importlib.util.find_spec("sae_lens")  # only asks whether it is installed
        modules = []
        def load():
            import sae_lens
            from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as registry
            modules.append(registry["gated"][0].__module__)
        threads = [threading.Thread(target=load) for _ in range(16)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert autoload._Finder not in sys.meta_path
        print(set(modules))
    """
    assert printed(forks, code, tmp_path) == "{'sae_gated_plugin.architectures.gated'}\n"
