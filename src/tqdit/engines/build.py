"""Compile an exported ONNX file into a bundle."""

from __future__ import annotations

from pathlib import Path

from tqdit.card import GraphCard
from tqdit.engines.backends import build_row
from tqdit.engines.bundle import Manifest, write_manifest
from tqdit.errors import FileFormatError, UsageError
from tqdit.files import sha256, whole_folder

PRECISIONS = ("fp32",)


def build_engine(source: Path, output: Path, backend: str = "onnxruntime", precision: str = "fp32") -> Manifest:
    """Compile `source` for `backend` into the folder `output`, which appears whole or not at all."""
    from tqdit.onnx_file import external_files, load_graph, read_card  # needs onnx; the runtime must not

    if precision not in PRECISIONS:
        raise UsageError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}.")
    card = read_card(source)
    for name in external_files(load_graph(source), source):
        if not (source.parent / name).is_file():
            raise FileFormatError(
                f"{source.parent / name}: missing; it holds the weights of {source}. Keep them together."
            )
    _check_decoder(source, card)
    with whole_folder(output) as folder:
        manifest = build_row(backend).build(source, card, folder, precision)
        write_manifest(folder, manifest)
    return manifest


def _check_decoder(source: Path, card: GraphCard) -> None:
    if card.vae is None:
        return
    file = source.parent / card.vae.file
    if Path(card.vae.file).name != card.vae.file or not file.is_file():
        raise FileFormatError(f"{file}: missing; {source} names it as its decoder. Keep them together or export again.")
    if sha256(file) != card.vae.sha256:
        raise FileFormatError(f"{file}: altered since {source} was exported (its SHA-256 differs). Export again.")
