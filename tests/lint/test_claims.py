"""The consequences that the lint's messages state, seen in the backends themselves.

Only what can be seen without a GPU: which products ONNX Runtime, OpenVINO and TensorRT-RTX's builder keep in integers,
and which files they refuse.
"""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lint_graphs import CONSTANTS, FUNCTION, QUANTIZED, graph, vector, weight
from tqdit.lint import lint

ROWS = QUANTIZED.replace("(x, s, zero)", "<axis = 0>(x, r, zr)").replace("(a, s, zero)", "<axis = 0>(a, r, zr)")
TENSOR = QUANTIZED.replace(", s, zero", ", r, zero")
RATIO = "xr = Div(x, r)" + QUANTIZED.replace("(x, s", "(xr, s").replace("y = MatMul", "p = MatMul") + "y = Mul(p, r)"
MANY = ", ".join([CONSTANTS, vector("rows", 64), vector("zeros", 64, 0, "int8")])
CHANNELS = QUANTIZED.replace(", s, zero", ", rows, zeros")
BLOCKS = QUANTIZED.replace("(x, s, zero)", "<block_size = 64>(x, t, tz)").replace(
    "(a, s, zero)", "<block_size = 64>(a, t, tz)"
)


def uneven(name, count):
    return numpy_helper.from_array(0.001 * np.arange(1, count + 1, dtype=np.float32), name)


WRONG_AXIS = graph(
    QUANTIZED.replace("(w, ws)", "<axis = 0>(w, uneven)"),
    outputs="float[2, 64] y",
    weights=(weight("w", (64, 64)), uneven("uneven", 64)),
)
MODELS = {
    "clean": graph(QUANTIZED),
    "ratio form": graph(RATIO, inputs="float[2, 64] x, float[2, 1] r"),
    "scale per row at run time": graph(
        "n = Constant<value_ints = [2]>() zr = Expand(zero, n)" + ROWS, inputs="float[2, 64] x, float[2] r"
    ),
    "scale per tensor at run time": graph(TENSOR, inputs="float[2, 64] x, float r"),
    "output type without zero point": graph(
        "a = QuantizeLinear<output_dtype = 3>(x, s) b = DequantizeLinear(a, s) c = DequantizeLinear(w, ws) "
        "y = MatMul(b, c)",
        opset=21,
    ),
    "channels of an activation": graph(CHANNELS, MANY),
    "blocks of an activation": graph(
        BLOCKS, CONSTANTS + ", float[2, 1] t = {0.1, 0.2}, int8[2, 1] tz = {0, 0}", opset=21
    ),
    "wrong axis": WRONG_AXIS,
}
INTEGER = {"MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm"}


