"""Property-based fuzzing of every parser of ours: a value or one line, never another exception."""

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import rounds
from tqdit.calibration.advice import read_advice
from tqdit.calibration.config import QuantizationConfig
from tqdit.card import GraphCard
from tqdit.engines.bundle import MANIFEST, Manifest, read_manifest
from tqdit.engines.config import BatchRange
from tqdit.engines.run.shards import INDEX, read_index
from tqdit.errors import TqditError
from tqdit.lint import lint
from tqdit.models.model_card import ModelCard, read_model_card
from tqdit.models.state import read_tensors
from tqdit.onnx_file import OnnxFile, parse_model, read_card
from tqdit.quantization.granularity import granularity_from_text, granularity_to_text
from tqdit.quantization.table import METADATA_KEY, parse

pytestmark = pytest.mark.hardening
many = settings(max_examples=rounds(400), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
some = settings(many, max_examples=rounds(150))
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 20) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["..", "/etc/passwd", "../x", "step", "ddim", "group:3", "softmax", "\x00"])
)  # fmt: skip
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def places(value, path=()):
    """Paths to every node of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def changed(draw, value):
    """A JSON value with one to three nodes replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(places(value), key=repr)))
        if not path:
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del parent[path[-1]]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=4))] = draw(JSON)
        else:
            parent[path[-1]] = draw(JSON)
    return value


def value_or_one_line(parser, *arguments):
    """What the parser makes of it, or None where it refuses with a sentence; any other exception fails the test."""
    try:
        return parser(*arguments)
    except TqditError as error:
        refusal = str(error)
    assert len(refusal.split()) > 3
    return None


@given(st.data())
@many
def test_cards(inputs, data):
    good = read_card(inputs / "model.onnx").to_json()
    card = value_or_one_line(GraphCard.from_json, json.dumps(data.draw(changed(good))), "x.onnx")
    if card is not None:  # and what it says can be used
        assert len(card.sampling.schedule.timesteps) == card.sampling.steps
        assert np.zeros(card.state_shape).size > 0
        assert card.guidance is None or np.isfinite(card.guidance.scale)
        assert card.latents is None or card.latents.scale != 0
        assert card.quantization is None or card.quantization.summary
        json.dumps(card.to_json())


@given(st.data())
@many
def test_manifests(inputs, data):
    good = json.loads((inputs / "model.engine" / MANIFEST).read_text())
    text = json.dumps(data.draw(changed(good)))
    manifest = value_or_one_line(Manifest.from_json, text, Path("x.engine/manifest.json"))
    if manifest is not None:
        for name in [*manifest.files, manifest.entry]:
            assert Path("x.engine", name).resolve().parent == Path("x.engine").resolve()


def folder_with_index(inputs, values):
    folder = inputs / "changed"
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps(values))
    return folder


@given(st.data())
@many
def test_shard_indexes(inputs, data):
    good = json.loads((inputs / "shards" / INDEX).read_text())
    folder = value_or_one_line(read_index, folder_with_index(inputs, data.draw(changed(good))))
    assert folder is None or folder.done <= folder.job.shards


@given(st.data())
@many
def test_scale_tables(inputs, data):
    """Metadata and tensors changed by themselves, in ways that a valid safetensors file can hold."""
    with safetensors.safe_open(inputs / "scales.safetensors", "np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = (
        json.dumps(data.draw(changed(json.loads(metadata[METADATA_KEY]))))
        if data.draw(st.booleans())
        else metadata[METADATA_KEY]
    )
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = data.draw(st.sampled_from([
        tensors[name], tensors[name].reshape(-1), tensors[name].astype(np.float64), tensors[name] * 0,
        np.full_like(tensors[name], -1), tensors[name][None], np.zeros((0,), tensors[name].dtype),
        np.full(tensors[name].shape, np.nan, np.float32), None,
    ]))  # fmt: skip
    tensors = {key: each for key, each in (tensors | {name: tensor}).items() if each is not None}
    table = value_or_one_line(parse, {METADATA_KEY: text}, tensors)
    if table is not None:  # what was accepted survives a round trip
        assert not any(np.isnan(tensor).any() for tensor in tensors.values())
        again = safetensors.deserialize(table.to_bytes())
        assert {name for name, _ in again} == set(tensors)


@given(st.text(max_size=20) | st.from_regex(r"-?\d{1,3}(,-?\d{0,3}){0,3}", fullmatch=True))
@many
def test_batch_ranges(text):
    found = value_or_one_line(BatchRange.parse, text)
    assert found is None or 1 <= found.least <= found.best <= found.most


@given(st.text(max_size=12) | st.from_regex(r"(tensor|channel|group):?\d{0,3}", fullmatch=True))
@many
def test_granularities(text):
    found = value_or_one_line(granularity_from_text, text)
    assert found is None or granularity_from_text(granularity_to_text(found)) == found


