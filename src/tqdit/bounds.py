"""Bounds of what comes from outside: counts that a user names, and sizes that the header of a file claims.

They are checked before anything of that size is allocated, written or waited for.
"""

from __future__ import annotations

import math
import operator
import os
import shutil
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

from tqdit.errors import FileFormatError, OutputError, UsageError

# More than any use of them; one more digit by mistake is refused.
MOST_THREADS = 1024
MOST_BATCH = 2**16  # images per engine call
MOST_SHARDS = 100_000  # the index of a folder lists each of them, and is written again after each
MOST_RESAMPLES = 100_000
MOST_SEEDS = 1000
MOST_SIDE = 16384  # pixels
MOST_TEXT_BYTES = 2**24  # of a file of prompts, or of all prompts of a command
MOST_GUIDANCE = 1000.0  # beyond it, float32 states overflow
BLOCKS = (4, 16, 64, 256)  # of channels that a rotation takes (tqdit.models.rotation)
DEFLATE_RATIO = 1032  # bytes that one compressed byte can unpack to at most, by the format


def check_count(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The whole number. Raises UsageError for anything else, for a fraction as well, and outside least..most."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        known = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{name} is {value!r}; expected a whole number {known}.")
    return number


def check_number(name: str, value: Any, least: float, most: float) -> float:
    """The finite number. Raises UsageError for anything else and outside least..most."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not least <= number <= most:
        raise UsageError(f"{name} is {value!r}; expected a finite number from {least:g} to {most:g}.")
    return number


def check_memory(what: str, size_bytes: int, advice: str) -> None:
    """Raise UsageError if this many bytes at once are more than the machine or its container has left."""
    left = memory_left()
    if size_bytes > left:
        raise UsageError(
            f"{what}: {_gigabytes(size_bytes)} of memory are needed, {_gigabytes(left)} are free. {advice}"
        )


def check_disk(path: Path, size_bytes: int, advice: str) -> None:
    """Raise OutputError if this many bytes are more than the disk of an output has left."""
    place = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    left = shutil.disk_usage(place).free
    if size_bytes > left:
        raise OutputError(f"{path}: needs {_gigabytes(size_bytes)}, the disk has {_gigabytes(left)} free. {advice}")


def check_claim(where: str, what: str, claimed: int, held: int) -> None:
    """Raise FileFormatError if the header of a file claims more bytes than the file holds."""
    if claimed > held:
        raise FileFormatError(f"{where}: {what} claims {claimed} bytes, the file holds {held}. Get or write it again.")


def memory_left() -> float:
    """Bytes that can still be taken, as far as the system says; infinite if it does not."""
    left = [math.inf]
    with suppress(OSError, ValueError, AttributeError):
        left.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError, IndexError):  # Linux: what is free or can be freed
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        left += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container; 'max' if it has none
        with suppress(OSError, ValueError):
            left.append(int(Path("/sys/fs/cgroup", limit).read_text(encoding="ascii")))
    return min(left)


def _gigabytes(size_bytes: float) -> str:
    return f"{max(size_bytes, 0) / 1e9:,.1f} GB"
