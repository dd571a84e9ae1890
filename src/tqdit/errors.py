"""Everything that TQDiT raises on purpose.

A message is one line that names the thing, what was found, what was expected and what to do. A command prints it and
exits with 1, or with 2 if the command line is wrong.

    TqditError
    |-- UsageError            a value that the caller passed
    |-- CheckpointError       a model that cannot be loaded
    |-- FileFormatError       a file of TQDiT that is damaged or of an unknown version
    |-- LintError             an ONNX file that a backend would refuse, or run in float without a message
    |-- InputError            a file that the system does not let us read, or that does not fit into memory
    |-- OutputError           an output that cannot be written
    |-- MissingLibraryError   an extra that is not installed
    |-- BackendError          an engine that cannot be built or run here
    |   `-- VerificationError an engine that does not compute what its golden calls say
    `-- SamplingError         a chain that became NaN or was stopped
        |-- SamplingStopped
        |-- QueueFullError    a request that the full queue of a StepBatcher refuses
        `-- DeadlineError     a request that missed its deadline
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


class TqditError(Exception):
    """Base of every error that TQDiT raises on purpose."""


class UsageError(TqditError, ValueError):
    """A value that the caller passed is not usable."""


class CheckpointError(TqditError):
    """A model checkpoint cannot be loaded."""


class FileFormatError(TqditError):
    """A file of TQDiT is damaged, truncated or of an unknown version, or a bundle or shard was altered."""


class LintError(TqditError):
    """A backend would refuse an ONNX file, or run it in float or wrongly without a message."""


class InputError(TqditError):
    """The system refuses to read a file, or its content does not fit into memory."""


class OutputError(TqditError):
    """An output cannot be written."""


class MissingLibraryError(TqditError, ImportError):
    """A library that a stage needs is not installed; the message holds the pip command."""


class BackendError(TqditError):
    """An engine cannot be built or run on this machine."""


class VerificationError(BackendError):
    """An engine's error on golden calls is larger than that of the fake-quantized network."""


class SamplingError(TqditError):
    """A sampling chain cannot go on: NaN, or stopped."""


class SamplingStopped(SamplingError):  # noqa: N818 (not a failure: the caller asked for it)
    """A callback stopped the chain; nothing was written."""


class QueueFullError(SamplingError):
    """The queue of a StepBatcher is full; the request was not queued."""


class DeadlineError(SamplingError, TimeoutError):
    """The deadline of a request passed before its image was finished."""


class TqditWarning(UserWarning):
    """Something was assumed, or is not as a user may expect; the result may differ from what was meant."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Of the known names the one most like a wrong one, for messages."""
    return max(known, key=lambda other: SequenceMatcher(None, name, other).ratio(), default="none")


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error of another library says, in one line of at most so many characters; else the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
