"""Code of plugins that runs inside ours: what it raises becomes one of our errors."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from ..errors import PluginError, SaeGatedError, first_line
from ..saelens_internals import InterruptedException


@contextmanager
def isolated(what: str, *passing: type[SaeGatedError]) -> Generator[None]:
    """Turn an exception into a PluginError that says `what` failed.

    passing: errors that the code may raise on purpose. A signal is nobody's failure.
    """
    try:
        yield
    except (InterruptedException, *passing):
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{what} failed: {first_line(error)}") from error
