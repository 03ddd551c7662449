"""The command line `sae-gated`."""

from ..old_paths import names_of

__getattr__ = names_of("cli")
