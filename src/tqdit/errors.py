"""Everything that TQDiT raises on purpose.

A message is one line that names the thing, what was found, what was expected and what to do. A command prints it and
exits with 1, or with 2 where the command line itself was wrong.

    TqditError
    |-- UsageError            a value that the caller passed
    |-- CheckpointError       a model that cannot be loaded
    |-- FileFormatError       a file of ours that is damaged, truncated, altered or of an unknown version
    |-- LintError             an ONNX file that a backend would refuse or run in float without a word
    |-- OutputError           an output that cannot be written
    |-- MissingLibraryError   an extra that is not installed
    |-- BackendError          an engine that cannot be built or run here
    `-- SamplingError         a chain that went wrong (NaN) or was stopped
        |-- SamplingStopped
        |-- QueueFullError    a request that a StepBatcher has no place for
        `-- DeadlineError     a request that was not done in time
"""

from __future__ import annotations


class TqditError(Exception):
    """Base of every error that TQDiT raises on purpose."""


class UsageError(TqditError, ValueError):
    """A value that the caller passed is not usable."""


class CheckpointError(TqditError):
    """A model checkpoint cannot be loaded."""


class FileFormatError(TqditError):
    """A file of ours is damaged, truncated, altered, or of an unknown version."""


class LintError(TqditError):
    """An ONNX file that a backend would refuse, or run in float or wrongly without a word."""


class OutputError(TqditError):
    """An output cannot be written."""


class MissingLibraryError(TqditError, ImportError):
    """A library that a stage needs is not installed; the message holds the pip command."""


class BackendError(TqditError):
    """An engine cannot be built or run on this machine."""


class SamplingError(TqditError):
    """A sampling chain went wrong."""


class SamplingStopped(SamplingError):  # noqa: N818 (a caller's wish, not a failure)
    """A callback asked to stop; nothing was written."""


class QueueFullError(SamplingError):
    """A StepBatcher has as many unfinished requests as it takes; nothing was queued."""


class DeadlineError(SamplingError, TimeoutError):
    """A request's deadline passed before its image was done."""
