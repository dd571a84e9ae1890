"""Replacing the weights of an engine in place of compiling another one (`tqdit-build --refit`).

An engine that was built with it carries `refit.json`: a digest of the graph that was compiled, without its weights, the
settings, and a digest of each weight. A file of the same graph and settings, such as one with a fused LoRA, gives the
engine its own weights. No layer changes, so the audit stays. The library must be able to replace every weight that
differs: one that it compiled into its code would keep its old value without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import onnx
from onnx import TensorProto, numpy_helper

from tqdit.card import GraphCard
from tqdit.engines import cuda
from tqdit.engines.bundle import Manifest, check_parts, read_manifest
from tqdit.engines.config import BuildConfig
from tqdit.errors import BackendError
from tqdit.files import decode_record

RECORD_FILE = "refit.json"
RECORD_VERSION = 1
# Tensors of these types are weights; those of the others are shapes and indices, which belong to the graph.
WEIGHTS = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.FLOAT8E4M3FN,
}  # fmt: skip
NOT_SETTINGS = ("allow_fallback", "timing_cache", "device", "base")  # they change nothing in what is compiled


@dataclass(frozen=True)
class Content:
    """Digests (SHA-256) of a prepared file."""

    graph: str  # of all but the weights
    weights: dict[str, str]  # name of an initializer -> of its bytes

    @classmethod
    def of(cls, model: onnx.ModelProto, folder: Path) -> Content:
        """folder: where weights of a large file lie."""
        graph, weights = hashlib.sha256(), {}
        parts = [*model.opset_import, *model.functions, *model.graph.input, *model.graph.output, *model.graph.node]
        for part in parts:
            graph.update(part.SerializeToString(deterministic=True))
        for tensor in model.graph.initializer:
            graph.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
            found = hashlib.sha256(numpy_helper.to_array(tensor, str(folder)).tobytes()).hexdigest()
            if tensor.data_type in WEIGHTS:
                weights[tensor.name] = found
            else:
                graph.update(found.encode())
        return cls(graph.hexdigest(), weights)


@dataclass(frozen=True)
class Record(Content):
    """What an engine was compiled from."""

    settings: dict[str, str]  # what else decides what is compiled
    plugins_for: str | None  # compute capability of the custom ops' plugins
    spelled_out: tuple[str, ...]  # modules whose weights the compiler got in another form

    def write(self, folder: Path) -> None:
        text = msgspec.json.encode({"format_version": RECORD_VERSION, **asdict(self)})
        (folder / RECORD_FILE).write_bytes(msgspec.json.format(text, indent=1) + b"\n")

    def replaced_by(self, content: Content, settings: dict[str, str]) -> tuple[Record, tuple[str, ...]]:
        """The record with the weights of another file, and the names of those that differ.

        Raises BackendError naming what else differs.
        """
        for name, value in settings.items():
            if self.settings.get(name) != value:
                raise BackendError(f"it was built with {name} {self.settings.get(name)}, now it is {value}")
        if (content.graph, content.weights.keys()) != (self.graph, self.weights.keys()):
            raise BackendError("the file holds another graph")
        changed = tuple(name for name, digest in content.weights.items() if digest != self.weights[name])
        return replace(self, weights=content.weights), changed


def settings_of(config: BuildConfig, rows: tuple[int, int, int]) -> dict[str, str]:
    """What the user and the defaults chose, as text."""
    chosen = {name: str(value) for name, value in vars(config).items() if name not in NOT_SETTINGS}
    return chosen | {"batch": f"of {', '.join(map(str, rows))} rows"}


@dataclass(frozen=True)
class Base:
    """An engine that may get other weights."""

    folder: Path
    manifest: Manifest
    record: Record


def open_base(folder: Path, backend: str, card: GraphCard, device: int | None) -> Base:
    """The engine at `folder`, for a file with this card. Raises a TqditError if it has to be compiled: why."""
    manifest = read_manifest(folder)
    if manifest.backend != backend or RECORD_FILE not in manifest.files:
        raise BackendError(f"it was built for {manifest.backend}" if manifest.backend != backend
                           else "it was built without --refit")  # fmt: skip
    check_parts(folder, manifest)
    record = decode_record((folder / RECORD_FILE).read_bytes(), _Stored, RECORD_VERSION, RECORD_FILE, "Build it again.")
    before, now = (_products(one) for one in (manifest.card, card))
    if before != now or manifest.card.vae != card.vae:
        raise BackendError("its decoder is another one" if before == now else "other products are quantized")
    gpu = cuda.find_device(device)
    built, here = manifest.target, {"compute_capabilities": gpu.capability} | gpu.facts
    if "," in built["compute_capabilities"]:
        raise BackendError("it was built for several compute capabilities; replacing its weights takes one (--target)")
    for name, value in here.items():
        if built.get(name, value) != value:
            raise BackendError(f"it was built for {name} {built[name]}, this GPU has {value}")
    return Base(folder, manifest, Record(**{name: getattr(record, name) for name in Record.__dataclass_fields__}))


@dataclass(frozen=True)
class _Stored(Record):
    format_version: int


def _products(card: GraphCard) -> Collection[tuple[str, str]]:
    return {} if card.quantization is None else card.quantization.products.items()
