"""SAELens's own class by name: one warning, and the switch. In processes of their own."""

from __future__ import annotations

from support.interpreter import Interpreter

BUILD = """
import warnings, sae_lens
from sae_lens.registry import get_sae_training_class
def build(sae, config):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sae(config(d_in=4, d_sae=8))
    return [str(w.message) for w in said if "GatedTrainingSAE" in str(w.message)]
"""


def lines(interpreter: Interpreter, code: str) -> list[str]:
    done = interpreter.run(BUILD + code)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_constructing_saelens_own_class_warns_once_and_names_ours(interpreter: Interpreter) -> None:
    found = lines(
        interpreter,
        """
for name in ("gated", "sae_lens_gated", "mlp_encoder"):
    print(build(*get_sae_training_class(name)))
print(*build(sae_lens.GatedTrainingSAE, sae_lens.GatedTrainingSAEConfig))
print(build(sae_lens.GatedTrainingSAE, sae_lens.GatedTrainingSAEConfig))
""",
    )
    assert found[:3] == ["[]"] * 3
    assert "not the paper's" in found[3]
    assert "The paper's is sae_gated_plugin.GatedTrainingSAE" in found[3]
    assert found[4:] == ["[]"]


def test_the_switch_makes_saelens_names_ours(interpreter: Interpreter) -> None:
    found = lines(
        interpreter,
        """
import sae_gated_plugin
before = sae_lens.GatedTrainingSAE
sae_gated_plugin.replace_gated()
print(build(sae_lens.GatedTrainingSAE, sae_lens.GatedTrainingSAEConfig))
print(sae_lens.GatedTrainingSAE is sae_gated_plugin.GatedTrainingSAE, before.__module__)
from sae_lens.saes import GatedTrainingSAE
from sae_lens import SAE, GatedSAE
sae = GatedTrainingSAE(sae_lens.GatedTrainingSAEConfig(d_in=4, d_sae=8, target_l0=3))
print(bool((sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6), issubclass(GatedSAE, SAE))
""",
    )
    assert found == ["[]", "True sae_lens.saes.gated_sae", "True True"]
