"""A linear layer on joined columns is exported as the sum of its parts, each with scales of its own."""

import numpy as np
import pytest
import torch

from networks import Parallel, Tokens, described, run_graph
from support import assert_agrees
from tables import Kind, make_table, random_rows
from tqdit.exporter.graph import ExportConfig, finish_graph, trace_graph
from tqdit.quantization.fake_quant import apply

pytestmark = pytest.mark.slow

KINDS = {"W8A8": Kind(), "W4A6, 4 groups": Kind(4, 6, groups=4, everywhere=True)}


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = described(Tokens(Parallel()), (4, 6))
    return model, trace_graph(model, ExportConfig())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_export_equals_the_fake_quantized_network(traced, kind):
    model, trace = traced
    table, inputs = make_table(model, kind), random_rows(model.signature, 24, last=1)
    schemes = {site.name: site.quantizer.scheme for site in table.sites if "columns" in site.name}
    assert schemes["body.proj_out.columns.0.input"] == "symmetric"
    assert schemes["body.proj_out.columns.1.input"] == "gelu"
    graph, card = finish_graph(trace.clone(), model, ExportConfig(), table)
    assert_agrees(run_graph(graph, inputs), apply(model, table)(inputs), kind.activation_bits)
    kinds = {node.op_type for node in graph.graph}
    assert not kinds & {"Concat", "Split"}  # what would be joined is not
    assert {card.quantization.products[f"body.proj_out.columns.{part}"] for part in (0, 1)} == {"integer"}


def test_the_float_graph_computes_the_network(traced):
    model, trace = traced
    inputs = random_rows(model.signature, 8, last=1)
    graph, _ = finish_graph(trace.clone(), model, ExportConfig(), None)
    np.testing.assert_allclose(run_graph(graph, inputs), model(inputs), rtol=1e-4, atol=1e-5)
