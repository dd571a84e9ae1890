"""The optimizer of traces: torch's own result, in a time that grows with the graph and not with its square."""

import sys

import onnx_ir as ir
import pytest
import torch
from onnxscript.optimizer import optimize_ir
from torch import nn

from tqdit.exporter.optimize import optimize
from tqdit.exporter.trace import trace

pytestmark = pytest.mark.slow


class Call(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network.eval()

    def forward(self, *inputs):
        return self.network(*inputs)


def calls_of(function, *arguments):
    """How many Python functions a call enters: a measure of work that no other process disturbs."""
    count = 0

    def enter(_frame, event, _argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(enter)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count


def halves(blocks):
    """A graph whose every block takes and adds two halves, as rotary embeddings do."""
    lines = "".join(
        f"""
        a{i} = Slice(x{i}, begin, middle, axis)
        b{i} = Slice(x{i}, middle, end, axis)
        x{i + 1} = Concat<axis=1>(b{i}, a{i})"""
        for i in range(blocks)
    )
    return ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        halves (float[N, 4] x0) => (float[N, 4] x{blocks})
        <int64[1] begin = {{0}}, int64[1] middle = {{2}}, int64[1] end = {{4}}, int64[1] axis = {{1}}> {{{lines}
        }}""")


def test_twice_the_blocks_are_twice_the_work():
    calls_of(optimize, halves(1))  # what is done once for all
    once, twice = (calls_of(optimize, halves(blocks)) for blocks in (40, 80))
    assert 1.8 < twice / once < 2.2


def test_it_gives_what_torchs_own_optimizer_gives(network, monkeypatch):
    """torch.onnx calls `optimize_ir` for an opset before 23."""
    graphs = []
    monkeypatch.setattr("tqdit.exporter.trace.optimize", lambda graph: graphs.extend([graph.clone(), graph.clone()]))
    inputs = {"x": torch.zeros(3, 4, 8, 8), "t": torch.zeros(3, dtype=torch.int64), "y": torch.zeros(3).long()}
    plain = trace(Call(network), inputs, "prediction")
    for each, graph in zip((optimize, optimize_ir), graphs, strict=True):
        each(graph)
    ours, theirs = (ir.to_proto(graph).SerializeToString(deterministic=True) for graph in graphs)
    assert ours == theirs
    assert len(graphs[0].graph) < len(plain.graph)
