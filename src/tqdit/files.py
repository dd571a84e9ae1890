"""Files on disk: outputs that are written whole or not at all, folders with one writer, arrays that are read safely.

A file or folder is written under a temporary name beside its final one and renamed when it is complete. The next run
that writes the same output removes the temporary files of a killed run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from tqdit.errors import FileFormatError, OutputError

# Damaged files raise all of these. RuntimeError: a member marked as encrypted; MemoryError: a shape that is too large.
_NPZ_ERRORS = (OSError, ValueError, RuntimeError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)
LOCK = ".lock"  # an empty file in a locked folder
_SUFFIX = ".partial"
T = TypeVar("T")
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # a rename met a full folder or a file


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
    """Yield a folder beside `path` to prepare it in. It is removed at the end or, after a kill, by the next run."""
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
    """Turn an OSError into an OutputError: one line that names the output."""
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
    """Raise OutputError if an output cannot be written; called before hours of work, not after."""
    with writing(path):
        _require_ordinary(path, lambda: path.is_file() or path.is_dir())
        _make_parent(path)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Version(msgspec.Struct):
    """The part of a record that has the same form in every version."""

    format_version: int


def decode_record(text: str | bytes, kind: type[T], version: int, where: str, advice: str) -> T:
    """A dataclass from JSON with a `format_version`. Raises FileFormatError if it is damaged or of another version."""
    try:
        found = msgspec.json.decode(text, type=_Version).format_version
        if found == version:
            return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise FileFormatError(f"{where}: damaged ({error}). {advice}") from error
    raise FileFormatError(
        f"{where}: written in format {found}, this tqdit reads format {version}. {advice} Or install the tqdit that "
        "wrote it."
    )


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz` file, without pickled objects. Raises FileFormatError if it cannot be read."""
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except _NPZ_ERRORS as error:
        raise FileFormatError(f"{path}: damaged, or not an .npz of plain arrays ({error}). Write it again.") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy returns other members of the zip file as bytes
            raise FileFormatError(f"{path}: '{name}' is not an array. Write it again.")
    return arrays


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and this process its only writer. The lock ends with the process, even if it is killed.

    Raises OutputError if another process holds it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / LOCK).acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"{folder}: another process is writing it. Wait until it ends, or choose another folder."
            ) from error
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()  # filelock refuses a lock on a removed file: the next owner makes a new one


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, with every link followed, lies in `folder` or in the cache of a model hub that holds the folder.

    Such a cache keeps links in `snapshots/REVISION` to files in `blobs`.
    """
    real, tree = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    caches = (parent.parent / "blobs" for parent in tree.parents if parent.name == "snapshots")
    return any(real.is_relative_to(place) for place in (tree, *caches))


def _behind_links(path: Path) -> Path:
    """The target of a link: it is replaced, and the link stays."""
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
    """Remove the temporary files that killed runs left beside `path`."""
    prefix = f".{path.name}."
    for old in path.parent.iterdir():
        if old.name.startswith(prefix) and old.name.endswith(_SUFFIX):
            owner = old.name[len(prefix) :].split(".")[0]
            if owner.isdigit() and not _alive(int(owner)):
                _remove(old)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder if it exists; ignore what cannot be removed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _require_ordinary(path: Path, is_ordinary: Callable[[], bool]) -> None:
    """Raise FileExistsError for a device or a pipe, which a rename would replace by a file."""
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
    """Give a file a second name: a hard link, or a copy if the two are on different disks.

    For libraries that do not follow symbolic links out of a folder.
    """
    try:
        target.hardlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, target)


def flush(path: Path) -> None:
    """Write a file to the disk before its rename: after a power cut, a file with its final name is complete."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _swap(new: Path, path: Path) -> None:
    """Put folder `new` at `path`. What was there moves aside first, and returns if the second rename fails."""
    aside = new.with_name(f"{new.name}{_SUFFIX}")
    while not _rename(new, path, aside):  # again if another run puts its own folder there between the two renames
        _remove(aside)
        with suppress(FileNotFoundError):
            path.rename(aside)
    _remove(aside)


def _rename(new: Path, path: Path, aside: Path) -> bool:
    """False if something is at `path`."""
    try:
        new.rename(path)
    except OSError as error:
        if error.errno in _OCCUPIED:
            return False
        with suppress(OSError):
            aside.rename(path)
        raise
    return True
