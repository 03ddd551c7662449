from stranger_architecture import INFERENCE, TRAINING, as_jumprelu, describe

from sae_gated_plugin import hookimpl
from sae_gated_plugin.plugins.records import About


@hookimpl
def register_architectures(register):
    about = About("Stranger SAE", describe, as_jumprelu, histograms=("b_enc",))
    register("stranger", training=TRAINING, inference=INFERENCE, about=about)


@hookimpl
def register_losses(register):
    register("half_l1", lambda acts, decoder_norms, n_tokens: acts.sum() / n_tokens / 2)
