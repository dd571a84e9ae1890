"""Programs that torch's ONNX exporter refuses or gets wrong without our passes: the graph computes the module."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from tqdit.exporter.trace import fixed_rows, trace, trace_any_rows

pytestmark = pytest.mark.slow


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.full((4,), 0.5))

    def forward(self, *inputs):
        x, mask = inputs
        return self.function(x * self.weight, mask)


def chosen_masks(x, mask):
    keep = torch.where(mask[:, :1] > 0, mask > 0, mask < 1)
    return x * keep.to(x.dtype)


def filled_masks(x, mask):
    keep = (mask > 0).masked_fill(mask > 5, False).masked_fill(mask < 1, True)
    return x * keep.to(x.dtype)


def tiny_epsilon(x, mask):
    return mask * 1e-12 / (torch.relu(-x.abs()) + 1e-12)


def complex_table(x, mask):
    turns = torch.polar(torch.ones(2), torch.tensor([0.3, 1.2]))
    pairs = torch.view_as_real(turns)
    return torch.stack([x[:, ::2] * pairs[:, 0], x[:, 1::2] * pairs[:, 1]], -1).flatten(1) + mask


def idle_squeeze(x, mask):
    return (x[:, None, :].squeeze(2).squeeze(1) + mask).squeeze(-1)


def autocast(x, mask):
    with torch.autocast("cpu", enabled=False):
        return (x + mask).float()


def in_place(x, mask):
    table = torch.zeros_like(x)
    table[:, 1:] = x[:, :-1]
    table += mask
    return table


FUNCTIONS = [chosen_masks, filled_masks, tiny_epsilon, complex_table, idle_squeeze, autocast, in_place]


def inputs(rows):
    draw = np.random.default_rng(0)
    return draw.standard_normal((rows, 4)).astype(np.float32), draw.integers(0, 8, (rows, 4))


def run(graph, x, mask, tmp_path):
    ir.save(graph, tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "mask": mask})[0]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_graph_computes_the_module_for_any_number_of_rows(function, tmp_path):
    module = Module(function)
    example = {name: torch.from_numpy(array) for name, array in zip(("x", "mask"), inputs(3), strict=True)}
    graph = trace(module, example, "y", 20)
    for rows in (2, 5):
        x, mask = inputs(rows)
        with torch.no_grad():
            expected = module(torch.from_numpy(x), torch.from_numpy(mask)).numpy()
        np.testing.assert_allclose(run(graph, x, mask, tmp_path), expected, rtol=1e-5, atol=1e-7)


def test_a_module_that_looks_at_its_rows_is_traced_with_one(tmp_path):
    module = Module(lambda x, mask: torch.stack([row + other for row, other in zip(list(x), list(mask), strict=True)]))
    x, mask = inputs(3)
    graph = trace_any_rows(module, {"x": torch.from_numpy(x), "mask": torch.from_numpy(mask)}, "y", 20)
    assert fixed_rows(graph) == 1
    np.testing.assert_allclose(run(graph, x[:1], mask[:1], tmp_path), x[:1] * 0.5 + mask[:1], rtol=1e-6)
