"""Products whose first axis holds frames or words besides the rows of a call: one scale for all groups."""

import pytest
import torch

from networks import Folded, Tokens, described, run_graph
from support import assert_agrees
from tables import Kind, make_table, random_rows
from tqdit.engines.build.engine import build_engine
from tqdit.exporter.graph import ExportConfig, finish_graph, trace_graph
from tqdit.exporter.onnx_writer import write
from tqdit.ports import Port
from tqdit.quantization.fake_quant import apply

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = described(Tokens(Folded()), (4, 6), Port("text", "request", "float32", (None, 5, 8)))
    return model, trace_graph(model, ExportConfig())


@pytest.mark.parametrize("form", ["simulated", "fused", "integer"])
def test_each_form_equals_the_fake_quantized_network(traced, form):
    model, trace = traced
    table, inputs = make_table(model, Kind(groups=4, everywhere=True)), random_rows(model.signature, 24, last=1)
    graph, _ = finish_graph(trace.clone(), model, ExportConfig(attention=form), table)
    assert_agrees(run_graph(graph, inputs), apply(model, table)(inputs))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_nothing_falls_back(traced, backend, tmp_path):
    """Among them products of two dimensions with a bias, which ONNX Runtime would make a Gemm of."""
    model, trace = traced
    table = make_table(model, Kind(groups=4, everywhere=True))
    write(tmp_path / "model.onnx", *finish_graph(trace.clone(), model, ExportConfig(), table))
    audit = build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", backend).audit
    assert (audit.integer, audit.fallen_back) == (12, ())
