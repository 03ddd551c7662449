"""Patience with the Hugging Face Hub, and its errors as sentences."""

from __future__ import annotations

import contextlib
import re
import tempfile
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
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from ..errors import HubError, disk_full, first_line

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
    """Around requests: what fails becomes a HubError whose cause is the client's own error."""
    try:
        yield
    except Exception as error:
        # The client wraps an upload or a download that failed in words of its own.
        while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(
            error.__cause__, Exception
        ):
            error = error.__cause__
        if disk_full(error):
            raise error from None
        raise HubError(_sentence(repo, error)) from error


def patiently(attempt: Callable[[], T]) -> T:
    """Try again after faults that pass.

    Everything is safe to repeat: a commit is whole or it is not there, and is made on top of the
    state that was read, or refused (412).
    """
    return Retrying(
        retry=retry_if_exception(_passes),
        wait=_wait,
        stop=stop_after_attempt(1 + len(WAITS)),
        reraise=True,
    )(attempt)


def _passes(error: BaseException) -> bool:
    status = _status(error.__cause__)
    if status is None:
        return _is_connection(error.__cause__)
    return status in (408, 412, 429) or status >= 500


def _wait(state: RetryCallState) -> float:
    """Seconds until the next try: ours, or what the server asks for."""
    error = state.outcome and state.outcome.exception()
    response = getattr(error and error.__cause__, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    wait = [*WAITS, 0.0][state.attempt_number - 1]  # asked for even where it will stop
    return min(MAX_WAIT, max(wait, float(asked))) if re.fullmatch(r"\d+", asked) else wait


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_connection(error: BaseException | None) -> bool:
    """Whether the connection failed, rather than the Hub saying no."""
    if isinstance(error, OfflineModeIsEnabled | HFValidationError | EntryNotFoundError):
        return False
    # By name: the client's HTTP library has been requests, httpx and httpx2.
    module = type(error).__module__
    return isinstance(error, ConnectionError | TimeoutError) or module.startswith(
        ("httpx", "requests")
    )


def _sentence(repo: str, error: Exception) -> str:
    status, reason = _status(error), first_line(error)
    sentences = (
        (
            isinstance(error, OfflineModeIsEnabled),
            f"huggingface_hub is offline: unset HF_HUB_OFFLINE to reach '{repo}' on the Hub.",
        ),
        (
            status == 401 or isinstance(error, LocalTokenNotFoundError),
            "The Hub does not know you: log in with `hf auth login`, or set HF_TOKEN.",
        ),
        (status == 403, f"The Hub does not let you write to '{repo}': it is another account's."),
        (status == 412, f"'{repo}' kept changing while this was pushed; try again."),
        (
            status == 404 or isinstance(error, RepositoryNotFoundError),
            f"There is no repository '{repo}', or you may not see it.",
        ),
        (isinstance(error, HfHubHTTPError), f"The Hub refused the push to '{repo}': {reason}"),
        (_is_connection(error), f"The Hub could not be reached for '{repo}': {reason}"),
        (isinstance(error, OSError), f"What the Hub has of '{repo}' cannot be kept here: {reason}"),
        (True, f"The Hub's answer about '{repo}' cannot be read: {reason}"),
    )
    return next(sentence for applies, sentence in sentences if applies)
