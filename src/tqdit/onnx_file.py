"""An ONNX file, parsed once per command and handed on. Needs the extra `build`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tqdit.card import METADATA_KEY, GraphCard
from tqdit.errors import FileFormatError
from tqdit.extras import need
from tqdit.files import ONNX, bring, reading, sha256, stays_inside
from tqdit.golden import CALLS_KEY, GoldenCalls
from tqdit.graph_names import Scopes
from tqdit.onnx_header import OnnxHeader

need("onnx", "build", "reading and writing ONNX files")
need("onnx_ir", "build", "reading and writing ONNX files")

import onnx  # noqa: E402  (after its absence has been answered)
import onnx_ir as ir  # noqa: E402
from google.protobuf.message import DecodeError, Message  # noqa: E402

SMALL_BYTES = 256  # shapes and the like stay inside, since tools infer other shapes from them
EXTERNAL_DATA_BYTES = 1_000_000_000  # a protobuf file ends at 2 GB; from half of that weights go beside it


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A file and its parsed content. Treat the model as read-only: edit what `copy` or `to_ir` returns."""

    path: Path
    model: onnx.ModelProto  # without the weights that lie in other files

    @classmethod
    def read(cls, path: Path) -> OnnxFile:
        """Parse `path`. Raises FileFormatError if it is missing, damaged or not an ONNX file."""
        OnnxHeader.read(path)  # which refuses it in the words that a machine without onnx uses
        return cls(path, parse_model(path))

    @cached_property
    def card(self) -> GraphCard | None:
        """None if another program wrote the file. Raises FileFormatError if it is damaged."""
        return OnnxHeader.read(self.path).card

    @cached_property
    def golden(self) -> GoldenCalls | None:
        """The calls that prove an engine of this file; None if it holds none."""
        for entry in self.model.metadata_props:
            if entry.key == CALLS_KEY:
                return GoldenCalls.from_text(entry.value, str(self.path))
        return None

    @property
    def own_card(self) -> GraphCard:
        """The card. Raises FileFormatError if another program wrote the file."""
        if self.card is None:
            raise FileFormatError(
                f"{self.path}: an ONNX file, but not one that tqdit-export wrote (it has no '{METADATA_KEY}' metadata)."
            )
        return self.card

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """Files beside this one that hold weights. Raises FileFormatError if one is missing, or in another folder.

        A link is followed within the folder and in the cache of a model hub.
        """
        names = {e.value for tensor in _tensors(self.model) for e in tensor.external_data if e.key == "location"}
        for name in names:
            is_plain = Path(name).name == name and name not in ("", ".", "..")
            if not is_plain or not stays_inside(self.path.with_name(name), self.path.parent):
                raise FileFormatError(
                    f"{self.path}: its weights lie in '{name}', outside its own folder. Refused; export it again."
                )
            if not self.path.with_name(name).is_file():
                raise FileFormatError(
                    f"{self.path.with_name(name)}: missing; it holds the weights of {self.path}. Keep them together."
                )
        return tuple(self.path.with_name(name) for name in sorted(names))

    @cached_property
    def size_bytes(self) -> int:
        """On disk, with the weights beside it."""
        return sum(file.stat().st_size for file in (self.path, *self.weight_files))

    @cached_property
    def scopes(self) -> Scopes:
        return Scopes(self.model.graph.node)

    def copy(self) -> onnx.ModelProto:
        """The model, to be edited and given to `save_copy`."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return model

    def save_copy(self, model: onnx.ModelProto, folder: Path) -> Path:
        """Write an edited copy into `folder` under the same name, with the same weight files beside it."""
        for file in self.weight_files:
            bring(file, folder / file.name)
        onnx.save(model, folder / self.path.name)
        return folder / self.path.name

    def to_ir(self) -> ir.Model:
        """The model for passes of onnx_ir; weights are read when they are needed."""
        model = ir.from_proto(self.model)
        ir.external_data.set_base_dir(model.graph, self.path.parent)
        return model


def read_card(path: Path) -> GraphCard:
    """The card of a file that tqdit-export wrote."""
    return OnnxFile.read(path).own_card


def save(model: ir.Model, target: Path) -> onnx.ModelProto:
    """Write `model` and return it as written.

    Large weights go beside it, into a file whose name carries the beginning of its SHA-256.
    """
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    tensors = [value.const_value for value in values]
    draft = target.with_name("draft.data")
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) >= EXTERNAL_DATA_BYTES:
        ir.external_data.unload_from_model(model, target.parent, draft.name, size_threshold_bytes=SMALL_BYTES)
    else:
        ir.external_data.load_to_model(model)  # of a file whose weights lay beside it
    proto = ir.to_proto(model)
    for value, tensor in zip(values, tensors, strict=True):
        value.const_value = tensor
    if draft.exists():
        name = f"{target.stem}-{sha256(draft)[:8]}.onnx.data"
        draft.rename(target.with_name(name))
        for entry in (entry for tensor in _tensors(proto) for entry in tensor.external_data):
            if entry.key == "location":
                entry.value = name
    onnx.save(proto, target)
    return proto


def parse_model(path: Path) -> onnx.ModelProto:
    """The content of an ONNX file without the weights beside it: the one place that parses.

    Raises FileFormatError if it is not an ONNX file.
    """
    with reading(path, ONNX, "Export it again.", DecodeError, ValueError):
        model = onnx.load(path, load_external_data=False)
    if not _is_text(model):
        raise FileFormatError(f"{path}: damaged, not an ONNX file (a name that is not UTF-8). Export it again.")
    if not model.graph.node:
        raise FileFormatError(f"{path}: not an ONNX file, or one without a graph. Export it again.")
    return model


def _is_text(message: Message) -> bool:
    """Whether every name is UTF-8. protobuf returns other bytes as `bytes`, but all readers expect `str`."""
    if isinstance(message, onnx.TensorProto):  # its data may be gigabytes, and is not text
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
