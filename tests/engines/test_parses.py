"""A command parses an ONNX file once, whatever its backend does with it."""

import importlib.util
from collections import Counter

import onnx
import pytest

import support
from tables import Kind, make_table
from tqdit.cli.main import main
from tqdit.engines.build.engine import build_engine
from tqdit.engines.config import BuildConfig
from tqdit.exporter.onnx_writer import write
from tqdit.exporter.vae import DecoderGraph

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path):
    """A file with weight-only products (`conditioning`), which ONNX Runtime's build edits."""
    path = tmp_path / "model.onnx"
    write(path, *support.exported(pixels=True, table=make_table(support.tiny_model(pixels=True), Kind(groups=10))))
    return path


@pytest.fixture
def parses(monkeypatch):
    """How often this process parsed each file, by its name. (onnx_ir's `load` calls onnx's.)"""
    counts, load = Counter(), onnx.load

    def counted(path, *arguments, **options):
        counts[path.name] += 1
        return load(path, *arguments, **options)

    monkeypatch.setattr(onnx, "load", counted)
    return counts


@pytest.mark.parametrize(
    ("backend", "precision", "artefacts"),
    [
        ("onnxruntime", "int8", {"graph.onnx": 1}),  # the audit reads what was compiled
        ("onnxruntime", "fp32", {}),
        ("openvino", "int8", {}),
        ("tensorrt-rtx", "int8", {}),
        ("tensorrt-rtx", "fp16", {}),
    ],
)
def test_a_build_parses_its_file_once(source, tmp_path, parses, backend, precision, artefacts):
    if backend == "tensorrt-rtx" and importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("needs the package tensorrt-rtx")
    build_engine(source, tmp_path / "model.engine", backend, BuildConfig(precision=precision))
    assert parses == {"model.onnx": 1} | artefacts


@pytest.mark.parametrize("arguments", [[], ["--lint"]])
def test_inspect_and_lint_parse_their_file_once(source, parses, arguments):
    assert main(["inspect", str(source), *arguments]) == 0
    assert parses == {"model.onnx": 1}


def test_a_decoder_is_parsed_once_too(tmp_path, parses):
    decoder = support.exported()[0]  # any graph will do
    write(tmp_path / "model.onnx", *support.exported(), vae=DecoderGraph(decoder, 8, 8, None))
    parses.clear()
    build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", "openvino")
    assert set(parses.values()) == {1}
    assert len(parses) == 2
