"""A quantized file without its quantization: the float network with quantized weights."""

import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import support
from tables import Kind, make_table
from tqdit.engines.build.strip import strip_quantization
from tqdit.errors import UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.graph_names import SCOPE_KEY
from tqdit.onnx_file import read_card
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.fold import fold

KINDS = {
    "W8A8": Kind(groups=10),
    "numerators, 10 groups": Kind(groups=10, numerators=True),
    "groups everywhere": Kind(groups=5, everywhere=True),
    "asymmetric": Kind(asymmetric=True, groups=3, everywhere=True),
    "asymmetric, one group": Kind(asymmetric=True),
    "W4A6": Kind(weight_bits=4, activation_bits=6, conditioning_inputs=True),
    "equalised": Kind(groups=4, everywhere=True, equalised=True),
    "dynamic": Kind(dynamic=True, conditioning_inputs=True),
    "dynamic, asymmetric": Kind(dynamic=True, asymmetric=True),
}


def stripped_file(tmp_path, table, attention="simulated", origin="published", graph="denoiser"):
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(graph, attention=attention), origin, table=table))
    model = ir.load(path)
    strip_quantization(model, read_card(path))
    ir.save(model, tmp_path / "stripped.onnx")
    return tmp_path / "stripped.onnx"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "attention"), support.few(
    [
        *((kind, "simulated") for kind in KINDS),
        *((kind, attention) for kind in ("groups everywhere", "asymmetric") for attention in ("integer", "float")),
    ],
    ("numerators, 10 groups", "simulated"), ("asymmetric", "integer"), ("groups everywhere", "float"),
    ("equalised", "simulated"), ("W4A6", "simulated"), ("dynamic, asymmetric", "simulated"),
))  # fmt: skip
def test_it_computes_the_network_with_quantized_weights(tmp_path, kind, attention):
    """Float sums in another order: 1e-4 of the output, relative."""
    import onnxruntime as ort

    model = support.tiny_model()
    table = make_table(model, KINDS[kind])
    path = stripped_file(tmp_path, table, attention)
    with torch.no_grad():
        folded, plain = fold(model, table)
        weights = replace(plain, sites=tuple(site for site in plain.sites if site.role == "weight"))
        quantized = apply(folded, weights).network
        rng = np.random.default_rng(0)
        inputs = {"x": rng.standard_normal((5, 4, 8, 8), np.float32), "timestep": np.array([0, 180, 420, 700, 999]),
                  "class_labels": np.arange(5)}  # fmt: skip
        expected = quantized(**{name: torch.from_numpy(values) for name, values in inputs.items()}).numpy()
    found = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize(("origin", "attention"), support.few(
    itertools.product(["published", "diffusers"], ["simulated", "integer"]), ("published", "simulated"),
    ("published", "integer"),
))  # fmt: skip
def test_nothing_of_the_quantization_is_left(tmp_path, origin, attention):
    table = make_table(support.tiny_model(origin), Kind(asymmetric=True, groups=3, everywhere=True))
    path = stripped_file(tmp_path, table, attention, origin, "step")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert not any("Linear" in node.op_type for node in model.graph.node)
    assert not any(tensor.data_type == onnx.TensorProto.INT8 for tensor in model.graph.initializer)
    names = sorted(node.name for node in model.graph.node if node.op_type == "MatMul")
    modules = read_card(path).quantization.products
    assert names == sorted(f"{module}/MatMul.float" for module in modules)  # each once, whatever its regions were


@pytest.mark.slow
def test_a_form_that_it_does_not_know_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    write(path, *support.exported(table=make_table(support.tiny_model(), Kind())))
    model = ir.load(path)
    product = next(node for node in model.graph if node.name == "blocks.0.mlp.fc1/MatMul")
    product.metadata_props[SCOPE_KEY] = "elsewhere"
    with pytest.raises(UsageError, match=r"'blocks\.0\.mlp\.fc1' cannot be stripped"):
        strip_quantization(model, read_card(path))
