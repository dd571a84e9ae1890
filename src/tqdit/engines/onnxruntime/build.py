"""Optimise the exported graph once and store the result."""

from __future__ import annotations

import platform
from pathlib import Path

from tqdit import __version__
from tqdit.card import GraphCard
from tqdit.engines.bundle import Manifest, describe_parts
from tqdit.engines.onnxruntime.library import load_library
from tqdit.errors import BackendError
from tqdit.onnx_file import bytes_on_disk

GRAPH_FILE = "graph.onnx"
DECODER_FILE = "decoder.onnx"
EXTERNAL_DATA_BYTES = 1_000_000_000


def build(source: Path, card: GraphCard, folder: Path, precision: str) -> Manifest:
    """Compile the graph and, where there is one, the decoder beside it."""
    ort = load_library()
    _optimise(source, folder / GRAPH_FILE)
    if card.vae is not None:
        _optimise(source.parent / card.vae.file, folder / DECODER_FILE)
    return Manifest(
        backend="onnxruntime",
        precision=precision,
        card=card,
        entry=GRAPH_FILE,
        decoder=DECODER_FILE if card.vae is not None else None,
        versions={"tqdit": __version__, "onnxruntime": ort.__version__},
        target={"provider": "CPUExecutionProvider", "machine": platform.machine()},
        files=describe_parts(folder),
    )


def _optimise(source: Path, target: Path) -> None:
    """Fuse what does not depend on this machine's CPU; layout changes that do are left to the moment of loading."""
    ort = load_library()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    if bytes_on_disk(source) > EXTERNAL_DATA_BYTES:
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{target.name}.data"
        )
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code
        raise BackendError(
            f"{source}: ONNX Runtime {ort.__version__} cannot compile it ({_first_line(error)})."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
