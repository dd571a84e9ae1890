"""The forecast of an engine: the graph without its blocks, which takes their residual as an input.

The ONNX file holds the full call alone (`tqdit-export --forecast`); the forecast is cut out of it when it is built, so
both have the same weights, scales and float type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from tqdit.card import GraphCard
from tqdit.engines.run.backend import Engine
from tqdit.errors import FileFormatError, VerificationError
from tqdit.files import temporary_folder
from tqdit.golden import GoldenCalls, relative_errors
from tqdit.graph_names import scope_of
from tqdit.onnx_file import OnnxFile, save
from tqdit.sampling.forecasts import RESIDUAL

FLOAT32 = ir.DataType.FLOAT
LIMIT = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 1e-2}  # of a forecast with the true residual, against the full call


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


def check_forecast(
    full: Engine, forecast: Engine, card: GraphCard, golden: GoldenCalls | None, float_type: str
) -> None:
    """Raise VerificationError unless a forecast with the residual of a full call gives the prediction of that call.

    The inputs are those of a golden call, or normal numbers if there is none.
    """
    rows = card.rows_per_image
    if golden is not None:
        inputs = {name: np.repeat(array[:1], rows, axis=0) for name, array in golden.inputs.items()}
    else:
        generator = np.random.default_rng(0)
        inputs = card.signature.zeros(rows)
        for name in (card.signature.state.name, *(port.name for port in card.signature.requests)):
            if inputs[name].dtype == np.float32:
                inputs[name] = generator.standard_normal(inputs[name].shape, np.float32)
        middle = sum(card.sampling.process.span) / 2
        time = inputs[card.signature.time.name]
        time[...] = middle if np.isfinite(middle) else 1
    prediction, residual = full.outputs(inputs)
    found = relative_errors(forecast({**inputs, RESIDUAL: residual}), prediction).max()
    if not found <= LIMIT[float_type]:
        raise VerificationError(
            f"a forecast with the residual of a full call is {found:.1e} from that call's prediction, expected at most "
            f"{LIMIT[float_type]:.0e}. Export the model without --forecast."
        )
