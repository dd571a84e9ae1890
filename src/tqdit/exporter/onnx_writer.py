"""ONNX files on disk: written whole or not at all, with large weights beside them."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from tqdit.card import METADATA_KEY, GraphCard, VaeCard
from tqdit.errors import FileFormatError, OutputError
from tqdit.exporter.text import TextGraph
from tqdit.exporter.trace import fixed_rows
from tqdit.exporter.vae import DecoderGraph
from tqdit.files import flush, sha256, temporary_folder
from tqdit.onnx_file import OnnxFile, save
from tqdit.onnx_header import PRODUCER, OnnxHeader


def write(
    path: Path, model: ir.Model, card: GraphCard, vae: DecoderGraph | None = None, text: TextGraph | None = None
) -> GraphCard:
    """Write a graph with its card to `path`, and what belongs to it beside it. Returns the card with what lies there.

    The side files carry a piece of their own SHA-256 in their names and the ONNX file is renamed last, so a run that
    is killed leaves the old export as it was. Files of the replaced export are removed at the end.
    """
    stale = _side_files(path)
    with temporary_folder(path) as folder:
        if vae is not None:
            card = replace(card, vae=_write_vae(folder, path, vae))
        if text is not None:
            card = replace(card, text=text.write(folder, path.stem))
        model.metadata_props[METADATA_KEY] = json.dumps(card.to_json(), sort_keys=True)
        model.producer_name, model.producer_version = PRODUCER, card.written_by
        save(model, folder / path.name)
        fresh = {file.name for file in folder.iterdir()}
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the graph itself last
            flush(file)
            file.replace(path.parent / file.name)
    for file in stale:
        if file.name not in fresh:
            file.unlink(missing_ok=True)
    return card


def check_overwrite(path: Path, force: bool) -> None:
    """Raise OutputError unless an export may take this place: free, or that of a file that tqdit-export wrote.

    force: a file that this tqdit cannot use, too, as one of another version.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise OutputError(f"{path}: is a directory. Name a file for the ONNX model.")
    header = None
    with suppress(FileFormatError):
        header = OnnxHeader.read(path)
    if header is None or not {header.producer, *header.metadata} & {PRODUCER, METADATA_KEY}:
        raise OutputError(f"{path}: exists and was not written by tqdit. Choose another name, or remove it yourself.")
    try:
        _ = header.card
    except FileFormatError as error:
        if not force:
            raise OutputError(f"{error} Or choose another name, or pass --force to replace it.") from error


def _write_vae(folder: Path, path: Path, decoder: DecoderGraph) -> VaeCard:
    draft = folder / "vae.onnx"
    ir.save(decoder.model, draft)
    digest = sha256(draft)
    name = f"{path.stem}.vae-{digest[:8]}.onnx"
    draft.rename(folder / name)
    return VaeCard(name, digest, decoder.height, decoder.width, decoder.frames, fixed_rows(decoder.model))


def _side_files(path: Path) -> set[Path]:
    """Files beside an existing export that belong to it alone."""
    try:
        file = OnnxFile.read(path)
        card, names = file.own_card, {weights.name for weights in file.weight_files}
    except FileFormatError:
        return set()
    names |= {card.vae.file} if card.vae else set()
    names |= {*card.text.files} if card.text else set()
    return {path.parent / name for name in names if Path(name).name == name and name.startswith(path.stem)}
