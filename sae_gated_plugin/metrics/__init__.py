"""Streaming metrics of reconstructions, firing and the decoder."""

from ..old_paths import names_of

__getattr__ = names_of("metrics")
