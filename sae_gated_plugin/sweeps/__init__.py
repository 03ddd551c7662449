"""Many SAEs of one grid, on one stream of activations or on Ray."""

from ..old_paths import names_of

__getattr__ = names_of("sweeps")
