"""The header of an ONNX file, read without onnx, says what onnx says."""

import io
from contextlib import suppress
from pathlib import Path

import onnx
import pytest

from tqdit import onnx_header
from tqdit.errors import FileFormatError
from tqdit.onnx_header import OnnxHeader


@pytest.fixture
def model():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Abs(x) }'
    )
    model.producer_name, model.producer_version, model.model_version = "somebody", "1.2", -1
    for key, value in {"a": "x" * 300, "empty": "", "ü": "✓"}.items():
        model.metadata_props.add(key=key, value=value)
    return model


def test_it_reads_what_onnx_writes(tmp_path, model):
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    header = OnnxHeader.read(path)
    assert header.producer == "somebody"
    assert header.metadata == {"a": "x" * 300, "empty": "", "ü": "✓"}
    assert header.card is None


def test_the_graph_is_not_read(tmp_path, model, monkeypatch):
    model.graph.initializer.add(name="w", data_type=onnx.TensorProto.INT8, dims=[10_000], raw_data=bytes(10_000))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    read = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(Path, "open", lambda path, mode: Counting(path, mode))
    assert OnnxHeader.read(path).metadata["empty"] == ""
    assert sum(read) < 1000


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, model):
    """Where a field ends the file is a valid one with fewer fields, if it has a graph."""
    path, content = tmp_path / "m.onnx", model.SerializeToString()
    accepted = 0
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with suppress(FileFormatError):
            OnnxHeader.read(path)
            assert onnx.load(path).HasField("graph")
            accepted += 1
    assert accepted <= 4  # after the graph and after each field behind it


FIELD = 8 * 14 + 2  # metadata_props


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,  # a number without an end
        bytes([FIELD]) + b"\xff" * 9 + b"\x01",  # 2**64 - 1 bytes
        bytes([FIELD, 4, 10, 2, 0xFF, 0xFE]),  # a key that is not UTF-8
        bytes([FIELD, 2, 10, 9]),  # a key that is longer than its entry
        bytes([8 * 14 + 3]),  # a wire type that protobuf has given up
        bytes([8 * 7 + 1, 0]),  # a graph of 8 bytes in 1
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"not an ONNX file|or truncated"):
        OnnxHeader.read(path)


@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 100), ("MAX_FIELDS", 5)])
def test_what_is_read_has_a_limit(tmp_path, model, monkeypatch, limit, value):
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    monkeypatch.setattr(onnx_header, limit, value)
    with pytest.raises(FileFormatError, match="damaged"):
        OnnxHeader.read(path)
