"""Bundles on disk: whole, unaltered, for this machine; or refused by name."""

import json
import shutil

import onnx
import onnxruntime
import pytest

import support
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import MANIFEST, check_overwrite, read_manifest
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import BackendError, FileFormatError, OutputError, UsageError
from tqdit.exporter.onnx_writer import write


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy.engine")


def change_manifest(folder, **changes):
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(values | changes))


def test_a_manifest_survives_json(bundle):
    manifest = read_manifest(bundle)
    assert manifest.from_json(json.dumps(manifest.to_json()), bundle) == manifest
    assert manifest.versions["onnxruntime"] == onnxruntime.__version__
    assert manifest.backend == "onnxruntime"
    assert set(manifest.files) == {"graph.onnx"}


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_truncated_part_is_named(copy, cut):
    part = copy / "graph.onnx"
    part.write_bytes(part.read_bytes()[:-cut])
    with pytest.raises(FileFormatError, match=r"graph\.onnx: \d+ bytes, the manifest says \d+: truncated"):
        Sampler.open(copy)


def test_a_single_flipped_bit_is_named(copy):
    part = copy / "graph.onnx"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"graph\.onnx: altered since it was built"):
        Sampler.open(copy)


def test_a_missing_part_is_named(copy):
    (copy / "graph.onnx").unlink()
    with pytest.raises(FileFormatError, match=r"graph\.onnx: missing"):
        Sampler.open(copy)


@pytest.mark.parametrize("cut", range(1, 900, 97))
def test_a_truncated_manifest_is_refused(copy, cut):
    manifest = copy / MANIFEST
    manifest.write_text(manifest.read_text()[:-cut])
    if cut == 1:  # only the final newline is gone
        Sampler.open(copy).close()
        return
    with pytest.raises(FileFormatError, match="damaged"):
        Sampler.open(copy)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format_version": 2}, FileFormatError, "format 2, this tqdit reads format 3"),
        ({"entry": "../graph.onnx"}, FileFormatError, r"'\.\./graph\.onnx' is not a file of this bundle"),
        ({"decoder": "decoder.onnx"}, FileFormatError, r"'decoder\.onnx' is not a file of this bundle"),
        ({"files": {"/etc/passwd": {"sha256": "", "size_bytes": 1}}}, FileFormatError, "'/etc/passwd' is not a file"),
        ({"card": {}}, FileFormatError, "damaged"),
        ({"precision": 8}, FileFormatError, r"damaged \(.*precision"),
        ({"batch": {"least": 2, "best": 1, "most": 1}}, FileFormatError, "damaged"),
        ({"audit": {"integer": 1}}, FileFormatError, "damaged"),
        ({"files": {"graph.onnx": {"sha256": "", "size_bytes": "1"}}}, FileFormatError, "damaged"),
        ({"backend": "abacus"}, UsageError, "unknown backend 'abacus'"),
        ({"target": {"machine": "riscv64"}}, BackendError, "built for riscv64, this machine is"),
        ({"versions": {"onnxruntime": "99.1.0"}}, BackendError, r"built by ONNX Runtime 99\.1\.0, installed is"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(copy, changes, error, message):
    change_manifest(copy, **changes)
    with pytest.raises(error, match=message):
        Sampler.open(copy)


def test_folders_that_are_no_bundles_are_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"no such engine\. Run tqdit-build first"):
        Sampler.open(tmp_path / "nothing")
    with pytest.raises(FileFormatError, match=r"it has no manifest\.json"):
        Sampler.open(tmp_path)


def test_only_bundles_are_replaced(copy, tmp_path):
    for place in (copy, tmp_path / "nothing", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        check_overwrite(place, force=False)
    (copy / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("mine")
    home = tmp_path / "home"
    (home / ".git").mkdir(parents=True)
    (home / MANIFEST).write_text('{"name": "another program\'s"}')
    for place, name in ((copy, "thesis.tex"), (tmp_path / "file", "file"), (home, ".git")):
        for force in (False, True):
            with pytest.raises(OutputError, match=rf"'{name}' is not of an engine bundle.*empty the place yourself"):
                check_overwrite(place, force)


def test_a_bundle_of_another_version_is_replaced_by_force_alone(copy):
    change_manifest(copy, format_version=2)
    with pytest.raises(OutputError, match=r"format 2, this tqdit writes format 3.*--force"):
        check_overwrite(copy, force=False)
    check_overwrite(copy, force=True)


def test_rebuilding_replaces_the_whole_bundle_and_nothing_of_the_users(tmp_path):
    write(tmp_path / "model.onnx", *support.exported(pixels=True))
    output = tmp_path / "model.engine"
    build_engine(str(tmp_path / "model.onnx"), str(output))
    (output / "graph.onnx").write_bytes(b"old")
    build_engine(tmp_path / "model.onnx", output)
    assert (output / "graph.onnx").read_bytes() != b"old"
    (output / "stray").write_text("not listed")
    with pytest.raises(OutputError, match="'stray' is not of an engine bundle"):
        build_engine(tmp_path / "model.onnx", output)
    assert sorted(file.name for file in output.iterdir()) == ["graph.onnx", MANIFEST, "stray"]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_graph_that_cannot_be_compiled_leaves_no_bundle(tmp_path):
    model = tmp_path / "model.onnx"
    graph, card = support.exported(pixels=True)
    write(model, graph, card)
    edited = onnx.load(model)
    for node in edited.graph.node:
        node.op_type = node.op_type.replace("LayerNormalization", "LayerNormalizatiom")
    onnx.save(edited, model)
    with pytest.raises(BackendError, match=r"model\.onnx: ONNX Runtime .* cannot open it"):
        build_engine(model, tmp_path / "model.engine")
    assert not (tmp_path / "model.engine").exists()


def test_both_distributions_of_onnxruntime_are_refused(bundle, monkeypatch):
    from tqdit.engines.backends.onnxruntime import library

    monkeypatch.setattr(library.metadata, "distributions", lambda name: [name])
    with pytest.raises(BackendError, match=r"both installed.*pip uninstall"):
        Sampler.open(bundle)


def test_a_missing_backend_comes_with_the_pip_command(bundle, monkeypatch):
    import sys

    from tqdit.errors import MissingLibraryError

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'onnxruntime>="):
        Sampler.open(bundle)
