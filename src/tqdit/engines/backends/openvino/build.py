"""Convert the exported graph to an OpenVINO IR, and prove from the compiled model that it stayed integer."""

from __future__ import annotations

import re
import warnings
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx.inliner

from tqdit.card import GraphCard
from tqdit.engines import cpu
from tqdit.engines.backends.openvino.angles import tabulate_angles
from tqdit.engines.backends.openvino.library import compile_file, core_of, has_bfloat16, load_library, reason, release
from tqdit.engines.backends.openvino.moved_codes import move_codes, moves_floats
from tqdit.engines.backends.openvino.single_rows import widen_single_rows
from tqdit.engines.backends.openvino.two_regions import chain_two_regions
from tqdit.engines.build.audit import audit, check_audit
from tqdit.engines.build.backend import Fitness, processor
from tqdit.engines.build.regions import has_regions, sum_regions
from tqdit.engines.bundle import Artefact, Audit
from tqdit.engines.config import BuildConfig, FloatType, Progress
from tqdit.errors import BackendError, TqditWarning
from tqdit.files import temporary_folder
from tqdit.graph_names import Scopes
from tqdit.onnx_file import OnnxFile

GRAPH_FILE = "graph.xml"  # its weights lie in graph.bin
DECODER_FILE = "decoder.xml"
OPTIONS: frozenset[str] = frozenset()
CASTS_FLOATS = True  # by its own precision hint; it takes the file as it was exported
TAKES_FP8 = False
PRODUCTS = {"FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention"}  # layers of a compiled model
INTEGERS = {"i8", "u8"}
ATTENTION_OPERANDS = 3  # q, k and v; a mask and the ratio of a group of timesteps are float inputs beside them
# What OpenVINO calls nodes of its own; ours have a module before a slash.
NAMELESS = re.compile(r"[A-Z][A-Za-z0-9]*_\d+")


def fitness() -> Fitness:
    if util.find_spec("openvino") is None:
        return Fitness(0, "openvino is not installed")
    if cpu.sums_overflow():
        return Fitness(5, f"its sums of integers overflow on CPUs without {cpu.WIDE_SUMS}")
    return Fitness(20, "the fastest on CPUs")


def float_types(config: BuildConfig) -> tuple[FloatType, ...]:
    """float32 first: bfloat16 rounds what the scales were calibrated for (docs/engine-bundle.md says how much)."""
    return ("fp32", "bf16") if has_bfloat16(load_library()) else ("fp32",)


def place(config: BuildConfig) -> str:
    return f"{processor()}, computes in {', '.join(float_types(config))}"


def build(
    source: OnnxFile, decoder: OnnxFile | None, card: GraphCard, folder: Path, config: BuildConfig, progress: Progress
) -> Artefact:
    """Convert the graph and the decoder; read off the compiled graph what stayed integer."""
    ov = load_library()
    if card.quantization is not None and cpu.sums_overflow():
        warnings.warn(
            f"this CPU has no {cpu.WIDE_SUMS}, and OpenVINO's sums of integer products overflow on such CPUs. If the "
            "engine is refused for its error, build it with --backend onnxruntime.",
            TqditWarning,
            stacklevel=2,
        )
    float_type = "bf16" if config.float_type == "bf16" else "fp32"
    parts = {GRAPH_FILE: source} | ({} if decoder is None else {DECODER_FILE: decoder})
    for done, (name, file) in enumerate(parts.items()):
        progress(f"converting {file.path.name}", done, len(parts))
        _convert(ov, file, folder / name, float_type, card)
    report = audit_graph(folder / GRAPH_FILE, card, source.scopes, float_type)
    if report is not None and not config.allow_fallback:
        check_audit(report, "openvino", "a scale that is not a constant; run tqdit-inspect --lint on the file")
    return Artefact(
        entry=GRAPH_FILE,
        decoder=None if decoder is None else DECODER_FILE,
        versions={"openvino": release(ov)},
        target={"device": "CPU", **cpu.target(report is not None)},
        audit=report,
    )


def audit_graph(file: Path, card: GraphCard, scopes: Scopes, float_type: str) -> Audit | None:
    """Compile an IR and read off which products multiply integers: by the types of both inputs.

    A layer's `runtimePrecision` says i8 even if only the weight is. Layers keep the names of the nodes that
    were fused into them; one whose scaling moved behind a sum gets a name of its own, and its weight tells its
    module. A layer may round its result for the next one, whose QuantizeLinear then is in its names. A whole
    attention may be one kernel: its inputs q, k and v must be integers, and the probabilities quantized inside.
    """
    if card.quantization is None:
        return None
    compiled = compile_file(load_library(), file, float_type)
    integer: list[str] = []
    floating: list[str] = []
    for layer in compiled.get_runtime_model().get_ops():
        kind, names = layer.get_rt_info()["layerType"].astype(str), _names(layer)
        is_attention = kind == "Subgraph" and any(name.endswith("/Softmax") for name in names)
        if kind not in PRODUCTS and not is_attention:
            continue
        if kind == "FullyConnected":
            names += _names(layer.input_value(1).get_node())
        operands = layer.inputs() if is_attention else layer.inputs()[:2]
        integers = sum(operand.get_element_type().get_type_name() in INTEGERS for operand in operands)
        if is_attention:
            quantized = integers >= ATTENTION_OPERANDS and any("/QuantizeLinear" in name for name in names)
        else:
            quantized = integers == len(operands)
        own = names if is_attention else [name for name in names if "/QuantizeLinear" not in name]
        (integer if quantized else floating).extend(own)
    return audit(card.quantization, scopes, integer, floating)


def _names(layer: Any) -> list[str]:
    """Of the nodes that became this layer."""
    names: list[str] = layer.get_rt_info()["originalLayersNames"].astype(str).split(",")
    return names


def _convert(ov: ModuleType, source: OnnxFile, target: Path, float_type: str, card: GraphCard) -> None:
    """Write the IR of an ONNX file, in float32; a hint at compilation asks for other types."""
    with temporary_folder(target.with_name(f"{target.stem}.inlined")) as folder:
        try:
            path, changed = source.path, _rewritten(source)
            if source.model.functions:  # which OpenVINO refuses
                changed = onnx.inliner.inline_local_functions(changed or source.model)
            if changed is not None:
                path = source.save_copy(changed, folder)
                del changed  # up to 2 GB that the compiler may need
            model = core_of(ov).read_model(path)
            if float_type == "bf16":
                tabulate_angles(ov, model, card)
            else:
                chain_two_regions(ov, model)
            widen_single_rows(ov, model)
            _name_the_nameless(model)
            ov.save_model(model, target, compress_to_fp16=False)
        except RuntimeError as error:  # what OpenVINO raises whatever went wrong
            raise BackendError(f"{source.path}: OpenVINO {release(ov)} cannot convert it ({reason(error)}).") from error


def _rewritten(source: OnnxFile) -> onnx.ModelProto | None:
    """A copy with two regions as OpenVINO multiplies them fastest, rounded before it is moved; None if nothing is."""
    if not has_regions(source.model) and not moves_floats(source.model):
        return None
    model = source.copy()
    sum_regions(model, chains=True)
    move_codes(model, source.path.parent)
    return model


def _name_the_nameless(model: Any) -> None:
    """Number nodes without a name by their place, not by how many this process has made: builds repeat bit for bit."""
    for index, node in enumerate(model.get_ordered_ops()):
        if NAMELESS.fullmatch(node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{index}")
