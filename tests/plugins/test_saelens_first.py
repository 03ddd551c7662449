"""Importing the package waits for SAELens; whoever imports SAELens then finds the plugin active."""

from __future__ import annotations

import textwrap

import pytest
from support.interpreter import Interpreter

ACTIVE = """
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY as known
    import sae_gated_plugin

    assert known["gated"][0].__module__ == "sae_gated_plugin.architectures.gated"
    assert {plugin.status for plugin in sae_gated_plugin.registry().plugins} == {"ok"}
    assert not [f for f in sys.meta_path if "saelens_first" in type(f).__module__]
"""


@pytest.mark.parametrize("autoload", ["0", "1"])
@pytest.mark.parametrize(
    "code",
    [
        """
        import importlib.util
        import sae_gated_plugin
        assert importlib.util.find_spec("sae_lens")
        assert "sae_lens" not in sys.modules
        import sae_lens
        """,
        "import sae_gated_plugin.architectures.gated",
        "from sae_gated_plugin import hookimpl",
        "import sae_lens, sae_gated_plugin",
    ],
)
def test_the_plugin_is_active_in_whatever_order_they_are_imported(
    code: str, autoload: str, interpreter: Interpreter
) -> None:
    program = "import sys\n" + textwrap.dedent(code) + "\n" + textwrap.dedent(ACTIVE)
    done = interpreter.run(program, SAE_GATED_PLUGIN_AUTOLOAD=autoload)
    assert done.returncode == 0, done.stderr
