"""Compile an exported ONNX file into a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdit.card import GraphCard
from tqdit.engines.backends import BuildRow, build_row, choose_backend
from tqdit.engines.bundle import Manifest, write_manifest
from tqdit.engines.config import PRECISIONS, BuildConfig, FloatType, Progress, silent
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
    from tqdit.onnx_seal import check_seal

    config = config or BuildConfig()
    card = read_card(source)
    config = _choose_precision(source, card, config)
    model = load_graph(source)
    beside = external_files(model, source)
    for name in beside:
        if not (source.parent / name).is_file():
            raise FileFormatError(
                f"{source.parent / name}: missing; it holds the weights of {source}. Keep them together."
            )
    check_seal(source, model, beside, progress)
    del model  # up to 2 GB that the compiler may need
    _check_decoder(source, card)
    if backend == "auto":
        backend, _ = choose_backend()
    row = build_row(backend)
    config.refuse_unknown(backend, row.OPTIONS)
    chosen = _check_float_type(backend, row, config)
    config = replace(config, float_type=chosen)
    cast: FloatType = "fp32" if row.CASTS_FLOATS else chosen
    strip = card.quantization is not None and config.precision != "int8"
    with whole_folder(output) as folder, _prepared(source, card, strip, cast, output) as typed:
        card = replace(card, quantization=None) if strip else card
        manifest = replace(row.build(typed, card, folder, config, progress), float_type=chosen)
        write_manifest(folder, manifest)
    return manifest


@contextmanager
def _prepared(source: Path, card: GraphCard, strip: bool, float_type: FloatType, output: Path) -> Iterator[Path]:
    """The file without its quantization, and with its float parts in another type, where that is asked for.

    It lies in a temporary folder together with its decoder.
    """
    if not strip and float_type == "fp32":
        yield source
        return
    import onnx_ir as ir  # of the extra `export`, like the passes

    from tqdit.engines.build.cast import cast_floats
    from tqdit.engines.build.strip import strip_quantization
    from tqdit.export.onnx_writer import save

    with temporary_folder(output.with_name(f"{output.name}.prepared")) as folder:
        model = ir.load(source)
        if strip:
            strip_quantization(model, card)
            card = replace(card, quantization=None)
        if float_type != "fp32":
            cast_floats(model, card, float_type)
        save(model, folder / source.name)
        del model  # gigabytes that the compiler may need
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


def _choose_precision(source: Path, card: GraphCard, config: BuildConfig) -> BuildConfig:
    """The precision of the products, and with a float one the same float type around them."""
    held = "int8" if card.quantization is not None else "fp32" if config.float_type == "auto" else config.float_type
    precision = config.precision or held
    if precision not in PRECISIONS:
        raise UsageError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}.")
    if precision == "int8":
        if card.quantization is None:
            raise UsageError(f"{source}: holds a float graph, asked for int8. Export it with a scale table.")
        return replace(config, precision=precision)
    if config.float_type not in ("auto", precision):
        raise UsageError(f"--precision {precision} and --float-type {config.float_type} contradict. Pass one of them.")
    return replace(config, precision=precision, float_type=precision)


def _check_decoder(source: Path, card: GraphCard) -> None:
    if card.vae is None:
        return
    file = source.parent / card.vae.file
    if Path(card.vae.file).name != card.vae.file or not file.is_file():
        raise FileFormatError(f"{file}: missing; {source} names it as its decoder. Keep them together or export again.")
    if sha256(file) != card.vae.sha256:
        raise FileFormatError(f"{file}: altered since {source} was exported (its SHA-256 differs). Export again.")
