"""Compile an exported ONNX file into a bundle."""

from __future__ import annotations

from pathlib import Path

from tqdit.card import GraphCard
from tqdit.engines.backends import build_row
from tqdit.engines.bundle import Manifest, write_manifest
from tqdit.errors import FileFormatError, UsageError
from tqdit.files import sha256, whole_folder

PRECISIONS = ("int8", "fp32")


def build_engine(
    source: Path,
    output: Path,
    backend: str = "onnxruntime",
    precision: str | None = None,
    allow_fallback: bool = False,
) -> Manifest:
    """Compile `source` for `backend` into the folder `output`, which appears whole or not at all.

    precision None: int8 for a quantized file, fp32 for a float one. Raises BackendError where a quantized product would
    run in float, unless `allow_fallback`.
    """
    from tqdit.onnx_file import external_files, load_graph, read_card  # needs onnx; the runtime must not

    card = read_card(source)
    precision = _check_precision(source, card, precision)
    for name in external_files(load_graph(source), source):
        if not (source.parent / name).is_file():
            raise FileFormatError(
                f"{source.parent / name}: missing; it holds the weights of {source}. Keep them together."
            )
    _check_decoder(source, card)
    with whole_folder(output) as folder:
        manifest = build_row(backend).build(source, card, folder, precision, allow_fallback)
        write_manifest(folder, manifest)
    return manifest


def _check_precision(source: Path, card: GraphCard, precision: str | None) -> str:
    held = "fp32" if card.quantization is None else "int8"
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
