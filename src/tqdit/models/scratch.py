"""Check the temp directory before PyTorch needs it: one line if there is none, or only a full one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from tqdit.errors import OutputError


def need_compiler() -> None:
    """Import PyTorch's compiler, which the first operation on a tensor without memory does otherwise.

    It makes a folder for what it compiles, a temporary one if no variable names another. An import that failed on
    that cannot be repeated, so Python's own trial of the folder comes first.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        need_temporary_folder()
    with _in_one_line():
        import_module("torch._dynamo")


def need_temporary_folder() -> None:
    """Refuse before PyTorch's exporter fails deep inside."""
    with _in_one_line():
        tempfile.gettempdir()


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise OutputError(
            f"{place}PyTorch finds no place for its temporary files ({error.strerror or error}). Free some space, or "
            "set TMPDIR to a folder that you may write to."
        ) from error
