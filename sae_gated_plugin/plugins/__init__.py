"""The pluggy hooks, what plugins registered, and the bridge into SAELens."""

from ..old_paths import names_of

__getattr__ = names_of("plugins")
