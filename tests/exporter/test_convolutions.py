"""Convolutions whose stride is their kernel are linear layers on patches, in one, two and three dimensions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from networks import Convolutions, described, run_graph
from support import assert_agrees
from tables import Kind, make_table, random_rows
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.layers import plan
from tqdit.exporter.graph import ExportConfig, finish_graph, trace_graph
from tqdit.quantization.fake_quant import apply

pytestmark = pytest.mark.slow

ROWS = 24
ON_PATCHES = {"patches", "expand", "shrink", "pairs", "out"}


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    network = Convolutions()
    for parameter in network.parameters():
        parameter.data *= 2
    model = described(network, (4, 2, 4, 7))
    return model, trace_graph(model, ExportConfig())


@pytest.mark.parametrize(
    "kind",
    [Kind(), Kind(groups=4, everywhere=True, asymmetric=True), Kind(dynamic=True), Kind(dynamic=True, asymmetric=True)],
    ids=["W8A8", "asymmetric, 4 groups", "dynamic", "dynamic, asymmetric"],
)
def test_an_export_equals_the_fake_quantized_network(traced, kind):
    model, trace = traced
    table = make_table(model, kind)
    assert {site.module for site in table.sites} == ON_PATCHES | {"time"}
    graph, card = finish_graph(trace.clone(), model, ExportConfig(), table)
    inputs = random_rows(model.signature, ROWS, last=1)
    expected = apply(model, table)(inputs)
    assert_agrees(run_graph(graph, inputs), expected)
    assert np.linalg.norm(expected - model(inputs)) > 1e-3 * np.linalg.norm(expected)
    kinds = [node.op_type for node in graph.graph]
    assert kinds.count("Conv") == 3
    assert kinds.count("MatMul") + kinds.count("Gemm") == len(ON_PATCHES) + 1
    products = card.quantization.products
    assert {name for name, form in products.items() if form == "integer"} == ON_PATCHES
    assert {name for name, form in products.items() if form == "float"} == {"depthwise", "strided", "dilated"}
    assert "3 float" in card.quantization.summary


def test_a_calibration_plans_them(traced):
    model, _ = traced
    plans = {each.name: set(each.operands) for each in plan(model, replace(QuantizationConfig(), patch="all"))}
    assert {name for name, roles in plans.items() if roles == {"weight", "input"}} == ON_PATCHES
    assert "depthwise" not in plans
