"""The sparse core's old place, until its callers have moved."""

from .core.active import (
    Active,
    Backend,
    decode_active,
    decode_both,
    decode_matrix,
    dense_form,
    encode_active,
    tangent_gradient,
)
from .core.cost import CROSSOVER_DENSITY, MIN_TOKENS

__all__ = [
    "CROSSOVER_DENSITY",
    "MIN_TOKENS",
    "Active",
    "Backend",
    "decode_active",
    "decode_both",
    "decode_matrix",
    "dense_form",
    "encode_active",
    "tangent_gradient",
]
