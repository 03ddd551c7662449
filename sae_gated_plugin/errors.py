"""What can go wrong, said in a sentence: the command line turns each of these into exit code 2."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

#: Characters of an error's text that are shown: what was given can be a whole file.
LONGEST_TEXT = 2000


def one_line(text: str) -> str:
    """Return text as one line that any terminal can show: no control character, no screenful."""
    line = re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text.strip())
    if len(line) > LONGEST_TEXT:
        line = line[:LONGEST_TEXT] + " …"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class SaeGatedError(Exception):
    """Base of every error of ours; its text is meant for the person at the keyboard."""

    def __str__(self) -> str:
        # Exception's: KeyError's is the repr of its argument, with quotes around the sentence.
        return one_line(Exception.__str__(self))


class ConfigError(SaeGatedError, ValueError):
    """A configuration file, override or option that cannot be used."""


class UnknownArchitecture(SaeGatedError, KeyError):
    """An architecture name that nothing has registered."""


class PluginError(SaeGatedError):
    """A plugin that does not load, registers nonsense, or claims a name that has an owner."""


class ArtifactError(SaeGatedError):
    """A run folder, checkpoint or weights file that is missing, damaged or somebody else's."""


class HubError(SaeGatedError):
    """The Hugging Face Hub refused something, or could not be reached."""


class UndefinedMetric(SaeGatedError):
    """A metric that has no value on this data; the text says why."""


class TrainingDiverged(SaeGatedError):
    """Numbers that are not finite, or an L0 that collapsed, before this step of a training."""

    def __init__(self, step: int, reason: str):
        super().__init__(step, reason)  # both in args, or it could not be pickled
        self.step, self.reason = step, reason

    def __str__(self) -> str:
        return f"Training stopped before step {self.step}: {self.reason}"


class Interrupted(KeyboardInterrupt):
    """A signal ended the training; the text says what is saved. exit_code: 128 + the signal's."""

    def __init__(self, number: int, sentence: str):
        super().__init__(sentence)
        self.exit_code = 128 + number


def disk_full(error: BaseException) -> bool:
    """Whether there was no room left, in the words of the system, of torch or of safetensors."""
    return any(words in str(error) for words in ("No space left", "Disk quota exceeded"))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for a name that is not among the known ones."""
    names = sorted(known)
    return f"Unknown {what} '{name}'; known: {', '.join(names)}.{nearest(name, names)}"


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return the name of an error and the first line of its text, for use inside a sentence.

    Where that line only announces what follows, as in "one of:", the rest is with it.
    """
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a stranger's error may fail even at this
        lines = []
    if lines and not lines[0].rstrip().endswith(":"):
        del lines[1:]
    text = one_line(" ".join(line.strip() for line in lines))
    text = text if len(text) <= limit else text[:limit] + " …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
