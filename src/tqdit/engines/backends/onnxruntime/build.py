"""Optimise the exported graph once and store the result."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tqdit.card import GraphCard
from tqdit.engines import cpu, cuda
from tqdit.engines.backends.onnxruntime.library import load_library, open_session, session_options
from tqdit.engines.backends.onnxruntime.products import write_products
from tqdit.engines.backends.onnxruntime.providers import (
    FLOAT_TYPES,
    NOT_AUDITED,
    PROVIDERS,
    check_got,
    check_offered,
    refuse_device,
    settings_of,
)
from tqdit.engines.backends.onnxruntime.weight_only import write_weight_only_products
from tqdit.engines.build.audit import audit, check_audit
from tqdit.engines.build.backend import Fitness, processor
from tqdit.engines.build.cast import INTEGER_ATTENTIONS, OUT_TYPE
from tqdit.engines.build.regions import sum_regions
from tqdit.engines.bundle import Artefact, Audit
from tqdit.engines.config import BatchRange, BuildConfig, FloatType, Progress
from tqdit.errors import UsageError
from tqdit.files import temporary_folder
from tqdit.graph_names import SCOPE_KEY, Scopes, scope_of
from tqdit.onnx_file import OnnxFile, parse_model

GRAPH_FILE = "graph.onnx"
DECODER_FILE = "decoder.onnx"
EXTERNAL_DATA_BYTES = 1_000_000_000
CASTS_FLOATS = False
TAKES_FP8 = False
OPTIONS = frozenset({"provider", "batch", "device"})  # batch: of the TensorRT provider's profiles
# Operators of ONNX Runtime that multiply integers, and those that multiply floats.
INTEGER_PRODUCTS = {"MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "QGemm", "QLinearConv", "ConvInteger"}
CAUSES = {
    "cpu": "its optimiser does not fuse this form; run tqdit-inspect --lint on the file",
    "cuda": "its CUDA provider has no int8 products; take --backend tensorrt, or --precision fp16 here",
    "tensorrt": NOT_AUDITED,
}
MOVING = ("Transpose", "Reshape")  # what may stand between an attention and the next quantizer
FIRST_AXIS, ONE, NO_OFFSET = "tqdit.first_axis", "tqdit.one", "tqdit.no_offset"
FLOAT_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv"}


def fitness() -> Fitness:
    if util.find_spec("onnxruntime") is None:
        return Fitness(0, "onnxruntime is not installed")
    return Fitness(10, "runs on every CPU")


def float_types(config: BuildConfig) -> tuple[FloatType, ...]:
    return FLOAT_TYPES[config.provider or "cpu"]


def place(config: BuildConfig) -> str:
    """Its TensorRT provider compiles for the GPU that is here."""
    return processor() if (config.provider or "cpu") == "cpu" else cuda.kind_of(config.device or 0)


def build(
    source: OnnxFile, decoder: OnnxFile | None, card: GraphCard, folder: Path, config: BuildConfig, _progress: Progress
) -> Artefact:
    """Compile the graph and the decoder; read off the optimised graph what stayed integer."""
    ort = load_library()
    provider = config.provider or "cpu"
    if config.batch is not None and provider != "tensorrt":
        raise UsageError(f"--batch has no meaning for --provider {provider}, which takes any number of images.")
    refuse_device(provider, config.device)
    check_offered(ort, provider)
    providers = settings_of(provider, folder, card, config.batch, config.float_type, config.device)
    if provider == "tensorrt":
        _compile_by_tensorrt(source, card, folder / GRAPH_FILE, providers)
    else:
        with _prepared(source, card, folder, provider) as prepared:
            _optimise(prepared, folder / GRAPH_FILE, providers, provider, _keeps_weights_beside(source))
    if decoder is not None:
        on = provider if provider == "cpu" else "cuda"
        settings = settings_of(on, folder, card, None, device=config.device)
        _optimise(decoder.path, folder / DECODER_FILE, settings, on, _keeps_weights_beside(decoder))
    report = audit_graph(folder / GRAPH_FILE, card, source.scopes, provider)
    if report is not None and not config.allow_fallback:
        check_audit(report, "onnxruntime", CAUSES[provider])
    return Artefact(
        entry=GRAPH_FILE,
        decoder=None if decoder is None else DECODER_FILE,
        versions={"onnxruntime": ort.__version__},
        target={"provider": PROVIDERS[provider], **cpu.target(report is not None and provider == "cpu")},
        audit=report,
        batch=(config.batch or BatchRange()) if provider == "tensorrt" and not card.rows else None,
    )


def audit_graph(file: Path, card: GraphCard, scopes: Scopes, provider: str) -> Audit | None:
    """Read off the optimised graph which products are integer; its nodes keep their names through fusion."""
    if card.quantization is None:
        return None
    nodes = [] if provider == "tensorrt" else list(parse_model(file).graph.node)  # which compiles later, shows nothing
    return audit(
        card.quantization,
        scopes,
        (node.name for node in nodes if node.op_type in INTEGER_PRODUCTS),
        (node.name for node in nodes if node.op_type in FLOAT_PRODUCTS),
    )


@contextmanager
def _prepared(source: OnnxFile, card: GraphCard, folder: Path, provider: str) -> Iterator[Path]:
    """The file, or a temporary one with quantizers written out, two regions summed and products as ONNX Runtime's."""
    forms = {} if card.quantization is None else card.quantization.products
    if not forms:
        yield source.path
        return
    model, weights = source.copy(), source.path.parent
    _quantize_results(model.graph)
    sum_regions(model)
    alone = {module for module, form in forms.items() if form == "weight-only"}
    if provider == "cpu":
        if not cpu.sums_overflow():
            alone -= write_weight_only_products(model, weights, alone)
        integers = {module for module, form in forms.items() if form == "integer"}
        write_products(model, weights, integers, signed=not cpu.sums_overflow())
    _keep_apart(model.graph, alone)
    with temporary_folder(folder / "apart") as apart:
        path = source.save_copy(model, apart)
        del model  # up to 2 GB that the compiler may need
        yield path


