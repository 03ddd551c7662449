"""A stranger's architecture: SAELens's standard SAE under another name."""

import sae_lens


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


TRAINING = (StrangerTrainingSAE, StrangerTrainingConfig)
INFERENCE = (StrangerSAE, StrangerConfig)
