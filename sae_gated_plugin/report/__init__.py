"""From results.json files to one page with figures and comparisons; loads no model."""

from ..old_paths import names_of

__getattr__ = names_of("report")
