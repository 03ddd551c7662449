"""SAEs on data of known features."""

from ..old_paths import names_of

__getattr__ = names_of("toy")