def optimised(model, path, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def onnxruntime_keeps_integers(model, folder):
    optimised(model, folder / "optimised.onnx")
    return bool(INTEGER & {node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node})


@pytest.mark.parametrize(
    ("name", "keeps"),
    [
        ("clean", True),
        ("ratio form", True),
        ("scale per row at run time", False),
        ("scale per tensor at run time", True),  # the exception that the message names
        ("output type without zero point", False),
        ("channels of an activation", False),
        ("blocks of an activation", False),
    ],
)
def test_onnxruntime_keeps_integers_where_the_lint_says_so(name, keeps, tmp_path):
    model = MODELS[name]
    assert onnxruntime_keeps_integers(model, tmp_path) == keeps
    assert keeps or any(finding.severity == "error" for finding in lint(model, "onnxruntime"))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_scales_on_the_wrong_axis_give_wrong_values(backend, tmp_path):
    x = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    right = optimised(WRONG_AXIS, tmp_path / "o.onnx", level).run(None, {"x": x})[0]
    if backend == "onnxruntime":
        fast = optimised(WRONG_AXIS, tmp_path / "o.onnx").run(None, {"x": x})[0]
    else:
        fast = compiled_by_openvino(WRONG_AXIS, tmp_path)({"x": x})[0]
    assert np.abs(right - fast).max() > 0.5 * np.abs(right).max()


@pytest.mark.parametrize(("opset", "loads"), [(26, True), (27, False)])
def test_onnxruntime_has_the_upper_opset_that_the_table_says(opset, loads, tmp_path):
    model = graph("y = Relu(x)", outputs="float[2, 64] y", opset=opset, weights=())
    if loads:
        optimised(model, tmp_path / "o.onnx")
    else:
        with pytest.raises(Exception, match=r"official support for domain ai\.onnx is till opset 26"):
            optimised(model, tmp_path / "o.onnx")


def compiled_by_openvino(model, folder):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    onnx.save(model, folder / "m.onnx")
    core = openvino.Core()
    # float32 instead of the bfloat16 that OpenVINO prefers on some CPUs, so that there are two cases to tell apart
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(core.read_model(folder / "m.onnx"), "CPU", options)


@pytest.mark.parametrize(
    ("name", "reads"),
    [("clean", "i8"), ("ratio form", "i8"), ("scale per tensor at run time", "f32"),
     ("scale per row at run time", "f32"), ("channels of an activation", "i8")],
)  # fmt: skip
def test_openvino_multiplies_what_the_lint_says(name, reads, tmp_path):
    """By the type of the product's first input: its `runtimePrecision` says i8 in both cases."""
    nodes = compiled_by_openvino(MODELS[name], tmp_path).get_runtime_model().get_ops()
    product = next(node for node in nodes if node.get_rt_info()["layerType"].astype(str) == "FullyConnected")
    assert product.input(0).get_element_type().get_type_name() == reads


def test_openvino_refuses_functions_and_takes_them_inlined(tmp_path):
    model = graph("y = tqdit.twice(x)", outputs="float[2, 64] y", functions=FUNCTION, weights=())
    with pytest.raises(Exception, match="No conversion rule found"):
        compiled_by_openvino(model, tmp_path)
    compiled_by_openvino(onnx.inliner.inline_local_functions(model), tmp_path)


TENSORRT = r"""
import json, pathlib, sys
import tensorrt_rtx as trt

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []
    def log(self, severity, text):
        self.lines.append(text)

log, answers = Log(), {}
builder = trt.Builder(log)
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    log.lines.clear()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(path.read_bytes()):
        answers[path.stem] = "refused"
        continue
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if builder.build_serialized_network(network, config) is None:
        answers[path.stem] = "refused"
        continue
    layers = "\n".join(log.lines).partition("Layers:")[2]
    answers[path.stem] = "integer" if "LayerType: gemm" in layers else "float"
print(json.dumps(answers))
"""
PAIR = "a = QuantizeLinear(x, s, zero) y = DequantizeLinear(a, s, zero)"
SAME = {"outputs": "float[2, 64] y", "weights": ()}
UINT4 = helper.make_tensor("w4", TensorProto.UINT4, [64, 32], [1] * (64 * 32))
BUILDS = {
    "clean": (MODELS["clean"], "integer"),
    "ratio form": (MODELS["ratio form"], "integer"),
    "scale per tensor at run time": (MODELS["scale per tensor at run time"], "float"),
    "channels of an activation": (MODELS["channels of an activation"], "float"),
    "wrong axis": (MODELS["wrong axis"], "float"),
    "zero point at run time": (graph(PAIR.replace("zero", "o"), inputs="float[2, 64] x, int8 o", **SAME), "refused"),
    "zero point of 3": (graph(PAIR, "int8 zero = {3}, float s = {0.02}", **SAME), "refused"),
    "zero scale": (graph(PAIR, "int8 zero = {0}, float s = {0}", **SAME), "refused"),
    "negative scale": (graph(PAIR, "int8 zero = {0}, float s = {-1}", **SAME), "refused"),
    "uint8 activation": (graph(PAIR, "uint8 zero = {0}, float s = {0.02}", **SAME), "float"),  # built without an error
    "uint8 weight": (graph(QUANTIZED, weights=(weight("w", (64, 32), np.uint8),)), "refused"),
    "uint4 weight": (
        graph("c = DequantizeLinear(w4, ws) y = MatMul(x, c)", opset=21, weights=(UINT4,)),
        "refused",
    ),
    "int32 bias": (
        graph(
            QUANTIZED.replace("y = MatMul", "p = MatMul") + "d = DequantizeLinear(i, s) y = Add(p, d)",
            CONSTANTS + "," + vector("i", 32, 1, "int32"),
        ),
        "refused",
    ),
    "DynamicQuantizeLinear": (
        graph("a, k, z = DynamicQuantizeLinear(x) y = DequantizeLinear(a, k, z)", **SAME),
        "refused",
    ),
    "MatMulInteger": (graph("y = MatMulInteger(x, w)", inputs="int8[2, 64] x", outputs="int32[2, 32] y"), "refused"),
    "input left out of a call": (
        graph("y = tqdit.f(x)", functions=FUNCTION.replace("twice (a)", "f (a, k)"), **SAME),
        "refused",
    ),
}


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """What TensorRT-RTX does with each graph. A process of its own: its first logger is its last."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    folder = tmp_path_factory.mktemp("builds")
    for name, (model, _) in BUILDS.items():
        onnx.save(model, folder / f"{name}.onnx")
    done = subprocess.run([sys.executable, "-c", TENSORRT, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BUILDS)
def test_tensorrt_rtx_builds_what_the_lint_says(name, builds):
    model, expected = BUILDS[name]
    assert builds[name] == expected
    errors = [finding for finding in lint(model, "tensorrt-rtx") if finding.severity == "error"]
    assert bool(errors) == (expected != "integer")
