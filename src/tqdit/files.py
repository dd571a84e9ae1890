"""Files on disk: outputs that are written whole or not at all, folders with one writer, inputs that are read safely.

A file or folder is written under a temporary name beside its final one and renamed when it is complete. The next run
that writes the same output removes the temporary files of a killed run.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from tqdit.bounds import DEFLATE_RATIO, check_claim, check_memory
from tqdit.errors import FileFormatError, InputError, OutputError, TqditError

# What a damaged .npz raises. RuntimeError: a member marked as encrypted.
NPZ_ERRORS = (ValueError, RuntimeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
LOCK = ".lock"  # an empty file in a locked folder
_SUFFIX = ".partial"
T = TypeVar("T")
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # a rename met a full folder or a file
_LONGEST = len("..prepared..1234567890.partial.partial")  # what the names of temporary files add to that of an output
_ADVICE = {
    errno.ENOSPC: "Free some space or choose another place.",
    errno.EFBIG: "Raise the file size limit or choose another place.",
    errno.EROFS: "Choose a place that is not read-only.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit of open files.",
}
_ADVICE_BY_USE = {  # for a missing permission, and for whatever else
    "read": ("Ask its owner for the permission.", "Check the path and the disk."),
    "written": ("Choose a place that you may write to.", "Choose another place."),
    "used": ("Ask for the permission, or choose another place.", "Check the path."),
}


def cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/tqdit/NAME, by default under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "tqdit" / name


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
def whole_folder(path: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a temporary folder; put it in the place of `path` on success, remove it on failure.

    check: raises OutputError if what is at `path` may not be removed. It is asked before the work and after it.
    """
    path = _behind_links(path)
    check(path)
    with temporary_folder(path) as folder:
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                flush(file)
        check(path)
        _swap(folder, path)


def check_only(path: Path, is_ours: Callable[[str], object], what: str, folders: Collection[str] = ()) -> None:
    """Raise OutputError if a folder that is to be replaced is a file, or holds anything but files of ours.

    is_ours: whether tqdit writes a file of this name there. what: such a folder, for the message. folders: those that
    may be there, too.
    """
    if path.name in ("", ".."):
        raise OutputError(f"{path}: cannot be replaced as a whole. Call it by its name, or choose another place.")
    with writing(path):
        if not path.exists():
            return
        entries = sorted(path.iterdir()) if path.is_dir() else [path]
        foreign = [
            entry.name
            for entry in entries
            if not (entry.is_file() and path.is_dir() and is_ours(entry.name))
            and not (entry.is_dir() and not entry.is_symlink() and entry != path and entry.name in folders)
        ]
    if foreign:
        raise OutputError(
            f"{path}: '{foreign[0]}' is not of {what}, and tqdit removes only what it wrote. Choose another name, or "
            "empty the place yourself."
        )


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
        raise OutputError(explain(error, "written", path)) from error


@dataclass(frozen=True)
class Format:
    """What the files of a format are called, and how they begin."""

    name: str
    begin: re.Pattern[bytes]
    least: int  # bytes of the shortest one

    def check(self, path: Path, again: str, error: type[TqditError]) -> None:
        """Raise `error` if a file is too short for the format, or is of another one."""
        if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe may wait for ever
            raise error(f"{path}: a pipe or a device, expected a file. {again}")
        with path.open("rb") as file:
            head = file.read(16)
        if len(head) < self.least:
            raise error(f"{path}: empty or truncated: {len(head)} bytes, expected {self.name}. {again}")
        if not self.begin.match(head):
            raise error(f"{path}: not {self.name}. {again}")


NPZ = Format("an .npz of arrays", re.compile(rb"PK\x03\x04|PK\x05\x06"), 4)
SAFETENSORS = Format("a safetensors file", re.compile(rb".{8}\{", re.DOTALL), 9)
TORCH = Format("a PyTorch checkpoint", re.compile(rb"PK\x03\x04|\x80"), 4)
JSON = Format("a JSON object", re.compile(rb"\s*\{"), 2)
PICTURE = Format("a picture", re.compile(rb"\x89PNG|\xff\xd8|RIFF|BM"), 4)
ONNX = Format("an ONNX file", re.compile(rb"\x08"), 2)


