"""Training one SAE: run folder, checkpoints, exact resume, divergence."""

from ..old_paths import names_of

__getattr__ = names_of("training")
