"""Rounding in two regions as OpenVINO gets it: a chain with the values of MultiRegionSoftmax."""

import numpy as np
import onnx
import onnx.inliner
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

from tqdit.engines.backends.openvino.two_regions import chain_two_regions
from tqdit.plugins import DOMAIN, VERSION
from tqdit.plugins.multi_region_numerator import schema as numerator
from tqdit.plugins.multi_region_numerator.reference import multi_region_numerator
from tqdit.plugins.multi_region_softmax import schema as softmax
from tqdit.plugins.multi_region_softmax.reference import multi_region_softmax

OPS = {softmax: multi_region_softmax, numerator: lambda *given: multi_region_numerator(*given)[0]}


def graph_of(schema, table, bits, high_scale):
    """scores (B, 2, 8, 16), index (B,) of a low scale -> values in two regions."""
    names = ["out", "reciprocals"][: 1 + (schema is numerator)]
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["low"]),
        helper.make_node(schema.OP_TYPE, ["scores", "low"], names, domain=DOMAIN, bits=bits, high_scale=high_scale),
    ]
    shape = ["batch", 2, 8, 16]
    inputs = [helper.make_tensor_value_info(*each) for each in (("scores", 1, shape), ("index", 7, shape[:1]))]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(table, "table")])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[schema.body()], ir_version=10)
    return openvino.Core().read_model(onnx.inliner.inline_local_functions(model).SerializeToString())


def exact(bits):
    return 1 / ((1 << (bits - 1)) - 1)


def scores_of(rows):
    scores = 4 * np.random.default_rng(0).normal(size=(rows, 2, 8, 16)).astype(np.float32)
    scores[..., 3] = -1e30  # a masked key
    return scores


def call(graph, scores, index):
    return openvino.compile_model(graph, "CPU")({"scores": scores, "index": index})["out"]


def kinds(graph):
    return [node.get_type_name() for node in graph.get_ops()]


@pytest.mark.parametrize("schema", OPS, ids=lambda schema: schema.OP_TYPE)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_chain_has_the_values_of_the_op(schema, bits):
    """Each image has another low scale, of all that a calibration tries; what a mask hides stays exactly 0."""
    table = np.float32(exact(bits)) * np.float32(2) ** -np.arange(bits, dtype=np.float32)
    graph = graph_of(schema, table, bits, exact(bits))
    chain_two_regions(openvino, graph)
    assert kinds(graph).count("PRelu") == 2
    assert "Maximum" not in kinds(graph)
    scores = scores_of(bits)
    found = call(graph, scores, np.arange(bits))
    np.testing.assert_allclose(found, OPS[schema](scores, table, bits, exact(bits)), rtol=0, atol=2e-7)
    assert not found[..., 3].any()


@pytest.mark.parametrize(
    ("table", "high_scale"),
    [
        ([exact(8), exact(8) / 3], exact(8)),  # no power of two
        ([exact(8), exact(8) / 256], exact(8)),  # the joint value is on no coarse grid
        ([1 / 128, 1 / 256], 1 / 128),  # the paper's, which clips its top code
    ],
)
def test_scales_that_no_chain_can_have_keep_the_op(table, high_scale):
    table = np.array(table, np.float32)
    graph = graph_of(softmax, table, 8, high_scale)
    before = kinds(graph)
    chain_two_regions(openvino, graph)
    assert kinds(graph) == before
    scores = scores_of(2)
    found = call(graph, scores, np.arange(2))
    np.testing.assert_allclose(found, multi_region_softmax(scores, table, 8, high_scale), rtol=0, atol=2e-7)


def test_a_scale_that_is_no_constant_keeps_the_op():
    graph = graph_of(softmax, np.array([exact(8)], np.float32), 8, exact(8))
    (gather,) = (node for node in graph.get_ops() if node.get_type_name() == "Gather")
    scale = openvino.opset8.parameter([-1], np.float32, "scale")
    gather.output(0).replace(scale.output(0))
    graph.add_parameters([scale])
    chain_two_regions(openvino, graph)
    assert "PRelu" not in kinds(graph)