def _keep_apart(graph: onnx.GraphProto, modules: Collection[str]) -> None:
    """Put an Unsqueeze and a Squeeze after each DequantizeLinear of these modules, so that ONNX Runtime makes no
    MatMulNBits of weights whose products have float inputs.

    For the few rows of the conditioning MatMulNBits takes ten times as long as a float product (docs/engines.md). The
    int8 weight stays in the file and is dequantized once, when the engine is opened (`run.py`).
    """
    if not modules:
        return
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear" and scope_of(node) in modules]:
        module, value = scope_of(node), node.output[0]
        position = list(graph.node).index(node) + 1
        node.output[0] = f"{value}.dequantized"
        names = (f"{value}.dequantized", f"{value}.apart", value)
        for op_type, before, after in zip(("Unsqueeze", "Squeeze"), names, names[1:], strict=False):
            pair = onnx.helper.make_node(op_type, [before, FIRST_AXIS], [after], name=f"{node.name}/{op_type}.apart")
            pair.metadata_props.add(key=SCOPE_KEY, value=module)
            graph.node.insert(position, pair)
            position += 1
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.int64), FIRST_AXIS))


def _makes_codes(node: onnx.NodeProto) -> bool:
    """Whether it is an attention whose result is int8."""
    return node.op_type in INTEGER_ATTENTIONS and _out_type(node).i == onnx.TensorProto.INT8


def _out_type(node: onnx.NodeProto) -> onnx.AttributeProto:
    found: onnx.AttributeProto = next(each for each in node.attribute if each.name == OUT_TYPE)
    return found


def _quantize_results(graph: onnx.GraphProto) -> None:
    """Let an attention whose result is int8 give the float that it would round, and a QuantizeLinear round it.

    Both round half to even. ONNX Runtime makes an integer product only of codes that come from a QuantizeLinear.
    """
    results = [node for node in graph.node if _makes_codes(node)]
    moved: set[str] = set()
    for node in results:
        _out_type(node).i = onnx.TensorProto.FLOAT
        user, value = node, node.output[0]
        while user is node or user.op_type in MOVING:
            value = user.output[0]
            moved.add(value)
            (user,) = (each for each in graph.node if value in each.input)
        rounded = onnx.helper.make_node(
            "QuantizeLinear", [value, ONE, NO_OFFSET], [f"{value}.codes"], name=f"{node.name}/QuantizeLinear.result"
        )
        rounded.metadata_props.extend(node.metadata_props)
        user.input[0] = f"{value}.codes"
        graph.node.insert(list(graph.node).index(user), rounded)
    for info in graph.value_info:
        if info.name in moved:
            info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    if results:
        numbers = {ONE: np.float32(1), NO_OFFSET: np.int8(0)}
        graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(each), name) for name, each in numbers.items())


def _keeps_weights_beside(source: OnnxFile) -> bool:
    """Weights beside the source would otherwise stay there, where the bundle does not have them."""
    return bool(source.weight_files) or source.size_bytes > EXTERNAL_DATA_BYTES


def _optimise(source: Path, target: Path, providers: list[Any], provider: str, weights_beside: bool) -> None:
    """Fuse what does not depend on this machine's CPU; layout changes that do are left to the moment of loading."""
    ort = load_library()
    options, settings = session_options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    if weights_beside:
        entry = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{entry}_file_name", f"{target.name}.data")
        options.add_session_config_entry(f"{entry}_min_size_in_bytes", "1024")
    check_got(open_session(ort, source, options, providers=providers, **settings), provider)


def _compile_by_tensorrt(source: OnnxFile, card: GraphCard, target: Path, providers: list[Any]) -> None:
    """Keep the graph as it is and let the provider fill its engine cache beside it: it wants Q/DQ, not fused nodes."""
    ort = load_library()
    options, settings = session_options(ort)
    model = source.copy()
    forms = {} if card.quantization is None else card.quantization.products
    _keep_apart(model.graph, {module for module, form in forms.items() if form == "weight-only"})
    onnx.load_external_data_for_model(model, str(source.path.parent))
    data = f"{target.name}.data" if source.size_bytes > EXTERNAL_DATA_BYTES else None
    onnx.save(model, target, save_as_external_data=data is not None, location=data)
    check_got(open_session(ort, target, options, providers=providers, **settings), "tensorrt")
