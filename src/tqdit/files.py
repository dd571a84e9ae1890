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
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdit.errors import OutputError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SUFFIX = ".partial"
_ZIP_END = struct.Struct("<4s4HIIH")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` on success, remove it on failure."""
    path = _behind_links(path)
    temporary = _temporary_path(path)
    try:
        with writing(path):
            _require_ordinary(path, path.is_file)
            _make_parent(path)
            _remove_leftovers(path)
            yield temporary
            flush(temporary)
            temporary.replace(path)
    finally:
        _remove(temporary)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; put it in the place of `path` on success, remove it on failure."""
    path = _behind_links(path)
    with temporary_folder(path) as folder:
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                flush(file)
        _swap(folder, path)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to prepare it in; removed at the end or, if this run is killed, by the next one."""
    folder = _temporary_path(path)
    try:
        with writing(path):
            _make_parent(path)
            _remove_leftovers(path)
            folder.mkdir()
            yield folder
    finally:
        _remove(folder)


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
        _require_ordinary(path, lambda: path.is_file() or path.is_dir())
        _make_parent(path)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_listing(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise BadZipFile where the file's end counts other members than were found: zipfile stops early without a word
    where a length in its list is wrong, and an array would be missing."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _ZIP_END.size))
        end = file.read(_ZIP_END.size)
    if end[:4] != b"PK\5\6":  # a comment follows
        return
    count, found = _ZIP_END.unpack(end)[4], len(archive.infolist())
    if found != count != 0xFFFF:  # which stands for more
        raise zipfile.BadZipFile(f"{found} members, its end counts {count}")


def _behind_links(path: Path) -> Path:
    """Where `path` is a link, its target is replaced and the link stays."""
    with suppress(OSError):
        return Path(os.path.realpath(path)) if path.is_symlink() else path
    return path


def _make_parent(path: Path) -> None:
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"'{path.parent}' is not a folder")
    path.parent.mkdir(parents=True, exist_ok=True)


def _temporary_path(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}{_SUFFIX}"


def _remove_leftovers(path: Path) -> None:
    """What dead runs left beside `path`."""
    prefix = f".{path.name}."
    for old in path.parent.iterdir():
        if old.name.startswith(prefix) and old.name.endswith(_SUFFIX):
            owner = old.name[len(prefix) :].split(".")[0]
            if owner.isdigit() and not _alive(int(owner)):
                _remove(old)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there and as far as it goes."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _require_ordinary(path: Path, is_ordinary: Callable[[], bool]) -> None:
    """A rename would put a file in the place of a device or a pipe."""
    if path.exists() and not is_ordinary():
        raise FileExistsError(errno.EEXIST, "something other than a file is there")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return pid != os.getpid()


def bring(file: Path, target: Path) -> None:
    """The same content under another name: a hard link, or a copy where the two lie on different disks.

    For libraries that follow no symbolic links out of a folder.
    """
    try:
        target.hardlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, target)


def flush(path: Path) -> None:
    """To the disk before the rename, so that a power cut cannot leave a complete name on incomplete content."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _swap(new: Path, path: Path) -> None:
    """Put folder `new` at `path` in one step (two where the system cannot exchange names); the old content, if any,
    ends up under the temporary name or is removed."""
    try:
        if not path.exists():
            new.rename(path)
            return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another run has put its own there meanwhile
            raise
    if _exchange(new, path):
        return
    aside = new.with_name(f"{new.name}{_SUFFIX}")
    path.rename(aside)
    try:
        new.rename(path)
    except OSError:
        aside.rename(path)
        raise
    _remove(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step, where the system can."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)
