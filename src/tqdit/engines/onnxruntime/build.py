"""Optimise the exported graph once and store the result."""

from __future__ import annotations

import platform
from importlib import util
from pathlib import Path
from typing import Any

from tqdit import __version__
from tqdit.card import GraphCard
from tqdit.engines.audit import Audit, audit
from tqdit.engines.backends import Fitness
from tqdit.engines.bundle import Manifest, describe_parts
from tqdit.engines.config import BuildConfig, FloatType, Progress, silent
from tqdit.engines.onnxruntime.library import load_library, session_options
from tqdit.errors import BackendError

GRAPH_FILE = "graph.onnx"
DECODER_FILE = "decoder.onnx"
EXTERNAL_DATA_BYTES = 1_000_000_000
OPTIONS: frozenset[str] = frozenset()
# Operators of ONNX Runtime that multiply integers, and those that multiply floats.
INTEGER_PRODUCTS = {"MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "QGemm", "QLinearConv", "ConvInteger"}
FLOAT_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv"}


def fitness() -> Fitness:
    if util.find_spec("onnxruntime") is None:
        return Fitness(0, "onnxruntime is not installed")
    return Fitness(10, "runs on every CPU")


def float_types(config: BuildConfig) -> tuple[FloatType, ...]:
    """On CPUs it only emulates the others, with casts around float32."""
    return ("fp32",)


def build(source: Path, card: GraphCard, folder: Path, config: BuildConfig, progress: Progress = silent) -> Manifest:
    """Compile the graph and, where there is one, the decoder beside it; prove that what was quantized is integer."""
    ort = load_library()
    _optimise(source, folder / GRAPH_FILE)
    if card.vae is not None:
        _optimise(source.parent / card.vae.file, folder / DECODER_FILE)
    report = audit_graph(folder / GRAPH_FILE, card)
    if report is not None and not config.allow_fallback:
        report.check("onnxruntime", "its optimiser does not fuse this form; run tqdit-inspect --lint on the file")
    return Manifest(
        backend="onnxruntime",
        precision=config.precision or "fp32",
        card=card,
        entry=GRAPH_FILE,
        decoder=DECODER_FILE if card.vae is not None else None,
        versions={"tqdit": __version__, "onnxruntime": ort.__version__},
        target={"provider": "CPUExecutionProvider", "machine": platform.machine()},
        audit=report,
        files=describe_parts(folder),
    )


def audit_graph(file: Path, card: GraphCard) -> Audit | None:
    """Read off the optimised graph which products are integer; its nodes keep their names through fusion."""
    if card.quantization is None:
        return None
    from tqdit.onnx_file import load_graph  # needs onnx, which the runtime does without

    nodes = list(load_graph(file).graph.node)
    return audit(
        card.quantization,
        (node.name for node in nodes if node.op_type in INTEGER_PRODUCTS),
        (node.name for node in nodes if node.op_type in FLOAT_PRODUCTS),
    )


def _optimise(source: Path, target: Path) -> None:
    """Fuse what does not depend on this machine's CPU; layout changes that do are left to the moment of loading."""
    from tqdit.onnx_file import bytes_on_disk

    ort = load_library()
    options, settings = session_options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    if bytes_on_disk(source) > EXTERNAL_DATA_BYTES:
        _keep_weights_beside(options, target)
    try:
        ort.InferenceSession(source, options, **settings)
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"{source}: ONNX Runtime {ort.__version__} cannot compile it ({reason}).") from error


def _keep_weights_beside(options: Any, target: Path) -> None:
    entry = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{entry}_file_name", f"{target.name}.data")
    options.add_session_config_entry(f"{entry}_min_size_in_bytes", "1024")
