"""A third-party architecture: SAELens's standard SAE under another name."""

import sae_lens
import torch


class StrangerTrainingConfig(sae_lens.StandardTrainingSAEConfig):
    @classmethod
    def architecture(cls):
        return "stranger"


class StrangerConfig(sae_lens.StandardSAEConfig):
    @classmethod
    def architecture(cls):
        return "stranger"


class StrangerTrainingSAE(sae_lens.StandardTrainingSAE):
    pass


class StrangerSAE(sae_lens.StandardSAE):
    pass


def describe(config):
    return f"{config['d_sae']} latents of its own"


def as_jumprelu(sae):
    return sae.W_enc, sae.b_enc, torch.zeros_like(sae.b_enc), sae.W_dec, sae.b_dec


TRAINING = (StrangerTrainingSAE, StrangerTrainingConfig)
INFERENCE = (StrangerSAE, StrangerConfig)
