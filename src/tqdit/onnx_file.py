"""Reading ONNX files without their weights: the card inside, the files beside. Needs the `onnx` package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message

from tqdit.card import METADATA_KEY, GraphCard
from tqdit.errors import FileFormatError

PRODUCER = "tqdit"


def read_card(path: Path) -> GraphCard:
    """The card inside an ONNX file of ours, without its weights."""
    if path.is_dir():
        raise FileFormatError(f"{path}: a folder; expected the ONNX file that tqdit-export wrote. Pass that file.")
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file. Run tqdit-export {path.name} first.")
    card = card_of(load_graph(path), path)
    if card is None:
        raise FileFormatError(
            f"{path}: an ONNX file, but not one that tqdit-export wrote (it has no '{METADATA_KEY}' metadata)."
        )
    return card


def card_of(model: onnx.ModelProto, path: Path) -> GraphCard | None:
    """The card in the metadata of `path`; None where somebody else wrote the file."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            return GraphCard.from_json(entry.value, str(path))
    if model.producer_name == PRODUCER:
        raise FileFormatError(
            f"{path}: damaged or truncated: tqdit-export wrote it with '{METADATA_KEY}' metadata, which is not there. "
            "Export it again."
        )
    return None


def load_graph(path: Path) -> onnx.ModelProto:
    """An ONNX file without its external data; raises FileFormatError where it is none."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise FileFormatError(f"{path}: damaged or truncated, not an ONNX file ({error}). Export it again.") from error
    if not _is_text(model):
        raise FileFormatError(f"{path}: damaged, not an ONNX file (a name that is not UTF-8). Export it again.")
    if not model.graph.node:
        raise FileFormatError(f"{path}: not an ONNX file, or one without a graph. Export it again.")
    return model


def _is_text(message: Message) -> bool:
    """Whether every name is UTF-8: protobuf hands on other bytes as `bytes`, where all of us expect `str`."""
    if isinstance(message, onnx.TensorProto):  # its data may be gigabytes, and is no text
        entries = [text for entry in message.external_data for text in (entry.key, entry.value)]
        return all(isinstance(text, str) for text in (message.name, message.doc_string, *entries))
    for field, value in message.ListFields():
        values = [value] if isinstance(value, str | bytes | Message) else value
        if field.type == field.TYPE_STRING and not all(isinstance(text, str) for text in values):
            return False
        if field.type == field.TYPE_MESSAGE and not all(map(_is_text, values)):
            return False
    return True


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers, constants of nodes, subgraphs and functions."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for each in [value] if isinstance(value, Message) else value:
                yield from _tensors(each)


def external_files(model: onnx.ModelProto, path: Path) -> set[str]:
    """Names of the files that hold the weights of `model`; all must lie beside `path`."""
    names = {e.value for tensor in _tensors(model) for e in tensor.external_data if e.key == "location"}
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise FileFormatError(
                f"{path}: its weights lie in '{name}', outside its own folder. Refused; export it again."
            )
    return names


def bytes_on_disk(path: Path) -> int:
    """Size of an ONNX file together with the weights beside it."""
    beside = external_files(load_graph(path), path)
    for name in sorted(beside):
        if not (path.parent / name).is_file():
            raise FileFormatError(f"{path.parent / name}: missing; it holds the weights of {path}. Keep them together.")
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside)
