"""TensorRT-RTX really compiles here, without a GPU; what it compiled is read from its own log."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import support
import tqdit
from tables import Kind, make_table
from tqdit.cli import main as cli
from tqdit.engines import cuda
from tqdit.engines.backends.tensorrt import builder, compiler, worker
from tqdit.engines.backends.tensorrt.constants import fold_numbers
from tqdit.engines.backends.tensorrt.library import TENSORRT_RTX
from tqdit.engines.backends.tensorrt.weights import spell_out_weights
from tqdit.engines.build.backend import builder as build_side
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import read_manifest
from tqdit.engines.config import BatchRange, BuildConfig
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import BackendError, UsageError
from tqdit.exporter.graph import ExportConfig, finish_graph, trace_graph
from tqdit.exporter.onnx_writer import write
from tqdit.exporter.vae import DecoderGraph
from tqdit.models import families
from tqdit.models.dit import DiT, DiTConfig, randomize
from tqdit.models.families import published
from tqdit.models.load import load_model
from tqdit.models.products import Scores, ValueProduct

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 only")

BACKEND = "tensorrt-rtx"
XL_STACK = DiTConfig(
    input_size=32, patch_size=2, in_channels=4, out_channels=8, hidden_size=1152, depth=2, mlp_hidden_size=4608,
    num_classes=1000, num_heads=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model, W8A8 with ten groups of timesteps: a file for each form of attention."""
    folder, table = tmp_path_factory.mktemp("demo"), make_table(load_model("demo"), Kind(groups=10))
    files = {form: folder / form / "model.onnx" for form in ("simulated", "integer", "float")}
    for form, file in files.items():
        file.parent.mkdir()
        write(file, *support.exported(ExportConfig(attention=form), "demo", table=table))
    return files


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Two blocks of the width of DiT-XL/2 with everything around them."""
    network = randomize(DiT(XL_STACK)).eval().requires_grad_(False)
    model = published.describe(network, "stack")
    table = make_table(model, Kind(groups=10), operands=ranges_of(network))
    file = tmp_path_factory.mktemp("stack") / "model.onnx"
    write(file, *finish_graph(trace_graph(model, ExportConfig()), model, ExportConfig(), table))
    return file


def ranges_of(network):
    """A range of -3..3 for every operand: the compiler looks at forms, not at values."""
    products = nn.Linear | nn.Conv2d | Scores | ValueProduct
    return {name: (np.float32([-3, 3]),) * 2 for name, one in network.named_modules() if isinstance(one, products)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two blocks of width 16."""
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    write(path, *support.exported(ExportConfig(), table=make_table(support.tiny_model(), Kind(groups=10))))
    return path


@pytest.fixture
def layers(monkeypatch):
    """The layers of every engine that is built in the test."""
    seen = []

    def spy(job, progress):
        compiled = compiler.run_worker(job, progress)
        seen.append(compiled.layers)
        return compiled

    monkeypatch.setattr(builder, "run_worker", spy)
    return seen


def products(layers):
    return [layer for layer in layers if layer.multiplies]


def test_the_demo_model_is_integer_where_it_should_be(demo, tmp_path, layers):
    progress = []
    config = BuildConfig(targets=("8.9", "12.0"), batch=BatchRange(1, 4, 8))
    manifest = build_engine(
        demo["simulated"], tmp_path / "model.engine", BACKEND, config, lambda *step: progress.append(step)
    )
    assert manifest == read_manifest(tmp_path / "model.engine")
    assert manifest.audit.line == (
        "quantized products: 26 int8, 12 simulated by choice, 9 weight-only by choice, 0 fallen back"
    )
    assert (manifest.precision, manifest.float_type, manifest.batch) == ("int8", "fp16", BatchRange(1, 4, 8))
    assert manifest.target == {"compute_capabilities": "8.9,12.0"}
    assert manifest.versions["tensorrt_rtx"] == TENSORRT_RTX.load("").__version__
    assert set(manifest.plugins.values()) == {"body: TensorRT-RTX takes no plugins"}
    assert any(what == "Building engine" and total for what, _, total in progress)
    for layer in products(layers[0]):
        if layer.is_integer:  # scaled by a power of two, since raw accumulators exceed float16's 65504
            assert layer.outputs == ("Half",), layer


