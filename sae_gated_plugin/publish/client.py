"""Patience with the Hugging Face Hub, and its errors as sentences."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Generator
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..errors import HubError, SaeGatedError, disk_full, first_line

T = TypeVar("T")

#: Seconds to wait before each new try after a fault of the server or the connection.
WAITS = (1.0, 4.0, 15.0)

#: The longest that a server may ask us to wait.
MAX_WAIT = 120.0


@contextlib.contextmanager
def room_on_disk() -> Generator[None]:
    """Say in a sentence that a disk is full: a commit is the last thing that needs one."""
    try:
        yield
    except Exception as error:
        if isinstance(error, HubError) or not disk_full(error):
            raise
        raise HubError(
            f"There is no room for the copies that a push makes ({first_line(error)}); no half of "
            f"it was sent. Make room in '{tempfile.gettempdir()}' and '{constants.HF_HOME}', or "
            "choose other folders with TMPDIR and HF_HOME, and push again."
        ) from error


@contextlib.contextmanager
def answering(repo: str) -> Generator[None]:
    """Say of an answer that the client stumbles over, such as a proxy's, that it is none."""
    try:
        yield
    except (HfHubHTTPError, EntryNotFoundError, OSError):
        raise  # the client's own words, for `_sentence`
    except Exception as error:
        if _is_connection(error) or isinstance(error.__cause__, OSError | HfHubHTTPError):
            raise
        raise HubError(
            f"The Hub's answer about '{repo}' cannot be read: {first_line(error)}"
        ) from error


def patiently(repo: str, attempt: Callable[[], T]) -> T:
    """Try again after faults that pass; say the others in a sentence.

    Everything is safe to repeat: a commit is whole or it is not there, and is made on top of the
    state that was read, or refused (412).
    """
    waits = list(WAITS)
    while True:
        try:
            return attempt()
        except SaeGatedError:
            raise
        except Exception as error:
            cause = _root(error)
            wait = _wait(cause, waits)
            if wait is None:
                raise _sentence(repo, cause) from error
            time.sleep(wait)


def _root(error: Exception) -> Exception:
    """What lies behind the client's own words for an upload or a download that failed."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(
        error.__cause__, Exception
    ):
        error = error.__cause__
    return error


def _wait(error: Exception, waits: list[float]) -> float | None:
    """Seconds until the next try, or None where there should be none."""
    status = _status(error)
    passes = status in (408, 412, 429) or (status is not None and status >= 500)
    if not waits or not (passes or (status is None and _is_connection(error))):
        return None
    wait = waits.pop(0)
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(MAX_WAIT, max(wait, float(asked))) if re.fullmatch(r"\d+", asked) else wait


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_connection(error: Exception) -> bool:
    """Whether the connection failed, rather than the Hub saying no."""
    if isinstance(error, OfflineModeIsEnabled | HFValidationError | EntryNotFoundError):
        return False
    # By name: the client's HTTP library has been requests, httpx and httpx2.
    module = type(error).__module__
    return isinstance(error, ConnectionError | TimeoutError) or module.startswith(
        ("httpx", "requests")
    )


def _sentence(repo: str, error: Exception) -> Exception:
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("huggingface_hub is offline (HF_HUB_OFFLINE); --dry-run needs no Hub.")
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return HubError("The Hub does not know you: log in with `hf auth login`, or set HF_TOKEN.")
    if status == 403:
        return HubError(f"The Hub does not let you write to '{repo}': it is somebody else's.")
    if status == 412:
        return HubError(f"'{repo}' kept changing while this was pushed; try again.")
    if status == 404 or isinstance(error, RepositoryNotFoundError):
        return HubError(f"There is no repository '{repo}', or it is not yours to see.")
    if isinstance(error, HfHubHTTPError):
        return HubError(f"The Hub refused the push to '{repo}': {first_line(error)}")
    if _is_connection(error):
        return HubError(f"The Hub could not be reached for '{repo}': {first_line(error)}")
    if isinstance(error, OSError) and not disk_full(error):
        return HubError(f"What the Hub has of '{repo}' cannot be kept here: {first_line(error)}")
    return error
