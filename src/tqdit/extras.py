"""Imports of optional libraries; the error for a missing one holds the pip command."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata, util
from types import ModuleType

from tqdit.errors import MissingLibraryError

PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-cu12", "tensorrt-cu13",
    "tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "polygraphy", "cuda-python", "cuda-core", "triton",
    "onnx", "onnx-ir", "torch", "diffusers", "transformers", "safetensors", "tokenizers", "pycuda",
)  # fmt: skip


def need(module: str, extra: str, why: str) -> ModuleType:
    """Import `module`, which the extra `extra` installs; `why` begins the sentence '... needs'."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise missing(module, extra, why) from error


def need_part(part: str, why: str) -> None:
    """Raise MissingLibraryError if a package of tqdit is not there: the distribution `tqdit-runtime` has the run side
    alone.
    """
    if util.find_spec(part) is None:
        raise MissingLibraryError(f"{why} needs {part}, which tqdit-runtime leaves out. Install tqdit in its place.")


def missing(module: str, extra: str, why: str) -> MissingLibraryError:
    return MissingLibraryError(f"{why} needs {module.split('.')[0]}, which is not installed. Run: {install(extra)}")


def install(extra: str) -> str:
    """The command that installs the libraries of an extra. It names them, for tqdit is on no package index."""
    libraries = dict.fromkeys(_libraries(extra)) or [f".[{extra}]"]  # the installed metadata is missing, or older
    return f"pip install {shlex.join(libraries)}"


def _libraries(extra: str) -> Iterator[str]:
    """The requirements of an extra, as pyproject.toml lists them, without their conditions on the platform."""
    for line in _requirements():
        requirement, _, condition = (part.strip() for part in line.partition(";"))
        if re.search(rf"""\bextra == ["']{extra}["']""", condition):
            inner = re.fullmatch(r"tqdit(?:-runtime)?\[(.+)\]", requirement)
            for name in inner[1].split(",") if inner else ():
                yield from _libraries(name)
            if not inner:
                yield requirement


def _requirements() -> list[str]:
    for distribution in ("tqdit", "tqdit-runtime"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.requires(distribution) or []
    return []  # a clone whose tqdit is not installed


def installed_packages() -> dict[str, str]:
    """Versions of the distributions that tqdit knows."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
