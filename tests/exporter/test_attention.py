"""Attention of every kind that `scaled_dot_product_attention` computes: each form of export equals the fake-quantized
network.

Tolerance as in test_quantized.py: a code may flip where the last bit of a float operation decides a rounding tie.
"""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks import WIDTH, Tokens, described, run_graph
from support import assert_agrees, few
from tables import Kind, make_table, random_rows
from tqdit.engines.build.cast import cast_floats
from tqdit.exporter.graph import ExportConfig, finish_graph, trace_graph
from tqdit.ports import Port
from tqdit.quantization.fake_quant import apply

pytestmark = pytest.mark.slow

TOKENS, HEADS, ROWS = 6, 2, 24
attend = F.scaled_dot_product_attention


def key_mask(q, k, v, keys):
    """Padding, as diffusers' text encoders hand it over: 0 or -10000 for each key."""
    return attend(q, k, v, ((1 - keys) * -10000)[:, None, None])


def query_mask(q, k, v, keys):
    """Booleans for each query and key; a padded query sees no key."""
    seen = keys.bool()
    return attend(q, k, v, (seen[:, None, :, None] & seen[:, None, None]).expand(-1, HEADS, -1, -1))


def bias(q, k, v, keys):
    """A constant of two dimensions."""
    return attend(q, k, v, torch.linspace(-3, 3, TOKENS * TOKENS).reshape(TOKENS, TOKENS))


def twice(q, k, v, keys):
    """Two attentions of one module."""
    return attend(attend(q, k, v), k, v)


ATTENTIONS = {
    "plain": lambda q, k, v, _keys: attend(q, k, v),
    "key_mask": key_mask,
    "query_mask": query_mask,
    "bias": bias,
    "causal": lambda q, k, v, _keys: attend(q, k, v, is_causal=True),
    "scale": lambda q, k, v, _keys: attend(q, k, v, scale=0.7),
    "grouped_heads": lambda q, k, v, _keys: attend(q, k[:, :1], v[:, :1], enable_gqa=True),
    "twice": twice,
}


class Attention(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.name = name

    def forward(self, x, keys):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(ATTENTIONS[self.name](q, k, v, keys).transpose(1, 2).flatten(2))


class Attentions(nn.Module):
    def __init__(self):
        super().__init__()
        self.each = nn.ModuleDict({name: Attention(name) for name in ATTENTIONS})

    def forward(self, x, keys):
        for attention in self.each.values():
            x = attention(x, keys)
        return self.each["key_mask"](x, keys)  # called a second time


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    network = Tokens(Attentions())
    for parameter in network.parameters():
        parameter.data *= 2
    model = described(network, (4, TOKENS), Port("keys", "request", "float32", (None, TOKENS)))
    return model, trace_graph(model, ExportConfig())


def some_rows(model):
    """Rows in every group of timesteps, with masks of 1 to all keys."""
    inputs = random_rows(model.signature, ROWS, last=1)
    inputs["keys"] = (np.arange(TOKENS) <= np.arange(ROWS)[:, None] % TOKENS).astype(np.float32)
    return inputs


KINDS = {
    "W8A8": Kind(),
    "4 groups everywhere": Kind(groups=4, everywhere=True),
    "numerators": Kind(numerators=True),
    "numerators, 4 groups everywhere": Kind(groups=4, everywhere=True, numerators=True),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("form", few(["simulated", "fused", "integer"], "fused", "integer"))
def test_each_form_equals_the_fake_quantized_network(traced, form, kind):
    model, trace = traced
    inputs = some_rows(model)
    table = make_table(model, kind)
    graph, _ = finish_graph(trace.clone(), model, ExportConfig(attention=form), table)
    expected = apply(model, table)(inputs)
    assert_agrees(run_graph(graph, inputs), expected)
    assert np.linalg.norm(expected - model(inputs)) > 1e-3 * np.linalg.norm(expected)  # it is quantized at all
    op_type = f"MultiRegion{'Numerator' if kind.numerators else ''}IntegerAttention"
    fused = [node for node in graph.graph if node.op_type == op_type]
    assert len(fused) == (len(ATTENTIONS) + 2 if form == "fused" else 0)


@pytest.mark.parametrize(("form", "numerators"), few(
    [(form, numerators) for form in ("simulated", "fused") for numerators in (False, True)],
    ("simulated", False), ("fused", True),
))  # fmt: skip
def test_masks_stay_float32_in_a_float16_graph(traced, form, numerators):
    """-1e30 is beyond float16. 5 % of the output (relative L2) leaves room for flipped codes of nine attentions."""
    model, trace = traced
    inputs = some_rows(model)
    table = make_table(model, Kind(numerators=numerators))
    graph, card = finish_graph(trace.clone(), model, ExportConfig(attention=form), table)
    expected = run_graph(graph, inputs)
    graph = ir.from_proto(ir.to_proto(graph))  # as a builder reads it
    cast_floats(graph, card, "fp16")
    assert np.linalg.norm(run_graph(graph, inputs) - expected) <= 0.05 * np.linalg.norm(expected)
