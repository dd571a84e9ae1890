"""The forecast of an engine: the graph without its blocks, which takes their residual as an input.

The ONNX file holds the full call alone (`tqdit-export --forecast`); the forecast is cut out of it when it is built, so
both have the same weights, scales and float type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from tqdit.card import GraphCard
from tqdit.errors import FileFormatError
from tqdit.files import temporary_folder
from tqdit.graph_names import scope_of
from tqdit.onnx_file import OnnxFile, save
from tqdit.sampling.forecasts import RESIDUAL

FLOAT32 = ir.DataType.FLOAT


@contextmanager
def forecast_file(file: OnnxFile, card: GraphCard, output: Path) -> Iterator[tuple[OnnxFile, GraphCard]]:
    """The forecast of a file with a residual, as a temporary file, and its card."""
    model = file.to_ir()
    cut_blocks(model, str(file.path))
    scopes = {scope_of(node) for node in model.graph}
    quantization = card.quantization
    if quantization is not None:
        products = {module: form for module, form in quantization.products.items() if module in scopes}
        quantization = replace(quantization, products=products)
    with temporary_folder(output.with_name(f"{output.name}.forecast")) as folder:
        path = folder / file.path.name
        saved = OnnxFile(path, save(model, path))
        del model  # gigabytes that the compiler may need
        yield saved, replace(card, graph="forecast", quantization=quantization, vae=None, text=None)


def cut_blocks(model: ir.Model, where: str) -> None:
    """Make the output `residual` an input, with which the tokens after the blocks are made of those before them.

    Ensures: the inputs are those that the forecast needs, and the residual. Raises FileFormatError if the prediction
    does not depend on the tokens that the residual is of.
    """
    graph = model.graph
    value = next(each for each in graph.outputs if each.name == RESIDUAL)
    difference = value.producer()
    if difference is None or difference.op_type != "Sub":
        raise FileFormatError(f"{where}: '{RESIDUAL}' is not a difference of tokens. Export again.")
    after, before = difference.inputs
    assert after is not None
    assert before is not None
    graph.outputs.remove(value)
    value.name = f"{RESIDUAL}.full"
    given = ir.Value(name=RESIDUAL, shape=value.shape, type=ir.TensorType(FLOAT32))
    graph.inputs.append(given)
    tokens = ir.node("Add", [before, given], name=f"{RESIDUAL}/Add")
    made, cast = tokens.outputs[0], after.producer()
    nodes = [tokens]
    if cast is not None and cast.op_type == "Cast":  # the residual is float32 in a graph of another type
        after = cast.inputs[0]
        assert after is not None
        assert after.dtype is not None
        nodes.append(ir.node("Cast", [made], {"to": after.dtype}, name=f"{RESIDUAL}/Cast"))
        made = nodes[-1].outputs[0]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].shape = f"{node.name}:0", after.shape
    tokens.outputs[0].type, made.type = ir.TensorType(FLOAT32), after.type
    graph.insert_after(difference, nodes)
    after.replace_all_uses_with(made)
    graph.remove(difference, safe=False)
    graph.sort()
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    RemoveUnusedOpsetsPass()(model)
    if not given.uses():
        raise FileFormatError(f"{where}: its prediction does not depend on the tokens after its blocks. Export again.")
    for unused in [each for each in graph.inputs if not each.uses()]:
        graph.inputs.remove(unused)
    model.metadata_props.clear()
