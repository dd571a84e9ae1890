"""`tqdit-build --optimum`: the transformer's folder of optimum-intel's pipelines.

Not tested with optimum-intel itself, which pins older transformers than the rest of this environment. What its
OVModelTransformer does with the folder is repeated here: it reads both files, makes shapes free, and feeds torch
tensors by the names of diffusers' arguments.
"""

import json
from dataclasses import replace

import numpy as np
import openvino
import pytest
import torch

import tqdit
from support import few, made_once
from tqdit.cli.main import run
from tqdit.engines.backends.openvino.build import GRAPH_FILE
from tqdit.engines.backends.openvino.optimum import check_optimum, write_optimum
from tqdit.engines.bundle import read_manifest
from tqdit.errors import UsageError
from tqdit.onnx_file import read_card
from tqdit.quantization.table import read_scale_table
from zoo.test_pipelines import make

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")]

# Of each pipeline: what is fed besides the ports. Values are those of other calls, as nothing in the graph reads them.
ROPE = {"num_frames": 7, "height": 7, "width": 7, "rope_interpolation_scale": torch.ones(3)}
FED = {
    "flux": {"img_ids": torch.zeros(16, 3, dtype=torch.float16), "txt_ids": torch.zeros(6, 3)},
    "sd3": {}, "sana": {}, "ltx": ROPE,
}  # fmt: skip
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # the ov_config that the guide names


@pytest.fixture(scope="module", params=few(FED, "flux", "sana"))
def written(request, tmp_path_factory):
    """A family's name, its folder and the one for optimum-intel."""
    folder, place = (
        made_once(f"zoo-{request.param}", lambda path: make(request.param, path)),
        tmp_path_factory.mktemp("o"),
    )
    command = [folder / "model.onnx", "-o", place / "model.engine", "--backend", "openvino", "--optimum", place, "-q"]
    assert run("build", list(map(str, command))) == 0
    return request.param, folder, place


def free(model):
    """The model with the shapes that OVDiffusionPipeline gives it unless it is told `dynamic_shapes=False`."""
    shapes = {}
    for port in model.inputs:
        shape = port.get_partial_shape()
        if port.get_any_name() == "hidden_states":
            shape = [-1, shape[1], -1, -1] if len(shape) == 4 else [-1, -1, shape[2]]
        elif port.get_any_name() in ("timestep", "guidance"):
            shape = [-1]
        elif port.get_any_name() in ("img_ids", "txt_ids"):
            shape = [-1, 3]
        elif port.get_any_name() not in ROPE:
            shape[0] = -1
            if port.get_any_name() != "pooled_projections":
                shape[1] = -1
        shapes[port] = shape
    model.reshape(shapes)
    return model


@pytest.mark.parametrize("change", [free, lambda model: model], ids=["free shapes", "own shapes"])
def test_it_computes_what_the_engine_computes(written, change):
    name, folder, place = written
    inputs = read_scale_table(folder / "scales.safetensors").golden.inputs
    core = openvino.Core()
    model = change(core.read_model(place / "transformer" / "openvino_model.xml"))
    assert {port.get_any_name() for port in model.inputs} == {*inputs, *FED[name]}
    compiled = core.compile_model(model, "CPU", FLOAT32)
    fed = {port: torch.from_numpy(array) for port, array in inputs.items()} | FED[name]
    (found,) = compiled(fed, share_inputs=True).to_dict().values()
    with tqdit.Denoiser.open(place / "model.engine") as denoise:
        np.testing.assert_array_equal(found, denoise(**inputs))
    if change is free:  # OpenVINO notices another resolution only with several threads
        return
    half = fed["hidden_states"][..., : fed["hidden_states"].shape[-2] // 2, :]
    with pytest.raises(RuntimeError):  # another resolution
        compiled(fed | {"hidden_states": half}, share_inputs=True)


def test_a_residual_is_left_out(written, tmp_path):
    """Of an engine with forecasts, whose graph has it as its second output."""
    _, _, place = written
    manifest, bundle = read_manifest(place / "model.engine"), tmp_path / "model.engine"
    bundle.mkdir()
    model = openvino.Core().read_model(place / "model.engine" / GRAPH_FILE)
    (found,) = model.outputs
    doubled = openvino.opset13.multiply(found.get_node().input_value(0), np.float32(2))
    doubled.output(0).set_names({"residual"})
    model.add_results([openvino.opset13.result(doubled)])
    openvino.save_model(model, bundle / GRAPH_FILE, compress_to_fp16=False)
    write_optimum(bundle, manifest.card, tmp_path)
    (kept,) = openvino.Core().read_model(tmp_path / "transformer" / "openvino_model.xml").outputs
    assert kept.get_names() == found.get_names()


def test_its_configuration_is_what_pipelines_read(written):
    name, _, place = written
    config = json.loads((place / "transformer" / "config.json").read_text())
    card = read_manifest(place / "model.engine").card
    assert config["_class_name"] == card.signature.family
    assert config["in_channels"] == card.config["in_channels"]
    if name in ("flux", "sd3"):
        assert config["pooled_projection_dim"] in (24, 32)
    assert sorted(path.name for path in (place / "transformer").iterdir()) == [
        "config.json", "openvino_model.bin", "openvino_model.xml",
    ]  # fmt: skip


def test_only_what_tqdit_wrote_is_replaced(written, tmp_path, capsys):
    _, folder, place = written
    command = ["build", [str(folder / "model.onnx"), "-o", str(tmp_path / "a.engine"), "--backend", "openvino", "-q"]]
    again = [*command[1], "--optimum", str(place)]
    assert run("build", again) == 0
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    assert run("build", [*command[1], "--optimum", str(tmp_path)]) == 1
    assert "'config.json' is not of a transformer that tqdit-build wrote" in capsys.readouterr().err


def test_what_its_pipelines_do_not_feed_is_refused(written, tmp_path, capsys):
    _, folder, _ = written
    card = read_card(folder / "model.onnx")
    ports = card.signature.ports
    other = replace(card, signature=replace(card.signature, ports=(*ports[:-1], replace(ports[-1], name="extra"))))
    for refused, found in (
        (other, "extra"),
        (replace(card, graph="step"), "step graph"),
        (replace(card, rows=1), "1 row"),
    ):
        with pytest.raises(UsageError, match=found):
            check_optimum(refused, tmp_path)
    arguments = [str(folder / "model.onnx"), "--optimum", str(tmp_path), "--backend", "onnxruntime", "-q"]
    assert run("build", arguments) == 2
    assert "--optimum has no meaning for onnxruntime" in capsys.readouterr().err