def test_integer_attention_and_float_islands_elsewhere(demo, tmp_path, layers):
    manifest = build_engine(demo["integer"], tmp_path / "a.engine", BACKEND, BuildConfig(float_type="fp32"))
    assert (manifest.audit.integer, manifest.audit.simulated, manifest.audit.fallen_back) == (38, 0, ())
    assert manifest.target["compute_capabilities"].startswith("8.0,8.6,8.9,12.0")  # the default leaves Turing out
    names = {node for layer in layers[0] if layer.is_integer for node in layer.nodes}
    assert {"blocks.0.attn.qkv/MatMul", "blocks.0.attn.scores/MatMul", "blocks.0.attn.value_product/MatMul_2"} <= names


def test_products_with_numerators_stay_integer(tmp_path, layers):
    """Both products with V, one for each region, as with probabilities."""
    path, table = tmp_path / "model.onnx", make_table(support.tiny_model(), Kind(groups=10, numerators=True))
    write(path, *support.exported(ExportConfig(attention="integer"), table=table))
    manifest = build_engine(path, tmp_path / "a.engine", BACKEND, BuildConfig())
    assert (manifest.audit.integer, manifest.audit.simulated, manifest.audit.fallen_back) == (14, 0, ())
    names = {node for layer in layers[0] if layer.is_integer for node in layer.nodes}
    assert {"blocks.0.attn.value_product/MatMul", "blocks.0.attn.value_product/MatMul_2"} <= names


def test_float_attention_is_one_fused_kernel_in_bfloat16(demo, tmp_path, layers):
    manifest = build_engine(
        demo["float"], tmp_path / "a.engine", BACKEND, BuildConfig(targets=("8.6",), float_type="bf16")
    )
    assert (manifest.audit.integer, manifest.float_type) == (26, "bf16")
    fused = [layer for layer in layers[0] if "mha" in layer.name]
    assert len(fused) == 6
    assert {kind for layer in fused for kind in layer.inputs} == {"BFloat16"}


def test_qkv_that_would_lose_its_integers_gets_them_back(demo, tmp_path, layers):
    """Float attention in float32: nothing but layout between QKV and its split, the case that weights.py is for."""
    config = BuildConfig(targets=("8.9",), float_type="fp32")
    manifest = build_engine(demo["float"], tmp_path / "a.engine", BACKEND, config)
    lost, kept = ({node for layer in one if layer.is_integer for node in layer.nodes} for one in layers)
    assert "blocks.0.attn.qkv/MatMul" not in lost  # if this fails, the compiler has improved and weights.py can go
    assert "blocks.0.attn.qkv/MatMul" in kept
    assert (manifest.audit.integer, manifest.audit.fallen_back) == (26, ())


def test_weights_that_are_spelled_out_have_the_same_codes(demo):
    model = onnx.load(demo["float"])
    names = ("blocks.0.attn.qkv", "blocks.0.mlp.fc2")
    assert spell_out_weights(model, demo["float"].parent, names) == 2
    onnx.checker.check_model(model)
    rng = np.random.default_rng(0)
    fed = {
        "x": rng.standard_normal((2, 3, 16, 16), np.float32), "timestep": np.array([3, 800]),
        "class_labels": np.array([1, 2]),
    }  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (before,), (after,) = (
        onnxruntime.InferenceSession(one, options, providers=["CPUExecutionProvider"]).run(None, fed)
        for one in (str(demo["float"]), model.SerializeToString())
    )
    assert np.array_equal(before, after)


def test_numbers_of_the_bodies_are_computed_once(demo, tmp_path, layers):
    """The power of two of MultiRegionSoftmax, which TensorRT-RTX would compute in every call."""
    model = onnx.inliner.inline_local_functions(onnx.load(demo["simulated"]))
    fed = {
        "x": np.ones((1, 3, 16, 16), np.float32), "timestep": np.array([3]), "class_labels": np.array([1]),
    }  # fmt: skip
    runs = []
    for _ in range(2):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        runs.append(session.run(None, fed)[0])
        folded = fold_numbers(model)
    assert (folded, np.array_equal(*runs)) == (0, True)
    assert "Pow" not in {node.op_type for node in model.graph.node}
    build_engine(demo["simulated"], tmp_path / "a.engine", BACKEND, BuildConfig(targets=("8.9",)))
    assert [layer for layer in layers[0] if "Mul" in layer.name]  # fused kernels are named after their operations
    assert [layer for layer in layers[0] if "Pow" in layer.name] == []


