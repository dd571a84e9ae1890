"""Optimise the exported graph once and store the result."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from tqdit import __version__
from tqdit.card import GraphCard
from tqdit.engines.backends import Fitness
from tqdit.engines.backends.onnxruntime.library import load_library, session_options
from tqdit.engines.backends.onnxruntime.providers import (
    FLOAT_TYPES,
    NOT_AUDITED,
    PROVIDERS,
    check_got,
    check_offered,
    settings_of,
)
from tqdit.engines.build.audit import Audit, audit
from tqdit.engines.bundle import Manifest, describe_parts
from tqdit.engines.config import BatchRange, BuildConfig, FloatType, Progress, silent
from tqdit.errors import BackendError, UsageError
from tqdit.files import bring, temporary_folder

GRAPH_FILE = "graph.onnx"
DECODER_FILE = "decoder.onnx"
EXTERNAL_DATA_BYTES = 1_000_000_000
CASTS_FLOATS = False
OPTIONS = frozenset({"provider", "batch"})  # batch: of the TensorRT provider's profiles
# Operators of ONNX Runtime that multiply integers, and those that multiply floats.
INTEGER_PRODUCTS = {"MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "QGemm", "QLinearConv", "ConvInteger"}
CAUSES = {
    "cpu": "its optimiser does not fuse this form; run tqdit-inspect --lint on the file",
    "cuda": "its CUDA provider has no int8 products; take --backend tensorrt, or --precision fp16 here",
    "tensorrt": NOT_AUDITED,
}
FIRST_AXIS = "tqdit.first_axis"
FLOAT_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv"}


def fitness() -> Fitness:
    if util.find_spec("onnxruntime") is None:
        return Fitness(0, "onnxruntime is not installed")
    return Fitness(10, "runs on every CPU")


def float_types(config: BuildConfig) -> tuple[FloatType, ...]:
    return FLOAT_TYPES[config.provider or "cpu"]


def build(source: Path, card: GraphCard, folder: Path, config: BuildConfig, progress: Progress = silent) -> Manifest:
    """Compile the graph and, where there is one, the decoder beside it; prove that what was quantized is integer."""
    from tqdit.onnx_seal import unseal  # needs onnx, which the runtime does without

    ort = load_library()
    provider = config.provider or "cpu"
    if config.batch is not None and provider != "tensorrt":
        raise UsageError(f"--batch has no meaning for --provider {provider}, which takes any number of images.")
    check_offered(ort, provider)
    providers = settings_of(provider, folder, card, config.batch)
    with _float_weights_kept_apart(source, card, folder) as prepared:
        if provider == "tensorrt":
            _compile_by_tensorrt(prepared, folder / GRAPH_FILE, providers)
        else:
            _optimise(prepared, folder / GRAPH_FILE, providers, provider)
    if card.vae is not None:
        decoder = provider if provider == "cpu" else "cuda"
        _optimise(
            source.parent / card.vae.file, folder / DECODER_FILE, settings_of(decoder, folder, card, None), decoder
        )
    unseal(folder / GRAPH_FILE)
    report = audit_graph(folder / GRAPH_FILE, card)
    if report is not None and provider == "tensorrt":
        report = replace(report, integer=0, fallen_back=promised(card))
    if report is not None and not config.allow_fallback:
        report.check("onnxruntime", CAUSES[provider])
    return Manifest(
        backend="onnxruntime",
        precision=config.precision or "fp32",
        card=card,
        entry=GRAPH_FILE,
        decoder=DECODER_FILE if card.vae is not None else None,
        versions={"tqdit": __version__, "onnxruntime": ort.__version__},
        target={"provider": PROVIDERS[provider], "machine": platform.machine()},
        audit=report,
        files=describe_parts(folder),
        batch=(config.batch or BatchRange()) if provider == "tensorrt" else None,
    )


def promised(card: GraphCard) -> tuple[str, ...]:
    """The products that should be integer."""
    forms = {} if card.quantization is None else card.quantization.products
    return tuple(module for module, form in forms.items() if form == "integer")


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


@contextmanager
def _float_weights_kept_apart(source: Path, card: GraphCard, folder: Path) -> Iterator[Path]:
    """The file with something between each weight that is quantized alone and its product.

    ONNX Runtime would fuse them to MatMulNBits, which for the few rows of the conditioning takes ten times as long as a
    float product (a fifth of a DiT-XL/2 step; docs/engines.md). Kept apart, the int8 weight stays in the file and is
    turned into float32 once, when the engine is opened (`run.py`).
    """
    forms = {} if card.quantization is None else card.quantization.products
    alone = {module for module, form in forms.items() if form == "weight-only"}
    if not alone:
        yield source
        return
    import onnx

    from tqdit.onnx_file import external_files, load_graph

    model = load_graph(source)
    for node in [node for node in model.graph.node if node.op_type == "DequantizeLinear"]:
        module, value = node.name.split("/")[0], node.output[0]
        if module in alone:
            position = list(model.graph.node).index(node) + 1
            node.output[0] = f"{value}.dequantized"
            names = (f"{value}.dequantized", f"{value}.apart", value)
            for op_type, before, after in zip(("Unsqueeze", "Squeeze"), names, names[1:], strict=False):
                pair = onnx.helper.make_node(op_type, [before, FIRST_AXIS], [after], name=f"{module}/{op_type}.apart")
                model.graph.node.insert(position, pair)
                position += 1
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.int64), FIRST_AXIS))
    with temporary_folder(folder / "apart") as apart:
        for name in external_files(model, source):
            bring(source.parent / name, apart / name)
        onnx.save(model, apart / source.name)
        yield apart / source.name


def _optimise(source: Path, target: Path, providers: list[Any], provider: str) -> None:
    """Fuse what does not depend on this machine's CPU; layout changes that do are left to the moment of loading."""
    from tqdit.onnx_file import bytes_on_disk, external_files, load_graph

    ort = load_library()
    options, settings = session_options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    # weights that lie beside the source would otherwise stay there, where the bundle does not have them
    if external_files(load_graph(source), source) or bytes_on_disk(source) > EXTERNAL_DATA_BYTES:
        _keep_weights_beside(options, target)
    _open(source, options, settings | {"providers": providers}, provider)


def _compile_by_tensorrt(source: Path, target: Path, providers: list[Any]) -> None:
    """Keep the graph as it is and let the provider fill its engine cache beside it: it wants Q/DQ, not fused nodes."""
    import onnx

    options, settings = session_options(load_library())
    model = onnx.load(source)
    beside = source.stat().st_size + sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    data = f"{target.name}.data" if beside > EXTERNAL_DATA_BYTES else None
    onnx.save(model, target, save_as_external_data=data is not None, location=data)
    _open(target, options, settings | {"providers": providers}, "tensorrt")


def _open(source: Path, options: Any, settings: dict[str, Any], provider: str) -> None:
    ort = load_library()
    try:
        session = ort.InferenceSession(source, options, **settings)
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"{source}: ONNX Runtime {ort.__version__} cannot compile it ({reason}).") from error
    check_got(session, provider)


def _keep_weights_beside(options: Any, target: Path) -> None:
    entry = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{entry}_file_name", f"{target.name}.data")
    options.add_session_config_entry(f"{entry}_min_size_in_bytes", "1024")
