"""The digest of an exported file: right, wrong, removed on purpose, or spoilt itself."""

import hashlib

import numpy as np
import onnx
import pytest

import support
from tqdit import onnx_seal
from tqdit.cli.inspect import inspect
from tqdit.engines.build.engine import build_engine
from tqdit.errors import FileFormatError
from tqdit.export import onnx_writer, write
from tqdit.onnx_file import external_files, load_graph
from tqdit.onnx_seal import KEY, check_seal

ALTERED = (
    "altered since tqdit-export wrote it (its SHA-256 differs). Export it again or, if the change is meant, remove the "
    "entry 'tqdit_sha256' from its metadata."
)


@pytest.fixture(params=["weights inside", "weights beside"])
def exported(tmp_path, request, monkeypatch):
    if request.param == "weights beside":
        monkeypatch.setattr(onnx_writer, "EXTERNAL_DATA_BYTES", 1)
    write(tmp_path / "model.onnx", *support.exported(pixels=True))
    return tmp_path / "model.onnx"


def check(path, **options):
    model = load_graph(path)
    return check_seal(path, model, external_files(model, path), **options)


def refused(path, call):
    with pytest.raises(FileFormatError) as error:
        call()
    assert str(error.value) == f"{path}: {ALTERED}"
    return True


def test_the_digest_is_the_one_of_the_page(exported):
    """docs/onnx-file.md, Metadata."""
    (found,) = [entry.value for entry in onnx.load(exported, load_external_data=False).metadata_props
                if entry.key == KEY]  # fmt: skip
    digest = hashlib.sha256(exported.read_bytes().replace(found.encode(), b"0" * 64))
    for file in sorted(exported.parent.glob("*.data")):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} {hashlib.sha256(content).hexdigest()}\n".encode())
    assert found == digest.hexdigest()


def test_two_exports_are_the_same_byte_for_byte(exported, tmp_path):
    (tmp_path / "again").mkdir()
    write(tmp_path / "again" / exported.name, *support.exported(pixels=True))
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_a_whole_file_is_said_to_be_right(exported):
    assert ("kind", "ONNX file; its checksum is right") in inspect(str(exported))


@pytest.mark.parametrize("place", [0.05, 0.5, 0.95, 0.99])
def test_a_flipped_bit_is_refused_by_inspection_and_build(exported, tmp_path, place):
    target = next(exported.parent.glob("*.data"), exported)
    content = bytearray(target.read_bytes())
    content[int(place * len(content))] ^= 1
    target.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"model\.onnx: (altered|damaged)"):
        inspect(str(exported))
    with pytest.raises(FileFormatError, match=r"model\.onnx: (altered|damaged)"):
        build_engine(exported, tmp_path / "model.engine")
    assert not (tmp_path / "model.engine").exists()


def test_a_changed_weight_is_refused_with_both_ways_out(exported, tmp_path):
    model = onnx.load(exported)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(model, exported)
    assert refused(exported, lambda: inspect(str(exported)))
    assert refused(exported, lambda: build_engine(exported, tmp_path / "model.engine"))
    support.save_edited(model, exported)
    assert dict(inspect(str(exported)))["checksum"] == "none: edited since it was exported, or compiled"
    build_engine(exported, tmp_path / "model.engine")


def test_flipped_bits_do_not_remove_the_entry(exported):
    """One without an entry is taken, so no bit of the entry itself may make a file without."""
    content = exported.read_bytes()
    start = content.index(b"rP\n\x0ctqdit_sha256")
    for bit in [*range(8 * 18), *range(8 * 18, 8 * 82, 17)]:
        spoilt = bytearray(content)
        spoilt[start + bit // 8] ^= 1 << bit % 8
        exported.write_bytes(spoilt)
        with pytest.raises(FileFormatError):
            check(exported)


def test_no_cut_leaves_a_card_without_the_digest(exported):
    content = exported.read_bytes()
    for length in range(content.index(b"rP\n\x0ctqdit_sha256") - 5, len(content)):
        exported.write_bytes(content[:length])
        with pytest.raises(FileFormatError):
            inspect(str(exported))


def test_a_file_is_hashed_in_pieces_with_progress(exported, monkeypatch):
    monkeypatch.setattr(onnx_seal, "CHUNK_BYTES", 1009)  # so that a digest lies across two pieces somewhere
    said = []
    assert check(exported, progress=lambda *news: said.append(news))
    size = sum(file.stat().st_size for file in exported.parent.iterdir())
    assert said[-1] == ("checking the file (MB)", size >> 20, size >> 20)
    assert len(said) >= size // 1009
    at = exported.read_bytes().index(b"tqdit_sha256\x12@") + 14
    for chunk in (at + 1, at + 63, at + 64, at // 2 + 16):
        monkeypatch.setattr(onnx_seal, "CHUNK_BYTES", chunk)
        assert check(exported)


def test_what_a_backend_compiled_claims_no_digest(exported, tmp_path):
    """ONNX Runtime keeps the metadata of what it compiles."""
    build_engine(exported, tmp_path / "model.engine")
    compiled = tmp_path / "model.engine" / "graph.onnx"
    (value,) = [
        entry.value for entry in onnx.load(compiled, load_external_data=False).metadata_props if entry.key == KEY
    ]
    assert value == "0" * 64
    assert not check(compiled)
    assert inspect(str(tmp_path / "model.engine"))[0] == ("kind", "engine bundle; every checksum is right")


def test_a_file_of_ours_without_its_card_is_refused(exported):
    model = onnx.load(exported)
    del model.metadata_props[:]
    onnx.save(model, exported)
    with pytest.raises(FileFormatError, match="tqdit-export wrote it with 'tqdit' metadata, which is not there"):
        inspect(str(exported))


def test_files_of_others_need_no_digest(tmp_path):
    graph = onnx.parser.parse_graph("g (float[2] x) => (float[2] y) { y = Add(x, w) }")
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "w"))
    onnx.save(onnx.helper.make_model(graph), tmp_path / "theirs.onnx")
    assert not check(tmp_path / "theirs.onnx")
