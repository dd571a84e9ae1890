"""Compile an exported ONNX file into a bundle."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import onnx_ir as ir

from tqdit.card import GraphCard
from tqdit.engines.build.backend import Builder, builder, choose_backend
from tqdit.engines.build.cast import cast_floats
from tqdit.engines.build.fp8 import expect, quantize_to_fp8
from tqdit.engines.build.strip import strip_quantization
from tqdit.engines.bundle import (
    CALLS_FILE,
    Manifest,
    Verified,
    check_overwrite,
    describe_parts,
    read_manifest,
    write_manifest,
)
from tqdit.engines.config import LAYERS_FILE, PRECISIONS, QUANTIZED, BuildConfig, FloatType, Progress, silent
from tqdit.engines.gpu import GpuShare
from tqdit.engines.run.verify import verify_bundle
from tqdit.errors import BackendError, FileFormatError, TqditWarning, UsageError, VerificationError
from tqdit.files import bring, sha256, temporary_folder, whole_folder
from tqdit.golden import GoldenCalls
from tqdit.graph_names import SCOPE_KEY
from tqdit.onnx_file import OnnxFile, save
from tqdit.version import __version__

MUCH_WORSE = 2  # times the error of int8


def build_engine(
    source: str | Path,
    output: str | Path,
    backend: str = "onnxruntime",
    config: BuildConfig | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Compile `source` for `backend` ('auto': the best one here) into the folder `output`, which appears whole or not.

    A bundle that is there is replaced, of whatever version.
    Raises BackendError if a quantized product would run in float and the config does not allow it, UsageError for what
    the backend or the file cannot do, FileFormatError for a file that is damaged or incomplete, OutputError for a place
    that holds anything else.
    """
    source, output, config = Path(source), Path(output), config or BuildConfig()
    file = OnnxFile.read(source)
    card = file.own_card
    config = _choose_precision(source, card, config)
    _check_file(file, card)
    if backend == "auto":
        backend, _ = choose_backend()
    compiler = builder(backend)
    config.refuse_unknown(backend, compiler.OPTIONS)
    if card.rows is not None and config.batch is not None:
        raise UsageError(
            f"--batch: the graph of {source} takes {card.rows} row a call and no other number. Leave it out."
        )
    chosen = _check_float_type(backend, compiler, config)
    config = replace(config, float_type=chosen, base=output if config.refit and _is_bundle(output) else None)
    float_type: FloatType = "fp32" if compiler.CASTS_FLOATS else chosen
    strip = card.quantization is not None and config.precision not in QUANTIZED
    if config.precision == "fp8" and not compiler.TAKES_FP8:
        raise UsageError(f"--precision fp8: {backend} has no FP8 products. Use --backend tensorrt-rtx or tensorrt.")
    decoder = None if card.vae is None else OnnxFile.read(source.parent / card.vae.file)
    changed = _prepared(file, card, config.precision, float_type, output)
    with whole_folder(output, check_overwrite) as folder, changed as (prepared, golden):
        card = replace(card, quantization=None) if strip else card
        if config.precision != "int8":  # a correction is of the errors of these integers
            card = replace(card, correction=None)
        if golden is not None:
            golden.save(folder / CALLS_FILE)
        for name in card.text.files if card.text else ():
            bring(source.with_name(name), folder / name)

        def compiled(config: BuildConfig) -> Manifest:
            with _layers_kept(folder, output):
                artefact = compiler.build(prepared, decoder, card, folder, config, progress)
            precision, files = config.precision or "fp32", describe_parts(folder)
            facts = vars(artefact) | {"versions": {"tqdit": __version__} | artefact.versions}
            return Manifest(backend=backend, precision=precision, float_type=chosen, card=card, files=files, **facts)

        while True:
            manifest = compiled(config)
            try:
                manifest = _verified(folder, manifest, config, compiler, output)
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
def _layers_kept(folder: Path, output: Path) -> Iterator[None]:
    """If the compiler's result is refused, keep beside `output` what it said of its layers."""
    try:
        yield
    except BackendError as error:
        if not (folder / LAYERS_FILE).is_file():
            raise
        kept = output.with_name(f"{output.name}.{LAYERS_FILE}")
        (folder / LAYERS_FILE).replace(kept)
        raise BackendError(f"{error} The compiler's own list of layers: {kept}") from error


