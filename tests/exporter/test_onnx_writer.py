"""ONNX files on disk: large weights, side files, refusals, interruptions."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import support
from tqdit import onnx_file
from tqdit.card import FORMAT_VERSION, METADATA_KEY, GraphCard
from tqdit.errors import FileFormatError, OutputError
from tqdit.exporter.onnx_writer import check_overwrite, write
from tqdit.onnx_file import OnnxFile, read_card


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "model.onnx"
    write(path, *support.exported())
    return path


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def run(path):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    one = np.zeros(1, np.int64)
    return session.run(None, {"x": np.ones((1, 4, 8, 8), np.float32), "timestep": one, "class_labels": one})


@pytest.mark.slow
def test_large_weights_lie_beside_the_file_and_compute_the_same(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "EXTERNAL_DATA_BYTES", 1000)
    large = tmp_path / "large" / "model.onnx"
    large.parent.mkdir()
    write(large, *support.exported())
    data = [name for name in names(large.parent) if name.endswith(".data")]
    assert len(data) == 1
    assert large.stat().st_size < exported.stat().st_size
    onnx.checker.check_model(str(large), full_check=True)
    np.testing.assert_array_equal(run(large)[0], run(exported)[0])


@pytest.mark.slow
def test_a_replaced_export_takes_its_side_files_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "EXTERNAL_DATA_BYTES", 1000)
    path = tmp_path / "model.onnx"
    for seed in (0, 1):
        write(path, *support.exported(seed=seed))
    assert len(names(tmp_path)) == 2
    run(path)


@pytest.mark.slow
def test_a_failed_export_leaves_the_old_one_untouched(exported, monkeypatch):
    before = exported.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_file.onnx, "save", fail)
    with pytest.raises(OutputError, match=r"model\.onnx: cannot be written \(No space left on device\)\. Free some"):
        write(exported, *support.exported(seed=1))
    assert exported.read_bytes() == before
    assert names(exported.parent) == ["model.onnx"]


@pytest.mark.slow
def test_only_our_own_files_are_overwritten(exported, tmp_path):
    check_overwrite(exported, force=False)
    foreign = tmp_path / "foreign.onnx"
    foreign.write_text("not ours")
    theirs = tmp_path / "theirs.onnx"
    graph, _ = support.exported()
    graph.metadata_props.clear()
    graph.producer_name = "another program"
    ir.save(graph, theirs)
    for place in (foreign, theirs):
        for force in (False, True):
            with pytest.raises(OutputError, match=r"s?\.onnx: exists and was not written by tqdit.*remove it yourself"):
                check_overwrite(place, force)
    with pytest.raises(OutputError, match="is a directory"):
        check_overwrite(tmp_path, force=False)


def test_a_file_of_another_version_is_replaced_by_force_alone(exported):
    model = onnx.load(exported)
    (entry,) = model.metadata_props
    entry.value = entry.value.replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 1')
    onnx.save(model, exported)
    with pytest.raises(OutputError, match=r"format 1, this tqdit reads format \d+.*--force"):
        check_overwrite(exported, force=False)
    check_overwrite(exported, force=True)


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_a_truncated_file_is_refused_by_name(exported, cut):
    exported.write_bytes(exported.read_bytes()[:-cut])
    with pytest.raises(FileFormatError, match=r"model\.onnx"):
        read_card(exported)


def test_a_foreign_onnx_file_is_refused(tmp_path):
    path = tmp_path / "relu.onnx"
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[1] x) => (float[1] y) {y = Relu(x)}'
    )
    onnx.save(model, path)
    with pytest.raises(FileFormatError, match=r"relu\.onnx: an ONNX file, but not one that tqdit-export wrote"):
        read_card(path)


@pytest.mark.slow
def test_weights_outside_the_folder_are_refused(exported, monkeypatch):
    monkeypatch.setattr(onnx_file, "EXTERNAL_DATA_BYTES", 1000)
    write(exported, *support.exported())
    file = OnnxFile.read(exported)
    for tensor in file.model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret.data"
    with pytest.raises(FileFormatError, match=r"'\.\./secret\.data', outside its own folder"):
        _ = file.weight_files


@pytest.fixture
def with_weights(exported, monkeypatch):
    """An export with its weights in a file beside it: both paths."""
    monkeypatch.setattr(onnx_file, "EXTERNAL_DATA_BYTES", 1000)
    write(exported, *support.exported())
    (weights,) = OnnxFile.read(exported).weight_files
    return exported, weights


@pytest.mark.slow
def test_weights_behind_a_link_out_of_the_folder_are_refused(with_weights):
    path, weights = with_weights
    target = path.parent.parent / f"{path.parent.name}-secret"
    weights.rename(target)
    weights.symlink_to(target)
    with pytest.raises(FileFormatError, match=rf"'{weights.name}', outside its own folder"):
        _ = OnnxFile.read(path).weight_files
    weights.unlink()
    target.rename(path.parent / "inside.data")
    weights.symlink_to("inside.data")
    assert OnnxFile.read(path).weight_files == (weights,)


@pytest.mark.slow
def test_weights_in_the_cache_of_a_model_hub_are_read(with_weights, tmp_path):
    (blobs := tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    (snapshot := tmp_path / "models--a--b" / "snapshots" / "0a1b").mkdir(parents=True)
    for file in with_weights:
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    path, weights = (snapshot / file.name for file in with_weights)
    assert OnnxFile.read(path).weight_files == (weights,)
    (blobs / f"hash-of-{weights.name}").rename(tmp_path / "secret")
    (blobs / f"hash-of-{weights.name}").symlink_to(tmp_path / "secret")
    with pytest.raises(FileFormatError, match="outside its own folder"):
        _ = OnnxFile.read(path).weight_files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card | {"format_version": 99}, "written in format 99, this tqdit reads format 3"),
        (lambda card: {k: v for k, v in card.items() if k != "sampling"}, "damaged"),
        (lambda card: card | {"signature": card["signature"] | {"output": [None, -8, 8, 8]}}, "damaged"),
        (lambda card: card | {"sampling": card["sampling"] | {"sampler": "euler"}}, "damaged"),
        (lambda card: card | {"graph": "other"}, "damaged"),
        (lambda card: card | {"sampling": card["sampling"] | {"steps": 0}}, "damaged"),
        (lambda _: [], "damaged"),
    ],
)
def test_a_damaged_card_is_refused(exported, change, message):
    card = json.loads(json.dumps(read_card(exported).to_json()))
    with pytest.raises(FileFormatError, match=message):
        GraphCard.from_json(json.dumps(change(card)), "model.onnx")
    assert METADATA_KEY == "tqdit"
