"""Better codes than an encoder's on the same decoder: pursuits, FISTA, exact refits."""

from ..old_paths import names_of

__getattr__ = names_of("sparse_coding")