def _verified(
    folder: Path, manifest: Manifest, config: BuildConfig, compiler: Builder, output: Path
) -> Manifest:  # fmt: skip
    """With what the golden calls gave, if the engine runs here. Raises VerificationError if it is wrong."""
    runs_here = config.provider in ("cuda", "tensorrt") or compiler.fitness().score
    if CALLS_FILE not in manifest.files or not runs_here:
        return manifest
    try:
        verdict = verify_bundle(folder, manifest, GpuShare(config.device, 0 if config.weight_streaming else None))
    except BackendError:
        if not config.targets:
            raise
        return manifest  # for other GPUs than the one that is here
    verdict.check(str(output))
    return replace(manifest, verified=Verified.of(verdict))


@contextmanager
def _prepared(
    file: OnnxFile, card: GraphCard, precision: str | None, float_type: FloatType, output: Path
) -> Iterator[tuple[OnnxFile, GoldenCalls | None]]:
    """The file, or a temporary one without its quantization or in FP8 and with its float parts in another type; and the
    golden calls with the errors that are expected of it.
    """
    golden, strip = file.golden, card.quantization is not None and precision not in QUANTIZED
    if not strip and precision != "fp8" and float_type == "fp32":
        yield file, golden
        return
    with temporary_folder(output.with_name(f"{output.name}.prepared")) as folder:
        model = file.to_ir()
        if strip:
            strip_quantization(model, card)
            card = replace(card, quantization=None)
        if precision == "fp8":
            quantize_to_fp8(model, card)
            if golden is not None:
                draft = _saved(model, folder / file.path.name)
                golden = _expected_in_fp8(golden, draft.path, card.rows or 1)
        if float_type != "fp32":
            cast_floats(model, card, float_type)
        changed = _saved(model, folder / file.path.name)
        del model  # gigabytes that the compiler may need
        yield changed, golden


def _expected_in_fp8(golden: GoldenCalls, file: Path, rows: int) -> GoldenCalls:
    """With the errors of FP8, and a warning if they are large beside those of int8."""
    found = expect(golden, file, rows)
    before, after = golden.errors.mean(), found.errors.mean()
    if after > MUCH_WORSE * before:
        warnings.warn(
            f"on the golden calls fp8 has a mean error of {after:.1e} against the float model, int8 of {before:.1e}.",
            TqditWarning, stacklevel=2,
        )  # fmt: skip
    return found


def _saved(model: ir.Model, path: Path) -> OnnxFile:
    return OnnxFile(path, save(model, path))


def _check_float_type(backend: str, compiler: Builder, config: BuildConfig) -> FloatType:
    offered, wanted = compiler.float_types(config), config.float_type
    if wanted == "auto":
        return offered[0]
    if wanted not in offered:
        raise UsageError(f"--float-type {wanted}: {backend} would only emulate it here; it has {', '.join(offered)}.")
    return wanted


def _choose_precision(source: Path, card: GraphCard, config: BuildConfig) -> BuildConfig:
    """The precision of the products, and with a float one the same float type around them."""
    held = "int8" if card.quantization is not None else "fp32" if config.float_type == "auto" else config.float_type
    precision = config.precision or held
    if precision not in PRECISIONS:
        raise UsageError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}.")
    if precision in QUANTIZED:
        if card.quantization is None:
            raise UsageError(f"{source}: holds a float graph, asked for {precision}. Export it with a scale table.")
        return replace(config, precision=precision)
    if config.float_type not in ("auto", precision):
        raise UsageError(f"--precision {precision} and --float-type {config.float_type} contradict. Pass one of them.")
    return replace(config, precision=precision, float_type=cast(FloatType, precision))


def _check_file(file: OnnxFile, card: GraphCard) -> None:
    """Refuse a file without its weights, its decoder or the scopes of its nodes."""
    _ = file.weight_files  # raises if one is missing
    if not file.scopes:
        raise FileFormatError(
            f"{file.path}: no node says to which module it belongs (metadata '{SCOPE_KEY}'). An older tqdit-export "
            "wrote it, or another program removed the metadata. Export again."
        )
    if card.text is not None:
        card.text.check(file.path.parent)
    if card.vae is None:
        return
    decoder = file.path.parent / card.vae.file
    if Path(card.vae.file).name != card.vae.file or not decoder.is_file():
        raise FileFormatError(
            f"{decoder}: missing; {file.path} names it as its decoder. Keep them together or export again."
        )
    if sha256(decoder) != card.vae.sha256:
        raise FileFormatError(f"{decoder}: altered since {file.path} was exported (its SHA-256 differs). Export again.")