@contextmanager
def reading(
    path: Path, kind: Format, again: str, *damage: type[Exception], error: type[TqditError] = FileFormatError
) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one line that says which: refused, of another format, or damaged.

    again: what to do about a wrong or damaged file, for which `error` is raised. damage: what the format's library
    raises for one. Whatever the system refuses, and a lack of memory, is an InputError.
    """
    try:
        kind.check(path, again, error)  # first, since libraries take a refusal of the system for damage
        yield
    except TqditError:
        raise
    except FileNotFoundError as found:
        raise error(f"{path}: no such file. {again}") from found
    except MemoryError as found:
        raise InputError(explain(found, "read", path)) from found
    except (OSError, *damage) as found:  # type: ignore[misc]  # mypy does not see through the star
        if isinstance(found, OSError) and found.errno not in (None, errno.EINVAL):  # EINVAL: a place that is not there
            raise InputError(explain(found, "read", path)) from found
        reason = str(found).splitlines()[0] if str(found) else type(found).__name__
        raise error(f"{path}: damaged or truncated ({reason}). {again}") from found


def explain(error: OSError | MemoryError, use: str = "used", path: object = None) -> str:
    """One line for what the system refuses. use: 'read', 'written' or 'used'. path: None: the one that it names."""
    if isinstance(error, MemoryError):
        place, advice = f"{path}: " if path else "", "Ask for less at a time, or free some memory."
        return f"{place}out of memory{f' ({error})' if str(error) else ''}. {advice}"
    reason = str(error.strerror or error)
    where = path or error.filename
    permission, other = _ADVICE_BY_USE[use]
    advice = permission if error.errno in (errno.EACCES, errno.EPERM) else _ADVICE.get(error.errno or 0, other)
    return f"{where}: cannot be {use} ({reason}). {advice}" if where else f"{reason}. {advice}"


def check_writable(path: Path) -> None:
    """Raise OutputError if an output cannot be written; called before hours of work, not after."""
    if path.name == "-":
        raise OutputError("-: outputs are files, not the standard output. Choose another name.")
    with writing(path), suppress(FileNotFoundError):
        path.parent.joinpath(path.name + _LONGEST * "x").lstat()  # raises an OSError if temporary names are too long
    with writing(path):
        _require_ordinary(path, lambda: path.is_file() or path.is_dir())
        _make_parent(path)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def sha256(path: Path) -> str:
    """Raises InputError if the system refuses to read the file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(explain(error, "read", path)) from error


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
    """All arrays of an `.npz` file, without pickled objects. Raises FileFormatError for anything else."""
    with reading(path, NPZ, "Write it again.", *NPZ_ERRORS), path.open("rb") as file:
        return parse_npz(str(path), file)


def parse_npz(where: str, file: BinaryIO) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz`; raises NPZ_ERRORS for a damaged one. where: names it in messages."""
    headers = npz_headers(where, file)
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in headers.values())
    check_memory(where, size, "Split the file, or take a machine with more memory.")
    with np.lib.npyio.NpzFile(file, allow_pickle=False) as content:
        return {name: content[name] for name in headers}


def npz_headers(where: str, file: BinaryIO) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of each array of an `.npz`, none of which claims more than the file holds."""
    headers = {}
    length = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            packed = entry.compress_size * (1 if entry.compress_type == zipfile.ZIP_STORED else DEFLATE_RATIO)
            check_claim(where, f"'{name}', compressed,", entry.compress_size, length)
            check_claim(where, f"'{name}'", entry.file_size, packed)
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
                if not all(type(length) is int and length >= 0 for length in shape):
                    raise ValueError(f"'{name}' has the shape {shape}")
                claimed = dtype.itemsize * math.prod(shape)
                check_claim(where, f"'{name}', {dtype} {shape},", claimed, entry.file_size - member.tell())
            headers[name] = dtype, shape
    return headers


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

    For libraries that do not follow symbolic links out of a folder. The target's folder is made if it is missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
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