@given(st.data())
@some
def test_the_lints_reader(inputs, data):
    """A valid protobuf message with fields that make no sense."""
    model = onnx.load(inputs / "model.onnx")
    for _ in range(data.draw(st.integers(1, 4))):
        graph = data.draw(st.sampled_from([model.graph, *model.functions]))
        node = data.draw(st.sampled_from(list(graph.node)))
        action = data.draw(st.integers(0, 5))
        if action == 0:
            node.op_type = data.draw(
                st.sampled_from(["DequantizeLinear", "QuantizeLinear", "Reshape", "Cast", "If", "x"])
            )
        elif action == 1 and node.input:
            node.input[data.draw(st.integers(0, len(node.input) - 1))] = data.draw(st.text(max_size=3))
        elif action == 2:
            del node.input[data.draw(st.integers(0, 2)) :]
        elif action == 3:
            del node.output[:]
        elif action == 4 and node.attribute:
            node.attribute[0].type = data.draw(st.integers(0, 14))
        else:
            node.attribute.append(
                onnx.helper.make_attribute(
                    data.draw(st.sampled_from(["axis", "to", "value"])),
                    data.draw(st.integers(-5, 5) | st.text(max_size=3)),
                )
            )
    findings = value_or_one_line(lint, model)
    assert all(finding.node and finding.remedy for finding in findings or ())


@given(st.binary(max_size=400))
@many
def test_onnx_files_of_any_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(content)
    model = value_or_one_line(parse_model, path)
    assert model is None or model.graph.node
    findings = () if model is None else value_or_one_line(lint, model)
    assert all(finding.node and finding.remedy for finding in findings or ())


@given(st.data())
@some
def test_indexes_of_sharded_checkpoints(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "x.index.json"
    path.write_text(
        json.dumps(data.draw(changed({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})))
    )
    assert value_or_one_line(read_tensors, path) in (None, {})


@given(st.data())
@some
def test_model_cards(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "own.json"
    good = {"heads": 2, "class_names": ["a", "b"], "process": {"type": "flow", "shift": 3.0}, "guidance_scale": None}
    path.write_text(json.dumps(data.draw(changed(good))))
    card = value_or_one_line(read_model_card, path)
    assert card is None or isinstance(card, ModelCard)


@given(st.data())
@some
def test_diagnoses(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "diagnosis.json"
    good = {
        "settings": QuantizationConfig().to_json(),
        "fingerprint": "0",
        "advice": [{"layer": "blocks.0.mlp.fc1", "change": {"final": "all"}}],
    }
    path.write_text(json.dumps(data.draw(changed(good))))
    advice = value_or_one_line(read_advice, path)
    assert advice is None or advice.config.with_layer_knobs([]) == advice.config


@given(st.text(max_size=40) | st.from_regex(r"blocks\.\d\.[a-z.]{0,8}:[a-z_]{1,12}=[a-z0-9]{1,4}", fullmatch=True))
@many
def test_overrides(text):
    config = value_or_one_line(lambda: QuantizationConfig(overrides=text))
    assert config is None or config.with_layer_knobs([]).layer_knobs == config.layer_knobs


NAMES = ["../graph.onnx", "/etc/passwd", "..", ".", "", "sub/graph.onnx", "./graph.onnx"]


@pytest.mark.parametrize("name", NAMES)
def test_no_path_in_a_manifest_leaves_its_folder(inputs, tmp_path, name):
    good = json.loads((inputs / "model.engine" / MANIFEST).read_text())
    part = good["files"]["graph.onnx"]
    for changes in (
        {"entry": name, "files": {name: part}},
        {"files": {**good["files"], name: part}},
        {"decoder": name},
    ):
        (tmp_path / MANIFEST).write_text(json.dumps(good | changes))
        if changes == {"decoder": ""}:  # none
            continue
        with pytest.raises(TqditError, match="not a file of this bundle"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_no_path_of_external_data_leaves_its_folder(inputs, tmp_path, name):
    model = onnx.load(inputs / "model.onnx")
    constants = [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
    tensor = constants[0] if constants and name == ".." else model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=name)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(TqditError, match="outside its own folder"):
        _ = OnnxFile.read(tmp_path / "model.onnx").weight_files


@pytest.mark.parametrize("name", [*NAMES, "shard-00000.npz/../../x", "shard-00009.npz"])
def test_no_path_in_an_index_of_shards_leaves_its_folder(inputs, name):
    values = json.loads((inputs / "shards" / INDEX).read_text())
    values["shards"][name] = "0" * 64
    with pytest.raises(TqditError, match="not a shard of this job"):
        read_index(folder_with_index(inputs, values))
