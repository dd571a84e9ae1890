"""`tqdit-build --triton`: a repository as Triton Inference Server reads it. The server itself is not here.

The server's module of utilities is a stand-in; config.pbtxt is read by a strict parser of protobuf's text format with
the fields of the server's model_config.proto. By hand the same texts were read by tritonclient's model_config_pb2.
"""

import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import support
from tqdit.cli import main as cli
from tqdit.engines.build.triton import write_triton
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.sampler import Sampler
from tqdit.exporter.onnx_writer import write

TENSOR = {"name": str, "data_type": {"TYPE_FP32", "TYPE_INT64", "TYPE_INT32", "TYPE_UINT8", "TYPE_BOOL"}, "dims": [int],
          "optional": bool}  # fmt: skip
SCHEMA = {
    "name": str, "backend": str, "max_batch_size": int, "input": [TENSOR], "output": [TENSOR],
    "instance_group": [{"count": int, "kind": {"KIND_CPU", "KIND_GPU"}}],
}  # fmt: skip
TOKEN = re.compile(r'\s+|#[^\n]*|(?P<token>"(?:[^"\\\n]|\\.)*"|-?\d+|[A-Za-z_]\w*|[\[\]{}:,])')


def parse(text):
    """A message of SCHEMA; asserts every rule that it knows."""
    tokens, at = [], 0
    while at < len(text):
        match = TOKEN.match(text, at)
        assert match, text[at : at + 20]
        at = match.end()
        tokens += [match["token"]] if match["token"] else []
    tokens.append("}")
    message = _message(tokens, SCHEMA)
    assert tokens == []
    return message


def _message(tokens, schema):
    found = {}
    while (key := tokens.pop(0)) != "}":
        assert key in schema, key
        assert key not in found, key
        if tokens[0] == ":":
            tokens.pop(0)
        else:  # only before messages and lists of them
            assert tokens[0] in "{["
            assert isinstance(schema[key], list), key
        found[key] = _value(tokens, schema[key])
    return found


def _value(tokens, kind):
    token = tokens.pop(0)
    if isinstance(kind, list):
        assert token == "["
        values = []
        while tokens[0] != "]":
            values.append(_value(tokens, kind[0]))
            assert tokens[0] in ",]"
            if tokens[0] == ",":
                tokens.pop(0)
                assert tokens[0] != "]", "protobuf takes no comma at the end"
        tokens.pop(0)
        return values
    if isinstance(kind, dict):
        assert token == "{"
        return _message(tokens, kind)
    if isinstance(kind, set):
        assert token in kind
        return token
    if kind is bool:
        return {"true": True, "false": False}[token]
    assert token.startswith('"') == (kind is str), token
    return json.loads(token) if kind is str else int(token)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "small.onnx"
    write(path, *support.exported(pixels=True))
    return path


@pytest.fixture(scope="module")
def repository(model):
    folder = model.parent / "repository"
    for _ in range(2):  # replaces its own
        assert cli.run("build", [str(model), "--backend", "onnxruntime", "--triton", str(folder), "-q"]) == 0
    return folder


def test_the_configuration_is_the_server_s(repository):
    config = parse((repository / "small" / "config.pbtxt").read_text())
    assert (config["name"], config["backend"], config["max_batch_size"]) == ("small", "python", 0)
    assert config["input"][0] == {"name": "class_labels", "data_type": "TYPE_INT64", "dims": [-1]}
    assert [(each["name"], each["optional"]) for each in config["input"][1:]] == [
        ("seed", True), ("steps", True), ("guidance_scale", True),
    ]  # fmt: skip
    assert config["output"] == [{"name": "images", "data_type": "TYPE_UINT8", "dims": [-1, 8, 8, 3]}]
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    assert (
        '{"name": "class_labels", "datatype": "INT64", "shape": [1], "data": [1]}'
        in (repository / "small" / "README.md").read_text()
    )
    assert sorted(each.name for each in (repository / "small" / "1").iterdir()) == ["model.engine", "model.py"]


def test_any_name_of_a_folder_is_a_name_of_a_model(repository, tmp_path):
    bundle = repository / "small" / "1" / "model.engine"
    for name in ('a "b"', "back\\slash", "zwölf {0}", "two\nlines"):
        made = write_triton(bundle, read_manifest(bundle), tmp_path, name)
        assert parse((made / "config.pbtxt").read_text(encoding="utf-8"))["name"] == name
        assert name in (made / "README.md").read_text(encoding="utf-8")


def test_engines_of_gpus_get_one(repository, tmp_path):
    manifest = read_manifest(repository / "small" / "1" / "model.engine")
    bundle = repository / "small" / "1" / "model.engine"
    object.__setattr__(manifest, "backend", "tensorrt")
    made = write_triton(bundle, manifest, tmp_path, "g")
    assert parse((made / "config.pbtxt").read_text())["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]


def request(**inputs):
    return {name: SimpleNamespace(as_numpy=lambda value=value: np.array(value)) for name, value in inputs.items()}


def test_the_model_answers_as_the_sampler_does(repository, monkeypatch):
    utils = SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: request.get(name),
        Tensor=lambda name, array: (name, array), TritonError=str,
        InferenceResponse=lambda output_tensors, error=None: SimpleNamespace(outputs=output_tensors, error=error),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    folder = repository / "small"
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_repository": str(folder), "model_version": "1", "model_instance_kind": "CPU",
                      "model_instance_device_id": "0"})  # fmt: skip
    chosen = {"steps": [3], "guidance_scale": np.float32([2.0])}
    first, second, third = model.execute([
        request(class_labels=[1, 2], seed=[7], **chosen), request(class_labels=[99], **chosen), request(seed=[1]),
    ])  # fmt: skip
    with Sampler.open(folder / "1" / "model.engine") as sampler:
        expected = sampler.sample([1, 2], guidance_scale=2.0, seed=7, steps=3)
    ((name, images),) = first.outputs
    assert (name, first.error) == ("images", None)
    assert np.array_equal(images, expected)
    assert second.outputs == third.outputs == []
    assert "99" in second.error
    assert "'class_labels' is missing" in third.error
    model.finalize()


def test_a_folder_of_somebody_else_stays(model, tmp_path, capsys):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.pbtxt").write_text('name: "mine"')
    assert cli.run("build", [str(model), "--backend", "onnxruntime", "--triton", str(tmp_path), "-q"]) == 1
    assert "tqdit-build --triton" in capsys.readouterr().err
    assert (tmp_path / "small" / "config.pbtxt").read_text() == 'name: "mine"'
