"""ONNX files on disk: written whole or not at all, with large weights beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from tqdit.card import METADATA_KEY, GraphCard, VaeCard
from tqdit.errors import FileFormatError, OutputError
from tqdit.files import flush, sha256, temporary_folder
from tqdit.onnx_file import PRODUCER, external_files, load_graph, read_card
from tqdit.onnx_seal import add_entry, seal

EXTERNAL_DATA_BYTES = 1_000_000_000  # a protobuf file ends at 2 GB; from half of that weights go beside it


def write(path: Path, model: ir.Model, card: GraphCard, vae: tuple[ir.Model, tuple[int, int]] | None = None) -> None:
    """Write a graph with its card to `path`, and what belongs to it beside it.

    The side files carry a piece of their own SHA-256 in their names and the ONNX file is renamed last, so a run that
    is killed leaves the old export as it was. Files of the replaced export are removed at the end.
    """
    stale = _side_files(path)
    with temporary_folder(path) as folder:
        if vae is not None:
            card = replace(card, vae=_write_vae(folder, path, *vae))
        model.metadata_props[METADATA_KEY] = json.dumps(card.to_json(), sort_keys=True)
        model.producer_name, model.producer_version = PRODUCER, card.written_by
        beside = save(model, folder / path.name)
        seal(folder / path.name, beside)
        fresh = {file.name for file in folder.iterdir()}
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the graph itself last
            flush(file)
            file.replace(path.parent / file.name)
    for file in stale:
        if file.name not in fresh:
            file.unlink(missing_ok=True)


def check_overwrite(path: Path, force: bool) -> None:
    """Only files that TQDiT wrote are overwritten without --force."""
    if not path.exists() or force:
        return
    if path.is_dir():
        raise OutputError(f"{path}: is a directory. Name a file for the ONNX model.")
    try:
        read_card(path)
    except FileFormatError as error:
        raise OutputError(
            f"{path}: exists and was not written by tqdit. Choose another name or pass --force."
        ) from error


def _write_vae(folder: Path, path: Path, model: ir.Model, size: tuple[int, int]) -> VaeCard:
    draft = folder / "vae.onnx"
    ir.save(model, draft)
    digest = sha256(draft)
    name = f"{path.stem}.vae-{digest[:8]}.onnx"
    draft.rename(folder / name)
    return VaeCard(name, digest, *size)


def save(model: ir.Model, target: Path) -> dict[str, str]:
    """Save with weights inside, or beside under a name that carries a piece of their SHA-256; the names with all of it.

    The place for the file's own digest is left empty.
    """
    total = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    if total < EXTERNAL_DATA_BYTES:
        _store(ir.to_proto(model), target)
        return {}
    draft, data = target.with_name("draft.onnx"), target.with_name("draft.data")
    ir.save(model, draft, external_data=data.name)
    digest = sha256(data)
    name = f"{target.stem}-{digest[:8]}.onnx.data"
    data.rename(target.with_name(name))
    proto = onnx.load(draft, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    _store(proto, target)
    draft.unlink()
    return {name: digest}


def _store(proto: onnx.ModelProto, target: Path) -> None:
    add_entry(proto)
    onnx.save(proto, target)


def _side_files(path: Path) -> set[Path]:
    """Files beside an existing export that belong to it alone."""
    try:
        card, names = read_card(path), external_files(load_graph(path), path)
    except FileFormatError:
        return set()
    names |= {card.vae.file} if card.vae else set()
    return {path.parent / name for name in names if Path(name).name == name and name.startswith(path.stem)}
