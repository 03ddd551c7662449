"""Better codes than an encoder's on the same decoder: pursuits, FISTA, exact refits."""

from ..old_paths import names_of
from .codes import SparseCodes
from .fista import fista
from .problem import refit
from .pursuit import gradient_pursuit, matching_pursuit

__all__ = ["SparseCodes", "fista", "gradient_pursuit", "matching_pursuit", "refit"]

__getattr__ = names_of("sparse_coding")
