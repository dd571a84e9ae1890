"""Compile an exported ONNX file into a bundle."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

from tqdit.card import GraphCard
from tqdit.engines.build.backend import Builder, builder, choose_backend
from tqdit.engines.build.forecast import forecast_file
from tqdit.engines.build.prepare import prepared, settled
from tqdit.engines.bundle import (
    CALLS_FILE,
    FORECAST,
    Manifest,
    Verified,
    check_overwrite,
    describe_parts,
    read_manifest,
    write_manifest,
)
from tqdit.engines.config import LAYERS_FILE, LAYERS_KEPT, BuildConfig, FloatType, Progress, silent
from tqdit.engines.gpu import GpuShare
from tqdit.engines.run.backend import open_engine
from tqdit.engines.run.verify import check_forecast, verify_bundle
from tqdit.errors import BackendError, FileFormatError, TqditWarning, VerificationError
from tqdit.files import bring, whole_folder
from tqdit.onnx_file import OnnxFile
from tqdit.version import __version__


def build_engine(
    source: str | Path,
    output: str | Path,
    backend: str = "onnxruntime",
    config: BuildConfig | None = None,
    progress: Progress = silent,
    layers: Path | None = None,
) -> Manifest:
    """Compile `source` for `backend` ('auto': the best one here) into the folder `output`, which appears whole or not.

    A bundle that is there is replaced, of whatever version. layers: a file for what TensorRT or TensorRT-RTX says of
    the layers that it compiled; None: it is kept, beside `output`, only if the engine is refused because of it.
    Raises BackendError if a quantized product would run in float and the config does not allow it, UsageError for what
    the backend or the file cannot do, FileFormatError for a file that is damaged or incomplete, OutputError for a place
    that holds anything else.
    """
    source, output, config = Path(source), Path(output), config or BuildConfig()
    file = OnnxFile.read(source)
    card = file.own_card
    if backend == "auto":
        backend, _ = choose_backend()
    compiler, config = builder(backend), settled(file, card, backend, config)
    config = replace(config, base=output if config.refit and _is_bundle(output) else None)
    float_type: FloatType = "fp32" if compiler.CASTS_FLOATS else cast(FloatType, config.float_type)
    decoder = None if card.vae is None else OnnxFile.read(source.parent / card.vae.file)
    changed = prepared(file, card, config.precision, float_type, output)
    with whole_folder(output, check_overwrite) as folder, changed as (graph, card, golden):
        if golden is not None:
            golden.save(folder / CALLS_FILE)
        for name in card.text.files if card.text else ():
            bring(source.with_name(name), folder / name)

        def compiled(config: BuildConfig) -> Manifest:
            with _layers_kept(folder, output, layers):
                artefact = compiler.build(graph, decoder, card, folder, config, progress)
            forecast = _forecast(graph, card, folder, output, compiler, config, progress)
            facts = vars(artefact) | {"versions": {"tqdit": __version__} | artefact.versions}
            return Manifest(
                backend=backend, precision=config.precision or "fp32", float_type=config.float_type, card=card,
                files=describe_parts(folder), forecast=forecast, **facts,
            )  # fmt: skip

        while True:
            manifest = compiled(config)
            try:
                manifest = _verified(folder, manifest, config, compiler, output)
                _check_forecast(folder, manifest, config, compiler)
                break
            except VerificationError as error:
                config = _another_way(error, manifest, config)
        write_manifest(folder, manifest)
    return manifest


def _another_way(error: VerificationError, manifest: Manifest, config: BuildConfig) -> BuildConfig:
    """How to build an engine again that is wrong; raises the error if there is no other way."""
    if manifest.weights == "refitted":
        warnings.warn(f"{error} Compiling it.", TqditWarning, stacklevel=3)
        return replace(config, base=None)
    if "plugin" in manifest.plugins.values():
        warnings.warn(f"{error} Building it again without plugins.", TqditWarning, stacklevel=3)
        return replace(config, base=None, plugins=False)
    raise error


def _is_bundle(folder: Path) -> bool:
    """Whether an engine of this version of tqdit is there, whole or not."""
    try:
        read_manifest(folder)
    except FileFormatError:
        return False
    return True


@contextmanager
def _layers_kept(folder: Path, output: Path, layers: Path | None) -> Iterator[None]:
    """Take what the compiler said of its layers out of the folder, to `layers`, or beside `output` if the compiler's
    result is refused.
    """
    said = folder / LAYERS_FILE
    try:
        yield
    except BackendError as error:
        if not said.is_file():
            raise
        kept = layers or output.with_name(f"{output.name}.{LAYERS_FILE}")
        said.replace(kept)
        raise BackendError(f"{error}{LAYERS_KEPT}{kept}") from error
    if layers is not None and said.is_file():
        said.replace(layers)
    said.unlink(missing_ok=True)


def _forecast(
    graph: OnnxFile, card: GraphCard, folder: Path, output: Path, compiler: Builder, config: BuildConfig,
    progress: Progress,
) -> str | None:  # fmt: skip
    """Compile the forecast of a graph with a residual into its folder; the file that the backend opens."""
    if card.residual is None:
        return None
    place = folder / FORECAST
    place.mkdir(exist_ok=True)
    with forecast_file(graph, card, output) as (part, part_card):
        made = compiler.build(part, None, part_card, place, replace(config, base=None, refit=False), progress)
    (place / LAYERS_FILE).unlink(missing_ok=True)
    return made.entry


def _check_forecast(folder: Path, manifest: Manifest, config: BuildConfig, compiler: Builder) -> None:
    """Run a forecast, if there is one and the engine runs here. Raises VerificationError if it is wrong."""
    if manifest.forecast is None or not _runs_here(config, compiler):
        return
    part = f"{FORECAST}/{manifest.forecast}"
    with ExitStack() as engines:
        full, forecast = (
            engines.enter_context(closing(open_engine(folder, manifest, file, device=config.device)))
            for file in (manifest.entry, part)
        )
        check_forecast(folder, manifest, full, forecast)


def _runs_here(config: BuildConfig, compiler: Builder) -> bool:
    return bool(config.provider in ("cuda", "tensorrt") or compiler.fitness().score)


def _verified(
    folder: Path, manifest: Manifest, config: BuildConfig, compiler: Builder, output: Path
) -> Manifest:  # fmt: skip
    """With what the golden calls gave, if the engine runs here. Raises VerificationError if it is wrong."""
    if CALLS_FILE not in manifest.files or not _runs_here(config, compiler):
        return manifest
    try:
        verdict = verify_bundle(folder, manifest, GpuShare(config.device, 0 if config.weight_streaming else None))
    except BackendError:
        if not config.targets:
            raise
        return manifest  # for other GPUs than the one that is here
    verdict.check(str(output))
    return replace(manifest, verified=Verified.of(verdict))