def test_a_float_precision_of_a_quantized_file_has_no_integers(demo, tmp_path, layers):
    manifest = build_engine(
        demo["simulated"], tmp_path / "a.engine", BACKEND, BuildConfig(targets=("12.0",), precision="fp16")
    )
    assert (manifest.audit, manifest.precision, manifest.float_type) == (None, "fp16", "fp16")
    kinds = {kind for layer in products(layers[0]) for kind in layer.inputs}
    assert "Int8" not in kinds
    assert "Half" in kinds


@pytest.mark.parametrize("target", support.few(["8.9", "12.0"], "8.9"))
def test_a_stack_of_xl_blocks_keeps_all_its_integers(stack, tmp_path, layers, target):
    """QKV above all: with int8 weights behind a lone DequantizeLinear, releases have lost its INT8 without a word."""
    manifest = build_engine(stack, tmp_path / "a.engine", BACKEND, BuildConfig(targets=(target,)))
    assert (manifest.audit.integer, manifest.audit.simulated, manifest.audit.fallen_back) == (14, 0, ())
    integer = {node for layer in layers[0] if layer.is_integer for node in layer.nodes}
    assert {f"blocks.{block}.attn.qkv/MatMul" for block in (0, 1)} <= integer
    assert {layer.outputs for layer in products(layers[0]) if layer.is_integer} == {("Half",)}


def test_the_same_stack_in_float16(stack, tmp_path, layers):
    build_engine(stack, tmp_path / "a.engine", BACKEND, BuildConfig(targets=("8.9",), precision="fp16"))
    assert len([layer for layer in layers[0] if "mha" in layer.name]) == 2
    assert {kind for layer in products(layers[0]) for kind in layer.inputs} == {"Half"}


def with_run_time_scale(source, target, module):
    """The file with a scale on `module`'s input that depends on the data."""
    model = onnx.load(source)
    nodes = {node.name: node for node in model.graph.node}
    quantize, dequantize = nodes[f"{module}/QuantizeLinear"], nodes[f"{module}/DequantizeLinear_2"]
    if dequantize.input[0] != quantize.output[0]:
        dequantize = nodes[f"{module}/DequantizeLinear"]
    assert dequantize.input[0] == quantize.output[0]
    model.graph.initializer.append(helper.make_tensor("one_127th", TensorProto.FLOAT, [], [1 / 127]))
    extra = [
        helper.make_node("Abs", [quantize.input[0]], ["broken/abs"], "broken/Abs"),
        helper.make_node("ReduceMax", ["broken/abs"], ["broken/max"], "broken/ReduceMax", keepdims=0),
        helper.make_node("Mul", ["broken/max", "one_127th"], ["broken/scale"], "broken/Mul"),
    ]
    at = list(model.graph.node).index(quantize)
    for offset, node in enumerate(extra):
        model.graph.node.insert(at + offset, node)
    quantize.input[1] = dequantize.input[1] = "broken/scale"
    onnx.save(model, target)


def test_a_scale_computed_at_run_time_fails_the_audit_by_name(tiny, tmp_path):
    broken, output = tmp_path / "broken.onnx", tmp_path / "a.engine"
    with_run_time_scale(tiny, broken, "blocks.1.mlp.fc1")
    config = BuildConfig(targets=("8.9",), float_type="fp32")
    with pytest.raises(
        BackendError,
        match=r"1 quantized product\(s\) would run in float on tensorrt-rtx: blocks\.1\.mlp\.fc1\. "
        r"Likely cause: a scale that is computed at run time",
    ):
        build_engine(broken, output, BACKEND, config)
    assert not output.exists()
    kept = build_engine(broken, output, BACKEND, replace(config, allow_fallback=True))
    assert kept.audit.fallen_back == ("blocks.1.mlp.fc1",)
    assert kept.audit.integer == 13


@pytest.mark.parametrize(
    ("source", "products"), support.few([("diffusers", 17), ("two-streams", 18)], ("two-streams", 18))
)
def test_networks_of_other_families_keep_their_integers(source, products, tmp_path, monkeypatch):
    """diffusers' own module, and the toy family of two token streams with a float timestep."""
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(support.TOYS / "families")])
    model = support.tiny_model("diffusers") if source == "diffusers" else load_model(source)
    few = {"preset": "tq-dit", "steps": 10, "groups": 2, "rows_per_group": 4, "chains": 4, "candidates": 10}
    tqdit.export(model, tmp_path / "model.onnx", scales=tqdit.calibrate(model, **few))
    config = BuildConfig(targets=("8.9",))
    manifest = tqdit.build(tmp_path / "model.onnx", tmp_path / "model.engine", backend=BACKEND, config=config)
    assert (manifest.audit.integer, manifest.audit.fallen_back) == (products, ())


