"""Every variant is taken by the other tools: onnx's checker, OpenVINO, Polygraphy, TensorRT-RTX, and our own lint."""

import os
import subprocess
import sys

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
import openvino
import pytest

import support
from tables import Kind, make_table
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.lint import lint
from tqdit.onnx_file import OnnxFile

pytestmark = pytest.mark.slow

VARIANTS = {
    "simulated W8A8": ("simulated", Kind(groups=10)),
    "integer W6A6 groups everywhere": ("integer", Kind(6, 6, groups=10, everywhere=True)),
    "float attention W4A8 asymmetric": ("float", Kind(4, 8, asymmetric=True, groups=10, everywhere=True)),
    "one group, inputs of the conditioning": ("integer", Kind(conditioning_inputs=True)),
    "float": ("float", None),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def file(request, tmp_path_factory):
    form, kind = request.param
    path = tmp_path_factory.mktemp("variant") / "model.onnx"
    table = None if kind is None else make_table(support.tiny_model(), kind)
    write(path, *support.exported(ExportConfig("step", attention=form), table=table))
    write(path.with_name("denoiser.onnx"), *support.exported(ExportConfig("denoiser", attention=form), table=table))
    return path


def test_the_full_checker_takes_it(file):
    onnx.checker.check_model(str(file), full_check=True)


def test_the_lint_finds_nothing_but_functions_for_openvino(file):
    assert {finding.rule for finding in lint(onnx.load(file))} <= {"function"}
    assert lint(onnx.inliner.inline_local_functions(onnx.load(file))) == ()


def compile_for_openvino(path):
    """Inlined, in float32 around the integers, and without rounding the inputs of products with int8 weights alone.

    OpenVINO does the latter by default (dynamic quantization: 1.8 % of this model's output), which nobody asked for.
    """
    inlined = onnx.inliner.inline_local_functions(onnx.load(path))
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    return core.compile_model(core.read_model(inlined.SerializeToString()), "CPU", settings)


def test_openvino_compiles_the_step(file):
    assert len(compile_for_openvino(file).inputs) == 5


def test_openvino_computes_the_denoiser(file):
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.standard_normal((48, 4, 8, 8), np.float32),
        "timestep": np.linspace(0, 999, 48).astype(np.int64),
        "class_labels": np.arange(48) % 6,
    }
    path = file.with_name("denoiser.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (expected,) = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)
    quantization = OnnxFile.read(path).own_card.quantization
    bits = 8 if quantization is None else quantization.activation_bits
    support.assert_agrees(compile_for_openvino(path)(inputs)[0], expected, bits)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(VARIANTS["simulated W8A8"], marks=pytest.mark.full),
        VARIANTS["integer W6A6 groups everywhere"],
    ],
    indirect=True,
)
def test_polygraphy_inspects_and_sanitizes_it(file, tmp_path):
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    clean = tmp_path / "clean.onnx"
    for command in (["inspect", "model", str(file)], ["surgeon", "sanitize", str(file), "-o", str(clean)]):
        code = "import sys; from polygraphy.tools import main; sys.argv = ['polygraphy', *sys.argv[1:]]; main()"
        result = subprocess.run(
            [sys.executable, "-c", code, *command], capture_output=True, text=True, env=environment, check=False
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    kept = {node.op_type for node in onnx.load(clean).graph.node}
    assert {node.op_type for node in onnx.load(file).graph.node} & {"MultiRegionSoftmax", "QuantizeLinear"} <= kept


def test_tensorrt_rtx_parses_it(file):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for Linux on x86-64 only")
    code = (
        "import sys, tensorrt_rtx as trt\n"
        "logger = trt.Logger(trt.Logger.ERROR)\n"
        "network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))\n"
        "parser = trt.OnnxParser(network, logger)\n"
        "assert parser.parse_from_file(sys.argv[1]), [str(parser.get_error(i)) for i in range(parser.num_errors)]\n"
        "print(network.num_layers)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) > 50
