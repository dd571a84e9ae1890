"""Outputs appear whole or not at all; inputs are checked by their SHA-256.

A file or folder is written under a temporary name beside its final one and renamed when it is complete. What a killed
run left behind is removed by the next run that writes the same output.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdit.errors import OutputError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` on success, remove it on failure."""
    temporary = temporary_name(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; put it in the place of `path` on success, remove it on failure."""
    with temporary_folder(path) as folder:
        yield folder
        with writing(path):
            for file in folder.rglob("*"):
                if file.is_file():
                    flush(file)
            _swap(folder, path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to prepare it in; removed at the end or, if this run is killed, by the next one."""
    folder = temporary_name(path)
    try:
        with writing(path):
            folder.mkdir(parents=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that names the output."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = {
            errno.ENOSPC: "Free some space or choose another place.",
            errno.EFBIG: "Raise the file size limit or choose another place.",
            errno.EACCES: "Choose a place that you may write to.",
            errno.EROFS: "Choose a place that is not read-only.",
        }.get(error.errno or 0, "Choose another place.")
        raise OutputError(f"{path}: cannot be written ({reason}). {advice}") from error


def check_writable(path: Path) -> None:
    """Refuse an output that could not be written, before hours of work and not after."""
    with writing(path):
        parent = path.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "its parent is not a folder")
        if not os.access(parent, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_name(path: Path) -> Path:
    """A fresh temporary name beside `path`, after removing those of runs that are dead."""
    prefix, suffix = f".{path.name}.", ".partial"
    if path.parent.is_dir():
        for old in path.parent.iterdir():
            if old.name.startswith(prefix) and old.name.endswith(suffix):
                owner = old.name[len(prefix) : -len(suffix)]
                if owner.isdigit() and not _alive(int(owner)):
                    shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
    return path.parent / f"{prefix}{os.getpid()}{suffix}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()


def flush(path: Path) -> None:
    """To the disk before the rename, so that a power cut cannot leave a complete name on incomplete content."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _swap(new: Path, path: Path) -> None:
    """Put folder `new` at `path`; the old content, if any, ends up under the temporary name."""
    if not path.exists():
        os.rename(new, path)
        return
    if _exchange(new, path):
        return
    aside = new.with_name(new.name.replace(".partial", ".old"))
    os.rename(path, aside)
    os.rename(new, path)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step, where the system can."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)
