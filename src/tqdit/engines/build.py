"""Compile an exported ONNX file into a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdit.card import GraphCard
from tqdit.engines.backends import BuildRow, build_row, choose_backend
from tqdit.engines.bundle import Manifest, write_manifest
from tqdit.engines.config import PRECISIONS, BuildConfig, FloatType, Precision, Progress, silent
from tqdit.errors import FileFormatError, UsageError
from tqdit.files import sha256, temporary_folder, whole_folder


def build_engine(
    source: Path,
    output: Path,
    backend: str = "onnxruntime",
    config: BuildConfig | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Compile `source` for `backend` ('auto': the best one here) into the folder `output`, which appears whole or not.

    Raises BackendError where a quantized product would run in float, unless the config allows it, and UsageError for
    what the backend or the file cannot do.
    """
    from tqdit.onnx_file import external_files, load_graph, read_card  # needs onnx; the runtime must not

    config = config or BuildConfig()
    card = read_card(source)
    config = replace(config, precision=_check_precision(source, card, config.precision))
    for name in external_files(load_graph(source), source):
        if not (source.parent / name).is_file():
            raise FileFormatError(
                f"{source.parent / name}: missing; it holds the weights of {source}. Keep them together."
            )
    _check_decoder(source, card)
    if backend == "auto":
        backend, _ = choose_backend()
    row = build_row(backend)
    config.refuse_unknown(backend, row.OPTIONS)
    chosen = _check_float_type(backend, row, config)
    config = replace(config, float_type=chosen)
    with whole_folder(output) as folder, _cast(source, card, chosen, output) as typed:
        manifest = replace(row.build(typed, card, folder, config, progress), float_type=chosen)
        write_manifest(folder, manifest)
    return manifest


@contextmanager
def _cast(source: Path, card: GraphCard, float_type: FloatType, output: Path) -> Iterator[Path]:
    """The file with its float parts in another type, in a temporary folder together with its decoder."""
    if float_type == "fp32":
        yield source
        return
    import onnx_ir as ir  # of the extra `export`, like the pass

    from tqdit.export.passes.cast import cast_floats

    with temporary_folder(output.with_name(f"{output.name}.cast")) as folder:
        model = ir.load(source)
        cast_floats(model, card, "fp16" if float_type == "fp16" else "bf16")
        ir.save(model, folder / source.name, external_data=f"{source.name}.data")
        if card.vae is not None:
            (folder / card.vae.file).symlink_to((source.parent / card.vae.file).absolute())
        yield folder / source.name


def _check_float_type(backend: str, row: BuildRow, config: BuildConfig) -> FloatType:
    offered, wanted = row.float_types(config), config.float_type
    if wanted == "auto":
        return offered[0]
    if wanted not in offered:
        raise UsageError(f"--float-type {wanted}: {backend} would only emulate it here; it has {', '.join(offered)}.")
    return wanted


def _check_precision(source: Path, card: GraphCard, precision: Precision | None) -> Precision:
    held: Precision = "fp32" if card.quantization is None else "int8"
    if precision is not None and precision not in PRECISIONS:
        raise UsageError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}.")
    if precision not in (None, held):
        advice = "Export it with a scale table" if precision == "int8" else "Export it with --float"
        raise UsageError(f"{source}: holds a graph in {held}, asked for {precision}. {advice}.")
    return held


def _check_decoder(source: Path, card: GraphCard) -> None:
    if card.vae is None:
        return
    file = source.parent / card.vae.file
    if Path(card.vae.file).name != card.vae.file or not file.is_file():
        raise FileFormatError(f"{file}: missing; {source} names it as its decoder. Keep them together or export again.")
    if sha256(file) != card.vae.sha256:
        raise FileFormatError(f"{file}: altered since {source} was exported (its SHA-256 differs). Export again.")
