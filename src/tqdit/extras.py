"""Imports of optional libraries; the error for a missing one holds the pip command."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType

from tqdit.errors import MissingLibraryError


def need(module: str, extra: str, why: str) -> ModuleType:
    """Import `module`, which the extra `extra` installs; `why` begins the sentence '... needs'."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise missing(module, extra, why) from error


def missing(module: str, extra: str, why: str) -> MissingLibraryError:
    return MissingLibraryError(f"{why} needs {module.split('.')[0]}, which is not installed. Run: {install(extra)}")


def install(extra: str) -> str:
    """The command that installs the libraries of an extra. It names them, for tqdit is on no package index."""
    libraries = dict.fromkeys(_libraries(extra)) or [f".[{extra}]"]  # the installed metadata is missing, or older
    return f"pip install {shlex.join(libraries)}"


def _libraries(extra: str) -> Iterator[str]:
    """The requirements of an extra, as pyproject.toml lists them, without their conditions on the platform."""
    try:
        lines = metadata.requires("tqdit") or ()
    except metadata.PackageNotFoundError:  # a clone whose tqdit is not installed
        lines = ()
    for line in lines:
        requirement, _, condition = (part.strip() for part in line.partition(";"))
        if re.search(rf"""\bextra == ["']{extra}["']""", condition):
            inner = re.fullmatch(r"tqdit\[(.+)\]", requirement)
            for name in inner[1].split(",") if inner else ():
                yield from _libraries(name)
            if not inner:
                yield requirement
