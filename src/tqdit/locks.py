"""One writer per folder.

The lock is the operating system's (flock), so a killed owner frees it at once; the file holds the owner's process id
for the message alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdit.errors import OutputError
from tqdit.files import writing

LOCK = ".lock"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an existing folder for this process alone.

    Raises OutputError where another process holds it. On systems without flock, and on file systems that refuse it,
    nothing is locked.
    """
    path = folder / LOCK
    with writing(folder):
        file = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock goes: whoever waits for it looks at the name again
        os.close(file)


def _acquire(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _try_lock(file):
                raise OutputError(
                    f"{path.parent}: process {_owner(path)} is writing it. Wait for its end, or choose another place."
                )
            if _is_still(file, path):
                os.ftruncate(file, 0)
                os.write(file, str(os.getpid()).encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its owner removed it between our two calls


def _try_lock(file: int) -> bool:
    """False where another process holds it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return True
    return True


def _is_still(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    return text if text.isdigit() else "another"