def test_weights_beside_the_file_are_found(tiny, tmp_path):
    """Large models: the graph is inlined, its weights stay where they are."""
    beside = {"save_as_external_data": True, "location": "big.data", "size_threshold": 0}
    onnx.save(onnx.load(tiny), tmp_path / "big.onnx", **beside)
    assert (tmp_path / "big.data").stat().st_size > 10_000
    manifest = build_engine(tmp_path / "big.onnx", tmp_path / "a.engine", BACKEND, BuildConfig(float_type="fp32"))
    assert (manifest.audit.integer, manifest.audit.fallen_back) == (14, ())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.engine", "big.data", "big.onnx"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BuildConfig(targets=("9.0",)), r"--target 9.0: TensorRT-RTX compiles for 7.5, 8.0, .*--backend tensorrt"),
        (BuildConfig(targets=("8.9", "10.0")), r"--target 10.0: TensorRT-RTX compiles for"),
        (BuildConfig(targets=("ada",)), r"--target ada: expected a compute capability such as 8.9"),
        (
            BuildConfig(targets=("7.5",), float_type="bf16"),
            r"--float-type bf16: .*would only emulate it here; it has fp16",
        ),
        (BuildConfig(optimization_level=5), r"--optimization-level has no meaning for tensorrt-rtx"),
        (BuildConfig(version_compatible=True), r"--version-compatible has no meaning for tensorrt-rtx"),
    ],
)
def test_what_it_cannot_do_is_refused(demo, tmp_path, config, message):
    with pytest.raises(UsageError, match=message):
        build_engine(demo["simulated"], tmp_path / "a.engine", BACKEND, config)
    assert not (tmp_path / "a.engine").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BuildConfig(targets=("7.5", "8.9")), r"Compute capability 7.5 has no float32 products"),
        (BuildConfig(targets=("8.9",), workspace_bytes=1 << 20), r"Raise --workspace or leave it out"),
    ],
)
def test_what_the_compiler_refuses_comes_with_advice(demo, tmp_path, config, message):
    with pytest.raises(BackendError, match=rf"model.onnx: TensorRT-RTX .* cannot compile it .*{message}") as caught:
        build_engine(demo["simulated"], tmp_path / "a.engine", BACKEND, config)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_parsed_is_one_line(demo, tmp_path):
    model = onnx.load(demo["float"])
    zero = next(one for one in model.graph.initializer if one.name == "blocks.0.mlp.fc1.input.zero_point")
    zero.CopyFrom(numpy_helper.from_array(np.int8(3), zero.name))  # TensorRT quantizes around 0 only
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(BackendError, match=r"odd.onnx: TensorRT-RTX .* cannot compile it") as caught:
        build_engine(tmp_path / "odd.onnx", tmp_path / "a.engine", BACKEND, BuildConfig(float_type="fp32"))
    assert "\n" not in str(caught.value)
    assert "zero" in str(caught.value)
    assert not (tmp_path / "a.engine").exists()


def test_ctrl_c_ends_the_compiler_and_leaves_nothing(demo, tmp_path):
    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(demo["float"], tmp_path / "a.engine", BACKEND, BuildConfig(targets=("8.9",)), interrupt)
    assert list(tmp_path.iterdir()) == []
    running = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [command for command in running if "tensorrt.worker" in command]


def test_a_compiler_that_crashes_is_one_line(demo, tmp_path, monkeypatch):
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\nread job\necho 'terminate called without an active exception' >&2\nkill -ABRT $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(compiler.sys, "executable", str(crash))
    with pytest.raises(BackendError, match=r"TensorRT-RTX crashed .*exit status -6; its last words: terminate called"):
        build_engine(demo["float"], tmp_path / "a.engine", BACKEND, BuildConfig(float_type="fp32"))


