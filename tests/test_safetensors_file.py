"""The reader of safetensors files agrees with the format's library, and refuses what the library refuses."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from tqdit import safetensors_file
from tqdit.safetensors_file import TYPES, read, read_metadata


def file_of(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype="F32", shape=(2,), place=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


def test_it_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    rng = np.random.default_rng(0)
    shapes = [(), (3,), (2, 3), (0, 4)]
    arrays = {
        f"{name}{shape}": rng.integers(-9, 9, shape).astype(dtype) for name, dtype in TYPES.items() for shape in shapes
    }
    path.write_bytes(safetensors.numpy.save(arrays, {"key": "a text"}))
    metadata, found = read(path)
    assert metadata == read_metadata(path) == {"key": "a text"}
    assert found.keys() == arrays.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype
        assert array.flags.writeable


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"[]", b""),
        (b"[" * 100_000, b""),
        (b'{"a":' + b"[" * 100_000, b""),
        (b'{"\xff": 1}', b""),
        ({"__metadata__": {"a": 1}}, b""),
        ({"a": 3}, b""),
        ({"a": tensor()}, bytes(7)),
        ({"a": tensor()}, bytes(9)),
        ({"a": tensor(place=(4, 12))}, bytes(12)),
        ({"a": tensor(place=(8, 0))}, bytes(8)),
        ({"a": tensor(shape=(3,))}, bytes(8)),
        ({"a": tensor(shape=(-2,))}, bytes(8)),
        ({"a": tensor(shape=(1,) * 70, place=(0, 4))}, bytes(4)),
        ({"a": tensor(shape=(0, 2**70), place=(0, 0))}, b""),
        ({"a": tensor(), "b": tensor()}, bytes(8)),
        ({"a": tensor("X32")}, bytes(8)),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, header, data):
    path = file_of(tmp_path / "a.safetensors", header, data)
    with pytest.raises(ValueError, match=r"\w"):
        read(path)
    with pytest.raises((safetensors.SafetensorError, ValueError, OverflowError)):
        safetensors.numpy.load_file(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 1_000])
def test_a_length_is_compared_with_the_file_before_anything_is_allocated(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + bytes(500))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"a header of {length} bytes in a file of 508"):
        read_metadata(path)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_a_header_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "MAX_HEADER", 40)
    read_metadata(file_of(tmp_path / "a.safetensors", {"__metadata__": {"a": "b"}}))
    with pytest.raises(ValueError, match="a header of"):
        read_metadata(file_of(tmp_path / "a.safetensors", {"__metadata__": {"a": "b" * 40}}))
