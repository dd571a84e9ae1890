"""A layer that is called several times, with inputs of two, three and four dimensions, has one weight and one scale."""

from dataclasses import replace

import pytest
import torch

from networks import Shared, Tokens, described, run_graph
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
    model = described(Tokens(Shared()), (4, 6), Port("words", "request", "float32", (None, 5, 16)))
    return model, trace_graph(model, ExportConfig())


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_an_export_equals_the_fake_quantized_network(traced, groups, asymmetric):
    model, trace = traced
    kind = Kind(groups=groups, everywhere=True, asymmetric=asymmetric, conditioning_inputs=True)
    table, inputs = make_table(model, kind), random_rows(model.signature, 24, last=1)
    graph, _ = finish_graph(trace.clone(), model, ExportConfig(), table)
    assert_agrees(run_graph(graph, inputs), apply(model, table)(inputs))
    weights = [name for name in graph.graph.initializers if name.startswith("body.up.weight.codes")]
    assert len(weights) == 1


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_all_its_calls_are_integer(traced, backend, tmp_path):
    model, trace = traced
    table = make_table(model, Kind(groups=4, everywhere=True, conditioning_inputs=True))
    write(tmp_path / "model.onnx", *finish_graph(trace.clone(), model, ExportConfig(), table))
    audit = build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", backend).audit
    assert audit.fallen_back == ()


def test_so_it_may_if_only_its_weights_are_integers(traced, tmp_path):
    model, trace = traced
    table = make_table(model, Kind(groups=4, everywhere=True, conditioning_inputs=True))
    sites = tuple(site for site in table.sites if (site.module, site.role) != ("body.up", "input"))
    write(tmp_path / "m.onnx", *finish_graph(trace.clone(), model, ExportConfig(), replace(table, sites=sites)))
    audit = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", "onnxruntime").audit
    assert audit.fallen_back == ()