def test_a_compiler_whose_caller_is_gone_leaves(demo, tmp_path):
    job = worker.Job(BACKEND, str(demo["float"]), str(tmp_path / "engine.plan"), (1, 2, 4))
    command = [sys.executable, "-m", "tqdit.engines.backends.tensorrt.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        process.stdin.write(json.dumps(asdict(job)) + "\n")
        process.stdin.close()
        assert process.wait(timeout=60) == 1
    assert list(tmp_path.iterdir()) == []


DECODER = """
<ir_version: 10, opset_import: ["": 20]>
decoder (float[N, 4, 8, 8] latents) => (float[N, 3, 16, 16] image)
<float[4] scales = {1, 1, 2, 2}>
{
  large = Resize(latents, , scales)
  image = Conv<pads = [1, 1, 1, 1]>(large, weight)
}
"""


def test_a_decoder_becomes_an_engine_of_its_own(tmp_path):
    proto = onnx.parser.parse_model(DECODER)
    weight = numpy_helper.from_array(np.ones((3, 4, 3, 3), np.float32), "weight")
    proto.graph.initializer.append(weight)
    write(
        tmp_path / "model.onnx", *support.exported(ExportConfig()), vae=DecoderGraph(ir.from_proto(proto), 16, 16, None)
    )
    manifest = build_engine(tmp_path / "model.onnx", tmp_path / "a.engine", BACKEND, BuildConfig(targets=("8.6",)))
    assert (manifest.entry, manifest.decoder) == ("engine.plan", "decoder.plan")
    assert sorted(manifest.files) == ["decoder.plan", "engine.plan"]


@pytest.fixture(scope="module")
def bundle(demo, tmp_path_factory):
    output = tmp_path_factory.mktemp("bundle") / "model.engine"
    build_engine(demo["float"], output, BACKEND, BuildConfig(targets=("8.9",), batch=BatchRange(1, 2, 4)))
    return output


def test_inspect_tells_what_it_was_built_for(bundle, capsys):
    assert cli.main(["inspect", str(bundle)]) == 0
    told = capsys.readouterr()
    facts = dict(line.split(maxsplit=1) for line in (told.out + told.err).splitlines())
    assert facts["runs"].split() == ["on", "8.9"]
    assert facts["batch"] == "1 to 4 images per call, tuned for 2"


def test_more_images_per_call_than_it_was_built_for_are_refused(bundle):
    with pytest.raises(UsageError, match=r"built for at most 4 image\(s\) per call, asked for 5.*--batch 1,2,5"):
        Sampler.open(bundle, batch=5)


def test_opening_it_elsewhere_says_what_is_missing(bundle, monkeypatch):
    def no_gpu(*_):
        raise BackendError("no usable NVIDIA GPU here (x).")

    monkeypatch.setattr(cuda, "find_device", no_gpu)
    with pytest.raises(BackendError, match="no usable NVIDIA GPU here"):
        Sampler.open(bundle)
    monkeypatch.setattr(cuda, "find_device", lambda *_: cuda.Device(0, "9.0"))
    with pytest.raises(BackendError, match=r"built for compute capability 8.9, this GPU has 9.0"):
        Sampler.open(bundle)
    monkeypatch.setattr(cuda, "find_device", lambda *_: cuda.Device(0, "8.9"))
    monkeypatch.setattr(TENSORRT_RTX.load(""), "__version__", "1.8.0.1")
    with pytest.raises(
        BackendError, match=r"built by TensorRT-RTX 1\.7.*installed is 1\.8\.0\.1.*pip install tensorrt-rtx=="
    ):
        Sampler.open(bundle)


@pytest.mark.parametrize(
    ("capability", "score", "reason"),
    [
        ("8.9", 30, "GPU of compute capability 8.9"),
        ("9.0", 0, "TensorRT-RTX has no kernels for compute capability 9.0"),
        (None, 0, r"no GPU; it builds here for machines with one"),
    ],
)
def test_auto_takes_it_only_where_it_runs(monkeypatch, capability, score, reason):
    def find_device():
        if capability is None:
            raise BackendError("no GPU. Install one.")
        return cuda.Device(0, capability)

    monkeypatch.setattr(cuda, "find_device", find_device)
    fitness = build_side(BACKEND).fitness()
    assert fitness[:2] == (score, reason)
    assert fitness.builds or score  # wherever it runs


def test_full_tensorrt_is_out_where_it_is_not_installed():
    assert build_side("tensorrt").fitness() == (0, "tensorrt is not installed", None)
