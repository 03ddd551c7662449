"""Scripts in processes forked from an interpreter that has imported what is heavy, and is not ours.

SAELens and this package are for the scripts to import, in the order that they test. How an
interpreter starts (.pth files, the entry point) is not shown by these: new ones show it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAVY = ("torch", "transformers", "transformer_lens", "datasets", "wandb")


class Interpreter:
    """python: whose packages are seen; environment: of the interpreter, default this process's."""

    def __init__(
        self, python: str | Path = sys.executable, environment: Mapping[str, str] = os.environ
    ):
        self._environment = dict(environment)
        self._process = subprocess.Popen(
            [str(python), __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Each script says whether it wants the plugin activated by itself.
            env={**self._environment, "SAE_GATED_PLUGIN_AUTOLOAD": "0"},
        )

    def run(
        self,
        script: str | Path,
        *arguments: str | Path,
        module: bool = False,
        cwd: Path | None = None,
        **environ: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run code, a file, or a module by name; environ: what is otherwise in its environment."""
        with tempfile.TemporaryDirectory() as folder:
            request: dict[str, Any] = {
                "script": str(script),
                "kind": "module" if module else "code" if isinstance(script, str) else "file",
                "arguments": [str(argument) for argument in arguments],
                "environment": {**self._environment, **environ},
                "cwd": str(cwd or Path.cwd()),
                "output": [f"{folder}/stdout", f"{folder}/stderr"],
            }
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the interpreter has died"
            output, errors = (Path(path).read_text() for path in request["output"])
        return subprocess.CompletedProcess(request["arguments"], int(answer), output, errors)

    def end(self) -> None:
        self._process.communicate()


def serve() -> dict[str, Any]:
    """Import, and fork for every request; return in each fork what it was asked to run."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import may print is no answer
    for name in HEAVY:
        importlib.import_module(name)
    assert not {"sae_lens", "sae_gated_plugin"} & set(sys.modules)
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        answers.flush()
    sys.exit()


def become(request: dict[str, Any]) -> None:
    """Run what was asked for as a new interpreter would; what it raises is left to this one."""
    script, environment = request["script"], request["environment"]
    for number, path in enumerate(request["output"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    sys.argv = [script if request["kind"] == "file" else "-c", *request["arguments"]]
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = os.path.dirname(script) if request["kind"] == "file" else ""
    sys.path[:1] = [first, *(path for path in added if path not in sys.path)]
    if autoload := sys.modules.get("_sae_gated_autoload"):
        autoload.install()  # as the .pth file does, by this environment
    if request["kind"] == "module":
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if request["kind"] == "file":
        main.__file__ = script
        script = Path(script).read_text()
    exec(compile(script, main.__dict__.get("__file__", "<string>"), "exec"), main.__dict__)


if __name__ == "__main__":
    own = sys.modules["__main__"]  # it must outlive its place in sys.modules
    become(serve())
