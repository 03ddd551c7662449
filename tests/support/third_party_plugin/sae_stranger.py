from stranger_architecture import INFERENCE, TRAINING

from sae_gated_plugin import hookimpl


@hookimpl
def register_architectures(register):
    register("stranger", training=TRAINING, inference=INFERENCE)


@hookimpl
def register_losses(register):
    register("half_l1", lambda acts, decoder_norms, n_tokens: acts.sum() / n_tokens / 2)
