"""Engines that were built before: `tqdit-build --cache DIR`.

    DIR/KEY/    an engine bundle; KEY is a SHA-256 over all that decides what it holds

That is the content of every file that the build reads, the settings, the versions of tqdit and of the libraries, and
what the backend builds for: a kind of processor, or a GPU (name, compute capability, multiprocessors) and its driver.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdit.engines.build.backend import builder, choose_backend
from tqdit.engines.build.fastest import build_fastest
from tqdit.engines.bundle import MANIFEST, Manifest, check_overwrite, check_parts, read_manifest, write_manifest
from tqdit.engines.config import BuildConfig, Progress, silent
from tqdit.errors import FileFormatError, TqditWarning, UsageError
from tqdit.extras import installed_packages
from tqdit.files import bring, check_writable, sha256, whole_folder
from tqdit.onnx_file import OnnxFile
from tqdit.version import __version__

UNTOLD = {"timing_cache", "device", "base"}  # settings that name a place; the GPU itself is in the key


def build_cached(
    sources: Sequence[str | Path], output: str | Path, cache: str | Path, backend: str = "onnxruntime",
    config: BuildConfig | None = None, progress: Progress = silent,
) -> tuple[Manifest, Path | None]:  # fmt: skip
    """As `build_fastest`, unless `cache` has the engine; what is built is kept there. Also where it was found, or None.

    A kept engine that is damaged is built again, with a TqditWarning. Raises UsageError with `refit`, which changes an
    engine, and what `build_fastest` raises.
    """
    files, output, config = [Path(source) for source in sources], Path(output), config or BuildConfig()
    if config.refit:
        raise UsageError("--refit changes an engine, --cache keeps engines as they were built. Leave one of them out.")
    if backend == "auto":
        backend, _ = choose_backend()
    kept = Path(cache) / key_of(files, backend, config)
    check_writable(kept)
    if (kept / MANIFEST).exists():
        try:
            manifest = read_manifest(kept)
            check_parts(kept, manifest)
        except FileFormatError as error:
            warnings.warn(f"{error} Building it.", TqditWarning, stacklevel=2)
        else:
            _copy(kept, manifest, output)
            return manifest, kept
    manifest = build_fastest(files, output, backend, config, progress)
    _copy(output, manifest, kept)
    return manifest, None


def key_of(files: Sequence[Path], backend: str, config: BuildConfig) -> str:
    """The name of an engine in a cache. Raises FileFormatError for a file that is damaged or incomplete."""
    facts = {
        "tqdit": __version__,
        "libraries": installed_packages(),
        "backend": backend,
        "place": builder(backend).place(config),
        "config": {name: value for name, value in asdict(config).items() if name not in UNTOLD},
        "files": [[(part.name, sha256(part)) for part in _parts(file)] for file in files],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _parts(file: Path) -> list[Path]:
    """Every file that a build of `file` reads."""
    source = OnnxFile.read(file)
    card, found = source.own_card, [file, *source.weight_files]
    if card.vae is not None:
        decoder = OnnxFile.read(file.parent / card.vae.file)
        found += [decoder.path, *decoder.weight_files]
    if card.text is not None:
        card.text.check(file.parent)
        found += [file.with_name(name) for name in card.text.files]
    return sorted(found)


def _copy(bundle: Path, manifest: Manifest, target: Path) -> None:
    """The bundle in another place: second names of its files if the disk can, since nothing changes them."""
    with whole_folder(target, check_overwrite) as folder:
        for name in manifest.files:
            bring(bundle / name, folder / name)
        write_manifest(folder, manifest)
