"""Engines that were built before: `tqdit-build --cache DIR`.

    DIR/KEY/    an engine bundle; KEY is a SHA-256 over all that decides what it holds

That is the content of every file that the build reads, the settings, tqdit's own sources, the versions of the
libraries, and what the backend builds for: a kind of processor, or a GPU (name, compute capability, multiprocessors)
and its driver. Of several files, the fastest of which is kept, it is also the machine that measures them.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from tqdit.engines import cpu
from tqdit.engines.build.backend import builder, choose_backend
from tqdit.engines.build.fastest import build_fastest
from tqdit.engines.bundle import FORECAST, Manifest, check_overwrite, check_parts, read_manifest, write_manifest
from tqdit.engines.config import BuildConfig, Progress, silent
from tqdit.engines.doctor import find_gpus
from tqdit.errors import FileFormatError, OutputError, TqditWarning, UsageError
from tqdit.extras import installed_packages
from tqdit.files import bring, check_only, check_writable, sha256, whole_folder
from tqdit.onnx_file import OnnxFile

PACKAGE = Path(__file__).parents[2]  # tqdit's sources: clones of many states have the same version
UNTOLD = {"timing_cache", "device", "base"}  # settings that name a place; the GPU itself is in the key


def build_cached(
    sources: Sequence[str | Path], output: str | Path, cache: str | Path | None, backend: str = "onnxruntime",
    config: BuildConfig | None = None, progress: Progress = silent,
) -> tuple[Manifest, Path | None]:  # fmt: skip
    """As `build_fastest`, unless `cache` has the engine; what is built is kept there. Also where it was found, or None.

    cache: a folder; None: nothing is looked for or kept.

    A kept engine that is damaged is built again, and one that cannot be kept after all is built all the same, both with
    a TqditWarning. Raises UsageError with `refit`, which changes an engine, OutputError before the build if nothing can
    be written to the cache, and what `build_fastest` raises.
    """
    files, output, config = [Path(source) for source in sources], Path(output), config or BuildConfig()
    if cache is None:
        return build_fastest(files, output, backend, config, progress), None
    if config.refit:
        raise UsageError("--refit changes an engine, --cache keeps engines as they were built. Leave one of them out.")
    if output.resolve() in (Path(cache).resolve() / "KEY").parents:
        raise UsageError(f"--cache {cache}: lies in the engine {output}, which is replaced. Choose another folder.")
    if backend == "auto":
        backend, _ = choose_backend()
    kept = Path(cache) / key_of(files, backend, config)
    try:
        manifest = _whole(kept)
    except FileFormatError as error:
        warnings.warn(f"{error} Building it.", TqditWarning, stacklevel=2)
        manifest = None
    if manifest is not None:
        _copy(kept, manifest, output, check_overwrite)
        return manifest, kept
    check_writable(kept)
    manifest = build_fastest(files, output, backend, config, progress)
    if len(files) > 1 and not manifest.measured:
        return manifest, None  # the first of the files, which another build may not take for the fastest
    try:
        _keep(output, manifest, kept)
    except OutputError as error:
        warnings.warn(f"{error} The engine is built and not kept.", TqditWarning, stacklevel=2)
    return manifest, None


def key_of(files: Sequence[Path], backend: str, config: BuildConfig) -> str:
    """The name of an engine in a cache. Raises FileFormatError for a file that is damaged or incomplete."""
    facts = {
        "tqdit": _sources(),
        "libraries": installed_packages(),
        "backend": backend,
        "place": builder(backend).place(config),
        "measured": str((cpu.features(), os.cpu_count(), *find_gpus())) if len(files) > 1 else "",
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


def _sources() -> dict[str, str]:
    """SHA-256 of each module of tqdit."""
    return {str(file.relative_to(PACKAGE)): sha256(file) for file in sorted(PACKAGE.rglob("*.py"))}


def _whole(kept: Path) -> Manifest | None:
    """Of a kept engine; None if there is none. Raises FileFormatError if it is damaged."""
    if not kept.exists():
        return None
    manifest = read_manifest(kept)
    check_parts(kept, manifest)
    return manifest


def _keep(output: Path, manifest: Manifest, kept: Path) -> None:
    """Put a new engine into the cache, unless another build did so meanwhile: others may be copying that one."""
    with suppress(FileFormatError):
        if _whole(kept) is not None:
            return
    _copy(output, manifest, kept, _check_kept)


def _check_kept(kept: Path) -> None:
    """Whatever files are in such a place: damage may have taken the manifest that names them."""
    check_only(kept, lambda _: True, "a kept engine", (FORECAST,))
    if (kept / FORECAST).exists():
        check_only(kept / FORECAST, lambda _: True, "a kept engine")


def _copy(bundle: Path, manifest: Manifest, target: Path, check: Callable[[Path], None]) -> None:
    """The bundle in another place: second names of its files if the disk can, since nothing changes them."""
    with whole_folder(target, check) as folder:
        for name in manifest.files:
            bring(bundle / name, folder / name)
        write_manifest(folder, manifest)
